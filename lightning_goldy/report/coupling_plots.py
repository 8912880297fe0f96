"""Knowledge coupling as matplotlib figures, for the loggers and the command's pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_goldy.report.couplings import (
    CouplingMap,
    coupling_histogram,
    coupling_map,
    histogram_caption,
    map_caption,
    quantity,
    titled,
)
from lightning_goldy.report.plots import blank_figure, register_plot, write_heading, write_titles
from lightning_goldy.report.registry import Row, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart with every kind of colour vision (Okabe and Ito), then shades of grey.
COLOURS = (
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#000000", "#9a6324", "#999999",
)  # fmt: skip
_MOST_LABELS = 40


@register_plot("knowledge_coupling", "heat_map")
def plot_coupling_map(row: Row) -> Figure:
    """Heat map of the cosines in the order of the clusters, with a strip of categories.

    Args:
        row: Of the analysis ``knowledge_coupling``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> drawn = {"cells": [[1, 0.5], [0.5, 1]], "sizes": [1, 1], "categories": ["b", None], "n_pieces": 2}
        >>> figure = plot_coupling_map({"step": 3, "result": {"heat_map": drawn}})
        >>> figure.axes[1].images[0].get_clim()
        (-0.5, 0.5)
    """
    found = coupling_map(row)
    figure = blank_figure(8.0, 7.0)
    widths = [0.025, 1] if found.names else [1]
    panels = np.atleast_1d(figure.subplots(1, len(widths), width_ratios=widths))
    axes: Axes = panels[-1]
    extent = (-0.5, found.n_pieces - 0.5, found.n_pieces - 0.5, -0.5)
    image = axes.imshow(
        found.cells,
        cmap="RdBu_r",
        vmin=-found.limit,
        vmax=found.limit,
        aspect="auto",
        # Smaller than a pixel, cells are averaged rather than dropped.
        interpolation="nearest" if len(found.cells) <= _MOST_LABELS else "antialiased",
        extent=extent,
    )
    axes.set_xlabel("piece, in the order of the clusters")
    axes.set_yticks([])
    figure.colorbar(image, ax=axes, label=quantity(row), shrink=0.8, aspect=30, extend="both")
    if found.names:
        _draw_strip(figure, panels[0], found)
    else:
        axes.set_ylabel("piece")
    write_heading(figure, titled("Knowledge coupling", row), map_caption(row))
    return figure


@register_plot("knowledge_coupling", "distribution")
def plot_coupling_distribution(row: Row) -> Figure:
    """Histogram of the cosines of all pairs, with the thresholds.

    Args:
        row: Of the analysis ``knowledge_coupling``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> drawn = {"edges": [-1, 0, 0.5, 1], "counts": [0, 4, 0]}
        >>> result = {"distribution": drawn, "thresholds": {"high": 0.4, "moderate": 0.1}}
        >>> figure = plot_coupling_distribution({"step": 3, "result": result})
        >>> [line.get_xdata()[0] for line in figure.axes[0].lines]
        [0.0, 0.1, 0.4]
    """
    found = coupling_histogram(row)
    figure = blank_figure(7.2, 4.2)
    axes = figure.add_subplot()
    axes.stairs(found.counts, found.edges, fill=True, color="#35608d")
    if found.counts.any():
        axes.set_yscale("log")
        # A bin with one pair would have no height on an axis that starts at one.
        axes.set_ylim(bottom=0.5)
    else:
        axes.text(0.5, 0.5, "no pair", transform=axes.transAxes, ha="center", va="center")
    marks = ((0.0, "", "0.4"), (found.moderate, "moderate", "#e69f00"), (found.high, "high", "#d55e00"))
    for place, label, colour in marks:
        line = axes.axvline(place, color=colour, linestyle="--", linewidth=1.2 if label else 0.7)
        line.set_label(f"{label} from {place:g}" if label else "_nothing")
    axes.set_xlabel(quantity(row))
    axes.set_ylabel("pairs (logarithmic)")
    axes.legend(fontsize=8)
    write_titles(axes, titled("Distribution of the coupling", row), histogram_caption(row), columns=95)
    return figure


def _draw_strip(figure: Figure, axes: Axes, found: CouplingMap) -> None:
    matplotlib: Any = require("matplotlib.colors")
    patches: Any = require("matplotlib.patches")
    # Whites for blocks without a category come first.
    colours = ["white", *(COLOURS[place % len(COLOURS)] for place in range(len(found.names)))]
    axes.imshow(
        found.strip[:, None] + 1,
        cmap=matplotlib.ListedColormap(colours),
        vmin=-0.5,
        vmax=len(colours) - 0.5,
        aspect="auto",
        interpolation="nearest",
        extent=(0, 1, found.n_pieces - 0.5, -0.5),
    )
    axes.set_xticks([])
    axes.set_ylabel("piece, in the order of the clusters; strip: category")
    handles = [patches.Patch(color=colour, label=name) for colour, name in zip(colours[1:], found.names, strict=True)]
    legend = figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)
