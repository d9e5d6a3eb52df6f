"""The divergences against pair-by-pair oracles, by identities, and at the ends of the number range."""

import keras
import numpy as np
import pytest
from keras import ops

import reference
from rdrop_keras import Divergence, RDropModel
from rdrop_keras.divergence_of_output import resolve

ORACLES = {
    ("kl", True): (reference.kl, lambda a: a),
    ("kl", False): (reference.kl_of_probabilities, reference.softmax),
    ("js", True): (reference.js, lambda a: a),
    ("js", False): (reference.js_of_probabilities, reference.softmax),
    ("bernoulli_kl", True): (reference.bernoulli_kl, lambda a: a),
    ("bernoulli_kl", False): (reference.bernoulli_kl_of_probabilities, reference.sigmoid),
    ("mse", None): (reference.mse, lambda a: a),
}
ALL = [pytest.param(*key, id=f"{key[0]}-{'logits' if key[1] else 'outputs'}") for key in ORACLES]


def call(divergence, outputs):
    if keras.backend.backend() == "jax":
        import jax

        return np.asarray(jax.jit(divergence.__call__)(outputs))  # Compiled once, not once for each operation.
    return ops.convert_to_numpy(divergence(ops.convert_to_tensor(outputs)))


def gradient(divergence, outputs):
    """The gradient of the sum of a divergence, by the backend's own differentiation."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        x = tf.constant(outputs)
        with tf.GradientTape() as tape:
            tape.watch(x)
            total = tf.reduce_sum(divergence(x))
        return tape.gradient(total, x).numpy()
    if backend == "jax":
        import jax

        return np.asarray(jax.jit(jax.grad(lambda x: divergence(x).sum()))(outputs))
    import torch

    x = torch.tensor(outputs, requires_grad=True)
    divergence(x).sum().backward()
    return x.grad.numpy()


@pytest.mark.parametrize("num_passes", [2, 3, 5])
@pytest.mark.parametrize("shape", [(4, 6), (3, 5, 7)])
@pytest.mark.parametrize("name, from_logits", ALL)
def test_equals_the_sum_over_pairs(name, from_logits, shape, num_passes):
    oracle, of_logits = ORACLES[name, from_logits]
    outputs = of_logits(np.random.normal(size=(num_passes, *shape), scale=2)).astype("float32")
    divergence = Divergence(name, from_logits)
    expected = reference.mean_over_pairs(oracle, outputs.astype("float64"))
    np.testing.assert_allclose(call(divergence, outputs), expected, rtol=1e-5, atol=1e-7)
    step = 1e-4 if from_logits is False else 1e-6  # Away from the edge of (0, 1).
    slope = reference.gradient(
        lambda x: reference.mean_over_pairs(oracle, x).sum(),
        outputs[:, :1],
        step=step * outputs[:, :1].min() if from_logits is False else step,
    )
    scale = np.abs(slope).max()
    np.testing.assert_allclose(gradient(divergence, outputs[:, :1]), slope, rtol=2e-5, atol=1e-5 * scale)


def test_constants_derived_by_hand():
    # Over (0, 0) and (0, log 3) the distributions are (1/2, 1/2) and (1/4, 3/4):
    # KL(P‖Q) = ½ log 2 + ½ log ⅔ = ½ log 4/3; KL(Q‖P) = ¼ log ½ + ¾ log 3/2; their mean is ⅛ log 3.
    two = np.log([[[1.0, 1.0]], [[1.0, 3.0]]]).astype("float32")
    np.testing.assert_allclose(call(Divergence("kl", True), two), [np.log(3) / 8], rtol=1e-6)
    # As Bernoulli variables with logits 0 and log 3: the same two distributions.
    one = np.log([[[1.0]], [[3.0]]]).astype("float32")
    np.testing.assert_allclose(call(Divergence("bernoulli_kl", True), one), [np.log(3) / 8], rtol=1e-6)
    # Disjoint certainties have a Jensen-Shannon divergence of log 2.
    certain = np.array([[[1.0, 0.0]], [[0.0, 1.0]]], "float32")
    np.testing.assert_allclose(call(Divergence("js", False), certain), [np.log(2)], rtol=1e-6)
    # Squared differences 4 and 0, averaged.
    np.testing.assert_allclose(call(Divergence("mse"), np.array([[[1.0, 5]], [[3.0, 5]]], "float32")), [2.0])


@pytest.mark.parametrize("name, from_logits", ALL)
def test_identities(name, from_logits):
    _, of_logits = ORACLES[name, from_logits]
    outputs = of_logits(np.random.normal(size=(4, 3, 5))).astype("float32")
    divergence = Divergence(name, from_logits)
    value = call(divergence, outputs)
    assert (value > 0).all()
    np.testing.assert_allclose(call(divergence, outputs[[2, 0, 3, 1]]), value, rtol=1e-5)  # Order of passes.
    np.testing.assert_allclose(call(divergence, outputs[:, :2]), value[:2], rtol=1e-6)  # Rows are independent.
    np.testing.assert_allclose(call(divergence, np.stack([outputs[0]] * 3)), np.zeros(3), atol=1e-7)
    order = np.random.permutation(5)
    np.testing.assert_allclose(call(divergence, outputs[..., order]), value, rtol=1e-5)  # Order of classes.
    moved = Divergence(name, from_logits, axis=1)
    np.testing.assert_allclose(call(moved, np.moveaxis(outputs, -1, 2)), value, rtol=1e-6)
    images = of_logits(np.random.normal(size=(2, 3, 5, 4, 2))).astype("float32")
    np.testing.assert_allclose(
        call(Divergence(name, from_logits, axis=1), images),
        call(Divergence(name, from_logits, axis=-1), np.moveaxis(images, 2, -1)),
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", ["kl", "js"])
def test_shifted_logits_are_the_same_distribution(name):
    outputs = np.random.normal(size=(2, 3, 5)).astype("float32")
    shift = np.array([3.0, -7.0], "float32")[:, None, None]
    np.testing.assert_allclose(
        call(Divergence(name, True), outputs + shift), call(Divergence(name, True), outputs), rtol=1e-4
    )


def test_bernoulli_is_the_softmax_over_two_classes():
    a = np.random.normal(size=(3, 4, 1), scale=3).astype("float32")
    np.testing.assert_allclose(
        call(Divergence("bernoulli_kl", True), a),
        call(Divergence("kl", True), np.concatenate([a, np.zeros_like(a)], axis=-1)),
        rtol=1e-5,
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "name, logits, exact",
    [
        # ½ Σ (P−Q)(a−b) with P, Q certain of two different classes: ½(1·40 + (−1)(−40)).
        ("kl", [[[40.0, 0, 0]], [[0, 40.0, 0]]], 40.0),
        ("kl", [[[40.0, -40.0]], [[-40.0, 40.0]]], 80.0),
        ("bernoulli_kl", [[[40.0]], [[-40.0]]], 40.0),
    ],
)
def test_saturated_logits(name, logits, exact, dtype):
    logits = np.array(logits, dtype)
    np.testing.assert_allclose(call(Divergence(name, True), logits), [exact], rtol=1e-6)
    slope = gradient(Divergence(name, True), logits)
    assert np.isfinite(slope).all() and np.abs(slope).max() > 0.4


def test_saturated_alike():
    # Both are certain of the first class. The two others differ by e^−38 − e^−40, which float32 resolves only if they
    # are never added to the 1.
    logits = np.array([[[40.0, 0, 0]], [[38.0, 0, 0]]], "float32")
    np.testing.assert_allclose(call(Divergence("kl", True), logits), [2 * (np.exp(-38) - np.exp(-40))], rtol=1e-5)
    ones = np.array([[[40.0]], [[38.0]]], "float32")
    np.testing.assert_allclose(call(Divergence("bernoulli_kl", True), ones), [np.exp(-38) - np.exp(-40)], rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", ["kl", "js", "bernoulli_kl"])
def test_probabilities_of_exactly_0_and_1(name, dtype):
    certain = np.array([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]], dtype)
    value = call(Divergence(name, False), certain)
    slope = gradient(Divergence(name, False), certain.astype("float32"))
    assert np.isfinite(value).all() and (value > 0.1).all()
    assert np.isfinite(slope).all() and (np.abs(slope).max(axis=(0, 2)) > 0.1).all()


@pytest.mark.parametrize("never", [-1e4, -1e9, -3e38, -np.inf])
@pytest.mark.parametrize("name", ["kl", "js"])
def test_impossible_classes_change_nothing(name, never):
    logits = np.random.normal(size=(2, 3, 5)).astype("float32")
    more = np.concatenate([logits, np.full((2, 3, 4), never, "float32")], axis=-1)
    divergence = Divergence(name, True)
    np.testing.assert_allclose(call(divergence, more), call(divergence, logits), rtol=1e-6)
    slope = gradient(divergence, more)
    np.testing.assert_allclose(slope[..., :5], gradient(divergence, logits), rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(slope[..., 5:], np.zeros((2, 3, 4)))


def test_half_precision_is_computed_in_single():
    outputs = np.random.normal(size=(2, 4, 1000)).astype("float16")
    value = call(Divergence("kl", True), outputs)
    assert value.dtype == "float32"
    expected = reference.mean_over_pairs(reference.kl, outputs.astype("float64"))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_one_output_a_row_without_a_last_axis():
    outputs = np.array([[1.0, 2.0, 3.0], [1.0, 4.0, 0.0]], "float32")
    np.testing.assert_allclose(call(Divergence("mse"), outputs), [0, 4, 9], rtol=1e-6)


LOSSES = keras.losses


class OwnCall(LOSSES.SparseCategoricalCrossentropy):
    def call(self, y_true, y_pred):
        return super().call(y_true, y_pred[..., :2])


@pytest.mark.parametrize(
    "loss, expected",
    [
        ("mse", Divergence("mse", None, -1)),
        ("mean_absolute_error", Divergence("mse", None, -1)),
        (LOSSES.Huber(), Divergence("mse", None, -1)),
        (LOSSES.LogCosh(), Divergence("mse", None, -1)),
        ("sparse_categorical_crossentropy", Divergence("kl", False, -1)),
        (LOSSES.sparse_categorical_crossentropy, Divergence("kl", False, -1)),
        (LOSSES.SparseCategoricalCrossentropy(from_logits=True), Divergence("kl", True, -1)),
        (LOSSES.CategoricalCrossentropy(from_logits=True, axis=1), Divergence("kl", True, 1)),
        (LOSSES.CategoricalFocalCrossentropy(from_logits=True), Divergence("kl", True, -1)),
        (LOSSES.KLDivergence(), Divergence("kl", False, -1)),
        (LOSSES.BinaryCrossentropy(from_logits=True), Divergence("bernoulli_kl", True, -1)),
        (LOSSES.BinaryFocalCrossentropy(), Divergence("bernoulli_kl", False, -1)),
        ("binary_crossentropy", Divergence("bernoulli_kl", False, -1)),
    ],
)
def test_auto_reads_the_loss(loss, expected):
    assert resolve("auto", loss, "out") == expected


@pytest.mark.parametrize("loss", ["hinge", LOSSES.Poisson(), OwnCall(from_logits=True), lambda y, p: ops.mean(p)])
def test_auto_says_when_it_cannot_tell(loss):
    with pytest.raises(ValueError, match=r"cannot read a divergence off the loss of output 'out'.*'js', 'kl', 'mse'"):
        resolve("auto", loss, "out")
    with pytest.raises(ValueError, match=r"the model's output"):
        resolve("auto", loss, None)


def test_a_name_takes_what_the_loss_tells():
    assert resolve("js", LOSSES.CategoricalCrossentropy(from_logits=True, axis=2), None) == Divergence("js", True, 2)
    assert resolve(Divergence("kl", True, 1), "mse", None) == Divergence("kl", True, 1)
    assert resolve("mse", lambda y, p: p, None) == Divergence("mse", None, -1)
    with pytest.raises(ValueError, match=r"MeanSquaredError, does not tell whether that output holds logits"):
        resolve("kl", LOSSES.MeanSquaredError(), "out")


def test_errors():
    with pytest.raises(ValueError, match=r"one of 'bernoulli_kl', 'js', 'kl', 'mse'. Received: name='k'"):
        Divergence("k")
    with pytest.raises(ValueError, match=r"`from_logits` must be True, False or None. Received: from_logits='yes'"):
        Divergence("kl", from_logits="yes")
    with pytest.raises(ValueError, match=r"`axis` must be an integer other than 0.*axis=0"):
        Divergence("kl", axis=0)
    with pytest.raises(ValueError, match=r"logits or probabilities.*Divergence\('kl', from_logits=None"):
        Divergence("kl")(np.ones((2, 3, 4)))
    with pytest.raises(ValueError, match=r"at least two passes. Received: 1\."):
        Divergence("mse")(np.ones((1, 3, 4)))
    with pytest.raises(ValueError, match=r"0 over a single class.*'bernoulli_kl'"):
        Divergence("kl", from_logits=True)(np.ones((2, 3, 1)))
    with pytest.raises(TypeError, match=r"`divergence` must be.*Received: divergence=3"):
        resolve(3, "mse", None)


def test_configuration():
    divergence = Divergence("kl", from_logits=True, axis=2)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(divergence))
    assert again == divergence and hash(again) == hash(divergence) and again != Divergence("kl")
    assert repr(again) == "Divergence('kl', from_logits=True, axis=2)"
    assert keras.saving.get_registered_name(RDropModel) == "rdrop_keras>RDropModel"
