"""Annotations: complete on what is public, and of use to a user's own script. `mypy` alone checks the package."""

import inspect
import os
import pathlib
import re
import subprocess
import sys

import pytest

import rdrop_keras
from rdrop_keras import monitor
from rdrop_keras.passes import report
from rdrop_keras.wrapper.wrapper_model import WrapperModel

PUBLIC = [
    *(getattr(rdrop_keras, name) for name in rdrop_keras.__all__ if name not in ("__version__", "plot")),
    rdrop_keras.plot.Clock,
    rdrop_keras.plot.compare,
    monitor.Inconsistency,
    report.Sharing,
    WrapperModel,
]
PACKAGE = str(pathlib.Path(rdrop_keras.__file__).parent)


def functions(public):
    """`(name, function)` of a public function, or of all public and special methods that a class defines."""
    if inspect.isfunction(public):
        yield public.__name__, public
    for name, value in vars(public).items() if inspect.isclass(public) else ():
        value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
        written = inspect.isfunction(value) and value.__code__.co_filename.startswith(PACKAGE)  # Not by `dataclass`.
        if written and (not name.startswith("_") or name.startswith("__")):
            yield f"{public.__name__}.{name}", value


@pytest.mark.parametrize("name, function", [pair for public in PUBLIC for pair in functions(public)])
def test_public_signatures_are_annotated(name, function):
    parameters = inspect.signature(function).parameters
    arguments = [parameter for key, parameter in parameters.items() if key not in ("self", "cls")]
    if isinstance(function, type) or name.endswith(".from_config"):
        arguments = arguments[1:]
    bare = [argument.name for argument in arguments if argument.annotation is inspect.Parameter.empty]
    # `functools.wraps` shows the signature of Keras's method.
    if not hasattr(function, "__wrapped__"):
        assert not bare and "return" in function.__annotations__


def mypy(*arguments, folder):
    """`(exit status, what mypy printed)`."""
    package = pathlib.Path(PACKAGE).parent
    installed = package.name == "site-packages"  # Where mypy finds it by itself.
    environment = {**os.environ, "MYPYPATH": "" if installed else str(package)}
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(folder / "cache"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    return result.returncode, result.stdout + result.stderr


SCRIPT = """
import keras
import numpy as np
import rdrop_keras

plain = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.1), keras.layers.Dense(3)])
schedule = keras.optimizers.schedules.ExponentialDecay(1.0, 10, 0.9)
model = rdrop_keras.RDropModel(plain, alpha=schedule, divergence={"a": rdrop_keras.Divergence("kl")}, num_passes=3)
model = rdrop_keras.RDropModel(plain, alpha=lambda step: 0.1 * step, dropout_rates=(0.1, 0.2), share="nothing")
model = rdrop_keras.RDropModel(plain, rdrop_keras.KLBudget(0.1), divergence="js", every=2, start=10, name="mine")
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
model.alpha = 2.0
monitor = rdrop_keras.InconsistencyMonitor(np.ones((4, 8)), np.zeros(4), every=2)
history = model.fit(np.ones((4, 8)), np.zeros(4), callbacks=[monitor], verbose=0)
rdrop_keras.plot.compare({"R-Drop": history, "seeds": [history, history.history]}, "runs.png").savefig("runs.pdf")
gap: float = rdrop_keras.inconsistency(model, np.ones((4, 8)), np.zeros(4)).gap.value
print(rdrop_keras.sharing(plain).summary.upper(), rdrop_keras.sharing(plain).calls[0].once)
"""
WRONG = {
    "rdrop_keras.RDropModel(plain, alhpa=1)": 'Unexpected keyword argument "alhpa" for "RDropModel"',
    "rdrop_keras.RDropModel(plain, num_passes='2')": 'Argument "num_passes" to "RDropModel" has incompatible type "str',
    "rdrop_keras.RDropModel(plain, share=3)": 'Argument "share" to "RDropModel" has incompatible type "int"',
    'rdrop_keras.RDropModel(plain, alpha="big")': 'Argument "alpha" to "RDropModel" has incompatible type "str"',
    "rdrop_keras.RDropModel(plain, divergence=1)": 'Argument "divergence" to "RDropModel" has incompatible type',
    'rdrop_keras.Divergence("lk")': 'Argument 1 to "Divergence" has incompatible type "Literal[\'lk\']"',
    "rdrop_keras.KLBudget()": 'Missing positional argument "target" in call to "KLBudget"',
    'rdrop_keras.with_dropout(plain, rate="0.1")': 'Argument "rate" to "with_dropout" has incompatible type "str"',
    'rdrop_keras.inconsistency(plain, num_passes="8")': 'Argument "num_passes" to "inconsistency" has incompat',
    "rdrop_keras.inconsistency(plain).gpa": '"Inconsistency" has no attribute "gpa"',
}


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
@pytest.mark.needs("mypy")
def test_wrong_arguments_in_a_script_are_reported(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    arguments = ["--config-file", "", "--ignore-missing-imports", str(script)]
    status, printed = mypy(*arguments, folder=tmp_path)
    assert status == 0, printed
    right = len(SCRIPT.splitlines())
    script.write_text(SCRIPT + "\n".join(WRONG) + "\n")
    status, printed = mypy(*arguments, folder=tmp_path)
    assert status == 1
    found = dict(re.findall(r"script\.py:(\d+): error: (.*?)  \[", printed))
    assert sorted(map(int, found)) == list(range(right + 1, right + 1 + len(WRONG))), printed
    for line, (code, message) in enumerate(WRONG.items(), right + 1):
        assert found[str(line)].startswith(message), (code, printed)
