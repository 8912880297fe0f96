"""``goldy masks`` and ``goldy data``: shows, compares, combines and converts files of masks and of questions."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from lightning_goldy.core.mask import ParameterMask
    from lightning_goldy.core.store import VectorHeader
    from lightning_goldy.data.readers import PieceSet

Operation = Literal["and", "or", "minus", "not"]
_SHOWN_CATEGORIES = 5


def combined(masks: Sequence[ParameterMask], operation: Operation) -> ParameterMask:
    """One mask of several.

    Args:
        masks: Of one space; one for ``not``, two or more for the others.
        operation: ``and``, ``or``, ``minus`` (in the first but no other) or ``not``.

    Raises:
        ValueError: The number of masks does not fit the operation.
        SpaceError: They belong to different spaces.
    """
    if operation == "not":
        if len(masks) != 1:
            raise ValueError(f"'not' takes one mask; got {len(masks)}")
        return ~masks[0]
    if len(masks) < 2:
        raise ValueError(f"{operation!r} takes two masks or more; got {len(masks)}")
    result, *others = masks
    for other in others:
        result = result & other if operation == "and" else result | other if operation == "or" else result - other
    return result


def show_masks(options: argparse.Namespace) -> None:
    """Prints the density of each block of mask files.

    Args:
        options: Those of ``goldy masks show``.
    """
    loaded = _loaded(options.files)
    for path, (mask, header) in loaded.items():
        step = "" if header.step is None else f", step {header.step}"
        table = _table(f"{path}: {header.model_class}{step}", ("block", "in the mask", "elements", "density"))
        for row in mask.block_summary():
            table.add_row(_shown(row.block), f"{row.count:,}", f"{row.numel:,}", _density(row.density))
        table.add_section()
        table.add_row("all", f"{mask.total:,}", f"{mask.space.numel:,}", _density(mask.density))
        Console().print(table)


def compare_masks(options: argparse.Namespace) -> None:
    """Prints how much every two mask files share, and how much of that is chance.

    Args:
        options: Those of ``goldy masks compare``.

    Raises:
        ValueError: There are not two files or more, each once.
        SpaceError: The masks belong to different spaces.
    """
    if len(options.files) < 2:
        raise ValueError(f"two masks or more can be compared; got {len(options.files)}")
    masks = [mask for mask, _ in _loaded(options.files).values()]
    if len(masks) < len(options.files):
        raise ValueError("a file is named twice")
    columns = ("first", "second", "shared", "by chance", "IoU", "beyond chance")
    kept = "each tensor" if options.scope == "tensor" else "the whole mask"
    table = _table(f"chance keeps the number of elements of {kept}", columns)
    for (path, first), (other, second) in combinations(zip(options.files, masks, strict=True), 2):
        beyond = first.chance_corrected_overlap(second, scope=options.scope)
        table.add_row(
            _shown(path),
            _shown(other),
            f"{(first & second).total:,}",
            f"{first.chance_overlap(second, scope=options.scope):,.1f}",
            f"{first.jaccard(second):.4f}",
            "-" if beyond is None else f"{beyond:+.4f}",
        )
    Console().print(table)


def combine_masks(options: argparse.Namespace) -> None:
    """Writes one mask file of several.

    Args:
        options: Those of ``goldy masks combine``.

    Raises:
        FileExistsError: The file is there already, and is not to be replaced.
        ValueError: The masks belong to different models, or their number does not fit the operation.
        SpaceError: They belong to different spaces.
    """
    _refuse_existing(options)
    loaded = [*_loaded(options.files).items()]
    path, (_, header) = loaded[0]
    for other_path, (_, other) in loaded[1:]:
        if other.model_class != header.model_class:
            raise ValueError(f"{path} belongs to {header.model_class}, {other_path} to {other.model_class}")
    result = combined([mask for _, (mask, _) in loaded], cast("Operation", options.operation))
    steps = {each.step for _, (_, each) in loaded}
    result.save(options.output, model=header.model_class, step=steps.pop() if len(steps) == 1 else None)
    told = f"{result.total:,} of {result.space.numel:,} elements ({_density(result.density)})"
    print(f"{_plain(options.output)}: {told}")


def _loaded(files: Sequence[str]) -> dict[str, tuple[ParameterMask, VectorHeader]]:
    # Brings torch, which other commands need not wait for.
    from lightning_goldy.core.mask import ParameterMask
    from lightning_goldy.core.store import read_header

    return {path: (ParameterMask.load(path), read_header(path)) for path in files}


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=_shown(title), title_justify="left")
    for index, column in enumerate(columns):
        is_text = index == 0 or column == "second"
        table.add_column(column, justify="left" if is_text else "right", overflow="fold" if is_text else "ellipsis")
    return table


def convert_pieces(options: argparse.Namespace) -> None:
    """Writes a source's pieces, and prints what it gave.

    Args:
        options: Those of ``goldy data convert``.

    Raises:
        FileExistsError: The file is there already, and is not to be replaced.
    """
    _refuse_existing(options)
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


def _print(title: str, table: Table) -> None:
    console = Console()
    console.print(_plain(title), soft_wrap=True, markup=False, highlight=False)
    console.print(table)


def _refuse_existing(options: argparse.Namespace) -> None:
    if Path(options.output).exists() and not options.force:
        raise FileExistsError(f"{options.output} exists; --force replaces it")


def _plain(text: str) -> str:
    from lightning_goldy.core.files import printable  # brings torch, which other commands need not wait for

    return printable(text)


def _density(share: float) -> str:
    from lightning_goldy.core.files import percentage  # as above

    return percentage(share, 4)


def _shown(text: str) -> str:
    return escape(_plain(text))
