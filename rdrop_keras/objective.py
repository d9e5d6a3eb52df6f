"""The objective of R-Drop as a compiled loss.

For m passes with outputs P_1..P_m of one batch (half the paper's Eq. 4 for m = 2; its section 4.3 for m > 2):

    L = 1/m · [ Σ_i loss(y, P_i)  +  α / (m(m−1)) · Σ_{i≠j} D(P_i ‖ P_j) ]

`divergences.py` defines D.

Comes in: targets, and the outputs of all passes. Goes out: L, to Keras, which takes its gradient. Called by: Keras, for
a model that `RDropModel.make_loss` has given this loss.
"""

import keras
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


class RowMeans(keras.metrics.Metric):
    """Means of scalars by name, weighted by rows. A name without values has NaN, not 0.

    All are one metric with one variable. In a small model, bookkeeping is much of a step's cost.
    """

    def __init__(self, names, name):
        super().__init__(name=name, dtype=keras.backend.result_type(keras.config.floatx(), "float32"))
        self.names = names
        self._sums = self.add_variable(shape=(2 * len(names),), initializer="zeros", name="sums")

    def update_state(self, *args, **kwargs):
        """Does nothing. The loss calls `record`; loops over all metrics of a model have only targets and outputs."""

    def record(self, values, rows):
        """Counts the `values`, `{name: scalar}`, of so many rows."""
        # On JAX a step of one's own may differentiate around this. No value that is kept may depend on the weights.
        values = {name: ops.stop_gradient(value) for name, value in values.items()}
        sums = [ops.cast(values.get(name, 0.0), self.dtype) for name in self.names]
        counts = [float(name in values) for name in self.names]
        self._sums.assign_add(ops.convert_to_tensor(sums + counts) * ops.cast(rows, self.dtype))

    def means(self):
        """All means, in the order of the names, in one tensor."""
        totals, rows = ops.split(self._sums.value, 2)
        return totals / rows

    def result(self):
        return dict(zip(self.names, ops.unstack(self.means())))


def check_logs(metrics, own):
    """Raises if one of `metrics` is logged by the same name as one of R-Drop's `own`, which are among them."""
    names = [name for metric in metrics if metric in own for name in metric.names]
    for metric in metrics:
        result = {} if metric in own else metric.result()
        for name in result if isinstance(result, dict) else [metric.name]:
            if name in names:
                of_output = not isinstance(result, dict) and name.endswith("_loss")
                received = f"an output {name.removesuffix('_loss')!r}" if of_output else "a metric"
                raise ValueError(
                    f"R-Drop logs {', '.join(map(repr, names))}. No output and no metric can be logged by one of these "
                    "names, as an output called 'task' has its loss logged as 'task_loss'. Rename it: an output by its "
                    f"layer's `name` or its key in the outputs, a metric by `name`. Received: {received} that "
                    f"is logged as {name!r}."
                )
