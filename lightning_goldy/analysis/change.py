"""How far the parameters have moved from the base: norms by tensor, and the distribution of the changes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.result import AnalysisResult
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.naming import block_of, kind_of
from lightning_goldy.core.sharding import gather, is_sharded, local, scatter_like, sum_over_shards
from lightning_goldy.core.vector import ParameterVector, reduce_tensors

# log10 |change| from 1e-12 to 10, four bins a decade; what lies outside falls into the outermost bins.
_LOWEST, _HIGHEST, _PER_DECADE = -12, 1, 4
_CHUNK = 1 << 20


@dataclass(frozen=True)
class WeightChange(AnalysisResult):
    r"""The change :math:`\Delta = \theta_t - \theta_0`, tensor by tensor.

    Args:
        names: Parameter names.
        numel: Elements of each.
        base_norms: :math:`\lVert\theta_0\rVert` of each.
        delta_norms: :math:`\lVert\Delta\rVert` of each.
        edges: Bin edges, log10 of an element's absolute change.
        counts: Elements in each bin.
        unchanged: Elements that have not changed at all.
    """

    analysis: ClassVar[str] = "golden_snapshot"

    names: tuple[str, ...]
    numel: tuple[int, ...]
    base_norms: tuple[float, ...]
    delta_norms: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    unchanged: int

    @property
    def delta_norm(self) -> float:
        """Norm of the whole change."""
        return math.hypot(*self.delta_norms)

    @property
    def relative_change(self) -> float:
        """Norm of the change over the norm of the base; infinite when the base is zero and has changed."""
        ratio = norm_ratio(self.delta_norms, self.base_norms)
        return ratio if ratio is not None else (math.inf if self.delta_norm else 0.0)

    def metrics(self) -> dict[str, float | None]:
        """Norms, the share of the elements that have not changed, and the relative change by block."""
        return {
            "delta_norm": self.delta_norm,
            "relative_change": self.relative_change,
            "unchanged_share": self.unchanged / sum(self.numel),
            **{f"relative_change/{block}": value for block, value in self.by_block().items()},
        }

    def details(self) -> dict[str, Any]:
        """The tensors' rows, and the distribution of the elements' changes."""
        histogram = {"edges": list(self.edges), "counts": list(self.counts), "zero": self.unchanged}
        return {"tensors": self.rows(), "histogram": histogram}

    def histograms(self) -> dict[str, tuple[list[float], list[int]]]:
        """log10 of the elements' absolute changes, where there is one."""
        return {"change_log10": (list(self.edges), list(self.counts))} if any(self.counts) else {}

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able row per tensor, with the block and the kind that it belongs to."""
        columns = zip(self.names, self.numel, self.base_norms, self.delta_norms, strict=True)
        return [
            {
                "name": name,
                "block": block_of(name),
                "kind": kind_of(name),
                "numel": numel,
                "base_norm": base,
                "delta_norm": delta,
                "relative_change": norm_ratio((delta,), (base,)),
            }
            for name, numel, base, delta in columns
        ]

    def by_block(self) -> dict[str, float]:
        """Relative change of each block: norm of its change over the norm of its base."""
        norms: dict[str, list[tuple[float, float]]] = {}
        for name, delta, base in zip(self.names, self.delta_norms, self.base_norms, strict=True):
            norms.setdefault(block_of(name), []).append((delta, base))
        ratios = {block: norm_ratio(*zip(*pairs, strict=True)) for block, pairs in norms.items()}
        return {block: ratio for block, ratio in ratios.items() if ratio is not None}


def norm_ratio(delta_norms: Sequence[float], base_norms: Sequence[float]) -> float | None:
    r"""Relative change of several tensors taken together; None where their base is zero.

    .. math:: \frac{\lVert\Delta\rVert}{\lVert\theta_0\rVert}
        = \sqrt{\sum_i \lVert\Delta_i\rVert^2} \Big/ \sqrt{\sum_i \lVert\theta_{0,i}\rVert^2}

    Args:
        delta_norms: Norm of each tensor's change.
        base_norms: Norm of each tensor in the base.

    Example:
        >>> norm_ratio([3.0, 4.0], [10.0, 0.0]), norm_ratio([1.0], [0.0])
        (0.5, None)
    """
    base = math.hypot(*base_norms)
    return math.hypot(*delta_norms) / base if base else None


class SuccessiveUpdates:
    """Cosine between the update since the last observation and the update before it.

    Holds two vectors: the values last seen and the last update.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> updates, cosines = SuccessiveUpdates(), []
        >>> for value in (0.0, 1.0, 3.0, 2.0):
        ...     layer.weight.data.fill_(value)
        ...     cosines.append(updates.observe(ParameterVector.of(layer)))
        tensor([[0.]])
        tensor([[1.]])
        tensor([[3.]])
        tensor([[2.]])
        >>> cosines
        [None, None, 1.0, -1.0]
    """

    def __init__(self) -> None:
        self._previous: ParameterVector | None = None
        self._update: ParameterVector | None = None

    def observe(self, values: ParameterVector) -> float | None:
        """Takes in present values (a copy, not views) and returns the cosine; None while there is none.

        A cosine with an update of zero is None as well.
        """
        current = offloaded(values)
        if self._previous is None:
            self._previous = current
            return None
        update, before = current - self._previous, self._update
        self._previous, self._update = current, update
        scale = update.norm() * before.norm() if before is not None else 0.0
        return update.dot(before) / scale if before is not None and scale else None

    def vectors(self) -> dict[str, ParameterVector]:
        """What is held, by name, for :meth:`load` after a resume."""
        held = {"previous": self._previous, "update": self._update}
        return {name: vector for name, vector in held.items() if vector is not None}

    def load(self, vectors: dict[str, ParameterVector]) -> None:
        """Takes up what :meth:`vectors` gave."""
        self._previous, self._update = (
            offloaded(vectors[name]) if name in vectors else None for name in ("previous", "update")
        )


def offloaded(vector: ParameterVector) -> ParameterVector:
    """The vector on the CPU; sharded tensors stay on their mesh's device, which they cannot leave."""
    return vector.map(lambda tensor: tensor if is_sharded(tensor) else tensor.cpu())


def weight_change(model: nn.Module, base: BaseParameters) -> WeightChange:
    r"""Measures the change of every parameter since the base.

    .. math:: \Delta = \theta_t - \theta_0, \qquad \text{relative change} = \lVert\Delta\rVert / \lVert\theta_0\rVert

    Sums are accumulated in float64 over all shards; one tensor's change is held at a time.

    Args:
        model: The model as it is now.
        base: What it is compared with.

    Returns:
        Norms by tensor and the histogram of the elements' changes.

    Raises:
        ValueError: A parameter is no longer finite; it is named.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> base = BaseParameters(ParameterVector.of(layer))
        >>> _ = layer.weight.data[0, 0].add_(0.25)
        >>> change = weight_change(layer, base)
        >>> round(change.delta_norm, 6), change.unchanged
        (0.25, 1)
    """
    names, numel, base_norms, delta_norms = [], [], [], []
    bins = (_HIGHEST - _LOWEST) * _PER_DECADE
    counts = torch.zeros(bins + 1, dtype=torch.int64)
    for name, before, delta in base.changes(model):
        squares = [reduce_tensors([tensor], lambda x: x @ x)[0] for tensor in (before, delta)]
        if not math.isfinite(squares[1]):
            raise ValueError(f"{name} has changed to values that are not finite")
        names.append(name)
        numel.append(delta.numel())
        base_norms.append(math.sqrt(squares[0]))
        delta_norms.append(math.sqrt(squares[1]))
        counts += sum_over_shards([_histogram(local(delta), bins)], [delta])[0].cpu()
    return WeightChange(
        names=tuple(names),
        numel=tuple(numel),
        base_norms=tuple(base_norms),
        delta_norms=tuple(delta_norms),
        edges=tuple(_LOWEST + index / _PER_DECADE for index in range(bins + 1)),
        counts=tuple(counts[:bins].tolist()),
        unchanged=int(counts[bins]),
    )


def change_inside(model: nn.Module, base: BaseParameters, mask: ParameterVector) -> float | None:
    r"""Share of :math:`\lVert\Delta\rVert^2` that lies inside a mask, a fraction; None when nothing has changed.

    Args:
        model: The model as it is now.
        base: What it is compared with.
        mask: Boolean, on any device; its parameters must be among the base's.
    """
    inside = total = 0.0
    for name, _, delta in base.changes(model):
        total += reduce_tensors([delta], lambda x: x @ x)[0]
        if name in mask.space:
            marked = scatter_like(delta, gather(mask[name]))
            inside += reduce_tensors([delta], lambda x, m: (x * x) @ m, [marked])[0]
    return inside / total if total else None


def _histogram(delta: Tensor, bins: int) -> Tensor:
    """Counts by log10 of the absolute value; the last entry counts exact zeros."""
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=delta.device)
    flat = delta.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        size = flat[start : start + _CHUNK].abs()
        index = ((size.log10() - _LOWEST) * _PER_DECADE).floor_().clamp_(0, bins - 1)
        index[size == 0] = bins
        counts += torch.bincount(index.long(), minlength=bins + 1)
    return counts
