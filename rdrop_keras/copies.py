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
            else:
                copy = self._of_configuration(operation)
            # The original is kept, so that no other object takes its id.
            self._copies[id(operation)] = (operation, copy)
        return self._copies[id(operation)][1]

    def _of_graph(self, model):
        if isinstance(model, keras.Sequential):
            inputs = [self.copy(tensor_layer) for tensor_layer in _keras.input_layers(model)]
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
            config = rates.with_rates(layer.get_config(), new_rate, cls.__name__)
            if "preprocessor" in config:  # Its configuration has no vocabulary if that was read from a file.
                config["preprocessor"] = layer.preprocessor
            functions = _own_functions(layer, config)
            with keras.saving.custom_object_scope(_own_objects(layer)):
                if isinstance(layer, keras.layers.Lambda):
                    return cls(**{**config, **functions, "arguments": layer.arguments})
                copy = cls.from_config({**config, **functions})
        except Exception as error:
            remedy = (
                "Write its `get_config`, or make it with the rate that you want in its constructor."
                if is_model
                else "Write its `get_config`."
            )
            raise ValueError(
                f"`with_dropout` makes `{cls.__name__}` anew from its configuration, which fails with "
                f"{type(error).__name__}. {remedy} Received: {layer.name!r}."
            ) from error
        return copy


def _own_functions(layer, config):
    """The entries of `config` that are functions of others on `layer`, such as a lambda: a name does not bring them."""
    own = {}
    for name in config:
        value = vars(layer).get(name, vars(layer).get(f"_{name}"))
        if isinstance(value, types.FunctionType) and not stochastic.is_from_known(value.__module__):
            own[name] = value
    return own


def _own_objects(layer):
    """The classes and functions that are not Keras's in `layer`, by the names under which Keras looks them up."""
    own = {}
    for inner in _keras.all_layers(layer):
        for value in (inner, *vars(inner).values()):
            named = value if isinstance(value, (type, types.FunctionType)) else type(value)
            if not stochastic.is_from_known(named.__module__ or ""):
                own[named.__name__] = named
    return own
