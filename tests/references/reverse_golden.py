"""The search for reverse golden parameters the slow, obvious way: whole sorts, autograd through the definition."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.references.golden import first_k
from tests.references.volume import divergence_reference


def budget_of(percent: float, numel: int) -> int:
    return max(1, math.floor(numel * percent / 100 + 0.5))


def top_reference(scores: dict[str, Tensor], percent: float, scope: str) -> dict[str, Tensor]:
    """Exactly the budget, by sorting everything."""
    if scope == "tensor":
        return {
            name: first_k(each.flatten(), budget_of(percent, each.numel())).view(each.shape)
            for name, each in scores.items()
        }
    flat = torch.cat([each.flatten() for each in scores.values()])
    parts = first_k(flat, budget_of(percent, flat.numel())).split([each.numel() for each in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def single_shot_reference(model: nn.Module, pieces: Sequence, loss) -> dict[str, dict[str, Tensor]]:
    """The three scores of each parameter from whole gradients."""
    named = dict(model.named_parameters())
    found = {key: {n: torch.zeros_like(p) for n, p in named.items()} for key in ("gradient", "taylor", "fisher")}
    for piece in pieces:
        gradients = torch.autograd.grad(loss(model, piece), list(named.values()))
        for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
            found["gradient"][name] += gradient.abs()
            found["taylor"][name] += (gradient * parameter.detach()).abs()
            found["fisher"][name] += (gradient * parameter.detach()) ** 2
    return found


def zeroed(model: nn.Module, mask: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach() * (~mask[name]) for name, parameter in model.named_parameters()}


def masked_divergence_reference(model: nn.Module, mask: dict[str, Tensor], logits) -> float:
    """KL of the model with zeroed elements, by its definition; ``logits(model)`` gives rows at the targets."""
    with torch.no_grad():
        plain = logits(lambda *args, **options: model(*args, **options))
        moved = logits(lambda *args, **options: torch.func.functional_call(model, zeroed(model, mask), args, options))
    return divergence_reference(plain, moved)


def masked_gradient_reference(model: nn.Module, mask: dict[str, Tensor], logits) -> dict[str, Tensor]:
    """Gradient of that KL at the zeroed weights, by autograd through the definition."""
    weights = {name: each.clone().requires_grad_() for name, each in zeroed(model, mask).items()}
    plain = logits(lambda *args, **options: model(*args, **options)).detach()
    moved = logits(lambda *args, **options: torch.func.functional_call(model, weights, args, options))
    log_p, log_q = plain.log_softmax(-1), moved.log_softmax(-1)
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
    return {name: weight.grad for name, weight in weights.items()}


def reselected_reference(scores: Tensor, mask: Tensor, size: int, pool: int) -> Tensor:
    """The pool: all masked elements and the best others; of it the best."""
    flat, masked = scores.flatten(), mask.flatten()
    newcomers = pool - int(masked.sum())
    outside = torch.where(masked, -math.inf, flat)
    inside_pool = masked | first_k(outside, newcomers) if newcomers else masked
    return first_k(torch.where(inside_pool, flat, -math.inf), size).view(mask.shape)


def best_by_enumeration(weights: Tensor, size: int, divergence) -> tuple[float, set[int]]:
    """The best mask of a few elements, by trying all."""
    return max((divergence(set(chosen)), set(chosen)) for chosen in itertools.combinations(range(len(weights)), size))


def shrunk_reference(
    model: nn.Module,
    scores: dict[str, Tensor],
    percent: float,
    scope: str,
    swings: Sequence[float],
    logits,
    *,
    start: float = 30.0,
) -> tuple[float, dict[str, Tensor]]:
    """The best mask of the budget on the way from ``start`` times as many, each of the largest average gains so far.

    Args:
        swings: What a strategy makes each round of the mask's size while it is above the budget; one for every round.
    """
    groups = [list(scores)] if scope == "global" else [[name] for name in scores]
    means = {name: torch.zeros_like(each) for name, each in scores.items()}
    values, factor, found = scores, start, []
    for step, swing in enumerate(swings, start=1):
        mask = _largest_of_groups(values, groups, percent, factor)
        if factor == 1.0:
            found.append((masked_divergence_reference(model, mask, logits), mask))
        slopes = masked_gradient_reference(model, mask, logits)
        gains = {name: -slopes[name] * parameter.detach() for name, parameter in model.named_parameters()}
        for group in groups:
            total = sum(float(gains[name][mask[name]].abs().sum()) for name in group)
            # Where all that a tensor feeds is masked, nothing that is masked in it matters.
            shares = {name: gains[name] / total if total else torch.zeros_like(gains[name]) for name in group}
            means |= {name: 0.8 * means[name] + 0.2 * shares[name] for name in group}
        width = start ** (1 - step / (0.8 * len(swings)))
        values, factor = means, width * swing if width > 1 else 1.0
    mask = _largest_of_groups(values, groups, percent, factor)
    found.append((masked_divergence_reference(model, mask, logits), mask))
    return max(found, key=lambda each: each[0])


def _largest_of_groups(
    scores: dict[str, Tensor], groups: list[list[str]], percent: float, factor: float
) -> dict[str, Tensor]:
    chosen = {}
    for group in groups:
        flat = torch.cat([scores[name].flatten() for name in group])
        size = min(flat.numel(), math.ceil(factor * budget_of(percent, flat.numel()) - 1e-9))
        parts = first_k(flat, size).split([scores[name].numel() for name in group])
        chosen |= {name: part.view(scores[name].shape) for name, part in zip(group, parts, strict=True)}
    return chosen
