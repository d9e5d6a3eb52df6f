"""The same model with dropout: rates, weights, flags and outputs, for models of each kind."""

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

from marks import slow
from models import to_numpy
from rdrop_keras import RDropModel, stochastic_layers, with_dropout
from rdrop_keras.dropout import rates

BACKEND = keras.backend.backend()
TOLERANCE = 1e-6
HALF_TOLERANCE = 2**-6  # Two units in the last of bfloat16's eight bits; the backends round otherwise in each call.


@pytest.fixture(scope="module")
def hub():
    import keras_hub

    return keras_hub


def outputs(model, x):
    tensors = keras.tree.flatten(model(x, training=False))
    return [ops.convert_to_numpy(ops.cast(tensor, "float32")) for tensor in tensors]


def randomized(model):
    """Gives all weights different values, biases and scales too."""
    rng = np.random.default_rng(0)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(scale=0.3, size=variable.shape))
    return model


def check_same(new, model, x):
    """Asserts that `new` differs from `model` in its rates alone."""
    assert type(new) is type(model) and new.name == model.name
    assert new.dtype_policy == model.dtype_policy
    assert keras.tree.map_structure(lambda t: t.dtype, new(x)) == keras.tree.map_structure(lambda t: t.dtype, model(x))
    rtol, atol = (0, TOLERANCE) if model.compute_dtype == "float32" else (HALF_TOLERANCE, HALF_TOLERANCE)
    for ours, expected in zip(outputs(new, x), outputs(model, x), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=rtol, atol=atol)
    of_model = {id(variable) for variable in model.variables}
    assert not any(id(variable) in of_model for variable in new.variables)
    for kind in ("trainable_variables", "non_trainable_weights"):
        shapes = [sorted(tuple(v.shape) for v in getattr(m, kind) if "seed" not in v.path) for m in (new, model)]
        assert shapes[0] == shapes[1]
    return new


def rates_of(model):
    return {layer.name: layer.rate for layer in model._flatten_layers() if isinstance(layer, layers.Dropout)}


# Configurations.

DROPOUT = (
    "dropout",
    "dropout_rate",
    "attention_dropout_rate",
    "hidden_dropout_prob",
    "classifier_dropout",
    "dropout_p",
)
DROPOUT += ("drop_rate", "attn_drop", "proj_drop_rate", "drop")
DEPTH = ("drop_path_rate", "max_drop_path_rate", "drop_path", "drop_connect_rate", "stochastic_depth_rate")
NEITHER = (
    "recurrent_dropout",
    "dropout_seed",
    "num_dropout_layers",
    "rate",
    "dilation_rate",
    "backdrop",
    "drop_remainder",
)


def kinds(config, class_name=""):
    found = {}
    rates.with_rates(config, lambda rate_type, rate: found.setdefault(rate_type, []).append(rate) or rate, class_name)
    return found


def test_names_that_say_dropout():
    assert all(kinds({name: 0}) == {"dropout": [0]} for name in DROPOUT)
    assert all(kinds({name: 0.1}) == {"depth": [0.1]} for name in DEPTH)
    assert not any(kinds({name: 0}) for name in NEITHER)
    assert kinds({"rate": 0.0}, "SpatialDropout1D") == {"dropout": [0.0]}
    assert kinds({"drop_prob": 0.0}, "DropPath") == {"depth": [0.0]}


def test_rates_in_a_configuration():
    config = {
        "dropout": [0.0, 0.2],
        "attention_dropout": None,
        "use_dropout": True,
        "dropout_scale": 2.0,
        "encoder": {"class_name": "Encoder", "config": {"dropout": 0.3}, "compile_config": {"loss": "mine"}},
        "layers": [
            {"class_name": "Dropout", "config": {"rate": 0.0}},
            {"class_name": "Noise", "config": {"rate": 0.0}},
        ],
        "preprocessor": {"class_name": "Preprocessor", "config": {"dropout": 0.0}},
    }
    assert rates.with_rates(config, lambda rate_type, rate: 0.5) == {
        **config,
        "dropout": [0.5, 0.5],
        "encoder": {"class_name": "Encoder", "config": {"dropout": 0.5}},
        "layers": [
            {"class_name": "Dropout", "config": {"rate": 0.5}},
            {"class_name": "Noise", "config": {"rate": 0.0}},
        ],
    }


# Models of Keras's own layers.


def functional():
    """All ways to have layers in a graph: shared, nested, called twice, operators, arguments, two outputs."""
    x, z = keras.Input((5, 8), name="x"), keras.Input((5, 8), name="z")
    shared = layers.Dense(8, name="shared")
    inner = keras.Sequential([keras.Input((5, 8)), layers.Dense(8), layers.Dropout(0.0, name="inner")], name="twice")
    h = inner(shared(x)) + 0.5 * inner(shared(z))
    h = layers.MultiHeadAttention(2, 4, name="attention")(h, h, use_causal_mask=True)
    h = layers.SpatialDropout1D(0.0, name="spatial")(h)
    h = layers.BatchNormalization(name="normalization")(h)
    kept = layers.Dropout(0.4, name="kept")(h)
    pooled = ops.mean(ops.reshape(kept, (-1, 5, 8)), axis=1)
    return keras.Model({"x": x, "z": z}, {"a": layers.Dense(3, name="a")(pooled), "b": [h, pooled]}, name="net")


def batch():
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=(4, 5, 8)).astype("float32") for name in ("x", "z")}


def test_functional_model():
    model = randomized(functional())
    before = [to_numpy(variable) for variable in model.variables]
    new = check_same(with_dropout(model, 0.1), model, batch())
    assert [layer.name for layer in new.layers] == [layer.name for layer in model.layers]
    assert rates_of(new)["kept"] == 0.4
    assert rates_of(new)["spatial"] == rates_of(new)["inner"] == 0.1
    assert new.get_layer("attention").get_config()["dropout"] == 0.1
    assert rates_of(model)["spatial"] == rates_of(model)["inner"] == 0.0
    assert model.get_layer("attention").get_config()["dropout"] == 0.0
    # It has its own weights: what one model learns, the other does not.
    new.compile("sgd", {"a": "mse"})
    new.fit(batch(), {"a": np.ones((4, 3))}, verbose=0)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(to_numpy(variable), value)


def test_frozen_layers_stay_frozen():
    model = functional()
    model.get_layer("shared").trainable = False
    model.get_layer("twice").layers[0].trainable = False
    model.get_layer("normalization").gamma.trainable = False
    new = check_same(with_dropout(model, 0.1), model, batch())
    assert not new.get_layer("shared").trainable and not new.get_layer("twice").layers[0].trainable
    assert new.get_layer("twice").trainable and not new.get_layer("normalization").gamma.trainable
    assert new.get_layer("normalization").beta.trainable
    model.trainable = False
    new = check_same(with_dropout(model, 0.1), model, batch())
    assert not new.trainable and not new.trainable_variables


@pytest.mark.parametrize("deferred", [False, True])
def test_sequential_model(deferred):
    model = keras.Sequential([layers.Dense(4), layers.Dropout(0), layers.Dense(2)])
    x = np.ones((3, 8), "float32")
    if deferred:
        model(x)
    else:
        model.build((None, 8))
    new = check_same(with_dropout(randomized(model), np.float32(0.25)), model, x)
    assert list(rates_of(new).values()) == [0.25]


@pytest.mark.parametrize(
    "layer, name",
    [
        (lambda: layers.AlphaDropout(0.0), "rate"),
        (lambda: layers.GaussianDropout(0.0), "rate"),
        (lambda: layers.LSTM(4), "dropout"),
        (lambda: layers.GRU(4, recurrent_dropout=0.0), "dropout"),
        (lambda: layers.Bidirectional(layers.SimpleRNN(4)), "dropout"),
        (lambda: layers.TimeDistributed(layers.Dropout(0.0)), "rate"),
    ],
    ids=["AlphaDropout", "GaussianDropout", "LSTM", "GRU", "Bidirectional", "TimeDistributed"],
)
def test_layers_with_a_rate(layer, name):
    model = randomized(keras.Sequential([keras.Input((5, 8)), layer()]))
    new = check_same(with_dropout(model, 0.1), model, batch()["x"])
    (config, *_) = [inner.get_config() for inner in new._flatten_layers() if name in inner.get_config()]
    assert config[name] == 0.1 and config.get("recurrent_dropout", 0) == 0


def test_nothing_of_the_user_need_be_registered():
    factor = 3.0

    class Scale(layers.Layer):
        def __init__(self, dropout=0.0, **kwargs):
            super().__init__(**kwargs)
            self.dropout = dropout
            self.layer = layers.Dropout(dropout)

        def build(self, input_shape):
            self.scale = self.add_weight(shape=(input_shape[-1],))

        def call(self, inputs, training=None):
            return self.layer(inputs * self.scale, training=training)

        def get_config(self):
            return {**super().get_config(), "dropout": self.dropout}

    class Trained(keras.Model):
        def train_step(self, *args):
            return super().train_step(*args)

    def activation(x):
        return factor * x

    def loss(y_true, y_pred):
        return ops.mean(y_pred)

    x = keras.Input((8,))
    h = Scale(name="scale")(layers.Dense(8, activation=activation)(x))
    h = layers.Dense(8, activation=lambda x: x + factor)(h)
    h = layers.Lambda(lambda x, by: by * factor * x, arguments={"by": 2.0})(h)
    model = randomized(Trained(x, h))
    model.compile("adam", loss)
    new = check_same(with_dropout(model, 0.1), model, np.ones((2, 8), "float32"))
    assert new.get_layer("scale").dropout == 0.1 and not new.compiled and model.compiled


@pytest.mark.needs("tensorflow")
def test_state_that_is_not_in_variables():
    x, words = keras.Input((2,)), keras.Input((1,), dtype="string", name="words")
    normalization, lookup = layers.Normalization(), layers.StringLookup()
    normalization.adapt(np.array([[1.0, 5.0], [3.0, 6.0], [5.0, 10.0]]))
    h = layers.Dropout(0.0)(normalization(x))
    model = keras.Model(x, h)
    check_same(with_dropout(model, 0.1), model, np.array([[1.0, 2.0]], "float32"))
    if BACKEND == "tensorflow":
        import tensorflow as tf

        lookup.adapt(["b", "a", "b"])
        model = keras.Model([x, words], [h, lookup(words)])
        check_same(with_dropout(model, 0.1), model, [tf.ones((2, 2)), tf.constant([["a"], ["c"]])])


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    model = functional()
    keras.config.set_dtype_policy("float32")
    new = check_same(with_dropout(model, 0.1), model, batch())
    assert new.get_layer("twice").dtype_policy.name == policy


def test_lora_of_layers():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4), layers.Dropout(0.0), layers.Dense(2)])
    model.layers[0].enable_lora(2, lora_alpha=6)
    new = check_same(with_dropout(randomized(model), 0.1), model, np.ones((2, 8), "float32"))
    assert (new.layers[0].lora_rank, new.layers[0].lora_alpha) == (2, 6)
    assert [v.name for v in new.layers[0].trainable_variables] == [v.name for v in model.layers[0].trainable_variables]


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
def test_quantized_model():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(4), layers.Dropout(0.0), layers.Dense(2)])
    model.quantize("int8")
    new = check_same(with_dropout(model, 0.1), model, np.ones((2, 8), "float32"))
    assert new.layers[0].quantization_mode == "int8"


class Net(keras.Model):
    def __init__(self, units, drop_rate=0.0, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(units)
        self.dropout = layers.Dropout(drop_rate)

    def call(self, inputs, training=None):
        return self.dropout(self.dense(inputs), training=training)

    def get_config(self):
        return {"name": self.name, "units": self.dense.units, "drop_rate": self.dropout.rate}


def test_subclassed_model_whose_constructor_takes_the_rate():
    model = Net(4)
    x = np.ones((2, 8), "float32")
    model(x)
    new = check_same(with_dropout(randomized(model), 0.1), model, x)
    assert new.dropout.rate == 0.1
    # The same inside of a graph.
    inputs = keras.Input((8,))
    model = randomized(keras.Model(inputs, Net(4, drop_rate=0.3, name="net")(inputs)))
    new = check_same(with_dropout(model, 0.1), model, x)
    assert new.get_layer("net").dropout.rate == 0.1


def test_stochastic_depth_is_set_where_there_is_nothing_else():
    class DropPath(layers.Dropout):
        pass

    def build(*rates):
        return keras.Sequential([keras.Input((8,)), DropPath(0.0, name="path"), *rates])

    assert rates_of(with_dropout(build(), 0.1)) == {"path": 0.1}
    both = with_dropout(build(layers.Dropout(0.0, name="dropout")), 0.1)
    assert rates_of(both) == {"path": 0.0, "dropout": 0.1}


def test_dropout_that_is_on_everywhere_is_kept():
    model = keras.Sequential([keras.Input((8,)), layers.Dropout(0.2, name="a"), layers.Dropout(0.3, name="b")])
    assert rates_of(check_same(with_dropout(model, 0.1), model, np.ones((2, 8)))) == {"a": 0.2, "b": 0.3}


@pytest.mark.slow
def test_applications():
    model = keras.applications.MobileNetV2((32, 32, 3), alpha=0.35, weights=None, include_top=False)
    with pytest.raises(ValueError, match=r"must have a dropout layer.*Insert a `keras.layers.Dropout`.*'mobilenetv2"):
        with_dropout(model, 0.1)
    model = keras.applications.EfficientNetB0(weights=None, input_shape=(32, 32, 3), classes=2)
    new = check_same(with_dropout(model, 0.1), model, np.ones((2, 32, 32, 3), "float32"))
    assert rates_of(new) == rates_of(model) and min(rates_of(new).values()) > 0


def test_trains_with_rdrop():
    model = keras.Sequential([keras.Input((8,)), layers.Dense(16), layers.Dropout(0.0), layers.Dense(3)])
    with pytest.raises(ValueError, match=r"`rdrop_keras.with_dropout\(model, 0.1\)` raises them"):
        RDropModel(model)
    model = RDropModel(with_dropout(model, 0.1))
    model.compile("adam", losses.SparseCategoricalCrossentropy(from_logits=True))
    logs = model.train_on_batch(np.random.normal(size=(8, 8)), np.zeros(8, int), return_dict=True)
    assert logs["consistency_loss"] > 0


@pytest.mark.backends("tensorflow")
@pytest.mark.filterwarnings("ignore")
def test_strategy_of_the_model():
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = keras.Sequential([keras.Input((8,)), layers.Dense(4), layers.Dropout(0.0)])
    new = check_same(with_dropout(model, 0.1), model, np.ones((2, 8), "float32"))
    with strategy.scope():
        RDropModel(new)


# Errors.


@pytest.mark.parametrize("rate, received", [("0.1", r"rate='0.1' \(str\)"), (True, "bool"), (None, "NoneType")])
def test_rate_of_a_wrong_type(rate, received):
    with pytest.raises(TypeError, match=rf"`rate` must be a number > 0 and < 1. Received: .*{received}"):
        with_dropout(keras.Sequential([keras.Input((8,)), layers.Dropout(0.0)]), rate)


@pytest.mark.parametrize("rate", [0, 0.0, 1, -0.1, float("nan")])
def test_impossible_rate(rate):
    with pytest.raises(ValueError, match=r"`rate` must be a number > 0 and < 1. Received: rate="):
        with_dropout(keras.Sequential([keras.Input((8,)), layers.Dropout(0.0)]), rate)


def test_models_that_are_refused():
    with pytest.raises(TypeError, match=r"`model` must be a keras\.Model"):
        with_dropout(layers.Dropout(0.0), 0.1)
    with pytest.raises(ValueError, match="`model` must be built"):
        with_dropout(keras.Sequential([layers.Dropout(0.0)]), 0.1)
    wrapped = RDropModel(keras.Sequential([keras.Input((8,)), layers.Dropout(0.1)]))
    with pytest.raises(ValueError, match=r"is or holds an RDropModel.*its `.model`"):
        with_dropout(wrapped, 0.1)


def test_subclassed_models_that_cannot_be_made_anew():
    class Fixed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dropout = layers.Dropout(0.0)

        def call(self, inputs, training=None):
            return self.dropout(inputs, training=training)

    class Given(keras.Model):
        def __init__(self, layer, dropout=0.0):
            super().__init__()
            self.layer = layer
            self.dropout = layers.Dropout(dropout)

        def call(self, inputs, training=None):
            return self.dropout(self.layer(inputs), training=training)

    class Forgotten(Net):
        def get_config(self):
            return {"drop_rate": 0.0}

    class Changed(Net):
        def get_config(self):
            return {**super().get_config(), "units": self.dense.units + 1}

    for model, message in [
        (Fixed(), "their rate in its constructor"),
        (Given(layers.Dense(4)), "their rate in its constructor"),
        (Forgotten(4), "fails with TypeError.*rate that you want in its constructor"),
        (Changed(4), "same layers with the same weights.*Make it with"),
    ]:
        model(np.ones((2, 8), "float32"))
        with pytest.raises(ValueError, match=message):
            with_dropout(model, 0.1)


def test_rate_that_is_not_used():
    class Unused(keras.Model):
        def __init__(self, dropout=0.0):
            super().__init__()
            self.dense = layers.Dense(4)

        def call(self, inputs):
            return self.dense(inputs)

        def get_config(self):
            return {"dropout": 0.0}

    model = Unused()
    model(np.ones((2, 8), "float32"))
    with pytest.raises(ValueError, match="a place for a dropout rate of which its layers make no use"):
        with_dropout(model, 0.1)


# KerasHub.

TEXT = {"vocabulary_size": 20, "num_layers": 2, "hidden_dim": 8, "intermediate_dim": 16}
HEADS = {"num_heads": 2, "max_sequence_length": 8}
GROUPS = {"num_query_heads": 2, "num_key_value_heads": 1}
IMAGE = {"image_shape": (16, 16, 3), "patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 8}
MIX = {"layerwise_sr_ratios": [2, 1], "layerwise_patch_sizes": [7, 3], "layerwise_strides": [4, 2]}
BACKBONES = {
    "GPT2": {**TEXT, **HEADS, "dropout": 0.0},
    "Gemma": {**TEXT, **GROUPS, "head_dim": 4},
    "Llama": {**TEXT, **GROUPS},
    "Falcon": {**TEXT, "num_attention_heads": 2, "intermediate_dim": 32},
    "DebertaV3": {**TEXT, **HEADS, "dropout": 0.0, "bucket_size": 4},
    "T5": {**TEXT, "num_heads": 2, "dropout": 0.0},
    "Bart": {**TEXT, **HEADS, "dropout": 0.0},
    "ViT": {**IMAGE, "mlp_dim": 16},
    "DINOV2": {**IMAGE, "intermediate_dim": 16, "position_embedding_shape": (16, 16, 3)},
    "MiT": {**MIX, "image_shape": (16, 16, 3), "layerwise_depths": [1, 1], "num_layers": 2, "max_drop_path_rate": 0.0}
    | {"layerwise_num_heads": [1, 2], "hidden_dims": [4, 8]},
}
NAMES = {"Falcon": ("attention_dropout_rate", "feedforward_dropout_rate"), "MiT": ("max_drop_path_rate",)}
NAMES |= {"ViT": ("dropout_rate", "attention_dropout"), "DINOV2": ("dropout_rate",)}


USUAL = ("Bart", "GPT2", "Gemma", "Llama", "ViT")


def backbone(hub, name, **kwargs):
    return getattr(hub.models, f"{name}Backbone")(**BACKBONES[name], **kwargs)


def inputs_of(model):
    def one(tensor):
        shape = [2, *(size or 6 for size in tensor.shape[1:])]
        if "int" in tensor.dtype:
            return np.ones(shape, "int32") if "mask" in tensor.name else np.random.randint(2, 20, shape)
        return np.random.normal(size=shape).astype("float32")

    return keras.tree.map_structure(one, model.input)


@pytest.mark.needs("keras_hub")
@pytest.mark.parametrize("name", [name if name in USUAL else slow(name) for name in sorted(BACKBONES)])
def test_backbones(hub, name):
    model = randomized(backbone(hub, name))
    new = check_same(with_dropout(model, 0.1), model, inputs_of(model))
    assert all(new.get_config()[rate] == 0.1 for rate in NAMES.get(name, ("dropout",)))
    assert all(model.get_config()[rate] == 0 for rate in NAMES.get(name, ("dropout",)))
    # MiT has dropout that is not in its configuration.
    assert len(stochastic_layers(new)) > len(stochastic_layers(model)) and (
        name == "MiT" or not stochastic_layers(model)
    )


@pytest.mark.needs("keras_hub")
def test_rates_above_0_of_a_configuration_are_set_too(hub):
    task = hub.models.ViTImageClassifier(backbone(hub, "ViT", dropout_rate=0.3), 2, dropout=0.5)
    new = with_dropout(task, 0.1)
    assert (new.dropout, new.backbone.dropout_rate, new.backbone.attention_dropout) == (0.1, 0.1, 0.1)
    # Also nested in a model of the user's, whose own dropout stays.
    x = keras.Input((16, 16, 3))
    model = keras.Model(x, layers.Dropout(0.5, name="head")(task(x)))
    new = check_same(with_dropout(model, 0.1), model, np.ones((2, 16, 16, 3), "float32"))
    assert rates_of(new)["head"] == 0.5 and sorted(set(rates_of(new).values())) == [0.1, 0.5]


@pytest.mark.needs("keras_hub")
def test_image_classifier_whose_backbone_has_no_dropout(hub):
    net = hub.models.ResNetBackbone([64], [7], [64, 64], [1, 1], [1, 2], "basic_block", image_shape=(16, 16, 3))
    with pytest.raises(ValueError, match=r"must have a dropout layer.*ResNetBackbone"):
        with_dropout(net, 0.1)
    task = hub.models.ResNetImageClassifier(net, 2)
    new = check_same(with_dropout(task, 0.1), task, np.ones((2, 16, 16, 3), "float32"))
    assert rates_of(new) == {"output_dropout": 0.1}


@pytest.mark.slow
@pytest.mark.needs("keras_hub")
def test_language_model_keeps_preprocessor_and_sampler(hub):
    vocabulary = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate("abcdefghijĠ")}, "ab": 12}
    tokenizer = hub.models.GPT2Tokenizer(vocabulary=vocabulary, merges=["a b"])
    preprocessor = hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=8)
    task = hub.models.GPT2CausalLM(backbone(hub, "GPT2"), preprocessor)
    task.compile(sampler="greedy")
    task.backbone.get_layer("transformer_layer_0").trainable = False
    new = check_same(with_dropout(randomized(task), 0.1), task, inputs_of(task))
    assert new.preprocessor is preprocessor and new.sampler is task.sampler
    assert not new.backbone.get_layer("transformer_layer_0").trainable
    model = RDropModel(new)
    model.compile("adam", losses.SparseCategoricalCrossentropy(from_logits=True), run_eagerly=True)
    assert model.fit(["a b c", "d"], verbose=0).history["consistency_loss"][0] > 0


@pytest.mark.needs("keras_hub")
def test_lora_of_a_backbone(hub, tmp_path):
    model = backbone(hub, "Gemma")
    model.enable_lora(2)
    x = inputs_of(model)
    new = check_same(with_dropout(randomized(model), 0.1), model, x)
    assert len(new.trainable_variables) == len(model.trainable_variables) == 8
    new.save_lora_weights(tmp_path / "new.lora.h5")
    expected = outputs(model, x)
    randomized(model)
    model.load_lora_weights(tmp_path / "new.lora.h5")
    np.testing.assert_allclose(outputs(model, x)[0], expected[0], atol=TOLERANCE)


@pytest.mark.needs("keras_hub")
def test_error_without_dropout_names_the_remedy(hub):
    for name, remedy in {"GPT2": "with_dropout", "Falcon": "with_dropout"}.items():
        with pytest.raises(ValueError, match=f"needs a layer that is random in training.*{remedy}"):
            RDropModel(backbone(hub, name))
    net = keras.Sequential([keras.Input((8,)), layers.Dense(2)])
    with pytest.raises(ValueError, match=r"needs a layer .*insert a `keras.layers.Dropout`.*layers are: none"):
        RDropModel(net)
