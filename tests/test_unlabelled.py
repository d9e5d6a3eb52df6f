"""Rows without labels: the runs of `benchmarks/unlabelled.py`, that they go on where they stopped, and the page."""

import pathlib

import keras
import numpy as np
import pytest

import measure
import unlabelled
import unlabelled_report
from models import mlp
from tasks.unlabelled import ALL, KINDS, PLAIN, Setting, Task

RUNS = measure.read_runs(unlabelled.RESULTS)
PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "unlabelled.md").read_text(encoding="utf-8")


def tiny():
    x = np.random.RandomState(0).normal(size=(120, 4)).astype("float32")
    y = (x[:, 0] > 0).astype("int32")
    data = {"train": (x[:30], y[:30]), "validation": (x[30:50], y[30:50]), "test": (x[50:70], y[50:70])}
    return Task({**data, "unlabelled": x[70:]}, lambda views: mlp(), num_steps=100)


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")  # PyTorch takes its steps one by one.
def test_runs_go_on_where_they_stopped(tmp_path):
    path = tmp_path / "runs.json"
    runs = unlabelled.Runs(path, {"command": "a test"})
    unlabelled.run_all("tiny", tiny(), runs, 1, further=False)
    assert len(runs.runs) == 2 * len(KINDS)  # A price and a run of each.
    before = path.read_text(encoding="utf-8")
    again = unlabelled.Runs(path, {"command": "a test"})
    unlabelled.run_all("tiny", tiny(), again, 1, further=False)
    assert path.read_text(encoding="utf-8") == before
    for kind in KINDS:
        (run,) = unlabelled_report.runs_of(again.runs, "tiny", Setting(kind)).values()
        assert run["steps"] >= 100 and ("consistency_loss" in run) == (kind != PLAIN)


def test_loss_is_the_mean_over_labelled_rows():
    y, logits = np.array([1, -1, 0, -1, 2]), np.random.normal(size=(5, 3)).astype("float32")
    labelled = y >= 0
    logits64 = logits[labelled].astype("float64")
    expected = np.log(np.exp(logits64).sum(axis=-1)) - logits64[np.arange(3), y[labelled]]
    values = keras.ops.convert_to_numpy(unlabelled.loss_of_labelled(keras.ops.convert_to_tensor(y), logits))
    assert values.mean() == pytest.approx(expected.mean(), rel=1e-5)
    none = unlabelled.loss_of_labelled(keras.ops.convert_to_tensor(np.full(5, -1)), logits)
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(none), np.zeros(5))


def test_batches_have_the_share_of_labelled_rows():
    task = tiny()
    for kind, share, others in [(ALL, 0.25, 75), (ALL, 0.5, 25), (PLAIN, 0.25, 0)]:
        x, y = next(unlabelled.batches(task, Setting(kind, share=share), seed=0))
        assert len(x) == len(y) == 25 + others and (y == -1).sum() == others


def test_page_has_the_tables():
    for table in unlabelled_report.report(RUNS).split("\n\n"):
        assert table in PAGE
