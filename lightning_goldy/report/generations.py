"""Generations with and without a mask as a console table, as text for TensorBoard, and as a section of the page.

Models write whatever they like: every text is escaped for where it goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_goldy.report.formatting import format_number, format_percent, texts_html
from lightning_goldy.report.registry import ReportError, Row

Generations = Sequence[Mapping[str, Any]]
"""Entries of ``prompt``, ``plain``, ``masked``, ``agreement`` (a fraction) and ``kl_per_token`` (nats)."""

_TEXTS = ("prompt", "plain", "masked")
_HEADINGS = ("prompt", "whole model", "masked model", "same tokens", "nats per token")


def generations_table(generations: Generations) -> Table:
    """A table for the console.

    Args:
        generations: One entry per prompt.

    Example:
        >>> entry = {"prompt": "2+2=", "plain": "4", "masked": "[red]5", "agreement": 0.0, "kl_per_token": 1.5}
        >>> generations_table([entry]).row_count
        1
    """
    table = Table(*_HEADINGS, title="With and without the mask", title_justify="left", show_lines=True)
    for entry in generations:
        # As Text, because brackets in a plain string would be read as markup.
        table.add_row(*(Text(cell) for cell in _cells(entry)))
    return table


def generations_text(generations: Generations) -> str:
    """Markdown for loggers that take text; what the model wrote is shown, never rendered.

    Args:
        generations: One entry per prompt.

    Example:
        >>> entry = {"prompt": "a|b", "plain": "<b>", "masked": "*x*", "agreement": 0.5, "kl_per_token": 1.5}
        >>> print(generations_text([entry]).splitlines()[-1])
        | a&#124;b | &lt;b&gt; | &#42;x&#42; | 50 % | 1.5 |
    """
    lines = [f"| {' | '.join(_HEADINGS)} |", f"|{' --- |' * len(_HEADINGS)}"]
    lines += [f"| {' | '.join(map(_in_markdown, _cells(entry)))} |" for entry in generations]
    return "\n".join(lines)


def generations_html(row: Row) -> str:
    """A part of the page; nothing when the row compares no generations.

    Args:
        row: Its result may hold ``generations``.

    Raises:
        ReportError: An entry lacks something.

    Example:
        >>> entry = {"prompt": "2+2=", "plain": "<script>", "masked": "5", "agreement": 0.0, "kl_per_token": 1.5}
        >>> "&lt;script&gt;" in generations_html({"result": {"generations": [entry]}})
        True
        >>> generations_html({"result": {}})
        ''
    """
    generations = row["result"].get("generations")
    if not generations:
        return ""
    return "<h3>With and without the mask</h3>" + texts_html(_HEADINGS, map(_cells, generations))


def printable(text: str) -> str:
    r"""The text with control characters spelt out, so that it can steer no terminal.

    Example:
        >>> printable("a\n\x1b[31mb")
        'a↵\\x1b[31mb'
    """
    shown = text.replace("\r\n", "\n").replace("\n", "↵")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown)


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        texts = [printable(entry[name]) for name in _TEXTS]
        return (*texts, format_percent(entry["agreement"]), format_number(entry["kl_per_token"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"a comparison of generations lacks or spoils {error}") from error


def _in_markdown(text: str) -> str:
    escaped = escape(text)
    # Entities, because a backslash before a character of Markdown is itself shown inside some of its constructs.
    for char in "|*_`[]~\\!":
        escaped = escaped.replace(char, f"&#{ord(char)};")
    return escaped
