"""The paired graph: it equals tiling the inputs, runs each layer as often as it must, and knows which may be random."""

import contextlib
import time

import keras
import numpy as np
import pytest
from keras import layers, ops

import rdrop_keras
from models import gradients_of_step, to_numpy
from rdrop_keras.passes.graph import PairedGraph
from rdrop_keras.wrapper import step

RNG = np.random.default_rng(0)
CROSSENTROPY = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def floats(*shape):
    return RNG.normal(size=shape).astype("float32")


def labels(classes, *shape):
    return RNG.integers(0, classes, size=shape)


def hub():
    import keras_hub

    return keras_hub.models


def mlp():
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(8, "relu", kernel_regularizer="l2", activity_regularizer="l2"),
            layers.Dense(8, "tanh"),
            layers.Dropout(0.3),
            layers.Dense(3),
        ]
    )
    return model, floats(6, 5), labels(3, 6)


def cnn():
    """Batch normalization before and after the first dropout, a skip connection over it, dropout in the head."""
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, padding="same", use_bias=False)(inputs)
    skip = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.SpatialDropout2D(0.3)(skip)
    x = layers.BatchNormalization()(layers.Conv2D(4, 3, padding="same", use_bias=False)(x))
    x = layers.Concatenate()([layers.Add()([x, skip]), skip])
    x = layers.Dropout(0.3)(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, layers.Dense(3)(x)), floats(6, 8, 8, 2), labels(3, 6)


def nested():
    """Models in models, one of them called twice: once before the first dropout, once after."""
    block = keras.Sequential([keras.Input((4,)), layers.Dense(4, "relu"), layers.BatchNormalization()], name="block")
    inputs = keras.Input((4,))
    x = layers.Dropout(0.3)(block(inputs))
    middle = keras.Model(inputs, {"a": block(x), "b": block(inputs)}, name="middle")
    outer = keras.Input((4,), name="outer")
    outputs = middle(layers.Dense(4)(outer))
    return keras.Model(outer, layers.Dense(3)(ops.add(outputs["a"], outputs["b"]))), floats(6, 4), labels(3, 6)


def two_inputs_two_outputs():
    """Layers shared by both inputs. The second output depends on no random layer."""
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    shared, dropout = layers.Dense(5, "tanh"), layers.Dropout(0.4)
    left, right = shared(a), shared(b)
    first = layers.Dense(3, name="first")(layers.Add()([dropout(left), right]))
    second = layers.Dense(2, name="second")(layers.Concatenate()([left, right]))
    model = keras.Model({"a": a, "b": b}, {"first": first, "second": second})
    return model, {"a": floats(6, 4), "b": floats(6, 4)}, {"first": labels(3, 6), "second": labels(2, 6)}


def masked():
    """Implicit masks made before the tile and used after it, and an explicit one."""
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(10, 6, mask_zero=True)(tokens)
    x = layers.LSTM(6, return_sequences=True)(layers.LayerNormalization()(x))
    x = layers.Dropout(0.3, seed=1)(x)  # Without a seed, PyTorch's masks depend on the memory layout of tensors.
    x = layers.MultiHeadAttention(2, 3, dropout=0.2, seed=2)(x, x, x)
    x = layers.GRU(6, return_sequences=True)(x)
    pooled = layers.GlobalAveragePooling1D()(x, mask=ops.not_equal(tokens, 0))
    x = labels(10, 6, 7)
    x[:, 5:] = 0
    return keras.Model(tokens, layers.Dense(3)(pooled)), x, labels(3, 6)


def mobilenet():
    shape = (96, 96, 3)
    backbone = keras.applications.MobileNetV2(shape, alpha=0.35, include_top=False, weights=None, pooling="avg")
    model = keras.Sequential([keras.Input(shape), backbone, layers.Dropout(0.3), layers.Dense(3)])
    return model, floats(4, *shape), labels(3, 4)


def efficientnet():
    model = keras.applications.EfficientNetB0(
        input_shape=(96, 96, 3), weights=None, classes=3, classifier_activation=None
    )
    return model, 100 * floats(4, 96, 96, 3), labels(3, 4)


def bert():
    backbone = hub().BertBackbone(20, num_layers=2, num_heads=2, hidden_dim=8, intermediate_dim=8, dropout=0.2)
    model = hub().BertTextClassifier(backbone=backbone, num_classes=3, dropout=0.2)
    mask = np.arange(7) < np.array([[7], [7], [4], [3]])
    return model, {"token_ids": labels(20, 4, 7), "segment_ids": labels(2, 4, 7), "padding_mask": mask}, labels(3, 4)


def vit():
    backbone = hub().ViTBackbone(
        (8, 8, 3), patch_size=(4, 4), num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8, dropout_rate=0.2
    )
    return hub().ViTImageClassifier(backbone=backbone, num_classes=3), floats(4, 8, 8, 3), labels(3, 4)


def resnet():
    backbone = hub().ResNetBackbone(
        input_conv_filters=[64],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 64],
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="basic_block",
        use_pre_activation=True,
        image_shape=(16, 16, 3),
    )
    return (
        hub().ResNetImageClassifier(backbone=backbone, num_classes=3, dropout=0.3),
        floats(4, 16, 16, 3),
        labels(3, 4),
    )


def bart():
    backbone = hub().BartBackbone(20, num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=8, dropout=0.2)
    logits = backbone.token_embedding(backbone.output["decoder_sequence_output"], reverse=True)
    x = {
        "encoder_token_ids": labels(20, 4, 7),
        "encoder_padding_mask": np.arange(7) < np.array([[7], [7], [4], [3]]),
        "decoder_token_ids": labels(20, 4, 5),
        "decoder_padding_mask": np.arange(5) < np.array([[5], [2], [4], [3]]),
    }
    return keras.Model(backbone.input, logits), x, labels(20, 4, 5)


SMALL = [mlp, cnn, nested, two_inputs_two_outputs, masked, bert, vit, bart]
LARGE = [mobilenet, efficientnet, resnet]


def cases(*makes, slow=()):
    """Parameters of a test. Those with models of KerasHub are marked as needing it."""
    marks = {make: [pytest.mark.needs("keras_hub")] for make in makes if make in (bert, vit, bart, resnet)}
    marks[efficientnet] = [pytest.mark.backends("tensorflow", "torch")]  # JAX compiles it for a minute.
    return [pytest.param(make, marks=marks.get(make, []) + [pytest.mark.slow] * (make in slow)) for make in makes]


def wrap(make, share, **kwargs):
    """The model of `make`, the same at every call, including its random numbers."""
    global RNG
    RNG = np.random.default_rng(1)
    keras.utils.set_random_seed(1)
    model, x, y = make()
    return rdrop_keras.RDropModel(model, alpha=2.0, share=share, **kwargs), x, y


def compile_for(model, **kwargs):
    outputs = model.model.outputs
    loss = CROSSENTROPY if len(outputs) == 1 else dict.fromkeys(model.output_names, CROSSENTROPY)
    model.compile(keras.optimizers.SGD(0.1), loss, **kwargs)


def assert_close(actual, expected, tolerance=1e-5):
    """Compares relative to the largest element of each tensor, or to a hundredth of the largest of all: the gradient of
    a bias before batch normalization is 0 up to rounding."""
    actual, expected = ([np.asarray(v, "float64") for v in keras.tree.flatten(vs)] for vs in (actual, expected))
    assert len(actual) == len(expected) > 0
    largest = max(np.abs(e).max(initial=0) for e in expected)
    for a, e in zip(actual, expected):
        np.testing.assert_allclose(a, e, rtol=0, atol=tolerance * max(np.abs(e).max(initial=0), largest / 100))


def shares(model):
    """Whether any call runs once for all passes."""
    return not all(call.repeated for call in model._passes.graph.calls)


def outputs_of_passes(model, x, num_passes=2):
    keras.utils.set_random_seed(2)  # PyTorch's dropout draws from the generator of the process.
    with step.training(num_passes):
        x = keras.tree.map_structure(ops.convert_to_tensor, x)
        return keras.tree.map_structure(ops.convert_to_numpy, model(x, training=True))


def batch_sizes(monkeypatch, function):
    """`{layer name: batch sizes of its calls}` while `function` runs."""
    seen = {}
    call = keras.Layer.__call__

    def recording(self, *args, **kwargs):
        tensors = [t for t in keras.tree.flatten((args, kwargs)) if hasattr(t, "shape")]
        seen.setdefault(self.name, []).append(tensors[0].shape[0])
        return call(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(keras.Layer, "__call__", recording)
        function()
    return seen


@pytest.mark.parametrize("make", cases(*SMALL, slow=(masked, vit, bart)))
def test_equals_tiling_the_inputs(make, num_passes=2):
    late, x, y = wrap(make, "deterministic", num_passes=num_passes)
    early, _, _ = wrap(make, "nothing", num_passes=num_passes)
    assert shares(late) and not shares(early)
    assert_close(outputs_of_passes(late, x, num_passes), outputs_of_passes(early, x, num_passes))
    for model in (late, early):
        compile_for(model)
    logs_late, gradients_late = gradients_of_step(late, x, y)
    logs_early, gradients_early = gradients_of_step(early, x, y)
    assert_close(logs_late, logs_early)
    assert logs_late["consistency_loss"] > 0
    assert_close(gradients_late, gradients_early)


def test_equals_tiling_the_inputs_three_times():
    test_equals_tiling_the_inputs(cnn, num_passes=3)


def masked_across_models():
    """A mask from outside is used in a nested model, in two calls. The second comes after dropout."""
    x = keras.Input((7, 6))
    h = layers.Dropout(0.3, seed=1)(layers.LSTM(5, return_sequences=True)(x))
    encoder = keras.Model(x, layers.GRU(4)(h), name="encoder")
    tokens = keras.Input((7,), dtype="int32")
    x = layers.Embedding(10, 6, mask_zero=True)(tokens)
    x = layers.Concatenate()([encoder(x), encoder(layers.Dropout(0.2, seed=3)(x))])
    ids = labels(10, 6, 7)
    ids[:, 4:] = 0
    return keras.Model(tokens, layers.Dense(3)(x)), ids


def states():
    """Several outputs of a layer, some used after the dropout of another, and as a keyword."""
    x = keras.Input((7, 6))
    sequence, h, c = layers.LSTM(5, return_sequences=True, return_state=True)(x)
    outputs = layers.LSTM(5)(layers.Dropout(0.3, seed=2)(sequence), initial_state=[h, c])
    return keras.Model(x, layers.Dense(3)(outputs)), floats(6, 7, 6)


def passthrough():
    """An output that is the input, and outputs that have no layer in common."""
    x = keras.Input((4,))
    return keras.Model(x, [x, layers.Dropout(0.3, seed=1)(x), layers.Dense(3)(x)]), floats(6, 4)


def dicts():
    """A nested model that is called with dictionaries in another order of keys, and with another dtype."""
    a, b = keras.Input((4,), name="zz"), keras.Input((3,), name="aa")
    inner = keras.Model({"zz": a, "aa": b}, {"o": layers.Dense(2)(a), "p": layers.Dropout(0.3, seed=1)(b)})
    c, d = keras.Input((4,), dtype="int32"), keras.Input((3,))
    outputs = inner({"aa": d, "zz": c})
    return keras.Model([c, d], [outputs["p"], outputs["o"]]), [labels(5, 6, 4), floats(6, 3)]


@pytest.mark.parametrize("make", [masked_across_models, states, passthrough, dicts])
def test_unusual_graphs(make):
    late, x, _ = wrap(lambda: (*make(), None), "deterministic")
    early, _, _ = wrap(lambda: (*make(), None), "nothing")
    assert shares(late)
    assert_close(outputs_of_passes(late, x), outputs_of_passes(early, x))


@pytest.mark.parametrize(
    "make", cases(*SMALL, *LARGE, slow=(nested, two_inputs_two_outputs, masked, bert, vit, bart, *LARGE))
)
def test_trains_as_with_tiled_inputs(make):
    """Weights, batch-normalization statistics and the optimizer's state after three steps."""
    states = []
    for share in ("deterministic", "nothing"):
        model, x, y = wrap(make, share)
        compile_for(model, run_eagerly=make not in SMALL and keras.backend.backend() != "jax")
        before = [to_numpy(v) for v in model.variables]
        logs = [model.train_on_batch(x, y, return_dict=True) for _ in range(3)]
        states.append((logs, [to_numpy(v) for v in model.variables + model.optimizer.variables]))
        assert any(np.abs(b - to_numpy(v)).max() > 0 for b, v in zip(before, model.variables))
    assert_close(*states)


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_jit_compile():
    states = []
    for share in ("deterministic", "nothing"):
        model, x, y = wrap(cnn, share)
        compile_for(model, jit_compile=True)
        logs = [model.train_on_batch(x, y, return_dict=True) for _ in range(3)]
        states.append((logs, [to_numpy(v) for v in model.variables]))
    assert_close(*states)


@contextlib.contextmanager
def two_devices():
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        one_device = tf.distribute.ReductionToOneDevice()
        with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=one_device).scope():
            yield
    else:
        devices = keras.distribution.list_devices()[:2]
        keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))
        try:
            yield
        finally:
            keras.distribution.set_distribution(None)


@pytest.mark.backends("jax", "tensorflow")
@pytest.mark.slow
@pytest.mark.parametrize("make", cases(cnn, nested))
def test_on_two_devices(make):
    states = []
    for share in ("deterministic", "nothing"):
        with two_devices():
            model, x, y = wrap(make, share)
            compile_for(model)
            history = model.fit(x, y, batch_size=6, epochs=3, shuffle=False, verbose=0).history
        states.append((history, [to_numpy(v) for v in model.variables]))
    assert_close(*states)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    late, x, _ = wrap(nested, "deterministic")
    early, _, _ = wrap(nested, "nothing")
    outputs, expected = outputs_of_passes(late, x), outputs_of_passes(early, x)
    assert outputs.dtype == expected.dtype
    np.testing.assert_allclose(outputs.astype("float64"), expected.astype("float64"), atol=0.03)


@pytest.mark.parametrize("make", cases(cnn, nested, two_inputs_two_outputs, bert))
def test_how_often_each_layer_runs(make, monkeypatch):
    """Every layer is called once, with N rows before the first random layer and with mN rows after it."""
    model, x, _ = wrap(make, "deterministic", num_passes=3)
    rows = len(keras.tree.flatten(x)[0])
    expected = {}
    for call in model._passes.graph.calls:
        if isinstance(call.operation, keras.Layer):
            sizes = expected.setdefault(call.operation.name, [])
            sizes.append(3 * rows if call.repeated else rows)
    seen = batch_sizes(monkeypatch, lambda: outputs_of_passes(model, x, 3))
    assert {name: sorted(seen[name]) for name in expected} == {name: sorted(n) for name, n in expected.items()}
    assert {n for sizes in seen.values() for n in sizes} >= {rows, 3 * rows}


def test_head_dropout_costs_nothing_before_it(monkeypatch):
    model, x, _ = wrap(cnn, "deterministic")
    seen = batch_sizes(monkeypatch, lambda: outputs_of_passes(model, x))
    names = [layer.name.rstrip("_0123456789") for layer in model.model.layers]
    first_rows = [seen[layer.name][0] for layer, name in zip(model.model.layers, names) if name != "input_layer"]
    assert first_rows == [6, 6, 6, 12, 12, 12, 12, 12, 12, 12, 12]


def test_runs_once_outside_a_paired_step(monkeypatch):
    model, x, y = wrap(mlp, "deterministic")
    compile_for(model, run_eagerly=True)
    for function in (lambda: model.predict(x, verbose=0), lambda: model.evaluate(x, y, verbose=0)):
        seen = batch_sizes(monkeypatch, function)
        assert {n for sizes in seen.values() for n in sizes} == {6}


def test_share_up_to_a_layer(monkeypatch):
    """Up to the layer there is one pass, with its dropout. After it each pass has its own dropout."""
    inputs = keras.Input((4,))
    x = layers.Dropout(0.5, name="early", seed=1)(layers.Dense(32, name="first")(inputs))
    backbone = keras.Model(inputs, layers.Dense(32, name="pooled")(x), name="backbone")
    x = layers.Dropout(0.5, name="late", seed=2)(backbone(inputs))
    model = keras.Model(inputs, layers.Dense(2, name="logits")(x))
    for share in ("backbone/pooled", "pooled", "backbone"):
        wrapper = rdrop_keras.RDropModel(model, share=share)
        seen = batch_sizes(monkeypatch, lambda wrapper=wrapper: outputs_of_passes(wrapper, floats(3, 4)))
        assert {name: seen[name] for name in ("first", "early", "pooled", "late", "logits")} == {
            "first": [3],
            "early": [3],
            "pooled": [3],
            "late": [6],
            "logits": [6],
        }
    wrapper = rdrop_keras.RDropModel(model, share="backbone/early")
    seen = batch_sizes(monkeypatch, lambda: outputs_of_passes(wrapper, floats(3, 4)))
    assert [seen[name] for name in ("early", "pooled", "late")] == [[3], [3], [6]]

    # Both passes have the same rows up to the layer, although it comes after a dropout.
    probe = keras.Model(inputs, [backbone(inputs), layers.Dropout(0.5, seed=3)(backbone(inputs))])
    pooled, dropped = outputs_of_passes(rdrop_keras.RDropModel(probe, share="pooled"), floats(3, 4))
    np.testing.assert_array_equal(pooled[:3], pooled[3:])
    assert np.abs(dropped[:3] - dropped[3:]).max() > 0
    pooled, _ = outputs_of_passes(rdrop_keras.RDropModel(probe), np.ones((3, 4), "float32"))
    assert np.abs(pooled[:3] - pooled[3:]).max() > 0


def test_share_errors():
    inputs = keras.Input((4,))
    x = layers.Dropout(0.5, name="early")(layers.Dense(4, name="first")(inputs))
    x = layers.Dropout(0.5, name="late")(layers.MultiHeadAttention(1, 2, name="attention")(x[:, None], x[:, None]))
    twin = keras.Model(inputs, layers.Dense(3, name="first")(inputs), name="twin")
    model = keras.Model(inputs, [layers.Dense(2, name="logits")(x), twin(inputs)])

    def wrapped(share, model=model):
        return rdrop_keras.RDropModel(model, share=share)

    with pytest.raises(TypeError, match=r"`share` must be 'deterministic', 'nothing' or .*\(NoneType\)"):
        wrapped(None)
    with pytest.raises(ValueError, match=r"Close names: 'early'.*Received: share='earli'"):
        wrapped("earli")
    with pytest.raises(ValueError, match=r"Close names: 'deterministic'. Received: share='determinstic'"):
        wrapped("determinstic")
    with pytest.raises(ValueError, match="Close names: none"):
        wrapped("xyzzy")
    with pytest.raises(ValueError, match="It is a part of 'attention', which runs as a whole"):
        wrapped("query")
    for share in ("late", "logits"):
        with pytest.raises(ValueError, match=f"Nothing that is random .* share='{share}'. Name an earlier layer"):
            wrapped(share)
    assert shares(wrapped("first"))  # It is the whole name of one layer and the end of another's.
    with pytest.raises(ValueError, match="More than one has it: 'a/same', 'b/same'"):
        a, b = (keras.Model(inputs, layers.Dense(3, name="same")(inputs), name=name) for name in "ab")
        wrapped("same", keras.Model(inputs, layers.Dropout(0.5)(a(inputs) + b(inputs))))
    with pytest.raises(ValueError, match=r"a Functional or Sequential model only.*share='first'"):
        wrapped("first", Subclassed())
    transposed = layers.Permute((2, 1))(x)
    with pytest.raises(ValueError, match=r"axis 0 is not known to be the batch.*an output of 'turned'"):
        turned = ops.transpose(transposed, (1, 0, 2))
        turned._keras_history.operation.name = "turned"
        wrapped("turned", keras.Model(inputs, layers.Dropout(0.5)(turned)))


class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)
        self.dropout = layers.Dropout(0.5)

    def call(self, inputs, training=None):
        return self.dropout(self.dense(inputs), training=training)


class Noisy(layers.Layer):
    """Random without a seed of its own, like a layer that is written in the functions of a backend."""

    def compute_output_shape(self, input_shape):
        return input_shape

    def call(self, inputs, training=None):
        return inputs + keras.random.normal(ops.shape(inputs)) if training else inputs


class Scale(layers.Layer):
    rdrop_stochastic = False

    def call(self, inputs):
        return 2.0 * inputs


class Undeclared(layers.Layer):
    def call(self, inputs):
        return 2.0 * inputs


class OwnDense(layers.Dense):
    """Changes nothing of what `Dense` computes."""

    def __init__(self, units, **kwargs):
        super().__init__(units, **kwargs)


class OwnCall(layers.Dense):
    def call(self, inputs, training=None):
        return super().call(inputs)


class Counter(layers.Layer):
    """Keeps state: its outputs depend on how often it was called."""

    def build(self, input_shape):
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs):
        self.count.assign_add(1.0)
        return inputs * self.count


class OverriddenCall(keras.Model):
    """A Functional model that runs more than its graph."""

    def call(self, inputs, training=None, mask=None):
        outputs = super().call(inputs, training=training)
        return outputs + keras.random.normal(ops.shape(outputs)) if training else outputs


def noise(x):
    return x + keras.random.normal(ops.shape(x))


def overridden():
    inputs = keras.Input((4,))
    return OverriddenCall(inputs, layers.Dense(3)(inputs))


def declared(layer, value=False):
    layer.rdrop_stochastic = value
    return layer


def with_own_call(layer):
    layer.call = lambda inputs: inputs + keras.random.normal(ops.shape(inputs))
    return layer


SUSPECTS = {
    "noise without a seed": (Noisy, r"may be random: Noisy declares no rdrop_stochastic"),
    "lambda": (lambda: layers.Lambda(noise, output_shape=lambda shape: shape), "may be random: Lambda"),
    "activation": (lambda: layers.Dense(4, activation=noise), "may be random: Dense"),
    "activation layer": (lambda: layers.Activation(noise), "may be random: Activation"),
    "overridden call": (overridden, "may be random: OverriddenCall"),
    "call on the instance": (lambda: with_own_call(layers.Dense(4)), "may be random: Dense"),
    "subclassed model": (Subclassed, "random: holds Dropout rate=0.5"),
    "custom layer": (Undeclared, "may be random: Undeclared"),
    "call in a subclass of Dense": (lambda: OwnCall(4), "may be random: OwnCall"),
    "inside a Keras layer": (lambda: layers.TimeDistributed(Noisy()), "may be random: Noisy"),
    "preprocessing": (lambda: layers.GaussianNoise(0.1), "random: GaussianNoise stddev=0.1"),
    "declared random": (lambda: declared(layers.Dense(4), True), "random: Dense"),
    "state": (lambda: declared(Counter(), None), "may be random: Counter"),
    "Keras's own state": (
        lambda: layers.SpectralNormalization(layers.Dense(4)),
        "may keep state: SpectralNormalization",
    ),
    "recurrent dropout": (lambda: layers.LSTM(4, recurrent_dropout=0.1), "holds LSTMCell recurrent_dropout=0.1"),
}


@pytest.mark.parametrize("name", SUSPECTS)
def test_what_cannot_be_vouched_for_is_repeated(name):
    make, reason = SUSPECTS[name]
    shape = (3, 4) if name in ("inside a Keras layer", "recurrent dropout") else (4,)
    inputs = keras.Input(shape)
    suspect = make()
    model = keras.Model(inputs, layers.Dropout(0.5)(suspect(layers.Dense(4)(inputs))))
    graph = PairedGraph(model, "deterministic")
    first, second = graph.calls[:2]
    assert not first.repeated and second.operation is suspect and second.repeated
    assert reason in second.reason


@pytest.mark.parametrize("name", ["noise without a seed", "lambda", "activation", "overridden call"])
def test_suspects_differ_between_passes(name):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, SUSPECTS[name][0]()(inputs))
    with pytest.warns(UserWarning, match="No layer of `model` is known to be random"):
        model = rdrop_keras.RDropModel(model)
    outputs = outputs_of_passes(model, floats(3, 4))
    assert np.abs(outputs[:3] - outputs[3:]).max() > 1e-3


@pytest.mark.parametrize(
    "make",
    [
        Scale,
        lambda: declared(Undeclared()),
        lambda: declared(Counter()),
        lambda: OwnDense(4),
        lambda: layers.Dense(4, activation="gelu", kernel_initializer=lambda shape, dtype: ops.ones(shape, dtype)),
        lambda: layers.Dense(4, activation=layers.LeakyReLU()),
        lambda: layers.Dropout(0.0),
        lambda: layers.BatchNormalization(),
        lambda: layers.Normalization(mean=0.5, variance=2.0),
    ],
)
def test_what_is_vouched_for_is_shared(make):
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dropout(0.5)(make()(layers.Dense(4)(inputs))))
    assert [call.repeated for call in PairedGraph(model, "deterministic").calls] == [False, False, True]


def transposed(tokens):
    return ops.transpose(layers.Embedding(10, 4)(tokens), (1, 0, 2))


def folded(tokens):
    return ops.reshape(layers.Embedding(10, 4)(tokens), (-1, 4))


def batch_mean(tokens):
    return ops.sum(layers.Embedding(10, 4)(tokens), axis=0, keepdims=True)


@pytest.mark.parametrize("function", [transposed, folded, batch_mean])
def test_tiles_before_an_axis_0_that_is_not_the_batch(function):
    """Both axes of the input are unknown. Only shapes at two batch sizes tell which is the batch."""

    def make():
        tokens = keras.Input((None,), dtype="int32")
        x = layers.Dropout(0.5, seed=1)(function(tokens))
        x = ops.transpose(x, (1, 0, 2)) if function is transposed else x
        return keras.Model(tokens, x), labels(10, 5, 5), None

    late, x, _ = wrap(make, "deterministic")
    early, _, _ = wrap(make, "nothing")
    assert "axis 0 of its output is not known to be the batch" in [call.reason for call in late._passes.graph.calls]
    assert [call.repeated for call in late._passes.graph.calls][:2] == [False, True]
    np.testing.assert_allclose(outputs_of_passes(late, x), outputs_of_passes(early, x), rtol=1e-6)


def test_the_wrapped_model_is_untouched():
    model, x, y = cnn()
    layer_names = [layer.name for layer in model.layers]
    counts = [(len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in model.layers]
    config, lines = model.get_config(), []
    model.summary(print_fn=lines.append)
    weights = [w.path for w in model.weights]
    wrapper = rdrop_keras.RDropModel(model)
    compile_for(wrapper)
    wrapper.fit(x, y, verbose=0)
    after = []
    model.summary(print_fn=after.append)
    assert after == lines
    assert model.get_config() == config
    assert [layer.name for layer in model.layers] == layer_names
    assert [w.path for w in model.weights] == weights
    assert [(len(layer._inbound_nodes), len(layer._outbound_nodes)) for layer in model.layers] == counts
    assert model.layers[-1].output is model.output
    assert wrapper.layers == model.layers
    assert {id(w) for w in wrapper.weights} == {id(w) for w in model.weights}
    model.layers[1].trainable = False
    assert len(wrapper.trainable_weights) == len(model.trainable_weights) == len(weights) - 4 - 1


def test_rates_changed_before_compile():
    inputs = keras.Input((4,))
    early, late = layers.Dropout(0.5), layers.Dropout(0.5)
    model = rdrop_keras.RDropModel(keras.Model(inputs, late(layers.Dense(3)(early(inputs)))))
    assert [call.repeated for call in model._passes.graph.calls] == [True, True, True]
    early.rate = 0.0
    compile_for(model)
    assert [call.repeated for call in model._passes.graph.calls] == [False, False, True]


def test_unbuilt_sequential_shares(monkeypatch):
    model = keras.Sequential([layers.Dense(4, name="first"), layers.Dropout(0.5), layers.Dense(3, name="last")])
    wrapper = rdrop_keras.RDropModel(model)
    seen = batch_sizes(monkeypatch, lambda: outputs_of_passes(wrapper, floats(5, 4)))
    assert (seen["first"][-1], seen["last"][-1]) == (5, 10)


def test_optional_input():
    inputs, extra = keras.Input((4,)), keras.Input((4,), optional=True)

    class AddIfGiven(layers.Layer):
        rdrop_stochastic = False

        def call(self, x, extra):
            return x if extra is None else x + extra

        def compute_output_shape(self, x_shape, extra_shape):
            return x_shape

    model = keras.Model([inputs, extra], layers.Dropout(0.5)(AddIfGiven()(layers.Dense(3)(inputs), extra)))
    outputs = rdrop_keras.RDropModel(model)
    with step.training(2):
        assert outputs([ops.ones((5, 4)), None], training=True).shape == (10, 3)


@pytest.mark.needs("keras_hub")
def test_builds_in_less_than_a_second_for_twelve_layers():
    """It takes a tenth of that, so that a slow machine passes too. `benchmarks/` measures it."""
    backbone = hub().BertBackbone(100, num_layers=12, num_heads=2, hidden_dim=8, intermediate_dim=8)
    model = hub().BertTextClassifier(backbone=backbone, num_classes=2)
    start = time.perf_counter()
    PairedGraph(model, "pooled_dense")
    assert time.perf_counter() - start < 1.0
