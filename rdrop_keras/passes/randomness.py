"""Which layers are random in training, which are known not to be, and which relate the rows of a batch.

A layer counts as deterministic only if its code is Keras's or KerasHub's and shows nothing random, or if it declares

    rdrop_stochastic = False

on the class or the layer. This promises that in training its outputs depend on its inputs and weights alone, that it
changes no state, and that each row of the outputs depends on one row of the batch. `rdrop_stochastic = True` declares
it random.

    rdrop_mixes_rows = True

on a layer or a model, or on its class, declares that its rows depend on each other or share one draw of random numbers.
The passes then run one after another. Both can be declared together.

Comes in: a model, a layer or an operation. Goes out: what is known of it, and why. Called by: other modules of
`passes`, `logs` for a warning, and `with_dropout`.
"""

import functools
import inspect
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
# Random layers, known by name. Some draw from Keras's global seed, and some make a seed only for a rate above 0.
_DROPOUT = re.compile("Dropout|DropPath|DropBlock|StochasticDepth|GaussianNoise")
# Layers whose non-trainable variables do not keep them from running once for all passes. Batch normalization updates
# its own by the mean and variance of the batch, which are the same when the batch is repeated. `Normalization` never
# updates its own.
_EXACT_STATE = ("BatchNormalization", "Normalization")


def classify(model):
    """The layers of `model` by what is known of their randomness in training.

    Returns:
        Three lists. `active` has layers that draw random numbers. `inactive` has `(layer, rates)` for those that would
        if their rates were above 0. `opaque` has layers with code from outside Keras and KerasHub, which may draw or
        not. Models are never `opaque`, since their `call` usually only connects layers.
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
        elif not isinstance(layer, keras.Model) and not _is_vouched(layer):
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


def is_vouched_for(operation):
    """Whether all code that computes the outputs of `operation` is Keras's, KerasHub's, or declared deterministic."""
    return all(map(_is_vouched, _parts(operation)))


def treats_rows_alike(operation):
    """Whether `operation` is known to compute each row of its outputs from the same row of its inputs."""
    return (
        isinstance(operation, keras.Layer) and is_vouched_for(operation) and not any(map(mixes_rows, _parts(operation)))
    )


def mixes_rows(operation):
    """Whether `operation` itself declares that its rows depend on each other."""
    return bool(getattr(operation, "rdrop_mixes_rows", False))


def why_rows_relate(operation):
    """Why rows of a batch depend on each other in `operation`; None if none of its layers shows it."""
    for layer in _parts(operation):
        if mixes_rows(layer):
            return f"{layer.name!r} declares rdrop_mixes_rows"
        noise_shape = getattr(layer, "noise_shape", None)
        # Any other noise shape begins with 1 or the size of one batch, or is too short to have an axis for rows.
        for_each_row = noise_shape is None or tuple(noise_shape)[:1] == (None,)
        if type(layer).__name__ in _ONCE_A_BATCH or not for_each_row:
            return f"{layer.name!r} draws once for a whole batch"
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

    Returns:
        Whether a layer is known to be random. If none is, the model's own code may still draw random numbers.

    Raises:
        ValueError: If no layer is random in training, or the random ones stay off.
    """
    active, inactive, opaque = classify(model)
    off = [] if keras_private.takes_training(model) else [layer for layer in active if _is_off_by_default(layer)]
    if off:
        raise ValueError(
            f"`{type(model).__name__}.call` has no `training` argument, so Keras keeps its dropout off in training. "
            "Write `def call(self, inputs, training=None)`. "
            f"Received: model={model.name!r} with {_listed((layer, {}) for layer in off)}."
        )
    if not active and not opaque and (inactive or is_vouched_for(model)):
        raise ValueError(
            "R-Drop needs a layer that is random in training, else all passes are identical. "
            "Where rates are 0, as in many pretrained configurations, `rdrop_keras.with_dropout(model, 0.1)` raises "
            "them. Elsewhere insert a `keras.layers.Dropout`, for example before the last layer. Or train with "
            f"`alpha=0`. Received: model={model.name!r}, whose dropout layers are: {_listed(inactive) or 'none'}."
        )
    return bool(active)


def why_equal(model):
    """What can be done if the passes of `model` turned out to be equal."""
    active, _, _ = classify(model)
    cls = type(model).__name__
    if not active:
        most_likely = (
            "No layer is known to be random: insert a `keras.layers.Dropout`, for example before the last layer."
        )
    elif keras_private.functional(model) is None:
        most_likely = f"Does `{cls}.call` hand `training` on to {_listed((layer, {}) for layer in active)}?"
    else:
        most_likely = ""
    if not keras_private.takes_training(model):
        most_likely += (
            f" `{cls}.call` has no `training` argument, so Keras hands none on: write "
            "`def call(self, inputs, training=None)`."
        )
    return (
        f"{most_likely} Where all rows of a batch share one draw of random numbers, set `rdrop_mixes_rows = True` on "
        "that layer, and the passes run one after another."
    ).strip()


def rates_of(layer):
    """`{name: rate}`: how strong the randomness of `layer` is, by the names under which Keras keeps it."""
    attributes = vars(layer)
    named = [name for name in _RATES if name in attributes]
    return {name: attributes[name] for name in named if isinstance(attributes[name], numbers.Real)}


def _parts(operation):
    """`operation` and all layers below it."""
    return keras_private.all_layers(operation) or [operation]


def _is_off_by_default(layer):
    """Whether `layer` is random only where it is told that it is training."""
    training = inspect.signature(layer.call).parameters.get("training")
    return training is not None and training.default is not True


def _is_stateful(layer):
    return isinstance(layer, keras.Layer) and getattr(layer, "stateful", False) is True


def _is_declared(operation):
    return getattr(operation, "rdrop_stochastic", None) is False


def _is_vouched(operation):
    """`is_vouched_for` without sublayers."""
    if _is_declared(operation):
        return True
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
    """Whether an attribute is a function from elsewhere, such as an activation, that a layer may call on its inputs."""
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
