"""Attention statistics and maps as metrics, as a row that can be redrawn, and as lines over the run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from lightning_goldy.analysis.attention import STATISTICS, AttentionMaps, AttentionStatistics
from lightning_goldy.callbacks.attention_prompts import Prompt
from lightning_goldy.callbacks.base import Findings

# Statistics that tell heads of a kind apart; the strongest head of each is shown unless others are chosen.
KINDS = ("previous_token", "induction", "duplicate_token", "first_token")
# Points of a line; a row holds the line so far, so without a limit a file would grow with the square of the run.
_MOST_POINTS = 200


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


def attention_findings(
    found: Attention,
    *,
    step: int,
    heads: Sequence[tuple[int, int]] | None,
    singular_values: int,
    earlier: Sequence[Mapping[str, Any]],
) -> Findings:
    """What to log and to save of an analysis.

    Args:
        found: The analysis.
        step: Optimizer steps so far.
        heads: The (layer, head) pairs whose patterns are kept; None keeps those of the first row, or without one the
            strongest head of each kind.
        singular_values: How many of each head's pattern are kept.
        earlier: The rows of earlier analyses.

    Returns:
        Means over heads, the strongest head's values, drift and entropy by layer; and the row.
    """
    statistics = found.statistics
    chosen = list(heads) if heads is not None else _heads(statistics, earlier)
    data: dict[str, Any] = {
        "n_samples": statistics.n_samples,
        "queries": {name: int(count) for name, count in zip(STATISTICS, statistics.queries[0], strict=True)},
        "statistics": {name: statistics.statistic(name).tolist() for name in statistics.names},
        "heads": [list(pair) for pair in chosen],
        "prompts": [_prompt(shown, chosen, singular_values) for shown in found.shown],
    }
    data["spectra"] = _spectra([*earlier, {"step": step, "result": data}])
    return Findings(_metrics(statistics, found.shown), data, evaluations=found.passes)


def _heads(statistics: AttentionStatistics, earlier: Sequence[Mapping[str, Any]]) -> list[tuple[int, int]]:
    if earlier:
        # The same heads over the whole run, so that the figures compare.
        return [(layer, head) for layer, head in earlier[0]["result"]["heads"]]
    strongest = [statistics.strongest(name) for name in KINDS]
    return list(dict.fromkeys(pair for pair in strongest if pair is not None))


def _metrics(statistics: AttentionStatistics, shown: Sequence[Shown]) -> dict[str, float | None]:
    metrics: dict[str, float | None] = {name: _finite(statistics.mean(name)) for name in statistics.names}
    peaks = ("previous_token", "induction", "duplicate_token", *(["drift"] if statistics.drift is not None else []))
    for name in peaks:
        pair = statistics.strongest(name)
        metrics[f"{name}_max"] = None if pair is None else float(statistics.statistic(name)[pair])
    for name in ("entropy", "drift"):
        if name in statistics.names:
            for layer, row in enumerate(statistics.statistic(name)):
                metrics[f"{name}/layer_{layer}"] = _finite(float(row.nanmean()))
    for each in shown:
        values = each.maps.singular_values(1)
        metrics[f"largest_singular_value/{each.prompt.name}"] = _finite(float(values.nanmean()))
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


def _spectra(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each singular value over the run, a mean over the heads; one group of lines per prompt."""
    points: dict[str, list[tuple[int, list[float | None]]]] = {}
    for row in rows:
        for prompt in row["result"]["prompts"]:
            values = np.asarray(prompt["singular_values"], dtype=np.float64)  # [layers, heads, top]
            known = np.isfinite(values)
            counts = known.sum(axis=(0, 1))
            sums = np.where(known, values, 0.0).sum(axis=(0, 1))
            means = [
                total / count if count else None for total, count in zip(sums.tolist(), counts.tolist(), strict=True)
            ]
            points.setdefault(prompt["name"], []).append((row["step"], means))
    lines = []
    for name, found in points.items():
        kept = _thinned(found)
        lines.append({"prompt": name, "steps": [step for step, _ in kept], "values": [values for _, values in kept]})
    return lines


def _thinned(points: Sequence[Any]) -> list[Any]:
    count = len(points)
    kept = sorted({round(place) for place in np.linspace(0, count - 1, min(count, _MOST_POINTS))})
    return [points[index] for index in kept]


def _rounded(values: Tensor, digits: int) -> Any:
    # Enough for a figure, in a third of the characters.
    return values.double().round(decimals=digits).tolist()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
