"""Basin volumes: over the run, what they rest on, and by cutoff."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_goldy.report.builders import Line, Lines, columns_of, lines, rounded, tips
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import (
    Figure,
    ReportError,
    Row,
    number,
    objects_of,
    register_figure,
    require,
    text_of,
)
from lightning_goldy.report.formatting import MISSING, format_number

_LOWER_BOUND = (
    "Each value along rays is a lower bound, in expectation below the true log-volume and in many dimensions far below "
    "it. Only volumes of one measure, sigma and cutoff compare."
)
_NUMBER = ".6~g"
_WHOLE = "datum.value % 1 ? '' : datum.value"


@register_figure("basin_volume", "trajectory", heading="The volume over the run", over="run", reads=("volumes",))
def chart_volume_trajectory(rows: Sequence[Row]) -> Figure:
    """The lower bound over the run, one line per split and cutoff, and the volumes by a bridge with their errors.

    Args:
        rows: Of the analysis ``basin_volume``, ascending.

    Raises:
        ReportError: A row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> volume = {"label": "clean", "log_volume": -9.0, "interval_low": -10.0, "interval_high": -8.5}
        >>> row = {"step": 5, "result": {"volumes": [volume]}}
        >>> chart_volume_trajectory([row | {"step": 0}, row]).data["points"]["low"]
        [-10.0, -10.0]
    """
    return lines(trajectories(rows), Lines(y="log-volume, nats", scale="linear"), caption=trajectory_caption(rows))


@register_figure("basin_volume", "estimates", heading="What the volume rests on")
def chart_volume_estimates(row: Row) -> Figure:
    """Histogram of the directions' estimates relative to the log-volume that they give.

    Args:
        row: Of the analysis ``basin_volume``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> volume = {"label": "clean", "estimates": [-10.0, -12.0], "log_volume": -10.6, "effective_sample_size": 1.3}
        >>> sum(chart_volume_estimates({"result": {"volumes": [volume]}}).data["bins"]["count"])
        2
    """
    groups = estimates(row)
    offsets = [value for group in groups for value in group.offsets]
    edges = np.histogram_bin_edges(offsets, bins=max(20, math.isqrt(len(offsets)))) if offsets else np.array([0.0, 1.0])
    bins = []
    for group in groups:
        counts = np.histogram(group.offsets, bins=edges)[0].tolist()
        panel = group.label if group.offsets else f"{group.label}: no direction is bounded"
        ends = itertools.pairwise(rounded(edges))
        bins += [(panel, low, high, count) for (low, high), count in zip(ends, counts, strict=True)]
    table = columns_of(("panel", "low", "high", "count"), bins)
    return Figure(_estimates_chart(), {"bins": table}, estimates_caption(row))


@register_figure("basin_volume", "cutoffs", heading="The volume by cutoff")
def chart_volume_cutoffs(row: Row) -> Figure:
    """The log-volume against the cutoff with the fitted line; at one cutoff, the slope that its directions tell.

    Args:
        row: Of the analysis ``basin_volume``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> volume = {"split": "clean", "cutoff": 0.01, "log_volume": -9.0, "scaling_exponent": 2.0}
        >>> figure = chart_volume_cutoffs({"result": {"volumes": [volume], "fits": []}})
        >>> figure.data["ends"]["cutoff"], figure.data["ends"]["slope"]
        ([0.005, 0.02], [2.0, 2.0])
    """
    curves = cutoff_curves(row)
    points = [
        (curve.label, *rounded(numbers))
        for curve in curves
        for numbers in zip(curve.cutoffs, curve.values, curve.low, curve.high, strict=True)
    ]
    ends = [(curve.label, *rounded([*end, curve.slope])) for curve in curves for end in curve.line]
    data = {
        "points": columns_of(("split", "cutoff", "value", "low", "high"), points),
        "ends": columns_of(("split", "cutoff", "value", "slope"), ends),
    }
    bounded = any(value is not None for value in data["points"]["low"])
    return Figure(_cutoffs_chart(len(curves) > 1, bounded), data, cutoff_caption(row))


@functools.cache
def _estimates_chart() -> Any:
    alt = require("altair")
    x = {"title": "estimate minus log-volume, nats", "scale": alt.Scale(zero=False), "axis": alt.Axis(grid=False)}
    bars = (
        alt.Chart()
        .transform_calculate(floor="0")
        .mark_bar(binSpacing=0)
        .encode(
            x=alt.X("low:Q", **x),
            x2="high:Q",
            y=alt.Y("count:Q", title="directions", axis=alt.Axis(labelExpr=_WHOLE, tickCount=3)),
            y2="floor:Q",
            color=alt.Color("panel:N", sort=None, legend=None),
            tooltip=tips(
                ("panel:N", "samples"), ("low:Q", "from", _NUMBER), ("high:Q", "to", _NUMBER), ("count:Q", "directions")
            ),
        )
    )
    rule = alt.Chart().mark_rule(strokeDash=[2, 3]).encode(x=alt.datum(0, type="quantitative"))
    header = alt.Header(labelOrient="top", labelAnchor="start", labelPadding=2, labelLimit=500)
    panels = alt.layer(bars, rule, data=alt.NamedData("bins")).properties(width=500, height=64)
    return panels.facet(row=alt.Row("panel:N", sort=None, title=None, header=header), spacing=8)


@functools.cache
def _cutoffs_chart(several: bool, bounded: bool) -> Any:
    alt = require("altair")
    wide, legend = alt.Scale(type="log", nice=False, padding=12), alt.Legend(title=None, orient="top", columns=3)
    axis = alt.Axis(format="~g", tickCount=6, gridOpacity=0.5)
    x = alt.X("cutoff:Q", title="cutoff, nats", scale=wide, axis=axis)
    color = alt.Color("split:N", sort=None, legend=legend if several else None)
    axis = alt.Axis(format=",.9~g", tickCount=6)
    height = {"title": "log-volume, nats", "scale": alt.Scale(zero=False), "axis": axis}
    split = ("split:N", "samples")
    told = {"cutoff": "cutoff, nats", "value": "log-volume, nats", "low": "95 % from", "high": "to"}
    numbers = tips(split, *((f"{name}:Q", title, _NUMBER) for name, title in told.items()))
    slope = tips(split, ("slope:Q", "d log V / d log cutoff", _NUMBER))
    points = alt.Chart(alt.NamedData("points")).encode(x=x, color=color, tooltip=numbers)
    fits = alt.Chart(alt.NamedData("ends")).encode(x=x, color=color, tooltip=slope)
    return alt.layer(
        fits.mark_line(strokeDash=[5, 4], strokeWidth=1.2).encode(y=alt.Y("value:Q", **height)),
        *([points.mark_rule().encode(y=alt.Y("low:Q", **height), y2="high:Q")] if bounded else []),
        points.mark_point(filled=True, size=45, opacity=1).encode(y=alt.Y("value:Q", **height)),
    ).properties(height=260)


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


def trajectories(rows: Sequence[Row]) -> dict[str, Line]:
    """The bounds over the run, by split and cutoff, and the volumes by a bridge, 1.96 errors to either side.

    Notes tell proposal and sigma; rows that still hold a bootstrap interval of the bound keep it.

    Args:
        rows: Of the analysis ``basin_volume``, ascending.

    Raises:
        ReportError: A row lacks what the figure needs.

    Example:
        >>> volume = {"label": "clean", "log_volume": -9.0, "sigma": 0.1, "preconditioner": "none"}
        >>> line = trajectories([{"step": 5, "result": {"volumes": [volume]}}])["clean"]
        >>> line.x, line.y, line.low, line.notes
        ((5,), (-9.0,), (nan,), ('none, sigma 0.1',))
    """
    points: dict[str, list[tuple[Any, ...]]] = {}
    for row in rows:
        for volume, where in _volumes(row):
            *numbers, sigma = _numbers(volume, ("log_volume", "interval_low", "interval_high", "sigma"), where)
            note = f"{volume.get('preconditioner', MISSING)}, sigma {format_number(_known(sigma))}"
            points.setdefault(text_of(volume, "label", where), []).append((row["step"], *numbers, note))
        for bridge, where in _bridges(row):
            value, error = _numbers(bridge, ("log_volume", "error"), where)
            note = "by a bridge" + (f"; weak: {bridge['weak']}" if bridge.get("weak") else "")
            ends = (value - 1.96 * error, value + 1.96 * error)
            label = f"{text_of(bridge, 'label', where)} by a bridge"
            points.setdefault(label, []).append((row["step"], value, *ends, note))
    columns = {label: zip(*line, strict=True) for label, line in points.items()}
    return {label: Line(x, y, low, high, notes=notes) for label, (x, y, low, high, notes) in columns.items()}


def estimates(row: Row) -> list[Estimates]:
    """The directions' own estimates, relative to the volume that they give.

    Args:
        row: Of the analysis ``basin_volume``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> volume = {"label": "clean", "estimates": [-10.0, -12.0, None], "log_volume": None}
        >>> [(group.offsets, group.unbounded) for group in estimates({"result": {"volumes": [volume]}})]
        [((0.0, -2.0), 1)]
    """
    groups = []
    for volume, where in _volumes(row):
        values = volume.get("estimates")
        if not isinstance(values, list):
            raise ReportError(f"'{where}.estimates' must be a list of numbers, got {values!r:.60}")
        numbers = [number(value, f"{where}.estimates[{index}]") for index, value in enumerate(values)]
        bounded = [value for value in numbers if math.isfinite(value)]
        log_volume, effective = _numbers(volume, ("log_volume", "effective_sample_size"), where)
        # Without a volume the largest estimate is what the others are compared with.
        zero = log_volume if math.isfinite(log_volume) else max(bounded, default=0.0)
        offsets = tuple(value - zero for value in bounded)
        label = text_of(volume, "label", where)
        groups.append(Estimates(label, offsets, len(numbers) - len(bounded), effective, log_volume))
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
    names = ("cutoff", "log_volume", "interval_low", "interval_high", "scaling_exponent")
    by_split: dict[str, list[list[float]]] = {}
    for volume, where in _volumes(row):
        by_split.setdefault(text_of(volume, "split", where), []).append(_numbers(volume, names, where))
    found = objects_of(row, "fits", "a list of at least 0 objects", least=0)
    fits = {text_of(fit, "split", "result.fits"): fit for fit in found}
    return [_curve(split, points, fits.get(split)) for split, points in by_split.items()]


def _curve(split: str, points: list[list[float]], fit: Mapping[str, Any] | None) -> CutoffCurve:
    cutoffs, values, low, high, exponents = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    if fit is None:
        slope, intercept = exponents[0], values[0] - exponents[0] * math.log(cutoffs[0])
        ends = (cutoffs[0] / 2, cutoffs[0] * 2)
    else:
        slope, intercept = _numbers(fit, ("scaling_exponent_fit", "intercept"), "result.fits")
        ends = (cutoffs[0], cutoffs[-1])
    line = tuple((end, intercept + slope * math.log(end)) for end in ends) if math.isfinite(intercept) else ()
    return CutoffCurve(split, cutoffs, values, low, high, slope, line, fit is not None)


def trajectory_caption(rows: Sequence[Row]) -> str:
    """What a reader sees in the trajectory, and whether its points compare.

    Example:
        >>> trajectory_caption([{"result": {"volumes": [], "n_directions": 5, "measure": "uniform"}}])[:58]
        'Log-volume of the region where the model says the same, un'
    """
    volumes = [volume for row in rows for volume in row["result"].get("volumes", ())]
    sigmas = {volume.get("sigma") for volume in volumes} - {None}
    used = {volume.get("preconditioner") for volume in volumes}
    measure = str(rows[-1]["result"].get("measure", MISSING)).replace("gaussian", "Gaussian")
    text = (
        f"Log-volume of the region where the model says the same, under the {measure} measure, at least, over "
        f"{format_number(rows[-1]['result'].get('n_directions'))} directions: upwards is a wider basin. {_LOWER_BOUND}"
    )
    told = [bridge_sentence(bridge) for bridge, _ in _bridges(rows[-1])]
    text = " ".join([text, *told])
    if len(sigmas) > 1:
        text += " The points here were measured at different sigmas, so they do not compare."
    if "none" in used and len(used) > 1:
        text += " Points without a preconditioner lie lower for that reason alone."
    return text


def bridge_sentence(bridge: Mapping[str, Any]) -> str:
    """What a bridge found, with its error, and what speaks against it.

    Example:
        >>> bridge_sentence({"label": "clean", "log_volume": -100.0, "error": 2.0, "method": "bridge", "weak": ""})
        'The volume of clean by a bridge is -100 +- 2 nats (one standard error).'
    """
    how = "by weighted draws" if bridge.get("method") == "importance" else "by a bridge"
    value, error = (format_number(bridge.get(name)) for name in ("log_volume", "error"))
    text = f"The volume of {bridge.get('label')} {how} is {value} +- {error} nats (one standard error)."
    return f"{text} Do not rely on it: {bridge['weak']}." if bridge.get("weak") else text


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


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _volumes(row: Row) -> list[tuple[Mapping[str, Any], str]]:
    """The volumes of a row, and where each of them stands."""
    volumes = objects_of(row, "volumes", "a list of at least 1 objects")
    return [(volume, f"result.volumes[{index}]") for index, volume in enumerate(volumes)]


def _bridges(row: Row) -> list[tuple[Mapping[str, Any], str]]:
    """The volumes by a bridge, of which most rows have none."""
    if "bridges" not in row["result"]:
        return []
    bridges = objects_of(row, "bridges", "a list of at least 0 objects", least=0)
    return [(bridge, f"result.bridges[{index}]") for index, bridge in enumerate(bridges)]


def _numbers(record: Mapping[str, Any], names: Sequence[str], where: str) -> list[float]:
    """Numbers of a record; missing ones are NaN."""
    return [number(record.get(name), f"{where}.{name}") for name in names]


_BASIN_VOLUME = Description(
    title="Basin volume",
    measures=(
        "How robust the model is: the volume of the region around the weights in which its predictions on the "
        "probe stay within a Kullback-Leibler divergence of the cutoff, as a log-probability under the measure."
    ),
    reading=(
        "A larger log-volume is a wider basin: more of the parameter space says the same. Every number along rays is "
        "a lower bound, far below the volume where there are many parameters, so that only differences between "
        "checkpoints along common directions mean something; a bridge states the volume with its error. Only volumes "
        "of one measure, sigma and cutoff compare. A large negative number is normal: it grows with the number of "
        "parameters, as bits per parameter does not."
    ),
    metrics={
        "log_volume": "log-mean-exp of the directions' estimates, nats; a lower bound in expectation",
        "lower_bound": "mean of the estimates, nats; by Jensen below the log-volume",
        "interval_low": "lower end of the bound's bootstrap interval over directions, nats; of earlier runs",
        "interval_high": "upper end of that, nats; no interval of the volume",
        "bits_per_parameter": "bits per parameter that name a point of the region, at most",
        "bridge_log_volume": "the log-volume itself by a bridge, nats",
        "bridge_error": "its standard error, nats",
        "bridge_bits_per_parameter": "bits per parameter that it takes to name a point of the region",
        "bridge_scaling_exponent": "d log V / d log cutoff at the saddle",
        "bridge_learning_coefficient": "local learning coefficient from the same samples",
        "bridge_sgld_learning_coefficient": "the same by Langevin dynamics at a fixed step",
        "bridge_weak": "1 where something speaks against the bridge's number",
        "bridge_gradients": "gradients that the bridge took",
        "spread": "standard deviation of the estimates, nats; a narrow one is no proof of accuracy",
        "effective_sample_size": "how many directions the volume rests on",
        "scaling_exponent": "d log V / d log cutoff, from slopes along the directions; D/2 at a regular minimum",
        "scaling_exponent_fit": "the same, fitted over the cutoffs",
        "learning_coefficient_slope": (
            "d log V / d log cutoff between the two smallest cutoffs: like a local learning coefficient, half the "
            "effective dimension, where they are small"
        ),
        "tolerance": "what the tolerance of the radii may move an estimate by, nats",
        "unbounded": "directions along which the cutoff was never reached",
        "evaluations": "evaluations of the divergence, each one forward pass over the samples",
        "sigma": "standard deviation of the Gaussian measure",
        "eps": "damping of the preconditioner",
        "kronecker_eps": "damping of the Kronecker factors beside the optimizer's moments",
    },
    headline=("bridge_log_volume", "log_volume", "log_volume/*"),
    method=(
        "The volume of the region within a KL divergence of the checkpoint was bounded from below along random "
        "directions (Scherlis and Belrose 2025, arXiv 2501.18812); where a bridge is stated, it was estimated by "
        "thermodynamic integration from a Gaussian of the curvature."
    ),
)
describe("basin_volume", _BASIN_VOLUME)
