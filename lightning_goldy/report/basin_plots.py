"""Basin volumes as matplotlib figures, for the loggers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_goldy.report.formatting import format_number
from lightning_goldy.report.plots import blank_figure, register_plot, write_titles
from lightning_goldy.report.registry import Row
from lightning_goldy.report.volumes import (
    cutoff_caption,
    cutoff_curves,
    estimates,
    estimates_caption,
    trajectories,
    trajectory_caption,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart with every kind of colour vision (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_CAPTION_COLUMNS = 95


@register_plot("basin_volume", "trajectory")
def plot_volume_trajectory(row: Row) -> Figure:
    """The log-volume over the run with its bootstrap intervals, one line per split and cutoff.

    Args:
        row: Of the analysis ``basin_volume``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> line = {"label": "clean", "steps": [0, 5], "log_volume": [-9.0, -7.0], "interval_low": [-10.0, -8.0]}
        >>> line |= {"interval_high": [-8.5, -6.0], "sigma": [0.1, 0.1], "preconditioner": ["none", "none"]}
        >>> figure = plot_volume_trajectory({"step": 5, "result": {"trajectory": [line]}})
        >>> figure.axes[0].get_ylabel()
        'log-volume, nats'
    """
    figure = blank_figure(7.0, 4.6)
    axes = figure.add_subplot()
    for index, line in enumerate(trajectories(row)):
        _with_intervals(axes, line.steps, line.values, (line.low, line.high), line.label, index)
    axes.set_xlabel("optimizer step")
    _finish(figure, axes)
    write_titles(axes, f"Basin volume, up to step {row['step']}", trajectory_caption(row), _CAPTION_COLUMNS)
    return figure


@register_plot("basin_volume", "estimates")
def plot_volume_estimates(row: Row) -> Figure:
    """Histogram of the directions' estimates relative to the log-volume that they give.

    Args:
        row: Of the analysis ``basin_volume``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> volume = {"label": "clean", "estimates": [-10.0, -12.0, None], "log_volume": None}
        >>> figure = plot_volume_estimates({"step": 5, "result": {"volumes": [volume]}})
        >>> figure.axes[0].texts[0].get_text()
        'clean'
    """
    groups = estimates(row)
    # Taller than 30 inches, image plug-ins of the loggers give up.
    figure = blank_figure(7.0, min(30.0, 2.4 + 0.8 * len(groups)))
    panels = figure.subplots(len(groups), sharex=True, sharey=True, squeeze=False)[:, 0]
    offsets = [value for group in groups for value in group.offsets]
    edges = np.histogram_bin_edges(offsets, bins=max(20, math.isqrt(len(offsets)))) if offsets else None
    for index, (axes, group) in enumerate(zip(panels, groups, strict=True)):
        if edges is not None and group.offsets:
            counts, _ = np.histogram(group.offsets, bins=edges)
            axes.stairs(counts, edges, fill=True, color=_COLOURS[index % len(_COLOURS)])
            axes.axvline(0.0, color="0.4", linewidth=1, linestyle=":")
        else:
            axes.text(0.5, 0.5, "no direction is bounded", transform=axes.transAxes, ha="center", va="center")
        label = axes.annotate(group.label, (0.01, 0.95), xycoords="axes fraction", fontsize=8, va="top")
        # Names may hold a dollar sign, which matplotlib would read as mathematics.
        label.set_parse_math(False)
        axes.locator_params(axis="y", integer=True, nbins=3)
    panels[-1].set_xlabel("estimate minus log-volume, nats")
    panels[-1].xaxis.set_major_formatter(_tick)
    figure.supylabel("directions", fontsize=10)
    write_titles(panels[0], f"Directions of the basin, step {row['step']}", estimates_caption(row), _CAPTION_COLUMNS)
    return figure


@register_plot("basin_volume", "cutoffs")
def plot_volume_cutoffs(row: Row) -> Figure:
    """The log-volume against the cutoff with the fitted line; at one cutoff, the slope that its directions tell.

    Args:
        row: Of the analysis ``basin_volume``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> volume = {"split": "clean", "cutoff": 0.01, "log_volume": -9.0, "scaling_exponent": 2.0}
        >>> figure = plot_volume_cutoffs({"step": 5, "result": {"volumes": [volume], "fits": []}})
        >>> figure.axes[0].get_xscale()
        'log'
    """
    figure = blank_figure(7.0, 4.6)
    axes = figure.add_subplot()
    for index, curve in enumerate(cutoff_curves(row)):
        colour = _COLOURS[index % len(_COLOURS)]
        _with_intervals(axes, curve.cutoffs, curve.values, (curve.low, curve.high), curve.label, index, joined=False)
        if curve.line:
            axes.plot(*zip(*curve.line, strict=True), color=colour, linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("cutoff, nats")
    _finish(figure, axes)
    write_titles(axes, f"Volume by cutoff, step {row['step']}", cutoff_caption(row), _CAPTION_COLUMNS)
    return figure


def _with_intervals(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[float],
    ends: tuple[Sequence[float], Sequence[float]],
    label: str,
    index: int,
    *,
    joined: bool = True,
) -> None:
    y, low, high = (np.asarray(column, dtype=np.float64) for column in (values, *ends))
    # A percentile interval of a log-mean-exp may leave out the value itself.
    reach = np.stack([np.fmax(y - low, 0.0), np.fmax(high - y, 0.0)])  # [2, points]
    style: dict[str, Any] = {"color": _COLOURS[index % len(_COLOURS)], "label": label, "markersize": 5, "capsize": 3}
    axes.errorbar(x, y, yerr=np.nan_to_num(reach), fmt="o-" if joined else "o", linewidth=1.5, **style)


def _finish(figure: Figure, axes: Axes) -> None:
    axes.set_ylabel("log-volume, nats")
    # An offset at the top of the axis would lie under the caption.
    axes.yaxis.set_major_formatter(_tick)
    legend = figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _tick(value: float, position: float | None = None) -> str:
    return format_number(value)
