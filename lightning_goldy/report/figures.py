"""Figures as pieces of the page: data for the script, a slider over the steps, a caption."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from lightning_goldy.report.charts import Series, line_chart

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True)
class Frame:
    """A figure at one step.

    Args:
        label: Shown beside the slider, for example ``step 40``.
        figure: The figure; its caption is ``layout.meta["caption"]``.
    """

    label: str
    figure: Figure


def script_json(value: Any) -> str:
    r"""JSON that can stand inside a script element whatever text it holds.

    Example:
        >>> script_json({"name": "</script>"}) == r'{"name":"\u003c/script\u003e"}'
        True
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def figure_html(heading: str, frames: Sequence[Frame]) -> str:
    """A figure of the page; with several frames it has a slider that starts at the last.

    Args:
        heading: Text above the figure.
        frames: At least one, in the order of the slider.

    Example:
        >>> from lightning_goldy.report.charts import line_chart
        >>> page = figure_html("Loss <nats>", [Frame("step 1", line_chart({"loss": ([1], [2.0])}))])
        >>> "<h4>Loss &lt;nats&gt;</h4>" in page, "<input" in page
        (True, False)
    """
    figures = [json.loads(frame.figure.to_json()) for frame in frames]
    _share_colours(figures)
    captions = [(figure["layout"].pop("meta", None) or {}).get("caption", "") for figure in figures]
    data = [
        {"label": frame.label, "caption": caption, "figure": figure}
        for frame, caption, figure in zip(frames, captions, figures, strict=True)
    ]
    height = int(figures[-1]["layout"].get("height", 300))
    slider = _slider(heading, frames) if len(frames) > 1 else ""
    caption = f"<figcaption>{escape(captions[-1])}</figcaption>" if any(captions) else ""
    return (
        f'<figure class="chart"><h4>{escape(heading)}</h4>{slider}'
        f'<div class="plot" style="height:{height}px"></div>{caption}'
        f'<script type="application/json">{script_json(data)}</script></figure>'
    )


def lines_html(heading: str, series: Mapping[str, Series]) -> str:
    """A line chart of the page.

    Example:
        >>> lines_html("loss", {"loss": ([1, 2], [2.0, 1.0])}).startswith('<figure class="chart"><h4>loss</h4>')
        True
    """
    return figure_html(heading, [Frame("", line_chart(series))])


def _slider(heading: str, frames: Sequence[Frame]) -> str:
    last = len(frames) - 1
    return (
        f'<label class="steps"><span>Analysis</span><input type="range" min="0" max="{last}" value="{last}" step="1" '
        f'aria-label="Step of {escape(heading)}"><output>{escape(frames[-1].label)}</output></label>'
    )


def _share_colours(figures: Sequence[dict[str, Any]]) -> None:
    """One colour scale for all steps, so that moving the slider compares."""
    names = {name for figure in figures for name in figure["layout"] if name.startswith("coloraxis")}
    for name in names:
        axes = [figure["layout"][name] for figure in figures if name in figure["layout"]]
        for bound, choose in (("cmin", min), ("cmax", max)):
            values = [axis[bound] for axis in axes if axis.get(bound) is not None]
            for axis in axes:
                if values:
                    axis[bound] = choose(values)
