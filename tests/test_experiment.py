"""`examples/experiment.py`: flags, runs that resume after a kill, the table, export, with a model of a few neurons."""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import keras
import numpy as np
import pytest

import experiment
import rdrop_keras

X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")
# A whole example: what the tests import, and what they start as a process of its own.
EXAMPLE = textwrap.dedent(
    """
    import argparse, sys, time
    import keras, numpy as np
    import experiment, rdrop_keras

    X = np.random.default_rng(0).normal(size=(64, 4)).astype("float32")
    Y = (X[:, 0] > 0).astype("int32")

    class Slow(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            time.sleep(0.3)

    def train(run):
        inputs = keras.Input((4,))
        outputs = keras.layers.Dense(2)(keras.layers.Dropout(run.args.dropout)(inputs))
        model = trained = keras.Model(inputs, outputs)
        if run.alpha is not None:
            model = rdrop_keras.RDropModel(model, run.alpha)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(experiment.schedule(run.args, 64)), loss)
        model.fit(X, Y, batch_size=run.args.batch_size, epochs=run.args.epochs, validation_data=(X, Y),
                  callbacks=[*run.callbacks(), Slow()], verbose=2)
        return trained, {"accuracy": float((trained.predict(X, verbose=0).argmax(-1) == Y).mean())}

    parser = argparse.ArgumentParser(prog="toy.py")
    experiment.add_flags(parser, alpha=1.0, dropout=0.2, epochs=6, batch_size=16, learning_rate=0.05)
    args = experiment.parse(parser)
    experiment.run_all(args, experiment.prepare(args), train)
    """
)


def flags(monkeypatch, *values):
    monkeypatch.setattr(sys, "argv", ["toy.py", *map(str, values)])
    parser = argparse.ArgumentParser(prog="toy.py")
    experiment.add_flags(parser, alpha=1.0, dropout=0.2, epochs=2, batch_size=16, learning_rate=0.05)
    return experiment.parse(parser)


def train(run):
    with run.scope():
        inputs = keras.Input((4,))
        outputs = keras.layers.Dense(2)(keras.layers.Dropout(run.args.dropout)(inputs))
        model = trained = keras.Model(inputs, outputs)
        if run.alpha is not None:
            model = rdrop_keras.RDropModel(model, run.alpha)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(experiment.schedule(run.args, len(X))), loss)
    x, y = experiment.whole_batches(run.args, X, Y)
    model.fit(
        x,
        y,
        batch_size=run.args.batch_size,
        epochs=run.args.epochs,
        validation_data=(X, Y),
        callbacks=run.callbacks(),
        verbose=run.verbose,
    )
    return trained, {"accuracy": float((trained.predict(X, verbose=0).argmax(-1) == Y).mean())}


def run_all(monkeypatch, *values):
    args = flags(monkeypatch, *values)
    try:
        experiment.run_all(args, experiment.prepare(args), train)
    finally:
        keras.config.set_dtype_policy("float32")
        if keras.backend.backend() == "jax":
            keras.distribution.set_distribution(None)
    return args


def test_compares_both_from_the_same_weights(tmp_path, monkeypatch, capsys):
    run_all(monkeypatch, "--compare", "--seeds", 2, "--out", tmp_path / "x.png", "--results", tmp_path / "x.json")
    results = json.loads((tmp_path / "x.json").read_text())
    assert [(run["alpha"], run["seed"]) for run in results["runs"]] == [(None, 0), (1.0, 0), (None, 1), (1.0, 1)]
    assert all(len(run["curves"]["val_loss"]) == 2 for run in results["runs"])
    assert results["versions"]["keras"] == keras.__version__ and results["command"].startswith(
        "python toy.py --compare"
    )
    assert (tmp_path / "x.png").stat().st_size > 10_000
    plain, rdrop = (line for line in capsys.readouterr().out.splitlines() if " ± " in line)
    accuracies = [run["scores"]["accuracy"] for run in results["runs"][::2]]
    assert plain.startswith("plain ") and rdrop.startswith("R-Drop (alpha=1) ")
    assert plain.split()[1:4] == [f"{np.mean(accuracies):.4g}", "±", f"{np.std(accuracies, ddof=1):.2g}"]


def test_a_kill_is_resumed(tmp_path, monkeypatch):
    """After SIGKILL in the fourth epoch the same command goes on from there, with the curves of those before."""
    script = tmp_path / "toy.py"
    script.write_text(EXAMPLE)
    environment = {**os.environ, "PYTHONPATH": str(pathlib.Path(experiment.__file__).parent)}
    command = [sys.executable, str(script), "--backup-dir", "backup", "--results", "x.json"]
    log = tmp_path / "backup" / "rdrop-0" / "log.csv"
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.read_text().count("\n") >= 4) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.1)  # By now the backup of the epoch is written, and the example sleeps.
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = log.read_text().splitlines()
    second = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "Epoch 1/6" not in second.stdout and "Epoch 6/6" in second.stdout
    (run,) = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert len(run["curves"]["loss"]) == 6
    kept = float(before[1].split(",")[before[0].split(",").index("loss")])
    assert run["curves"]["loss"][0] == pytest.approx(kept)
    assert all(np.diff(run["curves"]["seconds"]) > 0)
    third = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "done before" in third.stdout and "Epoch" not in third.stdout
    assert json.loads((tmp_path / "x.json").read_text())["runs"] == [run]


def test_a_backup_of_other_flags_is_refused(tmp_path, monkeypatch, capsys):
    flags(monkeypatch, "--backup-dir", tmp_path / "backup")
    flags(monkeypatch, "--backup-dir", tmp_path / "backup", "--seeds", 3, "--results", tmp_path / "x.json")
    with pytest.raises(SystemExit):
        flags(monkeypatch, "--backup-dir", tmp_path / "backup", "--alpha", 2)
    assert "holds runs with --alpha 1.0. Received: 2.0. Give the same flags to resume" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.backends("tensorflow", "jax")
def test_the_printed_call_of_the_export_runs(tmp_path, monkeypatch, capsys):
    tf = pytest.importorskip("tensorflow")
    run_all(monkeypatch, "--export", tmp_path / "served")
    printed = capsys.readouterr().out.split("To load and call it:\n\n")[1]
    names = {}
    exec(textwrap.dedent(printed), names)
    assert names["outputs"].shape == (1, 2) and isinstance(names["tf"], type(tf))


@pytest.mark.backends("tensorflow", "jax")
def test_a_failed_export_keeps_the_weights(tmp_path, monkeypatch):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])

    def fails(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(model, "export", fails)
    with pytest.raises(OSError, match="No space left") as error:
        experiment.export(model, tmp_path / "served")
    assert str(tmp_path / "served.weights.h5") in error.value.__notes__[0]
    model.load_weights(tmp_path / "served.weights.h5")


@pytest.mark.slow
def test_mixed_precision(tmp_path, monkeypatch):
    run_all(monkeypatch, "--mixed-precision", "mixed_bfloat16", "--results", tmp_path / "x.json")
    assert np.isfinite(json.loads((tmp_path / "x.json").read_text())["runs"][0]["curves"]["loss"]).all()


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_mirrored_strategy(tmp_path, monkeypatch):
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy
    devices = ["CPU:0", "CPU:1"]
    one = tf.distribute.ReductionToOneDevice()
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda: strategy(devices, cross_device_ops=one))
    run_all(
        monkeypatch,
        "--strategy",
        "mirrored",
        "--compare",
        "--out",
        tmp_path / "x.png",
        "--results",
        tmp_path / "x.json",
    )
    plain, rdrop = json.loads((tmp_path / "x.json").read_text())["runs"]
    assert rdrop["curves"]["consistency_loss"][0] > 0 and plain["curves"]["loss"][0] > 0


@pytest.mark.backends("jax")
def test_jax_shares_batches_between_all_devices(monkeypatch, capsys):
    try:
        experiment.prepare(flags(monkeypatch))
        assert isinstance(keras.distribution.distribution(), keras.distribution.DataParallel)
        with pytest.raises(SystemExit):
            experiment.prepare(flags(monkeypatch, "--batch-size", 10))
        assert "--batch-size must be a multiple of the 8 devices. Received: 10" in capsys.readouterr().err
    finally:
        keras.distribution.set_distribution(None)


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_tensorboard(tmp_path, monkeypatch):
    run_all(monkeypatch, "--tensorboard", tmp_path / "logs")
    assert list((tmp_path / "logs" / "rdrop-0").rglob("events*"))


def test_learning_rate_rises_and_falls_to_zero(monkeypatch):
    schedule = experiment.schedule(flags(monkeypatch, "--epochs", 5), num_rows=100)  # 30 steps, of which 3 rise.
    rates = [float(keras.ops.convert_to_numpy(schedule(step))) for step in (0, 3, 30)]
    np.testing.assert_allclose(rates, [0.0, 0.05, 0.0], atol=1e-8)


def test_rows_that_fill_no_batch_are_left_out(monkeypatch, capsys):
    args = flags(monkeypatch, "--batch-size", 30)
    x, y = experiment.whole_batches(args, {"a": X}, Y)
    assert x["a"].shape == (60, 4) and y.shape == (60,)
    with pytest.raises(SystemExit):
        experiment.whole_batches(flags(monkeypatch, "--batch-size", 65), X)
    assert "--batch-size must be ≤ the 64 rows to train on. Received: 65" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values, message",
    [
        (("--alpha", -1), "--alpha must be a finite number ≥ 0. Received: -1.0"),
        (("--alpha", "nan"), "--alpha must be a finite number ≥ 0. Received: nan"),
        (("--dropout", 1), "--dropout must be ≥ 0 and < 1. Received: 1.0"),
        (("--dropout", 0), "--dropout must be > 0: R-Drop compares passes"),
        (("--learning-rate", 0), "--learning-rate must be a finite number > 0. Received: 0.0"),
        (("--batch-size", 0), "--batch-size must be ≥ 1. Received: 0"),
        (("--train-rows", 0), "--train-rows must be ≥ 1. Received: 0"),
        (("--plain", "--compare"), "not allowed with argument"),
        (("--out", "nowhere/x.png"), "--out must be a file in a folder that exists. Received: nowhere/x.png"),
        (("--compare", "--out", "x.txt"), "--out must end in one of ."),
        (("--results", "nowhere/x.json"), "--results must be a file in a folder that exists"),
        (("--backup-dir", __file__), "--backup-dir must be a folder. Received: "),
        (("--strategy", "many"), "invalid choice: 'many'"),
        (("--mixed-precision", "float8"), "invalid choice: 'float8'"),
    ],
    ids=lambda value: " ".join(map(str, value))[:20].replace("/", "_") if isinstance(value, tuple) else "",
)
def test_bad_flags(monkeypatch, capsys, values, message):
    with pytest.raises(SystemExit):
        flags(monkeypatch, *values)
    assert message in capsys.readouterr().err


@pytest.mark.backends("jax", "torch")
def test_strategies_are_tensorflows(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        flags(monkeypatch, "--strategy", "mirrored")
    assert "--strategy is for the TensorFlow backend" in capsys.readouterr().err


@pytest.mark.backends("torch")
def test_no_export_from_torch(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        flags(monkeypatch, "--export", "served")
    assert "--export writes a SavedModel, which Keras cannot from PyTorch" in capsys.readouterr().err


def test_what_a_missing_package_says(monkeypatch, capsys):
    monkeypatch.setattr(experiment.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        flags(monkeypatch, "--compare")
    assert "matplotlib is missing: pip install matplotlib" in capsys.readouterr().err
