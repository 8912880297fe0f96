"""Searches for reverse golden parameters as matplotlib figures, for the loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_goldy.report.plots import blank_figure, register_plot, write_titles
from lightning_goldy.report.registry import Row
from lightning_goldy.report.reverse_golden_history import search_caption, search_history

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart with every kind of colour vision (Okabe and Ito).
_LEVEL_COLOURS = ("#000000", "#56b4e9", "#cc79a7", "#e69f00", "#999999")


@register_plot("reverse_golden_parameters", "history")
def plot_search_history(row: Row) -> Figure:
    """The divergence of what was tried and kept over the iterations, and below it the sizes of mask and pool.

    Args:
        row: Of the analysis ``reverse_golden_parameters``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> entry = {"iteration": 0, "size": 4, "pool": 5, "greedy_kl": 1.0, "pool_kl": 1.2, "kl": 1.2}
        >>> result = {"history": [entry | {"accepted": True}], "kl_divergence": 0.9, "single_shots": {"taylor": 0.2}}
        >>> figure = plot_search_history({"step": 3, "result": result})
        >>> [axes.get_ylabel() for axes in figure.axes]
        ['divergence, nats', 'elements']
    """
    history = search_history(row)
    figure = blank_figure(7.0, 5.2)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    upper.plot(history.iterations, history.kept, color="#0072b2", linewidth=1.5, label="kept")
    upper.plot(history.iterations, history.greedy, "x", color="#d55e00", markersize=5, label="greedy")
    upper.plot(history.iterations, history.pool, "o", color="#009e73", markersize=4, fillstyle="none", label="pool")
    taken = [index for index, accepted in enumerate(history.accepted) if accepted]
    upper.plot(
        [history.iterations[index] for index in taken],
        [history.pool[index] for index in taken],
        "o",
        color="#009e73",
        markersize=4,
        label="pool, accepted",
    )
    for index, (label, level) in enumerate(history.levels.items()):
        colour = _LEVEL_COLOURS[index % len(_LEVEL_COLOURS)]
        upper.axhline(level, color=colour, linewidth=1, linestyle=":" if index else "--", label=label)
    upper.set_ylabel("divergence, nats")
    lower.step(history.iterations, history.pools, where="mid", color="#009e73", linewidth=1.2)
    lower.fill_between(history.iterations, history.sizes, step="mid", color="#0072b2", alpha=0.3)
    lower.set_ylim(bottom=0)
    lower.set_ylabel("elements")
    lower.set_xlabel("iteration")
    lower.xaxis.get_major_locator().set_params(integer=True)
    legend = figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    for text in legend.get_texts():
        # Names of scores may hold a dollar sign, which matplotlib would read as mathematics.
        text.set_parse_math(False)
    title = f"Search for reverse golden parameters, step {row['step']}"
    write_titles(upper, title, search_caption(row), columns=95)
    return figure
