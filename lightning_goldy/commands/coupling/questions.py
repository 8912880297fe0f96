"""Questions that the report answers from pairs of pieces."""

from __future__ import annotations

import csv
import io
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.analysis.agreement import EVERYTHING, Agreement, agreement_of
from lightning_goldy.analysis.coupling import CouplingResult
from lightning_goldy.analysis.ripple import EDITED, Predictor, RippleResult
from lightning_goldy.commands.coupling.run import Findings
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
    found = []
    for first, second, cosine in zip(pairs.first[:count], pairs.second[:count], pairs.cosine[:count], strict=True):
        one, other = result.pieces[int(first)], result.pieces[int(second)]
        found.append({"cosine": float(cosine), "first": dict(one), "second": dict(other), "same": shared(one, other)})
    return found


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
    return " ".join(value.split()).casefold() if name == "answer" and isinstance(value, str) else value


def _sorted(parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """The most coupled first; ties to the smaller numbers."""
    joined = np.concatenate(parts)
    return joined[np.lexsort((joined[:, 2], joined[:, 1], -joined[:, 0]))]


_CATEGORIES = 12
_GROUPS = 10
_CHANGES = 5


def cross_question_analysis(found: Findings) -> dict[str, Any]:
    """How pieces that share something differ from those that do not, between questions, and ripples of edits.

    Args:
        found: What was measured.
    """
    contrasts = [{"same_what": name, **contrast} for name, contrast in found.statistics.contrasts.items()]
    return {
        "contrasts": contrasts,
        "hops": [dict(each) for each in found.statistics.hops],
        "categories": category_means(found.result),
        "groups": linked_groups(found.result),
        "ripple": None if found.ripple is None else _ripple(found, found.ripple),
    }


def category_means(result: CouplingResult) -> dict[str, Any] | None:
    """Mean cosine within and between the most frequent categories; None where pieces have none.

    Args:
        result: Pieces that failed take no part.
    """
    names, blocks = _blocks(result, "category")
    if not names:
        return None
    chosen = sorted(range(len(names)), key=lambda place: (-len(blocks[place]), names[place]))[:_CATEGORIES]
    cosines = result.cosines.numpy()
    means: list[list[float | None]] = []
    for first in chosen:
        line: list[float | None] = []
        for second in chosen:
            block = cosines[np.ix_(blocks[first], blocks[second])].astype(np.float64)
            own = len(block) if first == second else 0
            line.append(float((block.sum() - own) / (block.size - own)) if block.size > own else None)
        means.append(line)
    return {"names": [names[place] for place in chosen], "mean_cosine": means, "n_categories": len(names)}


def linked_groups(result: CouplingResult) -> list[dict[str, Any]]:
    """The pairs of different groups (questions) with the largest mean cosine between their pieces.

    Args:
        result: Pieces that failed take no part.
    """
    names, blocks = _blocks(result, "group")
    if len(names) < 2:
        return []
    sizes = np.array([len(block) for block in blocks], dtype=np.float64)
    order = np.concatenate(blocks)
    starts = (np.cumsum(sizes) - sizes).astype(np.int64)
    cosines = result.cosines.numpy()
    best: list[tuple[float, int, int]] = []
    for first, block in enumerate(blocks):
        sums = np.add.reduceat(cosines[np.ix_(block, order)].astype(np.float64).sum(axis=0), starts)
        means = (sums / (sizes[first] * sizes))[first + 1 :]
        # The few largest of this row are enough.
        places = np.argsort(-means, kind="stable")[:_GROUPS]
        best += [(float(means[place]), first, first + 1 + int(place)) for place in places]
        best = sorted(best, key=lambda each: (-each[0], each[1], each[2]))[:_GROUPS]
    return [
        {
            "first": names[first],
            "second": names[second],
            "mean_cosine": mean,
            "n_pairs": int(sizes[first] * sizes[second]),
        }
        for mean, first, second in best
    ]


def size_of_change(found: Findings, ripple: RippleResult) -> list[dict[str, Any]]:
    """How the size of the measured changes goes with each thing that could have foretold it.

    Args:
        found: The coupling, and the similarity of activations if there is one.
        ripple: Of edits to some of its pieces.

    Returns:
        ``predictor``, ``n``, ``pearson``, ``spearman``, ``reason``: the sizes of both predictions; ``coupling_matrix``,
        the cosine of the *original* answer's gradient with the other piece's (GradSim); ``activation``.
    """
    chosen = ripple.pairs()
    sizes = ripple.measured.abs().numpy()[chosen]
    columns = {predictor: ripple.predicted(predictor).abs().numpy() for predictor in get_args(Predictor)}
    places = {name: place for place, name in enumerate(found.result.ids)}
    others = [places[name] for name in ripple.pieces]
    for name, result in (("coupling_matrix", found.result), ("activation", found.activation)):
        if result is not None:
            cosines = result.cosines.double().numpy()
            edited = [places[edit["pieces"][0]] for edit in ripple.edits]
            columns[name] = cosines[np.ix_(edited, others)]
    told = [agreement_of(values[chosen], sizes, name, EVERYTHING) for name, values in columns.items()]
    return [{name: _json(each)[name] for name in ("predictor", "n", "pearson", "spearman", "reason")} for each in told]


def _ripple(found: Findings, ripple: RippleResult) -> dict[str, Any]:
    pieces = {piece["id"]: piece for piece in found.result.pieces}
    measured = ripple.measured.numpy()
    edits = []
    for row, edit in enumerate(ripple.edits):
        piece = pieces[edit["pieces"][0]]
        others = [place for place, name in enumerate(ripple.classes[row]) if name != EDITED]
        changes = measured[row, others]
        largest = np.argsort(-np.abs(changes), kind="stable")[:_CHANGES]
        edits.append(
            {
                "id": piece["id"],
                "question": piece["question"],
                "answer": piece["answer"],
                "new_answer": edit["answers"][0],
                "learned": bool(ripple.new_exact[row]),
                "new_log_prob_before": float(ripple.new_before[row]),
                "new_log_prob_after": float(ripple.new_after[row]),
                "step_norm": float(ripple.delta_norm[row]),
                "mean_change": float(changes.mean()) if len(changes) else None,
                "largest_changes": [
                    _change(pieces[ripple.pieces[others[place]]], ripple, row, others[place]) for place in largest
                ],
            }
        )
    return {
        **ripple.settings,
        "n_edits": len(ripple.edits),
        "n_pieces": len(ripple.pieces),
        "agreement": [_json(each) for predictor in get_args(Predictor) for each in ripple.agreement(predictor)],
        "size_of_change": size_of_change(found, ripple),
        "edits": edits,
    }


def _change(piece: dict[str, Any], ripple: RippleResult, row: int, place: int) -> dict[str, Any]:
    return {
        "id": piece["id"],
        "question": piece["question"],
        "class": ripple.classes[row][place],
        "measured": float(ripple.measured[row, place]),
        "first_order": float(ripple.predicted_first_order[row, place]),
        "coupling": float(ripple.predicted_coupling[row, place]),
        "known_before": bool(ripple.exact_before[place]),
        "known_after": bool(ripple.exact_after[row, place]),
    }


def _blocks(result: CouplingResult, name: str) -> tuple[list[Any], list[NDArray[np.int64]]]:
    """The values of a column, and which pieces have each."""
    values: Sequence[Any] = result.column(name)
    codes = np.where(result.valid.numpy(), codes_of(values), -1)
    found = [(values[places[0]], places) for code in range(codes.max(initial=-1) + 1)
             if len(places := np.flatnonzero(codes == code))]  # fmt: skip
    return [value for value, _ in found], [places for _, places in found]


def _json(each: Agreement) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and not np.isfinite(value) else value
        for name, value in vars(each).items()
    }
