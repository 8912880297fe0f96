"""What a checkpoint writes, beside its base, as a console table and as a section of the page.

Models write whatever they like: every text is escaped for where it goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.formatting import format_number, format_percent, texts_html
from lightning_goldy.report.generations import printable
from lightning_goldy.report.registry import ReportError, Row

Continuations = Sequence[Mapping[str, Any]]
"""Entries of ``prompt``, ``present``, and ``base``, ``agreement`` (a fraction), ``kl_per_token`` (nats) or null."""

_HEADINGS = ("prompt", "base", "checkpoint", "same tokens", "nats per token")
_ALONE = ("prompt", "checkpoint")


def continuations_table(continuations: Continuations) -> Table:
    """A table for the console.

    Args:
        continuations: One entry per prompt.

    Example:
        >>> entry = {"prompt": "2+2=", "present": "[red]5", "base": "4", "agreement": 0.0, "kl_per_token": 1.5}
        >>> continuations_table([entry]).row_count
        1
    """
    table = Table(title="What they write", title_justify="left", show_lines=True)
    for heading in _headings(continuations):
        table.add_column(heading, overflow="fold")
    for entry in continuations:
        # As Text, because brackets in a plain string would be read as markup.
        table.add_row(*(Text(cell) for cell in _cells(entry)))
    return table


def continuations_html(row: Row) -> str:
    """A part of the page; nothing when the row continues no prompt.

    Args:
        row: Its result may hold ``continuations``.

    Raises:
        ReportError: An entry lacks something.

    Example:
        >>> entry = {"prompt": "2+2=", "present": "<b>", "base": None, "agreement": None, "kl_per_token": None}
        >>> page = continuations_html({"result": {"continuations": [entry]}})
        >>> "&lt;b&gt;" in page, "same tokens" in page
        (True, False)
        >>> continuations_html({"result": {}})
        ''
    """
    continuations = row["result"].get("continuations")
    if not continuations:
        return ""
    return texts_html(_headings(continuations), map(_cells, continuations))


def _headings(continuations: Continuations) -> tuple[str, ...]:
    return _HEADINGS if any(entry.get("base") is not None for entry in continuations) else _ALONE


def _cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    try:
        prompt, present = printable(entry["prompt"]), printable(entry["present"])
        if entry["base"] is None:
            return prompt, present
        compared = format_percent(entry["agreement"]), format_number(entry["kl_per_token"])
        return prompt, printable(entry["base"]), present, *compared
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ReportError(f"a continuation lacks or spoils {error}") from error


describe(
    "continuations",
    Description(
        title="What it writes",
        measures="Continuations of the prompts by the checkpoint and by its base, from the same random state.",
        reading=(
            "Continuations part for good at the first token that differs, so the share of same tokens says when rather "
            "than how much; the divergence, taken along what the checkpoint writes, says how far apart they are there."
        ),
        metrics={
            "prompts": "prompts continued",
            "agreement": "share of positions with the same token, of the longer continuation; mean over prompts",
            "kl_per_token": (
                "mean KL(model || the other) along what the model writes, nats per token; the checkpoint, the base"
            ),
        },
    ),
)
