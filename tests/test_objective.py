"""RDropModel's training step against the objective written out in float64: values, and gradients of every output."""

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

import reference
from models import Passes, gradients_of_step, mlp, to_numpy
from rdrop_keras import Divergence, RDropModel

REDUCTIONS = ["sum_over_batch_size", "sum", "mean", "mean_with_sample_weight"]


def model_of(passes, activation=None):
    """A model with input `(N, 1)` whose outputs in training are `passes`."""
    x = keras.Input((1,))
    return keras.Model(x, Passes(passes, activation)(x))


def check(passes, y, compiled, loss, oracle, alpha=0.7, activation=None, oracle_of=None, **kwargs):
    """Compares a step on `passes` with the oracle. `oracle_of` maps the weights of `Passes` to its outputs."""
    oracle_of = oracle_of or (lambda w: w)
    passes = np.asarray(passes, "float32")
    m, rows = passes.shape[:2]
    axis = kwargs.pop("axis", -1)
    model = RDropModel(model_of(passes, activation), alpha, divergence=kwargs.pop("chosen", "auto"), num_passes=m)
    model.compile("sgd", compiled)
    weights = kwargs.get("weights")
    logs, (slope,) = gradients_of_step(model, np.zeros((rows, 1), "float32"), y, sample_weight=weights)
    oracle_weights = None if weights is None else weights.astype("float64")

    def objective(w):
        return reference.objective(
            oracle_of(w),
            y,
            loss,
            divergence=getattr(reference, oracle),
            alpha=alpha,
            axis=axis,
            reduction=kwargs.get("reduction", "sum_over_batch_size"),
            weights=oracle_weights,
            mask=kwargs.get("mask"),
        )

    total, task, consistency = objective(passes.astype("float64"))
    assert logs["loss"] == pytest.approx(total, rel=1e-5)
    assert logs["task_loss"] == pytest.approx(task, rel=1e-5)
    assert logs["consistency_loss"] == pytest.approx(consistency, rel=1e-5)
    expected = reference.gradient(lambda w: objective(w)[0], passes)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def normal(*shape, scale=1.5):
    return np.random.normal(size=shape, scale=scale).astype("float32")


def labels(*shape, classes=5):
    return np.random.randint(0, classes, size=shape)


@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_softmax_logits(m, reduction):
    check(
        normal(m, 3, 5),
        labels(3),
        losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction),
        reference.sparse_cross_entropy,
        oracle="kl",
        reduction=reduction,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("m", [2, 3])
def test_softmax_logits_weighted_by_row(m, reduction):
    check(
        normal(m, 4, 5),
        labels(4),
        losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction),
        reference.sparse_cross_entropy,
        oracle="kl",
        reduction=reduction,
        weights=np.array([1.0, 0.0, 2.5, 0.25], "float32"),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sequences_weighted_by_token(reduction):
    check(
        normal(2, 3, 4, 5),
        labels(3, 4),
        losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction),
        reference.sparse_cross_entropy,
        oracle="kl",
        reduction=reduction,
        weights=np.random.uniform(0, 2, size=(3, 4)).astype("float32"),
    )


def test_softmax_probabilities():
    check(
        normal(3, 3, 5),
        labels(3),
        "sparse_categorical_crossentropy",
        reference.sparse_cross_entropy_of_probabilities,
        oracle="kl_of_probabilities",
        activation="softmax",
        oracle_of=reference.softmax,
    )


def test_probabilities_given_as_such():
    check(
        reference.softmax(normal(2, 3, 5)),
        labels(3),
        "sparse_categorical_crossentropy",
        lambda y, p: reference.sparse_cross_entropy_of_probabilities(y, p / p.sum(-1, keepdims=True)),
        oracle="kl_of_probabilities",
    )


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("shape", [(3, 1), (3, 4), (2, 3, 2)])
def test_sigmoid_logits(m, shape):
    check(
        normal(m, *shape),
        np.random.randint(0, 2, size=shape),
        losses.BinaryCrossentropy(from_logits=True),
        reference.binary_cross_entropy,
        oracle="bernoulli_kl",
    )


def test_sigmoid_probabilities():
    check(
        normal(2, 3, 4),
        np.random.randint(0, 2, size=(3, 4)),
        "binary_crossentropy",
        reference.binary_cross_entropy_of_probabilities,
        oracle="bernoulli_kl_of_probabilities",
        activation="sigmoid",
        oracle_of=reference.sigmoid,
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_regression(reduction):
    check(
        normal(3, 4, 2),
        normal(4, 2),
        losses.MeanSquaredError(reduction=reduction),
        reference.squared_error,
        oracle="mse",
        reduction=reduction,
        weights=np.array([1.0, 2.0, 0.5, 0.0], "float32"),
    )


def test_absolute_error_has_a_squared_divergence():
    check(normal(2, 4, 2), normal(4, 2), "mae", reference.absolute_error, oracle="mse")


def test_jensen_shannon():
    check(
        normal(3, 3, 5),
        labels(3),
        losses.SparseCategoricalCrossentropy(from_logits=True),
        reference.sparse_cross_entropy,
        oracle="js",
        chosen="js",
    )


def test_classes_on_another_axis():
    y = np.moveaxis(np.eye(3)[labels(2, 4, classes=3)], -1, 1)
    check(
        normal(2, 2, 3, 4),
        y,
        losses.CategoricalCrossentropy(from_logits=True, axis=1),
        lambda y, a: reference.cross_entropy(y, a, axis=1),
        oracle="kl",
        axis=1,
    )


def test_own_loss_with_a_named_divergence():
    check(
        normal(2, 3, 5),
        labels(3),
        lambda y, a: ops.sparse_categorical_crossentropy(y, a, from_logits=True),
        reference.sparse_cross_entropy,
        oracle="kl",
        chosen=Divergence("kl", from_logits=True),
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
def test_implicit_mask(reduction, weighted):
    passes, y = normal(2, 3, 4, 5), labels(3, 4)
    lengths = np.array([4, 2, 1])
    mask = np.arange(4) < lengths[:, None]
    x = keras.Input((4, 1))
    model = keras.Model(x, Passes(passes)(layers.Masking()(x)))
    model = RDropModel(model, alpha=0.7)
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction))
    weights = np.random.uniform(0.5, 2, size=(3, 4)).astype("float32") if weighted else None
    logs, (slope,) = gradients_of_step(model, mask[..., None].astype("float32"), y, sample_weight=weights)

    def objective(w):
        return reference.objective(
            w, y, reference.sparse_cross_entropy, reference.kl, 0.7, reduction, weights=weights, mask=mask
        )

    total, task, consistency = objective(passes.astype("float64"))
    assert logs == pytest.approx({"loss": total, "task_loss": task, "consistency_loss": consistency}, rel=1e-5)
    expected = reference.gradient(lambda w: objective(w)[0], passes)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_ignored_class(reduction):
    passes, y = normal(2, 3, 4, 5), labels(3, 4)
    y[0, 1] = y[2, 2:] = -1
    mask = y != -1
    model = RDropModel(model_of(passes), alpha=0.7)
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1, reduction=reduction))
    logs, (slope,) = gradients_of_step(model, np.zeros((3, 1), "float32"), y)

    def objective(w):
        return reference.objective(
            w, np.where(mask, y, 0), reference.sparse_cross_entropy, reference.kl, 0.7, reduction, mask=mask
        )

    total, task, consistency = objective(passes.astype("float64"))
    assert logs == pytest.approx({"loss": total, "task_loss": task, "consistency_loss": consistency}, rel=1e-5)
    expected = reference.gradient(lambda w: objective(w)[0], passes)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_class_weight_is_a_sample_weight():
    passes, y = normal(2, 4, 3), np.array([0, 1, 2, 1])
    class_weight = {0: 1.0, 1: 3.0, 2: 0.5}
    model = RDropModel(model_of(passes), alpha=2.0)
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
    logs, (slope,) = gradients_of_step(model, np.zeros((4, 1), "float32"), y, class_weight=class_weight)
    weights = np.array([class_weight[label] for label in y])

    def objective(w):
        return reference.objective(w, y, reference.sparse_cross_entropy, reference.kl, 2.0, weights=weights)[0]

    assert logs["loss"] == pytest.approx(objective(passes.astype("float64")), rel=1e-5)
    expected = reference.gradient(objective, passes)
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


class TwoOutputs:
    """A class output and a regression output, as a dict, a list or nested; with the oracle of their sum."""

    def __init__(self):
        self.a, self.b = normal(2, 3, 5), normal(2, 3, 2)
        self.y = labels(3), normal(3, 2)
        self.losses = losses.SparseCategoricalCrossentropy(from_logits=True), losses.MeanSquaredError()

    def model(self, structure):
        x = {"p": keras.Input((1,), name="p"), "q": (keras.Input((1,), name="q"),)}
        a, b = Passes(self.a, name="a")(x["p"]), Passes(self.b, name="b")(x["q"][0])
        return keras.Model(x, structure(a, b))

    def x(self):
        return {"p": np.zeros((3, 1), "float32"), "q": (np.zeros((3, 1), "float32"),)}

    def objective(self, a, b, alpha, loss_weights=(1.0, 1.0), weights=(None, None)):
        first = reference.objective(
            a, self.y[0], reference.sparse_cross_entropy, reference.kl, alpha, weights=weights[0]
        )
        second = reference.objective(b, self.y[1], reference.squared_error, reference.mse, alpha, weights=weights[1])
        return [loss_weights[0] * f + loss_weights[1] * s for f, s in zip(first, second)]


@pytest.mark.parametrize(
    "structure",
    [
        pytest.param(lambda a, b: {"a": a, "b": b}, id="dict"),
        pytest.param(lambda a, b: [a, b], id="list"),
        pytest.param(lambda a, b: {"one": {"a": a}, "two": [b]}, id="nested"),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_several_outputs(structure, weighted):
    two = TwoOutputs()
    model = RDropModel(two.model(structure), alpha=1.5)
    loss_weights = (0.5, 3.0) if weighted else (1.0, 1.0)
    nested = isinstance(structure(0, 0), dict) and "one" in structure(0, 0)
    model.compile(
        "sgd", structure(*two.losses), loss_weights=structure(*loss_weights) if weighted and not nested else None
    )
    loss_weights = (1.0, 1.0) if nested else loss_weights
    weights = np.array([1.0, 0.5, 2.0], "float32"), np.array([0.0, 1.0, 4.0], "float32")
    weights = weights if weighted else (None, None)
    logs, slopes = gradients_of_step(
        model, two.x(), structure(*two.y), sample_weight=structure(*weights) if weighted else None
    )
    total, task, consistency = two.objective(two.a.astype("d"), two.b.astype("d"), 1.5, loss_weights, weights)
    assert logs["loss"] == pytest.approx(total, rel=1e-5)
    assert logs["task_loss"] == pytest.approx(task, rel=1e-5)
    assert logs["consistency_loss"] == pytest.approx(consistency, rel=1e-5)
    for which, slope in enumerate(slopes):

        def objective(w, which=which):
            both = [two.a, two.b]
            both[which] = w
            return two.objective(*both, 1.5, loss_weights, weights)[0]

        expected = reference.gradient(objective, [two.a, two.b][which])
        np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_logs_of_each_output_are_the_compiled_losses():
    two = TwoOutputs()
    model = RDropModel(two.model(lambda a, b: {"a": a, "b": b}), alpha=1.5)
    model.compile("sgd", {"a": two.losses[0], "b": two.losses[1]})
    logs = model.train_on_batch(two.x(), {"a": two.y[0], "b": two.y[1]}, return_dict=True)
    task = np.mean([reference.sparse_cross_entropy(two.y[0], a).mean() for a in two.a.astype("d")])
    assert logs["a_loss"] == pytest.approx(task, rel=1e-5)
    assert logs["a_loss"] + logs["b_loss"] == pytest.approx(logs["task_loss"], rel=1e-5)


@pytest.mark.parametrize(
    "divergence",
    [{"a": "kl", "b": "mse"}, ["kl", "mse"], {"a": Divergence("kl", from_logits=True), "b": "auto"}],
    ids=["dict", "list", "mixed"],
)
def test_a_divergence_for_each_output(divergence):
    two = TwoOutputs()
    model = RDropModel(two.model(lambda a, b: {"a": a, "b": b}), 1.5, divergence=divergence)
    model.compile("sgd", {"a": two.losses[0], "b": two.losses[1]})
    logs = model.train_on_batch(two.x(), {"a": two.y[0], "b": two.y[1]}, return_dict=True)
    assert logs["loss"] == pytest.approx(two.objective(two.a.astype("d"), two.b.astype("d"), 1.5)[0], rel=1e-5)


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("divergence", ["auto", {"b": "mse"}, [None, "mse"]], ids=["auto", "dict", "list"])
def test_output_without_a_loss_has_no_consistency_term(divergence):
    two = TwoOutputs()
    model = RDropModel(two.model(lambda a, b: {"a": a, "b": b}), 1.5, divergence=divergence)
    model.compile("sgd", {"a": None, "b": two.losses[1]})
    logs, slopes = gradients_of_step(model, two.x(), {"a": two.y[0], "b": two.y[1]})
    expected = reference.objective(two.b.astype("d"), two.y[1], reference.squared_error, reference.mse, 1.5)
    assert [logs[k] for k in ("loss", "task_loss", "consistency_loss")] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(slopes[0], 0)


def test_ignored_class_within_a_mask():
    passes, y = normal(2, 3, 4, 5), labels(3, 4)
    y[0, 1] = y[2, 0] = -1
    padding = np.arange(4) < np.array([4, 2, 1])[:, None]
    x = keras.Input((4, 1))
    model = RDropModel(keras.Model(x, Passes(passes)(layers.Masking()(x))), alpha=0.7)
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=-1, reduction="sum"))
    logs = model.train_on_batch(padding[..., None].astype("float32"), y, return_dict=True)
    total, task, consistency = reference.objective(
        passes.astype("d"),
        np.maximum(y, 0),
        reference.sparse_cross_entropy,
        reference.kl,
        0.7,
        "sum",
        mask=padding & (y != -1),
    )
    assert logs == pytest.approx({"loss": total, "task_loss": task, "consistency_loss": consistency}, rel=1e-5)


def test_two_losses_on_an_output_have_one_divergence():
    two = TwoOutputs()
    model = RDropModel(two.model(lambda a, b: {"a": a, "b": b}), alpha=1.5)
    model.compile("sgd", {"a": [two.losses[0], two.losses[0]], "b": two.losses[1]})
    logs = model.train_on_batch(two.x(), {"a": two.y[0], "b": two.y[1]}, return_dict=True)
    _, task, consistency = two.objective(two.a.astype("d"), two.b.astype("d"), 1.5)
    extra = np.mean([reference.sparse_cross_entropy(two.y[0], a).mean() for a in two.a.astype("d")])
    assert logs["task_loss"] == pytest.approx(task + extra, rel=1e-5)
    assert logs["consistency_loss"] == pytest.approx(consistency, rel=1e-5)


class AddsLosses(layers.Layer):
    def build(self, input_shape):
        self.w = self.add_weight(shape=(), initializer="ones", regularizer=keras.regularizers.L2(0.5))

    def call(self, inputs):
        self.add_loss(0.25 * ops.mean(ops.square(inputs)))
        return self.w * inputs


def test_losses_of_the_model_count_once():
    passes, x = normal(2, 3, 5), normal(3, 2)
    inputs = keras.Input((2,))
    h = AddsLosses()(inputs)
    h = layers.ActivityRegularization(l2=0.1)(h)
    model = RDropModel(keras.Model(inputs, Passes(passes, activity_regularizer=keras.regularizers.L1(0.01))(h)), 1.5)
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
    y = labels(3)
    logs = model.train_on_batch(x, y, return_dict=True)
    expected, task, consistency = reference.objective(
        passes.astype("d"), y, reference.sparse_cross_entropy, reference.kl, 1.5
    )
    extra = 0.5 + 0.25 * np.mean(x.astype("d") ** 2) + 0.1 * np.sum(x.astype("d") ** 2) / 3
    extra += 0.01 * np.abs(passes.astype("d")).sum() / 6
    assert logs["loss"] == pytest.approx(expected + extra, rel=1e-5)
    assert logs["task_loss"] == pytest.approx(task, rel=1e-5)
    assert logs["consistency_loss"] == pytest.approx(consistency, rel=1e-5)


@pytest.mark.parametrize("policy", ["float32", "mixed_float16", "mixed_bfloat16"])
def test_saturated_outputs_train_in_every_precision(policy):
    keras.config.set_dtype_policy(policy)
    passes = np.array([[[40.0, -40.0, 0]], [[-40.0, 40.0, 0]]], "float32")
    model = RDropModel(model_of(passes), alpha=1.0)
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
    logs, (slope,) = gradients_of_step(model, np.zeros((1, 1), "float32"), np.array([2]))
    # Each pass: cross-entropy 40. Divergence ½(1·80 + 1·80) = 80, times α/m.
    assert logs["loss"] == pytest.approx(40 + 80 / 2, rel=1e-3)
    # The loss pulls the first output of the first pass by P/m = ½, the divergence by d/da ½ · ½(P − Q)(a − b) = ¼.
    np.testing.assert_allclose(slope[0, 0, :2], [0.5 + 0.25, -0.25], rtol=1e-2)


def test_saturated_probabilities_keep_the_logits_they_came_from():
    passes, y = np.array([[[40.0, -40.0, 0]], [[-40.0, 30.0, 0]]], "float32"), np.array([2])
    model = RDropModel(model_of(passes, "softmax"), alpha=1.0)
    model.compile("sgd", "sparse_categorical_crossentropy")
    logs = model.train_on_batch(np.zeros((1, 1), "float32"), y, return_dict=True)
    # What Keras makes of each pass alone: exact where it keeps the logits, clipped at 1e-7 where it cannot.
    alone = [keras.losses.sparse_categorical_crossentropy(y, keras.activations.softmax(ops.array(p))) for p in passes]
    assert logs["task_loss"] == pytest.approx(np.mean([ops.convert_to_numpy(loss) for loss in alone]), rel=1e-4)
    # ½ Σ (P − Q)(a − b) with P, Q certain of the first and the second class: ½ (80 + 70).
    assert logs["consistency_loss"] == pytest.approx(75, rel=1e-3)


def small_step(model, x, y, alpha=3.0, loss=None, **kwargs):
    model = RDropModel(model, alpha)
    model.compile("sgd", loss or losses.SparseCategoricalCrossentropy(from_logits=True))
    return gradients_of_step(model, x, y, **kwargs)


class TestAlphaMeansOneThing:
    """The objective and its gradient with respect to shared weights."""

    def assert_same(self, first, second):
        for key in ("loss", "task_loss", "consistency_loss"):
            assert first[0][key] == pytest.approx(second[0][key], rel=1e-5)

    def test_whatever_the_batch_size(self):
        passes, y = normal(2, 3, 5), labels(3)
        one = small_step(model_of(passes), np.zeros((3, 1)), y)
        two = small_step(model_of(np.concatenate([passes] * 2, axis=1)), np.zeros((6, 1)), np.concatenate([y, y]))
        self.assert_same(one, two)
        np.testing.assert_allclose(two[1][0][:, :3] + two[1][0][:, 3:], one[1][0], rtol=1e-4, atol=1e-6)

    def test_whatever_the_padding(self):
        passes, y = normal(2, 3, 2, 5), labels(3, 2)
        one = small_step(model_of(passes), np.zeros((3, 1)), y)
        padded = np.concatenate([passes, normal(2, 3, 4, 5)], axis=2)
        y_padded = np.concatenate([y, labels(3, 4)], axis=1)
        x = keras.Input((6, 1))
        model = keras.Model(x, Passes(padded)(layers.Masking()(x)))
        mask = np.concatenate([np.ones((3, 2, 1)), np.zeros((3, 4, 1))], axis=1)
        two = small_step(model, mask, y_padded)
        self.assert_same(one, two)
        np.testing.assert_allclose(two[1][0][:, :, :2], one[1][0], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(two[1][0][:, :, 2:], 0)

    def test_whatever_the_length(self):
        passes, y = normal(2, 3, 2, 5), labels(3, 2)
        one = small_step(model_of(passes), np.zeros((3, 1)), y)
        two = small_step(model_of(np.concatenate([passes] * 3, axis=2)), np.zeros((3, 1)), np.tile(y, (1, 3)))
        self.assert_same(one, two)

    def test_whatever_the_classes_that_never_occur(self):
        passes, y = normal(2, 3, 5), labels(3)
        one = small_step(model_of(passes), np.zeros((3, 1)), y)
        more = np.concatenate([passes, np.full((2, 3, 7), -1e9, "float32")], axis=-1)
        two = small_step(model_of(more), np.zeros((3, 1)), y)
        self.assert_same(one, two)
        np.testing.assert_allclose(two[1][0][..., :5], one[1][0], rtol=1e-4, atol=1e-6)

    def test_as_a_factor_of_the_consistency_term(self):
        passes, y = normal(3, 3, 5), labels(3)
        for alpha in (0.5, 5.0):
            model = RDropModel(model_of(passes), alpha, num_passes=3)
            model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
            logs = model.train_on_batch(np.zeros((3, 1)), y, return_dict=True)
            assert logs["loss"] == pytest.approx(logs["task_loss"] + alpha / 3 * logs["consistency_loss"], rel=1e-5)


def test_the_official_formula():
    """The snippet of the authors' README (github.com/dropreg/R-Drop): at α it is ours at 2α."""
    passes, y, alpha = normal(2, 4, 5), labels(4), 0.8
    p, q = passes.astype("d")
    cross_entropy = 0.5 * (reference.sparse_cross_entropy(y, p).mean() + reference.sparse_cross_entropy(y, q).mean())
    official = cross_entropy + alpha * (reference.kl(p, q).mean() + reference.kl(q, p).mean()) / 2
    logs, _ = small_step(model_of(passes), np.zeros((4, 1)), y, alpha=2 * alpha)
    assert logs["loss"] == pytest.approx(official, rel=1e-5)
    # And half of Eq. 4 of the paper at the same α.
    nll = reference.sparse_cross_entropy(y, p).mean() + reference.sparse_cross_entropy(y, q).mean()
    eq_4 = nll + alpha * 0.5 * (reference.kl(p, q).mean() + reference.kl(q, p).mean())
    logs, _ = small_step(model_of(passes), np.zeros((4, 1)), y, alpha=alpha)
    assert logs["loss"] == pytest.approx(eq_4 / 2, rel=1e-5)


def test_metrics_see_the_first_pass():
    passes = np.stack([np.eye(3), np.eye(3)[[1, 2, 0]]]).astype("float32")
    model = RDropModel(model_of(passes), alpha=1.0)
    model.compile(
        "sgd", losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"], weighted_metrics=["mse"]
    )
    logs = model.train_on_batch(np.zeros((3, 1)), np.arange(3), return_dict=True)
    assert logs["accuracy"] == 1.0


def test_weights_are_those_of_the_model():
    model = mlp()
    wrapper = RDropModel(model)
    assert [id(v) for v in wrapper.weights] == [id(v) for v in model.weights]
    np.testing.assert_array_equal(to_numpy(wrapper.weights[0]), to_numpy(model.weights[0]))
