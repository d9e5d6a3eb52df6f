"""Loops over blocks of rows, on TensorFlow and PyTorch. On a processor the blocks stay in its cache.

Comes in: a tensor, and on TensorFlow a function of a block's number. Goes out: the size of its blocks, and what the
function computes of all blocks. Called by: `crossentropy.py` and `kl.py`.
"""

import math

import keras
from keras import ops

ELEMENTS = 2**17  # The most in a block. The block fits the cache, together with what is computed of it.
# On other devices, so that they stay busy and what is computed of a block takes little memory beside the logits.
ELEMENTS_ON_OTHER_DEVICES = 2**24
FEWEST_ELEMENTS = 2**13  # With fewer the loop itself takes as long as its work.


def rows_in_block(tensor, num_parts):
    """How many rows of each of the `num_parts` equal parts of `tensor` make a block; None where blocks do not help.

    On PyTorch the last block may have fewer. On TensorFlow blocks have one size, and help on a processor. Its other
    devices are busy only with whole tensors, and under `keras.distribution` a block would lie on one device.
    """
    batch, *others, width = tensor.shape
    if width is None:
        return None
    known = math.prod([1 if batch is None else batch // num_parts, *(size for size in others if size is not None)])
    if keras.backend.backend() == "torch":
        most = ELEMENTS if on_processor(tensor) else ELEMENTS_ON_OTHER_DEVICES
        return max(1, min(known, most // max(1, width)))
    most, fewest = min(known, ELEMENTS // width), max(1, math.ceil(FEWEST_ELEMENTS / width))
    size = next((n for n in range(most, fewest - 1, -1) if known % n == 0), None)
    return size if size and on_processor(tensor) else None


def on_processor(tensor):
    """Whether a processor computes `tensor`, and this process all of it."""
    if keras.distribution.distribution() is not None:
        return False
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() == "cpu"
    if keras.backend.backend() == "torch":
        return tensor.device.type == "cpu"
    import tensorflow as tf

    return not (tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("TPU"))


def rows(tensor, first, size):
    """`size` rows from `first` on, on axis −2 of a tensor `(n, width)` or `(m, n, width)`."""
    if keras.backend.backend() == "torch":
        return tensor[..., first : first + size, :]
    *before, _, width = tensor.shape
    return ops.slice(tensor, (*[0] * len(before), first, 0), (*before, size, width))


def compiled(compute):
    """`compute()`, in a program whose operations TensorFlow's compiler fuses.

    By itself TensorFlow compiles nothing on a processor, and each operation reads and writes all of its block. Each
    shape is compiled once. That takes longer than an eager step, so eager steps do not compile.
    """
    import tensorflow as tf

    return compute() if tf.executing_eagerly() else tf.function(compute, autograph=False, jit_compile=True)()


def side_by_side(compute, num_blocks, num_values, dtype):
    """The results of `compute(i)` for all blocks i, each of shape `(num_values, n)` and `dtype`, joined on axis 1."""
    import tensorflow as tf

    numbers = tf.range(num_blocks)
    of_blocks = tf.map_fn(compute, numbers, fn_output_signature=dtype)
    return tf.reshape(tf.transpose(of_blocks, (1, 0, 2)), (num_values, -1))


def filled(compute, num_blocks, size, like):
    """A tensor like `like`, of shape `(m, num_blocks · size, width)`; `compute(i)` is block i, `(m, size, width)`."""
    import tensorflow as tf

    num_parts, _, width = like.shape

    def fill(i, result):
        block = compute(i)
        for part in range(num_parts):
            result = result.write(part * num_blocks + i, block[part])
        return i + 1, result

    result = tf.TensorArray(like.dtype, num_parts * num_blocks, element_shape=(size, width))
    _, result = tf.while_loop(lambda i, _: i < num_blocks, fill, (0, result))
    return tf.reshape(result.stack(), tf.shape(like))
