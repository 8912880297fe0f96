"""A figure as a piece of the page: its chart stored once, the numbers of every step, a slider, a caption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lightning_goldy.report.figures import Figure, plain_columns, range_params
from lightning_goldy.report.formatting import script_json


@dataclass(frozen=True)
class Frame:
    """A figure at one step.

    Args:
        label: Shown beside the slider, for example ``step 40``.
        figure: The figure, or a sentence that says why there is none.
    """

    label: str
    figure: Figure | str


def figure_html(heading: str, frames: Sequence[Frame]) -> str:
    """A figure of the page; with several frames it has a slider that starts at the last.

    Args:
        heading: Text above the figure.
        frames: At least one, in the order of the slider.

    Example:
        >>> from lightning_goldy.report.builders import lines
        >>> page = figure_html("Loss <nats>", [Frame("step 1", lines({"loss": ([1], [2.0])}))])
        >>> "<h4>Loss &lt;nats&gt;</h4>" in page, "<input" in page
        (True, False)
    """
    figures = [frame.figure for frame in frames if isinstance(frame.figure, Figure)]
    if not figures:
        return f'<figure><h4>{escape(heading)}</h4><p class="note">{escape(str(frames[-1].figure))}</p></figure>'
    captions = [frame.figure.caption if isinstance(frame.figure, Figure) else frame.figure for frame in frames]
    slider = _slider(heading, frames) if len(frames) > 1 else ""
    caption = f"<figcaption>{escape(captions[-1])}</figcaption>" if any(captions) else ""
    return (
        f'<figure class="chart"><h4>{escape(heading)}</h4>{slider}<div class="plot"></div>{caption}'
        f'<script type="application/json">{script_json(_packed(frames))}</script></figure>'
    )


def _slider(heading: str, frames: Sequence[Frame]) -> str:
    last = len(frames) - 1
    return (
        f'<label class="steps"><span>Analysis</span><input type="range" min="0" max="{last}" value="{last}" step="1" '
        f'aria-label="Step of {escape(heading)}"><output>{escape(frames[-1].label)}</output></label>'
    )


def _packed(frames: Sequence[Frame]) -> dict[str, Any]:
    """What the script needs: charts, columns that most frames have in common, and what is each frame's own."""
    specs: list[dict[str, Any]] = []
    shared: dict[str, dict[str, Any]] = {}
    packed = []
    for frame in frames:
        content: dict[str, Any] = {"label": frame.label}
        packed.append(content)
        if isinstance(frame.figure, str):
            content["none"] = frame.figure
            continue
        spec = frame.figure.bare()
        if spec not in specs:
            specs.append(spec)
        content |= {"caption": frame.figure.caption, "spec": specs.index(spec), "data": {}}
        for name, columns in frame.figure.data.items():
            own = {column: _short(values) for column, values in plain_columns(columns).items()}
            common = shared.setdefault(name, own)
            # 0 stands for a column that is the same as in the first frame.
            content["data"][name] = {
                column: 0 if common.get(column) == values else values for column, values in own.items()
            }
    return {"specs": specs, "params": range_params(_widest(frames)), "shared": shared, "frames": packed}


def _widest(frames: Sequence[Frame]) -> dict[str, tuple[float, float]]:
    """One range of colours for all steps, so that moving the slider compares."""
    ranges: dict[str, tuple[float, float]] = {}
    for frame in frames:
        if isinstance(frame.figure, Figure):
            for name, (low, high) in frame.figure.ranges.items():
                known = ranges.get(name, (low, high))
                ranges[name] = min(low, known[0]), max(high, known[1])
    return ranges


def _short(values: Sequence[Any]) -> Sequence[Any] | Mapping[str, Any]:
    """A column of texts that repeat as the texts and their places."""
    if not values or not isinstance(values[0], str):
        return values
    places = {text: place for place, text in enumerate(dict.fromkeys(values))}
    if len(places) > len(values) / 2:
        return values
    return {"of": list(places), "at": [places[text] for text in values]}
