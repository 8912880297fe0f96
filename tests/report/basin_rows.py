"""Rows of the analysis ``basin_volume``, made up."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_goldy.analysis.basin import BasinVolumes, VolumeResult
from lightning_goldy.analysis.result import Cost


def volume(
    estimates: list[float], *, cutoff: float = 1e-2, sigma: float = 0.1, preconditioner: str = "none"
) -> VolumeResult:
    """A result with these estimates; NaN is an unbounded direction."""
    values = torch.tensor(estimates, dtype=torch.float64)
    each = torch.where(values.isnan(), math.nan, 1.0)
    return VolumeResult(
        estimates=values,
        radii=each,
        props=torch.ones_like(each),
        deltas=each * cutoff,
        slopes=2 * each,
        log_integral=values,
        sensitivities=8 * each,
        evaluations=torch.full_like(each, 2).long(),
        extra_evaluations=1,
        measure="gaussian",
        preconditioner=preconditioner,
        dimension=8,
        sigma=sigma,
        cutoff=cutoff,
        anchor_cost=0.0,
        rtol=1e-2,
        max_radius=100.0,
        seed=0,
        first_direction=0,
        seconds=0.5,
    )


def basin_row(volumes: dict[str, list[VolumeResult]], *, step: int = 10) -> dict[str, Any]:
    """The row of an analysis that found these volumes by split."""
    kept = {split: tuple(results) for split, results in volumes.items()}
    found = BasinVolumes(kept, dict.fromkeys(kept, 2), "none", cost=Cost(forwards=12))
    return found.row().at(step=step, trigger="step", seconds=2.0, peak_memory_bytes=2**20).to_dict()
