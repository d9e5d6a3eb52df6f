"""A Keras model that trains another one in a way of its own, and is that other one in everything else.

Comes in: a `keras.Model`, and the calls of Keras's trainers. Goes out: training steps for a subclass to fill. Called
by: Keras, through `model.RDropModel`.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, Self, TypeVar

import keras
import numpy as np

from rdrop_keras import keras_private
from rdrop_keras.wrapper import checkpoints, multi_worker, preprocessing, random_state, replicas, step

# What `keras.Model` does in training and the wrapper does in the model's place.
_REPLACED = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics", *preprocessing.METHODS)

MethodT = TypeVar("MethodT", bound=Callable[..., Any])


def _as_documented(method: Any) -> Callable[[MethodT], MethodT]:
    """`functools.wraps`, after which type checkers still see a method."""
    decorator: Any = functools.wraps(method)
    return decorator


class WrapperModel(keras.Model):
    """Trains `model`, found again as `.model`; to evaluate, predict, export and when called it is that model.

    What a subclass may override, all of it about training alone:

    - `call_in_training(inputs, training, kind)`: the outputs that the loss and the metrics get;
    - `make_loss(loss, loss_weights)`: what takes the place of Keras's compiled loss;
    - `kinds_of_step`, `kind_of_step(number)` and `check_steps_per_execution()`: kinds, each with a program of its own;
      one of kind `step.AS_IS` trains just as Keras does;
    - `steps_made(result)`: how many steps an execution made;
    - `training_metrics`: metrics that `evaluate` does not report;
    - `after_fit(history)`;
    - `save_own_variables` and `load_own_variables`, `get_config` and `from_config`, `fixed`: as it has more of its own.

    A KerasHub task takes raw inputs as it does by itself. Files are replaced when the new one is whole, and hold the
    states of random generators. Replicas of `tf.distribute` draw random numbers of their own, and their rows count
    alike.

    Args:
        model: The `keras.Model` to train.
        name: Name of the wrapper.
        as_is: Trains just as Keras does, and overrides nothing.
        begins_as_is: Does so in its first steps, which are of kind `step.AS_IS`.

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
    ...     def call_in_training(self, inputs, training, kind):
    ...         return self.model(self.noise(inputs, training=True), training=training)
    >>> model = NoisyInputs(keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)]), stddev=0.1)
    >>> model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    >>> history = model.fit(np.ones((32, 8)), np.zeros(32), verbose=0)
    """

    model: keras.Model
    train_function: Any

    # Attributes that a model keeps for life.
    fixed: tuple[str, ...] = ("model",)

    def __init__(
        self, model: keras.Model, name: str | None = None, as_is: bool = False, begins_as_is: bool = False
    ) -> None:
        _check_model(model, type(self).__name__)
        # The model's own policy, for loss scaling; inputs are left to the model to cast.
        super().__init__(name=name, dtype=model.dtype_policy, autocast=False)
        _check_strategy(model, self)
        self.model = model
        self.built = model.built
        self._as_is = as_is
        self._evaluating = False
        self._num_steps = 0  # Steps made. No variable: it decides which program runs.
        self._kind = None  # Of the step under way.
        # As it is, a model draws nothing that it would not draw alone.
        self._torch_seed = None if as_is else random_state.torch_seed(started=not begins_as_is)
        keras_private.take_training_argument_as(self, model)

    # What subclasses override.

    @property
    def kinds_of_step(self) -> tuple[Any, ...]:
        """What a step can be; each kind has a program of its own."""
        return (None,)

    @property
    def training_metrics(self) -> Sequence[keras.Metric]:
        """Metrics that `evaluate` does not report."""
        return ()

    def call_in_training(self, inputs: Any, training: bool | None, kind: Any) -> Any:
        """The outputs of a training step."""
        return keras_private.call(self.model, inputs, training)

    def make_loss(self, loss: Any, loss_weights: Any) -> Any:
        """A compiled loss in place of the one that Keras makes of these; None for Keras's."""
        return None

    def kind_of_step(self, number: int) -> Any:
        """The kind of the step of that number, one of `kinds_of_step`."""
        return self.kinds_of_step[0]

    def steps_made(self, result: Any) -> int:
        """How many steps the execution made whose result, of Keras's `train_function`, that is."""
        return 1

    def check_steps_per_execution(self) -> None:
        """Raises if there are several programs and executions of several steps, which cannot choose between them."""
        if len(self.kinds_of_step) > 1 and self.steps_per_execution > 1:
            raise ValueError(
                "With steps of several kinds, `steps_per_execution` must be 1. "
                f"Received: steps_per_execution={self.steps_per_execution}."
            )

    def after_fit(self, history: keras.callbacks.History) -> None:
        """Is called at the end of each `fit`."""

    # The model's call, and what trainers ask for around it.
    def call(self, inputs: Any, training: bool | None = None) -> Any:
        current = step.current()
        if current is None:
            return keras_private.call(self.model, inputs, training)
        if current.kind == step.AS_IS:
            return keras_private.call_as_trained(self.model, inputs, training)
        return self.call_in_training(inputs, training, current.kind)

    @property
    def weights(self) -> list[Any]:
        # Variables of the wrapper's own are state for Keras's programs and no weights, as random states are.
        return self.model.weights

    @property
    def output_names(self) -> list[str]:
        return self.model.output_names

    @property
    def metrics(self) -> list[keras.Metric]:
        metrics = super().metrics
        if not self._as_is and not self._evaluating:
            return metrics
        return [metric for metric in metrics if metric not in self.training_metrics]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.fixed and hasattr(self, name):
            cls = type(self).__name__
            made = f"{cls}(other)" if name == "model" else f"{cls}(model.model, {name}=...)"
            raise AttributeError(
                f"`{name}` of this {cls} is fixed when it is made. Make a new one and compile it: `{made}`. "
                "The model inside keeps its weights."
            )
        super().__setattr__(name, value)

    # Training.
    def compile(
        self, optimizer: Any = "rmsprop", loss: Any = None, loss_weights: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        """Configures training; see `keras.Model.compile`, whose arguments it takes."""
        made = None if self._as_is else self.make_loss(loss, loss_weights)
        super().compile(optimizer, loss, loss_weights, *args, **kwargs)
        try:
            self.check_steps_per_execution()
        except ValueError:
            self.compiled = False
            raise
        if made is not None:
            keras_private.set_compiled_loss(self, made)

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles with what `get_compile_config` returned, and makes the optimizer's variables."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def train_step(self, *args: Any) -> Any:
        kind = self._kind if self._kind is not None else self.kind_of_step(0)
        if self._as_is or kind == step.AS_IS:
            with step.training(step.AS_IS):
                return super().train_step(*args)
        of_replica = replicas.training_step(self.model, args[-1])
        with step.training(kind), random_state.drawing_from(self._torch_seed), of_replica:
            return super().train_step(*args)

    def make_train_function(self, force: bool = False) -> None:
        self.check_steps_per_execution()
        if len(self.kinds_of_step) == 1 or self._as_is:
            super().make_train_function(force)
            return
        if self.train_function is not None and not force:
            return
        functions = {}
        for kind in self.kinds_of_step:
            # A function of its own each time: JAX would take the program of an equal one from its cache.
            self.__dict__["train_step"] = lambda *args: type(self).train_step(self, *args)
            try:
                super().make_train_function(force=True)
            finally:
                del self.__dict__["train_step"]
            functions[kind] = self.train_function

        def train_function(*args):
            self._kind = self.kind_of_step(self._num_steps)
            result = functions[self._kind](*args)
            self._num_steps += self.steps_made(result)
            return result

        self.train_function = train_function

    # Private to Keras (3.14 to 3.15.1): the part that `add_loss` and regularizers have in the loss.
    def _aggregate_additional_loss(self, loss):
        return replicas.weigh(super()._aggregate_additional_loss(loss))

    # Private to Keras's trainer for TensorFlow (3.14 to 3.15.1), like the next two; see `multi_worker.py`.
    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        def specification():
            return data_batch if iterator is None else multi_worker.batch_specification(iterator)

        if keras_private.strategy_of(self) is not None:
            super()._maybe_symbolic_build(data_batch=specification())
        elif self.built and not self.run_eagerly:
            # Keras leaves the variables of optimizer and metrics to the first trace of a step, and TensorFlow traces
            # every step anew in which variables were made. What fails here is left to that trace, which tells why.
            with contextlib.suppress(Exception):
                if keras_private.has_metrics(self):
                    self._symbolic_build(data_batch=specification())
                elif not self.optimizer.built:  # A compiled loss has no variables.
                    self.optimizer.build(self.trainable_variables)

    def _make_function(self, step_function, **kwargs):
        return multi_worker.with_local_logs(
            super()._make_function(step_function, **kwargs), keras_private.strategy_of(self)
        )

    @property
    def distribute_strategy(self) -> Any:
        return multi_worker.strategy_of_step(super().distribute_strategy)

    # Data, which a KerasHub task takes raw.
    @_as_documented(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
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
        before, self._evaluating = self._evaluating, evaluation
        try:
            if preprocessing.pipeline_class(self.model) is None:
                return getattr(super(), method)(*args, **kwargs)
            return preprocessing.run(method, self.model, self, args, kwargs)
        finally:
            self._evaluating = before

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
        if str(filepath).endswith((".h5", ".hdf5")):
            raise ValueError(
                f"An {type(self).__name__} is saved as a `.keras` file, or its weights by `save_weights` as a "
                "`.weights.h5` file: from the older HDF5 format it could not be loaded. `model.model.save(filepath)` "
                f"saves the trained model alone. Received: filepath={str(filepath)!r}."
            )
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
