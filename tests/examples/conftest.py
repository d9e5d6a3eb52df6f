"""Tutorials as modules, with constants so small that each runs in seconds."""

import importlib.util
import pathlib
import re
import sys

import keras
import pytest

EXAMPLES = pathlib.Path(__file__).resolve().parents[2] / "examples"
TEXT_MODEL = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32}
CONSTANTS = {
    "tune_alpha": {"STARTS": (0.5,)},
    "glue": {
        "SMALL": {**TEXT_MODEL, "dropout": 0.1},
        "BATCH_SIZE": 16,
        "SEQUENCE_LENGTH": 12,
        "SMALL_LEARNING_RATE": 1e-2,
    },
    "vit_cifar100": {
        "SMALL": {"patch_size": 4, "num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32},
        "BATCH_SIZE": 16,
        "SMALL_IMAGE_SIZE": 8,
        "SMALL_LEARNING_RATE": 1e-2,
    },
    "translation": {
        "SMALL": {**TEXT_MODEL, "dropout": 0.1},
        "BATCH_SIZE": 8,
        "MAX_LENGTH": 12,
        "SMALL_VOCABULARY_SIZE": 300,
    },
    "language_model": {
        "SMALL": TEXT_MODEL,
        "BATCH_SIZE": 8,
        "WORDS": 8,
        "SEQUENCE_LENGTH": 24,
        "SMALL_VOCABULARY_SIZE": 300,
    },
    "summarization": {
        "SMALL": TEXT_MODEL,
        "BATCH_SIZE": 8,
        "SMALL_DOCUMENT_LENGTH": 16,
        "SMALL_SUMMARY_LENGTH": 12,
        "SMALL_VOCABULARY_SIZE": 300,
    },
}


@pytest.fixture
def load(monkeypatch):
    """Imports a tutorial anew, under a name that no other module has."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"tutorial_{name}", EXAMPLES / f"{name}.py")
        tutorial = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, tutorial)  # TensorFlow looks up the source of functions there.
        spec.loader.exec_module(tutorial)
        for constant, value in CONSTANTS[name].items():
            assert hasattr(tutorial, constant)
            monkeypatch.setattr(tutorial, constant, value)
        return tutorial

    yield load
    if keras.backend.backend() == "jax":
        keras.distribution.set_distribution(None)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a tutorial as on a command line. Returns what it printed."""

    def run(tutorial, *flags):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [tutorial.__name__, *map(str, flags)])
        tutorial.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def difference():
    """Returns the printed difference between the outputs of the model and of the loaded one."""

    def difference(printed):
        return float(re.search(r"differ by at most (\S+)\.\n", printed)[1])

    return difference
