"""Knowledge coupling as plotly figures, for the HTML page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_goldy.report.charts import plain, register_chart
from lightning_goldy.report.coupling_plots import COLOURS
from lightning_goldy.report.couplings import (
    CouplingMap,
    coupling_histogram,
    coupling_map,
    histogram_caption,
    map_caption,
    quantity,
)
from lightning_goldy.report.registry import Row, require

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_MARGIN = {"l": 8, "r": 8, "t": 28, "b": 8}


@register_chart("knowledge_coupling", "Which pieces are coupled")
def chart_coupling_map(row: Row) -> Figure:
    """Heat map of the cosines in the order of the clusters, with a strip of categories.

    Args:
        row: Of the analysis ``knowledge_coupling``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> drawn = {"cells": [[1, 0.5], [0.5, 1]], "sizes": [1, 1], "categories": ["b", None], "n_pieces": 2}
        >>> chart_coupling_map({"result": {"heat_map": drawn}}).data[0].z
        ([1.0, 0.5], [0.5, 1.0])
    """
    found = coupling_map(row)
    count = len(found.cells)
    step = found.n_pieces / count
    places = ((np.arange(count) + 0.5) * step - 0.5).round(1).tolist()
    trace = require("plotly.graph_objects").Heatmap(
        x=places,
        y=places,
        z=found.cells.tolist(),
        coloraxis="coloraxis",
        hovertemplate="pieces %{y:.0f} and %{x:.0f}<br>%{z:.3f}<extra></extra>",
        xaxis="x2" if found.names else "x",
    )
    strip = [_strip(found, places)] if found.names else []
    figure: Figure = require("plotly.graph_objects").Figure([trace, *strip], _map_layout(row, found))
    return figure


@register_chart("knowledge_coupling", "How much is coupled")
def chart_coupling_distribution(row: Row) -> Figure:
    """Histogram of the cosines of all pairs, with the thresholds.

    Args:
        row: Of the analysis ``knowledge_coupling``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> drawn = {"edges": [-1, 0, 0.5, 1], "counts": [0, 4, 0]}
        >>> result = {"distribution": drawn, "thresholds": {"high": 0.4, "moderate": 0.1}}
        >>> chart_coupling_distribution({"result": result}).data[0].y
        (4,)
    """
    graph_objects = require("plotly.graph_objects")
    found = coupling_histogram(row)
    middles, widths = (found.edges[1:] + found.edges[:-1]) / 2, np.diff(found.edges)
    bars = graph_objects.Bar(
        x=middles.round(6).tolist(),
        y=found.counts.tolist(),
        width=widths.tolist(),
        marker_line_width=0,
        marker_color="#2a6fb0",
        hovertemplate="around %{x:.3f}<br>%{y:,} pairs<extra></extra>",
    )
    figure: Figure = graph_objects.Figure(bars)
    for place, label, colour in ((found.moderate, "moderate", "#c8871a"), (found.high, "high", "#c8541a")):
        figure.add_vline(place, line={"dash": "dash", "width": 1.5, "color": colour}, annotation_text=label)
    value_axis: dict[str, Any] = {"title": {"text": "pairs"}, "automargin": True}
    if found.counts.any():
        # A bin with one pair would have no height on a logarithmic axis that starts at one.
        extent = [math.log10(0.5), math.log10(2 * found.counts.max())]
        value_axis |= {"type": "log", "dtick": 1, "range": extent, "exponentformat": "power"}
    figure.update_layout(
        template=None,
        height=340,
        margin=_MARGIN,
        showlegend=False,
        bargap=0,
        xaxis={"title": {"text": quantity(row)}, "automargin": True, "zeroline": False},
        yaxis=value_axis,
        meta={"caption": histogram_caption(row)},
    )
    return figure


def _strip(found: CouplingMap, places: list[float]) -> Any:
    steps = len(found.names)
    # Each category has a band of one colour.
    scale = [
        (edge, COLOURS[place % len(COLOURS)]) for place in range(steps) for edge in (place / steps, (place + 1) / steps)
    ]
    return require("plotly.graph_objects").Heatmap(
        x=["category"],
        y=places,
        z=[[None if place < 0 else float(place)] for place in found.strip.tolist()],
        zmin=-0.5,
        zmax=steps - 0.5,
        colorscale=scale,
        showscale=False,
        customdata=[["" if place < 0 else plain(found.names[place])] for place in found.strip.tolist()],
        hovertemplate="piece %{y:.0f}<br>%{customdata}<extra></extra>",
    )


def _map_layout(row: Row, found: CouplingMap) -> dict[str, Any]:
    pieces = {"title": {"text": "piece, in the order of the clusters"}, "automargin": True, "showgrid": False}
    colours = {
        "colorscale": "RdBu",
        "reversescale": True,
        "cmin": -found.limit,
        "cmax": found.limit,
        "colorbar": {"title": {"text": quantity(row), "side": "right"}, "thickness": 14},
    }
    layout: dict[str, Any] = {
        "template": None,
        "height": 620,
        "margin": _MARGIN,
        "coloraxis": colours,
        "yaxis": {"autorange": "reversed", "automargin": True, "showgrid": False, "zeroline": False},
        "meta": {"caption": map_caption(row)},
    }
    if found.names:
        layout["xaxis"] = {"domain": [0, 0.03], "showticklabels": False, "showgrid": False}
        layout["xaxis2"] = {**pieces, "domain": [0.04, 1], "anchor": "y", "zeroline": False}
    else:
        layout["xaxis"] = {**pieces, "zeroline": False}
    return layout
