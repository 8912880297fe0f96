"""Explained changes as matplotlib figures, for the loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_goldy.report.explanations import survival, survival_caption
from lightning_goldy.report.formatting import format_cell
from lightning_goldy.report.plots import blank_figure, register_plot, write_titles
from lightning_goldy.report.registry import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart with every kind of colour vision (Okabe and Ito).
_COLOURS = ("#0072b2", "#e69f00")
_CAPTION_COLUMNS = 68


@register_plot("explain_change", "survival")
def plot_explained_change(row: Row) -> Figure:
    """What survives of the change of loss and logits in each variant, in percent.

    Args:
        row: Of the analysis ``explain_change``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> row = {"step": 3, "result": {"variants": [{"variant": "both", "loss_share": 0.5, "logit_share": 0.4}]}}
        >>> [float(bar.get_width()) for bar in plot_explained_change(row).axes[0].patches]
        [50.0, 40.0]
    """
    groups = survival(row)
    labels = groups[0].labels
    figure = blank_figure(7.0, 1.8 + 0.55 * len(labels))
    axes = figure.add_subplot()
    height = 0.8 / len(groups)
    for index, group in enumerate(groups):
        places = [place - 0.4 + (index + 0.5) * height for place in range(len(labels))]
        widths = [0.0 if value is None else value for value in group.percent]
        axes.barh(places, widths, height=0.9 * height, color=_COLOURS[index], label=group.name)
        for place, value in zip(places, group.percent, strict=True):
            text = format_cell(float("nan") if value is None else value)
            axes.annotate(text, (value or 0.0, place), (3, 0), textcoords="offset points", fontsize=7, va="center")
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.invert_yaxis()
    axes.axvline(0.0, color="0.6", linewidth=0.8)
    axes.axvline(100.0, color="0.4", linewidth=1, linestyle=":")
    axes.set_xlabel("surviving, % of the change")
    axes.margins(x=0.1)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    write_titles(axes, f"What the change needed, step {row['step']}", survival_caption(row), _CAPTION_COLUMNS)
    return figure
