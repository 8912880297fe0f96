"""How sure a model is of pieces of knowledge, and how that changes along a direction in parameter space."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.editors import log_prob_gradient
from lightning_goldy.core.autodiff import Substituted, directional_derivatives
from lightning_goldy.core.batches import split_batch
from lightning_goldy.core.encoding import Sample
from lightning_goldy.core.objective import IGNORE_INDEX, CausalLMObjective
from lightning_goldy.core.vector import ParameterVector

Measure = Literal["answer_with_end", "answer", "first_token"]
Batch = Mapping[str, Tensor]
Route = Literal["forward", "gradients"]


@dataclass(frozen=True)
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


def measured_samples(samples: Sequence[Sample], measure: Measure, names: Sequence[str]) -> list[Sample]:
    """Samples whose labels are the tokens that are measured.

    Args:
        samples: Labels on the answer and the end-of-text token.
        measure: ``answer_with_end`` for all of these, ``answer`` without the end, ``first_token`` for the first.
        names: Of the samples, for messages.

    Raises:
        ValueError: Nothing predicts the first token, for the prompt is empty.

    Example:
        >>> labels = torch.tensor([-100, 7, 8, 0])
        >>> measured_samples([{"labels": labels}], "answer", ["a"])[0]["labels"].tolist()
        [-100, 7, 8, -100]
    """
    found = []
    for sample, name in zip(samples, names, strict=True):
        labels = sample["labels"].clone()
        places = (labels != IGNORE_INDEX).nonzero().flatten()
        if int(places[0]) == 0:
            raise ValueError(f"the prompt of piece {name!r} is empty, so nothing predicts its answer's first token")
        if measure == "answer":
            labels[places[-1]] = IGNORE_INDEX
        elif measure == "first_token":
            labels[places[1:]] = IGNORE_INDEX
        found.append({**sample, "labels": labels})
    return found


def score_pieces(model: nn.Module, batches: Sequence[Batch]) -> PieceScores:
    """Measures pieces, a forward pass per batch.

    Args:
        model: A causal language model.
        batches: Of pieces, labels on what is measured.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
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
            parts.append((target.log_probs().cpu(), worst.cpu(), (misses == 0).cpu()))
    return PieceScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def available_route(model: nn.Module, start: ParameterVector, sample: Batch) -> Route:
    """``forward`` where forward mode runs through the model, else ``gradients``.

    Args:
        model: A causal language model that can be called.
        start: Its values.
        sample: A batch that it takes.
    """
    try:
        _forward_slope(model, start, start, sample)
    except torch.OutOfMemoryError:
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
