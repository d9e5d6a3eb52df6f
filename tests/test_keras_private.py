"""The private names of Keras that the package reads or overrides are there in the installed Keras."""

import inspect

import keras
import pytest
from keras.src.models.functional import Functional
from keras.src.trainers.compile_utils import CompileLoss

# What the package reads or overrides, by the class that has it.
PRIVATE_NAMES = {
    keras.Layer: (
        "_call_has_training_arg",
        "_convert_input_args",
        "_flatten_layers",
        "_get_call_context",
        "_layers",
        "_maybe_reset_call_context",
        "_non_trainable_variables",
        "_open_name_scope",
        "_seed_generators",
        "_trainable",
        "_trainable_variables",
    ),
    keras.Model: ("_aggregate_additional_loss", "_assert_input_compatibility", "_compile_loss", "_compile_metrics"),
    keras.Sequential: ("_functional",),
    Functional: (
        "_inputs_struct",
        "_nodes_by_depth",
        "_outputs_struct",
        "_run_through_graph",
        "_standardize_inputs",
    ),
    keras.Operation: ("_inbound_nodes", "_outbound_nodes"),
    CompileLoss: ("_flat_losses", "_user_loss_weights"),
}
if keras.backend.backend() == "tensorflow":
    from keras.src.backend.tensorflow.trainer import TFEpochIterator

    PRIVATE_NAMES[keras.Model] += (
        "_distribute_strategy",
        "_make_function",
        "_maybe_symbolic_build",
        "_symbolic_build",
    )
    PRIVATE_NAMES[TFEpochIterator] = ("_distributed_dataset",)


def has(owner, name):
    """Whether a class has an attribute, or one of its methods, inherited or not, touches one of that name."""
    if hasattr(owner, name):
        return True
    functions = [value for cls in owner.__mro__ for value in vars(cls).values()]
    functions = [value.fget if isinstance(value, property) else value for value in functions]
    codes = [inspect.unwrap(value).__code__ for value in functions if inspect.isfunction(value)]
    return any(name in code.co_names for code in codes)


@pytest.mark.parametrize("owner", PRIVATE_NAMES, ids=lambda owner: owner.__name__)
def test_private_names_are_there(owner):
    assert not [name for name in PRIVATE_NAMES[owner] if not has(owner, name)]


def test_a_name_that_is_gone_is_seen():
    assert not has(keras.Layer, "_gone")
