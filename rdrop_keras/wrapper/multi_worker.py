"""Lets Keras's trainer run under `MultiWorkerMirroredStrategy`, where a plain `keras.Model` fails too.

Comes in: the strategy, and functions of Keras's trainer. Goes out: the same, for several workers. Called by:
`WrapperModel`. Keras 3.14.0 and 3.15.1, in which it was read, need it for two reasons:

- To build what is not built, Keras reads a batch and averages it over replicas. Replicas of other processes, and parts
  of unequal size under any strategy, cannot be averaged. The dataset's `element_spec` tells the shapes as well.
- Keras averages the logs of a step along axis 0, and scalars have no axis 0. Here those of the first replica are taken,
  without communication. The logs of an epoch are the metrics over all replicas in any case.

With a Keras that does not ask for that axis, the second workaround switches itself off. The first costs nothing.
"""

import contextvars
import functools
import types

from keras import tree


def batch_specification(epoch_iterator):
    """The shapes and types of one replica's part of a batch from Keras's epoch iterator, its number of rows unknown."""
    import tensorflow as tf

    def of_replica(spec):
        spec = getattr(spec, "_value_specs", [spec])[0]  # Those of a `PerReplicaSpec`.
        if getattr(spec, "shape", None) is None:  # None, or a `tf.experimental.Optional` of it.
            return None
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)

    return tree.map_structure(of_replica, epoch_iterator._distributed_dataset.element_spec)


class _LocalLogs:
    """`strategy`, except that `run` returns the results of the first local replica in place of all."""

    def __init__(self, strategy):
        self._strategy = strategy

    def __getattr__(self, name):
        return getattr(self._strategy, name)

    def run(self, *args, **kwargs):
        results = self._strategy.run(*args, **kwargs)
        return tree.map_structure(lambda value: self._strategy.experimental_local_results(value)[0], results)


_in_step_function = contextvars.ContextVar("rdrop_keras_in_step_function", default=False)


def strategy_of_step(strategy):
    """The strategy to give to Keras in place of `strategy`."""
    return _LocalLogs(strategy) if _in_step_function.get() else strategy


def with_local_logs(function, strategy):
    """`function`, one of Keras's for training or evaluation, with logs from the first local replica."""
    if strategy is None or not _is_multi_worker(strategy) or not _averages_scalars_along_an_axis():
        return function

    @functools.wraps(function)
    def with_local_logs(*args):
        token = _in_step_function.set(True)
        try:
            return function(*args)
        finally:
            _in_step_function.reset(token)

    return with_local_logs


def _is_multi_worker(strategy):
    import tensorflow as tf

    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and strategy.extended._in_multi_worker_mode()


@functools.cache
def _averages_scalars_along_an_axis():
    """Whether Keras asks a strategy of several workers for the mean of a scalar along an axis."""
    import tensorflow as tf
    from keras.src.backend.tensorflow import trainer

    class Recorder(tf.distribute.MultiWorkerMirroredStrategy):
        extended = types.SimpleNamespace(_in_multi_worker_mode=lambda: True)

        def __init__(self):
            self.axis = None

        def reduce(self, reduce_op, value, axis=None):
            self.axis = axis
            return value

    recorder = Recorder()
    trainer.reduce_per_replica(tf.constant(0.0), recorder, "auto")
    return recorder.axis is not None
