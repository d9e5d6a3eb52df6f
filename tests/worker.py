"""What one process of a `cluster.Cluster` does: `python worker.py TASK JSON`. Tasks return what can be JSON."""

import json
import pathlib
import sys

import keras


def strategy(replicas=1, timeout=None):
    import tensorflow as tf

    if replicas > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)
    options = tf.distribute.experimental.CommunicationOptions(
        implementation=tf.distribute.experimental.CommunicationImplementation.RING, timeout_seconds=timeout
    )
    return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)


def train(options):
    """Trains the model of `test_distribution.py`, with validation, and with checkpoints by the chief alone."""
    scope = strategy(options.get("replicas", 1)).scope()
    import test_distribution as tests

    model_options = dict(options.get("model", {}))
    if "budget" in model_options:
        model_options["alpha"] = tests.KLBudget(**model_options.pop("budget"))
    with scope:
        model = tests.model(**model_options)
    callbacks = [keras.callbacks.EarlyStopping("val_loss", patience=10, restore_best_weights=True)]
    if options["index"] == 0:
        callbacks.append(keras.callbacks.ModelCheckpoint(pathlib.Path(options["folder"]) / "chief.keras"))
    rows = options["rows"]
    x, y = tests.X[:rows], tests.Y[:rows]
    size = options["batch_size"]
    history, weights = tests.steps(model, True, x, y, batch_size=size, callbacks=callbacks)
    return {
        "history": history,
        "weights": [w.tolist() for w in weights],
        "evaluation": model.evaluate(x, y, batch_size=size, verbose=0, return_dict=True),
        "predictions": model.predict(x, batch_size=size, verbose=0).tolist(),
    }


def train_with_jax(options):
    """The same with `keras.distribution`; each process gives its own part of each batch."""
    addresses, index = options["addresses"], options["index"]
    keras.distribution.initialize(",".join(addresses), len(addresses), index)
    import numpy as np
    import test_distribution as tests

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
    model = tests.model(**options.get("model", {}))
    rows = np.arange(16).reshape(2, len(addresses), -1)[:, index].ravel()
    history, weights = tests.steps(model, True, tests.X[rows], tests.Y[rows], tests.W[rows], 8 // len(addresses))
    return {"history": history, "weights": [w.tolist() for w in weights], "devices": len(devices)}


if __name__ == "__main__":
    task, options = sys.argv[1], json.loads(sys.argv[2])
    result = globals()[task](options)
    path = pathlib.Path(options["folder"]) / f"{options['index']}.json"
    path.write_text(json.dumps(result))
