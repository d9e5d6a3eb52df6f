"""The objective of R-Drop as a compiled loss.

For m passes with outputs P_1..P_m of one batch (half the paper's Eq. 4 for m = 2; its section 4.3 for m > 2):

    L = 1/m · [ Σ_i loss(y, P_i)  +  α / (m(m−1)) · Σ_{i≠j} D(P_i ‖ P_j) ]

Comes in: targets, and the outputs of all passes; what D is, is in `divergences.py`. Goes out: L, to Keras, which takes
its gradient. Called by: Keras, for a model that `RDropModel.make_loss` has given this loss.
"""

import keras
from keras import ops

from rdrop_keras.output_loss import logged
from rdrop_keras.passes_loss import PassesLoss
from rdrop_keras.wrapper import step


class RDropLoss(PassesLoss):
    """What `Model.compile` makes of `loss`, with the consistency term added in paired steps.

    In any other step it is Keras's compiled loss and nothing else. To its value Keras adds what layers gave to
    `add_loss`, scales the sum for mixed precision and takes the gradient. The consistency term joins here rather than
    through `add_loss` because here it is known which target, weight and mask an output has, and because it then
    carries its loss's own scale under `tf.distribute`, where Keras gives all `add_loss` terms that of a mean.

    Args:
        loss, loss_weights, output_names, divergence: As for `PassesLoss`, which raises what this raises.
        alpha: What gives α, of `alpha.py`.
        logs: `RowMeans` to update in training: `task_loss` in every step with the mean over passes of the compiled
            loss, and in paired steps `consistency_loss` with the consistency term without α.
        alpha_log: `RowMeans` to update in paired steps with `alpha`; None if it is not logged.
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
        if not current.loss_made:  # Of a step that computes its loss again, the first is logged and moves α.
            self._record(terms, self.num_rows(y_pred, num_passes), current)
        if num_passes == 1:
            return terms.task
        term = ops.cast(current.kept, terms.consistency.dtype) / num_passes * terms.consistency
        return terms.task + ops.cast(term, terms.task.dtype)

    def _record(self, terms, rows, current):
        """Logs the `terms` of so many rows, moves α, and keeps the α of the step for it."""
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
    """Means of scalars by name, weighted by rows; NaN, and not 0, as long as there was none of a name.

    It is one metric with one variable. In a small model, bookkeeping is much of a step's cost.
    """

    def __init__(self, names, name):
        super().__init__(name=name, dtype=keras.backend.result_type(keras.config.floatx(), "float32"))
        self.names = names
        self._sums = self.add_variable(shape=(2 * len(names),), initializer="zeros", name="sums")

    def update_state(self, *args, **kwargs):
        """Does nothing: the loss records what it has, and loops over all metrics of a model have targets only."""

    def record(self, values, rows):
        """Counts the `values`, `{name: scalar}`, of so many rows."""
        # On JAX a step of one's own may differentiate around this, and keep no value that depends on the weights.
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
    """Raises if any of `metrics` is logged by a name by which one of R-Drop's `own` among them is."""
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
