"""A coupling matrix small enough to draw: block means in the order of its clusters, and its distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.analysis.coupling import CouplingResult
from lightning_goldy.analysis.coupling_statistics import CouplingStatistics
from lightning_goldy.analysis.result import AnalysisResult

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
        >>> from lightning_goldy.analysis.coupling import knowledge_coupling
        >>> from lightning_goldy.analysis.coupling_statistics import coupling_statistics
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
