"""Figures of topics that are still drawn twice: with plotly for the page, with matplotlib for the loggers."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from lightning_goldy.report.charts import CHARTS
from lightning_goldy.report.figures import Row, require
from lightning_goldy.report.formatting import script_json
from lightning_goldy.report.plots import PLOTS

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
        f'<figure class="chart old"><h4>{escape(heading)}</h4>{slider}'
        f'<div class="plot" style="height:{height}px"></div>{caption}'
        f'<script type="application/json">{script_json(data)}</script></figure>'
    )


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


@dataclass(frozen=True)
class Plot:
    """A matplotlib figure that answers as a :class:`~lightning_goldy.report.figures.Figure` does."""

    figure: Any

    def png(self, scale: float = 1.0) -> bytes:
        """The image."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=100 * scale)
        return buffer.getvalue()


def draw_old(row: Row, earlier: Sequence[Row] = ()) -> dict[str, Any]:
    """The matplotlib figures of a row."""
    return {name: Plot(figure) for name, figure in PLOTS.draw(row, earlier).items()}


def scripts_html() -> str:
    """What draws plotly figures on the page."""
    script = resources.files("lightning_goldy.report").joinpath("legacy.js").read_text(encoding="utf-8")
    return f"<script>\n{require('plotly.offline').get_plotlyjs()}\n</script>\n<script>\n{script}\n</script>"


def old_figures_html(drawn: Sequence[Mapping[str, Any]], labels: Sequence[str], analysis: str) -> str:
    """The plotly figures of an analysis."""
    return "".join(
        figure_html(name, [Frame(label, figures[name]) for label, figures in zip(labels, drawn, strict=True)])
        for name in CHARTS.names(analysis)
    )
