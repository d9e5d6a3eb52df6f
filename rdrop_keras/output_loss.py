"""The loss of one output over several passes, and the divergence between them.

The divergence takes the shape that the loss's values have before they are weighted and reduced. So `sample_weight`,
masks and the loss's reduction mean the same for both, whichever axes the loss averages over.

Comes in: a compiled loss, and the targets, outputs and weights that Keras gives to it. Goes out: the loss, and the
`OutputTerms` of the divergence. Called by: Keras, through `PassesLoss`.
"""

import contextlib
import contextvars
import functools
import itertools
from typing import NamedTuple

import keras
from keras import ops

from rdrop_keras import crossentropy, divergences, keras_private
from rdrop_keras.divergence_of_output import ignored_class
from rdrop_keras.passes import tiling
from rdrop_keras.wrapper import replicas

# The number of passes, and a list for the terms. Keras calls the loss of each output and passes no further arguments.
_reading = contextvars.ContextVar("rdrop_keras_reading", default=None)


class OutputTerms(NamedTuple):
    """What one output adds to `Terms`."""

    consistency: object
    observed: object
    agreement: object
    weight: object


@contextlib.contextmanager
def reading(num_passes):
    """Within it, outputs hold so many passes. It yields a list, to which each output adds its `OutputTerms`."""
    terms = []
    token = _reading.set((num_passes, terms))
    try:
        yield terms
    finally:
        _reading.reset(token)


class OutputLoss:
    """The loss of one output. Within a `reading` it is the mean over passes, and their divergence joins the terms.

    Args:
        loss: A Keras loss.
        loss_weight: What Keras multiplies it by, or None.
        divergence: A `Divergence` or an `OwnDivergence`; None for the second loss of an output.
    """

    def __init__(self, loss, loss_weight, divergence):
        self.loss = loss
        self._loss_weight = loss_weight
        self._divergence = divergence
        self._ignored_class = ignored_class(loss)
        self._reduction = _KerasReduction(
            reduction=loss.reduction, dtype=keras.backend.result_type(loss.dtype, "float32"), name="consistency"
        )

    def __call__(self, y_true, y_pred, sample_weight=None):
        under_way = _reading.get()
        if under_way is None:
            return self.loss(y_true, y_pred, sample_weight)
        num_passes, terms = under_way
        if not tiling.has_rows(y_pred, num_passes):
            raise ValueError(
                "R-Drop needs the batch on axis 0 of every output with a loss. "
                f"Received: an output of shape {tuple(y_pred.shape)} for {num_passes} passes."
            )
        if num_passes == 1 or self._divergence is None:
            task, _, _ = self._task(y_true, tiling.split(y_pred, num_passes), sample_weight)
            return self._scaled_for_replicas(task)
        if crossentropy.reads_together(self.loss, self._divergence, y_pred):
            values = crossentropy.crossentropy_and_kl(self.loss, y_true, y_pred, num_passes)
            divergence, mask = values[1], self._mask(y_true, y_pred, num_passes, ops.shape(values)[1:])
            task, consistency = _reduced(self._reduction, values, mask, sample_weight)
            task = ops.cast(task, self.loss.dtype)
        else:
            reads_kl = crossentropy.reads_kl(self._divergence, y_pred)
            y_pred = crossentropy.with_gradient_written_once(y_pred) if reads_kl else y_pred
            passes = tiling.split(y_pred, num_passes)
            task, values, mask = self._task(y_true, passes, sample_weight)
            divergence = crossentropy.kl_alone(y_pred, num_passes) if reads_kl else self._divergence_of(passes)
            # A loss with a `__call__` of its own does not show its values. The weights then show their first axes.
            like = sample_weight if values is None else values
            divergence = divergence if like is None else _in_shape_of(like, divergence, mask, y_true)
            (consistency,) = _reduced(self._reduction, ops.expand_dims(divergence, 0), mask, sample_weight)

        def reduced(reduction, values):
            reduction = _KerasReduction(reduction=reduction, dtype="float32", name=reduction)
            return _reduced(reduction, ops.expand_dims(values, 0), mask, sample_weight)[0]

        def agreement():
            alike = _in_shape_of(divergence, self._alike(y_pred), mask, y_true)
            return reduced("mean_with_sample_weight", alike)

        def weight():
            return reduced("sum", ops.ones_like(divergence))

        # The mean of `observed` over replicas has to be what one device has.
        observed = logged(consistency)
        observed = observed if self.loss.reduction == "sum" else replicas.scaled_value(observed)
        terms.append(
            OutputTerms(
                self._times_loss_weight(self._scaled_for_replicas(consistency)),
                self._times_loss_weight(observed),
                agreement if self._divergence.decides else None,
                weight,
            )
        )
        return self._scaled_for_replicas(task)

    def _task(self, y_true, passes, sample_weight):
        """The loss as a mean over passes; its values for the first pass, None if unknown; the mask of all passes."""
        losses = [self.loss] * len(passes)
        if type(self.loss).__call__ is keras.losses.Loss.__call__:
            losses = [_KeepsValues(self.loss) for _ in passes]
        task = sum(loss(y_true, each, _copied(sample_weight)) for loss, each in zip(losses, passes)) / len(passes)
        values = [loss.values for loss in losses if isinstance(loss, _KeepsValues)]
        mask = _common([keras_private.get_keras_mask(tensor) for tensor in (*passes, *values)])
        return task, values[0] if values else None, mask

    def _mask(self, y_true, y_pred, num_passes, shape):
        """The mask of all passes, for a loss that is read together with the divergence and has values of that shape."""
        mask = keras_private.get_keras_mask(y_pred)
        masks = [] if mask is None else tiling.split(mask, num_passes)
        if self._ignored_class is not None:
            counts = ops.not_equal(y_true, ops.cast(self._ignored_class, y_true.dtype))
            masks.append(ops.reshape(counts, shape))
        return _common(masks)

    def _divergence_of(self, passes):
        divergence = self._divergence
        logits = [keras_private.keras_logits(output) for output in passes]
        if divergence.from_logits is False and logits[0] is not None:
            # The probabilities came out of a softmax or sigmoid. Its inputs have not been rounded to 0 and 1.
            passes, divergence = logits, divergences.Divergence(divergence.name, True, divergence.axis)
        return divergence(passes)

    def _alike(self, y_pred):
        """1 where two passes decide alike, else 0; for Bernoulli variables, the fraction on which they do."""
        first, second = map(self._divergence.decisions, tiling.split(y_pred, 2))
        alike = ops.cast(ops.equal(first, second), "float32")
        return alike if self._divergence.name != "bernoulli_kl" else ops.mean(alike, axis=self._divergence.axis)

    def _scaled_for_replicas(self, term):
        return replicas.scaled_gradient(term) if self.loss.reduction in _MEANS else term

    def _times_loss_weight(self, term):
        return term if self._loss_weight is None else self._loss_weight * term


def logged(loss):
    """`loss` as Keras logs it: one number, not scaled for replicas."""
    loss = keras_private.unscale_loss_for_distribution(loss)
    return ops.mean(loss) if len(loss.shape) else loss


# Reductions that are the mean if there are no weights.
_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


class _KerasReduction(keras.losses.Loss):
    """Keras's own weighting, masking, reduction and scaling for replicas, for values that are there already."""

    def call(self, y_true, y_pred):
        return y_pred


class _KeepsValues(keras.losses.Loss):
    """A Keras loss that keeps its values: what its `call` returns, before they are weighted and reduced."""

    def __init__(self, loss):
        super().__init__(name=loss.name, reduction=loss.reduction, dtype=loss.dtype)
        self.loss = loss

    def call(self, y_true, y_pred):
        self.values = self.loss.call(y_true, y_pred)
        return self.values


def _reduced(reduction, values, mask, sample_weight):
    """The k tensors in `values`, `(k, …)`, each reduced to a scalar as a loss with these weights and this mask is."""
    if mask is None and sample_weight is None and reduction.reduction in _MEANS and len(values.shape) > 1:
        means = keras_private.scale_loss_for_distribution(_means(values))
        return ops.unstack(ops.cast(means, reduction.dtype))
    reduced = []
    for each in ops.unstack(values):
        if mask is not None:
            keras_private.set_keras_mask(each, mask)
        reduced.append(reduction(each, each, _copied(sample_weight)))
    return reduced


def _means(values):
    """The mean of each of `values`, `(k, …)`. As in Keras it is 0 on a replica whose part of the batch has no rows."""
    axes = tuple(range(1, len(values.shape)))
    if all(size for size in values.shape[1:]):  # Static, and not 0.
        return ops.mean(values, axis=axes)
    return ops.divide_no_nan(ops.sum(values, axis=axes), ops.cast(ops.size(values[0]), values.dtype))


def _in_shape_of(values, divergence, mask, y_true):
    """`divergence`, `(batch, …)`, in the shape of the `values` of a loss.

    It is averaged over axes that only it has, and repeated over axes that only the values have. Counted from the first,
    axes are taken to be the same as long as they have the same size.
    """
    # The targets may know sizes that the outputs do not.
    known = [
        size if size is not None else of_target
        for size, of_target in itertools.zip_longest(divergence.shape, getattr(y_true, "shape", ()))
    ]
    pairs = zip(known[: len(divergence.shape)], values.shape)
    common = len(list(itertools.takewhile(lambda sizes: sizes[1] in (None, sizes[0]), pairs)))
    if common < len(divergence.shape):
        divergence = _mean(divergence, common, mask)
    if common < len(values.shape):
        for _ in values.shape[common:]:
            divergence = ops.expand_dims(divergence, -1)
        divergence = divergence * ops.ones_like(values, dtype=divergence.dtype)
    return divergence


def _mean(tensor, first, mask):
    """The mean, over axis `first` and all later ones, of the elements that count."""
    axes = tuple(range(first, len(tensor.shape)))
    if mask is None or not first < len(mask.shape) <= len(tensor.shape):
        return ops.mean(tensor, axis=axes)
    counts = ops.cast(mask, tensor.dtype)
    for _ in tensor.shape[len(mask.shape) :]:
        counts = ops.expand_dims(counts, -1)
    return ops.divide_no_nan(ops.mean(tensor * counts, axis=axes), ops.mean(counts, axis=axes))


def _common(masks):
    """Which elements count in all `masks`, some of which may be None; None if all do."""
    masks = [ops.cast(mask, "bool") for mask in masks if mask is not None]
    return functools.reduce(ops.logical_and, masks) if masks else None


def _copied(sample_weight):
    """A copy to give away: on PyTorch, Keras multiplies weights by masks in place."""
    return None if sample_weight is None else ops.copy(sample_weight)
