"""A wrapper answers as the model inside: what scripts do with the variable that they wrapped."""

import keras
import numpy as np
import pytest
from keras import layers

from models import to_numpy
from rdrop_keras import RDropModel

X = np.random.RandomState(0).normal(size=(16, 8)).astype("float32")
Y = np.arange(16) % 3
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def functional():
    inputs = keras.Input((8,))
    features = layers.Dense(4, "relu", name="features")(inputs)
    return keras.Model(inputs, layers.Dense(3, name="logits")(layers.Dropout(0.3)(features)))


class WithTable(keras.Model):
    """A model with attributes and a method of its own."""

    def __init__(self):
        super().__init__()
        self.table = np.eye(8, dtype="float32")
        self.start, self.temperature = 7, 1.0
        self.hidden, self.dropout, self.out = layers.Dense(4), layers.Dropout(0.3), layers.Dense(3)

    def call(self, inputs, training=None):
        return (
            self.out(
                self.dropout(
                    self.hidden(keras.ops.matmul(inputs, keras.ops.convert_to_tensor(self.table))), training=training
                )
            )
            / self.temperature
        )

    def generate(self, inputs):
        return keras.ops.argmax(self(inputs), axis=-1)


def test_layers_inputs_and_outputs_are_those_of_the_model():
    inner = functional()
    model = RDropModel(inner)
    assert model.layers == inner.layers and model.get_layer("features") is inner.get_layer("features")
    assert model.get_layer(index=1) is inner.layers[1]
    assert model.inputs is inner.inputs and model.outputs is inner.outputs
    assert model.input is inner.input and model.output is inner.output
    assert model.input_shape == (None, 8) and model.output_shape == (None, 3)
    activations = keras.Model(model.inputs, model.get_layer("features").output)  # As for Grad-CAM.
    expected = inner.get_layer("features")(keras.ops.convert_to_tensor(X))
    np.testing.assert_allclose(to_numpy_tensor(activations([X])), to_numpy_tensor(expected), rtol=1e-6)


def to_numpy_tensor(tensor):
    return keras.ops.convert_to_numpy(tensor)


def test_unfreezing_layers_trains_them():
    model = RDropModel(functional())
    for layer in model.layers[:-1]:
        layer.trainable = False
    assert [v.path for v in model.trainable_variables] == [v.path for v in model.get_layer("logits").variables]
    model.compile(keras.optimizers.SGD(0.5), LOSS)
    before = [to_numpy(w) for w in model.weights]
    model.fit(X, Y, verbose=0)
    changed = [not np.array_equal(a, to_numpy(b)) for a, b in zip(before, model.weights)]
    assert changed == [False, False, True, True]


def test_methods_and_attributes_are_those_of_the_model():
    inner = WithTable()
    inner(X)
    model = RDropModel(inner)
    np.testing.assert_array_equal(to_numpy_tensor(model.generate(X)), to_numpy_tensor(inner.generate(X)))
    model.table = 2 * np.eye(8, dtype="float32")
    model.temperature = 2.0
    assert inner.table.sum() == 16 and inner.temperature == 2.0
    assert model.start == 0 and inner.start == 7  # What the wrapper has itself is its own.
    model.note = "mine"
    assert model.note == "mine" and not hasattr(inner, "note")
    del model.temperature
    assert not hasattr(inner, "temperature")


def test_what_neither_has_is_an_error_that_names_the_model():
    model = RDropModel(functional())
    with pytest.raises(AttributeError, match=r"Neither `RDropModel` nor the model inside, its `.model`, .* 'genrate'"):
        model.genrate  # noqa: B018
    with pytest.raises(AttributeError, match=r"no attribute '_functional'. If the model inside has it: `.model._func"):
        model._functional  # noqa: B018
    inner = functional()
    inner.compile("adam", LOSS)
    with pytest.raises(AttributeError, match=r"no attribute 'optimizer'.*`.model.optimizer`"):
        RDropModel(inner).optimizer  # noqa: B018


def test_summary_is_the_table_of_the_model():
    model = RDropModel(functional())
    lines, own = [], []
    model.summary(print_fn=lambda line, **_: lines.append(line))
    model.model.summary(print_fn=lambda line, **_: own.append(line))
    assert lines[: len(own)] == own and "R-Drop: 1 of 3 layer calls" in lines[-1]


def test_a_compiled_model_inside_is_not_a_compiled_wrapper():
    inner = functional()
    inner.compile("adam", LOSS)
    model = RDropModel(inner)
    for method in ("fit", "evaluate", "train_on_batch", "test_on_batch"):
        with pytest.raises(ValueError, match=rf"Call `compile` of the RDropModel. Received: `{method}`"):
            getattr(model, method)(X, Y)
    np.testing.assert_allclose(model.predict(X, verbose=0), inner.predict(X, verbose=0), rtol=1e-5, atol=1e-6)
    model.compile("adam", LOSS)
    model.fit(X, Y, verbose=0)


@pytest.mark.parametrize("make", [WithTable, lambda: keras.Sequential([layers.Dropout(0.3), layers.Dense(3)])])
def test_build_and_fit(make):
    model = RDropModel(make())
    if isinstance(model.model, keras.Sequential):
        model.build((None, 8))
        assert len(model.weights) == len(model.model.weights) == 2
    else:
        with pytest.warns(UserWarning, match="does not have a `build"):  # As of a plain subclassed model.
            model.build((None, 8))
    model.compile("adam", LOSS)
    assert model.fit(X, Y, verbose=0).history["consistency_loss"][0] > 0
    assert model.built and model.weights


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")  # Keras, of dropout and inputs.
@pytest.mark.parametrize("by", ["model", "wrapper"])
def test_quantization_shows_in_predictions(by):
    model = RDropModel(functional())
    model.compile("adam", LOSS)
    before = model.predict(X, verbose=0)
    (model.model if by == "model" else model).quantize("int8")
    after = model.predict(X, verbose=0)
    np.testing.assert_allclose(after, model.model.predict(X, verbose=0), rtol=1e-5, atol=1e-6)
    assert np.abs(after - before).max() > 1e-5


@pytest.mark.backends("tensorflow")
def test_saved_model_has_the_signature_of_the_model(tmp_path):
    import tensorflow as tf

    model = RDropModel(functional())
    tf.saved_model.save(model, tmp_path)
    loaded = tf.saved_model.load(tmp_path)
    expected = model.predict(X, verbose=0)
    (served,) = loaded.signatures["serving_default"](inputs=tf.constant(X)).values()
    np.testing.assert_allclose(served, expected, rtol=1e-5, atol=1e-6)
    assert tf.lite.TFLiteConverter.from_saved_model(str(tmp_path)).convert()


@pytest.mark.parametrize("make", [functional, lambda: keras.Sequential([keras.Input((None, 4)), layers.Dropout(0.3)])])
def test_output_shape_is_that_of_the_model(make):
    model = make()
    shape = (7, *model.input_shape[1:])
    wrapper = RDropModel(model)
    assert wrapper.compute_output_shape(shape) == model.compute_output_shape(shape)
    assert keras.Sequential([wrapper, layers.Softmax()]).compute_output_shape(shape)[0] == 7


def test_a_part_of_another_model_of_any_length():
    """JAX would run the convolution on an unknown length, and cannot tell whether that is above 2."""
    inner = [layers.Dropout(0.3), layers.Conv1D(2, 3), layers.GlobalMaxPooling1D()]
    wrapper = RDropModel(keras.Sequential([keras.Input((None, 4)), *inner]))
    inputs = keras.Input((None, 5, 4))
    outer = keras.Model(inputs, layers.TimeDistributed(wrapper)(inputs))
    x = np.random.RandomState(0).normal(size=(2, 3, 5, 4)).astype("float32")
    expected = keras.ops.convert_to_numpy(wrapper.model(x.reshape(6, 5, 4))).reshape(2, 3, 2)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(outer(x)), expected, rtol=1e-5, atol=1e-6)


class WithHead(RDropModel):
    def __init__(self, model, **kwargs):
        super().__init__(model, **kwargs)
        self.head = layers.Dense(2)
        self.head.build((None, 3))


def test_layers_of_a_subclass_have_weights():
    """`EarlyStopping(restore_best_weights=True)` gets and sets them."""
    wrapper = WithHead(functional())
    assert [w.path for w in wrapper.weights] == [w.path for w in [*wrapper.model.weights, *wrapper.head.weights]]
    zeros = [np.zeros(w.shape, w.dtype) for w in wrapper.weights]
    wrapper.set_weights(zeros)
    assert not keras.ops.convert_to_numpy(wrapper.head.kernel).any()


def test_build_config_is_that_of_the_model(tmp_path):
    """KerasTuner makes its best models anew, builds them from it and loads their weights."""

    def make():
        return RDropModel(keras.Sequential([layers.Dense(4), layers.Dropout(0.3), layers.Dense(3)]))

    trained, new = make(), make()
    trained.compile("sgd", LOSS)
    trained.fit(X, Y, verbose=0)
    trained.save_weights(tmp_path / "best.weights.h5")
    new.build_from_config(trained.get_build_config())
    new.load_weights(tmp_path / "best.weights.h5")
    np.testing.assert_allclose(new.predict(X, verbose=0), trained.predict(X, verbose=0), rtol=1e-6)


def test_outer_model_that_trains_a_wrapper_is_warned_of():
    """Only the wrapper's own steps are R-Drop's. The remedy in the message makes those of the outer model so."""
    wrapper = RDropModel(functional(), alpha=1.0)
    outer = keras.Sequential([wrapper, layers.Dense(3)])
    outer.compile("sgd", LOSS)
    with pytest.warns(UserWarning, match="must be the outermost model in training: as a layer of another it trains"):
        outer.fit(X, Y, epochs=1, verbose=0)
    outer.evaluate(X, Y, verbose=0)
    model = RDropModel(keras.Sequential([wrapper.model, layers.Dense(3)]), alpha=1.0)
    model.compile("sgd", LOSS)
    assert model.fit(X, Y, epochs=1, verbose=0).history["consistency_loss"][0] > 0
