"""The objective of R-Drop as a compiled loss.

For m passes with outputs P_1..P_m of one batch (half the paper's Eq. 4 for m = 2; its section 4.3 for m > 2):

    L = 1/m · [ Σ_i loss(y, P_i)  +  α / (m(m−1)) · Σ_{i≠j} D(P_i ‖ P_j) ]

`divergences.py` defines D.

Comes in: targets, and the outputs of all passes. Goes out: L, to Keras, which takes its gradient. Called by: Keras, for
a model that `RDropModel.make_loss` has given this loss.
"""

from keras import ops

from rdrop_keras.output_loss import logged
from rdrop_keras.passes_loss import PassesLoss
from rdrop_keras.wrapper import step


class RDropLoss(PassesLoss):
    """What `Model.compile` makes of `loss`, with the consistency term added in steps of R-Drop.

    In any other step its value is that of Keras's compiled loss. Keras adds what layers gave to `add_loss`, scales the
    sum for mixed precision and takes the gradient. The consistency term does not go through `add_loss`, for two
    reasons. Here it is known which target, weight and mask belong to an output. And here the term gets the scale of its
    own loss under `tf.distribute`, where Keras scales all `add_loss` terms as means.

    Args:
        loss, loss_weights, output_names, divergence: As for `PassesLoss`, with the same errors.
        alpha: The object from `alpha.make`, which gives α.
        logs: `RowMeans` to update in training. In every step `task_loss` gets the mean over passes of the compiled
            loss. In steps of R-Drop `consistency_loss` gets the consistency term without α.
        alpha_log: `RowMeans` to update with `alpha` in steps of R-Drop; None if it is not logged.
    """

    def __init__(self, loss, loss_weights, output_names, divergence, *, alpha, logs, alpha_log=None):
        super().__init__(loss, loss_weights, output_names, divergence)
        self.alpha = alpha
        self.logs = logs
        self.alpha_log = alpha_log

    def call(self, y_true, y_pred, sample_weight=None):
        current = step.current()
        if current is None:
            return super().call(y_true, y_pred, sample_weight)
        num_passes = current.num_passes
        terms = self.terms(y_true, y_pred, sample_weight, num_passes)
        if not current.loss_made:  # If a step computes its loss again, only the first is logged and moves α.
            self._record(terms, self.num_rows(y_pred, num_passes), current)
        if num_passes == 1:
            return terms.task
        term = ops.cast(current.kept, terms.consistency.dtype) / num_passes * terms.consistency
        return terms.task + ops.cast(term, terms.task.dtype)

    def _record(self, terms, rows, current):
        """Logs the `terms` of so many rows, moves α, and keeps the α of the step for further losses in it."""
        logs = {"task_loss": logged(terms.task)}
        if current.num_passes == 1:
            self.logs.record(logs, rows)
            return
        current.kept = alpha = self.alpha.current()
        self.logs.record({**logs, "consistency_loss": logged(terms.consistency)}, rows)
        if self.alpha_log is not None:
            self.alpha_log.record({"alpha": alpha}, 1)
        self.alpha.observe(terms.observed, terms.weight)
