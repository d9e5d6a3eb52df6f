"""A model whose noise depends on the row alone, so that it trains to the same numbers however devices split a batch."""

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

from models import to_numpy
from rdrop_keras import RDropModel
from rdrop_keras.passes import tiling
from rdrop_keras.wrapper import step

# The last batch has 5 rows in place of 8: 3 and 2 on two replicas; 2, 2, 1 and none on four.
X = np.random.RandomState(0).normal(size=(21, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32") + (X[:, 2] > 1)
W = np.random.RandomState(1).uniform(0, 2, size=21).astype("float32")


class NoiseOfTheRow(layers.Layer):
    """Scales rows by a factor that depends on the row and its pass alone, however replicas split the batch."""

    rdrop_stochastic = True

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs, training=None):
        if not training:
            return inputs
        passes = tiling.split(inputs, step.current().num_passes)
        return tiling.concatenate([x * (1 + 0.5 * i * ops.cos(7 * x)) for i, x in enumerate(passes)])


def compiled(model, alpha=4.0, reduction="sum_over_batch_size", **options):
    model = RDropModel(model, alpha, **options)
    loss = losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    return model


def model(reduction="sum_over_batch_size", noise=NoiseOfTheRow, **options):
    keras.utils.set_random_seed(2)
    x = keras.Input((4,))
    h = noise()(layers.Dense(8, activation="tanh", name="hidden")(x))
    outputs = layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.01))(h)
    return compiled(keras.Model(x, outputs), reduction=reduction, **options)


def steps(model, weighted=False, x=X, y=Y, weights=W, batch_size=8, callbacks=None):
    history = model.fit(
        x,
        y,
        sample_weight=weights[: len(x)] if weighted else None,
        batch_size=batch_size,
        epochs=2,
        shuffle=False,
        verbose=0,
        validation_data=(x, y),
        callbacks=callbacks,
    ).history
    return history, [to_numpy(w) for w in model.weights]


def assert_same(first, second):
    assert first[0].keys() == second[0].keys()
    for key, values in first[0].items():
        assert second[0][key] == pytest.approx(values, rel=1e-5), key
    for a, b in zip(first[1], second[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def whole_batches(model):
    """Steps on batches of 8 only. Keras's JAX trainer cannot shard others."""
    return steps(model, True, X[:16], Y[:16])
