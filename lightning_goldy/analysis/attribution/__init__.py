"""Change attribution and grafting: which parameters carry what a finetune did, and what a part of them recovers."""

from lightning_goldy.analysis.attribution.attribution import ChangeAttributionResult, change_attribution
from lightning_goldy.analysis.attribution.graft import (
    GraftCurve,
    GraftPoint,
    baseline_mask,
    graft_curve,
)
from lightning_goldy.analysis.attribution.learned import LearnedMask, LearnOptions, learn_mask
from lightning_goldy.analysis.attribution.path import apply_change, graft, interleaved, save_change
from lightning_goldy.analysis.attribution.units import UnitGroup, mask_links, model_units, unit_mask

__all__ = [
    "ChangeAttributionResult",
    "GraftCurve",
    "GraftPoint",
    "LearnOptions",
    "LearnedMask",
    "UnitGroup",
    "apply_change",
    "baseline_mask",
    "change_attribution",
    "graft",
    "graft_curve",
    "interleaved",
    "learn_mask",
    "mask_links",
    "model_units",
    "save_change",
    "unit_mask",
]
