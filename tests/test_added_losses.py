"""What layers add to the loss counts once, however the passes run."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, ops

from rdrop_keras import RDropModel
from rdrop_keras.passes import Passes

N = 8
X = np.random.RandomState(0).normal(size=(N, 6)).astype("float32")
Y = np.arange(N) % 3
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class AddsMean(layers.Layer):
    """Adds the mean of what it gets, and its square as a second loss."""

    def call(self, x):
        mean = ops.mean(x)
        self.add_loss([mean, ops.square(mean)])
        return x


class Subclassed(keras.Model):
    def __init__(self, *inner):
        super().__init__()
        self.inner = list(inner)

    def call(self, x, training=None):
        for layer in self.inner:
            x = layer(x, training=training) if "dropout" in layer.name else layer(x)
        return x


def parts(noise_shape):
    """Layers that add 3 + 9, then dropout, the constant 1 + 1, an activity regularizer, and a weight of 2 decayed."""
    return [
        layers.Rescaling(0.0, offset=3.0),
        AddsMean(),
        layers.Dropout(0.5, noise_shape=noise_shape),
        layers.Rescaling(0.0, offset=1.0),
        AddsMean(),
        layers.Activation("linear", activity_regularizer=keras.regularizers.L1(0.5)),
        layers.Dense(3, kernel_initializer="zeros", bias_initializer=keras.initializers.Constant(2.0), **DECAY),
    ]


DECAY = {"bias_regularizer": keras.regularizers.L2(0.25)}
# 3 + 9 before dropout, 1 + 1 after it, 0.5 · 6 units of 1, 0.25 · 3 biases of 2 squared. The biases give a softmax that
# is uniform in each pass.
ADDED = 12 + 2 + 3 + 3


def sequential(noise_shape):
    return keras.Sequential([keras.Input((6,)), *parts(noise_shape)])


def nested(noise_shape):
    inner = keras.Sequential([keras.Input((6,)), *parts(noise_shape)[:-1]])
    inputs = keras.Input((6,))
    return keras.Model(inputs, parts(noise_shape)[-1](inner(inputs)))


def subclassed(noise_shape):
    model = Subclassed(*parts(noise_shape))
    model(X)
    return model


def unbuilt(noise_shape):
    return Subclassed(*parts(noise_shape))


def holding_a_subclassed_model(noise_shape):
    return keras.Sequential([keras.Input((6,)), Subclassed(*parts(noise_shape))])


@pytest.mark.parametrize("every_row", [True, False], ids=["together", "one after another"])
@pytest.mark.parametrize("make", [sequential, nested, subclassed, unbuilt, holding_a_subclassed_model])
def test_counts_once(make, every_row):
    check(make(None if every_row else (1, 6)))


@pytest.mark.parametrize("make", [sequential, subclassed])
def test_counts_once_at_rates_of_their_own(make):
    check(make(None), dropout_rates=(0.5, 0.1, 0.3), num_passes=3)


def test_counts_once_if_nothing_is_shared():
    check(sequential((1, 6)), share="nothing", num_passes=3)


def check(model, **options):
    model = RDropModel(model, **options)
    model.compile(keras.optimizers.SGD(0.0), LOSS)
    for _ in range(2):  # Nothing is left over for the next step.
        told = contextlib.nullcontext() if model._warned_of_no_effect else pytest.warns(UserWarning, match="not differ")
        with told:
            logs = model.fit(X, Y, batch_size=N, verbose=0).history
        assert logs["task_loss"][0] == pytest.approx(np.log(3), rel=1e-5)
        assert logs["loss"][0] - logs["task_loss"][0] == pytest.approx(ADDED, rel=1e-5)
    assert not any("add_loss" in vars(layer) for layer in model.model._flatten_layers())


def test_is_the_mean_over_passes():
    """One pass at rate 0 gives the mean 1; the other the mean of what its mask left."""
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dropout(0.5, seed=1), AddsMean(), layers.Identity(name="masked")]
    )
    outputs = Passes(model, dropout_rates=(0.0, 0.5))(ops.ones((4, 6)), 2, True)
    full, dropped = np.split(ops.convert_to_numpy(outputs).astype("float64"), 2)
    assert full.mean() == 1 and 0 < dropped.mean() != 1
    expected = [1 / 2, 1 / 2, dropped.mean() / 2, dropped.mean() ** 2 / 2]
    np.testing.assert_allclose([ops.convert_to_numpy(loss) for loss in model.losses], expected, rtol=1e-5)


def test_an_error_leaves_the_layers_as_they_were():
    class Fails(layers.Layer):
        def call(self, x, training=None):
            if training:
                raise RuntimeError("on purpose")
            return x

    model = keras.Sequential([keras.Input((6,)), layers.Dropout(0.5, noise_shape=(1, 6)), AddsMean(), Fails()])
    with pytest.raises(RuntimeError, match="on purpose"):
        Passes(model)(ops.ones((4, 6)), 2, True)
    assert not any("add_loss" in vars(layer) for layer in model.layers)


def test_activity_regularizer_of_the_whole_model():
    model = keras.Sequential([keras.Input((6,)), layers.Dropout(0.5), layers.Rescaling(0.0, offset=1.0)])
    model.activity_regularizer = keras.regularizers.L1(0.5)
    model(X)
    assert [float(loss) for loss in model.losses] == pytest.approx([3.0])
    for share in ("deterministic", "nothing"):
        Passes(model, share)(ops.convert_to_tensor(X), 2, True)
        assert [float(loss) for loss in model.losses] == pytest.approx([3.0])


class AddsRows(layers.Layer):
    """Adds the values of the rows and their sum over two columns, as endpoint layers do that hold a loss."""

    rdrop_stochastic = False

    def call(self, x):
        self.add_loss([ops.mean(x, axis=-1), x[:, :2]])
        return x


@pytest.mark.parametrize("noise_shape", [None, (1, 6)], ids=["together", "one after another"])
def test_a_value_for_each_row_counts_once(noise_shape):
    """Keras adds up what is no scalar: 8 rows of 3 and 8 · 2 of 3 before dropout, where they run once, and of 1."""
    sources = [layers.Rescaling(0.0, offset=3.0), AddsRows(), layers.Dropout(0.5, noise_shape=noise_shape)]
    ones = layers.Dense(6, kernel_initializer="zeros", bias_initializer="ones")
    model = RDropModel(keras.Sequential([keras.Input((6,)), *sources, ones, AddsRows()]), divergence="mse")
    model.compile(keras.optimizers.SGD(0.0), "mse")
    with pytest.warns(UserWarning, match="not differ"):
        logs = model.fit(X, np.ones((N, 6)), batch_size=N, verbose=0).history
    assert logs["task_loss"][0] == pytest.approx(0, abs=1e-6)
    assert logs["loss"][0] == pytest.approx(8 * 3 + 16 * 3 + 8 * 1 + 16 * 1, rel=1e-5)
