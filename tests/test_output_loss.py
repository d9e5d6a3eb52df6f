"""The divergence has the shape of its loss, so that weights, masks, reduction and α mean the same for both."""

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

import reference
from models import Passes, gradients_of_step, logs_of_step, mlp
from rdrop_keras import Divergence, KLBudget, RDropModel, inconsistency

PROBABILITIES = Divergence("bernoulli_kl", from_logits=False)
REDUCTIONS = ["sum_over_batch_size", "sum", "mean_with_sample_weight"]


def probabilities(*shape):
    return np.random.uniform(0.1, 0.9, size=shape).astype("float32")


def normal(*shape):
    return np.random.normal(size=shape).astype("float32")


class CallOfItsOwn(losses.Loss):
    """A loss that overrides what Keras weights and reduces in."""

    def __call__(self, y_true, y_pred, sample_weight=None):
        rows = ops.mean(ops.square(ops.subtract(y_true, y_pred)), axis=(1, 2))
        return ops.mean(rows if sample_weight is None else rows * ops.cast(sample_weight, rows.dtype))

    def call(self, y_true, y_pred):
        raise AssertionError("not called")


class Squares(losses.Loss):
    """The squared error, averaged over the axes that are given; over all for None."""

    def __init__(self, axes, reduction="sum_over_batch_size"):
        super().__init__(reduction=reduction)
        self.axes = axes

    def call(self, y_true, y_pred):
        squares = ops.square(y_true - y_pred)
        return squares if self.axes == () else ops.mean(squares, axis=self.axes)


# Of each: the outputs of two passes, the loss, D and its oracle, the same in the shape of the loss, the weights.
CASES = {
    # As many rows as pixels in a line: weights of rows would fit the last axis too.
    "dice, one value a row": (
        probabilities(2, 4, 3, 4, 1),
        lambda reduction: losses.Dice(axis=(1, 2, 3), reduction=reduction),
        PROBABILITIES,
        reference.bernoulli_kl_of_probabilities,
        lambda d: d.mean((1, 2)),
        (4,),
    ),
    "tversky, one value a class": (
        probabilities(2, 4, 3, 4, 5),
        lambda reduction: losses.Tversky(axis=(1, 2), reduction=reduction),
        PROBABILITIES,
        reference.bernoulli_kl_of_probabilities,
        lambda d: np.repeat(d.mean((1, 2))[:, None], 5, 1),
        (4, 5),
    ),
    "one value a step": (
        normal(2, 3, 4, 3, 4),
        lambda reduction: Squares((2, 3), reduction),
        "mse",
        reference.mse,
        lambda d: d.mean(2),
        (3, 4),
    ),
    "one value an element": (
        normal(2, 4, 3, 4),
        lambda reduction: Squares((), reduction),
        "mse",
        reference.mse,
        lambda d: np.repeat(d[..., None], 4, -1),
        (4, 3, 4),
    ),
    "one value a batch": (
        normal(2, 4, 3, 2),
        lambda reduction: Squares(None, reduction),
        "mse",
        reference.mse,
        lambda d: np.full(4, d.mean()),  # Keras makes one value a row of it, for their weights.
        (4,),
    ),
    "a call of its own": (
        normal(2, 4, 3, 4),
        lambda reduction: CallOfItsOwn(reduction=reduction),
        "mse",
        reference.mse,
        lambda d: d.mean(1),
        (4,),
    ),
}


def step(passes, y, loss, divergence, alpha, weights=None):
    x = keras.Input((1,))
    model = RDropModel(keras.Model(x, Passes(passes)(x)), alpha, divergence)
    model.compile("sgd", loss)
    return gradients_of_step(model, np.zeros((passes.shape[1], 1), "float32"), y, sample_weight=weights)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", CASES)
def test_the_divergence_is_weighted_as_the_loss_is(name, reduction):
    passes, loss, divergence, oracle, in_shape_of_loss, weights_shape = CASES[name]
    y = np.random.randint(0, 2, size=passes.shape[1:]).astype("float32")
    weights = np.random.uniform(0, 2, size=weights_shape).astype("float32")

    def consistency(w):
        values = in_shape_of_loss(reference.mean_over_pairs(oracle, w))
        return reference.reduce(values, reduction, weights.astype("float64"))

    logs, (slope,) = step(passes, y, loss(reduction), divergence, 1.0, weights)
    of_keras = [ops.convert_to_numpy(loss(reduction)(y, each, weights)) for each in passes]
    assert logs["task_loss"] == pytest.approx(np.mean(of_keras), rel=1e-5)
    assert logs["consistency_loss"] == pytest.approx(consistency(passes.astype("float64")), rel=1e-5)
    assert logs["loss"] == pytest.approx(logs["task_loss"] + logs["consistency_loss"] / 2, rel=1e-5)
    _, (steeper,) = step(passes, y, loss(reduction), divergence, 3.0, weights)  # By (3 − 1)/m of the consistency.
    expected = reference.gradient(consistency, passes)
    np.testing.assert_allclose(steeper - slope, expected, rtol=1e-3, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_alpha_does_not_grow_with_the_elements_of_a_value(name):
    """Without weights, the consistency loss is the mean divergence, times the number of values if the loss is a sum."""
    passes, loss, divergence, oracle, in_shape_of_loss, _ = CASES[name]
    y = np.random.randint(0, 2, size=passes.shape[1:]).astype("float32")
    mean = reference.mean_over_pairs(oracle, passes.astype("float64")).mean()
    logs, _ = step(passes, y, loss("sum_over_batch_size"), divergence, 1.0)
    assert logs["consistency_loss"] == pytest.approx(mean, rel=1e-5)
    if name not in ("one value a batch", "a call of its own"):
        logs, _ = step(passes, y, loss("sum"), divergence, 1.0)
        values = in_shape_of_loss(np.ones(oracle(passes[0], passes[1]).shape)).size
        assert logs["consistency_loss"] == pytest.approx(values * mean, rel=1e-5)


def test_connectionist_temporal_classification():
    passes, y = normal(2, 6, 6, 6), np.random.randint(1, 6, size=(6, 3))
    weights = np.random.uniform(0, 2, size=6).astype("float32")
    logs, _ = step(passes, y, losses.CTC(), Divergence("kl", from_logits=True), 1.0, weights)
    rows = reference.mean_over_pairs(reference.kl, passes.astype("float64")).mean(1)
    assert logs["consistency_loss"] == pytest.approx(reference.reduce(rows, "mean", weights), rel=1e-5)


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "mean_with_sample_weight"])
def test_masked_steps_count_nothing_in_one_value_a_batch(reduction):
    passes, y = normal(2, 3, 4, 5), normal(3, 4, 5)
    mask = np.arange(4) < np.array([4, 2, 1])[:, None]
    x = keras.Input((4, 1))
    model = RDropModel(keras.Model(x, Passes(passes)(layers.Masking()(x))), 1.0, "mse")
    model.compile("sgd", Squares(None, reduction))
    logs = logs_of_step(model, mask[..., None].astype("float32"), y)
    expected = reference.mean_over_pairs(reference.mse, passes.astype("float64"))[mask].mean()
    assert logs["consistency_loss"] == pytest.approx(expected, rel=1e-5)


class Masks(losses.Loss):
    """A loss that says itself which steps count, as Keras's `ignore_class` does."""

    def call(self, y_true, y_pred):
        values = ops.mean(ops.square(y_true - y_pred), axis=-1)
        values._keras_mask = ops.greater(y_true[..., 0], 0)
        return values


@pytest.mark.backends("tensorflow", "torch")  # JAX's tracers cannot carry a mask on values.
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_what_a_loss_masks_itself(reduction):
    passes, y = normal(2, 3, 4, 5), normal(3, 4, 5)
    logs, _ = step(passes, y, Masks(reduction=reduction), "mse", 1.0)
    values = reference.mean_over_pairs(reference.mse, passes.astype("float64"))
    assert logs["consistency_loss"] == pytest.approx(reference.reduce(values, reduction, mask=y[..., 0] > 0), rel=1e-5)


@pytest.mark.backends("tensorflow")
def test_sizes_that_are_known_in_the_step_alone():
    """Rows of unknown number and length; the loss has one value a row, the divergence one a step."""
    import tensorflow as tf

    x = [normal(4, length, 2) for length in (3, 4, 6)]
    weights = [np.random.uniform(size=4).astype("float32") for _ in x]
    signature = [tf.TensorSpec(shape) for shape in ((None, None, 2), (None, None, 2), (None,))]
    data = tf.data.Dataset.from_generator(lambda: zip(x, x, weights), output_signature=tuple(signature))
    inputs = keras.Input((None, 2))
    scale = layers.Dense(2, kernel_initializer="identity")
    model = RDropModel(keras.Model(inputs, Doubled()(scale(inputs))), 1.0, "mse")
    model.compile(keras.optimizers.SGD(0.0), Squares((1, 2)))
    history = model.fit(data, verbose=0).history
    # The passes are x and 2x.
    expected = np.mean([(w * (each**2).mean((1, 2))).mean() for each, w in zip(x, weights)])
    assert history["consistency_loss"][0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize(
    "name, loss", [("js", "kl_divergence"), ("bernoulli_kl", "binary_crossentropy"), ("mse", "mse")]
)
def test_an_axis_of_classes_of_unknown_size(name, loss):
    """Such as logits over the words of a padded text; those of cross-entropy are read in `crossentropy.py`."""
    import tensorflow as tf

    x = [probabilities(4, length) for length in (3, 4, 6)]
    signature = (tf.TensorSpec((None, None)), tf.TensorSpec((None, None)))
    data = tf.data.Dataset.from_generator(lambda: zip(x, x), output_signature=signature)
    inputs = keras.Input((None,))
    half = layers.Dense(1, use_bias=False, kernel_initializer=keras.initializers.Constant(0.5))
    outputs = Doubled()(half(inputs[..., None])[..., 0])
    model = RDropModel(keras.Model(inputs, outputs), 1.0, Divergence(name, from_logits=False))
    model.compile(keras.optimizers.SGD(0.0), loss)
    oracle = getattr(reference, {"mse": "mse"}.get(name, f"{name}_of_probabilities"))
    passes = [np.stack([each / 2, each]).astype("float64") for each in x]
    expected = np.mean([reference.mean_over_pairs(oracle, each).mean() for each in passes])
    assert model.fit(data, verbose=0).history["consistency_loss"][0] == pytest.approx(expected, rel=1e-5)


class Doubled(layers.Layer):
    """In training doubles the rows of the second of two passes."""

    rdrop_stochastic = True

    def call(self, inputs, training=None):
        if not training:
            return inputs
        first, second = ops.split(inputs, 2)
        return ops.concatenate([first, 2 * second])


def test_weights_are_given_away_as_copies():
    """On PyTorch Keras multiplies weights by masks in place: in what it is given, a NumPy array's memory included."""
    passes, y = normal(2, 3, 4, 5), np.random.randint(0, 5, size=(3, 4))
    mask = np.arange(4) < np.array([4, 2, 1])[:, None]
    weights = np.random.uniform(0.5, 2, size=(3, 4)).astype("float32")
    given = weights.copy()
    x = keras.Input((4, 1))
    for loss, divergence, values in (
        (losses.SparseCategoricalCrossentropy(from_logits=True), "auto", reference.kl),
        (losses.SparseCategoricalCrossentropy(from_logits=True), "js", reference.js),
        (losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum"), "js", reference.js),
    ):
        model = RDropModel(keras.Model(x, Passes(passes)(layers.Masking()(x))), 1.0, divergence)
        model.compile("sgd", loss)
        data = mask[..., None].astype("float32"), y, ops.convert_to_tensor(weights)
        logs, _ = gradients_of_step(model, *data)
        expected = reference.reduce(
            reference.mean_over_pairs(values, passes.astype("float64")), loss.reduction, weights, mask
        )
        assert logs["consistency_loss"] == pytest.approx(expected, rel=1e-5)
        task = [reference.sparse_cross_entropy(y, each) for each in passes.astype("float64")]
        expected = np.mean([reference.reduce(each, loss.reduction, weights, mask) for each in task])
        assert logs["task_loss"] == pytest.approx(expected, rel=1e-5)
        np.testing.assert_array_equal(weights, given)


def test_inconsistency_under_a_mask_and_weights():
    """It reads the same weights many times."""
    x = np.random.randint(1, 9, size=(8, 6))
    x[::2, 4:] = 0
    y, weights = np.random.randint(0, 3, size=(8, 6)), np.random.uniform(size=(8, 6)).astype("float32")
    model = keras.Sequential(
        [keras.Input((6,)), layers.Embedding(9, 8, mask_zero=True), layers.Dropout(1e-7), layers.Dense(3)]
    )
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
    result = inconsistency(model, x, y, weights, num_passes=3)
    loss = model.evaluate(x, y, sample_weight=weights, verbose=0)
    np.testing.assert_allclose([result.full_model_loss, result.submodel_loss.value], [loss, loss], rtol=1e-5)


@pytest.mark.backends("tensorflow")
def test_without_a_reduction_rows_are_trained_as_keras_trains_them():
    """By the gradient of their sum, and the mean is logged. On JAX and PyTorch plain Keras trains no such loss."""
    passes, y = normal(2, 4, 5), np.random.randint(0, 5, size=4)
    weights = np.random.uniform(0.5, 2, size=4).astype("float32")
    for given in (None, weights):
        none, slopes = step(
            passes, y, losses.SparseCategoricalCrossentropy(True, reduction="none"), "auto", 2.0, weights=given
        )
        summed, expected = step(
            passes, y, losses.SparseCategoricalCrossentropy(True, reduction="sum"), "auto", 2.0, weights=given
        )
        assert {name: 4 * value for name, value in none.items()} == pytest.approx(summed, rel=1e-5)
        np.testing.assert_allclose(slopes[0], expected[0], rtol=1e-4, atol=1e-6)


def test_without_a_reduction_one_value_a_batch_is_a_loss():
    """On all backends: nothing is left to reduce."""
    passes, y = normal(2, 4, 5), normal(4, 5)
    logs, _ = step(passes, y, Squares(None, "none"), "mse", 2.0)
    expected = reference.mean_over_pairs(reference.mse, passes.astype("float64")).mean()
    assert logs["consistency_loss"] == pytest.approx(expected, rel=1e-5)
    assert logs["loss"] == pytest.approx(logs["task_loss"] + logs["consistency_loss"], rel=1e-5)


@pytest.fixture
def floatx(request):
    before = keras.config.floatx()
    keras.config.set_floatx(request.param)
    yield request.param
    keras.config.set_floatx(before)


PRECISION = {"float64": 1e-5, "float32": 1e-5, "float16": 1e-2, "bfloat16": 5e-2}


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")  # JAX has no float64 unless it is told to.
@pytest.mark.parametrize("floatx", PRECISION, indirect=True)
@pytest.mark.parametrize("alpha", [1.0, KLBudget(0.1)], ids=["fixed", "budget"])
@pytest.mark.parametrize("loss", ["sparse_categorical_crossentropy", "mse"])
def test_every_floatx(floatx, alpha, loss):
    y = np.random.randint(0, 3, size=8) if "sparse" in loss else np.eye(3, dtype="float32")[[0, 1, 2, 0, 1, 2, 0, 1]]
    model = RDropModel(mlp(activation="softmax" if "sparse" in loss else None), alpha)
    model.compile("sgd", loss)
    history = model.fit(normal(8, 4), y, verbose=0).history
    logs = {name: float(values[0]) for name, values in history.items()}
    weight = 1.0 / 2  # α/m of the first step.
    assert logs["loss"] == pytest.approx(logs["task_loss"] + weight * logs["consistency_loss"], rel=PRECISION[floatx])
    assert logs["consistency_loss"] > 0


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("divergence", ["auto", "js"])
def test_every_dtype_of_a_loss(dtype, divergence):
    """The divergence is computed in float32 or wider, whatever the loss is computed in."""
    passes, y = normal(2, 4, 5), np.random.randint(0, 5, size=4)
    loss = losses.SparseCategoricalCrossentropy(from_logits=True, dtype=dtype)
    logs, _ = step(passes, y, loss, divergence, 2.0)
    oracle = reference.js if divergence == "js" else reference.kl
    expected = reference.mean_over_pairs(oracle, passes.astype("float64")).mean()
    assert logs["consistency_loss"] == pytest.approx(expected, rel=1e-5)
    task = np.mean([reference.sparse_cross_entropy(y, each).mean() for each in passes.astype("float64")])
    assert logs["task_loss"] == pytest.approx(task, rel=PRECISION[dtype])


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype")
def test_outputs_whose_losses_have_different_dtypes():
    x = keras.Input((1,))
    a, b = normal(2, 4, 5), normal(2, 4, 5)
    model = RDropModel(keras.Model(x, [Passes(a, name="a")(x), Passes(b, name="b")(x)]), 1.0)
    model.compile("sgd", [losses.MeanSquaredError(dtype="float16"), losses.MeanSquaredError(dtype="float64")])
    logs = logs_of_step(model, np.zeros((4, 1), "float32"), [normal(4, 5), normal(4, 5)])
    expected = sum(reference.mean_over_pairs(reference.mse, each.astype("float64")).mean() for each in (a, b))
    assert logs["consistency_loss"] == pytest.approx(expected, rel=1e-5)
