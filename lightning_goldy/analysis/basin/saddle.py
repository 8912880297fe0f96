"""What the samples of a bridge say of a volume: the result, the saddle point, and rules and weights for samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_goldy.analysis.result import AnalysisResult, Cost

Array = NDArray[np.float64]
Region = Literal["connected", "star"]

# Below this width the saddle point's Gaussian is too coarse, and the samples inside the cutoff are counted instead.
COUNTED = 2.0
# Student's 97.5 % points over those of the Gaussian, by chains less 1: few chains know their own spread badly.
_STUDENT = {1: 6.5, 2: 2.2, 3: 1.62, 4: 1.42, 5: 1.31, 6: 1.25, 7: 1.21, 9: 1.15, 15: 1.09, 31: 1.04}


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
        tether: κ where a tethered walk begins, in units of 1/σ²; 1 without a tether.
        effective_sample_size: Of the importance weights, as a share of the draws.
        parts: What the error is made of, nats, by name.
        trace: Nodes of the walk: the leg, its place, κ, mean cost, mean of half the squared distance, acceptance; on a
            tether by round, way and place of κ.
        acceptance: Mean acceptance of the trajectories.
        gradients: Gradients taken, of the whole probe.
        evaluations: Costs taken without a gradient.
        chains: Their number.
        nodes: Intervals of the path; on a tether the trajectories of its last way back.
        dimension: D.
        sigma: Standard deviation of the measure, parameter units.
        cutoff: The cost at the region's boundary, nats.
        seed: Decides the noise.
        seconds: Wall clock.
        learning_coefficient: Of the same samples, b (<K> - K(0)), the local learning coefficient's estimate at b.
        sgld: The same by Langevin dynamics at fixed steps, on the same probe at the same b; empty where not asked for.
        cost: Passes of the model, in samples.
    """

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
    trace: tuple[dict[str, Any], ...]
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
    learning_coefficient: float = math.nan
    sgld: dict[str, float] = field(default_factory=dict)
    cost: Cost = field(default=Cost(), compare=False)

    @property
    def scaling_exponent(self) -> float:
        """Derivative of log V by log cutoff, which at the saddle is b c."""
        return self.inverse_temperature * self.cutoff

    @property
    def bits_per_parameter(self) -> float:
        """Bits that it takes to name a point of the region, per parameter: minus the log-volume / (D log 2)."""
        return -self.log_volume / (self.dimension * math.log(2))

    def metrics(self) -> dict[str, float | None]:
        """The numbers that describe the result; ``weak`` is 1 where something speaks against it."""
        names = ("log_volume", "error", "bits_per_parameter", "scaling_exponent", "learning_coefficient")
        numbers: dict[str, float | None] = {name: getattr(self, name) for name in names}
        if self.sgld:
            numbers["sgld_learning_coefficient"] = self.sgld["learning_coefficient"]
        return numbers | {"weak": float(bool(self.weak)), "gradients": self.gradients}

    def details(self) -> dict[str, Any]:
        """Everything but the time."""
        derived = {name: getattr(self, name) for name in ("scaling_exponent", "bits_per_parameter")}
        return {name: value for name, value in vars(self).items() if name not in ("seconds", "cost")} | derived

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
        >>> round(result.b, 9), round(result.log_volume, 6)
        (10.0, -15.096082)
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
    for _ in range(30):
        middle = 0.5 * (low + high)
        weights, _ = at(math.exp(middle))
        low, high = (middle, high) if weights @ costs > cutoff else (low, middle)
    b = math.exp(low)
    # A temperature at which the draws carry no weight says nothing; the one they were drawn at always does.
    b = min(max(b, drawn * math.exp(-0.3)), drawn * math.exp(0.3))
    weights, level = at(b)
    mean = float(weights @ costs)
    deviation = math.sqrt(max(float(weights @ (costs - mean) ** 2), 1e-300))
    if b * deviation < COUNTED:
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
    """Values with a control variate of mean 0 taken off, by the factor that the samples ask for, drawn towards 1.

    Where its mean is not 0 the chains have not settled. If it explains the values almost whole, what it takes off is
    then the bias as well; otherwise nothing is taken off.

    Args:
        values: Shape ``[chains, samples]``.
        control: The same.
    """
    spread = control - control.mean()
    square = float((spread**2).mean())
    if not (square > 0 and math.isfinite(square)) or not trusted(values, control):
        return values
    asked = float((spread * (values - values.mean())).mean())
    factor = (values.size * asked + 10 * square) / (square * (values.size + 10))
    return values - factor * control


def trusted(values: Array, control: Array) -> bool:
    """Whether a control variate is around 0 as far as its samples tell, or explains the values almost whole.

    Args:
        values: Shape ``[chains, samples]``.
        control: The same.
    """
    chains = control.mean(axis=1)
    # Samples of one chain depend on each other, so its mean may stray by as much as a few of them.
    stray = max(4 * chains.std() / math.sqrt(len(chains)), 2 * control.std() / math.sqrt(len(chains)))
    if abs(chains.mean()) <= stray:
        return True
    left = values - values.mean() - (control - control.mean())
    return float((left**2).mean()) < 0.02 * float(values.var())


def student(chains: int) -> float:
    """By how much an error from few chains is widened."""
    return next((factor for degrees, factor in _STUDENT.items() if degrees >= chains - 1), 1.0)


def part_of(table: Array, part: slice | None) -> Array:
    """The first or the second half of every chain's columns, or all, shape ``[chains, n]``."""
    if part is None:
        return table
    middle = table.shape[1] // 2
    return table[:, middle:] if part.start else table[:, : max(middle, 1)]


def difference_of(first: Array, second: Array) -> tuple[float, float]:
    """Second less first over chains, and the error of that."""
    difference = (second - first).mean(axis=0)
    return float(difference.mean()), float(difference.std(ddof=1) / math.sqrt(len(difference))) * student(
        len(difference)
    )
