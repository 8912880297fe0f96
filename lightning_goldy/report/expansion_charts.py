"""Taylor comparisons as plotly figures, for the HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_goldy.report.charts import plain, register_chart
from lightning_goldy.report.expansions import prediction, prediction_caption, shares, shares_caption
from lightning_goldy.report.registry import Row, require

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_ACTUAL = "#2a6fb0"
_COLOURS = {1: "#c8871a", 2: "#3a9a6b", 3: "#b5489a"}


@register_chart("taylor_diff", "Actual and predicted change")
def chart_taylor_prediction(row: Row) -> Figure:
    """Actual and predicted change of the loss over the run, and the nonlinearity with the bands of the regimes.

    Args:
        row: Of the analysis ``taylor_diff``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> lines = {"steps": [1], "change": [-0.5], "order1": [-0.4], "nonlinearity": [0.2]}
        >>> result = {"trajectory": lines, "thresholds": {"lazy": 0.1, "nonlinear": 0.5}, "regime": "weakly nonlinear"}
        >>> [trace.name for trace in chart_taylor_prediction({"metrics": {}, "result": result}).data]
        ['actual', 'order 1', 'nonlinearity']
    """
    graph_objects = require("plotly.graph_objects")
    found = prediction(row)
    figure: Figure = require("plotly.subplots").make_subplots(
        2, 1, shared_xaxes=True, row_heights=(0.6, 0.4), vertical_spacing=0.08
    )
    lines = [("actual", found.actual, _ACTUAL, "solid")]
    lines += [
        (f"order {order}", line, _COLOURS.get(order, "grey"), "dash") for order, line in sorted(found.orders.items())
    ]
    for name, line, colour, dash in lines:
        trace = graph_objects.Scatter(
            x=list(found.steps),
            y=list(line),
            name=name,
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            hovertemplate="step %{x}<br>%{y:.4g} nats<extra>" + name + "</extra>",
        )
        figure.add_trace(trace, 1, 1)
    trace = graph_objects.Scatter(
        x=list(found.steps),
        y=list(found.nonlinearity),
        name="nonlinearity",
        mode="lines+markers",
        line={"color": "#7a6bd1"},
        showlegend=False,
        hovertemplate="step %{x}<br>%{y:.3g}<extra>nonlinearity</extra>",
    )
    figure.add_trace(trace, 2, 1)
    for level, name in ((found.lazy, "lazy below"), (found.nonlinear, "nonlinear above")):
        figure.add_hline(level, line={"dash": "dot", "color": "grey", "width": 1}, annotation_text=name, row=2, col=1)
    figure.update_layout(_layout(prediction_caption(row), 460))
    figure.update_xaxes(automargin=True, zeroline=False)
    figure.update_yaxes(automargin=True, zeroline=False)
    figure.update_xaxes(title_text="optimizer step", row=2)
    figure.update_yaxes(title_text="change of the loss, nats", row=1)
    figure.update_yaxes(title_text="nonlinearity", rangemode="tozero", row=2)
    return figure


@register_chart("taylor_diff", "Who carries the step")
def chart_taylor_shares(row: Row) -> Figure:
    """What each part of the model contributes to the first-order change of the loss and of the logits.

    Args:
        row: Of the analysis ``taylor_diff``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> result = {"loss_shares": {"h.0": -0.5}, "function_shares": {"h.0": 1.0}}
        >>> chart_taylor_shares({"result": result}).data[0].x
        (-0.5,)
    """
    graph_objects = require("plotly.graph_objects")
    rows = shares(row)
    figure: Figure = require("plotly.subplots").make_subplots(1, 2, shared_yaxes=True, horizontal_spacing=0.04)
    names = [plain(each[0]) for each in rows]
    columns = ((1, "g . Delta, nats", _ACTUAL), (2, "part of J Delta", _COLOURS[1]))
    for column, label, colour in columns:
        trace = graph_objects.Bar(
            x=[0.0 if each[column] is None else each[column] for each in rows],
            y=names,
            orientation="h",
            marker={"color": colour},
            showlegend=False,
            hovertemplate="%{y}<br>%{x:.4g}<extra></extra>",
        )
        figure.add_trace(trace, 1, column)
        figure.update_xaxes(title_text=label, zeroline=True, automargin=True, row=1, col=column)
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_layout(_layout(shares_caption(row), 160 + 22 * max(len(rows), 3)))
    return figure


def _layout(caption: str, height: int) -> dict[str, Any]:
    return {
        "template": None,
        "height": height,
        "margin": {"l": 8, "r": 8, "t": 28, "b": 8},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "meta": {"caption": caption},
    }
