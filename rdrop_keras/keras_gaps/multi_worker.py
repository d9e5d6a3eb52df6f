"""What lets Keras's trainer run under `MultiWorkerMirroredStrategy`, where a plain `keras.Model` fails too.

Read in Keras 3.14.0 and 3.15.1, both of which need it, for two reasons:

- To build what is not built, Keras reads a batch and averages it over replicas. Replicas of other processes, and parts
  of unequal size under any strategy, cannot be averaged. The dataset's `element_spec` tells the shapes as well.
- Keras averages the logs of a step, scalars, along axis 0, which they do not have. The first replica's are taken here,
  without communication; the logs of an epoch are the metrics, over all replicas, in any case.

The second ends by itself with a Keras that does not ask for that axis. The first costs nothing and reads no data.
"""

import contextvars
import functools
import types

from keras import tree


def batch_specification(epoch_iterator):
    """The shapes and types of one replica's part of a batch, its number of rows unknown, of Keras's epoch iterator."""
    import tensorflow as tf

    def of_replica(spec):
        spec = getattr(spec, "_value_specs", [spec])[0]  # Of a `PerReplicaSpec`.
        if getattr(spec, "shape", None) is None:  # None, or a `tf.experimental.Optional` of it.
            return None
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)

    return tree.map_structure(of_replica, epoch_iterator._distributed_dataset.element_spec)


class _LocalLogs:
    """A strategy whose `run` gives the first local replica's results instead of all; else it is `strategy`."""

    def __init__(self, strategy):
        self._strategy = strategy

    def __getattr__(self, name):
        return getattr(self._strategy, name)

    def run(self, *args, **kwargs):
        results = self._strategy.run(*args, **kwargs)
        return tree.map_structure(lambda value: self._strategy.experimental_local_results(value)[0], results)


_in_step_function = contextvars.ContextVar("rdrop_keras_in_step_function", default=False)


def strategy_of_step(strategy):
    """What Keras is to take for `strategy`."""
    return _LocalLogs(strategy) if _in_step_function.get() else strategy


def with_local_logs(function, strategy):
    """`function`, of Keras's for training or evaluation, such that it takes its logs from the first local replica."""
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
