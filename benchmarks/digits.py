"""The digits task of `studies.py`: a small vision Transformer on 400 images, which trains in seconds.

The images, of 8 by 8 grey pixels, come with scikit-learn. The learning rate, α and dropout were chosen on the
validation split, of 0.001, 0.002 and 0.004, of 0.3, 1, 3 and 5, and of 0.1, 0.2 and 0.3.
"""

import keras
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

NUM_CLASSES = 10
IMAGE_SIZE = 8
NUM_TRAIN = 400
NUM_VALIDATION = 400  # The other 997 images are the test split.
SPLIT_SEED = 0

PATCH_SIZE = 2
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2
WIDTH = 64
NUM_LAYERS = 2
NUM_HEADS = 4

EPOCHS = 40
BATCH_SIZE = 40
LEARNING_RATE = 2e-3


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
