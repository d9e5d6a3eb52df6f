"""What a training step costs: plain training, R-Drop as others write it, and `RDropModel`.

All variants of a case train the same network on the same batch of random data, in one process, for a few steps each in
turn, so that what slows the machine slows all of them. A figure is the median over rounds of the ratio to the plain
steps of the same round. Peak memory is that of a process of its own for each variant, and is read on Linux only.

    python step_time.py                                  # the six small cases, 7 rounds
    KERAS_BACKEND=jax python step_time.py --cases bert,lm
    python step_time.py --options --cases vit            # the cost of passes, of two rates, of steps between
    KERAS_BACKEND=jax python step_time.py --gpu          # the large cases, in bfloat16
"""

import argparse
import functools
import pathlib
import re
import statistics
import subprocess
import sys
import time
import warnings

import keras
import keras_hub
import numpy as np
from keras import layers, ops

import measure
import rdrop_keras
import two_calls

SMALL = ("mobilenet", "efficientnet", "vit", "bert", "lm", "tiny")
LARGE = ("vit_b16", "bert_base", "decoder")
SECONDS_OF_A_TURN = 0.5  # Of plain training.
MOST_STEPS = 512  # Of a turn.
MEMORY_STEPS = 3
ALPHA = two_calls.ALPHA
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


# Each case returns a model with logits, a function that makes inputs and labels for n rows, and the layer up to which
# head-only sharing computes once, or None where no dropout comes after the body.


def images(size, classes, rows):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, size, size, 3)).astype("float32"), rng.integers(0, classes, rows)


def tokens(length, vocabulary, rows):
    rng = np.random.default_rng(0)
    inputs = {
        "token_ids": rng.integers(1, vocabulary, (rows, length)),
        "padding_mask": np.ones((rows, length), "int32"),
    }
    return inputs, rng


def sentences(length, vocabulary, rows):
    inputs, rng = tokens(length, vocabulary, rows)
    return {**inputs, "segment_ids": np.zeros((rows, length), "int32")}, rng.integers(0, 2, rows)


def text(length, vocabulary, rows):
    inputs, rng = tokens(length, vocabulary, rows)
    return inputs, rng.integers(1, vocabulary, (rows, length))


def mobilenet():
    backbone = keras.applications.MobileNetV2((96, 96, 3), include_top=False, weights=None, pooling="avg")
    model = keras.Sequential([keras.Input((96, 96, 3)), backbone, layers.Dropout(0.2), layers.Dense(10)])
    return model, functools.partial(images, 96, 10), None


def efficientnet():
    model = keras.applications.EfficientNetB0(
        input_shape=(96, 96, 3), weights=None, classes=10, classifier_activation=None
    )
    return model, functools.partial(images, 96, 10), "avg_pool"


def vit():
    backbone = keras_hub.models.ViTBackbone(
        (32, 32, 3),
        patch_size=(4, 4),
        num_layers=4,
        num_heads=4,
        hidden_dim=128,
        mlp_dim=512,
        dropout_rate=0.1,
        attention_dropout=0.1,
        name="backbone",
    )
    model = keras_hub.models.ViTImageClassifier(backbone=backbone, num_classes=10, dropout=0.1)
    return model, functools.partial(images, 32, 10), "backbone"


def bert(num_layers=4, num_heads=2, width=128, length=64, vocabulary=8000):
    backbone = keras_hub.models.BertBackbone(
        vocabulary, num_layers, num_heads, width, 4 * width, max_sequence_length=length
    )
    model = keras_hub.models.BertTextClassifier(backbone=backbone, num_classes=2, dropout=0.1)
    return model, functools.partial(sentences, length, vocabulary), "pooled_dense"


def lm(num_layers=2, num_heads=4, width=256, length=64, vocabulary=16_000):
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary, num_layers, num_heads, width, 4 * width, dropout=0.1, max_sequence_length=length
    )
    logits = backbone.token_embedding(backbone.output, reverse=True)
    return keras.Model(backbone.input, logits), functools.partial(text, length, vocabulary), None


def tiny():
    """So small that a step's time goes to what is around it."""
    model = keras.Sequential([keras.Input((16,)), layers.Dropout(0.1), layers.Dense(16, "relu"), layers.Dense(10)])
    return model, vectors, None


def vectors(rows):
    rng = np.random.default_rng(0)
    return rng.normal(size=(rows, 16)).astype("float32"), rng.integers(0, 10, rows)


def vit_b16():
    backbone = keras_hub.models.ViTBackbone(
        (224, 224, 3), (16, 16), 12, 12, 768, 3072, dropout_rate=0.1, attention_dropout=0.1, name="backbone"
    )
    model = keras_hub.models.ViTImageClassifier(backbone=backbone, num_classes=1000, dropout=0.1)
    return model, functools.partial(images, 224, 1000), "backbone"


bert_base = functools.partial(bert, num_layers=12, num_heads=12, width=768, length=128, vocabulary=30_522)
decoder = functools.partial(lm, num_layers=12, num_heads=12, width=768, length=128, vocabulary=50_257)

CASES = {
    "mobilenet": (mobilenet, 32, "MobileNetV2 96×96, head dropout"),
    "efficientnet": (efficientnet, 32, "EfficientNetB0 96×96, drop-connect and head dropout"),
    "vit": (vit, 32, "ViT of 4 layers, 128 wide, 64 patches"),
    "bert": (bert, 32, "BERT of 4 layers, 128 wide, 64 tokens"),
    "lm": (lm, 16, "GPT-2 of 2 layers, 256 wide, 64 tokens, vocabulary 16,000"),
    "tiny": (tiny, 32, "two dense layers of 16 and 10 units"),
    "lm_64k": (functools.partial(lm, vocabulary=64_000), 16, "the same GPT-2, vocabulary 64,000"),
    "lm_own_loss": (lm, 16, "GPT-2 with vocabulary 16,000, and a cross-entropy of one's own"),
    "vit_b16": (vit_b16, 64, "ViT-B/16 224×224"),
    "bert_base": (bert_base, 64, "BERT-base, 128 tokens"),
    "decoder": (decoder, 16, "GPT-2 of 12 layers, 768 wide, 128 tokens, vocabulary 50,257"),
}


def smoothed(y_true, y_pred):
    """Cross-entropy with smoothed labels of classes, which Keras does not have."""
    logs = ops.log_softmax(y_pred)
    chosen = ops.take_along_axis(logs, ops.expand_dims(ops.cast(y_true, "int32"), -1), axis=-1)
    return -(0.9 * ops.squeeze(chosen, -1) + 0.1 * ops.mean(logs, axis=-1))


OWN_LOSSES = {"lm_own_loss": smoothed}


def bert4keras(y_true, y_pred):
    """bert4keras: every row twice, next to its twin, and Keras's own losses of the probabilities."""
    p = ops.softmax(y_pred)
    crossentropy = ops.mean(keras.losses.sparse_categorical_crossentropy(y_true, p))
    kl = keras.losses.kl_divergence
    return crossentropy + ops.mean(kl(p[::2], p[1::2]) + kl(p[1::2], p[::2])) / 4 * ALPHA


class Clock(keras.callbacks.Callback):
    """Takes the seconds of an epoch of `fit`, up to the values of its logs."""

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds = time.perf_counter() - self.began


def in_fit(model, x, y):
    """A function that fits `model` for so many steps on the batch `x`, `y`, and returns the seconds they took."""

    def train(num_steps):
        clock = Clock()
        repeated = keras.tree.map_structure(lambda array: np.concatenate([array] * num_steps), (x, y))
        fitted = model.fit(*repeated, batch_size=len(y), shuffle=False, verbose=0, callbacks=[clock])
        assert np.isfinite(fitted.history["loss"][0])
        return clock.seconds

    return train


def in_loop(model, x, y):
    """The same, for the loop of two calls."""
    loop = two_calls.loop(model, x, y)

    def train(num_steps):
        began = time.perf_counter()
        assert np.isfinite(loop(num_steps))
        return time.perf_counter() - began

    return train


def plain(model):
    """`model` without the methods of a KerasHub task, which compile and feed it in their own way."""
    return keras.Model(model.inputs, model.outputs) if hasattr(model, "preprocess_samples") else model


def variants(case, rows=None, options=False):
    """`{name: function that makes a function that trains}` for a case and a batch of `rows`."""
    make, its_rows, _ = CASES[case]
    rows = rows or its_rows
    loss_of_case = OWN_LOSSES.get(case, CROSSENTROPY)

    def fitted(wrap=lambda model: model, loss=loss_of_case, repeats=1, times=1, accumulated=None):
        keras.utils.set_random_seed(0)
        model, data, _ = make()
        model = wrap(plain(model))
        model.compile(keras.optimizers.SGD(two_calls.LEARNING_RATE, gradient_accumulation_steps=accumulated), loss)
        return in_fit(
            model, *keras.tree.map_structure(lambda a: np.repeat(a, repeats, axis=0), data(int(rows * times)))
        )

    def looped():
        keras.utils.set_random_seed(0)
        model, data, _ = make()
        return in_loop(model, *data(rows))

    def rdrop(share="deterministic", **options):
        divergence = rdrop_keras.Divergence("kl", from_logits=True)  # As it is by default, but for losses of one's own.
        return lambda model: rdrop_keras.RDropModel(model, alpha=ALPHA, divergence=divergence, share=share, **options)

    yardsticks = {
        "plain": fitted,
        "plain, 2N rows": functools.partial(fitted, times=2),
    }
    if options:
        options = {
            **{f"num_passes={m}": {"num_passes": m} for m in (2, 3, 4)},
            "dropout_rates=(0.1, 0.3)": {"dropout_rates": (0.1, 0.3)},
            "every=k, its plain steps": {"every": 10**6},
        }
        options = {name: functools.partial(fitted, rdrop(**kwargs)) for name, kwargs in options.items()}
        # In the memory of plain training.
        options["half the rows, one of two steps"] = functools.partial(fitted, rdrop(), times=0.5, accumulated=2)
        return yardsticks | options
    by_hand = {"two calls": looped, "bert4keras": functools.partial(fitted, loss=bert4keras, repeats=2)}
    result = {
        **yardsticks,
        **({} if case in OWN_LOSSES else by_hand),
        "RDropModel, share='nothing'": functools.partial(fitted, rdrop("nothing")),
        "RDropModel": functools.partial(fitted, rdrop("deterministic")),
    }
    head = make()[2]
    if head is not None:
        result["RDropModel, head only"] = functools.partial(fitted, rdrop(head))
    return result


def seconds_of(function, *args):
    began = time.perf_counter()
    function(*args)
    return time.perf_counter() - began


def time_variants(functions, rounds, num_firsts=1):
    """What was measured of each, `{name: {…}}`.

    `seconds` of a step, of every round; `first_step_seconds` of a call of `fit` with one step, which traces and
    compiles; and `second_step_seconds` of another such call, in which `every` and `start` make a second program. Both
    are medians over `num_firsts` new models, which take turns too.
    """
    runs, calls = {}, {name: [] for name in functions}
    for name, make in list(functions.items()) * num_firsts:
        runs[name] = make()
        calls[name].append([seconds_of(runs[name], 1) for _ in range(2)])
    rows = {}
    for name, pairs in calls.items():
        first, second = map(statistics.median, zip(*pairs))
        rows[name] = {"seconds": [], "first_step_seconds": first, "second_step_seconds": second}
    num_steps = 1
    while runs["plain"](num_steps) < SECONDS_OF_A_TURN and num_steps < MOST_STEPS:
        num_steps *= 2
    for run in runs.values():
        run(num_steps)
    names = list(runs)
    for round_ in range(rounds):
        for i in range(len(names)):
            name = names[(i + round_) % len(names)]
            rows[name]["seconds"].append(runs[name](num_steps) / num_steps)
    return rows


def memory(args, case, variant):
    """Peak memory in MiB of a process that runs this variant alone: of the device where it tells, else of the host."""
    command = [sys.executable, __file__, "--dtype", args.dtype, "--memory-of", case, variant]
    command += ["--batch-size", str(args.batch_size)] if args.batch_size else []
    command += ["--options"] if args.options else []
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.split()[-1])


def own_memory(args):
    case, variant = args.memory_of
    run = variants(case, args.batch_size, args.options)[variant]()
    for _ in range(MEMORY_STEPS):
        run(1)
    if keras.backend.backend() == "jax":
        import jax

        statistics_ = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in statistics_:
            return statistics_["peak_bytes_in_use"] / 2**20
    # Not `getrusage`, whose peak a process inherits from the one that started it.
    status = pathlib.Path("/proc/self/status").read_text(encoding="ascii")
    return float(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10


def seconds_to_build():
    """Of the paired graph of a BERT with 12 layers; the width has no part in it."""
    model = bert(num_layers=12)[0]
    return statistics.median(seconds_of(rdrop_keras.sharing, model, "pooled_dense") for _ in range(5))


def ratios(rows, name, base):
    return [a / b for a, b in zip(rows[name]["seconds"], rows[base]["seconds"])]


def timed(args, case):
    _, batch_size, title = CASES[case]
    batch_size = args.batch_size or batch_size
    chosen = {
        name: variant for name, variant in variants(case, batch_size, args.options).items() if name not in args.without
    }
    measured = time_variants(chosen, args.rounds, args.firsts)
    rows = {}
    for name, row in measured.items():
        over_plain = ratios(measured, name, "plain")
        rows[name] = {
            **row,
            "seconds": statistics.median(row["seconds"]),
            "ratio": statistics.median(over_plain),
            "ratio_quartiles": statistics.quantiles(over_plain, n=4)[::2],
            "ratio_to_2N": statistics.median(ratios(measured, name, "plain, 2N rows")),
        }
    print(f"\n{title}, N = {batch_size}")
    print(f"{'':32} {'seconds':>8} {'× plain':>8} {'quartiles':>13} {'× 2N':>6} {'first step':>10}")
    for name, row in rows.items():
        low, high = row["ratio_quartiles"]
        print(
            f"{name:32} {row['seconds']:8.4f} {row['ratio']:8.2f} {low:8.2f}-{high:.2f} {row['ratio_to_2N']:6.2f} "
            f"{row['first_step_seconds']:10.2f}"
        )
    sys.stdout.flush()
    return {"title": title, "batch_size": batch_size, "variants": rows}


def add_memory(args, case, measured):
    print(f"\n{CASES[case][2]}: peak MiB")
    for name, row in measured.items():
        row["peak_MiB"] = round(memory(args, case, name))
        print(f"{name:32} {row['peak_MiB']:8}", flush=True)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", help=f"comma-separated, of {', '.join(CASES)}; by default the first six")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--firsts", type=int, default=3, help="models of each variant whose first step is timed")
    parser.add_argument(
        "--without", type=lambda names: names.split(";"), default=[], metavar="VARIANT;…", help="variants to leave out"
    )
    parser.add_argument("--batch-size", type=int, help="rows of a plain step; by default that of the case")
    parser.add_argument("--dtype", help="a Keras dtype policy; by default float32")
    parser.add_argument("--gpu", action="store_true", help="by default the last three cases, in mixed_bfloat16")
    parser.add_argument("--options", action="store_true", help="time the options of RDropModel instead")
    parser.add_argument(
        "--memory", default="all", help="cases to take the peak memory of too; 'all' (default) or 'none'"
    )
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file to write the results to, after each case")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.cases = args.cases.split(",") if args.cases else LARGE if args.gpu else SMALL
    args.dtype = args.dtype or ("mixed_bfloat16" if args.gpu else "float32")
    unknown = set(args.cases) - set(CASES)
    if unknown:
        parser.error(f"unknown --cases {', '.join(sorted(unknown))}: choose from {', '.join(CASES)}")
    args.memory = args.cases if args.memory == "all" else set(args.memory.split(",")) - {"none"}
    if args.memory and sys.platform != "linux":
        parser.error("peak memory is read on Linux only: add --memory none")
    if not set(args.memory) <= set(args.cases):
        parser.error(
            f"--memory must name some of the cases, {', '.join(args.cases)}. Received: {', '.join(args.memory)}"
        )
    if args.rounds < 2:
        parser.error(f"--rounds must be at least 2, for quartiles. Received: {args.rounds}")
    if args.firsts < 1:
        parser.error(f"--firsts must be at least 1. Received: {args.firsts}")
    return args


def main():
    args = parse_arguments()
    warnings.filterwarnings("ignore", "R-Drop was at most", UserWarning)  # Nothing here is to be learned.
    keras.config.set_dtype_policy(args.dtype)
    if args.memory_of:
        print(own_memory(args))
        return
    result = {
        **measure.provenance(),
        "backend": keras.backend.backend(),
        "dtype": args.dtype,
        "rounds": args.rounds,
        "alpha": ALPHA,
        "seconds_to_build_12_layers": seconds_to_build(),
        "cases": {},
    }
    print(f"Paired graph of a BERT with 12 layers: {result['seconds_to_build_12_layers']:.4f} s")
    for case in args.cases:
        result["cases"][case] = timed(args, case)
        if case in args.memory:
            add_memory(args, case, result["cases"][case]["variants"])
        if args.out:
            measure.write(args.out, result)


if __name__ == "__main__":
    main()
