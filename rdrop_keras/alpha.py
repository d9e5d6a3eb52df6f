"""What α is at each step: fixed, on a schedule, or moved by a budget for the consistency loss.

Comes in: what the user gave as `alpha`, later the consistency loss of each step. Goes out: α of the current step.
Called by: `RDropModel`, and the objective in each step.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Self, TypeAlias

import keras
import numpy as np
from keras import ops

from rdrop_keras import keras_private
from rdrop_keras.arguments import check_number, is_number
from rdrop_keras.wrapper import replicas


@keras.saving.register_keras_serializable(package="rdrop_keras")
@dataclasses.dataclass(eq=False)
class KLBudget:
    """α as a multiplier that brings the consistency loss to a target, so that you need not search for α.

    The paper derives R-Drop from a constrained problem (Eq. 5-6): the smallest loss of the sub-models under a bound on
    the divergence between them. With C = 1/(m(m−1)) · Σ_{i≠j} D(P_i ‖ P_j), the consistency loss, and a bound ε,

        minimize 1/m · Σ_i loss(y, P_i)   subject to   C ≤ ε.

    Its Lagrangian is R-Drop's objective with the multiplier λ = α/m, and Proposition 2.1 bounds by ε how far the
    full model is from its sub-models. The multiplier is found by dual ascent, one step on each R-Drop step:

        α ← min(max(α + step · (C/ε − 1), 0), maximum).

    Where α settles, the average of C is ε. If C stays below ε without R-Drop, α falls to 0. Under `tf.distribute` α
    moves by the mean of C over replicas.

    Args:
        target: ε > 0, in units of the logged `consistency_loss`.
        step: How much α grows in a step in which C is twice the target. Smaller is smoother and slower.
            Defaults to 0.1.
        initial: α at the start, from 0 to `maximum`. Defaults to 1.
        maximum: The largest α. It keeps α from growing without end if the target is out of reach. `fit` warns once if
            α ends there. Defaults to 100.

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

    target: float
    step: float = 0.1
    initial: float = 1.0
    maximum: float = 100.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_number(name, value)
            if value == 0 and name != "initial":
                raise ValueError(f"`{name}` of a KLBudget must be above 0. Received: {name}={value!r}.")
        if self.initial > self.maximum:
            raise ValueError(
                "`initial` of a KLBudget must not be above `maximum`. "
                f"Received: initial={self.initial!r}, maximum={self.maximum!r}."
            )
        for name, value in vars(self).items():
            setattr(self, name, float(value))

    def get_config(self) -> dict[str, float]:
        """Returns the constructor's arguments."""
        return dict(vars(self))

    @classmethod
    def from_config(cls, config: dict[str, float]) -> Self:
        """Makes a `KLBudget` from what `get_config` returned."""
        return cls(**config)


# What an `RDropModel` takes for its α. A `LearningRateSchedule` is covered as a function of the step. Type checkers do
# not know Keras's class, and would accept anything if it stood here.
Alpha: TypeAlias = float | KLBudget | Callable[[Any], Any]


def make(alpha, model):
    """The object that gives `model`, an `RDropModel`, its α at each step."""
    if isinstance(alpha, KLBudget):
        return Budgeted(alpha, model)
    return Scheduled(alpha, model) if callable(alpha) else Fixed(alpha, model)


class _Alpha:
    """Gives a model its α at each step.

    Attributes:
        given: What the user gave: a number, a function of the step or a `KLBudget`.
        moves: Whether α changes by itself from step to step.
        variables: `{name: variable}`, saved with the model.
    """

    moves = True

    def __init__(self, given):
        self.given = given
        self.variables = {}

    def current(self):
        """α at the current step, a scalar."""
        raise NotImplementedError

    def observe(self, consistency, weight):
        """Receives a step's consistency loss, a mean. The function `weight` returns the sum of the weights in it."""

    def end_step(self):
        """Counts a step of training."""

    def end_fit(self):
        """Warns once if `fit` has shown that something is wrong with α."""

    def assign(self, alpha):
        """Makes `alpha` the α of the steps to come."""
        raise TypeError(
            f"`alpha` can be assigned only where it is a number. This RDropModel has alpha={self.given!r}, which moves "
            f"by itself. {_NEW_MODEL} Received: alpha={alpha!r} ({type(alpha).__name__})."
        )

    def write(self):
        """Writes to the variables what was assigned while Keras held their values in a program."""

    def save(self, store):
        for name, variable in self.variables.items():
            store[name] = variable

    def load(self, store):
        names = set(store.keys())
        for name, variable in self.variables.items():
            if name in names:
                variable.assign(store[name])


class Fixed(_Alpha):
    """A fixed α. It is a variable, so that another number can be assigned without a new program.

    A number that was assigned is saved with the model's weights, as a learning rate is. The number with which the model
    was made is not saved there, so that weights can be loaded into a model with another α.
    """

    moves = False

    def __init__(self, alpha, model):
        super().__init__(float(alpha))
        self._assigned = False
        if self.given:
            self._variable = add_scalar(model, "alpha", self.given)

    def current(self):
        return ops.convert_to_tensor(self._variable)

    def assign(self, alpha):
        check_alpha(alpha)
        if is_moving(alpha):
            raise TypeError(
                "`alpha` can be assigned a number only, not what moves by itself. "
                f"{_NEW_MODEL} Received: alpha={alpha!r} ({type(alpha).__name__})."
            )
        if (alpha == 0) != (self.given == 0):
            raise ValueError(
                "`alpha` cannot be changed from 0 or to 0, which is plain training, by assignment. "
                f"{_NEW_MODEL} Received: alpha={alpha!r}, in place of {self.given!r}."
            )
        self.given = float(alpha)
        self._assigned = True
        self.write()

    def write(self):
        if self._assigned and self.given:
            self._variable.assign(self.given)

    def save(self, store):
        if self._assigned and self.given:
            store["alpha"] = np.array(self.given)

    def load(self, store):
        if "alpha" in set(store.keys()) and self.given:
            self.assign(float(np.array(store["alpha"])))


class Scheduled(_Alpha):
    """α as a function of the training step.

    Args:
        schedule: A `LearningRateSchedule` or another callable, from a step, a scalar integer tensor, to a scalar.
        model: The model that keeps the number of the step among its variables.
    """

    def __init__(self, schedule, model):
        super().__init__(schedule)
        self.step = add_scalar(model, "step", 0)
        self._held = add_scalar(model, "held", 0)
        self._warned = False
        self.variables = {"step": self.step}
        check_number("alpha(0)", float(ops.convert_to_numpy(self._at(ops.convert_to_tensor(0, "int32")))))
        self._check_symbolic()

    def current(self):
        alpha = self._at(ops.convert_to_tensor(self.step))
        valid = ops.logical_and(ops.isfinite(alpha), alpha >= 0)
        self._held.assign_add(1 - ops.cast(valid, "int32"))
        return ops.where(valid, alpha, ops.zeros_like(alpha))

    def end_step(self):
        self.step.assign_add(1)

    def end_fit(self):
        steps = int(ops.convert_to_numpy(self._held))
        if steps and not self._warned:
            self._warned = True
            warnings.warn(
                f"`alpha` must be a finite number ≥ 0 at every step, and was not at {steps} of the steps so far; there "
                f"it was taken for 0. Received: alpha={self.given!r}. Bound it, for example by `keras.ops.maximum`.",
                stacklevel=4,
            )

    def _at(self, step):
        alpha = ops.convert_to_tensor(self.given(step), dtype="float32")
        if len(alpha.shape) != 0:
            raise ValueError(
                f"`alpha` must be a scalar at every step. Received: a tensor of shape {tuple(alpha.shape)} from "
                f"alpha={self.given!r}."
            )
        return alpha

    def _check_symbolic(self):
        if keras.backend.backend() == "torch":  # It runs the function as Python in each step.
            return
        try:
            keras_private.compute_output_spec(self._at, keras.KerasTensor((), dtype="int32"))
        except Exception as error:
            raise ValueError(
                "`alpha` must be a function of the training step, an integer tensor, that is written in `keras.ops`, "
                "since it is compiled with the step: `keras.ops.where(step < 100, 1.0, 5.0)` in place of a Python "
                f"`if`, `keras.ops.cast` in place of `float`. Received: alpha={self.given!r}, which raised "
                f"{type(error).__name__}."
            ) from error


class Budgeted(_Alpha):
    """The α of a `KLBudget`, kept as a variable of `model`."""

    def __init__(self, budget, model):
        super().__init__(budget)
        self._warned = False
        self.alpha = add_scalar(model, "alpha", budget.initial, aggregation="mean")
        self.variables = {"alpha": self.alpha}

    def current(self):
        # Clipped when read. If each replica clipped what it writes, their mean would differ from that of one device.
        return ops.clip(ops.convert_to_tensor(self.alpha), 0.0, self.given.maximum)

    def observe(self, consistency, weight):
        excess = ops.cast(ops.stop_gradient(consistency), "float32") / self.given.target - 1.0
        alpha = self.current()
        moved = alpha + self.given.step * excess
        # Steps without weights tell nothing about α. Neither do those whose loss is not finite.
        says_something = ops.logical_and(ops.isfinite(excess), replicas.total(weight()) > 0)
        self.alpha.assign(ops.where(says_something, moved, alpha))

    def end_fit(self):
        if not self._warned and float(ops.convert_to_numpy(self.alpha)) >= self.given.maximum:
            self._warned = True
            warnings.warn(
                f"α has reached the maximum of {self.given} and the consistency loss is still above its target. Give "
                "a higher `target` or `maximum`, or lower the dropout rates.",
                stacklevel=4,
            )


def check_alpha(alpha):
    """Raises if an `RDropModel` does not accept `alpha`."""
    choices = "a number ≥ 0, a LearningRateSchedule, a KLBudget or a function"
    if isinstance(alpha, type):
        raise TypeError(
            f"`alpha` must be {choices}. Received: alpha={alpha.__name__}, the class. Call it with its arguments."
        )
    if is_moving(alpha):
        return
    if not is_number(alpha):
        raise TypeError(f"`alpha` must be {choices}. Received: alpha={alpha!r} ({type(alpha).__name__}).")
    check_number("alpha", alpha)


_NEW_MODEL = (
    "Make a new RDropModel around the same `.model` and compile it: `RDropModel(model.model, alpha=...)` goes on from "
    "its weights."
)


def is_moving(alpha):
    """Whether `alpha` is a function of the step or a `KLBudget`, not a number."""
    return callable(alpha) or isinstance(alpha, KLBudget)


def add_scalar(model, name, value, aggregation="only_first_replica"):
    """Adds a scalar variable to `model`, int or float like `value`, that is not one of its weights."""
    return model.add_weight(
        name=name,
        shape=(),
        dtype="int32" if isinstance(value, int) else "float32",
        initializer=keras.initializers.Constant(value),
        trainable=False,
        aggregation=aggregation,
    )
