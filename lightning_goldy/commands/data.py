"""``goldy data``: converts question sets to knowledge pieces and shows them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from lightning_goldy.data.readers import PieceSet

_SHOWN_CATEGORIES = 5


def convert_pieces(options: argparse.Namespace) -> None:
    """Writes a source's pieces, and prints what it gave.

    Args:
        options: Those of ``goldy data convert``.

    Raises:
        FileExistsError: The file is there already, and is not to be replaced.
    """
    if Path(options.output).exists() and not options.force:
        raise FileExistsError(f"{options.output} exists; --force replaces it")
    from lightning_goldy.data.readers import write_pieces

    found = _load(options, options.limit)
    path = write_pieces(found.pieces, options.output)
    _print(f"{found.source}, format {found.format}", summary_table(found))
    print(_plain(str(path)))


def show_pieces(options: argparse.Namespace) -> None:
    """Prints the first pieces of a source.

    Args:
        options: Those of ``goldy data show``.

    Raises:
        ValueError: None is asked for.
    """
    if options.n < 1:
        raise ValueError(f"--n {options.n} must be at least 1")
    # A record that is kept gives a piece, so this many records are enough.
    pieces = _load(options, options.n).pieces[: options.n]
    for piece in pieces:
        table = Table(show_header=False)
        table.add_column("field")
        table.add_column("value", overflow="fold")
        for field in ("question", "answer", "category", "group", "hop", "supporting_fact"):
            value = getattr(piece, field)
            if value is not None:
                table.add_row(field, _shown(str(value)))
        _print(piece.id, table)


def _load(options: argparse.Namespace, limit: int | None) -> PieceSet:
    from lightning_goldy.data.readers import load_pieces

    settings = ("format", "split", "form", "whole_questions", "on_malformed")
    return load_pieces(options.source, limit=limit, **{name: getattr(options, name) for name in settings})


def summary_table(found: PieceSet) -> Table:
    """What a source gave, and what was left out of it and why."""
    table = Table(show_header=False)
    table.add_column("what", overflow="fold")
    table.add_column("count", justify="right")
    table.add_row("records", f"{found.records:,}")
    table.add_row("pieces", f"{len(found.pieces):,}")
    table.add_row("groups", f"{len(found.groups):,}")
    for hop, count in sorted(found.hops.items()):
        table.add_row(f"hop {hop}", f"{count:,}")
    categories = found.categories.most_common()
    table.add_row("categories", f"{len(categories):,}")
    for category, count in categories[:_SHOWN_CATEGORIES]:
        table.add_row(f"  {_shown(category)}", f"{count:,}")
    if len(categories) > _SHOWN_CATEGORIES:
        others = sum(count for _, count in categories[_SHOWN_CATEGORIES:])
        table.add_row(f"  {len(categories) - _SHOWN_CATEGORIES:,} others", f"{others:,}")
    _add_counts(table, "left out", found.skipped)
    if found.incomplete:
        _add_counts(table, "kept without", found.incomplete)
    return table


def _add_counts(table: Table, title: str, counts: Mapping[str, int]) -> None:
    table.add_section()
    table.add_row(title, f"{sum(counts.values()):,}")
    for reason, count in sorted(counts.items(), key=lambda each: (-each[1], each[0])):
        table.add_row(f"  {_shown(reason)}", f"{count:,}")


def _plain(text: str) -> str:
    from lightning_goldy.core.files import printable  # brings torch, which other commands need not wait for

    return printable(text)


def _shown(text: str) -> str:
    return escape(_plain(text))


def _print(title: str, table: Table) -> None:
    console = Console()
    console.print(_plain(title), soft_wrap=True, markup=False, highlight=False)
    console.print(table)
