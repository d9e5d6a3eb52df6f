"""The files and commands in docs/distributed.md run as they stand."""

import os
import pathlib
import re
import subprocess
import sys

import keras
import pytest

DOCUMENT = (pathlib.Path(__file__).parents[1] / "docs" / "distributed.md").read_text(encoding="utf-8")
BACKEND = keras.backend.backend()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", DOCUMENT, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [block for block in blocks("bash") if f"KERAS_BACKEND={BACKEND}" in block]


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
@pytest.mark.parametrize("command", COMMANDS, ids=[re.search(r"(\w+)\.py", block)[1] for block in COMMANDS])
def test_commands(command, tmp_path):
    for code in blocks("python"):
        (tmp_path / re.match(r"# (\w+\.py)\n", code)[1]).write_text(code, encoding="utf-8")
    # The same Python that runs the tests, even if its environment is not activated.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "TF_CONFIG")}
    environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    result = subprocess.run(
        ["bash", "-ec", command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Epoch 2/2" in result.stdout and "consistency_loss" in result.stdout
    assert "Traceback" not in result.stderr, result.stderr


@pytest.mark.backends("torch")
def test_torch_s_error_is_the_one_in_the_document():
    with pytest.raises(AttributeError) as caught:
        keras.distribution.DataParallel()
    assert f"AttributeError: {caught.value}" in DOCUMENT
