"""Every Keras name the package uses that Keras does not make public.

Each was read in Keras 3.14.0 and 3.15.1. `tests/test_keras_private.py` lists them and fails if one is gone. Only two
other places use private names of Keras: `wrapper`, mostly to override them, and the compiled loss in `passes_loss.py`.

Comes in: Keras's models, layers and tensors. Goes out: what Keras knows of them and does not show. Called by: the
whole package.
"""

import contextlib
import sys

import keras
from keras.src.backend import AutocastScope, compute_output_spec, get_keras_mask, is_float_dtype, set_keras_mask
from keras.src.backend.common.global_state import get_global_attribute
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.losses.loss import scale_loss_for_distribution, unscale_loss_for_distribution
from keras.src.models.functional import Functional, functional_like_constructor, operation_fn, unpack_singleton

# The compiled loss and metrics. Nothing else knows which target, weight and output belong together.
from keras.src.trainers.compile_utils import CompileLoss, CompileMetrics

# Marks a `build` as one that makes no variables by itself: Keras then builds by a symbolic call.
from keras.src.utils.python_utils import default

# Of these, the names that other modules use.
__all__ = [
    "CompileLoss",
    "CompileMetrics",
    "compute_output_spec",
    "default",
    "get_keras_mask",
    "operation_fn",
    "scale_loss_for_distribution",
    "set_keras_mask",
    "unscale_loss_for_distribution",
]


def all_layers(operation):
    """`operation` and all layers below it; none if it is no layer. Only models have a public `layers`."""
    return list(operation._flatten_layers()) if isinstance(operation, keras.Layer) else []


def is_built(model):
    """Whether all layers of `model` are built. `Model.built` says so too after a `build` that could not build them."""
    return all(layer.built for layer in model._flatten_layers())


def children(layer):
    """The layers that `layer` holds itself."""
    return list(layer._layers)


def own_variables(layer):
    """The variables that `layer` itself owns, without seeds and those of sublayers."""
    return [*layer._trainable_variables, *layer._non_trainable_variables]


def assign(variable, other):
    """Copies the value of `other` into `variable`."""
    # On JAX both would share one array, which training either model frees.
    variable.assign(keras.ops.copy(other.value) if keras.backend.backend() == "jax" else other.value)


def set_trainable(layer, trainable):
    """Sets `layer.trainable` alone. The public property also sets that of sublayers and variables."""
    layer._trainable = trainable


def lora_layers(layer):
    """The layers to which a KerasHub backbone (read in 0.32) has added LoRA; none for any other layer."""
    numbers = getattr(layer, "_lora_enabled_layers", None) or []
    return [_with_weights(layer)[number] for number in numbers]


def set_lora_layers(backbone, layers):
    """Makes a KerasHub backbone save the LoRA weights of `layers`, which it finds by number."""
    numbers = {id(layer): number for number, layer in enumerate(_with_weights(backbone))}
    backbone._lora_enabled_layers = [numbers[id(layer)] for layer in layers]
    backbone._lora_rank = layers[0].lora_rank


def _with_weights(backbone):
    return [layer for layer in backbone._flatten_layers(include_self=False) if layer.weights]


def has_seed(layer):
    """Whether `layer` itself owns a `SeedGenerator`. `Layer.variables` does not tell them from those of sublayers."""
    return bool(layer._seed_generators)


def has_state(layer):
    """Whether `layer` itself owns variables made with `trainable=False`, other than seeds."""
    return bool(layer._non_trainable_variables)


def operations(layer):
    """The operations, including layers, in the graph of a Functional `layer`; none for any other layer."""
    return layer.operations if isinstance(layer, Functional) else []


def functional(model):
    """The Functional model whose graph of nodes is all that `model.call` runs, or None."""
    outer = type(model).__call__
    # KerasHub's `__call__` (read in 0.32) refuses strings and then calls Keras's.
    in_task = outer.__module__ == "keras_hub.src.utils.pipeline_model"
    unchanged = "call" not in vars(model) and (outer is keras.Layer.__call__ or in_task)
    unchanged = unchanged and model.activity_regularizer is None  # `__call__` would apply it.
    if unchanged and isinstance(model, keras.Sequential) and type(model).call is keras.Sequential.call:
        return model._functional
    if unchanged and isinstance(model, Functional) and type(model).call is Functional.call:
        return model
    return None


def is_saving_attributes():
    """Whether the caller's caller is Keras's walk over the attributes of an object that it saves or loads."""
    frame = sys._getframe(2)
    return frame.f_code.co_name == "_walk_saveable" and frame.f_globals["__name__"] == "keras.src.saving.saving_lib"


def is_plain_graph(layer):
    """Whether `layer` is a Sequential or Functional model that is made from its layers and nothing else."""
    if isinstance(layer, keras.Sequential):
        unchanged = type(layer).__init__ is keras.Sequential.__init__
        return unchanged and type(layer).get_config is keras.Sequential.get_config
    if not isinstance(layer, Functional) or type(layer).get_config is not Functional.get_config:
        return False
    return functional_like_constructor(type(layer))


def input_layers(model):
    """The `InputLayer`s of a graph, in the structure of its inputs. A Sequential model has a list, empty if unknown."""
    if isinstance(model, keras.Sequential):
        return [tensor._keras_history.operation for tensor in model.inputs] if model._functional else []
    return keras.tree.map_structure(lambda tensor: tensor._keras_history.operation, model._inputs_struct)


def run_graph(functional, inputs, operation_fn):
    """The outputs of a Functional model on symbolic `inputs`, with `operation_fn(operation)` for each operation."""
    return functional._run_through_graph(inputs, operation_fn)


def copied_operation(operation):
    """A copy, outside of any graph, of `operation`, which is no layer and so has no state."""
    copy = object.__new__(type(operation))
    vars(copy).update(vars(operation), _inbound_nodes=[], _outbound_nodes=[])
    return copy


def nodes(functional):
    """The nodes of a Functional model, one for each call of an operation, in an order in which they can run."""
    by_depth = functional._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]


def reference_order(functional, inputs):
    """`inputs`, a structure that `functional` is called with, in the order of its flat `inputs`."""
    if isinstance(inputs, dict) and not isinstance(functional._inputs_struct, dict):
        return [inputs.get(tensor.name) for tensor in functional.inputs]
    return keras.tree.flatten(inputs)


def standardized(model, functional, inputs):
    """`inputs` as `model` checks and converts them, in the order of the flat inputs of `functional`, its graph."""
    inputs = keras.tree.map_structure(lambda x: converted(x, model=model), inputs)
    model._assert_input_compatibility(inputs)
    return functional._standardize_inputs(inputs)


def converted(tensor, mask=None, *, model, reference=None):
    """`tensor` as `model` receives it: cast by its dtype policy, then to the dtype of its input `reference`."""
    result = tensor
    if model._convert_input_args:
        result = model.dtype_policy.convert_input(result, model.autocast, model.input_dtype)
    if reference is not None:
        result = keras.ops.convert_to_tensor(result, dtype=reference.dtype, sparse=reference.sparse)
    if result is not tensor:
        copy_annotations([tensor], result, lambda attached: attached[0])
    if mask is not None:
        set_keras_mask(result, mask)
    return result


def packed_outputs(functional, tensors):
    """The flat `tensors`, in the structure that `functional` returns."""
    return unpack_singleton(keras.tree.pack_sequence_as(functional._outputs_struct, tensors))


@contextlib.contextmanager
def call_context(layer, training):
    """What `Layer.__call__` sets around `call`: sublayers that are called within it find `training` there."""
    context = layer._get_call_context()
    before = context.get_value("training")
    context.set_value("training", training)
    try:
        yield
    finally:
        context.set_value("training", before)
        layer._maybe_reset_call_context()


def is_called_by_another(layer):
    """Whether `layer`, whose call is running, was called by another layer, or by a program of JAX that trains one."""
    context = get_global_attribute("current_call_ctx")
    # Keras's trainer for JAX calls the `call` of the model that it trains, so that this has no context.
    return context is not None and (context.entry_layer is not layer or in_stateless_scope())


def autocast_scope(model):
    """Within it, variables are cast to the dtype in which `model` computes."""
    dtype = model.compute_dtype
    return AutocastScope(dtype if model.autocast and is_float_dtype(dtype) else None)


def name_scope(layer):
    """The scope that `layer` opens around its call. `keras.distribution` finds the layouts of outputs by it."""
    return layer._open_name_scope()


def takes_training(layer):
    """Whether `layer.call` has a `training` argument. If not, Keras passes none in `fit`."""
    return layer._call_has_training_arg


def call(model, inputs, training):
    """`model(inputs)` with `training`. If the model's `call` does not take it, layers find it in the call context."""
    if takes_training(model):
        return model(inputs, training=training)
    with call_context(model, training):
        return model(inputs)


def call_as_trained(model, inputs, training):
    """The call by which Keras trains `model`.

    Its trainer for JAX (3.15.1) calls `model.call` itself, with no call context: in a model that does not hand
    `training` on to its layers, dropout stays off.
    """
    if keras.backend.backend() != "jax":
        return call(model, inputs, training)
    return model.call(inputs, training=training) if takes_training(model) else model.call(inputs)


def declares_shape(operation):
    """Whether `operation` itself declares what it returns for KerasTensors. Otherwise Keras runs it symbolically."""
    names = ("compute_output_shape", "compute_output_spec")
    return any(getattr(type(operation), name, None) is not getattr(keras.Layer, name) for name in names)


def output_spec(function, variables, *specs):
    """The KerasTensors that `function`, which uses `variables`, returns for `specs`; also in the middle of a step."""
    # In the middle of a step on JAX, the program holds the values of variables.
    values = [(variable, variable.value) for variable in variables] if in_stateless_scope() else []

    def run(*inputs):
        with keras.StatelessScope(values):
            return function(*inputs)

    return compute_output_spec(run, *specs)


def output_spec_of_call(node, tensors, specs):
    """The KerasTensors that the call recorded as `node` returns, with `specs` for the tensors of ids `tensors`.

    The operation runs, whatever shape it declares.
    """
    operation = node.operation

    def run(*inputs):
        args, kwargs = node.arguments.fill_in(dict(zip(tensors, inputs)))
        with call_context(operation, None) if isinstance(operation, keras.Layer) else contextlib.nullcontext():
            return operation(*args, **kwargs)

    return output_spec(run, getattr(operation, "variables", []), *specs)


def is_from_known(module):
    """Whether the module named `module` belongs to Keras or its libraries, whose code is known."""
    return module.partition(".")[0] in ("keras", "keras_cv", "keras_hub", "keras_nlp")


def take_training_argument_as(wrapper, model):
    """Makes Keras's trainers pass `training` to `wrapper` if they would pass it to `model`."""
    wrapper._call_has_training_arg = takes_training(model)


def set_compiled(model, loss, metrics):
    """Replaces the `CompileLoss` of a compiled `model`, and its `CompileMetrics` if it has one. None leaves them."""
    if loss is not None:
        model._compile_loss = loss
    if metrics is not None and has_metrics(model):
        vars(model)["_compile_metrics"] = metrics  # Past the tracker, which would list them a second time.


def strategy_of(model):
    """The `tf.distribute` strategy under which `model` was made, or None. The public property never gives None."""
    return getattr(model, "_distribute_strategy", None)


def strategy_scope(model):
    """The scope of the `tf.distribute` strategy under which `model` was made, or a context that does nothing."""
    strategy = strategy_of(model)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def has_metrics(model):
    """Whether `model` was compiled with metrics."""
    return model._compile_metrics is not None


def loss_weights(model):
    """The `loss_weights` that `model` was compiled with."""
    return model._compile_loss._user_loss_weights


def keras_logits(probabilities):
    """The logits from which `softmax` or `sigmoid` computed `probabilities`, or None.

    Keras keeps them on the tensor, so that cross-entropy need not take the logarithm of a rounded probability. Keras's
    losses read them on TensorFlow. JAX's tracers cannot carry them.
    """
    return getattr(probabilities, "_keras_logits", None)


def copy_annotations(sources, target, function):
    """Attaches to `target` the masks and logits that Keras attached to all of `sources`, joined by `function`."""
    masks = [get_keras_mask(source) for source in sources]
    if all(mask is not None for mask in masks):
        set_keras_mask(target, function(masks))
    logits = [keras_logits(source) for source in sources]
    if all(logit is not None for logit in logits):
        target._keras_logits = function(logits)
    return target
