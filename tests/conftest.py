"""Several logical CPU devices stand in for several accelerators; set before a backend starts."""

import json
import os
import pathlib
import sys

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if os.environ["KERAS_BACKEND"] == "jax":
    # The tests spend most of their time in the compiler: machine code that is not optimized halves it.
    flags = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

import keras
import pytest

BACKEND = keras.backend.backend()
PROGRAMS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(PROGRAMS))

if BACKEND == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds")
    config.addinivalue_line("markers", "backends(*names): runs on these backends only")


def pytest_collection_modifyitems(items):
    for item in items:
        for marker in item.iter_markers("backends"):
            if BACKEND not in marker.args:
                item.add_marker(pytest.mark.skip(reason=f"for {', '.join(marker.args)}"))


@pytest.fixture
def run_example(tmp_path, monkeypatch):
    """Runs `main()` of a program with flags, as on a command line. Returns what `--results` says of the runs."""

    def run(module, *flags):
        results = tmp_path / "results.json"
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, flags), "--results", str(results)])
        try:
            module.main()
        finally:
            keras.config.set_dtype_policy("float32")
            if BACKEND == "jax":
                keras.distribution.set_distribution(None)
        return json.loads(results.read_text(encoding="utf-8"))["runs"]

    return run


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
