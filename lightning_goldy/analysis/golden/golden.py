"""Golden parameters: the elements that sample after sample depends on most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import own_share, precise
from lightning_goldy.analysis.golden.budget import Budget, counts_by_expert, expert_sizes, largest_of
from lightning_goldy.analysis.gradients import (
    backward,
    gradient_part,
    only_these_require_gradients,
    require_gradients,
)
from lightning_goldy.analysis.result import AnalysisResult, Cost, tensor_rows
from lightning_goldy.core.architecture.experts import expert_counts, expert_names
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.mask import ParameterMask, Scope, check_scope
from lightning_goldy.core.naming import require_at_least, require_number
from lightning_goldy.core.objective import Objective, objective_for
from lightning_goldy.core.registry import Registry
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
from lightning_goldy.core.vector import ParameterVector, elements_in, require_finite

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
    """Which parameters are golden, and how many would be by chance.

    Args:
        mask: True where golden; boolean, on the CPU.
        golden: Golden elements of each tensor (of a stack each expert), in the mask's order.
        marked: Elements of each tensor that one sample marks; its expectation at random under the global scope.
        chance: Elements of each tensor expected to be golden if every sample marked at random.
        n_samples: Samples that voted.
        needed: Votes that make an element golden.
        top_k_percent: Share that each sample marked, percent.
        score: Name of the score.
        scope: ``tensor`` or ``global``.
        quorum: Share of the samples that must agree.
        cost: A forward and a backward pass of every sample.
    """

    analysis: ClassVar[str] = "golden_parameters"

    golden: tuple[int, ...]
    marked: tuple[int, ...]
    chance: tuple[float, ...]
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
    def chance_density(self) -> float:
        """Share expected if every sample marked at random, a fraction; k^n at a quorum of 1."""
        return math.fsum(self.chance) / self.mask.space.numel

    @property
    def density_over_chance(self) -> float:
        """How many times more are golden than by chance."""
        return self.density / self.chance_density if self.chance_density else math.inf

    def metrics(self) -> dict[str, float | None]:
        """Count and density, against chance."""
        names = ("count", "density", "chance_density", "density_over_chance")
        return {name: getattr(self, name) for name in names}

    def details(self) -> dict[str, Any]:
        """A JSON-able description without the mask: the settings, and counts by tensor."""
        settings = ("top_k_percent", "score", "scope", "quorum", "n_samples")
        return self.described(settings, k=self.marked, golden=self.golden, chance=self.chance)

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
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> GoldenResult:
    r"""Finds the elements that at least a quorum of the samples mark among their strongest.

    .. math::
        g_i = \nabla_\theta \, \overline{\log p_\theta}(\text{response}_i \mid \text{query}_i), \qquad
        \text{golden} = \Big\{ j : \tfrac1n \sum_i [\, j \in \mathrm{top}_k\, s(g_i, \theta) ] \ge \text{quorum} \Big\}

    One forward and backward pass per sample, in evaluation mode. Each gradient is turned into votes and freed as soon
    as it exists, so beside one sample's largest gradient only the votes (one or two bytes per element) are held. The
    model comes back as it was. On several ranks the samples are shared out and the votes summed; every rank must call.
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
        progress: Called with (samples done, samples in all) on this rank.
        split_over_ranks: Whether to share samples out over the ranks of an initialised process group.

    Returns:
        The mask with its counts, tensor by tensor.

    Raises:
        ValueError: An argument is out of range, there are too few samples, a weight or a gradient is not finite (the
            tensor is named), or no parameter received a gradient.

    Source: "golden parameters" as the intersection of per-sample top-k gradient masks; chance overlap k^n.

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
        parameters = space.resolve(model)
        require_finite(parameters, "weights")
        experts = {name: count for name, count in expert_counts(model).items() if name in space}
        ballot = Ballot(parameters, Budget(parameters, top_k_percent, scope, experts), score, len(samples))
        with ballot.collecting(model):
            for sample in own_share(samples, model, replicas, progress):
                ballot.vote(objective, model, sample)
    needed = max(1, math.ceil(quorum * len(samples) - 1e-9))
    golden = {name: gather(votes).cpu() >= needed for name, votes in ballot.totals(replicas).items()}
    sizes = expert_sizes(space, experts)
    # Of each tensor or expert, what a sample marks, or would be expected to mark at random, a fraction.
    groups = zip(ballot.groups, ballot.budget.numels, strict=True)
    shares = [k / n for (group, k, _), n in groups for name in group for _ in range(experts.get(name, 1))]
    return GoldenResult(
        mask=ParameterMask(space, golden),
        experts=experts,
        golden=counts_by_expert(golden, experts),
        marked=tuple(round(share * size) for share, size in zip(shares, sizes, strict=True)),
        chance=tuple(
            binomial_tail(len(samples), needed, share) * size for share, size in zip(shares, sizes, strict=True)
        ),
        n_samples=len(samples),
        needed=needed,
        top_k_percent=top_k_percent,
        score=score,
        scope=scope,
        quorum=quorum,
        cost=Cost(forwards=len(samples), backwards=len(samples)),
    )


class Ballot:
    """Votes per element, filled while gradients are produced."""

    def __init__(self, parameters: dict[str, nn.Parameter], budget: Budget, score: str, n_samples: int) -> None:
        self.parameters = parameters
        self.budget, self.groups = budget, list(zip(budget.groups, budget.sizes(), budget.stacks, strict=True))
        self.score = SCORES[score]
        # A byte holds the votes of 255 samples, a short those of 32,767.
        dtype = torch.uint8 if n_samples < 256 else torch.int16 if n_samples < 32768 else torch.int32
        self.votes = {name: torch.zeros_like(local(p), dtype=dtype) for name, p in parameters.items()}
        self.seen: set[str] = set()

    def collecting(self, model: nn.Module) -> ExitStack:
        """Hooks that turn each gradient into votes as soon as it is complete, where that is possible.

        FSDP2 writes sharded gradients without running such hooks, and a global selection needs all gradients at once.
        """
        hooks = ExitStack()
        only_these_require_gradients(model, self.parameters)
        if any(map(is_sharded, self.parameters.values())):
            return hooks
        for group, k, stack in self.groups:
            if len(group) == 1:
                hook = partial(self._mark, group, k, stack)
                hooks.callback(self.parameters[group[0]].register_post_accumulate_grad_hook(hook).remove)
        return hooks

    def vote(self, objective: Objective, model: nn.Module, sample: Any) -> None:
        """One forward and backward pass, whose gradients become votes."""
        before = set(self.seen)
        self.seen.clear()
        backward(objective.log_probs(model, sample).mean())
        for group, k, stack in self.groups:
            if group[0] not in self.seen:
                self._mark(group, k, stack)
        self.seen |= before
        for parameter in model.parameters():
            parameter.grad = None

    def _mark(self, names: Sequence[str], k: int, stack: int, hooked: Tensor | None = None) -> None:
        # A hook also hands its parameter over.
        scores = []
        for name in names:
            parameter = self.parameters[name]
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                part = torch.zeros_like(precise(local(parameter)))
            else:
                self.seen.add(name)
                part = self.score(gradient_part(gradient, parameter), precise(local(parameter)))
            scores.append(like(parameter.detach(), part))
        self._require_finite(names, scores)
        for name, mask in zip(names, largest_of(scores, k, stack), strict=True):
            # Booleans are bytes of 0 and 1; seen as such, the addition is vectorised.
            self.votes[name].add_(mask.view(torch.uint8))

    def _require_finite(self, names: Sequence[str], scores: Sequence[Tensor]) -> None:
        # The largest element is NaN when any is: one pass, and no second tensor.
        largest = [part.amax() if part.numel() else part.new_zeros(()) for part in map(local, scores)]
        flags: Sequence[Tensor | bool] = [not math.isfinite(value) for value in largest]
        if any(map(is_sharded, scores)):
            # Summed over shards, so that all processes raise and none is left waiting in the selection.
            parts = [torch.tensor(int(flag), device=value.device) for flag, value in zip(flags, largest, strict=True)]
            flags = sum_over_shards(parts, scores)
        for name, broken in zip(names, flags, strict=True):
            if broken:
                raise ValueError(f"the gradient of {name} is not finite; its elements cannot be ranked")

    def totals(self, replicas: Replicas) -> dict[str, Tensor]:
        """Votes summed over the replicas, in the layout of the parameters."""
        unused = require_gradients(self.parameters, self.seen, replicas)
        totals = {}
        for name, votes in self.votes.items():
            if name in unused:  # ties at zero are no votes
                votes.zero_()
            # Process groups do not sum shorts.
            summable = votes.int() if votes.dtype == torch.int16 and replicas.size > 1 else votes
            totals[name] = like(self.parameters[name].detach(), replicas.sum_(summable))
        return totals


def binomial_tail(n: int, needed: int, p: float) -> float:
    """Probability that at least ``needed`` of ``n`` independent events of probability ``p`` happen.

    Example:
        >>> binomial_tail(3, 3, 0.5), round(binomial_tail(2, 1, 0.5), 12)
        (0.125, 0.75)
    """
    if p >= 1:
        return 1.0
    if needed == n:
        return float(p**n)
    whole, happens, fails = math.lgamma(n + 1), math.log(p), math.log1p(-p)
    terms = (
        math.exp(whole - math.lgamma(m + 1) - math.lgamma(n - m + 1) + m * happens + (n - m) * fails)
        for m in range(needed, n + 1)
    )
    return min(1.0, math.fsum(terms))


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
