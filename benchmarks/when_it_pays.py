"""Does R-Drop pay in the time that plain training takes? Test scores and losses against the time spent.

The unit of time is that in which plain training reaches its best validation loss. Plain training and R-Drop get one,
two and four such units, in as many steps as fit by the measured prices of their steps, and each run ends its own
learning rate schedule in its budget. The checkpoint with the lowest validation loss is tested. For each task

1. `pilot`: plain training finds the unit, and how the divergence between its sub-models grows;
2. `price`: steps of all variants take turns, which gives their prices;
3. `search`: plain training gets its own learning rate and dropout, then R-Drop its α and `KLBudget` its target, at
   budget 2, on the validation split, with a seed that is not used again;
4. `main`: all variants, with the same seeds.

Runs are kept in the file of results as they end; the same command goes on where it was stopped. Tables and pictures are
made by `when_it_pays_report.py`.

    python benchmarks/when_it_pays.py --plan                                 # the runs, and what they cost
    python benchmarks/when_it_pays.py --tasks digits-100 digits-400
    python benchmarks/when_it_pays.py --data FOLDER --encoder FOLDER         # all tasks
"""

import argparse
import functools
import inspect
import itertools
import math
import operator
import os
import pathlib
import statistics
import tempfile
import time

# Seeds, learning rates, α and budgets share a program, which JAX keeps from one run to the next.
os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "when_it_pays"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import measure
import rdrop_keras
import tasks

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "when_it_pays.json"
BUDGETS = (1, 2, 4)
SEARCH_BUDGET, SEARCH_SEED = 2, 1000
EVALUATIONS = 20  # Of a run.
TURNS = 30  # In which the steps of all variants are timed.
TARGETS = (0.25, 0.5)  # Of `KLBudget`, as parts of the divergence that plain training reached.
PLAIN, THROUGHOUT, BUDGET = "plain", "R-Drop", "KLBudget"
STARTS = {"R-Drop from ½": 0.5, "R-Drop from ¾": 0.75}
VARIANTS = [PLAIN, THROUGHOUT, *STARTS, *tasks.SHARED, BUDGET]  # As tables list them.


# ## One run
def wrap(task, model, variant, setting, num_steps):
    """`model` as the variant trains it. `setting` has its `alpha`, or its `target`."""
    if variant == PLAIN:
        return rdrop_keras.RDropModel(model, alpha=0)
    alpha = rdrop_keras.KLBudget(setting["target"]) if variant == BUDGET else setting["alpha"]
    return rdrop_keras.RDropModel(
        model,
        alpha=alpha,
        divergence=task.divergence,
        start=round(STARTS.get(variant, 0) * num_steps),
        share=task.shared.get(variant, "deterministic"),
    )


def compiled(task, variant, setting, num_steps, seed):
    keras.utils.set_random_seed(seed)
    model = wrap(task, task.build(setting["dropout"]), variant, setting, num_steps)
    model.compile(keras.optimizers.AdamW(setting["learning_rate"], weight_decay=0.01, clipnorm=1.0), task.loss)
    return model


def learning_rate_at(epoch, highest):
    """Two epochs of warming up, then half a cosine to 0; a callback's, so that all lengths share a program."""
    return highest * min((epoch + 1) / 3, 0.5 * (1 + math.cos(math.pi * (epoch + 0.5) / EVALUATIONS)))


def batches(task, seed):
    """Batches of the training split without end, in an order of the seed's."""
    x, y, weights = task.data["train"]
    generator = np.random.RandomState(seed)
    num_rows = len(y)
    while True:
        order = generator.permutation(num_rows)
        for i in range(0, num_rows - task.batch_size + 1, task.batch_size):
            rows = order[i : i + task.batch_size]
            batch = keras.tree.map_structure(operator.itemgetter(rows), x), y[rows]
            yield batch if weights is None else (*batch, weights[rows])


def outputs_and_loss(task, model, split):
    x, y, weights = task.data[split]
    outputs = model.predict(x, batch_size=100, verbose=0)
    return outputs, float(task.loss(y, outputs, weights))


class Best(keras.callbacks.Callback):
    """Measures the validation loss at the end of each epoch, and keeps the weights with which it was lowest."""

    def __init__(self, task):
        super().__init__()
        self.task, self.losses = task, []

    def on_epoch_end(self, epoch, logs=None):
        loss = outputs_and_loss(self.task, self.model, "validation")[1]
        if not self.losses or loss < min(self.losses):
            self.weights = self.model.model.get_weights()
        self.losses.append(loss if math.isfinite(loss) else 1e9)


def run(task, variant, setting, num_steps, seed, measure_divergence=False):
    """Trains, and tests the checkpoint with the lowest validation loss."""
    began = time.perf_counter()
    steps = max(1, round(num_steps / EVALUATIONS))
    model = compiled(task, variant, setting, steps * EVALUATIONS, seed)
    best = Best(task)
    callbacks = [
        best,
        keras.callbacks.LearningRateScheduler(lambda e, _: learning_rate_at(e, setting["learning_rate"])),
    ]
    if measure_divergence:
        x, y, weights = task.data["validation"]
        callbacks.append(rdrop_keras.InconsistencyMonitor(x, y, weights, num_passes=2, batch_size=100))
    source = batches(task, seed)
    history = model.fit(
        source, steps_per_epoch=steps, epochs=EVALUATIONS, verbose=0, callbacks=callbacks, shuffle=False
    )
    history = history.history
    model.model.set_weights(best.weights)
    outputs, loss = outputs_and_loss(task, model, "test")
    x, y, weights = task.data["test"]
    score = task.score(y, outputs, weights)
    result = {
        **setting,
        "steps": steps * EVALUATIONS,
        "validation losses": measure.rounded(best.losses),
        "test loss": measure.rounded(loss),
        "test": {name: measure.rounded(value) for name, value in score.items()},
        "seconds": measure.rounded(time.perf_counter() - began),
    }
    if measure_divergence:
        result["divergences"] = measure.rounded(history["divergence"])
    for name in ("task_loss", "consistency_loss", "alpha"):
        if name in history:
            result[name] = measure.rounded(history[name][-1])
    return result


def prices(task, variants, setting):
    """What a step of each variant costs in plain steps: the median over turns in which all take one."""
    source = batches(task, 0)
    models = {}
    for variant in variants:
        models[variant] = compiled(task, variant, {**setting, "alpha": 1.0, "target": 1.0}, 1000, 0)
        for _ in range(3):
            models[variant].train_on_batch(*next(source))
    seconds = {variant: [] for variant in variants}
    for turn in range(TURNS):
        first = turn % len(variants)
        for variant in variants[first:] + variants[:first]:
            batch = next(source)
            began = time.perf_counter()
            models[variant].train_on_batch(*batch)
            seconds[variant].append(time.perf_counter() - began)
    plain = seconds[PLAIN]
    result = {v: measure.rounded(statistics.median(a / b for a, b in zip(seconds[v], plain))) for v in variants}
    return {"price": result, "plain step": measure.rounded(statistics.median(plain))}


# ## All runs
def variants_of(task):
    return [PLAIN, THROUGHOUT, *STARTS, *task.shared, BUDGET]


def steps_of(variant, budget, unit, price):
    """How many steps of the variant take as long as `budget` times `unit` plain ones."""
    start = STARTS.get(variant, 0)
    mean = start + (1 - start) * price[THROUGHOUT if variant in STARTS else variant]
    return budget * unit / mean


def middle(values):
    return values[len(values) // 2]


def planned(variant, setting, num_steps, seed):
    """`run` of a task that is yet to be given."""
    return functools.partial(run, variant=variant, setting=setting, num_steps=num_steps, seed=seed)


class Runs:
    """The runs of a task in the file of results, made if they are not there.

    `hidden` are folders of this machine, and what results say in their place.
    """

    def __init__(self, path, name, make_task, hidden):
        self.path, self.name, self._make_task, self._hidden = path, name, make_task, hidden
        self.results = measure.read_runs(path)

    @functools.cached_property
    def task(self):
        return self._make_task()

    def get(self, *key, make):
        """The run called `key`, from the file or by `make(task)`."""
        key = " | ".join([self.name, *map(str, key)])
        if key not in self.results:
            result = {**make(self.task), "provenance": measure.provenance(self._hidden)}
            self.results = measure.read_runs(self.path)  # The runs of other tasks have been added since.
            self.results[key] = result
            measure.write_runs(self.path, self.results)
            print(f"{key}: {summary(result)}", flush=True)
        return self.results[key]

    def settings(self):
        """What was found before the main runs: the unit, prices, and the setting of each variant."""
        task = self.task
        setting = {"learning_rate": middle(task.learning_rates), "dropout": middle(task.dropouts)}
        pilot = self.get(
            "pilot", make=lambda t: {"title": t.title, **run(t, PLAIN, setting, t.pilot_steps, SEARCH_SEED, True)}
        )
        losses = pilot["validation losses"]
        best = losses.index(min(losses))
        unit = (best + 1) * pilot["steps"] / len(losses)
        price = self.get("price", make=lambda t: prices(t, variants_of(t), setting))["price"]

        def search(variant, tried):
            steps = steps_of(variant, SEARCH_BUDGET, unit, price)
            found = {}
            for each in tried:
                name = ", ".join(f"{key} {value:g}" for key, value in each.items())
                result = self.get("search", variant, name, make=planned(variant, each, steps, SEARCH_SEED))
                found[name] = min(result["validation losses"]), each
            return min(found.values(), key=lambda pair: pair[0])[1]

        grid = itertools.product(task.learning_rates, task.dropouts)
        plain = search(PLAIN, [{"learning_rate": rate, "dropout": dropout} for rate, dropout in grid])
        with_alpha = search(THROUGHOUT, [{**plain, "alpha": alpha} for alpha in task.alphas])
        reached = pilot["divergences"][best]
        targets = [measure.rounded(part * reached) for part in TARGETS]
        with_target = search(BUDGET, [{**plain, "target": target} for target in targets])
        chosen = dict.fromkeys(variants_of(task), with_alpha) | {PLAIN: plain, BUDGET: with_target}
        return unit, price, chosen

    def main(self, seed):
        if seed >= self.task.num_seeds:
            return
        unit, price, chosen = self.settings()
        for budget, variant in itertools.product(BUDGETS, variants_of(self.task)):
            steps = steps_of(variant, budget, unit, price)
            make = planned(variant, chosen[variant], steps, seed)
            self.get("main", variant, f"budget {budget}", f"seed {seed}", make=make)


def summary(result):
    if "price" in result:
        return ", ".join(f"{variant} {price:.2f}" for variant, price in result["price"].items())
    test = ", ".join(f"{name} {value:.4g}" for name, value in result["test"].items())
    return f"{result['steps']} steps, {test}, test loss {result['test loss']:.4g}, {result['seconds']:.0f} s"


def print_plan(results):
    """The runs of each task, and what is there of them with its cost."""
    print(f"{'task':24}{'runs there':>12}{'seconds':>10}{'a run':>8}")
    for name in tasks.TASKS:
        seconds = [result["seconds"] for key, result in results.items() if "seconds" in result and is_of(key, name)]
        mean = sum(seconds) / len(seconds) if seconds else 0
        print(f"{name:24}{len(seconds):12}{sum(seconds):10.0f}{mean:8.1f}")
    print(
        "A task has a pilot, up to 12 runs of plain training, 4 of R-Drop and 2 of KLBudget in its search, and in each"
    )
    print(f"seed {len(BUDGETS)} budgets times 5 to 7 variants. A budget of 1 is meant to take 5 to 60 seconds.")


def is_of(key, name):
    return key.split(" | ")[0] == name


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=tasks.TASKS, default=list(tasks.TASKS))
    parser.add_argument("--data", type=pathlib.Path, metavar="FOLDER", help="see README.md")
    parser.add_argument("--encoder", type=pathlib.Path, metavar="FOLDER", help="of MiniLM, see README.md")
    parser.add_argument("--seeds", type=int, help="at most so many")
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--plan", action="store_true", help="say what there is to run, and what it costs")
    args = parser.parse_args()
    if args.plan:
        print_plan(measure.read_runs(args.out))
        return
    hidden = [(args.data, "FOLDER")] if args.data else []
    hidden += [(args.encoder, "ENCODER")] if args.encoder else []
    runs = []
    for name in args.tasks:
        make = tasks.TASKS[name]
        parameters = inspect.signature(make).parameters
        arguments = {"folder": args.data} | ({"encoder": args.encoder} if "encoder" in parameters else {})
        runs.append(Runs(args.out, name, functools.partial(make, **arguments), hidden))
    for seed in range(args.seeds or 5):
        for each in runs:
            each.main(seed)


if __name__ == "__main__":
    main()
