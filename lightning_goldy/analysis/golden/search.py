"""The search for the mask whose zeroing changes the predictions most, and how its pool of candidates moves."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_goldy.analysis.divergence import Cache, check_cache
from lightning_goldy.analysis.golden.golden import SCORES
from lightning_goldy.analysis.golden.masked_divergence import MaskedModel, SharedDivergence
from lightning_goldy.core.mask import Scope
from lightning_goldy.core.registry import Registry
from lightning_goldy.core.selection import select_largest
from lightning_goldy.core.sharding import like, sum_over_shards
from lightning_goldy.core.vector import elements_in

Strategy = Callable[[int, float], float]
"""``strategy(iteration, improvement)``: the pool's size divided by the budget's, from the iteration (0, 1, ...) and the
growth of the divergence in the iteration before, nats."""


@dataclass(frozen=True)
class Search:
    """How far and from where a search goes.

    Args:
        score: Registered score of the unmasked model to start from.
        rounds: Forward and backward passes under the masked model at most; one more scores the unmasked one.
        chunk_size: Samples of one forward and backward pass, to bound the memory; the batches' own size by default.
        max_stagnant_iterations: Iterations without an improvement at the full budget, after which the search ends.
        seed: Decides the strategies that draw numbers.
        cache: Where the unmasked model's log-probabilities are kept: ``device``, ``cpu``, ``none``, or ``auto``.

    Raises:
        ValueError: A value is unknown or out of range.

    Example:
        >>> Search(rounds=0)
        Traceback (most recent call last):
        ValueError: rounds must be at least 1; got 0
    """

    score: str = "fisher"
    rounds: int = 11
    chunk_size: int | None = None
    max_stagnant_iterations: int = 5
    seed: int = 0
    cache: Cache = "auto"

    def __post_init__(self) -> None:
        SCORES[self.score]
        check_cache(self.cache, None)
        for name in ("rounds", "chunk_size", "max_stagnant_iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")


@dataclass(frozen=True)
class Fluctuation:
    """The settings that strategies share; each reads those that it names.

    Args:
        amplitude: How far the pool grows beyond the budget, a fraction of it.
        frequency: Oscillations per iteration.
        momentum: Share of its velocity that a moving pool keeps, in [0, 1).
        temperature: Of the exploration, nats: improvements far above it end the exploration.
        inflation_step: Factor of the pool after an iteration without improvement, at least 1.
        decay_factor: Factor of the pool after an improvement, or of the temperature each iteration, in (0, 1].
        max_inflation_factor: Largest pool, as a multiple of the budget, at least 1.
        min_delta: Smallest growth of the divergence that counts as an improvement, nats.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> Fluctuation(momentum=1.0)
        Traceback (most recent call last):
        ValueError: momentum must lie in [0, 1); got 1.0
    """

    amplitude: float = 0.3
    frequency: float = 0.1
    momentum: float = 0.8
    temperature: float = 1.0
    inflation_step: float = 1.2
    decay_factor: float = 0.9
    max_inflation_factor: float = 2.0
    min_delta: float = 0.01

    def __post_init__(self) -> None:
        ranges = {
            "amplitude": (self.amplitude >= 0, ">= 0"),
            "frequency": (self.frequency >= 0, ">= 0"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "temperature": (self.temperature > 0, "> 0"),
            "inflation_step": (self.inflation_step >= 1, ">= 1"),
            "decay_factor": (0 < self.decay_factor <= 1, "in (0, 1]"),
            "max_inflation_factor": (self.max_inflation_factor >= 1, ">= 1"),
            "min_delta": (self.min_delta >= 0, ">= 0"),
        }
        for name, (valid, wanted) in ranges.items():
            if not valid or not math.isfinite(getattr(self, name)):
                lie = "must lie" if wanted.startswith("in") else "must be"
                raise ValueError(f"{name} {lie} {wanted}; got {getattr(self, name)}")

    def strategy(self, name: str, seed: int = 0) -> Strategy:
        """The strategy of this name at its first iteration, kept between no more than the budget and the largest pool.

        Args:
            name: Of a registered strategy.
            seed: Decides the random ones.

        Raises:
            ValueError: The name is unknown; the valid ones are listed.

        Example:
            >>> wave = Fluctuation(frequency=0.25).strategy("adaptive_sinusoidal")
            >>> [round(wave(iteration, 0.0), 3) for iteration in range(4)]
            [1.15, 1.3, 1.15, 1.0]
        """
        factor = STRATEGIES[name](self, random.Random(seed))

        def bounded(iteration: int, improvement: float) -> float:
            value = factor(iteration, improvement)
            if not math.isfinite(value):
                raise ValueError(f"strategy {name!r} gave a pool of {value} times the budget at iteration {iteration}")
            return min(self.max_inflation_factor, max(1.0, value))

        return bounded


STRATEGIES: Registry[Callable[[Fluctuation, random.Random], Strategy]] = Registry("strategy")
register_strategy = STRATEGIES.register


@register_strategy("none")
def plain_greedy(settings: Fluctuation, generator: random.Random) -> Strategy:
    """The pool is the budget, so nothing that is masked comes out again: plain greedy growth."""
    return lambda iteration, improvement: 1.0


@register_strategy("adaptive_sinusoidal")
def adaptive_sinusoidal(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""A wave whose height follows the improvement.

    .. math:: 1 + \tfrac a2 (1 + \tanh \Delta) (1 + \sin 2 \pi f t)
    """

    def factor(iteration: int, improvement: float) -> float:
        height = settings.amplitude * (1 + math.tanh(improvement)) / 2
        return 1 + height * (1 + math.sin(2 * math.pi * settings.frequency * iteration))

    return factor


@register_strategy("momentum_based")
def momentum_based(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""A pool with inertia, which grows while the divergence does and shrinks when it stagnates.

    .. math:: v_t = \mu v_{t-1} \pm (1 - \mu), \qquad e_t = e_{t-1} + a v_t, \qquad e_0 = a
    """
    excess, velocity = settings.amplitude, 0.0

    def factor(iteration: int, improvement: float) -> float:
        nonlocal excess, velocity
        if iteration:
            push = 1.0 if improvement > settings.min_delta else -1.0
            velocity = settings.momentum * velocity + (1 - settings.momentum) * push
            excess = max(0.0, excess + settings.amplitude * velocity)
        return 1 + excess

    return factor


@register_strategy("exploration_decay")
def exploration_decay(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""Noise that cools down, and that an improvement silences.

    .. math:: 1 + 2 a u_t \, e^{-|\Delta| / T_t}, \qquad u_t \sim U(0, 1), \quad T_t = T d^t
    """

    def factor(iteration: int, improvement: float) -> float:
        cooled = settings.temperature * settings.decay_factor**iteration
        quiet = math.exp(-min(abs(improvement) / cooled, 700.0))
        return 1 + 2 * settings.amplitude * generator.random() * quiet

    return factor


@register_strategy("harmonic_oscillator")
def harmonic_oscillator(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""A damped spring around the budget, let go at the amplitude.

    .. math:: v_t = \mu v_{t-1} - (2 \pi f)^2 x_{t-1}, \qquad x_t = x_{t-1} + v_t, \qquad \text{factor} = 1 + |x_t|
    """
    place, velocity = settings.amplitude, 0.0

    def factor(iteration: int, improvement: float) -> float:
        nonlocal place, velocity
        if iteration:
            # Faster than one radian per iteration, the steps would be longer than the swing.
            stiffness = min(1.0, (2 * math.pi * settings.frequency) ** 2)
            velocity = settings.momentum * velocity - stiffness * place
            place += velocity
        return 1 + abs(place)

    return factor


@register_strategy("chaos_driven")
def chaos_driven(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""The logistic map in its chaotic regime.

    .. math:: c_t = 3.8 \, c_{t-1} (1 - c_{t-1}), \qquad \text{factor} = 1 + 2 a c_t
    """
    state = 0.1 + 0.8 * generator.random()

    def factor(iteration: int, improvement: float) -> float:
        nonlocal state
        state = 3.8 * state * (1 - state)
        return 1 + 2 * settings.amplitude * state

    return factor


@register_strategy("inflation")
def inflation(settings: Fluctuation, generator: random.Random) -> Strategy:
    """The pool inflates by a step while nothing improves, and decays towards the budget while something does."""
    size = 1 + settings.amplitude

    def factor(iteration: int, improvement: float) -> float:
        nonlocal size
        if iteration:
            improved = improvement > settings.min_delta
            size *= settings.decay_factor if improved else settings.inflation_step
            size = min(settings.max_inflation_factor, max(1.0, size))
        return size

    return factor


Mask = dict[str, Tensor]

# Share of the rounds in which the mask grows to the whole budget; in the others its elements are exchanged.
_GROWTH = 0.7
# What a pool exceeds the budget by is divided by this after an exchange that brought nothing.
_SHRINKAGE = 4
_MOST_FAILURES = 8


class Budget:
    """How many elements a mask may have, by tensor or in all, and the selections within it.

    Args:
        parameters: Name to parameter.
        top_k_percent: Share of the elements, percent in (0, 100].
        scope: The share of each ``tensor``, or of all elements together (``global``).

    Example:
        >>> budget = Budget({"a": torch.zeros(10), "b": torch.zeros(4)}, 20, "tensor")
        >>> budget.sizes(), budget.sizes(0.5), Budget({"a": torch.zeros(10), "b": torch.zeros(4)}, 20, "global").sizes()
        ([2, 1], [1, 1], [3])
    """

    def __init__(self, parameters: Mapping[str, Tensor], top_k_percent: float, scope: Scope) -> None:
        self.layouts = {name: parameter.detach() for name, parameter in parameters.items()}
        names = list(self.layouts)
        self.groups = [names] if scope == "global" else [[name] for name in names]
        """Names of the tensors that share a budget."""
        self._numels = [sum(self.layouts[name].numel() for name in group) for group in self.groups]
        self._whole = [elements_in(top_k_percent, numel) for numel in self._numels]

    def sizes(self, share: float = 1.0) -> list[int]:
        """Elements of each group at this share of the budget, rounded half up, at least one."""
        return [max(1, math.floor(share * size + 0.5)) for size in self._whole]

    def pools(self, sizes: list[int], factor: float) -> list[int]:
        """Elements of each group's pool, rounded up; at most all."""
        return [min(numel, math.ceil(factor * size - 1e-9)) for size, numel in zip(sizes, self._numels, strict=True)]

    def largest(self, scores: Mapping[str, Tensor], sizes: list[int]) -> Mask:
        """Marks exactly so many elements of each group, the largest, ties to the smaller index."""
        mask: Mask = {}
        for group, size in zip(self.groups, sizes, strict=True):
            laid_out = self.laid_out({name: scores[name] for name in group})
            mask.update(zip(group, select_largest(list(laid_out.values()), size), strict=True))
        return mask

    def reselected(self, scores: Mapping[str, Tensor], mask: Mask, sizes: list[int], pools: list[int]) -> Mask:
        """The best of a pool that holds the masked elements and the best others, exactly so many of each group.

        Args:
            scores: Larger is better; finite.
            mask: The present one.
            sizes: Elements to mark of each group.
            pools: Elements of each pool, at least the size to be marked.
        """
        # At most pool - masked others come in, so the best size - (pool - masked) of the masked stay whatever happens.
        masked = self.counts(mask)
        stay = [size - (pool - count) for size, pool, count in zip(sizes, pools, masked, strict=True)]
        inside = {name: torch.where(mask[name], score, -math.inf) for name, score in scores.items()}
        chosen = {name: torch.where(mask[name], math.inf, scores[name]) for name in scores}
        for group, count, kept in zip(self.groups, masked, stay, strict=True):
            if 0 < kept < count:
                best = select_largest([like(self.layouts[name], inside[name]) for name in group], kept)
                chosen |= {
                    name: torch.where(each, math.inf, scores[name]) for name, each in zip(group, best, strict=True)
                }
            elif kept <= 0:
                chosen |= {name: scores[name] for name in group}
        return self.largest(chosen, sizes)

    def laid_out(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's parts in the layouts of their parameters."""
        return {name: like(self.layouts[name], part) for name, part in parts.items()}

    def counts(self, mask: Mask) -> list[int]:
        """Marked elements of each group."""
        each = [mask[name].count_nonzero() for name in self.layouts]
        counts = dict(zip(self.layouts, sum_over_shards(each, list(self.layouts.values())), strict=True))
        return [sum(int(counts[name]) for name in group) for group in self.groups]


class _Valued(NamedTuple):
    mask: Mask
    value: float


@dataclass
class MaskSearch:
    r"""Zeroes a growing part of the budget, scoring anew under the partly masked model each time.

    With :math:`F(m) = \mathrm{KL}(p_\theta \,\|\, p_{\theta \odot (1 - m)})` and its gradient G at the masked weights,
    :math:`s = -G \odot \theta` is to first order what masking an element adds to F, and what unmasking one takes away.
    Each round two masks of the wanted size are tried with a forward pass: the greedy one, which only adds the best
    elements, and the best of a pool somewhat larger, in which masked elements may lose their place. The better one is
    kept. Where both lose what was reached, the step was too long for a first-order score, and the budget is filled with
    the smallest weights instead, which change next to nothing. What a pool exceeds the budget by shrinks after each
    exchange that brought nothing, and grows again after each that did.

    Args:
        masked: The model.
        divergence: Over the samples that choose.
        budget: Of the mask.
        search: How far it goes.
        fluctuation: Settings of the strategy; its ``min_delta`` is the growth that counts as an improvement.
        strategy: Name of what sizes the pool; under ``none`` the mask only grows, over all rounds.
        progress: Called with (gradient passes done, gradient passes at most).
    """

    masked: MaskedModel
    divergence: SharedDivergence
    budget: Budget
    search: Search
    fluctuation: Fluctuation
    strategy: str
    progress: Callable[[int, int], None] | None = None
    best: Mask | None = field(default=None, init=False)
    """The best mask of the whole budget so far."""
    best_divergence: float = field(default=-math.inf, init=False)
    passes: int = field(default=0, init=False)
    """Forward and backward passes made."""
    evaluations: int = field(default=0, init=False)
    """Forward passes made for themselves."""
    history: list[dict[str, Any]] = field(default_factory=list, init=False)

    def offer(self, mask: Mask) -> None:
        """Measures a mask of the whole budget by one forward pass, and keeps it if it is the best so far."""
        self._keep(self._measure(mask))

    def run(self, scores: Mapping[str, Tensor]) -> None:
        """Searches from the scores of the unmasked model until the rounds are spent or nothing improves.

        Args:
            scores: Where to start, this process's part of each tensor.
        """
        rounds, greedy = self.search.rounds, self.strategy == "none"
        pool_factor = self.fluctuation.strategy(self.strategy, self.search.seed)
        steps = rounds if greedy else max(1, math.ceil(_GROWTH * rounds))
        now = self._measure(self.budget.largest(scores, self.budget.sizes(1 / (steps + 1))))
        improvement, stagnant, failures = 0.0, 0, 0
        gain: Mask | None = None
        for step in itertools.count(1):
            spent = gain is None and self.passes == rounds
            if spent or stagnant == self.search.max_stagnant_iterations or (greedy and step > steps):
                return
            gain = self._gains(now.mask) if gain is None else gain
            sizes = self.budget.sizes(min(1.0, (step + 1) / (steps + 1)))
            factor = 1 + (pool_factor(len(self.history), improvement) - 1) / _SHRINKAGE**failures
            pools = self.budget.pools(sizes, factor)
            tried = self._try(gain, now, sizes, pools, fill=not greedy)
            # The first of equals: nothing is exchanged for nothing.
            kept = max(tried, key=lambda name: tried[name].value)
            improvement, moved = tried[kept].value - now.value, tried[kept].mask is not now.mask
            now = tried[kept]
            if step >= steps:
                stagnant = 0 if now.value - self.best_divergence > self.fluctuation.min_delta else stagnant + 1
                self._keep(now)
            self._record(tried, kept, sizes, pools, factor)
            failures = max(0, failures - 1) if moved else min(failures + 1, _MOST_FAILURES)
            gain = None if moved else gain

    def _gains(self, mask: Mask) -> Mask:
        """What masking each element adds, to first order, nats."""
        self.masked.zero(mask)
        _, gradients = self.divergence.gradients(self.masked.model, self.masked.parameters)
        self.passes += 1
        if self.progress is not None:
            self.progress(self.passes, self.search.rounds)
        values = self.masked.values
        return {name: gradient.mul_(values[name]).neg_() for name, gradient in gradients.items()}

    def _try(self, gain: Mask, now: _Valued, sizes: list[int], pools: list[int], *, fill: bool) -> dict[str, _Valued]:
        grows = self.budget.counts(now.mask) != sizes
        tried = {"greedy": self._measure(self.budget.reselected(gain, now.mask, sizes, sizes)) if grows else now}
        if pools != sizes:
            tried["pool"] = self._measure(self.budget.reselected(gain, now.mask, sizes, pools))
        if fill and grows and max(each.value for each in tried.values()) < now.value:
            smallest = {name: -part.abs().to(gain[name].dtype) for name, part in self.masked.values.items()}
            tried["smallest"] = self._measure(self.budget.reselected(smallest, now.mask, sizes, sizes))
        return tried

    def _measure(self, mask: Mask) -> _Valued:
        self.masked.zero(mask)
        self.evaluations += 1
        return _Valued(mask, self.divergence(self.masked.model))

    def _keep(self, found: _Valued) -> None:
        if found.value > self.best_divergence:
            self.best, self.best_divergence = found

    def _record(
        self, tried: Mapping[str, _Valued], kept: str, sizes: list[int], pools: list[int], factor: float
    ) -> None:
        self.history.append(
            {
                "iteration": len(self.history),
                "passes": self.passes,
                "size": sum(sizes),
                "pool": sum(pools),
                "factor": factor,
                "greedy_kl": tried["greedy"].value,
                "pool_kl": tried["pool"].value if "pool" in tried else None,
                "kl": tried[kept].value,
                "kept": kept,
                "accepted": kept == "pool",
                "best_kl": self.best_divergence,
            }
        )
