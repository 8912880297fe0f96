"""Whether the numbers of a run can be trusted: the checks, the verdict, and what to do next."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from lightning_goldy.commands.coupling.run import Findings

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
    checks = _coupling_checks(found, unknown_tokens) + _ripple_checks(found)
    counts = {status: sum(check["status"] == status for check in checks) for status in ("pass", "warn", "fail")}
    verdict = "not ready" if counts["fail"] else "ready with reservations" if counts["warn"] else "ready"
    steps = [check["next_step"] for check in checks if check["status"] != "pass" and check["next_step"]]
    doubts = [check["meaning"] for check in checks if check["status"] in ("fail", "warn")]
    summary = (
        f"{counts['pass']} of {len(checks)} checks passed, {counts['warn']} call for caution, {counts['fail']} failed. "
        + (f"First: {doubts[0]}" if doubts else "The numbers can be read as they are.")
    )
    return {"verdict": verdict, "summary": summary, "checks": checks, "next_steps": list(dict.fromkeys(steps))}


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


def _coupling_checks(found: Findings, unknown_tokens: float) -> list[dict[str, Any]]:
    result, statistics = found.result, found.statistics
    norms = result.norms[result.valid].numpy()
    return [
        _check(
            "pieces", statistics.n_pieces, "at least", 50, fail_at=3,
            meaning="Pieces that were compared. Means over few pairs move with every piece that is added.",
            next_step="Take more pieces: a larger --n-pieces, or more records.",
        ),
        _check(
            "share of failed pieces", statistics.n_failed / len(result), "at most", 0.01, fail_at=0.2,
            meaning="Pieces that have no row: they could not be tokenised or run, or their gradient is zero.",
            next_step="Look at knowledge_pieces.failed for the reasons, and leave those pieces out or mend them.",
        ),
        _check(
            "share of answers the model knows", found.known_share, "at least", 0.5, fail_at=0.05,
            meaning="Answers whose every token is the most probable one. The gradient of an answer that the model does "
            "not know tells how it would be learned, not how it is stored.",
            next_step="Check --template and --form (the prompt that the model was trained on), or keep to pieces that "
            "the model knows: knowledge_pieces.pieces says which.",
        ),
        _check(
            "share of saturated pairs", saturated_share(found), "at most", 0.01, fail_at=0.25,
            meaning=f"Pairs with a cosine of {_SATURATED} or more: one gradient in two pieces, as of paraphrases or of "
            "one answer to alike questions. They say nothing that is not in the texts.",
            next_step="Look at pairs.csv: leave repeated answers out, or compare other tensors with --select or "
            "--layers.",
        ),
        _check(
            "mean cosine", statistics.mean, "at most", 0.3,
            meaning="A direction that all gradients share, such as that of the answer's form or of the end-of-text "
            "token, couples everything with everything.",
            next_step="Use --center, which subtracts the mean gradient.",
        ),
        _check(
            "smallest over median gradient norm", float(norms.min() / np.median(norms)) if len(norms) else None,
            "at least", 1e-4,
            meaning="Where the model is sure of an answer its gradient vanishes, and what is left of it may be "
            "rounding.",
            next_step="Do not read couplings of the pieces in gradient_analysis.smallest, or use --dtype float32.",
        ),
        _check(
            "error of a cosine by the projection", result.projection_error or 0.0, "at most", 0.05, fail_at=0.2,
            meaning="Bound on the root mean square error that the random projection makes; 0 without one.",
            next_step="Raise --projection fourfold to halve it, or leave it out.",
        ),
        _check(
            "norms against plain backward passes", layer_error(found), "at most", 1e-3, fail_at=0.05,
            meaning="Largest relative difference over the pieces that were differentiated one by one as well.",
            next_step="Use --dtype float32; if the difference stays, this model uses its weights in a way that is not "
            "understood, and the couplings are not to be trusted.",
        ),
        _check(
            "share of prompts with unknown tokens", unknown_tokens, "at most", 0.0, fail_at=0.5,
            meaning="The tokenizer reads words of these prompts as unknown, so different questions look the same.",
            next_step="Use the model's own tokenizer, and a --template in words that it knows.",
        ),
    ]  # fmt: skip


def _ripple_checks(found: Findings) -> list[dict[str, Any]]:
    ripple = found.ripple
    spearman = None if ripple is None else ripple.agreement("first_order")[0].metrics()["spearman"]
    return [
        _check(
            "rank correlation of predicted and measured changes", spearman, "at least", 0.5,
            meaning="Whether gradients predict what an edit did to the other pieces.",
            next_step=_MEASURE if ripple is None else "Try a smaller --learning-rate: if the correlation rises, the "
            "edits were no small steps, and cosines do not describe them.",
        ),
        _check(
            "share of edits that were learned", None if ripple is None else float(ripple.new_exact.double().mean()),
            "at least", 0.5,
            meaning="Edits whose new answer is the most probable one afterwards. Ripples of an edit that was not "
            "learned are those of a nudge.",
            next_step=_MEASURE if ripple is None else "Raise --learning-rate, or use --editor finetune with more "
            "--steps, until the new answers are learned; see then whether the prediction still holds.",
        ),
    ]  # fmt: skip


def _check(
    name: str,
    value: float | None,
    rule: Literal["at least", "at most"],
    threshold: float,
    *,
    meaning: str,
    next_step: str,
    fail_at: float | None = None,
) -> dict[str, Any]:
    sign = 1 if rule == "at least" else -1
    status = "pass"
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
