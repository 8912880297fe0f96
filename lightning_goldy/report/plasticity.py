"""What the figures of head plasticity show, computed from rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.report.formatting import format_number, format_percent
from lightning_goldy.report.registry import ReportError, Row

MOMENTS = {"before": "before the cut", "cut": "right after", "recovered": "recovered"}


@dataclass(frozen=True)
class GateTimeline:
    """Which heads were open when.

    Args:
        labels: One per head, ``layer.head``.
        edges: Optimizer steps, [spans + 1], ascending.
        opened: [heads, spans]; 1 where the head was open.
    """

    labels: tuple[str, ...]
    edges: tuple[float, ...]
    opened: NDArray[np.float64]


@dataclass(frozen=True)
class LossCourse:
    """The loss over the cycles.

    Args:
        steps: Optimizer steps; one may occur twice, before and after something was done.
        loss: Nats.
        multiplier: Of the learning rate.
        events: (step, what was done).
    """

    steps: tuple[float, ...]
    loss: tuple[float, ...]
    multiplier: tuple[float, ...]
    events: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class ScoreGrid:
    """The scores that the last cut rested on.

    Args:
        values: [layers, heads]; NaN where there is no such head.
        closed: Heads that were closed already.
        cut: Heads that were cut.
    """

    values: NDArray[np.float64]
    closed: frozenset[tuple[int, int]]
    cut: frozenset[tuple[int, int]]


@dataclass(frozen=True)
class AttentionGrid:
    """Attention maps of some heads at some moments.

    Args:
        moments: Labels of the rows.
        heads: Labels of the columns.
        maps: [moments, heads, T, T], weights in [0, 1].
    """

    moments: tuple[str, ...]
    heads: tuple[str, ...]
    maps: NDArray[np.float64]


def gate_timeline(row: Row) -> GateTimeline:
    """Which heads were open when, up to the row's step.

    Args:
        row: Of the analysis ``head_plasticity``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> result = {"heads_per_layer": [2], "timeline": [{"step": 0, "closed": []}, {"step": 3, "closed": [[0, 1]]}]}
        >>> gate_timeline({"step": 5, "result": result}).opened.tolist()
        [[1.0, 1.0], [1.0, 0.0]]
    """
    result = _result(row)
    heads = [
        (layer, head) for layer, size in enumerate(_field(result, "heads_per_layer", list)) for head in range(size)
    ]
    changes = _field(result, "timeline", list)
    if not heads or not changes:
        raise ReportError("'result.heads_per_layer' and 'result.timeline' must not be empty")
    edges = [float(change["step"]) for change in changes]
    edges.append(max(float(row["step"]), edges[-1] + 1))
    opened = np.ones((len(heads), len(changes)))
    for column, change in enumerate(changes):
        for layer, head in change["closed"]:
            opened[heads.index((layer, head)), column] = 0
    return GateTimeline(tuple(f"{layer}.{head}" for layer, head in heads), tuple(edges), opened)


def loss_course(row: Row) -> LossCourse:
    """The loss over the cycles, up to the row's step.

    Args:
        row: Of the analysis ``head_plasticity``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> curve = {"steps": [1, 2], "loss": [2.0, 3.0], "multiplier": [1.0, 3.0]}
        >>> timeline = [{"step": 0, "closed": []}, {"step": 2, "closed": [[0, 1]]}]
        >>> loss_course({"step": 2, "result": {"curve": curve, "timeline": timeline}}).events
        ((2, '1 cut'),)
    """
    result = _result(row)
    curve = _field(result, "curve", Mapping)
    steps, loss, multiplier = (_numbers(curve.get(name)) for name in ("steps", "loss", "multiplier"))
    if not len(steps) == len(loss) == len(multiplier):
        raise ReportError("'result.curve' must hold 'steps', 'loss' and 'multiplier' of one length")
    events, before = [], 0
    for change in _field(result, "timeline", list):
        number = len(change["closed"])
        if number != before:
            events.append((int(change["step"]), f"{abs(number - before)} {'cut' if number > before else 'opened'}"))
        before = number
    return LossCourse(steps, loss, multiplier, tuple(events))


def score_grid(row: Row) -> ScoreGrid | None:
    """The scores of the last cut; None when nothing has been scored yet.

    Args:
        row: Of the analysis ``head_plasticity``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> scores = {"values": [[0.5, None]], "closed_before": [], "cut": [[0, 0]]}
        >>> score_grid({"result": {"scores": scores}}).values
        array([[0.5, nan]])
    """
    scores = _result(row).get("scores")
    if scores is None:
        return None
    values = np.array([_numbers(line) for line in _field(scores, "values", list)], dtype=np.float64)
    closed, cut = ({(layer, head) for layer, head in _field(scores, name, list)} for name in ("closed_before", "cut"))
    return ScoreGrid(values, frozenset(closed), frozenset(cut))


def attention_grid(row: Row) -> AttentionGrid | None:
    """Attention maps of the cycle; None where there are none.

    Args:
        row: Of the analysis ``head_plasticity``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> shown = {"heads": [[0, 1]], "n_cut": 1, "maps": {"before": [[[1.0]]]}}
        >>> attention_grid({"result": {"attention": shown}}).heads
        ('0.1, cut',)
    """
    shown = _result(row).get("attention")
    if shown is None:
        return None
    maps = _field(shown, "maps", Mapping)
    moments = [name for name in MOMENTS if name in maps]
    changes = [each for each in _result(row).get("timeline", ()) if each["step"] > shown.get("step", 0)]
    later = {(layer, head) for change in changes for layer, head in change["closed"]}
    labels = tuple(
        f"{layer}.{head}, {'cut' if place < shown['n_cut'] else 'cut later' if (layer, head) in later else 'kept'}"
        for place, (layer, head) in enumerate(_field(shown, "heads", list))
    )
    values = np.array([maps[name] for name in moments], dtype=np.float64)
    if values.ndim != 4 or values.shape[1] != len(labels):
        raise ReportError(f"'result.attention.maps' must hold a square map per head, got shape {values.shape}")
    return AttentionGrid(tuple(MOMENTS[name] for name in moments), labels, values)


def plasticity_caption(row: Row) -> str:
    """What has been cut, and what it cost so far.

    Example:
        >>> metrics = {"active_heads": 6, "closed_share": 0.25, "loss": 2.0}
        >>> plasticity_caption({"metrics": metrics, "result": {"strategy": "taylor", "cycle": 1, "cycles": 2}})
        'by taylor: 6 heads are open, 25 % closed; loss 2 nats, cycle 2 of 2'
    """
    metrics, result = row["metrics"], _result(row)
    cycle = min(int(result.get("cycle", 0)) + 1, int(result.get("cycles", 1)))
    return (
        f"by {result.get('strategy')}: {format_number(metrics.get('active_heads'))} heads are open, "
        f"{format_percent(metrics.get('closed_share'))} closed; loss {format_number(metrics.get('loss'))} nats, "
        f"cycle {cycle} of {result.get('cycles')}"
    )


def score_caption(row: Row) -> str:
    """What the scores are.

    Example:
        >>> score_caption({"result": {"scores": {"strategy": "taylor", "step": 4, "n_samples": 16}}})
        'taylor scores of 16 samples at step 4; marked are the heads that were cut then or closed before'
    """
    scores = _result(row).get("scores")
    if scores is None:
        return "no head has been scored yet"
    return (
        f"{scores['strategy']} scores of {scores['n_samples']} samples at step {scores['step']}; marked are the heads "
        "that were cut then or closed before"
    )


def _result(row: Row) -> Mapping[str, Any]:
    result = row.get("result")
    if not isinstance(result, Mapping):
        raise ReportError(f"'result' must be an object, got {type(result).__name__}")
    return result


def _field(values: Mapping[str, Any], name: str, kind: type) -> Any:
    value = values.get(name)
    if not isinstance(value, kind):
        raise ReportError(f"'{name}' must be of the kind {kind.__name__}, got {value!r:.60}")
    return value


def _numbers(values: Sequence[float | None] | None) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)):
        raise ReportError(f"a list of numbers is missing, got {values!r:.60}")
    # null is how a number that was not finite is written.
    return tuple(math.nan if value is None else float(value) for value in values)
