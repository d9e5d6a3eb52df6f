"""The programs of the five tasks on local data: plain training and R-Drop, in as many epochs, over seeds.

Every run is a command of its own, a program with flags, that writes its scores. Of several α the one with the best
validation score at the first seed is taken for the others. Runs are kept in a file as they end, so that a command which
is stopped goes on where it was when it is given again.

    python tasks.py --data DIR --encoder DIR                  # all of them
    python tasks.py --data DIR --encoder DIR --tasks cola rte --seeds 1
    python tasks.py --table                                   # prints what the file holds

`DIR` of `--data` has a folder or file for each task, as the programs read them: `glue/cola`, `glue/sst2`, `glue/mrpc`,
`glue/rte`, `glue/stsb`, `multi30k`, `cifar10_15k.zip`, `wikitext2`, `debsum`. `--encoder` is a BERT as
`glue.py` reads it.
"""

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

import measure

ROOT = pathlib.Path(__file__).resolve().parents[1]


@dataclasses.dataclass
class Task:
    """One row of the table: a program, its data, its flags, and the α to choose from."""

    program: str
    data: str
    flags: str
    score: str
    alphas: tuple
    lower_is_better: bool = False


def glue(task, length, rows, epochs, score):
    budget = f"--max-length {length} --train-rows {rows} --epochs {epochs}"
    flags = f"--task {task} {budget} --learning-rate 1e-4 --jit off"
    return Task("glue.py", f"glue/{task}", flags, score, (0.1, 0.5, 1.0))


TRANSLATION = "--preset none --max-length 32 --train-rows 10000 --epochs 10 --learning-rate 1e-3 --dropout 0.1"
TASKS = {
    "cola": glue("cola", 24, 3000, 6, "Matthews"),
    "sst2": glue("sst2", 40, 2000, 4, "accuracy"),
    "mrpc": glue("mrpc", 64, 2000, 3, "accuracy"),
    "rte": glue("rte", 80, 2000, 3, "accuracy"),
    "stsb": glue("stsb", 40, 2000, 4, "Pearson"),
    "en-de": Task("translation.py", "multi30k", TRANSLATION, "BLEU", (1.0, 5.0)),
    "de-en": Task("translation.py", "multi30k", f"{TRANSLATION} --source de --target en", "BLEU", (1.0, 5.0)),
    "cifar10": Task(
        "vit_cifar100.py",
        "cifar10_15k.zip",
        "--preset none --epochs 10 --learning-rate 1e-3 --dropout 0.1",
        "accuracy",
        (0.6,),
    ),
    "wikitext2": Task(
        "language_model.py",
        "wikitext2",
        "--preset none --epochs 8 --learning-rate 1e-3 --dropout 0.1",
        "perplexity",
        (1.0,),
        lower_is_better=True,
    ),
    "debsum": Task(
        "summarization.py",
        "debsum",
        "--preset none --train-rows 10000 --epochs 6 --batch-size 32 --learning-rate 2e-3 --dropout 0.1",
        "ROUGE-L",
        (0.7,),
    ),
}


def command(name, args, alpha, seed):
    """Of one run; without α it is plain training."""
    task = TASKS[name]
    kind = ["--plain"] if alpha is None else ["--alpha", f"{alpha:g}"]
    encoder = ["--encoder", str(args.encoder)] if task.program == "glue.py" else []
    data = ["--data", str(args.data / task.data)]
    return [f"benchmarks/{task.program}", *data, *encoder, *task.flags.split(), *kind, "--seed", str(seed)]


class Results:
    """The runs made so far, in a JSON file: `{task: {α or plain: {seed: run}}}`."""

    def __init__(self, path):
        self.path = path
        self.runs = measure.read(path, {})

    def run(self, name, args, alpha, seed):
        """The scores of a run, made if it has not been."""
        done = self.runs.setdefault(name, {}).setdefault("plain" if alpha is None else f"alpha={alpha:g}", {})
        if str(seed) not in done:
            arguments = command(name, args, alpha, seed)
            print(f"\n{name}: python {' '.join(arguments)}", flush=True)
            with tempfile.TemporaryDirectory() as folder:
                results = pathlib.Path(folder) / "results.json"
                subprocess.run([sys.executable, *arguments, "--results", str(results)], cwd=ROOT, check=True)
                content = json.loads(results.read_text(encoding="utf-8"))
            (run,) = content.pop("runs")
            shown = argparse.Namespace(data=pathlib.Path("DIR"), encoder="ENCODER")
            content["command"] = " ".join(["python", *command(name, shown, alpha, seed)])
            curves = {key: [round(value, 4) for value in values] for key, values in run["curves"].items()}
            done[str(seed)] = {"scores": run["scores"], "curves": curves, **content}
            measure.write(self.path, self.runs)
        return done[str(seed)]["scores"]


def run_all(name, args, results):
    for alpha in TASKS[name].alphas:
        results.run(name, args, alpha, 0)
    best = float(chosen(name, results.runs[name]).removeprefix("alpha="))
    for seed in range(args.seeds):
        results.run(name, args, None, seed)
        results.run(name, args, best, seed)


def chosen(name, kinds):
    """The kind of run, of those with R-Drop, that has the best validation score at the first seed."""
    task = TASKS[name]
    sign = -1 if task.lower_is_better else 1
    of_rdrop = [kind for kind in kinds if kind != "plain"]
    return max(of_rdrop, key=lambda kind: sign * kinds[kind]["0"]["scores"][f"validation {task.score}"])


def table(results):
    lines = [
        "| task | rows | epochs | score | plain | R-Drop | α | of | seeds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in TASKS:
        kinds = results.runs.get(name, {})
        if len(kinds) < 2 or "plain" not in kinds:
            continue
        task, best = TASKS[name], chosen(name, kinds)
        split = "test" if f"test {task.score}" in kinds["plain"]["0"]["scores"] else "validation"
        seeds = sorted(kinds["plain"].keys() & kinds[best].keys())
        scores = [[kinds[kind][seed]["scores"][f"{split} {task.score}"] for seed in seeds] for kind in ("plain", best)]
        cells = [measure.mean_and_deviation(each, ".2f" if max(map(abs, each)) > 1.5 else ".3f") for each in scores]
        flags = kinds["plain"]["0"]["command"].split()
        rows, epochs = (
            flags[flags.index(flag) + 1] if flag in flags else "all" for flag in ("--train-rows", "--epochs")
        )
        tried = ", ".join(kind.removeprefix("alpha=") for kind in sorted(kinds.keys() - {"plain"}))
        columns = [name, rows, epochs, f"{task.score}, {split}", *cells, best.removeprefix("alpha="), tried, len(seeds)]
        lines.append(f"| {' | '.join(map(str, columns))} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--encoder", type=pathlib.Path, metavar="DIR")
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), metavar="TASK", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "tasks.json")
    parser.add_argument("--table", action="store_true", help="print the results in the file and stop")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be ≥ 1. Received: {args.seeds}")
    results = Results(args.out)
    if not args.table:
        if args.data is None or not args.data.is_dir():
            parser.error(f"--data must be a folder that exists. Received: {args.data}")
        if args.encoder is None and any(TASKS[name].program == "glue.py" for name in args.tasks):
            parser.error("the tasks of GLUE need --encoder")
        args.data = args.data.resolve()
        args.encoder = args.encoder and args.encoder.resolve()
        for name in args.tasks:
            run_all(name, args, results)
    print(table(results))


if __name__ == "__main__":
    main()
