"""The kinds of figure that several topics draw: heat maps, lines, bars, histograms, clouds of points, several at once.

Each takes numbers and a frozen style, which holds all that is not data. Charts of equal styles are built once. Labels
travel as data and never become field names, so that any text can stand in them.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from lightning_goldy.report.figures import Columns, Figure, bounds, is_single, require, widest_ranges

Colours: TypeAlias = Literal["cividis", "viridis", "diverging"]
Spec: TypeAlias = dict[str, Any]

# Labels of a heat map may repeat (tokens do), so that a number makes each unique; it is not shown.
_LABEL = "slice(datum.{0}, indexof(datum.{0}, '|') + 1)"
_NUMBER = (
    "!isValid(datum.value) ? '–' : "  # noqa: RUF001
    "format(datum.value, abs(datum.value) >= 999.5 && abs(datum.value) < 1e5 ? ',.0f' : '.3~g')"
)
# Places on the colour scale, from 0 to 1, at which its colours are too dark for black letters.
_DARK = {"cividis": "{0} < 0.5", "viridis": "{0} < 0.6", "diverging": "abs({0} - 0.5) > 0.33"}
_EXACT = ".9~g"
_TICKS = ",.9~g"
# On a logarithmic axis as many as can be read.
_ONE_TWO_FIVE = (
    "indexof([1, 2, 5], round(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)))) < 0 ? '' : datum.label"
)
# A logarithmic axis has many lines.
_FAINT = {False: 1.0, True: 0.5}


def rounded(values: ArrayLike, digits: int = 6) -> list[Any]:
    """Numbers with few significant digits and None for those that are not finite, as nested lists.

    Example:
        >>> rounded([[0.123456789, float("nan")]])
        [[0.123457, None]]
    """

    def shorten(value: Any) -> Any:
        if isinstance(value, list):
            return [shorten(inner) for inner in value]
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None

    return shorten(np.asarray(values, dtype=np.float64).tolist())


def columns_of(names: Sequence[str], records: Iterable[Sequence[Any]]) -> dict[str, list[Any]]:
    """Records as columns of a figure's data.

    Example:
        >>> columns_of(("head", "low"), [("0.1", 3), ("0.2", 5)])
        {'head': ['0.1', '0.2'], 'low': [3, 5]}
    """
    rows = list(records)
    return {name: [row[place] for row in rows] for place, name in enumerate(names)}


def tips(*told: tuple[str, ...]) -> list[Any]:
    """Tooltips, each out of a field with its type, a title and, where there is one, a format.

    Example:
        >>> tips(("low:Q", "from", ".3f"))[0].to_dict()
        {'field': 'low', 'format': '.3f', 'title': 'from', 'type': 'quantitative'}
    """
    alt = require("altair")
    return [alt.Tooltip(name, title=title, **({"format": rest[0]} if rest else {})) for name, title, *rest in told]


@dataclass(frozen=True)
class HeatMap:
    """How a heat map looks.

    Args:
        unit: What the numbers are, beside the colours.
        rows: What a row is, for the tooltips.
        columns: What a column is.
        colours: From dark to bright; ``"diverging"`` from blue over white at the middle to red.
        scale: Name of the range of the colours. Panels that state the same one share it, and so do all steps.
        numbers: Whether each cell states its number.
        cell: Width and height of a cell.
        axes: Whether the axes have titles, which are those of the tooltips.
        title: Above the map, for one among several.
        legend: Whether the colours are explained beside it.
        note: What further words of each cell are, in its tooltip; empty without.
    """

    unit: str
    rows: str = "block"
    columns: str = "kind"
    colours: Colours = "viridis"
    scale: str = "colour"
    numbers: bool = True
    cell: tuple[float, float] = (64, 20)
    axes: bool = False
    title: str = ""
    legend: bool = True
    note: str = ""


def heads_style(unit: str, **changes: Any) -> HeatMap:
    """A heat map of layers and heads: small cells without numbers, readable with 30 layers of 16 heads.

    Example:
        >>> heads_style("share", title="induction").rows
        'layer'
    """
    style = HeatMap(unit, rows="layer", columns="head", numbers=False, cell=(13, 13), axes=True)
    return replace(style, **changes)


def heat_map(
    values: ArrayLike,
    rows: Sequence[object],
    columns: Sequence[object],
    style: HeatMap,
    *,
    extent: tuple[float, float] | None = None,
    notes: Sequence[Sequence[str]] | None = None,
    caption: str = "",
) -> Figure:
    """A table of numbers as colours.

    Args:
        values: [rows, columns]; a number that is not finite leaves its cell empty.
        rows: Labels from top to bottom; any objects, shown as text.
        columns: Labels from left to right.
        style: How it looks.
        extent: Numbers of the darkest and the brightest colour; by default from 0 to the largest, and for diverging
            colours to both sides as far as the largest.
        notes: Of each cell what the style's ``note`` is, such as its interval.
        caption: Sentences under the figure.

    Raises:
        ValueError: The labels do not fit the numbers.
        ImportError: altair is not installed.

    Example:
        >>> figure = heat_map([[2.0, float("nan")]], ["h.0"], ["mlp", "norm"], HeatMap("%"))
        >>> figure.data["cells"]["value"], figure.ranges
        ([2.0, None], {'colour': (0.0, 2.0)})
    """
    table = np.asarray(values, dtype=np.float64)
    if table.shape != (len(rows), len(columns)):
        raise ValueError(f"numbers of shape {table.shape} for {len(rows)} rows and {len(columns)} columns")
    down, across = ([f"{place}|{label}" for place, label in enumerate(labels)] for labels in (rows, columns))
    cells = {"y": np.repeat(down, len(across)).tolist(), "x": across * len(down), "value": rounded(table.ravel())}
    if style.note:
        cells["note"] = [note for row in notes or () for note in row] or [""] * table.size
    ends = _extent(table, style) if extent is None else extent
    still = frozenset() if extent is not None or np.nan_to_num(table).any() else frozenset([style.scale])
    return Figure(_heat_map_chart(style), {"cells": cells}, caption, ranges={style.scale: ends}, still=still)


def _extent(table: np.ndarray[Any, Any], style: HeatMap) -> tuple[float, float]:
    finite = np.abs(table[np.isfinite(table)]) if style.colours == "diverging" else table[np.isfinite(table)]
    top = float(f"{finite.max():.6g}") if finite.size and finite.max() > 0 else 1.0
    return (-top, top) if style.colours == "diverging" else (0.0, top)


@functools.lru_cache(maxsize=256)
def _heat_map_chart(style: HeatMap) -> Spec:
    alt = require("altair")
    scheme = {"diverging": "redblue"}.get(style.colours, style.colours)
    both = style.colours == "diverging"
    scale = alt.Scale(scheme=scheme, domain=bounds(style.scale), clamp=True, reverse=both, nice=False)
    legend = alt.Legend(title=style.unit, gradientLength=80, format=".3~g") if style.legend else None
    base = _heat_map_base(style)
    known = base.transform_filter("isValid(datum.value)")
    layers = [known.mark_rect().encode(color=alt.Color("value:Q", scale=scale, legend=legend))]
    if style.numbers:
        position = f"((datum.value - {style.scale}_low) / ({style.scale}_high - {style.scale}_low))"
        ink = alt.condition(_DARK[style.colours].format(position), alt.value("white"), alt.value("black"))
        layers.append(known.mark_text(fontSize=10).encode(text="text:N", color=ink))
        layers.append(base.transform_filter("!isValid(datum.value)").mark_text(fontSize=10).encode(text="text:N"))
    width, height = map(alt.Step, style.cell)
    return plain_spec(alt.layer(*layers), style.title, width=width, height=height)


def _heat_map_base(style: HeatMap) -> Any:
    alt = require("altair")
    angle = 0 if style.cell[0] >= 40 else -90
    words = {"sort": None, "scale": alt.Scale(paddingInner=0.06 if style.numbers else 0, paddingOuter=0)}
    said = {"labelOverlap": True, "labelExpr": _LABEL.format("label")}
    plain = {"domain": False, "ticks": False, "grid": False, **said}
    across, down = (style.columns, style.rows) if style.axes else (None, None)
    return (
        alt.Chart(alt.NamedData("cells"))
        .transform_calculate(row=_LABEL.format("y"), column=_LABEL.format("x"), text=_NUMBER)
        .encode(
            x=alt.X("x:N", title=across, axis=alt.Axis(orient="top", labelAngle=angle, **plain), **words),
            y=alt.Y("y:N", title=down, axis=alt.Axis(**plain), **words),
            tooltip=tips(
                ("row:N", style.rows),
                ("column:N", style.columns),
                ("value:Q", style.unit, _EXACT),
                *([("note:N", style.note)] if style.note else []),
            ),
        )
    )


def plain_spec(chart: Any, title: str = "", **properties: Any) -> Spec:
    """The specification of an Altair chart for a :class:`~lightning_goldy.report.figures.Figure`.

    Args:
        chart: Over named data.
        title: Above the plot, for one among several.
        properties: Of the chart, such as its height; those that are None are left to the page.
    """
    known = {name: value for name, value in properties.items() if value is not None}
    spec: Spec = chart.properties(**known).to_dict(validate=False)
    for key in ("$schema", "config"):
        spec.pop(key, None)
    if title:
        spec["title"] = {"text": title, "fontSize": 12, "fontWeight": "normal", "offset": 6}
    return spec


@dataclass(frozen=True)
class Line:
    """One of the lines, or clouds, of a figure.

    Args:
        x: Ascending positions.
        y: Numbers; None or one that is not finite is a gap.
        low: Lower ends of intervals, drawn as a band.
        high: Upper ends of them.
        shape: What is drawn: the line (with its points where there are few), a dashed line, or points alone as circles,
            disks or crosses.
        notes: Further words for the tooltip of each point.
    """

    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    shape: Literal["line", "dashed", "points", "disks", "crosses"] = "line"
    notes: Sequence[str] = ()


# (steps, values) of one line.
Series: TypeAlias = "tuple[Sequence[float], Sequence[float | None]]"


@dataclass(frozen=True)
class Lines:
    """How lines look.

    Args:
        x: Title of the axis to the right.
        y: Title of the axis of the values.
        scale: ``"auto"`` is logarithmic when every value is positive and the largest at least 100 times the smallest.
        zero: Whether a linear axis begins at zero.
        whole: Whether positions are counts, which have no fractions.
        across: Whether positions are on a linear or a logarithmic axis.
        step: Whether a value holds until the next, so that the line has stairs.
        width: None follows the page.
        height: Of the plot.
        title: Above it, for one among several.
        legend: Whether lines are named beside them; by default where there are 2 to 30.
    """

    x: str = "optimizer step"
    y: str = ""
    scale: Literal["auto", "linear", "log"] = "auto"
    zero: bool = False
    whole: bool = True
    across: Literal["linear", "log"] = "linear"
    step: bool = False
    width: float | None = None
    height: float = 220
    title: str = ""
    legend: bool | None = None


def lines(series: Mapping[str, Line | Series], style: Lines | None = None, *, caption: str = "") -> Figure:
    """Lines over the steps, with bands where there are intervals.

    Args:
        series: Name to line; a tuple is (positions, values).
        style: How they look.
        caption: Sentences under the figure.

    Raises:
        ImportError: altair is not installed.

    Example:
        >>> figure = lines({"loss": ([1, 2, 3], [9.0, 0.3, 0.01])})
        >>> figure.data["points"]["y"], figure.bare()["layer"][0]["encoding"]["y"]["scale"]["type"]
        ([9.0, 0.3, 0.01], 'log')
    """
    style = Lines() if style is None else style
    drawn = {name: line if isinstance(line, Line) else Line(*line) for name, line in series.items()}
    # Vega warns of the extent of values of which there are none.
    bands = any(value is not None for line in drawn.values() for value in _gapped(line.low or ()))
    notes = any(line.notes for line in drawn.values())
    points = _line_points(drawn, bands, notes)
    few = max((len(line.x) for line in drawn.values()), default=0) <= 40
    shapes = tuple((name, line.shape) for name, line in drawn.items() if line.shape != "line")
    chart = _lines_chart(_settled(style, points, len(drawn)), bands, notes, few, shapes)
    return Figure(chart, {"points": points}, caption)


def _line_points(drawn: Mapping[str, Line], bands: bool, notes: bool) -> dict[str, list[Any]]:
    points: dict[str, list[Any]] = {name: [] for name in ("x", "y", "line")}
    points |= {name: [] for name, has in (("low", bands), ("high", bands), ("note", notes)) if has}
    for name, line in drawn.items():
        count = len(line.x)
        whole = all(isinstance(x, Integral) for x in line.x)
        points["x"] += [int(x) for x in line.x] if whole else rounded(line.x, 9)
        points["y"] += _gapped(line.y)
        points["line"] += [name] * count
        if bands:
            points["low"] += _gapped(line.low or [None] * count)
            points["high"] += _gapped(line.high or [None] * count)
        if notes:
            points["note"] += list(line.notes) or [""] * count
    return points


def _gapped(values: Iterable[float | None]) -> list[float | None]:
    # Nine digits: a line may be about differences of numbers that are far from zero, as log-volumes are.
    gapped: list[float | None] = rounded([math.nan if value is None else value for value in values], 9)
    return gapped


def _settled(style: Lines, points: Mapping[str, Sequence[Any]], count: int) -> Lines:
    values = [value for name in ("y", "low", "high") for value in points.get(name, ()) if value is not None]
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = style.scale
    if scale == "auto":
        scale = "log" if low > 0 and high >= 100 * low else "linear"
    # Around a line that never moves Vega opens an axis of its own, however small the number.
    still = scale == "linear" and high != 0 and high - low <= 1e-6 * max(abs(low), abs(high))
    legend = 2 <= count <= 30 if style.legend is None else style.legend
    return replace(style, scale=scale, zero=style.zero or still, legend=legend)


@functools.lru_cache(maxsize=256)
def _lines_chart(style: Lines, bands: bool, notes: bool, few: bool, shapes: tuple[tuple[str, str], ...]) -> Spec:
    alt = require("altair")
    base = _lines_base(style, bands, notes)
    layers = [base.mark_area(opacity=0.2, line=False).encode(y="low:Q", y2="high:Q")] if bands else []
    named = dict(shapes)
    for shape in dict.fromkeys(["line", *named.values()]):
        names = [name for name, other in shapes if other == shape]
        test: Any = alt.FieldOneOfPredicate(field="line", oneOf=names)
        if shape == "line":
            test = {"not": alt.FieldOneOfPredicate(field="line", oneOf=list(named))}
        layers.append(_marked(base.transform_filter(test) if named else base, shape, style, few))
    if not few:
        # Somewhere to point at: a line without points answers nowhere else.
        layers.append(base.mark_point(opacity=0, size=30))
    return plain_spec(alt.layer(*layers), style.title, height=style.height, width=style.width)


def _lines_base(style: Lines, bands: bool, notes: bool) -> Any:
    alt = require("altair")
    log = style.scale == "log"
    scale = alt.Scale(type="log", nice=False, padding=6) if log else alt.Scale(type="linear", zero=style.zero)
    # Vega places ticks between two counts that are all there are, and would round their names.
    named = "datum.value === floor(datum.value) ? datum.label : ''"
    whole = {"tickMinStep": 1, "format": ",d", "labelExpr": named} if style.whole else {"format": _TICKS}
    across = style.across == "log"
    whole |= {"labelExpr": _ONE_TWO_FIVE} if across else {}
    legend = alt.Legend(title=None, orient="top", columns=2, labelLimit=180, symbolOpacity=1) if style.legend else None
    told = [("line:N", "line"), ("x:Q", style.x or "at", "," if style.whole else _EXACT)]
    told += [("y:Q", style.y or "value", _EXACT), *((f"{end}:Q", end, _EXACT) for end in ("low", "high") if bands)]
    told += [("note:N", "note")] if notes else []
    places: dict[str, Any] = {"type": "log"} if across else {"zero": False}
    places["nice"] = False
    # The last label is drawn to the left of its tick, and would run into the one before it.
    onwards = alt.Axis(grid=False, labelOverlap="greedy" if across else "parity", labelSeparation=8, **whole)
    upwards = alt.Axis(format=_TICKS, tickCount=6, gridOpacity=_FAINT[log])
    return alt.Chart(alt.NamedData("points")).encode(
        x=alt.X("x:Q", title=style.x or None, axis=onwards, scale=alt.Scale(**places)),
        y=alt.Y("y:Q", title=style.y or None, scale=scale, axis=upwards),
        color=alt.Color("line:N", sort=None, legend=legend),
        tooltip=tips(*told),
    )


def _marked(part: Any, shape: str, style: Lines, few: bool) -> Any:
    if shape in ("points", "disks", "crosses"):
        symbol = "cross" if shape == "crosses" else "circle"
        return part.mark_point(shape=symbol, filled=shape != "points", size=34, opacity=1)
    stairs = {"interpolate": "step-after"} if style.step else {}
    dash = {"strokeDash": [5, 4]} if shape == "dashed" else {}
    # Few points are measurements, which a bare line would hide.
    marker = {"filled": True, "size": 22} if few and shape == "line" and not style.step else False
    return part.mark_line(strokeWidth=1.8, point=marker, **dash, **stairs)


@dataclass(frozen=True)
class Bars:
    """How bars look.

    Args:
        unit: Title of the axis of the numbers.
        rows: What a bar is, for the tooltips.
        mark: A number at which a dotted rule stands, for example that of chance.
        scale: ``"auto"`` is logarithmic when no number is negative and the largest is over 30 times the smallest
            positive, the mark among them. Bars then begin at the mark, or at 1, and zeros have none.
        colour: Place in the palette, from 0.
        width: None follows the page.
        bar: Height of a bar with its gap.
        labels: Whether the bars are named; one among several may leave it to its neighbour.
        title: Above them, for some among several.
    """

    unit: str
    rows: str = "block"
    mark: float | None = None
    scale: Literal["auto", "linear", "log"] = "linear"
    colour: int = 0
    width: float | None = None
    bar: float = 18
    labels: bool = True
    title: str = ""


def bars(values: Mapping[str, float | None], style: Bars, *, caption: str = "") -> Figure:
    """Horizontal bars from top to bottom.

    Args:
        values: Label to number; None has no bar.
        style: How they look.
        caption: Sentences under the figure.

    Raises:
        ImportError: altair is not installed.

    Example:
        >>> bars({"h.0": 2.0, "h.1": None}, Bars("stable rank")).data["bars"]["value"]
        [2.0, None]
    """
    numbers = _gapped(values.values())
    if style.scale == "auto":
        known = [number for number in (*numbers, style.mark) if number]
        decades = bool(known) and min(known) > 0 and max(known) > 30 * min(known)
        style = replace(style, scale="log" if decades else "linear")
    return Figure(_bars_chart(style), {"bars": {"label": list(values), "value": numbers}}, caption)


@functools.lru_cache(maxsize=64)
def _bars_chart(style: Bars) -> Spec:
    alt = require("altair")
    base = alt.Chart(alt.NamedData("bars"))
    axis = alt.Axis(labels=style.labels, ticks=False, domain=False)
    log = style.scale == "log"
    spread = {"scale": alt.Scale(type="log", nice=False)} if log else {}
    onwards = alt.Axis(format=_TICKS, tickCount=5, gridOpacity=_FAINT[log], labelOverlap="greedy", labelSeparation=8)
    # A logarithm has no zero for bars to begin at. A bar of no length keeps its row, so that neighbours line up.
    start = (1.0 if style.mark is None else style.mark) if log else 0.0
    known = "datum.value > 0" if log else "isValid(datum.value)"
    begin = {"x2": alt.datum(start)} if log else {}
    marks = (
        base.transform_calculate(end=f"{known} ? datum.value : {start}")
        .mark_bar()
        .encode(
            x=alt.X("end:Q", title=style.unit, axis=onwards, **spread),
            y=alt.Y("label:N", sort=None, title=None, axis=axis),
            **begin,
            color=_palette_colour(style.colour),
            tooltip=tips(("label:N", style.rows), ("value:Q", style.unit, _EXACT)),
        )
    )
    layers = [marks]
    if style.mark is not None:
        rule = alt.Chart(alt.InlineData([{}])).mark_rule(strokeDash=[2, 3])
        layers.append(rule.encode(x=alt.datum(style.mark, type="quantitative")))
    return plain_spec(alt.layer(*layers), style.title, height=alt.Step(style.bar), width=style.width)


def _palette_colour(place: int) -> Any:
    """The colour at a place of the theme's palette."""
    alt = require("altair")
    return alt.ColorDatum(str(place), type="nominal", legend=None, scale=alt.Scale(domain=[str(i) for i in range(8)]))


@dataclass(frozen=True)
class Histogram:
    """How a histogram looks.

    Args:
        x: What was counted by, under the bars.
        y: What was counted.
        log: Whether the counts are on a logarithmic axis.
        scale: Name of the ranges of the axes. Panels that state the same one share them, and so do all steps.
        width: None follows the page.
        height: Of the plot.
        title: Above it, for one among several.
    """

    x: str
    y: str = "elements"
    log: bool = True
    scale: str = "bins"
    width: float | None = None
    height: float = 240
    title: str = ""


def histogram(edges: ArrayLike, counts: ArrayLike, style: Histogram, *, caption: str = "") -> Figure:
    """Bars of counts between edges.

    Args:
        edges: [bins + 1], ascending.
        counts: [bins]
        style: How it looks.
        caption: Sentences under the figure.

    Raises:
        ValueError: There is not one edge more than counts.
        ImportError: altair is not installed.

    Example:
        >>> histogram([-3, -2, -1], [4, 1], Histogram("log10 |Delta|")).data["bins"]["high"]
        [-2.0, -1.0]
    """
    ends, sizes = rounded(edges), np.asarray(counts).tolist()
    if len(ends) != len(sizes) + 1:
        raise ValueError(f"a histogram needs one edge more than counts, got {len(ends)} edges and {len(sizes)} counts")
    bins = {"low": ends[:-1], "high": ends[1:], "count": sizes}
    # A bin with one element would have no height on a logarithmic axis that starts at one.
    least, most = (0.5, 2 * max(sizes, default=0)) if style.log else (0, max(sizes, default=0))
    filled = [place for place, size in enumerate(sizes) if size] or range(len(sizes))
    across = (ends[min(filled)], ends[max(filled) + 1]) if sizes else (0.0, 1.0)
    ranges = {style.scale: across, f"{style.scale}_counts": (least, max(most, 1))}
    return Figure(_histogram_chart(style), {"bins": bins}, caption, ranges=ranges)


@functools.lru_cache(maxsize=64)
def _histogram_chart(style: Histogram) -> Spec:
    alt = require("altair")
    scale = alt.Scale(type="log" if style.log else "linear", domain=bounds(f"{style.scale}_counts"), nice=False)
    across = alt.Scale(domain=bounds(style.scale), nice=False)
    upwards = alt.Axis(format="~s", tickCount=6, gridOpacity=_FAINT[style.log])
    chart = (
        alt.Chart(alt.NamedData("bins"))
        .transform_filter("datum.count > 0")
        .transform_calculate(floor=f"{style.scale}_counts_low")
        .mark_bar(binSpacing=0)
        .encode(
            x=alt.X("low:Q", title=style.x, scale=across, axis=alt.Axis(grid=False)),
            x2="high:Q",
            y=alt.Y("count:Q", title=style.y, scale=scale, axis=upwards),
            y2="floor:Q",
            color=_palette_colour(0),
            tooltip=tips(("low:Q", "from", _EXACT), ("high:Q", "to", _EXACT), ("count:Q", style.y, ",")),
        )
    )
    return plain_spec(chart, style.title, height=style.height, width=style.width)


@dataclass(frozen=True)
class Scatter:
    """How a cloud of points looks.

    Args:
        x: Title of the axis to the right.
        y: Title of the axis upwards.
        point: What a point is, for the tooltips.
        diagonal: Whether a line shows where both numbers are equal.
        names: Whether each point's name stands beside it.
        log: Whether both axes are logarithmic.
        size: Width and height of the plot.
        title: Above it, for one among several.
    """

    x: str
    y: str
    point: str = "point"
    diagonal: bool = False
    names: bool = False
    log: bool = False
    size: tuple[float, float] = (360, 320)
    title: str = ""


@dataclass(frozen=True)
class Points:
    """Points of one group, all drawn in one colour.

    Args:
        x: Numbers to the right.
        y: Numbers upwards; a point of which either is None or not finite is left out.
        names: One for each point.
    """

    x: Sequence[float | None]
    y: Sequence[float | None]
    names: Sequence[str] = ()


def scatter(groups: Mapping[str, Points], style: Scatter, *, caption: str = "") -> Figure:
    """Points by two numbers.

    Args:
        groups: Name to points; the first lies on top, and one alone has no legend.
        style: How it looks.
        caption: Sentences under the figure.

    Raises:
        ImportError: altair is not installed.

    Example:
        >>> points = Points([1.0, 2.0], [1.5, float("nan")], ["a", "b"])
        >>> scatter({"all": points}, Scatter("predicted", "measured")).data["points"]["name"]
        ['a']
    """
    records = [
        (*rounded([x, y], 9), group, name)
        for group, points in groups.items()
        for x, y, name in zip(points.x, points.y, points.names or [""] * len(points.x), strict=True)
        if x is not None and y is not None and math.isfinite(x) and math.isfinite(y)
    ]
    table = columns_of(("x", "y", "group", "name"), records)
    both = [*table["x"], *table["y"]]
    ends = {"ends": {"end": [min(both), max(both)] if both else []}} if style.diagonal else {}
    named = any(table["name"])
    return Figure(_scatter_chart(style, len(groups) > 1, named), {"points": table, **ends}, caption)


@functools.lru_cache(maxsize=64)
def _scatter_chart(style: Scatter, grouped: bool, named: bool) -> Spec:
    alt = require("altair")
    scale = alt.Scale(type="log") if style.log else alt.Scale(zero=False)
    axis = alt.Axis(format=_TICKS, tickCount=6)
    x, y = ({"title": title, "scale": scale, "axis": axis} for title in (style.x, style.y))
    told: list[tuple[str, ...]] = [("name:N", style.point)] if named else []
    told += [("group:N", "group")] if grouped else []
    legend = alt.Legend(title=None, orient="top", columns=3) if grouped else None
    base = (
        alt.Chart(alt.NamedData("points"))
        .transform_window(place="row_number()")
        .encode(
            x=alt.X("x:Q", **x),
            y=alt.Y("y:Q", **y),
            color=alt.Color("group:N", sort=None, legend=legend),
            order=alt.Order("place:Q", sort="descending"),
            tooltip=tips(*told, ("x:Q", style.x, _EXACT), ("y:Q", style.y, _EXACT)),
        )
    )
    layers = [base.mark_point(filled=True, size=40, opacity=0.75)]
    if style.names:
        layers.append(base.mark_text(align="left", dx=6, fontSize=10).encode(text="name:N"))
    if style.diagonal:
        line = alt.Chart(alt.NamedData("ends")).mark_line(strokeDash=[4, 4], color="#888888", strokeWidth=1)
        layers.insert(0, line.encode(x=alt.X("end:Q", **x), y=alt.Y("end:Q", **y)))
    return plain_spec(alt.layer(*layers), style.title, width=style.size[0], height=style.size[1])


def arrange(figures: Iterable[Figure], *, columns: int = 1, width: float = 560, caption: str = "") -> Figure:
    """Several figures as one, from left to right and from top to bottom.

    Ranges of one name become one range. Each keeps its own axes and legend.

    Args:
        figures: At least one; their captions are dropped.
        columns: How many side by side.
        width: Of those that state no width, altogether.
        caption: Sentences under all.

    Raises:
        ValueError: There is none.

    Example:
        >>> pair = arrange([lines({"a": ([1], [2.0])}), lines({"b": ([1], [3.0])})], columns=2)
        >>> list(pair.data), len(pair.bare()["concat"])
        (['points_0', 'points_1'], 2)
    """
    parts: list[Spec] = []
    data: dict[str, Columns] = {}
    shown = list(figures)
    for place, figure in enumerate(shown):
        part = _renamed(copy.deepcopy(figure.bare()), f"_{place}")
        if is_single(part):
            part.setdefault("width", round(width / columns))
        parts.append(part)
        data |= {f"{name}_{place}": table for name, table in figure.data.items()}
    if not parts:
        raise ValueError("there is no figure to arrange")
    independent = {"scale": {"color": "independent"}, "legend": {"color": "independent"}}
    chart = {"concat": parts, "columns": columns, "resolve": independent, "spacing": 24}
    ranges = widest_ranges(shown)
    still = {name for name in ranges if all(name in figure.still for figure in shown if name in figure.ranges)}
    return Figure(chart, data, caption, ranges=ranges, still=frozenset(still))


def layered(
    figure: Figure, over: Iterable[Spec] = (), *, below: Iterable[Spec] = (), data: Mapping[str, Columns] | None = None
) -> Figure:
    """The figure with more layers, over and below its own.

    Args:
        figure: One plot with layers.
        over: Specifications of layers.
        below: Likewise.
        data: What they show, by name.
    """
    chart = copy.deepcopy(figure.bare())
    chart["layer"] = [*below, *chart["layer"], *over]
    return replace(figure, chart=chart, data={**figure.data, **(data or {})})


def _renamed(part: Any, suffix: str) -> Any:
    """Gives the data of a chart that becomes one of several names of its own."""
    if isinstance(part, list):
        return [_renamed(inner, suffix) for inner in part]
    if not isinstance(part, dict):
        return part
    result = {key: _renamed(value, suffix) for key, value in part.items()}
    data = result.get("data")
    if isinstance(data, dict) and set(data) == {"name"}:
        result["data"] = {"name": data["name"] + suffix}
    return result
