"""Rows of results as matplotlib figures, for the loggers.

Figures are made without pyplot: no window, no global state, any thread.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_goldy.report.captions import change_caption, golden_caption, histogram_caption
from lightning_goldy.report.formatting import format_cell
from lightning_goldy.report.grids import BlockGrid, change_histogram, golden_density, relative_change
from lightning_goldy.report.registry import FigureRegistry, Row, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PLOTS: FigureRegistry[Figure] = FigureRegistry("matplotlib")


def register_plot(analysis: str, name: str) -> Callable[[Callable[[Row], Figure]], Callable[[Row], Figure]]:
    """Decorator that makes a function of a row one of the analysis's logged figures.

    Args:
        analysis: The ``analysis`` field of the rows that it draws.
        name: Name of the figure, unique within the analysis; the logged tag ends with it.

    Raises:
        ValueError: The analysis has a figure of that name.

    Example:
        >>> @register_plot("golden_parameters", "density")
        ... def again(row): ...
        Traceback (most recent call last):
        ValueError: analysis 'golden_parameters' has a matplotlib figure 'density' already: ...
    """
    return PLOTS.register(analysis, name)


def draw_plots(row: Row, earlier: Sequence[Row] = ()) -> dict[str, Figure]:
    """Draws all figures of a row's analysis.

    Args:
        row: One row of ``results.jsonl``.
        earlier: Rows of the same analysis before it, for the figures over the run.

    Returns:
        Figure name to figure; empty for an analysis that has none.

    Raises:
        ReportError: The row lacks what a figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> draw_plots({"analysis": "of somebody else"})
        {}
    """
    return PLOTS.draw(row, earlier)


@register_plot("golden_parameters", "density")
def plot_golden_parameters(row: Row) -> Figure:
    """Heat map of the golden density by block and tensor kind, with the density expected by chance.

    Args:
        row: Of the analysis ``golden_parameters``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> tensors = [{"name": "h.0.w", "block": "h.0", "kind": "mlp", "numel": 8, "k": 4, "golden": 2}]
        >>> row = {"step": 3, "metrics": {"density": 0.25}, "result": {"tensors": tensors}}
        >>> plot_golden_parameters(row).axes[0].get_title(loc="left")
        'Golden parameters, step 3'
    """
    title = f"Golden parameters, step {row['step']}"
    # Cividis runs from navy to gold and reads the same with colour blindness and in grey.
    return _heat_map(golden_density(row), title, golden_caption(row), "golden, % of the parameters", "cividis")


@register_plot("golden_snapshot", "relative_change")
def plot_weight_changes(row: Row) -> Figure:
    """Heat map of ||Delta|| / ||theta_0|| by block and tensor kind.

    Args:
        row: Of the analysis ``golden_snapshot``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> tensors = [{"name": "h.0.w", "block": "h.0", "kind": "mlp", "base_norm": 2.0, "delta_norm": 0.1}]
        >>> figure = plot_weight_changes({"step": 3, "metrics": {}, "result": {"tensors": tensors}})
        >>> figure.axes[0].texts[0].get_text()
        '5'
    """
    title = f"Change since the snapshot, step {row['step']}"
    return _heat_map(relative_change(row), title, change_caption(row), "||Delta|| / ||base||, %", "viridis")


@register_plot("golden_snapshot", "change_histogram")
def plot_change_histogram(row: Row) -> Figure:
    """Histogram of log10 |Delta| over the elements; unchanged ones are counted in the caption.

    Args:
        row: Of the analysis ``golden_snapshot``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> histogram = {"edges": [-3, -2, -1], "counts": [4, 1], "zero": 5}
        >>> plot_change_histogram({"step": 3, "result": {"histogram": histogram}}).axes[0].get_ylabel()
        'elements'
    """
    histogram = change_histogram(row)
    figure = blank_figure(6.4, 4.0)
    axes = figure.add_subplot()
    if histogram.counts.any():
        axes.stairs(histogram.counts, histogram.edges, fill=True, color="#35608d")
        axes.set_yscale("log")
        # A bin with one element would have no height on an axis that starts at one.
        axes.set_ylim(bottom=0.5)
    else:
        axes.text(0.5, 0.5, "no element has changed", transform=axes.transAxes, ha="center", va="center")
        axes.set_yticks([])
    axes.set_xlabel("log10 |Delta|")
    axes.set_ylabel("elements")
    write_titles(axes, f"Sizes of the changes, step {row['step']}", histogram_caption(row), columns=80)
    return figure


def blank_figure(width: float, height: float) -> Figure:
    """An empty figure.

    Args:
        width: Inches.
        height: Inches.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> blank_figure(4.0, 3.0).get_size_inches().tolist()
        [4.0, 3.0]
    """
    figure: Figure = require("matplotlib.figure").Figure(figsize=(width, height), dpi=100, layout="constrained")
    return figure


def write_titles(axes: Axes, title: str, caption: str, columns: int) -> None:
    """Writes a title and, below it in small letters, a caption above the axes.

    Args:
        axes: Where.
        title: One line.
        caption: Wrapped.
        columns: Letters per line of the caption.
    """
    lines = textwrap.wrap(caption, columns)
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold", pad=8 + 11 * len(lines), parse_math=False)
    axes.annotate(
        "\n".join(lines), (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8, va="bottom"
    ).set_parse_math(False)


def write_heading(figure: Figure, title: str, caption: str) -> None:
    """Writes a title and a caption above all panels of a figure; those of one panel would push the others aside.

    Args:
        figure: Where.
        title: One line.
        caption: Wrapped.
    """
    width = int(14 * figure.get_size_inches()[0])
    text = "\n".join([title, *textwrap.wrap(caption, width)])
    figure.suptitle(text, fontsize=9, x=0.01, ha="left", parse_math=False)


def _heat_map(grid: BlockGrid, title: str, caption: str, unit: str, colours: str) -> Figure:
    rows, columns = grid.values.shape
    label_width = 0.075 * max(map(len, grid.blocks))
    width = max(5.5, 1.8 + label_width + 0.95 * columns)
    # Taller than 30 inches, image plug-ins of the loggers give up.
    figure = blank_figure(width, min(30.0, 1.6 + 0.27 * rows))
    axes = figure.add_subplot()
    colour_map = require("matplotlib").colormaps[colours]
    image = axes.imshow(
        np.ma.masked_invalid(grid.values), aspect="auto", interpolation="nearest", cmap=colour_map, vmin=0
    )
    image.set_clim(0, grid.largest)
    axes.set_facecolor("0.92")
    # Names may hold a dollar sign, which matplotlib would read as mathematics.
    axes.set_yticks(range(rows), grid.blocks, fontsize=8, parse_math=False)
    axes.set_xticks(range(columns), grid.kinds, fontsize=9, parse_math=False)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    _write_cells(axes, grid, colour_map)
    figure.colorbar(image, ax=axes, label=unit, shrink=min(1.0, 6 / rows) if rows > 6 else 1.0, aspect=25)
    write_titles(axes, title, caption, columns=int(15 * (width - label_width)))
    return figure


def _write_cells(axes: Axes, grid: BlockGrid, colour_map: Any) -> None:
    for (row, column), value in np.ndenumerate(grid.values):
        red, green, blue, _ = colour_map(value / grid.largest if math.isfinite(value) else 1.0)
        dark = math.isfinite(value) and 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            column, row, format_cell(value), ha="center", va="center", fontsize=7, color="white" if dark else "black"
        )
