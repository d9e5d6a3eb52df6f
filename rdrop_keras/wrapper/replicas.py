"""What a training step on several replicas of `tf.distribute` does beyond Keras's.

Keras 3.14 to 3.15 mirrors the states of random generators, so that all replicas draw the same dropout masks. It also
gives each replica's mean the same weight, even if the last batch of an epoch is split unevenly. Here replicas draw
masks of their own, and every row of the batch counts the same, as on one device. Neither needs communication. On JAX
`keras.distribution` runs one program over the whole batch, and there is nothing to do.

Comes in: a step on this replica's part of the batch, and its losses. Goes out: masks of its own, and losses weighted by
rows. Called by: the steps and the call of `WrapperModel`, `tf_trainer`, the losses, α and `RDropModel.compute_loss`.
"""

import contextlib

import keras
from keras import ops

from rdrop_keras.wrapper import random_state, step

# Added r times to the seeds of replica r. It is large, so that seeds do not meet those of other layers.
_SEED_STRIDE = 1_640_531_527


@contextlib.contextmanager
def own_masks(model):
    """Within it, the random generators of `model` are the replica's own. Afterwards all replicas have the same."""
    context = _replica_context()
    states = [] if context is None else random_state.states(model)
    shifts = [ops.cast(context.replica_id_in_sync_group, state.dtype) * _SEED_STRIDE for state in states]
    for state, shift in zip(states, shifts):
        state.assign_add([shift, ops.zeros_like(shift)])
    try:
        yield
    finally:
        for state, shift in zip(states, shifts):
            state.assign_sub([shift, ops.zeros_like(shift)])


def row_scale(tensor):
    """The rows of `tensor`, of this replica's part of the batch, as a multiple of the mean over replicas.

    None on a single replica, and if all replicas have the same number of rows.
    """
    context = _replica_context()
    if context is None:
        return None
    import tensorflow as tf

    # In a program, a batch of static size is always full and split evenly. TPUs accept only such batches.
    in_program = not tf.executing_eagerly()
    if isinstance(context.strategy, tf.distribute.TPUStrategy) or (in_program and tensor.shape[0] is not None):
        return None

    def mean(strategy, rows):
        # Over the replicas of this process. Asking other processes would need communication.
        local = strategy.experimental_local_results(rows)
        return tf.add_n(local) / len(local)

    rows = tf.cast(tf.shape(tensor)[0], "float32")
    return rows / context.merge_call(mean, args=(rows,))


def scaled_gradient(loss):
    """`loss`, a mean over this replica's rows, with the gradient of its part in the mean over all rows.

    Its value stays the same, since Keras weights logs by rows.
    """
    scale = _current_row_scale()
    if scale is None:
        return loss
    scale = ops.cast(scale, loss.dtype)
    return scale * loss + ops.stop_gradient((1 - scale) * loss)


def scaled_value(value):
    """`value`, a mean over this replica's rows, scaled so that its mean over replicas is the mean over all rows."""
    scale = _current_row_scale()
    return value if scale is None else ops.cast(scale, value.dtype) * value


def after(tensor):
    """Within it, assignments in a program of TensorFlow wait for `tensor`.

    Otherwise a variable that does not depend on the data would count a step whose data fail.
    """
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.control_dependencies([tensor])


def is_in_function():
    """Whether a `tf.function` is being traced."""
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return tf.inside_function()


def total(value):
    """The sum of `value` over replicas."""
    context = _replica_context()
    return value if context is None else context.all_reduce("SUM", value)


def _current_row_scale():
    """The `row_scale` of the replica in the current step; None if all replicas have the same number of rows."""
    current = step.current()
    return None if current is None else current.row_scale


def _replica_context():
    """TensorFlow's context of one replica among several, or None."""
    if keras.backend.backend() != "tensorflow":
        return None
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return context if context is not None and context.num_replicas_in_sync > 1 else None
