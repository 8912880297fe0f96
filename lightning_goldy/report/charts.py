"""Rows of results as plotly figures, for the HTML page.

A figure states its caption in ``layout.meta["caption"]``; the page prints it as text under the chart.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
