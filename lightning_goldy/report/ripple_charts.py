"""Ripple effects as plotly figures, for the HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_goldy.report.charts import plain, register_chart
from lightning_goldy.report.registry import Row, require
from lightning_goldy.report.ripples import PREDICTORS, identity, overall, ripple_caption, scatters

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_COLOURS = ("#c8541a", "#2a6fb0", "#3a9a6b", "#8a8a8a", "#b5489a", "#c8871a")


@register_chart("ripple_effects", "Predicted and measured change")
def chart_ripple_effects(row: Row) -> Figure:
    """Predicted against measured change of each piece by each edit, coloured by distance class.

    Args:
        row: Of the analysis ``ripple_effects``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> points = {"first_order": [0.5], "coupling": [0.4], "measured": [0.25], "class": ["near"]}
        >>> numbers = {"n": 1, "pearson": None, "spearman": None}
        >>> agreement = [{"predictor": p, "group": g, **numbers} for p in list(points)[:2] for g in ("all", "near")]
        >>> chart_ripple_effects({"result": {"points": points, "agreement": agreement}}).data[0].name
        'near (n = 1)'
    """
    graph_objects = require("plotly.graph_objects")
    figure: Figure = require("plotly.subplots").make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.06)
    for column, predictor in enumerate(PREDICTORS, 1):
        groups = scatters(row, predictor)
        for index, group in reversed(list(enumerate(groups))):
            trace = graph_objects.Scatter(
                x=list(group.predicted),
                y=list(group.measured),
                mode="markers",
                name=plain(group.label),
                marker={"color": _COLOURS[index % len(_COLOURS)], "size": 6, "opacity": 0.75},
                legend="legend" if column == 1 else "legend2",
                legendrank=index,
                hovertemplate="predicted %{x:.4g}<br>measured %{y:.4g} nats<extra>" + plain(group.name) + "</extra>",
            )
            figure.add_trace(trace, 1, column)
        ends = identity(groups)
        line = {"type": "line", "line": {"dash": "dot", "width": 1, "color": "grey"}, "layer": "below"}
        figure.add_shape(**line, x0=ends[0], y0=ends[0], x1=ends[1], y1=ends[1], row=1, col=column)
        title = plain(overall(row, predictor)).replace("\n", "<br>")
        figure.update_xaxes(title_text=f"predicted, nats<br>{title}", automargin=True, zeroline=False, col=column)
    figure.update_yaxes(automargin=True, zeroline=False)
    figure.update_yaxes(title_text="measured change of log p, nats", col=1)
    legend = {"y": 1, "yanchor": "bottom", "font": {"size": 10}}
    figure.update_layout(
        template=None,
        height=460,
        margin={"l": 8, "r": 8, "t": 28, "b": 8},
        legend={**legend, "x": 0},
        legend2={**legend, "x": 0.53},
        meta={"caption": ripple_caption(row)},
    )
    return figure
