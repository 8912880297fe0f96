"""The finetune as an edit: what it did to every piece of knowledge, predicted at the base and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import EVERYTHING, Agreement, agreement_of, spaced_places
from lightning_goldy.analysis.divergence import own_share
from lightning_goldy.analysis.result import AnalysisResult, Cost, counted_passes, total_cost
from lightning_goldy.analysis.ripple.measure import (
    Batch,
    Encoding,
    Measure,
    PieceScores,
    available_route,
    check_pieces,
    gathered,
    score_pieces,
    slopes,
    unit_change,
)
from lightning_goldy.core.architecture.adapters import line_from
from lightning_goldy.core.base import Base, base_of
from lightning_goldy.core.batches import split_batch
from lightning_goldy.core.files import finite
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.pieces import QUESTION_TEMPLATE, KnowledgePiece
from lightning_goldy.core.sharding import Replicas, is_sharded, unshard_guard
from lightning_goldy.core.vector import ParameterVector, substituted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNTOUCHED = "untouched"
"""The class of pieces that the finetune does not teach."""
# Pieces in a row of results.jsonl; more than a scatter plot can show.
_MOST_POINTS = 2000


@dataclass(frozen=True)
class FinetuneRipple(AnalysisResult):
    r"""Predicted and measured change of N pieces since the base; tensors of shape ``[N]``, float64 unless said.

    Args:
        pieces: Ids.
        classes: The class of each piece, such as ``edited`` and ``untouched``.
        predicted: g_j . Delta, nats: the change of each piece's log-probability to first order at the base.
        before: Mean log-probability of each answer's tokens at the base, nats.
        after: The same now.
        rank_before: Rank of the answer at the base, int64: of its tokens, each after the true ones before it, the
            worst rank in the vocabulary; 1 is best.
        rank_after: The same now.
        exact_before: Whether every token of the answer was the most probable one, bool.
        exact_after: The same now.
        delta_norm: ||Delta||, parameter units.
        route: ``forward`` (derivatives along Delta by forward mode) or ``gradients`` (inner products with gradients,
            where a model has no forward mode).
        cost: Passes of the model on all ranks.
        space: ``merged`` or ``adapters``; None of a model without adapters.
    """

    pieces: tuple[str, ...]
    classes: tuple[str, ...]
    predicted: Tensor
    before: Tensor
    after: Tensor
    rank_before: Tensor
    rank_after: Tensor
    exact_before: Tensor
    exact_after: Tensor
    delta_norm: float
    route: str
    cost: Cost = field(default=Cost(), compare=False)
    space: str | None = None

    @property
    def measured(self) -> Tensor:
        """Change of each piece's log-probability, nats."""
        return self.after - self.before

    @property
    def groups(self) -> tuple[str, ...]:
        """The classes that occur, in the order of the pieces."""
        return tuple(dict.fromkeys(self.classes))

    def places(self, group: str = EVERYTHING) -> list[int]:
        """The numbers of the pieces of a class, or of ``all``.

        Raises:
            ValueError: No piece has that class.
        """
        if group != EVERYTHING and group not in self.groups:
            raise ValueError(f"no piece has the class {group!r}; {suggestion(group, [EVERYTHING, *self.groups])}")
        return [place for place, name in enumerate(self.classes) if group in (EVERYTHING, name)]

    def agreement(self) -> tuple[Agreement, ...]:
        """How well the changes were predicted: over all pieces first, then by class."""
        predicted, measured = self.predicted.numpy(), self.measured.numpy()
        return tuple(
            agreement_of(predicted[places], measured[places], "first_order", group)
            for group in (EVERYTHING, *self.groups)
            for places in (self.places(group),)
        )

    def most_moved(self, count: int, group: str = UNTOUCHED) -> tuple[int, ...]:
        """The numbers of the pieces of a class whose log-probability changed most, the largest change first.

        Args:
            count: At most so many.
            group: A class, or ``all``; one that no piece has gives none.
        """
        places = self.places(group) if group in (EVERYTHING, *self.groups) else []
        size = self.measured.abs().nan_to_num(nan=math.inf).tolist()
        return tuple(sorted(places, key=lambda place: (-size[place], place))[:count])

    def _error(self, group: str) -> float:
        """Standard error of a class's mean change over its pieces, nats; NaN for a single piece."""
        measured = self.measured[self.places(group)]
        return float(measured.std() / math.sqrt(len(measured))) if len(measured) > 1 else math.nan

    def metrics(self) -> dict[str, float | None]:
        """Every number worth a curve, by name; None where it is undefined."""
        found: dict[str, float | None] = {"delta_norm": self.delta_norm}
        for entry in self.agreement():
            place = "" if entry.group == EVERYTHING else f"/{entry.group}"
            found |= {f"{name}{place}": value for name, value in entry.metrics().items()}
        columns = {
            "measured_change": self.measured,
            "predicted_change": self.predicted,
            "exact": self.exact_after.double(),
            "exact_before": self.exact_before.double(),
        }
        for group in self.groups:
            places = self.places(group)
            found |= {f"{name}/{group}": finite(float(column[places].mean())) for name, column in columns.items()}
        return found

    def details(self) -> dict[str, Any]:
        """Predictions, measured changes and how they agree; of more than 2,000 pieces, so many evenly spaced."""
        places = spaced_places(len(self.pieces), _MOST_POINTS).tolist()
        points = {
            "piece": [self.pieces[place] for place in places],
            "class": [self.classes[place] for place in places],
            "predicted": finite(self.predicted[places].tolist()),
            "measured": finite(self.measured[places].tolist()),
            "exact": self.exact_after[places].long().tolist(),
        }
        return {
            "n_pieces": len(self.pieces),
            "classes": {name: len(self.places(name)) for name in self.groups},
            "errors": {name: finite(self._error(name)) for name in self.groups},
            "route": self.route,
            **({} if self.space is None else {"space": self.space}),
            "points": points,
            "agreement": [entry.details() for entry in self.agreement()],
        }


def finetune_ripple(
    model: nn.Module,
    base: Base,
    pieces: Sequence[KnowledgePiece],
    *,
    tokenizer: PreTrainedTokenizerBase,
    classes: Sequence[str] | None = None,
    measure: Measure = "answer",
    template: str = QUESTION_TEMPLATE,
    batch_size: int = 16,
    space: str = "merged",
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> FinetuneRipple:
    r"""Predicts at the base what a finetune did to pieces of knowledge, and measures it.

    .. math::
        \Delta \log p_j \approx g_j \cdot \Delta, \qquad \Delta = \theta_t - \theta_0, \qquad
        g_j = \nabla_\theta \overline{\log p_{\theta_0}}(a_j \mid q_j)

    By one pass of forward mode along Delta per batch; a model without forward mode, or one that is sharded, takes a
    backward pass per piece. The prediction is first order: what the finetune did beyond that is in the measured change
    alone. The model works in evaluation mode and comes back bit for bit. On several ranks the batches are shared out;
    every rank must call.

    Args:
        model: The finetuned causal language model, plain or sharded with FSDP2.
        base: Its base, theta_0: anything that :func:`~lightning_goldy.core.base_of` takes.
        pieces: What is measured; ids must differ.
        tokenizer: Of the model.
        classes: A class per piece; ``untouched`` for all by default.
        measure: Which tokens count: ``answer``, ``answer_with_end`` (the end-of-text token too) or ``first_token``.
        template: The prompt, with ``{question}`` where the question goes.
        batch_size: Pieces per forward pass.
        space: Of a model with adapters ``merged``, along the weights that they come to, or ``adapters``.
        progress: Called with (batches done, batches in all) on this rank.
        split_over_ranks: Whether to share batches out over the ranks of an initialised process group.

    Returns:
        Predicted and measured changes, and how they agree.

    Raises:
        ValueError: An argument is out of range, or a piece cannot be encoded.
        SpaceError: The base is of another model.
        AdapterError: There is no line through the model's merged weights.
        StoreError: The file of the base cannot be read.

    Source: the gradient's first-order prediction as in Pruthi et al., "Estimating Training Data Influence by Tracing
        Gradient Descent" (2020), along the whole finetune.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.data import byte_tokenizer
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=258, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
        >>> pieces = [KnowledgePiece("a", "1 + 1?", "2"), KnowledgePiece("b", "1 + 2?", "3")]
        >>> found = finetune_ripple(model, model, pieces, tokenizer=byte_tokenizer())
        >>> found.delta_norm, found.measured.tolist(), found.route
        (0.0, [0.0, 0.0], 'forward')
    """
    pieces = tuple(pieces)
    check_pieces(pieces)
    encoding = Encoding(tokenizer, template, measure, batch_size, next(model.parameters()).device)
    classes = (UNTOUCHED,) * len(pieces) if classes is None else tuple(classes)
    if len(classes) != len(pieces):
        raise ValueError(f"there are {len(classes)} classes for {len(pieces)} pieces")
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    with preserved(model), counted_passes(model) as passes:
        with replicas.together("finetune_ripple"):
            batches = encoding.batches(encoding.samples(pieces))
            with line_from(model, base_of(base, model), space) as line:
                route, common, mine = _measure_batches(model, line.start, batches, replicas, progress, passes)
        parts = zip(*gathered(replicas, mine, len(batches)), strict=True)
        cost = total_cost(replicas, passes(), common)
    before, after = (PieceScores.joined(next(parts)) for _ in range(2))
    return FinetuneRipple(
        pieces=tuple(piece.id for piece in pieces),
        classes=classes,
        predicted=torch.cat(next(parts)),
        **before.named("before"),
        **after.named("after"),
        delta_norm=line.step_norm,
        route=route,
        cost=cost,
        space=line.space,
    )


def _measure_batches(
    model: nn.Module,
    start: ParameterVector,
    batches: list[Batch],
    replicas: Replicas,
    progress: Callable[[int, int], None] | None,
    passes: Callable[[], Cost],
) -> tuple[str, Cost, list[tuple[PieceScores, PieceScores, Tensor]]]:
    """The route, what trying it cost; of each batch of this rank the scores at the base and now, and predictions."""
    now = [score_pieces(model, [batch]) for batch in replicas.share(batches)]
    unit, size = unit_change(model, start)
    rows = []
    with substituted(model, start):
        sharded = any(map(is_sharded, start.values()))
        tried = passes()
        route = "gradients" if sharded else available_route(model, start, next(split_batch(batches[0])))
        common = passes() - tried
        for batch, after in zip(own_share(batches, model, replicas, progress), now, strict=True):
            before = score_pieces(model, [batch])
            if sharded:
                along = _sharded_slopes(model, unit, batch)
            else:
                along = slopes(model, start, (unit,), [batch], route)[0]
            rows.append((before, after, along * size))
    return route, common, rows


def _sharded_slopes(model: nn.Module, unit: ParameterVector, batch: Batch) -> Tensor:
    """g_j . u by a backward pass per piece, whose gradients FSDP2 leaves in the parameters' ``grad``."""
    found = []
    for piece in split_batch(batch):
        # Also before the pass: another analysis of the same parameters may have left the root gathered.
        parameters = unit.space.resolve(model)
        for parameter in model.parameters():
            parameter.grad = None
        CausalLMObjective().log_probs(model, piece).mean().backward()
        unshard_guard(model)
        gradients = {name: torch.zeros_like(own) if own.grad is None else own.grad for name, own in parameters.items()}
        found.append(ParameterVector(unit.space, gradients).dot(unit))
    for parameter in model.parameters():
        parameter.grad = None
    return torch.tensor(found, dtype=torch.float64)
