"""One process of a `cluster.Cluster`: `python worker.py TASK JSON`. What tasks return is written as JSON."""

import contextlib
import faulthandler
import json
import os
import pathlib
import signal
import sys

import keras

from models import mlp, to_numpy
from rdrop_keras import KLBudget, RDropModel


def strategy(replicas=1, timeout=None, to_start=None):
    import tensorflow as tf

    if replicas > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=tf.distribute.experimental.CommunicationImplementation.RING, timeout_seconds=timeout
    )
    if to_start is not None:
        faulthandler.dump_traceback_later(to_start, exit=True)
    made = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    faulthandler.cancel_dump_traceback_later()
    return made


def train(options):
    """Trains the model of `split_batches.py` with validation. The chief alone writes checkpoints and exports."""
    scope = strategy(options.get("replicas", 1)).scope()
    import split_batches

    model_options = dict(options.get("model", {}))
    if "budget" in model_options:
        model_options["alpha"] = KLBudget(**model_options.pop("budget"))
    with scope:
        model = split_batches.model(**model_options)
    callbacks = [keras.callbacks.EarlyStopping("val_loss", patience=10, restore_best_weights=True)]
    if options["index"] == 0:
        callbacks.append(keras.callbacks.ModelCheckpoint(pathlib.Path(options["folder"]) / "chief.keras"))
    rows = options["rows"]
    x, y = split_batches.X[:rows], split_batches.Y[:rows]
    size = options["batch_size"]
    history, weights = split_batches.steps(model, True, x, y, batch_size=size, callbacks=callbacks)
    if options["index"] == 0:
        model.export(f"{options['folder']}/served", verbose=False)
    return {
        "history": history,
        "weights": [w.tolist() for w in weights],
        "evaluation": model.evaluate(x, y, batch_size=size, verbose=0, return_dict=True),
        "predictions": model.predict(x, batch_size=size, verbose=0).tolist(),
    }


def train_with_jax(options):
    """The same with `keras.distribution`. Each process gives its own part of each batch."""
    addresses, index = options["addresses"], options["index"]
    keras.distribution.initialize(",".join(addresses), len(addresses), index)
    import numpy as np

    import split_batches

    devices = keras.distribution.list_devices()
    if options.get("model_parallel"):
        mesh = keras.distribution.DeviceMesh(
            (len(addresses), len(devices) // len(addresses)), ("batch", "model"), devices
        )
        layouts = keras.distribution.LayoutMap(mesh)
        layouts["hidden/kernel"] = (None, "model")
        distribution = keras.distribution.ModelParallel(
            layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False
        )
    else:
        distribution = keras.distribution.DataParallel(auto_shard_dataset=False)
    keras.distribution.set_distribution(distribution)
    model = split_batches.model(**options.get("model", {}))
    rows = np.arange(16).reshape(2, len(addresses), -1)[:, index].ravel()
    history, weights = split_batches.steps(
        model, True, split_batches.X[rows], split_batches.Y[rows], split_batches.W[rows], 8 // len(addresses)
    )
    return {"history": history, "weights": [w.tolist() for w in weights], "devices": len(devices)}


class Backup(keras.callbacks.BackupAndRestore):
    """The first worker writes, and all go on from what it wrote."""

    def __init__(self, folder, writes):
        super().__init__(str(folder), double_checkpoint=True, delete_checkpoint=False)
        self.writes = writes

    def on_epoch_end(self, epoch, logs=None):
        if self.writes:
            super().on_epoch_end(epoch, logs)


class Fault(keras.callbacks.Callback):
    """Sends this process a signal in the middle of an epoch."""

    def __init__(self, epoch, signal):
        super().__init__()
        self.epoch, self.signal = epoch, signal

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch == self.epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.now and batch == 1:
            os.kill(os.getpid(), self.signal)


def kill_in_save(number):
    """Kills this process while it writes the `number`-th file of weights."""
    from keras.src.saving import saving_lib

    saves, write = [], saving_lib._save_state

    def save_state(trackable, *args, **kwargs):
        if isinstance(trackable, RDropModel):
            saves.append(trackable)
        if len(saves) == number and isinstance(trackable, keras.optimizers.Optimizer):
            os.kill(os.getpid(), signal.SIGKILL)  # The model is written and its optimizer is not.
        return write(trackable, *args, **kwargs)

    saving_lib._save_state = save_state


def resume(options):
    """Trains with everything that has state, from the backup in the folder if there is one, perhaps with a fault."""
    scope = contextlib.nullcontext()
    if len(options["addresses"]) > 1:
        scope = strategy(timeout=options.get("timeout"), to_start=options.get("to_start")).scope()
    import split_batches

    keras.utils.set_random_seed(2)
    with scope:
        model = RDropModel(mlp(rate=0.3), KLBudget(0.01, step=0.5), every=2)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    folder = pathlib.Path(options["folder"])
    callbacks = [Backup(folder / "backup", writes=options["index"] == 0)]
    fault = options.get("fault")
    if fault and fault["index"] == options["index"]:
        if "save" in fault:
            kill_in_save(fault["save"])
        else:
            callbacks.append(Fault(fault["epoch"], getattr(signal, fault["signal"])))
    history = model.fit(
        split_batches.X[:20],
        split_batches.Y[:20],
        batch_size=4,
        epochs=5,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )
    return {
        "epochs": history.epoch,
        "history": history.history,
        "weights": [to_numpy(variable).tolist() for variable in (*model.variables, *model.optimizer.variables)],
    }


def train_until_alone(options):
    """Trains forever with `keras.distribution` on JAX, until it notices within `timeout` that another is gone."""
    import jax

    jax.distributed.initialize(
        options["addresses"][0],
        len(options["addresses"]),
        options["index"],
        heartbeat_timeout_seconds=options["timeout"],
    )
    import split_batches

    keras.distribution.set_distribution(keras.distribution.DataParallel(auto_shard_dataset=False))
    callbacks = []
    if options["index"] == 1:
        callbacks.append(Fault(3, getattr(signal, options["signal"])))
    split_batches.model().fit(
        split_batches.X[:8], split_batches.Y[:8], batch_size=4, epochs=100_000, verbose=0, callbacks=callbacks
    )


if __name__ == "__main__":
    task, options = sys.argv[1], json.loads(sys.argv[2])
    result = globals()[task](options)
    path = pathlib.Path(options["folder"]) / f"{options['index']}.json"
    path.write_text(json.dumps(result))
