"""Head plasticity as matplotlib figures, for the loggers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from lightning_goldy.report.plasticity import (
    attention_grid,
    gate_timeline,
    loss_course,
    plasticity_caption,
    score_caption,
    score_grid,
)
from lightning_goldy.report.plasticity_sweep import sweep_caption, sweep_lines
from lightning_goldy.report.plots import blank_figure, register_plot, write_titles
from lightning_goldy.report.registry import Row, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart with every kind of colour vision (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_CAPTION_COLUMNS = 95


@register_plot("head_plasticity", "timeline")
def plot_gate_timeline(row: Row) -> Figure:
    """Which heads were open when.

    Args:
        row: Of the analysis ``head_plasticity``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> result = {"heads_per_layer": [2], "timeline": [{"step": 0, "closed": [[0, 1]]}], "strategy": "taylor"}
        >>> figure = plot_gate_timeline({"step": 5, "metrics": {}, "result": {**result, "cycles": 1}})
        >>> figure.axes[0].get_xlabel()
        'optimizer step'
    """
    timeline = gate_timeline(row)
    rows = len(timeline.labels)
    # Taller than 30 inches, image plug-ins of the loggers give up.
    figure = blank_figure(7.0, min(30.0, 1.8 + 0.16 * max(rows, 8)))
    axes = figure.add_subplot()
    colours = require("matplotlib.colors").ListedColormap(["#3b3b3b", "#8ecae6"])
    axes.pcolormesh(
        timeline.edges, np.arange(rows + 1) - 0.5, timeline.opened, cmap=colours, vmin=0, vmax=1, linewidth=0.4,
        edgecolors="white",
    )  # fmt: skip
    shown = range(0, rows, math.ceil(rows / 40))
    axes.set_yticks(list(shown), [timeline.labels[index] for index in shown], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("head (dark: closed)")
    write_titles(axes, f"Open heads, up to step {row['step']}", plasticity_caption(row), _CAPTION_COLUMNS)
    return figure


@register_plot("head_plasticity", "loss")
def plot_plasticity_loss(row: Row) -> Figure:
    """The loss of the probe over the cycles, with cuts and regrowths, and the learning-rate multiplier below.

    Args:
        row: Of the analysis ``head_plasticity``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> curve = {"steps": [1, 2], "loss": [2.0, 3.0], "multiplier": [1.0, 3.0]}
        >>> result = {"curve": curve, "timeline": [], "strategy": "taylor", "cycles": 1}
        >>> figure = plot_plasticity_loss({"step": 2, "metrics": {}, "result": result})
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['loss, nats', 'multiplier']
    """
    course = loss_course(row)
    figure = blank_figure(7.0, 4.8)
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    top.plot(course.steps, course.loss, "o-", color=_COLOURS[0], markersize=3, linewidth=1.5)
    for step, what in course.events:
        colour = _COLOURS[1] if "cut" in what else _COLOURS[2]
        for axes in (top, bottom):
            axes.axvline(step, color=colour, linewidth=0.8, linestyle=":")
        top.annotate(
            what, (step, 1), (2, -3), xycoords=("data", "axes fraction"), textcoords="offset points", fontsize=7,
            rotation=90, va="top", color=colour,
        )  # fmt: skip
    bottom.plot(course.steps, course.multiplier, color=_COLOURS[3], linewidth=1.5)
    top.set_ylabel("loss, nats")
    bottom.set_ylabel("multiplier")
    bottom.set_xlabel("optimizer step")
    write_titles(top, f"Loss of the probe, up to step {row['step']}", plasticity_caption(row), _CAPTION_COLUMNS)
    return figure


@register_plot("head_plasticity", "scores")
def plot_head_scores(row: Row) -> Figure:
    """Heat map of the scores that the last cut rested on.

    Args:
        row: Of the analysis ``head_plasticity``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> scores = {"values": [[0.5, -1.0]], "closed_before": [], "cut": [[0, 1]], "strategy": "taylor", "step": 3}
        >>> figure = plot_head_scores({"step": 3, "result": {"scores": {**scores, "n_samples": 4}}})
        >>> [text.get_text() for text in figure.axes[0].texts[:2]]
        ['0.5', '-1']
    """
    grid = score_grid(row)
    layers, heads = (1, 1) if grid is None else grid.values.shape
    width = max(5.5, 1.8 + 0.6 * heads)
    figure = blank_figure(width, min(30.0, 1.8 + 0.38 * max(layers, 3)))
    axes = figure.add_subplot()
    if grid is None:
        _say(axes, "no head has been scored yet")
    else:
        image = axes.imshow(np.ma.masked_invalid(grid.values), aspect="auto", cmap="cividis", interpolation="nearest")
        low, high = image.get_clim()
        for (layer, head), value in np.ndenumerate(grid.values):
            if not math.isfinite(value):
                continue
            light = value > (low + high) / 2
            text = f"{value:.2g}" + ("\nclosed" if (layer, head) in grid.closed else "")
            axes.text(head, layer, text, ha="center", va="center", fontsize=6, color="black" if light else "white")
            if (layer, head) in grid.cut:
                box = require("matplotlib.patches").Rectangle((head - 0.47, layer - 0.45), 0.94, 0.9)
                box.set(fill=False, edgecolor="#d55e00", linewidth=2)
                axes.add_patch(box)
        axes.set_xticks(range(heads))
        axes.set_yticks(range(layers))
        axes.set_xlabel("head")
        axes.set_ylabel("layer")
        figure.colorbar(image, ax=axes, label="score")
    write_titles(axes, f"Importance of heads, step {row['step']}", score_caption(row), int(14 * (width - 1.6)))
    return figure


@register_plot("head_plasticity", "attention")
def plot_attention_maps(row: Row) -> Figure:
    """Attention maps of some cut and some kept heads: before the cut, right after it, and when heads regrow.

    Args:
        row: Of the analysis ``head_plasticity``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> shown = {"heads": [[0, 1]], "n_cut": 1, "maps": {"before": [[[1.0]]]}}
        >>> figure = plot_attention_maps({"step": 3, "result": {"attention": shown}})
        >>> len(figure.axes)
        1
    """
    grid = attention_grid(row)
    if grid is None:
        figure = blank_figure(5.0, 2.0)
        _say(figure.add_subplot(), "no attention maps yet")
        return figure
    rows, columns = len(grid.moments), len(grid.heads)
    figure = blank_figure(1.2 + 1.35 * columns, 0.9 + 1.35 * rows)
    panels = figure.subplots(rows, columns, squeeze=False)
    for (line, column), axes in np.ndenumerate(panels):
        axes.imshow(grid.maps[line, column], cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        axes.set_xticks([])
        axes.set_yticks([])
        if line == 0:
            axes.set_title(grid.heads[column], fontsize=8)
        if column == 0:
            axes.set_ylabel(grid.moments[line], fontsize=8)
    figure.suptitle(f"Attention of one sample, step {row['step']} (columns: layer.head)", fontsize=10)
    return figure


@register_plot("plasticity_sweep", "loss_by_level")
def plot_plasticity_sweep(row: Row) -> Figure:
    """What pruning cost at the end of each run, by level, for each strategy and number of cycles.

    Args:
        row: Of the analysis ``plasticity_sweep``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> run = {"strategy": "taylor", "level": 0.5, "cycles": 1, "seed": 0, "cost": 0.1, "open_share": 0.75}
        >>> plot_plasticity_sweep({"result": {"runs": [run]}}).axes[0].get_xlabel()
        'pruning level'
    """
    figure = blank_figure(7.0, 4.8)
    axes = figure.add_subplot()
    for index, line in enumerate(sweep_lines(row)):
        low, mean, high = (np.asarray(column) for column in (line.low, line.mean, line.high))
        axes.errorbar(
            line.levels, mean, yerr=np.stack([mean - low, high - mean]), fmt="o-", capsize=3, linewidth=1.5,
            markersize=5, label=line.label, color=_COLOURS[index % len(_COLOURS)],
        )  # fmt: skip
    axes.axhline(0.0, color="0.5", linewidth=1, linestyle=":")
    axes.set_xlabel("pruning level")
    axes.set_ylabel("loss over the run without pruning, nats")
    legend = figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    write_titles(axes, "What pruning cost", sweep_caption(row), _CAPTION_COLUMNS)
    return figure


def _say(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center")
    axes.set_xticks([])
    axes.set_yticks([])
