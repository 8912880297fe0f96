"""What the figure of a sweep shows, computed from its row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_goldy.report.registry import ReportError, Row


@dataclass(frozen=True)
class SweepLine:
    """Costs of one strategy and number of cycles, over the levels.

    Args:
        label: Strategy, with the number of cycles where several were tried.
        levels: Pruning levels, ascending, fractions.
        mean: Mean over the seeds, nats.
        low: Smallest, nats.
        high: Largest, nats.
    """

    label: str
    levels: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def sweep_lines(row: Row) -> tuple[SweepLine, ...]:
    """The lines, in the order of the runs.

    Args:
        row: Of the analysis ``plasticity_sweep``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> run = {"strategy": "taylor", "level": 0.5, "cycles": 1, "seed": 0, "cost": 0.1}
        >>> sweep_lines({"result": {"runs": [run, {**run, "seed": 1, "cost": 0.3}]}})[0].high
        (0.3,)
    """
    runs = sweep_runs(row)
    several = len({run["cycles"] for run in runs}) > 1
    groups: dict[tuple[str, int], dict[float, list[float]]] = {}
    for run in runs:
        cost = math.nan if run["cost"] is None else float(run["cost"])
        groups.setdefault((run["strategy"], run["cycles"]), {}).setdefault(run["level"], []).append(cost)
    lines = []
    for (strategy, cycles), by_level in groups.items():
        label = f"{strategy}, {cycles} cycle{'s' if cycles > 1 else ''}" if several else strategy
        levels = sorted(by_level)
        columns = [[function(by_level[level]) for level in levels] for function in (_mean, min, max)]
        lines.append(SweepLine(label, tuple(levels), *(tuple(column) for column in columns)))
    return tuple(lines)


def sweep_runs(row: Row) -> list[Mapping[str, Any]]:
    """The runs of a sweep.

    Raises:
        ReportError: There is none, or one lacks a field.

    Example:
        >>> sweep_runs({"result": {"runs": []}})
        Traceback (most recent call last):
        lightning_goldy.report.figures.ReportError: 'result.runs' must be a list with at least one run
    """
    result = row.get("result")
    runs = result.get("runs") if isinstance(result, Mapping) else None
    if not isinstance(runs, list) or not runs:
        raise ReportError("'result.runs' must be a list with at least one run")
    for number, run in enumerate(runs):
        for field in ("strategy", "level", "cycles", "seed", "cost"):
            if not isinstance(run, Mapping) or field not in run:
                raise ReportError(f"'result.runs[{number}]' lacks {field!r}")
    return runs


def sweep_caption(row: Row) -> str:
    """How many runs there were.

    Example:
        >>> run = {"strategy": "taylor", "level": 0.5, "cycles": 1, "seed": 0, "cost": 0.1}
        >>> sweep_caption({"result": {"runs": [run]}})
        '1 run with 1 seed; points are means over seeds, bars their range; 0 is the same seed without pruning'
    """
    runs = sweep_runs(row)
    seeds = len({run["seed"] for run in runs})
    return (
        f"{len(runs)} run{'s' if len(runs) > 1 else ''} with {seeds} seed{'s' if seeds > 1 else ''}; points are means "
        "over seeds, bars their range; 0 is the same seed without pruning"
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
