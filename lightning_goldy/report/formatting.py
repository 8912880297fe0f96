"""Numbers and tables as people read them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_goldy.core.files import printable as printable

MISSING = "–"  # noqa: RUF001


def format_number(value: float | None) -> str:
    """Four significant digits; whole numbers in full with thousands separators.

    Args:
        value: None stands for a number that is not there.

    Example:
        >>> [format_number(value) for value in (1234567, 0.031249, 4e-7, 16.0, float("nan"), None)]
        ['1,234,567', '0.03125', '4e-07', '16', 'nan', '–']
    """
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3e}"


def format_percent(share: float | None) -> str:
    """A share as a percentage with three significant digits.

    Example:
        >>> format_percent(0.0312), format_percent(3.9e-11), format_percent(None)
        ('3.12 %', '3.9e-09 %', '–')
    """
    return MISSING if share is None else f"{100 * share:.3g} %"


def percent(share: float | None) -> str:
    r"""A share as a percentage with two significant digits, as an interval allows no more; full percent above ten.

    Example:
        >>> [percent(share) for share in (0.001, 0.0312, 0.954, 1.0, 25.0, 8.7e14, math.nan, None)]
        ['0.1 %', '3.1 %', '95 %', '100 %', '2,500 %', '8.7e+16 %', '\u2013', '\u2013']
    """
    if not isinstance(share, (int, float)) or not math.isfinite(share):
        return MISSING
    if abs(share) < 0.1:
        return format_percent(float(f"{share:.2g}"))
    return f"{100 * share:,.0f} %" if abs(share) < 1e4 else f"{100 * share:.2g} %"


def percents_apart(first: float, second: float) -> tuple[str, str]:
    """Two shares as percentages with as many digits as tell them apart, where they differ.

    Example:
        >>> percents_apart(0.8, 0.99), percents_apart(0.996, 0.999), percents_apart(0.5, 0.5)
        (('80 %', '99 %'), ('99.6 %', '99.9 %'), ('50 %', '50 %'))
    """
    told = percent(first), percent(second)
    for digits in range(3, 18):
        if told[0] != told[1] or first == second:
            break
        told = f"{100 * first:.{digits}g} %", f"{100 * second:.{digits}g} %"
    return told


def points(share: float) -> str:
    """A difference of shares in points of a percentage, with two significant digits.

    Example:
        >>> points(-0.1873), points(0.031), points(0.0)
        ('-19', '3.1', '0')
    """
    return f"{100 * share:.0f}" if abs(share) >= 0.0995 else f"{100 * share:.2g}"


def format_seconds(seconds: float | None) -> str:
    """A duration in the units of a clock.

    Example:
        >>> [format_seconds(value) for value in (0.0123, 7.25, 125, 7260, None, math.nan)]
        ['12.3 ms', '7.25 s', '2 min 5 s', '2 h 1 min', '–', '–']
    """
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if 0 < seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60} min"


def format_bytes(count: float | None) -> str:
    """A size in binary units.

    Example:
        >>> [format_bytes(value) for value in (0, 1536, 3 * 2**30, None, math.inf)]
        ['0 B', '1.5 KiB', '3 GiB', '–', '–']
    """
    if count is None or not math.isfinite(count):
        return MISSING
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


GLOSSARY: dict[str, str] = {
    "": "pass, warn, fail, or not measured",
    "#95 % interval": "of the difference, in the unit of the quantity, by Student's t over pairs",
    "KL, nats": "KL(base || now) of the next token's distribution, nats",
    "analysis": "name of the callback's instance, and of its folder",
    "answer": "the text whose tokens are scored",
    "asked for": "what the value is held against",
    "base": "what the base model writes",
    "base says": "the base's most probable next token",
    "block": "number of the transformer block, from 0",
    "check": "what must hold before the coupling is read",
    "checkpoint": "what the checkpoint writes",
    "cosine": "cosine of the two answers' gradients, -1 to 1",
    "difference": "of the two runs, in the unit of the quantity; of volumes paired by direction",
    "each": "wall-clock time of one firing, on average",
    "evaluations": "model evaluations as rows of an older format counted them",
    "fact": "identifier of the piece of knowledge",
    "forward": "forward passes, each counted once per sample",
    "backward": "backward passes, each counted once per sample",
    "log p before": "mean log probability of the answer's tokens at the base, nats",
    "log p now": "mean log probability of the answer's tokens now, nats",
    "masked model": "what the model writes with the mask's elements set to zero",
    "meaning": "definition of the metric, and its unit",
    "metric": "name in rows, and in loggers after goldy/<analysis>/",
    "model": "whose activations were steered",
    "most promoted tokens": "tokens that the mean difference raises most, read through the unembedding",
    "nats per token": "KL divergence between the two models' predictions, nats per token",
    "now says": "the present model's most probable next token",
    "of all analyses": "share of the time of all analyses, a percentage",
    "of the run": "share of the run's time, from its first to its last logged scalar, a percentage",
    "peak memory": "largest memory beside the training's, in binary units",
    "plain": "what is written without steering",
    "predicted": "change of the log probability to first order at the base, nats",
    "prompt": "what was continued",
    "quantity": "what is compared",
    "question": "what was asked",
    "rank before": "worst rank of the answer's tokens in the vocabulary at the base; 1 is the most probable",
    "rank now": "worst rank of the answer's tokens in the vocabulary now; 1 is the most probable",
    "remark": "what to know before the difference is read",
    "same": "whether both answers are of one group",
    "same tokens": "share of the tokens on which both models agree, a percentage",
    "steered": "what is written with the mean difference added",
    "strength": "times the mean difference that was added",
    "text": "the tokens before the prediction",
    "time": "wall-clock time of all firings",
    "times": "how often it was measured",
    "value": "what was found",
    "what it means": "what to do about it",
    "whole model": "what the model writes with all of its elements",
}
"""Unit and definition of the columns of the page's tables, which a heading tells when a pointer rests on it."""


def _told(heading: str) -> str:
    """The heading's definition as an attribute; a step, or a run, that names a column speaks for itself."""
    meaning = GLOSSARY.get(heading) or GLOSSARY.get(f"#{heading}", "")
    meaning = meaning or ("value at that step, in the metric's unit" if heading.startswith("step ") else "")
    return f' title="{escape(meaning)}"' if meaning else ""


def table_html(header: Sequence[str], body: Sequence[Sequence[str]], footer: Sequence[str] = ()) -> str:
    """A table whose first column names its rows; the cells are HTML already.

    A column whose heading begins with ``#`` holds numbers; :data:`GLOSSARY` tells unit and definition of a heading.

    Example:
        >>> table_html(["metric", "#latest"], [["count", "3"]]).count('class="number"')
        2
    """
    marks = [' class="number"' if text.startswith("#") else "" for text in header]

    def line(cells: Sequence[str]) -> str:
        rest = (f"<td{mark}>{cell}</td>" for mark, cell in zip(marks[1:], cells[1:], strict=True))
        return f'<tr><th scope="row">{cells[0]}</th>{"".join(rest)}</tr>'

    foot = f"<tfoot>{line(footer)}</tfoot>" if footer else ""
    return _table_html(marks, [text.removeprefix("#") for text in header], map(line, body), foot)


def _table_html(marks: Sequence[str], header: Sequence[str], lines: Iterable[str], foot: str = "") -> str:
    head = "".join(f'<th scope="col"{mark}{_told(text)}>{text}</th>' for mark, text in zip(marks, header, strict=True))
    body = "".join(lines)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody>{foot}</table></div>'


# Longer words of a table's texts may break.
_WHOLE_LETTERS = 20


def texts_html(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    numbers_from: int | None = None,
    wrap: Literal["anywhere", "normal"] = "anywhere",
) -> str:
    """A table whose every cell is escaped, and kept from reordering its neighbours.

    Args:
        headings: Plain texts.
        rows: Plain texts, one per heading.
        numbers_from: The first of the columns that hold numbers, which are the last ones; none by default.
        wrap: Where long words may break.

    Example:
        >>> page = texts_html(["asked", "times"], [["<b>", "3"]], numbers_from=1)
        >>> "&lt;b&gt;" in page, page.count('class="number"')
        (True, 2)
    """
    first = len(headings) if numbers_from is None else numbers_from
    rows = list(rows)
    marks = ["" if place < first else ' class="number"' for place in range(len(headings))]
    # Words break anywhere, so that a table is no wider than the page, but those of a common length stay whole.
    longest = [
        max((len(word) for row in rows for word in row[place].split()), default=0) for place in range(len(marks))
    ]
    heads = [
        mark or f' style="min-width:calc({min(size, _WHOLE_LETTERS)}ch + 1rem)"'
        for mark, size in zip(marks, longest, strict=True)
    ]

    def cell(mark: str, text: str) -> str:
        # Left-to-right marks and the like stay within their cell.
        return f'<td{mark}><bdi style="overflow-wrap:{wrap}">{escape(text)}</bdi></td>'

    lines = ("".join(cell(mark, text) for mark, text in zip(marks, cells, strict=True)) for cells in rows)
    return _table_html(heads, [escape(text) for text in headings], (f"<tr>{line}</tr>" for line in lines))


def console_table(
    title: str, headings: Sequence[str], rows: Iterable[Sequence[str | Text]], *, numbers: int = 0, **look: Any
) -> Table:
    """A table for the console whose cells are shown as they are, but for control characters, which are spelt out.

    Args:
        title: Above it.
        headings: Plain texts.
        rows: Plain or styled texts, one per heading.
        numbers: How many of the last columns hold numbers.
        look: Of :class:`rich.table.Table`.

    Example:
        >>> console_table("Counts", ["what", "times"], [["[red]", "3"]], numbers=1).row_count
        1
    """
    table = Table(title=title, title_justify="left", **look)
    for place, heading in enumerate(headings):
        right: dict[str, Any] = {"justify": "right", "no_wrap": True}
        table.add_column(heading, **(right if place >= len(headings) - numbers else {"overflow": "fold"}))
    for cells in rows:
        # As Text, because brackets in a plain string would be read as markup.
        table.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in cells))
    return table


def show(shown: Any) -> None:
    """Prints a table or a text; letters that the console's encoding lacks become question marks.

    Example:
        >>> show("62 % of the effect")
        62 % of the effect
    """
    console = Console()
    with console.capture() as captured:
        console.print(shown)
    encoding = getattr(console.file, "encoding", None) or "utf-8"
    console.file.write(captured.get().encode(encoding, "replace").decode(encoding))
    console.file.flush()


def prose_html(text: str) -> str:
    r"""Markdown of the documentation as HTML, all of it escaped; tables and code stay as they are written.

    Links lead to other pages of the documentation, which are not here, and become their words.

    Example:
        >>> prose_html("Read `a<b` in [the docs](docs.md).")
        '<p>Read <code>a&lt;b</code> in the docs.</p>'
        >>> prose_html("- one\n  more\n- **two**")
        '<ul><li>one more</li><li><strong>two</strong></li></ul>'
    """
    parts = []
    # Blocks are told apart by empty lines, and code by its fences.
    for place, piece in enumerate(re.split(r"^```.*$", text, flags=re.M)):
        if place % 2:
            parts.append(f"<pre>{escape(piece.strip(chr(10)))}</pre>")
            continue
        for block in filter(str.strip, re.split(r"\n\s*\n", piece)):
            if block.lstrip().startswith(("|", "$$")):
                parts.append(f"<pre>{escape(block)}</pre>")
            elif block.lstrip().startswith("- "):
                items = re.split(r"^\s*- ", block, flags=re.M)[1:]
                parts.append(f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</ul>")
            else:
                heading = re.match(r"#+ (.*)", block.strip())
                parts.append(f"<h4>{_inline(heading[1])}</h4>" if heading else f"<p>{_inline(block)}</p>")
    return "".join(parts)


def _inline(text: str) -> str:
    told = escape(" ".join(text.split()))
    told = re.sub(r"!?\[([^\]]*)\]\([^)\s]*\)", r"\1", told)
    told = re.sub(r"`([^`]+)`", r"<code>\1</code>", told)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", told)


def script_json(value: Any) -> str:
    r"""JSON that can stand inside a script element whatever text it holds.

    Example:
        >>> script_json({"name": "</script>"}) == r'{"name":"\u003c/script\u003e"}'
        True
    """
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


SPACES = {
    "merged": "Of the weights that the adapters come to (space: merged), not of the adapters themselves.",
    "adapters": "Of the adapters themselves (space: adapters), not of the weights that they come to.",
}
"""What a space of a row means."""


def remarks(row: Mapping[str, Any]) -> list[str]:
    """What to know before the numbers of a row are read: the space they are of, their precision, and its notes.

    Example:
        >>> remarks({"result": {"precision": {"dtype": "bfloat16", "by": "weights", "relative_change": 0.0017}}})
        ['Computed in bfloat16 (weights), by whose rounding alone weights change by 0.17 % of their norm.']
        >>> remarks({"result": {"precision": {"dtype": "float32", "by": "autocast", "training": "bfloat16"}}})
        ['Computed in float32, while the training computes in bfloat16 (autocast).']
    """
    result = row.get("result") or {}
    told = [SPACES[result["space"]]] if result.get("space") in SPACES else []
    precision = result.get("precision") or {}
    if precision.get("training"):
        by = precision.get("by", MISSING)
        told.append(f"Computed in {precision['dtype']}, while the training computes in {precision['training']} ({by}).")
    elif precision:
        words = f"Computed in {precision.get('dtype', MISSING)} ({precision.get('by', MISSING)})"
        if precision.get("relative_change") is not None:
            share = format_percent(precision["relative_change"])
            words += f", by whose rounding alone weights change by {share} of their norm"
        if precision.get("loss_floor") is not None:
            words += f"; differences of the loss below {format_number(precision['loss_floor'])} nats may be rounding"
        told.append(f"{words}.")
    return [*told, *(note for note in result.get("notes", ()) if not str(note).startswith("computed in "))]
