"""What the parts of ``coupling.json`` answer from what was measured; see docs/coupling_schema.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.analysis.agreement import EVERYTHING, Agreement, agreement_of, spaced_places
from lightning_goldy.analysis.coupling import CouplingResult
from lightning_goldy.analysis.ripple import EDITED, Predictor, RippleResult
from lightning_goldy.commands.coupling.pairs import StrongPairs, codes_of, pair_kinds, pair_texts
from lightning_goldy.commands.coupling.readiness import layer_error, saturated_share
from lightning_goldy.commands.coupling.run import Findings

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_ENDS = 10
_CLUSTERS = 10
_TOP = 20
_CATEGORIES = 12
_GROUPS = 10
_CHANGES = 5
# Pairs that two similarities are compared on; more would take longer than they tell.
_MOST_PAIRS = 1_000_000


def knowledge_pieces(found: Findings, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What was compared, piece by piece.

    Args:
        found: What was measured.
        settings: ``template`` and ``form``, as given to the tokenizer, and ``unknown_tokens``, a share.
    """
    result, scores = found.result, found.scores
    reasons = {each["index"]: each["reason"] for each in result.failed}
    listed = [
        {
            **piece,
            "gradient_norm": float(result.norms[index]),
            "log_prob": float(result.log_probs[index]),
            "known": bool(scores.exact[index]) if index not in reasons else None,
            "rank": int(scores.rank[index]) if index not in reasons else None,
            "failure": reasons.get(index),
        }
        for index, piece in enumerate(result.pieces)
    ]
    return {
        "source": found.source.source,
        "format": found.source.format,
        **settings,
        "records": found.source.records,
        "available": len(found.source.pieces),
        "compared": len(result),
        "left_out": [{"reason": reason, "count": count} for reason, count in found.source.skipped.items()],
        "incomplete": [{"reason": reason, "count": count} for reason, count in found.source.incomplete.items()],
        "failed": list(result.failed),
        "known_share": found.known_share,
        "distinct_answers": len(set(codes_of(result.column("answer"), fold=True).tolist())),
        "categories": _counted(result.column("category")),
        "n_groups": len({group for group in result.column("group") if group is not None}),
        "hops": _counted(result.column("hop")),
        "pieces": listed,
    }


def gradient_analysis(found: Findings) -> dict[str, Any]:
    """How large gradients are, where they lie, and how that goes with how sure the model is.

    Args:
        found: What was measured.
    """
    result = found.result
    good = result.valid.numpy()
    norms, log_probs = result.norms.numpy(), result.log_probs.numpy()
    order = np.flatnonzero(good)[np.argsort(norms[good], kind="stable")].tolist()
    relation = agreement_of(np.log10(norms[good]), log_probs[good], "log10 norm", "all")
    return {
        "parameters": list(result.parameters),
        "blocks": list(result.layers),
        "centered": result.center,
        "norms": _spread(norms[good]),
        "log_probs": _spread(log_probs[good]),
        "smallest": [_sized(found, index) for index in order[:_ENDS]],
        "largest": [_sized(found, index) for index in order[::-1][:_ENDS]],
        "log_prob_relation": _told(relation, "pearson", "spearman", "n", "reason"),
        "by_layer": _by_layer(found),
        "by_layer_pieces": len(found.layered),
        "backward_error": layer_error(found),
        "by_category": _by_category(result),
    }


def coupling_analysis(found: Findings) -> dict[str, Any]:
    """The distribution of the cosines, their clusters and their spectrum.

    Args:
        found: What was measured.
    """
    result, statistics = found.result, found.statistics
    plain = ("n_pieces", "n_failed", "n_pairs", "mean", "std", "minimum", "maximum", "high", "moderate", "low")
    more = ("negative", "n_clusters", "effective_rank", "participation_ratio")
    return {
        "measure": result.measure,
        "projection": result.projection,
        "projection_error": result.projection_error,
        **{name: getattr(statistics, name) for name in (*plain, *more)},
        "thresholds": dict(statistics.thresholds),
        "quantiles": [{"share": float(share), "cosine": value} for share, value in statistics.quantiles.items()],
        "histogram": {
            "edges": np.linspace(-1, 1, len(statistics.histogram) + 1).round(10).tolist(),
            "counts": list(statistics.histogram),
        },
        "saturated_share": saturated_share(found),
        "clusters": _clusters(found),
        "activation": _activation(found),
    }


def high_coupling_pairs(found: Findings, pairs: StrongPairs, file: str) -> dict[str, Any]:
    """The strongest pairs, and what they share.

    Args:
        found: What was measured.
        pairs: Of the coupling.
        file: The table that lists them.
    """
    threshold = found.statistics.thresholds["high"]
    return {
        "threshold": threshold,
        "above": pairs.above,
        "listed": len(pairs),
        "file": file,
        "kinds": pair_kinds(found.result, pairs, threshold),
        "top": pair_texts(found.result, pairs, _TOP),
        "bottom": [
            {"cosine": pair["cosine"], **{side: dict(found.result.pieces[pair[side]]) for side in ("first", "second")}}
            for pair in found.statistics.bottom
        ],
    }


def cross_question_analysis(found: Findings) -> dict[str, Any]:
    """How pieces that share something differ from those that do not, between questions, and ripples of edits.

    Args:
        found: What was measured.
    """
    contrasts = [{"same_what": name, **contrast} for name, contrast in found.statistics.contrasts.items()]
    return {
        "contrasts": contrasts,
        "hops": [dict(hop) for hop in found.statistics.hops],
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
    means = [
        [_mean(cosines[np.ix_(blocks[first], blocks[second])], own=first == second) for second in chosen]
        for first in chosen
    ]
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
        best = sorted(best, key=lambda link: (-link[0], *link[1:]))[:_GROUPS]
    return [
        {"first": names[one], "second": names[other], "mean_cosine": mean, "n_pairs": int(sizes[one] * sizes[other])}
        for mean, one, other in best
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
    return [_told(entry, "predictor", "n", "pearson", "spearman", "reason") for entry in told]


def _ripple(found: Findings, ripple: RippleResult) -> dict[str, Any]:
    pieces = {piece["id"]: piece for piece in found.result.pieces}
    return {
        **ripple.settings,
        "n_edits": len(ripple.edits),
        "n_pieces": len(ripple.pieces),
        "agreement": ripple.details()["agreement"],
        "size_of_change": size_of_change(found, ripple),
        "edits": [_edit(pieces, ripple, row) for row in range(len(ripple.edits))],
    }


def _edit(pieces: Mapping[str, Mapping[str, Any]], ripple: RippleResult, row: int) -> dict[str, Any]:
    edit = ripple.edits[row]
    piece = pieces[edit["pieces"][0]]
    others = np.array([place for place, name in enumerate(ripple.classes[row]) if name != EDITED], dtype=np.int64)
    changes = ripple.measured.numpy()[row, others]
    largest = others[np.argsort(-np.abs(changes), kind="stable")[:_CHANGES]].tolist()
    return {
        **{name: piece[name] for name in ("id", "question", "answer")},
        "new_answer": edit["answers"][0],
        "learned": bool(ripple.new_exact[row]),
        "new_log_prob_before": float(ripple.new_before[row]),
        "new_log_prob_after": float(ripple.new_after[row]),
        "step_norm": float(ripple.delta_norm[row]),
        "mean_change": float(changes.mean()) if len(changes) else None,
        "largest_changes": [
            {
                "id": ripple.pieces[place],
                "question": pieces[ripple.pieces[place]]["question"],
                "class": ripple.classes[row][place],
                "measured": float(ripple.measured[row, place]),
                "first_order": float(ripple.predicted_first_order[row, place]),
                "coupling": float(ripple.predicted_coupling[row, place]),
                "known_before": bool(ripple.exact_before[place]),
                "known_after": bool(ripple.exact_after[row, place]),
            }
            for place in largest
        ],
    }


def _blocks(result: CouplingResult, name: str) -> tuple[list[Any], list[NDArray[np.int64]]]:
    """The values of a column, and which pieces have each."""
    values: Sequence[Any] = result.column(name)
    codes = np.where(result.valid.numpy(), codes_of(values), -1)
    found = [(values[places[0]], places) for code in range(codes.max(initial=-1) + 1)
             if len(places := np.flatnonzero(codes == code))]  # fmt: skip
    return [value for value, _ in found], [places for _, places in found]


def _by_layer(found: Findings) -> list[dict[str, Any]]:
    squares = {name: norms.square().numpy() for name, norms in found.layers.items()}
    whole = sum(squares.values())
    return [
        {"block": name, "mean_norm": float(np.sqrt(square).mean()), "share_of_square": float((square / whole).mean())}
        for name, square in squares.items()
    ]


def _by_category(result: CouplingResult) -> list[dict[str, Any]]:
    names, blocks = _blocks(result, "category")
    norms = {name: result.norms.numpy()[places].astype(np.float64) for name, places in zip(names, blocks, strict=True)}
    return [
        {"category": name, "n": len(values), "mean_norm": float(values.mean())}
        for name, values in sorted(norms.items(), key=lambda item: (-len(item[1]), item[0]))
    ]


def _clusters(found: Findings) -> list[dict[str, Any]]:
    members: dict[int, list[int]] = {}
    for index, cluster in zip(found.statistics.order, found.statistics.clusters, strict=True):
        members.setdefault(cluster, []).append(index)
    cosines, pieces = found.result.cosines.numpy(), found.result.pieces
    told = []
    for cluster, inside in sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))[:_CLUSTERS]:
        if len(inside) > 1:
            names = {name: _counted([pieces[index][name] for index in inside])[:3] for name in ("answer", "category")}
            told.append(
                {
                    "cluster": cluster,
                    "size": len(inside),
                    "mean_cosine": _mean(cosines[np.ix_(inside, inside)], own=True),
                    "answers": names["answer"],
                    "categories": names["category"],
                    "ids": [pieces[index]["id"] for index in inside[:5]],
                }
            )
    return told


def _mean(block: NDArray[Any], *, own: bool) -> float | None:
    """Mean of a block of cosines, without the pieces' own where it lies on the diagonal; None of no pair."""
    wide = block.astype(np.float64)
    n_pairs = wide.size - own * len(wide)
    return float((wide.sum() - own * np.trace(wide)) / n_pairs) if n_pairs else None


def _activation(found: Findings) -> dict[str, Any] | None:
    if found.activation is None:
        return None
    good = np.flatnonzero((found.result.valid & found.activation.valid).numpy())
    rows, columns = np.triu_indices(len(good), 1)
    places = spaced_places(len(rows), _MOST_PAIRS)
    first, second = good[rows[places]], good[columns[places]]
    gradient, activation = (each.cosines.numpy()[first, second] for each in (found.result, found.activation))
    told = agreement_of(activation, gradient, "activation", "all")
    return {
        "mean": float(activation.mean()) if len(activation) else None,
        **_told(told, "pearson", "spearman", "reason"),
        "n_pairs": told.n,
        "n_failed": len(found.activation.failed),
    }


def _sized(found: Findings, index: int) -> dict[str, Any]:
    numbers = {"gradient_norm": float(found.result.norms[index]), "log_prob": float(found.result.log_probs[index])}
    return {name: found.result.pieces[index][name] for name in ("id", "question", "answer")} | numbers


def _spread(values: NDArray[Any]) -> dict[str, Any] | None:
    if not len(values):
        return None
    quantiles = np.quantile(values, _QUANTILES).tolist()
    return {
        "minimum": float(values.min()),
        "mean": float(values.mean()),
        "maximum": float(values.max()),
        "std": float(values.std()),
        "quantiles": [{"share": share, "value": value} for share, value in zip(_QUANTILES, quantiles, strict=True)],
    }


def _counted(values: Sequence[Any]) -> list[dict[str, Any]]:
    counts = Counter(value for value in values if value is not None)
    return [
        {"name": name, "count": count} for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def _told(agreement: Agreement, *names: str) -> dict[str, Any]:
    return {name: value for name, value in agreement.details().items() if name in names}
