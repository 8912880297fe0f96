"""Ripple effects: what an edit of one piece of knowledge does to the others, predicted and measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from lightning_goldy.analysis.ripple.editors import Editor, make_editor, require_count
from lightning_goldy.analysis.ripple.measure import Encoding, Measure, Outcome, PieceScores, prepare_work
from lightning_goldy.analysis.ripple.result import (
    KnowledgeEdit,
    RippleResult,
    check_pieces,
    classes_of,
    distance_class,
    planned_edits,
)
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.pieces import QUESTION_TEMPLATE, KnowledgePiece
from lightning_goldy.core.sharding import Replicas, is_sharded, unshard_guard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    measure: Measure = "answer_with_end",
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
    They are first order: what an edit does beyond that is in the measured change alone. The model works in evaluation
    mode and comes back bit for bit. On several ranks the edits are shared out; every rank must call.

    Args:
        model: A plain or DistributedDataParallel-unwrapped causal language model, with adapters or without.
        pieces: What is measured; ids must differ.
        edits: New answers, as :class:`KnowledgeEdit` or pairs of a piece (or its id) and an answer.
        tokenizer: Of the model.
        editor: ``gradient_step``, ``finetune``, ``rank_one``, another registered name, or an editor.
        learning_rate: Of the named editor; its own default where None.
        steps: Likewise.
        select: Glob patterns of the parameters that the named editor changes; every MLP output projection by default.
        measure: Which tokens count, for the edit as for the pieces: ``answer_with_end`` all of the answer and the
            end-of-text token, ``answer`` without the latter, ``first_token`` the answer's first.
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
    pieces, replicas = tuple(pieces), _replicas(model, split_over_ranks)
    _check(pieces, measure, batch_size)
    asked = planned_edits(edits, pieces, together=together)
    rows = [asked] if together else [(edit,) for edit in asked]
    classes = tuple(classes_of(row, pieces, distance) for row in rows)
    with preserved(model):
        with replicas.together("ripple_effects"):
            encoding = Encoding(tokenizer, template, measure, batch_size, next(model.parameters()).device)
            work = prepare_work(model, chosen, encoding, pieces)
            norms = work.gradient_norms(replicas)
        all_norms = _in_order(replicas, norms, len(pieces))
        with replicas.together("ripple_effects"):
            outcomes = work.outcomes(replicas.share(rows), progress)
        all_outcomes = _in_order(replicas, outcomes, len(rows))
    name = editor if isinstance(editor, str) else type(editor).__name__
    settings = {"editor": name, "measure": measure, "route": work.route}
    edited = [
        {"pieces": tuple(each.piece.id for each in row), "answers": tuple(each.wanted.answer for each in row)}
        for row in rows
    ]
    return _result(tuple(piece.id for piece in pieces), edited, classes, work.scores, all_norms, all_outcomes, settings)


def _check(pieces: Sequence[KnowledgePiece], measure: str, batch_size: int) -> None:
    check_pieces(pieces)
    if measure not in get_args(Measure):
        raise ValueError(f"unknown measure {measure!r}; {suggestion(str(measure), get_args(Measure))}")
    require_count("batch_size", batch_size)


def _replicas(model: nn.Module, split_over_ranks: bool) -> Replicas:
    unshard_guard(model)
    sharded = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if sharded is not None:
        raise ValueError(
            f"ripple_effects needs whole parameters, and {sharded!r} is a DTensor, sharded by FSDP2 (fully_shard) or "
            "tensor parallelism: load the weights into a plain copy of the model, on one process or on all"
        )
    return Replicas.of(model) if split_over_ranks else Replicas()


def _in_order(replicas: Replicas, mine: list[Any], count: int) -> list[Any]:
    """What the replicas made of items that they had shared out, in the items' order; a collective."""
    parts = replicas.gather_objects(mine)
    return [parts[at % replicas.size][at // replicas.size] for at in range(count)]


def _result(
    pieces: tuple[str, ...],
    edits: Sequence[dict[str, Any]],
    classes: tuple[tuple[str, ...], ...],
    scores: PieceScores,
    norms: Sequence[float],
    outcomes: Sequence[Outcome],
    settings: dict[str, str],
) -> RippleResult:
    size = torch.tensor([each.delta_norm for each in outcomes], dtype=torch.float64)
    own = torch.tensor(norms, dtype=torch.float64)
    along_gradient = torch.stack([each.along_gradient for each in outcomes])  # [E, N]
    # A gradient of zero has no direction.
    angled = torch.tensor([each.gradient_norm > 0 for each in outcomes])[:, None] & (own > 0)
    return RippleResult(
        pieces=pieces,
        edits=tuple(edits),
        classes=classes,
        predicted_first_order=torch.stack([each.along_delta for each in outcomes]) * size[:, None],
        predicted_coupling=along_gradient * size[:, None],
        cosine=torch.where(angled, along_gradient / own, torch.nan),
        before=scores.log_prob,
        after=torch.stack([each.scores.log_prob for each in outcomes]),
        rank_before=scores.rank,
        rank_after=torch.stack([each.scores.rank for each in outcomes]),
        exact_before=scores.exact,
        exact_after=torch.stack([each.scores.exact for each in outcomes]),
        new_before=torch.tensor([each.new_before for each in outcomes], dtype=torch.float64),
        new_after=torch.tensor([each.new_after for each in outcomes], dtype=torch.float64),
        new_exact=torch.tensor([each.new_exact for each in outcomes]),
        delta_norm=size,
        gradient_norm=own,
        settings=settings,
    )
