"""What a model is when it is compiled is what trains: layers, rates, policies and flags may change after wrapping."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from rdrop_keras import RDropModel, sharing

N = 12
X = np.random.RandomState(0).normal(size=(N, 8)).astype("float32")
Y = np.arange(N) % 3
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def mlp(*inputs):
    return keras.Sequential([*inputs, layers.Dense(6, "tanh"), layers.Dropout(0.3, seed=1), layers.Dense(3)])


def deepen(model):
    model.pop()
    model.add(layers.Dense(5, "tanh", name="added"))
    model.add(layers.Dense(3))


def trained(wrapper, rate=0.1, batch_size=N):
    wrapper.compile(keras.optimizers.SGD(rate), LOSS)
    return wrapper.fit(X, Y, batch_size=batch_size, epochs=2, shuffle=False, verbose=0).history


@pytest.mark.parametrize("first", ["wrap", "compile", "fit"])
@pytest.mark.parametrize("inputs", [(keras.Input((8,)),), ()], ids=["built", "unbuilt"])
def test_layers_added_and_removed(first, inputs):
    """The same numbers as a model that had these layers from the start."""

    def run(change_first):
        keras.utils.set_random_seed(1)
        model = mlp(*inputs)
        if change_first:
            deepen(model)
        wrapper = RDropModel(model, alpha=2.0)
        if not change_first:
            if first != "wrap":
                wrapper.compile(keras.optimizers.SGD(0.1), LOSS)
            if first == "fit":
                wrapper.fit(X, Y, verbose=0)
            deepen(model)
        if not model.built:
            model.build((None, 8))
        initial = np.random.RandomState(3)
        model.set_weights([initial.normal(size=w.shape, scale=0.5) for w in model.get_weights()])
        keras.utils.set_random_seed(2)
        model.layers[1].seed_generator.state.assign(np.array([1, 0], "uint32"))
        before = model.get_weights()
        history = trained(wrapper)
        assert all(np.any(a != b) for a, b in zip(before, model.get_weights()))
        assert "added" in [call.name for call in sharing(wrapper).calls]
        lines = []
        wrapper.summary(print_fn=lambda text, **kwargs: lines.append(text))
        assert "R-Drop: 1 of 4 layer calls" in "".join(lines)
        return [history["loss"], *model.get_weights()]

    for actual, expected in zip(run(False), run(True)):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_layers_added_after_compile():
    """As in plain Keras, whose first step is traced in `fit`."""
    model = mlp(keras.Input((8,)))
    wrapper = RDropModel(model)
    wrapper.compile(keras.optimizers.SGD(0.1), LOSS)
    deepen(model)
    before = model.get_weights()
    wrapper.fit(X, Y, verbose=0)
    assert all(np.any(a != b) for a, b in zip(before, model.get_weights()))


def test_layers_of_a_nested_model():
    inner = mlp(keras.Input((8,)))
    inputs = keras.Input((8,))
    wrapper = RDropModel(keras.Model(inputs, layers.Activation("linear")(inner(inputs))))
    trained(wrapper)
    deepen(inner)
    before = inner.get_weights()
    trained(wrapper)
    assert all(np.any(a != b) for a, b in zip(before, inner.get_weights()))
    assert f"{inner.name}/added" in [call.name for call in sharing(wrapper).calls]


def test_layer_of_a_subclassed_model():
    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dropout, self.head = layers.Dropout(0.3, seed=1), layers.Dense(3)

        def call(self, inputs, training=None):
            return self.head(self.dropout(inputs, training=training))

    model = Own()
    wrapper = RDropModel(model)
    assert min(trained(wrapper)["consistency_loss"]) > 0
    model.dropout.noise_shape = (1, 8)  # One draw for all rows.
    assert min(trained(wrapper, batch_size=3)["consistency_loss"]) > 0


def test_no_random_layer_is_left():
    model = mlp(keras.Input((8,)))
    wrapper = RDropModel(model)
    model.pop()
    model.pop()
    with pytest.raises(ValueError, match="needs a layer that is random in training"):
        wrapper.compile("sgd", LOSS)


def frozen(model):
    model.layers[0].trainable = False


def with_lora(model):
    model.layers[0].enable_lora(2)


def in_bfloat16(model):
    model.layers[-1].dtype_policy = "mixed_bfloat16"


def early_dropout(model):
    model.layers[1].rate = 0.0
    model.add(layers.Dropout(0.4, seed=2))


@pytest.mark.parametrize("change", [frozen, with_lora, in_bfloat16, early_dropout])
def test_changes_of_layers(change):
    """A wrapper made and trained before the change trains on as one that is made after it."""
    results = []
    for wraps_first in (True, False):
        keras.utils.set_random_seed(1)
        model = mlp(keras.Input((8,)))
        wrapper = RDropModel(model)
        if wraps_first:
            trained(wrapper, rate=0.0)  # Moves nothing but the state of the dropout layers.
        change(model)
        wrapper = wrapper if wraps_first else RDropModel(model)
        for layer in model.layers:
            if isinstance(layer, layers.Dropout):
                layer.seed_generator.state.assign(np.array([1, 0], "uint32"))
        initial = np.random.RandomState(3)
        model.set_weights([initial.normal(size=w.shape, scale=0.5) for w in model.get_weights()])
        keras.utils.set_random_seed(2)
        results.append([trained(wrapper)["loss"], *model.get_weights()])
        assert [call.repeated for call in wrapper._passes.graph.calls] == [not c.once for c in sharing(model).calls]
    for actual, expected in zip(*results):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_compiled_again_unchanged():
    histories = []
    for times in (1, 3):
        keras.utils.set_random_seed(1)
        wrapper = RDropModel(mlp(keras.Input((8,))))
        for _ in range(times - 1):
            wrapper.compile(keras.optimizers.SGD(0.1), LOSS)
        keras.utils.set_random_seed(2)
        histories.append(trained(wrapper)["loss"])
    assert histories[0] == pytest.approx(histories[1], rel=1e-6)


def test_rates_changed_between_fits():
    wrapper = RDropModel(mlp(keras.Input((8,))))
    trained(wrapper)
    wrapper.model.layers[1].rate = 0.0
    wrapper.model.add(layers.Dropout(0.4))
    outputs = wrapper._passes(ops.convert_to_tensor(X), 2, True)
    assert [call.repeated for call in wrapper._passes.graph.calls] == [False, False, False, True]
    assert np.any(ops.convert_to_numpy(outputs[:N] != outputs[N:]))
