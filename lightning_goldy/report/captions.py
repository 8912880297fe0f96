"""The sentence under a figure: the settings and the numbers that it has to be read against."""

from __future__ import annotations

from lightning_goldy.report.formatting import MISSING, format_number, format_percent
from lightning_goldy.report.grids import ChangeHistogram, change_histogram
from lightning_goldy.report.registry import Row


def golden_caption(row: Row) -> str:
    """Settings of the analysis, the density found, and the density expected by chance.

    Example:
        >>> result = {"top_k_percent": 5, "score": "taylor", "scope": "tensor", "quorum": 1.0, "n_samples": 2}
        >>> golden_caption({"metrics": {"density": 0.02, "chance_density": 0.0025}, "result": result})
        'top 5 % by taylor score per tensor, marked by 100 % of 2 samples: density 2 %, by chance 0.25 %'
    """
    metrics, result = row["metrics"], row["result"]
    scope = {"tensor": "per tensor", "global": "over all tensors"}.get(result.get("scope"), MISSING)
    return (
        f"top {format_number(result.get('top_k_percent'))} % by {result.get('score', MISSING)} score {scope}, "
        f"marked by {format_percent(result.get('quorum'))} of {format_number(result.get('n_samples'))} samples: "
        f"density {format_percent(metrics.get('density'))}, by chance {format_percent(metrics.get('chance_density'))}"
    )


def change_caption(row: Row) -> str:
    """How far the whole model has moved.

    Example:
        >>> change_caption({"metrics": {"relative_change": 0.01, "delta_norm": 2.5}})
        'the whole model moved by 1 % of its base norm (||Delta|| = 2.5)'
    """
    metrics = row["metrics"]
    relative, norm = format_percent(metrics.get("relative_change")), format_number(metrics.get("delta_norm"))
    return f"the whole model moved by {relative} of its base norm (||Delta|| = {norm})"


def histogram_caption(row: Row) -> str:
    """How many elements moved, and how many did not.

    Example:
        >>> histogram_caption({"result": {"histogram": {"edges": [-3, -2, -1], "counts": [4, 1], "zero": 15}}})
        '5 elements changed, 15 did not at all (75 %)'
    """
    histogram: ChangeHistogram = change_histogram(row)
    changed = histogram.total - histogram.zero
    share = format_percent(histogram.zero / histogram.total if histogram.total else None)
    return f"{changed:,} elements changed, {histogram.zero:,} did not at all ({share})"
