"""`benchmarks/gpu.py`: which cases there are, and what becomes of those that cannot be measured.

`.ci/run` runs all of it with `--tiny`.
"""

import sys
import time

import keras
import pytest

import gpu


def test_cases():
    cases = gpu.cases()
    assert len(set(cases)) == len(cases) == 18 + 18 + 6
    assert [case[1] for case in cases[:18]] == ["JAX"] * 18  # What compiles comes first.
    for network, engine, variant in cases:
        assert set(gpu.NETWORKS[network]["sizes"]) == set(gpu.NETWORKS[network]["tiny"])
        if engine != "Hugging Face" and variant != gpu.PLAIN:
            assert (network, engine, gpu.PLAIN) in cases
    assert ("resnet", "JAX", gpu.HEAD) not in cases  # All its dropout is in the head.


def test_what_is_not_there_is_told(monkeypatch, tmp_path):
    case, soon = ("bert", "Hugging Face", gpu.PLAIN), time.monotonic() + 60
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None if name == "transformers" else name)
    assert gpu.measured(case, True, tmp_path, soon) == {"error": "transformers: not installed"}
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: name)
    assert gpu.measured(case, True, tmp_path, time.monotonic()) == {"error": "not run: the time was up"}


@pytest.mark.backends("jax", "torch")
def test_a_processor_is_for_tiny_networks(monkeypatch, tmp_path):
    import gpu_case

    engine = {"jax": "JAX", "torch": "PyTorch"}[keras.backend.backend()]
    monkeypatch.setattr(sys, "argv", ["gpu_case.py", "bert", engine, gpu.PLAIN, "--lock", str(tmp_path / "lock")])
    with pytest.raises(RuntimeError, match=f"{engine} must find a GPU. Received: .* cores of .* `--tiny`"):
        gpu_case.main()


def test_table(capsys):
    results = {
        "vit | JAX | plain": {
            "seconds": 0.010,
            "seconds_of_first_step": 5.0,
            "seconds_to_compile": 20.0,
            "peak_MiB": 9,
        },
        "vit | JAX | plain, 2N rows": {"seconds": 0.020, "seconds_of_first_step": 5.0, "peak_MiB": 18},
        "vit | JAX | RDropModel": {"seconds": 0.021, "seconds_of_first_step": 5.0, "peak_MiB": 19},
        "bert | JAX | plain": {"error": "exit code 1: out of memory"},
    }
    gpu.print_table(results)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if "JAX: " in line]
    rows = {line[-5]: line for line in lines}
    assert rows["10.00"][-5:] == ["10.00", "1.00", "0.50", "25.0", "9"]
    assert rows["21.00"][-5:] == ["21.00", "2.10", "1.05", "5.0", "19"]
    assert any(line[-3:] == ["out", "of", "memory"] for line in lines)
