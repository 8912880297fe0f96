"""The most coupled pairs of pieces: found, told with what they share, written as a table."""

from __future__ import annotations

import csv
import io
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.analysis.coupling import CouplingResult
from lightning_goldy.commands.coupling.run import folded
from lightning_goldy.core.files import atomic_write

SHARED = ("answer", "category", "group")
_COLUMNS = ("id", "question", "answer", "category", "group", "hop")
# Pairs that are gathered before they are sorted.
_WAITING = 200_000
# A spreadsheet runs what begins so.
_FORMULAS = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True)
class StrongPairs:
    """Pairs of pieces, the most coupled first.

    Args:
        first: Numbers of pieces, ``[P]``.
        second: Likewise, larger than ``first``.
        cosine: ``[P]``.
        above: Pairs from the threshold on, listed or not.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    cosine: NDArray[np.float64]
    above: int

    def __len__(self) -> int:
        return len(self.first)


def strong_pairs(result: CouplingResult, threshold: float, *, least: int = 100, most: int = 100_000) -> StrongPairs:
    """All pairs from a threshold on, or the strongest where those are too few or too many.

    Args:
        result: Pieces that failed take no part.
        threshold: A cosine.
        least: List as many even when fewer reach the threshold.
        most: List no more.

    Raises:
        ValueError: The numbers are not in order.

    Example:
        >>> import torch
        >>> matrix = torch.tensor([[1.0, 0.5, 0.1], [0.5, 1.0, 0.9], [0.1, 0.9, 1.0]])
        >>> same = {"matrix": matrix, "norms": torch.ones(3), "log_probs": torch.zeros(3), "pieces": ({},) * 3}
        >>> rest = {"failed": (), "parameters": (), "measure": "gradient", "normalize": True, "center": False}
        >>> found = strong_pairs(CouplingResult(**same, **rest, projection=None, projection_error=None, seconds=0), 0.4,
        ...                      least=0, most=1)
        >>> found.first.tolist(), found.second.tolist(), found.above
        ([1], [2], 2)
    """
    if not 0 <= least <= most:
        raise ValueError(f"least and most are numbers of pairs in order; got least={least}, most={most}")
    cosines, good = result.cosines.numpy(), result.valid.numpy()
    kept, waiting, above = np.empty((0, 3)), [], 0  # columns: cosine, first, second
    border = -np.inf if least else threshold
    for at in np.flatnonzero(good):
        row = cosines[at, at + 1 :].astype(np.float64)
        row[~good[at + 1 :]] = np.nan
        above += int((row >= threshold).sum())
        places = np.flatnonzero(row >= border)
        waiting.append(np.column_stack([row[places], np.full(len(places), at), at + 1 + places]))
        if sum(map(len, waiting)) > _WAITING:
            kept, waiting = _sorted([kept, *waiting])[:most], []
            if len(kept) >= least > 0:
                # What is neither among the strongest `least` nor above the threshold is not listed.
                border = min(threshold, kept[least - 1, 0])
            if len(kept) == most > 0:
                border = max(border, kept[-1, 0])
    kept = _sorted([kept, *waiting])[:most]
    kept = kept[: max(least, int((kept[:, 0] >= threshold).sum()))]
    return StrongPairs(kept[:, 1].astype(np.int64), kept[:, 2].astype(np.int64), kept[:, 0], above)


def pair_texts(result: CouplingResult, pairs: StrongPairs, count: int) -> list[dict[str, Any]]:
    """The first pairs with the texts of their pieces and what they share.

    Args:
        result: The pieces.
        pairs: Of that result.
        count: How many.
    """
    columns = (column[:count].tolist() for column in (pairs.first, pairs.second, pairs.cosine))
    return [
        {"cosine": cosine, "first": dict(one), "second": dict(other), "same": shared(one, other)}
        for first, second, cosine in zip(*columns, strict=True)
        for one, other in ((result.pieces[first], result.pieces[second]),)
    ]


def pair_kinds(result: CouplingResult, pairs: StrongPairs, threshold: float) -> list[dict[str, Any]]:
    """How many of the listed pairs above the threshold share something, beside how many of all pairs do.

    Args:
        result: The pieces.
        pairs: Of that result.
        threshold: Listed pairs below it do not count.
    """
    chosen = pairs.cosine >= threshold
    found = []
    for name in SHARED:
        codes = codes_of(result.column(name), fold=name == "answer")
        known = codes[result.valid.numpy()]
        known = known[known >= 0]
        if not len(known):
            continue
        first, second = codes[pairs.first[chosen]], codes[pairs.second[chosen]]
        counts = np.bincount(known).astype(np.float64)
        everywhere, same = len(known) * (len(known) - 1) / 2, float((counts * (counts - 1)).sum() / 2)
        share = float(((first == second) & (first >= 0)).mean()) if chosen.any() else None
        by_chance = same / everywhere if everywhere else None
        found.append({"same": name, "share": share, "share_of_all_pairs": by_chance})
    return found


def write_pairs(result: CouplingResult, pairs: StrongPairs, path: str | Path) -> Path:
    """Writes pairs as CSV, one line each, as spreadsheets and RFC 4180 have it.

    A text that a spreadsheet would run as a formula gets an apostrophe before it.

    Args:
        result: The pieces.
        pairs: Of that result.
        path: Target.
    """
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer)
    head = [f"{side}_{name}" for side in ("first", "second") for name in _COLUMNS]
    writer.writerow(["cosine", *head, *(f"same_{name}" for name in SHARED)])
    for first, second, cosine in zip(pairs.first.tolist(), pairs.second.tolist(), pairs.cosine.tolist(), strict=True):
        one, other = result.pieces[first], result.pieces[second]
        cells = [guarded(piece[name]) for piece in (one, other) for name in _COLUMNS]
        same = shared(one, other)
        writer.writerow([f"{cosine:.6f}", *cells, *(int(name in same) for name in SHARED)])
    # CSV can hold half a surrogate pair, which UTF-8 cannot.
    return atomic_write(path, buffer.getvalue().encode("utf-8", "replace"))


def guarded(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula.

    Example:
        >>> guarded("=1+1"), guarded("Lima"), guarded(-1), guarded(None)
        ("'=1+1", 'Lima', -1, '')
    """
    if value is None:
        return ""
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULAS) else value


def shared(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What two pieces have in common, of answer, category and group.

    Example:
        >>> one = {"answer": "Lima ", "category": None, "group": "a"}
        >>> shared(one, {"answer": "lima", "category": None, "group": "b"})
        ['answer']
    """
    return [name for name in SHARED if one[name] is not None and _key(one[name], name) == _key(other[name], name)]


def codes_of(values: Sequence[Any], *, fold: bool = False) -> NDArray[np.int64]:
    """A number per value, -1 for none.

    Args:
        values: Texts or None.
        fold: Texts that differ in case or white space alone are the same.

    Example:
        >>> codes_of(["a", None, "A "], fold=True).tolist()
        [0, -1, 0]
    """
    numbers: dict[Hashable, int] = {}
    name = "answer" if fold else ""
    return np.array(
        [-1 if value is None else numbers.setdefault(_key(value, name), len(numbers)) for value in values],
        dtype=np.int64,
    )


def _key(value: Any, name: str) -> Hashable:
    return folded(value) if name == "answer" and isinstance(value, str) else value


def _sorted(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The most coupled first; ties to the smaller numbers."""
    joined = np.concatenate(parts)
    return joined[np.lexsort((joined[:, 2], joined[:, 1], -joined[:, 0]))]
