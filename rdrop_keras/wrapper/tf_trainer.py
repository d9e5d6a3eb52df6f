"""What Keras's trainer for TensorFlow does not do yet. Once Keras does it, `TFTrainerFixes` and this file can go.

Comes in: the calls that the trainer makes of its own methods. Goes out: the same calls, mended. Called by: Keras,
through `WrapperModel`. On other backends trainers make only the call for added losses, which then stay as they are.

All is private to Keras. It was read in 3.14.0 and 3.15.1, and both need all of it:

- Under `MultiWorkerMirroredStrategy` nothing trains, not even a plain `keras.Model` (keras-team/keras#20585, open). To
  build what is not built, Keras reads a batch and averages it over replicas. It cannot average over the replicas of
  other processes, nor over parts of unequal size under any strategy. Then it averages the logs of a step along axis 0,
  and scalars have no axis 0 (`_maybe_symbolic_build` and `reduce_per_replica` in
  `keras/src/backend/tensorflow/trainer.py`).
- Added losses and regularizers of all replicas count alike, however few rows a replica has
  (`scale_loss_for_distribution` in `keras/src/losses/loss.py`, made for keras-team/keras#19891).
- Each program of training is traced twice, since its first trace makes the variables of the optimizer
  (tensorflow/tensorflow#67033, closed without a change).
"""

import contextlib
from typing import Any

import keras
from keras import tree

from rdrop_keras import keras_private
from rdrop_keras.wrapper import replicas


class TFTrainerFixes(keras.Model):
    """A `keras.Model` whose trainer for TensorFlow is mended."""

    def _aggregate_additional_loss(self, loss):
        return replicas.scaled_gradient(super()._aggregate_additional_loss(loss))

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        def specification():
            return data_batch if iterator is None else _batch_specification(iterator)

        if keras_private.strategy_of(self) is not None:
            super()._maybe_symbolic_build(data_batch=specification())
        elif keras_private.is_built(self) and not self.run_eagerly:
            # If this fails, the trace of the first step fails too, and tells why.
            with contextlib.suppress(Exception):
                if keras_private.has_metrics(self):
                    self._symbolic_build(data_batch=specification())
                elif not self.optimizer.built:  # A compiled loss has no variables.
                    self.optimizer.build(self.trainable_variables)

    def _make_function(self, step_function, **kwargs):
        function, strategy = super()._make_function(step_function, **kwargs), keras_private.strategy_of(self)
        if strategy is None or not _is_multi_worker(strategy):
            return function

        def with_local_logs(*args):
            self._in_step_function = True
            try:
                return function(*args)
            finally:
                self._in_step_function = False

        return with_local_logs

    # Keras asks the model for its strategy in many places. In a function of steps it has to get another one.
    _in_step_function = False

    @property
    def distribute_strategy(self) -> Any:
        strategy = super().distribute_strategy
        return _LocalLogs(strategy) if self._in_step_function else strategy


def _batch_specification(epoch_iterator):
    """The shapes and types of one replica's part of a batch, with an unknown number of rows, from Keras's iterator."""
    import tensorflow as tf

    def of_replica(spec):
        spec = getattr(spec, "_value_specs", [spec])[0]  # Those of a `PerReplicaSpec`.
        if getattr(spec, "shape", None) is None:  # `spec` is None, or a `tf.experimental.Optional` of it.
            return None
        return tf.TensorSpec([None, *spec.shape[1:]], spec.dtype)

    return tree.map_structure(of_replica, epoch_iterator._distributed_dataset.element_spec)


class _LocalLogs:
    """`strategy`, except that `run` returns the results of the first local replica in place of all results.

    That needs no communication. The logs of an epoch are the metrics over all replicas in any case.
    """

    def __init__(self, strategy):
        self._strategy = strategy

    def __getattr__(self, name):
        return getattr(self._strategy, name)

    def run(self, *args, **kwargs):
        results = self._strategy.run(*args, **kwargs)
        return tree.map_structure(lambda value: self._strategy.experimental_local_results(value)[0], results)


def _is_multi_worker(strategy):
    import tensorflow as tf

    return isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy) and strategy.extended._in_multi_worker_mode()
