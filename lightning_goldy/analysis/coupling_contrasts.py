"""Pairs of pieces that share something against pairs that do not."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

CONTRASTS = ("answer", "category", "group")


def rows_above(matrix: Tensor) -> Iterator[tuple[int, NDArray[Any]]]:
    """The number of each row and what stands above the diagonal in it."""
    array = matrix.numpy()
    for at in range(len(array) - 1):
        yield at, array[at, at + 1 :]


def contrasts(cosines: Tensor, columns: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Pairs that share an answer, a category or a group against pairs that do not.

    Args:
        cosines: Shape ``[N, N]``.
        columns: One value per piece, None for none, for each of ``CONTRASTS``.

    Returns:
        By column what :class:`~lightning_goldy.analysis.coupling_statistics.CouplingStatistics` says; columns that
        fewer than two pieces have are left out.
    """
    found = {}
    for name in CONTRASTS:
        codes = _codes(columns[name], fold=name == "answer")
        if (codes >= 0).sum() > 1:
            found[name] = _contrast(cosines, codes)
    return found


def _codes(values: Sequence[Any], *, fold: bool) -> NDArray[np.int64]:
    """A number per value, -1 for none; answers that differ in case or white space alone are the same."""
    known: dict[Any, int] = {}
    keys = [" ".join(value.split()).casefold() if fold and isinstance(value, str) else value for value in values]
    return np.array([-1 if key is None else known.setdefault(key, len(known)) for key in keys], dtype=np.int64)


def _contrast(cosines: Tensor, codes: NDArray[np.int64]) -> dict[str, Any]:
    sums = np.zeros((2, 3))  # of same and different: number, sum, sum of squares
    for at, row in rows_above(cosines):
        if codes[at] < 0:
            continue
        has, same = codes[at + 1 :] >= 0, codes[at + 1 :] == codes[at]
        for which, mask in enumerate((same, has & ~same)):
            chosen = row[mask].astype(np.float64)
            sums[which] += len(chosen), chosen.sum(), (chosen * chosen).sum()
    (n_same, *_), (n_different, *_) = sums
    means = [float(total / count) if count else None for count, total, _ in sums]
    difference = means[0] - means[1] if means[0] is not None and means[1] is not None else None
    scatter = sum(square - total * total / count for count, total, square in sums if count)
    freedom = n_same + n_different - 2
    pooled = math.sqrt(max(0.0, scatter) / freedom) if freedom > 0 else 0.0
    return {
        "same": means[0],
        "different": means[1],
        "n_same": int(n_same),
        "n_different": int(n_different),
        "difference": difference,
        "effect_size": difference / pooled if difference is not None and pooled > 0 else None,
    }


def hop_coupling(cosines: Tensor, groups: Sequence[Any], hops: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """Mean cosine between the hops of one question, by their numbers.

    Args:
        cosines: Shape ``[N, N]``.
        groups: The question of each piece.
        hops: The number of each piece among the hops of its question.
    """
    members: dict[Any, list[int]] = {}
    for at, (group, hop) in enumerate(zip(groups, hops, strict=True)):
        if group is not None and hop is not None:
            members.setdefault(group, []).append(at)
    found: dict[tuple[int, int], list[float]] = {}
    for inside in members.values():
        for place, first in enumerate(inside):
            for second in inside[place + 1 :]:
                key = tuple(sorted((hops[first], hops[second])))
                found.setdefault(key, []).append(float(cosines[first, second]))
    return tuple(
        {"hops": key, "mean": math.fsum(values) / len(values), "n_pairs": len(values)}
        for key, values in sorted(found.items())
    )
