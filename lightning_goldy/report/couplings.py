"""What the figures of knowledge coupling draw, taken from rows and checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.formatting import format_number, format_percent
from lightning_goldy.report.registry import ReportError, Row

_LACKS = "a row of knowledge_coupling lacks what its figure needs"
# Below this the colours would show rounding.
_LEAST_LIMIT = 0.05


@dataclass(frozen=True)
class CouplingMap:
    """The heat map.

    Args:
        cells: Mean cosines, ``[B, B]``.
        names: Categories that occur in the strip.
        strip: For each block the place of its category in ``names``, -1 for none, ``[B]``.
        limit: The cosine at which colours end, either way.
        n_pieces: Pieces in all.
    """

    cells: NDArray[np.float64]
    names: tuple[str, ...]
    strip: NDArray[np.int64]
    limit: float
    n_pieces: int

    @property
    def averaged(self) -> bool:
        """Whether cells are means over several pairs."""
        return self.n_pieces > len(self.cells)


@dataclass(frozen=True)
class CouplingHistogram:
    """The distribution of cosines.

    Args:
        edges: Of the bins that are drawn, ``[bins + 1]``.
        counts: Pairs in each.
        moderate: Cosine from which a pair is moderately coupled.
        high: Cosine from which it is highly coupled.
    """

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]
    moderate: float
    high: float


def coupling_map(row: Row) -> CouplingMap:
    """The heat map of a row.

    Args:
        row: Of the analysis ``knowledge_coupling``.

    Raises:
        ReportError: The row lacks it.

    Example:
        >>> drawn = {"cells": [[1, 0.5], [0.5, 1]], "sizes": [1, 1], "categories": ["b", None], "n_pieces": 2}
        >>> found = coupling_map({"result": {"heat_map": drawn}})
        >>> found.limit, found.strip.tolist(), found.averaged
        (0.5, [0, -1], False)
    """
    try:
        given = row["result"]["heat_map"]
        cells = np.array(given["cells"], dtype=np.float64)
        sizes, categories, n_pieces = given["sizes"], given["categories"], int(given["n_pieces"])
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{_LACKS}: {error}") from error
    if not len(cells) or cells.shape != (len(sizes), len(sizes)) or len(categories) != len(sizes):
        raise ReportError(f"{_LACKS}: {cells.shape} cells for {len(sizes)} sizes and {len(categories)} categories")
    names = tuple(sorted({name for name in categories if name is not None}))
    strip = np.array([-1 if name is None else names.index(name) for name in categories], dtype=np.int64)
    # A piece has 1 with itself, which would leave the other cells pale.
    apart = np.abs(cells[~np.eye(len(cells), dtype=bool)])
    limit = float(max(_LEAST_LIMIT, np.nanquantile(apart, 0.99))) if apart.size else 1.0
    return CouplingMap(cells, names, strip, limit, n_pieces)


def coupling_histogram(row: Row) -> CouplingHistogram:
    """The distribution of a row: the bins from the first to the last that is not empty.

    Args:
        row: Of the analysis ``knowledge_coupling``.

    Raises:
        ReportError: The row lacks it.

    Example:
        >>> drawn = {"edges": [-1, 0, 0.5, 1], "counts": [0, 4, 0]}
        >>> result = {"distribution": drawn, "thresholds": {"high": 0.4, "moderate": 0.1}}
        >>> coupling_histogram({"result": result}).edges.tolist()
        [0.0, 0.5]
    """
    try:
        given, thresholds = row["result"]["distribution"], row["result"]["thresholds"]
        edges = np.array(given["edges"], dtype=np.float64)
        counts = np.array(given["counts"], dtype=np.int64)
        moderate, high = float(thresholds["moderate"]), float(thresholds["high"])
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(f"{_LACKS}: {error}") from error
    if edges.shape != (len(counts) + 1,):
        raise ReportError(f"{_LACKS}: {len(edges)} edges for {len(counts)} counts; one more is needed")
    full = np.flatnonzero(counts)
    if len(full):
        edges, counts = edges[full[0] : full[-1] + 2], counts[full[0] : full[-1] + 1]
    return CouplingHistogram(edges, counts, moderate=moderate, high=high)


def map_caption(row: Row) -> str:
    """How the pieces are ordered, and what a cell is.

    Example:
        >>> drawn = {"cells": [[1.0]], "sizes": [2], "categories": [None], "n_pieces": 2}
        >>> map_caption({"result": {"heat_map": drawn, "n_clusters": 1}}).split(". ")[1]
        'Each cell is a mean over blocks of up to 2 pieces, without pairs of a piece with itself'
    """
    found = coupling_map(row)
    result = row["result"]
    clusters = result.get("n_clusters")
    told = f", {format_number(clusters)} cluster{'' if clusters == 1 else 's'}" if clusters is not None else ""
    cell = "Each cell is one pair"
    if found.averaged:
        largest = max(result["heat_map"]["sizes"])
        cell = f"Each cell is a mean over blocks of up to {largest} pieces, without pairs of a piece with itself"
    return (
        f"{found.n_pieces:,} pieces in the order of average linkage{told}. {cell}. "
        f"Colours end at {found.limit:.2g}, the 99th percentile of the cells beside the diagonal"
    )


def histogram_caption(row: Row) -> str:
    """Mean, spread and the shares beyond the thresholds.

    Example:
        >>> metrics = {"mean": 0.1, "std": 0.2, "high_share": 0.05, "moderate_share": 0.25, "negative_share": 0.5}
        >>> histogram_caption({"metrics": metrics, "result": {"n_pairs": 10}})
        '10 pairs: mean 0.1, standard deviation 0.2; 5 % high, 25 % moderate, 50 % below 0'
    """
    metrics, result = row.get("metrics", {}), row.get("result", {})
    shares = [
        f"{format_percent(metrics.get(f'{name}_share'))} {label}"
        for name, label in (("high", "high"), ("moderate", "moderate"), ("negative", "below 0"))
    ]
    mean, std = (format_number(metrics.get(name)) for name in ("mean", "std"))
    return f"{format_number(result.get('n_pairs'))} pairs: mean {mean}, standard deviation {std}; {', '.join(shares)}"


def quantity(row: Row) -> str:
    """What the cosine is of.

    Example:
        >>> quantity({"result": {"measure": "activation"}})
        'cosine of activations'
    """
    measure: Any = row.get("result", {}).get("measure", "gradient")
    return "cosine of activations" if measure == "activation" else "cosine of gradients"


def titled(title: str, row: Row) -> str:
    """A title with the step, where there was a training.

    Example:
        >>> titled("Coupling", {"step": 1200}), titled("Coupling", {"step": 0})
        ('Coupling, step 1,200', 'Coupling')
    """
    return f"{title}, step {row['step']:,}" if row.get("step") else title


STATISTICS = {
    "mean": "mean cosine over pairs of two different pieces",
    "std": "standard deviation of the cosines",
    "maximum": "largest cosine",
    "high_share": "share of the pairs from the upper threshold on",
    "moderate_share": "share of the pairs between the thresholds",
    "negative_share": "share of the pairs below 0",
    "effective_rank": "exponential of the entropy of the normalised spectrum; the directions that gradients point in",
    "participation_ratio": "(sum of eigenvalues)^2 / sum of their squares",
    "n_clusters": "clusters of average linkage at the upper threshold",
    "n_failed": "pieces that failed",
}
"""What the statistics of a matrix of cosines mean, by the name of their metric."""

_MEANS = "mean cosine of pairs with the same {0}, of other pairs, and their difference"
CONTRASTS = {"answer": _MEANS.format("answer"), "category": _MEANS.format("category")}
CONTRASTS["group"] = _MEANS.format("group (question)")
"""Likewise of what pairs have in common."""

describe(
    "knowledge_coupling",
    Description(
        title="Knowledge coupling",
        measures=(
            "Which answers learn together: the cosine between the gradients of two answers' log-probabilities. A small "
            "step that makes one answer likelier moves the other in proportion to it."
        ),
        reading=(
            "A positive cosine says that learning one answer raises the other, a negative one that it lowers it, for a "
            "small step along the gradient. Look first at how much comes from equal answers: pairs that share their "
            "answer's tokens are coupled whatever they are about. The cosine does not say that a fact is safe where it "
            "is small, nor what a large edit does."
        ),
        metrics={
            **STATISTICS,
            **CONTRASTS,
        },
    ),
)
