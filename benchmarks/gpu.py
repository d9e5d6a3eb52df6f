"""What a training step costs on a GPU: plain training, `RDropModel` and the official snippet, in at most 8 minutes.

Each case is a process of its own (`gpu_case.py`), with a limit of its own, so that what fails costs only itself. They
compile side by side, into JAX's persistent cache, and are timed one at a time, while nothing compiles. Results are
written after each case, and the same command measures what is missing. It needs keras, keras_hub, JAX and PyTorch and
no TensorFlow; Hugging Face's models are measured where `transformers` is installed.

    python benchmarks/gpu.py                # BERT-base, ViT-B/16, GPT-2 and ResNet-50, in bfloat16
    python benchmarks/gpu.py --tiny         # all of it with small networks, on a processor
"""

import argparse
import concurrent.futures
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import measure

HERE = pathlib.Path(__file__).resolve().parent
PLAIN, DOUBLE, RDROP, HEAD, SNIPPET = "plain", "plain, 2N rows", "RDropModel", "RDropModel, head only", "two calls"
# A title and rows of a batch; sizes, and their small twins for `--tiny`.
NETWORKS = {
    "bert": {
        "title": "BERT-base, 128 tokens",
        "rows": 256,
        "sizes": {"num_layers": 12, "num_heads": 12, "width": 768, "length": 128, "vocabulary": 30_522},
        "tiny": {"num_layers": 1, "num_heads": 2, "width": 8, "length": 4, "vocabulary": 50},
    },
    "vit": {
        "title": "ViT-B/16, 224×224",
        "rows": 128,
        "sizes": {"num_layers": 12, "num_heads": 12, "width": 768, "size": 224, "patch": 16, "classes": 1000},
        "tiny": {"num_layers": 1, "num_heads": 2, "width": 8, "size": 4, "patch": 2, "classes": 10},
    },
    "gpt2": {
        "title": "GPT-2 of 6 layers, 128 tokens, 50,257 words",
        "rows": 16,
        "sizes": {"num_layers": 6, "num_heads": 12, "width": 768, "length": 128, "vocabulary": 50_257},
        "tiny": {"num_layers": 1, "num_heads": 2, "width": 8, "length": 4, "vocabulary": 50},
    },
    "resnet": {
        "title": "ResNet-50 with head dropout, 224×224",
        "rows": 128,
        "sizes": {"filters": (64, 128, 256, 512), "blocks": (3, 4, 6, 3), "size": 224, "classes": 1000},
        "tiny": {"filters": (64,), "blocks": (1,), "size": 16, "classes": 10},
    },
}
# The layer up to which head-only sharing computes once, where dropout comes after the body and in it.
LAST_OF_BODY = {"bert": "pooled_dense", "vit": "backbone"}
# The backend of each engine, and what has to be installed for it.
ENGINES = {
    "JAX": ("jax", ("jax", "keras_hub")),
    "PyTorch": ("torch", ("torch", "keras_hub")),
    "Hugging Face": ("torch", ("torch", "transformers")),
}


def cases():
    """`(network, engine, variant)` of all there is to measure; what has to compile comes first."""
    result = []
    for engine in ENGINES:
        for network in NETWORKS:
            if engine == "Hugging Face":
                variants = (PLAIN, DOUBLE, SNIPPET) if network in ("bert", "gpt2") else ()
            else:
                head = (HEAD,) if network in LAST_OF_BODY else ()
                variants = (PLAIN, DOUBLE, RDROP, *head, SNIPPET)
            result += [(network, engine, variant) for variant in variants]
    return result


def measured(case, tiny, lock, deadline):
    """What a case's process measured, or `{"error": …}`."""
    network, engine, variant = case
    backend, packages = ENGINES[engine]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        return {"error": f"{' and '.join(missing)}: not installed"}
    if time.monotonic() >= deadline:
        return {"error": "not run: the time was up"}
    command = [sys.executable, str(HERE / "gpu_case.py"), network, engine, variant, "--lock", str(lock)]
    environment = {
        "JAX_COMPILATION_CACHE_DIR": os.path.join(tempfile.gettempdir(), "rdrop_keras_gpu"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **os.environ,
        "KERAS_BACKEND": backend,
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # Those that wait leave the card's memory to the one that is timed.
    }
    if tiny:
        command.append("--tiny")
        environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    try:
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=deadline - time.monotonic()
        )
    except subprocess.TimeoutExpired:
        return {"error": "ended: the time was up"}
    if process.returncode:
        last = process.stderr.strip().splitlines()[-1:]
        return {"error": f"exit code {process.returncode}: {' '.join(last)[:300]}"}
    result = json.loads(process.stdout.splitlines()[-1])
    result["provenance"]["command"] = measure.command_line()
    return result


def print_table(results, tiny=False):
    """Steps in milliseconds and in parts of those of plain training, of one row and of two."""
    print(f"\n{'':72}{'ms':>9}{'× plain':>9}{'× 2N':>7}{'first s':>9}{'peak MiB':>10}")
    for network, engine, variant in cases():
        result = results.get(name_of((network, engine, variant)))
        title = f"small {network}" if tiny else NETWORKS[network]["title"]
        label = f"{title}, {engine}: {variant}"
        if result is None or "error" in result:
            print(f"{label:72}  {result['error'][:70] if result else 'not run'}")
            continue
        ratios = [ratio(results, result, (network, engine, yardstick)) for yardstick in (PLAIN, DOUBLE)]
        first = sum(result.get(key, 0) for key in ("seconds_to_trace", "seconds_to_compile", "seconds_of_first_step"))
        print(
            f"{label:72}{1000 * result['seconds']:9.2f}{ratios[0]:>9}{ratios[1]:>7}{first:9.1f}"
            f"{result['peak_MiB']:10.0f}"
        )


def ratio(results, result, yardstick):
    plain = results.get(name_of(yardstick), {})
    return f"{result['seconds'] / plain['seconds']:.2f}" if "seconds" in plain else ""


def name_of(case):
    network, engine, variant = case
    return f"{network} | {engine} | {variant}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small networks, on a processor")
    parser.add_argument("--minutes", type=float, default=8, help="after which what is missing is left out (8)")
    parser.add_argument("--processes", type=int, default=min(12, os.cpu_count()), help="at a time (%(default)s)")
    parser.add_argument("--out", type=pathlib.Path, help="a JSON file of the results, written after each case")
    args = parser.parse_args()
    deadline = time.monotonic() + 60 * args.minutes
    results = measure.read_runs(args.out, args.tiny) if args.out else {}
    missing = [case for case in cases() if "seconds" not in results.get(name_of(case), {})]
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.processes) as pool:
        lock = pathlib.Path(folder, "lock")
        found = {pool.submit(measured, case, args.tiny, lock, deadline): case for case in missing}
        for future in concurrent.futures.as_completed(found):
            name, result = name_of(found[future]), future.result()
            results[name] = {**result, "provenance": result.get("provenance", {"command": measure.command_line()})}
            print(f"{name}: {result.get('error') or format(1000 * result['seconds'], '.2f') + ' ms'}", flush=True)
            if args.out:
                measure.write_runs(args.out, results)
    print_table(results, args.tiny)
    failed = [name for name, result in results.items() if "not installed" not in result.get("error", "not installed")]
    sys.exit(f"These failed: {'; '.join(failed)}." if failed else 0)


if __name__ == "__main__":
    main()
