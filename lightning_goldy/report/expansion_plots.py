"""Taylor comparisons as matplotlib figures, for the loggers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning_goldy.report.expansions import prediction, prediction_caption, shares, shares_caption
from lightning_goldy.report.plots import blank_figure, register_plot, write_heading, write_titles
from lightning_goldy.report.registry import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {1: "#d55e00", 2: "#009e73", 3: "#cc79a7"}
_ACTUAL = "#0072b2"
_CAPTION_COLUMNS = 95


@register_plot("taylor_diff", "prediction")
def plot_taylor_prediction(row: Row) -> Figure:
    """Actual and predicted change of the loss over the run, and the nonlinearity with the bands of the regimes.

    Args:
        row: Of the analysis ``taylor_diff``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> lines = {"steps": [1], "change": [-0.5], "order1": [-0.4], "nonlinearity": [0.2]}
        >>> result = {"trajectory": lines, "thresholds": {"lazy": 0.1, "nonlinear": 0.5}, "regime": "weakly nonlinear"}
        >>> plot_taylor_prediction({"step": 1, "metrics": {}, "result": result}).axes[1].get_ylabel()
        'nonlinearity'
    """
    found = prediction(row)
    figure = blank_figure(7.0, 5.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    above.plot(found.steps, _gaps(found.actual), color=_ACTUAL, marker="o", markersize=3, label="actual")
    for order, line in sorted(found.orders.items()):
        style = {"color": _COLOURS.get(order, "0.4"), "linestyle": "--", "marker": ".", "label": f"order {order}"}
        above.plot(found.steps, _gaps(line), **style)
    above.axhline(0.0, color="0.6", linewidth=0.8)
    above.set_ylabel("change of the loss, nats")
    above.legend(fontsize=8)
    values = [value for value in found.nonlinearity if value is not None]
    top = max([1.2 * found.nonlinear, *(1.1 * value for value in values)])
    bands = (
        (0.0, found.lazy, "lazy"),
        (found.lazy, found.nonlinear, "weakly nonlinear"),
        (found.nonlinear, top, "nonlinear"),
    )
    for index, (low, high, name) in enumerate(bands):
        below.axhspan(low, high, color=_ACTUAL, alpha=0.04 + 0.07 * index, linewidth=0)
        below.text(0.01, (low + high) / 2, name, transform=below.get_yaxis_transform(), fontsize=7, va="center")
    below.plot(found.steps, _gaps(found.nonlinearity), color="black", marker="o", markersize=3)
    below.set_ylim(0.0, top)
    below.set_ylabel("nonlinearity")
    below.set_xlabel("optimizer step")
    if len(found.steps) == 1:
        # One checkpoint alone: an axis around it would tell nothing.
        below.set_xticks(found.steps)
    write_titles(above, f"Taylor expansion, up to step {row['step']}", prediction_caption(row), _CAPTION_COLUMNS)
    return figure


@register_plot("taylor_diff", "shares")
def plot_taylor_shares(row: Row) -> Figure:
    """What each part of the model contributes to the first-order change of the loss and of the logits.

    Args:
        row: Of the analysis ``taylor_diff``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> result = {"loss_shares": {"h.0": -0.5}, "function_shares": {"h.0": 1.0}}
        >>> len(plot_taylor_shares({"step": 1, "result": result}).axes)
        2
    """
    rows = shares(row)
    figure = blank_figure(7.5, min(30.0, 1.8 + 0.24 * max(len(rows), 3)))
    left, right = figure.subplots(1, 2, sharey=True)
    places = range(len(rows))
    for axes, column, label in ((left, 1, "g . Delta, nats"), (right, 2, "part of J Delta")):
        values = [0.0 if each[column] is None else each[column] for each in rows]
        axes.barh(places, values, color=_ACTUAL if column == 1 else _COLOURS[1])
        axes.axvline(0.0, color="0.4", linewidth=0.8)
        axes.set_xlabel(label)
    left.set_yticks(places, [each[0] for each in rows], fontsize=7, parse_math=False)
    if rows:
        left.invert_yaxis()
    write_heading(figure, f"Shares of the step, step {row['step']}", shares_caption(row))
    return figure


def _gaps(line: object) -> list[float]:
    return [float("nan") if value is None else float(value) for value in line]  # type: ignore[attr-defined]
