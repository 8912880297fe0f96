"""What else it touched: cosines between the gradients of answers."""

from lightning_goldy.analysis.coupling.activation import activation_similarity
from lightning_goldy.analysis.coupling.coupling import knowledge_coupling, layer_gradient_norms
from lightning_goldy.analysis.coupling.passes import CouplingError, OnError, RunOptions
from lightning_goldy.analysis.coupling.pieces import Layers, Select, check_selection
from lightning_goldy.analysis.coupling.statistics import (
    OTHERS,
    CouplingDrift,
    CouplingPicture,
    CouplingResult,
    CouplingStatistics,
    check_thresholds,
    coupling_drift,
    coupling_picture,
    coupling_statistics,
)

__all__ = [
    "OTHERS",
    "CouplingDrift",
    "CouplingError",
    "CouplingPicture",
    "CouplingResult",
    "CouplingStatistics",
    "Layers",
    "OnError",
    "RunOptions",
    "Select",
    "activation_similarity",
    "check_selection",
    "check_thresholds",
    "coupling_drift",
    "coupling_picture",
    "coupling_statistics",
    "knowledge_coupling",
    "layer_gradient_norms",
]
