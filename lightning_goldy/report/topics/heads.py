"""Head plasticity: which heads were open when, what cutting cost, what was cut, and strategies compared."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_goldy.report.builders import (
    Line,
    Lines,
    arrange,
    columns_of,
    heads_style,
    heat_map,
    layered,
    lines,
    plain_spec,
    rounded,
    tips,
)
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import Columns, Figure, ReportError, Row, register_figure, require, result_of
from lightning_goldy.report.formatting import format_number, format_percent

MOMENTS = {"before": "before the cut", "cut": "right after", "recovered": "recovered"}
# Legible on a light and on a dark page.
_CUT, _OPENED = "#c4453c", "#3a9a6b"
# A little larger than their cells, or the background would shine through between them.
_CLOSE = {"width": {"band": 1.1}, "height": {"band": 1.1}}


@register_figure(
    "head_plasticity", "timeline", heading="Open heads over the run", over="run", reads=("timeline", "curve")
)
def chart_gate_timeline(rows: Sequence[Row]) -> Figure:
    """Which heads were open when, up to the step of the last row.

    Args:
        rows: Of the analysis ``head_plasticity``, ascending; each tells what came since the one before.

    Raises:
        ReportError: A row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> first = {"step": 0, "result": {"timeline": [{"step": 0, "closed": []}]}}
        >>> result = {"heads_per_layer": [2], "timeline": [{"step": 3, "closed": [[0, 1]]}], "strategy": "taylor"}
        >>> last = {"step": 5, "metrics": {}, "result": {**result, "cycles": 1}}
        >>> spans = chart_gate_timeline([first, last]).data["spans"]
        >>> list(zip(spans["head"], spans["low"], spans["high"], spans["state"]))
        [('0.0', 0, 5, 'open'), ('0.1', 0, 3, 'open'), ('0.1', 3, 5, 'closed')]
    """
    sizes = _field(result_of(rows[-1]), "heads_per_layer", list)
    changes = _changes(rows)
    if not sum(sizes) or not changes:
        raise ReportError("'result.heads_per_layer' and 'result.timeline' must not be empty")
    edges = [change["step"] for change in changes]
    edges.append(max(rows[-1]["step"], edges[-1] + 1))
    closed = [{(layer, head) for layer, head in change["closed"]} for change in changes]
    spans: list[tuple[str, float, float, str]] = []
    for head in ((layer, head) for layer, size in enumerate(sizes) for head in range(size)):
        states = itertools.groupby(range(len(changes)), key=lambda place, head=head: head in closed[place])  # type: ignore[misc]
        for shut, places in states:
            first, *_, last = [*places] * 2
            spans.append((f"{head[0]}.{head[1]}", edges[first], edges[last + 1], "closed" if shut else "open"))
    columns = columns_of(("head", "low", "high", "state"), spans)
    return Figure(_timeline_chart(sum(sizes)), {"spans": columns}, plasticity_caption(rows[-1]))


@register_figure("head_plasticity", "loss", heading="The loss over the cycles", over="run", reads=("timeline", "curve"))
def chart_plasticity_loss(rows: Sequence[Row]) -> Figure:
    """The loss of the probe with cuts and regrowths, and the learning-rate multiplier below.

    Args:
        rows: Of the analysis ``head_plasticity``, ascending; each tells what came since the one before.

    Raises:
        ReportError: A row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> curve = {"steps": [1, 2], "loss": [2.0, 3.0], "multiplier": [1.0, 3.0]}
        >>> timeline = [{"step": 0, "closed": []}, {"step": 2, "closed": [[0, 1]]}]
        >>> result = {"curve": curve, "timeline": timeline, "strategy": "taylor", "cycles": 1}
        >>> figure = chart_plasticity_loss([{"metrics": {}, "result": result}])
        >>> figure.data["points_0"]["y"], figure.data["events_0"]
        ([2.0, 3.0], {'step': [2], 'what': ['1 cut']})
    """
    points: list[tuple[float, ...]] = []
    for row in rows:
        curve = _field(result_of(row), "curve", Mapping)
        columns = [_numbers(curve.get(name)) for name in ("steps", "loss", "multiplier")]
        if len(set(map(len, columns))) > 1:
            raise ReportError("'result.curve' must hold 'steps', 'loss' and 'multiplier' of one length")
        known = points[-1][0] if points else -math.inf
        points += [point for point in zip(*columns, strict=True) if point[0] > known]
    numbers = [(change["step"], len(change["closed"])) for change in _changes(rows)]
    events = columns_of(
        ("step", "what"),
        [
            (step, f"{abs(number - before)} {'cut' if number > before else 'opened'}")
            for (_, before), (step, number) in itertools.pairwise([(0, 0), *numbers])
            if number != before
        ],
    )
    steps, loss, multiplier = ([point[place] for point in points] for place in range(3))
    upper = lines({"loss": Line(steps, loss)}, Lines(x="", y="loss, nats", scale="linear"))
    lower = lines({"multiplier": Line(steps, multiplier)}, Lines(y="multiplier", scale="linear", height=80))
    panels = [layered(part, _event_layers(part is upper), data={"events": events}) for part in (upper, lower)]
    return arrange(panels, caption=plasticity_caption(rows[-1]))


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
        >>> scores = {"values": [[0.5, None]], "closed_before": [], "cut": [[0, 0]], "strategy": "taylor", "step": 3}
        >>> figure = chart_head_scores({"result": {"scores": {**scores, "n_samples": 4}}})
        >>> figure.data["cells"]["value"], figure.data["marks"]["mark"]
        ([0.5, None], ['cut'])
    """
    scores = result_of(row).get("scores")
    if scores is None:
        return "No head has been scored yet."
    values = np.array([_numbers(line) for line in _field(scores, "values", list)], dtype=np.float64)
    layers, heads = values.shape
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    # With many heads the numbers would be wider than the page; the tooltips have them.
    cell = (76.0, 26.0) if heads <= 10 else (28.0, 18.0)
    style = heads_style("score", colours="cividis", cell=cell, numbers=heads <= 10)
    extent = (low, high if high > low else low + 1)
    figure = heat_map(values, range(layers), range(heads), style, extent=extent, caption=score_caption(row))
    named = (("closed_before", "closed"), ("cut", "cut"))
    state = {tuple(head): mark for name, mark in named for head in _field(scores, name, list)}
    records = [
        (f"{layer}|{layer}", f"{head}|{head}", rounded(values[layer, head]), mark)
        for (layer, head), mark in state.items()
    ]
    marks = columns_of(("y", "x", "value", "mark"), records)
    return layered(figure, _mark_layers(cell), data={"marks": marks})


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
    shown = result_of(row).get("attention")
    if shown is None:
        return "There are no attention maps yet."
    maps = _field(shown, "maps", Mapping)
    moments = {name: label for name, label in MOMENTS.items() if name in maps}
    scores = result_of(row).get("scores") or {"step": -1}
    # Within a cycle heads are only cut, so those of the last cut and those closed before it are all.
    fresh = [*scores["closed_before"], *scores["cut"]] if scores["step"] > shown.get("step", 0) else []
    later = {(layer, head) for layer, head in fresh}
    labels = tuple(
        f"{layer}.{head}, {'cut' if place < shown['n_cut'] else 'cut later' if (layer, head) in later else 'kept'}"
        for place, (layer, head) in enumerate(_field(shown, "heads", list))
    )
    values = np.array([maps[name] for name in moments], dtype=np.float64)
    if values.ndim != 4 or values.shape[1] != len(labels):
        raise ReportError(f"'result.attention.maps' must hold a square map per head, got shape {values.shape}")
    panels = [(place, *panel) for place, panel in enumerate(itertools.product(moments.values(), labels))]
    # The weights alone, in order: their places tell panel, query and key.
    data: dict[str, Columns] = {
        "weights": {"weight": rounded(values.ravel())},
        "panels": columns_of(("panel", "moment", "head"), panels),
    }
    caption = "columns: layer.head; rows of each map are queries; the first tokens of the first sample"
    return Figure(_maps_chart(values.shape[-1], tuple(moments.values()), labels), data, caption)


@register_figure("plasticity_sweep", "loss_by_level", heading="What pruning cost")
def chart_plasticity_sweep(row: Row) -> Figure:
    """What pruning cost at the end of each run, by level, for each strategy and number of cycles: mean and range.

    Args:
        row: Of the analysis ``plasticity_sweep``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> run = {"strategy": "taylor", "level": 0.5, "cycles": 1, "seed": 0, "cost": 0.1}
        >>> figure = chart_plasticity_sweep({"result": {"runs": [run, {**run, "seed": 1, "cost": 0.3}]}})
        >>> figure.data["points"]["y"], figure.data["ranges"]["high"]
        ([0.2], [0.3])
    """
    runs = sweep_runs(row)
    several = len({run["cycles"] for run in runs}) > 1
    groups: dict[str, dict[float, list[float]]] = {}
    for run in runs:
        cycles = f", {run['cycles']} cycle{'s' if run['cycles'] > 1 else ''}" if several else ""
        by_level = groups.setdefault(f"{run['strategy']}{cycles}", {})
        by_level.setdefault(run["level"], []).append(math.nan if run["cost"] is None else float(run["cost"]))
    ordered = {label: dict(sorted(by_level.items())) for label, by_level in groups.items()}
    title = "loss over the run without pruning, nats"
    style = Lines(x="pruning level", y=title, scale="linear", whole=False, legend=True, height=300)
    means = {
        label: Line(list(by_level), [sum(costs) / len(costs) for costs in by_level.values()])
        for label, by_level in ordered.items()
    }
    ranges = [
        (label, level, *rounded([min(costs), max(costs)]))
        for label, by_level in ordered.items()
        for level, costs in by_level.items()
    ]
    # What choosing at random costs, as a band from the cheapest to the dearest seed: the null of every other line.
    band = [each for each in ranges if each[0].partition(",")[0] == "random"]
    levels = len({level for _, level, *_ in band})
    columns = {
        name: columns_of(("line", "x", "low", "high"), rows) for name, rows in (("ranges", ranges), ("band", band))
    }
    return layered(lines(means, style, caption=sweep_caption(row)), _range_layers(levels == 1), data=columns)


@functools.lru_cache(maxsize=16)
def _timeline_chart(heads: int) -> dict[str, Any]:
    alt = require("altair")
    scale = alt.Scale(domain=["open", "closed"], range=["#8ecae6", "#5a5a5a"])
    onwards = alt.Axis(grid=False, labelFlush=False, tickCount=10, tickMinStep=1, format=",d")
    # Hundreds of heads share the page's height.
    height = max(3.0, min(14.0, 1500 / heads))
    chart = (
        alt.Chart(alt.NamedData("spans"))
        .mark_rect(height={"band": 0.9} if height > 6 else _CLOSE["height"])
        .encode(
            x=alt.X("low:Q", title="optimizer step", scale=alt.Scale(zero=False, nice=False), axis=onwards),
            x2="high:Q",
            y=alt.Y("head:N", sort=None, title="head", axis=alt.Axis(labelOverlap=True, ticks=False, domain=False)),
            color=alt.Color("state:N", scale=scale, legend=alt.Legend(title=None, orient="top")),
            tooltip=["head:N", "state:N", *tips(("low:Q", "from step", ","), ("high:Q", "to step", ","))],
        )
    )
    return plain_spec(chart, height=alt.Step(height))


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
    cross = {"type": "point", "shape": "cross", "filled": True, "size": 45, "stroke": "black", "strokeWidth": 0.8}
    if cell[0] > 40:
        cross |= {"xOffset": cell[0] / 2 - 6}
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
    place, legend = "(datum.number - 1)", alt.Legend(title="weight", gradientLength=80)
    axis = alt.Axis(labels=False, ticks=False, domain=False)
    side = {"title": None, "scale": alt.Scale(padding=0), "axis": axis}
    step = max(1, 110 // size)
    chart = (
        alt.Chart(alt.NamedData("weights"))
        .transform_window(number="row_number()")
        .transform_calculate(
            key=f"{place} % {size}",
            query=f"floor({place} / {size}) % {size}",
            panel=f"floor({place} / {size * size})",
        )
        .transform_lookup(lookup="panel", from_=alt.LookupData(alt.NamedData("panels"), "panel", ["moment", "head"]))
        .mark_rect(**_CLOSE)
        .encode(
            x=alt.X("key:O", **side),
            y=alt.Y("query:O", **side),
            color=alt.Color("weight:Q", scale=alt.Scale(scheme="viridis", domain=[0, 1]), legend=legend),
            row=alt.Row("moment:N", sort=list(moments), title=None, header=alt.Header(labelAngle=-90)),
            column=alt.Column("head:N", sort=list(heads), title=None),
            tooltip=["query:O", "key:O", alt.Tooltip("weight:Q", format=".3f")],
        )
    )
    return plain_spec(chart, width=alt.Step(step), height=alt.Step(step))


@functools.lru_cache(maxsize=2)
def _range_layers(one_level: bool) -> list[dict[str, Any]]:
    encoding = {
        "x": {"field": "x", "type": "quantitative"},
        "y": {"field": "low", "type": "quantitative"},
        "y2": {"field": "high"},
        "color": {"field": "line", "type": "nominal", "sort": None},
        "tooltip": [
            {"field": "line", "title": "strategy", "type": "nominal"},
            {"field": "low", "title": "smallest, nats", "type": "quantitative"},
            {"field": "high", "title": "largest, nats", "type": "quantitative"},
        ],
    }
    zero = {"data": {"values": [{}]}, "mark": {"type": "rule", "strokeDash": [2, 3]}, "encoding": {"y": {"datum": 0}}}
    # An area over a single level would have no width.
    mark, places = ("rect", ()) if one_level else ("area", ("x",))
    band = {name: encoding[name] for name in (*places, "y", "y2", "color")}
    return [
        {"data": {"name": "band"}, "mark": {"type": mark, "opacity": 0.15}, "encoding": band},
        {"data": {"name": "ranges"}, "mark": {"type": "rule", "strokeWidth": 1.5}, "encoding": encoding},
        zero,
    ]


def plasticity_caption(row: Row) -> str:
    """What has been cut, and what it cost so far.

    Example:
        >>> metrics = {"active_heads": 6, "closed_share": 0.25, "loss": 2.0}
        >>> plasticity_caption({"metrics": metrics, "result": {"strategy": "taylor", "cycle": 1, "cycles": 2}})
        'by taylor: 6 heads are open, 25 % closed; loss 2 nats, cycle 2 of 2'
    """
    metrics, result = row["metrics"], result_of(row)
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
    scores = result_of(row).get("scores")
    if scores is None:
        return "no head has been scored yet"
    return (
        f"{scores['strategy']} scores of {scores['n_samples']} samples at step {scores['step']}; boxes are heads "
        f"that were cut then, crosses closed before{_certainty(scores)}"
    )


def _certainty(scores: Mapping[str, Any]) -> str:
    """How well the samples know the scores, and how many cut heads they do not tell from the first that was kept."""
    values, errors = scores.get("values") or [], scores.get("errors") or []
    pairs = [
        ((layer, head), value, error)
        for layer, (row, spreads) in enumerate(zip(values, errors, strict=False))
        for head, (value, error) in enumerate(zip(row, spreads, strict=False))
        if value is not None and error is not None and math.isfinite(value) and math.isfinite(error)
    ]
    if not pairs:
        return ""
    told = f"; a score is known to +- {format_number(float(np.median([error for *_, error in pairs])))} (median)"
    cut, before = ({tuple(head) for head in scores.get(name, ())} for name in ("cut", "closed_before"))
    kept = [(value, error) for head, value, error in pairs if head not in cut | before]
    if not cut or not kept:
        return told
    border, spread = min(kept)
    near = sum(border - value < 2 * math.hypot(error, spread) for head, value, error in pairs if head in cut)
    return f"{told}, {near} of {len(cut)} cut heads within two standard errors of the first kept one"


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
    random = {run["seed"] for run in runs if run["strategy"] == "random"}
    band = "; the band is what heads chosen at random cost" if len(random) > 1 else ""
    return (
        f"{len(runs)} run{'s' if len(runs) > 1 else ''} with {seeds} seed{'s' if seeds > 1 else ''}; points are means "
        f"over seeds, bars their range; 0 is the same seed without pruning{band}"
    )


def _changes(rows: Sequence[Row]) -> list[Mapping[str, Any]]:
    """What was closed from when on; rows of format 1 tell the whole run, of which the steps tell what is new."""
    changes: list[Mapping[str, Any]] = []
    for row in rows:
        known = changes[-1]["step"] if changes else -math.inf
        changes += [change for change in _field(result_of(row), "timeline", list) if change["step"] > known]
    return changes


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


_HEAD_PLASTICITY = Description(
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
    headline=("loss", "active_heads", "closed_share"),
    method=(
        "Heads were scored, closed along a schedule and opened again by the gradient of their gates at zero (scores "
        "after Michel et al. 2019, arXiv 1905.10650)."
    ),
)
describe("head_plasticity", _HEAD_PLASTICITY)
_PLASTICITY_SWEEP = Description(
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
    method=(
        "Strategies of closing heads were compared at equal levels and seeds with the same run without closing, and "
        "with heads closed at random."
    ),
)
describe("plasticity_sweep", _PLASTICITY_SWEEP)
