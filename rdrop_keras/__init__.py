"""R-Drop (Liang et al., NeurIPS 2021) for every Keras 3 model."""

from rdrop_keras._version import __version__
from rdrop_keras.divergences import Divergence
from rdrop_keras.model import RDropModel
from rdrop_keras.sharing import sharing

__all__ = ["Divergence", "RDropModel", "__version__", "sharing"]
