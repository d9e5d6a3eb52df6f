"""The state of a model's random generators, so that training resumed from a file draws the masks it would have drawn.

Keras saves weights and the optimizer, not this.
"""

import warnings

import keras


def save(model, store):
    """Writes the states to `store`, a mapping from names to arrays."""
    for i, seed in enumerate(_seeds(model)):
        store[f"seed_{i}"] = seed
    if keras.backend.backend() == "torch":
        for name, (get, _) in _torch_generators().items():
            store[name] = get().numpy()


def load(model, store):
    """Puts back what `save` wrote; leaves everything as it is, with a warning, if the model has other generators."""
    saved = sorted(key for key in store.keys() if key.startswith("seed_"))  # noqa: SIM118, an HDF5 group
    seeds = _seeds(model)
    if saved and len(saved) != len(seeds):
        warnings.warn(
            f"The file holds the states of {len(saved)} random generators, and the model has {len(seeds)}: they were "
            "not restored, so that dropout masks will not continue those of the saved run. Weights are not affected.",
            stacklevel=2,
        )
        return
    for i, seed in enumerate(seeds if saved else ()):
        seed.assign(store[f"seed_{i}"])
    if keras.backend.backend() == "torch":
        import torch

        for name, (_, put) in _torch_generators().items():
            if name in store.keys():  # noqa: SIM118
                put(torch.tensor(store[name][:], dtype=torch.uint8))


def _seeds(model):
    """The state variables of the model's `SeedGenerator`s: what `variables` has over `weights`."""
    weights = {id(variable) for variable in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]


def _torch_generators():
    """Getters and setters of PyTorch's global generators, from which Keras's dropout without a seed draws there."""
    import torch

    generators = {"torch_cpu": (torch.get_rng_state, torch.set_rng_state)}
    if torch.cuda.is_available():
        generators["torch_cuda"] = (torch.cuda.get_rng_state, torch.cuda.set_rng_state)
    return generators
