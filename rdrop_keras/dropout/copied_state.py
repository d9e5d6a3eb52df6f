"""Copies the state of a model into another that was made from its configuration.

The two do not have the same lists of layers. Some layers of KerasHub make their dropout only for a rate above 0, and a
graph with dropout has its other layers in another order. So layers are paired from the outside in, by name within a
graph and by order elsewhere.

Comes in: two models of the same layers, except for dropout. Goes out: weights, trainable flags, LoRA and assets of the
first in the second. Called by: `with_dropout`.
"""

import collections
import re
import tempfile

from rdrop_keras import keras_private


def copy_state(source, target):
    """Copies the state of `source` into `target`.

    Raises:
        ValueError: If a layer with weights in one model has no counterpart in the other.
    """
    pairs = _Pairs()
    pairs.add(source, target)
    for old, new in pairs:
        _copy_layer(old, new)
    for old, new in pairs:
        with_lora = keras_private.lora_layers(old)
        if with_lora:
            keras_private.set_lora_layers(new, [pairs.of(layer) for layer in with_lora])


class _Pairs:
    """Pairs of layers. Iteration gives outer layers before inner ones."""

    def __init__(self):
        self._new = {}
        self._old = {}

    def __iter__(self):
        return iter([(old, self._new[id(old)]) for old in self._old.values()])

    def of(self, old):
        return self._new[id(old)]

    def add(self, old, new):
        if old is new:  # Such as a preprocessor, which both share.
            return
        if id(old) in self._new or id(new) in self._old:
            if self._new.get(id(old)) is not new:
                raise _mismatch(f"{old.path} is shared in one model and not in the other")
            return
        if type(old) is not type(new):
            raise _mismatch(f"{old.path} ({type(old).__name__}) and {new.path} ({type(new).__name__})")
        self._new[id(old)], self._old[id(new)] = new, old
        for olds, news in _groups(old, new, _has_weights):
            if len(olds) != len(news):
                names = [[layer.name for layer in layers] for layers in (olds, news)]
                raise _mismatch(f"{old.path} holds {names[0]}, and {names[1]} anew")
            for inner_old, inner_new in zip(olds, news):
                self.add(inner_old, inner_new)
        for olds, news in _groups(old, new, lambda layer: not _has_weights(layer)):
            # Dropout may be among them and have no counterpart. The others have no state but a flag.
            if [type(layer) for layer in olds] == [type(layer) for layer in news]:
                for inner_old, inner_new in zip(olds, news):
                    if id(inner_old) not in self._new and id(inner_new) not in self._old:
                        self.add(inner_old, inner_new)


def _groups(old, new, belongs):
    """Pairs of lists: layers of `old`, and of `new`, for which `belongs` holds. The k-th of both are counterparts."""
    both = [[layer for layer in keras_private.children(parent) if belongs(layer)] for parent in (old, new)]
    names = [[layer.name for layer in layers] for layers in both]
    if len(set(names[0])) == len(names[0]) and sorted(names[0]) == sorted(names[1]):
        by_name = {layer.name: layer for layer in both[1]}
        return [([layer], [by_name[layer.name]]) for layer in both[0]]
    if not keras_private.operations(old):
        return [both]
    # In some graphs of KerasHub, names of layers begin with the name of the model. Names that Keras makes end in a
    # number that counts on from model to model.
    groups = collections.defaultdict(lambda: ([], []))
    for i, (parent, layers) in enumerate(zip((old, new), both)):
        for layer in layers:
            name = layer.name.removeprefix(f"{parent.name}_")
            stem, number = re.fullmatch(r"(.*?)(?:_(\d+))?", name, re.DOTALL).groups()
            groups[type(layer), stem][i].append((int(number or 0), layer))
    return [
        tuple([layer for _, layer in sorted(layers, key=lambda entry: entry[0])] for layers in pair)
        for pair in groups.values()
    ]


def _copy_layer(old, new):
    if getattr(old, "lora_enabled", False):
        if not new.lora_enabled:
            new.enable_lora(old.lora_rank)
        new.lora_alpha = old.lora_alpha  # Keras 3.15 loses it if LoRA comes from the configuration.
    for variable, counterpart in _variable_pairs(old, new):
        keras_private.assign(counterpart, variable)
        if counterpart.trainable != variable.trainable:
            counterpart.trainable = variable.trainable
    keras_private.set_trainable(new, old.trainable)
    if hasattr(old, "save_assets"):  # Such as vocabularies, which are not variables.
        with tempfile.TemporaryDirectory() as folder:
            old.save_assets(folder)
            new.load_assets(folder)
    elif hasattr(old, "finalize_state"):  # `Normalization` uses values that it computes from its variables.
        new.finalize_state()


def _variable_pairs(old, new):
    olds, news = keras_private.own_variables(old), keras_private.own_variables(new)
    names = [[variable.name for variable in variables] for variables in (olds, news)]
    if len(set(names[0])) == len(names[0]) and sorted(names[0]) == sorted(names[1]):
        # A layer to which variables were added later, such as by quantization, has them in another order than a layer
        # that was made with them.
        olds, news = (sorted(variables, key=lambda variable: variable.name) for variables in (olds, news))
    described = [[(tuple(v.shape), v.dtype) for v in variables] for variables in (olds, news)]
    if described[0] != described[1]:
        raise _mismatch(f"{old.path} has variables {described[0]}, and {described[1]} anew")
    return zip(olds, news)


def _has_weights(layer):
    return any(map(keras_private.own_variables, keras_private.all_layers(layer)))


def _mismatch(what):
    return ValueError(
        "The model made anew from the configuration must have the same layers with the same weights. Make it with the "
        f"rate that you want in its constructor, and copy its weights. Received: {what}."
    )
