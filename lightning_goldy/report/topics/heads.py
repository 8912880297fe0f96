"""Head plasticity: which heads were open when, what cutting cost, what was cut, and strategies compared."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.report.builders import Line, Lines, arrange, heads_style, heat_map, lines, rounded
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import Columns, Figure, ReportError, Row, register_figure, require
from lightning_goldy.report.formatting import format_number, format_percent

MOMENTS = {"before": "before the cut", "cut": "right after", "recovered": "recovered"}
# Legible on a light and on a dark page.
_CUT, _OPENED = "#c4453c", "#3a9a6b"


@register_figure(
    "head_plasticity", "timeline", heading="Open heads over the run", over="run", reads=("timeline", "curve")
)
def chart_gate_timeline(rows: Sequence[Row]) -> Figure:
    """Which heads were open when.

    Args:
        rows: Of the analysis ``head_plasticity``, ascending.

    Raises:
        ReportError: A row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> result = {"heads_per_layer": [2], "timeline": [{"step": 0, "closed": [[0, 1]]}], "strategy": "taylor"}
        >>> figure = chart_gate_timeline([{"step": 5, "metrics": {}, "result": {**result, "cycles": 1}}])
        >>> figure.data["spans"]["head"], figure.data["spans"]["state"]
        (['0.0', '0.1'], ['open', 'closed'])
    """
    timeline = gate_timeline(rows)
    spans: dict[str, list[Any]] = {name: [] for name in ("head", "low", "high", "state")}
    for label, opened in zip(timeline.labels, timeline.opened, strict=True):
        changes = [0, *(np.flatnonzero(np.diff(opened)) + 1).tolist(), len(opened)]
        for first, last in itertools.pairwise(changes):
            state = "open" if opened[first] else "closed"
            for name, value in zip(spans, (label, timeline.edges[first], timeline.edges[last], state), strict=True):
                spans[name].append(value)
    return Figure(_timeline_chart(len(timeline.labels)), {"spans": spans}, plasticity_caption(rows[-1]))


@register_figure("head_plasticity", "loss", heading="The loss over the cycles", over="run", reads=("timeline", "curve"))
def chart_plasticity_loss(rows: Sequence[Row]) -> Figure:
    """The loss of the probe with cuts and regrowths, and the learning-rate multiplier below.

    Args:
        rows: Of the analysis ``head_plasticity``, ascending.

    Raises:
        ReportError: A row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> curve = {"steps": [1, 2], "loss": [2.0, 3.0], "multiplier": [1.0, 3.0]}
        >>> result = {"curve": curve, "timeline": [], "strategy": "taylor", "cycles": 1}
        >>> chart_plasticity_loss([{"metrics": {}, "result": result}]).data["points_0"]["y"]
        [2.0, 3.0]
    """
    course = loss_course(rows)
    events = {"step": [step for step, _ in course.events], "what": [what for _, what in course.events]}
    upper = lines({"loss": Line(course.steps, course.loss)}, Lines(x="", y="loss, nats", scale="linear"))
    style = Lines(y="multiplier", scale="linear", height=80)
    lower = lines({"multiplier": Line(course.steps, course.multiplier)}, style)
    return arrange(
        [
            _layered(upper, {"events": events}, _event_layers(True)),
            _layered(lower, {"events": events}, _event_layers()),
        ],
        caption=plasticity_caption(rows[-1]),
    )


@register_figure("head_plasticity", "scores", heading="Importance of heads")
def chart_head_scores(row: Row) -> Figure | str:
    """Heat map of the scores that the last cut rested on, with marks at the heads that were cut or closed before.

    Args:
        row: Of the analysis ``head_plasticity``.

    Returns:
        The figure, or that nothing has been scored.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> scores = {"values": [[0.5, -1.0]], "closed_before": [], "cut": [[0, 1]], "strategy": "taylor", "step": 3}
        >>> figure = chart_head_scores({"result": {"scores": {**scores, "n_samples": 4}}})
        >>> figure.data["cells"]["value"], figure.data["marks"]["mark"]
        ([0.5, -1.0], ['cut'])
    """
    grid = score_grid(row)
    if grid is None:
        return "No head has been scored yet."
    layers, heads = grid.values.shape
    finite = grid.values[np.isfinite(grid.values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    # With many heads the numbers would be wider than the page; the tooltips have them.
    cell = (64.0, 26.0) if heads <= 12 else (28.0, 18.0)
    style = heads_style("score", colours="cividis", cell=cell, numbers=heads <= 12)
    figure = heat_map(
        grid.values,
        range(layers),
        range(heads),
        style,
        extent=(low, high if high > low else low + 1),
        caption=score_caption(row),
    )
    state = {**dict.fromkeys(sorted(grid.closed), "closed"), **dict.fromkeys(sorted(grid.cut), "cut")}
    marks = {
        "y": [f"{layer}|{layer}" for layer, _ in state],
        "x": [f"{head}|{head}" for _, head in state],
        "value": rounded([grid.values[head] for head in state]),
        "mark": list(state.values()),
    }
    return _layered(figure, {"marks": marks}, _mark_layers(cell))


@register_figure("head_plasticity", "attention", heading="Attention of cut and kept heads")
def chart_attention_maps(row: Row) -> Figure | str:
    """Attention maps of some cut and some kept heads for one sample: before the cut, right after, when heads regrow.

    Args:
        row: Of the analysis ``head_plasticity``.

    Returns:
        The figure, or that there are no maps.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> shown = {"heads": [[0, 1]], "n_cut": 1, "maps": {"before": [[[1.0]]]}}
        >>> chart_attention_maps({"result": {"attention": shown}}).data["panels"]
        {'panel': [0], 'moment': ['before the cut'], 'head': ['0.1, cut']}
    """
    grid = attention_grid(row)
    if grid is None:
        return "There are no attention maps yet."
    panels = [(moment, head) for moment in grid.moments for head in grid.heads]
    # The weights alone, in order: their places tell panel, query and key.
    data: dict[str, Columns] = {
        "weights": {"weight": rounded(grid.maps.ravel())},
        "panels": {
            "panel": list(range(len(panels))),
            "moment": [moment for moment, _ in panels],
            "head": [head for _, head in panels],
        },
    }
    caption = "columns: layer.head; rows of each map are queries; the first tokens of the first sample"
    return Figure(_maps_chart(grid.maps.shape[-1], grid.moments, grid.heads), data, caption)


@register_figure("plasticity_sweep", "loss_by_level", heading="What pruning cost")
def chart_plasticity_sweep(row: Row) -> Figure:
    """What pruning cost at the end of each run, by level, for each strategy and number of cycles.

    Args:
        row: Of the analysis ``plasticity_sweep``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> run = {"strategy": "taylor", "level": 0.5, "cycles": 1, "seed": 0, "cost": 0.1}
        >>> chart_plasticity_sweep({"result": {"runs": [run]}}).data["points"]["y"]
        [0.1]
    """
    found = sweep_lines(row)
    style = Lines(
        x="pruning level",
        y="loss over the run without pruning, nats",
        scale="linear",
        whole=False,
        legend=True,
        height=300,
    )
    figure = lines({line.label: Line(line.levels, line.mean) for line in found}, style, caption=sweep_caption(row))
    ranges = {
        "line": [line.label for line in found for _ in line.levels],
        "x": [level for line in found for level in line.levels],
        "low": rounded([low for line in found for low in line.low]),
        "high": rounded([high for line in found for high in line.high]),
    }
    return _layered(figure, {"ranges": ranges}, _range_layers())


def _layered(figure: Figure, data: Mapping[str, Columns], layers: Sequence[Mapping[str, Any]]) -> Figure:
    """The figure with more layers over it, and what they show."""
    chart = copy.deepcopy(figure.bare())
    chart["layer"] = [*chart["layer"], *layers]
    return replace(figure, chart=chart, data={**figure.data, **data})


@functools.lru_cache(maxsize=16)
def _timeline_chart(heads: int) -> dict[str, Any]:
    alt = require("altair")
    scale = alt.Scale(domain=["open", "closed"], range=["#8ecae6", "#5a5a5a"])
    # Hundreds of heads share the page's height.
    height = max(3.0, min(14.0, 1500 / heads))
    chart = (
        alt.Chart(alt.NamedData("spans"))
        .mark_rect(height={"band": 0.9 if height > 6 else 1})
        .encode(
            x=alt.X(
                "low:Q",
                title="optimizer step",
                scale=alt.Scale(zero=False, nice=False),
                axis=alt.Axis(grid=False, labelFlush=False, tickCount=10, tickMinStep=1, format=",d"),
            ),
            x2="high:Q",
            y=alt.Y("head:N", sort=None, title="head", axis=alt.Axis(labelOverlap=True, ticks=False, domain=False)),
            color=alt.Color("state:N", scale=scale, legend=alt.Legend(title=None, orient="top")),
            tooltip=[
                alt.Tooltip("head:N"),
                alt.Tooltip("state:N"),
                alt.Tooltip("low:Q", title="from step", format=","),
                alt.Tooltip("high:Q", title="to step", format=","),
            ],
        )
        .properties(height=alt.Step(height))
    )
    spec: dict[str, Any] = chart.to_dict(validate=False)
    return spec


@functools.lru_cache(maxsize=2)
def _event_layers(named: bool = False) -> list[dict[str, Any]]:
    colour = {"condition": {"test": "indexof(datum.what, 'cut') > 0", "value": _CUT}, "value": _OPENED}
    place = {"x": {"field": "step", "type": "quantitative"}, "color": colour}
    tooltip = [{"field": "step", "title": "step", "format": ","}, {"field": "what", "title": "event"}]
    events = {"data": {"name": "events"}}
    rule = {**events, "mark": {"type": "rule", "strokeDash": [2, 3]}, "encoding": {**place, "tooltip": tooltip}}
    words = {"type": "text", "angle": 270, "align": "right", "dy": 8, "fontSize": 10, "baseline": "middle"}
    text = {**events, "mark": words, "encoding": {**place, "y": {"value": 2}, "text": {"field": "what"}}}
    return [rule, text] if named else [rule]


@functools.lru_cache(maxsize=2)
def _mark_layers(cell: tuple[float, float]) -> list[dict[str, Any]]:
    place = {axis: {"field": axis, "type": "nominal", "sort": None} for axis in "xy"}
    name = "slice(datum.{0}, indexof(datum.{0}, '|') + 1)"
    calculate = [{"calculate": name.format(axis), "as": label} for axis, label in (("y", "layer"), ("x", "head"))]
    tooltip = [{"field": label, "type": "nominal"} for label in ("layer", "head", "mark")]
    tooltip.append({"field": "value", "type": "quantitative", "title": "score", "format": ".6~g"})
    box = {"type": "rect", "filled": False, "fillOpacity": 0, "strokeWidth": 2.5}
    # White with a dark edge shows on every colour; beside the number where there is one.
    cross = {"type": "point", "shape": "cross", "filled": True, "size": 60, "stroke": "black", "strokeWidth": 0.8}
    if cell[0] > 40:
        cross |= {"xOffset": cell[0] / 2 - 8}
    base = {"data": {"name": "marks"}, "transform": calculate}
    kept = {"transform": [*calculate, {"filter": "datum.mark == 'cut'"}]}
    shut = {"transform": [*calculate, {"filter": "datum.mark == 'closed'"}]}
    return [
        {**base, **kept, "mark": box, "encoding": {**place, "stroke": {"value": _CUT}, "tooltip": tooltip}},
        {**base, **shut, "mark": cross, "encoding": {**place, "color": {"value": "white"}, "tooltip": tooltip}},
    ]


@functools.lru_cache(maxsize=16)
def _maps_chart(size: int, moments: tuple[str, ...], heads: tuple[str, ...]) -> dict[str, Any]:
    alt = require("altair")
    place, plain = "(datum.number - 1)", {"labels": False, "ticks": False, "domain": False}
    # Even, or the background would shine through between the cells at one and a half times the size.
    step = max(2, 2 * (60 // size))
    chart = (
        alt.Chart(alt.NamedData("weights"))
        .transform_window(number="row_number()")
        .transform_calculate(
            key=f"{place} % {size}",
            query=f"floor({place} / {size}) % {size}",
            panel=f"floor({place} / {size * size})",
        )
        .transform_lookup(lookup="panel", from_=alt.LookupData(alt.NamedData("panels"), "panel", ["moment", "head"]))
        .mark_rect()
        .encode(
            x=alt.X("key:O", title=None, scale=alt.Scale(padding=0), axis=alt.Axis(**plain)),
            y=alt.Y("query:O", title=None, scale=alt.Scale(padding=0), axis=alt.Axis(**plain)),
            color=alt.Color(
                "weight:Q",
                scale=alt.Scale(scheme="viridis", domain=[0, 1]),
                legend=alt.Legend(title="weight", gradientLength=80),
            ),
            row=alt.Row("moment:N", sort=list(moments), title=None, header=alt.Header(labelAngle=-90)),
            column=alt.Column("head:N", sort=list(heads), title=None),
            tooltip=[alt.Tooltip("query:O"), alt.Tooltip("key:O"), alt.Tooltip("weight:Q", format=".3f")],
        )
        .properties(width=alt.Step(step), height=alt.Step(step))
    )
    spec: dict[str, Any] = chart.to_dict(validate=False)
    return spec


@functools.lru_cache(maxsize=1)
def _range_layers() -> list[dict[str, Any]]:
    encoding = {
        "x": {"field": "x", "type": "quantitative"},
        "y": {"field": "low", "type": "quantitative"},
        "y2": {"field": "high"},
        "color": {"field": "line", "type": "nominal", "sort": None},
        "tooltip": [
            {"field": name, "title": title, "type": kind}
            for name, title, kind in (
                ("line", "strategy", "nominal"),
                ("low", "smallest, nats", "quantitative"),
                ("high", "largest, nats", "quantitative"),
            )
        ],
    }
    zero = {"data": {"values": [{}]}, "mark": {"type": "rule", "strokeDash": [2, 3]}, "encoding": {"y": {"datum": 0}}}
    return [{"data": {"name": "ranges"}, "mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": encoding}, zero]


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


def gate_timeline(rows: Sequence[Row]) -> GateTimeline:
    """Which heads were open when, up to the step of the last row.

    Args:
        rows: Of the analysis ``head_plasticity``, ascending; each tells what came since the one before.

    Raises:
        ReportError: A row lacks what the figure needs.

    Example:
        >>> first = {"step": 0, "result": {"timeline": [{"step": 0, "closed": []}]}}
        >>> second = {"heads_per_layer": [2], "timeline": [{"step": 3, "closed": [[0, 1]]}]}
        >>> gate_timeline([first, {"step": 5, "result": second}]).opened.tolist()
        [[1.0, 1.0], [1.0, 0.0]]
    """
    sizes = _field(_result(rows[-1]), "heads_per_layer", list)
    heads = [(layer, head) for layer, size in enumerate(sizes) for head in range(size)]
    changes = _changes(rows)
    if not heads or not changes:
        raise ReportError("'result.heads_per_layer' and 'result.timeline' must not be empty")
    edges = [float(change["step"]) for change in changes]
    edges.append(max(float(rows[-1]["step"]), edges[-1] + 1))
    opened = np.ones((len(heads), len(changes)))
    for column, change in enumerate(changes):
        for layer, head in change["closed"]:
            opened[heads.index((layer, head)), column] = 0
    return GateTimeline(tuple(f"{layer}.{head}" for layer, head in heads), tuple(edges), opened)


def loss_course(rows: Sequence[Row]) -> LossCourse:
    """The loss over the cycles, up to the step of the last row.

    Args:
        rows: Of the analysis ``head_plasticity``, ascending; each tells what came since the one before.

    Raises:
        ReportError: A row lacks what the figure needs.

    Example:
        >>> curve = {"steps": [1, 2], "loss": [2.0, 3.0], "multiplier": [1.0, 3.0]}
        >>> timeline = [{"step": 0, "closed": []}, {"step": 2, "closed": [[0, 1]]}]
        >>> loss_course([{"step": 2, "result": {"curve": curve, "timeline": timeline}}]).events
        ((2, '1 cut'),)
    """
    points: list[tuple[float, ...]] = []
    for row in rows:
        curve = _field(_result(row), "curve", Mapping)
        steps, loss, multiplier = (_numbers(curve.get(name)) for name in ("steps", "loss", "multiplier"))
        if not len(steps) == len(loss) == len(multiplier):
            raise ReportError("'result.curve' must hold 'steps', 'loss' and 'multiplier' of one length")
        known = points[-1][0] if points else -math.inf
        points += [point for point in zip(steps, loss, multiplier, strict=True) if point[0] > known]
    events, before = [], 0
    for change in _changes(rows):
        number = len(change["closed"])
        if number != before:
            events.append((int(change["step"]), f"{abs(number - before)} {'cut' if number > before else 'opened'}"))
        before = number
    columns = [tuple(point[place] for point in points) for place in range(3)]
    return LossCourse(*columns, events=tuple(events))


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
    changes = [change for change in _result(row).get("timeline", ()) if change["step"] > shown.get("step", 0)]
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
        'taylor scores of 16 samples at step 4; boxes are heads that were cut then, crosses closed before'
    """
    scores = _result(row).get("scores")
    if scores is None:
        return "no head has been scored yet"
    return (
        f"{scores['strategy']} scores of {scores['n_samples']} samples at step {scores['step']}; boxes are heads "
        "that were cut then, crosses closed before"
    )


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


def _changes(rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    """What was closed from when on; rows of format 1 tell the whole run, of which the steps tell what is new."""
    changes: list[Mapping[str, Any]] = []
    for row in rows:
        known = changes[-1]["step"] if changes else -math.inf
        changes += [change for change in _field(_result(row), "timeline", list) if change["step"] > known]
    return changes


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


describe(
    "head_plasticity",
    Description(
        title="Head plasticity",
        measures=(
            "Which attention heads the finetune needs: the least important ones are closed along a schedule, the model "
            "trains on, and the most wanted of them open again."
        ),
        reading=(
            "The step up of the loss at a cut is what the heads were worth at that moment, the distance that is left "
            "when heads regrow is what the model could not do without them. Compare with the strategy `random` before "
            "you trust a score. Losses are of the probe, in evaluation mode."
        ),
        metrics={
            "loss": "mean loss of the model as it is, nats; over the probe's samples, with the present gates",
            "perplexity": "exponential of that loss",
            "active_heads": "open heads",
            "closed_share": "closed heads divided by all",
            "learning_rate_multiplier": "of the attention of the layer that was cut last; 1 = the run's own rate",
            "cycle": "cycles that are finished",
            "recovery_steps": "optimizer steps from the last cut until the loss was back within the margin",
            "cut": "of the probe around a cut",
            "regrow": "of the probe around a regrowth",
            "finish": "of the probe as the cycle began (before) and as it ended",
            "rolled_back": "1 when the cycle cost too much and was undone",
        },
    ),
)
describe(
    "plasticity_sweep",
    Description(
        title="Head plasticity: strategies compared",
        measures=(
            "The same finetune with every combination of strategy, pruning level and number of cycles, and once "
            "without pruning: how the losses at the end compare."
        ),
        reading=(
            "Differences below the range over the seeds mean nothing, and with one seed there is no range. A strategy "
            "that does not beat `random` has found nothing."
        ),
        metrics={
            "runs": "runs with pruning",
            "best_cost": "smallest mean rise of the loss over the run without pruning, nats",
            "worst_cost": "largest mean rise of the loss, nats",
        },
    ),
)
