"""Rows of the analysis ``basin_volume``, made up."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_goldy.analysis.basin import Estimator, Selection, VolumeResult, VolumeSurvey
from lightning_goldy.analysis.basin.survey import Measured, Survey
from lightning_goldy.callbacks.basin_volume import volume_findings


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


def survey_of(cutoffs: tuple[float, ...] = (1e-2,), n_directions: int = 3) -> VolumeSurvey:
    return VolumeSurvey(
        n_directions=n_directions,
        cutoffs=cutoffs,
        preconditioner="none",
        sigma="first",
        n_samples=None,
        selection=Selection(),
        estimator=Estimator(),
    )


def basin_row(volumes: dict[str, list[VolumeResult]], *, step: int = 10) -> dict[str, Any]:
    """The row of an analysis that found these volumes by split."""
    cutoffs = tuple(each.cutoff for each in next(iter(volumes.values())))
    measured = tuple(
        Measured(split, split if len(results) == 1 else f"{split}-{result.cutoff!r}", 2, result)
        for split, results in volumes.items()
        for result in results
    )
    found = Survey(measured, measured[0].result.sigma, None, 12)
    row = volume_findings(survey_of(cutoffs), found)
    row = row.at(step=step, trigger="step", seconds=2.0, peak_memory_bytes=2**20)
    return row.to_dict()
