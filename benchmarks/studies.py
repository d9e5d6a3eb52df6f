"""The paper's studies (its section 4 and appendix C.1) on two tasks small enough for a CPU.

`digits` is a small vision Transformer on 400 images of digits (`digits.py`), which trains in seconds.
`translation` is the small Transformer of `translation.py` on local tables of sentence pairs. Every variant
runs with the same seeds, twice: for as many steps as plain training, and for as many seconds; the checkpoint with the
lowest validation loss is tested. Runs are kept in a file as they end, so that a command which is stopped goes on where
it was when it is given again.

    python studies.py                             # all variants, 5 seeds: about an hour on two cores
    python studies.py --variants "plain;alpha=5" --seeds 2 --out some.json
    python studies.py --task translation --data DIR --variants "plain;alpha=1;alpha=5" --seeds 1
    python studies.py --table                     # prints what the file holds
    python studies.py --pictures ../docs          # draws it
"""

import argparse
import math
import os
import pathlib
import statistics
import time

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import measure
import rdrop_keras

ROOT = pathlib.Path(__file__).resolve().parents[1]

CURVES = ("consistency_loss", "loss", "task_loss", "val_accuracy", "val_loss")


# ## The tasks
#
# Each has the options of its variants, the size of its training, and the data, model, compilation and test of one run.
class Digits:
    alpha, dropout, share, budgets = 3.0, 0.1, "add_1", (0.02, 0.05)
    measures = ("test accuracy", "test loss")
    pictures = (
        ("alpha", ("plain", "alpha=1", "alpha=3", "alpha=10", "alpha warmed up")),
        ("steps-and-passes", ("plain", "alpha=3", "every=5", "num_passes=3")),
    )

    def __init__(self, args):
        import digits

        self.digits = digits
        self.epochs, self.batch_size = digits.EPOCHS, digits.BATCH_SIZE
        self.validation_batch_size = digits.NUM_VALIDATION
        self.train, self.validation, self.test_split = digits.load_data()

    def build(self):
        return self.digits.build_model(self.dropout)

    def compile(self, model, num_steps):
        learning_rate = keras.optimizers.schedules.CosineDecay(self.digits.LEARNING_RATE, decay_steps=num_steps)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])

    def test(self, model, trained):
        loss, accuracy = model.evaluate(*self.test_split, batch_size=self.validation_batch_size, verbose=0)
        return {"test accuracy": accuracy, "test loss": loss}


class Translation:
    alpha, dropout, share, budgets = 5.0, 0.1, "encoder_norm", (0.02, 0.05)
    divergence = rdrop_keras.Divergence("kl", from_logits=True)
    measures = ("test BLEU", "test loss")
    pictures = (("translation", ("plain", "alpha=1", "alpha=5")),)
    epochs, batch_size, validation_batch_size, train_rows, learning_rate = 20, 128, 128, 10_000, 1e-3

    def __init__(self, args):
        import experiment
        import translation

        self.example = translation
        # The example's own settings of its small model, but for what makes it small enough here.
        self.args = argparse.Namespace(
            data=args.data, source=None, target=None, train_rows=self.train_rows, preset="none",
            vocabulary_size=4000, max_length=32, dropout=self.dropout, beams=5, batch_size=self.batch_size,
            epochs=self.epochs, learning_rate=self.learning_rate,
        )  # fmt: skip
        self.texts, _ = translation.load_data(self.args)
        self.proto = translation.train_tokenizer(self.texts["train"], self.args.vocabulary_size)
        splits = {
            name: translation.tokenize(texts, self.proto, self.args.max_length) for name, texts in self.texts.items()
        }
        self.train = experiment.whole_batches(self.args, *splits["train"])
        self.validation, self.test_split = splits["validation"], splits["test"]

    def build(self):
        return self.example.build_translator(self.args)

    def compile(self, model, num_steps):
        warmup = round(0.1 * num_steps)
        learning_rate = keras.optimizers.schedules.CosineDecay(
            0.0, num_steps - warmup, warmup_target=self.learning_rate, warmup_steps=warmup
        )
        self.example.compile_model(model, learning_rate)

    def test(self, model, trained):
        loss = model.evaluate(*self.test_split[:2], sample_weight=self.test_split[2], verbose=0, return_dict=True)[
            "loss"
        ]
        translations = self.example.translate(trained, self.test_split[0]["source"], self.proto, self.args.beams)
        bleu = self.example.sacrebleu.corpus_bleu(translations, [self.texts["test"][1]]).score
        return {"test BLEU": bleu, "test loss": loss}


TASKS = {"digits": Digits, "translation": Translation}


# ## The variants
def variants_of(task):
    """`{name: (how many times plain training's rows a batch has, how a model is wrapped given the steps)}`."""

    def rdrop(**options):
        def wrap(model, num_steps):
            alpha = options.get("alpha", task.alpha)
            alpha = alpha(num_steps) if callable(alpha) else alpha
            divergence = getattr(task, "divergence", "auto")
            return rdrop_keras.RDropModel(model, **{**options, "alpha": alpha, "divergence": divergence})

        return 1, wrap

    def plain(rows):
        return rows, lambda model, num_steps: model

    def budget(target):
        return lambda num_steps: rdrop_keras.KLBudget(target, initial=0.0)

    def warmed_up(num_steps):  # From 0 over the first third of training.
        return keras.optimizers.schedules.PolynomialDecay(0.0, num_steps / 3, task.alpha)

    return {
        "plain": plain(1),
        "plain, 2N rows": plain(2),
        **{f"alpha={a}": rdrop(alpha=float(a)) for a in (1, 3, 5, 7, 10)},
        "alpha warmed up": rdrop(alpha=warmed_up),
        **{f"KLBudget({target})": rdrop(alpha=budget(target)) for target in task.budgets},
        **{f"every={k}": rdrop(every=k) for k in (2, 5, 10)},
        "num_passes=3": rdrop(num_passes=3),
        **{
            f"dropout_rates={rates}": rdrop(dropout_rates=rates)
            for rates in ((0.1, 0.3), (0.1, 0.5), (0.3, 0.3), (0.3, 0.5), (0.5, 0.5))
        },
        f"share up to {task.share}": rdrop(share=task.share),
    }


def run(task, variant, seed, epochs):
    """Trains once, and tests the checkpoint with the lowest validation loss."""
    rows, wrap = variant
    batch_size = rows * task.batch_size
    num_steps = epochs * math.ceil(len(task.train[1]) / batch_size)
    keras.utils.clear_session()  # Layers have the same names in every run.
    keras.utils.set_random_seed(seed)
    trained = task.build()
    # Arrays in a model of the same layers: KerasHub's own tasks do not shuffle them.
    model = wrap(keras.Model(trained.input, trained.output), num_steps)
    task.compile(model, num_steps)
    steps = StepSeconds()
    best = keras.callbacks.EarlyStopping("val_loss", patience=epochs, restore_best_weights=True)
    history = model.fit(
        task.train[0],
        task.train[1],
        sample_weight=task.train[2] if len(task.train) > 2 else None,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=task.validation,
        validation_batch_size=task.validation_batch_size,
        callbacks=[steps, best],
        verbose=0,
    ).history
    median = statistics.median(steps.seconds)
    return {
        **task.test(model, trained),
        "validation loss": min(history["val_loss"]),
        "seconds a step": float(np.mean([s for s in steps.seconds if s < 10 * median])),
        "seconds": float(sum(s for s in steps.seconds if s < 10 * median)),  # Without those that compile.
        "epochs": epochs,
        "curves": {key: [round(v, 4) for v in history[key]] for key in CURVES if key in history},
    }


class StepSeconds(keras.callbacks.Callback):
    """The time of each training step."""

    def on_train_begin(self, logs=None):
        self.seconds = []

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])
        self.seconds.append(time.perf_counter() - self.start)


class Results:
    """The runs made so far, in a JSON file: `{variant: {budget: {seed: result}}}`."""

    def __init__(self, path):
        self.path = path
        self.content = measure.read(path, {"runs": {}})
        self.runs = self.content["runs"]

    def get(self, variant, budget):
        return self.runs.setdefault(variant, {}).setdefault(budget, {})

    def save(self, args, task):
        self.content.update(
            measure.provenance(shown=[(args.data, "DIR")]),
            seeds=args.seeds,
            task=args.task,
            alpha=task.alpha,
            dropout=task.dropout,
            train_rows=len(task.train[1]),
        )
        measure.write(self.path, self.content)


def seconds_of_plain(results, variant, epochs):
    """Epochs that take as long as plain training, by the `epochs` already timed."""
    plain = statistics.median(r["seconds"] for r in results.get("plain", "steps").values())
    own = statistics.median(r["seconds"] for r in results.get(variant, "steps").values())
    return max(1, round(epochs * plain / own))


def table(results, measures):
    first, *others = measures
    columns = ["", *measures, "step, × plain", f"same seconds: {first}", *others, "epochs"]
    lines = [f"| {' | '.join(columns)} |".replace("|  |", "| |"), "|---" * len(columns) + "|"]
    plain = results.get("plain", "steps").values()
    for variant in results.runs:
        cells = [variant]
        for budget in ("steps", "seconds"):
            runs = list(results.get(variant, budget).values())
            for name in measures:
                cells.append(measure.mean_and_deviation([r[name] for r in runs], ".2f" if "BLEU" in name else ".3f"))
            if budget == "steps":
                base = statistics.median(r["seconds a step"] for r in plain)
                cells.append(f"{statistics.median(r['seconds a step'] for r in runs) / base:.2f}")
            else:
                cells.append(str(runs[0]["epochs"]) if runs else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results, pictures, folder):
    """Curves over epochs and seconds, of as many steps each; of the seconds, a run's mean time of an epoch is taken."""
    for name, variants in pictures:
        histories = {}
        for variant in variants:
            runs = results.get(variant, "steps").values()
            curves = [
                {**r["curves"], "seconds": [r["seconds"] * (i + 1) / r["epochs"] for i in range(r["epochs"])]}
                for r in runs
            ]
            histories[variant] = [{key: c[key] for key in c if key in (*CURVES, "seconds")} for c in curves]
        rdrop_keras.plot.compare(histories, folder / f"studies-{name}.png")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS), default="digits")
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR", help="the sentence pairs of --task translation")
    names = {name: list(variants_of(task)) for name, task in TASKS.items()}
    parser.add_argument("--variants", help=f"separated by ';', for digits of: {'; '.join(names['digits'])}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, help="(default: a file of the task in benchmarks/results)")
    parser.add_argument("--table", action="store_true", help="print the results in the file and stop")
    parser.add_argument("--pictures", type=pathlib.Path, metavar="FOLDER", help="draw the results in the file and stop")
    args = parser.parse_args()
    names = names[args.task]
    args.variants = names if args.variants is None else args.variants.split(";")
    unknown = [variant for variant in args.variants if variant not in names]
    if unknown:
        parser.error(f"unknown --variants {'; '.join(unknown)}: choose from {'; '.join(names)}")
    if args.seeds < 1:
        parser.error(f"--seeds must be ≥ 1. Received: {args.seeds}")
    if args.task == "translation" and args.data is None and not args.table and args.pictures is None:
        parser.error("--task translation needs --data, a folder of tables as translation.py reads them")
    if args.out is None:
        name = "studies.json" if args.task == "digits" else f"studies_{args.task}.json"
        args.out = ROOT / "benchmarks" / "results" / name
    return args


def main():
    args = arguments()
    results = Results(args.out)
    if results.content.get("task", args.task) != args.task:
        raise SystemExit(f"{args.out} holds runs of --task {results.content['task']}: give another --out")
    measures = TASKS[args.task].measures
    if args.pictures is not None:
        draw(results, TASKS[args.task].pictures, args.pictures)
    elif not args.table:
        task = TASKS[args.task](args)
        variants = variants_of(task)
        for budget in ("steps", "seconds"):
            for name in args.variants:
                if budget == "seconds" and name == "plain":
                    continue
                rows, _ = variants[name]
                epochs = rows * task.epochs  # As many steps as plain training.
                if budget == "seconds":
                    epochs = seconds_of_plain(results, name, epochs)
                done = results.get(name, budget)
                for seed in range(args.seeds):
                    if str(seed) not in done:
                        done[str(seed)] = run(task, variants[name], seed, epochs)
                        results.save(args, task)
                        shown = {m: round(v, 4) for m, v in done[str(seed)].items() if m != "curves"}
                        print(f"{name}, same {budget}, seed {seed}: {shown}", flush=True)
    print(table(results, measures))


if __name__ == "__main__":
    main()
