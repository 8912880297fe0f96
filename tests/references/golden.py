"""Golden parameters the slow, obvious way: whole gradients, whole sorts."""

from __future__ import annotations

import math

import torch


def first_k(scores: torch.Tensor, k: int) -> torch.Tensor:
    """True at the k largest elements of a flat tensor, ties to the smaller index."""
    order = torch.argsort(scores, descending=True, stable=True)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[:k]] = True
    return mask


def golden_masks(model, samples, loss, *, percent, score="gradient", scope="tensor", quorum=1.0):
    """Masks by name from a list of single samples and ``loss(model, sample)``."""
    model.eval()
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    votes = {name: torch.zeros(parameter.shape, dtype=torch.long) for name, parameter in named}
    for sample in samples:
        model.zero_grad(set_to_none=True)
        loss(model, sample).backward()
        scores = {}
        for name, parameter in named:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            gradient, value = gradient.detach().float(), parameter.detach().float()
            scores[name] = {
                "gradient": lambda g=gradient: g.abs(),
                "taylor": lambda g=gradient, v=value: (g * v).abs(),
                "fisher": lambda g=gradient, v=value: (g * v) ** 2,
            }[score]()
        if scope == "global":
            flat = torch.cat([each.flatten() for each in scores.values()])
            mask = first_k(flat, max(1, math.floor(flat.numel() * percent / 100 + 0.5)))
            for (name, parameter), part in zip(named, mask.split([p.numel() for _, p in named]), strict=True):
                votes[name] += part.view(parameter.shape)
        else:
            for name, each in scores.items():
                k = max(1, math.floor(each.numel() * percent / 100 + 0.5))
                votes[name] += first_k(each.flatten(), k).view(each.shape)
    model.zero_grad(set_to_none=True)
    needed = max(1, math.ceil(quorum * len(samples) - 1e-9))
    return {name: vote >= needed for name, vote in votes.items()}


def row_column_null_reference(votes, n_samples, needed):
    """Golden elements expected when rates of rows and columns multiply: fitted by bisection, summed one by one."""
    rows, columns = ((votes.sum(dim=axis).double() / n_samples).tolist() for axis in (1, 0))
    total = sum(rows)
    first, second = [row / total for row in rows], list(columns)

    def solved(target, others):
        low, high = 0.0, 1e5
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if sum(min(1.0, middle * other) for other in others) < target else (low, middle)
        return high if target else 0.0

    for _ in range(30):
        if max(first) * max(second) <= 1 + 1e-9:
            break
        first = [solved(target, second) for target in rows]
        second = [solved(target, first) for target in columns]

    def tail(p):
        terms = (math.comb(n_samples, m) * p**m * (1 - p) ** (n_samples - m) for m in range(needed, n_samples + 1))
        return sum(terms)

    rates = (torch.tensor(first)[:, None] * torch.tensor(second)).clamp(max=1).double().flatten()
    return sum(
        tail(p) * count for p, count in zip(*map(torch.Tensor.tolist, rates.unique(return_counts=True)), strict=True)
    )
