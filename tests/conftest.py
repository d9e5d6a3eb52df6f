"""Which tests run, and on what: several logical CPU devices stand in for several accelerators.

Slow tests are left out unless `--slow` is given, and `--without NAME,…` leaves out those that need packages that are
not installed. A test of another backend is skipped. Any other skip fails the run.
"""

import ast
import gc
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
if os.environ["KERAS_BACKEND"] == "jax":
    # The tests spend most of their time in the compiler. Without optimization and fusion it takes a quarter of it.
    flags = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
    if tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11):
        flags.append("--xla_cpu_use_fusion_emitters=false")  # XLA ends the process for a flag that it does not know.
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags])

import keras
import pytest

BACKEND = keras.backend.backend()
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "benchmarks"))  # `cluster` imports `measure`.

if BACKEND == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 4)
    # Optimizing takes a third of the time, and is not worth it for small graphs that run a few times.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})

BACKENDS = ("tensorflow", "jax", "torch")
# The reasons for which a test may be skipped.
ALLOWED_SKIPS = re.compile(rf"for ({'|'.join(BACKENDS)})(, ({'|'.join(BACKENDS)}))*")
LEFT_OUT = pytest.StashKey()


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")
    parser.addoption(
        "--without",
        default="",
        metavar="NAME,…",
        help="leave out the tests that need these packages, by the names they are imported by",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --slow only")
    config.addinivalue_line("markers", "backends(*names): runs on these backends only")
    config.addinivalue_line("markers", "needs(*names): is left out by --without any of these packages")
    config.stash[LEFT_OUT] = {"slow": 0, "tests": 0, "files": []}


def without(config):
    return set(filter(None, config.getoption("without").split(",")))


def needs(item):
    return {name for marker in item.iter_markers("needs") for name in marker.args}


def other_backends(item):
    """The marker of a test that this backend does not run, or None."""
    return next((marker for marker in item.iter_markers("backends") if BACKEND not in marker.args), None)


def pytest_ignore_collect(collection_path, config):
    """Leaves out files that import a package of --without at their top."""
    if collection_path.suffix != ".py" or not collection_path.name.startswith("test_") or not without(config):
        return None
    imported = set()
    for node in ast.parse(collection_path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module.partition(".")[0])
    if not imported & without(config):
        return None
    config.stash[LEFT_OUT]["files"].append(str(collection_path))
    return True


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    """Reports a missing package as an error that says what to do."""
    report = yield
    advice = "Install the extra `test`: python -m pip install '.[test]'. Or leave such tests out: --without"
    if report.failed and (missing := re.search(r"ModuleNotFoundError: No module named '(\w+)", str(report.longrepr))):
        report.longrepr = f"{report.longrepr}\n{advice} {missing[1]}"
    needed = set()
    for item in report.result or ():
        if isinstance(item, pytest.Item) and not other_backends(item):
            needed |= needs(item) - without(collector.config)
    missing = sorted(name for name in needed if importlib.util.find_spec(name) is None)
    if missing:
        report.outcome, report.result = "failed", []
        report.longrepr = f"Tests in {collector.nodeid} need {', '.join(missing)}. {advice} {','.join(missing)}"
    return report


def pytest_collection_modifyitems(config, items):
    slow_too = config.getoption("slow") or "slow" in config.option.markexpr
    left_out = config.stash[LEFT_OUT]
    kept, deselected = [], []
    for item in items:
        if marker := other_backends(item):
            item.add_marker(pytest.mark.skip(reason=f"for {', '.join(marker.args)}"), append=False)
        elif needs(item) & without(config):
            left_out["tests"] += 1
            deselected.append(item)
            continue
        elif item.get_closest_marker("slow") and not slow_too:
            left_out["slow"] += 1
            deselected.append(item)
            continue
        kept.append(item)
    if deselected:
        config.hook.pytest_deselected(items=deselected)
        items[:] = kept


def skips(config):
    """`(test, reason)` of each that was skipped."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    for report in reporter.stats.get("skipped", ()) if reporter else ():
        yield report.nodeid, str(report.longrepr[2]).removeprefix("Skipped: ")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # A worker of pytest-xdist tells the process that reports.
        session.config.workeroutput["left_out"] = session.config.stash[LEFT_OUT]
    elif session.exitstatus == 0 and not all(ALLOWED_SKIPS.fullmatch(reason) for _, reason in skips(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", node.config.stash[LEFT_OUT])


def counted(number, noun):
    return f"{number} {noun}{'s' * (number != 1)}"


def pytest_terminal_summary(terminalreporter, config):
    left_out = config.stash[LEFT_OUT]
    others, parts = 0, []
    for name, reason in skips(config):
        if ALLOWED_SKIPS.fullmatch(reason):
            others += 1
        else:
            terminalreporter.write_line(f"SKIPPED, which fails the run: {name}: {reason}", red=True)
    if left_out["slow"]:
        parts.append(f"{counted(left_out['slow'], 'slow test')} (--slow runs them)")
    if others:
        names = " or ".join(name for name in BACKENDS if name != BACKEND)
        parts.append(f"{counted(others, 'test')} of other backends (KERAS_BACKEND={names})")
    if left_out["tests"] or left_out["files"]:
        names = config.getoption("without")
        files = counted(len(set(left_out["files"])), "whole file")
        parts.append(f"{counted(left_out['tests'], 'test')} and {files} for want of {names} (--without)")
    terminalreporter.write_line(f"Left out: {', '.join(parts) or 'nothing'}")


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)
    yield
    keras.config.set_dtype_policy("float32")
    gc.freeze()  # To look through all programs that are kept, again and again, takes a tenth of the time.


@pytest.fixture(autouse=True, scope="module")
def programs_let_go():
    """Lets go of the programs of a module's tests. A process has memory for so many, and JAX so many mappings of it."""
    yield
    gc.unfreeze()
    gc.collect()
    if BACKEND == "jax":
        import jax

        jax.clear_caches()
