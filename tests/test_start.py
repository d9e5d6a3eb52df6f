"""R-Drop that starts late: what comes before is plain training, and what follows goes on from there."""

import csv

import keras
import numpy as np
import pytest
from keras import layers, ops

from marks import slow
from models import mlp, to_numpy
from rdrop_keras import KLBudget, RDropModel
from rdrop_keras.wrapper import random_state

X = np.random.RandomState(0).normal(size=(44, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32") + (X[:, 2] > 1)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
BACKEND = keras.backend.backend()
STEPS = 6  # Of an epoch of batches of 8, of which the last has 4 rows.


def regularized():
    return keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(16, activation="relu", kernel_regularizer="l2"),
            layers.BatchNormalization(),
            layers.Dropout(0.3),
            layers.Dense(3),
        ]
    )


MODELS = {"regularized": regularized, "seeded": lambda: mlp(rate=0.3)}


def trained(
    make=mlp, epochs=1, policy="float32", jit=BACKEND == "jax", callbacks=None, steps_per_execution=1, **kwargs
):
    """A model trained on X in order, and its history. What is random starts from one seed."""
    keras.utils.set_random_seed(3)
    keras.config.set_dtype_policy(policy)
    inner = make()
    inner(X[:1])
    model = RDropModel(inner, **kwargs)
    schedule = keras.optimizers.schedules.CosineDecay(0.05, 20)
    options = {"steps_per_execution": steps_per_execution, "jit_compile": jit}
    model.compile(keras.optimizers.Adam(schedule), LOSS, metrics=["accuracy"], **options)
    history = model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks).history
    return model, history


def assert_close(first, second):
    """That weights, optimizers and random generators of two models are the same, up to rounding."""
    for a, b in zip(first.model.variables, second.model.variables, strict=True):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-4, atol=1e-6, err_msg=a.path)
    for a, b in zip(first.optimizer.variables, second.optimizer.variables, strict=True):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-4, atol=1e-6, err_msg=a.path)


def fixed_masks(monkeypatch):
    """On PyTorch plain training draws from the generator of the process, and a wrapper's steps from its own seed."""
    if BACKEND == "torch":
        monkeypatch.setattr(random_state, "torch_seed", lambda: None)


@pytest.mark.parametrize("name", [slow("regularized"), "seeded"])
def test_plain_until_then(name, monkeypatch):
    fixed_masks(monkeypatch)
    plain, expected = trained(MODELS[name], alpha=0)
    model, history = trained(MODELS[name], alpha=2.0, start=STEPS)
    assert_close(model, plain)
    np.testing.assert_allclose(history["loss"], expected["loss"], rtol=1e-5)
    assert history["accuracy"] == expected["accuracy"]
    assert np.isnan(history["consistency_loss"]).all()


def test_float16_with_loss_scaling(monkeypatch):
    fixed_masks(monkeypatch)
    plain, _ = trained(policy="mixed_float16", alpha=0)
    model, _ = trained(policy="mixed_float16", alpha=2.0, start=STEPS)
    assert_close(model, plain)


def test_every_counts_from_there():
    model, _ = trained(alpha=2.0, start=4, every=3)
    assert [model.passes_of_step(number) for number in range(11)] == [1, 1, 1, 1, 2, 1, 1, 2, 1, 1, 2]
    history = model.fit(X[:8], Y[:8], batch_size=8, epochs=5, initial_epoch=0, verbose=0).history  # Steps 6 to 10.
    assert (np.array(history["consistency_loss"]) > 0).tolist() == [False, True, False, False, True]
    assert np.isnan(history["consistency_loss"]).tolist() == [True, False, True, True, False]


def test_r_drop_goes_on_from_there():
    """From the same weights and generators, the step after the start is the step of a model that begins with it."""
    model, _ = trained(alpha=2.0, start=STEPS)
    other, _ = trained(alpha=0)
    other = RDropModel(other.model, alpha=2.0)
    other.compile(keras.optimizers.SGD(0.1), LOSS)
    model.compile(keras.optimizers.SGD(0.1), LOSS)
    histories = []
    for each in (model, other):
        # The two share no layers, and on PyTorch each starts a generator of its own from that of the process.
        keras.utils.set_random_seed(4)
        histories.append(each.fit(X, Y, batch_size=8, shuffle=False, verbose=0).history)
    np.testing.assert_allclose(histories[0]["loss"], histories[1]["loss"], rtol=1e-6)
    np.testing.assert_allclose(histories[0]["consistency_loss"], histories[1]["consistency_loss"], rtol=1e-6)


def test_count_goes_on_in_files(tmp_path):
    model, _ = trained(alpha=2.0, start=8)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.start == 8 and again._num_steps == STEPS
    for each in (model, again):
        history = each.fit(X[:8], Y[:8], batch_size=8, epochs=4, verbose=0).history
        assert np.isnan(history["consistency_loss"]).tolist() == [True, True, False, False]


def test_backup_and_restore(tmp_path):
    """Training that was interrupted before the start ends as training that was not."""

    class Interrupt(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    # On PyTorch the dropout of this model draws from the generator of the process, which is in no file.
    options = {"make": regularized, "epochs": 3, "alpha": 2.0, "start": 9}
    expected, history = trained(**options)
    with pytest.raises(KeyboardInterrupt):
        trained(**options, callbacks=[keras.callbacks.BackupAndRestore(tmp_path), Interrupt()])
    model, rest = trained(**options, callbacks=[keras.callbacks.BackupAndRestore(tmp_path)])
    assert model._num_steps == expected._num_steps == 3 * STEPS
    np.testing.assert_allclose(rest["loss"], history["loss"][1:], rtol=1e-6)
    assert_close(model, expected)


def test_callbacks_bear_epochs_without_r_drop(tmp_path):
    callbacks = [
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.EarlyStopping("consistency_loss", mode="min", patience=5),
        keras.callbacks.ReduceLROnPlateau("val_loss", patience=1),
        keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", "val_loss", save_best_only=True),
        keras.callbacks.TerminateOnNaN(),
    ]
    keras.utils.set_random_seed(3)
    model = RDropModel(mlp(rate=0.3), alpha=2.0, start=2 * STEPS)
    model.compile("adam", LOSS, jit_compile=BACKEND == "jax")
    history = model.fit(X, Y, batch_size=8, epochs=4, verbose=0, callbacks=callbacks, validation_data=(X, Y)).history
    with open(tmp_path / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(history["loss"]) == len(rows) == 4
    assert [float(row["consistency_loss"]) > 0 for row in rows] == [False, False, True, True]
    assert [row["consistency_loss"] for row in rows[:2]] == ["nan", "nan"]
    np.testing.assert_allclose(
        history["loss"], np.array(history["task_loss"]) + np.nan_to_num(history["consistency_loss"]), rtol=1e-5
    )


@pytest.mark.needs("tensorflow", "tensorboard")
def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing import event_accumulator

    callback = keras.callbacks.TensorBoard(tmp_path)
    trained(epochs=2, alpha=2.0, start=STEPS, callbacks=[callback])
    accumulator = event_accumulator.EventAccumulator(str(tmp_path / "train"))
    accumulator.Reload()
    import tensorflow as tf

    values = [float(tf.make_ndarray(event.tensor_proto)) for event in accumulator.Tensors("epoch_consistency_loss")]
    assert np.isnan(values[0]) and values[1] > 0


def test_alpha_that_moves():
    """A schedule counts plain steps too; a budget moves in steps of R-Drop alone."""
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([5, 8], [0.0, 1.0, 3.0])
    _, history = trained(epochs=2, alpha=schedule, start=STEPS)
    assert np.isnan(history["alpha"][0])
    np.testing.assert_allclose(history["alpha"][1], (3 * 1.0 + 3 * 3.0) / 6)
    model, history = trained(epochs=2, alpha=KLBudget(0.01, step=0.5, initial=2.0), start=STEPS)
    assert np.isnan(history["alpha"][0]) and history["alpha"][1] > 2
    model = RDropModel(mlp(), KLBudget(0.01), start=10)
    model.compile("adam", LOSS)
    model.fit(X, Y, batch_size=8, verbose=0)
    assert float(ops.convert_to_numpy(model._alpha.current())) == 1.0


@pytest.mark.slow
@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("options", [{"run_eagerly": True}, {"mirrored": 2}])
def test_on_tensorflow(options):
    """In every way in which Keras runs a step, on replicas too, whose last batch of an epoch is dealt unevenly."""
    import tensorflow as tf

    options = dict(options)
    results = []
    for arguments in ({"alpha": 0}, {"alpha": 2.0, "start": STEPS}):
        strategy = tf.distribute.get_strategy()
        if options.get("mirrored"):
            one = tf.distribute.ReductionToOneDevice()
            strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=one)
        keras.utils.set_random_seed(5)
        with strategy.scope():
            # Replicas of a wrapper draw masks of their own, those of plain training the same: here masks change little.
            model = RDropModel(mlp(rate=1e-7), **arguments)
            model.compile(keras.optimizers.SGD(0.05), LOSS, **{k: v for k, v in options.items() if k != "mirrored"})
        model.fit(X[:40], Y[:40], batch_size=8, shuffle=False, verbose=0)
        results.append(model)
    for a, b in zip(*(model.weights for model in results)):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-4, atol=1e-6)
    with pytest.warns(UserWarning, match="The passes of R-Drop did not differ"):  # Such is the dropout here.
        history = model.fit(X, Y, batch_size=8, epochs=2, verbose=0).history
    assert history["consistency_loss"][1] == 0  # That of plain steps is NaN.


@pytest.mark.backends("jax")
def test_data_parallel():
    import jax

    distribution = keras.distribution.DataParallel(devices=jax.devices()[:2], auto_shard_dataset=False)
    keras.distribution.set_distribution(distribution)
    try:
        plain, model = trained(alpha=0)[0], trained(alpha=2.0, start=STEPS)[0]
        assert_close(model, plain)
        assert model.fit(X[:40], Y[:40], batch_size=8, verbose=0).history["consistency_loss"][0] > 0
    finally:
        keras.distribution.set_distribution(None)


def test_errors():
    for value in (-1, float("nan")):
        with pytest.raises((ValueError, TypeError), match=r"`start` must be an integer ≥ 0. Received: start="):
            RDropModel(mlp(), start=value)
    for value in (1.5, True, "2", None):
        with pytest.raises(TypeError, match=r"`start` must be an integer ≥ 0"):
            RDropModel(mlp(), start=value)
    model = RDropModel(mlp(), start=np.int64(3))
    assert model.get_config()["start"] == 3
    with pytest.raises(AttributeError, match=r"`start` of this RDropModel is fixed"):
        model.start = 5
    for arguments in ({"start": 3}, {"every": 2}):
        with pytest.raises(ValueError, match=r"`steps_per_execution` must be 1: .*start=., steps_per_execution=2"):
            RDropModel(mlp(), **arguments).compile("sgd", LOSS, steps_per_execution=2)
