"""What a training step costs: plain training, R-Drop as others write it, and `RDropModel`.

All variants of a case train the same network on the same batch of random data, in one process, one step each in turn,
so that what slows the machine slows all of them. A figure is the median over rounds of the ratio to the plain step of
the same round. Peak memory is that of a process of its own for each variant, and is read on Linux only.

    python step_time.py                                  # the six small cases, 15 rounds
    KERAS_BACKEND=jax python step_time.py --cases bert,lm
    python step_time.py --options --cases vit            # the cost of passes, of two rates, of steps between
    KERAS_BACKEND=jax python step_time.py --cases vit_b16,bert_base --dtype mixed_bfloat16 --batch-size 128   # a GPU
"""

import argparse
import functools
import pathlib
import re
import statistics
import subprocess
import sys
import time

import keras
import keras_hub
import numpy as np
from keras import layers, ops

import measure
import rdrop_keras

SMALL = ("mobilenet", "efficientnet", "vit", "bert", "lm", "tiny")
LARGE = ("vit_b16", "bert_base")
WARM_UP_STEPS = 3
MEMORY_STEPS = 3
ALPHA = 1.0
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


def lm(vocabulary=16_000, length=64):
    backbone = keras_hub.models.GPT2Backbone(vocabulary, 2, 4, 256, 1024, dropout=0.1, max_sequence_length=length)
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

CASES = {
    "mobilenet": (mobilenet, 32, "MobileNetV2 96×96, head dropout"),
    "efficientnet": (efficientnet, 32, "EfficientNetB0 96×96, drop-connect and head dropout"),
    "vit": (vit, 32, "ViT of 4 layers, 128 wide, 64 patches"),
    "bert": (bert, 32, "BERT of 4 layers, 128 wide, 64 tokens"),
    "lm": (lm, 16, "GPT-2 of 2 layers, 256 wide, 64 tokens, vocabulary 16,000"),
    "tiny": (tiny, 32, "two dense layers of 16 and 10 units"),
    "vit_b16": (vit_b16, 64, "ViT-B/16 224×224"),
    "bert_base": (bert_base, 64, "BERT-base, 128 tokens"),
}


class TwoCalls(keras.Model):
    """The recipe in the README of the official repository: two calls of the model in a step.

    There it is a training loop; here it is `call` and `compute_loss`, so that Keras's own step runs it on any backend.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def call(self, inputs, training=None):
        return (self.model(inputs, training=training), self.model(inputs, training=training))

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        first, second = y_pred
        crossentropy = 0.5 * (CROSSENTROPY(y, first) + CROSSENTROPY(y, second))
        return crossentropy + ALPHA * 0.5 * (self.kl(first, second) + self.kl(second, first))

    @staticmethod
    def kl(p, q):
        """`F.kl_div(F.log_softmax(q), F.softmax(p))`, which takes the logarithm of its target."""
        target = ops.softmax(p)
        return ops.mean(ops.sum(target * (ops.log(target + 1e-30) - ops.log_softmax(q)), axis=-1))


def bert4keras(y_true, y_pred):
    """bert4keras: every row twice, next to its twin, and Keras's own losses of the probabilities."""
    p = ops.softmax(y_pred)
    crossentropy = ops.mean(keras.losses.sparse_categorical_crossentropy(y_true, p))
    kl = keras.losses.kl_divergence
    return crossentropy + ops.mean(kl(p[::2], p[1::2]) + kl(p[1::2], p[::2])) / 4 * ALPHA


def variants(args, case):
    """`{name: function that makes a compiled model and its batch}`."""
    make, rows, _ = CASES[case]
    rows = args.batch_size or rows

    def compiled(wrap, loss=CROSSENTROPY, repeats=1, times=1, accumulated=None):
        keras.utils.set_random_seed(0)
        model, data, _ = make()
        model = wrap(model)
        model.compile(keras.optimizers.SGD(1e-3, gradient_accumulation_steps=accumulated), loss)
        x, y = data(int(rows * times))
        return model, *keras.tree.map_structure(lambda array: np.repeat(array, repeats, axis=0), (x, y))

    def rdrop(share="deterministic", **options):
        return lambda model: rdrop_keras.RDropModel(model, alpha=ALPHA, share=share, **options)

    def plain(model):  # Not the task itself, whose KerasHub methods preprocess and compile in their own way.
        return keras.Model(model.inputs, model.outputs) if hasattr(model, "preprocess_samples") else model

    yardsticks = {
        "plain": functools.partial(compiled, plain),
        "plain, 2N rows": functools.partial(compiled, plain, times=2),
    }
    if args.options:
        options = {
            **{f"num_passes={m}": {"num_passes": m} for m in (2, 3, 4)},
            "dropout_rates=(0.1, 0.3)": {"dropout_rates": (0.1, 0.3)},
            "every=k, its plain steps": {"every": 10**6},
        }
        options = {name: functools.partial(compiled, rdrop(**kwargs)) for name, kwargs in options.items()}
        # In the memory of plain training.
        options["half the rows, one of two steps"] = functools.partial(compiled, rdrop(), times=0.5, accumulated=2)
        return yardsticks | options
    result = {
        **yardsticks,
        "two calls": functools.partial(compiled, TwoCalls),
        "bert4keras": functools.partial(compiled, plain, loss=bert4keras, repeats=2),
        "RDropModel, share='nothing'": functools.partial(compiled, rdrop("nothing")),
        "RDropModel": functools.partial(compiled, rdrop("deterministic")),
    }
    head = make()[2]
    if head is not None:
        result["RDropModel, head only"] = functools.partial(compiled, rdrop(head))
    return result


def step(model, x, y):
    return float(np.ravel(model.train_on_batch(x, y))[0])


def time_case(args, case):
    """`{variant: seconds of every round}`, and `{variant: seconds of the first step}`, which traces and compiles."""
    runs, first = {}, {}
    for name, make in variants(args, case).items():
        runs[name] = make()
        start = time.perf_counter()
        step(*runs[name])
        first[name] = time.perf_counter() - start
        for _ in range(WARM_UP_STEPS):
            assert np.isfinite(step(*runs[name])), name
    seconds = {name: [] for name in runs}
    names = list(runs)
    for round_ in range(args.rounds):
        for i in range(len(names)):
            name = names[(i + round_) % len(names)]
            start = time.perf_counter()
            step(*runs[name])
            seconds[name].append(time.perf_counter() - start)
    return seconds, first


def memory(args, case, variant):
    """Peak memory in MiB of a process that runs this variant alone: of the device where it tells, else of the host."""
    command = [sys.executable, __file__, "--dtype", args.dtype, "--memory-of", case, variant]
    command += ["--batch-size", str(args.batch_size)] if args.batch_size else []
    command += ["--options"] if args.options else []
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.split()[-1])


def own_memory(args):
    case, variant = args.memory_of
    run = variants(args, case)[variant]()
    for _ in range(MEMORY_STEPS):
        step(*run)
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
    times = []
    for _ in range(5):
        start = time.perf_counter()
        rdrop_keras.sharing(model, "pooled_dense")
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ratios(seconds, name, base):
    return [a / b for a, b in zip(seconds[name], seconds[base])]


def timed(args, case):
    seconds, first = time_case(args, case)
    rows = {}
    for name in seconds:
        over_plain = ratios(seconds, name, "plain")
        rows[name] = {
            "seconds": statistics.median(seconds[name]),
            "ratio": statistics.median(over_plain),
            "ratio_quartiles": statistics.quantiles(over_plain, n=4)[::2],
            "first_step_seconds": first[name],
            "ratio_to_2N": statistics.median(ratios(seconds, name, "plain, 2N rows")),
        }
    _, batch_size, title = CASES[case]
    batch_size = args.batch_size or batch_size
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
    parser.add_argument("--cases", default=",".join(SMALL), help=f"comma-separated, of {', '.join(SMALL + LARGE)}")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch-size", type=int, help="rows of a plain step; by default that of the case")
    parser.add_argument("--dtype", default="float32", help="a Keras dtype policy")
    parser.add_argument("--options", action="store_true", help="time the options of RDropModel instead")
    parser.add_argument("--no-memory", action="store_true", help="measure time only")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file to write the results to")
    parser.add_argument("--memory-of", nargs=2, metavar=("CASE", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set(args.cases.split(",")) - set(SMALL + LARGE)
    if unknown:
        parser.error(f"unknown --cases {', '.join(sorted(unknown))}: choose from {', '.join(SMALL + LARGE)}")
    return args


def main():
    args = parse_arguments()
    keras.config.set_dtype_policy(args.dtype)
    if args.memory_of:
        print(own_memory(args))
        return
    result = {
        **measure.provenance(),
        "backend": keras.backend.backend(),
        "rounds": args.rounds,
        "alpha": ALPHA,
        "seconds_to_build_12_layers": seconds_to_build(),
        "cases": {case: timed(args, case) for case in args.cases.split(",")},
    }
    print(f"\nPaired graph of a BERT with 12 layers: {result['seconds_to_build_12_layers']:.4f} s")
    if not args.no_memory and sys.platform == "linux":
        for case, measured in result["cases"].items():
            add_memory(args, case, measured["variants"])
    if args.out:
        measure.write(args.out, result)


if __name__ == "__main__":
    main()
