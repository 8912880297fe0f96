"""A finetune's knowledge drift as matplotlib figures, for the loggers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lightning_goldy.report.coupling_drifts import (
    CLASSES,
    drift_lines,
    drift_map,
    drift_scatters,
    identity,
    lines_caption,
    map_caption,
    prediction_caption,
)
from lightning_goldy.report.coupling_plots import plot_coupling_distribution, plot_coupling_map
from lightning_goldy.report.plots import blank_figure, register_plot, write_heading, write_titles
from lightning_goldy.report.registry import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart with every kind of colour vision (Okabe and Ito).
_COLOURS = dict(zip(CLASSES, ("#d55e00", "#e69f00", "#0072b2"), strict=True))
_CAPTION_COLUMNS = 95


@register_plot("coupling_drift", "prediction")
def plot_drift_prediction(row: Row) -> Figure:
    """Predicted against measured change of each piece since the base, coloured by class.

    Args:
        row: Of the analysis ``coupling_drift``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> points = {"predicted": [0.5], "measured": [0.25], "class": ["edited"]}
        >>> numbers = {"n": 1, "pearson": None, "spearman": None, "slope": None}
        >>> result = {"points": points, "agreement": [{"group": name, **numbers} for name in ("all", "edited")]}
        >>> plot_drift_prediction({"step": 3, "result": result}).axes[0].get_legend().get_texts()[0].get_text()
        'edited (n = 1)'
    """
    groups = drift_scatters(row)
    figure = blank_figure(6.4, 5.4)
    axes = figure.add_subplot()
    # Untouched facts are many and would hide the edited ones.
    for group in reversed(groups):
        style: dict[str, Any] = {"s": 18, "alpha": 0.75, "linewidths": 0, "color": _COLOURS.get(group.name, "0.4")}
        axes.scatter(group.predicted, group.measured, label=group.label, **style)
    ends = identity(groups)
    axes.plot(ends, ends, color="0.3", linewidth=0.8, linestyle="--", zorder=0)
    for draw in (axes.axhline, axes.axvline):
        draw(0.0, color="0.85", linewidth=0.8, zorder=0)
    axes.set_xlabel("predicted change of log p, g . Delta, nats")
    axes.set_ylabel("measured change of log p, nats")
    handles, labels = axes.get_legend_handles_labels()
    for text in axes.legend(handles[::-1], labels[::-1], fontsize=7).get_texts():
        text.set_parse_math(False)
    write_titles(axes, f"What the finetune moved, step {row['step']:,}", prediction_caption(row), _CAPTION_COLUMNS)
    return figure


@register_plot("coupling_drift", "drift")
def plot_drift_lines(row: Row) -> Figure:
    """Drift of the cosines over the run, and mean changes of log p by class beside what was predicted.

    Args:
        row: Of the analysis ``coupling_drift``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> lines = {"steps": [4], "mean_absolute_difference": [0.1], "correlation": [0.9]}
        >>> change = {"untouched": [0.2]}
        >>> lines |= {"change": change, "predicted_change": change}
        >>> len(plot_drift_lines({"step": 4, "result": {"trajectory": lines}}).axes)
        3
    """
    found = drift_lines(row)
    figure = blank_figure(7.0, 5.6)
    above, below = figure.subplots(2, 1, sharex=True)
    twin = above.twinx()
    marks = {"marker": "o", "markersize": 3}
    above.plot(found.steps, _gaps(found.difference), color="#0072b2", label="mean absolute difference", **marks)
    twin.plot(found.steps, _gaps(found.correlation), color="#009e73", label="correlation", **marks)
    above.set_ylabel("difference of cosines", color="#0072b2")
    twin.set_ylabel("correlation", color="#009e73")
    for name, line in found.measured.items():
        colour = _COLOURS.get(name, "0.4")
        below.plot(found.steps, _gaps(line), color=colour, label=name, **marks)
        below.plot(found.steps, _gaps(found.predicted.get(name, ())), color=colour, linestyle="--", marker=".")
    below.axhline(0.0, color="0.6", linewidth=0.8)
    below.set_ylabel("mean change of log p, nats")
    below.set_xlabel("optimizer step")
    if found.measured:
        for text in below.legend(fontsize=8).get_texts():
            text.set_parse_math(False)
    if len(found.steps) == 1:
        # One analysis alone: an axis around it would tell nothing.
        below.set_xticks(found.steps)
    write_titles(above, f"Drift of the coupling, up to step {row['step']:,}", lines_caption(row), _CAPTION_COLUMNS)
    return figure


@register_plot("coupling_drift", "difference")
def plot_drift_map(row: Row) -> Figure:
    """Heat map of the differences of the cosines from those of the base, of the pieces that drifted most.

    Args:
        row: Of the analysis ``coupling_drift``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> drifted = {"ids": ["a", "b"], "classes": ["edited", "untouched"], "difference": [[0, 0.5], [0.5, 0]]}
        >>> plot_drift_map({"step": 3, "result": {"drifted": drifted}}).axes[0].images[0].get_clim()
        (-0.5, 0.5)
    """
    found = drift_map(row)
    size = max(4.5, 2.6 + 0.16 * len(found.names))
    figure = blank_figure(size + 1.2, size)
    axes = figure.add_subplot()
    image = axes.imshow(found.cells, cmap="RdBu_r", vmin=-found.limit, vmax=found.limit, interpolation="nearest")
    places = range(len(found.names))
    axes.set_yticks(places, found.names, fontsize=7, parse_math=False)
    axes.set_xticks(places, found.names, fontsize=7, rotation=90, parse_math=False)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="difference of cosines", shrink=0.7, aspect=30)
    write_heading(figure, f"Where the coupling moved, step {row['step']:,}", map_caption(row))
    return figure


register_plot("coupling_drift", "heat_map")(plot_coupling_map)
register_plot("coupling_drift", "distribution")(plot_coupling_distribution)


def _gaps(line: Sequence[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in line]
