"""Joining and splitting passes: splitting gives back what was joined, bit for bit."""

import contextlib

import keras
import numpy as np
import pytest
from keras import layers, ops

from rdrop_keras import keras_private
from rdrop_keras.passes import tiling

BACKEND = keras.backend.backend()


def passes_of(num_passes):
    """Nested structures of tensors of several ranks and types, with None and a scalar among them."""
    rng = np.random.default_rng(0)

    def one_pass():
        return {
            "image": ops.convert_to_tensor(rng.normal(size=(4, 3, 2)).astype("float32")),
            "others": [
                ops.convert_to_tensor(rng.integers(9, size=4)),
                None,
                (ops.convert_to_tensor(rng.normal(size=(4, 1)).astype("float16")),),
            ],
            "scalar": ops.convert_to_tensor(2.0),
        }

    return [one_pass() for _ in range(num_passes)]


def to_numpy(structure):
    return keras.tree.map_structure(lambda x: None if x is None else ops.convert_to_numpy(x), structure)


def assert_equal(structure, expected):
    keras.tree.assert_same_structure(structure, expected)
    for a, b in zip(keras.tree.flatten(to_numpy(structure)), keras.tree.flatten(to_numpy(expected))):
        np.testing.assert_array_equal(a, b)
        assert a is None or a.dtype == b.dtype


@contextlib.contextmanager
def distribution():
    """A distribution, under which the passes of a row lie next to each other."""
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=keras.distribution.list_devices()[:1]))
    try:
        yield
    finally:
        keras.distribution.set_distribution(None)


SCOPES = [contextlib.nullcontext, pytest.param(distribution, marks=pytest.mark.backends("jax"))]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("num_passes", [2, 3])
def test_stack_has_the_passes_on_an_axis_of_their_own(num_passes, scope):
    passes = [structure["image"] for structure in passes_of(num_passes)]
    with scope():
        joined = tiling.concatenate(passes)
        stacked = tiling.stack(joined, num_passes)
        assert_equal(list(stacked), passes)
        assert_equal(tiling.unstack(stacked), joined)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("num_passes", [2, 3])
def test_split_gives_back_what_was_concatenated(num_passes, scope):
    passes = passes_of(num_passes)
    with scope():
        joined = tiling.concatenate(passes)
        again = tiling.split(joined, num_passes)
    assert joined["image"].shape == (4 * num_passes, 3, 2) and len(again) == num_passes
    for one, expected in zip(again, passes):
        assert_equal(one, expected)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("num_passes", [2, 3])
def test_all_passes_of_a_tile_are_the_batch(num_passes, scope):
    (batch,) = passes_of(1)
    del batch["scalar"]
    with scope():
        for one in tiling.split(tiling.tile(batch, num_passes), num_passes):
            assert_equal(one, batch)


def test_order_of_rows():
    first, second = ops.convert_to_tensor([1, 2]), ops.convert_to_tensor([3, 4])
    assert ops.convert_to_numpy(tiling.concatenate([first, second])).tolist() == [1, 2, 3, 4]
    if BACKEND == "jax":
        with distribution():
            assert ops.convert_to_numpy(tiling.concatenate([first, second])).tolist() == [1, 3, 2, 4]


def test_masks_go_with_their_tensors():
    embedding = layers.Embedding(5, 2, mask_zero=True)
    passes = [embedding(np.array(tokens)) for tokens in ([[1, 0], [2, 3]], [[0, 0], [4, 0]])]
    for one, expected in zip(tiling.split(tiling.concatenate(passes), 2), passes):
        assert_equal(one, expected)
        assert_equal(keras_private.get_keras_mask(one), keras_private.get_keras_mask(expected))


def test_inputs_without_a_batch():
    with pytest.raises(ValueError, match=r"axis 0 of every input. Received: an input of shape \(\)"):
        tiling.tile({"x": ops.convert_to_tensor(1.0)}, 2)
