"""Pictures of runs: which panels, which curves, which errors."""

import builtins

import keras
import numpy as np
import pytest

from models import mlp
from rdrop_keras import RDropModel, plot

X = np.random.RandomState(0).normal(size=(16, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")


def run(wrap, seed, epochs=3):
    keras.utils.set_random_seed(seed)
    model = wrap(mlp())
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    return model.fit(X, Y, batch_size=8, epochs=epochs, verbose=0, validation_data=(X, Y), callbacks=[plot.Clock()])


@pytest.fixture(scope="module")
def histories():
    return {
        "plain": [run(lambda model: model, s) for s in (1, 2, 3)],
        "R-Drop": [run(RDropModel, s) for s in (1, 2, 3)],
    }


def test_panels(histories, tmp_path):
    figure = plot.compare(histories, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 10_000
    axes = np.array(figure.axes).reshape(3, 2)
    assert [row[0].get_ylabel() for row in axes] == [
        "loss (dashed: training)",
        "validation accuracy",
        "consistency loss",
    ]
    assert [a.get_xlabel() for a in axes[-1]] == ["training step", "seconds"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["plain", "R-Drop"]
    assert [len(a.get_lines()) for a in axes[:, 0]] == [4, 2, 1]
    assert [len(a.collections) for a in axes[:, 0]] == [4, 2, 1]  # One band for each line.


def test_panels_of_validation_alone():
    (axes,) = plot.compare({"plain": {"val_loss": [2.0, 1.0]}}).axes
    assert axes.get_ylabel() == "validation loss" and len(axes.get_lines()) == 1


def test_curves(histories):
    figure = plot.compare(histories)
    lines = figure.axes[0].get_lines()
    np.testing.assert_array_equal(lines[0].get_xdata(), [2, 4, 6])  # Two steps in each epoch.
    tasks = np.array([history.history["task_loss"] for history in histories["R-Drop"]])
    np.testing.assert_allclose(lines[2].get_ydata(), tasks.mean(axis=0))
    low, high = (f(figure.axes[0].collections[2].get_paths()[0].vertices[:, 1]) for f in (np.min, np.max))
    deviation = tasks.std(axis=0, ddof=1)
    np.testing.assert_allclose([low, high], [(tasks.mean(0) - deviation).min(), (tasks.mean(0) + deviation).max()])
    colours = {line.get_color() for line in lines}
    assert len(colours) == 2 and len({line.get_marker() for line in lines}) == 2
    np.testing.assert_allclose(
        figure.axes[1].get_lines()[0].get_xdata(), np.mean([h.history["seconds"] for h in histories["plain"]], axis=0)
    )


def test_single_histories_as_dicts():
    figure = plot.compare({"a": {"loss": [3.0, 2.0], "val_loss": [4.0, 3.0]}})
    (axes,) = figure.axes
    assert axes.get_xlabel() == "epoch" and not axes.collections
    np.testing.assert_array_equal(axes.get_lines()[1].get_ydata(), [4.0, 3.0])


def test_clock():
    history = run(lambda model: model, 1).history
    assert history["seconds"] == sorted(history["seconds"]) and history["seconds"][0] > 0


def test_errors(monkeypatch):
    with pytest.raises(TypeError, match=r"`histories` must be a dict from names to runs. Received: list"):
        plot.compare([])
    with pytest.raises(ValueError, match="at least one run"):
        plot.compare({})
    for value in (3, [], {}, [{"loss": [1.0]}, 4]):
        with pytest.raises(TypeError, match=r"A run must be a keras.callbacks.History.*for 'a'"):
            plot.compare({"a": value})
    with pytest.raises(ValueError, match=r"must have one length. Received: 'a'"):
        plot.compare({"a": [{"loss": [1.0]}, {"loss": [1.0, 2.0]}]})
    imported = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"needs matplotlib: `pip install rdrop-keras\[plot\]`"):
        plot.compare({"a": {"loss": [1.0]}})
