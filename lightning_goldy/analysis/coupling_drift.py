"""How far a coupling matrix has moved from the one of the base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

import numpy as np
import torch
from torch import Tensor

from lightning_goldy.analysis.agreement import agreement_of
from lightning_goldy.analysis.coupling import CouplingResult
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
        >>> from lightning_goldy.analysis.coupling import knowledge_coupling
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
