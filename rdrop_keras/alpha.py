"""What α is at each step: fixed, on a schedule, or moved by a budget for the consistency loss."""

import math
import numbers
import warnings

import keras
from keras import ops


@keras.saving.register_keras_serializable(package="rdrop_keras")
class KLBudget:
    """α as a multiplier that settles the consistency loss at a target, so that it need not be searched.

    The paper derives R-Drop from a constrained problem (Eq. 5-6): the smallest loss of the sub-models under a bound on
    the divergence between them. With C = 1/(m(m−1)) · Σ_{i≠j} D(P_i ‖ P_j), the consistency loss, and a bound ε,

        minimize 1/m · Σ_i loss(y, P_i)   subject to   C ≤ ε.

    Its Lagrangian is R-Drop's objective with the multiplier λ = α/m, and Proposition 2.1 bounds by ε how far the
    full model is from its sub-models. The multiplier is found by dual ascent, one step on each R-Drop step:

        α ← min(max(α + step · (C/ε − 1), 0), maximum).

    Where α comes to rest, the average of C is ε; where C stays below ε without R-Drop, α is 0. Under `tf.distribute`
    replicas move α by the mean of their C.

    Args:
        target: ε > 0, in units of the logged `consistency_loss`.
        step: By how much α grows in a step in which C is twice the target. Smaller is smoother and slower.
            Defaults to 0.1.
        initial: α at the start, from 0 to `maximum`. Defaults to 1.
        maximum: What α does not exceed, so that a target out of reach does not make it grow without end; `fit` warns
            once if it ends with α there. Defaults to 100.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If one is out of its range.

    Example:

    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dropout(0.3), keras.layers.Dense(3)])
    >>> model = rdrop_keras.RDropModel(model, alpha=rdrop_keras.KLBudget(target=0.05, step=0.1))
    >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> history = model.fit(np.ones((32, 8)), np.zeros(32), verbose=0)
    >>> sorted(history.history)
    ['alpha', 'consistency_loss', 'loss', 'task_loss']
    """

    def __init__(self, target, step=0.1, initial=1.0, maximum=100.0):
        for name, value in (("target", target), ("step", step), ("initial", initial), ("maximum", maximum)):
            check_number(name, value)
        for name, value in (("target", target), ("step", step), ("maximum", maximum)):
            if value <= 0:
                raise ValueError(f"`{name}` of a KLBudget must be above 0. Received: {name}={value!r}.")
        if initial > maximum:
            raise ValueError(
                "`initial` of a KLBudget must not be above `maximum`. "
                f"Received: initial={initial!r}, maximum={maximum!r}."
            )
        self.target = float(target)
        self.step = float(step)
        self.initial = float(initial)
        self.maximum = float(maximum)

    def get_config(self):
        return {"target": self.target, "step": self.step, "initial": self.initial, "maximum": self.maximum}

    @classmethod
    def from_config(cls, config):
        return cls(**config)

    def __repr__(self):
        return f"KLBudget(target={self.target}, step={self.step}, initial={self.initial}, maximum={self.maximum})"


def make(alpha, model):
    """What gives `model`, an `RDropModel`, its α at each step."""
    if isinstance(alpha, KLBudget):
        return Budgeted(alpha, model)
    return Scheduled(alpha, model) if callable(alpha) else Fixed(float(alpha))


class Fixed:
    """The α of a number."""

    def __init__(self, alpha):
        self.alpha = alpha
        self.variables = {}

    def current(self):
        return self.alpha

    def observe(self, consistency):
        pass

    def end_step(self):
        pass


class Scheduled:
    """The α of a function of the training step.

    Args:
        schedule: A `LearningRateSchedule` or another callable, from a step, a scalar integer tensor, to a scalar.
        model: The model that keeps the number of the step among its variables.
    """

    def __init__(self, schedule, model):
        self.schedule = schedule
        self.step = model.add_weight(
            name="step", shape=(), dtype="int32", initializer="zeros", trainable=False, aggregation="only_first_replica"
        )
        self.variables = {"step": self.step}
        check_number("alpha(0)", float(ops.convert_to_numpy(self._at(ops.convert_to_tensor(0, "int32")))))

    def current(self):
        return self._at(ops.convert_to_tensor(self.step))

    def observe(self, consistency):
        pass

    def end_step(self):
        self.step.assign_add(1)

    def _at(self, step):
        alpha = ops.convert_to_tensor(self.schedule(step), dtype="float32")
        if len(alpha.shape) != 0:
            raise ValueError(
                f"`alpha` must be a scalar at every step. Received: a tensor of shape {tuple(alpha.shape)} from "
                f"alpha={self.schedule!r}."
            )
        return alpha


class Budgeted:
    """The α of a `KLBudget`, kept among the variables of `model`."""

    def __init__(self, budget, model):
        self.budget = budget
        self._warned = False
        self.alpha = model.add_weight(
            name="alpha",
            shape=(),
            dtype="float32",
            initializer=keras.initializers.Constant(budget.initial),
            trainable=False,
            aggregation="mean",
        )
        self.variables = {"alpha": self.alpha}

    def current(self):
        # Clipped when read: clipped when written, the mean over replicas would not be that of one device.
        return ops.clip(ops.convert_to_tensor(self.alpha), 0.0, self.budget.maximum)

    def observe(self, consistency):
        excess = ops.cast(consistency, "float32") / self.budget.target - 1.0
        alpha = self.current()
        moved = alpha + self.budget.step * excess
        # A step whose loss is not finite, as loss scaling meets them, says nothing of α.
        self.alpha.assign(ops.where(ops.isfinite(excess), moved, alpha))

    def end_step(self):
        pass

    def warn_at_maximum(self):
        """Warns, once, if α has come to rest at `maximum`."""
        if not self._warned and float(ops.convert_to_numpy(self.alpha)) >= self.budget.maximum:
            self._warned = True
            warnings.warn(
                f"α has reached the maximum of {self.budget} and the consistency loss is still above its target. Give "
                "a higher `target` or `maximum`, or lower the dropout rates.",
                stacklevel=3,
            )


def check_number(name, value):
    """Raises if `value` is not a finite number ≥ 0."""
    received = f"Received: {name}={value!r} ({type(value).__name__})."
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number ≥ 0. {received}")
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"`{name}` must be a finite number ≥ 0. {received}")
