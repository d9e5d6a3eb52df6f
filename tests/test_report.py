"""Reports: what runs once for all passes and why, and which layers are random."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import rdrop_keras
from models import mlp
from rdrop_keras.wrapper import step


def backbone_and_head():
    inputs = keras.Input((4,))
    backbone = keras.Model(inputs, layers.BatchNormalization()(layers.Dense(8)(inputs)), name="backbone")
    x = layers.Dropout(0.25, name="drop")(backbone(inputs))
    x = layers.Dense(8, name="hidden")(x)
    return keras.Model(inputs, layers.Dense(2, name="logits")(layers.ReLU(name="relu")(x)))


def test_calls():
    report = rdrop_keras.sharing(backbone_and_head())
    dense, batch_norm, drop, hidden, relu, logits = report.calls
    assert dense.name.startswith("backbone/dense") and dense[1:] == ("Dense", 40, True, "deterministic")
    assert batch_norm[1:] == ("BatchNormalization", 32, True, "deterministic")
    assert drop == ("drop", "Dropout", 0, False, "random: Dropout rate=0.25")
    assert hidden == ("hidden", "Dense", 72, False, "follows drop")
    assert relu == ("relu", "ReLU", 0, False, "follows drop")
    assert logits == ("logits", "Dense", 18, False, "follows drop")


def test_table():
    summary, empty, header, *rows = repr(rdrop_keras.sharing(backbone_and_head())).splitlines()
    # 40 + 32 of 162 parameters.
    assert summary == "2 of 6 layer calls (44.4% of the parameters) run once for all passes, share='deterministic'"
    assert empty == ""
    assert header.split() == ["layers", "calls", "parameters", "run", "why"]
    assert [row.split()[-1] for row in rows] == ["deterministic", "rate=0.25", "drop"]
    assert rows[2].split() == ["hidden", "…", "logits", "3", "90", "each", "pass", "follows", "drop"]
    assert len({row.index(word) for row, word in zip(rows, ("once", "each", "each"))}) == 1


def test_share():
    model = backbone_and_head()
    assert all(not call.once for call in rdrop_keras.sharing(model, "nothing").calls)
    assert rdrop_keras.sharing(model, "backbone").calls[0].reason == "up to 'backbone'"
    with pytest.raises(ValueError, match=r"Close names: 'drop'.*Received: share='dorp'"):
        rdrop_keras.sharing(model, "dorp")
    with pytest.raises(TypeError, match=r"`share` must be .* Received: share=3 \(int\)"):
        rdrop_keras.sharing(model, 3)


@pytest.mark.parametrize("share", ["deterministic", "shift"])
def test_augmentation_inside_the_model(share):
    """Each row of each pass has its own shift. If `share` names the layer, both passes have the same shifts."""
    inputs = keras.Input((8, 8, 1))
    shifted = layers.RandomTranslation(0.5, 0.5, fill_mode="constant", name="shift", seed=1)(inputs)
    dropped = layers.Dropout(0.5, name="drop", seed=2)(shifted)
    model = keras.Model(inputs, [shifted, dropped])
    report = rdrop_keras.sharing(model, share)
    assert [(call.name, call.once) for call in report.calls] == [("shift", share == "shift"), ("drop", False)]

    wrapper = rdrop_keras.RDropModel(model, share=share)
    x = np.ones((3, 8, 8, 1), "float32")  # The images are equal, so that only their shifts differ.
    keras.utils.set_random_seed(3)
    with step.training(2):
        shifted, dropped = (ops.convert_to_numpy(y) for y in wrapper(ops.convert_to_tensor(x), training=True))
    assert np.any(dropped[:3] != dropped[3:])
    first, second = shifted[:3], shifted[3:]
    if share == "shift":
        np.testing.assert_array_equal(first, second)
    views = first if share == "shift" else shifted
    assert len(np.unique(views.reshape(len(views), -1), axis=0)) == len(views)
    np.testing.assert_array_equal(wrapper.predict(x, verbose=0)[0], x)


def test_weights_used_before_and_after_count_as_repeated():
    inputs = keras.Input((4,))
    dense = layers.Dense(4)
    model = keras.Model(inputs, dense(layers.Dropout(0.5)(dense(inputs))))
    report = rdrop_keras.sharing(model)
    assert report.summary.startswith("1 of 3 layer calls (0.0% of the parameters)")
    assert [call.once for call in report.calls] == [True, False, False]


def test_models():
    model = backbone_and_head()
    wrapper = rdrop_keras.RDropModel(model)
    assert rdrop_keras.sharing(wrapper).calls == rdrop_keras.sharing(model).calls
    with pytest.raises(TypeError, match=r"`model` must be a keras.Model. Received: model='m' \(str\)"):
        rdrop_keras.sharing("m")
    with pytest.raises(ValueError, match=r"`model` must be built.*model.build\(input_shape\)"):
        rdrop_keras.sharing(keras.Sequential([layers.Dense(3)]))

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(3)

        def build(self, input_shape):
            self.dense.build(input_shape)

        def call(self, inputs):
            return self.dense(inputs)

    own = Own()
    own.build((None, 4))
    (call,) = rdrop_keras.sharing(own).calls
    assert not call.once and call.parameters == 15 and call.reason == "Own is no graph of layers: its call is its own"


@pytest.mark.parametrize("alpha", [0, 1.0])
def test_summary_ends_with_a_line_on_sharing(alpha, capsys):
    model = rdrop_keras.RDropModel(backbone_and_head(), alpha, share="backbone")
    lines = []
    model.summary(print_fn=lambda text, **kwargs: lines.append(text))
    model.summary(80)
    for text in ("".join(lines), capsys.readouterr().out):
        assert "Total params: 162" in text
        line = "R-Drop: 2 of 6 layer calls (44.4% of the parameters) run once for all passes, share='backbone'"
        assert (line in text) == (alpha > 0)


def test_stochastic_layers():
    model = mlp()
    assert rdrop_keras.stochastic_layers(model) == [model.layers[1]]
    assert rdrop_keras.stochastic_layers(rdrop_keras.RDropModel(model)) == [model.layers[1]]
    with pytest.raises(TypeError, match=r"`model` must be a keras.Model"):
        rdrop_keras.stochastic_layers([])
