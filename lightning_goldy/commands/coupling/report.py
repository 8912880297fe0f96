"""The parts of ``coupling.json`` that tell what was compared and what was found; see docs/coupling_schema.md."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_goldy.analysis.agreement import agreement_of
from lightning_goldy.commands.coupling.questions import StrongPairs, codes_of, pair_kinds, pair_texts
from lightning_goldy.commands.coupling.run import Findings

Status = Literal["pass", "warn", "fail", "not measured"]

# Cosines from which two gradients are one for all purposes.
_SATURATED = 0.95
_MEASURE = "See what edits do to other answers, predicted and measured: add --edits 10."


def readiness(found: Findings, unknown_tokens: float) -> dict[str, Any]:
    """The verdict, the checks behind it, and what to do next.

    Args:
        found: What was measured.
        unknown_tokens: Share of the pieces whose prompt has a token that the tokenizer does not know.

    Returns:
        ``verdict``, ``summary``, ``checks`` and ``next_steps``.
    """
    checks = [*(check(found) for check in _CHECKS), _unknown_tokens(unknown_tokens), *_ripple(found)]
    worst = {each["status"] for each in checks}
    verdict = "not ready" if "fail" in worst else "ready with reservations" if "warn" in worst else "ready"
    open_ones = [each for each in checks if each["status"] != "pass"]
    steps = list(dict.fromkeys(each["next_step"] for each in open_ones if each["next_step"]))
    counts = {status: sum(each["status"] == status for each in checks) for status in ("pass", "warn", "fail")}
    summary = (
        f"{counts['pass']} of {len(checks)} checks passed, {counts['warn']} call for caution, {counts['fail']} failed. "
        + (f"First: {next(e['meaning'] for e in checks if e['status'] in ('fail', 'warn'))}" if verdict != "ready" else
           "The numbers can be read as they are.")
    )  # fmt: skip
    return {"verdict": verdict, "summary": summary, "checks": checks, "next_steps": steps}


def layer_error(found: Findings) -> float | None:
    """Largest relative difference between norms of the coupling and of plain backward passes."""
    if found.result.center or not found.layered:
        return None
    plain = torch.stack(list(found.layers.values())).square().sum(dim=0).sqrt()
    fast = found.result.norms[list(found.layered)]
    return float(((fast - plain).abs() / plain).max())


def saturated_share(found: Findings) -> float | None:
    """Share of the pairs whose cosine is at least 0.95."""
    cosines = found.result.cosines.numpy()
    good = found.result.valid.numpy()
    high = sum(int((row[at + 1 :] >= _SATURATED).sum()) for at, row in enumerate(cosines) if good[at])
    return high / found.statistics.n_pairs if found.statistics.n_pairs else None


def _check(
    name: str,
    value: float | None,
    rule: Literal["at least", "at most"],
    threshold: float,
    *,
    fail_at: float | None,
    meaning: str,
    next_step: str,
) -> dict[str, Any]:
    sign = 1 if rule == "at least" else -1
    status: Status = "pass"
    if value is None:
        status = "not measured"
    elif fail_at is not None and sign * value < sign * fail_at:
        status = "fail"
    elif sign * value < sign * threshold:
        status = "warn"
    return {
        "check": name,
        "value": value,
        "rule": rule,
        "threshold": threshold,
        "fail_threshold": fail_at,
        "status": status,
        "meaning": meaning,
        "next_step": next_step,
    }


def _pieces(found: Findings) -> dict[str, Any]:
    return _check(
        "pieces", found.statistics.n_pieces, "at least", 50, fail_at=3,
        meaning="Pieces that were compared. Means over few pairs move with every piece that is added.",
        next_step="Take more pieces: a larger --n-pieces, or more records.",
    )  # fmt: skip


def _failed(found: Findings) -> dict[str, Any]:
    return _check(
        "share of failed pieces", found.statistics.n_failed / len(found.result), "at most", 0.01, fail_at=0.2,
        meaning="Pieces that have no row: they could not be tokenised or run, or their gradient is zero.",
        next_step="Look at knowledge_pieces.failed for the reasons, and leave those pieces out or mend them.",
    )  # fmt: skip


def _known(found: Findings) -> dict[str, Any]:
    share = float(found.scores.exact[found.result.valid].double().mean()) if found.statistics.n_pieces else None
    return _check(
        "share of answers the model knows", share, "at least", 0.5, fail_at=0.05,
        meaning="Answers whose every token is the most probable one. The gradient of an answer that the model does not "
        "know tells how it would be learned, not how it is stored.",
        next_step="Check --template and --form (the prompt that the model was trained on), or keep to pieces that the "
        "model knows: knowledge_pieces.pieces says which.",
    )  # fmt: skip


def _saturated(found: Findings) -> dict[str, Any]:
    return _check(
        "share of saturated pairs", saturated_share(found), "at most", 0.01, fail_at=0.25,
        meaning=f"Pairs with a cosine of {_SATURATED} or more: one gradient in two pieces, as of paraphrases or of one "
        "answer to alike questions. They say nothing that is not in the texts.",
        next_step="Look at pairs.csv: leave repeated answers out, or compare other tensors with --select or --layers.",
    )  # fmt: skip


def _common(found: Findings) -> dict[str, Any]:
    return _check(
        "mean cosine", found.statistics.mean, "at most", 0.3, fail_at=None,
        meaning="A direction that all gradients share, such as that of the answer's form or of the end-of-text token, "
        "couples everything with everything.",
        next_step="Use --center, which subtracts the mean gradient.",
    )  # fmt: skip


def _norms(found: Findings) -> dict[str, Any]:
    norms = found.result.norms[found.result.valid].numpy()
    ratio = float(norms.min() / np.median(norms)) if len(norms) else None
    return _check(
        "smallest over median gradient norm", ratio, "at least", 1e-4, fail_at=None,
        meaning="Where the model is sure of an answer its gradient vanishes, and what is left of it may be rounding.",
        next_step="Do not read couplings of the pieces in gradient_analysis.smallest, or use --dtype float32.",
    )  # fmt: skip


def _projection(found: Findings) -> dict[str, Any]:
    return _check(
        "error of a cosine by the projection", found.result.projection_error or 0.0, "at most", 0.05, fail_at=0.2,
        meaning="Bound on the root mean square error that the random projection makes; 0 without one.",
        next_step="Raise --projection fourfold to halve it, or leave it out.",
    )  # fmt: skip


def _backward(found: Findings) -> dict[str, Any]:
    return _check(
        "norms against plain backward passes", layer_error(found), "at most", 1e-3, fail_at=0.05,
        meaning="Largest relative difference over the pieces that were differentiated one by one as well.",
        next_step="Use --dtype float32; if the difference stays, this model uses its weights in a way that is not "
        "understood, and the couplings are not to be trusted.",
    )  # fmt: skip


_CHECKS: tuple[Callable[[Findings], dict[str, Any]], ...] = (
    _pieces, _failed, _known, _saturated, _common, _norms, _projection, _backward,
)  # fmt: skip


def _unknown_tokens(share: float) -> dict[str, Any]:
    return _check(
        "share of prompts with unknown tokens", share, "at most", 0.0, fail_at=0.5,
        meaning="The tokenizer reads words of these prompts as unknown, so different questions look the same.",
        next_step="Use the model's own tokenizer, and a --template in words that it knows.",
    )  # fmt: skip


def _ripple(found: Findings) -> list[dict[str, Any]]:
    spearman = learned = None
    if found.ripple is not None:
        value = found.ripple.agreement("first_order")[0].spearman
        spearman = None if np.isnan(value) else value
        learned = float(found.ripple.new_exact.double().mean())
    measured = found.ripple is not None
    return [
        _check(
            "rank correlation of predicted and measured changes", spearman, "at least", 0.5, fail_at=None,
            meaning="Whether gradients predict what an edit did to the other pieces.",
            next_step="Try a smaller --learning-rate: if the correlation rises, the edits were no small steps, and "
            "cosines do not describe them." if measured else _MEASURE,
        ),
        _check(
            "share of edits that were learned", learned, "at least", 0.5, fail_at=None,
            meaning="Edits whose new answer is the most probable one afterwards. Ripples of an edit that was not "
            "learned are those of a nudge.",
            next_step="Raise --learning-rate, or use --editor finetune with more --steps, until the new answers are "
            "learned; see then whether the prediction still holds." if measured else _MEASURE,
        ),
    ]  # fmt: skip


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
