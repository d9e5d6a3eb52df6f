"""The compiled metrics of an `RDropModel`, which count the data once.

Comes in: targets, and the outputs of all passes. Goes out: metrics of the first pass. Called by: Keras, and loops over
`model.metrics` in training steps of one's own.
"""

from keras import tree

from rdrop_keras import keras_private
from rdrop_keras.passes import tiling
from rdrop_keras.wrapper import step


class FirstPassMetrics(keras_private.CompileMetrics):
    """What `Model.compile` makes of `metrics`. In a training step they see the first pass only.

    Outputs with as many rows as the targets are taken as they are.
    """

    def update_state(self, y_true, y_pred, sample_weight=None):
        current = step.current()
        if current is not None and current.num_passes > 1 and _has_all_passes(y_true, y_pred):
            y_pred = tiling.split(y_pred, current.num_passes)[0]
        return super().update_state(y_true, y_pred, sample_weight)


def _has_all_passes(y_true, y_pred):
    rows = [
        {leaf.shape[0] for leaf in tree.flatten(tensors) if leaf is not None and len(leaf.shape)}
        for tensors in (y_true, y_pred)
    ]
    return None in rows[0] | rows[1] or rows[0] != rows[1]
