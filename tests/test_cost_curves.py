"""`benchmarks/cost_curves.py`, with the smallest sizes."""

import sys

import pytest

import cost_curves

pytestmark = pytest.mark.needs("keras_hub")


@pytest.mark.slow
@pytest.mark.backends("jax")  # What differs between backends is in `step_time.py`.
def test_measures_and_draws(tmp_path, monkeypatch, capsys):
    sizes = {"rows": (2, 4), "length": (4,), "classes": (10,), "passes": (2, 3)}
    monkeypatch.setattr(cost_curves, "SIZES", sizes)
    monkeypatch.setattr(cost_curves, "USUAL", {"rows": 2, "length": 4, "classes": 10, "passes": 2})
    monkeypatch.setattr("step_time.SECONDS_OF_A_TURN", 0.0)
    path, picture = tmp_path / "curves.json", tmp_path / "curves.png"

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["cost_curves.py", *map(str, flags)])
        cost_curves.main()

    run("--rounds", "2", "--out", path)
    result = cost_curves.measure.read(path, None)
    assert {size: tuple(map(int, curve)) for size, curve in result["sizes"].items()} == sizes
    assert all(
        ratio > 0 for curve in result["sizes"].values() for ratios in curve.values() for ratio in ratios.values()
    )
    run("--picture", picture, path)
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        run("--picture", picture)
    assert "needs the JSON files" in capsys.readouterr().err
