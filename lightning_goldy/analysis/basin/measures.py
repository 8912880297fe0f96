"""Measures of a ray's volume, and the radial integrals that they need."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lightning_goldy.core.directions import Proposal

Array = NDArray[np.float64]

# An integrand this many nats below its maximum adds less than a float64 can hold.
_NEGLIGIBLE = 60.0
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_BISECTIONS = 80
# Below this |t| the series of log(1 + t) - t is closer than the difference of two nearly equal numbers.
_SERIES = 1e-2


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


class RadialMeasure(Protocol):
    """How far to walk along a direction, where that leads, and what lies before it.

    Attributes:
        constant: Added to every log-integral, nats.
        start: First distance tried, parameter units (radians on the sphere).
        max_radius: Default of the largest distance.
    """

    constant: float
    start: float
    max_radius: float

    def unit(self, proposal: Proposal) -> float:
        """Distance from the anchor that a radius of 1 means."""
        ...

    def coefficients(self, radius: float, proposal: Proposal) -> tuple[float, float]:
        """Multiples of the anchor and of P u that make up the point at a radius."""
        ...

    def chord(self, radius: float, proposal: Proposal) -> float:
        """Euclidean distance of that point from the anchor, parameter units."""
        ...

    def integrals(self, radii: Array, lengths: Array, projections: Array) -> RadialIntegral:
        """Logarithm of the radial integral of each direction, nats."""
        ...


class UniformMeasure:
    """Volume in parameter space itself.

    Args:
        dimension: D.
        scale: A typical size of a parameter, for the first step.
    """

    def __init__(self, dimension: int, scale: float) -> None:
        self.dimension = dimension
        self.constant = log_sphere_area(dimension)
        self.start = 1e-2 * scale * math.sqrt(dimension)
        self.max_radius = 1e2 * scale * math.sqrt(dimension)

    def unit(self, proposal: Proposal) -> float:
        """Length of P u."""
        return proposal.length

    def coefficients(self, radius: float, proposal: Proposal) -> tuple[float, float]:
        """The anchor and ``radius`` times P u."""
        return 1.0, radius

    def chord(self, radius: float, proposal: Proposal) -> float:
        """The distance itself."""
        return radius * proposal.length

    def integrals(self, radii: Array, lengths: Array, projections: Array) -> RadialIntegral:
        """That of r^(D-1)."""
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


class SphereMeasure:
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
