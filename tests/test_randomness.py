"""Models whose passes are or may be equal: what is refused, what is warned of, and the remedies that are named."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

from rdrop_keras import RDropModel, inconsistency
from rdrop_keras.passes import randomness

N = 16
X = np.random.RandomState(0).normal(size=(N, 6)).astype("float32")
Y = np.arange(N) % 3
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
NO_TRAINING = r"`Net.call` has no `training` argument, so Keras keeps its dropout off in training\. Write `def call"
NONE_KNOWN = r"No layer of `model` is known to be random.*insert a `keras.layers.Dropout`.*`rdrop_stochastic = True`"


class Identity(layers.Layer):
    def call(self, x):
        return x


class Noise(layers.Layer):
    """Another number for each row, in training, and nothing shows it."""

    def call(self, x, training=None):
        return x + ops.cast(ops.sin(ops.arange(ops.shape(x)[0])), x.dtype)[:, None] if training else x


class Net(keras.Model):
    """Does not hand `training` on."""

    def __init__(self, *inner):
        super().__init__()
        self.inner, self.flatten, self.out = list(inner), layers.Flatten(), layers.Dense(3)

    def call(self, x):
        for layer in self.inner:
            x = layer(x)
        return self.out(self.flatten(x))


class NetInTraining(Net):
    def call(self, x, training=None):
        return super().call(x)


def wrapped(model, x=X, **kwargs):
    model(x)
    model = RDropModel(model, **kwargs)
    model.compile("sgd", LOSS)
    return model


def logs(model, x=X):
    return {name: values[0] for name, values in model.fit(x, Y, batch_size=N, verbose=0).history.items()}


IMAGES = np.random.RandomState(0).uniform(size=(N, 4, 4, 1)).astype("float32")


@pytest.mark.parametrize(
    "inner",
    [
        lambda: [layers.Dropout(0.5)],
        lambda: [layers.Dropout(0.5), Identity()],
        lambda: [keras.Sequential([layers.Dropout(0.5)]), Identity()],
        lambda: [layers.GaussianNoise(0.5), Identity()],
        lambda: [layers.RandomFlip(), layers.Dropout(0.5), Identity()],
        lambda: [layers.RandomFlip(), layers.Dropout(0.5)],
    ],
)
def test_training_that_is_not_handed_on(inner):
    with pytest.raises(ValueError, match=NO_TRAINING):
        wrapped(Net(*inner()), IMAGES)
    unbuilt = RDropModel(Net(*inner()))
    unbuilt.compile("sgd", LOSS)
    with pytest.raises(ValueError, match=NO_TRAINING):
        unbuilt.fit(IMAGES, Y, verbose=0)
    wrapped(Net(*inner()), IMAGES, alpha=0)
    remedied = wrapped(NetInTraining(*inner()), IMAGES)
    assert logs(remedied, IMAGES)["consistency_loss"] > 0


def test_augmentation_needs_no_training_argument():
    """Keras has it on unless it is told otherwise."""
    model = wrapped(Net(layers.RandomFlip(seed=1), Identity()), IMAGES)
    assert logs(model, IMAGES)["consistency_loss"] > 0


def test_a_random_layer_that_asks_for_no_training_argument():
    class Always(layers.Layer):
        rdrop_stochastic = True

        def call(self, x):
            return Noise.call(self, x, training=True)

    assert logs(wrapped(Net(Always())))["consistency_loss"] > 0


@pytest.mark.parametrize("make", [lambda: Net(Identity()), lambda: NetInTraining(Noise()), lambda: Net()])
def test_no_layer_is_known_to_be_random(make):
    with pytest.warns(UserWarning, match=NONE_KNOWN + r".*Received: model='net\w*' \(Net"):
        model = wrapped(make())
    model.compile("sgd", LOSS)  # Told once: warnings are errors here.
    model = RDropModel(make())
    model.compile("sgd", LOSS)
    with pytest.warns(UserWarning) as told:
        consistency = logs(model)["consistency_loss"]
    told = [str(warning.message) for warning in told]
    assert [message.startswith("No layer of `model`") for message in told].count(True) == 1
    assert (consistency == 0) == any("did not differ" in message for message in told)


def test_declared_random_code_is_known():
    class Declared(NetInTraining):
        rdrop_stochastic = True

    class DeclaredNoise(Noise):
        rdrop_stochastic = True

    for model in (Declared(Noise()), NetInTraining(DeclaredNoise())):
        assert logs(wrapped(model))["consistency_loss"] > 0


def equal_passes(model, x=X):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No layer of `model`")
        model = wrapped(model, x)
    with pytest.warns(UserWarning, match="The passes of R-Drop did not differ") as told:
        logs(model, x)
    return next(str(warning.message) for warning in told if "did not differ" in str(warning.message))


def test_remedies_for_equal_passes():
    class Forgets(NetInTraining):
        def call(self, x, training=None):
            return self.out(self.flatten(self.inner[0](x, training=False)))

    one_draw = r"share one draw of random numbers, set `rdrop_mixes_rows = True` on that layer"
    insert = r"No layer is known to be random: insert a `keras.layers.Dropout`, for example before the last layer\."
    assert_matches(equal_passes(NetInTraining(Identity())), rf"{insert} Where all rows.* {one_draw}")
    assert_matches(equal_passes(Net(Noise())), rf"{insert} `Net.call` has no `training` argument.*{one_draw}")
    handed_on = r"Does `Forgets.call` hand `training` on to dropout\w*\? Where"
    assert_matches(equal_passes(Forgets(layers.Dropout(0.5))), handed_on)


def assert_matches(text, pattern):
    with pytest.raises(ValueError, match=pattern):
        raise ValueError(text)


def test_remedy_for_one_draw():
    model = keras.Sequential([keras.Input((6,)), layers.Dropout(0.5), layers.Dense(3)])
    assert randomness.why_equal(model).startswith("Where all rows of a batch share one draw")


def test_inconsistency_of_a_model_without_training():
    """The monitor sees what training sees."""
    model = Net(layers.RandomFlip(seed=1), Identity())
    model(IMAGES)
    model.compile("sgd", LOSS)
    assert inconsistency(model, IMAGES, Y, num_passes=2, batch_size=N).divergence.value > 0
