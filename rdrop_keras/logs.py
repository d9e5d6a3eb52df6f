"""What an `RDropModel` logs: means over the rows of all steps, and compiled metrics that count the data once.

It also reads the logs of a `fit`, and finds whether R-Drop had an effect.

Comes in: values of a step with their number of rows; targets, and the outputs of all passes. Goes out: logs, and
warnings about them. Called by: the objective, `RDropModel` and `monitor`; Keras, and loops over `model.metrics` in
training steps of one's own.
"""

import math

import keras
from keras import ops, tree

from rdrop_keras import keras_private
from rdrop_keras.alpha import is_moving
from rdrop_keras.passes import randomness, tiling
from rdrop_keras.wrapper import step


class FirstPassMetrics(keras_private.CompileMetrics):
    """What `Model.compile` makes of `metrics`. In a training step they see the first pass only.

    Outputs with as many rows as the targets are taken as they are.
    """

    def update_state(self, y_true, y_pred, sample_weight=None):
        current = step.current()
        if current is not None and current.num_passes > 1 and _has_all_passes(y_true, y_pred):
            y_pred = tiling.split(y_pred, current.num_passes)[0]
        return super().update_state(y_true, y_pred, sample_weight)


def _has_all_passes(y_true, y_pred):
    rows = [
        {leaf.shape[0] for leaf in tree.flatten(tensors) if leaf is not None and len(leaf.shape)}
        for tensors in (y_true, y_pred)
    ]
    return None in rows[0] | rows[1] or rows[0] != rows[1]


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


# R-Drop is too little to matter if it was a smaller fraction of the loss than this, after at least so many steps.
_SMALL_FRACTION = 0.02
_MANY_STEPS = 100


def why_no_effect(history, model):
    """A warning if the logs of `fit` show that R-Drop had no effect on `model`, or little; else None."""
    pairs = zip(history.get("task_loss", []), history.get("consistency_loss", []))
    epochs = [epoch for epoch in pairs if not math.isnan(epoch[1])]  # Those with steps of R-Drop.
    # A program may compute equal passes in different ways. Rounding then leaves a small difference.
    if any(abs(consistency) < 1e-12 for _, consistency in epochs):
        return (
            "The passes of R-Drop did not differ: `consistency_loss` was 0 in a whole epoch, and training was plain "
            f"training at the price of R-Drop. {randomness.why_equal(model.model)}"
        )
    steps = int(ops.convert_to_numpy(model.optimizer.iterations))
    # An α that moves may be meant to be small.
    if is_moving(model.alpha) or steps < _MANY_STEPS or not epochs or any(task <= 0 for task, _ in epochs):
        return None
    terms = [(task, model.alpha / model.num_passes * consistency) for task, consistency in epochs]
    fraction = max(term / (task + term) for task, term in terms)
    if not fraction < _SMALL_FRACTION:
        return None
    return (
        f"R-Drop was at most {fraction:.1%} of the loss in each epoch, too little to matter: training was much like "
        f"plain training at the price of R-Drop. Take a larger `alpha` than {model.alpha:g}, raise the dropout rates, "
        "or let a `KLBudget` find α."
    )
