"""Inconsistency against float64 oracles, its errors, and the callback."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import rdrop_keras
import reference
from marks import slow
from models import mlp, to_numpy
from rdrop_keras import InconsistencyMonitor, RDropModel, inconsistency, monitor

X = np.random.RandomState(0).normal(size=(40, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32") + (X[:, 2] > 1)
W = np.random.RandomState(1).uniform(0, 2, size=40).astype("float32")
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
NAMES = {"gap", "submodel_loss", "divergence", "agreement"}


class Chosen(layers.Layer):
    """In training sub-model i of m adds `shift[i]` to its rows. The full model adds nothing."""

    rdrop_stochastic = True

    def __init__(self, shifts):
        super().__init__()
        self.shifts = np.array(shifts, "float32")

    def call(self, inputs, training=None):
        if not training:
            return inputs
        m = len(self.shifts)
        return inputs + ops.repeat(ops.convert_to_tensor(self.shifts), ops.shape(inputs)[0] // m, axis=0)


def cross_entropy(logits, weights):
    logits = logits.astype("float64")
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -(weights * log_p[np.arange(len(Y)), Y]).sum() / len(Y)


@pytest.mark.parametrize("weights", [None, W])
@pytest.mark.parametrize("batch_size", [40, 16])
def test_by_hand(weights, batch_size):
    """Three sub-models whose logits are known, against float64."""
    shifts = np.array([[0.0, 0.5, 0.0], [0.3, 0.0, -0.4], [0.0, 0.0, 2.0]])
    inputs = keras.Input((3,))
    model = keras.Model(inputs, Chosen(shifts)(inputs))
    model.compile("sgd", LOSS)
    z = X[:, :3]
    result = inconsistency(model, z, Y, sample_weight=weights, num_passes=3, batch_size=batch_size)
    w = np.ones(40) if weights is None else weights.astype("float64")
    losses = [cross_entropy(z + shift, w) for shift in shifts]
    full = cross_entropy(z, w)
    np.testing.assert_allclose(result.full_model_loss, full, rtol=1e-5)
    np.testing.assert_allclose(result.submodel_loss.value, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(result.submodel_loss.error, np.std(losses, ddof=1) / np.sqrt(3), rtol=1e-4)
    np.testing.assert_allclose(result.gap.value, abs(np.mean(losses) - full), rtol=1e-4)
    divergence = reference.mean_over_pairs(reference.kl, np.stack([z + shift for shift in shifts]).astype("float64"))
    np.testing.assert_allclose(result.divergence.value, (w * divergence).sum() / 40, rtol=1e-5)
    decisions = np.stack([(z + shift).argmax(-1) for shift in shifts])
    if weights is None:
        pairs = [np.mean(decisions[i] == decisions[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        np.testing.assert_allclose(result.agreement.value, np.mean(pairs), rtol=1e-5)
        np.testing.assert_allclose(result.agreement_with_full.value, np.mean(decisions == z.argmax(-1)), rtol=1e-5)


def test_jackknife():
    """The jackknife of the mean of a product over pairs: leave out each pass in turn."""
    values = np.array([1.0, 2.0, -1.0, 4.0])
    products = [values[i] * values[j] for i in range(4) for j in range(i + 1, 4)]
    estimate = monitor._over_pairs(np.array(products), 4)
    without = []
    for left_out in range(4):
        kept = np.delete(values, left_out)
        without.append(np.mean([kept[0] * kept[1], kept[0] * kept[2], kept[1] * kept[2]]))
    np.testing.assert_allclose(estimate.value, np.mean(products))
    np.testing.assert_allclose(estimate.error, np.sqrt(3 / 4 * np.sum((without - np.mean(without)) ** 2)))


def test_no_dropout_but_one_row_block_is_no_inconsistency():
    inputs = keras.Input((3,))
    model = keras.Model(inputs, Chosen(np.zeros((4, 3)))(inputs))
    model.compile("sgd", LOSS)
    result = inconsistency(model, X[:, :3], Y, num_passes=4)
    for estimate in (result.gap, result.divergence):
        np.testing.assert_allclose(estimate, 0, atol=1e-6)
    np.testing.assert_allclose(result.agreement, (1, 0), atol=1e-6)
    np.testing.assert_allclose(result.agreement_with_full, (1, 0), atol=1e-6)


def test_leaves_no_trace():
    inputs = keras.Input((4,))
    h = layers.Dropout(0.3)(layers.BatchNormalization()(layers.Dense(8)(inputs)))
    inner = keras.Model(inputs, layers.Dense(3)(layers.BatchNormalization(trainable=False)(h)))
    model = RDropModel(inner, 2.0)
    model.compile("adam", LOSS, metrics=["accuracy"])
    model.fit(X, Y, verbose=0)
    before = [to_numpy(v) for v in model.variables]
    metrics, trainable = model.get_metrics_result(), [layer.trainable for layer in inner.layers]
    torch_state = None
    if keras.backend.backend() == "torch":
        import torch

        torch_state = torch.get_rng_state()
    inconsistency(model, X, Y, num_passes=3)
    for value, variable in zip(before, model.variables):
        np.testing.assert_array_equal(value, to_numpy(variable))
    assert {k: float(v) for k, v in model.get_metrics_result().items()} == {k: float(v) for k, v in metrics.items()}
    assert [layer.trainable for layer in inner.layers] == trainable
    assert model.layers == inner.layers
    if torch_state is not None:
        assert (torch.get_rng_state() == torch_state).all()


def test_batch_normalization_is_in_inference():
    """Statistics far from those of the batch would make a gap by themselves."""
    inputs = keras.Input((4,))
    model = keras.Model(inputs, layers.Dense(3)(layers.Dropout(1e-6)(layers.BatchNormalization()(inputs))))
    model.compile("sgd", LOSS)
    assert inconsistency(model, 5 + 3 * X, Y, num_passes=2).gap.value < 1e-3


@pytest.mark.parametrize(
    "loss, activation, agrees",
    [
        (keras.losses.BinaryCrossentropy(from_logits=True), None, True),
        (keras.losses.BinaryCrossentropy(), "sigmoid", True),
        ("mse", None, False),
    ],
)
def test_other_losses(loss, activation, agrees):
    model = mlp(outputs=2, activation=activation)
    model.compile("sgd", loss)
    result = inconsistency(model, X, np.eye(3)[Y][:, :2], num_passes=3)
    assert result.divergence.value > 0
    assert np.isfinite(result.agreement.value) == agrees
    assert not agrees or 0 < result.agreement.value <= 1


def test_data():
    """Arrays and generators. The draws differ, and the full model does not."""
    model = RDropModel(mlp(), 1.0)
    model.compile("sgd", LOSS)
    a = inconsistency(model, X, Y, num_passes=2, batch_size=20)
    b = inconsistency(model, ((X[i : i + 20], Y[i : i + 20]) for i in (0, 20)), num_passes=2)
    np.testing.assert_allclose(a.full_model_loss, b.full_model_loss, rtol=1e-6)
    loss = model.evaluate(X, Y, verbose=0)
    np.testing.assert_allclose(a.full_model_loss, loss, rtol=1e-5)


@pytest.mark.backends("tensorflow")
@pytest.mark.parametrize("replicas", [None, slow(2)])
def test_tf_data(replicas):
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    if replicas:
        one = tf.distribute.ReductionToOneDevice()
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=one)
    with strategy.scope():
        keras.utils.set_random_seed(1)
        model = RDropModel(mlp(), 1.0)
        model.compile("sgd", LOSS)
    result = inconsistency(model, tf.data.Dataset.from_tensor_slices((X, Y)).batch(20), num_passes=3)
    np.testing.assert_allclose(result.full_model_loss, model.evaluate(X, Y, verbose=0), rtol=1e-5)
    assert result.divergence.value > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not support masking")
@pytest.mark.needs("keras_hub")
def test_raw_strings():
    import keras_hub

    hub = keras_hub.models
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "good", "bad", "film"]
    task = hub.BertTextClassifier(
        backbone=hub.BertBackbone(len(words), num_layers=1, num_heads=2, hidden_dim=8, intermediate_dim=8, dropout=0.3),
        preprocessor=hub.BertTextClassifierPreprocessor(hub.BertTokenizer(words), sequence_length=6),
        num_classes=2,
    )
    model = RDropModel(task, 1.0)
    model.compile("sgd", LOSS)
    result = inconsistency(model, ["a good film", "a bad film"], np.array([1, 0]), num_passes=3)
    assert result.divergence.value > 0


def test_monitor(tmp_path):
    model = RDropModel(mlp(), 1.0)
    model.compile("sgd", LOSS)
    log = keras.callbacks.CSVLogger(str(tmp_path / "log.csv"))
    callbacks = [InconsistencyMonitor(X, Y, every=2, num_passes=2), log]
    history = model.fit(X, Y, epochs=5, verbose=0, callbacks=callbacks).history
    assert set(history) > NAMES
    for name in NAMES:
        values = history[name]
        assert np.isnan(values[0]) and values[1] == values[2] and values[3] == values[4]
        assert name == "agreement" or values[1] != values[3]
    header = (tmp_path / "log.csv").read_text().splitlines()[0]
    assert set(header.split(",")) > NAMES


def test_result():
    values = {"submodel_loss": (0.3, 0.01), "gap": (0.1, 0.01), "divergence": (0.05, 0.002)}
    result = rdrop_keras.monitor.Inconsistency(
        8, 0.2, **values, agreement=(0.9, 0.03), agreement_with_full=(float("nan"), float("nan"))
    )
    assert result.to_dict()["gap_error"] == 0.01 and result.to_dict()["num_passes"] == 8
    lines = repr(result).splitlines()
    assert lines[0] == "Inconsistency of 8 sub-models"
    assert lines[3].split() == ["gap", "0.1", "±", "0.01"]


def test_errors():
    model = mlp()
    with pytest.raises(RuntimeError, match=r"must be compiled with a loss"):
        inconsistency(model, X, Y)
    with pytest.raises(ValueError, match=r"`num_passes` must be an integer ≥ 2. Received: num_passes=1"):
        inconsistency(model, X, Y, num_passes=1)
    with pytest.raises(TypeError, match=r"`model` must be a keras.Model. Received: model='m' \(str\)"):
        inconsistency("m", X, Y)
    with pytest.raises(ValueError, match=r"`every` must be an integer ≥ 1. Received: every=0"):
        InconsistencyMonitor(X, Y, every=0)
    plain = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    plain.compile("sgd", LOSS)
    with pytest.raises(ValueError, match=r"needs a layer that is random in training"):
        inconsistency(plain, X, Y)
    unbuilt = keras.Sequential([layers.Dropout(0.1), layers.Dense(3)])
    unbuilt.compile("sgd", LOSS)
    with pytest.raises(ValueError, match=r"`model` must be built"):
        inconsistency(unbuilt, X, Y)
    model.compile("sgd", lambda y_true, y_pred: ops.mean(y_pred))
    with pytest.raises(ValueError, match=r"`divergence='auto'` cannot read"):
        inconsistency(model, X, Y)


def test_share_of_the_objective():
    """α/m · D over the whole; a model trained without R-Drop has none."""
    model = RDropModel(mlp(rate=0.4), 3.0, num_passes=3)
    model.compile(keras.optimizers.SGD(0.01), LOSS)
    monitor = InconsistencyMonitor(X, Y, num_passes=4)
    logs = {name: value[0] for name, value in model.fit(X, Y, verbose=0, callbacks=[monitor]).history.items()}
    term = 3.0 / 3 * logs["divergence"]
    np.testing.assert_allclose(logs["consistency_fraction"], term / (logs["submodel_loss"] + term), rtol=1e-6)
    plain = RDropModel(mlp(rate=0.4), 0)
    plain.compile(keras.optimizers.SGD(0.01), LOSS)
    assert "consistency_fraction" not in plain.fit(X, Y, verbose=0, callbacks=[monitor]).history
