"""Log-probabilities, ranks and gradients of answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.core.autodiff import Substituted, directional_derivatives
from lightning_goldy.core.batches import split_batch
from lightning_goldy.core.naming import require_choice
from lightning_goldy.core.objective import IGNORE_INDEX, CausalLMObjective
from lightning_goldy.core.pieces import AnswerTokens, KnowledgePiece, Sample, encode_pieces, padded_batches
from lightning_goldy.core.sharding import RankError, Replicas
from lightning_goldy.core.vector import ParameterVector

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
