"""What an edit of knowledge does to every other piece: predicted, made, measured and undone."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import EVERYTHING, Agreement, agreement_of, correlation_interval, spaced_places
from lightning_goldy.analysis.result import AnalysisResult, Cost, counted_passes, total_cost
from lightning_goldy.analysis.ripple.editors import Editor, EditRequest, attempts, make_editor
from lightning_goldy.analysis.ripple.measure import (
    Encoding,
    Measure,
    PieceScores,
    available_route,
    check_pieces,
    gathered,
    normalise_,
    piece_gradient,
    score_pieces,
    slopes,
    unit_change,
)
from lightning_goldy.core.batches import split_batch
from lightning_goldy.core.files import finite
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import require_choice, suggestion
from lightning_goldy.core.pieces import QUESTION_TEMPLATE, KnowledgePiece
from lightning_goldy.core.sharding import Replicas, is_sharded, unshard_guard
from lightning_goldy.core.vector import ParameterVector, require_finite, substituted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    subject = edit.subject
    if subject is None:
        # As a word of its own: a group called "a" is no subject of every question with an a.
        subject = piece.group if piece.group and _as_word(piece.group).search(piece.question) else None
    elif not subject or subject not in piece.question:
        raise ValueError(f"the subject {subject!r} does not stand in the question {piece.question!r}")
    return PlannedEdit(piece, replace(piece, answer=edit.answer.strip()), subject)


def _as_word(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")


Predictor = Literal["first_order", "coupling"]

LINEAR_RANGE = (0.8, 1.25)
"""Slopes of measured on predicted changes within which an edit counts as a small step."""

# Pairs in a row of results.jsonl; more than a scatter plot can show.
_MOST_POINTS = 2000
# Fewer edits tell no spread; more groups than this are not left out one by one.
_FEW_EDITS, _MOST_GROUPS = 3, 20


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
        cost: Passes of the model on all ranks, with those that the editor made.
        learning_rate: Of the editor in each row, ``[E]``; NaN where it has none.
        slope: Of measured on predicted changes in each row, ``[E]``: of the least-squares line over the pieces that it
            does not edit; where they have none, the new answer's measured over its predicted change.
        scaled: Whether the learning rate was halved until the slope lay within 0.8 and 1.25.
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
    cost: Cost = field(default=Cost(), compare=False)
    learning_rate: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    slope: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    scaled: bool = False

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
        require_choice("predictor", predictor, get_args(Predictor))
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

    @property
    def linear(self) -> Tensor:
        """Which rows of edits are small steps, whose slope lies in the linear range, bool, ``[E]``."""
        return (self.slope >= LINEAR_RANGE[0]) & (self.slope <= LINEAR_RANGE[1])

    def warning(self) -> str:
        """What to know of edits that changed nothing, and of slopes outside the linear range; empty where all is well.

        The slope over all pairs is looked at, and those of the edits where none is defined.
        """
        parts = []
        if idle := int((self.delta_norm == 0).sum()):
            parts.append(
                f"{idle} of {len(self.delta_norm)} edits changed no weight: the step is below the weights' rounding, "
                "or an editor's search found nothing better than no change, where more steps or less weight decay may"
            )
        moved = self.delta_norm[: len(self.slope)] > 0  # results of older files have no slopes
        slope, wrong = self.agreement()[0].slope, self.slope[~self.linear & moved].tolist()
        low, high = LINEAR_RANGE
        told = []
        if np.isfinite(slope) and not low <= slope <= high:
            told.append(f"the slope of measured on predicted changes is {slope:.3g}, outside [{low}, {high}]")
        if wrong:
            least, most = (f"{end:.3g}" for end in (min(wrong), max(wrong)))
            several = least if least == most else f"{least} to {most}"
            told.append(f"{len(wrong)} of {len(self.slope)} edits have slopes outside ({several})")
        if told:
            advice = "no small steps, so gradients do not tell the size of what they do; lower the learning rate"
            parts.append(f"{'; '.join(told)}: {advice}")
        return "; ".join(parts)

    def metrics(self) -> dict[str, float | None]:
        """Scalars by name, None where undefined: agreement of both predictions, and what the edits did."""
        found: dict[str, float | None] = {}
        for entry in self._agreements():
            place = "" if entry.group == EVERYTHING else "/" + entry.group.replace(" ", "_")
            found |= {f"{entry.predictor}_{name}{place}": value for name, value in entry.metrics().items()}
        for group in self.groups:
            change = self.measured.numpy()[self.pairs(group)].mean()
            found[f"measured_change/{group.replace(' ', '_')}"] = finite(float(change))
        found["new_answers_exact"] = float(self.new_exact.double().mean())
        found["new_answer_change"] = finite(float((self.new_after - self.new_before).mean()))
        if len(self.slope):
            found["smallest_slope"], found["largest_slope"] = map(finite, map(float, self.slope.aminmax()))
        return found

    def _interval(self) -> dict[str, Any] | None:
        """95 % interval of the first order's rank correlation, over edits, or over pieces where edits are few."""
        kept, over = self.pairs(), "edits" if len(self.edits) >= _FEW_EDITS else "pieces"
        first, measured = self.predicted("first_order").numpy(), self.measured.numpy()

        def correlation(chosen: NDArray[np.bool_]) -> float:
            return agreement_of(first[chosen], measured[chosen]).spearman

        count = kept.shape[0 if over == "edits" else 1]
        without = []
        for group in np.array_split(np.arange(count), min(count, _MOST_GROUPS)):
            left = kept.copy()
            left[(group, slice(None)) if over == "edits" else (slice(None), group)] = False
            without.append(correlation(left))
        ends = correlation_interval(correlation(kept), without)
        return None if ends is None else {"spearman": list(ends), "over": f"{count} {over}"}

    def details(self) -> dict[str, Any]:
        """Predictions, measured changes and how they agree; of more than 2,000 pairs, so many evenly spaced."""
        pairs = np.argwhere(self.pairs())
        edits, pieces = pairs[spaced_places(len(pairs), _MOST_POINTS)].T
        columns = {name: self.predicted(name) for name in get_args(Predictor)} | {"measured": self.measured}
        points = {
            **{name: finite(table.numpy()[edits, pieces].tolist()) for name, table in columns.items()},
            "edit": edits.tolist(),
            "piece": [self.pieces[place] for place in pieces],
            "class": [self.classes[edit][place] for edit, place in zip(edits, pieces, strict=True)],
        }
        return {
            **self.settings,
            "n_edits": len(self.edits),
            "n_pieces": len(self.pieces),
            "n_pairs": len(pairs),
            "points": points,
            "agreement": [entry.details() for entry in self._agreements()],
            "interval": self._interval(),
            "linear_range": list(LINEAR_RANGE),
            "slopes": finite(self.slope.tolist()),
            "learning_rates": finite(self.learning_rate.tolist()),
            "scaled": self.scaled,
            "warning": self.warning(),
        }

    def _agreements(self) -> list[Agreement]:
        return [entry for predictor in get_args(Predictor) for entry in self.agreement(predictor)]

    def table(self) -> str:
        """The agreement as lines of text."""
        lines = [f"{'prediction':12} {'class':16} {'n':>6} {'Pearson':>8} {'Spearman':>8} {'sign %':>7} {'slope':>8}"]
        for entry in self._agreements():
            numbers = f"{entry.pearson:8.3f} {entry.spearman:8.3f} {100 * entry.sign_agreement:7.1f} {entry.slope:8.3g}"
            lines.append(f"{entry.predictor:12} {entry.group:16} {entry.n:6} {numbers}  {entry.reason}".rstrip())
        return "\n".join([*lines, *filter(None, [self.warning()])])


def ripple_effects(
    model: nn.Module,
    pieces: Sequence[KnowledgePiece],
    edits: Iterable[KnowledgeEdit | tuple[KnowledgePiece | str, str]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    editor: str | Editor = "gradient_step",
    learning_rate: float | None = None,
    steps: int | None = None,
    select: Sequence[str] | None = None,
    measure: Measure = "answer",
    together: bool = False,
    template: str = QUESTION_TEMPLATE,
    batch_size: int = 16,
    distance: Callable[[KnowledgePiece, KnowledgePiece], str] = distance_class,
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> RippleResult:
    r"""Predicts what edits do to all pieces of knowledge, makes each edit, measures, and undoes it.

    .. math::
        \Delta \log p_j \approx g_j \cdot \delta, \qquad
        \Delta \log p_j \approx \cos(g_j, g_e) \, \lVert g_j \rVert \, \lVert \delta \rVert, \qquad
        g_j = \nabla_\theta \overline{\log p_\theta}(a_j \mid q_j)

    delta is the change of the parameters that the editor really made, g_e the gradient of the new answer's
    log-probability. Both predictions are made at the unedited model, by forward-mode derivatives along delta and g_e.
    They are first order: what an edit does beyond that is in the measured change alone. ``gradient_step`` without a
    learning rate makes a step that its first order describes: the rate is halved, edit by edit, until the slope of
    measured on predicted changes lies in [0.8, 1.25], or the halvings are used up and the slope nearest to 1 stands.
    Slopes outside are warned of, whatever the editor. The model works in evaluation mode and comes back bit for bit.
    On several ranks the edits are shared out; every rank must call.

    Args:
        model: A plain or DistributedDataParallel-unwrapped causal language model, with adapters or without.
        pieces: What is measured; ids must differ.
        edits: New answers, as :class:`KnowledgeEdit` or pairs of a piece (or its id) and an answer.
        tokenizer: Of the model.
        editor: ``gradient_step``, ``finetune``, ``rank_one``, another registered name, or an editor.
        learning_rate: Of the named editor; its own default where None, which for ``gradient_step`` follows the slope.
        steps: Likewise.
        select: Glob patterns of the parameters that the named editor changes; every MLP output projection by default.
        measure: Which tokens count, for the edit as for the pieces: ``answer`` all of the answer, ``answer_with_end``
            the end-of-text token too, ``first_token`` the answer's first.
        together: Make all edits at once, not each alone.
        template: The prompt, with ``{question}`` where the question goes.
        batch_size: Pieces per forward pass.
        distance: Class of a pair (edited piece, other piece). Of edits made together the nearest counts.
        progress: Called with (edits done, edits in all) on this rank.
        split_over_ranks: Whether to share edits out over the ranks of an initialised process group.

    Returns:
        Predicted and measured changes of every piece by every edit, and how they agree.

    Raises:
        ValueError: An argument is out of range, an edit names no piece, the model is sharded, or a weight is not
            finite.
        SpaceError: The editor's parameters are not there.

    Source: Qin et al., "Why Does New Knowledge Create Messy Ripple Effects in LLMs?" (2024), whose GradSim is a cosine
        of gradients; Cohen et al., "Evaluating the Ripple Effects of Knowledge Editing in Language Models" (2023).

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.data import byte_tokenizer
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=258, bos_token_id=0, eos_token_id=0)
        >>> pieces = [KnowledgePiece("a", "1 + 1?", "2"), KnowledgePiece("b", "1 + 2?", "3")]
        >>> found = ripple_effects(GPT2LMHeadModel(config), pieces, [("a", "5")], tokenizer=byte_tokenizer())
        >>> found.classes, bool(found.new_after > found.new_before)
        ((('edited', 'unrelated'),), True)
    """
    chosen = make_editor(editor, {"learning_rate": learning_rate, "steps": steps, "select": select})
    _require_whole(model)
    pieces, replicas = tuple(pieces), Replicas.of(model) if split_over_ranks else Replicas()
    check_pieces(pieces)
    encoding = Encoding(tokenizer, template, measure, batch_size, next(model.parameters()).device)
    asked = planned_edits(edits, pieces, together=together)
    rows = [asked] if together else [(edit,) for edit in asked]
    classes = tuple(classes_of(row, pieces, distance) for row in rows)
    with preserved(model), counted_passes(model) as passes:
        with replicas.together("ripple_effects"):
            work = _RippleWork(model, chosen, encoding, pieces, passes)
            common = passes()
            mine = work.gradient_norms(replicas), work.outcomes(replicas.share(rows), progress)
        norms, outcomes = gathered(replicas, mine[0], len(pieces)), gathered(replicas, mine[1], len(rows))
        cost = work.cost(replicas, common)
    found = {name: torch.stack([outcome[name] for outcome in outcomes]) for name in outcomes[0]}
    along_delta, along_gradient = found.pop("along_delta"), found.pop("along_gradient")  # [E, N]
    size, own = found["delta_norm"], torch.tensor(norms, dtype=torch.float64)
    # A gradient of zero has no direction.
    angled = (found.pop("edit_gradient_norm") > 0)[:, None] & (own > 0)
    name = editor if isinstance(editor, str) else type(editor).__name__
    result = RippleResult(
        pieces=tuple(piece.id for piece in pieces),
        edits=tuple(map(_described, rows)),
        classes=classes,
        predicted_first_order=along_delta * size[:, None],
        predicted_coupling=along_gradient * size[:, None],
        cosine=torch.where(angled, along_gradient / own, torch.nan),
        **work.scores.named("before"),
        **found,
        gradient_norm=own,
        settings={"editor": name, "measure": measure, "route": work.route},
        cost=cost,
        scaled=len(attempts(chosen)) > 1,
    )
    if replicas.rank == 0 and result.warning():
        warnings.warn(f"ripple_effects: {result.warning()}", stacklevel=2)
    return result


def _described(row: Sequence[PlannedEdit]) -> dict[str, Any]:
    """Edits that are made together, as a result tells them."""
    return {"pieces": tuple(edit.piece.id for edit in row), "answers": tuple(edit.wanted.answer for edit in row)}


def _require_whole(model: nn.Module) -> None:
    unshard_guard(model)
    sharded = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if sharded is not None:
        raise ValueError(
            f"ripple_effects needs whole parameters, and {sharded!r} is a DTensor, sharded by FSDP2 (fully_shard) or "
            "tensor parallelism: load the weights into a plain copy of the model, on one process or on all"
        )


@dataclass(frozen=True, eq=False)
class _Attempt:
    """One edit as it was made, and what it did; its slope is as if it had moved along the new answer's gradient."""

    delta: ParameterVector
    size: float
    scores: PieceScores
    new: PieceScores
    learning_rate: float
    others: NDArray[np.bool_]
    slope: float = math.nan

    @property
    def off(self) -> float:
        """How far the slope is from 1, as a logarithm."""
        return abs(math.log(self.slope)) if self.slope > 0 else math.inf

    def slope_along(self, along: Tensor, before: PieceScores) -> float:
        """Of measured on predicted changes of the pieces that are not edited; NaN where there is none."""
        change = (self.scores.log_prob - before.log_prob).numpy()
        return agreement_of((along * self.size).numpy()[self.others], change[self.others]).slope


class _RippleWork:
    """The model before any edit, the batches and scores of the pieces, and how derivatives are found."""

    def __init__(
        self,
        model: nn.Module,
        editor: Editor,
        encoding: Encoding,
        pieces: Sequence[KnowledgePiece],
        passes: Callable[[], Cost],
    ) -> None:
        self.model, self.editor, self.encoding = model, editor, encoding
        self.pieces, self.passes = pieces, passes
        space = editor.space(model)
        for name, parameter in model.named_parameters():
            require_finite({name: parameter}, "weights")
        edited = {id(parameter) for parameter in space.resolve(model).values()}
        for parameter in model.parameters():
            # Packed weights cannot require gradients and do not.
            if parameter.requires_grad is not (id(parameter) in edited):
                parameter.requires_grad_(id(parameter) in edited)
        self.start = ParameterVector.of(model, space)
        self.batches = encoding.batches(encoding.samples(pieces))
        self.scores = score_pieces(model, self.batches)
        self.route = available_route(model, self.start, next(split_batch(self.batches[0])))
        self.kept: dict[str, Any] = {}
        self.repeated: list[Cost] = []

    def gradient_norms(self, replicas: Replicas) -> list[float]:
        """||g_j|| of this process's share of the pieces."""
        pieces = [part for batch in self.batches for part in split_batch(batch)]
        return [piece_gradient(self.model, self.start, piece).norm() for piece in replicas.share(pieces)]

    def cost(self, replicas: Replicas, common: Cost) -> Cost:
        """Passes of all ranks; those before any edit, and those that several edits share, are counted once."""
        repeated = sum(self.repeated, Cost())
        # A rank without an edit has made none of it.
        once = max(replicas.gather_objects(repeated), key=lambda cost: cost.forwards)
        return total_cost(replicas, self.passes() - repeated, common) + once

    def outcomes(
        self, rows: Sequence[Sequence[PlannedEdit]], progress: Callable[[int, int], None] | None
    ) -> list[dict[str, Tensor]]:
        """What each row of edits does."""
        found = []
        for row in rows:
            found.append(self._outcome(row))
            if progress is not None:
                progress(len(found), len(rows))
        return found

    def _outcome(self, row: Sequence[PlannedEdit]) -> dict[str, Tensor]:
        """Makes edits, measures, undoes them, predicts: fields of the result, and slopes along unit vectors."""
        request = self._request(row)
        new_before = score_pieces(self.model, [request.batch])
        gradient = piece_gradient(self.model, self.start, request.batch)
        length = normalise_(gradient)
        (along_gradient,) = slopes(self.model, self.start, (gradient,), self.batches, self.route)
        del gradient
        edited = {edit.piece.id for edit in row}
        others = np.array([piece.id not in edited for piece in self.pieces])
        best: _Attempt | None = None
        for editor in attempts(self.editor):
            made = self._attempt(editor, request, others, along_gradient)
            if best is None or made.off < best.off:
                best = made
            # Where nothing is left of a step in the weights' rounding, half of it leaves no more.
            if LINEAR_RANGE[0] <= made.slope <= LINEAR_RANGE[1] or not made.size:
                break
            del made
        assert best is not None
        (along_delta,) = slopes(self.model, self.start, (best.delta,), self.batches, self.route)
        slope = best.slope_along(along_delta, self.scores)
        if not math.isfinite(slope) and best.size:
            (own,) = slopes(self.model, self.start, (best.delta,), [request.batch], self.route)
            predicted = float(own.mean()) * best.size
            slope = float((best.new.log_prob - new_before.log_prob).mean()) / predicted if predicted else math.nan
        numbers = {"learning_rate": best.learning_rate, "slope": slope, "delta_norm": best.size}
        return {
            **best.scores.named("after"),
            "new_before": new_before.log_prob.mean(),
            "new_after": best.new.log_prob.mean(),
            "new_exact": best.new.exact.all(),
            "edit_gradient_norm": torch.tensor(length, dtype=torch.float64),
            **{name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()},
            "along_delta": along_delta,
            "along_gradient": along_gradient,
        }

    def _attempt(
        self, editor: Editor, request: EditRequest, others: NDArray[np.bool_], along_gradient: Tensor
    ) -> _Attempt:
        """Makes an edit, measures, and undoes it."""
        # On its own, so that an edit leaves nothing to the next, such as another mode.
        with preserved(self.model), substituted(self.model, self.start):
            editor.edit(self.model, request)
            self.model.eval()
            # Inside autocast a low-precision copy of a weight may be older than the edit.
            torch.clear_autocast_cache()
            delta, size = unit_change(self.model, self.start)
            scores = score_pieces(self.model, self.batches)
            new = score_pieces(self.model, [request.batch])
        rate = getattr(editor, "learning_rate", None)
        made = _Attempt(delta, size, scores, new, math.nan if rate is None else float(rate), others)
        return replace(made, slope=made.slope_along(along_gradient, self.scores))

    def _request(self, row: Sequence[PlannedEdit]) -> EditRequest:
        samples = self.encoding.samples([edit.wanted for edit in row])
        template = self.encoding.template
        return EditRequest(
            prompts=tuple(template.replace("{question}", edit.wanted.question) for edit in row),
            subjects=tuple(edit.span(template.index("{question}")) for edit in row),
            samples=tuple(samples),
            batch=self.encoding.batches(samples, len(samples))[0],
            space=self.start.space,
            context=tuple(self.batches),
            tokenizer=self.encoding.tokenizer,
            kept=self.kept,
            passes=self.passes,
            repeated=self.repeated,
        )
