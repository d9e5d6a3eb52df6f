"""How a step's time grows with replicas: plain Keras beside R-Drop, under each way to use several devices.

Replicas have as many rows each, however many they are (weak scaling), so that a step on n of them at an efficiency of 1
takes the time of one. Plain training and R-Drop take turns in one process, an epoch of a few steps each; a figure is
the median over rounds. What the replicas exchange is not measured here: that it is what plain training exchanges is
asserted by `tests/test_distribution.py`, from the compiled program and from the strategy's trace.

    python scaling.py                                    # all engines that are installed, 1 and 2 replicas
    python scaling.py --engines data_parallel --replicas 1 2 4
    python scaling.py --engines data_parallel --replicas 1 2 4 8 --width 768 --layers 12 --length 128   # GPUs

On a machine without GPUs the replicas are parts of one CPU: they share its cores, and efficiency says how well.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import measure

# Engine: the backend, whether replicas are processes, and what it is.
ENGINES = {
    "mirrored": ("tensorflow", False, "tf.distribute.MirroredStrategy"),
    "multi_worker": ("tensorflow", True, "tf.distribute.MultiWorkerMirroredStrategy"),
    "data_parallel": ("jax", False, "keras.distribution.DataParallel, devices of one process"),
    "processes": ("jax", True, "keras.distribution.DataParallel, processes"),
}
# Under MultiWorkerMirroredStrategy Keras 3.15 trains no plain model; alpha=0 is plain training.
PLAIN_IS_ALPHA_0 = ("multi_worker",)
STEPS = 4  # Of an epoch.


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=sorted(ENGINES), metavar="ENGINE", default=list(ENGINES))
    parser.add_argument("--replicas", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", type=int, default=16, help="of each replica (default: %(default)s)")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--length", type=int, default=32, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--out", type=pathlib.Path, help="write the results as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.replicas) < 1 or args.rounds < 1:
        parser.error(f"--replicas and --rounds must be ≥ 1. Received: {args.replicas} and {args.rounds}")
    return args


# ## One worker
def time_steps(args, engine, replicas, index, addresses):
    """Seconds of a step, `{kind: [of each round]}`."""
    rows, scope = args.rows * replicas, contextlib.nullcontext
    if engine == "mirrored":
        import tensorflow as tf

        kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
        if kind == "CPU":
            cpu = tf.config.list_physical_devices("CPU")[0]
            tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
        # NCCL is for GPUs; logical devices of a CPU are summed on one.
        operations = tf.distribute.ReductionToOneDevice() if kind == "CPU" else None
        devices = [f"{kind}:{i}" for i in range(replicas)]
        scope = tf.distribute.MirroredStrategy(devices, cross_device_ops=operations).scope
    elif engine == "multi_worker":
        import tensorflow as tf

        scope = tf.distribute.MultiWorkerMirroredStrategy().scope
    import keras

    if engine == "processes":
        rows = args.rows  # Each process gives its own.
        keras.distribution.initialize(",".join(addresses), replicas, index)
        keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    elif engine == "data_parallel":
        devices = keras.distribution.list_devices()[:replicas]
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
    import numpy as np

    import rdrop_keras

    with scope():
        models = {}
        for kind, alpha in (("plain", 0.0), ("R-Drop", 1.0)):
            keras.utils.set_random_seed(0)
            model = encoder(args)
            if alpha or engine in PLAIN_IS_ALPHA_0:
                model = rdrop_keras.RDropModel(model, alpha)
            model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            models[kind] = model
    x = np.random.RandomState(0).randint(0, 1000, size=(rows * STEPS, args.length))
    y = x[:, 0] % 3
    seconds = {kind: [] for kind in models}
    for i in range(args.rounds + 2):
        for kind, model in models.items():
            began = time.perf_counter()
            model.fit(x, y, batch_size=rows, verbose=0, shuffle=False)
            if i > 1:  # Both before may compile.
                seconds[kind].append((time.perf_counter() - began) / STEPS)
    return {"seconds": seconds, "versions": measure.provenance()["versions"]}


def encoder(args):
    """A Transformer encoder that classifies; its first dropout is near its inputs, so that R-Drop shares nothing."""
    from keras import layers

    x = layers.Input((args.length,), dtype="int32")
    h = layers.Dropout(0.1)(layers.Embedding(1000, args.width)(x))
    for _ in range(args.layers):
        attention = layers.MultiHeadAttention(4, args.width // 4, dropout=0.1)(h, h)
        h = layers.LayerNormalization()(h + layers.Dropout(0.1)(attention))
        dense = layers.Dense(args.width)(layers.Dense(4 * args.width, activation="gelu")(h))
        h = layers.LayerNormalization()(h + layers.Dropout(0.1)(dense))
    import keras

    return keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling1D()(h)))


# ## All of them
def run(args, engine, replicas):
    """What `time_steps` gave to the first process."""
    backend, are_processes, _ = ENGINES[engine]
    addresses = [f"127.0.0.1:{port}" for port in measure.free_ports(replicas)]
    processes = []
    for index in range(replicas if are_processes else 1):
        environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        if backend == "jax":
            count = 1 if are_processes else replicas
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
        elif are_processes:
            task = {"type": "worker", "index": index}
            environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
        worker = json.dumps([engine, replicas, index, addresses])
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", worker]
        output = subprocess.PIPE if index == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.DEVNULL))
    output, _ = processes[0].communicate()
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"{engine} with {replicas} replicas failed: exit codes {codes}")
    return json.loads(output.splitlines()[-1])


def main():
    args = arguments()
    if args.worker:
        engine, replicas, index, addresses = json.loads(args.worker)
        print(json.dumps(time_steps(args, engine, replicas, index, addresses)))
        return
    results = {
        **{key: value for key, value in measure.provenance().items() if key != "versions"},
        "rounds": args.rounds,
        "rows of a replica": args.rows,
        "engines": {},
    }
    print(
        f"{'':14}{'replicas':>9}{'plain ms':>10}{'R-Drop ms':>11}{'R-Drop/plain':>14}{'efficiency':>12}{'of plain':>10}"
    )
    for engine in args.engines:
        backend, _, title = ENGINES[engine]
        if importlib.util.find_spec(backend) is None:
            print(f"{engine:14}  {backend} is not installed")
            continue
        rows = results["engines"][engine] = {"title": title, "plain is alpha=0": engine in PLAIN_IS_ALPHA_0}
        first = None
        for replicas in args.replicas:
            measured = run(args, engine, replicas)
            seconds = {kind: statistics.median(values) for kind, values in measured["seconds"].items()}
            ratio = statistics.median(
                b / a for a, b in zip(measured["seconds"]["plain"], measured["seconds"]["R-Drop"])
            )
            first = first or seconds
            efficiency = {kind: first[kind] / seconds[kind] for kind in seconds}
            rows["versions"] = measured["versions"]
            rows[str(replicas)] = {"seconds": seconds, "ratio": ratio, "efficiency": efficiency}
            print(
                f"{engine:14}{replicas:9}{1000 * seconds['plain']:10.1f}{1000 * seconds['R-Drop']:11.1f}{ratio:14.2f}"
                f"{efficiency['R-Drop']:12.2f}{efficiency['plain']:10.2f}",
                flush=True,
            )
    if args.out:
        measure.write(args.out, results)


if __name__ == "__main__":
    main()
