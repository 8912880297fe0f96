"""Parameter distributions as matplotlib figures, for the loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_goldy.report.distributions import PANELS, by_block, distribution_caption
from lightning_goldy.report.plots import blank_figure, register_plot, write_heading
from lightning_goldy.report.registry import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#0072b2", "#d55e00", "#009e73")


@register_plot("parameter_distribution", "blocks")
def plot_parameter_distribution(row: Row) -> Figure:
    """Stable rank, alignment over chance and histogram drift of each block.

    Args:
        row: Of the analysis ``parameter_distribution``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> tensor = {"block": "h.0", "numel": 4, "stable_rank": 2.0, "alignment_over_chance": 3.0}
        >>> figure = plot_parameter_distribution({"step": 1, "result": {"tensors": [tensor]}})
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['stable rank', 'alignment over chance', 'histogram drift, nats']
    """
    columns = {column: by_block(row, column) for column in PANELS}
    blocks = list(columns["stable_rank"])
    figure = blank_figure(8.5, min(30.0, 1.8 + 0.26 * max(len(blocks), 3)))
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, colour, (column, label) in zip(panels, _COLOURS, PANELS.items(), strict=True):
        axes.barh(range(len(blocks)), [columns[column][block] for block in blocks], color=colour)
        axes.set_xlabel(label)
    panels[1].axvline(1.0, color="0.4", linewidth=0.8, linestyle=":")
    panels[0].set_yticks(range(len(blocks)), blocks, fontsize=7, parse_math=False)
    panels[0].invert_yaxis()
    write_heading(figure, f"Shape of the change, step {row['step']}", distribution_caption(row))
    return figure
