"""Do rows without labels help? R-Drop on labelled and unlabelled rows, in the time of plain training.

Three kinds of training have the same processor time on one core: plain training and R-Drop on the labelled rows, and
R-Drop on batches of which a part is labelled. A step of each is timed first, and the number of steps follows from
that. Where two learning rates are tried, each kind has the better by validation loss, with a seed that is not used
again. A run's last weights are tested, and also those with the lowest validation loss. For the digits it is also
measured how the time, α, the share of labelled rows and the views matter.

    python benchmarks/unlabelled.py --tasks digits
    python benchmarks/unlabelled.py --data FOLDER --encoder FOLDER        # all tasks
    python benchmarks/unlabelled_report.py                                # the tables of docs/unlabelled.md

Runs are written as they end; the same command goes on where it was stopped.
"""

import argparse
import functools
import math
import os
import pathlib
import statistics
import time

# JAX takes several times as long to shift images on a processor.
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import ops

import measure
import rdrop_keras
from tasks.unlabelled import ALL, KINDS, PLAIN, TASKS, Setting

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "unlabelled.json"
EPOCHS = 10  # Of a run. Each ends with a look at the validation split.
STEPS_PER_EXECUTION = 10
LABELLED_ROWS = 25  # Of each batch.
SEARCH_SEED = 1000


# ## Training
def loss_of_labelled(y_true, y_pred):
    """Cross-entropy averaged over the labelled rows; a row without a label has −1."""
    labelled = ops.cast(y_true >= 0, y_pred.dtype)
    loss = ops.sparse_categorical_crossentropy(ops.maximum(y_true, 0), y_pred, from_logits=True)
    return ops.divide_no_nan(labelled * loss, ops.mean(labelled))


def compiled(task, setting):
    divergence = rdrop_keras.Divergence("kl", from_logits=True)
    alpha = 0 if setting.kind == PLAIN else setting.alpha
    model = rdrop_keras.RDropModel(task.build(setting.views), alpha, divergence=divergence)
    model.compile("adam", loss_of_labelled, steps_per_execution=STEPS_PER_EXECUTION)
    return model


def batches(task, setting, seed):
    """Batches without end: labelled rows and, for R-Drop on all rows, such without, in an order of the seed's."""
    generator = np.random.RandomState(seed)
    x, y = task.data["train"]
    others = task.data["unlabelled"]
    num_others = round(LABELLED_ROWS / setting.share) - LABELLED_ROWS if setting.kind == ALL else 0
    labels_of_others = np.full(num_others, -1, y.dtype)
    mine, theirs = orders(generator, len(y), LABELLED_ROWS), orders(generator, len(others), num_others)
    while True:
        rows = next(mine)
        yield np.concatenate([x[rows], others[next(theirs)]]), np.concatenate([y[rows], labels_of_others])


def orders(generator, num_rows, size):
    waiting = np.array([], int)
    while True:
        while len(waiting) < size:
            waiting = np.append(waiting, generator.permutation(num_rows))
        yield waiting[:size]
        waiting = waiting[size:]


def tested(task, model, split):
    x, y = task.data[split]
    logits = model.predict(x, batch_size=500, verbose=0).astype("float64")
    logits -= logits.max(axis=-1, keepdims=True)
    loss = np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(y)), y]
    return {"accuracy": rounded((logits.argmax(axis=-1) == y).mean()), "loss": rounded(loss.mean())}


def rounded(value):
    return float(f"{value:.4g}")


def run(task, model, setting, num_steps, learning_rate, seed):
    """Trains from new weights; the model is compiled once for all its runs."""
    keras.utils.set_random_seed(seed)
    for variable, new in zip(model.model.variables, task.build(setting.views).variables, strict=True):
        variable.assign(new)
    for variable in model.optimizer.variables:
        variable.assign(ops.zeros(variable.shape, variable.dtype))
    if setting.kind != PLAIN:
        model.alpha = setting.alpha
    steps = max(1, round(num_steps / EPOCHS / STEPS_PER_EXECUTION)) * STEPS_PER_EXECUTION
    looks = []

    def look(epoch, logs):
        looks.append((tested(task, model, "validation")["loss"], model.model.get_weights()))

    callbacks = [
        keras.callbacks.LearningRateScheduler(lambda i: learning_rate * 0.5 * (1 + math.cos(math.pi * i / EPOCHS))),
        keras.callbacks.LambdaCallback(on_epoch_end=look),
    ]
    began = time.process_time()
    source = batches(task, setting, seed)
    history = model.fit(source, steps_per_epoch=steps, epochs=EPOCHS, verbose=0, callbacks=callbacks).history
    result = {"steps": steps * EPOCHS, "seconds": rounded(time.process_time() - began)}
    if setting.kind != PLAIN:
        result["consistency_loss"] = rounded(history["consistency_loss"][-1])
    result["validation losses"] = [loss for loss, _ in looks]
    result["test"] = tested(task, model, "test")
    model.model.set_weights(min(looks, key=lambda look: look[0])[1])
    return {**result, "test of the best": tested(task, model, "test")}


def prices(task, models):
    """Processor seconds of some steps of each program: medians over rounds in which all take turns."""
    sources = {program: batches(task, program, 0) for program in models}
    seconds = {program: [] for program in models}
    for _ in range(6):
        for program, model in models.items():
            began = time.process_time()
            model.fit(sources[program], steps_per_epoch=5 * STEPS_PER_EXECUTION, verbose=0)
            seconds[program].append(time.process_time() - began)
    return {program: statistics.median(values[1:]) for program, values in seconds.items()}


# ## All runs
class Runs:
    """The runs in the file of results, by name."""

    def __init__(self, path, provenance):
        self.path, self.provenance, self.runs = path, provenance, measure.read_runs(path)

    def once(self, name, make):
        """The run of that name, made and written if there is none."""
        if name not in self.runs:
            print(name, flush=True)
            self.runs[name] = {**make(), "provenance": self.provenance}
            measure.write_runs(self.path, self.runs)
        return self.runs[name]


def name_of(task, setting, *more):
    return ", ".join(
        [
            task,
            setting.kind,
            f"α={setting.alpha:g}",
            f"share={setting.share}",
            f"views={setting.views}",
            f"length={setting.length}",
            *more,
        ]
    )


def run_all(name, task, runs, num_seeds, further):
    """The three kinds with so many seeds, or with `further` what else is tried."""
    settings = task.further if further else [Setting(kind) for kind in KINDS]
    compile_once = functools.cache(lambda program: compiled(task, program))
    programs = list(dict.fromkeys([Setting(PLAIN), *[setting.program for setting in settings]]))
    if any(name_of(name, program, "price") not in runs.runs for program in programs):
        found = prices(task, {program: compile_once(program) for program in programs})
        for program, seconds in found.items():
            price = {"plain steps": rounded(seconds / found[Setting(PLAIN)])}
            runs.once(name_of(name, program, "price"), functools.partial(dict, price))

    def train(setting, rate, seed):
        def make():
            all_rows, own = (runs.runs[name_of(name, each, "price")] for each in (Setting(ALL), setting.program))
            num_steps = setting.length * task.num_steps * all_rows["plain steps"] / own["plain steps"]
            return run(task, compile_once(setting.program), setting, num_steps, rate, seed)

        return runs.once(name_of(name, setting, f"rate={rate}", f"seed={seed}"), make)

    rates = {}
    for kind in KINDS:
        rates[kind] = task.learning_rates[0]
        if len(task.learning_rates) > 1:
            tried = {rate: train(Setting(kind), rate, SEARCH_SEED) for rate in task.learning_rates}
            rates[kind] = min(tried, key=lambda rate: min(tried[rate]["validation losses"]))
    for seed in range(num_seeds):
        for setting in settings:
            train(setting, rates[setting.kind], seed)


def main():
    parser = argparse.ArgumentParser(description="R-Drop on rows without labels, in the time of plain training.")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--data", type=pathlib.Path, help="the folder of data that the README here describes")
    parser.add_argument("--encoder", type=pathlib.Path, help="the folder of MiniLM")
    parser.add_argument("--seeds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    shown = ((args.data, "FOLDER"), (args.encoder, "ENCODER"), (args.out, "FILE"))
    runs = Runs(args.out, measure.provenance([pair for pair in shown if pair[0]]))
    tasks = {name: TASKS[name](args) for name in args.tasks}
    for further in (False, True):
        for name, task in tasks.items():
            run_all(name, task, runs, args.seeds, further)


if __name__ == "__main__":
    main()
