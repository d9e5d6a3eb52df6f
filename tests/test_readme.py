"""The code in the README, in the pages of the site and in docstrings runs as it stands."""

import doctest
import json
import pathlib
import re

import keras
import numpy as np
import pytest

import rdrop_keras

ROOT = pathlib.Path(__file__).parents[1]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
README = PAGES["README.md"]
# Its files and commands are run by `test_distributed_docs.py`.
del PAGES["distributed.md"]


def blocks(language, page):
    return re.findall(rf"^```{language}\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL)


def run(page, names=None):
    """Runs a page's blocks of Python one after another, those of other backends left out. Returns their names."""
    names = {"__name__": "page"} if names is None else names
    for code in blocks("python", page):
        backend = re.match(r"# KERAS_BACKEND=(\w+)\n", code)
        if backend is None or backend[1] == keras.backend.backend():
            exec(compile(code, "a page", "exec"), names)
    return names


def test_readme_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run(README)
    assert names["model"].model is names["my_model"]
    assert [path.name for path in tmp_path.iterdir()] == ["trained.keras"]
    assert len(README.splitlines()) <= 100


# KerasHub warns that positional embeddings drop masks, MirroredStrategy that there is no accelerator.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
@pytest.mark.needs("keras_hub")
@pytest.mark.parametrize("name", sorted(name for name in set(PAGES) - {"README.md"} if blocks("python", PAGES[name])))
def test_pages_in_order(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(PAGES[name])
    written = {path.name for path in tmp_path.iterdir()}
    expected = {"getting-started.md": {"rdrop.keras", "plain.keras"}, "inconsistency.md": {"runs.png"}}
    assert expected.get(name, set()) <= written


def test_two_commands():
    first, second = blocks("bash", README)
    assert "pip install" in first and "examples/quickstart.py" in first
    assert "pip install" in second and "pytest" in second
    # CI runs them as they stand, before anything else, and builds the site as the README does.
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert 0 < script.index("\npaste 1 ") < script.index("\npaste 2 ") < script.index("Format, lint")
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    runs = re.findall(r"^ +- run: (.*\n)", workflow, flags=re.MULTILINE)
    site = re.findall(r"^    (python -m .*\n)", README, flags=re.MULTILINE)
    assert runs[0] == "bash .ci/run\n" and set(site) <= set(runs)
    assert site[-1] in script.replace('"$work/site/bin/python"', "python")
    extras = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for extra in re.findall(r"[a-z]+", ",".join(re.findall(r"\[(.*?)\]", first + second + "".join(site)))):
        assert f"\n{extra} =" in extras


@pytest.mark.parametrize("name", sorted(PAGES))
def test_files_and_names_exist(name):
    page = PAGES[name]
    for path in re.findall(r"(?:\(|`)((?:examples|docs|benchmarks)/[\w./-]+)(?:#[\w-]+)?(?:\)|`)", page):
        assert (ROOT / path).exists(), path
    for used in re.findall(r"rdrop_keras\.(\w+)", page):
        assert hasattr(rdrop_keras, used), used


@pytest.mark.parametrize("name", sorted(set(rdrop_keras.__all__) - {"__version__", "plot"}))
def test_docstrings(name):
    names = {"keras": keras, "np": np, "rdrop_keras": rdrop_keras}
    (test,) = doctest.DocTestFinder(recurse=False).find(getattr(rdrop_keras, name), name, globs=names)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


VARIANTS = ("plain", "plain, 2N rows", "RDropModel")


@pytest.mark.parametrize("backend", ["TensorFlow", "JAX", "PyTorch"])
def test_step_times_are_those_measured(backend):
    path = ROOT / "benchmarks" / "results" / f"step_time_{backend.lower().removeprefix('py')}.json"
    cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
    table = re.search(rf"^\| {backend}, × the time of a plain.*?\n\n", PAGES["sharing.md"], re.MULTILINE | re.DOTALL)
    _, _, *rows = table[0].rstrip().split("\n")
    names = [name for name in dict.fromkeys(n for case in cases.values() for n in case["variants"]) if name != "plain"]
    for name, row in zip(names, rows, strict=True):
        cells = [cell.strip() for cell in row.strip("| ").split("|")][1:]
        measured = [case["variants"].get(name) for case in cases.values()]
        assert [f"{m['ratio']:.2f}" if m else "" for m in measured][: len(cells)] == cells


@pytest.mark.parametrize("backend", ["TensorFlow", "JAX", "PyTorch"])
def test_steps_of_language_models_are_those_measured(backend):
    for cores in (1, 2):
        name = f"step_time_gpt2_{backend.lower().removeprefix('py')}_{cores}core{'s' * (cores > 1)}.json"
        cases = json.loads((ROOT / "benchmarks" / "results" / name).read_text(encoding="utf-8"))["cases"].values()
        ratios = [f"{case['variants']['RDropModel']['ratio_to_2N']:.2f}" for case in cases]
        assert f"\n| {backend} | {cores} | {' | '.join(ratios)} |\n" in PAGES["sharing.md"]
        if cores == 1:
            for case in cases:
                peaks = " | ".join(f"{case['variants'][name]['peak_MiB']:,}" for name in VARIANTS)
                assert f" | {peaks} | " in PAGES["sharing.md"]
