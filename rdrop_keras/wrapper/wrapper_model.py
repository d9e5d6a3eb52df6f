"""A Keras model that trains another one in a way of its own, and is that other one in everything else.

Comes in: a `keras.Model`, and the calls of Keras's trainers. Goes out: training steps for a subclass to fill. Called
by: Keras, through `model.RDropModel`.
"""

import contextlib
import functools
import os
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self, TypeVar

import keras
import numpy as np

from rdrop_keras import keras_private
from rdrop_keras.wrapper import checkpoints, formats, preprocessing, random_state, replicas, step
from rdrop_keras.wrapper.attributes import ModelAttributes
from rdrop_keras.wrapper.tf_trainer import TFTrainerFixes

# What `keras.Model` does in training and the wrapper does in the model's place.
_REPLACED = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics", *preprocessing.METHODS)

# What needs no compiled loss.
_WITHOUT_LOSS = ("predict", "predict_on_batch")

MethodT = TypeVar("MethodT", bound=Callable[..., Any])


def _as_documented(method: Any) -> Callable[[MethodT], MethodT]:
    """`functools.wraps`, after which type checkers still see a method."""
    decorator: Any = functools.wraps(method)
    return decorator


def _step_of_wrapper(train_step: Callable[..., Any]) -> Callable[..., Any]:
    """`train_step`, a method of a `WrapperModel`, as a step of that wrapper: Keras's own, or one that overrides it."""

    @functools.wraps(train_step)
    def step_of_wrapper(self, *args):
        if step.current() is not None:  # `super().train_step` in an override.
            return train_step(self, *args)
        if self._as_is:
            with step.training():
                return train_step(self, *args)
        with self._in_step(self.passes_of_step(self._num_steps) if self._traced is None else self._traced):
            if keras.backend.backend() == "jax":
                return self._with_own_state(train_step, *args)
            return train_step(self, *args)

    return step_of_wrapper


class WrapperModel(ModelAttributes, TFTrainerFixes):
    """Trains `model`, found again as `.model`; in all but training it is that model.

    What a subclass may override, all of it about training alone:

    - `passes_of_step(number)` and `passes_of_steps`: how often the rows of the batch stand in the outputs of a step;
    - `call_in_training(inputs, training)`: the outputs that the loss and the metrics get;
    - `make_loss(loss, loss_weights)` and `make_metrics(metrics, weighted_metrics)`: what takes the place of Keras's
      compiled loss and metrics;
    - `training_metrics`: metrics that `evaluate` does not report;
    - `check_step(made, error)` and `after_fit(history)`;
    - `save_own_variables` and `load_own_variables`, `get_config` and `from_config`, `fixed`: extend these where the
      subclass has state or arguments of its own.

    A step is one of the wrapper's whatever `train_step` a subclass has. A KerasHub task takes raw inputs as it does by
    itself. Files are replaced when the new one is whole, and hold the states of random generators. Replicas of
    `tf.distribute` draw random numbers of their own, and their rows count alike.

    Args:
        model: The `keras.Model` to train.
        name: Name of the wrapper.
        as_is: Trains just as Keras does, and overrides nothing.

    Raises:
        TypeError: If `model` is no `keras.Model`.
        ValueError: If `model` is or holds a wrapper, overrides a step of training that the wrapper replaces, or was
            made under another `tf.distribute` strategy.
        AttributeError: If what is `fixed` is assigned.

    Example:

    >>> from rdrop_keras.wrapper.wrapper_model import WrapperModel
    >>> class NoisyInputs(WrapperModel):
    ...     \"\"\"Trains a model on inputs with noise.\"\"\"
    ...
    ...     def __init__(self, model, stddev, name=None):
    ...         super().__init__(model, name)
    ...         self.noise = keras.layers.GaussianNoise(stddev)
    ...
    ...     def call_in_training(self, inputs, training):
    ...         return self.model(self.noise(inputs, training=True), training=training)
    >>> model = NoisyInputs(keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)]), stddev=0.1)
    >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> history = model.fit(np.ones((32, 8)), np.zeros(32), verbose=0)
    """

    train_function: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "train_step" in vars(cls):
            setattr(cls, "train_step", _step_of_wrapper(cls.train_step))  # noqa: B010 (a method, for type checkers)

    def __init__(self, model: keras.Model, name: str | None = None, as_is: bool = False) -> None:
        _check_model(model, type(self).__name__)
        # The model's own policy, for loss scaling; inputs are left to the model to cast.
        super().__init__(name=name, dtype=model.dtype_policy, autocast=False)
        _check_strategy(model, self)
        self.model = model
        self.built = model.built
        self._as_is = as_is
        self._evaluating = False
        self._quantized: dict[str, str] = {}
        self._num_steps = 0  # Steps made. No variable: it decides which program runs.
        self._traced: int | None = None  # The passes of the program that runs, which it may be tracing.
        # As it is, a model draws nothing that it would not draw alone.
        self._torch_seed = None if as_is else random_state.torch_seed()
        keras_private.take_training_argument_as(self, model)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "train_step":  # As a subclass's.
            given = value
            value = types.MethodType(_step_of_wrapper(lambda self, *args: given(*args)), self)
        super().__setattr__(name, value)

    # What subclasses override.
    @property
    def passes_of_steps(self) -> tuple[int, ...]:
        """What `passes_of_step` may return; each has a program of its own."""
        return (1,)

    def described_steps(self) -> str:
        """What makes steps differ in their passes, for messages."""
        return f"steps of {' and '.join(map(str, self.passes_of_steps))} passes"

    def passes_of_step(self, number: int) -> int:
        """How often the rows of the batch stand in the outputs of the step of that number."""
        return self.passes_of_steps[0]

    @property
    def training_metrics(self) -> Sequence[keras.Metric]:
        """Metrics that `evaluate` does not report."""
        return ()

    def call_in_training(self, inputs: Any, training: bool | None) -> Any:
        """The outputs of a training step."""
        return keras_private.call(self.model, inputs, training)

    def make_loss(self, loss: Any, loss_weights: Any) -> Any:
        """A compiled loss in place of the one that Keras makes of these; None for Keras's."""
        return None

    def make_metrics(self, metrics: Any, weighted_metrics: Any) -> Any:
        """Compiled metrics in place of those that Keras makes of these; None for Keras's."""
        return None

    def check_step(self, made: step.Step, error: Exception | None) -> None:
        """Raises if the step `made` was none of the subclass's; `error` is what it ended with."""

    def after_fit(self, history: keras.callbacks.History) -> None:
        """Is called at the end of each `fit`."""

    # The model's call, and what trainers ask for around it.
    def call(self, inputs: Any, training: bool | None = None) -> Any:
        current = step.current()
        if current is None:
            return keras_private.call(self.model, inputs, training)
        if self._as_is:
            return keras_private.call_as_trained(self.model, inputs, training)
        if not current.called:
            current.called = True
            current.row_scale = replicas.row_scale(inputs)
        return self.call_in_training(inputs, training)

    @property
    def metrics(self) -> list[keras.Metric]:
        metrics = super().metrics
        if not self._as_is and not self._evaluating:
            return metrics
        return [metric for metric in metrics if metric not in self.training_metrics]

    # Training.
    def compile(
        self,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        weighted_metrics: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Configures training; see `keras.Model.compile`, whose arguments it takes."""
        made = None if self._as_is else self.make_loss(loss, loss_weights)
        super().compile(optimizer, loss, loss_weights, metrics, weighted_metrics, *args, **kwargs)
        if len(self.passes_of_steps) > 1 and self.steps_per_execution > 1:
            self.compiled = False
            raise ValueError(
                "Where the number of passes differs from step to step, `steps_per_execution` must be 1: each number is "
                "a program of its own, and an execution of several steps cannot choose between them. "
                f"Received: {self.described_steps()}, steps_per_execution={self.steps_per_execution}."
            )
        if made is not None:
            keras_private.set_compiled_loss(self, made)
        if keras_private.has_metrics(self) and not self._as_is:
            keras_private.set_compiled_metrics(self, self.make_metrics(metrics, weighted_metrics))

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles with what `get_compile_config` returned, and makes the optimizer's variables.

        If it needs a class that Keras cannot find, a model with a `compile` of its own, as KerasHub's tasks have, is
        loaded all the same: with a warning, and not compiled.
        """
        try:
            arguments = keras.saving.deserialize_keras_object(config)
        except (TypeError, ValueError) as error:
            if type(self.model).compile is keras.Model.compile:
                raise
            warnings.warn(
                f"This {type(self).__name__} is loaded without its optimizer, loss and metrics: compile it before you "
                "train it. Or register your classes by `keras.saving.register_keras_serializable`, or pass them as "
                f"`custom_objects`, before you load it. {error}",
                stacklevel=2,
            )
            return
        self.compile(**arguments)
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def train_step(self, *args: Any) -> Any:
        return super().train_step(*args)

    train_step = _step_of_wrapper(train_step)

    @contextlib.contextmanager
    def training_step(self) -> Iterator[int]:
        """Within it, a loop of one's own makes a training step of this wrapper.

        There `model(x, training=True)` returns the rows of all passes, and `model.compute_loss(x, y, outputs,
        sample_weight)` is the loss that `fit` minimizes. The model must be compiled with a loss; optimizer and metrics
        are the loop's own affair. At its end the step is counted. Under `tf.distribute` it belongs into the function
        of one replica.

        Yields:
            The number of passes of the step. A function that is compiled, by `tf.function` or `jax.jit`, needs it as
            an argument that is static if steps of this model differ in it.

        Raises:
            RuntimeError: If the model is not compiled with a loss.
        """
        if self._compile_loss is None:
            raise RuntimeError(
                f"`training_step` needs the compiled loss of this {type(self).__name__}: "
                "`compile(optimizer, loss=...)` first; the optimizer may be one that you do not use."
            )
        num_passes = self.passes_of_step(self._num_steps)
        with step.training(num_passes) if self._as_is else self._in_step(num_passes):
            yield num_passes
        self._num_steps += 1

    @contextlib.contextmanager
    def _in_step(self, num_passes):
        """Within it, this wrapper makes a step of so many passes."""
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

        Keras's own step hands them to the loss. A step of a subclass often computes the loss without them; what they
        are then given belongs into the state that it returns.
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
        if self._as_is:
            super().make_train_function(force)
            return
        if self.train_function is not None and not force:
            return
        own = self.__dict__.get("train_step")
        given = self.train_step
        functions = {}
        for num_passes in self.passes_of_steps:
            # A function of its own each time: JAX would take the program of an equal one from its cache.
            self.__dict__["train_step"] = lambda *args: given(*args)
            try:
                super().make_train_function(force=True)
            finally:
                del self.__dict__["train_step"]
                if own is not None:
                    self.__dict__["train_step"] = own
            functions[num_passes] = self.train_function

        def train_function(*args):
            self._traced = self.passes_of_step(self._num_steps)
            try:
                result = functions[self._traced](*args)
            finally:
                self._traced = None
            self._num_steps += self.steps_per_execution
            return result

        self.train_function = train_function

    # Data, which a KerasHub task takes raw.
    @_as_documented(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        formats.check_callbacks([*args[5:6], kwargs.get("callbacks")], type(self).__name__)
        history = self._with_data("fit", args, kwargs)
        self.after_fit(history)
        return history

    @_as_documented(keras.Model.evaluate)
    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_data("evaluate", args, kwargs, evaluation=True)

    @_as_documented(keras.Model.predict)
    def predict(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_data("predict", args, kwargs)

    @_as_documented(keras.Model.train_on_batch)
    def train_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_data("train_on_batch", args, kwargs)

    @_as_documented(keras.Model.test_on_batch)
    def test_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_data("test_on_batch", args, kwargs, evaluation=True)

    @_as_documented(keras.Model.predict_on_batch)
    def predict_on_batch(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_data("predict_on_batch", args, kwargs)

    def _with_data(self, method, args, kwargs, evaluation=False):
        """Calls `keras.Model`'s method; while `evaluation`, the logs are those of the wrapped model."""
        cls = type(self).__name__
        if self.model.compiled and not self.compiled and method not in _WITHOUT_LOSS:
            raise ValueError(
                f"The model inside is compiled, and the {cls} around it is not: it trains with an optimizer and a loss "
                f"of its own. Call `compile` of the {cls}. Received: `{method}` of {self.name!r}."
            )
        if keras.backend.backend() == "tensorflow":
            self._drop_stale_programs()
        before, self._evaluating = self._evaluating, evaluation
        try:
            if preprocessing.pipeline_class(self.model) is None:
                return getattr(super(), method)(*args, **kwargs)
            return preprocessing.run(method, self.model, self, args, kwargs)
        finally:
            self._evaluating = before

    def _drop_stale_programs(self):
        """Drops the programs of TensorFlow if the model inside was quantized, which drops its own alone."""
        layers = keras_private.all_layers(self.model)
        quantized = {layer.path: layer.quantization_mode for layer in layers if layer.quantization_mode is not None}
        if quantized != self._quantized:
            self._quantized = quantized
            self.train_function = self.test_function = self.predict_function = None

    # Files.
    def export(self, filepath: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Exports the wrapped model alone; see `keras.Model.export`, whose arguments it takes."""
        return self.model.export(filepath, *args, **kwargs)

    def save(
        self, filepath: str | os.PathLike[str], overwrite: bool = True, zipped: bool | None = None, **kwargs: Any
    ) -> None:
        """Saves as `keras.Model.save`, whose arguments it takes; an existing file is replaced when the new is whole.

        Raises:
            ValueError: If `filepath` is one of the older HDF5 format.
        """
        formats.check_format(filepath, type(self).__name__)
        if zipped is False:
            super().save(filepath, overwrite=overwrite, zipped=zipped, **kwargs)
            return
        with checkpoints.replacing(filepath, ".keras", overwrite, self._saved_variables()) as path:
            super().save(path, overwrite=overwrite, zipped=zipped, **kwargs)

    def save_weights(
        self, filepath: str | os.PathLike[str], overwrite: bool = True, max_shard_size: float | None = None
    ) -> None:
        """Saves as `keras.Model.save_weights`, whose arguments it takes, and replaces as `save` does."""
        with checkpoints.replacing(filepath, ".weights.h5", overwrite, self._saved_variables()) as path:
            super().save_weights(path, overwrite=overwrite, max_shard_size=max_shard_size)

    def load_weights(self, filepath: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Loads as `keras.Model.load_weights`, whose arguments it takes; also a file of the wrapped model alone."""
        if formats.is_of_model_alone(filepath):
            self.model.load_weights(filepath, *args, **kwargs)
        else:
            super().load_weights(filepath, *args, **kwargs)

    def save_own_variables(self, store: Any) -> None:
        random_state.save(store, self.model, self._torch_seed)
        store["num_steps"] = np.array(self._num_steps)

    def load_own_variables(self, store: Any) -> None:
        random_state.load(store, self.model, self._torch_seed)
        if "num_steps" in set(store.keys()):
            self._num_steps = int(np.array(store["num_steps"]))

    def get_config(self) -> dict[str, Any]:
        # Of what the model inside was itself compiled with the wrapper has no need.
        return {"name": self.name, "model": _uncompiled(keras.saving.serialize_keras_object(self.model))}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        model = keras.saving.deserialize_keras_object(config["model"], custom_objects=custom_objects)
        return cls(**{**config, "model": model})

    def _saved_variables(self):
        optimizer = getattr(self, "optimizer", None)
        return self.variables + (optimizer.variables if optimizer is not None else [])


def unwrapped(model):
    """The model inside a wrapper, or the `keras.Model` itself."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r} ({type(model).__name__}).")
    return model.model if isinstance(model, WrapperModel) else model


def check_unwrapped(model):
    """Raises if `model` is no `keras.Model`, or is or holds a wrapper."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r} ({type(model).__name__}).")
    inner = next((layer for layer in keras_private.all_layers(model) if isinstance(layer, WrapperModel)), None)
    if inner is not None:
        raise ValueError(
            f"`model` is or holds an {type(inner).__name__}: use the model inside that, its `.model`. "
            f"Received: {inner.name!r}."
        )


def _check_model(model, wrapper):
    check_unwrapped(model)
    pipeline = preprocessing.pipeline_class(model)
    for method in _REPLACED:
        known = [getattr(keras.Model, method), getattr(pipeline, method, None)]
        if getattr(type(model), method) not in known:
            raise ValueError(
                f"`{type(model).__name__}` overrides `{method}`, which an {wrapper} around it would pass by. Override "
                f"`{method}` in a subclass of {wrapper} instead, where `self.model` is the wrapped model."
            )


def _check_strategy(model, wrapper):
    own, others = keras_private.strategy_of(model), keras_private.strategy_of(wrapper)
    if own is not others:
        described = ["no strategy" if strategy is None else type(strategy).__name__ for strategy in (own, others)]
        cls = type(wrapper).__name__
        raise ValueError(
            f"`model` and the {cls} around it must be made under the same `strategy.scope()`. Received: "
            f"model={model.name!r} made under {described[0]}, the {cls} under {described[1]}."
        )


def _uncompiled(config):
    """The configuration of a model without what it was compiled with."""
    if isinstance(config, dict):
        return {key: _uncompiled(value) for key, value in config.items() if key != "compile_config"}
    return list(map(_uncompiled, config)) if isinstance(config, list) else config
