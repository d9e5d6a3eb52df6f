"""The comparison in the same time: what it runs, that it goes on where it stopped, and what it makes of the results."""

import json
import math
import pathlib
import sys

import keras
import numpy as np
import pytest
from scipy import stats

import measured_tasks
import when_it_pays
from models import mlp

RESULTS = json.loads(when_it_pays.RESULTS.read_text(encoding="utf-8"))
DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "when-it-pays.md"


def tiny(folder=None):
    """Three classes of points, with weights of rows in training."""
    x = np.random.RandomState(0).normal(size=(60, 4)).astype("float32")
    y = ((x[:, 0] > 0).astype("int32") + (x[:, 2] > 1)).astype("int32")
    return measured_tasks.Task(
        title="points",
        data={
            "train": (x[:20], y[:20], np.linspace(0.5, 1.5, 20, dtype="float32")),
            "validation": (x[20:40], y[20:40], None),
            "test": (x[40:], y[40:], None),
        },
        build=lambda dropout: mlp(rate=dropout),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        score=measured_tasks.accuracy_and_calibration,
        batch_size=10,
        pilot_steps=40,
        learning_rates=(0.01,),
        dropouts=(0.1, 0.3),
        alphas=(1.0, 10.0),
        num_seeds=2,
    )


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the program with flags on a task of two classes, and returns its results."""
    monkeypatch.setattr(measured_tasks, "TASKS", {"points": tiny})
    monkeypatch.setattr(when_it_pays, "EVALUATIONS", 4)
    monkeypatch.setattr(when_it_pays, "TURNS", 2)
    monkeypatch.setattr(when_it_pays, "BUDGETS", (1, 2))
    out = tmp_path / "results.json"

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["when_it_pays.py", "--out", str(out), *map(str, flags)])
        when_it_pays.main()
        return json.loads(out.read_text(encoding="utf-8"))

    return run


@pytest.mark.slow
def test_runs_and_goes_on(run, tmp_path, capsys):
    results = run("--seeds", 1)
    variants = ["plain", "R-Drop", "R-Drop from ½", "R-Drop from ¾", "KLBudget"]
    mains = [f"points | main | {variant} | budget {budget} | seed 0" for variant in variants for budget in (1, 2)]
    assert {key for key in results if "main" in key} == set(mains)
    searched = [key for key in results if "search" in key]
    assert len(searched) == 2 + 2 + 2
    for key in mains:
        assert len(results[key]["validation losses"]) == 4 and results[key]["provenance"]["versions"]["keras"]
    # What was chosen has the lowest validation loss of what was tried.
    tried = {key: min(results[key]["validation losses"]) for key in searched if "| plain |" in key}
    assert results[mains[0]]["dropout"] == results[min(tried, key=tried.get)]["dropout"]
    # All have the time of plain training, by the measured prices.
    price = results["points | price"]["price"]
    steps = {variant: results[f"points | main | {variant} | budget 2 | seed 0"]["steps"] for variant in variants}
    assert abs(steps["R-Drop"] * price["R-Drop"] - steps["plain"]) <= 4 * price["R-Drop"]

    capsys.readouterr()
    again = run("--seeds", 2)
    assert {key: again[key] for key in results} == results  # Nothing was made again.
    assert len(again) == len(results) + len(mains)
    (tmp_path / "when-it-pays.md").write_text("# Title\n\nAfter this.\n\n", encoding="utf-8")
    run("--report", tmp_path)
    text = (tmp_path / "when-it-pays.md").read_text(encoding="utf-8")
    assert text.startswith("# Title") and "### Points" in text and (tmp_path / "when-it-pays-points.png").exists()
    run("--report", tmp_path)
    assert (tmp_path / "when-it-pays.md").read_text(encoding="utf-8") == text
    capsys.readouterr()
    run("--plan")
    assert f"points {len([key for key in again if 'price' not in key]):>29}" in capsys.readouterr().out


def test_document_has_the_results():
    assert when_it_pays.tables(RESULTS) in DOCUMENT.read_text(encoding="utf-8")


def test_every_run_has_the_time_of_plain_training():
    price = {"plain": 1.0, "R-Drop": 1.6, "R-Drop from ½": 1.0, "KLBudget": 1.7}
    for variant, mean in (("plain", 1.0), ("R-Drop", 1.6), ("R-Drop from ½", 1.3), ("R-Drop from ¾", 1.15)):
        assert when_it_pays.steps_of(variant, 2, 100, price) == pytest.approx(200 / mean)


def test_learning_rate_ends_with_the_run():
    rates = [when_it_pays.learning_rate_at(epoch, 0.1) for epoch in range(when_it_pays.EVALUATIONS)]
    assert rates[0] < rates[1] < rates[2] <= 0.1 and rates[-1] < 0.001
    assert rates[3:] == sorted(rates[3:], reverse=True)


def test_intervals_and_verdicts():
    differences = [-0.3, -0.1, -0.2]
    mean, half = when_it_pays.interval(differences)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    np.testing.assert_allclose([mean - half, mean + half], [low, high])
    assert when_it_pays.verdict(differences, "test loss") == "tie"
    assert when_it_pays.verdict([-0.2, -0.21, -0.19], "test loss") == "win"
    assert when_it_pays.verdict([-0.2, -0.21, -0.19], "accuracy") == "loss"
    assert math.isnan(when_it_pays.interval([1.0])[1]) and when_it_pays.verdict([1.0], "accuracy") == "tie"


def test_calibration_error():
    """Against the definition, bin by bin."""
    random = np.random.RandomState(0)
    logits, y = random.normal(size=(300, 4)) * 2, random.randint(0, 4, 300)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == y
    expected = 0.0
    for i in range(10):
        chosen = (confidence >= i / 10) & (confidence < (i + 1) / 10)
        if chosen.any():
            expected += chosen.mean() * abs(right[chosen].mean() - confidence[chosen].mean())
    scores = measured_tasks.accuracy_and_calibration(y, logits)
    np.testing.assert_allclose(scores["calibration error"], expected)
    np.testing.assert_allclose(scores["accuracy"], right.mean())


@pytest.mark.parametrize("name", ["digits-100", "digits-50-shifted"])
def test_digits(name):
    task = measured_tasks.TASKS[name](None)
    x, y, _ = task.data["train"]
    assert len(x) == len(y) == int(name.split("-")[1])
    model = task.build(0.25)
    assert {layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)} == {0.25}
    assert any(layer.name == "shift" for layer in model.layers) == ("shifted" in name)
    assert model(x[:2]).shape == (2, 10)
