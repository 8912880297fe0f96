"""Attention as plotly figures, for the HTML page."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.report.attentions import (
    SHARES,
    TITLES,
    drift_caption,
    heads_by_statistic,
    heads_caption,
    patterns,
    patterns_caption,
    spectra,
    spectra_caption,
)
from lightning_goldy.report.charts import plain, register_chart
from lightning_goldy.report.registry import ReportError, Row, require

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_COLUMNS = 3


@register_chart("attention_tracker", "What each head looks at")
def chart_attention_heads(row: Row) -> Figure:
    """A heat map of layers and heads for every statistic that is a share.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> result = {"statistics": {"entropy": [[0.5]], "induction": [[None]], "diagonal": [[0.25]]}}
        >>> [trace.z for trace in chart_attention_heads({"result": result}).data]
        [([0.25],), ([None],)]
    """
    grids = {name: grid for name, grid in heads_by_statistic(row).items() if name in SHARES}
    if not grids:
        raise ReportError(f"'result.statistics' holds none of {', '.join(SHARES)}")
    titles = [TITLES[name] for name in grids]
    hovers = [f"layer %{{y}}, head %{{x}}<br>%{{z:.4g}}<extra>{plain(title)}</extra>" for title in titles]
    figure = _panels(list(grids.values()), titles, hovers, columns=min(_COLUMNS, len(grids)))
    lines = math.ceil(len(grids) / _COLUMNS)
    figure.update_layout(
        height=80 + lines * (70 + 18 * len(next(iter(grids.values())))),
        coloraxis=_colours("share", 1.0),
        meta={"caption": heads_caption(row)},
    )
    figure.update_yaxes(autorange="reversed", dtick=1)
    figure.update_xaxes(dtick=1)
    return figure


@register_chart("attention_tracker", "How sharply, how far, and how far from the base")
def chart_attention_scales(row: Row) -> Figure:
    """Heat maps of entropy and distance and, where there is a base, of the drift, each on its own scale.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> result = {"statistics": {"entropy": [[0.5]], "distance": [[3.0]]}}
        >>> figure = chart_attention_scales({"result": result})
        >>> [figure.layout[trace.coloraxis].cmax for trace in figure.data]
        [0.5, 3.0]
    """
    grids = {name: grid for name, grid in heads_by_statistic(row).items() if name not in SHARES}
    if not grids:
        raise ReportError("'result.statistics' holds neither entropy nor distance")
    titles = [TITLES.get(name, name) for name in grids]
    hovers = [f"layer %{{y}}, head %{{x}}<br>%{{z:.4g}}<extra>{plain(title)}</extra>" for title in titles]
    figure = _panels(list(grids.values()), titles, hovers, columns=len(grids))
    # By name, because the page gives a colour axis one range over all steps, and a step may lack a statistic.
    numbered = [name for name in TITLES if name not in SHARES]
    numbered += [name for name in grids if name not in numbered]
    for index, (trace, (name, grid)) in enumerate(zip(figure.data, grids.items(), strict=True)):
        top = float(np.nanmax(grid)) if np.isfinite(grid).any() else 1.0
        bar = {"thickness": 8, "outlinewidth": 0, "x": figure.layout[f"xaxis{index + 1 if index else ''}"].domain[1]}
        number = numbered.index(name)
        trace.coloraxis = f"coloraxis{number + 1}" if number else "coloraxis"
        figure.update_layout(
            {trace.coloraxis: {"colorscale": "Viridis", "cmin": 0, "cmax": top or 1.0, "colorbar": bar}}
        )
    caption = drift_caption(row) if "drift" in grids else "No base to compare with: add GoldenSnapshot for the drift."
    figure.update_layout(height=130 + 18 * len(next(iter(grids.values()))), meta={"caption": caption})
    figure.update_yaxes(autorange="reversed", dtick=1)
    figure.update_xaxes(dtick=1)
    return figure


@register_chart("attention_tracker", "What the chosen heads attend to")
def chart_attention_patterns(row: Row) -> Figure:
    """The chosen heads' patterns on the prompts, with token names.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> found = {"layer": 0, "head": 1, "weights": [[1.0]], "base": None}
        >>> prompt = {"name": "probe", "tokens": ["<b>"], "maps": [found]}
        >>> chart_attention_patterns({"result": {"prompts": [prompt]}}).data[0].customdata[0][0]
        ['&lt;b&gt;', '&lt;b&gt;']
    """
    return _pattern_chart(row, difference=False)


@register_chart("attention_tracker", "How these patterns differ from the base's")
def chart_attention_differences(row: Row) -> Figure:
    """The chosen heads' patterns minus the base's; empty without a base.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> found = {"layer": 0, "head": 1, "weights": [[1.0]], "base": [[0.75]]}
        >>> prompt = {"name": "probe", "tokens": ["a"], "maps": [found]}
        >>> chart_attention_differences({"result": {"prompts": [prompt]}}).data[0].z
        ([0.25],)
    """
    return _pattern_chart(row, difference=True)


@register_chart("attention_tracker", "Singular values of the patterns")
def chart_attention_spectra(row: Row) -> Figure:
    """The largest singular values over the run, means over heads.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: plotly is not installed.

    Example:
        >>> line = {"prompt": "probe", "steps": [0, 5], "values": [[2.0, 1.0], [2.5, None]]}
        >>> [trace.y for trace in chart_attention_spectra({"result": {"spectra": [line]}}).data]
        [(2.0, 2.5), (1.0, None)]
    """
    graph_objects = require("plotly.graph_objects")
    figure: Figure = graph_objects.Figure()
    for group in spectra(row):
        for index, values in enumerate(group.values.T):
            figure.add_trace(
                graph_objects.Scatter(
                    x=list(group.steps),
                    y=[value if math.isfinite(value) else None for value in values.tolist()],
                    name=plain(f"{group.prompt}, {index + 1}"),
                    mode="lines+markers",
                    hovertemplate=f"step %{{x}}<br>%{{y:.4g}}<extra>{plain(group.prompt)}, {index + 1}</extra>",
                )
            )
    figure.update_layout(
        template=None,
        height=320,
        margin={"l": 8, "r": 8, "t": 28, "b": 8},
        legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        xaxis={"title": {"text": "optimizer step"}, "automargin": True, "zeroline": False},
        yaxis={"title": {"text": "singular value"}, "automargin": True, "zeroline": False},
        meta={"caption": spectra_caption(row)},
    )
    return figure


def _pattern_chart(row: Row, *, difference: bool) -> Figure:
    shown = [each for each in patterns(row) if not difference or each.change is not None]
    if not shown:
        return _nothing("No base to compare with." if difference else "No pattern was kept.")
    grids = [each.change if difference and each.change is not None else each.weights for each in shown]
    titles = [f"{each.prompt}: layer {each.layer}, head {each.head}" for each in shown]
    hover = "%{customdata[0]} looks at %{customdata[1]}<br>%{z:.4g}<extra></extra>"
    columns = min(2, len(shown))
    figure = _panels(grids, titles, [hover] * len(grids), columns=columns)
    extent = max(1e-4, *(float(np.abs(grid).max()) for grid in grids)) if difference else 1.0
    for index, (trace, each) in enumerate(zip(figure.data, shown, strict=True)):
        names = [plain(token) for token in each.tokens]
        trace.customdata = [[[query, key] for key in names] for query in names]
        suffix = str(index + 1) if index else ""
        # Tokens repeat, so that they label places and cannot be places.
        ticks = {"tickvals": list(range(len(names))), "ticktext": names, "tickfont": {"size": 9}, "automargin": True}
        figure.layout[f"xaxis{suffix}"].update(ticks, tickangle=-90)
        figure.layout[f"yaxis{suffix}"].update(ticks, autorange="reversed")
    longest = max(len(each.tokens) for each in shown)
    colours = _colours("change", extent, low=-extent, scale="RdBu_r") if difference else _colours("weight", 1.0)
    figure.update_layout(
        height=80 + math.ceil(len(shown) / columns) * (150 + 14 * longest),
        coloraxis=colours,
        meta={"caption": patterns_caption(row)},
    )
    return figure


def _panels(grids: list[NDArray[np.float64]], titles: list[str], hovers: list[str], *, columns: int) -> Figure:
    lines = math.ceil(len(grids) / columns)
    figure: Figure = require("plotly.subplots").make_subplots(
        lines,
        columns,
        subplot_titles=[plain(title) for title in titles],
        vertical_spacing=0.35 / lines,
        horizontal_spacing=0.3 / columns,
    )
    for index, (grid, hover) in enumerate(zip(grids, hovers, strict=True)):
        cells = [[float(f"{value:.5g}") if math.isfinite(value) else None for value in line] for line in grid]
        trace: Any = require("plotly.graph_objects").Heatmap(
            z=cells, coloraxis="coloraxis", hovertemplate=hover, hoverongaps=False, xgap=1, ygap=1
        )
        figure.add_trace(trace, index // columns + 1, index % columns + 1)
    figure.update_annotations(font_size=12)
    figure.update_layout(template=None, margin={"l": 8, "r": 8, "t": 36, "b": 8})
    figure.update_xaxes(showgrid=False, zeroline=False, automargin=True)
    figure.update_yaxes(showgrid=False, zeroline=False, automargin=True)
    return figure


def _colours(title: str, top: float, *, low: float = 0.0, scale: str = "Viridis") -> dict[str, Any]:
    bar = {"title": {"text": title}, "thickness": 12, "outlinewidth": 0, "len": 1}
    return {"colorscale": scale, "cmin": low, "cmax": top, "colorbar": bar}


def _nothing(text: str) -> Figure:
    layout = {"template": None, "height": 60, "xaxis": {"visible": False}, "yaxis": {"visible": False}}
    note = [{"text": text, "showarrow": False, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}]
    figure: Figure = require("plotly.graph_objects").Figure(layout={**layout, "annotations": note})
    return figure
