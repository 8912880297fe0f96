"""How robust it is: the volume of the basin around a model."""

from lightning_goldy.analysis.basin.bridge import Bridge, BridgeSettings, bridge_gradients
from lightning_goldy.analysis.basin.kronecker import (
    KroneckerFisher,
    KroneckerPreconditioner,
    kronecker_fisher,
    kronecker_preconditioner,
)
from lightning_goldy.analysis.basin.preconditioners import (
    DiagonalPreconditioner,
    TunedPreconditioner,
    adam_curvature,
    adam_curvature_from_state,
    adam_preconditioner,
    diagonal_preconditioner,
    tuned_preconditioner,
)
from lightning_goldy.analysis.basin.result import VolumeResult, aggregate, best_of, paired_difference
from lightning_goldy.analysis.basin.saddle import BridgeResult
from lightning_goldy.analysis.basin.survey import BasinVolumes, VolumeSurvey, fit_exponents
from lightning_goldy.analysis.basin.volume import Estimator, Method, basin_volume, local_volume
from lightning_goldy.core.space import Selection

__all__ = [
    "BasinVolumes",
    "Bridge",
    "BridgeResult",
    "BridgeSettings",
    "DiagonalPreconditioner",
    "Estimator",
    "KroneckerFisher",
    "KroneckerPreconditioner",
    "Method",
    "Selection",
    "TunedPreconditioner",
    "VolumeResult",
    "VolumeSurvey",
    "adam_curvature",
    "adam_curvature_from_state",
    "adam_preconditioner",
    "aggregate",
    "basin_volume",
    "best_of",
    "bridge_gradients",
    "diagonal_preconditioner",
    "fit_exponents",
    "kronecker_fisher",
    "kronecker_preconditioner",
    "local_volume",
    "paired_difference",
    "tuned_preconditioner",
]
