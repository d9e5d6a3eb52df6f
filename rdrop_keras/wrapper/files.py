"""How a wrapper is saved: in whole files, with the states of random generators, in formats that can be loaded.

Comes in: paths, stores and configurations. Goes out: what Keras saves and loads, or an error before anything is trained
or written. Called by: users, Keras's saving, and `WrapperModel.fit`.
"""

import contextlib
import os
import zipfile
from typing import Any, Self

import h5py
import keras
import numpy as np

from rdrop_keras.wrapper import checkpoints, random_state
from rdrop_keras.wrapper.steps import TrainingSteps


class SavedWrapper(TrainingSteps):
    """A wrapper that is saved with the model inside, and exported as that model alone."""

    def export(self, filepath: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Exports the wrapped model alone. It takes the arguments of `keras.Model.export`."""
        return self.model.export(filepath, *args, **kwargs)

    def save(
        self, filepath: str | os.PathLike[str], overwrite: bool = True, zipped: bool | None = None, **kwargs: Any
    ) -> None:
        """Saves as `keras.Model.save` does, with the same arguments. A whole new file replaces an existing one.

        Raises:
            ValueError: If `filepath` is one of the older HDF5 format.
        """
        _check_format(filepath, type(self).__name__)
        if zipped is False:
            super().save(filepath, overwrite=overwrite, zipped=zipped, **kwargs)
            return
        with checkpoints.replacing(filepath, ".keras", overwrite, self._saved_variables()) as path:
            super().save(path, overwrite=overwrite, zipped=zipped, **kwargs)

    def save_weights(
        self, filepath: str | os.PathLike[str], overwrite: bool = True, max_shard_size: float | None = None
    ) -> None:
        """Saves as `keras.Model.save_weights` does, with the same arguments, and replaces files as `save` does."""
        with checkpoints.replacing(filepath, ".weights.h5", overwrite, self._saved_variables()) as path:
            super().save_weights(path, overwrite=overwrite, max_shard_size=max_shard_size)

    def load_weights(self, filepath: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Loads as `keras.Model.load_weights` does, with the same arguments; also a file of the wrapped model alone."""
        if _is_of_model_alone(filepath):
            self.model.load_weights(filepath, *args, **kwargs)
        else:
            super().load_weights(filepath, *args, **kwargs)

    def save_own_variables(self, store: Any) -> None:
        random_state.save(store, self.model, self._torch_seed)
        store["num_steps"] = np.array(self._num_steps)

    def load_own_variables(self, store: Any) -> None:
        random_state.load(store, self.model, self._torch_seed)
        if "num_steps" in set(store.keys()):
            self._num_steps = int(np.array(store["num_steps"]))

    def get_config(self) -> dict[str, Any]:
        # The wrapper does not need the inner model's compile configuration.
        return {"name": self.name, "model": _uncompiled(keras.saving.serialize_keras_object(self.model))}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> Self:
        model = keras.saving.deserialize_keras_object(config["model"], custom_objects=custom_objects)
        return cls(**{**config, "model": model})

    def _saved_variables(self):
        optimizer = getattr(self, "optimizer", None)
        return self.variables + (optimizer.variables if optimizer is not None else [])


def check_callbacks(callbacks, wrapper):
    """Raises if one of `callbacks` would save in the older HDF5 format. At its first save it would be too late."""
    for callback in keras.tree.flatten([getattr(each, "callbacks", each) for each in callbacks]):
        if isinstance(callback, keras.callbacks.ModelCheckpoint) and not callback.save_weights_only:
            _check_format(callback.filepath, wrapper)


def _check_format(filepath, wrapper):
    """Raises if `filepath` is of the older HDF5 format. Keras would save a wrapper there, but could not load it."""
    if str(filepath).endswith((".h5", ".hdf5")):
        raise ValueError(
            f"An {wrapper} is saved as a `.keras` file, or its weights by `save_weights` as a `.weights.h5` file: from "
            "the older HDF5 format it could not be loaded. `model.model.save(filepath)` saves the trained model alone. "
            f"Received: filepath={str(filepath)!r}."
        )


def _is_of_model_alone(filepath):
    """Whether a file of weights belongs to a model alone. A file of its wrapper holds the number of steps too."""
    with contextlib.suppress(OSError, KeyError, zipfile.BadZipFile), contextlib.ExitStack() as opened:
        file = str(filepath)
        if file.endswith(".keras"):
            file = opened.enter_context(opened.enter_context(zipfile.ZipFile(file)).open("model.weights.h5"))
        return "num_steps" not in opened.enter_context(h5py.File(file, "r")).get("vars", ())
    return False  # Keras says what is wrong with it.


def _uncompiled(config):
    """The configuration of a model without what it was compiled with."""
    if isinstance(config, dict):
        return {key: _uncompiled(value) for key, value in config.items() if key != "compile_config"}
    return list(map(_uncompiled, config)) if isinstance(config, list) else config
