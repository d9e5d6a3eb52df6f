"""Makes a model anew from its configuration, which may be changed on the way.

The layers of a graph are made one by one, so that classes and functions need not be registered. `copied_state.py`
copies the state of the original.

Comes in: a model, and a function that changes configurations. Goes out: a new model with new weights. Called by:
`with_dropout`.
"""

import types

import keras

from rdrop_keras import keras_private


class Copier:
    """Makes new layers, models and operations, one for each old one.

    Args:
        new_config: A function from a layer, or from a model that is more than a graph of layers, to the configuration
            of its copy.
    """

    def __init__(self, new_config):
        self._new_config = new_config
        self._copies = {}

    def copy(self, operation):
        """The copy of `operation`, a model, layer or `keras.Operation`."""
        if id(operation) not in self._copies:
            if not isinstance(operation, keras.Layer):
                copy = keras_private.copied_operation(operation)
            elif keras_private.is_plain_graph(operation):
                copy = self._of_graph(operation)
                # Quantization belongs to the layers, not to the model.
                if operation.dtype_policy.quantization_mode is None:
                    copy.dtype_policy = operation.dtype_policy
            else:
                copy = self._of_configuration(operation)
            # The original is kept so that no other object gets its id.
            self._copies[id(operation)] = (operation, copy)
        return self._copies[id(operation)][1]

    def _of_graph(self, model):
        if isinstance(model, keras.Sequential):
            inputs = [self.copy(layer) for layer in keras_private.input_layers(model)]
            return type(model)([*inputs, *map(self.copy, model.layers)], name=model.name)
        inputs = keras.tree.map_structure(lambda layer: self.copy(layer).output, keras_private.input_layers(model))
        return type(model)(inputs, keras_private.run_graph(model, inputs, self.copy), name=model.name)

    def _of_configuration(self, layer):
        cls = type(layer)
        try:
            config = self._new_config(layer)
            if "preprocessor" in config:  # Its configuration lacks a vocabulary that was read from a file.
                config["preprocessor"] = layer.preprocessor
            config.update(_own_functions(layer, config))
            with keras.saving.custom_object_scope(_own_objects(layer)):
                if isinstance(layer, keras.layers.Lambda):  # Its `from_config` takes no functions.
                    return cls(**{**config, "arguments": layer.arguments})
                return cls.from_config(config)
        except Exception as error:
            of_model = ", or make it with the rate that you want in its constructor"
            remedy = of_model if isinstance(layer, keras.Model) else ""
            raise ValueError(
                f"`{cls.__name__}` is made anew by `from_config(get_config())`, which fails with "
                f"{type(error).__name__}. Write these two methods{remedy}. Received: {layer.name!r}."
            ) from error


def _own_functions(layer, config):
    """The entries of `config` that are the user's own functions, such as a lambda. They cannot be found by a name."""
    own = {}
    for name in config:
        value = vars(layer).get(name, vars(layer).get(f"_{name}"))
        if isinstance(value, types.FunctionType) and not keras_private.is_from_known(value.__module__):
            own[name] = value
    return own


def _own_objects(layer):
    """The user's own objects in `layer` that are looked up by name: classes of layers, functions, initializers."""
    own = {}
    for inner in keras_private.all_layers(layer):
        for value in (inner, *vars(inner).values()):
            if isinstance(value, types.FunctionType) or hasattr(value, "get_config"):
                named = value if isinstance(value, (type, types.FunctionType)) else type(value)
                if not keras_private.is_from_known(named.__module__):
                    own[named.__name__] = named
    return own
