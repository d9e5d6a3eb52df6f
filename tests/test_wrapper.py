"""`WrapperModel` by itself, with another method than R-Drop."""

import doctest

import keras
import numpy as np
import pytest

from models import mlp
from rdrop_keras.wrapper import step, wrapper_model


def test_docstring_of_the_wrapper():
    names = {"keras": keras, "np": np}
    (test,) = doctest.DocTestFinder(recurse=False).find(wrapper_model.WrapperModel, "WrapperModel", globs=names)
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


@keras.saving.register_keras_serializable("tests")
class Doubled(wrapper_model.WrapperModel):
    """Another method than R-Drop: in every other training step it averages two passes, whose inputs are doubled."""

    passes_of_steps = (2, 1)

    def passes_of_step(self, number):
        return self.passes_of_steps[number % 2]

    def call_in_training(self, inputs, training):
        num_passes = step.current().num_passes
        return sum(self.model(num_passes * inputs, training=training) for _ in range(num_passes)) / num_passes


def test_another_method(tmp_path):
    """Its steps differ, it evaluates the model inside, and a loaded file continues where it was saved."""
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
    with pytest.raises(ValueError, match=r"`steps_per_execution` must be 1.*steps of 2 and 1 passes"):
        model.compile("sgd", loss, steps_per_execution=2)
    with pytest.raises(AttributeError, match=r"`model` of this Doubled is fixed"):
        model.model = plain
