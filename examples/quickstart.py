"""R-Drop on a small vision Transformer: what it changes, next to plain training.

A Transformer is trained on 400 images of handwritten digits, first as it is and then with R-Drop, several times each
from different random weights. The script prints the test accuracy, the test loss and the time a training step takes,
and saves a picture of both validation curves. The images come with scikit-learn, so nothing is downloaded.

R-Drop is the one line that wraps the model:

    model = rdrop_keras.RDropModel(model, alpha=1.0)

It needs scikit-learn and matplotlib, and takes about two minutes on two CPU cores:

    python quickstart.py
    python quickstart.py --alpha 3 --dropout 0.2 --seeds 5
    KERAS_BACKEND=jax python quickstart.py --out jax.pdf
"""

import argparse
import math
import pathlib
import time

import keras
import matplotlib
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import rdrop_keras

matplotlib.use("Agg")  # Draws to a file: no display needed.
from matplotlib import pyplot as plt  # noqa: E402

# Data
NUM_CLASSES = 10
IMAGE_SIZE = 8
NUM_TRAIN = 400
NUM_VALIDATION = 400  # The other 997 images are the test split.
SPLIT_SEED = 0

# Model
PATCH_SIZE = 2
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
WIDTH = 64
NUM_LAYERS = 2
NUM_HEADS = 4

# Training. The defaults of --alpha and --dropout and these values were chosen on the validation split.
EPOCHS = 60
BATCH_SIZE = 40
LEARNING_RATE = 1e-3
ALPHA = 1.0
DROPOUT = 0.1
NUM_SEEDS = 3

# Two colours that stay apart for the colour-blind, and two line styles that stay apart in black and white.
STYLES = {"plain": ("#D55E00", "--"), "R-Drop": ("#0072B2", "-")}


# ## The data
#
# 1797 grey images of 8 by 8 pixels. The split is stratified by digit and the same for every seed: what varies over
# seeds is the initial weights, the order of the batches and the dropout.
def load_data():
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, IMAGE_SIZE, IMAGE_SIZE).astype("float32") / 16.0
    x_train, x_rest, y_train, y_rest = train_test_split(
        images, labels, train_size=NUM_TRAIN, stratify=labels, random_state=SPLIT_SEED
    )
    x_validation, x_test, y_validation, y_test = train_test_split(
        x_rest, y_rest, train_size=NUM_VALIDATION, stratify=y_rest, random_state=SPLIT_SEED
    )
    return (x_train, y_train), (x_validation, y_validation), (x_test, y_test)


# ## The model
#
# An ordinary Keras model: a Transformer encoder over 16 patches of 2 by 2 pixels. It knows nothing of R-Drop. All that
# R-Drop asks of it is some dropout.
def build_model(dropout):
    inputs = keras.Input((IMAGE_SIZE, IMAGE_SIZE))

    # Cut the image into patches: (8, 8) -> (4, 2, 4, 2) -> (4, 4, 2, 2) -> (16, 4).
    side = IMAGE_SIZE // PATCH_SIZE
    x = keras.layers.Reshape((side, PATCH_SIZE, side, PATCH_SIZE))(inputs)
    x = keras.layers.Permute((1, 3, 2, 4))(x)
    x = keras.layers.Reshape((NUM_PATCHES, PATCH_SIZE**2))(x)

    # Project each patch, and add what was learned about its position: a bias for each patch and channel.
    x = keras.layers.EinsumDense(
        "bpi,io->bpo",
        output_shape=(NUM_PATCHES, WIDTH),
        bias_axes="po",
        bias_initializer=keras.initializers.RandomNormal(stddev=0.02),
        name="patch_and_position",
    )(x)
    x = keras.layers.Dropout(dropout)(x)

    for _ in range(NUM_LAYERS):
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.MultiHeadAttention(NUM_HEADS, WIDTH // NUM_HEADS, dropout=dropout)(y, y)
        y = keras.layers.Dropout(dropout)(y)
        x = keras.layers.Add()([x, y])

        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(2 * WIDTH, activation="gelu")(y)
        y = keras.layers.Dropout(dropout)(y)
        y = keras.layers.Dense(WIDTH)(y)
        y = keras.layers.Dropout(dropout)(y)
        x = keras.layers.Add()([x, y])

    x = keras.layers.LayerNormalization()(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    outputs = keras.layers.Dense(NUM_CLASSES)(x)
    return keras.Model(inputs, outputs, name="digits_transformer")


# ## Training
#
# Both ways compile and fit alike, for the same number of epochs. With the same seed both start from the same weights.
def train(method, alpha, dropout, seed, epochs, data):
    train_split, validation_split, test_split = data

    keras.utils.set_random_seed(seed)
    model = build_model(dropout)
    if method == "R-Drop":
        model = rdrop_keras.RDropModel(model, alpha=alpha)

    # From LEARNING_RATE down to zero, so that the last epoch is a fair point to compare.
    num_steps = epochs * math.ceil(NUM_TRAIN / BATCH_SIZE)
    learning_rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATE, decay_steps=num_steps)
    model.compile(
        optimizer=keras.optimizers.Adam(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    progress = Progress()
    history = model.fit(
        *train_split,
        batch_size=BATCH_SIZE,
        epochs=epochs,
        validation_data=validation_split,
        validation_batch_size=NUM_VALIDATION,
        callbacks=[progress],
        verbose=0,
    )

    # `evaluate` runs the wrapped model alone, so that both losses below are the same plain cross-entropy. That model
    # is `model.model`, an ordinary Keras model to save, export and serve.
    test_loss, test_accuracy = model.evaluate(*test_split, batch_size=NUM_VALIDATION, verbose=0)
    return {
        "test accuracy": test_accuracy,
        "test loss": test_loss,
        "seconds a step": float(np.median(progress.step_seconds)),
        "validation loss": history.history["val_loss"],
        "validation accuracy": history.history["val_accuracy"],
    }


class Progress(keras.callbacks.Callback):
    """One progress bar a run, and the time of each training step."""

    shown = ("loss", "task_loss", "consistency_loss", "val_loss", "val_accuracy")

    def on_train_begin(self, logs=None):
        self.step_seconds = []
        self.bar = keras.utils.Progbar(
            self.params["epochs"], stateful_metrics=self.shown, interval=0.5, unit_name="epoch"
        )
        self.bar.update(0)

    def on_train_batch_begin(self, batch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        float(logs["loss"])  # Waits until the step is done: JAX and GPUs run ahead of Python.
        self.step_seconds.append(time.perf_counter() - self.start)

    def on_epoch_end(self, epoch, logs=None):
        self.bar.update(epoch + 1, [(name, logs[name]) for name in self.shown if name in logs])


# ## The results
#
# Means and standard deviations over seeds.
def mean_and_deviation(values):
    """Mean and sample standard deviation over the first axis; the deviation of a single run is None."""
    values = np.asarray(values)
    return values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else None


def print_table(runs, labels):
    columns = {"test accuracy": ".3f", "test loss": ".3f", "seconds a step": ".4f"}
    print(f"\n{'':18}" + "".join(f"{column:>18}" for column in columns))
    for method, results in runs.items():
        row = f"{labels[method]:18}"
        for column, digits in columns.items():
            mean, deviation = mean_and_deviation([result[column] for result in results])
            row += (
                f"{mean:{digits}}".rjust(18)
                if deviation is None
                else f"{mean:{digits}} ± {deviation:{digits}}".rjust(18)
            )
        print(row)


def plot(runs, labels, path):
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, quantity in zip(axes, ("validation loss", "validation accuracy")):
        for method, results in runs.items():
            mean, deviation = mean_and_deviation([result[quantity] for result in results])
            color, line_style = STYLES[method]
            epochs = np.arange(1, len(mean) + 1)
            axis.plot(epochs, mean, color=color, linestyle=line_style, label=labels[method])
            if deviation is not None:
                axis.fill_between(epochs, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
        axis.set_xlabel("epoch")
        axis.set_ylabel(quantity)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=200)
