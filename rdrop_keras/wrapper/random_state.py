"""The state of a model's random generators. With it, training resumed from a file draws the masks that come next.

Keras saves weights and the optimizer, but not this state. On PyTorch, unseeded dropout draws from the generator of the
process, which no model can save. There the wrapper seeds each step from a variable of its own.

Comes in: a model, and a store or a seed. Goes out: states that are saved, loaded or put back, and a context in which a
step draws. Called by: `WrapperModel`, `replicas` and `monitor`.
"""

import contextlib
import warnings

import keras
import numpy as np


def torch_seed():
    """A `SeedGenerator` for `drawing_from`, started from PyTorch's generator; None on other backends.

    On other backends layers have generators of their own.
    """
    if keras.backend.backend() != "torch":
        return None
    import torch

    return keras.random.SeedGenerator(int(torch.randint(1, 2**31, ())))


@contextlib.contextmanager
def drawing_from(seed):
    """Within it, PyTorch draws from `seed` and its generators stay as they were. A `seed` of None changes nothing."""
    if seed is None:
        yield
        return
    import torch

    with _torch_fork():
        # `torch.manual_seed` records the whole call stack, which would slow a small step.
        manual_seed = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
        manual_seed(int(seed.state.value.sum()))
        seed.state.value[1] += 1  # As `seed.next()` does, with fewer operations.
        yield


@contextlib.contextmanager
def restored(model):
    """Puts back what training steps change outside the optimizer: variables of `model`, and PyTorch's generators."""
    variables = model.non_trainable_variables
    values = [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]
    try:
        with _torch_fork():
            yield
    finally:
        for variable, value in zip(variables, values):
            variable.assign(value)


def _torch_fork():
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else [])


def save(store, model, seed):
    """Writes to `store`, a mapping from names to arrays, the states of the generators of `model`, and of `seed`."""
    for i, state in enumerate(states(model)):
        store[f"seed_{i}"] = state
    if seed is not None:
        store["torch_seed"] = seed.state


def load(store, model, seed):
    """Puts back what `save` wrote. If the model has other generators, it warns and leaves all as it is."""
    names = list(store.keys())
    saved = [name for name in names if name.startswith("seed_")]
    generators = states(model)
    if saved and len(saved) != len(generators):
        warnings.warn(
            f"The file holds the states of {len(saved)} random generators, and the model has {len(generators)}: they "
            "were not restored, and dropout masks will not continue those of the saved run. Weights are not affected.",
            stacklevel=2,
        )
        return
    for i, state in enumerate(generators if saved else ()):
        state.assign(store[f"seed_{i}"])
    if seed is not None and "torch_seed" in names:
        seed.state.assign(store["torch_seed"])


def states(model):
    """The variables of the model's `SeedGenerator`s: those in `variables` that are not in `weights`."""
    weights = {id(variable) for variable in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]
