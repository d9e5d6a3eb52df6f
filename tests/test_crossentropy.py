"""Cross-entropy and divergence from one reading of the logits, against the objective in float64."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

import reference
from marks import slow
from models import Passes, gradients_of_step, to_numpy
from rdrop_keras import Divergence, RDropModel, blocks, crossentropy

SMOOTHING = 0.1
LENGTHS = np.array([4, 2, 3])


def smoothed(y, logits):
    classes = logits.shape[-1]
    return reference.cross_entropy(y * (1 - SMOOTHING) + SMOOTHING / classes, logits)


def step_and_oracle(kind, m, reduction, weighted, masked, ignored, scale=1.5):
    """`(logs, gradient)` of a step of a model whose passes are given, and the same of the objective in float64."""
    passes = np.random.normal(size=(m, 3, 4, 5), scale=scale).astype("float32")
    mask = np.arange(4) < LENGTHS[:, None] if masked else np.ones((3, 4), bool)
    if kind == "sparse":
        y = np.random.randint(0, 5, size=(3, 4))
        if ignored:
            y[0, 1] = y[2, 0] = -1
        loss, value = losses.SparseCategoricalCrossentropy, reference.sparse_cross_entropy
        loss = loss(from_logits=True, ignore_class=-1 if ignored else None, reduction=reduction)
        counted, y_oracle = mask & (y != -1), np.maximum(y, 0)
    else:
        y = np.random.dirichlet(np.ones(5), size=(3, 4)).astype("float32")
        loss = losses.CategoricalCrossentropy(from_logits=True, label_smoothing=SMOOTHING, reduction=reduction)
        value, counted, y_oracle = smoothed, mask, y.astype("float64")
    x = keras.Input((4, 1))
    model = RDropModel(keras.Model(x, Passes(passes)(layers.Masking()(x) if masked else x)), 0.7, num_passes=m)
    model.compile("sgd", loss, jit_compile=False, run_eagerly=keras.backend.backend() != "torch")
    assert crossentropy.reads_together(loss, Divergence("kl", True), np.zeros((3, 4, 5)))
    weights = np.random.uniform(0.5, 2, size=(3, 4)).astype("float32") if weighted else None
    logs, (slope,) = gradients_of_step(model, mask[..., None].astype("float32"), y, sample_weight=weights)

    def objective(w):
        return reference.objective(w, y_oracle, value, reference.kl, 0.7, reduction, weights, counted)

    total, task, consistency = objective(passes.astype("float64"))
    expected = {"loss": total, "task_loss": task, "consistency_loss": consistency}
    return logs, slope, expected, reference.gradient(lambda w: objective(w)[0], passes)


# Weights and masks are Keras's to reduce, and reductions are tested in `test_objective.py`: here each combination once.
@pytest.mark.parametrize("in_blocks", [False, True] if keras.backend.backend() != "jax" else [False])
@pytest.mark.parametrize("m", [slow(2), 3])
@pytest.mark.parametrize("kind", ["sparse", "categorical"])
def test_every_combination(kind, m, in_blocks, monkeypatch):
    if in_blocks:  # Of two of the four columns of a row.
        monkeypatch.setattr(blocks, "FEWEST_ELEMENTS", 10)
        monkeypatch.setattr(blocks, "ELEMENTS", 19)
    reductions = itertools.cycle(["sum_over_batch_size", "sum", "mean_with_sample_weight"])
    choices = itertools.product(
        [None, "rows", "elements"], [False, True], [False, True] if kind == "sparse" else [False]
    )
    for weights, masked, ignored in choices:
        logs, slope, expected, gradient = step_and_oracle(kind, m, next(reductions), weights, masked, ignored)
        assert logs == pytest.approx(expected, rel=1e-5)
        np.testing.assert_allclose(slope, gradient, rtol=1e-5, atol=1e-5 * np.abs(gradient).max())


def both(loss, y, passes):
    joined = ops.convert_to_tensor(np.concatenate(passes))
    values = crossentropy.crossentropy_and_kl(loss, ops.convert_to_tensor(y), joined, len(passes))
    return [ops.convert_to_numpy(value) for value in values]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_types_and_large_logits(dtype):
    """Logits are read in float32, and may be so large that probabilities round to 0 and 1."""
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    passes = [np.array([[4e4, 0, -4e4], [1.0, 2.0, 4.0]]), np.array([[-4e4, 4e4, 0], [1.0, 2.0, 4.0]])]
    y = np.array([0, 2])
    rounded = [to_numpy(keras.Variable(p, dtype=dtype)).astype("float64") for p in passes]
    expected = [
        sum(reference.sparse_cross_entropy(y, p) for p in rounded) / 2,
        reference.mean_over_pairs(reference.kl, rounded),
    ]
    joined = ops.cast(ops.convert_to_tensor(np.concatenate(passes).astype("float32")), dtype)
    values = crossentropy.crossentropy_and_kl(loss, ops.convert_to_tensor(y), joined, 2)
    for value, of_oracle in zip(values, expected):
        assert keras.backend.standardize_dtype(value.dtype) == "float32"
        np.testing.assert_allclose(ops.convert_to_numpy(value), of_oracle, rtol=1e-5, atol=1e-6)


def test_a_class_that_cannot_be():
    """A logit of −inf in all passes, as of words that are masked out, counts 0."""
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    passes = np.random.normal(size=(2, 4, 6)).astype("float32")
    passes[..., 5] = -np.inf
    y = np.arange(4)
    for value, of_finite in zip(both(loss, y, passes), both(loss, y, passes[..., :5])):
        np.testing.assert_allclose(value, of_finite, rtol=1e-6)


def test_targets_with_an_axis_of_their_own():
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    passes, y = np.random.normal(size=(2, 4, 6)).astype("float32"), np.arange(4)
    for value, expected in zip(both(loss, y[:, None], passes), both(loss, y, passes)):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize("in_blocks", [False, True] if keras.backend.backend() != "jax" else [False])
@pytest.mark.parametrize("m", [2, 3])
def test_kl_alone(m, in_blocks, monkeypatch):
    """For losses of one's own: within the model's step, with its gradient, and not through `Divergence`."""
    if in_blocks:
        monkeypatch.setattr(blocks, "FEWEST_ELEMENTS", 10)
        monkeypatch.setattr(blocks, "ELEMENTS", 19)
    monkeypatch.setattr(Divergence, "__call__", None)
    passes = np.random.normal(size=(m, 3, 4, 5)).astype("float32")
    x = keras.Input((4, 1))
    model = RDropModel(keras.Model(x, Passes(passes)(x)), 0.7, num_passes=m, divergence=Divergence("kl", True))
    model.compile("sgd", lambda y, z: 0.0 * z[..., 0], jit_compile=False)
    logs, (slope,) = gradients_of_step(model, np.ones((3, 4, 1), "float32"), np.zeros((3, 4)))

    def divergence(w):
        return np.mean(reference.mean_over_pairs(reference.kl, w))

    assert logs["consistency_loss"] == pytest.approx(divergence(passes.astype("float64")), rel=1e-5)
    expected = reference.gradient(lambda w: 0.7 / m * divergence(w), passes)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_kl_alone_keeps_digits():
    """With passes that hardly differ, beside a large offset, and with a class that cannot be."""
    first = np.random.normal(size=(8, 50), scale=2.0)
    passes = np.stack([first, first + 1e-2 * np.random.normal(size=first.shape)])
    for offset, impossible in itertools.product([0.0, 1e4], [False, True]):
        logits = (passes + offset).astype("float32")
        expected = reference.mean_over_pairs(reference.kl, logits.astype("float64"))
        if impossible:
            logits = np.concatenate([logits, np.full((2, 8, 1), -np.inf, "float32")], axis=-1)
        values = crossentropy.kl_alone(ops.convert_to_tensor(np.concatenate(logits)), 2)
        np.testing.assert_allclose(ops.convert_to_numpy(values), expected, rtol=1e-3)


@pytest.mark.backends("torch")
def test_blocks_on_other_devices():
    """They take little memory beside the logits of a language model, and all rows where there are few classes."""
    import torch

    rows = blocks.rows_in_block(torch.empty(2 * 16, 128, 50257, device="meta"), 2)
    assert 0.9 * blocks.ELEMENTS_ON_OTHER_DEVICES < rows * 50257 <= blocks.ELEMENTS_ON_OTHER_DEVICES
    assert blocks.rows_in_block(torch.empty(2 * 16, 10, device="meta"), 2) == 16


@pytest.mark.backends("torch")
def test_kl_alone_is_differentiated_twice_over():
    """The gradient that is computed with the values is scaled in place, and once only."""
    import torch

    logits = torch.randn(4, 3, 5, device="cpu", requires_grad=True)
    divergence = crossentropy.kl_alone(logits, 2).sum()
    first, second = (torch.autograd.grad(divergence, logits, retain_graph=True)[0] for _ in range(2))
    assert first.abs().max() > 0.01
    torch.testing.assert_close(second, first)


class Own(losses.SparseCategoricalCrossentropy):
    """A subclass may compute another loss."""


@pytest.mark.parametrize(
    "loss, divergence",
    [
        (Own(from_logits=True), Divergence("kl", True)),
        (losses.SparseCategoricalCrossentropy(), Divergence("kl", False)),
        (losses.SparseCategoricalCrossentropy(from_logits=True), Divergence("js", True)),
        (losses.SparseCategoricalCrossentropy(from_logits=True), Divergence("kl", False)),
        (losses.CategoricalCrossentropy(from_logits=True, axis=1), Divergence("kl", True, 1)),
        (losses.CategoricalFocalCrossentropy(from_logits=True), Divergence("kl", True)),
        (losses.BinaryCrossentropy(from_logits=True), Divergence("bernoulli_kl", True)),
    ],
)
def test_others_are_read_apart(loss, divergence):
    assert not crossentropy.reads_together(loss, divergence, np.zeros((3, 4, 5)))


def test_passes_that_hardly_differ():
    """The divergence is of second order in the difference of the logits, and keeps its digits."""
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    first = np.random.normal(size=(8, 50), scale=2.0)
    passes = np.stack([first, first + 1e-3 * np.random.normal(size=first.shape)]).astype("float32")
    _, divergence = both(loss, np.zeros(8, int), passes)
    expected = reference.mean_over_pairs(reference.kl, passes.astype("float64"))
    np.testing.assert_allclose(divergence, expected, rtol=2e-3)


def test_a_large_offset_between_nearly_equal_passes():
    """Both values and their gradient, with logits of 1e4 that differ by little: digits are lost in no difference."""
    loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    first = np.random.normal(size=(4, 20), scale=2.0)
    passes = (1e4 + np.stack([first, first + 0.1 * np.random.normal(size=first.shape)])).astype("float32")
    y = np.arange(4)
    crossentropy_, divergence = both(loss, y, passes)
    exact = passes.astype("float64")
    np.testing.assert_allclose(
        crossentropy_, reference.sparse_cross_entropy(np.stack([y, y]), exact).mean(0), rtol=1e-5
    )
    np.testing.assert_allclose(divergence, reference.mean_over_pairs(reference.kl, exact), rtol=1e-5)


@pytest.mark.backends("tensorflow")  # Elsewhere all sizes are known.
@pytest.mark.parametrize("kind", ["sparse", "categorical"])
def test_an_unknown_number_of_classes(kind):
    import tensorflow as tf

    logits, y = np.random.normal(size=(6, 5)).astype("float32"), np.array([0, 4, 2])
    if kind == "sparse":
        loss = losses.SparseCategoricalCrossentropy(from_logits=True)
    else:
        loss, y = losses.CategoricalCrossentropy(from_logits=True, label_smoothing=SMOOTHING), np.eye(5)[y]

    @tf.function(input_signature=[tf.TensorSpec((None, None))])
    def values_and_gradient(logits):
        with tf.GradientTape() as tape:
            tape.watch(logits)
            values = crossentropy.crossentropy_and_kl(loss, tf.constant(y), logits, 2)
            total = tf.reduce_sum(values)
        return values, tape.gradient(total, logits)

    def total(passes):
        value = reference.sparse_cross_entropy if kind == "sparse" else smoothed
        return sum(value(y, p) for p in passes).sum() / 2 + reference.mean_over_pairs(reference.kl, passes).sum()

    values, gradient = values_and_gradient(logits)
    passes = logits.reshape(2, 3, 5)
    np.testing.assert_allclose(np.sum(values), total(passes.astype("float64")), rtol=1e-5)
    np.testing.assert_allclose(gradient, reference.gradient(total, passes).reshape(6, 5), rtol=1e-4, atol=1e-6)


def counted_by_xla(function, *shapes):
    """XLA's own count of bytes read and written for the function and its gradients, and of those alive at once."""
    import jax

    arguments = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
    program = jax.jit(jax.value_and_grad(function, range(len(shapes)))).lower(*arguments).compile()
    return program.cost_analysis()["bytes accessed"], program.memory_analysis().temp_size_in_bytes


@pytest.mark.backends("jax")  # There XLA tells its count.
@pytest.mark.parametrize(
    "kind, m, on_processor", [("sparse", 2, True), ("sparse", 2, False), ("sparse", 3, False), ("dense", 2, False)]
)
@pytest.mark.parametrize("dtype, most", [("float32", 14), ("bfloat16", 12)])
def test_bytes_read_and_written(dtype, most, kind, m, on_processor, monkeypatch):
    """For loss and gradient, in float32 tensors as large as the logits."""
    monkeypatch.setattr(blocks, "on_processor", lambda tensor: on_processor)
    y = np.random.randint(0, 2000, size=(8, 16))
    loss, y = {
        "sparse": (losses.SparseCategoricalCrossentropy(from_logits=True), y),
        "dense": (losses.CategoricalCrossentropy(from_logits=True), np.eye(2000, dtype="float32")[y]),
    }[kind]

    def objective(logits):
        values = crossentropy.crossentropy_and_kl(loss, ops.convert_to_tensor(y), logits, m)
        return ops.mean(values[0]) + 0.5 * ops.mean(values[1])

    accessed, alive = counted_by_xla(objective, ((m * 8, 16, 2000), dtype))
    size = 4 * m * 8 * 16 * 2000
    assert accessed < most * size
    assert alive < 1.1 * size


@pytest.mark.backends("jax")
def test_gradient_of_a_loss_of_ones_own_is_written_once():
    """The products that come next read it, and do not compute it again."""

    def objective(x, w):
        logits = crossentropy.with_gradient_written_once(x @ w)
        task = sum(ops.mean(ops.log_softmax(each)[..., 0]) for each in ops.split(logits, 2))
        return task + ops.mean(crossentropy.kl_alone(logits, 2))

    accessed, alive = counted_by_xla(objective, ((16, 16, 32), "float32"), ((32, 2000), "float32"))
    size = 4 * 2 * 8 * 16 * 2000
    assert accessed < 28 * size  # 31 and 5.5 if they compute it.
    assert alive < 5 * size


def test_logits_whose_memory_is_transposed():
    """The last layer of many sequence models transposes, as `TimeDistributed` does. PyTorch then moves no memory."""
    x, y = np.random.RandomState(0).normal(size=(8, 3, 5)).astype("float32"), np.arange(40).reshape(8, 5) % 3

    def weights(*last):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3, 5)), layers.Dropout(0.3, seed=1), layers.Dense(5), *last])
        model = RDropModel(model, alpha=2.0)
        model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(x, y, batch_size=8, verbose=0)
        return model.get_weights()

    copied = layers.Lambda(lambda z: ops.concatenate([z, z], axis=-1)[..., :3] * 1.0)
    for transposed, expected in zip(weights(layers.Permute((2, 1))), weights(layers.Permute((2, 1)), copied)):
        np.testing.assert_allclose(transposed, expected, rtol=1e-5, atol=1e-6)
