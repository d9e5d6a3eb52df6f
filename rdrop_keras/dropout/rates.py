"""The dropout rates in the configuration of a model, and the same configuration with other rates.

A configuration is what `get_config` returns. It has a place for a rate even if the rate is 0 and the model made no
dropout layer for it. `passes/randomness.py` decides which layers are random.

Comes in: a model or its configuration. Goes out: the type of its rates, and a configuration with other rates. Called
by: `with_dropout`.
"""

import contextlib
import numbers
import re
import warnings

from rdrop_keras import keras_private

# The names of dropout rates in Keras, KerasHub and timm.
_DROPOUT = re.compile(r"dropout|(^|_)drop(_rate|_prob|_p)?$")
# Stochastic depth drops whole branches of the network, at rates that grow with depth.
_DEPTH = re.compile(r"drop_?path|drop_?connect|stochastic_?depth", re.IGNORECASE)
# Recurrent dropout is left alone, since Keras's fast implementations do not have it.
_NEITHER = re.compile(r"recurrent|seed|(^|_)num_|drop_?block", re.IGNORECASE)
# Names that are dropout rates only in some classes, such as `rate` in `Dropout(rate)`.
_OF_CLASS = ("rate", "drop_rate", "drop_prob")


def rate_type(model):
    """Which rates `with_dropout` is to set in `model`: "dropout", else "depth" (stochastic depth), else None."""
    found = set()

    def note(rate_type, rate):
        found.add(rate_type)
        return rate

    for part in parts(model):
        with contextlib.suppress(Exception):  # A layer without a configuration has no places.
            with_rates(configuration(part), note, type(part).__name__)
    return next((rate_type for rate_type in ("dropout", "depth") if rate_type in found), None)


def parts(model):
    """The layers whose configurations make up that of `model`: those in its graph, or `model` itself."""
    if not keras_private.is_plain_graph(model):
        return [model]
    return [part for layer in model.layers for part in parts(layer)]


def configuration(layer):
    """`layer.get_config()`, without Keras's warning that a lambda in it could not be loaded from a file."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The object being serialized includes a `lambda`")
        return layer.get_config()


def with_rates(config, new_rate, class_name=""):
    """A copy of `config`, the configuration of a `class_name`, in which each rate is `new_rate(rate_type, rate)`.

    A rate is a number ≥ 0 and < 1 with the name of a rate. Its type is "dropout" or "depth".
    """
    return {
        # A preprocessor is not part of the network.
        name: value if name == "preprocessor" else _replaced(name, value, new_rate, class_name)
        for name, value in config.items()
    }


def _replaced(name, value, new_rate, class_name):
    if isinstance(value, dict):
        if "class_name" not in value or not isinstance(value.get("config"), dict):
            return with_rates(value, new_rate)
        inner = with_rates(value["config"], new_rate, str(value["class_name"]))
        # Compiling it again would need losses and metrics that may not be registered.
        return {**{key: entry for key, entry in value.items() if key != "compile_config"}, "config": inner}
    if isinstance(value, (list, tuple)):
        return type(value)([_replaced(name, entry, new_rate, class_name) for entry in value])
    is_rate = isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= value < 1
    rate_type = _rate_type(str(name), class_name) if is_rate else None
    return value if rate_type is None else new_rate(rate_type, value)


def _rate_type(name, class_name):
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
