"""A model made anew from its configuration, with dropout at another rate and weights of its own.

The layers of a graph are made one by one, so that classes and functions need not be registered. The state of the
original is put into the new model by `copied_state.py`.
"""

import types

import keras

from rdrop_keras import _keras, rates, stochastic


class Copier:
    """Makes layers, models and operations anew, each once.

    Args:
        kind: Which rates to set, as `rates.kind` returns it.
        rate: The rate to set them to.
    """

    def __init__(self, kind, rate):
        self._kind = kind
        self._rate = rate
        self._copies = {}

    def copy(self, operation):
        """The copy of `operation`, a model, layer or `keras.Operation`."""
        if id(operation) not in self._copies:
            if not isinstance(operation, keras.Layer):
                copy = _keras.copied_operation(operation)
            elif _keras.is_plain_graph(operation):
                copy = self._of_graph(operation)
                if operation.dtype_policy.quantization_mode is None:  # Of the layers, not of the model.
                    copy.dtype_policy = operation.dtype_policy
            else:
                copy = self._of_configuration(operation)
            # The original is kept, so that no other object takes its id.
            self._copies[id(operation)] = (operation, copy)
        return self._copies[id(operation)][1]

    def _of_graph(self, model):
        if isinstance(model, keras.Sequential):
            inputs = [self.copy(layer) for layer in _keras.input_layers(model)]
            return type(model)([*inputs, *map(self.copy, model.layers)], name=model.name)
        inputs = keras.tree.map_structure(lambda layer: self.copy(layer).output, _keras.input_layers(model))
        return type(model)(inputs, _keras.run_graph(model, inputs, self.copy), name=model.name)

    def _of_configuration(self, layer):
        is_model = isinstance(layer, keras.Model)

        def new_rate(kind, rate):
            # Someone gave each layer of a graph its rate, whereas a model's configuration is often as it was published.
            return self._rate if kind == self._kind and (is_model or rate == 0) else rate

        cls = type(layer)
        try:
            config = rates.with_rates(rates.configuration(layer), new_rate, cls.__name__)
            if "preprocessor" in config:  # Its configuration has no vocabulary if that was read from a file.
                config["preprocessor"] = layer.preprocessor
            config.update(_own_functions(layer, config))
            with keras.saving.custom_object_scope(_own_objects(layer)):
                if isinstance(layer, keras.layers.Lambda):  # Its `from_config` takes no functions.
                    return cls(**{**config, "arguments": layer.arguments})
                return cls.from_config(config)
        except Exception as error:
            remedy = ", or make it with the rate that you want in its constructor" if is_model else ""
            raise ValueError(
                f"`with_dropout` makes `{cls.__name__}` anew by `from_config(get_config())`, which fails with "
                f"{type(error).__name__}. Write these two methods{remedy}. Received: {layer.name!r}."
            ) from error


def _own_functions(layer, config):
    """The entries of `config` that are functions of others on `layer`, such as a lambda: a name does not bring them."""
    own = {}
    for name in config:
        value = vars(layer).get(name, vars(layer).get(f"_{name}"))
        if isinstance(value, types.FunctionType) and not stochastic.is_from_known(value.__module__):
            own[name] = value
    return own


def _own_objects(layer):
    """What is not Keras's in `layer` and is looked up by name: classes of layers, functions, initializers and such."""
    own = {}
    for inner in _keras.all_layers(layer):
        for value in (inner, *vars(inner).values()):
            if isinstance(value, types.FunctionType) or hasattr(value, "get_config"):
                named = value if isinstance(value, (type, types.FunctionType)) else type(value)
                if not stochastic.is_from_known(named.__module__):
                    own[named.__name__] = named
    return own
