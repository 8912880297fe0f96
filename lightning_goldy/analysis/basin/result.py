"""What a volume estimate is made of: the result, the measures, and the radial integrals that they need."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.vector import Proposal

Measure = Literal["gaussian", "uniform", "sphere"]
Array = NDArray[np.float64]

COLUMNS = ("estimates", "radii", "props", "deltas", "slopes", "log_integral", "sensitivities", "evaluations")
"""What is found along each direction, in the order of the result's fields."""
_SETTINGS = (
    *("preconditioner", "sigma", "cutoff", "dimension", "measure", "seed", "first_direction", "anchor_cost", "rtol"),
    *("max_radius", "extra_evaluations"),
)

# An integrand this many nats below its maximum adds less than a float64 can hold.
_NEGLIGIBLE = 60.0
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_BISECTIONS = 80
# Below this |t| the series of log(1 + t) - t is closer than the difference of two nearly equal numbers.
_SERIES = 1e-2


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
        cost: Passes of the model, in samples, those of the anchor among them; nothing where the cost is somebody's own.
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
    cost: Cost = dataclasses.field(default=Cost(), compare=False)

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
        """Log-mean-exp of the estimates, nats, below the volume's in expectation; NaN when a direction is unbounded."""
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
        return float(1 / self.weights.square().sum())

    @property
    def weights(self) -> Tensor:
        """Share of each direction in the volume, shape ``[directions]``, summing to 1."""
        return torch.softmax(self.estimates, 0)

    @property
    def bits_per_parameter(self) -> float:
        """Bits that name a point of the region, per parameter, at most: minus the log-volume / (D log 2)."""
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
        """How much the bound hangs on single directions, nats, by resampling them; no interval of the volume.

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

    def metrics(self) -> dict[str, float | None]:
        """The numbers that describe the result, but the time, which is no part of it."""
        return _untimed(self.summary())

    def details(self) -> dict[str, Any]:
        """The settings, the metrics, and what was found along each direction."""
        settings = {name: getattr(self, name) for name in _SETTINGS}
        proposals = {name: _untimed(numbers) for name, numbers in self.proposals.items()}
        # The number of evaluations gives way to the list, one per direction.
        columns = {name: getattr(self, name).tolist() for name in COLUMNS}
        totals = {"proposals": proposals, "total_evaluations": self.total_evaluations}
        return settings | self.metrics() | totals | columns

    def summary(self) -> dict[str, Any]:
        """The numbers that describe the result, without the directions' own."""
        names = ("spread", "effective_sample_size", "bits_per_parameter", "scaling_exponent", "tolerance")
        counts = {"unbounded": len(self.unbounded), "evaluations": self.total_evaluations, "seconds": self.seconds}
        bounds = {"log_volume": self.log_volume, "lower_bound": self.lower_bound}
        return {**bounds, **{name: getattr(self, name) for name in names}, **counts}


def _untimed(numbers: Mapping[str, Any]) -> dict[str, Any]:
    # A resumed run must give the rows of an uninterrupted one, however long it took.
    return {name: value for name, value in numbers.items() if name != "seconds"}


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
    ranges = sorted((part.seed, part.first_direction, part.first_direction + part.n_directions) for part in results)
    for (seed, _, stop), (next_seed, start, _) in itertools.pairwise(ranges):
        if seed == next_seed and start < stop:
            raise ValueError(f"two results share direction {start} of seed {seed}; give them different seeds")
    joined: dict[str, Any] = {field: torch.cat([getattr(part, field) for part in results]) for field in COLUMNS}
    return dataclasses.replace(
        first,
        **joined,
        extra_evaluations=sum(part.extra_evaluations for part in results),
        anchor_cost=max(part.anchor_cost for part in results),
        rtol=max(part.rtol for part in results),
        seconds=sum(part.seconds for part in results),
        cost=sum((part.cost for part in results), Cost()),
        proposals={},
    )


def paired_difference(first: VolumeResult, second: VolumeResult) -> tuple[float, float]:
    """Mean difference of two bounds along common directions, second less first, and its standard error, nats.

    What two checkpoints share cancels: along common directions estimates differ by far less than from one to another.

    Args:
        first: One checkpoint's result.
        second: The other's, with the same seed, directions, measure, sigma and cutoff.

    Raises:
        ValueError: They were not made along the same directions, or do not describe like regions.
    """
    for name in ("measure", "sigma", "cutoff", "dimension", "seed", "first_direction", "n_directions"):
        if getattr(first, name) != getattr(second, name):
            values = f"{getattr(first, name)!r} and {getattr(second, name)!r}"
            raise ValueError(f"a paired difference needs results that agree in {name}; got {values}")
    differences = second.estimates - first.estimates
    count = first.n_directions
    error = float(differences.std()) / math.sqrt(count) if count > 1 else math.nan
    return float(differences.mean()), error


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
    name = max(bounds, key=lambda name: -math.inf if math.isnan(bounds[name]) else bounds[name])
    numbers = {proposal: result.summary() for proposal, result in proposals.items()}
    return dataclasses.replace(proposals[name], preconditioner=name, proposals=numbers)


class UniformMeasure:
    """How far to walk along a direction, where that leads, and what lies before it: volume in parameter space itself.

    Args:
        dimension: D.
        scale: A typical size of a parameter, for the first step.

    Attributes:
        constant: Added to every log-integral, nats.
        start: First distance tried, parameter units (radians on the sphere).
        max_radius: Default of the largest distance.
    """

    def __init__(self, dimension: int, scale: float) -> None:
        self.dimension = dimension
        self.constant = log_sphere_area(dimension)
        self.start = 1e-2 * scale * math.sqrt(dimension)
        self.max_radius = 1e2 * scale * math.sqrt(dimension)

    def unit(self, proposal: Proposal) -> float:
        """Distance from the anchor that a radius of 1 means: the length of P u."""
        return proposal.length

    def coefficients(self, radius: float, proposal: Proposal) -> tuple[float, float]:
        """Multiples of the anchor and of P u that make up the point at a radius."""
        return 1.0, radius

    def chord(self, radius: float, proposal: Proposal) -> float:
        """Euclidean distance of that point from the anchor, parameter units."""
        return radius * proposal.length

    def integrals(self, radii: Array, lengths: Array, projections: Array) -> RadialIntegral:
        """Logarithm of the radial integral of each direction, nats: that of r^(D-1)."""
        return log_uniform_integral(radii, self.dimension)


class GaussianMeasure(UniformMeasure):
    r"""Probability under :math:`\mathcal N(0, \sigma^2 I)`.

    Args:
        dimension: D.
        sigma: Standard deviation, parameter units.
        anchor_square: Squared length of the anchor.
    """

    def __init__(self, dimension: int, sigma: float, anchor_square: float) -> None:
        super().__init__(dimension, sigma)
        self.variance = sigma * sigma
        self.constant -= dimension / 2 * math.log(2 * math.pi * self.variance) + anchor_square / (2 * self.variance)

    def integrals(self, radii: Array, lengths: Array, projections: Array) -> RadialIntegral:
        """That of r^(D-1) times the density along the ray."""
        return log_gaussian_integral(
            radii, self.dimension, linear=projections / self.variance, quadratic=lengths**2 / self.variance
        )


class SphereMeasure(UniformMeasure):
    """Probability under the uniform distribution on the sphere around the origin that holds the anchor.

    Directions are tangents of the sphere, rays are great circles, radii are angles.

    Args:
        dimension: D, at least 2.
        anchor_square: Squared length of the anchor.
    """

    def __init__(self, dimension: int, anchor_square: float) -> None:
        self.dimension = dimension
        self.radius = math.sqrt(anchor_square)
        self.constant = log_sphere_area(dimension - 1) - log_sphere_area(dimension)
        self.start, self.max_radius = 1e-2, math.pi

    def unit(self, proposal: Proposal) -> float:
        """Radii are angles already."""
        return 1.0

    def coefficients(self, radius: float, proposal: Proposal) -> tuple[float, float]:
        """The point of the great circle through the anchor along the tangential part of the direction."""
        along = proposal.projection / self.radius
        across = math.sqrt(max(proposal.length**2 - along**2, 0.0))
        tangent = math.sin(radius) * self.radius / across
        return math.cos(radius) - tangent * along / self.radius, tangent

    def chord(self, radius: float, proposal: Proposal) -> float:
        """Of the angle."""
        return 2 * self.radius * math.sin(radius / 2)

    def integrals(self, radii: Array, lengths: Array, projections: Array) -> RadialIntegral:
        """That of a spherical cap."""
        return log_cap_integral(np.minimum(radii, math.pi), self.dimension)


class RadialIntegral(NamedTuple):
    """One value per direction.

    Args:
        log_integral: Shape ``[directions]``, nats.
        sensitivity: Shape ``[directions]``, its derivative with respect to the logarithm of the radius, dimensionless:
            an error of 1 % in the radius is this many hundredths of a nat.
    """

    log_integral: Array
    sensitivity: Array


def log_gaussian_integral(
    radius: ArrayLike, dimension: int, *, linear: ArrayLike, quadratic: ArrayLike
) -> RadialIntegral:
    r"""Logarithm of the radial integral of a Gaussian density along directions from an anchor.

    .. math:: \log \int_0^{R} r^{D-1} \exp\!\big(-b r - \tfrac{c}{2} r^2\big) \, dr

    The integrand is log-concave: Gauss-Legendre quadrature on both sides of its mode, or of the end where that comes
    first, over the stretch that matters.

    Args:
        radius: R, shape ``[directions]``; positive, infinity allowed.
        dimension: D, at least 1.
        linear: b, shape ``[directions]``.
        quadratic: c, shape ``[directions]``, positive.

    Returns:
        The logarithms, and how they depend on the radius.

    Example:
        >>> half = log_gaussian_integral([np.inf], 1, linear=[0.0], quadratic=[1.0]).log_integral
        >>> bool(abs(half[0] - 0.5 * math.log(math.pi / 2)) < 1e-12)
        True
    """
    upper, b, c = (np.atleast_1d(np.asarray(value, dtype=np.float64)) for value in (radius, linear, quadratic))
    upper, b, c = np.broadcast_arrays(upper, b, c)
    power = dimension - 1
    root = np.sqrt(b * b + 4 * c * power)
    # Of the two forms of the root of c r^2 + b r = power the one without cancellation.
    with np.errstate(divide="ignore", invalid="ignore"):
        mode = np.where(b > 0, 2 * power / (b + root), (root - b) / (2 * c))
    peak = np.minimum(mode, upper)

    def relative(r: Array, top: Array, b: Array = b, c: Array = c) -> Array:
        step = r - top
        if power == 0:
            return -b[:, None] * step - 0.5 * c[:, None] * step * (r + top)
        t = step / top
        # The linear terms nearly cancel at the mode, so they are summed first.
        slope = power - b[:, None] * top - c[:, None] * top * top
        return power * _log1p_excess(t) + slope * t - 0.5 * c[:, None] * (step * step)

    at_peak = _power_log(power, peak) - b * peak - 0.5 * c * peak * peak
    # Beyond the mode the integrand falls at least as fast as this Gaussian.
    reach = peak + np.sqrt(2 * _NEGLIGIBLE / c)
    return _integrate(relative, at_peak, peak, np.minimum(upper, reach), upper)


def log_uniform_integral(radius: ArrayLike, dimension: int) -> RadialIntegral:
    r"""The same under the uniform (Lebesgue) measure: :math:`\log \int_0^R r^{D-1} dr = D \log R - \log D`.

    Example:
        >>> float(log_uniform_integral([1.0], 4).log_integral[0]) == -math.log(4)
        True
    """
    upper = np.atleast_1d(np.asarray(radius, dtype=np.float64))
    with np.errstate(divide="ignore"):
        return RadialIntegral(dimension * np.log(upper) - math.log(dimension), np.full(upper.shape, float(dimension)))


def log_cap_integral(angle: ArrayLike, dimension: int) -> RadialIntegral:
    r"""The same on the sphere through the anchor: :math:`\log \int_0^\varphi \sin^{D-2}\phi \, d\phi`.

    Args:
        angle: Polar angle, shape ``[directions]``, radians in (0, pi].
        dimension: D of the space that the sphere lies in, at least 2.

    Example:
        >>> bool(abs(log_cap_integral([math.pi], 3).log_integral[0] - math.log(2)) < 1e-12)
        True
    """
    upper = np.atleast_1d(np.asarray(angle, dtype=np.float64))
    power = dimension - 2
    peak = np.minimum(upper, math.pi / 2)

    def relative(r: Array, top: Array) -> Array:
        if power == 0:
            return np.zeros_like(r)
        # sin r / sin top = 1 + (cos h - 1) + cot(top) sin h with h = r - top, without cancellation at the peak.
        step = r - top
        excess = np.sin(step) / np.tan(top) - 2 * np.sin(step / 2) ** 2
        with np.errstate(divide="ignore", invalid="ignore"):
            return power * np.log1p(np.maximum(excess, -1.0))

    with np.errstate(divide="ignore"):
        at_peak = _power_log(power, np.sin(peak))
    return _integrate(relative, at_peak, peak, upper, upper)


def log_sphere_area(dimension: int) -> float:
    r"""Area of the unit sphere in D dimensions, :math:`\log \frac{2 \pi^{D/2}}{\Gamma(D/2)}`, nats.

    Example:
        >>> round(math.exp(log_sphere_area(3)) / math.pi, 12)
        4.0
    """
    return math.log(2) + dimension / 2 * math.log(math.pi) - math.lgamma(dimension / 2)


def _integrate(
    relative: Callable[..., Array], at_peak: Array, peak: Array, stop: Array, upper: Array
) -> RadialIntegral:
    """Integrates exp(relative) over [0, stop], given that it rises up to ``peak`` and falls from there."""
    top = peak[:, None]
    start = _falls_by(relative, top, np.zeros_like(top))
    beyond = _falls_by(relative, top, stop[:, None])
    total = _panel(relative, top, start, top) + _panel(relative, top, top, beyond)
    with np.errstate(divide="ignore"):
        log_integral = at_peak + np.log(total[:, 0])
    finite = np.isfinite(upper)
    end = np.where(finite, upper, peak)[:, None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        density = np.where(finite, np.exp(relative(end, top)[:, 0]), 0.0)
        sensitivity = np.where(total[:, 0] > 0, end[:, 0] * density / total[:, 0], 0.0)
    return RadialIntegral(log_integral, sensitivity)


def _falls_by(relative: Callable[..., Array], top: Array, bound: Array) -> Array:
    """Where, between the peak and a bound, the integrand becomes negligible; the bound where it never does."""
    near, far = top.copy(), bound.copy()
    with np.errstate(divide="ignore", invalid="ignore"):
        for _ in range(_BISECTIONS):
            middle = 0.5 * (near + far)
            low = relative(middle, top) < -_NEGLIGIBLE
            far, near = np.where(low, middle, far), np.where(low, near, middle)
        # The bisection creeps to the bound where the integrand stays above; the bound itself is exact.
        return np.where(relative(bound, top) >= -_NEGLIGIBLE, bound, far)


def _panel(relative: Callable[..., Array], top: Array, start: Array, stop: Array) -> Array:
    half = 0.5 * (stop - start)  # [directions, 1]
    nodes = start + half * (1 + _NODES)  # [directions, nodes]
    with np.errstate(divide="ignore", invalid="ignore"):
        return half * (np.exp(relative(nodes, top)) @ _WEIGHTS)[:, None]


def _power_log(power: int, value: Array) -> Array:
    with np.errstate(divide="ignore"):
        return power * np.log(value) if power else np.zeros_like(value)


def _log1p_excess(t: Array) -> Array:
    """log(1 + t) - t without cancellation near 0."""
    t = np.maximum(t, -1.0)
    small = np.where(np.abs(t) < _SERIES, t, 0.0)
    series = np.zeros_like(t)
    # Horner's scheme over -t^2/2 + t^3/3 - ... + t^9/9; the next term is below 1e-16 of the first.
    for degree in range(9, 1, -1):
        series = (series + (1 if degree % 2 else -1) / degree) * small
    with np.errstate(divide="ignore"):
        direct = np.log1p(t) - t
    return np.where(np.abs(t) < _SERIES, series * small, direct)
