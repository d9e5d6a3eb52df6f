"""The same model with dropout, for the many pretrained models that come without it.

Comes in: a model and a rate. Goes out: a new model of the same class and weights, with dropout at that rate. Called by:
users, before they wrap a model.
"""

from typing import TypeVar

import keras

from rdrop_keras import keras_private
from rdrop_keras.arguments import is_number
from rdrop_keras.dropout import copied_state, copies, rates
from rdrop_keras.passes import randomness
from rdrop_keras.wrapper.wrapper_model import check_built, check_unwrapped

ModelT = TypeVar("ModelT", bound=keras.Model)


def with_dropout(model: ModelT, rate: float) -> ModelT:
    """A new model of the same class, configuration and weights as `model`, with dropout at `rate`.

    R-Drop needs dropout, and many pretrained models come with a rate of 0. This is the remedy:

        model = rdrop_keras.RDropModel(rdrop_keras.with_dropout(model, 0.1))

    Where the rate goes depends on the model:

    - In a KerasHub task or backbone, and in any model whose class has its own configuration, all dropout rates of the
      configuration are set to `rate`, including those above 0 and those of nested models.
    - In a Functional or Sequential model, dropout layers at rate 0 get `rate`. So do attention layers, recurrent layers
      and layers of KerasHub with an argument such as `dropout` that is 0. Rates above 0 are kept. If all are above 0,
      the new model is a plain copy.

    Recurrent dropout is left as it is. Stochastic depth is left too, unless the model has no place for other dropout.

    The new model predicts what `model` predicts, and `model` itself does not change. Frozen layers stay frozen. LoRA
    and dtype policies are kept. A KerasHub task keeps its sampler and its preprocessor, which are the same objects. The
    new model is not compiled, except that a KerasHub task compiles itself with its defaults. It is made under the
    `tf.distribute` strategy of `model`.

    Args:
        model: A built `keras.Model`.
        rate: The dropout rate, a number > 0 and < 1. The paper uses 0.1 to fine-tune pretrained models.

    Returns:
        The new model.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If `rate` is not > 0 and < 1; if `model` is or holds an `RDropModel`; if it is not built; if it has
            no place for dropout; if it cannot be made anew from its configuration, such as a subclassed model whose
            constructor does not take the rate.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.0, name="drop"), keras.layers.Dense(3)])
    >>> rdrop_keras.stochastic_layers(model)
    []
    >>> model = rdrop_keras.with_dropout(model, 0.1)
    >>> [(layer.name, layer.rate) for layer in rdrop_keras.stochastic_layers(model)]
    [('drop', 0.1)]
    """
    check_unwrapped(model)
    _check_rate(rate)
    check_built(model)
    rate_type = rates.rate_type(model)
    if rate_type is None:
        raise ValueError(
            f"`model` must have a dropout layer, or a place for a dropout rate in its configuration. {_REMEDY} "
            f"Received: model={model.name!r} ({type(model).__name__}), which has neither."
        )

    def new_config(layer):
        is_model = isinstance(layer, keras.Model)

        def new_rate(of_type, old):
            # In a graph of layers the user chose each rate. A model's configuration is often as it was published.
            return float(rate) if of_type == rate_type and (is_model or old == 0) else old

        return rates.with_rates(rates.configuration(layer), new_rate, type(layer).__name__)

    with keras_private.strategy_scope(model):
        new = copies.Copier(new_config).copy(model)
        if not new.built:
            new.build_from_config(model.get_build_config())
        copied_state.copy_state(model, new)
    if hasattr(model, "sampler"):  # A KerasHub task generates with it.
        new.sampler = model.sampler
    active, _, opaque = randomness.classify(new)
    if not active and not opaque:
        raise ValueError(
            f"The configuration of `model` has a place for a dropout rate of which its layers make no use. {_REMEDY} "
            f"Received: model={model.name!r} ({type(model).__name__})."
        )
    return new


_REMEDY = (
    "Insert a `keras.layers.Dropout` where you make the model, for example before its last layer, "
    "or give the layers of a subclassed model their rate in its constructor."
)


def _check_rate(rate):
    received = f"Received: rate={rate!r} ({type(rate).__name__})."
    if not is_number(rate):
        raise TypeError(f"`rate` must be a number > 0 and < 1. {received}")
    if not 0 < rate < 1:
        raise ValueError(f"`rate` must be a number > 0 and < 1. {received}")
