"""The part of ``coupling.json`` about pieces of different questions: what they share, and what edits do across them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.analysis.agreement import EVERYTHING, Agreement, agreement_of
from lightning_goldy.analysis.coupling import CouplingResult
from lightning_goldy.analysis.ripple_result import EDITED, Predictor, RippleResult
from lightning_goldy.coupling.analysis import Findings
from lightning_goldy.coupling.pairs import codes_of

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
