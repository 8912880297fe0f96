"""Basin volumes as plotly figures, for the HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_goldy.report.charts import plain, register_chart
from lightning_goldy.report.registry import Row, require
from lightning_goldy.report.volumes import (
    cutoff_caption,
    cutoff_curves,
    estimates,
    estimates_caption,
    trajectories,
    trajectory_caption,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# A curve and its line share one; legible on a light and on a dark page.
_COLOURS = ("#2a6fb0", "#c8871a", "#3a9a6b", "#b5489a", "#7a6bd1", "#c4453c")


@register_chart("basin_volume", "The volume over the run")
def chart_volume_trajectory(row: Row) -> Figure:
    """The log-volume over the run with its bootstrap intervals.

    Args:
        row: Of the analysis ``basin_volume``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> line = {"label": "clean", "steps": [0, 5], "log_volume": [-9.0, None], "interval_low": [-10.0, None]}
        >>> line |= {"interval_high": [-8.5, None], "sigma": [0.1, 0.1], "preconditioner": ["none", "none"]}
        >>> chart_volume_trajectory({"result": {"trajectory": [line]}}).data[0].y
        (-9.0, None)
    """
    traces = [
        _points(line.steps, line.values, (line.low, line.high), line.label, mode="lines+markers", x_name="step")
        for line in trajectories(row)
    ]
    return _figure(traces, "optimizer step", "log-volume, nats", trajectory_caption(row))


@register_chart("basin_volume", "What the volume rests on")
def chart_volume_estimates(row: Row) -> Figure:
    """Histogram of the directions' estimates relative to the log-volume that they give.

    Args:
        row: Of the analysis ``basin_volume``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> volume = {"label": "clean", "estimates": [-10.0, -12.0], "log_volume": -10.6, "effective_sample_size": 1.3}
        >>> sum(chart_volume_estimates({"result": {"volumes": [volume]}}).data[0].y)
        2
    """
    graph_objects = require("plotly.graph_objects")
    groups = estimates(row)
    offsets = [value for group in groups for value in group.offsets]
    edges = np.histogram_bin_edges(offsets, bins=max(20, math.isqrt(len(offsets)))) if offsets else np.array([0.0, 1.0])
    middles, widths = ((edges[1:] + edges[:-1]) / 2).tolist(), np.diff(edges).tolist()
    figure: Figure = require("plotly.subplots").make_subplots(
        len(groups), 1, shared_xaxes=True, shared_yaxes="all", vertical_spacing=0.3 / len(groups)
    )
    for index, group in enumerate(groups):
        trace = graph_objects.Bar(
            x=middles,
            y=np.histogram(group.offsets, bins=edges)[0].tolist(),
            width=widths,
            name=plain(group.label),
            marker={"color": _COLOURS[index % len(_COLOURS)], "line": {"width": 0}},
            hovertemplate=f"around %{{x:.4g}} nats<br>%{{y}} directions<extra>{plain(group.label)}</extra>",
        )
        figure.add_trace(trace, index + 1, 1)
    figure.update_layout(_layout("", "", estimates_caption(row), legend=len(groups) > 1), bargap=0)
    figure.update_layout(height=150 + 80 * len(groups))
    figure.update_xaxes(automargin=True, zeroline=False)
    figure.update_xaxes(title_text="estimate minus log-volume, nats", row=len(groups))
    figure.update_yaxes(automargin=True, zeroline=False, rangemode="tozero", tickformat="d", nticks=4)
    return figure


@register_chart("basin_volume", "The volume by cutoff")
def chart_volume_cutoffs(row: Row) -> Figure:
    """The log-volume against the cutoff with the fitted line; at one cutoff, the slope that its directions tell.

    Args:
        row: Of the analysis ``basin_volume``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> volume = {"split": "clean", "cutoff": 0.01, "log_volume": -9.0, "scaling_exponent": 2.0}
        >>> chart_volume_cutoffs({"result": {"volumes": [volume], "fits": []}}).layout.xaxis.type
        'log'
    """
    graph_objects = require("plotly.graph_objects")
    traces = []
    for index, curve in enumerate(cutoff_curves(row)):
        colour, group = _COLOURS[index % len(_COLOURS)], plain(curve.label)
        points = _points(
            curve.cutoffs, curve.values, (curve.low, curve.high), curve.label, mode="markers", x_name="cutoff"
        )
        points.update(legendgroup=group, marker={"color": colour})
        traces.append(points)
        if curve.line:
            x, y = zip(*curve.line, strict=True)
            style = {"dash": "dash", "width": 1, "color": colour}
            label = f"slope {curve.slope:.4g}"
            traces.append(graph_objects.Scatter(x=x, y=y, name=label, mode="lines", line=style, legendgroup=group))
    figure = _figure(traces, "cutoff, nats", "log-volume, nats", cutoff_caption(row))
    figure.update_xaxes(type="log", exponentformat="power")
    return figure


def _points(
    x: Sequence[float],
    values: Sequence[float],
    ends: tuple[Sequence[float], Sequence[float]],
    label: str,
    *,
    mode: str,
    x_name: str,
) -> Any:
    low, high = ends
    # A percentile interval of a log-mean-exp may leave out the value itself; null leaves a gap.
    up = [_reach(end - value) for value, end in zip(values, high, strict=True)]
    down = [_reach(value - end) for value, end in zip(values, low, strict=True)]
    return require("plotly.graph_objects").Scatter(
        x=list(x),
        y=[value if math.isfinite(value) else None for value in values],
        error_y={"type": "data", "symmetric": False, "array": up, "arrayminus": down, "width": 3, "thickness": 1.2},
        name=plain(label),
        mode=mode,
        line={"width": 2},
        hovertemplate=f"{x_name} %{{x}}<br>%{{y:.6g}} nats<extra>{plain(label)}</extra>",
    )


def _reach(length: float) -> float:
    return max(0.0, length) if math.isfinite(length) else 0.0


def _figure(traces: Sequence[Any], x_title: str, y_title: str, caption: str) -> Figure:
    layout = _layout(x_title, y_title, caption, legend=len(traces) > 1)
    figure: Figure = require("plotly.graph_objects").Figure(list(traces), layout)
    return figure


def _layout(x_title: str, y_title: str, caption: str, *, legend: bool) -> dict[str, Any]:
    return {
        "template": None,
        "height": 340,
        "margin": {"l": 8, "r": 8, "t": 28, "b": 8},
        "showlegend": legend,
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "xaxis": {"title": {"text": x_title}, "automargin": True, "zeroline": False},
        "yaxis": {"title": {"text": y_title}, "automargin": True, "zeroline": False},
        "meta": {"caption": caption},
    }
