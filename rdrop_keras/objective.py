"""The objective of R-Drop as a compiled loss.

For m passes with outputs P_1..P_m of one batch (half the paper's Eq. 4 for m = 2; its section 4.3 for m > 2):

    L = 1/m · [ Σ_i loss(y, P_i)  +  α / (m(m−1)) · Σ_{i≠j} D(P_i ‖ P_j) ]

Comes in: targets, and the outputs of all passes; what D is, is in `divergences.py`. Goes out: L, to Keras, which takes
its gradient. Called by: Keras, for a model that `RDropModel.make_loss` has given this loss.
"""

import functools
from typing import NamedTuple

import keras
from keras import ops, tree

from rdrop_keras import crossentropy, divergences, keras_private
from rdrop_keras.passes import tiling
from rdrop_keras.wrapper import replicas, step


class Terms(NamedTuple):
    """What `RDropLoss` is made of, all scalars.

    Attributes:
        task: The mean over passes of the compiled loss.
        consistency: 1/(m(m−1)) · Σ_{i≠j} D(P_i ‖ P_j); 0 of one pass.
        agreement: A function that returns how often two passes decide alike, the weighted fraction averaged over the
            outputs that decide; None if none does.
        weight: A function that returns the sum of the weights of all elements.
    """

    task: object
    consistency: object
    agreement: object
    weight: object


class RDropLoss(keras_private.CompileLoss):
    """What `Model.compile` makes of `loss`, with the consistency term added in paired steps.

    In any other step it is Keras's compiled loss and nothing else. To its value Keras adds what layers gave to
    `add_loss`, scales the sum for mixed precision and takes the gradient. The consistency term joins here rather than
    through `add_loss` because here it is known which target, weight and mask an output has, and because it then
    carries its loss's own scale under `tf.distribute`, where Keras gives all `add_loss` terms that of a mean.

    Args:
        loss, loss_weights, output_names: As for `CompileLoss`.
        alpha: What gives α, of `alpha.py`; None where the `terms` alone are asked for.
        divergence: What `RDropModel` takes.
        logs: `StepMeans` to update in training: `task_loss` in every step with the mean over passes of the compiled
            loss, and in paired steps `consistency_loss` with the consistency term without α.
        alpha_log: `StepMeans` to update in paired steps with `alpha`; None if it is not logged.

    Raises:
        ValueError: If `divergence` fits the losses or the outputs not; here where the names of losses and outputs
            tell, else when the first step has shown the outputs.
    """

    def __init__(self, loss, loss_weights, output_names, *, alpha, divergence, logs, alpha_log=None):
        super().__init__(loss, loss_weights, output_names=output_names)
        self.alpha = alpha
        self.divergence = divergence
        self.logs = logs
        self.alpha_log = alpha_log
        if output_names is not None:
            _check_outputs(divergence, output_names)
        if not tree.is_nested(divergence):
            for name, leaf in _named_losses(loss, output_names or []):
                # Keras chooses between three losses for "crossentropy" when it has seen the targets.
                if leaf is not None and str(leaf).lower() not in ("ce", "crossentropy"):
                    divergences.resolve(divergence, leaf, name)

    def build(self, y_true, y_pred):
        super().build(y_true, y_pred)
        self.built = False  # Until all is checked: after an error PyTorch's symbolic build tries once more.
        outputs = tree.flatten(y_pred)
        num_outputs = len(outputs)
        names = list(self.output_names or _keys(y_pred) or range(num_outputs))
        _check_outputs(self.divergence, names)
        positions = tree.pack_sequence_as(y_pred, list(range(num_outputs)))
        seen = set()
        losses = []
        self._position = None  # Of the first output with a loss, which has the rows of the batch.
        for compiled in self._flat_losses:
            position = positions
            for key in compiled.path:
                position = position[key]
            if tree.is_nested(position):
                raise ValueError(
                    "R-Drop needs a loss for each output tensor. Received: one loss for the nested output at "
                    f"{'/'.join(map(str, compiled.path))!r}."
                )
            divergence = None
            if position not in seen:  # Two losses on one output: its divergence counts once.
                chosen = _choose(self.divergence, compiled.path, position, names[position])
                name = names[position] if num_outputs > 1 else self.output_names and names[0]
                divergence = divergences.resolve(chosen, compiled.loss, name)
                divergence.check_axis(outputs[position].shape)
            seen.add(position)
            self._position = position if self._position is None else self._position
            losses.append(compiled._replace(loss=_PassesLoss(compiled.loss, compiled.loss_weights, divergence)))
        self._flat_losses = losses
        self.built = True

    def call(self, y_true, y_pred, sample_weight=None):
        current = step.current()
        if current is None:
            return super().call(y_true, y_pred, sample_weight)
        num_passes = _num_passes()
        task, consistency, _, weight = self.terms(y_true, y_pred, sample_weight)
        if current.loss_made:  # Of a step that computes its loss again, the first is logged and moves α.
            return task if num_passes == 1 else task + current.kept / num_passes * consistency
        # As many rows as Keras counts for `loss`: those of the batch.
        rows = ops.shape(tree.flatten(y_pred)[self._position])[0] // num_passes
        logs = {"task_loss": keras_private.unscale_loss_for_distribution(task)}
        if num_passes == 1:
            self.logs.record(logs, rows)
            return task
        current.kept = alpha = self.alpha.current()
        logged = keras_private.unscale_loss_for_distribution(consistency)
        self.logs.record({**logs, "consistency_loss": logged}, rows)
        if self.alpha_log is not None:
            self.alpha_log.record({"alpha": alpha}, 1)
        self.alpha.observe(replicas.weighed_value(logged), weight)
        return task + alpha / num_passes * consistency

    def terms(self, y_true, y_pred, sample_weight=None):
        """The `Terms` of outputs of as many passes as the step under way has."""
        outputs = step.current().notes
        outputs.clear()
        task = super().call(y_true, y_pred, sample_weight)
        deciding = [output.agreement for output in outputs if output.agreement is not None]
        return Terms(
            task,
            sum(output.consistency for output in outputs),
            (lambda: sum(agreement() for agreement in deciding) / len(deciding)) if deciding else None,
            lambda: sum(output.weight() for output in outputs),
        )


class StepMeans(keras.metrics.Metric):
    """Means of what steps have, by name and weighted by rows; NaN, and not 0, as long as no step had it.

    It is one metric with one variable, since what is around a step is what a small model's step costs.
    """

    def __init__(self, names, name):
        super().__init__(name=name)
        self.names = names
        self._sums = self.add_variable(shape=(2 * len(names),), initializer="zeros", name="sums")

    def update_state(self, *args, **kwargs):
        """Does nothing: the loss records what it has, and loops over all metrics of a model have targets only."""

    def record(self, values, rows):
        """Counts the `values`, `{name: scalar}`, of a step with so many rows."""
        # On JAX a step of one's own may differentiate around this, and keep no value that depends on the weights.
        values = {name: ops.stop_gradient(value) for name, value in values.items()}
        sums = [ops.cast(values.get(name, 0.0), self.dtype) for name in self.names]
        counts = [float(name in values) for name in self.names]
        self._sums.assign_add(ops.convert_to_tensor(sums + counts) * ops.cast(rows, self.dtype))

    def result(self):
        totals, rows = ops.split(self._sums.value, 2)
        return dict(zip(self.names, ops.unstack(totals / rows)))


class _OutputTerms(NamedTuple):
    """What one output adds to `Terms`."""

    consistency: object
    agreement: object
    weight: object


class _PassesLoss:
    """The loss of one output; in a paired step its mean over passes, with its divergence noted in the step."""

    def __init__(self, loss, loss_weight, divergence):
        self.loss = loss
        self.loss_weight = loss_weight
        self.divergence = divergence
        self.ignored_class = divergences.ignored_class(loss)
        self.reduction = _AsGiven(reduction=loss.reduction, dtype=loss.dtype, name="consistency")

    def __call__(self, y_true, y_pred, sample_weight=None):
        num_passes = _num_passes()
        if num_passes == 1:
            return self._weighed(self.loss(y_true, y_pred, sample_weight))
        if not tiling.has_rows(y_pred, num_passes):
            raise ValueError(
                "R-Drop needs the batch on axis 0 of every output with a loss. "
                f"Received: an output of shape {tuple(y_pred.shape)} for {num_passes} passes."
            )
        if self.divergence is not None and crossentropy.reads_together(self.loss, self.divergence, y_pred):
            task = None
            values = crossentropy.crossentropy_and_kl(self.loss, y_true, y_pred, num_passes)
        else:
            passes = tiling.split(y_pred, num_passes)
            task = sum(self.loss(y_true, p, sample_weight) for p in passes) / num_passes
            if self.divergence is None:
                return self._weighed(task)
            values = ops.expand_dims(self._divergence_of(passes), 0)
        mask = self._mask(values, y_true, y_pred, num_passes)
        *read_together, consistency = self._reduced(self.reduction, values, mask, sample_weight)
        task = read_together[0] if task is None else task
        consistency = self._weighed(consistency)
        consistency = consistency if self.loss_weight is None else self.loss_weight * consistency
        agreement = None
        if self.divergence.name != "mse":
            agreement = functools.partial(self._agreement, y_pred, mask, sample_weight)
        weight = functools.partial(self._weight, values, mask, sample_weight)
        step.current().notes.append(_OutputTerms(consistency, agreement, weight))
        return self._weighed(task)

    def _weighed(self, term):
        return term if self.loss.reduction == "sum" else replicas.weigh(term)

    def _divergence_of(self, passes):
        divergence = self.divergence
        logits = [keras_private.keras_logits(output) for output in passes]
        if divergence.from_logits is False and logits[0] is not None:
            # The probabilities came out of a softmax or sigmoid: its inputs have not been rounded to 0 and 1.
            passes, divergence = logits, divergences.Divergence(divergence.name, True, divergence.axis)
        return divergence(passes)

    def _agreement(self, y_pred, mask, sample_weight):
        first, second = map(self.divergence.decisions, tiling.split(y_pred, 2))
        alike = ops.cast(ops.equal(first, second), "float32")
        alike = alike if self.divergence.name != "bernoulli_kl" else ops.mean(alike, axis=self.divergence.axis)
        fraction = _AsGiven(reduction="mean_with_sample_weight", dtype="float32", name="agreement")
        return self._reduced(fraction, ops.expand_dims(alike, 0), mask, sample_weight)[0]

    def _weight(self, values, mask, sample_weight):
        total = _AsGiven(reduction="sum", dtype="float32")
        return self._reduced(total, ops.ones_like(values[:1]), mask, sample_weight)[0]

    def _mask(self, values, y_true, y_pred, num_passes):
        """Which elements count in all passes, of the shape of one of `values`; None if all do."""
        mask = keras_private.get_keras_mask(y_pred)
        masks = [] if mask is None else [ops.cast(each, "bool") for each in tiling.split(mask, num_passes)]
        if self.ignored_class is not None:
            counts = ops.not_equal(y_true, ops.cast(self.ignored_class, y_true.dtype))
            masks.append(ops.reshape(counts, ops.shape(values)[1:]))
        return functools.reduce(ops.logical_and, masks) if masks else None

    def _reduced(self, reduction, values, mask, sample_weight):
        """The k scalars of `values`, `(k, …)`, k for each element of the loss, reduced under its weights and mask."""
        if mask is None and sample_weight is None and reduction.reduction in _MEANS:
            reduced = ops.unstack(keras_private.scale_loss_for_distribution(_means(values)))
        else:
            reduced = []
            for each in ops.unstack(values):
                if mask is not None:
                    keras_private.set_keras_mask(each, mask)
                reduced.append(reduction(each, each, sample_weight))
        return [ops.cast(value, self.loss.dtype) for value in reduced]


# Reductions that are the mean where nothing has a weight.
_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


def _means(values):
    """The mean of each of `values`, `(k, …)`: 0, as in Keras, of a replica's part of a batch that has no rows."""
    axes = tuple(range(1, len(values.shape)))
    if all(size for size in values.shape[1:]):  # Static, and not 0.
        return ops.mean(values, axis=axes)
    return ops.divide_no_nan(ops.sum(values, axis=axes), ops.cast(ops.size(values[0]), values.dtype))


def _num_passes():
    """Passes of the step under way; one outside of steps."""
    current = step.current()
    return 1 if current is None else current.num_passes


class _AsGiven(keras.losses.Loss):
    """Keras's own weighting, masking, reduction and scaling for replicas, of values that are there already."""

    def call(self, y_true, y_pred):
        return y_pred


def _named_losses(loss, output_names):
    """`(output name or None, loss)` for each loss given to `compile`."""
    if isinstance(loss, dict):
        groups = loss.items()
    elif isinstance(loss, (list, tuple)) and len(loss) == len(output_names):
        groups = zip(output_names, loss)
    else:
        groups = [(output_names[0] if len(output_names) == 1 else None, loss)]
    return [(name, leaf) for name, group in groups for leaf in tree.flatten(group)]


def _keys(y_pred):
    return list(y_pred) if isinstance(y_pred, dict) and not any(map(tree.is_nested, y_pred.values())) else None


def _check_outputs(divergence, names):
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


def _choose(divergence, path, position, name):
    """What `divergence` holds for one output."""
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
