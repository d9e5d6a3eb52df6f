"""A Keras model that trains another model in its own way, and is that other model in everything else.

Comes in: a `keras.Model`, and the calls of users and of Keras's trainers. Goes out: training steps for a subclass to
fill. Called by: users and Keras, through `model.RDropModel`.
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import keras
from keras import ops, tree

from rdrop_keras import keras_private
from rdrop_keras.wrapper import preprocessing, replicas, step
from rdrop_keras.wrapper.files import SavedWrapper, check_callbacks

# Methods of the model that the wrapper replaces by its own, and so never calls.
_REPLACED = ("train_step", "test_step", "predict_step", "compute_loss", "compute_metrics", *preprocessing.METHODS)

# What needs no compiled loss.
_WITHOUT_LOSS = ("predict", "predict_on_batch")

MethodT = TypeVar("MethodT", bound=Callable[..., Any])


def _as_documented(method: Any) -> Callable[[MethodT], MethodT]:
    """`functools.wraps`, after which type checkers still see a method."""
    decorator: Any = functools.wraps(method)
    return decorator


class WrapperModel(SavedWrapper):
    """Trains `model`, which is found again as `.model`. In everything but training it is that model.

    A subclass may override these, which concern training alone:

    - `passes_of_step(number)` and `passes_of_steps`: how often the rows of the batch stand in the outputs of a step;
    - `call_in_training(inputs, training)`: the outputs that the loss and the metrics get;
    - `make_loss(loss, loss_weights)` and `make_metrics(metrics, weighted_metrics)`: what takes the place of Keras's
      compiled loss and metrics;
    - `training_metrics`: metrics that `evaluate` does not report;
    - `check_step(made, error)` and `after_fit(history)`: called at the end of a step and of `fit`;
    - `save_own_variables` and `load_own_variables`, `get_config` and `from_config`, `fixed`: extend these where the
      subclass has state or arguments of its own.

    A step is one of the wrapper's, whatever `train_step` a subclass has. A KerasHub task takes raw inputs as it does by
    itself. A file is replaced only by a whole new one, and holds the states of random generators. Replicas of
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

    def __init__(self, model: keras.Model, name: str | None = None, as_is: bool = False) -> None:
        _check_model(model, type(self).__name__)
        # The model's own policy, for loss scaling. The model itself casts the inputs.
        super().__init__(name=name, dtype=model.dtype_policy, autocast=False, as_is=as_is)
        _check_strategy(model, self)
        self.model = model
        self.built = model.built
        self._evaluating = False
        self._quantized: dict[str, str] = {}
        keras_private.take_training_argument_as(self, model)

    # What subclasses override.
    def call_in_training(self, inputs: Any, training: bool | None) -> Any:
        """The outputs of a training step."""
        return keras_private.call(self.model, inputs, training)

    def make_loss(self, loss: Any, loss_weights: Any) -> Any:
        """A compiled loss in place of the one that Keras makes of these; None for Keras's."""
        return None

    def make_metrics(self, metrics: Any, weighted_metrics: Any) -> Any:
        """Compiled metrics in place of those that Keras makes of these; None for Keras's."""
        return None

    def after_fit(self, history: keras.callbacks.History) -> None:
        """Is called at the end of each `fit`."""

    # The model's call, and the metrics.
    def call(self, inputs: Any, training: bool | None = None) -> Any:
        current = step.current()
        if current is None:
            if training and self._has_begun_step:  # Replicas run in threads of their own.
                raise RuntimeError(
                    "Under `tf.distribute`, `with model.training_step():` belongs into the function that "
                    "`strategy.run` calls on each replica. Received: a step that was begun outside of it."
                )
            if training and keras_private.is_called_by_another(self):
                wrapper = type(self).__name__
                warnings.warn(
                    f"A {wrapper} must be the outermost model in training: as a layer of another it trains plainly. "
                    f"Build that other model from `{self.name}.model`, and wrap it: `{wrapper}(other, ...)`. Received: "
                    f"{self.name!r}, called by another model that is being trained.",
                    stacklevel=2,
                )
            return keras_private.call(self.model, inputs, training)
        if self._as_is:
            return keras_private.call_as_trained(self.model, inputs, training)
        if training is not None and not training:  # Inference, in the middle of a step of one's own.
            return keras_private.call(self.model, inputs, training)
        if training is None and keras_private.takes_training(self):
            raise ValueError(
                "A training step must call the model in training mode, `self(x, training=True)`: otherwise dropout is "
                "off. Received: training=None."
            )
        if not current.called:
            current.called = True
            tensor = next(leaf for leaf in tree.flatten(inputs) if leaf is not None)
            current.num_rows = ops.shape(tensor)[0]
            current.row_scale = replicas.row_scale(tensor)
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
        run_eagerly: bool = False,
        steps_per_execution: int = 1,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Configures training. It takes the arguments of `keras.Model.compile`."""
        self.check_steps_per_execution(steps_per_execution)
        made = None if self._as_is else self.make_loss(loss, loss_weights)
        super().compile(
            optimizer, loss, loss_weights, metrics, weighted_metrics, run_eagerly, steps_per_execution, *args, **kwargs
        )
        if not self._as_is:
            keras_private.set_compiled(self, made, self.make_metrics(metrics, weighted_metrics))

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles with what `get_compile_config` returned, and makes the optimizer's variables.

        Keras may not find a class that this needs. A model with a `compile` of its own, as KerasHub's tasks have, is
        then loaded all the same, but not compiled, and a warning says so.
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

    # Data, which a KerasHub task takes raw.
    @_as_documented(keras.Model.fit)
    def fit(self, *args: Any, **kwargs: Any) -> keras.callbacks.History:
        check_callbacks([*args[5:6], kwargs.get("callbacks")], type(self).__name__)
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
        """Calls `keras.Model`'s method. In an `evaluation` the logs are those of the wrapped model."""
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
        """Drops the wrapper's TensorFlow programs if the model inside was quantized, which drops only its own."""
        layers = keras_private.all_layers(self.model)
        quantized = {layer.path: layer.quantization_mode for layer in layers if layer.quantization_mode is not None}
        if quantized != self._quantized:
            self._quantized = quantized
            self.train_function = self.test_function = self.predict_function = None


def unwrapped(model):
    """The model inside a wrapper, or the `keras.Model` itself."""
    if not isinstance(model, keras.Model):
        raise TypeError(f"`model` must be a keras.Model. Received: model={model!r} ({type(model).__name__}).")
    return model.model if isinstance(model, WrapperModel) else model


def check_unwrapped(model):
    """Raises if `model` is no `keras.Model`, or if it is or holds a wrapper."""
    unwrapped(model)
    inner = next((layer for layer in keras_private.all_layers(model) if isinstance(layer, WrapperModel)), None)
    if inner is not None:
        raise ValueError(
            f"`model` is or holds an {type(inner).__name__}: use the model inside that, its `.model`. "
            f"Received: {inner.name!r}."
        )


def check_built(model):
    """Raises if `model` is not built."""
    if not model.built:
        raise ValueError(
            "`model` must be built: give it an Input, call it on a batch, or `model.build(input_shape)`. "
            f"Received: model={model.name!r}, which is not."
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
