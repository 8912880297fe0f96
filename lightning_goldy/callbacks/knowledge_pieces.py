"""The pieces of knowledge that are watched, and which of them the finetune teaches."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L

from lightning_goldy.analysis.finetune_ripple import UNTOUCHED
from lightning_goldy.analysis.ripple_edits import check_pieces
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.pieces import QUESTION_TEMPLATE, KnowledgePiece
from lightning_goldy.data.atlas import AtlasDataModule
from lightning_goldy.data.readers import load_pieces
from lightning_goldy.data.relations import Fact

PieceSource = str | Path | Sequence[KnowledgePiece] | None
EDITED = "edited"
"""The class of pieces that the finetune teaches."""
REHEARSED = "rehearsed"
"""The class of facts that it repeats as they are."""


@dataclass(frozen=True)
class WatchedPieces:
    """What is measured.

    Args:
        pieces: With the answers that the finetune teaches where it teaches others.
        classes: Of each ``edited``, ``rehearsed`` or ``untouched``.
        template: The prompt.
    """

    pieces: tuple[KnowledgePiece, ...]
    classes: tuple[str, ...]
    template: str


def find_pieces(
    trainer: L.Trainer, source: PieceSource, edits: Sequence[str] | None, template: str | None
) -> WatchedPieces:
    """The pieces that are given, or those of the data module, with their classes.

    The atlas knows its edited and rehearsed facts; another data module those that it holds in ``train_pieces``.

    Args:
        trainer: Its data module is asked.
        source: A file, ``"atlas"``, pieces, or None for the data module's.
        edits: Ids of the pieces that the finetune teaches; None asks the data module.
        template: The prompt; None for the data module's.

    Raises:
        ValueError: There is no piece, an id occurs twice, an edit names none, or the template is malformed.
        FileNotFoundError: No such file.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    pieces = _pieces(source, data)
    check_pieces(pieces)
    facts = {_id(fact): fact for fact in data.facts} if isinstance(data, AtlasDataModule) else {}
    # Without its supporting sentence, which states the true answer.
    pieces = tuple(
        replace(piece, answer=facts[piece.id].answer, supporting_fact=None)
        if piece.id in facts and facts[piece.id].edited
        else piece
        for piece in pieces
    )
    taught, rehearsed = _taught(edits, data, pieces)
    classes = (EDITED if each.id in taught else REHEARSED if each.id in rehearsed else UNTOUCHED for each in pieces)
    return WatchedPieces(pieces, tuple(classes), _template(template, data))


def drawn(watched: WatchedPieces, count: int | None, seed: int) -> WatchedPieces:
    """At most so many pieces, in their order: half of them edited where there are enough of either kind.

    Args:
        watched: All of them.
        count: None keeps all.
        seed: Decides which.

    Example:
        >>> pieces = tuple(KnowledgePiece(str(n), f"{n}?", "yes") for n in range(6))
        >>> watched = WatchedPieces(pieces, (EDITED,) + (UNTOUCHED,) * 5, "{question}")
        >>> [each.id for each in drawn(watched, 3, seed=0).pieces][0], drawn(watched, 3, seed=0).classes
        ('0', ('edited', 'untouched', 'untouched'))
    """
    if count is None or count >= len(watched.pieces):
        return watched
    places: dict[bool, list[int]] = {True: [], False: []}
    for place, name in enumerate(watched.classes):
        places[name == EDITED].append(place)
    n_edited = min(len(places[True]), max(count // 2, count - len(places[False])))
    generator = random.Random(f"coupling {seed}")
    kept = generator.sample(places[True], n_edited) + generator.sample(places[False], count - n_edited)
    kept.sort()
    return replace(
        watched,
        pieces=tuple(watched.pieces[place] for place in kept),
        classes=tuple(watched.classes[place] for place in kept),
    )


def _pieces(source: PieceSource, data: Any) -> tuple[KnowledgePiece, ...]:
    if isinstance(source, (str, Path)):
        return load_pieces(source).pieces
    if source is not None:
        odd = next((each for each in source if not isinstance(each, KnowledgePiece)), None)
        if odd is not None:
            raise ValueError(f"pieces is a file, 'atlas', or a list of KnowledgePiece; one of it is {odd!r:.80}")
        return tuple(source)
    if isinstance(data, AtlasDataModule):
        known = {_id(fact) for fact in data.facts}
        return tuple(piece for piece in load_pieces("atlas").pieces if piece.id in known)
    found = getattr(data, "pieces", None)
    if not found or not all(isinstance(each, KnowledgePiece) for each in found):
        raise ValueError(
            f"no pieces of knowledge: pass pieces= (a file, 'atlas', or a list of KnowledgePiece), or train with an "
            f"AtlasDataModule or a KnowledgeDataModule; this is {'no data module' if data is None else type(data)!s}"
        )
    return tuple(found)


def _taught(edits: Sequence[str] | None, data: Any, pieces: Sequence[KnowledgePiece]) -> tuple[set[str], set[str]]:
    """Ids of what the finetune teaches, and of what it repeats."""
    rehearsed: set[str] = set()
    if isinstance(data, AtlasDataModule):
        taught = {_id(fact) for fact in data.edited_facts}
        rehearsed = {_id(each.fact) for each in data.training_questions()} - taught
        if not taught:
            # Pretraining: every fact is taught.
            taught, rehearsed = rehearsed, set()
    else:
        taught = {piece.id for piece in getattr(data, "train_pieces", ())}
    if edits is None:
        return taught, rehearsed
    known = {piece.id for piece in pieces}
    for name in edits:
        if name not in known:
            raise ValueError(f"no piece has the id {name!r}, which is to be edited; {suggestion(str(name), known)}")
    return set(edits), rehearsed - set(edits)


def _template(given: str | None, data: Any) -> str:
    # The atlas's questions are their own prompts.
    own = "{question}" if isinstance(data, AtlasDataModule) else getattr(data, "template", QUESTION_TEMPLATE)
    template = str(own) if given is None else given
    if template.count("{question}") != 1:
        raise ValueError(f"template={template!r} must contain '{{question}}' exactly once")
    return template


def _id(fact: Fact) -> str:
    return f"{fact.subject}/{fact.relation}"
