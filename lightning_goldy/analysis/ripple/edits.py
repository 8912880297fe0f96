"""Edits of knowledge: what is asked for, whether it can be made, and how far other pieces are from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from lightning_goldy.analysis.agreement import EVERYTHING
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.pieces import KnowledgePiece

Distance = Literal["same subject", "two-hop", "same relation", "unrelated"]

EDITED = "edited"
"""The class of a piece that the edit itself is of; it has no part in the agreement."""


@dataclass(frozen=True)
class KnowledgeEdit:
    """A new answer to a question.

    Args:
        piece: The piece, or the id of one of the pieces that are measured.
        answer: The new answer.
        subject: What the question is about, as it stands there. By default the piece's group where that stands there.

    Example:
        >>> KnowledgeEdit("capital of France", "Rome")
        KnowledgeEdit(piece='capital of France', answer='Rome', subject=None)
    """

    piece: KnowledgePiece | str
    answer: str
    subject: str | None = None


@dataclass(frozen=True)
class PlannedEdit:
    """An edit that is known to be possible.

    Args:
        piece: As it is.
        wanted: With the new answer.
        subject: What its question is about; None where that is not known.
    """

    piece: KnowledgePiece
    wanted: KnowledgePiece
    subject: str | None

    def span(self, offset: int = 0) -> tuple[int, int] | None:
        """Where the subject stands last in the question, as a word of its own where it does so.

        Args:
            offset: Where the question begins.

        Example:
            >>> piece = KnowledgePiece("1", "Is Lima in Peru or Peruvia?", "Peru")
            >>> PlannedEdit(piece, piece, "Peru").span()
            (11, 15)
        """
        if self.subject is None:
            return None
        words = list(_as_word(self.subject).finditer(self.piece.question))
        start = offset + (words[-1].start() if words else self.piece.question.rindex(self.subject))
        return start, start + len(self.subject)


def distance_class(edited: KnowledgePiece, other: KnowledgePiece) -> Distance:
    """How far a piece is from an edited one.

    ``same subject``: one group and one place in it (``hop`` equal, or missing in both). ``two-hop``: one group and
    different places in it: another hop of a chain, or the composed question, which has no ``hop``. ``same relation``:
    not one group, but one category. ``unrelated``: everything else.

    Args:
        edited: The piece that is edited.
        other: Another one.

    Example:
        >>> capital = KnowledgePiece("1", "Capital of Peru?", "Lima", category="capital", group="Peru")
        >>> distance_class(capital, KnowledgePiece("2", "Currency of Peru?", "Sol", category="currency", group="Peru"))
        'same subject'
        >>> distance_class(capital, KnowledgePiece("3", "Capital of Chad?", "N'Djamena", "capital", "Chad"))
        'same relation'
    """
    if edited.group is not None and edited.group == other.group:
        return "same subject" if edited.hop == other.hop else "two-hop"
    return "same relation" if edited.category is not None and edited.category == other.category else "unrelated"


def planned_edits(
    edits: Iterable[KnowledgeEdit | tuple[KnowledgePiece | str, str]],
    pieces: Sequence[KnowledgePiece],
    *,
    together: bool = False,
) -> tuple[PlannedEdit, ...]:
    """Finds the piece of every edit.

    Args:
        edits: What is asked.
        pieces: What is measured.
        together: Whether all are made at once.

    Raises:
        ValueError: There is no edit, one names no piece, has no answer or a subject that its question lacks, or one
            piece is edited twice, to the same answer or together.
        TypeError: An edit is neither a :class:`KnowledgeEdit` nor a pair.
    """
    known = {piece.id: piece for piece in pieces}
    found = tuple(_planned(edit, known) for edit in edits)
    if not found:
        raise ValueError("there is no edit to make")
    seen: set[tuple[str, str]] = set()
    for each in found:
        key = each.piece.id, "" if together else each.wanted.answer
        if key in seen:
            how = "together, to two answers" if together else f"to {key[1]!r}"
            raise ValueError(f"piece {key[0]!r} is edited twice {how}")
        seen.add(key)
    return found


def classes_of(
    edits: Sequence[PlannedEdit],
    pieces: Sequence[KnowledgePiece],
    distance: Callable[[KnowledgePiece, KnowledgePiece], str],
) -> tuple[str, ...]:
    """The class of each piece when these edits are made together: the nearest, ``edited`` where it is edited itself.

    Args:
        edits: Made together.
        pieces: What is measured.
        distance: Class of a pair; a class that is not one of the built-in four counts as nearer than those.

    Raises:
        ValueError: A class is no text, or a name that is taken.
    """
    order = {name: place for place, name in enumerate(get_args(Distance))}
    edited = {each.piece.id for each in edits}
    found = []
    for piece in pieces:
        if piece.id in edited:
            found.append(EDITED)
            continue
        names = [distance(each.piece, piece) for each in edits]
        for name in names:
            if not isinstance(name, str) or not name or name in (EVERYTHING, EDITED):
                raise ValueError(
                    f"the class of piece {piece.id!r} is {name!r}; a class is a name other than {EVERYTHING!r} and "
                    f"{EDITED!r}"
                )
        found.append(min(names, key=lambda name: order.get(name, -1)))
    return tuple(found)


def _planned(edit: KnowledgeEdit | tuple[KnowledgePiece | str, str], known: dict[str, KnowledgePiece]) -> PlannedEdit:
    if isinstance(edit, tuple) and len(edit) == 2:
        edit = KnowledgeEdit(*edit)
    if not isinstance(edit, KnowledgeEdit):
        raise TypeError(f"an edit is a KnowledgeEdit or a pair (piece or id, new answer); got {edit!r}")
    piece = edit.piece
    if isinstance(piece, str):
        if piece not in known:
            raise ValueError(f"no piece has the id {piece!r}, which is to be edited; {suggestion(piece, known)}")
        piece = known[piece]
    elif not isinstance(piece, KnowledgePiece):
        raise TypeError(f"the piece of an edit is a KnowledgePiece or an id; got {piece!r}")
    elif known.get(piece.id, piece) != piece:
        raise ValueError(f"the edited piece has the id {piece.id!r} of another piece")
    if not isinstance(edit.answer, str) or not edit.answer.strip():
        raise ValueError(f"the new answer of piece {piece.id!r} is empty: {edit.answer!r}")
    return PlannedEdit(piece, replace(piece, answer=edit.answer.strip()), _subject(edit, piece))


def _subject(edit: KnowledgeEdit, piece: KnowledgePiece) -> str | None:
    if edit.subject is not None:
        if not edit.subject or edit.subject not in piece.question:
            raise ValueError(f"the subject {edit.subject!r} does not stand in the question {piece.question!r}")
        return edit.subject
    # As a word of its own: a group called "a" is no subject of every question with an a.
    return piece.group if piece.group and _as_word(piece.group).search(piece.question) else None


def _as_word(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")
