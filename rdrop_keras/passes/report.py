"""Reports for users: what an `RDropModel` acts on, and what it computes once.

Comes in: a model, or an `RDropModel` around it. Goes out: a printable table of its calls, or a list of its random
layers. Called by: users, through `rdrop_keras`.
"""

import itertools
from typing import NamedTuple

import keras

from rdrop_keras.passes import check_share
from rdrop_keras.passes.graph import PairedGraph, num_parameters
from rdrop_keras.passes.randomness import classify
from rdrop_keras.wrapper.wrapper_model import check_built, unwrapped


class Call(NamedTuple):
    """One call of a layer or operation: its name, class, number of parameters, whether it runs once, and why."""

    name: str
    layer_class: str
    parameters: int
    once: bool
    reason: str


class Sharing:
    """What the passes of R-Drop compute once.

    It prints as a table, in which neighbouring calls with the same reason have one row.

    Attributes:
        calls: A list of `Call`, in the order in which they run.
        summary: One line about all of them.
    """

    calls: list[Call]
    summary: str

    def __init__(self, graph: PairedGraph) -> None:
        self.calls = [
            Call(
                name=call.name,
                layer_class=type(call.operation).__name__,
                parameters=num_parameters(call.weights),
                once=not call.repeated,
                reason=call.reason,
            )
            for call in graph.calls
        ]
        self.summary = graph.summary()

    def __repr__(self) -> str:
        rows = [("layers", "calls", "parameters", "run", "why")]
        for (once, reason), neighbours in itertools.groupby(self.calls, key=lambda call: (call.once, call.reason)):
            group = list(neighbours)
            names = group[0].name if len(group) == 1 else f"{group[0].name} … {group[-1].name}"
            parameters = sum(call.parameters for call in group)
            rows.append((names, str(len(group)), f"{parameters:,}", "once" if once else "each pass", reason))
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = [
            f"{layers:{widths[0]}}  {calls:>{widths[1]}}  {parameters:>{widths[2]}}  {run:{widths[3]}}  {why}"
            for layers, calls, parameters, run, why in rows
        ]
        return "\n".join([self.summary, "", *lines])


def sharing(model: keras.Model, share: str = "deterministic") -> Sharing:
    """What R-Drop would compute once for all passes of `model`, what for every pass, and why.

    Layers before the first that is random in training give every pass the same values, so `RDropModel` runs them once
    per step. A layer counts as random if it is random or may be. Layers that may be random are subclassed models,
    `Lambda`, activations of your own, layers that keep a state (except normalization and recurrent layers), and layers
    from outside Keras and KerasHub that do not set `rdrop_stochastic = False`. A layer also runs for every pass if axis
    0 of its output is not the batch. `.summary` tells whether the passes run one after another, and why.

    Args:
        model: A built `keras.Model`, or an `RDropModel` around one.
        share: As for `RDropModel`: `"deterministic"`, `"nothing"` or the name of a layer.

    Returns:
        A `Sharing`, which prints as a table. `.calls` has an entry for each call of a layer. `.summary` is one line.

    Raises:
        TypeError: If `model` is no `keras.Model` or `share` no string.
        ValueError: If `model` is not built, or `share` names no layer that is followed by a random one.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.Input((8,)), keras.layers.Dense(4), keras.layers.Dropout(0.1), keras.layers.Dense(2)], name="mlp"
    ... )
    >>> print(rdrop_keras.sharing(model).summary)
    1 of 3 layer calls (78.3% of the parameters) run once for all passes, share='deterministic'
    """
    model = unwrapped(model)
    check_share(share)
    check_built(model)
    return Sharing(PairedGraph(model, share))


def stochastic_layers(model: keras.Model) -> list[keras.Layer]:
    """The layers of `model` that are random in training, on which R-Drop acts.

    Args:
        model: A `keras.Model`, built so that all of its layers exist, or an `RDropModel` around one.

    Returns:
        A list of layers, including sublayers of other layers. Layers whose rate is 0 are left out, and so are those
        from outside Keras and KerasHub that have no seed and do not declare `rdrop_stochastic`.

    Raises:
        TypeError: If `model` is no `keras.Model`.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.1, name="drop"), keras.layers.Dense(2)])
    >>> [(layer.name, layer.rate) for layer in rdrop_keras.stochastic_layers(model)]
    [('drop', 0.1)]
    """
    return classify(unwrapped(model))[0]
