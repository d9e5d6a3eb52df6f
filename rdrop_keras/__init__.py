"""R-Drop (Liang et al., NeurIPS 2021) for every Keras 3 model."""

from rdrop_keras import plot
from rdrop_keras._version import __version__
from rdrop_keras.alpha import KLBudget
from rdrop_keras.divergences import Divergence
from rdrop_keras.dropout.with_dropout import with_dropout
from rdrop_keras.model import RDropModel
from rdrop_keras.monitor import InconsistencyMonitor, inconsistency
from rdrop_keras.passes.report import sharing, stochastic_layers

__all__ = [
    "Divergence",
    "InconsistencyMonitor",
    "KLBudget",
    "RDropModel",
    "__version__",
    "inconsistency",
    "plot",
    "sharing",
    "stochastic_layers",
    "with_dropout",
]
