"""A compiled loss of outputs that hold several passes, with the divergence between the passes.

Comes in: targets, and the outputs of all passes. Goes out: `Terms`, not yet added up. Called by: the objective in
training, and the monitor.
"""

from typing import NamedTuple

import keras
from keras import ops, tree

from rdrop_keras import divergence_of_output, keras_private
from rdrop_keras.output_loss import OutputLoss, reading


class Terms(NamedTuple):
    """What a compiled loss and the divergence of its outputs come to.

    Attributes:
        task: The mean over passes of the compiled loss, a scalar; with `reduction="none"`, one value for each row.
        consistency: 1/(m(m−1)) · Σ_{i≠j} D(P_i ‖ P_j), of the same shape as `task`; 0 for one pass.
        observed: The consistency as a number. Its mean over replicas is that of the whole batch.
        agreement: A function that returns how often two passes decide alike: a weighted fraction, averaged over the
            outputs that are decisions. None if no output is.
        weight: A function that returns the sum of the weights of all elements.
    """

    task: object
    consistency: object
    observed: object
    agreement: object
    weight: object


class PassesLoss(keras_private.CompileLoss):
    """What `Model.compile` makes of `loss`, able to read several passes. Called as a loss, it works as Keras's does.

    Args:
        loss, loss_weights, output_names: As for `CompileLoss`.
        divergence: What `RDropModel` takes.

    Raises:
        ValueError: If `divergence` does not fit the losses or the outputs. It is raised here if the names of losses and
            outputs show it, else once the first step has shown the outputs.
    """

    def __init__(self, loss, loss_weights, output_names, divergence):
        super().__init__(loss, loss_weights, output_names=output_names)
        self.divergence = divergence
        if output_names is not None:
            divergence_of_output.check_outputs(divergence, output_names)
        divergence_of_output.check_losses(divergence, loss, output_names or [])

    def build(self, y_true, y_pred):
        super().build(y_true, y_pred)
        self.built = False  # Until all is checked: after an error Keras's symbolic build on PyTorch tries once more.
        outputs = tree.flatten(y_pred)
        num_outputs = len(outputs)
        names = list(self.output_names or _keys(y_pred) or range(num_outputs))
        divergence_of_output.check_outputs(self.divergence, names)
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
                chosen = divergence_of_output.choose(self.divergence, compiled.path, position, names[position])
                name = names[position] if num_outputs > 1 else self.output_names and names[0]
                divergence = divergence_of_output.resolve(chosen, compiled.loss, name)
                divergence.check_axis(outputs[position].shape)
            seen.add(position)
            self._position = position if self._position is None else self._position
            losses.append(compiled._replace(loss=OutputLoss(compiled.loss, compiled.loss_weights, divergence)))
        self._flat_losses = losses
        self.built = True

    def terms(self, y_true, y_pred, sample_weight, num_passes):
        """The `Terms` of outputs that hold `num_passes` passes."""
        with reading(num_passes) as outputs:
            task = super().call(y_true, y_pred, sample_weight)
        wide = keras.backend.result_type(self.dtype, "float32")
        deciding = [output.agreement for output in outputs if output.agreement is not None]
        return Terms(
            task,
            sum(ops.cast(output.consistency, wide) for output in outputs),
            sum(ops.cast(output.observed, wide) for output in outputs),
            (lambda: sum(agreement() for agreement in deciding) / len(deciding)) if deciding else None,
            lambda: sum(output.weight() for output in outputs),
        )

    def num_rows(self, y_pred, num_passes):
        """The number of rows that Keras counts for `loss`. It is known after the first `terms`."""
        return ops.shape(tree.flatten(y_pred)[self._position])[0] // num_passes


def _keys(y_pred):
    return list(y_pred) if isinstance(y_pred, dict) and not any(map(tree.is_nested, y_pred.values())) else None
