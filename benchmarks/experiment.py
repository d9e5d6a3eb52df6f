"""What the programs have in common around Keras: flags, devices, runs that resume, the table, picture and export.

The tasks themselves, their data, models and metrics, are in the programs. Each calls, in this order,

    args = experiment.parse(parser)                # after `experiment.add_flags(parser, ...)`
    scope = experiment.prepare(args)               # chooses the devices, before anything is made
    experiment.run_all(args, scope, train)         # `train(run)` for plain training, R-Drop or both

where `train(run)` builds, compiles and fits a model with `run.alpha`, `run.jit_compile`, `run.callbacks()` and
`run.verbose`, and returns the trained Keras model and its scores.
"""

import contextlib
import csv
import dataclasses
import faulthandler
import importlib.util
import json
import math
import os
import pathlib
import sys
import tempfile

import keras
import numpy as np

import measure
import rdrop_keras

STRATEGIES = ("mirrored", "multiworker", "none", "tpu")
JIT = {"auto": "auto", "off": False, "on": True}
MIXED_PRECISION = ("mixed_bfloat16", "mixed_float16")
# Flags that say how a run is shown or where it is kept, not what it computes: they may change when it resumes.
NOT_OF_THE_RUN = ("backup_dir", "out", "results", "seeds", "tensorboard", "timeout")


# ## The command line
def add_flags(parser, *, alpha, dropout, epochs, batch_size, learning_rate):
    """Adds the flags of every task, with the defaults of this one."""
    name = pathlib.Path(parser.prog).stem
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--plain", action="store_true", help="train without R-Drop")
    kinds.add_argument("--compare", action="store_true", help="train both, with the same budget and seeds")
    training = parser.add_argument_group("training")
    training.add_argument("--alpha", type=float, default=alpha, help="weight of R-Drop, ≥ 0 (default: %(default)s)")
    training.add_argument("--dropout", type=float, default=dropout, help="dropout rate, < 1 (default: %(default)s)")
    training.add_argument("--epochs", type=int, default=epochs, help="(default: %(default)s)")
    training.add_argument("--batch-size", type=int, default=batch_size, help="of all devices (default: %(default)s)")
    training.add_argument("--learning-rate", type=float, default=learning_rate, help="its peak (default: %(default)s)")
    training.add_argument("--train-rows", type=int, metavar="N", help="train on the first N rows only")
    training.add_argument("--seed", type=int, default=0, help="the first seed (default: %(default)s)")
    training.add_argument("--seeds", type=int, default=1, help="runs of each kind (default: %(default)s)")
    training.add_argument("--mixed-precision", choices=MIXED_PRECISION, help="compute in 16 bits")
    training.add_argument(
        "--jit", choices=sorted(JIT), default="auto", help="XLA; on a CPU off is often faster (default: %(default)s)"
    )
    training.add_argument(
        "--strategy",
        choices=STRATEGIES,
        default="none",
        help="tf.distribute strategy, on TensorFlow; on JAX all devices are used (default: %(default)s)",
    )
    training.add_argument(
        "--timeout",
        type=int,
        metavar="SECONDS",
        default=600,
        help="of multiworker: how long to wait for a worker before ending with an error (default: %(default)s)",
    )
    files = parser.add_argument_group("files")
    files.add_argument("--backup-dir", type=pathlib.Path, metavar="DIR", help="resume from here after an interruption")
    files.add_argument("--tensorboard", type=pathlib.Path, metavar="DIR", help="write logs for TensorBoard")
    files.add_argument("--export", type=pathlib.Path, metavar="DIR", help="write the trained model as a SavedModel")
    files.add_argument("--results", type=pathlib.Path, metavar="JSON", help="write scores and curves")
    files.add_argument(
        "--out", type=pathlib.Path, default=f"{name}.png", help="picture of --compare (default: %(default)s)"
    )


def parse(parser):
    """The arguments, checked; a wrong one ends the program with a message, before anything is loaded."""
    args = parser.parse_args()
    if not (math.isfinite(args.alpha) and args.alpha >= 0):
        parser.error(f"--alpha must be a finite number ≥ 0. Received: {args.alpha}")
    if not 0 <= args.dropout < 1:
        parser.error(f"--dropout must be ≥ 0 and < 1. Received: {args.dropout}")
    if args.dropout == 0 and args.alpha > 0 and not args.plain:
        parser.error("--dropout must be > 0: R-Drop compares passes with different dropout. Or give --plain")
    if not (math.isfinite(args.learning_rate) and args.learning_rate > 0):
        parser.error(f"--learning-rate must be a finite number > 0. Received: {args.learning_rate}")
    check_least(parser, args, batch_size=1, epochs=1, seeds=1, timeout=1, train_rows=1)
    for name in ("backup_dir", "export", "tensorboard"):
        path = getattr(args, name)
        if path is not None and path.exists() and not path.is_dir():
            parser.error(f"--{name.replace('_', '-')} must be a folder. Received: {path}, a file")
    for name in ("out", "results"):
        path = getattr(args, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            parser.error(f"--{name} must be a file in a folder that exists. Received: {path}")
    if args.compare:
        if importlib.util.find_spec("matplotlib") is None:
            parser.error("--compare draws a picture, for which matplotlib is missing: pip install matplotlib")
        from matplotlib.backend_bases import FigureCanvasBase

        endings = ", ".join(f".{ending}" for ending in sorted(FigureCanvasBase.get_supported_filetypes()))
        if args.out.suffix.lower() not in endings.split(", "):
            parser.error(f"--out must end in one of {endings}. Received: {args.out}")
    backend = keras.backend.backend()
    if args.strategy != "none" and backend != "tensorflow":
        parser.error(f"--strategy is for the TensorFlow backend; on JAX all devices are used. The backend is {backend}")
    for name in ("export", "tensorboard"):
        if getattr(args, name) is not None and importlib.util.find_spec("tensorflow") is None:
            parser.error(f"--{name} needs TensorFlow: pip install tensorflow")
    if args.export is not None and backend == "torch":
        parser.error("--export writes a SavedModel, which Keras cannot from PyTorch: use TensorFlow or JAX")
    num_workers, is_chief = _worker(args)
    if num_workers > 1 and (args.plain or args.compare):
        parser.error(
            "--plain and --compare are for one process: Keras 3.15 does not train a plain model on several workers. "
            "--alpha 0 is plain training that does"
        )
    if args.backup_dir is not None:
        _check_backup(parser, args, is_chief)
    args.num_workers, args.is_chief = num_workers, is_chief
    if not is_chief:
        args.export = args.results = args.tensorboard = None
    return args


def _worker(args):
    """The number of workers, and whether this process is the first: it writes what all of them compute."""
    configuration = json.loads(os.environ.get("TF_CONFIG") or "{}") if args.strategy == "multiworker" else {}
    cluster, task = configuration.get("cluster", {}), configuration.get("task", {})
    first = "chief" if "chief" in cluster else "worker"
    return sum(map(len, cluster.values())) or 1, not task or (task["type"], int(task["index"])) == (first, 0)


def check_least(parser, args, **leasts):
    """Ends the program if an argument that is given is below the least of its name."""
    for name, least in leasts.items():
        value = getattr(args, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be ≥ {least}. Received: {value}")


def _check_backup(parser, args, is_chief):
    """A folder of another command's runs is refused: resuming them would mix the two."""
    path = args.backup_dir / "arguments.json"
    ours = {name: str(value) for name, value in vars(args).items() if name not in NOT_OF_THE_RUN}
    if path.exists():
        theirs = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        if changed:
            name = changed[0]
            parser.error(
                f"--backup-dir {args.backup_dir} holds runs with --{name.replace('_', '-')} {theirs.get(name)}. "
                f"Received: {ours.get(name)}. Give the same flags to resume, or another folder"
            )
    if is_chief:
        args.backup_dir.mkdir(parents=True, exist_ok=True)
        measure.write(path, ours)


# ## Devices
def prepare(args):
    """Sets precision and devices. Returns the scope in which models are to be made and compiled."""
    if args.mixed_precision is not None:
        keras.config.set_dtype_policy(args.mixed_precision)
    if keras.backend.backend() == "jax":
        num_devices = len(keras.distribution.list_devices())
        if num_devices > 1:
            keras.distribution.set_distribution(keras.distribution.DataParallel())
        scope = contextlib.nullcontext
    elif args.strategy == "none":
        num_devices, scope = 1, contextlib.nullcontext
    else:
        import tensorflow as tf

        if args.strategy == "mirrored":
            strategy = tf.distribute.MirroredStrategy()
        elif args.strategy == "multiworker":
            # Ends this process if the workers have not found each other by then, which they else wait for without end.
            faulthandler.dump_traceback_later(args.timeout, exit=True)
            options = tf.distribute.experimental.CommunicationOptions(timeout_seconds=args.timeout)
            strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
            faulthandler.cancel_dump_traceback_later()
        else:
            try:
                resolver = tf.distribute.cluster_resolver.TPUClusterResolver.connect()
            except (ValueError, tf.errors.OpError) as error:
                fail(f"--strategy tpu found no TPU: {error}")
            strategy = tf.distribute.TPUStrategy(resolver)
        num_devices, scope = strategy.num_replicas_in_sync, strategy.scope
    if args.batch_size % num_devices:
        fail(f"--batch-size must be a multiple of the {num_devices} devices. Received: {args.batch_size}")
    args.num_devices = num_devices
    return scope


# ## Runs
@dataclasses.dataclass
class Run:
    """One training run: plain where `alpha` is None, else with R-Drop."""

    alpha: float | None
    seed: int
    folder: pathlib.Path  # Of this process.
    backup: pathlib.Path  # Of all: the first worker writes it, each goes on from it.
    args: object
    scope: object

    @property
    def name(self):
        return "plain" if self.alpha is None else f"R-Drop (alpha={self.alpha:g})"

    @property
    def jit_compile(self):
        return JIT[self.args.jit]

    @property
    def verbose(self):
        """Progress bars for a reader, a line an epoch for a file."""
        return 1 if sys.stdout.isatty() else 2

    def callbacks(self):
        """What keeps the curves, and with `--backup-dir` the state of training, and with `--tensorboard` its logs."""
        callbacks = [
            rdrop_keras.plot.Clock(),
            keras.callbacks.CSVLogger(str(self.folder / "log.csv"), append=True),
        ]
        if self.args.backup_dir is not None:
            callbacks.append(Backup(self.backup, writes=self.args.is_chief))
        if self.args.tensorboard is not None:
            callbacks.append(keras.callbacks.TensorBoard(str(self.args.tensorboard / self.folder.name)))
        return callbacks

    def curves(self):
        """The logs of all epochs, those before an interruption too: `{name: [value of each epoch]}`."""
        with open(self.folder / "log.csv", encoding="utf-8", newline="") as file:
            rows = {int(row["epoch"]): row for row in csv.DictReader(file)}  # An epoch done twice counts as done last.
        rows = [rows[epoch] for epoch in sorted(rows)]
        curves = {key: [float(row[key]) for row in rows] for key in rows[0] if key != "epoch"}
        before, last = 0.0, 0.0
        for i, seconds in enumerate(curves["seconds"]):
            if seconds < last:  # The clock of a resumed run began again.
                before = curves["seconds"][i - 1]
            last = seconds
            curves["seconds"][i] = before + seconds
        return curves


class Backup(keras.callbacks.BackupAndRestore):
    """Each worker goes on from what the first has written.

    It is kept after training, so that an interruption of what follows, such as decoding, does not train again.
    """

    def __init__(self, folder, writes):
        super().__init__(str(folder), double_checkpoint=True, delete_checkpoint=False)
        self.writes = writes

    def on_epoch_end(self, epoch, logs=None):
        if self.writes:
            super().on_epoch_end(epoch, logs)


def run_all(args, scope, train):
    """Trains what the flags ask for, shows the scores in a table and saves the picture of `--compare`."""
    alphas = [None] if args.plain else [None, args.alpha] if args.compare else [args.alpha]
    records = []
    with contextlib.ExitStack() as stack:
        own = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        kept = args.backup_dir or own
        for seed in range(args.seed, args.seed + args.seeds):
            for alpha in alphas:
                name = f"{'plain' if alpha is None else 'rdrop'}-{seed}"
                run = Run(alpha, seed, (kept if args.is_chief else own) / name, kept / name / "backup", args, scope)
                records.append(_record(run, train, exports=(alpha, seed) == (alphas[-1], args.seed)))
                if args.results is not None:
                    measure.write(
                        args.results, {**measure.provenance(), "backend": keras.backend.backend(), "runs": records}
                    )
    if not args.is_chief:
        return
    print("\n" + table(records))
    if args.compare:
        histories = {}
        for record in records:
            histories.setdefault(record["name"], []).append(record["curves"])
        rdrop_keras.plot.compare(histories, args.out)
        print(f"\nCurves of both: {args.out}")
    if args.export is not None:
        (to_call,) = (record["to call"] for record in records if "to call" in record)
        kind = "R-Drop" if alphas[-1] is not None else "plain training"
        print(f"\nThe SavedModel of {kind}, seed {args.seed}, is in {args.export}. To load and call it:\n\n{to_call}")


def _record(run, train, exports):
    """What is kept of a run: made now, or before an interruption. Of one that `exports`, the SavedModel is written."""
    done = run.backup.parent / "done.json"
    run.folder.mkdir(exist_ok=True)
    if done.exists():
        print(f"\n{run.name}, seed {run.seed}: done before, in {run.folder}")
        return json.loads(done.read_text(encoding="utf-8"))
    print(f"\n{run.name}, seed {run.seed}")
    keras.utils.clear_session()
    keras.utils.set_random_seed(run.seed)
    model, scores = train(run)
    print(", ".join(f"{name} {value:.4g}" for name, value in scores.items()))
    record = {"name": run.name, "alpha": run.alpha, "seed": run.seed, "scores": scores}
    if not run.args.is_chief:
        return record
    record["curves"] = run.curves()
    if exports and run.args.export is not None:
        export(model, run.args.export)
        record["to call"] = how_to_call(model, run.args.export)
    measure.write(done, record)
    return record


def trainable(task):
    """The Keras model of a KerasHub task. The task's own `fit` takes arrays in their order: it never shuffles them."""
    return keras.Model(task.input, task.output, name=task.name)


def schedule(args, num_rows, warmup=0.1):
    """A learning rate that rises to its peak over the first `warmup` of all steps, and falls to 0 over the rest."""
    num_steps = args.epochs * (num_rows // args.batch_size)
    warmup_steps = round(warmup * num_steps)
    return keras.optimizers.schedules.CosineDecay(
        0.0 if warmup_steps else args.learning_rate,
        decay_steps=max(1, num_steps - warmup_steps),
        warmup_target=args.learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
    )


def whole_batches(args, *arrays):
    """The arrays (or dicts of them) without the rows that fill no batch: each step has one shape, as TPUs ask."""
    available = len(keras.tree.flatten(arrays)[0])
    num_rows = available // args.batch_size * args.batch_size
    if num_rows == 0:
        fail(f"--batch-size must be ≤ the {available} rows to train on. Received: {args.batch_size}")
    return keras.tree.map_structure(lambda array: array[:num_rows], arrays)


def filled(args, x, y, weights=None):
    """What is to be evaluated, on several devices with rows of weight 0 after it that make its batches whole.

    Keras deals no others out on JAX, and leaves some replicas without a row under `tf.distribute`, which not all models
    can take. Weights of rows are such that a mean over all rows is that over the true ones.
    """
    missing = -len(y) % args.batch_size
    if args.num_devices == 1 or missing == 0:
        return (x, y) if weights is None else (x, y, weights)
    if weights is None:
        weights = np.full(len(y), 1 + missing / len(y), "float32")
    x, y = keras.tree.map_structure(lambda array: np.concatenate([array, array[:1].repeat(missing, axis=0)]), (x, y))
    return x, y, np.concatenate([weights, np.zeros((missing, *weights.shape[1:]), weights.dtype)])


# ## Results
def table(records):
    """Mean, and over several seeds standard deviation, of each score."""
    rows = {}
    for record in records:
        scores = {**record["scores"], "seconds": record["curves"]["seconds"][-1]}
        for name, value in scores.items():
            rows.setdefault(record["name"], {}).setdefault(name, []).append(value)
    columns = list(next(iter(rows.values())))
    cells = [["", *columns]]
    for name, scores in rows.items():
        cells.append([name, *(measure.mean_and_deviation(scores[column], ".4g", ".2g") for column in columns)])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join(
        row[0].ljust(widths[0]) + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:]))
        for row in cells
    )


# ## Export
def export(model, path):
    try:
        model.export(str(path), verbose=False)
    except Exception as error:
        weights = path.with_suffix(".weights.h5")
        model.save_weights(weights)
        error.add_note(f"The trained weights are in {weights}.")
        raise


def how_to_call(model, path):
    """Python that loads the SavedModel and calls it on zeros of the right shapes."""
    arrays = keras.tree.map_structure(
        lambda x: f"tf.zeros({tuple(size or 1 for size in x.shape)}, {keras.backend.standardize_dtype(x.dtype)!r})",
        model.input,
    )
    if isinstance(arrays, dict):
        arrays = "{" + ", ".join(f"{name!r}: {array}" for name, array in arrays.items()) + "}"
    return (
        "    import tensorflow as tf\n\n"
        f"    served = tf.saved_model.load({str(path)!r})\n"
        f"    outputs = served.serve({arrays})"
    )


def progress(total, unit):
    """A bar for a reader, a line at its end for a file."""
    return keras.utils.Progbar(total, unit_name=unit, verbose=1 if sys.stdout.isatty() else 2)


def fail(message):
    """Ends the program as a wrong flag does."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)
