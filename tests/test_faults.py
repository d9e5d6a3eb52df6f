"""What is left when a process is killed, a worker never comes back, or the disk is full: with real processes."""

import errno
import os
import pathlib
import resource
import signal
import stat
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest

from cluster import Cluster
from models import mlp, to_numpy
from rdrop_keras import RDropModel
from rdrop_keras.wrapper import checkpoints

BACKEND = keras.backend.backend()
TIMEOUT = 20


def assert_same(result, expected):
    """Compares the logs of the epochs that both trained, and all state at the end."""
    first = result["epochs"][0]
    assert result["epochs"] == expected["epochs"][first:]
    for name, values in expected["history"].items():
        assert result["history"][name] == pytest.approx(values[first:], rel=1e-5), name
    for a, b in zip(result["weights"], expected["weights"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def killed(cluster, index, at_most=120):
    """Waits until a worker has been killed by the signal planned for it."""
    assert cluster.processes[index].wait(at_most) == -signal.SIGKILL, cluster.log(index)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs the task `resume` with that many workers and without a fault."""
    results = {}

    def run(workers):
        if workers not in results:
            with Cluster(BACKEND, workers, "resume", tmp_path_factory.mktemp("whole")) as cluster:
                results[workers] = cluster.results()
        return results[workers]

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault, first",
    [({"epoch": 2, "signal": "SIGKILL"}, 2), ({"save": 3}, 2), ({"save": 1}, 0)],
    ids=["in an epoch", "in a save", "in the first save"],
)
def test_killed_and_resumed(fault, first, uninterrupted, tmp_path):
    with Cluster(BACKEND, 1, "resume", tmp_path, fault={"index": 0, **fault}) as cluster:
        killed(cluster, 0)
    with Cluster(BACKEND, 1, "resume", tmp_path) as cluster:
        (result,) = cluster.results()
    assert result["epochs"][0] == first
    assert_same(result, uninterrupted(1)[0])


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("victim, kind", [(0, "SIGKILL"), (1, "SIGKILL"), (1, "SIGSTOP")])
def test_a_worker_that_does_not_come_back(victim, kind, uninterrupted, tmp_path):
    """The other ends with an error and does not hang. Started again, both go on from the chief's backup."""
    fault = {"index": victim, "epoch": 2, "signal": kind}
    with Cluster("tensorflow", 2, "resume", tmp_path, fault=fault, timeout=TIMEOUT) as cluster:
        if kind == "SIGKILL":
            killed(cluster, victim)
        began = time.monotonic()
        # Heartbeats and the timeout of the collective take at most that long each.
        assert cluster.processes[1 - victim].wait(4 * TIMEOUT + 60) not in (0, -signal.SIGKILL)
        assert kind == "SIGSTOP" or time.monotonic() - began < 4 * TIMEOUT
        log = cluster.log(1 - victim)
        assert "UnavailableError" in log or "DeadlineExceededError" in log, log
    with Cluster("tensorflow", 2, "resume", tmp_path) as cluster:
        results = cluster.results()
    for result, expected in zip(results, uninterrupted(2)):
        assert result["epochs"][0] == 2
        assert_same(result, expected)
    assert results[0]["weights"] == results[1]["weights"]


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
def test_a_worker_that_never_starts(tmp_path):
    """TensorFlow would wait forever. docs/distributed.md shows how to avoid that."""
    with Cluster("tensorflow", 2, "resume", tmp_path, to_start=5) as cluster:
        cluster.processes[1].kill()
        assert cluster.processes[0].wait(120) == 1
        assert "Timeout (0:00:05)!" in cluster.log(0)


@pytest.mark.slow
@pytest.mark.backends("jax")
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGSTOP"])
def test_a_process_of_jax_that_does_not_come_back(kind, tmp_path):
    with Cluster("jax", 2, "train_until_alone", tmp_path, timeout=TIMEOUT, signal=kind) as cluster:
        code = cluster.processes[0].wait(4 * TIMEOUT + 60)
        assert code not in (0, -signal.SIGKILL)
        assert "heartbeat" in cluster.log(0) or "Gloo" in cluster.log(0), cluster.log(0)


def compiled():
    model = RDropModel(mlp(inputs=50, rate=0.3), alpha=1.0)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@pytest.fixture
def full_disk():
    """Limits files to 2 kB, as on a full disk. Returns a function that makes room again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def room():
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2048, before[1]))
        return room

    yield full
    room()
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("method, name", [("save", "model.keras"), ("save_weights", "model.weights.h5")])
def test_full_disk(method, name, full_disk, tmp_path):
    x, y = np.ones((8, 50), "float32"), np.arange(8) % 3
    model = compiled()
    model.fit(x, y, epochs=2, verbose=0)
    save = getattr(model, method)
    save(tmp_path / name)
    written = (tmp_path / name).read_bytes()
    model.fit(x, y, verbose=0)
    before = [to_numpy(variable) for variable in (*model.variables, *model.optimizer.variables)]
    room = full_disk()
    with pytest.raises(OSError) as caught:
        save(tmp_path / name)
    room()
    assert caught.value.errno == errno.EFBIG or "errno = 27" in str(caught.value)
    # The old file is there and nothing else. The model is as it was, and goes on training.
    assert (tmp_path / name).read_bytes() == written
    assert [path.name for path in tmp_path.iterdir()] == [name]
    after = [to_numpy(variable) for variable in (*model.variables, *model.optimizer.variables)]
    for a, b in zip(before, after, strict=True):
        np.testing.assert_array_equal(a, b)
    model.fit(x, y, verbose=0)
    save(tmp_path / name)
    assert (tmp_path / name).read_bytes() != written


def test_refused_and_other_files_are_keras_s_to_write(tmp_path):
    model = compiled()
    with pytest.raises(ValueError, match=r"weights\.h5"):
        model.save_weights(tmp_path / "weights.txt")
    with pytest.raises(ValueError, match=r"\.keras"):
        model.save(tmp_path / "model")
    model.save(tmp_path / "folder", zipped=False)
    assert (tmp_path / "folder").is_dir()
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644])
def test_mode_of_the_file_before(mode, tmp_path):
    path = tmp_path / "model.keras"
    path.write_text("before")
    path.chmod(mode)
    with checkpoints.replacing(path, ".keras", True, []) as partial:
        # While it is written, it may be read by no one else than the file before.
        assert stat.S_IMODE(os.stat(partial).st_mode) == mode
        pathlib.Path(partial).write_text("after")
    assert path.read_text() == "after" and stat.S_IMODE(path.stat().st_mode) == mode


def test_mode_of_a_new_file(tmp_path):
    umask = os.umask(0o027)
    try:
        compiled().save(tmp_path / "model.keras")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "model.keras").stat().st_mode) == 0o640


# A process that is in the middle of a save of the file given, until it reads a line or is killed.
SAVES = """
import runpy, sys
with runpy.run_path(sys.argv[1])["replacing"](sys.argv[2], ".keras", True, []) as partial:
    open(partial, "w").write("of another process")
    print(partial, flush=True)
    sys.stdin.readline()
"""


def saving(path):
    """Such a process, and the path to which it writes."""
    arguments = [sys.executable, "-c", SAVES, checkpoints.__file__, str(path)]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, pathlib.Path(process.stdout.readline().strip())


def test_partial_files_of_processes_that_are_gone_are_removed(tmp_path):
    alive, partial = saving(tmp_path / "model.keras")
    gone, left_over = saving(tmp_path / "other.keras")
    gone.kill()
    gone.communicate()
    # Of other hosts, whose processes cannot be asked for: one that was written to today, and one that was not.
    today, yesterday = (tmp_path / f"model.partial-{number}-0123abcd-1.keras" for number in (1, 2))
    for path in (today, yesterday):
        path.write_text("")
    os.utime(yesterday, 2 * (time.time() - 25 * 3600,))
    assert left_over.exists() and partial.exists()
    compiled().save(tmp_path / "model.keras")
    assert set(tmp_path.iterdir()) == {tmp_path / "model.keras", partial, today}
    alive.communicate("go on")
    assert alive.returncode == 0
    assert (tmp_path / "model.keras").read_text() == "of another process"


def test_threads_that_save_to_one_path(tmp_path):
    """Each writes a file of its own, and the last that is whole stays."""
    path, both = tmp_path / "model.keras", threading.Barrier(2, timeout=60)
    written = []

    def save(content):
        with checkpoints.replacing(path, ".keras", True, []) as partial:
            both.wait()
            pathlib.Path(partial).write_text(content)
            both.wait()
        written.append(content)

    threads = [threading.Thread(target=save, args=(content,)) for content in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == ["first", "second"] and path.read_text() in written
    assert list(tmp_path.iterdir()) == [path]
