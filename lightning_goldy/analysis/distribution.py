"""The shape of a finetune's change, tensor by tensor: ranks, singular values, directions, histograms."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.change import norm_ratio
from lightning_goldy.analysis.result import AnalysisResult
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.directions import fill_direction_
from lightning_goldy.core.naming import block_of, kind_of
from lightning_goldy.core.sharding import Replicas, gather, is_sharded

_BINS = 256
_OVERSAMPLED = 8
_POWER_ITERATIONS = 4
_COLUMNS = ("relative_change", "stable_rank", "effective_rank", "histogram_drift", "alignment_over_chance")


@dataclass(frozen=True)
class ParameterDistributionResult(AnalysisResult):
    r"""One row per tensor, in the space's order.

    Args:
        rows: Of each tensor: ``name``, ``block``, ``kind``, ``numel``; ``base_norm`` and ``delta_norm``;
            ``relative_change``, \|Delta\| / \|base\| (None where the base is zero); ``histogram_drift``, the
            Jensen-Shannon divergence between the histograms of its elements now and in the base (nats, at most log 2).
            Of matrices that changed also ``singular_values``, the largest of Delta; ``stable_rank``, \|Delta\|_F^2 /
            \|Delta\|_2^2; ``effective_rank``, the exponential of the entropy of the normalised singular values (None
            where only the largest were computed); ``alignment``, the share of \|Delta\|_F^2 that lies between the
            base's top left and right singular directions, and ``alignment_chance``, what a random Delta would have;
            ``exact``, whether all singular values were computed.
        top: Number of singular values and directions.
    """

    analysis: ClassVar[str] = "parameter_distribution"

    rows: tuple[dict[str, Any], ...]
    top: int

    def metrics(self) -> dict[str, float | None]:
        """Of the model and by block: the relative change, and means weighted by the tensors' elements."""
        detailed = ParameterDistributionResult(tuple(self._detailed()), self.top)
        found: dict[str, float | None] = {}
        for column in _COLUMNS:
            found[column] = detailed.whole(column)
            found.update({f"{column}/{block}": value for block, value in detailed.by_block(column).items()})
        return found

    def details(self) -> dict[str, Any]:
        """The tensors' rows, with the alignment over chance."""
        return {"tensors": self._detailed(), "top": self.top}

    def _detailed(self) -> list[dict[str, Any]]:
        chances = [row.get("alignment_chance") for row in self.rows]
        return [
            {**row, "alignment_over_chance": row["alignment"] / chance if chance else None}
            for row, chance in zip(self.rows, chances, strict=True)
        ]

    def by_block(self, column: str) -> dict[str, float]:
        """Mean of a column over each block's tensors, weighted by their elements; tensors without it are left out.

        ``relative_change`` is no mean: it is that of all the block's tensors together.

        Args:
            column: Such as ``stable_rank``.
        """
        blocks: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            blocks.setdefault(row["block"], []).append(row)
        found = {block: _pooled(rows, column) for block, rows in blocks.items()}
        return {block: value for block, value in found.items() if value is not None}

    def whole(self, column: str) -> float | None:
        """As :meth:`by_block`, of the whole model; None where no tensor has it."""
        return _pooled(self.rows, column)


def parameter_distribution(
    model: nn.Module,
    base: BaseParameters,
    *,
    top: int = 8,
    exact_below: int = 1024,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> ParameterDistributionResult:
    r"""Describes the change :math:`\Delta = \theta_t - \theta_0` of every tensor.

    Singular values come from the eigenvalues of the smaller Gram matrix in float64 where its side is at most
    ``exact_below``, and from a randomised decomposition with power iterations above. On several replicas the tensors
    are shared out; sharded tensors are gathered one at a time. Every rank must call.

    Args:
        model: The finetuned model, plain or sharded.
        base: Its parameters before.
        top: Singular values and directions to keep.
        exact_below: Largest smaller side of a matrix whose whole spectrum is computed.
        seed: Of the randomised decomposition.
        progress: Called with (tensors done, tensors in all) on this rank.
        split_over_ranks: Whether to share tensors out over the ranks of an initialised process group.

    Returns:
        One row per tensor.

    Raises:
        ValueError: ``top`` or ``exact_below`` is below 1.
        SpaceError: The base is of another model.

    Source: stable rank: Rudelson and Vershynin 2007; effective rank: Roy and Vetterli 2007; randomised decomposition:
    Halko, Martinsson and Tropp 2011, algorithm 4.4; Delta's directions: Hu et al. 2022 ("LoRA"), section 7.3.

    Example:
        >>> from lightning_goldy.core.vector import ParameterVector
        >>> layer = nn.Linear(4, 4, bias=False)
        >>> base = BaseParameters(ParameterVector.of(layer))
        >>> _ = layer.weight.data.add_(torch.outer(torch.ones(4), torch.arange(4.0)))
        >>> round(parameter_distribution(layer, base).rows[0]["stable_rank"], 4)
        1.0
    """
    for name, value in (("top", top), ("exact_below", exact_below)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    rows: list[tuple[int, dict[str, Any]]] = []
    with torch.no_grad(), replicas.together("parameter_distribution"):
        total = len(base.space.names)
        for index, change in enumerate(base.changes(model)):
            # Shards are gathered by all; of replicas each takes its own tensors.
            if is_sharded(change.delta) or index % replicas.size == replicas.rank:
                before, delta = gather(change.base), gather(change.delta)
                rows.append((index, _row(change.name, before, delta, top, exact_below, seed)))
            if progress is not None:
                progress(index + 1, total)
    found = dict(pair for part in replicas.gather_objects(rows) for pair in part)
    return ParameterDistributionResult(tuple(found[index] for index in sorted(found)), top)


def _row(name: str, base: Tensor, delta: Tensor, top: int, exact_below: int, seed: int) -> dict[str, Any]:
    size, changed = float(base.double().norm()), float(delta.double().norm())
    row: dict[str, Any] = {
        "name": name,
        "block": block_of(name),
        "kind": kind_of(name),
        "numel": base.numel(),
        "base_norm": size,
        "delta_norm": changed,
        "relative_change": norm_ratio((changed,), (size,)),
        "histogram_drift": histogram_drift(base, base + delta),
    }
    if base.ndim < 2 or min(base.shape) < 2 or not changed:
        return row
    matrix, before = delta.reshape(len(delta), -1), base.reshape(len(base), -1)  # [out, in ...] -> [out, in]
    exact = min(matrix.shape) <= exact_below
    values, left, right = _leading(before, top, exact_below, name, seed)
    spectrum = _spectrum(matrix) if exact else _leading(matrix, top, exact_below, f"{name}/delta", seed)[0]
    inside = left.t() @ matrix.double() @ right  # [top, top]
    return {
        **row,
        "singular_values": tuple(spectrum[:top].tolist()),
        "stable_rank": changed**2 / float(spectrum[0]) ** 2,
        "effective_rank": _effective_rank(spectrum) if exact else None,
        "alignment": float(inside.square().sum()) / changed**2,
        "alignment_chance": len(values) ** 2 / matrix.numel(),
        "exact": exact,
    }


def _pooled(rows: Sequence[dict[str, Any]], column: str) -> float | None:
    if column == "relative_change":
        return norm_ratio([row["delta_norm"] for row in rows], [row["base_norm"] for row in rows])
    having = [row for row in rows if row.get(column) is not None]
    weight = sum(row["numel"] for row in having)
    return sum(row[column] * row["numel"] for row in having) / weight if weight else None


def histogram_drift(first: Tensor, second: Tensor) -> float:
    """Jensen-Shannon divergence between the histograms of two tensors' elements over their common range, nats.

    Example:
        >>> histogram_drift(torch.zeros(4), torch.zeros(4)), histogram_drift(torch.zeros(4), torch.ones(4))
        (0.0, 0.6931471805599453)
    """
    low = min(float(first.min()), float(second.min()))
    high = max(float(first.max()), float(second.max()))
    if low == high:
        return 0.0
    shares = [
        torch.histc(each.float().reshape(-1).cpu(), _BINS, low, high).double() / each.numel()
        for each in (first, second)
    ]
    middle = (shares[0] + shares[1]) / 2
    return float(sum(0.5 * torch.special.xlogy(share, share / middle.clamp(min=1e-300)).sum() for share in shares))


def _spectrum(matrix: Tensor) -> Tensor:
    """All singular values, descending, by the Gram matrix in float64: exact to 1e-8 of the largest."""
    wide = matrix.double()
    gram = wide @ wide.t() if matrix.shape[0] <= matrix.shape[1] else wide.t() @ wide
    return torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)


def _leading(matrix: Tensor, top: int, exact_below: int, name: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values with their left and right directions, float64."""
    wide, short = matrix.double(), min(matrix.shape)
    count = min(top, short)
    if short <= exact_below:
        if matrix.shape[0] > matrix.shape[1]:
            values, right, left = _leading(matrix.t(), top, exact_below, name, seed)
            return values, left, right
        squares, vectors = torch.linalg.eigh(wide @ wide.t())
        values, left = squares.clamp(min=0).sqrt().flip(0)[:count], vectors.flip(1)[:, :count]
        right = wide.t() @ left / values.clamp(min=1e-300)
        return values, left, right
    # A start that is the same on every machine, and draws from no random state.
    probe = torch.empty(matrix.shape[1], min(short, count + _OVERSAMPLED), dtype=torch.float32)
    basis = wide @ fill_direction_(probe, name, seed).to(wide)
    for _ in range(_POWER_ITERATIONS):
        basis = wide @ torch.linalg.qr(wide.t() @ torch.linalg.qr(basis).Q).Q
    orthogonal = torch.linalg.qr(basis).Q  # [out, count + oversampled]
    inner, values, right = torch.linalg.svd(orthogonal.t() @ wide, full_matrices=False)
    return values[:count], (orthogonal @ inner)[:, :count], right[:count].t()


def _effective_rank(spectrum: Tensor) -> float:
    shares = spectrum / spectrum.sum()
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))
