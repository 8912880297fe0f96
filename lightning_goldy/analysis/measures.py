"""Measures of parameter space whose share inside a star-shaped region can be summed direction by direction."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np

from lightning_goldy.analysis.radial import (
    Array,
    RadialIntegral,
    log_cap_integral,
    log_gaussian_integral,
    log_sphere_area,
    log_uniform_integral,
)
from lightning_goldy.core.ray import Proposal


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
