"""What layers add to the loss where the passes run one after another.

A layer that runs on the rows of all passes together calls `add_loss` once. A layer that runs once for each pass calls
it m times, and so does Keras for an activity regularizer. The loss of a step should have it once, as its mean over
passes.

Comes in: a model whose passes run. Goes out: scaled losses, which Keras collects. Called by: `graph.PairedGraph` and
`Passes`.
"""

import contextlib
import functools

from keras import ops, tree

from rdrop_keras import keras_private


@contextlib.contextmanager
def mean_over(num_passes, model):
    """Within it, layers of `model` run `num_passes` times, and what they give to `add_loss` counts as its mean."""
    given = []
    layers = keras_private.all_layers(model)
    for layer in layers:
        # In `vars`, since Keras would track what is assigned. Losses are handed on at the end, since each call of a
        # model from outside forgets those of the call before.
        vars(layer)["add_loss"] = functools.partial(_note, given, layer.add_loss)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("add_loss", None)
    for add_loss, loss in given:
        add_loss(tree.map_structure(lambda value: ops.divide(value, num_passes), loss))


def _note(given, add_loss, loss):
    given.append((add_loss, loss))
