"""`RDropModel.training_card`: what trained a model, in memory and in files."""

import json

import keras
import numpy as np
import pytest

import rdrop_keras
from models import mlp
from rdrop_keras import Divergence, KLBudget, RDropModel, card

X = np.random.RandomState(0).normal(size=(16, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")


def fitted(**kwargs):
    model = RDropModel(mlp(seed=None), **kwargs)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(X, Y, verbose=0)
    return model


def test_a_loaded_model_tells_what_trained_it(tmp_path, monkeypatch):
    model = fitted(alpha=3.0, num_passes=3, every=2, start=1, dropout_rates=(0.1, 0.2, 0.3), share="nothing")
    expected = {
        "method": "R-Drop",
        "alpha": 3.0,
        "divergence": "auto",
        "num_passes": 3,
        "every": 2,
        "start": 1,
        "dropout_rates": [0.1, 0.2, 0.3],
        "share": "nothing",
        "versions": card.installed_versions(),
    }
    assert model.training_card == expected
    assert expected["versions"]["rdrop_keras"] == rdrop_keras.__version__
    assert expected["versions"]["keras"] == keras.__version__ and keras.backend.backend() in expected["versions"]
    model.save(tmp_path / "model.keras")
    # Later versions change nothing of it until they train the model.
    later = {"rdrop_keras": "9.0", "keras": "9.1", keras.backend.backend(): "9.2"}
    monkeypatch.setattr(card, "installed_versions", lambda: later)
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.training_card == expected
    loaded.evaluate(X, Y, verbose=0)
    assert loaded.training_card == expected
    loaded.fit(X, Y, verbose=0)
    assert loaded.training_card == {**expected, "versions": later}


@pytest.mark.parametrize(
    "alpha, expected",
    [
        (KLBudget(0.1), {"class": "KLBudget", "target": 0.1, "step": 0.1, "initial": 1.0, "maximum": 100.0}),
        (keras.optimizers.schedules.InverseTimeDecay(1.0, 10, 0.5), "InverseTimeDecay"),
        (lambda step: 0.1 * keras.ops.cast(step, "float32"), "<lambda>"),
    ],
    ids=["budget", "schedule", "function"],
)
def test_moving_alpha(alpha, expected):
    received = RDropModel(mlp(), alpha, divergence=[Divergence("js", from_logits=True)]).training_card
    assert json.loads(json.dumps(received)) == received
    named = received["alpha"]["class"] if expected == "InverseTimeDecay" else received["alpha"]
    assert named == expected
    assert received["divergence"] == [{"class": "Divergence", "name": "js", "from_logits": True, "axis": None}]


def test_an_assigned_alpha_is_told():
    model = RDropModel(mlp(), 1.0, divergence={"out": "kl"})
    model.alpha = 2.5
    assert model.training_card["alpha"] == 2.5 and model.training_card["divergence"] == {"out": "kl"}
