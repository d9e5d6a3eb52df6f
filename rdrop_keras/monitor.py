"""Measures what R-Drop is meant to shrink: how far sub-models are from the full model and from each other.

A sub-model is the model with one draw of its dropout. The full model has dropout off.

Comes in: a compiled model and data. Goes out: losses, divergences and agreement, with standard errors. Called by:
users, directly or through the callback.
"""

import contextlib
import dataclasses
import itertools
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from rdrop_keras import keras_private
from rdrop_keras.arguments import check_integer
from rdrop_keras.logs import RowMeans
from rdrop_keras.model import RDropModel
from rdrop_keras.output_loss import logged
from rdrop_keras.passes import Passes, tiling
from rdrop_keras.passes_loss import PassesLoss
from rdrop_keras.wrapper import preprocessing, random_state
from rdrop_keras.wrapper.wrapper_model import check_built, unwrapped


class Estimate(NamedTuple):
    """A mean over sub-models and its standard error."""

    value: float
    error: float


@dataclasses.dataclass(repr=False)
class Inconsistency:
    """The result of `inconsistency`.

    Attributes:
        num_passes: How many sub-models were drawn.
        full_model_loss: The compiled loss with dropout off, a float.
        submodel_loss: The mean compiled loss of a sub-model, an `Estimate` like all that follow.
        gap: |sub-model loss − full-model loss|, which Proposition 2.1 of the paper bounds by the divergence.
        divergence: The mean divergence between two sub-models. In training it is R-Drop's consistency loss.
        agreement: The fraction of decisions that two sub-models have in common. A decision is the most likely class, or
            yes or no for a sigmoid output. NaN for a regression, and for a divergence that is a function of your own.
        agreement_with_full: The fraction that a sub-model and the full model have in common.
    """

    num_passes: int
    full_model_loss: float
    submodel_loss: Estimate
    gap: Estimate
    divergence: Estimate
    agreement: Estimate
    agreement_with_full: Estimate

    def to_dict(self) -> dict[str, float]:
        """`{name: value}`, with `<name>_error` for the standard error of each estimate."""
        result = {"num_passes": self.num_passes, "full_model_loss": self.full_model_loss}
        for name in ("submodel_loss", "gap", "divergence", "agreement", "agreement_with_full"):
            result[name], result[f"{name}_error"] = getattr(self, name)
        return result

    def __repr__(self) -> str:
        rows = [
            f"Inconsistency of {self.num_passes} sub-models",
            f"  {'full_model_loss':20} {self.full_model_loss:.5g}",
        ]
        for name in ("submodel_loss", "gap", "divergence", "agreement", "agreement_with_full"):
            value, error = getattr(self, name)
            rows.append(f"  {name:20} {value:.5g} ± {error:.2g}")
        return "\n".join(rows)


def inconsistency(
    model: keras.Model,
    x: Any = None,
    y: Any = None,
    sample_weight: Any = None,
    num_passes: int = 8,
    batch_size: int | None = None,
) -> Inconsistency:
    """Measures what R-Drop is meant to shrink: the gap between training and inference that dropout makes.

    For each batch `num_passes` new sub-models are drawn. Losses and divergences are weighted, masked and reduced like
    the compiled loss. Batch normalization runs in inference mode, so that sub-models differ by dropout alone. The model
    is left as it was, including its statistics, its metrics and the state of its random generators.

    Args:
        model: A compiled `RDropModel`, or any compiled `keras.Model` whose loss tells its divergence.
        x: As for `Model.evaluate`: arrays, a `tf.data.Dataset`, a generator; for a KerasHub task its raw inputs.
        y: Targets, as for `Model.evaluate`.
        sample_weight: Weights of rows, as for `Model.evaluate`.
        num_passes: The number of sub-models, at least 2. Where they can, all run in one forward pass, and memory grows
            with their number.
        batch_size: Rows of a batch, as for `Model.evaluate`.

    Returns:
        An `Inconsistency`. Each of its estimates has a standard error over the sub-models.

    Raises:
        TypeError: If `model` is no `keras.Model` or `num_passes` no integer.
        ValueError: If `num_passes` is below 2, or the model is not built, or no layer of it is random in training.
        RuntimeError: If the model is not compiled with a loss.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.3), keras.layers.Dense(3)])
    >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> result = rdrop_keras.inconsistency(model, np.ones((32, 8)), np.zeros(32), num_passes=4)
    >>> result.divergence.value > 0
    True
    """
    check_integer("num_passes", num_passes, least=2)
    return _probe_of(model, num_passes).measure(x, y, sample_weight, batch_size)


class InconsistencyMonitor(keras.callbacks.Callback):
    """Adds `inconsistency` on given data to the logs of epochs: `gap`, `submodel_loss`, `divergence` and `agreement`.

    For an `RDropModel` whose α is not 0 it also adds `consistency_fraction`, the consistency term's part of the
    objective. `History`, and callbacks that come after this one, find all of them in the logs.

    Args:
        x, y, sample_weight, num_passes, batch_size: As for `inconsistency`. The data must be readable more than once.
        every: Measures at the end of every `every`-th epoch. The epochs in between repeat the last values. Epochs
            before the first measurement have NaN. Defaults to 1.

    Raises:
        TypeError: If `num_passes` or `every` is no integer.
        ValueError: If `num_passes` is below 2 or `every` below 1.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.3), keras.layers.Dense(3)])
    >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> monitor = rdrop_keras.InconsistencyMonitor(np.ones((32, 8)), np.zeros(32), num_passes=4)
    >>> history = model.fit(np.ones((32, 8)), np.zeros(32), callbacks=[monitor], verbose=0)
    >>> sorted(history.history)
    ['agreement', 'divergence', 'gap', 'loss', 'submodel_loss']
    """

    every: int
    num_passes: int

    def __init__(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        every: int = 1,
        num_passes: int = 8,
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        check_integer("every", every, least=1)
        check_integer("num_passes", num_passes, least=2)
        self.data = (x, y, sample_weight, batch_size)
        self.every = every
        self.num_passes = num_passes

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        self._probe = _probe_of(self.model, self.num_passes)
        self._names = ["gap", "submodel_loss", "divergence", "agreement"]
        if isinstance(self.model, RDropModel) and self.model.alpha != 0:
            self._names.append("consistency_fraction")
        self._last = dict.fromkeys(self._names, float("nan"))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        if (epoch + 1) % self.every == 0:
            result = self._probe.measure(*self.data).to_dict()
            if "consistency_fraction" in self._names:
                term = self.model._current_term(result["divergence"])
                result["consistency_fraction"] = term / (result["submodel_loss"] + term)
            self._last = {name: result[name] for name in self._names}
        if logs is not None:
            logs.update(self._last)


def _probe_of(model, num_passes):
    """A compiled `_Probe` of `model`, which can measure any number of times with one program."""
    wrapped = unwrapped(model)
    if not model.compiled or model.loss is None:
        raise RuntimeError(
            f"`model` must be compiled with a loss before its inconsistency is measured. Received: {model.name!r}."
        )
    check_built(model)
    divergence = model.divergence if isinstance(model, RDropModel) else "auto"
    names = getattr(wrapped, "output_names", None)
    loss = PassesLoss(model.loss, keras_private.loss_weights(model), names, divergence)
    with keras_private.strategy_scope(wrapped):
        probe = _Probe(wrapped, loss, num_passes)
        probe.compile(loss=None, optimizer=None)
    return probe


class _Probe(keras.Model):
    """Evaluates the full model and sub-models of `model`, and averages what `Inconsistency` needs."""

    def __init__(self, model, loss, num_passes):
        super().__init__(name="inconsistency", dtype=model.dtype_policy, autocast=False)
        self.model = model
        self.built = True
        self._measured_loss = loss
        self._num_passes = num_passes
        self._call_passes = Passes(model)
        self._pairs = list(itertools.combinations(range(num_passes), 2))
        num_values = 1 + 2 * num_passes + 2 * len(self._pairs)
        self._means = RowMeans(["loss", *map(str, range(1, num_values))], name="means")

    def call(self, inputs, training=None):
        passes = self._call_passes(inputs, self._num_passes, True)
        return {"full": keras_private.call(self.model, inputs, False), "passes": passes}

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        full, passes = y_pred["full"], tiling.split(y_pred["passes"], self._num_passes)
        if not self._measured_loss.built:
            self._measured_loss.build(y, full)

        def terms(*outputs):
            return self._measured_loss.terms(y, tiling.concatenate(outputs), sample_weight, len(outputs))

        def agreement(pair):
            return ops.convert_to_tensor(float("nan")) if pair.agreement is None else pair.agreement()

        pairs = [terms(passes[i], passes[j]) for i, j in self._pairs]
        values = [
            *(logged(terms(output).task) for output in (full, *passes)),
            *(logged(pair.consistency) for pair in pairs),
            *map(agreement, pairs),
            *(agreement(terms(full, output)) for output in passes),
        ]
        rows = ops.shape(keras.tree.flatten(full)[0])[0]
        self._means.record(dict(zip(self._means.names, values)), rows)
        return values[0]

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {"loss": self._means.result()["loss"]}

    def measure(self, x, y, sample_weight, batch_size):
        arguments = {"x": x, "y": y, "sample_weight": sample_weight, "batch_size": batch_size, "verbose": 0}
        with random_state.restored(self.model), _inference_statistics(self.model):
            if preprocessing.pipeline_class(self.model) is None:
                self.evaluate(**arguments)
            else:
                preprocessing.run("evaluate", self.model, self, (), arguments)
        means = ops.convert_to_numpy(self._means.means()).astype("float64")
        num_pairs = len(self._pairs)
        sizes = [1, self._num_passes, num_pairs, num_pairs]
        full, losses, divergences, agreements, with_full = np.split(means, np.cumsum(sizes))
        full_model_loss, submodel_loss = full.item(), _over_passes(losses)
        return Inconsistency(
            self._num_passes,
            full_model_loss,
            submodel_loss,
            Estimate(abs(submodel_loss.value - full_model_loss), submodel_loss.error),
            _over_pairs(divergences, self._num_passes),
            _over_pairs(agreements, self._num_passes),
            _over_passes(with_full),
        )


@contextlib.contextmanager
def _inference_statistics(model):
    """Within it, batch normalization uses its moving statistics in training too."""
    normalizations = [
        layer
        for layer in keras_private.all_layers(model)
        if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
    ]
    try:
        for layer in normalizations:
            layer.trainable = False
        yield
    finally:
        for layer in normalizations:
            layer.trainable = True


def _over_passes(values):
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def _over_pairs(values, num_passes):
    """The mean over pairs of passes. Pairs that share a pass are not independent, so its error is a jackknife's."""
    matrix = np.zeros((num_passes, num_passes))
    matrix[np.triu_indices(num_passes, 1)] = values
    per_pass = (matrix + matrix.T).sum(axis=1)
    if num_passes == 2:
        return Estimate(float(values.mean()), float("nan"))
    without = (values.sum() - per_pass) / (len(values) - (num_passes - 1))
    error = np.sqrt((num_passes - 1) / num_passes * np.square(without - without.mean()).sum())
    return Estimate(float(values.mean()), float(error))
