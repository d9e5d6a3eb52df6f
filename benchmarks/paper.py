"""The paper's regime: R-Drop and plain training to convergence, on Multi30k and on five tasks of GLUE, on a GPU.

Multi30k: all 29,000 pairs, German to English, a Transformer of 3 + 3 layers, 256 wide, with dropout 0.3 and smoothed
labels, from scratch. Plain training has E epochs and 2E, R-Drop with α = 5 has E, and so has R-Drop from half of the
steps. GLUE: MiniLM fine-tuned whole, plain for E and 2E epochs, R-Drop with α of 1 and 5. Three seeds each. The
checkpoint with the lowest validation loss is tested.

It runs on JAX, without TensorFlow, on arrays that `--prepare` makes of tables, which needs `tokenizers` alone. A call
prints its plan first, takes at most 8 minutes and several processes, and does the runs that are missing in the file of
results, which is written after each run.

    python benchmarks/paper.py --prepare --data FOLDER --encoder FOLDER --arrays ARRAYS
    python benchmarks/paper.py --arrays ARRAYS --encoder FOLDER --out benchmarks/results/paper.json
    python benchmarks/paper.py --tiny                   # all of it with small models and tables, on a processor
"""

import argparse
import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
import time

import measure

HERE = pathlib.Path(__file__).resolve().parent
PLAIN, RDROP, HALF = "plain", "R-Drop", "R-Drop from ½"
# Kind, α and how many times E epochs.
MULTI30K = ((PLAIN, 0.0, 1), (PLAIN, 0.0, 2), (RDROP, 5.0, 1), (HALF, 5.0, 1))
GLUE = ((PLAIN, 0.0, 1), (PLAIN, 0.0, 2), (RDROP, 1.0, 1), (RDROP, 5.0, 1))
# What a plain run of E epochs is thought to take, in seconds, on a card that is shared; Multi30k's was seen.
SECONDS = {"multi30k": 28, "cola": 20, "mrpc": 12, "rte": 10, "stsb": 20, "sst2": 18}
PRICE = {PLAIN: 1.0, RDROP: 2.0, HALF: 1.5}
SECONDS_TO_START = 45  # Of a process: imports, and the first compilation.


def plan(num_seeds):
    """`(task, kind, α, times, seed)` of all runs."""
    variants = {task: MULTI30K if task == "multi30k" else GLUE for task in SECONDS}
    return [(task, *variant, seed) for task in SECONDS for variant in variants[task] for seed in range(num_seeds)]


def name_of(run):
    task, kind, alpha, times, seed = run
    return f"{task} | {variant_of(kind, alpha, times)} | seed {seed}"


def variant_of(kind, alpha, times):
    return f"{kind}, {times}E" if kind == PLAIN else f"{kind}, α = {alpha:g}"


def expected(run, results):
    """Seconds that a run will take: as many as it did with other seeds, or a guess."""
    task, kind, _, times, _ = run
    variant = name_of(run).rpartition(" | ")[0]
    same = [result["seconds"] for name, result in results.items() if name.rpartition(" | ")[0] == variant]
    return sum(same) / len(same) if same else SECONDS[task] * PRICE[kind] * times


def print_plan(runs, results, processes):
    """The runs that are missing, by task and kind, and what they are expected to cost."""
    groups = grouped(missing(runs, results))
    total = 0.0
    print(f"{'missing runs':32}{'runs':>6}{'of':>5}{'seconds':>9}")
    for (task, kind), group in groups.items():
        seconds = SECONDS_TO_START + sum(expected(run, results) for run in group)
        total += seconds
        print(f"{task + ', ' + kind:32}{len(group):6}{len(grouped(runs)[task, kind]):5}{seconds:9.0f}")
    print(f"{'':32}{'':11}{total:9.0f}, or {total / processes / 60:.0f} minutes in {processes} processes", flush=True)


def missing(runs, results):
    return [run for run in runs if name_of(run) not in results]


def grouped(runs):
    """`{(task, kind): [run]}`: those that share a program."""
    groups = {}
    for run in runs:
        groups.setdefault(run[:2], []).append(run)
    return groups


def train(group, args, deadline, keep):
    """Does the runs of a group in one process, and gives each to `keep` when it ends; returns what went wrong."""
    (task, kind), runs = group
    if time.time() >= deadline:
        return None
    command = [sys.executable, str(HERE / "paper_run.py"), task, kind, "--arrays", str(args.arrays)]
    command += ["--runs", json.dumps([run[2:] for run in runs]), "--until", str(deadline)]
    command += ["--encoder", str(args.encoder)] if args.encoder else []
    environment = {
        "JAX_COMPILATION_CACHE_DIR": os.path.join(tempfile.gettempdir(), "rdrop_keras_paper"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **os.environ,
        "KERAS_BACKEND": "jax",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # Several processes share the card.
    }
    if args.tiny:
        command.append("--tiny")
        environment |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        for line in process.stdout:
            if line.startswith("{"):
                result = json.loads(line)
                alpha, times, seed = result.pop("run")
                keep((task, kind, alpha, times, seed), result)
        if process.wait() not in (0, -signal.SIGALRM):  # The signal ends it when the time is up.
            errors.seek(0)
            return f"{task}, {kind}: exit code {process.returncode}: {errors.read().strip()[-1000:]}"
    return None


def print_table(runs, results):
    """Means and deviations over seeds."""
    print(f"\n{'':12}{'':20}{'score':>26}{'validation loss':>20}{'seconds':>9}{'seeds':>7}")
    for key in dict.fromkeys(run[:4] for run in runs):
        found = [results[name_of(run)] for run in runs if run[:4] == key and name_of(run) in results]
        if found:
            score = next(iter(found[0]))
            values = measure.mean_and_deviation([result[score] for result in found], ".4g", ".2g")
            losses = measure.mean_and_deviation([result["validation loss"] for result in found], ".4f", ".4f")
            seconds = sum(result["seconds"] for result in found) / len(found)
            print(
                f"{key[0]:12}{variant_of(*key[1:]):20}{score + ' ' + values:>26}{losses:>20}{seconds:9.1f}"
                f"{len(found):7}"
            )


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="make the arrays, and no run")
    parser.add_argument("--data", type=pathlib.Path, metavar="FOLDER", help="of tables, for --prepare; see README.md")
    parser.add_argument("--encoder", type=pathlib.Path, metavar="FOLDER", help="of MiniLM, see README.md")
    parser.add_argument("--arrays", type=pathlib.Path, metavar="FOLDER", help="of what --prepare makes")
    parser.add_argument("--tasks", nargs="+", choices=sorted(SECONDS), default=list(SECONDS))
    parser.add_argument("--seeds", type=int, help="3, or 1 of --tiny")
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count()), help="at a time (%(default)s)")
    parser.add_argument("--minutes", type=float, default=8, help="after which a call ends (%(default)s)")
    parser.add_argument("--plan", action="store_true", help="print the plan, and make no run")
    parser.add_argument("--tiny", action="store_true", help="small models and tables, on a processor")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file of the results, written after each run")
    args = parser.parse_args()
    needed = {"--arrays": args.arrays, "--encoder": args.encoder} | ({"--data": args.data} if args.prepare else {})
    absent = [flag for flag, value in needed.items() if value is None]
    if absent and not args.tiny and not args.plan:
        parser.error(f"{', '.join(needed)} must be given, or --tiny. Not received: {', '.join(absent)}.")
    args.seeds = args.seeds or (1 if args.tiny else 3)
    return args


def main():
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            args.data = args.encoder = pathlib.Path(folder, "tables")
            args.arrays = pathlib.Path(folder, "arrays")
        if args.tiny or args.prepare:
            os.environ.setdefault("KERAS_BACKEND", "jax")
            import paper_data

            if args.tiny:
                paper_data.write_tiny_tables(args.data)
            paper_data.prepare(args.data, args.encoder, args.arrays)
        if not args.prepare:
            make_runs(args)


def make_runs(args):
    deadline = time.time() + 60 * args.minutes
    results = measure.read_runs(args.out, args.tiny) if args.out else {}
    runs = [run for run in plan(args.seeds) if run[0] in args.tasks]
    print_plan(runs, results, args.processes)
    if args.plan:
        return
    hidden = [(args.data, "FOLDER"), (args.encoder, "ENCODER"), (args.arrays, "ARRAYS")]
    command = measure.command_line([(value, name) for value, name in hidden if value])
    lock = threading.Lock()

    def keep(run, result):
        result["provenance"]["command"] = command
        with lock:
            results[name_of(run)] = result
            score = next(iter(result))
            print(f"{name_of(run)}: {score} {result[score]:.4g}, {result['seconds']} s", flush=True)
            if args.out:
                measure.write_runs(args.out, results)

    with concurrent.futures.ThreadPoolExecutor(args.processes) as pool:
        groups = grouped(missing(runs, results)).items()
        failed = list(filter(None, pool.map(lambda group: train(group, args, deadline, keep), groups)))
    print_table(runs, results)
    left = len(missing(runs, results))
    print(f"{left} runs are missing; the same command goes on." if left else "All runs are there.")
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
