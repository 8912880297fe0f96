"""Searches for reverse golden parameters as plotly figures, for the HTML page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_goldy.report.charts import plain, register_chart
from lightning_goldy.report.registry import Row, require
from lightning_goldy.report.reverse_golden_history import search_caption, search_history

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_GREEDY, _POOL, _KEPT = "#c8871a", "#3a9a6b", "#2a6fb0"
_LEVELS = ("#7a6bd1", "#b5489a", "#c4453c", "#888888")


@register_chart("reverse_golden_parameters", "The course of the search")
def chart_search_history(row: Row) -> Figure:
    """The divergence of what was tried and kept over the iterations, with the levels of the single shots.

    Args:
        row: Of the analysis ``reverse_golden_parameters``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> entry = {"iteration": 0, "size": 4, "pool": 5, "greedy_kl": 1.0, "pool_kl": None, "kl": 1.0}
        >>> result = {"history": [entry | {"accepted": False}], "kl_divergence": 0.9, "single_shots": {"taylor": 0.2}}
        >>> [trace.name for trace in chart_search_history({"result": result}).data]
        ['kept', 'greedy', 'pool', 'returned, evaluation samples', 'single shot by taylor']
    """
    history = search_history(row)
    pools = [
        f"pool of {pool:,} for {size:,}{', accepted' if accepted else ''}"
        for pool, size, accepted in zip(history.pools, history.sizes, history.accepted, strict=True)
    ]
    symbols = ["circle" if accepted else "circle-open" for accepted in history.accepted]
    traces = [
        _trace(history.iterations, history.kept, "kept", mode="lines", line={"width": 2, "color": _KEPT}),
        _trace(history.iterations, history.greedy, "greedy", marker={"symbol": "x", "size": 7, "color": _GREEDY}),
        _trace(history.iterations, history.pool, "pool", pools, marker={"symbol": symbols, "size": 7, "color": _POOL}),
    ]
    ends = [min(history.iterations, default=0), max(history.iterations, default=0)]
    for index, (label, level) in enumerate(history.levels.items()):
        line = {"width": 1, "dash": "dot" if index else "dash", "color": _LEVELS[index % len(_LEVELS)]}
        traces.append(_trace(ends, [level, level], plain(label), mode="lines", line=line))
    layout = {
        "template": None,
        "height": 340,
        "margin": {"l": 8, "r": 8, "t": 28, "b": 8},
        "showlegend": True,
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "xaxis": {"title": {"text": "iteration"}, "automargin": True, "zeroline": False, "tickformat": "d"},
        "yaxis": {"title": {"text": "divergence, nats"}, "automargin": True, "zeroline": False, "rangemode": "tozero"},
        "meta": {"caption": search_caption(row)},
    }
    figure: Figure = require("plotly.graph_objects").Figure(traces, layout)
    return figure


def _trace(
    x: Sequence[float],
    values: Sequence[float],
    name: str,
    more: Sequence[str] = (),
    mode: str = "markers",
    **style: Any,
) -> Any:
    return require("plotly.graph_objects").Scatter(
        x=list(x),
        y=[value if math.isfinite(value) else None for value in values],
        name=name,
        mode=mode,
        text=list(more) or None,
        hovertemplate=f"iteration %{{x}}<br>%{{y:.5g}} nats{'<br>%{text}' if more else ''}<extra>{name}</extra>",
        **style,
    )
