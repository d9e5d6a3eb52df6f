"""Several passes in one: which step is paired, where its tensors are tiled, and what makes the passes differ.

Passes lie one after another on axis 0: `(N, …)` becomes `(mN, …)`, all rows of the first pass, then all of the second.
"""

import contextlib
import contextvars
import numbers
import re

import keras
from keras import ops, tree

from rdrop_keras import _keras

# Context and not an attribute of the model: `MirroredStrategy` traces its replicas in threads that take turns, each in
# the middle of its own step.
_num_passes = contextvars.ContextVar("rdrop_keras_num_passes", default=1)


@contextlib.contextmanager
def paired_step(num_passes):
    """Within it, a forward pass makes `num_passes` passes."""
    token = _num_passes.set(num_passes)
    try:
        yield
    finally:
        _num_passes.reset(token)


def passes_in_step():
    """Passes of the step under way: 1 unless it is paired."""
    return _num_passes.get()


def forward(model, inputs, training):
    """The outputs of `model` over `inputs`, of all passes at once in a paired step.

    Args:
        model: The wrapped model.
        inputs: What `model` is called with: a tensor or a nested structure of them, with the batch on axis 0.
        training: As of `model`; not passed on to a model that does not take it.

    Returns:
        The model's outputs, `(N, …)`, or in a paired step `(mN, …)`, which `split` takes apart.
    """
    inputs = tile(inputs, passes_in_step())
    return model(inputs, training=training) if _keras.takes_training(model) else model(inputs)


def tile(tensors, num_passes):
    """Repeats each tensor of a nested structure along axis 0: `(N, …)` to `(mN, …)`; None stays None."""
    if num_passes == 1:
        return tensors

    def repeat(tensor):
        if tensor is None:
            return None
        if len(tensor.shape) == 0:
            raise ValueError(
                "R-Drop repeats the batch, axis 0 of every input. Received: an input of shape (), which has none."
            )
        return ops.concatenate([tensor] * num_passes, axis=0)

    return tree.map_structure(repeat, tensors)


def split(tensors, num_passes):
    """The passes of each tensor of a nested structure: a list of `num_passes` structures of `(N, …)` tensors.

    Keras's masks and cached logits go with the tensors.
    """

    def take(tensor, index):
        size = ops.shape(tensor)[0] // num_passes
        return tensor[index * size : (index + 1) * size]

    def passes(tensor, index):
        return _keras.copy_annotations(tensor, take(tensor, index), lambda attached: take(attached, index))

    return [tree.map_structure(lambda t, i=i: None if t is None else passes(t, i), tensors) for i in range(num_passes)]


def stack(tensor, num_passes):
    """`(mN, …)` to `(m, N, …)`."""
    shape = ops.shape(tensor)
    return ops.reshape(tensor, (num_passes, shape[0] // num_passes, *shape[1:]))


# Where a `call` must be defined for its layer's randomness to be known from its name and attributes.
_KNOWN_LIBRARIES = ("keras", "keras_cv", "keras_hub", "keras_nlp")
# Layers of Keras that run code of others.
_FOREIGN = ("FlaxLayer", "JaxLayer", "Lambda", "TFSMLayer", "TorchModuleWrapper")
# How Keras and KerasHub name the strength of a layer's randomness. A layer without it is always random.
_RATES = ("rate", "stddev", "dropout", "recurrent_dropout", "drop_rate", "drop_prob")
# Some draw from Keras's global seed and some make their seed only for a rate above 0: these are known by name.
_DROPOUT = re.compile("Dropout|DropPath|DropBlock|StochasticDepth|GaussianNoise")


def stochastic_layers(model):
    """The layers of `model` by what is known of their randomness in training.

    Returns:
        Three lists. `active`: layers that draw random numbers. `inactive`: `(layer, rates)` of those that would,
        were their rates above 0. `opaque`: layers whose `call` comes from outside Keras and KerasHub and may draw or
        not. Models are not among the last: their `call` as a rule only connects layers.
    """
    active, inactive, opaque = [], [], []
    for layer in _keras.all_layers(model):
        attributes = vars(layer)
        rates = {name: attributes[name] for name in _RATES if isinstance(attributes.get(name), numbers.Real)}
        if _keras.has_seed(layer) or (rates and _DROPOUT.search(type(layer).__name__)):
            if rates and not any(rates.values()):
                inactive.append((layer, rates))
            else:
                active.append(layer)
        elif not isinstance(layer, keras.Model) and not _is_known(layer):
            opaque.append(layer)
    return active, inactive, opaque


def check_stochastic(model):
    """Raises if the passes of `model` would be identical.

    Raises:
        ValueError: If no layer is random in training. A model whose `call` is the user's own and holds no dropout
            layer at all is let through: it may draw random numbers by itself.
    """
    active, inactive, opaque = stochastic_layers(model)
    if opaque or (active and _keras.takes_training(model)):
        return
    if not active and not inactive and not _is_known(model):
        return
    if active:
        raise ValueError(
            f"`{type(model).__name__}.call` has no `training` argument, so Keras keeps its dropout off in training and "
            "the passes of R-Drop would be identical. Write `def call(self, inputs, training=None)`. "
            f"Received: model={model.name!r} with {_listed((layer, {}) for layer in active)}."
        )
    raise ValueError(
        "R-Drop needs a layer that is random in training, else all passes are identical. Give a dropout layer a rate "
        "above 0 (pretrained configurations often have 0: look for a `dropout` argument), or train with `alpha=0`. "
        f"Received: model={model.name!r}, whose dropout layers are: {_listed(inactive) or 'none'}."
    )


def _is_known(layer):
    call = type(layer).call
    return type(layer).__name__ not in _FOREIGN and call.__module__.partition(".")[0] in _KNOWN_LIBRARIES


def _listed(layers):
    rows = [" ".join([layer.path or layer.name, *(f"{k}={v}" for k, v in rates.items())]) for layer, rates in layers]
    more = [f"and {len(rows) - 20} more"] if len(rows) > 20 else []
    return ", ".join(rows[:20] + more)
