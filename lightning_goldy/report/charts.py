"""Rows of results as plotly figures, for the HTML page.

A figure states its caption in ``layout.meta["caption"]``; the page prints it as text under the chart.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_goldy.report.captions import change_caption, golden_caption, histogram_caption
from lightning_goldy.report.formatting import format_cell
from lightning_goldy.report.grids import BlockGrid, change_histogram, golden_density, relative_change
from lightning_goldy.report.registry import FigureRegistry, Row, require

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

CHARTS: FigureRegistry[Figure] = FigureRegistry("plotly")

# (steps, values) of one line.
Series = tuple[Sequence[float], Sequence["float | None"]]

_MARGIN = {"l": 8, "r": 8, "t": 28, "b": 8}


def register_chart(analysis: str, name: str) -> Callable[[Callable[[Row], Figure]], Callable[[Row], Figure]]:
    """Decorator that makes a function of a row one of the analysis's figures on the report page.

    Args:
        analysis: The ``analysis`` field of the rows that it draws.
        name: Heading of the figure on the page, unique within the analysis.

    Raises:
        ValueError: The analysis has a figure of that name.

    Example:
        >>> @register_chart("golden_snapshot", "Sizes of the changes")
        ... def again(row): ...
        Traceback (most recent call last):
        ValueError: analysis 'golden_snapshot' has a plotly figure 'Sizes of the changes' already: ...
    """
    return CHARTS.register(analysis, name)


def plain(text: str) -> str:
    """Text that plotly shows as it is; plotly reads labels as a small subset of HTML.

    Example:
        >>> plain("<b>h.0</b>")
        '&lt;b&gt;h.0&lt;/b&gt;'
    """
    # plotly knows no entity for quotes and would print it; text between dollar signs would go to MathJax.
    return html.escape(text, quote=False).replace("$", "&#36;")


@register_chart("golden_parameters", "Where the golden parameters are")
def chart_golden_parameters(row: Row) -> Figure:
    """Heat map of the golden density by block and tensor kind, in percent.

    Args:
        row: Of the analysis ``golden_parameters``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> tensors = [{"name": "h.0.w", "block": "h.0", "kind": "mlp", "numel": 8, "golden": 2}]
        >>> chart_golden_parameters({"metrics": {}, "result": {"tensors": tensors}}).data[0].z
        ([25.0],)
    """
    return heat_map(golden_density(row), golden_caption(row), "golden, %", "Cividis")


@register_chart("golden_snapshot", "Where the weights changed")
def chart_weight_changes(row: Row) -> Figure:
    """Heat map of ||Delta|| / ||theta_0|| by block and tensor kind, in percent.

    Args:
        row: Of the analysis ``golden_snapshot``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> tensors = [{"name": "h.0.w", "block": "h.0", "kind": "mlp", "base_norm": 2.0, "delta_norm": 0.5}]
        >>> chart_weight_changes({"metrics": {}, "result": {"tensors": tensors}}).data[0].z
        ([25.0],)
    """
    return heat_map(relative_change(row), change_caption(row), "change, %", "Viridis")


@register_chart("golden_snapshot", "Sizes of the changes")
def chart_change_histogram(row: Row) -> Figure:
    """Histogram of log10 |Delta| over the elements.

    Args:
        row: Of the analysis ``golden_snapshot``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> histogram = {"edges": [-3, -2, -1], "counts": [4, 1], "zero": 5}
        >>> chart_change_histogram({"result": {"histogram": histogram}}).data[0].y
        (4, 1)
    """
    graph_objects = require("plotly.graph_objects")
    histogram = change_histogram(row)
    middles, widths = (histogram.edges[1:] + histogram.edges[:-1]) / 2, np.diff(histogram.edges)
    hover = "log10 |Delta| around %{x:.2f}<br>%{y:,} elements<extra></extra>"
    bars = graph_objects.Bar(
        x=middles.tolist(), y=histogram.counts.tolist(), width=widths.tolist(), hovertemplate=hover, marker_line_width=0
    )
    value_axis: dict[str, Any] = {"title": {"text": "elements"}, "automargin": True}
    if histogram.counts.any():
        # A bin with one element would have no height on a logarithmic axis that starts at one.
        extent = [math.log10(0.5), math.log10(2 * histogram.counts.max())]
        value_axis |= {"type": "log", "dtick": 1, "range": extent, "exponentformat": "power"}
    layout = {
        "template": None,
        "height": 320,
        "margin": _MARGIN,
        "bargap": 0,
        "xaxis": {"title": {"text": "log10 |Delta|"}, "automargin": True, "zeroline": False},
        "yaxis": value_axis,
        "meta": {"caption": histogram_caption(row)},
    }
    figure: Figure = graph_objects.Figure(bars, layout)
    return figure


def heat_map(grid: BlockGrid, caption: str, unit: str, colours: str) -> Figure:
    """A heat map with a number in every cell; cells without a number stay empty.

    Args:
        grid: The numbers.
        caption: Sentence under the chart.
        unit: Title of the colour bar.
        colours: One of plotly's colour scales.

    Example:
        >>> figure = heat_map(BlockGrid(("h.0",), ("mlp", "norm"), np.array([[2.0, np.nan]])), "", "%", "Viridis")
        >>> figure.data[0].z, figure.data[0].text
        (([2.0, None],), (['2', '–'],))
    """
    graph_objects = require("plotly.graph_objects")
    cells = [[float(f"{value:.6g}") if math.isfinite(value) else None for value in line] for line in grid.values]
    text = [[format_cell(value) for value in line] for line in grid.values]
    trace = graph_objects.Heatmap(
        z=cells,
        x=[plain(kind) for kind in grid.kinds],
        y=[plain(block) for block in grid.blocks],
        text=text,
        texttemplate="%{text}",
        hovertemplate=f"%{{y}}, %{{x}}<br>%{{z:.4g}} ({plain(unit)})<extra></extra>",
        hoverongaps=False,
        xgap=2,
        ygap=2,
        coloraxis="coloraxis",
    )
    layout = {
        "template": None,
        "height": 110 + 26 * len(grid.blocks),
        "margin": _MARGIN,
        "xaxis": {"type": "category", "side": "top", "showgrid": False, "automargin": True},
        "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False, "automargin": True, "dtick": 1},
        "coloraxis": {
            "colorscale": colours,
            "cmin": 0,
            "cmax": grid.largest,
            "colorbar": {"title": {"text": plain(unit)}, "thickness": 12, "outlinewidth": 0, "len": 1},
        },
        "meta": {"caption": caption},
    }
    figure: Figure = graph_objects.Figure(trace, layout)
    return figure


def line_chart(series: Mapping[str, Series], *, x_title: str = "step") -> Figure:
    """Lines over the training steps.

    The value axis is logarithmic when every value is positive and the largest is at least 100 times the smallest.

    Args:
        series: Label of a line to its steps and values; None leaves a gap.
        x_title: Title of the horizontal axis.

    Raises:
        ImportError: plotly is not installed.

    Example:
        >>> line_chart({"loss": ([1, 2, 3], [9.0, 0.3, 0.01])}).layout.yaxis.type
        'log'
    """
    graph_objects = require("plotly.graph_objects")
    traces: list[Any] = []
    for label, (steps, values) in series.items():
        finite = [value if value is not None and math.isfinite(value) else None for value in values]
        # Few points are measurements, which a bare line would hide.
        mode = "lines+markers" if len(steps) <= 40 else "lines"
        hover = f"step %{{x}}<br>%{{y:.5g}}<extra>{plain(label)}</extra>"
        trace = graph_objects.Scatter(
            x=list(steps), y=finite, name=plain(label), mode=mode, line={"width": 2}, hovertemplate=hover
        )
        traces.append(trace)
    layout = {
        "template": None,
        "height": 260,
        "margin": _MARGIN,
        "showlegend": 1 < len(series) <= 10,
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "xaxis": {"title": {"text": x_title}, "automargin": True, "zeroline": False},
        "yaxis": {"automargin": True, "zeroline": False, **_value_axis(series)},
    }
    figure: Figure = graph_objects.Figure(traces, layout)
    return figure


def _value_axis(series: Mapping[str, Series]) -> dict[str, Any]:
    drawn = [value for _, values in series.values() for value in values if value is not None and math.isfinite(value)]
    low, high = min(drawn, default=0.0), max(drawn, default=0.0)
    if low > 0 and high >= 100 * low:
        decades = math.log10(high / low)
        return {"type": "log", "exponentformat": "power", "dtick": math.ceil(decades / 5)}
    if high - low <= 1e-6 * max(abs(low), abs(high)) and high != 0:
        # Around a line that never moves plotly opens an axis of one unit, however small the number.
        return {"type": "linear", "range": sorted((0.0, 2 * high)), "exponentformat": "power"}
    return {"type": "linear", "exponentformat": "power"}
