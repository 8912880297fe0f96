"""The result of a coupling: a matrix and the pieces that it belongs to, and how far it has moved from another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lightning_goldy.analysis.agreement import agreement_of
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.naming import block_of, suggestion

# Rows of the matrix that are worked on at a time.
ROWS = 1024


@dataclass(frozen=True)
class CouplingResult(AnalysisResult):
    r"""How alike pieces are, pair by pair.

    Args:
        matrix: Shape ``[N, N]``, in the order of the pieces: cosines, or with ``normalize=False`` inner products;
            float32, of a float64 model float64. NaN in the rows and columns of pieces that failed.
        norms: Shape ``[N]``, float64: norms of the gradients (nats per parameter unit), centred ones with ``center``;
            of activations for ``measure="activation"``. NaN where a piece failed.
        log_probs: Shape ``[N]``, float64: mean log-probability of each answer, nats.
        pieces: Of each piece ``id``, ``question``, ``answer``, ``category``, ``group`` and ``hop``; all but the id None
            where pieces came as batches.
        failed: Of each piece that failed its ``index``, ``id`` and ``reason``.
        parameters: Canonical names of the tensors that gradients were taken with respect to.
        measure: ``gradient`` or ``activation``.
        normalize: Whether the matrix holds cosines.
        center: Whether the mean over pieces was subtracted.
        projection: Dimensions of the random projection; None where the matrix is exact.
        projection_error: Bound on the root mean square error of a cosine that the projection makes, before centring;
            None without one.
        seconds: What it took on this process.
        cost: Passes that were made to their end: those of a first piece that every process tries, and those of pieces
            that failed later, among them; not those of blocks that a workspace had already.
    """

    matrix: Tensor
    norms: Tensor
    log_probs: Tensor
    pieces: tuple[dict[str, Any], ...]
    failed: tuple[dict[str, Any], ...]
    parameters: tuple[str, ...]
    measure: Literal["gradient", "activation"]
    normalize: bool
    center: bool
    projection: int | None
    projection_error: float | None
    seconds: float
    cost: Cost = field(default_factory=Cost)

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def ids(self) -> tuple[str, ...]:
        """The pieces' ids."""
        return self.column("id")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the blocks that the parameters belong to."""
        return tuple(dict.fromkeys(map(block_of, self.parameters)))

    @property
    def n_layers(self) -> int:
        """Number of those blocks."""
        return len(self.layers)

    @property
    def valid(self) -> Tensor:
        """Which pieces did not fail, shape ``[N]``, boolean."""
        return torch.isfinite(self.norms)

    @property
    def cosines(self) -> Tensor:
        """The cosines, also where the matrix holds inner products."""
        return (
            self.matrix
            if self.normalize
            else cosines_of_gram(self.matrix.to(torch.float64, copy=True), self.norms).to(self.matrix.dtype)
        )

    def column(self, name: str) -> tuple[Any, ...]:
        """One value per piece.

        Args:
            name: ``id``, ``question``, ``answer``, ``category``, ``group`` or ``hop``.

        Raises:
            ValueError: There is no such column.
        """
        valid = ("id", "question", "answer", "category", "group", "hop")
        if name not in valid:
            raise ValueError(f"unknown column {name!r}; {suggestion(name, valid)}")
        return tuple(piece[name] for piece in self.pieces)


def cosines_of_gram(gram: Tensor, norms: Tensor) -> Tensor:
    """Divides inner products by norms, in place; NaN stays where a norm is NaN.

    Args:
        gram: Shape ``[N, N]``, float64.
        norms: Shape ``[N]``, float64.

    Example:
        >>> cosines_of_gram(torch.tensor([[4.0, 3.0], [3.0, 9.0]]), torch.tensor([2.0, 3.0])).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    for start in range(0, len(gram), ROWS):
        part = gram[start : start + ROWS]
        part /= norms[start : start + ROWS, None] * norms
        part.clamp_(-1, 1)  # beyond by rounding, or by the error of a projection
    good = torch.isfinite(norms)
    gram.diagonal()[good] = 1
    return gram


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
    names, means = np.array(classes, dtype=object), {}
    size = np.triu(difference.abs().numpy(), 1)
    for one, other in combinations_with_replacement(dict.fromkeys(classes), 2):
        chosen = np.logical_or(np.outer(names == one, names == other), np.outer(names == other, names == one))
        count = np.triu(chosen, 1).sum()
        if count:
            means[one if one == other else f"{one}_{other}"] = float(size[chosen].sum() / count)
    return means
