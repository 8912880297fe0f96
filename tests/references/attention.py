"""Attention statistics the slow way: the library's own ``output_attentions``, and loops over single numbers."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn


def eager_patterns(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """Each layer's attention as the library returns it, ``[B, H, T, T]``, float64; samples go through one by one."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")
    found: list[list[Tensor]] = []
    for row in range(len(batch["input_ids"])):
        inputs = {key: value[row : row + 1] for key, value in batch.items() if key != "labels"}
        mask = inputs.get("attention_mask")
        if mask is not None and mask[0, 0] == 0:
            inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            found.append([each.double() for each in model(**inputs, output_attentions=True).attentions])
    return [torch.cat(layers) for layers in zip(*found, strict=True)]


def statistics_of_pattern(
    pattern: Tensor, ids: list[int], valid: list[bool], sees: Any = lambda t, s: s <= t
) -> dict[str, list[float]]:
    """Every query's statistics for one head's ``[T, T]`` pattern; ``sees(t, s)`` says which keys a query sees."""
    a = pattern.tolist()
    real = [t for t in range(len(ids)) if valid[t]]
    rows: dict[str, list[float]] = {}

    def put(name: str, value: float) -> None:
        rows.setdefault(name, []).append(value)

    for t in real:
        keys = [s for s in real if sees(t, s)]
        entropy = -math.fsum(a[t][s] * math.log(a[t][s]) for s in keys if a[t][s] > 0)
        put("entropy", entropy)
        if len(keys) > 1:
            put("normalised_entropy", entropy / math.log(len(keys)))
        put("distance", math.fsum(a[t][s] * abs(t - s) for s in keys))
        put("first_token", a[t][real[0]])
        put("diagonal", a[t][t])
        if t - 1 in keys:
            put("previous_token", a[t][t - 1])
        earlier = [s for s in keys if s < t and ids[s] == ids[t]]
        followers = [s for s in keys if s < t and s - 1 in real and ids[s - 1] == ids[t]]
        if earlier:
            put("duplicate_token", math.fsum(a[t][s] for s in earlier))
        if followers:
            put("induction", math.fsum(a[t][s] for s in followers))
    return rows


def mean_statistics(patterns: list[Tensor], batch: dict[str, Tensor], sees: Any = lambda t, s: s <= t) -> dict:
    """Mean of every statistic over the queries of all samples, ``[layers, heads]`` each."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    result: dict[str, Tensor] = {}
    for layer, pattern in enumerate(patterns):
        for head in range(pattern.shape[1]):
            pooled: dict[str, list[float]] = {}
            for row, ids in enumerate(batch["input_ids"].tolist()):
                found = statistics_of_pattern(pattern[row, head], ids, (mask[row] != 0).tolist(), sees)
                for name, values in found.items():
                    pooled.setdefault(name, []).extend(values)
            for name, values in pooled.items():
                table = result.setdefault(name, torch.full((len(patterns), pattern.shape[1]), math.nan).double())
                table[layer, head] = math.fsum(values) / len(values)
    return result


def divergence(p: list[float], q: list[float]) -> float:
    """Jensen-Shannon divergence by its definition, nats."""

    def relative(first: list[float], second: list[float]) -> float:
        return math.fsum(x * math.log(x / y) for x, y in zip(first, second, strict=True) if x > 0)

    middle = [(x + y) / 2 for x, y in zip(p, q, strict=True)]
    return (relative(p, middle) + relative(q, middle)) / 2


def mean_divergence(first: list[Tensor], second: list[Tensor], mask: Tensor) -> Tensor:
    """Mean divergence of the rows of queries that are no padding, ``[layers, heads]``."""
    table = torch.zeros(len(first), first[0].shape[1], dtype=torch.float64)
    for layer, (one, other) in enumerate(zip(first, second, strict=True)):
        for head in range(one.shape[1]):
            values = [
                divergence(one[row, head, t].tolist(), other[row, head, t].tolist())
                for row, t in mask.nonzero().tolist()
            ]
            table[layer, head] = math.fsum(values) / len(values)
    return table


def moved(model: nn.Module, size: float, seed: int = 7) -> nn.Module:
    """A copy with noise on every parameter."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return other


def rows_of_scores(scores: Tensor, hidden: Tensor, bias: Tensor, sink: float | None) -> list[list[list[float]]]:
    """Softmax of one head's rows over the keys that are not hidden, ``[T, T]``; a sink takes its share and is left out.

    A row without keys is uniform, as the lowest finite number everywhere makes it.
    """
    table = []
    for t, row in enumerate((scores + bias).tolist()):
        keys = [s for s in range(len(row)) if not hidden[t][s]]
        if not keys:
            table.append([1 / len(row)] * len(row))
            continue
        total = math.fsum(math.exp(row[s]) for s in keys) + (0.0 if sink is None else math.exp(sink))
        table.append([math.exp(row[s]) / total if s in keys else 0.0 for s in range(len(row))])
    return table
