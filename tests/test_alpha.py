import json

import keras
import numpy as np
import pytest
from keras import ops

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
    np.testing.assert_allclose(fit(model, 1)["alpha"], [7.25], rtol=1e-6)  # The step goes on in the next `fit`.


def test_schedule_weighs_the_consistency():
    """A constant schedule is the number; a moving one gives each step the loss of its own α."""
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
@pytest.mark.parametrize("ending", ["model.keras", "model.weights.h5"])
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
@pytest.mark.backends("jax", "tensorflow")  # 800 steps take PyTorch a minute.
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
