"""`benchmarks/experiment.py`: flags, resuming after a kill, the table, export, on a model of a few neurons."""

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
import measure
import toy

PROGRAMS = pathlib.Path(experiment.__file__).parent


def flags(monkeypatch, *values):
    monkeypatch.setattr(sys, "argv", ["toy.py", *map(str, values)])
    return toy.parse_arguments()


def test_compares_both_from_the_same_weights(run_example, tmp_path, capsys):
    runs = run_example(toy, "--compare", "--seeds", 2, "--out", "x.png")
    assert [(run["alpha"], run["seed"]) for run in runs] == [(None, 0), (1.0, 0), (None, 1), (1.0, 1)]
    assert all(len(run["curves"]["val_loss"]) == 2 for run in runs)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["versions"]["keras"] == keras.__version__ and results["command"].startswith(
        "python toy.py --compare"
    )
    assert (tmp_path / "x.png").stat().st_size > 10_000
    plain, rdrop = (line for line in capsys.readouterr().out.splitlines() if " ± " in line)
    accuracies = [run["scores"]["accuracy"] for run in runs[::2]]
    assert plain.startswith("plain ") and rdrop.startswith("R-Drop (alpha=1) ")
    assert plain.split()[1:4] == [f"{np.mean(accuracies):.4g}", "±", f"{np.std(accuracies, ddof=1):.2g}"]


def toy_process(*values):
    """Environment and command of the toy as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(PROGRAMS)}
    return environment, [sys.executable, toy.__file__, *map(str, values)]


@pytest.mark.slow
def test_a_kill_is_resumed(tmp_path, monkeypatch):
    """After SIGKILL in the fourth epoch the same command goes on from there, with the curves of those before."""
    environment, command = toy_process("--backup-dir", "backup", "--results", "x.json", "--epochs", 6, "--pause", 0.3)
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
@pytest.mark.needs("tensorflow")
def test_the_printed_call_of_the_export_runs(run_example, capsys):
    import tensorflow as tf

    run_example(toy, "--export", "served")
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
def test_mixed_precision(run_example):
    (run,) = run_example(toy, "--mixed-precision", "mixed_bfloat16")
    assert np.isfinite(run["curves"]["loss"]).all()


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_mirrored_strategy(run_example, monkeypatch):
    import tensorflow as tf

    strategy = tf.distribute.MirroredStrategy
    devices = ["CPU:0", "CPU:1"]
    one = tf.distribute.ReductionToOneDevice()
    monkeypatch.setattr(tf.distribute, "MirroredStrategy", lambda: strategy(devices, cross_device_ops=one))
    plain, rdrop = run_example(toy, "--strategy", "mirrored", "--compare", "--out", "x.png")
    assert rdrop["curves"]["consistency_loss"][0] > 0 and plain["curves"]["loss"][0] > 0


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_several_workers(tmp_path):
    """The first writes what all have computed; started again after a kill, all go on from its backup."""
    flags = ["--strategy", "multiworker", "--timeout", 120, "--epochs", 4, "--pause", 0.5, "--backup-dir", "backup"]
    log = tmp_path / "backup" / "rdrop-0" / "log.csv"
    for victim in (1, None):
        addresses = [f"127.0.0.1:{port}" for port in measure.free_ports(2)]
        workers = []
        for index in range(2):
            environment, command = toy_process(*flags, "--results", f"{index}.json", "--export", "served")
            task = {"type": "worker", "index": index}
            environment["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
            workers.append(
                subprocess.Popen(
                    command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
                )
            )
        if victim is not None:
            deadline = time.monotonic() + 120
            while not (log.exists() and log.read_text().count("\n") >= 3) and time.monotonic() < deadline:
                time.sleep(0.02)
            workers[victim].kill()
        outputs = [worker.communicate(timeout=240)[0].decode() for worker in workers]
        if victim is not None:
            assert all(worker.returncode for worker in workers), outputs
    assert not any(worker.returncode for worker in workers), outputs
    assert all("Epoch 1/4" not in output and "Epoch 4/4" in output for output in outputs), outputs
    (run,) = json.loads((tmp_path / "0.json").read_text())["runs"]
    assert len(run["curves"]["val_loss"]) == 4 and run["scores"]["accuracy"] > 0.5
    assert (tmp_path / "served").is_dir() and "SavedModel" in outputs[0] and "SavedModel" not in outputs[1]
    assert not (tmp_path / "1.json").exists()


def test_what_several_workers_cannot(monkeypatch, capsys):
    task = {"type": "worker", "index": 1}
    configuration = {"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}, "task": task}
    monkeypatch.setenv("TF_CONFIG", json.dumps(configuration))
    if keras.backend.backend() == "tensorflow":
        for kind in ("--plain", "--compare"):
            with pytest.raises(SystemExit):
                flags(monkeypatch, kind, "--strategy", "multiworker")
            assert "--alpha 0 is plain training that does" in capsys.readouterr().err
        args = flags(monkeypatch, "--strategy", "multiworker")
        assert (args.num_workers, args.is_chief) == (2, False)
    args = flags(monkeypatch, "--plain")
    assert (args.num_workers, args.is_chief) == (1, True)


@pytest.mark.backends("tensorflow")
def test_a_tpu_that_is_not_there(monkeypatch, capsys):
    monkeypatch.delenv("TPU_NAME", raising=False)
    with pytest.raises(SystemExit):
        experiment.prepare(flags(monkeypatch, "--strategy", "tpu"))
    assert "--strategy tpu found no TPU: " in capsys.readouterr().err


@pytest.mark.backends("tensorflow")
def test_a_tpu(monkeypatch):
    """What the flag asks TensorFlow for; of the strategy, a mirrored one takes the place."""
    import tensorflow as tf

    monkeypatch.setattr(tf.distribute.cluster_resolver.TPUClusterResolver, "connect", lambda: "resolver")
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], tf.distribute.ReductionToOneDevice())
    received = []
    monkeypatch.setattr(tf.distribute, "TPUStrategy", lambda resolver: received.append(resolver) or strategy)
    args = flags(monkeypatch, "--strategy", "tpu")
    with experiment.prepare(args)():
        assert tf.distribute.get_strategy() is strategy
    assert received == ["resolver"] and args.num_devices == 2


def test_filled_up_to_whole_batches():
    args = argparse.Namespace(batch_size=4, num_devices=2)
    x, y = {"a": np.arange(12).reshape(6, 2)}, np.arange(6.0)
    rows, labels, weights = experiment.filled(args, x, y)
    assert rows["a"].shape == (8, 2) and labels.shape == (8,)
    np.testing.assert_array_equal(rows["a"][:6], x["a"])
    assert np.mean(weights * labels) == pytest.approx(np.mean(y))
    *_, weights = experiment.filled(args, x, y, np.ones((6, 3)))
    np.testing.assert_array_equal(weights, np.repeat([1.0, 0.0], [6, 2])[:, None] * np.ones(3))
    args.num_devices = 1
    assert len(experiment.filled(args, x, y)) == 2
    args.num_devices = 3
    assert len(experiment.filled(args, {"a": x["a"][:4]}, y[:4])) == 2


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
def test_tensorboard(run_example, tmp_path):
    run_example(toy, "--tensorboard", "logs")
    assert list((tmp_path / "logs" / "rdrop-0").rglob("events*"))


def test_learning_rate_rises_and_falls_to_zero(monkeypatch):
    schedule = experiment.schedule(flags(monkeypatch, "--epochs", 5), num_rows=100)  # 30 steps, of which 3 rise.
    rates = [float(keras.ops.convert_to_numpy(schedule(step))) for step in (0, 3, 30)]
    np.testing.assert_allclose(rates, [0.0, 0.05, 0.0], atol=1e-8)


def test_rows_that_fill_no_batch_are_left_out(monkeypatch, capsys):
    args = flags(monkeypatch, "--batch-size", 30)
    x, y = experiment.whole_batches(args, {"a": toy.X}, toy.Y)
    assert x["a"].shape == (60, 4) and y.shape == (60,)
    with pytest.raises(SystemExit):
        experiment.whole_batches(flags(monkeypatch, "--batch-size", 65), toy.X)
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
