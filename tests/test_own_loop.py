"""The loops in docs/own-loop.md make the step that `fit` makes, and that an oracle computes."""

import pathlib
import re

import keras
import numpy as np
import pytest
from keras import ops

import rdrop_keras
import reference
from models import to_numpy

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "own-loop.md").read_text(encoding="utf-8")
SET_UP, *BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
OF_BACKEND = f"# KERAS_BACKEND={keras.backend.backend()}\n"
LOOP = next(block for block in BLOCKS if block.startswith(OF_BACKEND) and "for start in" in block)
ROWS, WIDTH = 8, 6


class GivenDropout(keras.layers.Layer):
    """Dropout whose masks, of shape `(passes, N, width)`, are given: one for each call, or all for a tiled batch."""

    rdrop_stochastic = True

    def __init__(self, masks):
        super().__init__()
        self.masks = np.array(masks, "float32")
        self.calls = 0

    def call(self, inputs, training=False):
        if not training:
            return inputs
        if inputs.shape[0] == self.masks.shape[0] * ROWS:
            return inputs * ops.reshape(self.masks, (-1, WIDTH))
        self.calls += 1
        return inputs * ops.convert_to_tensor(self.masks[(self.calls - 1) % len(self.masks)])


def make_model(masks):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(WIDTH, "tanh"), GivenDropout(masks), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((4,), batch_size=ROWS), *layers])


@pytest.mark.parametrize("num_passes", [2, 3])
def test_one_step(num_passes):
    rng = np.random.default_rng(0)
    masks = rng.integers(0, 2, size=(num_passes, ROWS, WIDTH)) * 2.0
    x, y = rng.normal(size=(ROWS, 4)).astype("float32"), rng.integers(0, 3, size=ROWS)
    names = {"__name__": "page"}
    exec(compile(SET_UP, "own-loop.md", "exec"), names)
    alpha, loss = names["alpha"], names["loss"]
    model = rdrop_keras.RDropModel(make_model(masks), alpha, num_passes=num_passes, share="nothing")
    model.compile(keras.optimizers.SGD(names["learning_rate"]), loss)
    names |= {"model": model, "x": x, "y": y, "batch_size": ROWS}
    if keras.backend.backend() == "tensorflow":
        names["tf"] = __import__("tensorflow")
    before = [to_numpy(variable).astype("float64") for variable in model.trainable_variables]
    exec(compile(LOOP, "own-loop.md", "exec"), names)

    # The value of the objective, in float64.
    kernel, bias, last_kernel, last_bias = before
    hidden = np.tanh(x.astype("float64") @ kernel + bias)
    passes = [hidden * mask @ last_kernel + last_bias for mask in masks]
    value, _, consistency = reference.objective(passes, y, reference.sparse_cross_entropy, reference.kl, alpha)
    assert consistency > 0.01
    np.testing.assert_allclose(ops.convert_to_numpy(ops.stop_gradient(names["value"])), value, rtol=1e-5)
    assert model._num_steps == 1

    # The weights after a step of `fit`.
    theirs = rdrop_keras.RDropModel(make_model(masks), alpha, num_passes=num_passes, share="nothing")
    theirs.compile(keras.optimizers.SGD(names["learning_rate"]), loss, run_eagerly=False)
    theirs.train_on_batch(x, y)
    for ours, other, old in zip(model.trainable_variables, theirs.trainable_variables, before):
        assert np.abs(to_numpy(ours) - old).max() > 1e-3
        np.testing.assert_allclose(to_numpy(ours), to_numpy(other), rtol=1e-5, atol=1e-6)


def test_steps_that_differ():
    """With `every`, the number of passes that `training_step` gives is that of the rows of the outputs."""
    model = rdrop_keras.RDropModel(make_model(np.ones((2, ROWS, WIDTH))), every=2)
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for expected in (2, 1, 2):
        with model.training_step() as num_passes:
            outputs = model(np.ones((ROWS, 4), "float32"), training=True)
            model.compute_loss(None, np.zeros(ROWS), outputs)
        assert num_passes == expected and len(outputs) == expected * ROWS


@pytest.mark.backends("tensorflow")
def test_loops_on_replicas():
    """A step begun on each replica is that of one device; one begun outside would have been plain, and is an error."""
    import tensorflow as tf

    x, y = np.random.RandomState(0).normal(size=(2 * ROWS, 4)).astype("float32"), np.arange(2 * ROWS) % 3
    masks = np.random.RandomState(1).randint(0, 2, size=(2, ROWS, WIDTH)) * 2.0
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        model = rdrop_keras.RDropModel(make_model(masks), share="nothing")
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.optimizer.build(model.trainable_variables)
        other = rdrop_keras.RDropModel(make_model(masks), start=1)
        other.compile("sgd", model.loss)

    def replica_step(x, y):
        with model.training_step():
            return plain_step(x, y)

    def plain_step(x, y):
        outputs = model(x, training=True)
        assert outputs.shape[0] == 2 * ROWS
        return model.compute_loss(x, y, outputs)

    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(2 * ROWS, drop_remainder=True)
    batch = next(iter(strategy.experimental_distribute_dataset(data)))
    per_replica = strategy.experimental_local_results(strategy.run(replica_step, args=batch))
    alone = rdrop_keras.RDropModel(make_model(masks), share="nothing")
    alone.compile("sgd", model.loss)
    expected = alone.train_on_batch(x[:ROWS], y[:ROWS], return_dict=True)["loss"]
    assert len(per_replica) == 2  # Each has its part of the mean over replicas.
    np.testing.assert_allclose(2 * ops.convert_to_numpy(per_replica[0]), expected, rtol=1e-5)
    with pytest.raises(RuntimeError, match=r"belongs into the function that `strategy.run` calls"):  # noqa: SIM117
        with model.training_step():
            strategy.run(plain_step, args=batch)

    @tf.function
    def compiled():
        with other.training_step():
            pass

    with pytest.raises(RuntimeError, match=r"belongs outside of a `tf.function`.*every=1, start=1"):
        compiled()
