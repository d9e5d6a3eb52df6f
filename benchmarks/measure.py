"""What every script here does with what it has measured: where it came from, keeping it, and means over runs.

It imports no backend: `step_time.py` and `scaling.py` choose theirs in processes of their own.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import socket
import statistics
import sys

PACKAGES = ("jax", "keras", "keras-hub", "numpy", "tensorflow", "torch", "transformers")
DEPTH_OF_A_RUN = 2  # A run has numbers, and lists and objects of them.


def provenance(shown=()):
    """What a number needs beside it: command, versions, hardware.

    Args:
        shown: As for `command_line`.
    """
    # `keras_hub` is imported where a package of another name gave it, such as its nightly build.
    imported = [package for package in PACKAGES if sys.modules.get(package.replace("-", "_"))]
    return {
        "command": command_line(shown),
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in imported}},
        "hardware": hardware(),
    }


def command_line(shown=()):
    """What started this process.

    Args:
        shown: `(value, what to write in its place)` of arguments that say where files are on this machine.
    """
    command = " ".join(["python", _script(), *sys.argv[1:]])
    for value, name in shown:
        command = command.replace(str(value), name)
    return command


def hardware():
    """The accelerators of JAX or PyTorch, or the cores that this process may use."""
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():  # First, since Keras may have imported JAX without using it.
        return f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
    if jax is not None and jax.default_backend() != "cpu":
        devices = jax.local_devices()
        return f"{len(devices)} × {devices[0].device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} of {os.cpu_count()} cores of {_processor()}"


def write(path, content):
    """Writes `content` as JSON, whole or not at all; a run, or what else is no deeper than one, is one line."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(_json(content) + "\n", encoding="utf-8")
    temporary.replace(path)


def read(path, default):
    """What `write` wrote, or `default` if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def write_runs(path, runs):
    """Writes `{name: run}`, sorted, with each provenance once; a run refers to its own by number."""
    sources, lines = [], {}
    for name, run in sorted(runs.items()):
        if run["provenance"] not in sources:
            sources.append(run["provenance"])
        lines[name] = {**run, "provenance": str(sources.index(run["provenance"]))}
    write(path, {"provenance": {str(i): source for i, source in enumerate(sources)}, "runs": lines})


def read_runs(path, tiny=False):
    """What `write_runs` wrote, each run with its provenance: those of `--tiny`, or all others. No runs of no file."""
    content = read(path, {"provenance": {}, "runs": {}})
    sources = {key: source for key, source in content["provenance"].items() if ("--tiny" in source["command"]) == tiny}
    runs = content["runs"].items()
    return {
        name: {**run, "provenance": sources[run["provenance"]]} for name, run in runs if run["provenance"] in sources
    }


def rounded(value):
    """Five digits of a number, or of each in a list."""
    return [rounded(each) for each in value] if isinstance(value, list) else float(f"{value:.5g}")


def mean_and_deviation(values, mean_format, deviation_format=None):
    """`"0.931 ± 0.002"`, the mean and sample standard deviation; the mean alone of one value, nothing of none."""
    if not values:
        return ""
    mean = format(statistics.mean(values), mean_format)
    if len(values) == 1:
        return mean
    return f"{mean} ± {format(statistics.stdev(values), deviation_format or mean_format)}"


def free_ports(number):
    """Ports of this machine that nothing listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _json(value, indent=""):
    """`value` as JSON, with the parts of each object that is deeper than a run on lines of their own."""
    if not isinstance(value, dict) or _depth(value) <= DEPTH_OF_A_RUN:
        return json.dumps(value, ensure_ascii=False)
    lines = [
        f"{indent} {json.dumps(key, ensure_ascii=False)}: {_json(part, indent + ' ')}" for key, part in value.items()
    ]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _depth(value):
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(_depth, parts), default=0)


def _script():
    """The path of the script that runs, as a reader in the repository's root gives it."""
    root = pathlib.Path(__file__).resolve().parents[1]
    path = pathlib.Path(sys.argv[0]).resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _version(package):
    module = sys.modules[package.replace("-", "_")]
    return getattr(module, "__version__", None) or importlib.metadata.version(package)


def _processor():
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
