"""Which layers are random in training, and which are known not to be.

A layer counts as deterministic only if its code is Keras's or KerasHub's and shows nothing random, or if it declares

    rdrop_stochastic = False

on the class or the layer. That promises: in training its outputs depend on its inputs and weights alone, it changes no
state, and each row of the outputs depends on one row of the batch. `rdrop_stochastic = True` declares it random.

Comes in: a model, a layer or an operation. Goes out: which layers are random, and why one counts as random. Called by:
the other modules of `passes`, and `with_dropout`.
"""

import functools
import numbers
import re

import keras

from rdrop_keras import keras_private

# Layers and operations of Keras that run code from elsewhere.
_FOREIGN = (
    *("FlaxLayer", "JaxLayer", "Lambda", "TFSMLayer", "TorchModuleWrapper"),
    *("AssociativeScan", "Cond", "ForiLoop", "Map", "Scan", "Switch", "VectorizedMap", "WhileLoop"),
)
# A subclass from elsewhere that defines only these still computes what its Keras parent computes.
_HARMLESS = ("__init__", "build", "compute_output_shape", "from_config", "get_build_config", "get_config")
# Callables on a layer that do not take part in computing its outputs.
_NOT_CALLED = re.compile("_(initializer|regularizer|constraint)$")
# The names under which Keras and KerasHub keep the strength of a layer's randomness. A random layer without one is
# always random.
DROPOUT_RATES = ("rate", "dropout", "recurrent_dropout", "drop_rate", "drop_prob")
_RATES = (*DROPOUT_RATES, "stddev")
# Layers of Keras that draw one number for all rows of a batch.
_ONCE_A_BATCH = ("AugMix", "CutMix", "MixUp", "RandAugment", "RandomCrop", "RandomElasticTransform")
# Known by name, since some draw from Keras's global seed and some make a seed only for a rate above 0.
_DROPOUT = re.compile("Dropout|DropPath|DropBlock|StochasticDepth|GaussianNoise")
# The only layers with non-trainable variables that can run once for all passes. Batch normalization updates them by
# the mean and variance of the batch, which are the same when the batch is repeated. `Normalization` never updates them.
_EXACT_STATE = ("BatchNormalization", "Normalization")


def classify(model):
    """The layers of `model` by what is known of their randomness in training.

    Returns:
        Three lists. `active`: layers that draw random numbers. `inactive`: `(layer, rates)` of those that would if
        their rates were above 0. `opaque`: layers with code from outside Keras and KerasHub, which may draw or not.
        Models are never `opaque`, since their `call` usually only connects layers.
    """
    active, inactive, opaque = [], [], []
    for layer in keras_private.all_layers(model):
        own_rates = rates_of(layer)
        declared = getattr(layer, "rdrop_stochastic", None)
        if declared or keras_private.has_seed(layer) or (own_rates and _DROPOUT.search(type(layer).__name__)):
            if own_rates and not any(own_rates.values()) and not declared:
                inactive.append((layer, own_rates))
            else:
                active.append(layer)
        elif declared is None and not isinstance(layer, keras.Model) and not _is_known(layer):
            opaque.append(layer)
    return active, inactive, opaque


def why_stochastic(operation):
    """Why `operation`, a layer or `keras.Operation`, counts as random in training; None if it does not."""
    if not isinstance(operation, keras.Layer):
        return None if _is_vouched(operation) else f"may be random: {type(operation).__name__} runs code of others"
    active, _, opaque = classify(operation)
    if active:
        layer = active[0]
        above = [f"{name}={rate:g}" for name, rate in rates_of(layer).items() if rate]
        where = [] if layer is operation else ["holds"]
        return " ".join(["random:", *where, type(layer).__name__, *above])
    layers = keras_private.all_layers(operation)
    operations = [other for layer in layers for other in keras_private.operations(layer)]
    opaque += [other for other in layers + operations if not _is_vouched(other)]
    if opaque:
        return f"may be random: {type(opaque[0]).__name__} declares no rdrop_stochastic"
    for layer in layers:
        exact = type(layer).__name__ in _EXACT_STATE or _is_stateful(layer) or _is_declared(layer)
        if keras_private.has_state(layer) and not exact:
            return f"may keep state: {type(layer).__name__} has non-trainable variables"
    return None


def treats_rows_alike(operation):
    """Whether `operation` is known to compute each row of its outputs from the same row of its inputs."""
    return isinstance(operation, keras.Layer) and all(map(_is_vouched, keras_private.all_layers(operation)))


def drawing_once_a_batch(operation):
    """The first layer in `operation` that draws the same numbers for all rows of a batch, or None."""
    for layer in keras_private.all_layers(operation):
        noise_shape = getattr(layer, "noise_shape", None)
        if type(layer).__name__ in _ONCE_A_BATCH or (noise_shape is not None and tuple(noise_shape)[:1] == (1,)):
            return layer
    return None


def check_stateless(operation):
    """Raises if `operation`, which is to run for every pass, holds a recurrent layer with a state for each row."""
    layer = next((layer for layer in keras_private.all_layers(operation) if _is_stateful(layer)), None)
    if layer is not None:
        raise ValueError(
            "A recurrent layer with `stateful=True` keeps a state for each row of the batch, and cannot keep one for "
            "each pass. Put it before the first dropout, name it by `share`, or make it with `stateful=False`. "
            f"Received: {layer.name!r} ({type(layer).__name__})."
        )


def check_stochastic(model):
    """Raises if the passes of `model` would be identical.

    Raises:
        ValueError: If no layer is random in training. A model without any dropout layer passes if its `call`, or that
            of a model in it, is the user's own, since it may draw random numbers by itself.
    """
    active, inactive, opaque = classify(model)
    if opaque or (active and keras_private.takes_training(model)):
        return
    if not active and not inactive and not all(map(_is_vouched, keras_private.all_layers(model))):
        return
    if active:
        raise ValueError(
            f"`{type(model).__name__}.call` has no `training` argument, so Keras keeps its dropout off in training and "
            "the passes of R-Drop would be identical. Write `def call(self, inputs, training=None)`. "
            f"Received: model={model.name!r} with {_listed((layer, {}) for layer in active)}."
        )
    raise ValueError(
        "R-Drop needs a layer that is random in training, else all passes are identical. "
        "Where rates are 0, as in many pretrained configurations, `rdrop_keras.with_dropout(model, 0.1)` raises them. "
        "Elsewhere insert a `keras.layers.Dropout`, for example before the last layer. Or train with `alpha=0`. "
        f"Received: model={model.name!r}, whose dropout layers are: {_listed(inactive) or 'none'}."
    )


def rates_of(layer):
    """`{name: rate}`: how strong the randomness of `layer` is, by the names under which Keras keeps it."""
    attributes = vars(layer)
    return {name: attributes[name] for name in _RATES if isinstance(attributes.get(name), numbers.Real)}


def _is_stateful(layer):
    return isinstance(layer, keras.Layer) and getattr(layer, "stateful", False) is True


def _is_declared(operation):
    return getattr(operation, "rdrop_stochastic", None) is False


def _is_vouched(operation):
    return _is_declared(operation) or _is_known(operation)


def _is_known(operation):
    """Whether all code that computes the outputs of `operation`, except its sublayers, is Keras's or KerasHub's."""
    if type(operation).__name__ in _FOREIGN or "call" in vars(operation):
        return False
    for cls in type(operation).__mro__:
        if cls is keras.Layer or cls is keras.Operation:
            break
        if not keras_private.is_from_known(cls.__module__):
            defined = [name for name, value in vars(cls).items() if _is_code(value) and name not in _HARMLESS]
            if defined:
                return False
    return not any(map(_is_foreign_callable, vars(operation).items()))


def _is_code(value):
    return callable(value) or isinstance(value, (classmethod, property, staticmethod))


def _is_foreign_callable(attribute):
    """Whether an attribute is a function from elsewhere that a layer may call on its inputs, such as an activation."""
    name, value = attribute
    while isinstance(value, functools.partial):
        value = value.func
    if not callable(value) or isinstance(value, (type, keras.Layer)) or _NOT_CALLED.search(name):
        return False
    return not keras_private.is_from_known(getattr(value, "__module__", None) or type(value).__module__)


def _listed(layers):
    rows = [" ".join([layer.path or layer.name, *(f"{k}={v}" for k, v in values.items())]) for layer, values in layers]
    more = [f"and {len(rows) - 20} more"] if len(rows) > 20 else []
    return ", ".join(rows[:20] + more)
