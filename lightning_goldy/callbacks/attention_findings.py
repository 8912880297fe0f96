"""Attention statistics and maps as metrics, and as a row that can be redrawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightning_goldy.analysis.attention import STATISTICS, AttentionMaps, AttentionStatistics
from lightning_goldy.analysis.result import Cost, Row
from lightning_goldy.callbacks.attention_prompts import Prompt

# Statistics that tell heads of a kind apart; the strongest head of each is shown unless others are chosen.
KINDS = ("previous_token", "induction", "duplicate_token", "first_token")


@dataclass(frozen=True)
class Shown:
    """One prompt's patterns, and the base's."""

    prompt: Prompt
    maps: AttentionMaps
    base: AttentionMaps | None


@dataclass(frozen=True)
class Attention:
    """What one analysis found.

    Args:
        statistics: Of all heads, over the probe.
        shown: Patterns of the prompts.
        passes: Forward passes.
    """

    statistics: AttentionStatistics
    shown: tuple[Shown, ...]
    passes: int


def attention_findings(found: Attention, *, heads: Sequence[tuple[int, int]] | None, singular_values: int) -> Row:
    """What to log and to save of an analysis.

    Args:
        found: The analysis.
        heads: The (layer, head) pairs whose patterns are kept; None for the strongest head of each kind.
        singular_values: How many of each head's pattern are kept.

    Returns:
        Means over heads, the strongest head's values, drift and entropy by layer; and the row.
    """
    statistics = found.statistics
    chosen = strongest_heads(statistics) if heads is None else list(heads)
    data: dict[str, Any] = {
        "n_samples": statistics.n_samples,
        "queries": {name: int(count) for name, count in zip(STATISTICS, statistics.queries[0], strict=True)},
        "statistics": {name: statistics.statistic(name).tolist() for name in statistics.names},
        "heads": [list(pair) for pair in chosen],
        "prompts": [_prompt(shown, chosen, singular_values) for shown in found.shown],
    }
    data["spectra"] = [_spectrum(prompt) for prompt in data["prompts"]]
    cost = Cost(forwards=found.passes)
    return Row("attention_tracker", _metrics(statistics, found.shown), data, cost=cost)


def strongest_heads(statistics: AttentionStatistics) -> list[tuple[int, int]]:
    """The (layer, head) pair that is strongest of each kind, without repetition.

    Args:
        statistics: Of all heads.
    """
    strongest = [statistics.strongest(name) for name in KINDS]
    return list(dict.fromkeys(pair for pair in strongest if pair is not None))


def _metrics(statistics: AttentionStatistics, shown: Sequence[Shown]) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {name: statistics.mean(name) for name in statistics.names}
    peaks = ("previous_token", "induction", "duplicate_token", *(["drift"] if statistics.drift is not None else []))
    for name in peaks:
        pair = statistics.strongest(name)
        metrics[f"{name}_max"] = None if pair is None else float(statistics.statistic(name)[pair])
    for name in ("entropy", "drift"):
        if name in statistics.names:
            for layer, row in enumerate(statistics.statistic(name)):
                metrics[f"{name}/layer_{layer}"] = float(row.nanmean())
    for each in shown:
        values = each.maps.singular_values(1)
        metrics[f"largest_singular_value/{each.prompt.name}"] = float(values.nanmean())
    return metrics


def _prompt(shown: Shown, chosen: Sequence[tuple[int, int]], singular_values: int) -> dict[str, Any]:
    maps = []
    for layer, head in chosen:
        base = None if shown.base is None else _rounded(shown.base.pattern(layer, head), 4)
        weights = _rounded(shown.maps.pattern(layer, head), 4)
        maps.append({"layer": layer, "head": head, "weights": weights, "base": base})
    return {
        "name": shown.prompt.name,
        "n_tokens": shown.prompt.n_tokens,
        "tokens": list(shown.maps.token_names()),
        "singular_values": _rounded(shown.maps.singular_values(singular_values), 6),
        "maps": maps,
    }


def _spectrum(prompt: Mapping[str, Any]) -> dict[str, Any]:
    """Each singular value, a mean over the heads."""
    values = np.asarray(prompt["singular_values"], dtype=np.float64)  # [layers, heads, top]
    known = np.isfinite(values)
    counts = known.sum(axis=(0, 1))
    sums = np.where(known, values, 0.0).sum(axis=(0, 1))
    means = [total / count if count else None for total, count in zip(sums.tolist(), counts.tolist(), strict=True)]
    return {"prompt": prompt["name"], "values": means}


def _rounded(values: Tensor, digits: int) -> Any:
    # Enough for a figure, in a third of the characters.
    return values.double().round(decimals=digits).tolist()
