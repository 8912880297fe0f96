"""The finetune as an edit: what it did to every piece of knowledge, predicted at the base and measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import EVERYTHING, Agreement, agreement_of
from lightning_goldy.analysis.result import AnalysisResult
from lightning_goldy.analysis.ripple.editors import require_count
from lightning_goldy.analysis.ripple.measure import (
    Batch,
    Encoding,
    Measure,
    PieceScores,
    available_route,
    score_pieces,
    slopes,
)
from lightning_goldy.analysis.ripple.result import check_pieces
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.batches import split_batch
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
# Passes of each piece: two forward, and one of forward mode (4 forward) or one forward and backward (3).
_PASSES = {"forward": 6, "gradients": 5}


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

    @property
    def measured(self) -> Tensor:
        """Change of each piece's log-probability, nats."""
        return self.after - self.before

    @property
    def groups(self) -> tuple[str, ...]:
        """The classes that occur, in the order of the pieces."""
        return tuple(dict.fromkeys(self.classes))

    @property
    def passes(self) -> int:
        """What it cost, in forward passes of one piece."""
        return _PASSES[self.route] * len(self.pieces)

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
        found = []
        for group in (EVERYTHING, *self.groups):
            places = self.places(group)
            predicted, measured = self.predicted[places].numpy(), self.measured[places].numpy()
            found.append(agreement_of(predicted, measured, "first_order", group))
        return tuple(found)

    def most_moved(self, count: int, group: str = UNTOUCHED) -> tuple[int, ...]:
        """The numbers of the pieces of a class whose log-probability changed most, the largest change first.

        Args:
            count: At most so many.
            group: A class, or ``all``; one that no piece has gives none.
        """
        places = self.places(group) if group in (EVERYTHING, *self.groups) else []
        size = self.measured.abs().nan_to_num(nan=math.inf).tolist()
        return tuple(sorted(places, key=lambda place: (-size[place], place))[:count])

    def scalars(self) -> dict[str, float | None]:
        """Every number worth a curve, by name; None where it is undefined."""
        found: dict[str, float | None] = {"delta_norm": self.delta_norm}
        for each in self.agreement():
            place = "" if each.group == EVERYTHING else f"/{each.group}"
            for name in ("pearson", "spearman", "sign_agreement", "slope"):
                found[f"{name}{place}"] = _finite(getattr(each, name))
        for group in self.groups:
            places = self.places(group)
            columns: dict[str, Tensor] = {
                "measured_change": self.measured,
                "predicted_change": self.predicted,
                "exact": self.exact_after.double(),
                "exact_before": self.exact_before.double(),
            }
            for name, column in columns.items():
                found[f"{name}/{group}"] = _finite(float(column[places].mean()))
        return found


def finetune_ripple(
    model: nn.Module,
    base: BaseParameters | ParameterVector,
    pieces: Sequence[KnowledgePiece],
    *,
    tokenizer: PreTrainedTokenizerBase,
    classes: Sequence[str] | None = None,
    measure: Measure = "answer_with_end",
    template: str = QUESTION_TEMPLATE,
    batch_size: int = 16,
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
        base: Snapshot of its trainable parameters, theta_0.
        pieces: What is measured; ids must differ.
        tokenizer: Of the model.
        classes: A class per piece; ``untouched`` for all by default.
        measure: Which tokens count: ``answer_with_end``, ``answer`` or ``first_token``.
        template: The prompt, with ``{question}`` where the question goes.
        batch_size: Pieces per forward pass.
        progress: Called with (batches done, batches in all) on this rank.
        split_over_ranks: Whether to share batches out over the ranks of an initialised process group.

    Returns:
        Predicted and measured changes, and how they agree.

    Raises:
        ValueError: An argument is out of range, or a piece cannot be encoded.
        SpaceError: The base is of another model.

    Source: the gradient's first-order prediction as in Pruthi et al., "Estimating Training Data Influence by Tracing
        Gradient Descent" (2020), along the whole finetune.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.core import ParameterVector
        >>> from lightning_goldy.data import byte_tokenizer
        >>> config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=258, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
        >>> base = ParameterVector.of(model)
        >>> pieces = [KnowledgePiece("a", "1 + 1?", "2"), KnowledgePiece("b", "1 + 2?", "3")]
        >>> found = finetune_ripple(model, base, pieces, tokenizer=byte_tokenizer())
        >>> found.delta_norm, found.measured.tolist(), found.route
        (0.0, [0.0, 0.0], 'forward')
    """
    pieces = tuple(pieces)
    check_pieces(pieces)
    if measure not in get_args(Measure):
        raise ValueError(f"unknown measure {measure!r}; {suggestion(str(measure), get_args(Measure))}")
    require_count("batch_size", batch_size)
    classes = (UNTOUCHED,) * len(pieces) if classes is None else tuple(classes)
    if len(classes) != len(pieces):
        raise ValueError(f"there are {len(classes)} classes for {len(pieces)} pieces")
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    with preserved(model), replicas.together("finetune_ripple"):
        encoding = Encoding(tokenizer, template, measure, batch_size, next(model.parameters()).device)
        batches = encoding.batches(encoding.samples(pieces), batch_size)
        start = base if isinstance(base, ParameterVector) else base.vector(model)
        work = _Work(model, start, _step(model, start), replicas.share(batches), progress)
        delta_norm, route, mine = work.results(next(split_batch(batches[0])))
    parts = replicas.gather_objects(mine)
    rows = [parts[at % replicas.size][at // replicas.size] for at in range(len(batches))]
    before, after = _joined([row[0] for row in rows]), _joined([row[1] for row in rows])
    return FinetuneRipple(
        pieces=tuple(piece.id for piece in pieces),
        classes=classes,
        predicted=torch.cat([row[2] for row in rows]),
        before=before.log_prob,
        after=after.log_prob,
        rank_before=before.rank,
        rank_after=after.rank,
        exact_before=before.exact,
        exact_after=after.exact,
        delta_norm=delta_norm,
        route=route,
    )


@dataclass(frozen=True)
class _Work:
    """The passes over this process's batches."""

    model: nn.Module
    start: ParameterVector
    delta: ParameterVector
    batches: list[Batch]
    progress: Callable[[int, int], None] | None

    def results(self, sample: Batch) -> tuple[float, str, list[tuple[PieceScores, PieceScores, Tensor]]]:
        """||Delta||, the route, and of each batch the scores at the base and now, and the predicted changes."""
        after = [score_pieces(self.model, [batch]) for batch in self.batches]
        size = self.delta.norm()
        # Along a unit vector, which no precision of the parameters flushes to zero; in place, for it may be large.
        for tensor in self.delta.values() if size else ():
            tensor.div_(size)
        rows = []
        with substituted(self.model, self.start):
            sharded = any(map(is_sharded, self.start.values()))
            route = "gradients" if sharded else available_route(self.model, self.start, sample)
            for done, (batch, now) in enumerate(zip(self.batches, after, strict=True), 1):
                before = score_pieces(self.model, [batch])
                if sharded:
                    slope = _sharded_slopes(self.model, self.delta, batch)
                else:
                    slope = slopes(self.model, self.start, (self.delta,), [batch], route)[0]
                rows.append((before, now, slope * size))
                if self.progress is not None:
                    self.progress(done, len(self.batches))
        return size, route, rows


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
        gradients = {name: parameter.grad for name, parameter in parameters.items()}
        missing = {name: torch.zeros_like(parameters[name]) for name, value in gradients.items() if value is None}
        vector = ParameterVector(unit.space, {**{n: g for n, g in gradients.items() if g is not None}, **missing})
        found.append(vector.dot(unit))
    for parameter in model.parameters():
        parameter.grad = None
    return torch.tensor(found, dtype=torch.float64)


def _step(model: nn.Module, start: ParameterVector) -> ParameterVector:
    """Delta, in at least float32."""

    def difference(now: Tensor, before: Tensor) -> Tensor:
        wide = torch.promote_types(before.dtype, torch.float32)
        return now.to(wide) - before.to(wide)

    return ParameterVector.of(model, start.space, clone=False).zip_with(start, difference)


def _joined(parts: Sequence[PieceScores]) -> PieceScores:
    columns: Mapping[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts]) for name in ("log_prob", "rank", "exact")
    }
    return PieceScores(**columns)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
