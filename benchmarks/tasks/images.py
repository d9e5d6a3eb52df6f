"""Small photographs of CIFAR-10, in parts of 2,000 and 10,000: a convolutional net and a vision Transformer."""

import functools
import io
import zipfile

import keras
import numpy as np
from keras import layers

from tasks.task import Task, accuracy_and_calibration, crossentropy, splits, without_preprocessing

FULL_SIZE = 32


@functools.cache
def cifar10(folder, size):
    """Images from 0 to 1 and labels of the training and the test split, whose order is that of names."""
    from PIL import Image

    with zipfile.ZipFile(folder / "cifar10_15k.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        classes = sorted({name.split("/")[-2] for name in names})
        result = []
        for split in ("train/", "test/"):
            found = [name for name in names if split in name]
            images = [Image.open(io.BytesIO(archive.read(name))).reduce(FULL_SIZE // size) for name in found]
            images = np.stack([np.asarray(image) for image in images])
            labels = np.array([classes.index(name.split("/")[-2]) for name in found], "int32")
            result.append((images.astype("float32") / 255, labels))
    return result


def cifar_splits(folder, num_train, size):
    """`num_train` images to train on, 500 others to choose by, and 2,000 to test with, all chosen at random."""
    (x, y), (x_test, y_test) = cifar10(folder, size)
    order, test_order = np.random.RandomState(0).permutation(len(y)), np.random.RandomState(1).permutation(len(y_test))
    num_train = min(num_train, len(y) - 500)
    train, validation, test = order[:num_train], order[-500:], test_order[:2000]
    return splits((x[train], y[train]), (x[validation], y[validation]), (x_test[test], y_test[test]))


def title(num_train, augmented, size, model):
    pixels = "" if size == FULL_SIZE else f" at {size} pixels"
    return f"CIFAR-10{pixels}, {num_train:,} images, {model}" + (", augmented inside the model" if augmented else "")


def augmentation(x):
    """Mirrors, and other light and contrast; inside the model, so that each pass draws its own."""
    x = layers.RandomFlip("horizontal")(x)
    x = layers.RandomBrightness(0.2, value_range=(0, 1))(x)
    return layers.RandomContrast(0.2, value_range=(0, 1))(x)


def convolutional(num_train, augmented, size, folder):
    """Three convolutions, with dropout in the head alone."""

    def build(dropout):
        inputs = keras.Input((size, size, 3))
        x = augmentation(inputs) if augmented else inputs
        for filters in (16, 32, 64):
            x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(x)
            x = layers.BatchNormalization()(x)
            x = layers.ReLU()(x)
            x = layers.MaxPooling2D()(x)
        x = layers.Flatten()(x)
        x = layers.Dropout(dropout)(x)
        x = layers.Dense(128, activation="relu")(x)
        x = layers.Dropout(dropout)(x)
        return keras.Model(inputs, layers.Dense(10)(x), name="convolutional")

    return Task(
        title=title(num_train, augmented, size, "convolutional"),
        data=cifar_splits(folder, num_train, size),
        build=build,
        loss=crossentropy(),
        score=accuracy_and_calibration,
        batch_size=16,
        pilot_steps=1500 if num_train <= 2000 else 3000,
        dropouts=(0.2, 0.4, 0.6),
        learning_rates=(5e-4, 1e-3, 2e-3),
    )


def vit(num_train, augmented, size, folder):
    """A ViT of three layers over 16 patches, with dropout everywhere."""
    import keras_hub

    def build(dropout):
        backbone = keras_hub.models.ViTBackbone(
            (size, size, 3),
            patch_size=size // 4,
            num_layers=3,
            num_heads=4,
            hidden_dim=64,
            mlp_dim=128,
            dropout_rate=dropout,
            attention_dropout=dropout,
        )
        classifier = without_preprocessing(keras_hub.models.ViTImageClassifier(backbone, 10, dropout=dropout))
        if not augmented:
            return classifier
        inputs = keras.Input((size, size, 3))
        return keras.Model(inputs, classifier(augmentation(inputs)))

    data = {name: (2 * x - 1, y, None) for name, (x, y, _) in cifar_splits(folder, num_train, size).items()}
    return Task(
        title=title(num_train, augmented, size, "ViT"),
        data=data,
        build=build,
        loss=crossentropy(),
        score=accuracy_and_calibration,
        batch_size=32 if size == FULL_SIZE else 16,
        pilot_steps=1000 if num_train <= 2000 else 2500,
        learning_rates=(5e-4, 1e-3, 2e-3),
    )
