"""The tables and pictures of what `when_it_pays.py` has measured, on the pages of the site.

A difference is between runs of the same seed in the same time. It counts where its 95 % interval by Student's t leaves
out 0.

    python benchmarks/when_it_pays_report.py docs
"""

import argparse
import itertools
import math
import pathlib
import statistics

from scipy import stats

import measure
import tasks
from when_it_pays import BUDGETS, PLAIN, RESULTS, STARTS, THROUGHOUT, VARIANTS, is_of

LOWER_IS_BETTER = ("test loss", "calibration error", "perplexity")
BEGIN, END = "<!-- The results begin. -->\n", "<!-- The results end. -->\n"


# ## Paired runs
def main_runs(results, name):
    """`{(variant, budget): {seed: {measure: value}}}` of a task."""
    runs = {}
    for key, result in results.items():
        if is_of(key, name) and key.split(" | ")[1] == "main":
            _, _, variant, budget, seed = key.split(" | ")
            values = {**result["test"], "test loss": result["test loss"]}
            runs.setdefault((variant, int(budget.split()[1])), {})[int(seed.split()[1])] = values
    return runs


def titles_and_runs(results):
    """Name, title and runs of each task, without variants of which there is one seed alone."""
    for name in tasks.TASKS:
        runs = {key: seeds for key, seeds in main_runs(results, name).items() if len(seeds) > 1}
        if runs:
            yield name, results[f"{name} | pilot"]["title"], runs


def measures_of(runs):
    """The task's own score first, then the test loss, then the rest."""
    first, *rest = next(iter(next(iter(runs.values())).values()))
    return [first, "test loss", *(name for name in rest if name != "test loss")]


def paired(runs, variant, budget, measured):
    """The differences to plain training in the same time, of the seeds that both have."""
    ours, plain = runs.get((variant, budget), {}), runs.get((PLAIN, budget), {})
    return [ours[seed][measured] - plain[seed][measured] for seed in sorted(set(ours) & set(plain))]


def interval(differences):
    """The mean and half of the 95 % interval by Student's t; NaN of one difference."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return mean, math.nan
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, float(stats.t.ppf(0.975, len(differences) - 1)) * error


def verdict(differences, measured):
    """`"win"` or `"loss"` where the interval leaves 0 out, else `"tie"`."""
    mean, half = interval(differences)
    if not abs(mean) > half:
        return "tie"
    return "win" if (mean < 0) == (measured in LOWER_IS_BETTER) else "loss"


# ## Tables
def heading(first, cells):
    return [f"| {first} | " + " | ".join(cells) + " |", "|---" * (1 + len(cells)) + "|"]


def counts_table(results):
    """Wins, ties and losses over tasks."""
    counts = {}
    for _, _, runs in titles_and_runs(results):
        score = measures_of(runs)[0]
        for (variant, budget), (measured, what) in itertools.product(runs, ((score, "score"), ("test loss", "loss"))):
            differences = paired(runs, variant, budget, measured)
            if variant != PLAIN and len(differences) > 1:
                counts.setdefault((variant, what, budget), []).append(verdict(differences, measured))
    columns = list(itertools.product(("score", "loss"), BUDGETS))
    lines = heading("wins–ties–losses over tasks", [f"{what}, budget {budget}" for what, budget in columns])
    for variant in VARIANTS[1:]:
        kinds = [counts.get((variant, *column), []) for column in columns]
        if any(kinds):
            cells = (
                "–".join(str(each.count(kind)) for kind in ("win", "tie", "loss")) if each else "" for each in kinds
            )
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return lines


def divergence_table(results):
    """The divergence between two sub-models of plain training next to what R-Drop changes."""
    variant, budget = next(iter(STARTS)), BUDGETS[-1]
    change = f"test loss, {variant}, budget {budget}, in parts of plain training's"
    lines = heading("divergence in plain training", ["first of 20 epochs", "best", "last", change])
    for name, title, runs in titles_and_runs(results):
        pilot, differences = results[f"{name} | pilot"], paired(runs, variant, budget, "test loss")
        if differences:
            losses, divergences = pilot["validation losses"], pilot["divergences"]
            plain = statistics.fmean(seed["test loss"] for seed in runs[PLAIN, budget].values())
            cells = [divergences[0], divergences[losses.index(min(losses))], divergences[-1]]
            change = statistics.fmean(differences) / plain
            lines.append(f"| {title} | " + " | ".join(f"{cell:.2g}" for cell in cells) + f" | {change:+.2f} |")
    return lines


def task_tables(results, name, title, runs):
    """What a task was trained with, its picture, and a table for each of its first three measures."""
    alpha, plain = (
        next(run for key, run in results.items() if is_of(key, name) and f"| main | {variant} |" in key)
        for variant in (THROUGHOUT, PLAIN)
    )
    lines = [
        "",
        f"### {title[0].upper()}{title[1:]}",
        "",
        f"{max(map(len, runs.values()))} seeds. Plain training: learning rate {plain['learning_rate']:g}, dropout "
        f"{plain['dropout']:g}, {plain['steps']} steps at budget 1. α = {alpha['alpha']:g}. A step costs "
        f"{results[f'{name} | price']['price'][THROUGHOUT]:.2f} plain ones.",
        "",
        f"![{measures_of(runs)[0]} and test loss of all variants over the time spent]({picture(name)})",
        "",
    ]
    for measured in measures_of(runs)[:3]:
        lines += heading(measured, [f"budget {budget}" for budget in BUDGETS])
        for variant in sorted({variant for variant, _ in runs}, key=VARIANTS.index):
            cells = [cell(runs, variant, budget, measured) for budget in BUDGETS]
            lines.append(f"| {variant} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def cell(runs, variant, budget, measured):
    """Plain training's mean and deviation; of other variants the mean difference and its interval."""
    digits = 1 if measured == "perplexity" else 3
    if variant == PLAIN:
        values = [seed[measured] for seed in runs.get((variant, budget), {}).values()]
        return measure.mean_and_deviation(values, f".{digits}f")
    differences = paired(runs, variant, budget, measured)
    if len(differences) < 2:
        return ""
    mean, half = interval(differences)
    mark = {"win": "**", "loss": "*", "tie": ""}[verdict(differences, measured)]
    return f"{mark}{mean:+.{digits}f} ± {half:.{digits}f}{mark}"


def counts(results):
    """What the first page has."""
    return "\n".join(counts_table(results)) + "\n"


def tables(results):
    """What the page of results has."""
    lines = divergence_table(results)
    for name, title, runs in titles_and_runs(results):
        lines += task_tables(results, name, title, runs)
    return "\n".join(lines).rstrip() + "\n"


PAGES = {"when-it-pays.md": counts, "when-it-pays-results.md": tables}


# ## Pictures
def picture(name):
    return f"when-it-pays-{name}.png"


def draw(results, folder):
    """A picture for each task: its score and its test loss over the time spent, of all variants."""
    from matplotlib.figure import Figure

    for name, title, runs in titles_and_runs(results):
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, measured in zip(panels, measures_of(runs)[:2]):
            for variant in dict.fromkeys(variant for variant, _ in runs):
                means = [
                    (budget, statistics.fmean(seed[measured] for seed in runs[variant, budget].values()))
                    for budget in BUDGETS
                    if (variant, budget) in runs
                ]
                style = {"color": "black", "linewidth": 2} if variant == PLAIN else {"marker": "o", "markersize": 4}
                axes.plot(*zip(*means), label=variant, **style)
            axes.set_xscale("log", base=2)
            axes.set_xticks(BUDGETS, [str(budget) for budget in BUDGETS])
            axes.set(xlabel="time, in that of plain training to its best", ylabel=measured)
            axes.grid(alpha=0.3)
        panels[0].legend(fontsize="small")
        figure.suptitle(title)
        figure.savefig(folder / picture(name), dpi=110)


def report(results, folder):
    """Puts the tables into the pages, and the pictures beside them."""
    for name, make in PAGES.items():
        path = folder / name
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        path.write_text(before + BEGIN + "\n" + make(results) + "\n" + END + after, encoding="utf-8")
    draw(results, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path, help=f"with {' and '.join(PAGES)}")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, metavar="FILE")
    args = parser.parse_args()
    report(measure.read_runs(args.results), args.folder)


if __name__ == "__main__":
    main()
