"""Rows of results as matplotlib figures, for the loggers.

Figures are made without pyplot: no window, no global state, any thread.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

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
