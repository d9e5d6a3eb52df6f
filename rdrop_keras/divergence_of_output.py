"""Which divergence each output has: the one that the user chose, or the one that the output's compiled loss asks for.

Comes in: what `RDropModel` got for `divergence`, the compiled losses and the names of the outputs. Goes out: a
`Divergence` or an `OwnDivergence` for each output with a loss. Called by: `RDropModel`, and the loss when it is built.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import keras
from keras import ops, tree

from rdrop_keras.divergences import NAMES, Divergence, Name, widened

# What an `RDropModel` takes for one output, and for all.
OfOutput: TypeAlias = Literal["auto"] | Name | Divergence | Callable[[list[Any]], Any]
OfModel: TypeAlias = OfOutput | Mapping[str, Any] | Sequence[Any]

_REGRESSION = (
    keras.losses.huber,
    keras.losses.log_cosh,
    keras.losses.mean_absolute_error,
    keras.losses.mean_absolute_percentage_error,
    keras.losses.mean_squared_error,
    keras.losses.mean_squared_logarithmic_error,
)
_SOFTMAX = (
    keras.losses.categorical_crossentropy,
    keras.losses.categorical_focal_crossentropy,
    keras.losses.kl_divergence,
    keras.losses.sparse_categorical_crossentropy,
)
_SIGMOID = (keras.losses.binary_crossentropy, keras.losses.binary_focal_crossentropy)
# What `divergence="auto"` chooses. Losses that say too little about the outputs (hinge, Poisson, cosine, Dice, CTC,
# one's own) are left out: there the user chooses.
_OF_LOSS = {
    **dict.fromkeys(_REGRESSION, "mse"),
    **dict.fromkeys(_SIGMOID, "bernoulli_kl"),
    **dict.fromkeys(_SOFTMAX, "kl"),
}


class OwnDivergence:
    """A divergence that is the user's function of the list of all passes' outputs.

    It has the interface of `Divergence`. It says nothing about logits and axes, and does not tell what outputs decide.
    """

    name = from_logits = axis = None
    decides = False

    def __init__(self, function):
        self.function = function

    def __call__(self, passes):
        values = ops.convert_to_tensor(self.function([widened(output) for output in passes]))
        rows, batch = (tensor.shape[0] if len(tensor.shape) else 0 for tensor in (values, passes[0]))
        if len(values.shape) == 0 or (rows != batch and None not in (rows, batch)):
            raise ValueError(
                "A function given as `divergence` must return one value for each element of the batch, a tensor of "
                f"shape (batch, …): average over other axes only. Received: a tensor of shape {tuple(values.shape)} "
                f"from {_describe(self.function)}, for outputs of shape {tuple(passes[0].shape)}."
            )
        return values

    def check_axis(self, shape):
        """Accepts every shape: the function itself has to cope with it."""


def check(divergence):
    """Raises if an `RDropModel` does not accept `divergence`."""
    choices = f"one of {', '.join(map(repr, ('auto', *NAMES)))}, a rdrop_keras.Divergence or a function"
    if divergence is None:
        _raise_type(choices, divergence)
    for leaf in tree.flatten(divergence):
        if isinstance(leaf, str):
            if leaf not in ("auto", *NAMES):
                raise ValueError(f"`divergence` must be {choices}. Received: divergence={leaf!r}.")
        elif leaf is not None and not isinstance(leaf, Divergence):
            if not callable(leaf) or isinstance(leaf, (type, keras.losses.Loss)):
                _raise_type(choices, leaf)
            _check_signature(leaf)


def _raise_type(choices, received):
    raise TypeError(
        f"`divergence` must be {choices}; or a dict or list of these. Received: divergence={received!r} "
        f"({type(received).__name__})."
    )


def _check_signature(function):
    try:
        inspect.signature(function).bind([])
    except ValueError:  # It has no signature that Python can read.
        return
    except TypeError as error:
        raise TypeError(
            "A function given as `divergence` must take one argument, the list of the outputs of all passes: "
            "`lambda outputs: ...`, where `outputs[0]` and `outputs[1]` are those of two passes. "
            f"Received: {_describe(function)}{inspect.signature(function)}."
        ) from error


def resolve(divergence, loss, output):
    """The divergence of one output. What the user left open is filled in from the output's compiled loss.

    Args:
        divergence: A name, `"auto"`, a `Divergence` or a function.
        loss: What was compiled for the output: a Keras loss, its name, or any callable.
        output: The output's name, for messages; None if it has none.

    Raises:
        ValueError: If the loss does not tell what the user left open.
    """
    check(divergence)
    if not isinstance(divergence, (str, Divergence)):
        return OwnDivergence(divergence)
    loss = keras.losses.get(loss)
    function = _builtin_function(loss)
    where = "the model's output" if output is None else f"output {output!r}"
    if isinstance(divergence, str) and divergence == "auto":
        if function is None:
            raise ValueError(
                f"`divergence='auto'` cannot read a divergence off the loss of {where}: {_describe(loss)}. Say what "
                "the output is, to the wrapper and not to `compile`: "
                "`RDropModel(model, divergence=rdrop_keras.Divergence(name, from_logits=...))` with name one of "
                f"{', '.join(map(repr, NAMES))}; for several outputs, a dict with one for each."
            )
        divergence = _OF_LOSS[function]
    if isinstance(divergence, str):
        divergence = Divergence(divergence)
    config = loss.get_config() if function is not None and function is not loss else {}
    from_logits = divergence.from_logits
    if from_logits is None and divergence.name != "mse":
        if function not in _SOFTMAX + _SIGMOID:
            raise ValueError(
                f"The loss of {where}, {_describe(loss)}, does not tell whether that output holds logits or "
                f"probabilities, which divergence {divergence.name!r} must know. Say so to the wrapper: "
                f"`RDropModel(model, divergence=rdrop_keras.Divergence({divergence.name!r}, from_logits=...))`."
            )
        from_logits = bool(config.get("from_logits", False))
    axis = config.get("axis", -1) if divergence.axis is None else divergence.axis
    return Divergence(divergence.name, from_logits, axis)


def check_losses(divergence, loss, output_names):
    """Raises if `divergence` does not fit a loss given to `compile`, as far as losses and outputs are known then."""
    if tree.is_nested(divergence):
        return
    if isinstance(loss, dict):
        groups = loss.items()
    elif isinstance(loss, (list, tuple)) and len(loss) == len(output_names):
        groups = zip(output_names, loss)
    else:
        groups = [(output_names[0] if len(output_names) == 1 else None, loss)]
    for name, group in groups:
        for leaf in tree.flatten(group):
            # Keras chooses between three losses for "crossentropy" when it has seen the targets.
            if leaf is not None and str(leaf).lower() not in ("ce", "crossentropy"):
                resolve(divergence, leaf, name)


def check_outputs(divergence, names):
    """Raises if a dict or list of divergences does not fit outputs called `names`."""
    if isinstance(divergence, dict) and not any(map(tree.is_nested, divergence.values())):
        unknown = sorted(set(divergence) - set(names))
        if unknown:
            raise ValueError(
                f"The keys of `divergence` must be names of outputs: {', '.join(map(repr, names))}. "
                f"Received: {', '.join(map(repr, unknown))}."
            )
    elif isinstance(divergence, (list, tuple)) and len(tree.flatten(divergence)) != len(names):
        raise ValueError(
            f"`divergence` must have one entry for each of the {len(names)} outputs; None for an output without a "
            f"loss. Received: {len(tree.flatten(divergence))} entries."
        )


def choose(divergence, path, position, name):
    """The entry of `divergence` for the output with that path, position and name."""
    chosen = divergence
    if isinstance(divergence, (list, tuple)):
        chosen = tree.flatten(divergence)[position]
    elif isinstance(divergence, dict):
        chosen = divergence.get(name)
        if chosen is None:
            chosen = divergence
            for key in path:
                if isinstance(chosen, dict):
                    chosen = chosen.get(key)
                elif isinstance(chosen, (list, tuple)):
                    chosen = chosen[key]
    if chosen is None or tree.is_nested(chosen):
        raise ValueError(
            f"`divergence` must have an entry for every output with a loss. Received: none for output {name!r} in "
            f"{divergence!r}."
        )
    return chosen


def ignored_class(loss):
    """The `ignore_class` of `loss`, a label that it leaves out of its sum and denominator; None if it has none."""
    return None if _builtin_function(loss) is None else loss.get_config().get("ignore_class")


def _builtin_function(loss):
    """The function in `_OF_LOSS` that `loss` is or wraps; None if there is none."""
    if isinstance(loss, keras.losses.Loss):
        # A subclass with a `call` of its own may read the outputs in another way.
        if type(loss).call is not keras.losses.MeanSquaredError.call:
            return None
        loss = loss.fn
    return next((function for function in _OF_LOSS if function is loss), None)


def _describe(function):
    return getattr(function, "__name__", None) or type(function).__name__
