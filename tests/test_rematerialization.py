"""docs/time-and-memory.md: layers without dropout train the same numbers in `keras.RematScope` as outside it."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers

from models import to_numpy
from rdrop_keras import RDropModel


def weights_after_training(rematerialized):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8,))
    mode = {"mode": "list_of_layers", "layer_names": ["hidden"]}
    with keras.RematScope(**mode) if rematerialized else contextlib.nullcontext():
        hidden = layers.Dense(16, "gelu", name="hidden")(layers.Dropout(0.3, seed=1)(inputs))
        model = RDropModel(keras.Model(inputs, layers.Dense(3)(layers.Dropout(0.3, seed=2)(hidden))), alpha=3.0)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = np.random.normal(size=(16, 8)), np.random.randint(0, 3, size=16)
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    return [to_numpy(variable) for variable in model.trainable_variables]


def test_same_numbers():
    outside = weights_after_training(False)
    if keras.backend.backend() == "tensorflow":  # As the page says; when Keras is mended, page and test change.
        with pytest.raises(ValueError, match="custom_gradient"):
            weights_after_training(True)
        return
    for weight, same in zip(weights_after_training(True), outside, strict=True):
        np.testing.assert_allclose(weight, same, rtol=1e-5, atol=1e-6)
