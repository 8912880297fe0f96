"""How far the weights have moved from the base, and what shape the change has."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import (
    effective_rank,
    histogram_drift,
    precise,
    product_spectrum,
    rank_of,
    spectrum_of,
)
from lightning_goldy.analysis.gradients import exact_products
from lightning_goldy.analysis.precision import low_precision, rounding_of
from lightning_goldy.analysis.result import AnalysisResult, tensor_rows
from lightning_goldy.core.architecture.adapters import LowRankChange, base_within, changes_in, chosen_space, merged_name
from lightning_goldy.core.architecture.blocks import expert_counts, expert_names
from lightning_goldy.core.base import Base, BaseParameters, base_of
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import block_of, require_at_least
from lightning_goldy.core.sharding import (
    Replicas,
    gather,
    inside_parallel,
    is_sharded,
    local,
    scatter_like,
    sum_over_shards,
)
from lightning_goldy.core.vector import (
    ParameterVector,
    fill_direction_,
    leading_directions,
    reduce_rows,
    reduce_tensors,
    refined_directions,
)

# log10 |change| from 1e-12 to 10, four bins a decade; what lies outside falls into the outermost bins.
_LOWEST, _HIGHEST, _PER_DECADE = -12, 1, 4
# Elements that are binned at a time: few, for several copies of them are held.
_CHUNK = 1 << 18


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
        space: ``merged`` or ``adapters``; None of a model without adapters.
        rounding: Where the model computes below float32, what :func:`~lightning_goldy.analysis.precision.low_precision`
            tells, ``relative_change``, that which rounding alone makes, and ``lost_share``, the elements whose change
            is below half of the gap between neighbouring numbers, a fraction of those that changed.
    """

    analysis: ClassVar[str] = "golden_snapshot"

    names: tuple[str, ...]
    numel: tuple[int, ...]
    base_norms: tuple[float, ...]
    delta_norms: tuple[float, ...]
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    unchanged: int
    space: str | None = None
    rounding: dict[str, Any] | None = None

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
            **(
                {}
                if self.rounding is None
                else {"rounding_floor": self.rounding["relative_change"], "lost_share": self.rounding["lost_share"]}
            ),
            **{f"relative_change/{block}": value for block, value in self.by_block().items()},
        }

    def details(self) -> dict[str, Any]:
        """The tensors' rows, and the distribution of the elements' changes."""
        histogram = {"edges": list(self.edges), "counts": list(self.counts), "zero": self.unchanged}
        return {"tensors": self.rows(), "histogram": histogram, **_told(self.space), **self._precision()}

    def _precision(self) -> dict[str, Any]:
        return {} if self.rounding is None else {"precision": self.rounding}

    def headline(self) -> str:
        """How far the weights have moved, and what rounding alone would have made."""
        told = super().headline()
        if self.rounding is None:
            return told
        return f"{told}; rounding to {self.rounding['dtype']} alone makes {self.rounding['relative_change']:.2g}"

    def histograms(self) -> dict[str, tuple[list[float], list[int]]]:
        """log10 of the elements' absolute changes, where there is one."""
        return {"change_log10": (list(self.edges), list(self.counts))} if any(self.counts) else {}

    def rows(self) -> list[dict[str, Any]]:
        """One JSON-able row per tensor, or expert of a stack, with the block and the kind that it belongs to."""
        norms = {"base_norm": self.base_norms, "delta_norm": self.delta_norms}
        changes = [norm_ratio((delta,), (base,)) for base, delta in zip(*norms.values(), strict=True)]
        return tensor_rows(self.names, numel=self.numel, **norms, relative_change=changes)

    def by_block(self) -> dict[str, float]:
        """Relative change of each block: norm of its change over the norm of its base."""
        norms: dict[str, list[tuple[float, float]]] = {}
        for name, delta, base in zip(self.names, self.delta_norms, self.base_norms, strict=True):
            norms.setdefault(block_of(name), []).append((delta, base))
        ratios = {block: norm_ratio(*zip(*pairs, strict=True)) for block, pairs in norms.items()}
        return {block: ratio for block, ratio in ratios.items() if ratio is not None}


def _told(space: str | None) -> dict[str, str]:
    """What a row says of the space; nothing where there is only one."""
    return {} if space is None else {"space": space}


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

    Holds two vectors: the values last seen and the last update. The latter is in bfloat16 where parameters are wider:
    the cosine only asks for its direction.

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

    def observe(self, values: ParameterVector, model: nn.Module | None = None, space: str = "merged") -> float | None:
        """Takes in present values (a copy, not views) and returns the cosine; None while there is none.

        A cosine with an update of zero is None as well.

        Args:
            values: Of what is trained.
            model: Which has them; with adapters the cosine is that of the merged weights' updates.
            space: ``merged`` or ``adapters``.
        """
        current = offloaded(values)
        previous, before = self._previous, self._update
        self._previous, self._update = current, None
        if previous is None:
            return None
        if before is None or model is None or chosen_space(model, space) != "merged":
            self._update, cosine = _update_between(previous, current, before)
            return cosine
        self._update, _ = _update_between(previous, current, None)
        return _merged_cosine(model, previous, previous - before)

    def grow(self, values: ParameterVector) -> None:
        """Takes in further parameters, which have had these values all the while and no update."""
        grown = offloaded(values)
        if self._previous is not None:
            self._previous = _joined(self._previous, grown)
        if self._update is not None:
            self._update = _joined(self._update, grown.map(torch.zeros_like).map(_halved))

    def vectors(self) -> dict[str, ParameterVector]:
        """What is held, by name, for :meth:`load` after a resume."""
        held = {"previous": self._previous, "update": self._update}
        return {name: vector for name, vector in held.items() if vector is not None}

    def load(self, vectors: dict[str, ParameterVector]) -> None:
        """Takes up what :meth:`vectors` gave."""
        self._previous, self._update = (
            offloaded(vectors[name]) if name in vectors else None for name in ("previous", "update")
        )


def _update_between(
    previous: ParameterVector, current: ParameterVector, before: ParameterVector | None
) -> tuple[ParameterVector, float | None]:
    """An update, halved, and its cosine with the one before; whole it is held of one tensor at a time."""
    current.space.require_same(previous.space)
    halved, dots = {}, []
    for name, tensor in current.items():
        update = tensor - previous[name]
        halved[name] = _halved(update)
        if before is not None:
            pairs = ((update, before[name]), (update, update), (before[name], before[name]))
            dots.append([reduce_tensors([one], torch.dot, [other])[0] for one, other in pairs])
    inner, *squares = map(math.fsum, zip(*dots, strict=True)) if dots else (0.0, 0.0)
    scale = math.prod(map(math.sqrt, squares))
    return ParameterVector(current.space, halved), inner / scale if scale else None


def _merged_cosine(model: nn.Module, previous: ParameterVector, earlier: ParameterVector) -> float | None:
    """Cosine of the merged weights' last two updates, with the memory of a few tensors at a time."""
    sums = [0.0, 0.0, 0.0]
    places = [changes_in(model, BaseParameters(vector, copy=False)) for vector in (previous, earlier)]
    for last, both in zip(*places, strict=True):
        pairs = [last.delta, both.delta - last.delta]
        for index, (one, other) in enumerate(((0, 1), (0, 0), (1, 1))):
            sums[index] += reduce_tensors([pairs[one]], torch.dot, [pairs[other]])[0]
    scale = math.sqrt(sums[1] * sums[2])
    return sums[0] / scale if scale else None


def _halved(tensor: Tensor) -> Tensor:
    return tensor.bfloat16() if tensor.element_size() > 2 else tensor


def _joined(first: ParameterVector, second: ParameterVector) -> ParameterVector:
    return ParameterVector(first.space.joined(second.space), {**first, **second})


def offloaded(vector: ParameterVector) -> ParameterVector:
    """The vector on the CPU; sharded tensors stay on their mesh's device, which they cannot leave."""
    return vector.map(lambda tensor: tensor if is_sharded(tensor) else tensor.cpu())


def weight_change(model: nn.Module, base: Base, *, space: str = "merged") -> WeightChange:
    r"""Measures the change of every parameter since the base.

    .. math:: \Delta = \theta_t - \theta_0, \qquad \text{relative change} = \lVert\Delta\rVert / \lVert\theta_0\rVert

    Sums are accumulated in float64 over all shards; one tensor's change is held at a time.

    Args:
        model: The model as it is now.
        base: What it is compared with: anything that :func:`~lightning_goldy.core.base.base_of` takes.
        space: Of a model with adapters ``merged``, the change of the weights that they come to, or ``adapters``.

    Returns:
        Norms by tensor and the histogram of the elements' changes.

    Raises:
        ValueError: A parameter is no longer finite; it is named. Or the space is unknown.
        AdapterError: The merged weights of a layer cannot be told.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> base = ParameterVector.of(layer)
        >>> _ = layer.weight.data[0, 0].add_(0.25)
        >>> change = weight_change(layer, base)
        >>> round(change.delta_norm, 6), change.unchanged
        (0.25, 1)
    """
    model = inside_parallel(model)
    columns = []
    bins = (_HIGHEST - _LOWEST) * _PER_DECADE
    counts = torch.zeros(bins + 1, dtype=torch.int64)
    precision, rounded = low_precision(model), torch.zeros(2, dtype=torch.float64)
    chosen = chosen_space(model, space)
    experts = _expert_counts(model, chosen)
    for name, before, delta in changes_in(model, base_within(base, model, space), space):
        stacked = name in experts
        squares = [_squares(tensor, stacked=stacked) for tensor in (before, delta)]
        rows = expert_names([name], experts)
        for row, square, changed in zip(rows, *squares, strict=True):
            if not math.isfinite(changed):
                raise ValueError(f"{row} has changed to values that are not finite")
            columns.append((row, delta.numel() // len(rows), math.sqrt(square), math.sqrt(changed)))
        counts += sum_over_shards([log_histogram(local(delta))], [delta])[0].cpu()
        if precision is not None:
            rounded += sum_over_shards([rounding_of(before, delta, precision)], [delta])[0].cpu()
    names, numel, base_norms, delta_norms = zip(*columns, strict=True)
    return WeightChange(
        names=names,
        numel=numel,
        base_norms=base_norms,
        delta_norms=delta_norms,
        edges=tuple(_LOWEST + index / _PER_DECADE for index in range(bins + 1)),
        counts=tuple(counts[:bins].tolist()),
        unchanged=int(counts[bins]),
        space=chosen,
        rounding=None if precision is None else precision | _floor(rounded, base_norms, sum(numel) - int(counts[bins])),
    )


def _floor(rounded: Tensor, base_norms: Sequence[float], changed: int) -> dict[str, float]:
    square, lost = rounded.tolist()
    size = math.hypot(*base_norms)
    return {"relative_change": math.sqrt(square) / size if size else 0.0, "lost_share": lost / max(changed, 1)}


def _expert_counts(model: nn.Module, space: str | None) -> dict[str, int]:
    counts = expert_counts(model)
    return {merged_name(name) if space == "merged" else name: count for name, count in counts.items()}


def _squares(tensor: Tensor, *, stacked: bool) -> list[float]:
    """Squared norm of a tensor, of stacked experts that of each."""
    return reduce_rows(tensor, lambda x: x @ x) if stacked else reduce_tensors([tensor], lambda x: x @ x)


def change_inside(model: nn.Module, base: Base, mask: ParameterMask) -> float | None:
    r"""Share of :math:`\lVert\Delta\rVert^2` that lies inside a mask, a fraction; None when nothing has changed.

    Args:
        model: The model as it is now.
        base: What it is compared with.
        mask: On any device; its parameters must be among the base's.
    """
    model = inside_parallel(model)
    inside = total = 0.0
    for name, _, delta in base_of(base, model).changes(model):
        total += reduce_tensors([delta], lambda x: x @ x)[0]
        if name in mask.space:
            marked = scatter_like(delta, gather(mask[name]))
            inside += reduce_tensors([delta], lambda x, m: (x * x) @ m, [marked])[0]
    return inside / total if total else None


def log_histogram(delta: Tensor) -> Tensor:
    """Counts by log10 of the absolute value, four bins a decade; the last entry counts exact zeros.

    Example:
        >>> counts = log_histogram(torch.tensor([0.0, 1e-3, 1e-3]))
        >>> int(counts[-1]), int(counts.max())
        (1, 2)
    """
    bins = (_HIGHEST - _LOWEST) * _PER_DECADE
    counts = torch.zeros(bins + 1, dtype=torch.int64, device=delta.device)
    flat = delta.reshape(-1)
    for start in range(0, flat.numel(), _CHUNK):
        size = flat[start : start + _CHUNK].abs()
        index = size.log10().sub_(_LOWEST).mul_(_PER_DECADE).floor_().clamp_(0, bins - 1)
        index[size == 0] = bins
        counts += torch.bincount(index.long(), minlength=bins + 1)
    return counts


Directions = dict[str, tuple[Tensor, ...]]
"""Singular directions and values of the base by tensor, and what its null is told from."""
_COLUMNS = (
    "relative_change",
    "stable_rank",
    "effective_rank",
    "histogram_drift",
    "alignment_over_chance",
    "intruder_share",
    "intruder_share_null",
    "intruder_share_null_rank",
)
# Base directions that the present weight's are compared with, as a multiple of those, where not all are computed.
_COMPARED = 4
# Those that a changed weight's are looked for from, as a multiple likewise; the largest residual of what is found so,
# over that of the base's, and as a fraction of the values.
_STARTING, _WORSE, _NEAR = 2, 1.5, 1e-2
# The spectral norm of a change that leaves directions where they are, as a fraction of the gap below them.
_GENTLE = 0.1
_PIECE = 4096  # rows in float64 at a time


@dataclass(frozen=True)
class ParameterDistributionResult(AnalysisResult):
    r"""One row per tensor, of stacked experts one per expert, in the space's order.

    Args:
        rows: Of each tensor: ``name``, ``block``, ``kind``, ``numel``; ``base_norm`` and ``delta_norm``;
            ``relative_change``, \|Delta\| / \|base\| (None where the base is zero); ``histogram_drift``, the
            Jensen-Shannon divergence between the histograms of its elements now and in the base (nats, at most log 2).
            Of matrices that changed also ``singular_values``, the largest of Delta; ``stable_rank``, \|Delta\|_F^2 /
            \|Delta\|_2^2; ``effective_rank``, the exponential of the entropy of the normalised singular values (None
            where only the largest were computed); ``singular_value_error``, how near a singular value lies to each of
            the largest at least, as a fraction of it (0 where all were computed; those below 4 machine epsilons of the
            largest are rounding, and have none); ``alignment``, the share of
            \|Delta\|_F^2 that lies between the base's top left and right singular directions, ``alignment_chance``,
            what a random Delta would have, and ``alignment_over_chance`` (of other tensors None); ``exact``, whether
            all singular values were computed. Where intruders are looked for also ``resemblances``, of each of the
            present weight's leading left singular vectors the largest cosine with any of the base's (where not all of
            those were computed, with any of the leading ones: a lower bound); ``intruders``, how many of them are below
            the threshold, ``intruder_share``, that divided by their number, and ``intruder_share_null``, what a random
            change of the same norm makes (of LoRA one of the adapters' rank). Where few directions hold the change
            (``change_rank``: so many hold 99.99 % of \|Delta\|_F^2, less than half of the smaller side)
            ``intruder_share_null_rank`` is what one of the same norm and that rank makes; else both are None, as where
            the singular values that were computed hold less.
        top: Number of singular values and directions.
        space: ``merged`` or ``adapters``; None of a model without adapters.
    """

    analysis: ClassVar[str] = "parameter_distribution"

    rows: tuple[dict[str, Any], ...]
    top: int
    space: str | None = None

    def metrics(self) -> dict[str, float | None]:
        """Of the model and by block: the relative change, and means weighted by the tensors' elements."""
        metrics: dict[str, float | None] = {}
        for column in _COLUMNS:
            metrics[column] = self.whole(column)
            metrics |= {f"{column}/{block}": value for block, value in self.by_block(column).items()}
        return metrics

    def details(self) -> dict[str, Any]:
        """The tensors' rows."""
        return {"tensors": list(self.rows), "top": self.top, **_told(self.space)}

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
        """As :meth:`by_block`, of all tensors together; None where no tensor has it."""
        return _pooled(self.rows, column)


def parameter_distribution(
    model: nn.Module,
    base: Base,
    *,
    top: int = 8,
    exact_below: int | None = 256,
    seed: int = 0,
    space: str = "merged",
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
    directions: Directions | None = None,
    intruders_below: float | None = 0.5,
) -> ParameterDistributionResult:
    r"""Describes the change :math:`\Delta = \theta_t - \theta_0` of every tensor.

    Of LoRA singular values are exact whatever the size: those of B A come from QR decompositions of both factors.
    Others come from the eigenvalues of the smaller Gram matrix in float64 where its side is at most
    ``exact_below``, and above from a randomised decomposition: with orthonormal Q of the range of

    .. math:: [A \Omega, \; (A A^T) A \Omega, \; \dots, \; (A A^T)^4 A \Omega], \qquad
        A \approx Q (Q^T A) = U \Sigma V^T

    whose values are never above the true ones, and whose residual :math:`\|A v_i - \sigma_i u_i\| / \sqrt2` bounds how
    far the nearest singular value of A is from :math:`\sigma_i`. Of a matrix of independent elements, the hardest
    case, the largest value comes out within 1 % and the others of the top 8 within 2 %; a change with a few strong
    directions is found to rounding. An intruder is one of the ``top`` left singular vectors (of the rows' side) of the
    present weight that resembles none of the base's,

    .. math:: \max_i |\langle u^0_i, u_j \rangle| < \tau

    whose directions are looked for from the base's and the change's own where what these leave is weaker, beside those
    that a random change makes, and where the change itself has low rank, as one of merged adapters, a
    random one of that rank: its few directions are strong, and so make intruders where full rank makes none. On several
    replicas the tensors are shared out; sharded tensors are gathered one at a time. Every rank must call.

    Args:
        model: The finetuned model, plain or sharded.
        base: Its parameters before: anything that :func:`~lightning_goldy.core.base.base_of` takes.
        top: Singular values and directions to keep.
        exact_below: Largest smaller side of a matrix whose whole spectrum is computed; None computes it of all.
        seed: Of the randomised decomposition.
        space: Of a model with adapters ``merged``, the change of the weights that they come to, or ``adapters``.
        progress: Called with (tensors done, tensors in all) on this rank.
        split_over_ranks: Whether to share tensors out over the ranks of an initialised process group.
        directions: The base's singular directions by tensor, which are taken from here and, where they lack, put here;
            to be used again with the same base and the same other arguments alone.
        intruders_below: Cosine below which a direction resembles another no more; None looks for no intruders.

    Returns:
        One row per tensor.

    Raises:
        ValueError: ``top`` or ``exact_below`` is below 1, ``intruders_below`` outside (0, 1), or the space is unknown.
        SpaceError: The base is of another model.
        AdapterError: The merged weights of a layer cannot be told.

    Source: stable rank: Rudelson and Vershynin 2007; effective rank: Roy and Vetterli 2007; randomised decomposition:
    Halko, Martinsson and Tropp 2011, algorithm 4.4, and Musco and Musco 2015 (all powers in the basis); Delta's
    directions: Hu et al. 2022 ("LoRA"), section 7.3; intruders: Shuttleworth et al. 2024, arXiv 2410.21228,
    algorithm 1, which has no null.

    Example:
        >>> layer = nn.Linear(4, 4, bias=False)
        >>> base = ParameterVector.of(layer)
        >>> _ = layer.weight.data.add_(torch.outer(torch.ones(4), torch.arange(4.0)))
        >>> round(parameter_distribution(layer, base).rows[0]["stable_rank"], 4)
        1.0
    """
    model = inside_parallel(model)
    check_distribution_arguments(top, exact_below, intruders_below)
    known: Directions = {} if directions is None else directions
    settings = _Settings(top, exact_below, seed, intruders_below)
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    rows: list[tuple[int, list[dict[str, Any]]]] = []
    chosen = chosen_space(model, space)
    experts = _expert_counts(model, chosen)
    with exact_products(next(model.parameters()).device), replicas.together("parameter_distribution"):
        start = base_within(base, model, space)
        total = len(start.space.names)
        for index, change in enumerate(changes_in(model, start, space)):
            # Shards are gathered by all; of replicas each takes its own tensors.
            if is_sharded(change.delta) or index % replicas.size == replicas.rank:
                before, delta = gather(change.base), gather(change.delta)
                names = expert_names([change.name], experts)
                slices = zip(before, delta, strict=True) if change.name in experts else [(before, delta)]
                parts = zip(names, slices, strict=True)
                factors = change.factors if isinstance(change, LowRankChange) else None
                found = [_row(name, *part, settings, known, factors) for name, part in parts]
                rows.append((index, found))
            if progress is not None:
                progress(index + 1, total)
        if progress is not None:
            progress(total, total)  # adapters of one layer are one change
    whole = dict(pair for part in replicas.gather_objects(rows) for pair in part)
    return ParameterDistributionResult(tuple(row for index in sorted(whole) for row in whole[index]), top, chosen)


def check_distribution_arguments(top: int, exact_below: int | None, intruders_below: float | None = None) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: An argument is out of range.
    """
    require_at_least("top", top, 1)
    if exact_below is not None:
        require_at_least("exact_below", exact_below, 1)
    if intruders_below is not None and (isinstance(intruders_below, str) or not 0 < intruders_below < 1):
        raise ValueError(f"intruders_below is a cosine in (0, 1), or None; got {intruders_below}")


@dataclass(frozen=True)
class _Settings:
    top: int
    exact_below: int | None
    seed: int
    intruders_below: float | None


def _row(
    name: str,
    base: Tensor,
    delta: Tensor,
    settings: _Settings,
    known: Directions,
    factors: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Any]:
    size, changed = (math.sqrt(square) for square in reduce_tensors([base, delta], lambda x: x @ x))
    present = base + delta
    row = tensor_rows([name], numel=[base.numel()])[0] | {
        "base_norm": size,
        "delta_norm": changed,
        "relative_change": norm_ratio((changed,), (size,)),
        "histogram_drift": histogram_drift(base, present),
        "alignment_over_chance": None,
    }
    if base.ndim < 2 or min(base.shape) < 2 or not changed:
        return row
    matrix, before = delta.reshape(len(delta), -1), base.reshape(len(base), -1)  # [out, in ...] -> [out, in]
    small = settings.exact_below is None or min(matrix.shape) <= settings.exact_below
    if name not in known:
        known[name] = _base_directions(before, settings, name, exact=small)
    left, right, *_ = known[name]
    spectrum, leads, error = _spectrum(matrix, settings, name, factors, exact=small)
    exact = small or factors is not None
    inside = (left.t() @ matrix.to(left) @ right).double()  # [top, top]
    alignment, chance = float(inside.square().sum()) / changed**2, left.shape[1] ** 2 / matrix.numel()
    row |= {
        "singular_values": tuple(spectrum[: settings.top].tolist()),
        "singular_value_error": error,
        "stable_rank": changed**2 / float(spectrum[0]) ** 2,
        "effective_rank": effective_rank(spectrum) if exact else None,
        "alignment": alignment,
        "alignment_chance": chance,
        "alignment_over_chance": alignment / chance,
        "exact": exact,
    }
    if settings.intruders_below is None or not size:
        return row
    given = None if factors is None else factors[0].shape[1]
    rank = rank_of(spectrum, changed, min(matrix.shape)) if given is None else given
    sought = _Sought(name, before, known, settings, exact=small)
    lead = None if leads is None else (leads, float(spectrum[-1]))
    # Of adapters the rank is known, and the null has it anyhow.
    return row | sought.intruders(present.reshape(before.shape), changed, rank, lead=lead, null_rank=given)


def _spectrum(
    matrix: Tensor, settings: _Settings, name: str, factors: tuple[Tensor, Tensor] | None, *, exact: bool
) -> tuple[Tensor, Tensor | None, float]:
    """Singular values of a change, its leading left directions where only these are looked for, and their error."""
    if factors is not None:
        return product_spectrum(*factors), None, 0.0
    if exact:
        return spectrum_of(matrix), None, 0.0
    found = leading_directions(matrix, settings.top, f"{name}/delta", settings.seed, exact=False)
    return found[0], found[1], found[3]


@dataclass(frozen=True, eq=False)
class _Sought:
    """Leading directions of one tensor after changes, and how much each resembles one of the base's."""

    name: str
    before: Tensor
    known: Directions
    settings: _Settings
    _: KW_ONLY
    exact: bool

    def intruders(
        self, now: Tensor, norm: float, rank: int | None, *, lead: tuple[Tensor, float] | None, null_rank: int | None
    ) -> dict[str, Any]:
        """The columns of a row that tell how many resemble none, and how many do so by chance.

        Args:
            now: The base and its change.
            norm: The change's Frobenius norm.
            rank: How many directions hold it, None where few do not.
            lead: As for :meth:`after`.
            null_rank: Of the random change of the same norm; None for all of it.
        """
        ranks = (null_rank,) if rank is None or null_rank is not None else (null_rank, rank)
        own, *chances = self.after(now, lead), *(self.by_chance(norm, of) for of in ranks)
        threshold = self.settings.intruders_below or 0.0
        below, *by_chance = (sum(value < threshold for value in cosines) for cosines in (own, *chances))
        return {
            "resemblances": own,
            "intruders": below,
            "intruder_share": below / len(own),
            "intruder_share_null": by_chance[0] / len(chances[0]),
            "change_rank": rank,
            "intruder_share_null_rank": None if rank is None else by_chance[-1] / len(chances[-1]),
        }

    def after(self, present: Tensor, lead: tuple[Tensor, float] | None = None) -> tuple[float, ...]:
        """The most that each of a present weight's resembles one of the base's.

        From the directions of the base and of the change, where no other can be among the leading ones: what both
        leave has a norm below theirs.

        Args:
            present: The base and its change.
            lead: The change's own leading left directions, and the least of their values, if they are known.
        """
        top, (_, _, compared, values, before) = self.settings.top, self.known[self.name]
        start = _STARTING * top
        if lead is not None and not self.exact and compared.shape[1] > start:
            leads, least = lead
            found, left, _, error = refined_directions(present, torch.cat([compared[:, :start], leads], dim=1), top)
            near = max(_NEAR, _WORSE * float(before))
            if error <= near and float(found[-1]) > float(values[start]) + least:
                return tuple(resemblances(left, compared))
        _, left, _, _ = leading_directions(present, top, f"{self.name}/present", self.settings.seed, exact=self.exact)
        return tuple(resemblances(left, compared))

    def by_chance(self, norm: float, rank: int | None) -> tuple[float, ...]:
        """The same after a random change of a norm and a rank.

        A gentle one of full rank is told from its products with what the base's directions lead to, made once.
        """
        top, (_, _, compared, values, _) = self.settings.top, self.known[self.name]
        start, sides = _STARTING * top, self.before.shape
        gap = float(values[top - 1] - values[start]) if not self.exact and compared.shape[1] > start else 0.0
        # The spectral norm of independent normals, of which all together have norm 1.
        spectral = sum(side**-0.5 for side in sides)
        if rank is not None or norm * spectral > _GENTLE * gap:
            change = _random_change(self.before, self.name, self.settings.seed, rank).to(self.before)
            # In place, for it may be the largest tensor of the model.
            return self.after(change.mul_(norm).add_(self.before))
        if (place := f"{self.name}/null") not in self.known:
            self.known[place] = _null_products(self.before, place, self.settings.seed, compared, start)
        base, mixed, chance, held, moved = self.known[place]
        squares, inner = torch.linalg.eigh(base + norm * mixed + norm**2 * chance)
        cosines = (held + norm * moved) @ inner / squares.clamp(min=1e-300).sqrt()
        return tuple(cosines.abs().amax(dim=0).flip(0)[:top].tolist())


def _null_products(base: Tensor, name: str, seed: int, compared: Tensor, start: int) -> tuple[Tensor, ...]:
    r"""What the leading directions of :math:`W_0 + c E` follow from for every small c, float64, E random of norm 1.

    .. math:: Q = \mathrm{orth}[W_0^T U_0, E^T U_0], \qquad
        \|(W_0 + c E) Q\|^2 = Q^T W_0^T W_0 Q + c \, (\dots) + c^2 Q^T E^T E Q

    Of E, whose elements are independent normals, only what these products ask for is drawn: :math:`U_0^T E`, and, as Q
    follows from it, independent normals in the place of the rest of :math:`E Q`; its norm from both, and a chi-square
    variable for what is left.
    """

    def normals(rows: int, columns: int, part: str) -> Tensor:
        return fill_direction_(torch.empty(rows, columns, dtype=torch.float32), f"{name}/{part}", seed).to(base)

    leads, (rows, columns) = compared[:, :start].to(base), base.shape
    along = normals(columns, start, "along")
    basis = torch.linalg.qr(torch.cat([(leads.t() @ base).t(), along], dim=1)).Q  # [columns, n]
    beside = normals(rows, basis.shape[1], "beside")
    beside -= leads @ (leads.t() @ beside)
    left = (rows - start) * (columns - basis.shape[1])
    square = left + math.sqrt(2 * left) * float(normals(1, 1, "norm"))
    square += sum(float(part.double().square().sum()) for part in (along, beside))
    held, moved = (base @ basis).double(), (leads @ (along.t() @ basis) + beside).double() / math.sqrt(square)
    mixed, wide = held.t() @ moved, compared.double().t()
    return held.t() @ held, mixed + mixed.t(), moved.t() @ moved, wide @ held, wide @ moved


def _base_directions(matrix: Tensor, settings: _Settings, name: str, *, exact: bool) -> tuple[Tensor, ...]:
    """The base's top left and right directions, the left ones that others are compared with, and the values."""
    top, dtype = settings.top, precise(matrix).dtype
    count = top if settings.intruders_below is None else min(matrix.shape) if exact else _COMPARED * top
    values, left, right, error = leading_directions(matrix, count, name, settings.seed, exact=exact)
    # A direction in which the base does nothing is none of its own, and only rounding tells which one it is.
    own = values > 1e-6 * values[:1]
    return left[:, :top].to(dtype), right[:, :top].to(dtype), left[:, own].to(dtype), values, torch.tensor(error)


def _random_change(matrix: Tensor, name: str, seed: int, rank: int | None) -> Tensor:
    """A random matrix of norm 1, of a matrix's shape and of a rank; a function of seed and name."""

    def gaussian(rows: int, columns: int, side: str) -> Tensor:
        return fill_direction_(torch.empty(rows, columns, dtype=torch.float32), f"{name}/null{side}", seed)

    if rank is None:
        change = gaussian(matrix.shape[0], matrix.shape[1], "")
    else:
        change = gaussian(matrix.shape[0], rank, "/left") @ gaussian(matrix.shape[1], rank, "/right").t()
    return change.to(matrix.device).div_(change.norm().item())


def resemblances(directions: Tensor, base: Tensor) -> list[float]:
    r"""Of each direction the largest absolute cosine with any of the base's.

    Args:
        directions: Unit columns, shape ``[rows, n]``.
        base: Unit columns, shape ``[rows, m]``.

    Example:
        >>> resemblances(torch.eye(3)[:, 1:], torch.eye(3)[:, :2])
        [1.0, 0.0]
    """
    # A piece at a time: of an embedding whole copies take longer than the products.
    pieces = zip(base.split(_PIECE), directions.split(_PIECE), strict=True)
    products = torch.stack([own.double().t() @ other.double() for own, other in pieces])
    return [float(value) for value in products.sum(dim=0).abs().amax(dim=0)]


def _pooled(rows: Sequence[dict[str, Any]], column: str) -> float | None:
    if column == "relative_change":
        return norm_ratio([row["delta_norm"] for row in rows], [row["base_norm"] for row in rows])
    having = [row for row in rows if row.get(column) is not None]
    weight = sum(row["numel"] for row in having)
    return sum(row[column] * row["numel"] for row in having) / weight if weight else None
