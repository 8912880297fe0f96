"""Parameter distributions as plotly figures, for the HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_goldy.report.charts import plain, register_chart
from lightning_goldy.report.distributions import PANELS, by_block, distribution_caption
from lightning_goldy.report.registry import Row, require

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_COLOURS = ("#2a6fb0", "#c8871a", "#3a9a6b")


@register_chart("parameter_distribution", "Shape of the change by block")
def chart_parameter_distribution(row: Row) -> Figure:
    """Stable rank, alignment over chance and histogram drift of each block.

    Args:
        row: Of the analysis ``parameter_distribution``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> tensor = {"block": "h.0", "numel": 4, "stable_rank": 2.0, "alignment_over_chance": 3.0}
        >>> chart_parameter_distribution({"result": {"tensors": [tensor]}}).data[0].x
        (2.0,)
    """
    graph_objects = require("plotly.graph_objects")
    figure: Figure = require("plotly.subplots").make_subplots(
        1, len(PANELS), shared_yaxes=True, horizontal_spacing=0.04
    )
    for index, (column, label) in enumerate(PANELS.items(), 1):
        values = by_block(row, column)
        trace = graph_objects.Bar(
            x=list(values.values()),
            y=[plain(block) for block in values],
            orientation="h",
            marker={"color": _COLOURS[index - 1]},
            showlegend=False,
            hovertemplate=f"%{{y}}<br>{label} %{{x:.4g}}<extra></extra>",
        )
        figure.add_trace(trace, 1, index)
        figure.update_xaxes(title_text=label, zeroline=False, automargin=True, row=1, col=index)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(
        template=None,
        height=160 + 22 * max(len(by_block(row, "stable_rank")), 3),
        margin={"l": 8, "r": 8, "t": 28, "b": 8},
        meta={"caption": distribution_caption(row)},
    )
    return figure
