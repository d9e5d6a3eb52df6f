"""What a TPU needs of a step, read off the compiled program: static shapes, and nothing left to the host."""

import re

import keras
import numpy as np
import pytest
from keras import layers, losses

from marks import slow
from models import mlp
from rdrop_keras import KLBudget, RDropModel

BACKEND = keras.backend.backend()
pytestmark = pytest.mark.backends("tensorflow", "jax")

# The calls that XLA runs by itself on every platform. Any other is a kernel of one platform or of the host.
XLA_CALLS = {"Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape"}
HOST = ("infeed", "outfeed", "send(", "recv(", "callback", "py_func", "PyFunc")
DYNAMIC = ("<=", "set-dimension-size", "get-dimension-size", "dynamic-reshape", "PadToStatic", "SliceToDynamic")


def program(model, *data):
    """The step of `model` on `data` as XLA receives it."""
    model.train_on_batch(*data)
    data = (*data, None)
    if BACKEND == "jax":
        import jax

        state = model._get_jax_state(
            trainable_variables=True, non_trainable_variables=True, optimizer_variables=True, metrics_variables=True
        )
        return jax.jit(model.train_step).lower(state, data).compiler_ir("hlo").as_hlo_text()
    import tensorflow as tf

    step = tf.function(model.train_step, jit_compile=True)
    data = keras.tree.map_structure(lambda x: None if x is None else tf.convert_to_tensor(x), data)
    logs = step(data)
    assert all(np.isfinite(value) for value in logs.values())
    return step.experimental_get_compiler_ir(data)(stage="hlo")


def assert_for_tpu(text):
    assert "ENTRY" in text
    for word in (*HOST, *DYNAMIC):
        assert word not in text, word
    assert set(re.findall(r'custom_call_target="([^"]*)"', text)) <= XLA_CALLS


def bert():
    import keras_hub as hub

    backbone = hub.models.BertBackbone(50, 2, 2, 8, 16, dropout=0.1, max_sequence_length=12)
    return hub.models.BertTextClassifier(backbone, 3, preprocessor=None, dropout=0.1)


def convolutions():
    x = keras.Input((8, 8, 3))
    h = layers.Dropout(0.2)(layers.BatchNormalization()(layers.Conv2D(4, 3, activation="relu")(x)))
    return keras.Model(x, layers.Dense(3)(layers.GlobalAveragePooling2D()(h)))


def tokens():
    x = keras.Input((12,), dtype="int32")
    h = layers.Dropout(0.2)(layers.Embedding(50, 8, mask_zero=True)(x))
    return keras.Model(x, layers.Dense(50)(h))


TOKENS = np.arange(96).reshape(8, 12).astype("int32") % 50
LABELS = np.arange(8).astype("int32") % 3
FEATURES = {"token_ids": TOKENS, "segment_ids": 0 * TOKENS, "padding_mask": np.minimum(TOKENS, 1)}
CASES = {
    "dense": (mlp, np.ones((8, 4), "float32"), LABELS),
    "convolutions": (convolutions, np.ones((8, 8, 8, 3), "float32"), LABELS),
    "masked tokens": (tokens, TOKENS, TOKENS),
    "bert": (bert, FEATURES, LABELS),
}
OPTIONS = {
    "plain steps too": {"every": 3},
    "passes": {"num_passes": 3},
    "rates": {"dropout_rates": (0.1, 0.3)},
    "inputs": {"share": "nothing"},
    "js": {"divergence": "js"},
    "schedule": {"alpha": keras.optimizers.schedules.PolynomialDecay(0.0, 6, 5.0)},
    "budget": {"alpha": KLBudget(0.01)},
}


def compiled(model, optimizer="adam", **options):
    model = RDropModel(model, **options)
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    # On TensorFlow `program` compiles the step, once.
    model.compile(optimizer, loss, metrics=["accuracy"], jit_compile=BACKEND == "jax")
    return model


@pytest.mark.parametrize(
    "case",
    [
        slow("dense"),
        slow("convolutions"),
        "masked tokens",
        pytest.param("bert", marks=[pytest.mark.slow, pytest.mark.needs("keras_hub")]),
    ],
)
def test_models(case):
    model, x, y = CASES[case]
    assert_for_tpu(program(compiled(model()), x, y))


@pytest.mark.parametrize(
    "options",
    [
        "budget",
        *map(slow, ("plain steps too", "rates", "passes", "inputs", "js", "schedule")),
    ],
)
def test_options(options):
    _, x, y = CASES["dense"]
    assert_for_tpu(program(compiled(mlp(), **OPTIONS[options]), x, y))


@pytest.mark.slow
def test_bfloat16():
    keras.config.set_dtype_policy("mixed_bfloat16")
    _, x, y = CASES["masked tokens"]
    text = program(compiled(tokens()), x, y)
    assert_for_tpu(text)
    assert "bf16[16,12,50]" in text  # The logits of both passes.


@pytest.mark.backends("tensorflow")
def test_the_check_sees_what_a_tpu_cannot_do():
    import tensorflow as tf

    def ir(function, *args):
        function = tf.function(function, jit_compile=True)
        return function.experimental_get_compiler_ir(*args)(stage="hlo")

    with pytest.raises(AssertionError):
        assert_for_tpu(ir(lambda x: tf.boolean_mask(x, x > 0) + 1, tf.ones(8)))
    with pytest.raises((tf.errors.OpError, ValueError)):
        ir(lambda x: tf.numpy_function(np.sort, [x], tf.float32), tf.ones(8))
