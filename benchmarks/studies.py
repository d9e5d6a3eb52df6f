"""The paper's studies (its section 4 and appendix C.1) on a task that trains in seconds: digits with few labels.

The model, the data and the training are the quickstart's. Every variant runs with the same seeds, twice: for as many
steps as plain training, and for as many seconds; the checkpoint with the lowest validation loss is tested. Runs are
kept in a file as they end, so that a command which is stopped goes on where it was when it is given again.

    python studies.py                             # all variants, 5 seeds: about an hour on two cores
    python studies.py --variants "plain;alpha=5" --seeds 2 --out some.json
    python studies.py --table                     # prints what the file holds
    python studies.py --pictures ../docs          # draws it
"""

import argparse
import functools
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import statistics
import sys

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import rdrop_keras

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))
import quickstart  # noqa: E402

ALPHA = 3.0
DROPOUT = 0.1
EPOCHS = quickstart.EPOCHS
CURVES = ("consistency_loss", "loss", "task_loss", "val_accuracy", "val_loss")
PICTURES = {
    "alpha": ["plain", "alpha=1", "alpha=3", "alpha=10", "alpha warmed up"],
    "steps-and-passes": ["plain", "alpha=3", "every=5", "num_passes=3"],
}
MEASURES = ("test accuracy", "test loss", "validation loss", "seconds a step", "seconds", "epochs")


def warmed_up(num_steps):
    """α from 0 to `ALPHA` over the first third of training."""
    return keras.optimizers.schedules.PolynomialDecay(0.0, num_steps / 3, ALPHA)


def rdrop(num_steps, **options):
    options = {key: value(num_steps) if key == "alpha" and callable(value) else value for key, value in options.items()}
    return lambda model: rdrop_keras.RDropModel(model, **{"alpha": ALPHA, **options})


# Each variant: how many rows a batch has, and from the number of steps a function that wraps the model.
VARIANTS = {
    "plain": (1, lambda num_steps: lambda model: model),
    "plain, 2N rows": (2, lambda num_steps: lambda model: model),
    **{f"alpha={a}": (1, functools.partial(rdrop, alpha=float(a))) for a in (1, 3, 5, 7, 10)},
    **{f"every={k}": (1, functools.partial(rdrop, every=k)) for k in (2, 5, 10)},
    "num_passes=3": (1, functools.partial(rdrop, num_passes=3)),
    **{
        f"dropout_rates={rates}": (1, functools.partial(rdrop, dropout_rates=rates))
        for rates in ((0.1, 0.3), (0.1, 0.5), (0.3, 0.3), (0.3, 0.5), (0.5, 0.5))
    },
    "share up to block 1": (1, functools.partial(rdrop, share="add_1")),
    "KLBudget(0.02)": (1, functools.partial(rdrop, alpha=lambda _: rdrop_keras.KLBudget(0.02, initial=0.0))),
    "KLBudget(0.05)": (1, functools.partial(rdrop, alpha=lambda _: rdrop_keras.KLBudget(0.05, initial=0.0))),
    "alpha warmed up": (1, functools.partial(rdrop, alpha=warmed_up)),
}


def run(variant, seed, epochs, data):
    """Trains once, and tests the checkpoint with the lowest validation loss."""
    train_split, validation_split, test_split = data
    rows, wrap = VARIANTS[variant]
    batch_size = rows * quickstart.BATCH_SIZE
    steps_per_epoch = math.ceil(quickstart.NUM_TRAIN / batch_size)
    num_steps = epochs * steps_per_epoch
    keras.utils.clear_session()  # Layers have the same names in every run.
    keras.utils.set_random_seed(seed)
    model = wrap(num_steps)(quickstart.build_model(DROPOUT))
    learning_rate = keras.optimizers.schedules.CosineDecay(quickstart.LEARNING_RATE, decay_steps=num_steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(learning_rate), loss, metrics=["accuracy"])
    steps = StepSeconds()
    best = keras.callbacks.EarlyStopping("val_loss", patience=epochs, restore_best_weights=True)
    history = model.fit(
        *train_split,
        batch_size=batch_size,
        epochs=epochs,
        validation_data=validation_split,
        validation_batch_size=quickstart.NUM_VALIDATION,
        callbacks=[steps, best],
        verbose=0,
    ).history
    test_loss, test_accuracy = model.evaluate(*test_split, batch_size=quickstart.NUM_VALIDATION, verbose=0)
    median = statistics.median(steps.seconds)
    return {
        "test accuracy": test_accuracy,
        "test loss": test_loss,
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
        self.start = quickstart.time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])
        self.seconds.append(quickstart.time.perf_counter() - self.start)


class Results:
    """The runs made so far, in a JSON file: `{variant: {budget: {seed: result}}}`."""

    def __init__(self, path):
        self.path = path
        self.content = {"runs": {}}
        if path.exists():
            self.content = json.loads(path.read_text(encoding="utf-8"))
        self.runs = self.content["runs"]

    def get(self, variant, budget):
        return self.runs.setdefault(variant, {}).setdefault(budget, {})

    def save(self, args):
        packages = (
            "keras",
            "numpy",
            "tensorflow" if keras.backend.backend() == "tensorflow" else keras.backend.backend(),
        )
        self.content.update(
            command=" ".join(["python", "benchmarks/studies.py", *sys.argv[1:]]),
            seeds=args.seeds,
            dropout=DROPOUT,
            versions={"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
            hardware=f"{usable_cores()} of {os.cpu_count()} CPU cores",
        )
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        temporary.replace(self.path)


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def steps_of_plain(variant):
    """Epochs in which `variant` makes as many steps as plain training."""
    return EPOCHS * VARIANTS[variant][0]


def seconds_of_plain(results, variant):
    """Epochs that take as long as plain training, by the steps already timed."""
    plain = statistics.median(r["seconds"] for r in results.get("plain", "steps").values())
    own = statistics.median(r["seconds"] for r in results.get(variant, "steps").values())
    return max(1, round(steps_of_plain(variant) * plain / own))


def table(results):
    lines = [
        "| | test accuracy | test loss | step, × plain | same seconds: test accuracy | test loss | epochs |",
        "|---|---|---|---|---|---|---|",
    ]
    plain = results.get("plain", "steps").values()
    for variant in results.runs:
        cells = [variant]
        for budget in ("steps", "seconds"):
            runs = list(results.get(variant, budget).values())
            for measure in ("test accuracy", "test loss"):
                cells.append(mean_and_deviation([r[measure] for r in runs]))
            if budget == "steps":
                base = statistics.median(r["seconds a step"] for r in plain)
                cells.append(f"{statistics.median(r['seconds a step'] for r in runs) / base:.2f}")
            else:
                cells.append(str(runs[0]["epochs"]) if runs else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results, folder):
    """Curves over epochs and seconds, of as many steps each; of the seconds, a run's mean time of an epoch is taken."""
    for name, variants in PICTURES.items():
        histories = {}
        for variant in variants:
            runs = results.get(variant, "steps").values()
            curves = [
                {**r["curves"], "seconds": [r["seconds"] * (i + 1) / r["epochs"] for i in range(r["epochs"])]}
                for r in runs
            ]
            histories[variant] = [{key: c[key] for key in c if key in (*CURVES, "seconds")} for c in curves]
        rdrop_keras.plot.compare(histories, folder / f"studies-{name}.png")


def mean_and_deviation(values):
    if not values:
        return ""
    mean = statistics.mean(values)
    return f"{mean:.3f}" if len(values) < 2 else f"{mean:.3f} ± {statistics.stdev(values):.3f}"


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", help=f"separated by ';', of: {'; '.join(VARIANTS)}")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "studies.json")
    parser.add_argument("--table", action="store_true", help="print the results in the file and stop")
    parser.add_argument("--pictures", type=pathlib.Path, metavar="FOLDER", help="draw the results in the file and stop")
    args = parser.parse_args()
    args.variants = list(VARIANTS) if args.variants is None else args.variants.split(";")
    unknown = [variant for variant in args.variants if variant not in VARIANTS]
    if unknown:
        parser.error(f"unknown --variants {'; '.join(unknown)}: choose from {'; '.join(VARIANTS)}")
    if args.seeds < 1:
        parser.error(f"--seeds must be ≥ 1. Received: {args.seeds}")
    return args


def main():
    args = arguments()
    results = Results(args.out)
    if args.pictures is not None:
        draw(results, args.pictures)
    elif not args.table:
        data = quickstart.load_data()
        for budget, epochs_of in (
            ("steps", lambda v: steps_of_plain(v)),
            ("seconds", lambda v: seconds_of_plain(results, v)),
        ):
            for variant in args.variants:
                if budget == "seconds" and variant == "plain":
                    continue
                done = results.get(variant, budget)
                for seed in range(args.seeds):
                    if str(seed) not in done:
                        done[str(seed)] = run(variant, seed, epochs_of(variant), data)
                        results.save(args)
                        shown = {m: round(done[str(seed)][m], 4) for m in MEASURES}
                        print(f"{variant}, same {budget}, seed {seed}: {shown}", flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
