"""Several processes of one training run, on 127.0.0.1, which stand in for several hosts."""

import json
import os
import pathlib
import subprocess
import sys

import measure

WORKER = pathlib.Path(__file__).parent / "worker.py"


class Cluster:
    """Processes of `worker.py`, one for each worker. The context manager leaves none behind.

    Args:
        backend: `"tensorflow"`, whose workers find each other by `TF_CONFIG`, or `"jax"`.
        size: Number of workers.
        task: The function of `worker.py` that they run.
        folder: Where the i-th writes `i.json`, its result, and `i.log`.
        options: Given to the task.
    """

    def __init__(self, backend, size, task, folder, **options):
        self.folder = folder
        folder.mkdir(exist_ok=True, parents=True)
        addresses = [f"127.0.0.1:{port}" for port in measure.free_ports(size)]
        self.processes = []
        for i in range(size):
            (folder / f"{i}.json").unlink(missing_ok=True)
            environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
            environment |= {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1"}
            if backend == "jax":
                environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.get('replicas', 1)}"
            if backend == "tensorflow":
                environment["TF_CONFIG"] = json.dumps(
                    {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": i}}
                )
            flags = json.dumps({"addresses": addresses, "index": i, "folder": str(folder), **options})
            with open(folder / f"{i}.log", "w") as log:
                self.processes.append(
                    subprocess.Popen([sys.executable, WORKER, task, flags], env=environment, stdout=log, stderr=log)
                )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self.processes:
            process.kill()
            process.wait()

    def log(self, i):
        return (self.folder / f"{i}.log").read_text(errors="replace")

    def results(self, timeout=240):
        """Waits for all workers. Returns what each returned."""
        for i, process in enumerate(self.processes):
            code = process.wait(timeout)
            assert code == 0, f"worker {i} ended with {code}:\n{self.log(i)[-6000:]}"
        return [json.loads((self.folder / f"{i}.json").read_text()) for i in range(len(self.processes))]
