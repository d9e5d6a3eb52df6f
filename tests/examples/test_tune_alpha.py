"""`examples/tune_alpha.py`, two trials of two epochs."""

import re

import pytest


# KerasTuner uses names that Python deprecates.
@pytest.mark.filterwarnings("ignore:(currentThread|getName|setDaemon):DeprecationWarning")
@pytest.mark.slow
@pytest.mark.needs("keras_tuner", "sklearn")
def test_searches_and_loads_the_best(load, run):
    """Warnings are errors here, that of Keras about an optimizer's variables too."""
    printed = run(load("tune_alpha"), "--trials", 2, "--epochs", 2)
    assert printed.split("\n\n")[-2].split()[:3] == ["alpha", "dropout", "start"]
    rows = re.findall(r"^ +\d\.\d +0\.\d +0\.5 +(\d\.\d{4})$", printed, re.MULTILINE)
    assert len(rows) == 2 and rows == sorted(rows)
    assert re.search(r"on the test split: loss \d\.\d{4}, accuracy 0\.\d{4}", printed)
