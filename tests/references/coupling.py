"""Coupling the slow, obvious way: one forward and one backward pass per piece, whole gradients, plain products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def rows_of(batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of each row without its padding, on whichever side that is."""
    rows = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        real = mask.bool()
        rows.append((ids[real], labels[real]))
    return rows


def log_prob(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean log-probability of the labelled tokens, each given all before it."""
    log_probs = model(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
    terms = [log_probs[t - 1, labels[t]] for t in range(1, len(ids)) if labels[t] != -100]
    return torch.stack(terms).mean()


def gradients(model: nn.Module, rows: Sequence[tuple[Tensor, Tensor]], names: Sequence[str]) -> Tensor:
    """Flat gradients of all rows with respect to the named parameters, shape ``[N, P]``, float64."""
    model.eval()
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    flags = [parameter.requires_grad for parameter in chosen]
    for parameter in chosen:
        parameter.requires_grad_(True)
    found = []
    for ids, labels in rows:
        each = torch.autograd.grad(log_prob(model, ids, labels), chosen, allow_unused=True)
        flat = [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, each, strict=True)]
        found.append(torch.cat([g.detach().double().flatten() for g in flat]))
    for parameter, flag in zip(chosen, flags, strict=True):
        parameter.requires_grad_(flag)
    return torch.stack(found)


def centered(flat: Tensor) -> Tensor:
    """Without the mean over pieces."""
    return flat - flat.mean(dim=0)


def cosines(flat: Tensor) -> Tensor:
    """Cosines between rows, one pair at a time, with correctly rounded norms."""
    count = len(flat)
    result = torch.empty(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(count):
            result[i, j] = (flat[i] * flat[j]).sum() / (flat[i].norm() * flat[j].norm())
    return result
