"""The passes of a step: a model called so that its outputs are those of several passes over one batch.

Where each pass gets the values that it would have alone, all passes go through the model in one call, as rows of one
batch. Elsewhere they run one after another.

Comes in: a batch of N rows and the number of passes m. Goes out: outputs of mN rows. Called by: `RDropModel` in steps
of R-Drop, and `monitor`.
"""

import contextlib
import functools
import warnings

import keras
import numpy as np
from keras import ops

from rdrop_keras import keras_private
from rdrop_keras.arguments import is_number
from rdrop_keras.passes import randomness, tiling
from rdrop_keras.passes.added_losses import mean_over
from rdrop_keras.passes.dropout_rates import DropoutRates
from rdrop_keras.passes.graph import PairedGraph, check_has_graph


class Passes:
    """Calls `model` for several passes.

    Attributes:
        graph: The `PairedGraph` of the model as it was examined; None while the model is not built.

    Args:
        model: A `keras.Model`. If it is not built, its layers are examined in the first call.
        share: `"deterministic"`, `"nothing"`, or the name of a layer.
        dropout_rates: None, or a rate for each pass.

    Raises:
        ValueError: If the passes would be identical, or cannot be made as asked for.
    """

    def __init__(self, model, share="deterministic", dropout_rates=None):
        self.model = model
        self.share = share
        self.dropout_rates = dropout_rates
        self.graph = None
        self._warned = False
        if model.built or isinstance(model, keras.Sequential):
            self.refresh()
            return
        check_has_graph(model, share)
        randomness.check_stateless(model)
        if dropout_rates is not None:
            raise ValueError(
                "`dropout_rates` needs the layers of `model`, which are made when it is built: call it on a batch "
                f"first. Received: model={model.name!r} ({type(model).__name__}), not built."
            )

    def refresh(self):
        """Examines the model as it is now: its layers, rates and weights may have changed."""
        self.graph = None
        if not self.model.built:
            return
        if not randomness.check_stochastic(self.model) and not self._warned:
            self._warned = True
            warnings.warn(
                "No layer of `model` is known to be random in training. If none is, all passes are identical: insert a "
                "`keras.layers.Dropout`, for example before the last layer. If code of your own draws random numbers, "
                "set `rdrop_stochastic = True` on its layer or model. "
                f"Received: model={self.model.name!r} ({type(self.model).__name__}).",
                stacklevel=4,
            )
        self._rates = None if self.dropout_rates is None else DropoutRates(self.model)
        self._seen = _layers_and_rates(self.model)
        self.graph = PairedGraph(self.model, self.share)

    def __call__(self, inputs, num_passes, training):
        """The model's outputs of all passes, `(mN, …)`, over `inputs`, `(N, …)`."""
        if not self.model.built:
            if isinstance(self.model, keras.Sequential) and ops.is_tensor(inputs):
                self.model.build(tuple(inputs.shape))
            else:
                keras_private.call(self.model, inputs, False)
        if self.graph is None or self._seen != _layers_and_rates(self.model):
            self.refresh()
        if self._rates is None:
            self.graph.examine_batch(inputs, training)
        at_rates = self._at_rates(num_passes)
        # If nothing is shared, no graph is needed, unless the passes run one by one.
        if self.graph.knows_layers and (self.share != "nothing" or at_rates is not None):
            return self.graph(inputs, num_passes, training, at_rates)
        if at_rates is None:
            return keras_private.call(self.model, tiling.tile(inputs, num_passes), training)
        outputs = []
        with mean_over(num_passes, self.model):
            for at_rate in at_rates:
                with at_rate(self.model):
                    outputs.append(keras_private.call(self.model, inputs, training))
        return tiling.concatenate(outputs)

    def _at_rates(self, num_passes):
        """If the passes run one after another, a context for each pass in which layers are called; else None."""
        if self._rates is not None:
            return [functools.partial(self._rates.at, rate) for rate in self.dropout_rates]
        return [contextlib.nullcontext] * num_passes if self.graph.separate else None


def _layers_and_rates(model):
    return [(layer, randomness.rates_of(layer)) for layer in keras_private.all_layers(model)]


def check_dropout_rates(rates, num_passes):
    """Raises if `rates` is neither None nor one rate for each pass."""
    if rates is None:
        return
    if isinstance(rates, np.ndarray) and rates.ndim == 1:
        rates = rates.tolist()
    received = f"Received: dropout_rates={rates!r}."
    must = "`dropout_rates` must be None or a tuple with a rate for each pass, from 0 to less than 1, not all 0."
    if not isinstance(rates, (list, tuple)) or not all(map(is_number, rates)):
        raise TypeError(f"{must} {received}")
    if len(rates) != num_passes:
        raise ValueError(f"{must} With num_passes={num_passes} it has {len(rates)}. {received}")
    if not all(0 <= rate < 1 for rate in rates) or not any(rates):
        raise ValueError(f"{must} {received}")


def check_share(share):
    """Raises if `share` is not a string. Whether it names a layer is checked when the graph is made."""
    if not isinstance(share, str):
        raise TypeError(
            "`share` must be 'deterministic', 'nothing' or the name of a layer. "
            f"Received: share={share!r} ({type(share).__name__})."
        )
