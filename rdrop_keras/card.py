"""What trained a model, for its model card.

Comes in: an `RDropModel`. Goes out: a dict that JSON can hold. Called by: `RDropModel.training_card`.
"""

from typing import Any

import keras
from keras import tree

from rdrop_keras._version import __version__


def training_card(model: Any, versions: dict[str, str]) -> dict[str, Any]:
    """The arguments of `model`, an `RDropModel`, and the `versions` it was trained with."""
    return {
        "method": "R-Drop",
        "alpha": _plain(model.alpha),
        "divergence": tree.map_structure(_plain, model.divergence),
        "num_passes": model.num_passes,
        "every": model.every,
        "start": model.start,
        "dropout_rates": None if model.dropout_rates is None else list(model.dropout_rates),
        "share": model.share,
        "versions": dict(versions),
    }


def installed_versions() -> dict[str, str]:
    """The versions of this package, of Keras and of its backend."""
    backend = keras.backend.backend()
    module = __import__(backend)
    return {"rdrop_keras": __version__, "keras": keras.__version__, backend: str(module.__version__)}


def _plain(value):
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "get_config"):
        return {"class": type(value).__name__, **value.get_config()}
    return getattr(value, "__qualname__", type(value).__name__)  # A function of the step.
