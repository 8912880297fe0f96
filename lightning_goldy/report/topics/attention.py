"""What attention heads look at: statistics of all heads, patterns of some on prompts, and singular values."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.report.builders import (
    HeatMap,
    Lines,
    arrange,
    columns_of,
    heads_style,
    heat_map,
    lines,
    plain_spec,
)
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import (
    Figure,
    ReportError,
    Row,
    matrix,
    objects_of,
    register_figure,
    require,
    result_of,
)
from lightning_goldy.report.formatting import format_number


class AttentionMaps(Protocol):
    """Recorded patterns, as :func:`~lightning_goldy.analysis.attention_maps` gives them."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Those recorded."""

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """Pairs of layer and head."""

    def token_names(self, sample: int = 0) -> tuple[str, ...]:
        """Names of the tokens."""

    def pattern(self, layer: int, head: int, *, sample: int = 0) -> Any:
        """Softmax weights of one head."""


SHARES = ("normalised_entropy", "first_token", "diagonal", "previous_token", "induction", "duplicate_token")
"""Statistics between 0 and 1, which share a colour scale."""

TITLES = {
    "entropy": "entropy, nats",
    "normalised_entropy": "entropy / log visible",
    "distance": "distance, tokens",
    "first_token": "first token",
    "diagonal": "own token",
    "previous_token": "previous token",
    "induction": "induction",
    "duplicate_token": "duplicate token",
    "drift": "drift from the base, nats",
}

# More patterns than these cannot be read.
_MOST_PATTERNS = 16
_SOME = "a list of at least one object"
_SPECTRA = (
    "Largest singular values of the attention patterns, means over all heads. A first value that grows while the "
    "others fall means that queries look more and more at the same places; values near 1 mean that each looks at a "
    "place of its own."
)


@register_figure("attention_tracker", "heads", heading="What each head looks at")
def chart_attention_heads(row: Row) -> Figure:
    """A heat map of layers and heads for every statistic that is a share, all in the same colours.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> result = {"statistics": {"entropy": [[0.5]], "induction": [[None]], "diagonal": [[0.25]]}}
        >>> [cells["value"] for cells in chart_attention_heads({"result": result}).data.values()]
        [[0.25], [None]]
    """
    grids = {name: grid for name, grid in heads_by_statistic(row).items() if name in SHARES}
    if not grids:
        raise ReportError(f"'result.statistics' holds none of {', '.join(SHARES)}")
    last = min(len(grids), _columns(grids)) - 1
    panels = [
        _heads(grid, "share", TITLES[name], scale="share", legend=place == last, extent=(0.0, 1.0))
        for place, (name, grid) in enumerate(grids.items())
    ]
    return arrange(panels, columns=_columns(grids), caption=heads_caption(row))


@register_figure("attention_tracker", "scales", heading="How sharply, how far, and how far from the base")
def chart_attention_scales(row: Row) -> Figure:
    """Heat maps of entropy and distance and, where there is a base, of the drift, each in colours of its own.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> result = {"statistics": {"entropy": [[0.5]], "distance": [[3.0]]}}
        >>> chart_attention_scales({"result": result}).ranges
        {'entropy': (0.0, 0.5), 'distance': (0.0, 3.0)}
    """
    grids = {name: grid for name, grid in heads_by_statistic(row).items() if name not in SHARES}
    if not grids:
        raise ReportError("'result.statistics' holds neither entropy nor distance")
    panels = [
        _heads(grid, "", TITLES.get(name, name), scale=name if name.isidentifier() else f"other_{place}")
        for place, (name, grid) in enumerate(grids.items())
    ]
    caption = drift_caption(row) if "drift" in grids else "No base to compare with: add GoldenSnapshot for the drift."
    return arrange(panels, columns=_columns(grids), caption=caption)


@register_figure("attention_tracker", "patterns", heading="What the chosen heads attend to")
def chart_attention_patterns(row: Row) -> Figure | str:
    """The chosen heads' patterns on the prompts, with token names.

    Args:
        row: Of the analysis ``attention_tracker``.

    Returns:
        The figure, or that no pattern was kept.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> found = {"layer": 0, "head": 1, "weights": [[1.0]], "base": None}
        >>> prompt = {"name": "probe", "tokens": ["<b>"], "maps": [found]}
        >>> chart_attention_patterns({"result": {"prompts": [prompt]}}).data["cells_0"]
        {'y': ['0|<b>'], 'x': ['0|<b>'], 'value': [1.0]}
    """
    shown = [(pattern.title, pattern.tokens, pattern.weights) for pattern in patterns(row)]
    return arrange(_maps(shown), columns=2, caption=patterns_caption(row)) if shown else "No pattern was kept."


@register_figure("attention_tracker", "differences", heading="How these patterns differ from the base's")
def chart_attention_differences(row: Row) -> Figure | str:
    """The chosen heads' patterns minus the base's.

    Args:
        row: Of the analysis ``attention_tracker``.

    Returns:
        The figure, or that there is no base.

    Raises:
        ReportError: The row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> found = {"layer": 0, "head": 1, "weights": [[1.0]], "base": [[0.75]]}
        >>> prompt = {"name": "probe", "tokens": ["a"], "maps": [found]}
        >>> chart_attention_differences({"result": {"prompts": [prompt]}}).ranges
        {'change': (-0.25, 0.25)}
    """
    shown = [(pattern.title, pattern.tokens, pattern.change) for pattern in patterns(row) if pattern.change is not None]
    if not shown:
        return "No base to compare with."
    return arrange(_maps(shown, changes=True), columns=2, caption=patterns_caption(row))


@register_figure(
    "attention_tracker", "singular_values", heading="Singular values of the patterns", over="run", reads=("spectra",)
)
def chart_attention_spectra(rows: Sequence[Row]) -> Figure:
    """The largest singular values over the run, means over heads, one panel per prompt.

    Args:
        rows: Of the analysis ``attention_tracker``, ascending.

    Raises:
        ReportError: A row lacks what the figure needs.
        ImportError: altair is not installed.

    Example:
        >>> rows = [{"step": step, "result": {"spectra": [{"prompt": "a", "values": [2.0, None]}]}} for step in (0, 5)]
        >>> chart_attention_spectra(rows).data["points_0"]["y"]
        [2.0, 2.0, None, None]
    """
    panels = []
    for prompt, courses in spectra(rows).items():
        named = {f"value {place}": course for place, course in enumerate(courses, 1)}
        panels.append(lines(named, Lines(y="singular value", scale="linear", title=prompt, height=180)))
    return arrange(panels, caption=_SPECTRA)


def chart_attention_map(maps: AttentionMaps, layer: int, head: int, *, sample: int = 0) -> Figure:
    """What one head attends to, with token names.

    Args:
        maps: Recorded patterns.
        layer: One of those recorded.
        head: From 0.
        sample: Row of the batch.

    Raises:
        IndexError: There is no such layer, head or sample.
        ImportError: altair is not installed.

    Example:
        >>> import torch
        >>> from lightning_goldy.analysis.attention import AttentionMaps
        >>> maps = AttentionMaps((0,), (torch.eye(2)[None, None],), torch.ones(1, 2, dtype=torch.bool), (("a", "b"),))
        >>> chart_attention_map(maps, 0, 0).data["cells_0"]["y"]
        ['0|a', '0|a', '1|b', '1|b']
    """
    shown = (f"layer {layer}, head {head}", maps.token_names(sample), _weights(maps, layer, head, sample))
    return arrange(_maps([shown]))


def chart_attention_map_change(
    maps: AttentionMaps, base: AttentionMaps, layer: int, head: int, *, sample: int = 0
) -> Figure:
    """One head's pattern in the base, the present one, and their difference.

    Args:
        maps: Recorded patterns.
        base: Those of the base model on the same batch.
        layer: One of those recorded.
        head: From 0.
        sample: Row of the batch.

    Raises:
        ValueError: The two are of different prompts.
        IndexError: There is no such layer, head or sample.
        ImportError: altair is not installed.
    """
    names, title = maps.token_names(sample), f"layer {layer}, head {head}"
    if base.token_names(sample) != names:
        raise ValueError("the patterns and the base's are of different prompts")
    before, now = (_weights(each, layer, head, sample) for each in (base, maps))
    both = _maps([(f"base: {title}", names, before), (title, names, now)])
    return arrange([*both, *_maps([("minus the base", names, now - before)], changes=True)], columns=3)


def chart_attention_grid(maps: AttentionMaps, *, sample: int = 0, base: AttentionMaps | None = None) -> Figure:
    """All recorded heads at once: a row of small panels per layer, a panel per head.

    Args:
        maps: Recorded patterns.
        sample: Row of the batch.
        base: Those of the base model on the same batch; the differences are then shown.

    Raises:
        IndexError: There is no such sample.
        ImportError: altair is not installed.
    """
    cells: list[tuple[float, ...]] = []
    for layer, head in maps.heads:
        values = _weights(maps, layer, head, sample)
        if base is not None:
            values = values - _weights(base, layer, head, sample)
        place = maps.layers.index(layer)
        cells += [(place, head, *at, float(f"{value:.4g}")) for at, value in np.ndenumerate(values)]
    table = columns_of(("layer", "head", "query", "key", "value"), cells)
    columns = max(table["head"], default=0) + 1
    chart = _grid_chart(maps.layers, columns, len(maps.token_names(sample)), base is not None)
    return Figure(chart, {"cells": table})


@functools.lru_cache(maxsize=16)
def _grid_chart(layers: tuple[int, ...], columns: int, length: int, changes: bool) -> dict[str, Any]:
    alt = require("altair")
    size, gap = max(24, min(64, 1200 // max(columns, len(layers)))), 0.92
    plain = {"grid": False, "domain": False, "ticks": False}
    scheme, low = ("redblue", -1) if changes else ("viridis", 0)
    scale = alt.Scale(scheme=scheme, domain=[low, 1], reverse=changes)
    places = {
        side: f"datum.{panel} + {gap} * (datum.{place} + {end}) / {length}"
        for panel, place, names in (("head", "key", ("left", "right")), ("layer", "query", ("top", "bottom")))
        for side, end in zip(names, (0, 1), strict=True)
    }
    axes = []
    for names, title in ((range(columns), "head"), (layers, "layer")):
        said = f"{list(names)}[floor(datum.value)]"
        axis = alt.Axis(values=[place + gap / 2 for place in range(len(names))], labelExpr=said, **plain)
        across = alt.Scale(domain=[0, len(names)], nice=False, zero=False, reverse=title == "layer")
        axes.append({"title": title, "axis": axis, "scale": across})
    axes[0]["axis"]["orient"] = "top"
    chart = (
        alt.Chart(alt.NamedData("cells"))
        .mark_rect()
        .transform_calculate(**places, name=f"{list(layers)}[datum.layer]")
        .encode(
            x=alt.X("left:Q", **axes[0]),
            x2="right:Q",
            y=alt.Y("top:Q", **axes[1]),
            y2="bottom:Q",
            color=alt.Color("value:Q", scale=scale, title="change" if changes else "weight"),
            tooltip=[alt.Tooltip("name:N", title="layer"), "head:Q", "query:Q", "key:Q", "value:Q"],
        )
    )
    return plain_spec(chart, width=size * columns, height=size * len(layers))


def _columns(grids: Mapping[str, NDArray[np.float64]]) -> int:
    """How many heat maps of heads fit side by side."""
    n_heads = next(iter(grids.values())).shape[1]
    return max(1, min(3, 900 // (_cell(n_heads) * n_heads + 70)))


def _cell(count: int) -> int:
    return max(12, min(40, 180 // count))


def _heads(
    grid: NDArray[np.float64],
    unit: str,
    title: str,
    *,
    scale: str,
    legend: bool = True,
    extent: tuple[float, float] | None = None,
) -> Figure:
    size = _cell(grid.shape[1])
    style = heads_style(unit, title=title, scale=scale, legend=legend, cell=(size, min(size, 22)))
    return heat_map(grid, range(grid.shape[0]), range(grid.shape[1]), style, extent=extent)


_Shown = tuple[str, tuple[str, ...], NDArray[np.float64]]


def _maps(shown: Sequence[_Shown], *, changes: bool = False) -> list[Figure]:
    """Patterns of queries and keys, or their changes, in the same colours: title, tokens and numbers of each."""
    most = max(1e-4, *(float(np.abs(values).max()) for *_, values in shown)) if changes else 1.0
    panels = []
    for place, (title, tokens, values) in enumerate(shown):
        size = max(5.0, min(16.0, 330 / len(tokens)))
        style = HeatMap(
            unit="change" if changes else "weight",
            rows="query",
            columns="key",
            colours="diverging" if changes else "viridis",
            scale="change" if changes else "weight",
            numbers=False,
            cell=(size, size),
            title=title,
            legend=place == min(2, len(shown)) - 1,
        )
        panels.append(heat_map(values, tokens, tokens, style, extent=(-most if changes else 0.0, most)))
    return panels


def _weights(maps: AttentionMaps, layer: int, head: int, sample: int) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = maps.pattern(layer, head, sample=sample).double().numpy()
    return weights


@dataclass(frozen=True, eq=False)
class Pattern:
    """What one head attends to on one prompt.

    Args:
        prompt: Its name.
        tokens: Names of its tokens.
        layer: From 0.
        head: From 0.
        weights: Rows are queries, ``[T, T]``.
        change: Weights minus the base's, likewise; None without a base.
    """

    prompt: str
    tokens: tuple[str, ...]
    layer: int
    head: int
    weights: NDArray[np.float64]
    change: NDArray[np.float64] | None

    @property
    def title(self) -> str:
        """On which prompt, and which head it is."""
        return f"{self.prompt}: layer {self.layer}, head {self.head}"


def heads_by_statistic(row: Row) -> dict[str, NDArray[np.float64]]:
    """Each statistic of every head, ``[layers, heads]``, in a fixed order.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> heads_by_statistic({"result": {"statistics": {"entropy": [[0.5, None]]}}})["entropy"]
        array([[0.5, nan]])
    """
    tables = result_of(row).get("statistics")
    if not isinstance(tables, Mapping) or not tables:
        raise ReportError(f"'result.statistics' must be an object with at least one statistic, got {tables!r:.60}")
    grids = {name: matrix(values, f"result.statistics.{name}") for name, values in tables.items()}
    if len({grid.shape for grid in grids.values()}) != 1:
        raise ReportError("the tables of 'result.statistics' differ in shape")
    return {name: grids[name] for name in (*TITLES, *(each for each in grids if each not in TITLES)) if name in grids}


def patterns(row: Row) -> list[Pattern]:
    """The patterns that a row keeps, at most as many as a figure can hold.

    Args:
        row: Of the analysis ``attention_tracker``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> found = {"layer": 0, "head": 1, "weights": [[1.0]], "base": [[0.75]]}
        >>> prompt = {"name": "probe", "tokens": ["a"], "maps": [found]}
        >>> patterns({"result": {"prompts": [prompt]}})[0].change
        array([[0.25]])
    """
    shown = []
    for index, prompt in enumerate(objects_of(row, "prompts", _SOME)):
        where = f"result.prompts[{index}]"
        tokens, maps = prompt.get("tokens"), prompt.get("maps")
        if not isinstance(tokens, list) or not isinstance(maps, list):
            raise ReportError(f"'{where}' must hold the lists 'tokens' and 'maps'")
        for number, head in enumerate(maps):
            place = f"{where}.maps[{number}]"
            if not isinstance(head, Mapping) or not all(isinstance(head.get(key), int) for key in ("layer", "head")):
                raise ReportError(f"'{place}' must be an object with 'layer' and 'head', got {head!r:.60}")
            weights = matrix(head.get("weights"), f"{place}.weights")
            base = None if head.get("base") is None else matrix(head["base"], f"{place}.base")
            for table in (weights, base):
                if table is not None and table.shape != (len(tokens), len(tokens)):
                    raise ReportError(f"'{place}' has weights of shape {table.shape} for {len(tokens)} tokens")
            change = None if base is None else weights - base
            name = str(prompt.get("name"))
            shown.append(Pattern(name, tuple(map(str, tokens)), head["layer"], head["head"], weights, change))
    return shown[:_MOST_PATTERNS]


def spectra(rows: Sequence[Row]) -> dict[str, list[tuple[list[int], list[float | None]]]]:
    """The courses of the singular values by prompt: steps and means over heads of the first, the second, ...

    Args:
        rows: Of the analysis ``attention_tracker``, ascending.

    Raises:
        ReportError: A row lacks what the figure needs.

    Example:
        >>> rows = [{"step": step, "result": {"spectra": [{"prompt": "a", "values": [2.0, None]}]}} for step in (0, 5)]
        >>> spectra(rows)
        {'a': [([0, 5], [2.0, 2.0]), ([0, 5], [None, None])]}
    """
    courses: dict[str, list[tuple[list[int], list[float | None]]]] = {}
    for row in rows:
        for index, spectrum in enumerate(objects_of(row, "spectra", _SOME)):
            (values,) = matrix([spectrum.get("values")], f"result.spectra[{index}].values")
            course = courses.setdefault(str(spectrum.get("prompt")), [])
            course += [([], []) for _ in range(len(values) - len(course))]
            for (steps, means), value in zip(course, values.tolist(), strict=False):
                steps.append(row["step"])
                means.append(value if math.isfinite(value) else None)
    return courses


def heads_caption(row: Row) -> str:
    """What the numbers are means over, and how to read them.

    Example:
        >>> heads_caption({"result": {"n_samples": 16, "queries": {"entropy": 200, "induction": 7}}})[:53]
        'Means over 200 queries of 16 samples, padding left ou'
    """
    result = result_of(row)
    queries = result.get("queries")
    counts = queries if isinstance(queries, Mapping) else {}
    total, induced, repeated = (format_number(counts.get(name)) for name in ("entropy", "induction", "duplicate_token"))
    return (
        f"Means over {total} queries of {format_number(result.get('n_samples'))} samples, padding left out; induction "
        f"over the {induced} and duplicate token over the {repeated} whose token occurred before. Rows are layers, "
        "columns heads."
    )


def drift_caption(row: Row) -> str:
    """Where the patterns moved most.

    Example:
        >>> drift_caption({"result": {"statistics": {"drift": [[0.0, 0.25]]}}})[:62]
        'Mean Jensen-Shannon divergence between the present and the bas'
    """
    grid = heads_by_statistic(row).get("drift")
    text = (
        "Mean Jensen-Shannon divergence between the present and the base's attention rows, at most log 2 = 0.693 nats."
    )
    if grid is None or not np.isfinite(grid).any():
        return text
    layer, head = np.unravel_index(int(np.nanargmax(grid)), grid.shape)
    return f"{text} It is largest in layer {layer}, head {head}: {format_number(float(grid[layer, head]))} nats."


def patterns_caption(row: Row) -> str:
    """How to read a pattern.

    Example:
        >>> patterns_caption({"result": {"prompts": []}})[:44]
        'Each row is a query, each column a key that '
    """
    total = sum(len(each.get("maps", ())) for each in result_of(row).get("prompts", ()) if isinstance(each, Mapping))
    more = f" The first {_MOST_PATTERNS} of {total} patterns." if total > _MOST_PATTERNS else ""
    return f"Each row is a query, each column a key that it looks at; a row sums to 1.{more}"


_ATTENTION_TRACKER = Description(
    title="Attention heads",
    measures=(
        "What every attention head looks at, averaged over the probe's tokens, and how far its patterns have moved "
        "from those of the base model."
    ),
    reading=(
        "A head near 1 in one of the shares does one thing: it looks at the token before, at the first token, or "
        "at what followed the last time. Heads that drift while the others stay are where the finetune changed "
        "what is looked at; a finetune that changes predictions without drift works through values and MLPs."
    ),
    metrics={
        "entropy": "mean entropy of the attention rows, nats",
        "normalised_entropy": "that entropy over the logarithm of the number of visible tokens; 1 is uniform",
        "distance": "mean distance between query and key, tokens",
        "first_token": "share of the attention on the first token",
        "diagonal": "share on the query's own token",
        "previous_token": "share on the token right before",
        "induction": "share on tokens that followed earlier occurrences of the query's token",
        "duplicate_token": "share on earlier occurrences of the query's token",
        "drift": "Jensen-Shannon divergence from the base's attention rows, nats; at most 0.693",
        "previous_token_max": "the same share of the head that has most of it",
        "induction_max": "the same share of the head that has most of it",
        "duplicate_token_max": "the same share of the head that has most of it",
        "drift_max": "drift of the head that moved most, nats",
        "largest_singular_value": "of the patterns on a prompt, mean over heads; 1 for a permutation",
    },
    headline=("entropy", "induction_max", "drift"),
    method=(
        "Attention of every head was told by its entropy, its scores as an induction (Olsson et al. 2022, arXiv "
        "2209.11895), previous-token and duplicate-token head (Wang et al. 2022, arXiv 2211.00593), and its Jensen-"
        "Shannon divergence from the base's."
    ),
)
describe("attention_tracker", _ATTENTION_TRACKER)
