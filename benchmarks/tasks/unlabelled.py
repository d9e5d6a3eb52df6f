"""Tasks of which most rows have no label, with a model for each, and the ways to train that are compared."""

import dataclasses
import functools
from collections.abc import Callable

import keras
import numpy as np
from keras import layers, ops

from tasks import images, sentences, tables
from tasks.digits import load as load_digits
from tasks.digits import transformer

PLAIN, LABELLED, ALL = "plain", "R-Drop, labelled rows", "R-Drop, all rows"
KINDS = (PLAIN, LABELLED, ALL)


@dataclasses.dataclass(frozen=True)
class Setting:
    """One way to train: its kind, α, the share of labelled rows, whether passes see own views, and how long."""

    kind: str
    alpha: float = 3.0
    share: float = 0.25
    views: bool = True
    length: int = 1  # Times the task's own number of steps.

    @property
    def program(self):
        """What is compiled, whatever α is and however long the training."""
        return dataclasses.replace(self, alpha=Setting.alpha, length=Setting.length)


@dataclasses.dataclass
class Task:
    """`data` has `(x, y)` for "train", "validation" and "test", and the inputs alone for "unlabelled"."""

    data: dict
    build: Callable  # From `views` to a model that returns logits.
    num_steps: int  # Of R-Drop on all rows.
    learning_rates: tuple = (1e-3,)  # Of which each kind has its own.
    further: tuple = ()  # `Setting`s beside the three kinds.


# ## Tasks
def convolutional(shape, augment, filters, dropout, views):
    inputs = keras.Input(shape)
    x = augment(inputs) if views else inputs
    for i, number in enumerate(filters):
        x = layers.Conv2D(number, 3, strides=1 + i % 2, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(10)(layers.Dropout(dropout)(layers.Flatten()(x))))


def digits_data():
    train, (x, y), test = load_digits(50)  # Of 400, 200 are to choose by; with the next, 600 go without a label.
    data = {"train": train, "validation": (x[:200], y[:200]), "test": (test[0][400:], test[1][400:])}
    return {**data, "unlabelled": np.concatenate([x[200:], test[0][:400]])}


def shift(x):
    return layers.RandomTranslation(1 / 8, 1 / 8, fill_mode="constant")(x)


def digits(args):
    build = functools.partial(convolutional, (8, 8, 1), shift, (32, 64), 0.2)
    longer = tuple(Setting(kind, length=3) for kind in KINDS)
    return Task(digits_data(), build, num_steps=1000, learning_rates=(1e-3, 3e-3), further=longer)


def digits_transformer(args):
    """The model of the quickstart."""

    def build(views):
        inputs = keras.Input((8, 8, 1))
        return keras.Model(inputs, transformer(shift(inputs) if views else inputs, 0.05))

    others = Setting(ALL, alpha=1.0), Setting(ALL, alpha=10.0), Setting(ALL, share=0.5)
    without_views = Setting(ALL, views=False), Setting(PLAIN, views=False)
    return Task(digits_data(), build, num_steps=1000, learning_rates=(1e-3, 3e-3), further=(*others, *without_views))


def cifar10(args):
    (x, y), (x_test, y_test) = images.cifar10(args.data, 16)
    order, test = np.random.RandomState(0).permutation(len(y)), np.random.RandomState(1).permutation(len(y_test))[:2000]
    x, y = x[order], y[order]

    def augment(x):
        return layers.RandomTranslation(1 / 8, 1 / 8)(layers.RandomFlip("horizontal")(x))

    data = {"train": (x[:500], y[:500]), "validation": (x[-500:], y[-500:]), "test": (x_test[test], y_test[test])}
    build = functools.partial(convolutional, (16, 16, 3), augment, (16, 32, 64), 0.2)
    return Task({**data, "unlabelled": x[500:-500]}, build, num_steps=1500)


def sst2(args):
    """A deep averaging network (Iyyer et al., 2015) on MiniLM's embeddings of tokens, of which it drops a third."""
    backbone, preprocessor = sentences.pretrained(args.encoder, 32)
    table = backbone.get_layer("token_embedding").get_weights()[0]
    data = {}
    for name, file in (("train", "train"), ("validation", "dev"), ("test", "test")):
        (texts,), y = tables.glue(args.data, "sst2", file)
        order = np.random.RandomState(0).permutation(len(y))
        data[name] = np.array(preprocessor(texts)["token_ids"], "int32")[order], y[order]
    tokens = np.unique(np.concatenate([x for x, _ in data.values()]))  # Token 0 is padding.
    data = {name: (np.searchsorted(tokens, x).astype("int32"), y) for name, (x, y) in data.items()}

    def build(views):
        inputs = keras.Input((32,), dtype="int32")
        embedding = layers.Embedding(len(tokens), table.shape[1], trainable=False)
        x = embedding(inputs)
        embedding.set_weights([table[tokens]])
        mask = ops.cast(ops.not_equal(inputs, 0), "float32")
        mask = layers.Dropout(0.3)(mask) if views else mask  # Of whole tokens.
        x = layers.Dot(axes=1)([mask, x]) / (ops.sum(mask, axis=1, keepdims=True) + 1e-3)
        for _ in range(2):
            x = layers.Dense(128, activation="relu")(layers.Dropout(0.2)(x))
        return keras.Model(inputs, layers.Dense(2)(layers.Dropout(0.2)(x)))

    x, y = data["train"]
    return Task({**data, "train": (x[:100], y[:100]), "unlabelled": x[100:]}, build, num_steps=600)


TASKS = {"digits": digits, "digits_transformer": digits_transformer, "sst2": sst2, "cifar10": cifar10}
