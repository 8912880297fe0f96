"""What the figures of a search for reverse golden parameters draw."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_goldy.report.formatting import MISSING, format_number
from lightning_goldy.report.registry import ReportError, Row


@dataclass(frozen=True)
class SearchHistory:
    """The course of one search.

    Args:
        iterations: 0, 1, ...
        greedy: Divergence of the greedy mask at each, nats.
        pool: Divergence of the pool's mask, nats; NaN where there was none.
        kept: Divergence of the mask that was kept, nats.
        accepted: Whether that was the pool's.
        sizes: Elements of the mask.
        pools: Elements of the pool.
        levels: Divergences on the evaluation samples, by label, nats.
    """

    iterations: tuple[int, ...]
    greedy: tuple[float, ...]
    pool: tuple[float, ...]
    kept: tuple[float, ...]
    accepted: tuple[bool, ...]
    sizes: tuple[int, ...]
    pools: tuple[int, ...]
    levels: Mapping[str, float]


def search_history(row: Row) -> SearchHistory:
    """The course of the search of a row.

    Args:
        row: Of the analysis ``reverse_golden_parameters``.

    Raises:
        ReportError: The row lacks what the figure needs.

    Example:
        >>> entry = {"iteration": 0, "size": 4, "pool": 5, "greedy_kl": 1.0, "pool_kl": None, "kl": 1.0}
        >>> result = {"history": [entry | {"accepted": False}], "kl_divergence": 0.9, "single_shots": {"taylor": 0.2}}
        >>> search_history({"result": result}).levels
        {'returned, evaluation samples': 0.9, 'single shot by taylor': 0.2}
    """
    result = row["result"]
    try:
        history = result["history"]
        levels = {"returned, evaluation samples": _number(result["kl_divergence"])}
        levels |= {f"single shot by {name}": _number(value) for name, value in result["single_shots"].items()}
        return SearchHistory(
            iterations=tuple(entry["iteration"] for entry in history),
            greedy=tuple(_number(entry["greedy_kl"]) for entry in history),
            pool=tuple(_number(entry["pool_kl"]) for entry in history),
            kept=tuple(_number(entry["kl"]) for entry in history),
            accepted=tuple(bool(entry["accepted"]) for entry in history),
            sizes=tuple(entry["size"] for entry in history),
            pools=tuple(entry["pool"] for entry in history),
            levels=levels,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"the row of a search lacks or spoils {error}") from error


def search_caption(row: Row) -> str:
    """Settings of the search, and what it found against the single shots.

    Example:
        >>> result = {"top_k_percent": 1, "scope": "tensor", "strategy": "none", "passes": 12, "history": []}
        >>> search_caption({"result": result | {"kl_divergence": 8.5, "single_shots": {"gradient": 1.4}}})
        '1 % per tensor, strategy none, 12 passes: 8.5 nats; single shots: gradient 1.4 nats; pools accepted: 0 of 0'
    """
    result = row["result"]
    scope = {"tensor": "per tensor", "global": "of all elements"}.get(result.get("scope"), MISSING)
    singles = ", ".join(f"{name} {format_number(value)}" for name, value in result.get("single_shots", {}).items())
    history = result.get("history", ())
    accepted = sum(bool(entry.get("accepted")) for entry in history)
    return (
        f"{format_number(result.get('top_k_percent'))} % {scope}, strategy {result.get('strategy', MISSING)}, "
        f"{format_number(result.get('passes'))} passes: {format_number(result.get('kl_divergence'))} nats; "
        f"single shots: {singles or MISSING} nats; pools accepted: {accepted} of {len(history)}"
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
