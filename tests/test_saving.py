"""Files: loading and going on, weights, configuration, export."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import warnings

import keras
import numpy as np
import pytest
from keras import layers, losses, ops

from marks import serves, slow
from models import mlp, to_numpy
from rdrop_keras import Divergence, RDropModel

BACKEND = keras.backend.backend()
X = np.random.RandomState(0).normal(size=(40, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32") + (X[:, 2] > 1)


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense, self.dropout, self.head = layers.Dense(units), layers.Dropout(0.3), layers.Dense(3)

    def call(self, inputs, training=None):
        return self.head(self.dropout(self.dense(inputs), training=training))

    def get_config(self):
        return {"units": self.units, "name": self.name}


def functional():
    x = keras.Input((4,))
    h = layers.BatchNormalization()(layers.Dense(8, activation="relu")(x))
    return keras.Model(x, layers.Dense(3)(layers.Dropout(0.3)(h)))


MODELS = {"functional": functional, "sequential": lambda: mlp(seed=None), "subclassed": lambda: Subclassed(6)}
NAMES = ["functional", slow("subclassed"), slow("sequential")]


def trained(model, **kwargs):
    model = RDropModel(model, alpha=3.0, **kwargs)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.ExponentialDecay(0.01, 5, 0.9)),
        losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    fit(model)
    return model


def fit(model):
    return model.fit(X, Y, batch_size=16, shuffle=False, verbose=0).history


def assert_same_state(first, second):
    for a, b in zip(
        first.weights + first.optimizer.variables, second.weights + second.optimizer.variables, strict=True
    ):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_reloaded_it_goes_on_where_it_stopped(name, tmp_path):
    model = trained(MODELS[name](), divergence="js", num_passes=3)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")  # In safe mode, Keras's default.
    assert type(again) is RDropModel and type(again.model) is type(model.model)
    assert again.compiled and again.get_config()["num_passes"] == 3 and again.divergence == "js"
    assert_same_state(model, again)
    np.testing.assert_allclose(again.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-6, atol=1e-7)
    uninterrupted, resumed = fit(model), fit(again)  # With the same dropout masks.
    assert sorted(resumed) == ["accuracy", "consistency_loss", "loss", "task_loss"]
    for key, values in uninterrupted.items():
        assert resumed[key] == pytest.approx(values, rel=1e-6)
    assert_same_state(model, again)


def test_weights_files(tmp_path):
    model = trained(functional())
    model.save_weights(tmp_path / "model.weights.h5")
    again = RDropModel(functional())
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(again.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-6)
    plain = RDropModel(functional(), alpha=0)
    plain.load_weights(tmp_path / "model.weights.h5")
    plain.save_weights(tmp_path / "plain.weights.h5")
    again.load_weights(tmp_path / "plain.weights.h5")
    np.testing.assert_allclose(again.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-6)
    model.model.save_weights(tmp_path / "bare.weights.h5")
    bare = functional()
    bare.load_weights(tmp_path / "bare.weights.h5")
    np.testing.assert_allclose(bare.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-6)


@pytest.mark.parametrize("name", ["plain.weights.h5", "plain.keras"])
def test_weights_of_a_plain_model(name, tmp_path):
    plain = functional()
    (plain.save_weights if name.endswith(".weights.h5") else plain.save)(tmp_path / name)
    model = RDropModel(functional())
    before = model._num_steps, model.alpha
    model.load_weights(tmp_path / name)
    np.testing.assert_array_equal(model.predict(X, verbose=0), plain.predict(X, verbose=0))
    assert (model._num_steps, model.alpha) == before
    x = keras.Input((4,))
    h = layers.BatchNormalization()(layers.Dense(8, activation="relu")(x))
    other = RDropModel(keras.Model(x, layers.Dense(5)(layers.Dropout(0.3)(h))))
    with warnings.catch_warnings(action="ignore"):  # Keras's, of what does not fit.
        with pytest.raises(ValueError, match=r"could not be loaded"):
            other.load_weights(tmp_path / name)
        other.load_weights(tmp_path / name, skip_mismatch=True)
    np.testing.assert_array_equal(to_numpy(other.model.layers[1].kernel), to_numpy(plain.layers[1].kernel))


def test_other_random_generators_are_no_reason_to_lose_weights(tmp_path):
    def model(rates):
        x = h = keras.Input((4,))
        for rate in rates:
            h = layers.Dropout(rate)(h)
        return RDropModel(keras.Model(x, layers.Dense(3)(h)))

    first, other = model([0.1, 0.2]), model([0.1, 0.0])
    first.save_weights(tmp_path / "model.weights.h5")
    with pytest.warns(UserWarning, match=r"states of 2 random generators, and the model has 1.*Weights are not"):
        other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(other.predict(X, verbose=0), first.predict(X, verbose=0))


@pytest.mark.parametrize("divergence", ["auto", Divergence("js", from_logits=True), {"out": Divergence("kl")}, ["mse"]])
def test_configuration(divergence):
    model = RDropModel(mlp(), 2.5, divergence=divergence, num_passes=4, share="nothing", name="mine")
    again = RDropModel.from_config(model.get_config())
    assert again.name == "mine" and again.alpha == 2.5 and again.num_passes == 4 and again.divergence == divergence
    assert again.share == "nothing"
    assert [layer.name for layer in again.model.layers] == [layer.name for layer in model.model.layers]
    assert not again.compiled


def test_clone():
    model = RDropModel(mlp(), 2.5, num_passes=3)
    clone = keras.models.clone_model(model)
    assert clone.num_passes == 3 and clone.model is not model.model
    assert clone.predict(X, verbose=0).shape == (40, 3)


@pytest.mark.slow
def test_the_model_inside_knows_nothing_of_rdrop(tmp_path):
    model = trained(functional())
    model.model.save(tmp_path / "plain.keras")
    code = f"""
    import sys, keras, numpy as np
    sys.modules["rdrop_keras"] = None
    model = keras.models.load_model({str(tmp_path / "plain.keras")!r})
    np.save({str(tmp_path / "outputs.npy")!r}, model.predict(np.load({str(tmp_path / "x.npy")!r}), verbose=0))
    """
    np.save(tmp_path / "x.npy", X)
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    np.testing.assert_allclose(np.load(tmp_path / "outputs.npy"), model.predict(X, verbose=0), rtol=1e-5, atol=1e-6)


@serves
@pytest.mark.needs("tensorflow")
@pytest.mark.parametrize("name", NAMES)
def test_saved_model(name, tmp_path):
    import tensorflow as tf

    model = trained(MODELS[name]())
    expected = model.predict(X, verbose=0)
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    for rows in (1, 7, 40):
        np.testing.assert_allclose(served.serve(tf.constant(X[:rows])), expected[:rows], rtol=1e-5, atol=1e-6)
    assert len(served.variables) == len(model.model.variables)


@serves
@pytest.mark.needs("tensorflow")
def test_saved_model_of_two_inputs(tmp_path):
    import tensorflow as tf

    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    h = layers.Dropout(0.2)(layers.Concatenate()([a, b]))
    model = RDropModel(keras.Model({"a": a, "b": b}, layers.Dense(3)(h)))
    model.export(tmp_path / "exported", verbose=False)
    served = tf.saved_model.load(tmp_path / "exported")
    x = {"a": X, "b": 2 * X}
    np.testing.assert_allclose(served.serve(x), model.predict(x, verbose=0), rtol=1e-5, atol=1e-6)


# Keras's exporter tries several ways, and PyTorch and ONNX warn about some of them.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.backends("torch")
@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
def test_onnx(tmp_path):
    import onnxruntime

    model = trained(functional())
    model.export(tmp_path / "model.onnx", format="onnx", verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (outputs,) = session.run(None, {session.get_inputs()[0].name: X})
    np.testing.assert_allclose(outputs, model.predict(X, verbose=0), rtol=1e-4, atol=1e-5)


def test_unknown_export_format():
    with pytest.raises(ValueError, match="format"):
        RDropModel(mlp()).export("nowhere", format="paper")


TRAINING = """
import os, signal, sys
import keras, numpy as np
sys.path[:0] = {path!r}
from test_saving import X, Y, functional
from rdrop_keras import RDropModel

keras.utils.set_random_seed(5)
model = RDropModel(functional(), alpha=3.0)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))

class Kill(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if sys.argv[2] == "kill" and self.params["epochs"] == 4 and self.epoch == 2 and batch == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

model.fit(X, Y, epochs=4, batch_size=8, shuffle=False, verbose=0,
          callbacks=[keras.callbacks.BackupAndRestore(sys.argv[1] + "/backup"), Kill()])
np.savez(sys.argv[1] + "/weights.npz", *model.get_weights())
"""


@pytest.mark.slow
def test_killed_and_restored_it_equals_an_uninterrupted_run(tmp_path):
    script = tmp_path / "training.py"
    script.write_text(TRAINING.format(path=[os.path.dirname(__file__)]))

    def run(folder, mode):
        (tmp_path / folder).mkdir(exist_ok=True)
        return subprocess.run([sys.executable, str(script), str(tmp_path / folder), mode]).returncode

    assert run("whole", "go on") == 0
    assert run("killed", "kill") == -signal.SIGKILL
    assert not (tmp_path / "killed" / "weights.npz").exists()
    assert run("killed", "go on") == 0
    whole, killed = np.load(tmp_path / "whole/weights.npz"), np.load(tmp_path / "killed/weights.npz")
    for name in whole:
        np.testing.assert_allclose(killed[name], whole[name], rtol=1e-5, atol=1e-7)


def test_own_loss_and_metric_come_back(tmp_path):
    @keras.saving.register_keras_serializable("tests")
    def own_loss(y_true, y_pred):
        return ops.mean(ops.square(y_true - y_pred), axis=-1)

    model = RDropModel(mlp(), divergence="mse")
    model.compile("sgd", own_loss, metrics=[keras.metrics.MeanAbsoluteError(name="mae")])
    y = np.zeros((40, 3), "float32")
    model.fit(X, y, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.fit(X, y, verbose=0).history.keys() == {"consistency_loss", "loss", "mae", "task_loss"}


def own_loss(y_true, y_pred):
    return keras.ops.mean(keras.ops.square(y_pred), axis=-1)


def test_what_the_model_inside_was_compiled_with_is_not_saved(tmp_path):
    """If its own loss is not registered, the file could not be loaded, and the wrapper does not need it."""
    inner = mlp()
    inner.compile("sgd", own_loss)
    model = RDropModel(keras.Sequential([keras.Input((4,)), inner]))
    model.compile("adam", losses.SparseCategoricalCrossentropy(from_logits=True))
    model.train_on_batch(np.ones((2, 4)), np.ones(2))
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert again.compiled and not again.model.compiled


def test_older_format_is_refused(tmp_path):
    for name in ("model.h5", "model.hdf5"):
        with pytest.raises(
            ValueError, match=r"saved as a `.keras` file.*`model.model.save\(filepath\)`.*Received: file"
        ):
            RDropModel(mlp()).save(tmp_path / name)
        assert not (tmp_path / name).exists()
    model = RDropModel(mlp())
    model.compile("sgd", losses.SparseCategoricalCrossentropy(from_logits=True))
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "model.h5")
    for callbacks in (checkpoint, [keras.callbacks.TerminateOnNaN(), checkpoint]):
        with pytest.raises(ValueError, match=r"saved as a `.keras` file.*Received: filepath='.*model.h5'"):
            model.fit(X, Y, epochs=2, verbose=0, callbacks=callbacks)
    with pytest.raises(ValueError, match=r"saved as a `.keras` file"):
        model.fit(X, Y, None, 1, 0, [checkpoint])
    assert int(to_numpy(model.optimizer.iterations)) == 0  # Not after the first epoch.
    weights = keras.callbacks.ModelCheckpoint(tmp_path / "model.weights.h5", save_weights_only=True)
    model.fit(X, Y, verbose=0, callbacks=[weights])
    assert (tmp_path / "model.weights.h5").exists()


# The files in `saved/` were written with Keras 3.14.0 by the version before the package had rooms. That version gave
# these: loss and first output of the trained model, steps made, α, and the loss of one more epoch on TensorFlow.
OLD_FILES = {
    "fixed": (1.056290269, [0.1735048145, -0.4024653137, -0.1417703182], 4, 3.0, 1.180205822),
    "budget": (1.041947365, [0.3101931810, 0.5732896328, -1.7447228432], 0, 10.508234024, 1.231130004),
}


@pytest.mark.parametrize("name", [slow("fixed"), "budget"])
def test_file_of_an_older_version(name):
    loss, outputs, steps, alpha, next_loss = OLD_FILES[name]
    model = keras.models.load_model(pathlib.Path(__file__).parent / "saved" / f"{name}.keras")
    if keras.backend.backend() == "torch":
        model.jit_compile = (
            False  # The file holds what "auto" was on TensorFlow, with which PyTorch would compile for a minute.
        )
    x = np.random.RandomState(0).normal(size=(16, 4)).astype("float32")
    y = np.arange(16) % 3
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0)[0], loss, rtol=1e-5)
    np.testing.assert_allclose(model.predict(x[:1], verbose=0)[0], outputs, rtol=1e-5, atol=1e-6)
    assert model.compiled and model._num_steps == steps
    np.testing.assert_allclose(float(keras.ops.convert_to_numpy(model._alpha.current())), alpha, rtol=1e-6)
    history = model.fit(x, y, batch_size=8, shuffle=False, verbose=0).history
    if keras.backend.backend() == "tensorflow":  # Other backends draw other masks.
        np.testing.assert_allclose(history["loss"][0], next_loss, rtol=1e-5)
    else:
        assert history["consistency_loss"][0] > 0
