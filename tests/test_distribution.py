"""n replicas give the numbers of one; on logical devices of one CPU."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

from models import mlp, to_numpy
from rdrop_keras import KLBudget, RDropModel
from rdrop_keras.pairing import passes_in_step

X = np.random.RandomState(0).normal(size=(16, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32") + (X[:, 2] > 1)
W = np.random.RandomState(1).uniform(0, 2, size=16).astype("float32")


class NoiseOfTheRow(layers.Layer):
    """Scales rows by what depends on the row and on its pass alone, however the batch is dealt to replicas."""

    def call(self, inputs, training=None):
        if not training:
            return inputs
        rows = ops.shape(inputs)[0]
        index = ops.cast(ops.arange(rows) // (rows // passes_in_step()), inputs.dtype)[:, None]
        return inputs * (1 + 0.5 * index * ops.cos(7 * inputs))


def model(reduction="sum_over_batch_size", alpha=4.0, **options):
    keras.utils.set_random_seed(2)
    x = keras.Input((4,))
    h = NoiseOfTheRow()(layers.Dense(8, activation="tanh", name="hidden")(x))
    outputs = layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.01))(h)
    model = RDropModel(keras.Model(x, outputs), alpha, **options)
    loss = losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=["accuracy"])
    return model


def steps(model, weighted):
    history = model.fit(
        X,
        Y,
        sample_weight=W if weighted else None,
        batch_size=8,
        epochs=3,
        shuffle=False,
        verbose=0,
        validation_data=(X, Y),
    ).history
    return history, [to_numpy(w) for w in model.weights]


def assert_same(first, second):
    assert first[0].keys() == second[0].keys()
    for key, values in first[0].items():
        assert second[0][key] == pytest.approx(values, rel=1e-5), key
    for a, b in zip(first[1], second[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def mirrored(replicas):
    import tensorflow as tf

    # Collective operations would keep the first group size for the whole process.
    reduction = tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(replicas)], cross_device_ops=reduction)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_mirrored_strategy(replicas, reduction, weighted):
    with mirrored(replicas).scope():
        distributed = model(reduction)
    history, weights = steps(distributed, weighted)
    expected, expected_weights = steps(model(reduction), weighted)
    if reduction == "sum":
        # Keras logs the mean over replicas of n times each replica's sum, plus a regularizer counted n times over
        # (the same for a plain model): only what it trains on is compared.
        history = {k: v for k, v in history.items() if k in ("accuracy", "task_loss", "consistency_loss")}
        expected = {k: v for k, v in expected.items() if k in history}
    assert_same((history, weights), (expected, expected_weights))


OPTIONS = [
    {"every": 2},
    {"num_passes": 3},
    {"share": "hidden"},
    {"share": "nothing"},
    {"alpha": keras.optimizers.schedules.PolynomialDecay(0.0, 6, 5.0)},
    {"alpha": KLBudget(0.01, step=0.5)},
]
OPTION_NAMES = ["every", "num_passes", "share", "share nothing", "schedule", "budget"]


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_mirrored_options(options):
    with mirrored(2).scope():
        distributed = model(**options)
    assert_same(steps(distributed, True), steps(model(**options), True))


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("mode", [{}, {"steps_per_execution": 2}])
def test_mirrored_dropout_and_batch_normalization(mode):
    with mirrored(2).scope():
        x = keras.Input((4,))
        h = layers.Dropout(0.3)(layers.BatchNormalization()(x))
        distributed = RDropModel(keras.Model(x, layers.Dense(3)(h)), alpha=2.0)
        distributed.compile("adam", losses.SparseCategoricalCrossentropy(from_logits=True), **mode)
    history = distributed.fit(X[:14], Y[:14], batch_size=6, epochs=4, verbose=0, validation_data=(X, Y)).history
    assert all(value > 0 for value in history["consistency_loss"])
    assert history["loss"] == pytest.approx(
        np.array(history["task_loss"]) + np.array(history["consistency_loss"]), rel=1e-5
    )
    assert history["val_loss"][-1] < history["val_loss"][0]


class NormalizedDropout(layers.Layer):
    """Dropout before and after a normalization for which replicas wait for each other."""

    def __init__(self, synchronized, **kwargs):
        super().__init__(**kwargs)
        self.normalization = layers.BatchNormalization(synchronized=synchronized)
        self.dropouts = [layers.Dropout(0.5), layers.Dropout(0.5)]

    def build(self, input_shape):
        self.normalization.build(input_shape)

    def call(self, inputs, training=None):
        x = self.normalization(self.dropouts[0](inputs, training=training), training=training)
        return self.dropouts[1](x, training=training)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("synchronized", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
def test_dropout_rates_where_replicas_wait(replicas, synchronized):
    """A replica that waits in the middle of a layer would go on at the rate of another's pass: that is refused."""
    with mirrored(replicas).scope():
        x = keras.Input((4,))
        inner = keras.Model(x, layers.Dense(3)(NormalizedDropout(synchronized, name="block")(x)))
        distributed = RDropModel(inner, dropout_rates=(0.0, 0.3))
        distributed.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    if synchronized and replicas > 1:
        with pytest.raises(
            ValueError, match=r"`dropout_rates` cannot act on a layer.*Received: 'block' with 'batch_norm"
        ):
            distributed.fit(X, Y, batch_size=8, verbose=0)
    else:
        assert np.isfinite(distributed.fit(X, Y, batch_size=8, verbose=0).history["loss"]).all()


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("inside", ["model", "wrapper"])
def test_scopes_must_agree(inside):
    scope = mirrored(2).scope()
    with scope if inside == "model" else contextlib.nullcontext():
        inner = mlp()
    scope = mirrored(2).scope() if inside == "wrapper" else contextlib.nullcontext()
    with scope, pytest.raises(ValueError, match=r"under the same `strategy.scope\(\)`.*made under (Mirrored|no )"):
        RDropModel(inner)


@pytest.mark.backends("jax")
@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_data_parallel(devices, reduction):
    expected = steps(model(reduction), weighted=True)
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(devices=keras.distribution.list_devices()[:devices])
    )
    try:
        distributed = model(reduction)
        assert len(distributed.weights[0].value.sharding.device_set) == devices
        history = steps(distributed, weighted=True)
    finally:
        keras.distribution.set_distribution(None)
    assert_same(history, expected)


@pytest.mark.backends("jax")
@pytest.mark.parametrize("options", OPTIONS, ids=OPTION_NAMES)
def test_data_parallel_options(options):
    expected = steps(model(**options), True)
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    try:
        history = steps(model(**options), True)
    finally:
        keras.distribution.set_distribution(None)
    assert_same(history, expected)


@pytest.mark.backends("jax")
def test_data_parallel_dropout():
    keras.distribution.set_distribution(keras.distribution.DataParallel())
    try:
        distributed = RDropModel(mlp(), alpha=2.0)
        distributed.compile("adam", losses.SparseCategoricalCrossentropy(from_logits=True))
        history = distributed.fit(X, Y, batch_size=8, epochs=4, verbose=0, validation_data=(X, Y)).history
    finally:
        keras.distribution.set_distribution(None)
    assert all(value > 0 for value in history["consistency_loss"])
    assert history["val_loss"][-1] < history["val_loss"][0]
