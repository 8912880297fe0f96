"""The parts of ``coupling.json`` that tell what was compared and what was found; see docs/coupling_schema.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.analysis.agreement import agreement_of
from lightning_goldy.coupling.analysis import Findings
from lightning_goldy.coupling.pairs import StrongPairs, codes_of, pair_kinds, pair_texts
from lightning_goldy.coupling.readiness import layer_error, saturated_share

SCHEMA_VERSION = 2
PARTS = (
    "metadata",
    "knowledge_pieces",
    "gradient_analysis",
    "coupling_analysis",
    "high_coupling_pairs",
    "cross_question_analysis",
    "generated_files",
    "performance",
    "readiness",
)
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_ENDS = 10
_CLUSTERS = 10
_TOP = 20
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
    valid = result.valid
    return {
        "source": found.found.source,
        "format": found.found.format,
        **settings,
        "records": found.found.records,
        "available": len(found.found.pieces),
        "compared": len(result),
        "left_out": [{"reason": reason, "count": count} for reason, count in found.found.skipped.items()],
        "incomplete": [{"reason": reason, "count": count} for reason, count in found.found.incomplete.items()],
        "failed": list(result.failed),
        "known_share": float(scores.exact[valid].double().mean()) if bool(valid.any()) else None,
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
        "log_prob_relation": {
            "pearson": _finite(relation.pearson),
            "spearman": _finite(relation.spearman),
            "n": relation.n,
            "reason": relation.reason,
        },
        "by_layer": _by_layer(found),
        "by_layer_pieces": len(found.layered),
        "backward_error": layer_error(found),
        "by_category": _by_category(result.column("category"), norms, good),
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
            {
                "cosine": each["cosine"],
                "first": dict(found.result.pieces[each["first"]]),
                "second": dict(found.result.pieces[each["second"]]),
            }
            for each in found.statistics.bottom
        ],
    }


def _by_layer(found: Findings) -> list[dict[str, Any]]:
    squares = {name: norms.square().numpy() for name, norms in found.layers.items()}
    whole = sum(squares.values())
    return [
        {
            "block": name,
            "mean_norm": float(np.sqrt(each).mean()),
            "share_of_square": float((each / whole).mean()),
        }
        for name, each in squares.items()
    ]


def _by_category(categories: Sequence[Any], norms: NDArray[Any], good: NDArray[Any]) -> list[dict[str, Any]]:
    found: dict[Any, list[float]] = {}
    for name, norm, well in zip(categories, norms.tolist(), good.tolist(), strict=True):
        if well and name is not None:
            found.setdefault(name, []).append(norm)
    return [
        {"category": name, "n": len(values), "mean_norm": float(np.mean(values))}
        for name, values in sorted(found.items(), key=lambda each: (-len(each[1]), each[0]))
    ]


def _clusters(found: Findings) -> list[dict[str, Any]]:
    members: dict[int, list[int]] = {}
    for index, cluster in zip(found.statistics.order, found.statistics.clusters, strict=True):
        members.setdefault(cluster, []).append(index)
    cosines = found.result.cosines.numpy()
    largest = sorted(members.items(), key=lambda each: (-len(each[1]), each[0]))[:_CLUSTERS]
    told = []
    for cluster, inside in largest:
        if len(inside) < 2:
            continue
        block = cosines[np.ix_(inside, inside)].astype(np.float64)
        count = len(inside)
        told.append(
            {
                "cluster": cluster,
                "size": count,
                "mean_cosine": float((block.sum() - np.trace(block)) / (count * (count - 1))),
                "answers": _counted([found.result.pieces[index]["answer"] for index in inside])[:3],
                "categories": _counted([found.result.pieces[index]["category"] for index in inside])[:3],
                "ids": [found.result.pieces[index]["id"] for index in inside[:5]],
            }
        )
    return told


def _activation(found: Findings) -> dict[str, Any] | None:
    if found.activation is None:
        return None
    good = np.flatnonzero((found.result.valid & found.activation.valid).numpy())
    rows, columns = np.triu_indices(len(good), 1)
    places = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), _MOST_PAIRS)).round().astype(np.int64))
    first, second = good[rows[places]], good[columns[places]]
    gradient, activation = (each.cosines.numpy()[first, second] for each in (found.result, found.activation))
    told = agreement_of(activation, gradient, "activation", "all")
    return {
        "mean": float(activation.mean()) if len(activation) else None,
        "pearson": _finite(told.pearson),
        "spearman": _finite(told.spearman),
        "n_pairs": told.n,
        "reason": told.reason,
        "n_failed": len(found.activation.failed),
    }


def _sized(found: Findings, index: int) -> dict[str, Any]:
    piece = found.result.pieces[index]
    return {
        "id": piece["id"],
        "question": piece["question"],
        "answer": piece["answer"],
        "gradient_norm": float(found.result.norms[index]),
        "log_prob": float(found.result.log_probs[index]),
    }


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
    counts: dict[Any, int] = {}
    for value in values:
        if value is not None:
            counts[value] = counts.get(value, 0) + 1
    return [
        {"name": name, "count": count} for name, count in sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    ]


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
