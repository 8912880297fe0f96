"""What a volume estimate is made of, and what may be said of it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_goldy.analysis.result import AnalysisResult

Measure = Literal["gaussian", "uniform", "sphere"]


@dataclass(frozen=True)
class VolumeResult(AnalysisResult):
    r"""The volume of the region around an anchor where a cost stays below a cutoff, direction by direction.

    With u uniform on the unit sphere and P a volume-preserving preconditioner the region reaches to
    :math:`\theta_A + r(u)\,P u`. Under the Gaussian and the uniform measure

    .. math:: e(u) = \log |S^{D-1}| + \log \int_0^{r(u)} r^{D-1} \rho(\theta_A + r P u)\, dr, \qquad
        \log V = \log \tfrac1n \sum_u \exp e(u)

    Args:
        estimates: e(u), shape ``[directions]``, float64, nats: log-probabilities, or for the uniform measure the
            logarithm of a volume in units of a parameter to the power D. NaN where the direction is unbounded.
        radii: r(u), shape ``[directions]``: multiples of the proposal vector P u (radians for the sphere); NaN where
            unbounded.
        props: Length of the proposal vector, \|P u\|, shape ``[directions]``, parameter units.
        deltas: The cost closest to the cutoff that was evaluated, shape ``[directions]``, nats.
        slopes: d log cost / d log r there, shape ``[directions]``; 2 for a quadratic cost.
        log_integral: The logarithm of the radial integral, shape ``[directions]``, nats.
        sensitivities: d log_integral / d log r, shape ``[directions]``; D for the uniform measure.
        evaluations: Cost evaluations spent, shape ``[directions]``, integers.
        extra_evaluations: Cost evaluations beside those: at the anchor, where the cost does not tell that value itself,
            and on directions that chose a preconditioner.
        measure: ``gaussian``, ``uniform`` or ``sphere``.
        preconditioner: Its name; ``none`` without one.
        dimension: D, the number of selected elements.
        sigma: Standard deviation of the Gaussian measure, parameter units.
        cutoff: The cost at the region's boundary, nats.
        anchor_cost: The cost at the anchor itself, nats: a bias of every evaluation, 0 when the cost is exact.
        rtol: Relative tolerance of the evaluated cost; after the last correction a tenth of it is left.
        max_radius: Largest distance from the anchor that was tried, parameter units (radians for the sphere).
        seed: Decides the directions.
        first_direction: Number of the first direction in the seed's endless row of them.
        seconds: Time spent, wall clock.
        proposals: For the best of several proposals, each one's own numbers by name.
    """

    estimates: Tensor
    radii: Tensor
    props: Tensor
    deltas: Tensor
    slopes: Tensor
    log_integral: Tensor
    sensitivities: Tensor
    evaluations: Tensor
    extra_evaluations: int
    measure: Measure
    preconditioner: str
    dimension: int
    sigma: float
    cutoff: float
    anchor_cost: float
    rtol: float
    max_radius: float
    seed: int
    first_direction: int
    seconds: float
    proposals: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def n_directions(self) -> int:
        """Number of directions."""
        return len(self.estimates)

    @property
    def unbounded(self) -> tuple[int, ...]:
        """The directions along which the cutoff was not reached within ``max_radius``."""
        return tuple(torch.isnan(self.radii).nonzero().flatten().tolist())

    @property
    def log_volume(self) -> float:
        """Log-mean-exp of the estimates, nats; NaN when a direction is unbounded."""
        mean = self.lower_bound
        # Jensen's inequality must hold after rounding too, so the excess over the mean is what is computed.
        excess = float(torch.logsumexp(self.estimates - mean, 0)) - math.log(self.n_directions)
        return mean + max(excess, 0.0)

    @property
    def lower_bound(self) -> float:
        """Mean of the estimates, nats: below the log-volume in expectation, by Jensen's inequality."""
        return float(self.estimates.mean())

    @property
    def spread(self) -> float:
        """Standard deviation of the estimates, nats; a narrow one is no proof of accuracy."""
        return float(self.estimates.std()) if self.n_directions > 1 else 0.0

    @property
    def effective_sample_size(self) -> float:
        """How many directions the log-volume rests on, from 1 to their number."""
        weights = self.weights
        return float(1 / weights.square().sum())

    @property
    def weights(self) -> Tensor:
        """Share of each direction in the volume, shape ``[directions]``, summing to 1."""
        return torch.softmax(self.estimates, 0)

    @property
    def bits_per_parameter(self) -> float:
        """Bits that it takes to name a point of the region, per parameter: minus the log-volume / (D log 2)."""
        return -self.log_volume / (self.dimension * math.log(2))

    @property
    def tolerance(self) -> float:
        """What the radii's tolerance may move an estimate by, nats: sensitivity / slope x rtol / 10, at most."""
        moved = (self.sensitivities / self.slopes).abs() * self.rtol / 10
        return float(moved.nan_to_num(nan=math.inf).max())

    @property
    def scaling_exponent(self) -> float:
        """Derivative of log V by log cutoff, from the slopes along the directions; D/2 around a regular minimum."""
        return float((self.weights * self.sensitivities / self.slopes).sum())

    @property
    def total_evaluations(self) -> int:
        """All cost evaluations."""
        return int(self.evaluations.sum()) + self.extra_evaluations

    def interval(self, level: float = 0.95, *, resamples: int = 2000) -> tuple[float, float]:
        """Bootstrap percentile interval of the log-volume, nats; too short where few directions dominate.

        Args:
            level: Coverage, a fraction in (0, 1).
            resamples: Number of resampled sets of directions.

        Raises:
            ValueError: ``level`` is out of range.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie in (0, 1); got {level}")
        generator = torch.Generator().manual_seed(self.seed)
        count = self.n_directions
        chosen = torch.randint(count, (resamples, count), generator=generator)
        volumes = torch.logsumexp(self.estimates[chosen], dim=1) - math.log(count)  # [resamples]
        ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
        low, high = torch.quantile(volumes, ends).tolist()
        return low, high

    def summary(self) -> dict[str, Any]:
        """The numbers that describe the result, without the directions' own."""
        low, high = self.interval()
        return {
            "log_volume": self.log_volume,
            "lower_bound": self.lower_bound,
            "interval_low": low,
            "interval_high": high,
            "spread": self.spread,
            "effective_sample_size": self.effective_sample_size,
            "bits_per_parameter": self.bits_per_parameter,
            "scaling_exponent": self.scaling_exponent,
            "tolerance": self.tolerance,
            "unbounded": len(self.unbounded),
            "evaluations": self.total_evaluations,
            "seconds": self.seconds,
        }


def aggregate(results: Sequence[VolumeResult]) -> VolumeResult:
    """One result from several that used different directions of one measure.

    Args:
        results: Of equal measure, sigma, cutoff, dimension and preconditioner, and of different directions.

    Raises:
        ValueError: There is none, they describe different things, or they share directions.
    """
    if not results:
        raise ValueError("there is no result to aggregate")
    first = results[0]
    for field in ("measure", "sigma", "cutoff", "dimension", "preconditioner", "max_radius"):
        for other in results[1:]:
            if getattr(other, field) != getattr(first, field):
                raise ValueError(
                    f"the results differ in {field}: {getattr(first, field)!r} and {getattr(other, field)!r}; "
                    "their volumes are not comparable"
                )
    ranges = sorted((each.seed, each.first_direction, each.first_direction + each.n_directions) for each in results)
    for (seed, _, stop), (next_seed, start, _) in itertools.pairwise(ranges):
        if seed == next_seed and start < stop:
            raise ValueError(f"two results share direction {start} of seed {seed}; give them different seeds")
    joined: dict[str, Any] = {
        field: torch.cat([getattr(each, field) for each in results])
        for field in ("estimates", "radii", "props", "deltas", "slopes", "log_integral", "sensitivities", "evaluations")
    }
    return dataclasses.replace(
        first,
        **joined,
        extra_evaluations=sum(each.extra_evaluations for each in results),
        anchor_cost=max(each.anchor_cost for each in results),
        rtol=max(each.rtol for each in results),
        seconds=sum(each.seconds for each in results),
        proposals={},
    )


def best_of(proposals: Mapping[str, VolumeResult]) -> VolumeResult:
    """The proposal with the highest lower bound, carrying every proposal's own numbers.

    Each proposal is a lower bound in expectation, so the highest is the closest; over few directions the choice itself
    favours luck a little.

    Args:
        proposals: By name; results for one region under one measure.

    Raises:
        ValueError: There is none, or they describe different regions.
    """
    if not proposals:
        raise ValueError("there is no proposal to choose from")
    first = next(iter(proposals.values()))
    for name, result in proposals.items():
        for field in ("measure", "sigma", "cutoff", "dimension"):
            if getattr(result, field) != getattr(first, field):
                raise ValueError(f"proposal {name!r} differs in {field}; proposals must describe one region")
    bounds = {name: result.lower_bound for name, result in proposals.items()}
    name = max(bounds, key=lambda each: -math.inf if math.isnan(bounds[each]) else bounds[each])
    numbers = {each: result.summary() for each, result in proposals.items()}
    return dataclasses.replace(proposals[name], preconditioner=name, proposals=numbers)
