"""Explained changes as plotly figures, for the HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_goldy.report.charts import plain, register_chart
from lightning_goldy.report.explanations import survival, survival_caption
from lightning_goldy.report.registry import Row, require

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_COLOURS = ("#2a6fb0", "#c8871a")


@register_chart("explain_change", "What survives of the change")
def chart_explained_change(row: Row) -> Figure:
    """What survives of the change of loss and logits in each variant, in percent.

    Args:
        row: Of the analysis ``explain_change``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> row = {"result": {"variants": [{"variant": "both", "loss_share": 0.5, "logit_share": None}]}}
        >>> chart_explained_change(row).data[0].x
        (50.0,)
    """
    graph_objects = require("plotly.graph_objects")
    groups = survival(row)
    traces = [
        graph_objects.Bar(
            x=list(group.percent),
            y=[plain(label) for label in group.labels],
            name=group.name,
            orientation="h",
            marker={"color": colour},
            hovertemplate=f"%{{y}}<br>%{{x:.4g}} % of the {group.name}<extra></extra>",
        )
        for group, colour in zip(groups, _COLOURS, strict=False)
    ]
    layout = {
        "template": None,
        "height": 150 + 50 * len(groups[0].labels),
        "margin": {"l": 8, "r": 8, "t": 28, "b": 8},
        "barmode": "group",
        "showlegend": len(groups) > 1,
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "xaxis": {"title": {"text": "surviving, % of the change"}, "automargin": True},
        "yaxis": {"autorange": "reversed", "automargin": True},
        "shapes": [{"type": "line", "x0": 100, "x1": 100, "y0": 0, "y1": 1, "yref": "paper", "line": {"dash": "dot"}}],
        "meta": {"caption": survival_caption(row)},
    }
    figure: Figure = graph_objects.Figure(traces, layout)
    return figure
