"""Which steps are R-Drop's, and at which dropout rates its passes run."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from marks import slow
from models import logs_of_step, mlp, to_numpy
from rdrop_keras import RDropModel
from rdrop_keras.wrapper import step

X = np.random.RandomState(0).normal(size=(48, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32") + (X[:, 2] > 1)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Rows(layers.Layer):
    """Adds to `seen` how many rows each call has; `state` holds the rows of the last one, on any backend."""

    rdrop_stochastic = True

    def build(self, input_shape):
        self.rows = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs, training=None):
        if training:
            self.rows.assign(ops.cast(ops.shape(inputs)[0], "float32"))
        return inputs


def counting(**kwargs):
    keras.utils.set_random_seed(5)
    rows = Rows()
    inner = keras.Sequential([keras.Input((4,)), rows, layers.Dropout(0.3, seed=1), layers.Dense(3)])
    model = RDropModel(inner, 2.0, **kwargs)
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    return model, rows


class RowsOfEachStep(keras.callbacks.Callback):
    """With one step an epoch, what JAX shows only at the end of epochs."""

    def __init__(self, rows):
        super().__init__()
        self.rows, self.seen = rows, []

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(int(to_numpy(self.rows.rows)))


@pytest.mark.parametrize("num_passes", [2, 3])
def test_every(num_passes):
    model, rows = counting(every=3, num_passes=num_passes)
    callback = RowsOfEachStep(rows)
    history = model.fit(X[:8], Y[:8], batch_size=8, epochs=7, verbose=0, callbacks=[callback]).history
    paired = [0, 3, 6]
    assert callback.seen == [8 * num_passes if step in paired else 8 for step in range(7)]
    consistency = np.array(history["consistency_loss"])
    assert (consistency[paired] > 0).all()
    assert np.isnan(np.delete(consistency, paired)).all()
    expected = np.array(history["task_loss"]) + 2.0 / num_passes * np.nan_to_num(consistency)
    np.testing.assert_allclose(history["loss"], expected, rtol=1e-5)


def test_consistency_is_averaged_over_the_steps_of_r_drop():
    model, _ = counting(every=2)
    logs = [logs_of_step(model, X[:8], Y[:8])["consistency_loss"] for _ in range(4)]
    assert np.isnan([logs[1], logs[3]]).all()
    again, _ = counting(every=2)
    history = again.fit(np.tile(X[:8], (4, 1)), np.tile(Y[:8], 4), batch_size=8, shuffle=False, verbose=0).history
    np.testing.assert_allclose(history["consistency_loss"], [(logs[0] + logs[2]) / 2], rtol=1e-5)


def test_steps_between_are_plain_training():
    """A model trained from step 1 to 3 of `every=4` is the model trained alone from where step 0 left it."""
    model, _ = counting(every=4)
    logs_of_step(model, X[:8], Y[:8])
    alone, _ = counting()
    alone = alone.model
    for own, variable in zip(alone.variables, model.model.variables, strict=True):
        own.assign(to_numpy(variable))  # The states of random generators too. JAX deletes what a step was given.
    alone.compile(keras.optimizers.SGD(0.1), LOSS)
    for _ in range(3):
        alone.reset_metrics()
        expected = alone.train_on_batch(X[:8], Y[:8])
        logs = logs_of_step(model, X[:8], Y[:8])
        np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)
    for a, b in zip(model.trainable_variables, alone.trainable_variables):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-5)


def test_a_batch_that_fails_is_no_step():
    """Neither for `every` nor for the clock of α, which go on together."""

    def batches():
        for i in range(5):
            yield X[8 * i : 8 * i + 8], Y[8 * i : 8 * i + 8]
        raise ValueError("bad row")

    keras.utils.set_random_seed(5)
    model = RDropModel(mlp(), lambda step: ops.cast(step, "float32"), every=3)
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    with pytest.raises(Exception, match="bad row"):
        model.fit(batches(), verbose=0)
    history = model.fit(X[:8], Y[:8], batch_size=8, epochs=3, verbose=0).history
    # Steps 5 to 7. Keras 3.14 on JAX asks for a batch ahead of training, so that these are 4 to 6.
    step = 2 if keras.__version__.startswith("3.14.") and keras.backend.backend() == "jax" else 1
    assert np.flatnonzero(~np.isnan(history["consistency_loss"])).tolist() == [step]
    assert history["alpha"][step] == pytest.approx(6)


def test_count_goes_on(tmp_path):
    model, _ = counting(every=3)
    model.fit(X[:32], Y[:32], batch_size=8, verbose=0)  # Steps 0 to 3.
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras", custom_objects={"Rows": Rows})
    for trained in (model, again):
        logs = [logs_of_step(trained, X[:8], Y[:8]) for _ in range(4)]
        assert [entry["consistency_loss"] > 0 for entry in logs] == [False, False, True, False]


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    "options", [slow({"jit_compile": True}), {"run_eagerly": True}, {"accumulate": 2}, slow({"mirrored": 2})]
)
def test_every_with(options):
    import tensorflow as tf

    options = dict(options)
    strategy = tf.distribute.get_strategy()
    if options.pop("mirrored", None):
        one = tf.distribute.ReductionToOneDevice()
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=one)
    steps = options.pop("accumulate", None)
    with strategy.scope():
        keras.utils.set_random_seed(5)
        model = RDropModel(mlp(), 2.0, every=2)
        model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps), LOSS, **options)
    history = model.fit(X[:8], Y[:8], batch_size=8, epochs=4, verbose=0).history
    assert [value > 0 for value in history["consistency_loss"]] == [True, False, True, False]


def test_every_and_steps_per_execution():
    model = RDropModel(mlp(), every=2)
    with pytest.raises(ValueError, match=r"`steps_per_execution` must be 1: .*every=2, start=0, steps_per_execution=4"):
        model.compile("sgd", LOSS, steps_per_execution=4)
    assert not model.compiled


def test_every_errors():
    with pytest.raises(ValueError, match=r"`every` must be an integer ≥ 1. Received: every=0"):
        RDropModel(mlp(), every=0)
    for value in (1.5, True, "2"):
        with pytest.raises(TypeError, match=r"`every` must be an integer ≥ 1"):
            RDropModel(mlp(), every=value)


def outputs_of(model, x, num_passes=2):
    with step.training(num_passes):
        return ops.convert_to_numpy(model(ops.convert_to_tensor(x), training=True))


def dropped(model, x=None, num_passes=2):
    """The fraction of zeros in each pass."""
    outputs = outputs_of(model, np.ones((50, 400), "float32") if x is None else x, num_passes)
    return [np.mean(rows == 0) for rows in np.split(outputs, num_passes)]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dropout = layers.Dropout(0.5)

    def call(self, inputs, training=None):
        return self.dropout(inputs, training=training)


def functional():
    inputs = keras.Input((400,))
    return keras.Model(inputs, layers.Dropout(0.5)(layers.ReLU()(inputs)))


def subclassed():
    model = Subclassed()
    model(np.ones((1, 400), "float32"))
    return model


@pytest.mark.parametrize("make", [functional, subclassed])
@pytest.mark.parametrize("rates", [(0.1, 0.3), (0.0, 0.7), (0.2, 0.5, 0.9)])
def test_dropout_rates(make, rates):
    inner = make()
    model = RDropModel(inner, num_passes=len(rates), dropout_rates=rates)
    np.testing.assert_allclose(dropped(model, num_passes=len(rates)), rates, atol=0.02)
    assert [layer.rate for layer in inner._flatten_layers() if isinstance(layer, layers.Dropout)] == [0.5]
    np.testing.assert_allclose(
        np.mean(ops.convert_to_numpy(inner(np.ones((50, 400)), training=True)) == 0), 0.5, atol=0.02
    )


def test_attention_and_recurrent_dropout():
    x = keras.Input((6, 4))
    h = layers.MultiHeadAttention(2, 2, dropout=0.5)(x, x)
    h = layers.LSTM(4, dropout=0.5, recurrent_dropout=0.5, return_sequences=True)(h)
    inner = keras.Model(x, layers.Bidirectional(layers.GRU(3, recurrent_dropout=0.5))(h))
    config = inner.get_config()
    model = RDropModel(inner, dropout_rates=(0.0, 0.5))
    batch = np.random.RandomState(1).normal(size=(5, 6, 4)).astype("float32")
    first, second = np.split(outputs_of(model, batch), 2)
    full = ops.convert_to_numpy(inner(batch))
    np.testing.assert_allclose(first, full, rtol=1e-5, atol=1e-6)  # At rate 0 a pass is the full model.
    assert np.abs(second - full).max() > 1e-2
    assert inner.get_config() == config


def test_equal_rates_are_the_layers_own():
    """Of a model without batch normalization, `dropout_rates` of the own rate changes the draws alone."""
    histories = []
    for rates in (None, (0.3, 0.3)):
        keras.utils.set_random_seed(6)
        model = RDropModel(mlp(rate=0.3), 1.0, dropout_rates=rates)
        model.compile(keras.optimizers.SGD(0.0), LOSS)
        histories.append([logs_of_step(model, X, Y)["consistency_loss"] for _ in range(100)])
    means = [np.mean(history) for history in histories]
    error = np.sqrt(sum(np.var(history) / len(history) for history in histories))
    assert abs(means[0] - means[1]) < 4 * error


def test_rates_and_share():
    inputs = keras.Input((400,))
    early = layers.Dropout(0.5, name="early")(inputs)
    inner = keras.Model(inputs, [early, layers.Dropout(0.5, name="late")(layers.ReLU()(inputs))])
    model = RDropModel(inner, dropout_rates=(0.1, 0.8), share="early")
    with step.training(2):
        early, late = model(ops.ones((50, 400)), training=True)
    first, second = np.split(ops.convert_to_numpy(early), 2)
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(np.mean(first == 0), 0.5, atol=0.02)
    np.testing.assert_allclose(
        [np.mean(rows == 0) for rows in np.split(ops.convert_to_numpy(late), 2)], [0.1, 0.8], atol=0.02
    )


def test_rates_are_restored_after_an_error():
    class Fails(layers.Layer):
        def call(self, inputs, training=None):
            if training:
                raise RuntimeError("no")
            return inputs

    inputs = keras.Input((4,))
    dropout = layers.Dropout(0.5)
    model = RDropModel(keras.Model(inputs, Fails()(dropout(inputs))), dropout_rates=(0.1, 0.2))
    with pytest.raises(RuntimeError, match="no"):
        outputs_of(model, X)
    assert dropout.rate == 0.5


@pytest.mark.parametrize("rates", [(0.1, 0.3), (0.0, 0.4)])
def test_trains_at_two_rates(rates):
    keras.utils.set_random_seed(7)
    model = RDropModel(mlp(), 1.0, dropout_rates=rates, every=2)
    model.compile(keras.optimizers.Adam(0.01), LOSS)
    history = model.fit(X, Y, batch_size=8, epochs=8, verbose=0, validation_data=(X, Y)).history
    assert history["val_loss"][-1] < history["val_loss"][0]
    assert min(history["consistency_loss"]) > 0


def test_dropout_rates_errors():
    for rates in ((0.1,), (0.1, 0.2, 0.3)):
        with pytest.raises(ValueError, match=rf"a rate for each pass.*With num_passes=2 it has {len(rates)}. Received"):
            RDropModel(mlp(), dropout_rates=rates)
    for rates in ((0.0, 0.0), (0.1, 1.0), (-0.1, 0.2), (0.1, float("nan"))):
        with pytest.raises(ValueError, match=r"from 0 to less than 1, not all 0. Received: dropout_rates=\("):
            RDropModel(mlp(), dropout_rates=rates)
    for rates in (0.1, ("0.1", 0.2), (True, 0.2)):
        with pytest.raises(TypeError, match=r"`dropout_rates` must be None or a tuple"):
            RDropModel(mlp(), dropout_rates=rates)
    with pytest.raises(ValueError, match=r"`dropout_rates` needs the layers of `model`.*Subclassed\), not built"):
        RDropModel(Subclassed(), dropout_rates=(0.1, 0.2))
    with pytest.raises(ValueError, match=r"`dropout_rates` needs a dropout layer with a rate above 0"):
        inputs = keras.Input((4,))
        RDropModel(keras.Model(inputs, layers.GaussianNoise(0.1)(inputs)), dropout_rates=(0.1, 0.2))


class Calls(layers.Layer):
    """Counts how often Python runs its `call` in training and otherwise: in compiled steps, once a trace."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.in_training = self.otherwise = 0

    def call(self, inputs, training=None):
        if training:
            self.in_training += 1
        else:
            self.otherwise += 1
        return inputs


@pytest.mark.parametrize("metrics", [None, ["accuracy"]])
@pytest.mark.parametrize("options, programs", [({}, 1), ({"every": 2}, 2), ({"start": 3}, 2)], ids=str)
def test_each_program_is_traced_once(options, programs, metrics):
    """Keras traces the first step on TensorFlow twice, if it makes variables."""
    calls = Calls()
    inner = keras.Sequential([keras.Input((4,)), layers.Dropout(0.3), calls, layers.Dense(3)])
    model = RDropModel(inner, 2.0, **options)
    model.compile("adam", LOSS, metrics=metrics)
    data = {"batch_size": 8, "epochs": 2, "verbose": 0}
    model.fit(X[:16], Y[:16], validation_data=(X[16:32], Y[16:32]), **data)
    if keras.backend.backend() == "torch":
        assert calls.in_training == 4
        return
    assert calls.in_training == programs
    traced = calls.otherwise
    model.fit(X[:32], Y[:32], validation_data=(X[:16], Y[:16]), **data)
    model.evaluate(X[:24], Y[:24], batch_size=8, verbose=0)
    assert (calls.in_training, calls.otherwise) == (programs, traced)
