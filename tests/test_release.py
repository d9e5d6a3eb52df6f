"""What is released: the content of the wheel and of the sdist, and versions, its own and those of Keras."""

import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import zipfile

import keras
import pytest

import rdrop_keras
from rdrop_keras import _version

ROOT = pathlib.Path(__file__).parents[1]
MODULES = {str(path.relative_to(ROOT)) for path in (ROOT / "rdrop_keras").rglob("*.py")}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of a wheel and an sdist, built from a copy of the repository."""
    source, out = tmp_path_factory.mktemp("source") / "repository", tmp_path_factory.mktemp("built")
    ignored = shutil.ignore_patterns(".git", ".*cache", "__pycache__", "build", "dist", "*.egg-info", "results", "runs")
    shutil.copytree(ROOT, source, ignore=ignored)
    code = f"from setuptools import build_meta as b; b.build_wheel({str(out)!r}); b.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=source, capture_output=True)
    return out


def test_content_of_the_wheel(built):
    (wheel,) = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    info = f"rdrop_keras-{rdrop_keras.__version__}.dist-info"
    assert {name for name in names if not name.startswith(info)} == {*MODULES, "rdrop_keras/py.typed"}
    assert f"{info}/licenses/LICENSE" in names


def test_content_of_the_sdist(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*MODULES, "rdrop_keras/py.typed", "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md"} <= names
    assert {name.partition("/")[0] for name in names if "/" in name} == {"rdrop_keras", "rdrop_keras.egg-info"}


def test_version_is_the_same_everywhere():
    version = re.escape(rdrop_keras.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    (date,) = re.findall(rf"^## \[{version}\] - (\d{{4}}-\d\d-\d\d)$", changelog, re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(rf"^version: {version}$", citation, re.MULTILINE)
    assert f"date-released: {date}\n" in citation


def test_versions_of_keras_are_the_same_everywhere():
    oldest, newest = ("{}.{}".format(*version) for version in (_version.OLDEST, _version.NEWEST))
    assert f"keras>={oldest}\n" in (ROOT / "setup.cfg").read_text(encoding="utf-8")
    assert f"Keras {oldest} to {newest}" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("version", ["3.14.0", "3.15.1", "3.15.0.dev2026"])
def test_tested_versions_of_keras(monkeypatch, version):
    monkeypatch.setattr(keras, "__version__", version)
    _version.check_version()  # Warnings are errors here.


@pytest.mark.parametrize(
    "version, remedy",
    [("3.13.2", "Upgrade it"), ("3.16.0.dev0", "upgrade rdrop_keras or install a tested Keras"), ("4.0.0", "If train")],
)
def test_other_versions_of_keras(monkeypatch, version, remedy):
    monkeypatch.setattr(keras, "__version__", version)
    message = rf"with Keras 3.14 to 3.15, and Keras {version} is installed.*{remedy}.*pip install 'keras>=3.14,<3.16'"
    with pytest.warns(UserWarning, match=message):
        _version.check_version()


def test_import_warns_once_and_loads_nothing_else():
    """Beyond Keras only the package and the standard library: no matplotlib, no SciPy, no other backend."""
    code = """
    import sys
    import keras
    keras.__version__ = "3.99.0"
    before = set(sys.modules)
    import rdrop_keras
    import rdrop_keras.model
    packages = {name.partition(".")[0] for name in set(sys.modules) - before}
    assert packages - sys.stdlib_module_names == {"rdrop_keras"}, packages
    """
    command = [sys.executable, "-W", "default", "-c", textwrap.dedent(code)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    assert printed.stderr.count("rdrop_keras is tested with Keras") == 1
