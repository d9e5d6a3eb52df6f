"""Handwritten digits of 8 by 8 pixels, which come with scikit-learn, and a small vision Transformer."""

import keras
from keras import layers

from tasks.task import Task, accuracy_and_calibration, crossentropy, splits

SIZE = 8
NUM_VALIDATION = 400
PATCH_SIZE, WIDTH, NUM_LAYERS, NUM_HEADS = 2, 32, 2, 4


def digits(num_train, shifted, folder):
    """`num_train` labels; with `shifted`, images move by up to a pixel inside the model, in each pass by itself."""

    def build(dropout):
        inputs = keras.Input((SIZE, SIZE, 1))
        x = inputs
        if shifted:
            x = layers.RandomTranslation(1 / SIZE, 1 / SIZE, fill_mode="constant", name="shift")(x)
        return keras.Model(inputs, transformer(x, dropout), name="digits_transformer")

    return Task(
        title=f"digits, {num_train} labels" + (", shifted inside the model" if shifted else ""),
        data=splits(*load(num_train)),
        build=build,
        loss=crossentropy(),
        score=accuracy_and_calibration,
        batch_size=25,
        pilot_steps=2000,
        dropouts=(0.05, 0.1, 0.2),
    )


def load(num_train):
    """The training, validation and test splits, stratified by digit, and the same in each run."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x = x.reshape(-1, SIZE, SIZE, 1).astype("float32") / 16
    x_train, x, y_train, y = train_test_split(x, y, train_size=num_train, stratify=y, random_state=0)
    x_valid, x_test, y_valid, y_test = train_test_split(x, y, train_size=NUM_VALIDATION, stratify=y, random_state=0)
    return (x_train, y_train), (x_valid, y_valid), (x_test, y_test)


def transformer(x, dropout):
    """Logits of an encoder over 16 patches."""
    x = layers.Conv2D(WIDTH, PATCH_SIZE, strides=PATCH_SIZE)(x)
    x = layers.Reshape((-1, WIDTH))(x)
    # A bias for each position: attention does not see where a patch is.
    x = layers.EinsumDense("bpi,io->bpo", output_shape=x.shape[1:], bias_axes="po", name="position")(x)
    x = layers.Dropout(dropout)(x)
    for _ in range(NUM_LAYERS):
        y = layers.LayerNormalization()(x)
        y = layers.MultiHeadAttention(NUM_HEADS, WIDTH // NUM_HEADS, dropout=dropout)(y, y)
        x = layers.Add()([x, layers.Dropout(dropout)(y)])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(2 * WIDTH, activation="gelu")(y)
        y = layers.Dense(WIDTH)(layers.Dropout(dropout)(y))
        x = layers.Add()([x, layers.Dropout(dropout)(y)])
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return layers.Dense(10)(x)
