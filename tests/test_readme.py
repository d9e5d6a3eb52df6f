"""The code in the README and in docstrings runs as it stands."""

import doctest
import json
import os
import pathlib
import re

import keras
import numpy as np
import pytest

import rdrop_keras

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


# KerasHub warns that positional embeddings drop masks, MirroredStrategy that there is no accelerator.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.needs("keras_hub")
def test_python_blocks_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), names)
    assert names["model"].built
    assert os.path.exists("rdrop.keras")
    assert keras.models.load_model("plain.keras").count_params() > 0


def test_two_commands():
    first, second = blocks("bash")
    assert "pip install" in first and "examples/quickstart.py" in first
    assert "pip install" in second and "pytest" in second
    # CI runs them as they stand, before anything else.
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    runs = re.findall(r"^ +- run: (.*\n)", workflow, flags=re.MULTILINE)
    assert runs == [first, second, ".ci/run\n"]
    extras = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for extra in re.findall(r"[a-z]+", ",".join(re.findall(r"\[(.*?)\]", first + second))):
        assert f"\n{extra} =" in extras


def test_files_and_names_exist():
    for path in re.findall(r"(?:\(|`)((?:examples|docs|benchmarks)/[\w./]+)(?:\)|`)", README):
        assert (ROOT / path).exists(), path
    for name in re.findall(r"rdrop_keras\.(\w+)", README):
        assert hasattr(rdrop_keras, name), name


@pytest.mark.parametrize("name", sorted(set(rdrop_keras.__all__) - {"__version__", "plot"}))
def test_docstrings(name):
    names = {"keras": keras, "np": np, "rdrop_keras": rdrop_keras}
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(rdrop_keras, name), name, globs=names)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


def test_step_times_are_those_measured():
    (path,) = (ROOT / "benchmarks" / "results").glob("step_time.json")
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    _, _, *rows = re.search(r"^\| × the time of a plain step.*?\n\n", README, re.MULTILINE | re.DOTALL)[0].split("\n")
    names = [name for name in cases["bert"]["variants"] if name != "plain"]
    for name, row in zip(names, rows):
        cells = [cell.strip() for cell in row.strip("| ").split("|")][1:]
        measured = [case["variants"].get(name) for case in cases.values()]
        assert [f"{m['ratio']:.2f}" if m else "" for m in measured][: len(cells)] == cells
