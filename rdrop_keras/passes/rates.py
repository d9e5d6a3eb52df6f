"""Where the configuration of a model has places for dropout rates, and the same configuration with other rates.

A configuration is what `get_config` returns. It says where a model could have dropout, also where none was made because
the rate is 0. Which layers of a model are random is in `randomness.py`.
"""

import contextlib
import numbers
import re
import warnings

from rdrop_keras.keras_gaps import _keras

# How Keras, KerasHub and timm name the rate of a dropout.
_DROPOUT = re.compile(r"dropout|(^|_)drop(_rate|_prob|_p)?$")
# Stochastic depth drops branches of the network by a schedule of its own.
_DEPTH = re.compile(r"drop_?path|drop_?connect|stochastic_?depth", re.IGNORECASE)
# Recurrent dropout keeps Keras from its fast implementations.
_NEITHER = re.compile(r"recurrent|seed|(^|_)num_|drop_?block", re.IGNORECASE)
# Names that say what they are only together with the name of the class, such as that of `Dropout(rate)`.
_OF_CLASS = ("rate", "drop_rate", "drop_prob")


def kind(model):
    """What `with_dropout` is to set in `model`: "dropout", or "depth" if there is nothing else, or None.

    "depth" is stochastic depth.
    """
    found = set()

    def note(kind, rate):
        found.add(kind)
        return rate

    for part in parts(model):
        with contextlib.suppress(Exception):  # A layer without a configuration has no places.
            with_rates(configuration(part), note, type(part).__name__)
    return next((kind for kind in ("dropout", "depth") if kind in found), None)


def parts(model):
    """The layers whose configurations together are that of `model`: those in its graph, or `model` itself."""
    if not _keras.is_plain_graph(model):
        return [model]
    return [part for layer in model.layers for part in parts(layer)]


def configuration(layer):
    """`layer.get_config()`, without Keras's warning that a lambda in it could not be loaded from a file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
        return layer.get_config()


def with_rates(config, new_rate, class_name=""):
    """A copy of `config`, of a class of that name, in which each rate is `new_rate(kind, rate)`.

    A rate is a number ≥ 0 and < 1 whose name says that it is one. Its kind is "dropout" or "depth".
    """
    return {
        # A preprocessor is no part of the network.
        name: value if name == "preprocessor" else _replaced(name, value, new_rate, class_name)
        for name, value in config.items()
    }


def _replaced(name, value, new_rate, class_name):
    if isinstance(value, dict):
        if "class_name" not in value or not isinstance(value.get("config"), dict):
            return with_rates(value, new_rate)
        inner = with_rates(value["config"], new_rate, str(value["class_name"]))
        # To compile it again would ask for losses and metrics that may not be registered.
        return {**{key: entry for key, entry in value.items() if key != "compile_config"}, "config": inner}
    if isinstance(value, (list, tuple)):
        return type(value)([_replaced(name, entry, new_rate, class_name) for entry in value])
    is_rate = isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= value < 1
    kind = _kind(str(name), class_name) if is_rate else None
    return value if kind is None else new_rate(kind, value)


def _kind(name, class_name):
    if _NEITHER.search(name):
        return None
    if _DEPTH.search(name):
        return "depth"
    if name in _OF_CLASS:
        if _DEPTH.search(class_name):
            return "depth"
        if "Dropout" in class_name and not _NEITHER.search(class_name):
            return "dropout"
    return "dropout" if _DROPOUT.search(name) else None
