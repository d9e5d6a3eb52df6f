"""Tutorials that run whole, with other constants, on prepared data and presets in folders made here.

tensorflow-datasets reads its own format under its own names, and KerasHub loads presets that it has saved. So each line
that a user with a network runs is run, and only the download is not.
"""

import importlib.util
import pathlib
import re
import sys

import keras
import numpy as np
import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight"]


@pytest.fixture
def run_page(tmp_path, monkeypatch, capsys):
    """Runs a tutorial with some of its constants replaced. Returns its variables and what it printed."""

    def run_page(name, **constants):
        source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        for constant, value in constants.items():
            line = f"{constant} = {value!r}"
            source, number = re.subn(rf"^{constant} = .*$", line, source, flags=re.MULTILINE)
            assert number == 1
        path = tmp_path / f"{name}.py"
        path.write_text(source, encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        spec = importlib.util.spec_from_file_location(f"tutorial_{name}", path)
        page = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, page)  # TensorFlow looks up the source of functions there.
        spec.loader.exec_module(page)
        return page, capsys.readouterr().out

    yield run_page
    if keras.backend.backend() == "jax":
        keras.distribution.set_distribution(None)


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Writes columns as the prepared data of a dataset, and makes the folder tensorflow-datasets' default one."""
    import tensorflow as tf
    import tensorflow_datasets as tfds

    folder = tmp_path / "tensorflow_datasets"
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(folder))

    def prepare(name, splits, columns):
        builder = tfds.builder(name, data_dir=folder)
        assert set(columns(2)) == set(builder.info.features)
        tfds.dataset_builders.store_as_tfds_dataset(
            name=builder.name,
            config=builder.builder_config and builder.builder_config.name,
            version=str(builder.version),
            data_dir=folder,
            features=builder.info.features,
            split_datasets={split: tf.data.Dataset.from_tensor_slices(columns(rows)) for split, rows in splits.items()},
        )

    return prepare


@pytest.fixture
def preset(tmp_path):
    """Saves parts of a KerasHub task as a preset. Returns its folder."""

    def preset(*parts):
        for part in parts:
            part.save_to_preset(tmp_path / "preset")
        return str(tmp_path / "preset")

    return preset


@pytest.fixture
def sentences():
    """Returns random sentences of a few words."""
    rng = np.random.default_rng(0)
    return lambda rows, words=6: [" ".join(rng.choice(WORDS, size=words)) for _ in range(rows)]
