"""What answers are worth to a model, by gradients and measured, for edits and for the finetune as an edit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import EVERYTHING, Agreement, agreement_of, spaced_places
from lightning_goldy.analysis.divergence import own_share
from lightning_goldy.analysis.result import AnalysisResult, Cost, counted_passes, total_cost
from lightning_goldy.core.architecture.adapters import base_within, line_from
from lightning_goldy.core.autodiff import Substituted, directional_derivatives
from lightning_goldy.core.base import Base
from lightning_goldy.core.batches import split_batch
from lightning_goldy.core.files import finite
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import require_choice, suggestion
from lightning_goldy.core.objective import IGNORE_INDEX, CausalLMObjective
from lightning_goldy.core.pieces import (
    QUESTION_TEMPLATE,
    AnswerTokens,
    KnowledgePiece,
    Sample,
    encode_pieces,
    padded_batches,
)
from lightning_goldy.core.sharding import RankError, Replicas, inside_parallel, is_sharded, unshard_guard
from lightning_goldy.core.vector import ParameterVector, substituted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

Measure = AnswerTokens
Batch = Mapping[str, Tensor]
Route = Literal["forward", "gradients"]


@dataclass(frozen=True)
class Encoding:
    """How pieces become batches.

    Args:
        tokenizer: Of the model.
        template: The prompt, with ``{question}`` where the question goes.
        measure: Which tokens are targets: ``answer_with_end`` for all of the answer and the end-of-text token,
            ``answer`` without the end, ``first_token`` for the first.
        batch_size: Pieces per batch.
        device: Where the batches are.

    Raises:
        ValueError: An unknown measure, or no batch size.

    Example:
        >>> from lightning_goldy.data import byte_tokenizer
        >>> encoding = Encoding(byte_tokenizer(), "{question}", "answer", 1, torch.device("cpu"))
        >>> encoding.samples([KnowledgePiece("1", "Q?", "A")])[0]["labels"].tolist()
        [-100, -100, 32, 65, -100]
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    measure: Measure
    batch_size: int
    device: torch.device

    def __post_init__(self) -> None:
        require_choice("measure", self.measure, get_args(Measure))
        require_count("batch_size", self.batch_size)

    def samples(self, pieces: Sequence[KnowledgePiece]) -> list[Sample]:
        """Prompt and answer of each piece, labels on the tokens that are measured.

        Raises:
            ValueError: A piece cannot be encoded, or nothing predicts its first token, for the prompt is empty.
        """
        samples = encode_pieces(pieces, self.tokenizer, template=self.template, tokens=self.measure)
        for sample, piece in zip(samples, pieces, strict=True):
            if int(sample["labels"][0]) != IGNORE_INDEX:
                raise ValueError(
                    f"the prompt of piece {piece.id!r} is empty, so nothing predicts its answer's first token"
                )
        return samples

    def batches(self, samples: Sequence[Sample], size: int | None = None) -> list[Batch]:
        """Samples in batches, of the encoding's size by default."""
        # Padding is masked, so any token serves.
        fill = next(
            (token for name in ("pad", "eos") if (token := getattr(self.tokenizer, f"{name}_token_id")) is not None), 0
        )
        padded = padded_batches(samples, int(fill), size or self.batch_size)
        return [{name: value.to(self.device) for name, value in batch.items()} for batch in padded]


@dataclass(frozen=True, eq=False)
class PieceScores:
    """How sure a model is of N pieces, on the CPU.

    Args:
        log_prob: Mean log-probability of the target tokens, nats, float64, ``[N]``.
        rank: Worst rank of a target token in the vocabulary, 1 is best, int64, ``[N]``.
        exact: Whether each target token is the most probable one, bool, ``[N]``.
    """

    log_prob: Tensor
    rank: Tensor
    exact: Tensor

    @classmethod
    def joined(cls, parts: Sequence[PieceScores]) -> PieceScores:
        """The scores of all parts, one after the other."""
        return cls(*(torch.cat(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))

    def named(self, when: str) -> dict[str, Tensor]:
        """As the fields of a result: such as ``before``, ``rank_before``, ``exact_before``."""
        return {when: self.log_prob, f"rank_{when}": self.rank, f"exact_{when}": self.exact}


def score_pieces(model: nn.Module, batches: Sequence[Batch]) -> PieceScores:
    """Measures pieces, a forward pass per batch.

    Args:
        model: A causal language model.
        batches: Of pieces, labels on what is measured.
    """
    parts = []
    with torch.no_grad():
        for batch in batches:
            target = CausalLMObjective().logits_and_targets(model, batch)
            # In float64, or the effect of a small edit would be a few units of the last place.
            target = dataclasses.replace(target, logits=target.logits.double())
            own = target.logits.gather(1, target.targets[:, None])  # [M, 1]
            ranks = 1 + (target.logits > own).sum(dim=1)  # [M]
            worst = torch.zeros(target.n_samples, dtype=torch.int64, device=ranks.device)
            worst.scatter_reduce_(0, target.sample, ranks, "amax")
            missed = target.logits.argmax(dim=1) != target.targets
            misses = torch.zeros_like(worst).index_add_(0, target.sample, missed.long())
            parts.append(PieceScores(target.log_probs().cpu(), worst.cpu(), (misses == 0).cpu()))
    return PieceScores.joined(parts)


def available_route(model: nn.Module, start: ParameterVector, sample: Batch) -> Route:
    """``forward`` where forward mode runs through the model, else ``gradients``.

    Args:
        model: A causal language model that can be called.
        start: Its values.
        sample: A batch that it takes.
    """
    try:
        _forward_slope(model, start, start, sample)
    except (RankError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, NotImplementedError):
        return "gradients"
    return "forward"


def slopes(
    model: nn.Module,
    start: ParameterVector,
    directions: Sequence[ParameterVector],
    batches: Sequence[Batch],
    route: Route,
) -> Tensor:
    r"""Derivatives of every piece's log-probability along directions.

    .. math:: s_{dj} = g_j \cdot u_d, \qquad g_j = \nabla_\theta \overline{\log p_\theta}(a_j \mid q_j)

    Args:
        model: At ``start``.
        start: theta.
        directions: D of them, u.
        batches: Of N pieces.
        route: ``forward``: one pass of forward mode per direction and batch. ``gradients``: a backward pass per piece.

    Returns:
        Shape ``[D, N]``, nats per unit of the direction, float64, on the CPU.
    """
    if route == "forward":
        rows = [torch.cat([_forward_slope(model, start, each, batch) for batch in batches]) for each in directions]
        return torch.stack(rows)
    columns = []
    for sample in (part for batch in batches for part in split_batch(batch)):
        gradient = piece_gradient(model, start, sample)
        columns.append(torch.tensor([gradient.dot(each) for each in directions], dtype=torch.float64))
    return torch.stack(columns, dim=1)


def piece_gradient(model: nn.Module, start: ParameterVector, batch: Batch) -> ParameterVector:
    """Gradient of the mean log-probability of a batch's pieces with respect to the parameters of ``start``."""
    log_prob = CausalLMObjective().log_probs(model, batch).mean()
    gradients = log_prob_gradient(start.space.resolve(model), log_prob)
    return ParameterVector(start.space, dict(zip(start, gradients, strict=True)))


def _forward_slope(model: nn.Module, start: ParameterVector, direction: ParameterVector, batch: Batch) -> Tensor:
    _, slope = directional_derivatives(
        lambda parameters: CausalLMObjective().log_probs(Substituted(model, parameters), batch),
        dict(start),
        dict(direction),
        1,
    )
    return slope.double().cpu()


def log_prob_gradient(parameters: Mapping[str, nn.Parameter], log_prob: Tensor) -> list[Tensor]:
    """The gradient of a scalar; zero for parameters that it does not depend on."""
    return list(torch.autograd.grad(log_prob, list(parameters.values()), allow_unused=True, materialize_grads=True))


def unit_change(model: nn.Module, start: ParameterVector) -> tuple[ParameterVector, float]:
    """The change of the parameters since ``start`` as a unit vector, in at least float32, and its norm."""

    def difference(now: Tensor, before: Tensor) -> Tensor:
        wide = torch.promote_types(before.dtype, torch.float32)
        return now.to(wide) - before.to(wide)

    change = ParameterVector.of(model, start.space, clone=False).zip_with(start, difference)
    return change, normalise_(change)


def normalise_(vector: ParameterVector) -> float:
    """Scales a vector to length 1 in place, for it may be large (a zero one stays), and returns the length it had.

    No precision of the parameters flushes a unit vector to zero.
    """
    size = vector.norm()
    for tensor in vector.values() if size else ():
        tensor.div_(size)
    return size


def gathered(replicas: Replicas, mine: list[T], count: int) -> list[T]:
    """What the replicas made of items that they had shared out, in the items' order; a collective."""
    parts = replicas.gather_objects(mine)
    return [parts[at % replicas.size][at // replicas.size] for at in range(count)]


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


def require_count(name: str, value: int) -> None:
    """Checks a setting.

    Raises:
        ValueError: It is not a whole number of at least 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")


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

    def _turned(self, group: str) -> dict[str, int]:
        """How many pieces of a class are exact now and were not at the base, and the reverse."""
        before, after = (flags[self.places(group)] for flags in (self.exact_before, self.exact_after))
        return {"gained": int((after & ~before).sum()), "lost": int((before & ~after).sum())}

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
            "turned": {name: self._turned(name) for name in self.groups},
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
    model, pieces = inside_parallel(model), tuple(pieces)
    check_pieces(pieces)
    encoding = Encoding(tokenizer, template, measure, batch_size, next(model.parameters()).device)
    classes = (UNTOUCHED,) * len(pieces) if classes is None else tuple(classes)
    if len(classes) != len(pieces):
        raise ValueError(f"there are {len(classes)} classes for {len(pieces)} pieces")
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    with preserved(model), counted_passes(model) as passes:
        with replicas.together("finetune_ripple"):
            batches = encoding.batches(encoding.samples(pieces))
            with line_from(model, base_within(base, model, space), space) as line:
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
