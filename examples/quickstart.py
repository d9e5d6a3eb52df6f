# %% [markdown]
# # What R-Drop gains on fifty images
#
# R-Drop pays where plain training overfits. So a small vision Transformer is trained here on only 50 images of
# handwritten digits, each shifted at random by up to a pixel. Plain training, plain training for as long as R-Drop
# takes, and R-Drop are compared, each from three different random weights. R-Drop is the one line that wraps the model.
#
# The images come with scikit-learn. On two processor cores the page takes two or three minutes with TensorFlow. With
# JAX it needs a GPU: on a processor its compiler makes the shifts slow. In a copy of the repository, this installs what
# the page needs:
#
#     python -m pip install ".[tensorflow,examples]"

# %%
import itertools

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import rdrop_keras

ALPHA = 3.0  # The weight of R-Drop.
DROPOUT = 0.05
EPOCHS = {"plain": 25, "plain, as long": 33, "R-Drop": 25}  # A step of R-Drop takes about 1.3 times as long.
LEARNING_RATES = {"plain": 0.003, "plain, as long": 0.001, "R-Drop": 0.003}
NUM_SEEDS = 3
NUM_TRAIN = 50
PASSES_AN_EPOCH = 20  # How often each epoch goes through the training images.
BATCH_SIZE = 25
WIDTH = 32
STEPS_PER_EXECUTION = 1 if keras.backend.backend() == "torch" else 10  # PyTorch makes them one by one.

# %% [markdown]
# α, dropout and the learning rates were chosen for each kind of training by its validation loss, with other seeds than
# those below.
#
# ## The data
#
# Of 1797 images of 8 by 8 pixels, 50 are trained on, 400 are for validation and the others for the test.

# %%
x, y = load_digits(return_X_y=True)
x = x.reshape(-1, 8, 8, 1).astype("float32") / 16.0
x_train, x, y_train, y = train_test_split(x, y, train_size=NUM_TRAIN, stratify=y, random_state=0)
x_valid, x_test, y_valid, y_test = train_test_split(x, y, train_size=400, stratify=y, random_state=0)
x_train, y_train = np.tile(x_train, (PASSES_AN_EPOCH, 1, 1, 1)), np.tile(y_train, PASSES_AN_EPOCH)

# %% [markdown]
# ## The model
#
# An ordinary Keras model: it knows nothing of R-Drop. All that R-Drop asks of it is something random in training: here
# dropout and the shift, which each of the two passes draws for itself. `share="shift"` would show both the same view of
# an image, as in the paper, where they differ by dropout alone.


# %%
def build_model():
    inputs = keras.Input((8, 8, 1))
    x = keras.layers.RandomTranslation(1 / 8, 1 / 8, fill_mode="constant", name="shift")(inputs)
    x = keras.layers.Reshape((-1, WIDTH))(keras.layers.Conv2D(WIDTH, 2, strides=2)(x))  # 16 patches.
    x = keras.layers.EinsumDense("bpi,io->bpo", output_shape=(16, WIDTH), bias_axes="po")(x)  # A bias for each place.
    x = keras.layers.Dropout(DROPOUT)(x)
    for _ in range(2):
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.MultiHeadAttention(4, WIDTH // 4, dropout=DROPOUT)(y, y)
        x = keras.layers.Add()([x, keras.layers.Dropout(DROPOUT)(y)])
        y = keras.layers.Dense(2 * WIDTH, activation="gelu")(keras.layers.LayerNormalization()(x))
        y = keras.layers.Dense(WIDTH)(keras.layers.Dropout(DROPOUT)(y))
        x = keras.layers.Add()([x, keras.layers.Dropout(DROPOUT)(y)])
    x = keras.layers.GlobalAveragePooling1D()(keras.layers.LayerNormalization()(x))
    return keras.Model(inputs, keras.layers.Dense(10)(x))


# %% [markdown]
# ## Training, with R-Drop and without
#
# To compile a step takes as long as some epochs. So each kind is compiled once, by an epoch that does not count, and
# every run starts with new weights and a new state of the optimizer. The callback `Clock` adds seconds to the history.

# %%
options = {"batch_size": BATCH_SIZE, "validation_data": (x_valid, y_valid), "validation_batch_size": 400, "verbose": 0}
histories = {}
print(f"{'':16}{'epochs':>8}{'seconds':>9}{'test accuracy':>18}{'test loss':>18}")
for kind, epochs in EPOCHS.items():
    keras.utils.set_random_seed(0)
    model = build_model()
    if kind == "R-Drop":
        model = rdrop_keras.RDropModel(model, alpha=ALPHA)
    num_steps = epochs * len(x_train) // BATCH_SIZE
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(LEARNING_RATES[kind], num_steps))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], steps_per_execution=STEPS_PER_EXECUTION)
    model.fit(x_train, y_train, **options)

    histories[kind], scores = [], []
    for seed in range(NUM_SEEDS):
        keras.utils.set_random_seed(seed)
        model.set_weights(build_model().get_weights())
        for variable in optimizer.variables:
            variable.assign(keras.ops.zeros(variable.shape, variable.dtype))
        callbacks = [rdrop_keras.plot.Clock()]
        histories[kind].append(model.fit(x_train, y_train, epochs=epochs, callbacks=callbacks, **options))
        scores.append(model.evaluate(x_test, y_test, batch_size=400, verbose=0))  # The model alone, without dropout.

    seconds = np.mean([history.history["seconds"][-1] for history in histories[kind]])
    (loss, accuracy), (loss_deviation, deviation) = np.mean(scores, axis=0), np.std(scores, axis=0, ddof=1)
    cells = f"{accuracy:.3f} ± {deviation:.3f}", f"{loss:.3f} ± {loss_deviation:.3f}"
    print(f"{kind:16}{epochs:8}{seconds:9.1f}{cells[0]:>18}{cells[1]:>18}", flush=True)

# %% [markdown]
# ## The curves
#
# Validation loss and accuracy, over steps and over seconds.

# %%
for history in itertools.chain(*histories.values()):
    history.history = {key: history.history[key] for key in ("val_loss", "val_accuracy", "seconds")}
figure = rdrop_keras.plot.compare(histories)
for axes in figure.axes:  # Without the first quarter of the curves, which is steep.
    late = np.concatenate([line.get_ydata()[len(line.get_ydata()) // 4 :] for line in axes.get_lines()])
    axes.set_ylim(late.min() - 0.05, late.max() + 0.05)
figure.savefig("quickstart.png", dpi=150)
print("Curves: quickstart.png")
