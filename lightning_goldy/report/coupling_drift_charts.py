"""A finetune's knowledge drift as plotly figures, for the HTML page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_goldy.report.charts import plain, register_chart
from lightning_goldy.report.coupling_charts import chart_coupling_distribution, chart_coupling_map
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
from lightning_goldy.report.registry import Row, require

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_COLOURS = dict(zip(CLASSES, ("#c8541a", "#c8871a", "#2a6fb0"), strict=True))
_MARGIN = {"l": 8, "r": 8, "t": 28, "b": 8}


@register_chart("coupling_drift", "Predicted and measured change")
def chart_drift_prediction(row: Row) -> Figure:
    """Predicted against measured change of each piece since the base, coloured by class.

    Args:
        row: Of the analysis ``coupling_drift``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> points = {"piece": ["a"], "predicted": [0.5], "measured": [0.25], "class": ["edited"]}
        >>> numbers = {"n": 1, "pearson": None, "spearman": None, "slope": None}
        >>> result = {"points": points, "agreement": [{"group": name, **numbers} for name in ("all", "edited")]}
        >>> chart_drift_prediction({"result": result}).data[0].name
        'edited (n = 1)'
    """
    graph_objects = require("plotly.graph_objects")
    groups = drift_scatters(row)
    points = row["result"]["points"]
    figure: Figure = graph_objects.Figure()
    for index, group in reversed(list(enumerate(groups))):
        columns = zip(points.get("piece", ()), points["class"], points["predicted"], points["measured"], strict=False)
        names = [plain(str(name)) for name, kind, *pair in columns if kind == group.name and None not in pair]
        trace = graph_objects.Scatter(
            x=list(group.predicted),
            y=list(group.measured),
            text=names,
            mode="markers",
            name=plain(group.label),
            legendrank=index,
            marker={"color": _COLOURS.get(group.name, "grey"), "size": 7, "opacity": 0.75},
            hovertemplate="%{text}<br>predicted %{x:.4g}<br>measured %{y:.4g} nats<extra></extra>",
        )
        figure.add_trace(trace)
    ends = identity(groups)
    line = {"dash": "dot", "width": 1, "color": "grey"}
    figure.add_shape(type="line", line=line, layer="below", x0=ends[0], y0=ends[0], x1=ends[1], y1=ends[1])
    figure.update_xaxes(title_text="predicted change of log p, g . Delta, nats", automargin=True)
    figure.update_yaxes(title_text="measured change of log p, nats", automargin=True)
    legend = {"x": 0, "y": 1, "yanchor": "bottom", "font": {"size": 10}}
    caption = {"caption": prediction_caption(row)}
    figure.update_layout(template=None, height=460, margin=_MARGIN, legend=legend, showlegend=True, meta=caption)
    return figure


@register_chart("coupling_drift", "Drift over the run")
def chart_drift_lines(row: Row) -> Figure:
    """Drift of the cosines over the run, and mean changes of log p by class beside what was predicted.

    Args:
        row: Of the analysis ``coupling_drift``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> lines = {"steps": [4], "mean_absolute_difference": [0.1], "correlation": [0.9]}
        >>> change = {"untouched": [0.2]}
        >>> lines |= {"change": change, "predicted_change": change}
        >>> [trace.name for trace in chart_drift_lines({"result": {"trajectory": lines}}).data]
        ['mean absolute difference', 'correlation', 'untouched', 'untouched, predicted']
    """
    found = drift_lines(row)
    figure: Figure = require("plotly.subplots").make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    drawn: list[tuple[str, Any, str, str, int]] = [
        ("mean absolute difference", found.difference, "#2a6fb0", "solid", 1),
        ("correlation", found.correlation, "#3a9a6b", "solid", 1),
    ]
    for name, measured in found.measured.items():
        colour = _COLOURS.get(name, "grey")
        drawn.append((name, measured, colour, "solid", 2))
        drawn.append((f"{name}, predicted", found.predicted.get(name, ()), colour, "dash", 2))
    for name, line, colour, dash, place in drawn:
        trace = require("plotly.graph_objects").Scatter(
            x=list(found.steps),
            y=list(line),
            name=plain(name),
            mode="lines+markers",
            line={"color": colour, "dash": dash},
            hovertemplate="step %{x}<br>%{y:.4g}<extra>" + plain(name) + "</extra>",
        )
        figure.add_trace(trace, place, 1)
    figure.update_xaxes(title_text="optimizer step", automargin=True, row=2)
    figure.update_yaxes(title_text="cosines, against the base", automargin=True, row=1)
    figure.update_yaxes(title_text="mean change of log p, nats", automargin=True, row=2)
    legend = {"x": 0, "y": 1, "yanchor": "bottom", "orientation": "h", "font": {"size": 10}}
    figure.update_layout(
        template=None, height=480, margin={**_MARGIN, "t": 48}, legend=legend, meta={"caption": lines_caption(row)}
    )
    return figure


@register_chart("coupling_drift", "Where the coupling moved")
def chart_drift_map(row: Row) -> Figure:
    """Heat map of the differences of the cosines from those of the base, of the pieces that drifted most.

    Args:
        row: Of the analysis ``coupling_drift``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> drifted = {"ids": ["a", "b"], "classes": ["edited", "untouched"], "difference": [[0, 0.5], [0.5, 0]]}
        >>> chart_drift_map({"result": {"drifted": drifted}}).data[0].z
        ([0.0, 0.5], [0.5, 0.0])
    """
    found = drift_map(row)
    names = [plain(name) for name in found.names]
    trace = require("plotly.graph_objects").Heatmap(
        x=names,
        y=names,
        z=found.cells.tolist(),
        colorscale="RdBu",
        reversescale=True,
        zmin=-found.limit,
        zmax=found.limit,
        colorbar={"title": {"text": "difference", "side": "right"}, "thickness": 14},
        hovertemplate="%{y}, %{x}<br>%{z:.3f}<extra></extra>",
    )
    axis = {"type": "category", "automargin": True, "showgrid": False, "tickfont": {"size": 9}}
    layout = {
        "template": None,
        "height": 200 + 13 * len(names),
        "margin": _MARGIN,
        "xaxis": axis,
        "yaxis": {**axis, "autorange": "reversed"},
        "meta": {"caption": map_caption(row)},
    }
    figure: Figure = require("plotly.graph_objects").Figure(trace, layout)
    return figure


register_chart("coupling_drift", "Which pieces are coupled")(chart_coupling_map)
register_chart("coupling_drift", "How much is coupled")(chart_coupling_distribution)
