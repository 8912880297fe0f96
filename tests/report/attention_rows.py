"""Rows of the analysis ``attention_tracker``, made up."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_goldy.analysis.attention import (
    STATISTICS,
    AttentionMaps,
    AttentionStatistics,
    PromptAttention,
    TrackedAttention,
)
from lightning_goldy.analysis.attention.statistics import strongest_heads
from lightning_goldy.analysis.result import Cost


def statistics_of(layers: int = 2, heads: int = 3, *, drift: bool = True) -> AttentionStatistics:
    """Head h of layer l has l + h / 10 of everything; no query has induction, and the last head drifted most."""
    values = torch.arange(layers)[:, None] + torch.arange(heads)[None, :].double() / 10
    named = dict.fromkeys(STATISTICS, values / 10) | {"entropy": values, "distance": 3 * values}
    named["induction"] = torch.full_like(values, math.nan)
    queries = torch.full((layers, len(STATISTICS)), 50)
    queries[:, STATISTICS.index("induction")] = 7
    return AttentionStatistics(**named, drift=values / 20 if drift else None, queries=queries, n_samples=4)


def maps_of(tokens: tuple[str, ...], layers: int = 2, heads: int = 3, *, seed: int = 0) -> AttentionMaps:
    """Causal patterns at random."""
    generator = torch.Generator().manual_seed(seed)
    length = len(tokens)
    scores = torch.randn(layers, 1, heads, length, length, generator=generator)
    patterns = torch.softmax(scores + torch.full((length, length), -math.inf).triu(1), dim=-1)
    return AttentionMaps(tuple(range(layers)), tuple(patterns), torch.ones(1, length, dtype=torch.bool), (tokens,))


def attention_row(
    tokens: tuple[str, ...] = ("the", "$5", "<b>", "the"),
    *,
    step: int = 10,
    drift: bool = True,
    heads: list[tuple[int, int]] | None = None,
    prompts: tuple[str, ...] = ("probe",),
) -> dict[str, Any]:
    """The row of an analysis."""
    base = maps_of(tokens, seed=0) if drift else None
    shown = tuple(PromptAttention(name, len(tokens), maps_of(tokens, seed=step), base) for name in prompts)
    statistics = statistics_of(drift=drift)
    chosen = strongest_heads(statistics) if heads is None else tuple(heads)
    row = TrackedAttention(statistics, shown, chosen, 3, Cost(forwards=4)).row()
    return row.at(step=step, trigger="step", seconds=2.0, peak_memory_bytes=2**20).to_dict()
