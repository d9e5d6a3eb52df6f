"""The tables of docs/unlabelled.md, from the runs of `unlabelled.py`.

python benchmarks/unlabelled_report.py
"""

import statistics

from scipy import stats

import measure
from tasks.unlabelled import ALL, KINDS, PLAIN, Setting
from unlabelled import RESULTS, SEARCH_SEED, name_of

# Of each: the task, how long, the title, and beside the three kinds what else is tried.
TABLES = (
    (
        "digits_transformer",
        1,
        "Digits, 50 labels and 600 rows without, a Transformer",
        {
            "α = 1": Setting(ALL, alpha=1.0),
            "α = 10": Setting(ALL, alpha=10.0),
            "half labelled": Setting(ALL, share=0.5),
            "all rows, no shifts": Setting(ALL, views=False),
            "plain, no shifts": Setting(PLAIN, views=False),
        },
    ),
    ("digits", 1, "The same, a convolutional network", {}),
    ("digits", 3, "The same, three times as long", {}),
    ("sst2", 1, "SST-2, 100 labels and 6,820 rows without", {}),
    ("cifar10", 1, "CIFAR-10 at 16 pixels, 500 labels and 9,000 rows without", {}),
)


def runs_of(runs, task, setting):
    """`{seed: run}` of those that count: with the learning rate that the search chose, without its own seed."""
    of_kind = name_of(task, Setting(setting.kind), "rate=")
    searched = {
        name: run for name, run in runs.items() if name.startswith(of_kind) and name.endswith(f"={SEARCH_SEED}")
    }
    best = min(searched, key=lambda name: min(searched[name]["validation losses"]), default=None)
    rate = "" if best is None else best.removeprefix(of_kind).partition(",")[0] + ","
    start = name_of(task, setting, f"rate={rate}")
    found = {int(name.rpartition("=")[2]): run for name, run in runs.items() if name.startswith(start)}
    return {seed: found[seed] for seed in sorted(found) if seed != SEARCH_SEED}


def table(runs, task, length, title, others):
    """Means over seeds with standard deviations, and paired differences to plain training with 95 % intervals."""
    plain = runs_of(runs, task, Setting(PLAIN, length=length))
    lines = [f"| {title} | seeds | steps | seconds | accuracy | test loss | accuracy − plain | test loss − plain |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for label, setting in {**{kind: Setting(kind, length=length) for kind in KINDS}, **others}.items():
        own = runs_of(runs, task, setting)
        if not own:
            continue
        cells = [label, f"{len(own)}", f"{next(iter(own.values()))['steps']:,}"]
        cells.append(f"{statistics.mean(run['seconds'] for run in own.values()):.0f}")
        for measured in ("accuracy", "loss"):
            values = [run["test of the best"][measured] for run in own.values()]
            cells.append(measure.mean_and_deviation(values, ".3f"))
        for measured in ("accuracy", "loss"):
            pairs = [
                own[i]["test of the best"][measured] - plain[i]["test of the best"][measured] for i in own if i in plain
            ]
            cells.append("" if setting.kind == PLAIN and setting.views else difference(pairs))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(pairs):
    """The mean, with its interval from three seeds on: that of two would be wider than the table."""
    text = f"{statistics.mean(pairs):+.3f}"
    return text if len(pairs) < 3 else f"{text} ± {stats.t.ppf(0.975, len(pairs) - 1) * stats.sem(pairs):.3f}"


def report(runs):
    """The tables of tasks of which all three kinds have been run."""
    done = [each for each in TABLES if all(runs_of(runs, each[0], Setting(kind, length=each[1])) for kind in KINDS)]
    return "\n\n".join(table(runs, *each) for each in done)


if __name__ == "__main__":
    print(report(measure.read_runs(RESULTS)))
