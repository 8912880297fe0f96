"""Head plasticity as plotly figures, for the HTML page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_goldy.report.charts import plain, register_chart
from lightning_goldy.report.formatting import format_cell
from lightning_goldy.report.plasticity import (
    attention_grid,
    gate_timeline,
    loss_course,
    plasticity_caption,
    score_caption,
    score_grid,
)
from lightning_goldy.report.plasticity_sweep import sweep_caption, sweep_lines
from lightning_goldy.report.registry import Row, require

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

# Legible on a light and on a dark page.
_COLOURS = ("#2a6fb0", "#c8871a", "#3a9a6b", "#b5489a", "#7a6bd1", "#c4453c")
_GATES = [[0, "#5a5a5a"], [1, "#8ecae6"]]


@register_chart("head_plasticity", "Open heads over the run")
def chart_gate_timeline(row: Row) -> Figure:
    """Which heads were open when.

    Args:
        row: Of the analysis ``head_plasticity``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> result = {"heads_per_layer": [2], "timeline": [{"step": 0, "closed": [[0, 1]]}], "strategy": "taylor"}
        >>> chart_gate_timeline({"step": 5, "metrics": {}, "result": {**result, "cycles": 1}}).data[0].z
        ([1.0], [0.0])
    """
    timeline = gate_timeline(row)
    trace = require("plotly.graph_objects").Heatmap(
        x=list(timeline.edges),
        y=[plain(label) for label in timeline.labels],
        z=timeline.opened.tolist(),
        zmin=0,
        zmax=1,
        colorscale=_GATES,
        showscale=False,
        ygap=1,
        hovertemplate="from step %{x}<br>head %{y}<br>%{z:d}<extra></extra>",
    )
    layout = _layout("optimizer step", "head (dark: closed)", plasticity_caption(row))
    layout["height"] = min(1600, 150 + 14 * len(timeline.labels))
    layout["yaxis"] |= {"type": "category", "autorange": "reversed"}
    figure: Figure = require("plotly.graph_objects").Figure(trace, layout)
    return figure


@register_chart("head_plasticity", "The loss over the cycles")
def chart_plasticity_loss(row: Row) -> Figure:
    """The loss of the probe with cuts and regrowths, and the learning-rate multiplier.

    Args:
        row: Of the analysis ``head_plasticity``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> curve = {"steps": [1, 2], "loss": [2.0, 3.0], "multiplier": [1.0, 3.0]}
        >>> result = {"curve": curve, "timeline": [], "strategy": "taylor", "cycles": 1}
        >>> chart_plasticity_loss({"metrics": {}, "result": result}).data[0].y
        (2.0, 3.0)
    """
    course, graph_objects = loss_course(row), require("plotly.graph_objects")
    figure: Figure = require("plotly.subplots").make_subplots(
        2, 1, shared_xaxes=True, row_heights=[0.72, 0.28], vertical_spacing=0.06
    )
    lines = (("loss", course.loss, "lines+markers"), ("multiplier", course.multiplier, "lines"))
    for number, (name, values, mode) in enumerate(lines, 1):
        trace = graph_objects.Scatter(
            x=list(course.steps), y=_finite(values), name=name, mode=mode, line={"color": _COLOURS[number - 1]}
        )
        figure.add_trace(trace, number, 1)
    layout = _layout("", "", plasticity_caption(row))
    figure.update_layout({key: layout[key] for key in ("template", "margin", "meta")}, height=420, showlegend=False)
    for step, what in course.events:
        colour = _COLOURS[5] if "cut" in what else _COLOURS[2]
        figure.add_vline(x=step, line={"color": colour, "width": 1, "dash": "dot"}, row="all", col=1)
        figure.add_annotation(
            x=step, y=1, yref="y domain", text=plain(what), textangle=-90, showarrow=False, font={"size": 10},
            xanchor="left", yanchor="top",
        )  # fmt: skip
    figure.update_xaxes(automargin=True, zeroline=False)
    figure.update_yaxes(automargin=True, zeroline=False)
    figure.update_xaxes(title_text="optimizer step", row=2)
    figure.update_yaxes(title_text="loss, nats", row=1)
    figure.update_yaxes(title_text="multiplier", row=2)
    return figure


@register_chart("head_plasticity", "Importance of heads")
def chart_head_scores(row: Row) -> Figure:
    """Heat map of the scores that the last cut rested on.

    Args:
        row: Of the analysis ``head_plasticity``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> scores = {"values": [[0.5, -1.0]], "closed_before": [], "cut": [[0, 1]], "strategy": "taylor", "step": 3}
        >>> chart_head_scores({"result": {"scores": {**scores, "n_samples": 4}}}).data[0].text
        (['0.5', '-1 (cut)'],)
    """
    grid, graph_objects = score_grid(row), require("plotly.graph_objects")
    layout = _layout("head", "layer", score_caption(row))
    if grid is None:
        layout["height"] = 120
        empty: Figure = graph_objects.Figure([], layout)
        return empty
    layers, heads = grid.values.shape
    text = []
    for layer in range(layers):
        marks = [
            " (cut)" if (layer, head) in grid.cut else " (closed)" if (layer, head) in grid.closed else ""
            for head in range(heads)
        ]
        text.append([f"{format_cell(value)}{mark}" for value, mark in zip(grid.values[layer], marks, strict=True)])
    trace = graph_objects.Heatmap(
        z=[_finite(line) for line in grid.values.tolist()],
        text=text,
        texttemplate="%{text}",
        coloraxis="coloraxis",
        hoverongaps=False,
        xgap=2,
        ygap=2,
        hovertemplate="layer %{y}, head %{x}<br>%{z:.4g}<extra></extra>",
    )
    layout["height"] = 130 + 26 * layers
    layout["xaxis"] |= {"dtick": 1, "showgrid": False}
    layout["yaxis"] |= {"dtick": 1, "autorange": "reversed", "showgrid": False}
    layout["coloraxis"] = {"colorscale": "Cividis", "colorbar": {"title": {"text": "score"}, "thickness": 12}}
    figure: Figure = graph_objects.Figure(trace, layout)
    return figure


@register_chart("head_plasticity", "Attention of cut and kept heads")
def chart_attention_maps(row: Row) -> Figure:
    """Attention maps of some cut and some kept heads for one sample.

    Args:
        row: Of the analysis ``head_plasticity``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> shown = {"heads": [[0, 1]], "n_cut": 1, "maps": {"before": [[[1.0]]]}}
        >>> len(chart_attention_maps({"result": {"attention": shown}}).data)
        1
    """
    grid, graph_objects = attention_grid(row), require("plotly.graph_objects")
    if grid is None:
        empty: Figure = graph_objects.Figure([], {**_layout("", "", "no attention maps yet"), "height": 120})
        return empty
    rows, columns = len(grid.moments), len(grid.heads)
    figure: Figure = require("plotly.subplots").make_subplots(
        rows, columns, column_titles=[plain(head) for head in grid.heads], row_titles=list(grid.moments),
        horizontal_spacing=0.15 / columns, vertical_spacing=0.12 / rows,
    )  # fmt: skip
    for line in range(rows):
        for column in range(columns):
            trace = graph_objects.Heatmap(
                z=grid.maps[line, column].tolist(),
                coloraxis="coloraxis",
                hovertemplate="query %{y}, key %{x}<br>%{z:.3f}<extra></extra>",
            )
            figure.add_trace(trace, line + 1, column + 1)
    figure.update_xaxes(showticklabels=False, showgrid=False)
    figure.update_yaxes(showticklabels=False, showgrid=False, autorange="reversed")
    figure.update_annotations(font_size=10)
    figure.update_layout(
        template=None,
        height=90 + 130 * rows,
        margin={"l": 8, "r": 24, "t": 36, "b": 8},
        coloraxis={"colorscale": "Viridis", "cmin": 0, "cmax": 1, "showscale": False},
        meta={"caption": "columns: layer.head; rows of each map are queries; the first tokens of the first sample"},
    )
    return figure


@register_chart("plasticity_sweep", "What pruning cost")
def chart_plasticity_sweep(row: Row) -> Figure:
    """What pruning cost at the end of each run, by level, for each strategy and number of cycles.

    Args:
        row: Of the analysis ``plasticity_sweep``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> run = {"strategy": "taylor", "level": 0.5, "cycles": 1, "seed": 0, "cost": 0.1}
        >>> chart_plasticity_sweep({"result": {"runs": [run]}}).data[0].y
        (0.1,)
    """
    traces: list[Any] = []
    for line in sweep_lines(row):
        bars = {
            "type": "data",
            "symmetric": False,
            "array": [high - mean for high, mean in zip(line.high, line.mean, strict=True)],
            "arrayminus": [mean - low for low, mean in zip(line.low, line.mean, strict=True)],
        }
        traces.append(
            require("plotly.graph_objects").Scatter(
                x=list(line.levels), y=_finite(line.mean), error_y=bars, name=plain(line.label), mode="lines+markers"
            )
        )
    layout = _layout("pruning level", "loss over the run without pruning, nats", sweep_caption(row))
    layout |= {"height": 400, "showlegend": True, "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"}}
    figure: Figure = require("plotly.graph_objects").Figure(traces, layout)
    return figure


def _layout(x_title: str, y_title: str, caption: str) -> dict[str, Any]:
    return {
        "template": None,
        "height": 340,
        "margin": {"l": 8, "r": 8, "t": 28, "b": 8},
        "xaxis": {"title": {"text": x_title}, "automargin": True, "zeroline": False},
        "yaxis": {"title": {"text": y_title}, "automargin": True, "zeroline": False},
        "meta": {"caption": caption},
    }


def _finite(values: Any) -> list[float | None]:
    # null leaves a gap.
    return [value if value is not None and math.isfinite(value) else None for value in values]
