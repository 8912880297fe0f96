"""The volume by a bridge from a Gaussian to the true cost, or by importance sampling where that Gaussian is good."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_goldy.analysis.basin.reference import Tilt, squares
from lightning_goldy.analysis.basin.sampling import Chains, Field
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.naming import require_at_least, require_choice
from lightning_goldy.core.sharding import Replicas

Array = NDArray[np.float64]
Region = Literal["connected", "star"]

# Draws of the importance sampler: a first look, and all of them where that look is good.
_LOOK, _DRAWS = 16, 128
# Share of the draws that the weights must leave, or a chain is needed.
_EFFECTIVE = 0.25
# Below this the saddle point's Gaussian is too coarse, and the samples inside the cutoff are counted instead.
_COUNTED = 2.0
# Where the mean cost is farther from the quadratic one than this, the Gaussian is tethered closer.
_FAR = 3.0
# 97.5 % points of Student's distribution over those of the Gaussian, by chains less 1: few chains know their spread badly.
_STUDENT = {1: 6.5, 2: 2.2, 3: 1.62, 4: 1.42, 5: 1.31, 6: 1.25, 7: 1.21, 8: 1.18, 9: 1.15, 11: 1.12, 15: 1.09, 31: 1.04}


@dataclass(frozen=True)
class BridgeSettings:
    """How a bridge is walked.

    Args:
        chains: Chains, at least 2: their spread is part of the error.
        nodes: Intervals of each leg, 2, 4, 8, ...; the estimate with half of them is part of the error.
        max_gradients: Gradients of the cost in all, each of the whole probe; the best estimate within them is returned.
        region: ``connected``, all that can be reached at no more than the cost, or ``star``, what is seen from the
            anchor along straight lines.
        ray_points: Places on each line that ``star`` looks at.
        floor: Least curvature that masses are made for, as a share of the mean curvature.
        seed: Decides all noise.

    Raises:
        ValueError: A value is unknown or out of range.

    Example:
        >>> BridgeSettings(nodes=6)
        Traceback (most recent call last):
        ValueError: nodes must be a power of 2, at least 2; got 6
    """

    chains: int = 4
    nodes: int = 8
    max_gradients: int = 20_000
    region: Region = "connected"
    ray_points: int = 8
    floor: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least("chains", self.chains, 2)
        require_at_least("ray_points", self.ray_points, 1)
        require_choice("region", self.region, get_args(Region))
        if self.nodes < 2 or self.nodes & (self.nodes - 1):
            raise ValueError(f"nodes must be a power of 2, at least 2; got {self.nodes}")
        if not self.floor >= 0:
            raise ValueError(f"floor must be at least 0; got {self.floor}")
        if self.max_gradients < self.least:
            raise ValueError(
                f"max_gradients must be at least {self.least} for {self.chains} chains; got {self.max_gradients}"
            )

    @property
    def least(self) -> int:
        """Gradients that the shortest bridge takes."""
        return self.chains * 40


@dataclass(frozen=True)
class BridgeResult(AnalysisResult):
    r"""The volume of the region where a cost stays below a cutoff, with an error that covers.

    .. math:: \log V \approx \log Z(b) + b c - \tfrac12 \log(2 \pi b^2\, \mathrm{Var}_b K), \qquad
        \langle K \rangle_b = c, \qquad Z(b) = \mathbb E_{\rho}\, e^{-b K}

    Args:
        log_volume: Log-probability of the region under the Gaussian measure, nats.
        error: One standard error, nats: between chains, halves and both directions of the walk, of the schedule, and of
            the saddle point.
        method: ``bridge``, or ``importance`` where the Gaussian alone was good enough.
        weak: Why the number is not to be relied on; empty where nothing speaks against it.
        region: ``connected`` or ``star``.
        inverse_temperature: b, per nat.
        log_normaliser: log Z(b), nats.
        mean_cost: Mean cost of the samples, nats; near the cutoff.
        cost_deviation: Standard deviation of the cost, nats.
        tether: κ at the end of the Gaussian in units of 1/σ²; 1 without a tether.
        effective_sample_size: Of the importance weights, as a share of the draws.
        parts: What the error is made of, nats, by name.
        trace: Nodes of the walk: the leg, its place, κ, mean cost, mean of half the squared distance, acceptance.
        acceptance: Mean acceptance of the trajectories.
        gradients: Gradients taken, of the whole probe.
        evaluations: Costs taken without a gradient.
        chains: Their number.
        nodes: Intervals of each leg.
        dimension: D.
        sigma: Standard deviation of the measure, parameter units.
        cutoff: The cost at the region's boundary, nats.
        seed: Decides the noise.
        seconds: Wall clock.
        learning_coefficient: Of the same samples by the loss on the probe, b (<L> - L(0)); None without a loss.
        sgld: What stochastic gradient Langevin dynamics finds on the same probe; empty where it was not asked for.
        cost: Passes of the model, in samples.
    """

    analysis = "basin_bridge"

    log_volume: float
    error: float
    method: Literal["bridge", "importance"]
    weak: str
    region: Region
    inverse_temperature: float
    log_normaliser: float
    mean_cost: float
    cost_deviation: float
    tether: float
    effective_sample_size: float
    parts: dict[str, float]
    trace: list[dict[str, Any]]
    acceptance: float
    gradients: int
    evaluations: int
    chains: int
    nodes: int
    dimension: int
    sigma: float
    cutoff: float
    seed: int
    seconds: float
    learning_coefficient: float | None = None
    sgld: dict[str, float] = field(default_factory=dict)
    cost: Cost = field(default=Cost(), compare=False)

    @property
    def scaling_exponent(self) -> float:
        """d log V / d log cutoff, which at the saddle is b c."""
        return self.inverse_temperature * self.cutoff

    @property
    def bits_per_parameter(self) -> float:
        """Bits that it takes to name a point of the region, per parameter: minus the log-volume / (D log 2)."""
        return -self.log_volume / (self.dimension * math.log(2))

    def interval(self) -> tuple[float, float]:
        """95 % interval of the log-volume: 1.96 errors to either side, nats."""
        return self.log_volume - 1.96 * self.error, self.log_volume + 1.96 * self.error


class Saddle(NamedTuple):
    """A volume from the cost's moments at one inverse temperature."""

    log_volume: float
    b: float
    width: float
    """Standard deviation of b K."""
    log_normaliser: float


def saddle(log_normaliser: float, b: float, mean: float, variance: float, cutoff: float) -> Saddle:
    r"""The saddle point at a cutoff, from moments of the cost at an inverse temperature near it.

    Between the two, :math:`\langle K \rangle` is taken to be a power of b, whose exponent the variance tells.

    Args:
        log_normaliser: log Z(b), nats.
        b: Inverse temperature, per nat.
        mean: Mean cost there, nats.
        variance: Its variance.
        cutoff: c, nats.

    Example:
        >>> result = saddle(-10 * math.log(5.0), 5.0, 2.0, 0.4, 1.0)  # a gamma distribution: Z(b) = b^-10
        >>> round(result.b, 9), round(result.log_volume - (10 - 10 * math.log(10) - math.log(20 * math.pi) / 2), 9)
        (10.0, -0.0)
    """
    power = min(max(b * variance / mean, 0.05), 20.0)
    shift = math.log(mean / cutoff) / power
    # The integral of mean (b / s)^power over s, from b to b exp(shift).
    rest = 1 - power
    crossed = b * mean * (shift if abs(rest) < 1e-9 else math.expm1(rest * shift) / rest)
    b = b * math.exp(shift)
    width = math.sqrt(power * cutoff * b)
    value = log_normaliser - crossed
    return Saddle(value + b * cutoff - 0.5 * math.log(2 * math.pi) - math.log(width), b, width, value)


def counted(log_normaliser: float, b: float, costs: Array, cutoff: float) -> float:
    """The volume from the samples inside the cutoff: log Z + log mean of exp(b K) over them, nats."""
    inside = costs[costs <= cutoff]
    if not len(inside):
        return -math.inf
    top = float(b * inside.max())
    return log_normaliser + top + math.log(float(np.exp(b * inside - top).sum()) / len(costs))


def nested_rule(intervals: int) -> tuple[Array, Array, Array]:
    """Clenshaw and Curtis's rule on [0, 1]: its nodes, its weights, and those of the rule with half of the intervals.

    Example:
        >>> nodes, weights, coarse = nested_rule(4)
        >>> [round(float(rule @ nodes**2), 9) for rule in (weights, coarse)]
        [0.333333333, 0.333333333]
    """

    def weights(nodes: Array) -> Array:
        degrees = np.arange(len(nodes))
        moments = np.where(degrees % 2 == 0, 2 / (1 - degrees.astype(float) ** 2 + (degrees == 1)), 0.0)
        return np.linalg.solve(np.cos(np.outer(degrees, np.arccos(nodes))), moments) / 2

    nodes = -np.cos(np.pi * np.arange(intervals + 1) / intervals)
    coarse = np.zeros(intervals + 1)
    coarse[::2] = weights(nodes[::2])
    return (nodes + 1) / 2, weights(nodes), coarse


class _Node(NamedTuple):
    leg: Literal["cost", "tether"]
    place: float
    tilt: Tilt
    scale: float
    """What the integrand of the leg is multiplied by: the length of its interval."""


class _Visit(NamedTuple):
    """What chains found at one node; every array of shape ``[chains, trajectories]``."""

    costs: Array
    integrand: Array
    centred: Array
    """The cost with its control variate taken off."""
    distance: Array
    acceptance: float


class Bridge:
    """Walks from a Gaussian to the true cost and back.

    Args:
        cost: The field.
        tilt: At t = 0 with κ = 1/σ², any b; its curvature is the Gaussian's.
        cutoff: c, nats.
        settings: How.
        replicas: Ranks that share out the chains; the noise and the result do not depend on their number.
        progress: Called with (gradients taken, gradients in all) on this rank.
    """

    def __init__(
        self,
        cost: Field,
        tilt: Tilt,
        cutoff: float,
        settings: BridgeSettings,
        *,
        replicas: Replicas = Replicas(),  # noqa: B008 - frozen
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.field, self.cutoff, self.settings, self.replicas = cost, cutoff, settings, replicas
        self.tell = progress or (lambda done, total: None)
        mean = float(tilt.curvature.mean(dtype=torch.float64))
        self.start = tilt.at(floor=settings.floor * mean).solved(cutoff)
        self.variance = 1 / tilt.kappa
        self.numbers = replicas.share(range(settings.chains))
        self.taken = 0
        self.visits_left = 0
        self.weak: list[str] = []

    # Numbers of all chains, in their order, on every rank.
    def _all(self, mine: Tensor) -> Array:
        parts = self.replicas.gather_objects(dict(zip(self.numbers, mine.tolist(), strict=True)))
        joined = {number: value for part in parts for number, value in part.items()}
        return np.array([joined[number] for number in range(self.settings.chains)], dtype=np.float64)

    def importance(self) -> tuple[Array, Array, float]:
        """Costs and log-weights of draws of the Gaussian, and the share of them that the weights leave."""
        costs: list[Array] = []
        quadratic: list[Array] = []
        chains = self._chains()
        share = 0.0
        for wanted in (_LOOK, _DRAWS):
            while sum(map(len, costs)) < wanted:
                x = chains.noise() * self.start.precision.rsqrt() + self.start.centre
                costs.append(self._all(self.field.values(x)))
                quadratic.append(self._all(squares(x, self.start.curvature).cpu() / 2))
            weights = self.start.b * (np.concatenate(quadratic) - np.concatenate(costs))
            share = effective_share(weights)
            if share < _EFFECTIVE:
                break
        return np.concatenate(costs), np.concatenate(quadratic), share

    def _chains(self) -> Chains:
        mine = torch.empty(len(self.numbers), len(self.start.pull), device=self.start.pull.device)
        return Chains(self.field, self.numbers, self.settings.seed, mine.to(self.start.pull.dtype))

    def tether(self) -> float:
        """The smallest κ at which the Gaussian's draws cost about what it says, per squared parameter unit."""
        kappa, chains = self.start.kappa, self._chains()
        for _ in range(24):
            tilt = self.start.at(kappa=kappa)
            x = chains.noise() * tilt.precision.rsqrt() + tilt.centre
            costs = self._all(self.field.values(x)).mean()
            quadratic = self._all(squares(x, tilt.curvature).cpu() / 2).mean()
            if quadratic == 0 or 1 / _FAR <= costs / quadratic <= _FAR or tilt.b * max(costs, quadratic) < 1:
                break
            kappa *= 4
        return kappa

    def run(self) -> tuple[dict[str, Any], Chains | None]:
        """The fields of the result that a walk fills, and the chains where they ended."""
        costs, quadratic, share = self.importance()
        if share >= _EFFECTIVE:
            return self._by_importance(costs, quadratic, share), None
        self.chains = self._chains()
        kappa = self.tether()
        self.kappas = (kappa, self.start.kappa)
        self.nodes = self._affordable(kappa > self.start.kappa)
        self.chains.draw(self.start.at(kappa=kappa))
        target = self._settled(self.start.at(t=1.0))
        return self._walked(target) | {"effective_sample_size": share, "tether": kappa / self.start.kappa}, self.chains

    def _affordable(self, tethered: bool) -> int:
        """Intervals of each leg: fewer where the budget does not give each node three trajectories and steps."""
        nodes = self.settings.nodes
        while nodes > 2 and self.settings.max_gradients < 2 * self.settings.chains * 24 * nodes * (1 + tethered):
            nodes //= 2
        if nodes < self.settings.nodes:
            self.weak.append(f"max_gradients={self.settings.max_gradients} allow {nodes} intervals of each leg")
        return nodes

    def _spend(self, tilt: Tilt, trajectories: int, gradients: int, gain: float = 0.0) -> tuple[int, int]:
        """Trajectories and their mean length that a number of gradients of all chains allows."""
        step = math.exp(float(self._all(self.chains.steps).mean()))
        length = max(1, min(self.chains.longest, round(math.pi / 2 / step), gradients // (2 * self.settings.chains)))
        return max(1, min(trajectories, gradients // (self.settings.chains * length))), length

    def _move(self, tilt: Tilt, longest: int, gain: float = 0.0) -> None:
        step = math.exp(float(self._all(self.chains.steps).mean()))
        length = min(longest, self.chains.length(step))
        self.chains.move(tilt, length, gain=gain)
        self.taken += length * self.settings.chains
        self.tell(min(self.taken, self.settings.max_gradients), self.settings.max_gradients)

    def _settled(self, target: Tilt) -> Tilt:
        """The target with the inverse temperature of the cutoff and the curvature learnt from the chains there."""
        high, low = self.kappas
        budget = 0.3 * self.settings.max_gradients
        if high > low:
            stages = np.geomspace(high, low, 8)[:-1]
            for kappa in stages:
                tilt = target.at(kappa=float(kappa))
                until = self.taken + 0.25 * budget / len(stages)
                while self.taken < until:
                    self._move(tilt, max(1, int(until - self.taken) // self.settings.chains), gain=0.3)
        rounds = 4
        left = budget - self.taken
        ends = [self.taken + left * share for share in np.cumsum([0.15, 0.2, 0.25, 0.4])]
        for number, end in enumerate(ends):
            sums = [torch.zeros_like(target.pull, dtype=torch.float64) for _ in range(4)]
            count, logs = 0, []
            while self.taken < end:
                self._move(target, max(1, int(end - self.taken) // self.settings.chains), gain=0.3 / (1 + number))
                slope = target.slope(self.chains.x, self.chains.gradients)
                costs = self.chains.costs
                if number > 1:  # the curvature is known well enough to take off what its fluctuation explains
                    costs = costs - _identity(target, self.chains.x, slope, target.learned).cpu()
                mean = float(self._all(costs).mean())
                gain = 0.5 if number < 2 else 1 / (2 + count)
                shift = max(-1.0, min(1.0, math.log(mean / self.cutoff))) if math.isfinite(mean) and mean > 0 else 1.0
                target = target.at(b=max(target.b * math.exp(gain * shift), 1e-9 / self.cutoff))
                logs.append(math.log(target.b))
                for row, grad in zip(self.chains.x.double(), slope.double(), strict=True):
                    for total, value in zip(sums, (row, row * row, grad, grad * grad), strict=True):
                        total += value
                count += 1
            if number == rounds - 1:
                target = target.at(b=math.exp(float(np.mean(logs[len(logs) // 2 :]))))
            target = target.at(learned=self._learned(target, sums, count))
        return target

    def _learned(self, target: Tilt, sums: Sequence[Tensor], count: int) -> Tensor:
        r"""Curvature of the cost from how gradients vary beside points: :math:`\sqrt{\mathrm{Var}\, g / \mathrm{Var}\, x}`."""
        total = count * self.settings.chains
        if total < 6:
            return target.learned
        first, second, slope, slopes = (self.replicas.sum_(value) / total for value in sums)
        points, gradients = second - first.square(), slopes - slope.square()
        precision = (gradients.clamp(min=0) / points.clamp(min=1e-300)).sqrt()
        found = ((precision - target.kappa) / target.b).clamp(min=0)
        # In logarithms above the floor, drawn towards what was believed before as by some draws of its own.
        floor = 0.1 * target.floor + 1e-300
        share = total / (total + 6.0)
        mixed = (1 - share) * (target.learned.double() + floor).log() + share * (found + floor).log()
        return (mixed.exp() - floor).clamp(min=0).to(torch.float32).to(target.pull.dtype)

    def _path(self, target: Tilt) -> tuple[list[_Node], list[tuple[Array, Array]]]:
        """The nodes from the Gaussian to the target, and the weights of each, fine and coarse."""
        places, fine, coarse = nested_rule(self.nodes)
        high, low = self.kappas
        nodes = [_Node("cost", float(t), target.at(t=float(t), kappa=high), 1.0) for t in places]
        rules = [(fine, coarse)]
        if high > low:
            length = math.log(high / low)
            nodes += [
                _Node("tether", float(u), target.at(t=1.0, kappa=high * math.exp(-u * length)), length) for u in places
            ]
            rules.append((fine, coarse))
        return nodes, rules

    def _visit(self, node: _Node, share: float, *, fresh: bool) -> _Visit:
        """Lets the chains settle at a node, then watches them."""
        tilt, chains = node.tilt, self.chains
        gradients = int(share * (self.settings.max_gradients - self.taken))
        model = tilt.at(floor=0.0)
        count, longest = self._spend(tilt, 10_000, gradients)
        settling = 0 if fresh else max(1, count // 4)
        records: list[Tensor] = []
        acceptance: list[float] = []
        for turn in range(settling + max(2, count - settling)):
            if tilt.t == 0:
                chains.draw(tilt)
                self.taken += self.settings.chains
                if turn >= 2 * self.settings.nodes:
                    break
            else:
                self._move(tilt, longest, gain=0.2 if turn < settling else 0.0)
            if turn >= settling:
                records.append(self._observed(node, model))
                acceptance.append(float(self._all(chains.acceptance).mean()))
        table = self._all(torch.stack(records, dim=1))  # [chains, trajectories, 5]
        costs, integrand, control, cost_control, distance = np.moveaxis(table, -1, 0)
        return _Visit(
            costs,
            controlled(integrand, control),
            controlled(costs, cost_control),
            distance,
            1.0 if tilt.t == 0 else float(np.mean(acceptance)),
        )

    def _observed(self, node: _Node, model: Tilt) -> Tensor:
        """Cost, integrand, their control variates by Stein's identity, and half the squared distance, ``[chains, 5]``."""
        tilt, x = node.tilt, self.chains.x
        slope = tilt.slope(x, self.chains.gradients)
        cost, half = self.chains.costs.to(x.device), squares(x) / 2
        of_cost = _identity(model, x, slope, model.learned)
        if node.leg == "tether":
            integrand, control = half * tilt.kappa, _identity(model, x, slope, tilt.kappa)
            integrand, control = integrand * node.scale, control * node.scale
        else:
            integrand = tilt.b * (squares(x, tilt.curvature) / 2 - cost)
            control = tilt.b * (_identity(model, x, slope, tilt.curvature) - of_cost)
        return torch.stack([cost, integrand, control, of_cost, half], dim=-1).cpu()

    def _walked(self, target: Tilt) -> dict[str, Any]:
        nodes, rules = self._path(target)
        weights = np.concatenate([fine for fine, _ in rules])
        coarse = np.concatenate([rule for _, rule in rules])
        last = len(nodes) - 1
        # The target's moments make the saddle, so it is watched for longer.
        shares = np.array([3.0 if place == last else 1.0 for place in range(len(nodes))])
        passes: list[dict[int, _Visit]] = []
        total, done = 2 * shares.sum(), 0.0
        for order in (range(last, -1, -1), range(last + 1)):
            found = {}
            for turn, place in enumerate(order):
                share = shares[place] / (total - done)
                found[place] = self._visit(nodes[place], share, fresh=place == last and turn == 0)
                done += shares[place]
            passes.append(found)
        base = target.at(t=0.0, kappa=self.kappas[0]).log_normaliser(self.variance)
        return self._summed(target, nodes, passes, weights, coarse, base)

    def _summed(
        self,
        target: Tilt,
        nodes: list[_Node],
        passes: list[dict[int, _Visit]],
        weights: Array,
        coarse: Array,
        base: float,
    ) -> dict[str, Any]:
        last = len(nodes) - 1

        def integral(rule: Array, part: slice | None = None) -> Array:  # [passes, chains]
            means = [
                np.stack([_part(found[place].integrand, part).mean(axis=1) for place in range(last + 1)])
                for found in passes
            ]
            return np.stack([rule @ mean for mean in means])

        whole = integral(weights)
        chains = whole.shape[1]
        spread = whole.mean(axis=0).std(ddof=1) / math.sqrt(chains) * student(chains)
        halves = integral(weights, slice(0, 1)), integral(weights, slice(1, 2))
        drift, drift_noise = _difference(*halves)
        there, back = whole
        loop, loop_noise = _difference(there[None], back[None])
        schedule = float(abs((weights - coarse) @ self._means(passes, last)))
        level = base + float(whole.mean())
        point, mean, variance, noise = self._crossed(target, passes, last, level)
        parts = {
            "chains": float(spread),
            "halves": max(0.0, abs(drift) - drift_noise),
            "directions": max(0.0, abs(loop) - loop_noise) / 2,
            "schedule": schedule,
            "saddle": noise,
        }
        value = point.log_volume
        acceptance = float(np.mean([found[place].acceptance for found in passes for place in found]))
        self._doubt(drift, drift_noise, loop, loop_noise, mean, acceptance, value, passes[-1][last])
        return {
            "log_volume": value,
            "error": math.sqrt(math.fsum(part**2 for part in parts.values())),
            "method": "bridge",
            "inverse_temperature": point.b,
            "log_normaliser": point.log_normaliser,
            "mean_cost": mean,
            "cost_deviation": math.sqrt(variance),
            "parts": parts,
            "trace": self._trace(nodes, passes),
            "acceptance": acceptance,
            "nodes": self.nodes,
            "weak": "; ".join(self.weak),
        }

    def _means(self, passes: list[dict[int, _Visit]], last: int) -> Array:
        return np.array([np.mean([found[place].integrand.mean() for found in passes]) for place in range(last + 1)])

    def _crossed(
        self, target: Tilt, passes: list[dict[int, _Visit]], last: int, level: float
    ) -> tuple[Saddle, float, float, float]:
        """The saddle, the mean and the variance of the cost, and the error that they bring, by leaving out chains."""
        rows = [(row, centred) for found in passes for row, centred in zip(found[last].costs, found[last].centred)]

        def point(without: int | None = None) -> tuple[Saddle, float, float]:
            kept = [pair for place, pair in enumerate(rows) if place != without]
            costs, centred = (np.concatenate(column) for column in zip(*kept, strict=True))
            mean, variance = float(centred.mean()), float(costs.var(ddof=1))
            found = saddle(level, target.b, mean, variance, self.cutoff)
            if found.width < _COUNTED:
                inside = counted(level, target.b, costs, self.cutoff)
                found = found._replace(log_volume=inside, b=target.b, log_normaliser=level)
            return found, mean, variance

        blocks = len(rows)
        others = np.array([point(block)[0].log_volume for block in range(blocks)])
        found, mean, variance = point()
        spread = float(others.std()) * math.sqrt(blocks - 1) * student(blocks)
        return found, mean, variance, math.hypot(spread, 1 / (8 * max(found.width, 0.5) ** 2))

    def _doubt(
        self, drift: float, noise: float, loop: float, loop_noise: float, mean: float, acceptance: float, value: float,
        visit: _Visit,
    ) -> None:
        """Notes what speaks against the number."""
        if abs(drift) > max(2 * noise, 1.0, 2e-3 * abs(value)):
            way = "too low" if drift > 0 else "too high"
            self.weak.append(f"the chains still drift, by {drift:+.3g} nats between halves: the volume is {way}")
        if abs(loop) > max(2 * loop_noise, 1.0, 5e-3 * abs(value)):
            self.weak.append(f"the way back differs from the way there by {loop:+.3g} nats")
        if not 0.5 < mean / self.cutoff < 2:
            self.weak.append(f"the samples cost {mean:.3g} nats on average where the cutoff is {self.cutoff:g}")
        if acceptance < 0.3:
            self.weak.append(f"only {acceptance:.0%} of the trajectories were accepted")
        if visit.costs.size < 32:
            self.weak.append(f"only {visit.costs.size} samples at the cutoff")

    def _trace(self, nodes: list[_Node], passes: list[dict[int, _Visit]]) -> list[dict[str, Any]]:
        rows = []
        for number, found in enumerate(passes):
            for place, visit in found.items():
                numbers = {
                    "mean_cost": float(visit.costs.mean()),
                    "distance": float(visit.distance.mean()),
                    "integrand": float(visit.integrand.mean()),
                    "acceptance": visit.acceptance,
                }
                node = nodes[place]
                rows.append(
                    {"way": ("there", "back")[number], "leg": node.leg, "place": node.place, "kappa": node.tilt.kappa}
                    | numbers
                    | {"samples": visit.costs.size}
                )
        return rows

    def _by_importance(self, costs: Array, quadratic: Array, share: float) -> dict[str, Any]:
        """The volume from weighted draws; its error by leaving out one after the other."""
        base = self.start.log_normaliser(self.variance)
        whole = weighted_volume(costs, quadratic, self.start.b, base, self.cutoff)
        count = len(costs)
        others = [
            weighted_volume(np.delete(costs, place), np.delete(quadratic, place), self.start.b, base, self.cutoff)[0]
            for place in range(count)
        ]
        value, b, mean, deviation, log_normaliser = whole
        noise = float(np.std(others) * math.sqrt(count - 1))
        parts = {"draws": noise, "saddle": 1 / (8 * max(b * deviation, 0.5) ** 2)}
        return {
            "log_volume": value,
            "error": math.hypot(*parts.values()),
            "method": "importance",
            "inverse_temperature": b,
            "log_normaliser": log_normaliser,
            "mean_cost": mean,
            "cost_deviation": deviation,
            "parts": parts,
            "trace": [],
            "acceptance": 1.0,
            "nodes": 0,
            "weak": "",
            "effective_sample_size": share,
            "tether": 1.0,
        }


def weighted_volume(
    costs: Array, quadratic: Array, drawn: float, base: float, cutoff: float
) -> tuple[float, float, float, float, float]:
    """The volume from draws of a Gaussian: log V, b, mean cost, its deviation, log Z(b).

    Args:
        costs: True costs of the draws, nats.
        quadratic: What the Gaussian takes them for, nats.
        drawn: Its inverse temperature.
        base: Its log-normaliser, nats.
        cutoff: c, nats.
    """

    def at(b: float) -> tuple[Array, float]:
        logs = drawn * quadratic - b * costs
        top = logs.max()
        weights = np.exp(logs - top)
        return weights / weights.sum(), float(top + math.log(weights.mean()))

    low, high = math.log(drawn) - 1.5, math.log(drawn) + 1.5
    for _ in range(50):
        middle = 0.5 * (low + high)
        weights, _ = at(math.exp(middle))
        low, high = (middle, high) if weights @ costs > cutoff else (low, middle)
    b = math.exp(low)
    # A temperature at which the draws carry no weight says nothing; the one they were drawn at always does.
    b = min(max(b, drawn * math.exp(-0.3)), drawn * math.exp(0.3))
    weights, level = at(b)
    mean = float(weights @ costs)
    deviation = math.sqrt(max(float(weights @ (costs - mean) ** 2), 1e-300))
    if b * deviation < _COUNTED:
        weights, level = at(drawn)
        inside = costs <= cutoff
        total = float((weights * np.exp(drawn * (costs - cutoff)))[inside].sum())
        value = base + level + drawn * cutoff + (math.log(total) if total > 0 else -math.inf)
        return value, drawn, mean, deviation, base + level
    point = saddle(base + level, b, mean, deviation**2, cutoff)
    return point.log_volume, point.b, mean, deviation, point.log_normaliser


def effective_share(logs: Array) -> float:
    """Share of draws that their weights leave, (sum w)^2 / (n sum w^2), from log-weights.

    Example:
        >>> effective_share(np.zeros(5)), effective_share(np.array([0.0, -1e9]))
        (1.0, 0.5)
    """
    finite = logs[np.isfinite(logs)]
    if not len(finite):
        return 0.0
    weights = np.exp(logs - finite.max())
    return float(weights.sum() ** 2 / (len(logs) * (weights**2).sum()))


def controlled(values: Array, control: Array) -> Array:
    """Values with a control variate of mean 0 taken off, by the factor that the samples ask for, drawn towards 1."""
    spread = control - control.mean()
    square = float((spread**2).mean())
    if not (square > 0 and math.isfinite(square)):
        return values
    asked = float((spread * (values - values.mean())).mean())
    factor = (values.size * asked + 10 * square) / (square * (values.size + 10))
    return values - factor * control


def _identity(model: Tilt, x: Tensor, slope: Tensor, weights: Tensor | float) -> Tensor:
    """What Stein's identity knows to have mean 0, shape ``[chains]``, float64.

    Where the density is the model's Gaussian it is half of the weighted squares less their mean; where it is not, its
    mean is 0 all the same.
    """
    precision = model.precision
    centre = -model.pull / precision
    term = ((x - centre) * slope - 1) / 2 + centre * slope
    return (term * (weights / precision)).sum(-1, dtype=torch.float64)


def student(chains: int) -> float:
    """By how much an error from few chains is widened."""
    return next((factor for degrees, factor in _STUDENT.items() if degrees >= chains - 1), 1.0)


def _part(table: Array, part: slice | None) -> Array:
    if part is None:
        return table
    middle = table.shape[1] // 2
    return table[:, middle:] if part.start else table[:, : max(middle, 1)]


def _difference(first: Array, second: Array) -> tuple[float, float]:
    """Second less first over chains, and the error of that."""
    difference = (second - first).mean(axis=0)
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference))) * student(len(difference))


def timed() -> Callable[[], float]:
    """Seconds since."""
    began = time.perf_counter()
    return lambda: time.perf_counter() - began
