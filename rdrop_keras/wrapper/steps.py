"""Training steps of a wrapper, with whichever `train_step` its class has, or in a loop of one's own.

Comes in: Keras's calls of `train_step`, or a loop around `training_step`. Goes out: the same within a `step.Step`, with
random states, replicas and the count of steps taken care of. Called by: Keras, and users.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
from keras import ops

from rdrop_keras import keras_private
from rdrop_keras.wrapper import random_state, replicas, step
from rdrop_keras.wrapper.attributes import ModelAttributes
from rdrop_keras.wrapper.tf_trainer import TFTrainerFixes


def _step_of_wrapper(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """`train_step`, a method of a `WrapperModel`, as a step of that wrapper. It is Keras's own or an override."""

    @functools.wraps(train_step)
    def step_of_wrapper(self, *args):
        if step.current() is not None:  # An override has called `super().train_step`.
            return train_step(self, *args)
        if self._as_is:
            with step.training():
                return train_step(self, *args)
        with self._in_step(self.passes_of_step(self._num_steps) if self._traced is None else self._traced):
            if keras.backend.backend() == "jax":
                return self._with_own_state(train_step, *args)
            return train_step(self, *args)

    vars(step_of_wrapper).update(is_of_wrapper=True)
    return step_of_wrapper


class TrainingSteps(ModelAttributes, TFTrainerFixes):
    """A wrapper whose steps are its own, whatever `train_step` a subclass has."""

    train_function: Any

    def __init__(self, *, as_is: bool, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._as_is = as_is  # Trains just as Keras does.
        self._num_steps = 0  # Steps made. No variable: it decides which program runs.
        self._has_begun_step = False  # By `training_step`, in whatever thread.
        self._traced: int | None = None  # The passes of the program that runs, which it may be tracing.
        # With `as_is`, a model draws nothing that it would not draw alone.
        self._torch_seed = None if as_is else random_state.torch_seed()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not hasattr(cls.train_step, "is_of_wrapper"):  # It is the class's own, or that of a mixin.
            setattr(cls, "train_step", _step_of_wrapper(cls.train_step))  # noqa: B010 (a method, for type checkers)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "train_step":  # It is treated as one in a subclass.
            given = value
            value = types.MethodType(_step_of_wrapper(lambda self, *args: given(*args)), self)
        super().__setattr__(name, value)

    # What subclasses override.
    @property
    def passes_of_steps(self) -> tuple[int, ...]:
        """All numbers that `passes_of_step` may return. Each has a program of its own."""
        return (1,)

    def described_steps(self) -> str:
        """The reason why steps differ in their number of passes, for messages."""
        return f"steps of {' and '.join(map(str, self.passes_of_steps))} passes"

    def check_steps_per_execution(self, steps_per_execution: int) -> None:
        """Raises if steps differ in their number of passes and an execution has several steps."""
        if len(self.passes_of_steps) > 1 and steps_per_execution > 1:
            raise ValueError(
                "Where the number of passes differs from step to step, `steps_per_execution` must be 1: each number is "
                "a program of its own, and an execution of several steps cannot choose between them. "
                f"Received: {self.described_steps()}, steps_per_execution={steps_per_execution}."
            )

    def passes_of_step(self, number: int) -> int:
        """How often the rows of the batch stand in the outputs of the step with that number."""
        return self.passes_of_steps[0]

    @property
    def training_metrics(self) -> Sequence[keras.Metric]:
        """Metrics that `evaluate` does not report."""
        return ()

    def check_step(self, made: step.Step, error: Exception | None) -> None:
        """Raises if the step `made` was not made as the subclass needs it. `error` is what ended it, or None."""

    # Keras's trainers, and loops of one's own.
    def _aggregate_additional_loss(self, loss):
        made = step.current()
        if made is not None and made.num_passes > 1 and made.called and len(loss.shape) > 0:
            # A layer that gives `add_loss` a value for each row gives it for those of all passes.
            of_all_passes = ops.equal(ops.shape(loss)[0], made.num_passes * made.num_rows)
            loss = ops.where(of_all_passes, ops.divide(loss, made.num_passes), loss)
        return super()._aggregate_additional_loss(loss)

    def _flatten_metrics_in_order(self, logs):
        # `train_on_batch` returns a list of what it would return for the model alone.
        own = [name for metric in self.training_metrics for name in getattr(metric, "names", [metric.name])]
        return super()._flatten_metrics_in_order({name: log for name, log in logs.items() if name not in own})

    def train_step(self, *args: Any) -> Any:
        return super().train_step(*args)

    train_step = _step_of_wrapper(train_step)

    @contextlib.contextmanager
    def training_step(self) -> Iterator[int]:
        """Within it, a loop of one's own makes a training step of this wrapper.

        There `model(x, training=True)` returns the rows of all passes, and `model.compute_loss(x, y, outputs,
        sample_weight)` returns the loss that `fit` minimizes. The model must be compiled with a loss. The loop takes
        care of optimizer and metrics itself. The step is counted when the context ends. Under `tf.distribute` the
        context belongs into the function that `strategy.run` calls.

        Yields:
            The number of passes of the step. If steps of this model differ in it, a function that is compiled by
            `tf.function` or `jax.jit` needs it as a static argument.

        Raises:
            RuntimeError: If the model is not compiled with a loss; if the model is called on a replica of
                `tf.distribute` in a step that was begun outside; if steps differ in their number of passes and one is
                begun in a `tf.function`, where steps cannot be counted.
        """
        if self._compile_loss is None:
            raise RuntimeError(
                f"`training_step` needs the compiled loss of this {type(self).__name__}: "
                "`compile(optimizer, loss=...)` first; the optimizer may be one that you do not use."
            )
        if len(self.passes_of_steps) > 1 and replicas.is_in_function():
            raise RuntimeError(
                "Where steps differ in their passes, `training_step` belongs outside of a `tf.function`, which is run "
                f"again without it. Received: {self.described_steps()}."
            )
        num_passes = self.passes_of_step(self._num_steps)
        self._has_begun_step = True
        try:
            with step.training(num_passes) if self._as_is else self._in_step(num_passes):
                yield num_passes
        finally:
            self._has_begun_step = False
        self._num_steps += 1

    @contextlib.contextmanager
    def _in_step(self, num_passes):
        """Within it, this wrapper makes a step with so many passes."""
        of_replica = replicas.own_masks(self.model)
        with step.training(num_passes) as made, random_state.drawing_from(self._torch_seed), of_replica:
            try:
                yield
            except Exception as error:
                self.check_step(made, error)
                raise
            self.check_step(made, None)

    def _with_own_state(self, train_step, state, data):
        """`train_step(self, state, data)` on JAX, where variables of the wrapper are part of the state.

        Keras's own step hands them to the loss. A step of a subclass often computes the loss without them. What is then
        assigned to them belongs into the state that the step returns.
        """
        own = [*keras_private.own_variables(self), *(v for metric in self.training_metrics for v in metric.variables)]
        own = {id(variable) for variable in own}
        _, others, _, metrics = state
        pairs = [*zip(self.non_trainable_variables, others), *zip(self.metrics_variables, metrics)]
        with keras.StatelessScope([pair for pair in pairs if id(pair[0]) in own]) as scope:
            before = {id(v): scope.get_current_value(v) for v, _ in pairs if id(v) in own}
            logs, (trainable, others, optimizer, metrics) = train_step(self, state, data)

        def updated(variables, values):
            after = [scope.get_current_value(v) if id(v) in own else None for v in variables]
            return [
                value if new is None or new is before[id(variable)] else new
                for variable, new, value in zip(variables, after, values)
            ]

        others = updated(self.non_trainable_variables, others)
        metrics = updated(self.metrics_variables, metrics)
        values = {id(variable): value for variable, value in zip(self.metrics_variables, metrics)}
        for metric in self.training_metrics:
            if metric.name in logs:
                logs[metric.name] = metric.stateless_result([values[id(variable)] for variable in metric.variables])
        return logs, (trainable, others, optimizer, metrics)

    def make_train_function(self, force: bool = False) -> None:
        """Makes the programs of training, one for each number of passes."""
        self.check_steps_per_execution(self.steps_per_execution)
        if self._as_is:
            super().make_train_function(force)
            return
        if self.train_function is not None and not force:
            return
        given, own = self.train_step, self.__dict__.get("train_step")
        functions = {}
        try:
            for num_passes in self.passes_of_steps:
                # Each number needs a function of its own. JAX would take the program of an equal one from its cache.
                self.__dict__["train_step"] = lambda *args: given(*args)
                super().make_train_function(force=True)
                functions[num_passes] = self.train_function
        finally:
            del self.__dict__["train_step"]
            if own is not None:
                self.__dict__["train_step"] = own

        def train_function(*args):
            self._traced = self.passes_of_step(self._num_steps)
            try:
                result = functions[self._traced](*args)
            finally:
                self._traced = None
            self._num_steps += self.steps_per_execution
            return result

        self.train_function = train_function
