"""Edits of knowledge pieces: drawn at random, or read from a file."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from lightning_goldy.analysis.ripple_edits import KnowledgeEdit
from lightning_goldy.core.files import RowError, read_rows
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.pieces import KnowledgePiece

_FIELDS = ("id", "answer", "subject")


def drawn_edits(pieces: Sequence[KnowledgePiece], count: int, seed: int) -> list[KnowledgeEdit]:
    """Draws pieces and gives each the answer of another one: of its own category where that has another answer.

    Args:
        pieces: All of them.
        count: Edits, at least 1.
        seed: Decides both.

    Raises:
        ValueError: There are not so many pieces, or all have one answer.

    Example:
        >>> pieces = [KnowledgePiece("1", "Capital of Peru?", "Lima"), KnowledgePiece("2", "Of Italy?", "Rome")]
        >>> [(edit.piece, edit.answer) for edit in drawn_edits(pieces, 2, seed=0)]
        [('1', 'Rome'), ('2', 'Lima')]
    """
    if not 1 <= count <= len(pieces):
        raise ValueError(
            f"--edits {count}: the number of edits must be between 1 and {len(pieces)}, the pieces there are"
        )
    generator = random.Random(f"coupling edits {seed}")
    by_category: dict[str | None, set[str]] = {}
    for piece in pieces:
        by_category.setdefault(piece.category, set()).add(piece.answer)
    everything = {piece.answer for piece in pieces}
    edits = []
    for place in sorted(generator.sample(range(len(pieces)), count)):
        piece = pieces[place]
        own = _folded(piece.answer)
        choices = next(
            (
                found
                for answers in (by_category[piece.category], everything)
                if (found := sorted(answer for answer in answers if _folded(answer) != own))
            ),
            [],
        )
        if not choices:
            raise ValueError(f"all pieces have the answer {piece.answer!r}, so there is no other to edit to")
        edits.append(KnowledgeEdit(piece.id, generator.choice(choices)))
    return edits


def read_edits(path: str | Path, pieces: Sequence[KnowledgePiece]) -> list[KnowledgeEdit]:
    r"""Reads edits from JSON lines: ``id`` of a piece, new ``answer``, and optionally ``subject``.

    Args:
        path: The file.
        pieces: What can be edited.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line lacks something, has a field too many, or names no piece.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "edits.jsonl").write_text('{"id": "1", "answer": "Rome"}\n')
        ...     read_edits(Path(folder, "edits.jsonl"), [KnowledgePiece("1", "Capital of Peru?", "Lima")])
        [KnowledgeEdit(piece='1', answer='Rome', subject=None)]
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"--edits is a number of edits or a file of them; there is no file {path}")
    try:
        rows = read_rows(path)
    except RowError as error:
        raise ValueError(str(error)) from error
    if not rows:
        raise ValueError(f'{path} holds no edit; one JSON object per line, such as {{"id": "1", "answer": "Rome"}}')
    known = {piece.id for piece in pieces}
    edits = []
    for number, row in enumerate(rows, 1):
        where = f"{path}, line {number}"
        for name in row:
            if name not in _FIELDS:
                raise ValueError(f"{where}: unknown field {name!r}; {suggestion(name, _FIELDS)}")
        for name in _FIELDS:
            value = row.get(name)
            if not (isinstance(value, str) and value.strip()) and (name != "subject" or value is not None):
                raise ValueError(f"{where}: {name!r} must be text; got {value!r}")
        if row["id"] not in known:
            raise ValueError(f"{where}: no piece has the id {row['id']!r}; {suggestion(row['id'], sorted(known))}")
        edits.append(KnowledgeEdit(row["id"], row["answer"], row.get("subject")))
    return edits


def _folded(answer: str) -> str:
    return " ".join(answer.split()).casefold()
