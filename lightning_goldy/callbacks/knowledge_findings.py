"""Coupling, its drift and the finetune's ripple as metrics, as a row that can be redrawn, and as lines over the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_goldy.analysis.coupling import CouplingResult
from lightning_goldy.analysis.coupling_drift import CouplingDrift
from lightning_goldy.analysis.coupling_picture import coupling_picture
from lightning_goldy.analysis.coupling_statistics import CouplingStatistics
from lightning_goldy.analysis.finetune_ripple import FinetuneRipple
from lightning_goldy.callbacks.base import Findings
from lightning_goldy.callbacks.knowledge_pieces import WatchedPieces
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import ParameterVector

# Points of a line; a row holds the line so far, so without a limit a file would grow with the square of the run.
_MOST_POINTS = 200
# Blocks and pieces in the heat maps, points in the scatter plot, facts in the table.
_BLOCKS, _PIECES, _POINTS, _MOVED = 64, 40, 2000, 20
_LINES = ("mean_absolute_difference", "correlation", "pearson", "spearman")


@dataclass(frozen=True)
class KnowledgeState:
    """What one analysis found.

    Args:
        coupling: At the present parameters.
        statistics: Of it.
        drift: From the base.
        ripple: What the finetune did to each piece.
    """

    coupling: CouplingResult
    statistics: CouplingStatistics
    drift: CouplingDrift
    ripple: FinetuneRipple


def knowledge_findings(
    found: KnowledgeState,
    base: tuple[CouplingResult, CouplingStatistics],
    watched: WatchedPieces,
    *,
    step: int,
    earlier: Sequence[Mapping[str, Any]],
) -> Findings:
    """What to log and to save of an analysis.

    Args:
        found: The analysis.
        base: The coupling at the base and its statistics.
        watched: The pieces.
        step: Optimizer steps so far.
        earlier: The rows of earlier analyses.

    Returns:
        Drift, agreement and changes by class; the row; the matrices and every piece's numbers as tensors.
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
        **coupling_picture(found.coupling, found.statistics, most=_BLOCKS).row(),
    }
    data["trajectory"] = _trajectory([*earlier, {"step": step, "metrics": metrics}], ripple.groups)
    evaluations = 3 * len(ripple.pieces) + ripple.passes
    return Findings(metrics, data, {"coupling": (_tensors(found, base[0]), "result")}, evaluations=evaluations)


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


def _tensors(found: KnowledgeState, base: CouplingResult) -> ParameterVector:
    tensors: dict[str, Tensor] = {
        "base_cosines": base.cosines,
        "cosines": found.coupling.cosines,
        "base_norms": base.norms,
        "norms": found.coupling.norms,
    }
    for name in ("predicted", "before", "after", "rank_before", "rank_after", "exact_before", "exact_after"):
        tensors[name] = getattr(found.ripple, name)
    space = ParameterSpace(
        tuple(tensors), tuple(each.shape for each in tensors.values()), tuple(each.dtype for each in tensors.values())
    )
    return ParameterVector(space, tensors)


def _trajectory(rows: Sequence[Mapping[str, Any]], groups: Sequence[str]) -> dict[str, Any]:
    """Drift, agreement and mean changes by class over the run, evenly thinned, the latest kept."""
    stride = -(-len(rows) // _MOST_POINTS)
    rows = rows[(len(rows) - 1) % stride :: stride]
    lines: dict[str, Any] = {"steps": [row["step"] for row in rows]}
    for name in _LINES:
        lines[name] = [row["metrics"].get(name) for row in rows]
    lines["change"] = {name: [row["metrics"].get(f"measured_change/{name}") for row in rows] for name in groups}
    lines["predicted_change"] = {
        name: [row["metrics"].get(f"predicted_change/{name}") for row in rows] for name in groups
    }
    return lines


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
