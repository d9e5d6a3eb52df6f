"""Passes at dropout rates of their own (section 4.4 of the paper).

Comes in: a model, and the rate of a pass. Goes out: a context in which its layers have that rate. Called by: `Passes`.
"""

import contextlib

from rdrop_keras import keras_private
from rdrop_keras.passes import randomness


class DropoutRates:
    """Runs layers of `model` at another dropout rate, for the passes of a step (section 4.4 of the paper).

    All rates above 0 are replaced, those of attention and recurrent dropout too. Layers at 0 stay at 0. Afterwards the
    rates are what they were when this object was made, whatever another thread does in between.

    Raises:
        ValueError: If no layer of `model` has a dropout rate above 0.
    """

    def __init__(self, model):
        strategy = keras_private.strategy_of(model)
        self._num_replicas = 1 if strategy is None else strategy.num_replicas_in_sync
        self._own = {
            layer: {
                name: rate
                for name, rate in randomness.rates_of(layer).items()
                if rate and name in randomness.DROPOUT_RATES
            }
            for layer in randomness.classify(model)[0]
        }
        if not any(self._own.values()):
            raise ValueError(
                "`dropout_rates` needs a dropout layer with a rate above 0, which it replaces. "
                f"Received: model={model.name!r}, which has none."
            )

    @contextlib.contextmanager
    def at(self, rate, operation):
        """Within it, the dropout layers in `operation` are at `rate`.

        Raises:
            ValueError: If several replicas of `tf.distribute` wait for each other inside `operation`.
        """
        layers = keras_private.all_layers(operation)
        own = [(layer, name, value) for layer in layers for name, value in self._own.get(layer, {}).items()]
        normalizer = next((layer for layer in layers if getattr(layer, "synchronized", False)), None)
        if own and normalizer is not None and self._num_replicas > 1:
            # Replicas are traced in threads, which take turns where they wait. Other replicas would run at this rate.
            raise ValueError(
                "On several replicas, `dropout_rates` cannot act on a layer or model that holds both dropout and "
                "synchronized batch normalization. Make it of Functional models, or give `synchronized=False`. "
                f"Received: {operation.name!r} with {normalizer.name!r}."
            )
        try:
            for layer, name, _ in own:
                setattr(layer, name, rate)
            yield
        finally:
            for layer, name, value in own:
                setattr(layer, name, value)
