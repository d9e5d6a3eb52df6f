"""What an `RDropModel` takes: each check raises for what it does not, naming what was received and the remedy."""

import numbers

import keras
import numpy as np
from keras import tree

from rdrop_keras import _keras, divergences, preprocessing
from rdrop_keras.alpha import is_number

# What `keras.Model` does in training and the wrapper does in the model's place.
_REPLACED = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics", *preprocessing.METHODS)


def check_unwrapped(model, wrapper):
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r} ({type(model).__name__}).")
    inner = next((layer for layer in _keras.all_layers(model) if isinstance(layer, wrapper)), None)
    if inner is not None:
        raise ValueError(
            f"`model` is or holds an RDropModel: use the model inside that, its `.model`. Received: {inner.name!r}."
        )


def check_model(model, wrapper):
    check_unwrapped(model, wrapper)
    pipeline = preprocessing.pipeline_class(model)
    for method in _REPLACED:
        known = [getattr(keras.Model, method), getattr(pipeline, method, None)]
        if getattr(type(model), method) not in known:
            raise ValueError(
                f"`{type(model).__name__}` overrides `{method}`, which an RDropModel around it would pass by. Override "
                f"`{method}` in a subclass of RDropModel instead, where `self.model` is the wrapped model."
            )


def check_divergence(divergence):
    choices = ("auto", *divergences.NAMES)
    for leaf in tree.flatten(divergence):
        if isinstance(leaf, str) and leaf not in choices:
            raise ValueError(
                f"`divergence` must be one of {', '.join(map(repr, choices))}, or a rdrop_keras.Divergence. "
                f"Received: divergence={leaf!r}."
            )
        if not isinstance(leaf, (str, divergences.Divergence)) and (leaf is not None or divergence is None):
            raise TypeError(
                f"`divergence` must be one of {', '.join(map(repr, choices))}, a rdrop_keras.Divergence, or a dict or "
                f"list of these. Received: divergence={leaf!r} ({type(leaf).__name__})."
            )


def check_integer(name, value, least):
    received = f"Received: {name}={value!r} ({type(value).__name__})."
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be an integer ≥ {least}. {received}")
    if value < least:
        raise ValueError(f"`{name}` must be an integer ≥ {least}. {received}")


def check_dropout_rates(rates, num_passes):
    if rates is None:
        return
    if isinstance(rates, np.ndarray) and rates.ndim == 1:
        rates = rates.tolist()
    received = f"Received: dropout_rates={rates!r}."
    must = "`dropout_rates` must be None or a tuple with a rate for each pass, from 0 to less than 1, not all 0."
    if not isinstance(rates, (list, tuple)):
        raise TypeError(f"{must} {received}")
    for rate in rates:
        if not is_number(rate):
            raise TypeError(f"{must} {received}")
    if len(rates) != num_passes:
        raise ValueError(f"{must} With num_passes={num_passes} it has {len(rates)}. {received}")
    if not all(0 <= rate < 1 for rate in rates) or not any(rates):
        raise ValueError(f"{must} {received}")


def check_share(share):
    """Raises if `share` is no string; whether it names a layer is seen when the graph is made."""
    if not isinstance(share, str):
        raise TypeError(
            "`share` must be 'deterministic', 'nothing' or the name of a layer. "
            f"Received: share={share!r} ({type(share).__name__})."
        )


def check_strategy(model, wrapper):
    own, others = _keras.strategy_of(model), _keras.strategy_of(wrapper)
    if own is not others:
        described = ["no strategy" if strategy is None else type(strategy).__name__ for strategy in (own, others)]
        raise ValueError(
            "`model` and the RDropModel around it must be made under the same `strategy.scope()`. Received: "
            f"model={model.name!r} made under {described[0]}, the RDropModel under {described[1]}."
        )
