"""How a coupling has moved from another, and what of it fits into a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_goldy.analysis.agreement import agreement_of
from lightning_goldy.analysis.coupling.result import CouplingResult
from lightning_goldy.analysis.coupling.statistics import CouplingStatistics
from lightning_goldy.analysis.result import AnalysisResult


@dataclass(frozen=True)
class CouplingDrift(AnalysisResult):
    r"""The drift of the cosines, over all pairs of two different pieces that failed in neither matrix.

    Args:
        n_pieces: Pieces that failed in neither.
        n_pairs: Their pairs.
        mean_absolute_difference: Mean of :math:`|C_{ij} - C^0_{ij}|`; None without a pair.
        mean_difference: Mean of :math:`C_{ij} - C^0_{ij}`; None likewise.
        correlation: Pearson correlation of the two upper triangles; None where a triangle is constant.
        by_class: Mean absolute difference by the classes of the two pieces, ``a`` for pairs inside a class and
            ``a_b`` for pairs between two; those that occur.
        piece_drift: Shape ``[N]``, float64: mean absolute difference of each piece with the others; NaN where it
            failed.
    """

    n_pieces: int
    n_pairs: int
    mean_absolute_difference: float | None
    mean_difference: float | None
    correlation: float | None
    by_class: dict[str, float]
    piece_drift: Tensor


def coupling_drift(base: CouplingResult, now: CouplingResult, classes: Sequence[str] | None = None) -> CouplingDrift:
    r"""Compares the cosines of two coupling results of the same pieces.

    .. math:: \frac{2}{N (N - 1)} \sum_{i < j} |C_{ij} - C^0_{ij}|

    Args:
        base: The matrix at the base, C^0.
        now: The present one, C.
        classes: A class per piece, for means by class.

    Raises:
        ValueError: The results are of other pieces, or the number of classes is another.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.analysis.coupling.coupling import knowledge_coupling
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 7]])}
        >>> found = knowledge_coupling(GPT2LMHeadModel(config), [batch])
        >>> drift = coupling_drift(found, found)
        >>> drift.n_pairs, drift.mean_absolute_difference, round(drift.correlation, 6)
        (3, 0.0, 1.0)
    """
    if base.ids != now.ids:
        place = next((i for i, (a, b) in enumerate(zip(base.ids, now.ids, strict=False)) if a != b), None)
        what = f"{len(base)} and {len(now)} pieces" if place is None else f"{base.ids[place]!r} and {now.ids[place]!r}"
        raise ValueError(f"the two couplings are of other pieces: {what}")
    if classes is not None and len(classes) != len(base):
        raise ValueError(f"there are {len(classes)} classes for {len(base)} pieces")
    valid = base.valid & now.valid
    kept = valid.nonzero().flatten()
    first, second = (result.cosines[kept][:, kept].double() for result in (base, now))
    difference = second - first  # [n, n]
    rows, columns = torch.triu_indices(len(kept), len(kept), offset=1)
    pairs = difference[rows, columns]
    some = len(pairs) > 0
    correlation = agreement_of(first[rows, columns].numpy(), second[rows, columns].numpy()).pearson
    piece_drift = torch.full((len(base),), math.nan, dtype=torch.float64)
    if len(kept) > 1:
        piece_drift[kept] = difference.abs().sum(dim=1) / (len(kept) - 1)  # the diagonal adds nothing
    return CouplingDrift(
        n_pieces=len(kept),
        n_pairs=len(pairs),
        mean_absolute_difference=float(pairs.abs().mean()) if some else None,
        mean_difference=float(pairs.mean()) if some else None,
        correlation=correlation if math.isfinite(correlation) else None,
        by_class={} if classes is None else _by_class(difference, [classes[place] for place in kept.tolist()]),
        piece_drift=piece_drift,
    )


def _by_class(difference: Tensor, classes: Sequence[str]) -> dict[str, float]:
    names, found = np.array(classes, dtype=object), {}
    size = np.triu(difference.abs().numpy(), 1)
    for one, other in combinations_with_replacement(dict.fromkeys(classes), 2):
        chosen = np.logical_or(np.outer(names == one, names == other), np.outer(names == other, names == one))
        count = np.triu(chosen, 1).sum()
        if count:
            found[one if one == other else f"{one}_{other}"] = float(size[chosen].sum() / count)
    return found


OTHERS = "others"
"""What categories are called that are too rare for a colour of their own."""
_BINS = 200
_MOST_COLOURS = 9
_DECIMALS = 4


@dataclass(frozen=True)
class CouplingPicture(AnalysisResult):
    """What the figures of a coupling show, for any number of pieces.

    Args:
        cells: B rows of B mean cosines over blocks of neighbours in the clusters' order, rounded; a piece with itself
            does not count where a block holds several.
        sizes: Pieces in each of the B blocks.
        categories: The most frequent category in each block, ``others`` for rare ones, None where pieces have none.
        n_pieces: Pieces in all; as many as blocks where nothing is averaged.
        counts: Pairs in 200 equal bins from -1 to 1.
    """

    cells: tuple[tuple[float, ...], ...]
    sizes: tuple[int, ...]
    categories: tuple[str | None, ...]
    n_pieces: int
    counts: tuple[int, ...]

    def details(self) -> dict[str, Any]:
        """The parts of a row of ``results.jsonl`` that the figures of ``knowledge_coupling`` draw."""
        return {
            "heat_map": {
                "cells": [list(line) for line in self.cells],
                "sizes": list(self.sizes),
                "categories": list(self.categories),
                "n_pieces": self.n_pieces,
            },
            "distribution": {
                "edges": np.linspace(-1, 1, _BINS + 1).round(10).tolist(),
                "counts": list(self.counts),
            },
        }


def coupling_picture(result: CouplingResult, statistics: CouplingStatistics, *, most: int = 200) -> CouplingPicture:
    r"""Averages a coupling matrix over blocks of neighbours.

    .. math:: P_{IJ} = \frac{1}{n_{IJ}} \sum_{i \in I, \, j \in J, \, i \ne j} C_{ij}

    with the pieces cut into blocks I in the order of ``statistics.order``, so that alike pieces share a block. A block
    of one piece has 1 with itself.

    Args:
        result: From ``knowledge_coupling`` or ``activation_similarity``.
        statistics: Of that result.
        most: Blocks at most; with fewer pieces each is a block of its own.

    Raises:
        ValueError: ``most`` is below 1.

    Example:
        >>> from lightning_goldy.analysis.coupling.coupling import knowledge_coupling
        >>> from lightning_goldy.analysis.coupling.statistics import coupling_statistics
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> import torch
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3]])
        >>> found = knowledge_coupling(GPT2LMHeadModel(config), [{"input_ids": ids}])
        >>> picture = coupling_picture(found, coupling_statistics(found), most=2)
        >>> picture.sizes, sum(picture.counts)
        ((2, 1), 3)
    """
    if most < 1:
        raise ValueError(f"most is a number of blocks, at least 1; got {most}")
    order = np.array(statistics.order, dtype=np.int64)
    cosines = result.cosines.numpy()
    # Sizes differ by one at most.
    blocks = [part for part in np.array_split(order, min(most, len(order)) or 1) if len(part)]
    sizes = np.array([len(part) for part in blocks], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    cells = np.zeros((len(blocks), len(blocks)))
    counts = np.zeros(_BINS, dtype=np.int64)
    done = 0
    for at, block in enumerate(blocks):
        rows = cosines[np.ix_(block, order)].astype(np.float64)  # [pieces of the block, N]
        cells[at] = np.add.reduceat(rows.sum(axis=0), starts)
        # Each pair once: the part of a row to the right of the diagonal.
        for place, row in enumerate(rows, start=done):
            counts += np.histogram(row[place + 1 :], bins=_BINS, range=(-1, 1))[0]
        done += len(block)
    return CouplingPicture(
        cells=tuple(tuple(line) for line in _means(cells, sizes).round(_DECIMALS).tolist()),
        sizes=tuple(sizes.tolist()),
        categories=_strip(blocks, result.column("category")),
        n_pieces=len(order),
        counts=tuple(counts.tolist()),
    )


def _means(sums: NDArray[Any], sizes: NDArray[np.int64]) -> NDArray[Any]:
    numbers = np.outer(sizes, sizes).astype(np.float64)
    several = sizes > 1
    places = np.flatnonzero(several)
    # Its own cosine is 1 exactly.
    sums[places, places] -= sizes[several]
    numbers[places, places] -= sizes[several]
    return sums / numbers


def _strip(blocks: Sequence[NDArray[np.int64]], categories: Sequence[str | None]) -> tuple[str | None, ...]:
    found = []
    for block in blocks:
        counted = Counter(name for index in block.tolist() if (name := categories[index]) is not None)
        # Of equally frequent ones the first in the alphabet.
        found.append(min(counted, key=lambda name: (-counted[name], name)) if counted else None)
    shown = Counter(name for name in categories if name is not None)
    frequent = sorted(shown, key=lambda name: (-shown[name], name))[:_MOST_COLOURS]
    return tuple(name if name is None or name in frequent else OTHERS for name in found)
