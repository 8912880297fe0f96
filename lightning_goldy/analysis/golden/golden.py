"""Golden parameters: the elements that sample after sample depends on most."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import row_column_nulls
from lightning_goldy.analysis.divergence import own_share, precise
from lightning_goldy.analysis.golden.budget import (
    Budget,
    ComputedScores,
    Mask,
    counts_by_expert,
    expert_sizes,
    largest_of,
)
from lightning_goldy.analysis.gradients import (
    SharedDivergence,
    backward,
    gradient_part,
    only_these_require_gradients,
    require_gradients,
    streamed_gradients,
    taken_gradients,
    zeros_like_parts,
)
from lightning_goldy.analysis.result import AnalysisResult, Cost, tensor_rows
from lightning_goldy.core.architecture.blocks import expert_counts, expert_names
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.mask import ParameterMask, Scope, check_scope
from lightning_goldy.core.naming import Registry, require_at_least, require_number
from lightning_goldy.core.objective import Objective, objective_for
from lightning_goldy.core.pieces import random_tokens
from lightning_goldy.core.sharding import (
    Replicas,
    gather,
    is_sharded,
    like,
    local,
    sum_over_shards,
)
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import Kind
from lightning_goldy.core.tasks import labels_classes, vocabulary_of
from lightning_goldy.core.vector import ParameterVector, elements_in, require_finite

# Half the width of a 95 % interval in standard errors.
_NORMAL = 1.96
# Marks of single samples that are kept of a matrix, over all of them, and of one sample at least.
_WATCHED, _LEAST_WATCHED = 1 << 20, 1 << 12
# How many bits of a byte are set.
_BITS = np.array([number.bit_count() for number in range(256)], dtype=np.uint8)
# Marks up to which one sum is faster than sums of words.
_FEW = 1 << 16
# The change of rates, relative, at which those without a sample are fitted.
_NEARLY = 1e-5

SINGLE_SHOTS = ("gradient", "taylor", "fisher")
"""The scores that every reverse search is measured against."""

Score = Callable[[Tensor, Tensor], Tensor]
"""``score(gradient, value)``: both in at least float32, the gradient free to be overwritten; larger is stronger."""

SCORES: Registry[Score] = Registry("score")
register_score = SCORES.register


@register_score("gradient")
def gradient(gradient: Tensor, value: Tensor) -> Tensor:
    """Magnitude of the gradient, ``|g|``.

    Example:
        >>> import torch
        >>> gradient(torch.tensor([-2.0]), torch.tensor([3.0]))
        tensor([2.])
    """
    return gradient.abs_()


@register_score("taylor")
def taylor(gradient: Tensor, value: Tensor) -> Tensor:
    r"""First-order change of the loss when the element is set to zero, :math:`|g\,\theta|`."""
    return gradient.mul_(value).abs_()


@register_score("fisher")
def fisher(gradient: Tensor, value: Tensor) -> Tensor:
    r"""Squared first-order change, :math:`g^2 \theta^2`.

    Within one sample it ranks elements as ``taylor`` does, so the votes of both agree; their values differ.
    """
    return gradient.mul_(value).square_()


@dataclass(frozen=True)
class MaskResult(AnalysisResult):
    """A mask that an analysis found, with its counts by tensor; an analysis's own result adds how it was found.

    Args:
        mask: Boolean, on the CPU.
        experts: How many experts each stacked parameter holds; counts and rows are of each expert there.
    """

    mask: ParameterMask
    experts: dict[str, int] = field(default_factory=dict, kw_only=True)

    @property
    def names(self) -> tuple[str, ...]:
        """What counts are of: tensors, and single experts of a stack such as ``experts.down_proj[3]``."""
        return expert_names(self.mask.space.names, self.experts)

    def vectors(self) -> dict[str, tuple[ParameterVector, Kind]]:
        """The mask."""
        return {"mask": (self.mask, "mask")}

    def described(self, names: Iterable[str], **columns: Iterable[Any]) -> dict[str, Any]:
        """Fields by name, and of each tensor its size and the columns."""
        rows = tensor_rows(self.names, numel=expert_sizes(self.mask.space, self.experts), **columns)
        return {**{name: getattr(self, name) for name in names}, "tensors": rows}


@dataclass(frozen=True)
class GoldenResult(MaskResult):
    """Which parameters are golden, how many would be if samples shared only rows and columns, and with random tokens.

    Args:
        mask: True where golden; boolean, on the CPU.
        golden: Golden elements of each tensor (of a stack each expert), in the mask's order.
        marked: Elements of each tensor that one sample marks; its expectation at random under the global scope.
        expected: Golden elements of each tensor under the null of :func:`row_column_null`; None where there are no rows
            and columns.
        error: Of the logarithm of ``over_null``, one standard error over the samples (jackknife); None where there are
            too few of them, or nothing is golden.
        control: Golden elements of each tensor when the samples' tokens are random; None where they have none.
        control_expected: As ``expected``, with random tokens.
        shared: Elements that are golden in both, of matrices; None without a control.
        n_samples: Samples that voted.
        needed: Votes that make an element golden.
        top_k_percent: Share that each sample marked, percent.
        score: Name of the score.
        scope: ``tensor`` or ``global``.
        quorum: Share of the samples that must agree.
        cost: A forward and a backward pass of every sample, and of every one with random tokens.
    """

    analysis: ClassVar[str] = "golden_parameters"

    golden: tuple[int, ...]
    marked: tuple[int, ...]
    expected: tuple[float | None, ...]
    error: float | None
    control: tuple[int, ...] | None
    control_expected: tuple[float | None, ...] | None
    shared: int | None
    n_samples: int
    needed: int
    top_k_percent: float
    score: str
    scope: str
    quorum: float
    cost: Cost = field(default=Cost(), compare=False)

    @property
    def count(self) -> int:
        """Number of golden elements."""
        return sum(self.golden)

    @property
    def density(self) -> float:
        """Share of the space's elements that are golden, a fraction."""
        return self.count / self.mask.space.numel

    @property
    def null_count(self) -> float:
        """Golden elements of matrices that shared rows and columns explain."""
        return math.fsum(value for value in self.expected if value is not None)

    @property
    def over_null(self) -> float | None:
        """Golden elements of matrices, as a multiple of what shared rows and columns explain; None where that is 0."""
        return _over_null(self.golden, self.expected)

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of ``over_null`` over samples; None where it is not known, as where nothing is golden."""
        if not self.over_null or self.error is None:
            return None
        return self.over_null * math.exp(-_NORMAL * self.error), self.over_null * math.exp(_NORMAL * self.error)

    @property
    def shared_with_control(self) -> float | None:
        """Share of the golden elements of matrices that are golden with random tokens, too, a fraction."""
        count = _in_matrices(self.golden, self.expected)
        return None if self.shared is None or not count else self.shared / count

    def metrics(self) -> dict[str, float | None]:
        """The count against what rows and columns explain, with its interval, and against random tokens."""
        low, high = self.interval or (None, None)
        control = self.control
        return {
            "count": self.count,
            "density": self.density,
            "null_count": self.null_count,
            "over_null": self.over_null,
            "over_null_low": low,
            "over_null_high": high,
            "control_count": None if control is None else sum(control),
            "control_over_null": None if control is None else _over_null(control, self.control_expected or ()),
            "shared_with_control": self.shared_with_control,
        }

    def headline(self) -> str:
        """How many are golden, against the null and against random tokens."""
        told = f"golden parameters: {self.count:,}"
        if self.over_null is not None:
            within = "" if self.interval is None else " (95 % over samples: {:.3g} to {:.3g})".format(*self.interval)
            told += f", in matrices {self.over_null:.3g}{within} times what shared rows and columns explain"
        if self.control is not None:
            shared = self.shared_with_control
            common = "" if shared is None else f", {100 * shared:.0f} % of these among them"
            told += f"; random tokens of the same lengths give {sum(self.control):,}{common}"
        return told

    def details(self) -> dict[str, Any]:
        """A JSON-able description without the mask: the settings, and counts by tensor."""
        settings = ("top_k_percent", "score", "scope", "quorum", "n_samples")
        columns: dict[str, Any] = {"k": self.marked, "golden": self.golden, "expected": self.expected}
        return self.described(settings, **columns, **({} if self.control is None else {"control": self.control}))

    summary = details


def golden_parameters(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    top_k_percent: float = 5.0,
    score: str = "gradient",
    scope: Scope = "tensor",
    quorum: float = 1.0,
    n_samples: int | None = None,
    space: ParameterSpace | None = None,
    control: bool = True,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> GoldenResult:
    r"""Finds the elements that at least a quorum of the samples mark among their strongest.

    .. math::
        g_i = \nabla_\theta \, \overline{\log p_\theta}(\text{response}_i \mid \text{query}_i), \qquad
        \text{golden} = \Big\{ j : \tfrac1n \sum_i [\, j \in \mathrm{top}_k\, s(g_i, \theta) ] \ge \text{quorum} \Big\}

    One forward and backward pass per sample, in evaluation mode. Each gradient is turned into votes and freed as soon
    as it exists, so beside one sample's largest gradient only the votes (one or two bytes per element) are held. Two
    things stand beside the count: what shared rows and columns alone would make (:func:`row_column_null`), and the same
    for random tokens of the same lengths. The model comes back as it was. On several ranks the samples are shared out
    and the votes summed; every rank must call.
    What no sample's objective depends on is not golden, and a warning names it.

    Args:
        model: A plain, DistributedDataParallel-unwrapped, or FSDP2-sharded module.
        batches: Batches that the objective understands, of any size; the same on every rank.
        objective: What to differentiate; next-token prediction by default.
        top_k_percent: Share that each sample marks, percent in (0, 100]: exactly k elements, ties to the smaller index;
            of stacked experts k of each expert.
        score: Name of a registered score: ``gradient`` |g|, ``taylor`` |g θ|, ``fisher`` g² θ², or a user's own.
        scope: Mark the share of each ``tensor`` and expert, or of all elements together (``global``).
        quorum: Share of the samples that must mark an element, a fraction in (0, 1]; 1 is the intersection.
        n_samples: Use only the first so many samples; all by default.
        space: Which parameters; all trainable ones by default.
        control: Whether to repeat it with random tokens (:func:`random_tokens`), where samples have tokens; it doubles
            the cost.
        seed: Of the random tokens.
        progress: Called with (samples done, samples in all) on this rank.
        split_over_ranks: Whether to share samples out over the ranks of an initialised process group.

    Returns:
        The mask with its counts, tensor by tensor.

    Raises:
        ValueError: An argument is out of range, there are too few samples, a weight or a gradient is not finite (the
            tensor is named), or no parameter received a gradient.

    Source: "golden parameters" as the intersection of per-sample top-k gradient masks.

    Example:
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> batch = (torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.1, 0.0]]), torch.tensor([0, 0]))
        >>> result = golden_parameters(nn.Linear(3, 2), [batch], ClassifierObjective(), top_k_percent=34)
        >>> result.mask["weight"].any(dim=0).tolist()
        [True, False, False]
    """
    check_golden_arguments(top_k_percent, score, scope, quorum, n_samples)
    objective = objective_for(model, objective)
    space = space or ParameterSpace.of(model)
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    with preserved(model), replicas.together("golden_parameters"):
        samples = _first_samples(batches, objective, n_samples)
        drawn = _draw_samples(model, samples, seed) if control else []
        parameters = space.resolve(model)
        require_finite(parameters, "weights")
        experts = {name: count for name, count in expert_counts(model).items() if name in space}
        budget = Budget(parameters, top_k_percent, scope, experts)
        needed = max(1, math.ceil(quorum * len(samples) - 1e-9))
        polls = []
        for done, part in enumerate((samples, drawn) if drawn else (samples,)):
            ballot = Ballot(parameters, budget, score, len(samples), experts)
            with warnings.catch_warnings():
                if done:
                    # Of parameters that nothing depends on the samples have told.
                    warnings.simplefilter("ignore")
                ballot.vote_on(part, objective, model, replicas, _shifted(progress, done, 2 if drawn else 1))
                polls.append(_Poll.of(ballot, replicas, quorum, needed))
            marked = ballot.marked_by_each(space)
            # Or the votes of one set would be held until there are those of the next.
            del ballot
    poll, other = polls[0], polls[1] if drawn else None
    return GoldenResult(
        mask=ParameterMask(space, poll.golden),
        experts=experts,
        golden=counts_by_expert(poll.golden, experts),
        marked=marked,
        expected=poll.expected,
        error=poll.error,
        control=None if other is None else counts_by_expert(other.golden, experts),
        control_expected=None if other is None else other.expected,
        shared=None if other is None else poll.shared(other),
        n_samples=len(samples),
        needed=needed,
        top_k_percent=top_k_percent,
        score=score,
        scope=scope,
        quorum=quorum,
        cost=Cost(forwards=len(samples) + len(drawn), backwards=len(samples) + len(drawn)),
    )


def _draw_samples(model: nn.Module, samples: Sequence[Any], seed: int) -> list[Any]:
    """Samples of random tokens; none where one has no tokens."""
    size = vocabulary_of(model)
    if not size:
        return []
    classes = labels_classes(model)
    drawn = [random_tokens(sample, size, seed, classes=classes) for sample in samples]
    return [] if any(sample is None for sample in drawn) else drawn


def _shifted(progress: Callable[[int, int], None] | None, part: int, parts: int) -> Callable[[int, int], None] | None:
    return progress and (lambda done, total: progress(part * total + done, parts * total))


def _in_matrices(counts: Sequence[int], expected: Sequence[float | None]) -> int:
    return sum(count for count, value in zip(counts, expected, strict=True) if value is not None)


def _over_null(counts: Sequence[int], expected: Sequence[float | None]) -> float | None:
    null = math.fsum(value for value in expected if value is not None)
    return _in_matrices(counts, expected) / null if null > 0 else None


@dataclass(frozen=True, eq=False)
class _Poll:
    """What the votes of one set of samples say."""

    golden: Mask
    expected: tuple[float | None, ...]
    error: float | None

    @classmethod
    def of(cls, ballot: Ballot, replicas: Replicas, quorum: float, needed: int) -> _Poll:
        golden: Mask = {}
        expected: list[float | None] = []
        n = ballot.n_samples
        # Without each sample.
        observed, nulls = np.zeros(n), np.zeros(n)
        fewer = max(1, math.ceil(quorum * (n - 1) - 1e-9)) if n > 2 else None
        for name, laid_out in ballot.totals(replicas):
            votes = gather(laid_out).cpu()
            # NumPy compares bytes several times as fast.
            golden[name] = torch.from_numpy(votes.numpy() >= needed)
            device = local(laid_out).device
            for number, part in enumerate(votes.reshape(ballot.experts.get(name, 1), -1)):
                watched = ballot.watched.get((name, number))
                if watched is None:
                    expected.append(None)
                    continue
                watched.sum_over(replicas, device)
                rows, columns = watched.rows.sum(axis=0), watched.columns.sum(axis=0)
                null, near = row_column_nulls(rows, columns, n, needed)
                expected.append(float(null))
                if fewer is not None:
                    observed += watched.observed_without_each(part.view(watched.shape), fewer)
                    left_out = rows - watched.rows, columns - watched.columns
                    nulls += row_column_nulls(*left_out, n - 1, fewer, near=near, done=_NEARLY)[0]
        return cls(golden, tuple(expected), _jackknife(observed, nulls) if fewer is not None else None)

    def shared(self, other: _Poll) -> int:
        """Elements of matrices that are golden in both."""
        names = [name for name, mask in self.golden.items() if mask.ndim > 1]
        return sum(int((self.golden[name] & other.golden[name]).count_nonzero()) for name in names)


def _jackknife(observed: NDArray[np.float64], nulls: NDArray[np.float64]) -> float | None:
    """Standard error of the logarithm of a ratio whose values without each sample are given."""
    if not (observed > 0).all() or not (nulls > 0).all():
        return None
    logarithms, n = np.log(observed) - np.log(nulls), len(observed)
    return float(math.sqrt((n - 1) / n * ((logarithms - logarithms.mean()) ** 2).sum()))


def watched_elements(numel: int, n_samples: int) -> int:
    """Elements of a matrix whose marks by single samples are kept.

    Example:
        >>> watched_elements(1000, 16), watched_elements(1_000_000, 16)
        (1000, 65536)
    """
    count = max(_LEAST_WATCHED, _WATCHED // n_samples)
    # All of them take no longer than most of them.
    return count if numel > 2 * count else numel


class _Watched:
    """Marks of single samples at some elements of a matrix, eight side by side, and their sums over rows and columns.

    Where all elements are watched, the sums are made of the marks when all samples have voted. What the watched are for
    is which samples marked the elements that have just enough votes; how many such elements there are is known of all.
    """

    def __init__(self, name: str, shape: tuple[int, int], n_samples: int) -> None:
        self.shape = shape
        words = shape[0] * -(-shape[1] // 8)
        watched = watched_elements(shape[0] * shape[1], n_samples)
        # Which eights of elements, of rows that are filled up to whole eights; None where all of them are watched.
        self.positions: Tensor | None = None
        if watched < shape[0] * shape[1]:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            self.positions = torch.randint(words, (-(-watched // 8),), generator=generator)
        self.marks = np.zeros((n_samples, words if self.positions is None else len(self.positions)), dtype=np.uint8)
        self.rows, self.columns = (np.zeros((n_samples, length), dtype=np.int32) for length in shape)

    def add(self, index: int, mask: Tensor) -> None:
        """Takes what one sample marks."""
        matrix = mask.reshape(self.shape)
        self.marks[index] = self._packed(matrix)
        if self.positions is not None:
            self.rows[index], self.columns[index] = marks_by_row(matrix).cpu(), marks_by_column(matrix).cpu()

    def _packed(self, matrix: Tensor) -> NDArray[np.uint8]:
        """The watched of a boolean matrix, eight in a byte."""
        if self.positions is None:
            marks = matrix.cpu().numpy()
            return np.packbits(marks) if marks.shape[1] % 8 == 0 else np.packbits(marks, axis=1).reshape(-1)
        if matrix.shape[1] % 8:
            matrix = nn.functional.pad(matrix, (0, -matrix.shape[1] % 8))
        self.positions = self.positions.to(matrix.device)
        words = _words(matrix).view(-1).index_select(0, self.positions)
        return np.packbits(words.cpu().numpy().view(np.bool_))

    def sum_over(self, replicas: Replicas, device: torch.device) -> None:
        """Gathers the samples of all replicas."""
        if replicas.size > 1:
            parts = (self.marks,) if self.positions is None else (self.marks, self.rows, self.columns)
            gathered = (replicas.sum_(torch.from_numpy(part).to(device)).cpu().numpy() for part in parts)
            self.marks, self.rows, self.columns = (*gathered, self.rows, self.columns)[:3]
        if self.positions is None:
            self._add_up()

    def _add_up(self) -> None:
        """The sums over rows and columns of all samples, of which all elements are watched."""
        packed = self.marks.reshape(len(self.marks), self.shape[0], -1)  # [samples, rows, columns / 8]
        self.rows = _BITS[packed].sum(axis=2, dtype=np.int32)
        columns = np.zeros((len(packed), 8 * packed.shape[2]), dtype=np.int32)
        # In each byte of a word of eight marks 255 rows have room; not all marks are unpacked at a time.
        step = max(1, min(255, _WATCHED // columns.size))
        for start in range(0, self.shape[0], step):
            words = np.unpackbits(packed[:, start : start + step], axis=2).view(np.int64)
            columns += np.add.reduce(words, axis=1).view(np.uint8)
        self.columns = columns[:, : self.shape[1]]

    def observed_without_each(self, votes: Tensor, needed: int) -> NDArray[np.float64]:
        """Golden elements without each sample: those lose that have just enough votes, its own among them."""
        n, just = len(self.marks), votes.numpy() == needed
        enough, all_just = np.count_nonzero(votes.numpy() >= needed), np.count_nonzero(just)
        packed = self._packed(torch.from_numpy(just))
        some = np.flatnonzero(packed)
        lost = _BITS[self.marks[:, some] & packed[some]].sum(axis=1, dtype=np.float64)
        # Each of these elements was marked by so many samples; where none is watched, by any.
        lost = lost * (needed * all_just / lost.sum()) if lost.any() else np.full(n, needed * all_just / n)
        return enough - lost


def marks_by_row(marks: Tensor) -> Tensor:
    """How many are marked in each row, int32.

    Args:
        marks: Boolean, shape ``[rows, columns]``.

    Example:
        >>> marks_by_row(torch.tensor([[True, False, True], [False, False, True]])).tolist()
        [2, 1]
    """
    return _counted(marks, 1)


def marks_by_column(marks: Tensor) -> Tensor:
    """As :func:`marks_by_row`, of each column.

    Example:
        >>> marks_by_column(torch.tensor([[True, False, True], [False, False, True]])).tolist()
        [1, 0, 2]
    """
    return _counted(marks, 0)


def _counted(marks: Tensor, dim: int) -> Tensor:
    if marks.device.type != "cpu" or marks.numel() <= _FEW:
        return marks.sum(dim=dim, dtype=torch.int32)
    # NumPy sums words of eight marks several times as fast, in each of whose bytes 255 have room.
    matrix, whole = marks.numpy(), marks.shape[1] - marks.shape[1] % 8
    words, rest = matrix[:, :whole].view(np.int64), matrix[:, whole:].sum(axis=dim, dtype=np.int32)
    total = np.zeros(whole if dim == 0 else len(matrix), dtype=np.int32)
    for start in range(0, words.shape[dim], 255):
        part = words[start : start + 255] if dim == 0 else words[:, start : start + 255]
        sums = np.add.reduce(part, axis=dim).view(np.uint8)
        total += sums if dim == 0 else sums.reshape(-1, 8).sum(axis=1, dtype=np.int32)
    return torch.from_numpy(np.concatenate([total, rest]) if dim == 0 else total + rest)


def _words(marks: Tensor) -> Tensor:
    """Eight bytes as one word, shape [rows, columns / 8], whose bytes sum up side by side while none overflows."""
    flat = marks.reshape(-1)
    # A view needs words to begin where words may.
    return (flat.clone() if flat.storage_offset() % 8 else flat).view(torch.int64).view(len(marks), -1)


class Ballot:
    """Votes per element, filled while gradients are produced."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        budget: Budget,
        score: str,
        n_samples: int,
        experts: Mapping[str, int] | None = None,
    ) -> None:
        self.n_samples, self.experts = n_samples, experts or {}
        self.parameters = parameters
        self.budget, self.groups = budget, list(zip(budget.groups, budget.sizes(), budget.stacks, strict=True))
        self.score = SCORES[score]
        # A byte holds the votes of 255 samples, a short those of 32,767.
        dtype = torch.uint8 if n_samples < 256 else torch.int16 if n_samples < 32768 else torch.int32
        self.votes = {name: torch.zeros_like(local(p), dtype=dtype) for name, p in parameters.items()}
        self.seen: set[str] = set()
        self._index = 0
        self._sharded = any(map(is_sharded, parameters.values()))
        self.watched: dict[tuple[str, int], _Watched] = {}
        for name, parameter in parameters.items():
            stack = self.experts.get(name, 1)
            shape = parameter.shape[1:] if stack > 1 else parameter.shape
            if len(shape) > 1 and min(shape) > 0:
                size = (shape[0], math.prod(shape[1:]))
                self.watched |= {(name, part): _Watched(f"{name}[{part}]", size, n_samples) for part in range(stack)}

    def collecting(self, model: nn.Module) -> ExitStack:
        """Hooks that turn each gradient into votes as soon as it is complete, where that is possible.

        FSDP2 writes sharded gradients without running such hooks, and a global selection needs all gradients at once.
        """
        hooks = ExitStack()
        only_these_require_gradients(model, self.parameters)
        if self._sharded:
            return hooks
        for group, k, stack in self.groups:
            if len(group) == 1:
                hook = partial(self._mark, group, k, stack)
                hooks.callback(self.parameters[group[0]].register_post_accumulate_grad_hook(hook).remove)
        return hooks

    def vote_on(
        self,
        samples: Sequence[Any],
        objective: Objective,
        model: nn.Module,
        replicas: Replicas,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        """The votes of this rank's share of the samples."""
        parameters = list(model.parameters())
        with self.collecting(model):
            mine = replicas.share(range(len(samples)))
            for index, sample in zip(mine, own_share(samples, model, replicas, progress), strict=True):
                self.vote(objective, model, sample, index)
                for parameter in parameters:
                    parameter.grad = None
        for parameter in model.parameters():
            # A first forward pass may have put new ones in the place of the old.
            parameter.grad = None

    def marked_by_each(self, space: ParameterSpace) -> tuple[int, ...]:
        """Elements of each tensor or expert that a sample marks, or would be expected to mark at random."""
        groups = zip(self.groups, self.budget.numels, strict=True)
        shares = [k / n for (group, k, _), n in groups for name in group for _ in range(self.experts.get(name, 1))]
        sizes = expert_sizes(space, self.experts)
        return tuple(round(share * size) for share, size in zip(shares, sizes, strict=True))

    def vote(self, objective: Objective, model: nn.Module, sample: Any, index: int = 0) -> None:
        """One forward and backward pass of the sample of this number, whose gradients become votes."""
        self._index = index
        before = set(self.seen)
        self.seen.clear()
        backward(objective.log_probs(model, sample).mean())
        for group, k, stack in self.groups:
            if group[0] not in self.seen:
                self._mark(group, k, stack)
        self.seen |= before

    def _mark(self, names: Sequence[str], k: int, stack: int, hooked: Tensor | None = None) -> None:
        # A hook also hands its parameter over.
        scores = []
        for name in names:
            parameter = self.parameters[name]
            gradient, parameter.grad = parameter.grad, None
            value = precise(local(parameter))
            if gradient is None:
                part = torch.zeros_like(value)
            else:
                self.seen.add(name)
                part = self.score(gradient_part(gradient, parameter), value)
            scores.append(like(parameter, part))
        self._require_finite(names, scores)
        for name, mask in zip(names, largest_of(scores, k, stack), strict=True):
            # Booleans are bytes of 0 and 1; seen as such, the addition is vectorised.
            self.votes[name].add_(mask.view(torch.uint8))
            if (name, 0) in self.watched:
                whole, stack = gather(like(self.parameters[name], mask)), self.experts.get(name, 1)
                for number, marks in enumerate(whole.reshape(stack, -1) if stack > 1 else (whole,)):
                    self.watched[name, number].add(self._index, marks)

    def _require_finite(self, names: Sequence[str], scores: Sequence[Tensor]) -> None:
        # The largest element is NaN when any is: one pass, and no second tensor.
        parts = map(local, scores) if self._sharded else scores
        largest = [part.amax() if part.numel() else part.new_zeros(()) for part in parts]
        flags: Sequence[Tensor | bool] = [not math.isfinite(value) for value in largest]
        if self._sharded:
            # Summed over shards, so that all processes raise and none is left waiting in the selection.
            told = [torch.tensor(int(flag), device=value.device) for flag, value in zip(flags, largest, strict=True)]
            flags = sum_over_shards(told, scores)
        for name, broken in zip(names, flags, strict=True):
            if broken:
                raise ValueError(f"the gradient of {name} is not finite; its elements cannot be ranked")

    def totals(self, replicas: Replicas) -> Iterator[tuple[str, Tensor]]:
        """Votes summed over the replicas, in the layout of the parameters; each is held no longer than it is read."""
        unused = require_gradients(self.parameters, self.seen, replicas)
        for name in list(self.votes):
            votes = self.votes.pop(name)
            if name in unused:  # ties at zero are no votes
                votes.zero_()
                self.watched = {key: watched for key, watched in self.watched.items() if key[0] != name}
            # Process groups do not sum shorts.
            summable = votes.int() if votes.dtype == torch.int16 and replicas.size > 1 else votes
            yield name, like(self.parameters[name].detach(), replicas.sum_(summable))


def _first_samples(batches: Iterable[Any], objective: Objective, n_samples: int | None) -> list[Any]:
    samples: list[Any] = []
    for batch in batches:
        samples.extend(objective.samples(batch))
        if n_samples is not None and len(samples) >= n_samples:
            return samples[:n_samples]
    if not samples:
        raise ValueError("there is no sample: the batches are empty")
    if n_samples is not None:
        raise ValueError(f"n_samples={n_samples}, but the batches hold only {len(samples)} samples")
    return samples


def check_golden_arguments(top_k_percent: float, score: str, scope: str, quorum: float, n_samples: int | None) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: An argument is unknown or out of range.
    """
    require_number("top_k_percent", top_k_percent)
    elements_in(top_k_percent, 1)
    SCORES[score]
    check_scope(scope)
    require_number("quorum", quorum)
    if not 0 < quorum <= 1:
        raise ValueError(f"quorum must lie in (0, 1]; got {quorum}")
    if n_samples is not None:
        require_at_least("n_samples", n_samples, 1)


def single_shot_scores(
    model: nn.Module,
    samples: SharedDivergence,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    wanted: Sequence[str],
    *,
    value: Callable[[str], Tensor] | None = None,
) -> dict[str, Mapping[str, Tensor]]:
    r"""Sums of scores over samples, a forward and backward pass each, by name of the score.

    .. math:: \sum_i |g_i|, \qquad \sum_i |g_i \theta|, \qquad \sum_i g_i^2 \theta^2

    The last is, up to a factor, the second-order estimate of the divergence that zeroing one element causes, with the
    Fisher matrix's diagonal taken at the data's own labels. At the unmasked weights the divergence has no gradient.

    Args:
        model: The unmasked module.
        samples: The pieces, whose samples are taken one by one.
        objective: Gives the log-probabilities to differentiate.
        parameters: Name to parameter.
        wanted: Registered scores; what none of them needs is not summed. At most one is none of the three.
        value: This process's part of an unmasked weight by name; by default what the parameters are when asked.

    Returns:
        Name of a score to name of a parameter to this process's part, in at least float32; ``taylor`` and ``fisher``
        are computed from the sums when a tensor is asked for.

    Raises:
        ValueError: No parameter has received a gradient. One that the objective ignores has scores of zero.
    """
    extra = next((name for name in wanted if name not in SINGLE_SHOTS), "")
    first, second, own = (
        zeros_like_parts(parameters) if needed else {}
        for needed in ({"gradient", "taylor"} & set(wanted), "fisher" in wanted, extra)
    )
    seen: set[str] = set()
    samples.cost += Cost(forwards=samples.n_samples, backwards=samples.n_samples)

    def unmasked(name: str) -> Tensor:
        return precise(local(parameters[name]) if value is None else value(name))

    def add(name: str, gradient: Tensor) -> None:
        seen.add(name)
        if own:
            own[name] += SCORES[extra](gradient.clone(), unmasked(name))
        if second:
            second[name].addcmul_(gradient, gradient)
        if first:
            first[name] += gradient.abs_()

    with streamed_gradients(parameters, add):
        # Sample by sample, so that the scores do not depend on how samples were batched.
        for sample in (sample for piece in samples.pieces for sample in objective.samples(piece)):
            backward(objective.log_probs(model, sample).mean())
            for name, gradient in taken_gradients(model, parameters):
                add(name, gradient)
    require_gradients(parameters, seen, samples.replicas)
    for part in (*first.values(), *second.values(), *own.values()):
        samples.replicas.sum_(part)
    scores = {
        "gradient": first,
        "taylor": ComputedScores(first, lambda name: first[name] * unmasked(name).abs()),
        "fisher": ComputedScores(second, lambda name: second[name] * unmasked(name).square()),
    }
    return {name: {**scores, extra: own}[name] for name in wanted}
