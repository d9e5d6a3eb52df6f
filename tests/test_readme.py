"""The code in the README and in docstrings runs as it stands."""

import doctest
import importlib
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import keras
import numpy as np
import pytest

import rdrop_keras

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


# KerasHub warns of positional embeddings that drop masks, MirroredStrategy of the lack of accelerators.
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
    first, second, _ = blocks("bash")
    assert "pip install" in first and "examples/quickstart.py" in first
    assert "pip install" in second and "pytest" in second
    # Whole, and before anything else.
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    runs = re.findall(r"^ +- run: (.*\n)", workflow, flags=re.MULTILINE)
    assert runs == [first, second, ".ci/run\n"]
    extras = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for extra in re.findall(r"[a-z]+", ",".join(re.findall(r"\[(.*?)\]", first + second))):
        assert f"\n{extra} =" in extras


@pytest.mark.backends("tensorflow")
@pytest.mark.needs("keras_hub")
def test_commands_of_the_examples(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    change, *lines = blocks("bash")[2].splitlines()
    assert change == "cd benchmarks"
    commands = [shlex.split(line, comments=True) for line in lines]
    assert len(commands) >= 3
    for python, script, *flags in commands:
        assert python == "python"
        monkeypatch.setattr("sys.argv", [script, *flags])
        importlib.import_module(pathlib.Path(script).stem).parse_arguments()


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


@pytest.mark.parametrize(
    "name, measure, digits", [("studies", "test accuracy", 3), ("studies_translation", "test BLEU", 2)]
)
def test_studies_are_those_measured(name, measure, digits):
    text = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
    runs = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))["runs"]
    tables = [table.splitlines() for table in re.findall(rf"^\| \| {measure} .*?\n\n", text, re.MULTILINE | re.DOTALL)]
    rows = [row.strip("| ").split(" | ") for table in tables for row in table[2:] if row]
    assert {row[0] for row in rows} == set(runs)
    for variant, *cells in rows:
        values = [result[measure] for result in runs[variant]["steps"].values()]
        deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        assert cells[0] == f"{np.mean(values):.{digits}f}{deviation}"
        if variant != "plain":
            values = [result[measure] for result in runs[variant]["seconds"].values()]
            assert cells[3].startswith(f"{np.mean(values):.{digits}f}")


def test_step_times_are_those_measured():
    (path,) = (ROOT / "benchmarks" / "results").glob("step_time.json")
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    _, _, *rows = re.search(r"^\| × the time of a plain step.*?\n\n", README, re.MULTILINE | re.DOTALL)[0].split("\n")
    names = [name for name in cases["bert"]["variants"] if name != "plain"]
    for name, row in zip(names, rows):
        cells = [cell.strip() for cell in row.strip("| ").split("|")][1:]
        measured = [case["variants"].get(name) for case in cases.values()]
        assert [f"{m['ratio']:.2f}" if m else "" for m in measured][: len(cells)] == cells


def test_tasks_are_those_measured():
    """The table is what `python benchmarks/tasks.py --table` prints."""
    path = ROOT / "benchmarks" / "tasks.py"
    command = [sys.executable, path, "--table"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    assert len(printed.splitlines()) > 2 and printed in README
