"""Golden parameters: the elements that sample after sample depends on most."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from lightning_goldy.analysis.ballot import Ballot, Scope
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.analysis.scores import SCORES
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import block_of, kind_of, suggestion
from lightning_goldy.core.objective import CausalLMObjective, Objective, map_batch
from lightning_goldy.core.sharding import Replicas, gather
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import Kind
from lightning_goldy.core.vector import ParameterVector, require_finite


@dataclass(frozen=True)
class GoldenResult(AnalysisResult):
    """Which parameters are golden, and how many would be by chance.

    Args:
        mask: True where golden; boolean, on the CPU.
        golden: Golden elements of each tensor, in the mask's order.
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

    mask: ParameterVector
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
        """The summary."""
        return self.summary()

    def vectors(self) -> dict[str, tuple[ParameterVector, Kind]]:
        """The mask."""
        return {"mask": (self.mask, "mask")}

    def summary(self) -> dict[str, Any]:
        """A JSON-able description without the mask: the settings, and counts by tensor."""
        rows = zip(self.mask.space.names, self.mask.space.shapes, self.marked, self.golden, self.chance, strict=True)
        return {
            "top_k_percent": self.top_k_percent,
            "score": self.score,
            "scope": self.scope,
            "quorum": self.quorum,
            "n_samples": self.n_samples,
            "tensors": [
                {
                    "name": name,
                    "block": block_of(name),
                    "kind": kind_of(name),
                    "numel": math.prod(shape),
                    "k": marked,
                    "golden": golden,
                    "chance": chance,
                }
                for name, shape, marked, golden, chance in rows
            ],
        }


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

    Args:
        model: A plain, DistributedDataParallel-unwrapped, or FSDP2-sharded module.
        batches: Batches that the objective understands, of any size; the same on every rank.
        objective: What to differentiate; next-token prediction by default.
        top_k_percent: Share that each sample marks, percent in (0, 100]: exactly k elements, ties to the smaller index.
        score: Name of a registered score: ``gradient`` |g|, ``taylor`` |g θ|, ``fisher`` g² θ², or a user's own.
        scope: Mark the share of each ``tensor``, or of all elements together (``global``).
        quorum: Share of the samples that must mark an element, a fraction in (0, 1]; 1 is the intersection.
        n_samples: Use only the first so many samples; all by default.
        space: Which parameters; all trainable ones by default.
        progress: Called with (samples done, samples in all) on this rank.
        split_over_ranks: Whether to share samples out over the ranks of an initialised process group.

    Returns:
        The mask with its counts, tensor by tensor.

    Raises:
        ValueError: An argument is out of range, there are too few samples, a weight or a gradient is not finite (the
            tensor is named), or a parameter never received a gradient.

    Source: "golden parameters" as the intersection of per-sample top-k gradient masks; chance overlap k^n.

    Example:
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> batch = (torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.1, 0.0]]), torch.tensor([0, 0]))
        >>> result = golden_parameters(nn.Linear(3, 2), [batch], ClassifierObjective(), top_k_percent=34)
        >>> result.mask["weight"].any(dim=0).tolist()
        [True, False, False]
    """
    check_arguments(score, scope, quorum, n_samples)
    objective = objective or CausalLMObjective()
    space = space or ParameterSpace.of(model)
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    with preserved(model), replicas.together("golden_parameters"):
        samples = _first_samples(batches, objective, n_samples)
        parameters = space.resolve(model)
        require_finite(parameters, "weights")
        ballot = Ballot(parameters, top_k_percent, score, scope, len(samples))
        mine = replicas.share(samples)
        device = next(iter(parameters.values())).device
        with ballot.collecting(model):
            for done, sample in enumerate(mine, 1):
                ballot.vote(objective, model, map_batch(sample, lambda tensor: tensor.to(device)))
                if progress is not None:
                    progress(done, len(mine))
    needed = max(1, math.ceil(quorum * len(samples) - 1e-9))
    golden = {name: gather(votes).cpu() >= needed for name, votes in ballot.totals(replicas).items()}
    sizes = [math.prod(shape) for shape in space.shapes]
    shares = ballot.shares()
    return GoldenResult(
        mask=ParameterVector(space, golden),
        golden=tuple(int(mask.count_nonzero()) for mask in golden.values()),
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


def jaccard(first: ParameterVector, second: ParameterVector) -> float:
    """Intersection over union of two masks; 1 when both are empty.

    Example:
        >>> space = ParameterSpace.of(nn.Linear(2, 1, bias=False))
        >>> a, b = (ParameterVector(space, {"weight": torch.tensor([row])}) for row in ([True, False], [True, True]))
        >>> jaccard(a, b)
        0.5
    """
    both = sum(first.zip_with(second, torch.logical_and).count())
    either = sum(first.zip_with(second, torch.logical_or).count())
    return both / either if either else 1.0


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
    terms = (
        math.exp(
            math.lgamma(n + 1)
            - math.lgamma(m + 1)
            - math.lgamma(n - m + 1)
            + m * math.log(p)
            + (n - m) * math.log1p(-p)
        )
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


def check_arguments(score: str, scope: str, quorum: float, n_samples: int | None) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: An argument is unknown or out of range.
    """
    SCORES[score]
    if scope not in ("tensor", "global"):
        raise ValueError(f"unknown scope {scope!r}; {suggestion(str(scope), ('tensor', 'global'))}")
    if not 0 < quorum <= 1:
        raise ValueError(f"quorum must lie in (0, 1]; got {quorum}")
    if n_samples is not None and n_samples < 1:
        raise ValueError(f"n_samples must be at least 1; got {n_samples}")
