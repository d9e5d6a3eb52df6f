"""`WrapperModel` by itself, with another method than R-Drop."""

import doctest

import keras
import numpy as np
import pytest

from models import mlp
from rdrop_keras.wrapper import wrapper_model


def test_docstring_of_the_wrapper():
    names = {"keras": keras, "np": np}
    (test,) = doctest.DocTestFinder(recurse=False).find(wrapper_model.WrapperModel, "WrapperModel", globs=names)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


@keras.saving.register_keras_serializable("tests")
class Doubled(wrapper_model.WrapperModel):
    """Another method than R-Drop: it doubles the inputs in every other training step."""

    kinds_of_step = (2.0, 1.0)

    def kind_of_step(self, step):
        return self.kinds_of_step[step % 2]

    def call_in_training(self, inputs, training, kind):
        return self.model(kind * inputs, training=training)


def test_another_method(tmp_path):
    """It has steps of two kinds, evaluates the model inside, and a loaded file continues where it was saved."""
    x, y = np.random.RandomState(0).normal(size=(24, 4)).astype("float32"), np.arange(24) % 3
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def trained(model, batches):
        model.compile(keras.optimizers.SGD(0.1), loss)
        for batch in batches:
            model.train_on_batch(batch, y[:8])
        return model

    keras.utils.set_random_seed(1)
    plain = trained(mlp(rate=0.0), [2 * x[:8], x[8:16], 2 * x[16:]])
    keras.utils.set_random_seed(1)
    model = trained(Doubled(mlp(rate=0.0)), [x[:8], x[8:16], x[16:]])
    np.testing.assert_allclose(model.predict(x, verbose=0), plain.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.evaluate(x, y, verbose=0), plain.evaluate(x, y, verbose=0), rtol=1e-5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for other, batch in ((model, x[:8]), (again, x[:8]), (plain, x[:8])):
        other.train_on_batch(batch, y[:8])
    np.testing.assert_allclose(again.predict(x, verbose=0), plain.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.predict(x, verbose=0), plain.predict(x, verbose=0), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"With steps of several kinds, `steps_per_execution` must be 1"):
        model.compile("sgd", loss, steps_per_execution=2)
    with pytest.raises(AttributeError, match=r"`model` of this Doubled is fixed"):
        model.model = plain
