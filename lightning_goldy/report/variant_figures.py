"""Losses of variants that are trained side by side, as matplotlib and plotly figures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_goldy.report.charts import Series, line_chart, register_chart
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.formatting import format_number
from lightning_goldy.report.plots import blank_figure, register_plot, write_titles
from lightning_goldy.report.registry import ReportError, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot
    from plotly.graph_objects import Figure as Chart

_LABELS = {
    "full": "full",
    "frozen_attention": "attention frozen",
    "linear_mlp": "MLPs linear",
    "tangent": "all linear (tangent)",
}
# Told apart with every kind of colour vision (Okabe and Ito).
_COLOURS = ("#000000", "#0072b2", "#e69f00", "#d55e00")
_CAPTION_COLUMNS = 95


def variant_lines(row: Row) -> dict[str, Series]:
    """The loss of every variant over the run, by its label.

    Raises:
        ReportError: The row has no lines.

    Example:
        >>> variant_lines({"result": {"trajectory": {"steps": [0, 5], "losses": {"tangent": [2.0, None]}}}})
        {'all linear (tangent)': ([0, 5], [2.0, None])}
    """
    found = row.get("result", {}).get("trajectory")
    if not found or not found.get("losses"):
        raise ReportError("a row of variant_losses needs result.trajectory with steps and losses")
    return {_LABELS.get(name, name): (found["steps"], values) for name, values in found["losses"].items()}


def variant_caption(row: Row) -> str:
    """What the losses are means over, and the latest ones.

    Example:
        >>> result = {"n_targets": 40, "trajectory": {"steps": [0, 5], "losses": {"full": [2.0, 1.5]}}}
        >>> variant_caption({"result": result})
        'mean loss over 40 targets of the probe, nats; latest: full 1.5'
    """
    latest = [f"{label} {format_number(values[-1])}" for label, (_, values) in variant_lines(row).items()]
    count = format_number(row["result"].get("n_targets"))
    return f"mean loss over {count} targets of the probe, nats; latest: {', '.join(latest)}"


@register_plot("variant_losses", "losses")
def plot_variant_losses(row: Row) -> Plot:
    """The loss of every variant over the run.

    Args:
        row: Of the analysis ``variant_losses``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: matplotlib is not installed.

    Example:
        >>> row = {"step": 5, "result": {"trajectory": {"steps": [0, 5], "losses": {"full": [2.0, 1.5]}}}}
        >>> plot_variant_losses(row).axes[0].get_ylabel()
        'loss, nats'
    """
    figure = blank_figure(7.0, 4.6)
    axes = figure.add_subplot()
    for index, (label, (steps, values)) in enumerate(variant_lines(row).items()):
        drawn = [math.nan if value is None else value for value in values]
        axes.plot(steps, drawn, color=_COLOURS[index % len(_COLOURS)], marker="o", markersize=3, label=label)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    write_titles(axes, f"Variants trained side by side, step {row['step']}", variant_caption(row), _CAPTION_COLUMNS)
    return figure


@register_chart("variant_losses", "The losses over the run")
def chart_variant_losses(row: Row) -> Chart:
    """The loss of every variant over the run.

    Args:
        row: Of the analysis ``variant_losses``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> row = {"result": {"trajectory": {"steps": [0, 5], "losses": {"full": [2.0, 1.5]}}}}
        >>> chart_variant_losses(row).data[0].y
        (2.0, 1.5)
    """
    figure = line_chart(variant_lines(row), x_title="optimizer step")
    figure.update_layout(meta={"caption": variant_caption(row)}, height=340)
    figure.update_yaxes(title_text="loss, nats")
    return figure


describe(
    "variant_losses",
    Description(
        title="Variants trained side by side",
        measures=(
            "The loss of one model that is trained on the same batches in full, with the attention patterns of its "
            "start, with MLPs that are linear around their start, and linear altogether (its tangent)."
        ),
        reading=(
            "Where a line lies on the full model's, the training does not need what that variant lacks; the distance "
            "between them is what it is worth."
        ),
        metrics={"loss": "mean loss of the model as it is, nats; over the probe's targets, of each variant"},
    ),
)
