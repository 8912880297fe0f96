"""``goldy data``: converts question sets to knowledge pieces and shows them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from lightning_goldy.data.readers import PieceSet

_SHOWN_CATEGORIES = 5


def add_data(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to those of ``goldy``.

    Args:
        commands: The sub-commands.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_data(parser.add_subparsers())
        >>> options = parser.parse_args(["data", "convert", "atlas", "--output", "atlas.jsonl", "--whole-questions"])
        >>> options.source, options.format, options.whole_questions
        ('atlas', 'auto', True)
    """
    parser = commands.add_parser("data", help="convert question sets to knowledge pieces, or show them")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    convert = actions.add_parser("convert", help="write a source's pieces as JSON lines", allow_abbrev=False)
    _add_source(convert)
    convert.add_argument("--output", metavar="FILE", required=True, help="the file of JSON lines to write")
    convert.add_argument("--force", action="store_true", help="replace an existing file")
    convert.add_argument("--limit", type=int, metavar="N", help="stop after N records that gave pieces (default: all)")
    convert.set_defaults(run=_convert)
    show = actions.add_parser("show", help="print the first pieces of a source", allow_abbrev=False)
    _add_source(show)
    show.add_argument("--n", type=int, default=5, metavar="N", help="pieces to print (default: %(default)s)")
    show.set_defaults(run=_show)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="SOURCE", help="a file, a saved dataset's folder, a dataset's name on the hub, or atlas"
    )
    # The names are the registry's to check: it brings torch, which other commands need not wait for.
    parser.add_argument(
        "--format",
        default="auto",
        metavar="NAME",
        help="jsonl, csv, qa, bamboogle, wikihop, hotpotqa, 2wikimultihopqa, musique, atlas; auto tells it from the"
        " first record (default: %(default)s)",
    )
    parser.add_argument("--split", metavar="NAME", help="of a dataset (default: train, or the only one)")
    parser.add_argument(
        "--form",
        choices=("question", "cloze"),
        default="question",
        help="how a subject and a relation are worded (default: %(default)s)",
    )
    parser.add_argument(
        "--whole-questions",
        action=argparse.BooleanOptionalAction,
        help="whether composed questions stand beside their facts (default: as the format has it)",
    )
    parser.add_argument(
        "--on-malformed",
        choices=("error", "skip"),
        default="error",
        help="stop at a faulty record, or leave it out and count it (default: %(default)s)",
    )


def _convert(options: argparse.Namespace) -> int:
    if Path(options.output).exists() and not options.force:
        raise FileExistsError(f"{options.output} exists; --force replaces it")
    from lightning_goldy.data.readers import write_pieces

    found = _load(options, options.limit)
    path = write_pieces(found.pieces, options.output)
    _print(f"{found.source}, format {found.format}", summary_table(found))
    print(path)
    return 0


def _show(options: argparse.Namespace) -> int:
    if options.n < 1:
        raise ValueError(f"--n {options.n} must be at least 1")
    # A record that is kept gives a piece, so this many records are enough.
    pieces = _load(options, options.n).pieces[: options.n]
    from rich.table import Table

    for piece in pieces:
        table = Table(show_header=False)
        table.add_column("field")
        table.add_column("value", overflow="fold")
        for field in ("question", "answer", "category", "group", "hop", "supporting_fact"):
            value = getattr(piece, field)
            if value is not None:
                table.add_row(field, _plain(str(value)))
        _print(piece.id, table)
    return 0


def _load(options: argparse.Namespace, limit: int | None) -> PieceSet:
    from lightning_goldy.data.readers import load_pieces

    return load_pieces(
        options.source,
        format=options.format,
        limit=limit,
        split=options.split,
        form=options.form,
        whole_questions=options.whole_questions,
        on_malformed=options.on_malformed,
    )


def summary_table(found: PieceSet) -> Table:
    """What a source gave, and what was left out of it and why."""
    from rich.table import Table

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
        table.add_row(f"  {_plain(category)}", f"{count:,}")
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
        table.add_row(f"  {_plain(reason)}", f"{count:,}")


def _plain(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _print(title: str, table: Table) -> None:
    from rich.console import Console

    console = Console()
    console.print(title, soft_wrap=True, markup=False, highlight=False)
    console.print(table)
