"""Figures by the kind of row that they draw, and the entries of rows, checked as they are read.

A figure is described once: which analysis it belongs to, and one specification for the page and for the loggers. A
function registered with :func:`register_figure` makes a :class:`Figure` out of a row, most often with the helpers of
:mod:`lightning_goldy.report.builders`. The page draws its specification with the reader's own script, the loggers take
its PNG.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import struct
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.core.files import PlainError, finite
from lightning_goldy.report.rendering import narrower, png_of, require_drawing

if TYPE_CHECKING:
    import altair

Row: TypeAlias = Mapping[str, Any]
Columns: TypeAlias = Mapping[str, Sequence[Any]]
"""Data of a figure: field name to values, all of one length. Values are numbers, texts, truth values or None."""

# Width of the plot of a specification that states none, where it cannot take the page's.
_WIDTH = 560
_BACKGROUNDS = {"light": "#ffffff", "dark": "#1c2229"}
# Charts that were made narrower, by what they were.
_FITTED: dict[str, dict[str, Any]] = {}
_MOST_FITTED = 256


class ReportError(PlainError):
    """A run directory or a row in it is not what the report can read; the message names the place."""


@dataclass(frozen=True)
class Figure:
    """What a figure shows, and the words around it.

    Data are given apart from the chart, by name, so that the page stores the chart of a slider once. A chart refers to
    them with ``altair.NamedData(name)``. Numbers that fix a colour scale go to ``ranges`` and not into the chart: it
    writes ``domain=bounds(name)``, and the page gives all steps of a slider the widest of their ranges.

    Args:
        chart: An Altair chart, or a Vega-Lite specification.
        data: Name to columns; a column's name is a plain identifier, as dots and brackets mean something to Vega.
        caption: Sentences under the figure: the settings and the numbers that it has to be read against.
        title: Above the image in loggers; the heading on the page and the step when it is empty.
        ranges: Name, an identifier, to (low, high).
        still: Names of ranges of nothing but zeros, which give way to another figure's of that name.
        letters: In a line of the caption and, nearly, of the title above an image.

    Raises:
        ValueError: A name is not an identifier, or columns of one table differ in length.

    Example:
        >>> chart = {"data": {"name": "cells"}, "mark": "point", "encoding": {"x": {"field": "size"}}}
        >>> Figure(chart, {"cells": {"size": [1, 2]}}).spec()["datasets"]
        {'cells': [{'size': 1}, {'size': 2}]}
    """

    chart: altair.TopLevelMixin | Mapping[str, Any]
    data: Mapping[str, Columns] = field(default_factory=dict)
    caption: str = ""
    title: str = ""
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    still: frozenset[str] = frozenset()
    letters: int = 95

    def __post_init__(self) -> None:
        for name in (*self.data, *self.ranges, *(name for columns in self.data.values() for name in columns)):
            if not name.isidentifier():
                raise ValueError(f"names of a figure's data and ranges must be identifiers, got {name!r}")
        for name, columns in self.data.items():
            lengths = {column: len(values) for column, values in columns.items()}
            if len(set(lengths.values())) > 1:
                raise ValueError(f"columns of {name!r} differ in length: {lengths}")

    def bare(self) -> dict[str, Any]:
        """The specification without data, ranges, title and theme."""
        chart = self.chart if isinstance(self.chart, Mapping) else self.chart.to_dict(validate=False)
        config = {name: value for name, value in chart.get("config", {}).items() if name != "view"}
        plain = {name: value for name, value in chart.items() if name not in ("$schema", "config")}
        return {**plain, "config": config} if config else plain

    def spec(self, theme: Literal["light", "dark"] = "light") -> dict[str, Any]:
        """The whole Vega-Lite specification.

        Args:
            theme: Colours of text, axes and lines, and of the background.
        """
        spec = self.bare()
        if is_single(spec):
            spec.setdefault("width", _WIDTH)
        tables = {name: plain_columns(columns) for name, columns in self.data.items()}
        data = {
            name: [dict(zip(own, row, strict=True)) for row in zip(*own.values(), strict=True)]
            for name, own in tables.items()
        }
        spec["datasets"] = {**spec.get("datasets", {}), **data}
        spec["params"] = [*spec.get("params", []), *range_params(self.ranges)]
        spec["config"] = {**THEMES[theme], "background": _BACKGROUNDS[theme], **spec.get("config", {})}
        lines, title = textwrap.wrap(self.caption, self.letters), textwrap.wrap(self.title, round(0.7 * self.letters))
        words: dict[str, Any] = {"text": title if len(title) > 1 else self.title, "subtitle": lines}
        if not self.title:
            # Vega shows no subtitle without a title.
            words = {"text": lines, "fontSize": 11, "fontWeight": "normal"}
        if self.title or self.caption:
            own = spec.get("title")
            spec["title"] = {**words, **(own if isinstance(own, dict) else {})}
        return spec

    def png(self, scale: float = 1.5) -> bytes:
        """The image in light colours.

        Args:
            scale: Pixels per unit of the specification's sizes.

        Raises:
            ImportError: altair or vl-convert is not installed.
            RenderError: The specification cannot be drawn.
        """
        return png_of(self.spec(), scale)

    def _repr_png_(self) -> bytes:
        """What a notebook shows where a cell ends with a figure."""
        return self.png()

    def within(self, width: float) -> Figure:
        """The figure for a narrow place: plots shrink or stand below each other, words take more lines.

        Heat maps keep the size of their cells, so that an image may be wider after all.

        Args:
            width: Of the image, in units of the specification's sizes.

        Raises:
            ImportError: altair or vl-convert is not installed.
            RenderError: The specification cannot be drawn.
        """
        chart = self.bare()
        if is_single(chart):
            chart.setdefault("width", round(width))
        found = replace(self, chart=chart, letters=round(width / 5.8))
        # Nothing is narrower than plots that have no data yet.
        filled = {name: any(map(len, columns.values())) for name, columns in self.data.items()}
        key = json.dumps([chart, width, filled], sort_keys=True, default=str)
        if key not in _FITTED:
            if len(_FITTED) >= _MOST_FITTED:
                _FITTED.clear()
            # Twice as many tries as the page's script has: here the words above count, too.
            for _ in range(8):
                pixels = struct.unpack(">I", found.png(1.0)[16:20])[0]  # of a PNG its width
                other = narrower(found.bare(), pixels - width)
                if other is None:
                    break
                found = replace(found, chart=other)
            # What fits at one step fits at the next, which need not be measured.
            _FITTED[key] = found.bare()
        return replace(found, chart=_FITTED[key])


Drawn: TypeAlias = Figure | str | None
"""What a figure function returns: a figure; a sentence that says why there is none; or None, and nothing is said."""


@dataclass(frozen=True)
class Entry:
    """A registered figure; see :func:`register_figure`."""

    name: str
    heading: str
    over: Literal["step", "run"]
    reads: tuple[str, ...]
    function: Callable[[Any], Drawn]

    def draw(self, rows: Sequence[Row]) -> Drawn:
        """Draws the last of the rows, or all of them where the figure is over the run.

        Raises:
            ReportError: A row lacks what the figure needs.
            TypeError: The function gives something else, such as a figure of another library.
        """
        try:
            drawn = self.function(rows if self.over == "run" else rows[-1])
        except ReportError:
            raise
        except Exception as error:
            raise ReportError(f"{type(error).__name__}: {error}") from error
        if not isinstance(drawn, (Figure, str, type(None))):
            raise TypeError(
                f"{self.function.__module__}.{self.function.__qualname__} returned a {type(drawn).__module__}."
                f"{type(drawn).__qualname__}; a function under register_figure returns a lightning_goldy.report.Figure"
            )
        return drawn


FIGURES: dict[str, dict[str, Entry]] = {}
"""The figures of each analysis by name, in the order of the page."""

TABLES: list[Callable[[Row], str]] = []
"""What stands below the figures of a row, as HTML; nothing where the row holds nothing of it."""

TEXTS: dict[str, Callable[[Any], str]] = {}
"""Entries of ``row["result"]`` that loggers get as text, and what makes Markdown of each."""

_Function = Callable[[Any], Drawn]


def register_figure(
    analysis: str, name: str, *, heading: str, over: Literal["step", "run"] = "step", reads: Iterable[str] = ()
) -> Callable[[_Function], _Function]:
    """Decorator that makes a function one of an analysis's figures, on the page and in the loggers.

    Args:
        analysis: The ``analysis`` field of the rows that it draws.
        name: Unique within the analysis; the logged tag ends with it.
        heading: Above the figure on the page.
        over: With ``"step"`` the function takes one row, and the page has a slider over the steps. With ``"run"`` it
            takes the rows of the run up to then, ascending; the page draws all of them once.
        reads: Entries of ``row["result"]`` that a figure over the run needs of earlier rows. While a run trains, only
            these are kept of them.

    Raises:
        ValueError: The analysis has a figure of that name, or `over` is something else.

    Example:
        >>> @register_figure("golden_parameters", "density", heading="Again")
        ... def again(row): ...
        Traceback (most recent call last):
        ValueError: analysis 'golden_parameters' has a figure 'density' already: ...chart_golden_parameters
    """
    if over not in ("step", "run"):
        raise ValueError(f"a figure is over 'step' or 'run', got {over!r}")

    def add(function: _Function) -> _Function:
        entries = FIGURES.setdefault(analysis, {})
        if name in entries:
            known = entries[name].function
            raise ValueError(
                f"analysis {analysis!r} has a figure {name!r} already: {known.__module__}.{known.__qualname__}"
            )
        entries[name] = Entry(name, heading, over, tuple(reads), function)
        return function

    return add


def register_former(analysis: str, name: str) -> Callable[[_Function], _Function]:
    """Takes the place of ``register_plot`` and ``register_chart``: the name is also the heading.

    Example:
        >>> register_former("golden_parameters", "density")(lambda row: None)
        Traceback (most recent call last):
        ValueError: analysis 'golden_parameters' has a figure 'density' already: ...chart_golden_parameters
    """
    return register_figure(analysis, name, heading=name)


def register_table(function: Callable[[Row], str]) -> Callable[[Row], str]:
    """Decorator that puts a function's HTML below the figures of every row; it gives nothing for rows of others.

    Example:
        >>> register_table(TABLES[0])
        Traceback (most recent call last):
        ValueError: ... is a table of the page already
    """
    if function in TABLES:
        raise ValueError(f"{function.__module__}.{function.__qualname__} is a table of the page already")
    TABLES.append(function)
    return function


def register_text(entry: str) -> Callable[[Callable[[Any], str]], Callable[[Any], str]]:
    """Decorator that logs an entry of ``row["result"]`` as Markdown, under its name, where it is not empty.

    Args:
        entry: Its name.

    Raises:
        ValueError: The entry has such a function.

    Example:
        >>> register_text("generations")(str)
        Traceback (most recent call last):
        ValueError: 'generations' is logged as text already: ...generations_text
    """

    def add(function: Callable[[Any], str]) -> Callable[[Any], str]:
        if entry in TEXTS:
            known = TEXTS[entry]
            raise ValueError(f"{entry!r} is logged as text already: {known.__module__}.{known.__qualname__}")
        TEXTS[entry] = function
        return function

    return add


def figures_of(analysis: str) -> tuple[Entry, ...]:
    """The registered figures of an analysis, in the order of the page; none when it is unknown."""
    return tuple(FIGURES.get(analysis, {}).values())


def reads_of(analysis: str) -> frozenset[str]:
    """Entries of ``row["result"]`` of earlier rows that the figures over the run need.

    Example:
        >>> reads_of("golden_parameters")
        frozenset()
    """
    return frozenset(name for entry in figures_of(analysis) if entry.over == "run" for name in entry.reads)


def draw_figures(
    row: Row, earlier: Sequence[Row] = (), *, failed: Callable[[str, Exception], None] | None = None
) -> dict[str, Figure]:
    """Draws all figures of a row's analysis, for loggers and files.

    Args:
        row: One row of ``results.jsonl``.
        earlier: The rows of the run before it, ascending; of their results, those entries that :func:`reads_of` names.
        failed: Told of a figure that cannot be drawn, by name, and why; the others are drawn. Without it that is an
            error.

    Returns:
        Figure name to figure, with its title; figures that have nothing to show in this row are left out.

    Raises:
        ReportError: A row lacks what a figure needs.
        ImportError: altair or vl-convert is not installed.

    Example:
        >>> draw_figures({"analysis": "of somebody else"})
        {}
    """
    figures = {}
    entries = figures_of(row["analysis"])
    if entries:
        require_drawing()
    for entry in entries:
        try:
            figure = entry.draw([*earlier, row])
        except (ReportError, TypeError) as error:
            if failed is None:
                raise
            failed(entry.name, error)
            continue
        if isinstance(figure, Figure):
            step = f"{entry.heading}, step {row['step']:,}"
            figures[entry.name] = figure if figure.title else replace(figure, title=step)
    return figures


def bounds(name: str) -> list[dict[str, str]]:
    """The domain of a scale that spans the figure's range of that name.

    Example:
        >>> bounds("density")
        [{'expr': 'density_low'}, {'expr': 'density_high'}]
    """
    return [{"expr": f"{name}_low"}, {"expr": f"{name}_high"}]


def range_params(ranges: Mapping[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Vega-Lite parameters that :func:`bounds` refers to.

    Example:
        >>> range_params({"density": (0.0, 5.0)})
        [{'name': 'density_low', 'value': 0.0}, {'name': 'density_high', 'value': 5.0}]
    """
    ends = (("low", 0), ("high", 1))
    return [{"name": f"{name}_{end}", "value": pair[place]} for name, pair in ranges.items() for end, place in ends]


def widest_ranges(figures: Iterable[Figure]) -> dict[str, tuple[float, float]]:
    """One range for all figures by its name, so that their colours compare."""
    ranges: dict[str, tuple[float, float]] = {}
    still: dict[str, tuple[float, float]] = {}
    for figure in figures:
        for name, (low, high) in figure.ranges.items():
            found = still if name in figure.still else ranges
            known = found.get(name, (low, high))
            found[name] = min(low, known[0]), max(high, known[1])
    return {**still, **ranges}


def is_single(spec: Mapping[str, Any]) -> bool:
    """Whether a specification is one plot, whose width can follow the page's, and not several side by side."""
    return ("mark" in spec or "layer" in spec) and not {"column", "row", "facet"} & set(spec.get("encoding", {}))


def require(module: str) -> Any:
    """Imports a module of the optional ``report`` extra.

    Args:
        module: Dotted name.

    Raises:
        ImportError: It is not installed; the message says how to install it.

    Example:
        >>> require("json").dumps([])
        '[]'
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f'figures need {package}: pip install "lightning-goldy[report]"') from error


def plain_columns(columns: Columns) -> dict[str, list[Any]]:
    """Columns as JSON knows them: arrays as lists, and None for numbers that are not finite.

    Example:
        >>> plain_columns({"loss": [1.0, float("nan")]})
        {'loss': [1.0, None]}
    """
    plain = {name: values.tolist() if hasattr(values, "tolist") else values for name, values in columns.items()}
    return {name: finite(list(values)) for name, values in plain.items()}


def _theme(text: str, soft: str, line: str, lines: Sequence[str]) -> dict[str, Any]:
    words = {"labelColor": text, "titleColor": text, "labelLimit": 260, "titleFontWeight": "normal"}
    return {
        "font": "system-ui, 'Liberation Sans', sans-serif",
        "view": {"stroke": None},
        "axis": {**words, "domainColor": line, "tickColor": line, "gridColor": line, "labelFontSize": 11},
        "legend": {**words, "labelFontSize": 11, "symbolLimit": 60},
        "title": {
            "color": text,
            "subtitleColor": soft,
            "subtitleFontSize": 11,
            "fontSize": 13,
            "anchor": "start",
            "frame": "group",
            "offset": 10,
            "subtitlePadding": 4,
        },
        "header": {"labelColor": text, "titleColor": text},
        "text": {"color": text},
        "rule": {"color": soft},
        "range": {"category": list(lines)},
    }


THEMES: Mapping[str, Mapping[str, Any]] = {
    "light": _theme(
        *("#1d232b", "#5b6673", "#dde2e8"),
        ["#2a6fb0", "#c8871a", "#3a9a6b", "#b5489a", "#7a6bd1", "#c4453c", "#4b9fb5", "#7d7f86"],
    ),
    "dark": _theme(
        *("#e4e8ed", "#9ba7b4", "#333c46"),
        ["#6cb0f0", "#e3b341", "#5cc596", "#e07cc6", "#a89af5", "#f0786f", "#74cfe3", "#a9b0b8"],
    ),
}
"""Vega-Lite configurations for bright and for dark surroundings."""


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Names, in front of the error, what was read when an entry is missing or of another kind.

    Example:
        >>> with naming("a row of tiny lacks what its figure needs:"):
        ...     {}["count"]
        Traceback (most recent call last):
        lightning_goldy.report.figures.ReportError: a row of tiny lacks what its figure needs: 'count'
    """
    try:
        yield
    except ReportError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ReportError(f"{what} {error}") from error


def result_of(row: Row) -> Mapping[str, Any]:
    """The result of a row.

    Raises:
        ReportError: It is not an object.
    """
    result = row.get("result")
    if not isinstance(result, Mapping):
        raise ReportError(f"'result' must be an object, got {result!r:.60}")
    return result


def objects_of(row: Row, name: str, wanted: str, *, least: int = 1) -> list[Mapping[str, Any]]:
    """A list of objects in the result of a row.

    Args:
        row: With a result.
        name: Of the entry.
        wanted: What it must be, in words.
        least: How many there must be.

    Raises:
        ReportError: It is something else.

    Example:
        >>> objects_of({"result": {"runs": 3}}, "runs", "a list of runs")
        Traceback (most recent call last):
        lightning_goldy.report.figures.ReportError: 'result.runs' must be a list of runs, got 3
    """
    items = result_of(row).get(name)
    if not isinstance(items, list) or len(items) < least or not all(isinstance(item, Mapping) for item in items):
        raise ReportError(f"'result.{name}' must be {wanted}, got {items!r:.60}")
    return items


def text_of(record: Mapping[str, Any], name: str, where: str) -> str:
    """A text of a record that stands at a path.

    Raises:
        ReportError: It is something else.
    """
    if not isinstance(record.get(name), str):
        raise ReportError(f"'{where}.{name}' must be text, got {record.get(name)!r:.60}")
    return str(record[name])


def number(value: Any, where: str) -> float:
    """A number; null, which stands for one that is not finite, is NaN.

    Args:
        value: As it was read.
        where: Path of it.

    Raises:
        ReportError: It is something else.

    Example:
        >>> number(3, "result.count"), number(None, "result.count")
        (3.0, nan)
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ReportError(f"'{where}' must be a number or null, got {value!r:.60}")
    return float(value)


def matrix(values: Any, where: str) -> NDArray[np.float64]:
    """A table of numbers; null is NaN.

    Args:
        values: As they were read.
        where: Path of them.

    Raises:
        ReportError: It is something else, or its rows differ in length.
    """
    if not isinstance(values, list) or not values or not all(isinstance(line, list) for line in values):
        raise ReportError(f"'{where}' must be a table of numbers, got {values!r:.60}")
    if len({len(line) for line in values}) != 1:
        raise ReportError(f"the rows of '{where}' differ in length")
    for value in (value for line in values for value in line):
        if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
            raise ReportError(f"'{where}' must hold numbers or null, got {value!r:.60}")
    return np.array(values, dtype=np.float64)
