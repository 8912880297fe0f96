"""What the figures of basin volumes show, computed from rows: trajectories, estimates, volumes against cutoffs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_goldy.report.formatting import MISSING, format_number
from lightning_goldy.report.registry import ReportError, Row

_LOWER_BOUND = (
    "Each value is in expectation below the true log-volume, and a few directions dominate it. Only volumes of one "
    "measure, sigma and cutoff compare."
)


@dataclass(frozen=True)
class Trajectory:
    """The log-volume of one split at one cutoff over the run.

    Args:
        label: Split and cutoff.
        steps: Optimizer steps, ascending.
        values: Log-volumes, nats; NaN where a direction was unbounded.
        low: Lower ends of the bootstrap intervals, nats.
        high: Upper ends.
        sigmas: Standard deviation of the measure at each step.
        preconditioners: The proposal used at each step.
    """

    label: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    sigmas: tuple[float, ...]
    preconditioners: tuple[str, ...]


@dataclass(frozen=True)
class Estimates:
    """The directions of one volume.

    Args:
        label: Split and cutoff.
        offsets: Estimates minus the log-volume, nats, of the bounded directions; at most the logarithm of their number.
        unbounded: Directions that never reached the cutoff.
        effective: Effective sample size, directions.
        log_volume: Nats; NaN when a direction was unbounded.
    """

    label: str
    offsets: tuple[float, ...]
    unbounded: int
    effective: float
    log_volume: float


@dataclass(frozen=True)
class CutoffCurve:
    """The log-volumes of one split by cutoff, and the line that goes with them.

    Args:
        label: The split.
        cutoffs: Nats, ascending.
        values: Log-volumes, nats.
        low: Lower ends of the bootstrap intervals, nats.
        high: Upper ends.
        slope: d log V / d log cutoff: fitted over the cutoffs, or measured along the directions at a single one.
        line: Cutoffs and log-volumes of the line's two ends; empty without a slope.
        fitted: Whether the slope was fitted over several cutoffs.
    """

    label: str
    cutoffs: tuple[float, ...]
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    slope: float
    line: tuple[tuple[float, float], ...]
    fitted: bool


def trajectories(row: Row) -> list[Trajectory]:
    """The volumes up to this row, one line per split and cutoff.

    Args:
        row: Of the analysis ``basin_volume``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> line = {"label": "clean", "steps": [0, 5], "log_volume": [-9.0, None], "interval_low": [-10.0, None]}
        >>> line |= {"interval_high": [-8.0, None], "sigma": [0.1, 0.1], "preconditioner": ["none", "none"]}
        >>> trajectories({"result": {"trajectory": [line]}})[0].values
        (-9.0, nan)
    """
    lines = []
    for index, line in enumerate(_objects(row, "trajectory")):
        where = f"result.trajectory[{index}]"
        columns = [
            _numbers(line, name, where) for name in ("steps", "log_volume", "interval_low", "interval_high", "sigma")
        ]
        used = line.get("preconditioner")
        if not isinstance(used, list) or {len(used), *map(len, columns)} != {len(columns[0])}:
            raise ReportError(f"the columns of '{where}' differ in length")
        steps, values, low, high, sigmas = columns
        label = _text(line, "label", where)
        lines.append(Trajectory(label, tuple(map(int, steps)), values, low, high, sigmas, tuple(map(str, used))))
    return lines


def estimates(row: Row) -> list[Estimates]:
    """The directions' own estimates, relative to the volume that they give.

    Args:
        row: Of the analysis ``basin_volume``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> volume = {"label": "clean", "estimates": [-10.0, -12.0, None], "log_volume": None}
        >>> [(each.offsets, each.unbounded) for each in estimates({"result": {"volumes": [volume]}})]
        [((0.0, -2.0), 1)]
    """
    groups = []
    for index, volume in enumerate(_objects(row, "volumes")):
        where = f"result.volumes[{index}]"
        values = _numbers(volume, "estimates", where)
        bounded = [value for value in values if math.isfinite(value)]
        log_volume = _number(volume, "log_volume", where)
        # Without a volume the largest estimate is what the others are compared with.
        zero = log_volume if math.isfinite(log_volume) else max(bounded, default=0.0)
        groups.append(
            Estimates(
                _text(volume, "label", where),
                tuple(value - zero for value in bounded),
                len(values) - len(bounded),
                _number(volume, "effective_sample_size", where),
                log_volume,
            )
        )
    return groups


def cutoff_curves(row: Row) -> list[CutoffCurve]:
    """The log-volume against the cutoff, one curve per split.

    Args:
        row: Of the analysis ``basin_volume``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> volume = {"split": "clean", "cutoff": 0.01, "log_volume": -9.0, "scaling_exponent": 2.0}
        >>> curve = cutoff_curves({"result": {"volumes": [volume], "fits": []}})[0]
        >>> curve.slope, curve.fitted, [round(value, 2) for _, value in curve.line]
        (2.0, False, [-10.39, -7.61])
    """
    by_split: dict[str, list[tuple[Mapping[str, Any], str]]] = {}
    for index, volume in enumerate(_objects(row, "volumes")):
        where = f"result.volumes[{index}]"
        by_split.setdefault(_text(volume, "split", where), []).append((volume, where))
    fits = {_text(fit, "split", "result.fits"): fit for fit in _objects(row, "fits", least=0)}
    return [_curve(split, volumes, fits.get(split)) for split, volumes in by_split.items()]


def trajectory_caption(row: Row) -> str:
    """What a reader sees in the trajectory, and whether its points compare.

    Example:
        >>> trajectory_caption({"result": {"trajectory": [], "n_directions": 5, "measure": "uniform"}})[:58]
        'Log-volume of the region where the model says the same, un'
    """
    result = row["result"]
    lines = [line for line in result.get("trajectory", ()) if isinstance(line, Mapping)]
    sigmas = {sigma for line in lines for sigma in line.get("sigma", ()) if sigma is not None}
    used = {name for line in lines for name in line.get("preconditioner", ())}
    measure = str(result.get("measure", MISSING)).replace("gaussian", "Gaussian")
    text = (
        f"Log-volume of the region where the model says the same, under the {measure} measure, "
        f"over {format_number(result.get('n_directions'))} directions, with 95 % bootstrap intervals: upwards is a "
        f"wider basin. {_LOWER_BOUND}"
    )
    if len(sigmas) > 1:
        text += " The points here were measured at different sigmas, so they do not compare."
    if "none" in used and len(used) > 1:
        text += " Points without a preconditioner lie lower for that reason alone."
    return text


def estimates_caption(row: Row) -> str:
    """How many directions the volume rests on.

    Example:
        >>> volume = {"label": "clean", "estimates": [-10.0, -12.0], "log_volume": -10.6, "effective_sample_size": 1.3}
        >>> estimates_caption({"result": {"volumes": [volume]}})[:52]
        'What each volume rests on: clean on 1.3 of 2 directi'
    """
    parts = []
    for group in estimates(row):
        count = len(group.offsets) + group.unbounded
        part = f"{group.label} on {format_number(_known(group.effective))} of {count} directions"
        parts.append(f"{part} ({group.unbounded} unbounded)" if group.unbounded else part)
    return (
        f"What each volume rests on: {', '.join(parts)}. Bars far left of 0 add nothing to the volume: when one bar "
        "stands alone at 0, a single direction is the result, and more directions would raise it. A narrow spread is "
        "no proof of accuracy."
    )


def cutoff_caption(row: Row) -> str:
    """The slopes, and what they stand for.

    Example:
        >>> volume = {"split": "clean", "cutoff": 0.01, "log_volume": -9.0, "scaling_exponent": 2.0}
        >>> cutoff_caption({"result": {"volumes": [volume], "fits": [], "dimension": 8}})[:60]
        'clean: slope 2 at the cutoff. With D = 8 parameters a regula'
    """
    parts = []
    for curve in cutoff_curves(row):
        how = "over the cutoffs" if curve.fitted else "at the cutoff"
        parts.append(f"{curve.label}: slope {format_number(_known(curve.slope))} {how}")
    dimension, used = row["result"].get("dimension"), str(row["result"].get("preconditioner_used", ""))
    mixed = " Points here come from different proposals, so the slope is that of bounds." if "," in used else ""
    regular = format_number(None if dimension is None else dimension / 2)
    return (
        f"{'; '.join(parts)}. With D = {format_number(dimension)} parameters a regular minimum has slope D/2 = "
        f"{regular} at small cutoffs; a smaller one means flat directions, or a region as wide as the measure. "
        f"{_LOWER_BOUND}{mixed}"
    )


def _curve(split: str, volumes: Sequence[tuple[Mapping[str, Any], str]], fit: Mapping[str, Any] | None) -> CutoffCurve:
    points = []
    for volume, where in volumes:
        names = ("cutoff", "log_volume", "interval_low", "interval_high", "scaling_exponent")
        points.append([_number(volume, name, where) for name in names])
    points.sort(key=lambda point: point[0])
    cutoffs, values, low, high, exponents = (tuple(column) for column in zip(*points, strict=True))
    if fit is None:
        slope, intercept = exponents[0], values[0] - exponents[0] * math.log(cutoffs[0])
        ends = (cutoffs[0] / 2, cutoffs[0] * 2)
    else:
        slope, intercept = (_number(fit, name, "result.fits") for name in ("scaling_exponent_fit", "intercept"))
        ends = (cutoffs[0], cutoffs[-1])
    line = tuple((end, intercept + slope * math.log(end)) for end in ends) if math.isfinite(intercept) else ()
    return CutoffCurve(split, cutoffs, values, low, high, slope, line, fit is not None)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _objects(row: Row, name: str, *, least: int = 1) -> list[Mapping[str, Any]]:
    result = row.get("result")
    found = result.get(name) if isinstance(result, Mapping) else None
    if not isinstance(found, list) or len(found) < least or not all(isinstance(each, Mapping) for each in found):
        raise ReportError(f"'result.{name}' must be a list of at least {least} objects, got {found!r:.60}")
    return found


def _text(record: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(record.get(name), str):
        raise ReportError(f"'{where}.{name}' must be text, got {record.get(name)!r:.60}")
    return str(record[name])


def _number(record: Mapping[str, Any], name: str, where: str) -> float:
    """A number; null, which stands for one that is not finite, and a missing one are NaN."""
    return _convert(record.get(name), f"{where}.{name}")


def _numbers(record: Mapping[str, Any], name: str, where: str) -> tuple[float, ...]:
    values = record.get(name)
    if not isinstance(values, list):
        raise ReportError(f"'{where}.{name}' must be a list of numbers, got {values!r:.60}")
    return tuple(_convert(value, f"{where}.{name}[{index}]") for index, value in enumerate(values))


def _convert(value: Any, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ReportError(f"'{where}' must be a number or null, got {value!r:.60}")
    return float(value)
