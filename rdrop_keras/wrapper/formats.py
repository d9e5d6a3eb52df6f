"""In which kinds of files a wrapper is saved, and whose weights a file holds.

Comes in: paths and callbacks that a user gave. Goes out: an error before anything is trained or written, or which model
is to read a file. Called by: `fit`, `save` and `load_weights` of `WrapperModel`.
"""

import contextlib
import zipfile

import h5py
import keras


def check_format(filepath, wrapper):
    """Raises if `filepath` is of the older HDF5 format. Keras would save a wrapper there, but could not load it."""
    if str(filepath).endswith((".h5", ".hdf5")):
        raise ValueError(
            f"An {wrapper} is saved as a `.keras` file, or its weights by `save_weights` as a `.weights.h5` file: from "
            "the older HDF5 format it could not be loaded. `model.model.save(filepath)` saves the trained model alone. "
            f"Received: filepath={str(filepath)!r}."
        )


def check_callbacks(callbacks, wrapper):
    """Raises if one of `callbacks` would save in the older HDF5 format. At its first save it would be too late."""
    for callback in keras.tree.flatten([getattr(each, "callbacks", each) for each in callbacks]):
        if isinstance(callback, keras.callbacks.ModelCheckpoint) and not callback.save_weights_only:
            check_format(callback.filepath, wrapper)


def is_of_model_alone(filepath):
    """Whether a file of weights belongs to a model alone. A file of its wrapper holds the number of steps too."""
    with contextlib.suppress(OSError, KeyError, zipfile.BadZipFile), contextlib.ExitStack() as opened:
        file = str(filepath)
        if file.endswith(".keras"):
            file = opened.enter_context(opened.enter_context(zipfile.ZipFile(file)).open("model.weights.h5"))
        return "num_steps" not in opened.enter_context(h5py.File(file, "r")).get("vars", ())
    return False  # Keras says what is wrong with it.
