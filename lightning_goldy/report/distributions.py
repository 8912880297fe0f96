"""What the figures of parameter distributions draw, taken from rows and checked."""

from __future__ import annotations

from lightning_goldy.report.formatting import format_number
from lightning_goldy.report.registry import ReportError, Row

PANELS = {
    "stable_rank": "stable rank",
    "alignment_over_chance": "alignment over chance",
    "histogram_drift": "histogram drift, nats",
}
"""Columns that are drawn, with their labels."""


def by_block(row: Row, column: str) -> dict[str, float]:
    """Mean of a column over each block's tensors, weighted by their elements, in the model's order.

    Raises:
        ReportError: The row lacks what is needed.
    """
    sums: dict[str, tuple[float, int]] = {}
    try:
        for tensor in row["result"]["tensors"]:
            total, weight = sums.setdefault(tensor["block"], (0.0, 0))
            value = tensor.get(column)
            if value is not None:
                sums[tensor["block"]] = (total + value * tensor["numel"], weight + tensor["numel"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ReportError(f"a row of parameter_distribution lacks what its figure needs: {error}") from error
    return {block: total / weight if weight else 0.0 for block, (total, weight) in sums.items()}


def distribution_caption(row: Row) -> str:
    """What a reader should see."""
    ranks = {block: value for block, value in by_block(row, "stable_rank").items() if value}
    if not ranks:
        return "Nothing has changed since the snapshot."
    lowest = min(ranks, key=ranks.__getitem__)
    return (
        f"The change of {lowest} has the fewest directions, a stable rank of {format_number(ranks[lowest])}. An "
        "alignment over chance far above 1 amplifies directions that the base had; near 1 the change has its own."
    )
