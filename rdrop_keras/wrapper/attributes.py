"""A wrapper that answers as the model inside, so that scripts can go on using the variable that they wrapped.

What the wrapper does not have itself is read from the model. What is assigned to an attribute of the model reaches the
model. Private names, and names that Keras sets in training, are the wrapper's own.

Comes in: reads and assignments of attributes. Goes out: the same of the wrapped model. Called by: users and Keras.
"""

from typing import Any

import keras

from rdrop_keras import keras_private

# What Keras sets in training on the model that it trains. The wrapper and the model inside each have their own.
_OF_TRAINING = ("history", "optimizer", "unrolled_steps_per_execution")


class ModelAttributes(keras.Model):
    """A model around another, `.model`, whose layers, inputs, outputs and attributes are those of that other.

    Raises:
        AttributeError: If what is `fixed` is assigned.
    """

    model: keras.Model

    # Attributes that a wrapper keeps for life.
    fixed: tuple[str, ...] = ("model",)

    def __getattr__(self, name: str) -> Any:
        of_backend = getattr(super(), "__getattr__", None)  # PyTorch keeps layers and parameters apart.
        if of_backend is not None:
            try:
                return of_backend(name)
            except AttributeError:
                pass
        model = _model_of(self)
        cls = type(self).__name__
        if model is None:
            raise AttributeError(f"`{cls}` has no attribute {name!r} yet.")
        if name.startswith("_") or name in _OF_TRAINING:
            raise AttributeError(f"`{cls}` has no attribute {name!r}. If the model inside has it: `.model.{name}`.")
        try:
            return getattr(model, name)
        except AttributeError as error:
            message = f"Neither `{cls}` nor the model inside, its `.model`, has an attribute {name!r}: {error}"
            raise AttributeError(message) from error

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.fixed and _has_itself(self, name):
            cls = type(self).__name__
            made = f"{cls}(other)" if name == "model" else f"{cls}(model.model, {name}=...)"
            raise AttributeError(
                f"`{name}` of this {cls} is fixed when it is made. Make a new one and compile it: `{made}`. "
                "The model inside keeps its weights."
            )
        if self._is_of_model(name):
            setattr(self.model, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_of_model(name):
            delattr(self.model, name)
        else:
            super().__delattr__(name)

    def _is_of_model(self, name):
        """Whether `name` is an attribute of the model inside and not of the wrapper."""
        model = None if name.startswith("_") else _model_of(self)
        if model is None or name in _OF_TRAINING or name in self.fixed or hasattr(type(self), name):
            return False
        return not _has_itself(self, name) and hasattr(model, name)

    @property
    def layers(self) -> list[keras.Layer]:
        # In files the model is a layer of the wrapper.
        return super().layers if keras_private.is_saving_attributes() else self.model.layers

    @property
    def input(self) -> Any:
        return self.model.input if hasattr(self.model, "input") else super().input

    @property
    def output(self) -> Any:
        return self.model.output if hasattr(self.model, "output") else super().output

    @property
    def output_names(self) -> list[str]:
        return self.model.output_names

    @property
    def weights(self) -> list[Any]:
        # The wrapper's own variables are state for Keras's programs, as random states are. They are no weights. A
        # subclass may have layers beside the model.
        layers = [self.model, *(layer for layer in keras_private.children(self) if layer is not self.model)]
        return list({id(weight): weight for layer in layers for weight in layer.weights}.values())

    def get_layer(self, name: str | None = None, index: int | None = None) -> keras.Layer:
        """Returns a layer of the wrapped model; see `keras.Model.get_layer`."""
        return self.model.get_layer(name, index)

    def get_build_config(self) -> Any:
        """Returns what the wrapped model can be built from; see `keras.Layer.get_build_config`."""
        return self.model.get_build_config()

    def build_from_config(self, config: Any) -> None:
        """Builds the wrapped model; see `keras.Layer.build_from_config`."""
        if not keras_private.is_built(self.model):
            self.model.build_from_config(config)
        self.built = self.model.built

    def compute_output_shape(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the shape of the wrapped model's output; see `keras.Layer.compute_output_shape`."""
        return self.model.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the wrapped model's output for KerasTensors; see `keras.Layer.compute_output_spec`."""
        return self.model.compute_output_spec(*args, **kwargs)

    @keras_private.default
    def build(self, input_shape: Any) -> None:
        """Builds the wrapped model; see `keras.Model.build`."""
        if not keras_private.is_built(self.model):
            self.model.build(input_shape)
        self.built = True

    def summary(
        self, line_length: int | None = None, positions: Any = None, print_fn: Any = None, **kwargs: Any
    ) -> None:
        """Prints the `summary` of the wrapped model. It takes the same arguments."""
        self.model.summary(line_length, positions, print_fn, **kwargs)

    # What `tf.saved_model.save` serves. The name is private to Keras's layers on TensorFlow (3.14 to 3.15.1).
    @property
    def _default_save_signature(self):
        return self.model._default_save_signature


def _own_names(wrapper):
    """Where Python and PyTorch keep the attributes of `wrapper` itself."""
    attributes = vars(wrapper)
    return attributes, *(attributes.get(name, ()) for name in ("_modules", "_parameters", "_buffers"))


def _has_itself(wrapper, name):
    return any(name in names for names in _own_names(wrapper))


def _model_of(wrapper):
    """The model inside `wrapper`; None while it is not set. Reading `.model` would ask `__getattr__` again."""
    return next((names["model"] for names in _own_names(wrapper) if "model" in names), None)
