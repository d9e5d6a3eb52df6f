"""Every Keras name the package uses that Keras does not make public.

Each was read in Keras 3.14.0 and 3.15.1. Nothing else in the package imports `keras.src` or touches an underscored
attribute of Keras, except the overrides in `model.py`, which say so.
"""

# The compiled loss: the only place that knows which target, weight and output belong together.
from keras.src.backend import get_keras_mask, set_keras_mask
from keras.src.losses.loss import unscale_loss_for_distribution
from keras.src.trainers.compile_utils import CompileLoss

__all__ = [
    "CompileLoss",
    "all_layers",
    "copy_annotations",
    "get_keras_mask",
    "has_seed",
    "keras_logits",
    "set_keras_mask",
    "strategy_of",
    "takes_training",
    "unscale_loss_for_distribution",
]


def all_layers(model):
    """`model` and all layers below it; `Layer.layers` exists on models only."""
    return list(model._flatten_layers())


def has_seed(layer):
    """Whether `layer` itself owns a `SeedGenerator`; `Layer.variables` mixes their states with those of sublayers."""
    return bool(layer._seed_generators)


def takes_training(layer):
    """Whether `layer.call` has a `training` argument, by which Keras decides if it passes one in `fit`."""
    return layer._call_has_training_arg


def strategy_of(model):
    """The `tf.distribute` strategy `model` was made under, or None; the public property falls back to the current."""
    return getattr(model, "_distribute_strategy", None)


def keras_logits(probabilities):
    """The logits that `softmax` or `sigmoid` made `probabilities` from, or None.

    Keras keeps them on the tensor so that cross-entropy need not take the logarithm of a rounded probability. Its
    TensorFlow losses read them; JAX tracers cannot carry them.
    """
    return getattr(probabilities, "_keras_logits", None)


def copy_annotations(source, target, function):
    """Puts on `target` what Keras attaches to `source` (mask and logits), each through `function`."""
    mask = get_keras_mask(source)
    if mask is not None:
        set_keras_mask(target, function(mask))
    logits = keras_logits(source)
    if logits is not None:
        target._keras_logits = function(logits)
    return target
