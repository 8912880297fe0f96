"""Coupling, its drift and the finetune's ripple as metrics, and as a row that can be redrawn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_goldy.analysis.coupling import CouplingResult
from lightning_goldy.analysis.coupling_drift import CouplingDrift
from lightning_goldy.analysis.coupling_picture import coupling_picture
from lightning_goldy.analysis.coupling_statistics import CouplingStatistics
from lightning_goldy.analysis.finetune_ripple import FinetuneRipple
from lightning_goldy.analysis.result import AnalysisResult, Cost, Row
from lightning_goldy.callbacks.knowledge_pieces import WatchedPieces
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import Kind
from lightning_goldy.core.vector import ParameterVector

# Blocks and pieces in the heat maps, points in the scatter plot, facts in the table.
_BLOCKS, _PIECES, _POINTS, _MOVED = 64, 40, 2000, 20


@dataclass(frozen=True)
class KnowledgeState(AnalysisResult):
    """What one analysis found.

    Args:
        coupling: At the present parameters.
        statistics: Of it.
        drift: From the base.
        ripple: What the finetune did to each piece.
        base: The coupling at the base.
    """

    coupling: CouplingResult
    statistics: CouplingStatistics
    drift: CouplingDrift
    ripple: FinetuneRipple
    base: CouplingResult

    def vectors(self) -> dict[str, tuple[ParameterVector, Kind]]:
        """The matrices and every piece's numbers as tensors."""
        return {"coupling": (_tensors(self), "result")}


def knowledge_findings(
    found: KnowledgeState,
    base: tuple[CouplingResult, CouplingStatistics],
    watched: WatchedPieces,
) -> Row:
    """What to log and to save of an analysis.

    Args:
        found: The analysis.
        base: The coupling at the base and its statistics.
        watched: The pieces.

    Returns:
        Drift, agreement and changes by class as metrics; points, matrix and the most moved facts for the figures.
    """
    ripple, drift = found.ripple, found.drift
    metrics: dict[str, float | None] = {
        "mean_absolute_difference": drift.mean_absolute_difference,
        "mean_difference": drift.mean_difference,
        "correlation": drift.correlation,
        **{f"mean_absolute_difference/{name}": value for name, value in drift.by_class.items()},
        **ripple.scalars(),
        **found.statistics.scalars(),
    }
    data: dict[str, Any] = {
        "n_pieces": len(ripple.pieces),
        "classes": {name: len(ripple.places(name)) for name in ripple.groups},
        "n_pairs": drift.n_pairs,
        "failed": [dict(each) for each in found.coupling.failed],
        "parameters": list(found.coupling.parameters),
        "template": watched.template,
        "route": ripple.route,
        "base_statistics": base[1].scalars(),
        "measure": found.coupling.measure,
        "n_clusters": found.statistics.n_clusters,
        "thresholds": dict(found.statistics.thresholds),
        "agreement": [{name: _json(value) for name, value in vars(each).items()} for each in ripple.agreement()],
        "points": _points(ripple),
        "moved": [_moved(ripple, watched, place) for place in ripple.most_moved(_MOVED)],
        "drifted": _drifted(base, found, watched),
        **coupling_picture(found.coupling, found.statistics, most=_BLOCKS).details(),
    }
    cost = Cost(forwards=3 * len(ripple.pieces) + ripple.passes)
    return Row("coupling_drift", metrics, data, cost=cost)


def _points(ripple: FinetuneRipple) -> dict[str, list[Any]]:
    """Predicted and measured changes; of more pieces than can be drawn, so many evenly spaced."""
    count = len(ripple.pieces)
    places = torch.linspace(0, count - 1, min(count, _POINTS), dtype=torch.float64).round().long().unique().tolist()
    return {
        "piece": [ripple.pieces[place] for place in places],
        "class": [ripple.classes[place] for place in places],
        "predicted": [_json(value) for value in ripple.predicted[places].tolist()],
        "measured": [_json(value) for value in ripple.measured[places].tolist()],
    }


def _moved(ripple: FinetuneRipple, watched: WatchedPieces, place: int) -> dict[str, Any]:
    piece = watched.pieces[place]
    return {
        "id": piece.id,
        "question": piece.question,
        "answer": piece.answer,
        "before": _json(float(ripple.before[place])),
        "after": _json(float(ripple.after[place])),
        "predicted": _json(float(ripple.predicted[place])),
        "rank_before": int(ripple.rank_before[place]),
        "rank_after": int(ripple.rank_after[place]),
    }


def _drifted(
    base: tuple[CouplingResult, CouplingStatistics], found: KnowledgeState, watched: WatchedPieces
) -> dict[str, Any]:
    """Differences of the cosines of the pieces whose coupling drifted most, alike ones at the base as neighbours."""
    drift = found.drift.piece_drift.tolist()
    kept = [place for place in base[1].order if math.isfinite(drift[place])]
    most = set(sorted(kept, key=lambda place: (-drift[place], place))[:_PIECES])
    places = [place for place in kept if place in most]
    difference = (found.coupling.cosines - base[0].cosines)[places][:, places]
    return {
        "ids": [watched.pieces[place].id for place in places],
        "classes": [watched.classes[place] for place in places],
        "difference": [[round(value, 4) for value in line] for line in difference.tolist()],
    }


def _tensors(found: KnowledgeState) -> ParameterVector:
    tensors: dict[str, Tensor] = {
        "base_cosines": found.base.cosines,
        "cosines": found.coupling.cosines,
        "base_norms": found.base.norms,
        "norms": found.coupling.norms,
    }
    for name in ("predicted", "before", "after", "rank_before", "rank_after", "exact_before", "exact_after"):
        tensors[name] = getattr(found.ripple, name)
    space = ParameterSpace(
        tuple(tensors), tuple(each.shape for each in tensors.values()), tuple(each.dtype for each in tensors.values())
    )
    return ParameterVector(space, tensors)


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
