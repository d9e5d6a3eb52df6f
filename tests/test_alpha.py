"""α on a schedule, by a budget, and assigned; saved and loaded."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from marks import slow
from models import logs_of_step, mlp
from rdrop_keras import KLBudget, RDropModel

X = np.random.RandomState(0).normal(size=(48, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32") + (X[:, 2] > 1)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def compiled(alpha, **kwargs):
    keras.utils.set_random_seed(3)
    model = RDropModel(mlp(), alpha, **kwargs)
    model.compile(keras.optimizers.SGD(0.05), LOSS)
    return model


def fit(model, epochs=2, **kwargs):
    return model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, **kwargs).history


@keras.saving.register_keras_serializable("tests")
def ramp(step):
    return 0.5 * ops.cast(step, "float32")


RAMPS = {
    "schedule": keras.optimizers.schedules.PolynomialDecay(0.0, 100, 50.0),
    "function": ramp,
}


@pytest.mark.parametrize("name", RAMPS)
def test_schedule(name):
    """α is 0, ½, 1, … at steps 0, 1, 2, …; an epoch has six."""
    model = compiled(RAMPS[name])
    history = fit(model)
    np.testing.assert_allclose(history["alpha"], [np.mean([0, 0.5, 1, 1.5, 2, 2.5]), 4.25], rtol=1e-6)
    assert "alpha" not in model.evaluate(X, Y, verbose=0, return_dict=True)
    np.testing.assert_allclose(
        fit(model, 1)["alpha"], [7.25], rtol=1e-6
    )  # The next `fit` continues the count of steps.


def test_schedule_weighs_the_consistency():
    """A constant schedule equals the number. With a moving one, each step has the loss of its own α."""
    constant = fit(compiled(lambda step: 2.0))
    fixed = fit(compiled(2.0))
    for name in fixed:
        np.testing.assert_allclose(constant[name], fixed[name], rtol=1e-5)
    model = compiled(ramp)
    for step in range(3):
        logs = logs_of_step(model, X[:8], Y[:8])
        expected = logs["task_loss"] + 0.5 * step / 2 * logs["consistency_loss"]
        np.testing.assert_allclose(logs["loss"], expected, rtol=1e-5)


@pytest.mark.parametrize("alpha", [*RAMPS.values(), KLBudget(0.02, step=0.5)], ids=[*RAMPS, "budget"])
@pytest.mark.parametrize("ending", ["model.keras", slow("model.weights.h5")])
def test_what_moves_is_saved(alpha, ending, tmp_path):
    model = compiled(alpha, every=2)
    fit(model)
    if ending == "model.keras":
        model.save(tmp_path / ending)
        again = keras.models.load_model(tmp_path / ending)
    else:
        model.save_weights(tmp_path / ending)
        again = compiled(alpha, every=2)
        again.load_weights(tmp_path / ending)
        again.optimizer.learning_rate = 0.05
    expected, history = fit(model, 1), fit(again, 1)
    np.testing.assert_allclose(history["alpha"], expected["alpha"], rtol=1e-5)
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)


def test_budget_by_hand():
    """α ← min(max(α + step · (C/target − 1), 0), maximum)."""
    model = compiled(KLBudget(target=0.1, step=0.5, initial=1.0, maximum=3.0))
    alpha = 1.0
    for _ in range(8):
        logs = logs_of_step(model, X[:16], Y[:16])
        np.testing.assert_allclose(logs["alpha"], alpha, rtol=1e-5)
        alpha = float(np.clip(alpha + 0.5 * (logs["consistency_loss"] / 0.1 - 1), 0, 3))
    assert alpha != 1.0


def test_budget_that_nothing_exceeds_leaves_alpha_at_0():
    model = compiled(KLBudget(target=100.0, step=0.2, initial=1.0))
    history = fit(model, 3)
    assert history["alpha"][-1] == 0.0
    np.testing.assert_allclose(history["loss"][-1], history["task_loss"][-1], rtol=1e-6)


def test_budget_out_of_reach_warns_once():
    model = compiled(KLBudget(target=1e-6, step=10.0, maximum=5.0))
    with pytest.warns(UserWarning, match=r"α has reached the maximum of KLBudget\(target=1e-06.*higher `target`"):
        history = fit(model)
    assert history["alpha"][-1] == 5.0
    fit(model)  # Warnings are errors here.


def real_model(budget):
    from sklearn.datasets import load_digits

    digits = load_digits()
    x = (digits.data / 16).astype("float32")
    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            keras.layers.Dense(64, "relu"),
            keras.layers.Dropout(0.3, seed=1),
            keras.layers.Dense(64, "relu"),
            keras.layers.Dropout(0.3, seed=2),
            keras.layers.Dense(10),
        ]
    )
    model = RDropModel(model, budget)
    model.compile(keras.optimizers.Adam(1e-3), LOSS)
    return model.fit(x[:1000], digits.target[:1000], batch_size=50, epochs=40, verbose=0).history


@pytest.mark.slow
@pytest.mark.backends("jax", "tensorflow")  # 800 steps take a minute on PyTorch.
@pytest.mark.parametrize("initial", [0.0, 10.0])
@pytest.mark.parametrize("target", [0.02, 0.05, 0.1])
def test_consistency_settles_at_the_target(target, initial):
    """Scanned digits, 800 steps; the mean over the last 10 epochs is within 10 % of the target."""
    history = real_model(KLBudget(target, step=0.3, initial=initial))
    assert abs(np.mean(history["consistency_loss"][-10:]) / target - 1) < 0.1


def test_budget_errors():
    for name in ("target", "step", "maximum"):
        with pytest.raises(ValueError, match=rf"`{name}` of a KLBudget must be above 0. Received: {name}=0"):
            KLBudget(**{"target": 0.1, "initial": 0.0, name: 0})
        with pytest.raises(ValueError, match=rf"`{name}` must be a finite number ≥ 0. Received: {name}=-1"):
            KLBudget(**{"target": 0.1, name: -1})
        with pytest.raises(TypeError, match=rf"`{name}` must be a number ≥ 0. Received: {name}='1' \(str\)"):
            KLBudget(**{"target": 0.1, name: "1"})
    with pytest.raises(ValueError, match=r"`initial` of a KLBudget must not be above `maximum`.*initial=3, maximum=2"):
        KLBudget(0.1, initial=3, maximum=2)


def test_schedule_errors():
    with pytest.raises(ValueError, match=r"a scalar at every step. Received: a tensor of shape \(2,\)"):
        RDropModel(mlp(), lambda step: ops.ones((2,)))
    with pytest.raises(ValueError, match=r"`alpha\(0\)` must be a finite number ≥ 0. Received: alpha\(0\)=-1.0"):
        RDropModel(mlp(), lambda step: -1.0)


def test_configuration():
    budget = KLBudget(0.1, step=0.2, initial=3.0, maximum=4.0)
    again = keras.saving.deserialize_keras_object(json.loads(json.dumps(keras.saving.serialize_keras_object(budget))))
    assert repr(again) == repr(budget) == "KLBudget(target=0.1, step=0.2, initial=3.0, maximum=4.0)"
    for alpha in (budget, *RAMPS.values()):
        model = RDropModel(mlp(), alpha, every=3, dropout_rates=(0.1, 0.2))
        again = RDropModel.from_config(json.loads(json.dumps(model.get_config())))
        assert type(again.alpha) is type(alpha)
        assert (again.every, again.dropout_rates) == (3, (0.1, 0.2))


def weight_of_consistency(logs):
    """α as it entered the loss of one epoch or step, from its logs: loss = task + α/2 · consistency."""
    loss, task, consistency = (np.ravel(logs[name]) for name in ("loss", "task_loss", "consistency_loss"))
    return (2 * (loss - task) / consistency).tolist()


class WarmUp(keras.callbacks.Callback):
    """Raises α by 1 in each epoch, from 1 in the first."""

    def on_epoch_begin(self, epoch, logs=None):
        self.model.alpha = 1.0 + epoch


def test_alpha_is_assigned_by_a_callback(tmp_path):
    model = compiled(5.0)
    history = fit(model, 3, callbacks=[WarmUp()])
    np.testing.assert_allclose(weight_of_consistency(history), [1, 2, 3], rtol=1e-3)
    assert "alpha" not in history
    # The assigned α stays, is saved with the model, and trains alike in both models.
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert model.alpha == again.alpha == model.get_config()["alpha"] == 3.0
    for trained in (model, again):
        np.testing.assert_allclose(weight_of_consistency(fit(trained, 1)), [3], rtol=1e-3)
    # A file of weights holds α if it was assigned. If not, the model that loads it keeps its own.
    model.save_weights(tmp_path / "assigned.weights.h5")
    compiled(5.0).save_weights(tmp_path / "plain.weights.h5")
    again = compiled(7.0)
    again.load_weights(tmp_path / "plain.weights.h5")
    assert again.alpha == 7.0
    again.load_weights(tmp_path / "assigned.weights.h5")
    assert again.alpha == 3.0
    np.testing.assert_allclose(weight_of_consistency(logs_of_step(again, X, Y)), [3], rtol=1e-3)


@pytest.mark.parametrize("through_callback", [True, False])
def test_alpha_assigned_between_steps(through_callback):
    """From the next step; on JAX, unless by a callback's `self.model`, from the next epoch."""
    model = compiled(1.0)

    class InTheMiddle(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                (self.model if through_callback else model).alpha = 9.0

    fit(model, 1, callbacks=[InTheMiddle()])
    assert model.alpha == 9.0
    np.testing.assert_allclose(weight_of_consistency(fit(model, 1)), [9], rtol=1e-3)


def test_alpha_assigned_makes_no_new_program():
    model = compiled(1.0)
    traced = []
    compute_loss = model.compute_loss
    model.compute_loss = lambda *args, **kwargs: traced.append(1) or compute_loss(*args, **kwargs)
    fit(model, 1)
    before = len(traced)
    model.alpha = 2.0
    fit(model, 1)
    steps = 6 if keras.backend.backend() == "torch" else 0  # PyTorch runs Python in each step.
    assert len(traced) == before + steps


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("devices", [1, 2])
def test_alpha_is_assigned_under_mirrored_strategy(devices):
    import tensorflow as tf

    one = tf.distribute.ReductionToOneDevice()
    names = [f"CPU:{i}" for i in range(devices)]
    strategy = tf.distribute.MirroredStrategy(names, cross_device_ops=one)
    with strategy.scope():
        model = compiled(5.0)
    history = model.fit(X, Y, batch_size=48, epochs=2, verbose=0, callbacks=[WarmUp()]).history
    np.testing.assert_allclose(weight_of_consistency(history), [1, 2], rtol=1e-3)


def test_weights_are_those_of_the_wrapped_model():
    """α and its step are not weights, so callbacks that restore weights leave them alone."""
    for alpha in (1.0, ramp, KLBudget(0.1)):
        model = compiled(alpha)
        assert [id(w) for w in model.weights] == [id(w) for w in model.model.weights]


def test_assignment_errors():
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"`alpha` must be a finite number ≥ 0. Received: alpha="):
            RDropModel(mlp()).alpha = value
    for value in ("1", None, True):
        with pytest.raises(TypeError, match=r"`alpha` must be a number ≥ 0, a LearningRateSchedule"):
            RDropModel(mlp()).alpha = value
    for before, after in ((1.0, 0), (0, 1.0)):
        with pytest.raises(ValueError, match=rf"from 0 or to 0, which is plain training.*Received: alpha={after}"):
            RDropModel(mlp(), before).alpha = after
    for value in (ramp, KLBudget(0.1)):
        with pytest.raises(TypeError, match=r"`alpha` can be assigned a number only.*Make a new RDropModel"):
            RDropModel(mlp()).alpha = value
        with pytest.raises(
            TypeError, match=r"`alpha` can be assigned only where it is a number.*Make a new RDropModel"
        ):
            RDropModel(mlp(), value).alpha = 2.0
    fixed = {"every": 2, "num_passes": 3, "share": "nothing", "divergence": "js", "dropout_rates": (0.1, 0.2)}
    for name, value in {**fixed, "model": mlp()}.items():
        model = RDropModel(mlp())
        before = getattr(model, name)
        with pytest.raises(
            AttributeError, match=rf"`{name}` of this RDropModel is fixed when it is made. Make a new one"
        ):
            setattr(model, name, value)
        assert getattr(model, name) is before


def test_kinds_of_numbers():
    for number in (np.float32(2), np.float64(2), np.int64(2), np.array(2.0), 2):
        assert RDropModel(mlp(), number).alpha == 2.0
    with pytest.raises(TypeError, match=r"Received: alpha=array\(\[1.\]\) \(ndarray\)"):
        RDropModel(mlp(), np.ones(1))
    for cls in (KLBudget, keras.optimizers.schedules.PolynomialDecay):
        with pytest.raises(TypeError, match=rf"Received: alpha={cls.__name__}, the class. Call it with its arguments"):
            RDropModel(mlp(), cls)


@pytest.mark.backends("jax", "tensorflow")  # PyTorch runs Python.
@pytest.mark.parametrize("function", [lambda step: 1.0 if step < 5 else 2.0, lambda step: float(step)])
def test_functions_that_cannot_be_compiled(function):
    with pytest.raises(ValueError, match=r"`alpha` must be a function of the training step.*`keras.ops.where"):
        RDropModel(mlp(), function)


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_schedule_that_turns_bad(bad):
    """Where α is not a number ≥ 0 it counts as 0, and `fit` warns once."""
    model = compiled(lambda step: ops.where(step < 2, 3.0, bad))
    with pytest.warns(UserWarning, match=r"`alpha` must be a finite number ≥ 0 at every step, and was not at 4 of"):
        history = fit(model, 1)
    np.testing.assert_allclose(history["alpha"], [1.0], rtol=1e-6)
    last = fit(model, 1)  # Warnings are errors here.
    np.testing.assert_allclose(last["loss"], last["task_loss"], rtol=1e-6)


def test_compiling_again_keeps_alpha_where_it_is():
    """The step of α counts the steps of the RDropModel, and a budget keeps the α that it has found."""
    for alpha in (ramp, KLBudget(0.02, step=0.5), 2.0):
        model = compiled(alpha)
        if alpha == 2.0:
            model.alpha = 4.0
        fit(model, 1)
        before = float(ops.convert_to_numpy(model._alpha.current()))
        model.compile(keras.optimizers.SGD(0.05), LOSS)
        assert float(ops.convert_to_numpy(model._alpha.current())) == before != 0
        assert model.optimizer.iterations == 0


def test_a_batch_without_weights_does_not_move_a_budget():
    model = compiled(KLBudget(0.1, step=0.5, initial=2.0))
    model.train_on_batch(X, Y, sample_weight=np.zeros(48))
    assert ops.convert_to_numpy(model._alpha.alpha) == 2.0
    model.train_on_batch(X, Y, sample_weight=np.eye(48)[0])
    assert ops.convert_to_numpy(model._alpha.alpha) != 2.0


def long_trained(alpha, epochs=13, **kwargs):  # Of 8 steps.
    model = RDropModel(mlp(rate=0.3), alpha, **kwargs)
    model.compile(keras.optimizers.SGD(0.0), LOSS)
    model.fit(X, Y, batch_size=6, epochs=epochs, verbose=0)
    return model


def test_too_small_to_matter():
    """An α that does nothing is told, once."""
    with pytest.warns(
        UserWarning, match=r"R-Drop was at most 0.0% of the loss in each epoch.*larger `alpha` than 0.00"
    ):
        model = long_trained(1e-3, start=4)
    model.fit(X, Y, verbose=0)  # Warnings are errors here.


@pytest.mark.parametrize(
    "alpha, options",
    [
        (10.0, {}),
        slow(1e-3, {"epochs": 2}),  # Too early to tell.
        slow(1e-3, {"start": 1000}),
        slow(keras.optimizers.schedules.PolynomialDecay(0.0, 10_000, 1.0), {}),  # It moves as it is meant to.
        slow(KLBudget(1.0, initial=0.0), {}),
    ],
    ids=["large", "few steps", "not begun", "schedule", "budget"],
)
def test_not_too_small_to_matter(alpha, options):
    long_trained(alpha, **options)  # Warnings are errors here.
