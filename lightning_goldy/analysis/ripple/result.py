"""Edits of knowledge, and what they did to every piece."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lightning_goldy.analysis.agreement import EVERYTHING, Agreement, agreement_of
from lightning_goldy.analysis.result import AnalysisResult
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.pieces import KnowledgePiece

Predictor = Literal["first_order", "coupling"]
Distance = Literal["same subject", "two-hop", "same relation", "unrelated"]

EDITED = "edited"
"""The class of a piece that the edit itself is of; it has no part in the agreement."""
# Pairs in a row of results.jsonl; more than a scatter plot can show.
_MOST_POINTS = 2000


@dataclass(frozen=True)
class RippleResult(AnalysisResult):
    r"""Predicted and measured changes, E edits by N pieces; all tensors float64 unless said.

    The log-probability of a piece is the mean over its target tokens, nats. An edit's row is one edit, or all of them
    where they were made together.

    Args:
        pieces: Ids.
        edits: ``pieces`` (ids) and ``answers`` of each row.
        classes: Distance class of every pair; ``edited`` where the piece itself is edited.
        predicted_first_order: g_j . delta, nats, ``[E, N]``.
        predicted_coupling: cos(g_j, g_edit) ||g_j|| ||delta||, nats, ``[E, N]``: the same if the editor had moved along
            the gradient of the new answer's log-probability.
        cosine: cos(g_j, g_edit), ``[E, N]``; NaN where a gradient is zero.
        before: Log-probability of each piece's answer, ``[N]``.
        after: The same after each edit, ``[E, N]``.
        rank_before: Rank of the answer, int64, ``[N]``: of its target tokens, each after the true ones before it, the
            worst rank in the vocabulary; 1 is best.
        rank_after: Likewise after each edit, ``[E, N]``.
        exact_before: Whether every target token is the most probable one after the true ones before it, bool, ``[N]``.
        exact_after: Likewise after each edit, ``[E, N]``.
        new_before: Log-probability of the edits' new answers, mean over a row's edits, ``[E]``.
        new_after: The same after the edit.
        new_exact: Whether all of a row's new answers are exact after the edit, bool, ``[E]``.
        delta_norm: ||delta||, parameter units, ``[E]``.
        gradient_norm: ||g_j||, nats per parameter unit, ``[N]``.
        settings: ``editor``, ``measure``, and ``route``: ``forward`` (derivatives along delta by forward mode) or
            ``gradients`` (inner products with gradients, where a model has no forward mode).
    """

    analysis: ClassVar[str] = "ripple_effects"

    pieces: tuple[str, ...]
    edits: tuple[dict[str, Any], ...]
    classes: tuple[tuple[str, ...], ...]
    predicted_first_order: Tensor
    predicted_coupling: Tensor
    cosine: Tensor
    before: Tensor
    after: Tensor
    rank_before: Tensor
    rank_after: Tensor
    exact_before: Tensor
    exact_after: Tensor
    new_before: Tensor
    new_after: Tensor
    new_exact: Tensor
    delta_norm: Tensor
    gradient_norm: Tensor
    settings: dict[str, str]

    @property
    def measured(self) -> Tensor:
        """Change of each piece's log-probability, nats, ``[E, N]``."""
        return self.after - self.before

    @property
    def groups(self) -> tuple[str, ...]:
        """The distance classes that occur: the built-in ones from near to far, then others as they come."""
        found = dict.fromkeys(name for row in self.classes for name in row if name != EDITED)
        known = [name for name in get_args(Distance) if name in found]
        return tuple(dict.fromkeys([*known, *found]))

    def pairs(self, group: str = EVERYTHING, *, edit: int | None = None) -> NDArray[np.bool_]:
        """Which pairs count: those of a class (or of all), never the edited pieces themselves.

        Args:
            group: A distance class, or ``all``.
            edit: Only this row.

        Returns:
            Shape ``[E, N]``.

        Raises:
            ValueError: There is no such class or row.
        """
        if group != EVERYTHING and group not in self.groups:
            raise ValueError(f"no pair has the class {group!r}; {suggestion(group, [EVERYTHING, *self.groups])}")
        names = np.array(self.classes, dtype=object).reshape(len(self.edits), len(self.pieces))
        chosen: NDArray[np.bool_] = (names != EDITED) if group == EVERYTHING else (names == group)
        if edit is not None:
            if not 0 <= edit < len(self.edits):
                raise ValueError(f"edit must be a row from 0 to {len(self.edits) - 1}; got {edit}")
            chosen &= (np.arange(len(self.edits)) == edit)[:, None]
        return chosen

    def predicted(self, predictor: Predictor) -> Tensor:
        """The predictions of one kind, nats, ``[E, N]``.

        Raises:
            ValueError: There is no such kind.
        """
        if predictor not in get_args(Predictor):
            raise ValueError(f"unknown predictor {predictor!r}; {suggestion(str(predictor), get_args(Predictor))}")
        return self.predicted_first_order if predictor == "first_order" else self.predicted_coupling

    def agreement(self, predictor: Predictor = "first_order", *, edit: int | None = None) -> tuple[Agreement, ...]:
        """How well the changes were predicted: over all pairs first, then by distance class.

        Pairs of all edits are pooled, so differences in size between edits count too; give ``edit`` to look at one.

        Args:
            predictor: Which prediction.
            edit: Only this row.

        Raises:
            ValueError: There is no such prediction or row.
        """
        predicted, measured = self.predicted(predictor).numpy(), self.measured.numpy()
        return tuple(
            agreement_of(predicted[chosen], measured[chosen], predictor, group)
            for group in (EVERYTHING, *self.groups)
            for chosen in (self.pairs(group, edit=edit),)
        )

    def metrics(self) -> dict[str, float | None]:
        """Scalars by name, None where undefined: agreement of both predictions, and what the edits did."""
        found: dict[str, float | None] = {}
        for predictor in get_args(Predictor):
            for each in self.agreement(predictor):
                place = "" if each.group == EVERYTHING else "/" + each.group.replace(" ", "_")
                for name in ("pearson", "spearman", "sign_agreement", "slope"):
                    found[f"{predictor}_{name}{place}"] = _finite(getattr(each, name))
        for group in self.groups:
            change = self.measured.numpy()[self.pairs(group)]
            found[f"measured_change/{group.replace(' ', '_')}"] = _finite(float(change.mean()))
        found["new_answers_exact"] = _finite(float(self.new_exact.double().mean()))
        found["new_answer_change"] = _finite(float((self.new_after - self.new_before).mean()))
        return found

    def details(self) -> dict[str, Any]:
        """Predictions, measured changes and how they agree; of more than 2,000 pairs, so many evenly spaced."""
        edits, pieces = self.pairs().nonzero()
        n_pairs = len(edits)
        places = np.unique(np.linspace(0, n_pairs - 1, min(n_pairs, _MOST_POINTS)).round().astype(int))
        edits, pieces = edits[places], pieces[places]
        columns = {
            "first_order": self.predicted_first_order,
            "coupling": self.predicted_coupling,
            "measured": self.measured,
        }
        points: dict[str, list[Any]] = {
            name: [_finite(value) for value in table.numpy()[edits, pieces].tolist()] for name, table in columns.items()
        }
        points["edit"] = edits.tolist()
        points["piece"] = [self.pieces[place] for place in pieces]
        points["class"] = [self.classes[edit][place] for edit, place in zip(edits, pieces, strict=True)]
        agreement = [each for predictor in get_args(Predictor) for each in self.agreement(predictor)]
        return {
            **self.settings,
            "n_edits": len(self.edits),
            "n_pieces": len(self.pieces),
            "n_pairs": n_pairs,
            "points": points,
            "agreement": [{name: _json(value) for name, value in vars(each).items()} for each in agreement],
        }

    def table(self) -> str:
        """The agreement as lines of text."""
        head = f"{'prediction':12} {'class':16} {'n':>6} {'Pearson':>8} {'Spearman':>8} {'sign %':>7} {'slope':>8}"
        lines = [head]
        for predictor in get_args(Predictor):
            for each in self.agreement(predictor):
                numbers = f"{each.pearson:8.3f} {each.spearman:8.3f} {100 * each.sign_agreement:7.1f} {each.slope:8.3g}"
                lines.append(f"{predictor:12} {each.group:16} {each.n:6} {numbers}  {each.reason}".rstrip())
        return "\n".join(lines)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json(value: Any) -> Any:
    return _finite(value) if isinstance(value, float) else value


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


def check_pieces(pieces: Sequence[KnowledgePiece]) -> None:
    """Checks that there are pieces and that their ids differ.

    Raises:
        ValueError: There is none, or an id occurs twice.
    """
    if not pieces:
        raise ValueError("there is no piece to measure")
    seen: set[str] = set()
    for piece in pieces:
        if piece.id in seen:
            raise ValueError(f"two pieces have the id {piece.id!r}; ids tell them apart in the result")
        seen.add(piece.id)


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
