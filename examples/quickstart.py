"""R-Drop on a small vision Transformer: what it gains, in as many epochs and in as much time.

R-Drop pays where plain training overfits. So a Transformer is trained here on only 50 images of handwritten digits,
which it sees 500 times, each time shifted by up to a pixel. Three kinds of training are compared, several times each
from different random weights: plain training; plain training for as long as R-Drop takes, since its steps cost more;
and R-Drop. The images come with scikit-learn, so nothing is downloaded.

R-Drop is the one line that wraps the model:

    model = rdrop_keras.RDropModel(model, alpha=3.0)

It needs scikit-learn and matplotlib, and takes about two minutes on two CPU cores. Three seeds are few: small
differences need more, such as `--seeds 10`.

    python quickstart.py
    python quickstart.py --alpha 1 --seeds 10
    KERAS_BACKEND=jax python quickstart.py --out jax.pdf
"""

import argparse
import math
import pathlib
import time

import keras
import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import rdrop_keras

# Data
IMAGE_SIZE = 8
NUM_TRAIN = 50
NUM_VALIDATION = 400  # The other 1347 images are the test split.
PASSES_AN_EPOCH = 20  # Each epoch goes this often through the training images.

# Model
PATCH_SIZE = 2
WIDTH = 32
NUM_LAYERS = 2
NUM_HEADS = 4
MAX_SHIFT = 1 / IMAGE_SIZE  # One pixel.

# Training. TUNING
EPOCHS = 25
BATCH_SIZE = 25
LEARNING_RATE = 3e-3
DROPOUT = 0.1
ALPHA = 3.0
NUM_SEEDS = 3
TIMED_EPOCHS = 9  # Of each kind, to find out what R-Drop costs.


# ## The data
#
# 1797 grey images of 8 by 8 pixels. The split is stratified by digit and the same for every seed: what varies over
# seeds is the initial weights, the order of the batches, the shifts and the dropout. The training images are repeated,
# so that Keras, which validates after each epoch, does so after every 20 passes through them.
def load_data():
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 1).astype("float32") / 16.0
    x_train, x_rest, y_train, y_rest = train_test_split(
        images, labels, train_size=NUM_TRAIN, stratify=labels, random_state=0
    )
    x_validation, x_test, y_validation, y_test = train_test_split(
        x_rest, y_rest, train_size=NUM_VALIDATION, stratify=y_rest, random_state=0
    )
    train = np.tile(x_train, (PASSES_AN_EPOCH, 1, 1, 1)), np.tile(y_train, PASSES_AN_EPOCH)
    return train, (x_validation, y_validation), (x_test, y_test)


# ## The model
#
# An ordinary Keras model, a Transformer encoder over 16 patches of 2 by 2 pixels. It knows nothing of R-Drop. All that
# R-Drop asks of it is something random in training: here dropout, and images shifted by up to a pixel. Since the shift
# is inside the model, each pass of R-Drop draws its own and sees another view of the image. With `share="shift"` both
# passes would see the same view, as in the paper, where only dropout differs.
def build_model():
    inputs = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 1))
    x = keras.layers.RandomTranslation(MAX_SHIFT, MAX_SHIFT, fill_mode="constant", name="shift")(inputs)

    # Cut the image into patches, then give each position a bias of its own: attention does not see where a patch is.
    x = keras.layers.Conv2D(WIDTH, PATCH_SIZE, strides=PATCH_SIZE)(x)
    x = keras.layers.Reshape((-1, WIDTH))(x)
    x = keras.layers.EinsumDense("bpi,io->bpo", output_shape=x.shape[1:], bias_axes="po", name="position")(x)
    x = keras.layers.Dropout(DROPOUT)(x)

    for _ in range(NUM_LAYERS):
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.MultiHeadAttention(NUM_HEADS, WIDTH // NUM_HEADS, dropout=DROPOUT)(y, y)
        y = keras.layers.Dropout(DROPOUT)(y)
        x = keras.layers.Add()([x, y])

        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(2 * WIDTH, activation="gelu")(y)
        y = keras.layers.Dropout(DROPOUT)(y)
        y = keras.layers.Dense(WIDTH)(y)
        y = keras.layers.Dropout(DROPOUT)(y)
        x = keras.layers.Add()([x, y])

    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    outputs = keras.layers.Dense(10)(x)
    return keras.Model(inputs, outputs, name="digits_transformer")


# ## Training
#
# With `alpha=None` the Keras model is trained as it is; otherwise R-Drop trains it. Both compile and fit alike, and with
# the same seed both start from the same weights. The learning rate falls to zero over the epochs a run has.
def compile_model(alpha, seed, epochs):
    keras.utils.set_random_seed(seed)
    model = build_model()
    if alpha is not None:
        model = rdrop_keras.RDropModel(model, alpha=alpha)
    num_steps = epochs * PASSES_AN_EPOCH * math.ceil(NUM_TRAIN / BATCH_SIZE)
    learning_rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, decay_steps=num_steps)
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def train(alpha, seed, epochs, data):
    train_split, validation_split, test_split = data
    model = compile_model(alpha, seed, epochs)
    history = model.fit(
        *train_split,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_data=validation_split,
        validation_batch_size=NUM_VALIDATION,
        verbose=0,
    )
    # `evaluate` runs the wrapped model alone: the loss is the same plain cross-entropy in all runs. The trained model
    # is `model.model`, an ordinary Keras model to save, export and serve.
    loss, accuracy = model.evaluate(*test_split, batch_size=NUM_VALIDATION, verbose=0)
    print(f"  seed {seed}: test accuracy {accuracy:.3f}, test loss {loss:.3f}", flush=True)
    return {"accuracy": accuracy, "loss": loss, "history": history}


# ## The price
#
# A step of R-Drop passes each image through the network twice. What this costs depends on the machine, so it is
# measured: epochs of both kinds take turns, and the median ratio of their times says for how many epochs plain training
# may go on in the time of R-Drop. The first epochs, which compile, are left out, as in all times given here.
def time_epochs(alpha, data):
    """The median seconds of an epoch of plain training, and how many times that an epoch of R-Drop takes."""
    models = [compile_model(kind, seed=0, epochs=EPOCHS) for kind in (None, alpha)]
    seconds = []
    for _ in range(1 + TIMED_EPOCHS):
        seconds.append([])
        for model in models:
            start = time.perf_counter()
            model.fit(*data[0], batch_size=BATCH_SIZE, verbose=0)
            seconds[-1].append(time.perf_counter() - start)
    plain, rdrop = np.transpose(seconds[1:])
    return np.median(plain), np.median(rdrop / plain)


# ## The results
#
# Mean and standard deviation over seeds; and, since runs of one seed start from the same weights, the mean of the
# differences between them, with its 95 % interval by Student's t.
def print_results(runs, seconds):
    print(f"\n{'':16}{'epochs':>8}{'seconds':>9}{'test accuracy':>18}{'test loss':>18}")
    for name, results in runs.items():
        epochs = len(results[0]["history"].epoch)
        row = f"{name:16}{epochs:8}{epochs * seconds[name]:9.1f}"
        for measure in ("accuracy", "loss"):
            values = [result[measure] for result in results]
            deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
            row += f"{f'{np.mean(values):.3f}{deviation}':>18}"
        print(row)

    *baselines, rdrop = runs
    print()
    for baseline in baselines:
        cells = []
        for measure in ("accuracy", "loss"):
            differences = [r[measure] - p[measure] for r, p in zip(runs[rdrop], runs[baseline])]
            interval = ""
            if len(differences) > 1:
                half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
                interval = f" ± {half:.3f}"
            cells.append(f"{measure} {np.mean(differences):+.3f}{interval}")
        print(f"{rdrop} against {baseline}: {', '.join(cells)}")


# ## The command line
def parse_arguments():
    parser = argparse.ArgumentParser(description="Compares plain training with R-Drop on a small vision Transformer.")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="weight of R-Drop, ≥ 0 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of R-Drop (default: %(default)s)")
    parser.add_argument(
        "--out", type=pathlib.Path, default="quickstart.png", help="file of the picture (default: %(default)s)"
    )
    args = parser.parse_args()

    if not (math.isfinite(args.alpha) and args.alpha >= 0):
        parser.error(f"--alpha must be a finite number ≥ 0. Received: {args.alpha}")
    for name in ("seeds", "epochs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be ≥ 1. Received: {getattr(args, name)}")
    formats = FigureCanvasBase.get_supported_filetypes()
    if args.out.suffix[1:].lower() not in formats:
        endings = ", ".join(f".{ending}" for ending in sorted(formats))
        parser.error(f"--out must end in one of {endings}. Received: {args.out}")
    if not args.out.parent.is_dir():
        parser.error(f"--out must be in a folder that exists. Received: {args.out}")
    if args.out.is_dir():
        parser.error(f"--out must be a file, not a folder. Received: {args.out}")
    return args


def main():
    args = parse_arguments()
    data = load_data()
    plain_seconds, ratio = time_epochs(args.alpha, data)
    print(f"An epoch of R-Drop takes {ratio:.2f} times as long as one of plain training.")

    rdrop = f"R-Drop, α = {args.alpha:g}"
    kinds = {
        "plain": (None, args.epochs),
        "plain, as long": (None, round(args.epochs * ratio)),
        rdrop: (args.alpha, args.epochs),
    }
    seconds = {name: plain_seconds * (1 if alpha is None else ratio) for name, (alpha, _) in kinds.items()}
    runs = {}
    for name, (alpha, epochs) in kinds.items():
        print(f"{name}, {epochs} epochs")
        runs[name] = [train(alpha, seed, epochs, data) for seed in range(args.seeds)]
    print_results(runs, seconds)

    # The picture: over training steps and, with the seconds of an epoch that were measured above, over time.
    for name, results in runs.items():
        for history in (result["history"] for result in results):
            history.history["seconds"] = [seconds[name] * (epoch + 1) for epoch in history.epoch]
    rdrop_keras.plot.compare({name: [r["history"] for r in results] for name, results in runs.items()}, args.out)
    print(f"Curves: {args.out}")


if __name__ == "__main__":
    main()
