"""R-Drop on a small vision Transformer: what it gains, in as many epochs and in as much time.

R-Drop pays where plain training overfits. So a Transformer is trained here on only 50 images of handwritten digits,
which it sees 500 times, each time shifted at random by up to a pixel. Three ways to train are compared, each several
times from different random weights: plain training; plain training for as long as R-Drop takes, whose steps cost more;
and R-Drop. The images come with scikit-learn, so nothing is downloaded. R-Drop is the one line that wraps the model:

    model = rdrop_keras.RDropModel(model, alpha=3.0)

It needs scikit-learn and matplotlib, and takes two to three minutes on two CPU cores with TensorFlow. With JAX it needs
a GPU, because on a CPU its compiler makes the shifts slow. Three seeds are few. To detect small differences give more.

    python quickstart.py
    python quickstart.py --alpha 1 --seeds 10
"""

import argparse
import itertools
import math

import keras
import numpy as np
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import rdrop_keras

# Data
IMAGE_SIZE = 8
NUM_TRAIN = 50
NUM_VALIDATION = 400  # The other 1347 images are the test split.
PASSES_AN_EPOCH = 20  # How often each epoch goes through the training images.

# Model
PATCH_SIZE = 2
WIDTH = 32
NUM_LAYERS = 2
NUM_HEADS = 4

# Training. Chosen for each kind by its validation loss over three seeds other than those below. For plain training, of
# dropout 0, 0.05, 0.1 and 0.2 and learning rates 0.001 and 0.003: at best 0.653 in these epochs and 0.610 in 33, which
# take as long as R-Drop (0.642 with 0.003). For R-Drop, of α 1, 3 and 5, dropout 0.05 and 0.1 and these rates: 0.526.
EPOCHS = 25
BATCH_SIZE = 25
DROPOUT = 0.05
ALPHA = 3.0
LEARNING_RATES = {"plain": 0.003, "plain, as long": 0.001, "R-Drop": 0.003}
NUM_SEEDS = 3
STEPS_PER_EXECUTION = 10  # The steps are so small that calling them one by one would take a good part of the time.


# ## The data
#
# 1797 grey images of 8 by 8 pixels. The split is stratified by digit and the same for every seed: what varies over
# seeds is the initial weights, the order of the batches, the shifts and the dropout. The training images are repeated,
# so that Keras validates after every 20 passes through them and not after each.
def load_data():
    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, IMAGE_SIZE, IMAGE_SIZE, 1).astype("float32") / 16.0
    x_train, x, y_train, y = train_test_split(x, y, train_size=NUM_TRAIN, stratify=y, random_state=0)
    x_valid, x_test, y_valid, y_test = train_test_split(x, y, train_size=NUM_VALIDATION, stratify=y, random_state=0)
    train = np.tile(x_train, (PASSES_AN_EPOCH, 1, 1, 1)), np.tile(y_train, PASSES_AN_EPOCH)
    return train, (x_valid, y_valid), (x_test, y_test)


# ## The model
#
# An ordinary Keras model, a Transformer encoder over 16 patches of 2 by 2 pixels. It knows nothing of R-Drop. All that
# R-Drop asks of it is something random in training: here dropout, and images shifted by up to a pixel. Since the shift
# is inside the model, each pass of R-Drop draws its own and sees another view of the image. `share="shift"` would show
# both passes the same view, as in the paper, where they differ by dropout alone.
def build_model():
    inputs = keras.Input((IMAGE_SIZE, IMAGE_SIZE, 1))
    x = keras.layers.RandomTranslation(1 / IMAGE_SIZE, 1 / IMAGE_SIZE, fill_mode="constant", name="shift")(inputs)

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
    return keras.Model(inputs, keras.layers.Dense(10)(x), name="digits_transformer")


# ## Training
#
# R-Drop wraps the model; plain training takes it as it is. The learning rate falls to zero over the epochs that a run
# has. Keras takes longer to make the program of a step than to run some epochs of it. So each kind is compiled once, by
# an epoch that does not count. The callback `Clock` adds the seconds since training began to the history.
def compiled_model(kind, alpha, epochs, data):
    model = build_model()
    if kind == "R-Drop":
        model = rdrop_keras.RDropModel(model, alpha=alpha)
    num_steps = epochs * PASSES_AN_EPOCH * NUM_TRAIN // BATCH_SIZE
    learning_rate = keras.optimizers.schedules.CosineDecay(LEARNING_RATES[kind], num_steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.Adam(learning_rate)
    model.compile(optimizer, loss, metrics=["accuracy"], steps_per_execution=STEPS_PER_EXECUTION)
    fit(model, data, epochs=1)
    return model


def fit(model, data, epochs):
    options = {"batch_size": BATCH_SIZE, "validation_batch_size": NUM_VALIDATION, "verbose": 0}
    callbacks = [rdrop_keras.plot.Clock()]
    return model.fit(*data[0], validation_data=data[1], epochs=epochs, callbacks=callbacks, **options)


# Each run begins with new weights, with the same seed those of the other kinds, and with the optimizer as it was.
def train(kind, model, seed, epochs, data):
    keras.utils.set_random_seed(seed)
    model.set_weights(build_model().get_weights())
    for variable in model.optimizer.variables:
        variable.assign(keras.ops.zeros_like(variable))

    history = fit(model, data, epochs)
    seconds = history.history["seconds"][-1]
    # `evaluate` runs the wrapped model alone, `model.model`: an ordinary Keras model to save, export and serve.
    loss, accuracy = model.evaluate(*data[2], batch_size=NUM_VALIDATION, verbose=0)
    print(f"{kind}, seed {seed}: {seconds:.1f} s, test accuracy {accuracy:.3f}, test loss {loss:.3f}", flush=True)
    return {"accuracy": accuracy, "loss": loss, "seconds": seconds, "history": history}


# ## The comparison
#
# A step of R-Drop passes each image through the network twice. What that costs depends on the machine, so it is
# measured: runs of both kinds take turns, and the median ratio of their times tells how many epochs of plain training
# fit into the time of R-Drop.
def compare(alpha, num_seeds, epochs, data):
    keras.utils.set_random_seed(0)
    runs = {"plain": [], "plain, as long": [], "R-Drop": []}
    models = {kind: compiled_model(kind, alpha, epochs, data) for kind in ("plain", "R-Drop")}
    for seed in range(num_seeds):
        for kind, model in models.items():
            runs[kind].append(train(kind, model, seed, epochs, data))

    ratios = [ours["seconds"] / theirs["seconds"] for ours, theirs in zip(runs["R-Drop"], runs["plain"])]
    print(f"R-Drop takes {np.median(ratios):.2f} times as long as plain training.")
    as_long = round(epochs * np.median(ratios))
    model = compiled_model("plain, as long", alpha, as_long, data)
    runs["plain, as long"] = [train("plain, as long", model, seed, as_long, data) for seed in range(num_seeds)]
    return runs


# ## The results
#
# First the mean and standard deviation over seeds. Then the mean of the differences between runs of the same seed,
# which start from the same weights, with its 95 % interval by Student's t.
def cell(values, paired=False):
    text = f"{np.mean(values):{'+' if paired else ''}.3f}"
    if len(values) > 1:
        half_interval = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
        text += f" ± {half_interval if paired else np.std(values, ddof=1):.3f}"
    return f"{text:>18}"


def print_results(runs):
    print(f"\n{'':16}{'epochs':>8}{'seconds':>9}{'test accuracy':>18}{'test loss':>18}")
    for name, results in runs.items():
        epochs, seconds = len(results[0]["history"].epoch), np.mean([result["seconds"] for result in results])
        cells = [cell([result[measure] for result in results]) for measure in ("accuracy", "loss")]
        print(f"{name:16}{epochs:8}{seconds:9.1f}", *cells, sep="")

    print("\nR-Drop against")
    for name in ("plain", "plain, as long"):
        pairs = list(zip(runs["R-Drop"], runs[name]))
        cells = [cell([ours[m] - theirs[m] for ours, theirs in pairs], paired=True) for m in ("accuracy", "loss")]
        print(f"{name:33}", *cells, sep="")


# ## The command line
def main():
    parser = argparse.ArgumentParser(description="Compares plain training with R-Drop on a small vision Transformer.")
    parser.add_argument("--alpha", type=float, default=ALPHA, help="weight of R-Drop, ≥ 0 (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=NUM_SEEDS, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="epochs of R-Drop (default: %(default)s)")
    args = parser.parse_args()
    if not 0 <= args.alpha < math.inf:
        parser.error(f"--alpha must be a finite number ≥ 0. Received: {args.alpha}")
    if args.seeds < 1 or args.epochs < 1:
        parser.error(f"--seeds and --epochs must be ≥ 1. Received: {args.seeds} and {args.epochs}")

    runs = compare(args.alpha, args.seeds, args.epochs, load_data())
    print_results(runs)

    # The validation curves, over steps and over seconds.
    histories = {kind: [result["history"] for result in results] for kind, results in runs.items()}
    for history in itertools.chain(*histories.values()):
        history.history = {key: history.history[key] for key in ("val_loss", "val_accuracy", "seconds")}
    figure = rdrop_keras.plot.compare(histories)
    for axes in figure.axes:  # The range is that of the last three quarters of the curves, which are steep before.
        late = np.concatenate([line.get_ydata()[len(line.get_ydata()) // 4 :] for line in axes.get_lines()])
        axes.set_ylim(late.min() - 0.05, late.max() + 0.05)
    figure.savefig("quickstart.png", dpi=150)
    print("Curves: quickstart.png")


if __name__ == "__main__":
    main()
