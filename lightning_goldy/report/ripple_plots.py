"""Ripple effects as matplotlib figures, for the loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_goldy.report.plots import blank_figure, register_plot, write_titles
from lightning_goldy.report.registry import Row
from lightning_goldy.report.ripples import PREDICTORS, identity, overall, ripple_caption, scatters

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart with every kind of colour vision (Okabe and Ito).
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "0.55", "#cc79a7", "#e69f00")
_CAPTION_COLUMNS = 120


@register_plot("ripple_effects", "prediction")
def plot_ripple_effects(row: Row) -> Figure:
    """Predicted against measured change of each piece by each edit, coloured by distance class.

    Args:
        row: Of the analysis ``ripple_effects``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> points = {"first_order": [0.5], "coupling": [0.4], "measured": [0.25], "class": ["near"]}
        >>> numbers = {"n": 1, "pearson": None, "spearman": None}
        >>> agreement = [{"predictor": p, "group": g, **numbers} for p in list(points)[:2] for g in ("all", "near")]
        >>> figure = plot_ripple_effects({"step": 3, "result": {"points": points, "agreement": agreement}})
        >>> figure.axes[0].get_legend().get_texts()[0].get_text()
        'near (n = 1)'
    """
    figure = blank_figure(9.5, 5.0)
    panels = figure.subplots(1, 2)
    for axes, predictor in zip(panels, PREDICTORS, strict=True):
        groups = scatters(row, predictor)
        # The far classes have the most points and would hide the near ones.
        for index, group in reversed(list(enumerate(groups))):
            style = {"s": 14, "alpha": 0.75, "linewidths": 0, "color": _COLOURS[index % len(_COLOURS)]}
            axes.scatter(group.predicted, group.measured, label=group.label, **style)
        ends = identity(groups)
        axes.plot(ends, ends, color="0.3", linewidth=0.8, linestyle="--", zorder=0)
        axes.set_xlabel(f"predicted change of log p, nats\n{overall(row, predictor)}", fontsize=8)
        axes.locator_params(nbins=6)
        handles, labels = axes.get_legend_handles_labels()
        legend = axes.legend(handles[::-1], labels[::-1], fontsize=7)
        for text in legend.get_texts():
            text.set_parse_math(False)
    panels[0].set_ylabel("measured change of log p, nats")
    title = f"Ripple effects, step {row['step']}" if row["step"] else "Ripple effects"
    write_titles(panels[0], title, ripple_caption(row), _CAPTION_COLUMNS)
    # The caption may reach over both panels; its height is in the title's distance.
    panels[0].texts[-1].set_in_layout(False)
    return figure
