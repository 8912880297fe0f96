"""What else it touched: cosines between the gradients of answers."""

from lightning_goldy.analysis.coupling.activation import activation_similarity
from lightning_goldy.analysis.coupling.capture import CouplingError
from lightning_goldy.analysis.coupling.coupling import knowledge_coupling
from lightning_goldy.analysis.coupling.drift import CouplingDrift, coupling_drift
from lightning_goldy.analysis.coupling.result import CouplingResult
from lightning_goldy.analysis.coupling.statistics import CouplingStatistics, coupling_statistics

__all__ = [
    "CouplingDrift",
    "CouplingError",
    "CouplingResult",
    "CouplingStatistics",
    "activation_similarity",
    "coupling_drift",
    "coupling_statistics",
    "knowledge_coupling",
]
