"""A divergence that is a function of the user's, and what is said of losses that tell none."""

import re

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

import reference
from models import Passes, gradients_of_step, logs_of_step, mlp
from rdrop_keras import Divergence, RDropModel, inconsistency

LOGITS = losses.SparseCategoricalCrossentropy(from_logits=True)
X = np.random.RandomState(0).normal(size=(16, 4)).astype("float32")
Y = np.arange(16) % 3


def squares(a, b, axis=-1):
    """Independent of the package's own: the squared difference of probabilities."""
    return ((reference.softmax(a, axis) - reference.softmax(b, axis)) ** 2).sum(axis=axis)


@keras.saving.register_keras_serializable("tests")
def brier(outputs):
    """The mean over pairs of the squared difference of probabilities."""
    ps = [ops.softmax(output) for output in outputs]
    total = sum(ops.sum(ops.square(p - q), axis=-1) for p in ps for q in ps)
    return total / (len(ps) * (len(ps) - 1))


def by_class(outputs):
    return ops.square(outputs[0] - outputs[1])


def of_passes(*passes):
    x = keras.Input((1,))
    outputs = [Passes(each, name=name)(x) for each, name in zip(passes, "ab")]
    return keras.Model(x, outputs[0] if len(outputs) == 1 else dict(zip("ab", outputs)))


def normal(*shape):
    return np.random.normal(size=shape).astype("float32")


@pytest.mark.parametrize("num_passes", [2, 3])
@pytest.mark.parametrize("reduction", ["sum_over_batch_size", "sum"])
def test_a_function_of_all_passes(num_passes, reduction):
    passes, y = normal(num_passes, 4, 3, 5), np.random.randint(0, 5, size=(4, 3))
    weights = np.random.uniform(size=(4, 3)).astype("float32")
    model = RDropModel(of_passes(passes), 0.7, brier, num_passes=num_passes)
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction))
    logs, (slope,) = gradients_of_step(model, np.zeros((4, 1), "float32"), y, sample_weight=weights)

    def objective(w):
        return reference.objective(w, y, reference.sparse_cross_entropy, squares, 0.7, reduction, weights)

    expected = dict(zip(("loss", "task_loss", "consistency_loss"), objective(passes.astype("float64"))))
    assert logs == pytest.approx(expected, rel=1e-5)
    slopes = reference.gradient(lambda w: objective(w)[0], passes)
    np.testing.assert_allclose(slope, slopes, rtol=1e-4, atol=1e-5 * np.abs(slopes).max())


def test_more_values_than_the_loss_has():
    """They are averaged as those of any divergence."""
    passes = normal(2, 4, 5)
    model = RDropModel(of_passes(passes), 1.0, by_class)
    model.compile("sgd", LOGITS)
    weights = np.random.uniform(size=4).astype("float32")
    logs, _ = gradients_of_step(model, np.zeros((4, 1), "float32"), np.arange(4), sample_weight=weights)
    rows = ((passes[0] - passes[1]).astype("float64") ** 2).mean(-1)
    assert logs["consistency_loss"] == pytest.approx((weights * rows).mean(), rel=1e-5)


@pytest.mark.parametrize("divergence", [{"a": brier, "b": "mse"}, [brier, "mse"]], ids=["dict", "list"])
def test_one_of_several_outputs(divergence):
    a, b = normal(2, 4, 3), normal(2, 4, 5)
    model = RDropModel(of_passes(a, b), 1.0, divergence)
    model.compile("sgd", {"a": LOGITS, "b": "mse"})
    logs = logs_of_step(model, np.zeros((4, 1), "float32"), {"a": np.arange(4) % 3, "b": normal(4, 5)})
    pairs = (squares, a), (reference.mse, b)
    expected = sum(reference.mean_over_pairs(oracle, each.astype("float64")).mean() for oracle, each in pairs)
    assert logs["consistency_loss"] == pytest.approx(expected, rel=1e-5)


def test_it_computes_in_single_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    seen = []

    def divergence(outputs):
        seen.extend(keras.backend.standardize_dtype(output.dtype) for output in outputs)
        return brier(outputs)

    model = RDropModel(mlp(), 1.0, divergence)
    model.compile("sgd", LOGITS)
    model.fit(X, Y, verbose=0)
    assert set(seen) == {"float32"} and len(seen) >= 2


@pytest.mark.parametrize("divergence", [brier, {"dense_out": brier}], ids=["one", "dict"])
def test_a_registered_function_is_saved_and_loaded_in_safe_mode(tmp_path, divergence):
    inputs = keras.Input((4,))
    inner = keras.Model(inputs, layers.Dense(3, name="dense_out")(layers.Dropout(0.3)(inputs)))
    model = RDropModel(inner, 2.0, divergence)
    model.compile("sgd", LOGITS)
    model.fit(X, Y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    assert loaded.divergence == divergence and loaded.compiled
    assert loaded.fit(X, Y, verbose=0).history["consistency_loss"][0] > 0


def test_inconsistency_decides_nothing_by_it():
    model = RDropModel(mlp(), 1.0, brier)
    model.compile("sgd", LOGITS)
    result = inconsistency(model, X, Y, num_passes=3)
    assert result.divergence.value > 0 and np.isnan(result.agreement.value)


class NoNumber:
    """Callable, as a metric is, but of two arguments."""

    def __call__(self, p, q):
        return p - q


@pytest.mark.parametrize(
    "divergence, message",
    [
        (lambda p, q: p - q, r"take one argument, the list of the outputs of all passes.*<lambda>\(p, q\)"),
        (keras.losses.kl_divergence, r"take one argument.*Received: kl_divergence\(y_true, y_pred"),
        (NoNumber(), r"take one argument.*Received: NoNumber\(p, q\)"),
        (losses.KLDivergence(), r"a rdrop_keras.Divergence or a function; or a dict or list.*\(KLDivergence\)"),
        (Divergence, r"a function; or a dict or list of these. Received: divergence=<class .*\(type\)"),
        (None, r"a function; or a dict or list of these. Received: divergence=None \(NoneType\)"),
    ],
    ids=["two arguments", "a loss function", "an object", "a loss", "a class", "None"],
)
def test_what_is_no_function_of_the_passes(divergence, message):
    with pytest.raises(TypeError, match=message):
        RDropModel(mlp(), 1.0, divergence)
    with pytest.raises(TypeError, match=message):
        RDropModel(mlp(), 1.0, {"dense": divergence} if divergence is not None else divergence)


@pytest.mark.parametrize(
    "divergence, shape",
    [
        (lambda outputs: ops.mean(ops.square(outputs[0] - outputs[1])), r"\(\)"),
        (lambda outputs: ops.zeros(3), r"\(3,\)"),
    ],
    ids=["a scalar", "classes"],
)
def test_a_value_for_each_element(divergence, shape):
    model = RDropModel(mlp(), 1.0, divergence)
    model.compile("sgd", LOGITS)
    with pytest.raises(ValueError, match=rf"shape \(batch, …\).*Received: a tensor of shape {shape} from <lambda>"):
        model.train_on_batch(X, Y)


def test_a_loss_that_tells_nothing_names_the_wrapper():
    own = lambda y_true, y_pred: ops.mean(ops.square(y_pred), axis=-1)  # noqa: E731
    model = RDropModel(mlp(), 1.0)
    with pytest.raises(ValueError, match=r"to the wrapper and not to `compile`: `RDropModel\(model, divergence=") as e:
        model.compile("sgd", own)
    remedy = re.search(r"divergence=(rdrop_keras.Divergence\(name, from_logits=...\))", str(e.value))
    assert remedy
    model = RDropModel(mlp(), 1.0, Divergence("kl", from_logits=True))
    model.compile("sgd", own)
    assert logs_of_step(model, X, Y)["consistency_loss"] > 0


class AddsItsLoss(layers.Layer):
    """The end of a model whose targets are an input, as in the older guides of Keras."""

    def call(self, inputs):
        logits, y = inputs
        self.add_loss(ops.mean(ops.sparse_categorical_crossentropy(y, logits, from_logits=True)))
        return logits


def test_a_loss_inside_a_layer():
    def model():
        x, y = keras.Input((4,)), keras.Input((), dtype="int32")
        logits = layers.Dense(3)(layers.Dropout(0.3)(x))
        return RDropModel(
            keras.Model([x, y], AddsItsLoss()([logits, y])), divergence=Divergence("kl", from_logits=True)
        )

    with pytest.raises(ValueError, match=r"needs a compiled `loss`.*`add_loss` has no outputs. Take the loss out") as e:
        model().compile("adam")
    # The remedy it names for a loss that has to stay.
    remedy = re.search(r"`loss=(lambda y, outputs: .*?)`,", str(e.value))[1]
    trained = model()
    trained.compile("sgd", loss=eval(remedy))
    logs = logs_of_step(trained, [X, Y], Y)
    assert logs["task_loss"] == 0 and logs["consistency_loss"] > 0
    assert logs["loss"] > logs["consistency_loss"] / 2 + 0.1  # The layer's own.


def named_outputs(*names):
    inputs = keras.Input((4,))
    h = layers.Dropout(0.3)(inputs)
    return keras.Model(inputs, {name: layers.Dense(3, name=name)(h) for name in names})


@pytest.mark.parametrize(
    "names, alpha, metrics, taken",
    [
        (("task", "aux"), 1.0, None, "task_loss"),
        (("aux", "consistency"), 1.0, None, "consistency_loss"),
        (("a", "b"), 1.0, {"a": [keras.metrics.SparseCategoricalAccuracy(name="x")]}, None),
        (("task", "aux"), 1.0, {"task": [keras.metrics.SparseCategoricalAccuracy(name="loss")]}, "task_loss"),
        (("alpha", "rdrop"), lambda step: 1.0 + 0.0 * ops.cast(step, "float32"), None, None),
    ],
    ids=["task", "consistency", "others", "metric of an output", "alpha and rdrop"],
)
def test_names_of_outputs_in_the_logs(names, alpha, metrics, taken):
    model = RDropModel(named_outputs(*names), alpha)
    model.compile("sgd", dict.fromkeys(names, LOGITS), metrics=metrics)
    y = dict.fromkeys(names, Y)
    if taken:
        with pytest.raises(
            ValueError,
            match=rf"Rename it.*Received: (a metric|an output '{taken[:-5]}') that is logged as '{taken}'",
        ):
            model.fit(X, y, verbose=0)
        plain = RDropModel(named_outputs(*names), 0.0)
        plain.compile("sgd", dict.fromkeys(names, LOGITS), metrics=metrics)
        assert taken in plain.fit(X, y, verbose=0).history
    else:
        history = model.fit(X, y, validation_data=(X, y), verbose=0).history
        assert {f"{name}_loss" for name in names} | {f"val_{name}_loss" for name in names} <= set(history)
        assert history["task_loss"][0] == pytest.approx(sum(history[f"{name}_loss"][0] for name in names), rel=1e-5)


@pytest.mark.parametrize("name", ["task_loss", "consistency_loss", "alpha", "rdrop", "rdrop_alpha"])
@pytest.mark.parametrize("moves", [False, True])
def test_names_of_metrics_in_the_logs(name, moves):
    model = RDropModel(mlp(), (lambda step: 1.0 + 0.0 * ops.cast(step, "float32")) if moves else 1.0)
    model.compile("sgd", LOGITS, metrics=[keras.metrics.SparseCategoricalAccuracy(name=name)])
    if name.endswith("_loss") or (name == "alpha" and moves):
        with pytest.raises(ValueError, match=rf"a metric by `name`. Received: a metric that is logged as '{name}'"):
            model.fit(X, Y, verbose=0)
    else:
        history = model.fit(X, Y, validation_data=(X, Y), verbose=0).history
        assert 0 <= history[name][0] <= 1 and 0 <= history[f"val_{name}"][0] <= 1
