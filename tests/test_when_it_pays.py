"""The comparison in the same time: what it runs, that it goes on where it stopped, and what it makes of the results."""

import math
import pathlib
import sys

import keras
import numpy as np
import pytest
from scipy import stats

import measure
import tasks
import when_it_pays
import when_it_pays_report
from models import mlp

RESULTS = measure.read_runs(when_it_pays.RESULTS)
DOCS = pathlib.Path(__file__).parents[1] / "docs"


def tiny(folder=None):
    """Three classes of points, with weights of rows in training."""
    x = np.random.RandomState(0).normal(size=(60, 4)).astype("float32")
    y = ((x[:, 0] > 0).astype("int32") + (x[:, 2] > 1)).astype("int32")
    return tasks.Task(
        title="points",
        data={
            "train": (x[:20], y[:20], np.linspace(0.5, 1.5, 20, dtype="float32")),
            "validation": (x[20:40], y[20:40], None),
            "test": (x[40:], y[40:], None),
        },
        build=lambda dropout: mlp(rate=dropout),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        score=tasks.accuracy_and_calibration,
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
    monkeypatch.setattr(tasks, "TASKS", {"points": tiny})
    monkeypatch.setattr(when_it_pays, "EVALUATIONS", 4)
    monkeypatch.setattr(when_it_pays, "TURNS", 2)
    monkeypatch.setattr(when_it_pays, "BUDGETS", (1, 2))
    out = tmp_path / "results.json"

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["when_it_pays.py", "--out", str(out), *map(str, flags)])
        when_it_pays.main()
        return measure.read_runs(out)

    return run


@pytest.mark.slow
@pytest.mark.backends("jax")  # The benchmark's own.
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
    pages = [tmp_path / name for name in when_it_pays_report.PAGES]
    for page in pages:
        page.write_text("# Title\n\nAfter this.\n\n", encoding="utf-8")
    when_it_pays_report.report(again, tmp_path)
    texts = [page.read_text(encoding="utf-8") for page in pages]
    assert all(text.startswith("# Title") for text in texts) and (tmp_path / "when-it-pays-points.png").exists()
    assert "| R-Drop | " in texts[0] and "### Points" in texts[1]
    when_it_pays_report.report(again, tmp_path)
    assert [page.read_text(encoding="utf-8") for page in pages] == texts
    capsys.readouterr()
    run("--plan")
    assert f"points {len([key for key in again if 'price' not in key]):>29}" in capsys.readouterr().out


@pytest.mark.parametrize("page", when_it_pays_report.PAGES)
def test_pages_have_the_results(page):
    assert when_it_pays_report.PAGES[page](RESULTS) in (DOCS / page).read_text(encoding="utf-8")


def test_results_have_a_run_a_line_and_each_provenance_once(tmp_path):
    lines = when_it_pays.RESULTS.read_text(encoding="utf-8").splitlines()
    sources = {str(run["provenance"]) for run in RESULTS.values()}
    assert len(lines) == len(RESULTS) + len(sources) + len(["{", "provenance", "}", "runs", "}", "}"])
    assert sum('"command"' in line for line in lines) == len(sources)
    copy = tmp_path / "copy.json"
    measure.write_runs(copy, RESULTS)
    assert measure.read_runs(copy) == RESULTS
    assert measure.read_runs(tmp_path / "nothing.json") == {}


def test_small_runs_stand_for_no_others(tmp_path):
    sources = {"command": "python gpu.py --tiny --out a.json"}, {"command": "python gpu.py --out a.json"}
    runs = {name: {"seconds": 1.0, "provenance": source} for name, source in zip(("a", "b"), sources)}
    measure.write_runs(tmp_path / "a.json", runs)
    assert measure.read_runs(tmp_path / "a.json") == {"b": runs["b"]}
    assert measure.read_runs(tmp_path / "a.json", tiny=True) == {"a": runs["a"]}


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
    mean, half = when_it_pays_report.interval(differences)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval()
    np.testing.assert_allclose([mean - half, mean + half], [low, high])
    assert when_it_pays_report.verdict(differences, "test loss") == "tie"
    assert when_it_pays_report.verdict([-0.2, -0.21, -0.19], "test loss") == "win"
    assert when_it_pays_report.verdict([-0.2, -0.21, -0.19], "accuracy") == "loss"
    assert (
        math.isnan(when_it_pays_report.interval([1.0])[1]) and when_it_pays_report.verdict([1.0], "accuracy") == "tie"
    )


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
    scores = tasks.accuracy_and_calibration(y, logits)
    np.testing.assert_allclose(scores["calibration error"], expected)
    np.testing.assert_allclose(scores["accuracy"], right.mean())


@pytest.mark.parametrize("name", ["digits-100", "digits-50-shifted"])
def test_digits(name):
    task = tasks.TASKS[name](None)
    x, y, _ = task.data["train"]
    assert len(x) == len(y) == int(name.split("-")[1])
    model = task.build(0.25)
    assert {layer.rate for layer in model.layers if isinstance(layer, keras.layers.Dropout)} == {0.25}
    assert any(layer.name == "shift" for layer in model.layers) == ("shifted" in name)
    assert model(x[:2]).shape == (2, 10)
