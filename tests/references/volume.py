"""Slow, obvious volumes: every vector whole, a doubling and a bisection, integrals by another library."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from mpmath import mp, mpf
from torch import Tensor, nn

from lightning_goldy.core import ParameterSpace, random_direction
from lightning_goldy.core.vector import direction_seed


def unit_direction(module: nn.Module, seed: int, index: int, space: ParameterSpace | None = None) -> Tensor:
    """The direction of an estimate as one flat float64 vector of length 1."""
    space = space or ParameterSpace.of(module)
    vector = random_direction(space, direction_seed(seed, index), dtype=torch.float32)
    flat = torch.cat([tensor.reshape(-1).double() for tensor in vector.values()])
    return flat / flat.norm()


def flat_parameters(module: nn.Module, space: ParameterSpace | None = None) -> Tensor:
    parameters = (space or ParameterSpace.of(module)).resolve(module)
    return torch.cat([parameter.detach().reshape(-1).double() for parameter in parameters.values()])


def put(module: nn.Module, flat: Tensor, space: ParameterSpace | None = None) -> None:
    start = 0
    with torch.no_grad():
        for parameter in (space or ParameterSpace.of(module)).resolve(module).values():
            parameter.copy_(flat[start : start + parameter.numel()].view(parameter.shape))
            start += parameter.numel()


def radius_reference(cost: Callable[[float], float], cutoff: float, start: float, rtol: float) -> tuple[float, int]:
    """Doubles until outside, halves the bracket until the cost is within ``rtol``; the radius, and the evaluations."""
    low, high, radius = 0.0, math.inf, start
    for count in range(1, 500):
        value = cost(radius)
        if abs(value - cutoff) <= rtol * cutoff:
            return radius, count
        if value < cutoff:
            low = radius
        else:
            high = radius
        radius = 2 * radius if math.isinf(high) else (low + high) / 2
    raise AssertionError("no radius")


def log_sphere_area(dimension: int) -> float:
    return float(mp.log(2) + mpf(dimension) / 2 * mp.log(mp.pi) - mp.loggamma(mpf(dimension) / 2))


def log_radial_integral(radius: float, dimension: int, linear: float, quadratic: float) -> float:
    """log of the integral of r^(D-1) exp(-b r - c r^2 / 2) over [0, R], by adaptive quadrature in 30 digits."""
    with mp.workdps(30):
        mode = (-linear + math.sqrt(linear**2 + 4 * quadratic * (dimension - 1))) / (2 * quadratic)
        width = 1 / math.sqrt(quadratic + (dimension - 1) / max(mode, 1e-300) ** 2) if dimension > 1 else radius / 4
        inner = [mode + step * width for step in (-12, -6, -3, -1, 0, 1, 3, 6, 12)] + list(np.linspace(0, radius, 25))
        points = [mpf(0), *(mpf(x) for x in sorted(inner) if 0 < x < radius), mpf(radius)]
        log_top = max(_log_integrand(float(point), dimension, linear, quadratic) for point in points[1:])
        total = mp.quad(
            lambda r: mp.exp((dimension - 1) * mp.log(r) - linear * r - quadratic * r * r / 2 - log_top), points
        )
        return float(mp.log(total) + log_top)


def _log_integrand(radius: float, dimension: int, linear: float, quadratic: float) -> float:
    return (dimension - 1) * math.log(radius) - linear * radius - quadratic * radius * radius / 2


def gaussian_volume_reference(
    module: nn.Module,
    cost: Callable[[nn.Module], float],
    *,
    cutoff: float,
    n_directions: int,
    seed: int = 0,
    stretch: Tensor | None = None,
    rtol: float = 1e-6,
) -> list[float]:
    """Estimates of log P under N(0, sigma^2 I), sigma the root mean square; ``stretch`` preconditions."""
    anchor = flat_parameters(module)
    dimension = len(anchor)
    variance = float(anchor @ anchor) / dimension
    estimates = []
    for index in range(n_directions):
        direction = unit_direction(module, seed, index)
        if stretch is not None:
            direction = direction * stretch

        def at(radius: float, direction: Tensor = direction) -> float:
            put(module, anchor + radius * direction)
            value = float(cost(module))
            put(module, anchor)
            return value

        radius, _ = radius_reference(at, cutoff, 1e-3, rtol)
        linear, quadratic = float(direction @ anchor) / variance, float(direction @ direction) / variance
        estimates.append(
            log_radial_integral(radius, dimension, linear, quadratic)
            + log_sphere_area(dimension)
            - dimension / 2 * math.log(2 * math.pi * variance)
            - float(anchor @ anchor) / (2 * variance)
        )
    return estimates


def divergence_reference(logits: Tensor, moved: Tensor) -> float:
    """Mean over rows of KL(softmax(logits) || softmax(moved)), by its definition in float64."""
    log_p, log_q = (torch.log_softmax(each.double(), dim=-1) for each in (logits, moved))
    return float((log_p.exp() * (log_p - log_q)).sum(dim=-1).mean())


def quadratic_volume_reference(curvature: Tensor, anchor: Tensor, cutoff: float, sigma: float = 1.0) -> float:
    """log P(sum h x^2 / 2 <= cutoff) for x ~ N(-anchor, sigma^2), by inverting the tilted characteristic function."""
    h, a, variance = curvature.double().numpy(), anchor.double().numpy(), sigma**2

    def log_transform(s: complex) -> complex:
        scale = 1 + s * h * variance
        return complex(-0.5 * np.log(scale).sum() - 0.5 * (a * a * s * h / scale).sum())

    def mean(b: float) -> float:
        scale = 1 + b * h * variance
        return float((0.5 * h * variance / scale + 0.5 * a * a * h / scale**2).sum())

    low, high = math.log(1e-9 / cutoff), math.log(len(h) / cutoff) + 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(math.exp(middle)) > cutoff else (low, middle)
    b = math.exp(low)
    scale = 1 + b * h * variance
    deviation = math.sqrt(float((0.5 * (h * variance / scale) ** 2 + a * a * h * h * variance / scale**3).sum()))
    steps = np.linspace(-15, 15, 1501) / deviation
    values = [np.exp(log_transform(b + 1j * u) - log_transform(b) + 1j * u * cutoff) / (b + 1j * u) for u in steps]
    total = float(np.real(values).sum()) * (steps[1] - steps[0]) / (2 * math.pi)
    return log_transform(b).real + b * cutoff + math.log(total)


def radial_volume_reference(radius: float, dimension: int, sigma: float = 1.0) -> float:
    """log P(|x| <= radius) for x ~ N(0, sigma^2) in D dimensions."""
    with mp.workdps(40):
        inside = mp.gammainc(mpf(dimension) / 2, 0, mpf(radius / sigma) ** 2 / 2, regularized=True)
        return float(mp.log(inside))


def splitting_volume_reference(
    cost: Callable[[Tensor], Tensor], dimension: int, cutoff: float, *, sigma: float = 1.0, particles: int = 1000
) -> tuple[float, float]:
    """log P(cost <= cutoff) under N(0, sigma^2), and its error, by splitting: half of the points survive each level.

    Survivors are copied and moved by steps that leave the prior as it is and are refused where they leave the level.
    """
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(particles, dimension, generator=generator, dtype=torch.float64) * sigma

    points, total, levels, size = normal(), 0.0, 0, 0.5
    costs = cost(points)
    while (level := float(costs.median())) > cutoff:
        total, levels = total + math.log(float((costs <= level).double().mean())), levels + 1
        kept = (costs <= level).nonzero().flatten()
        chosen = kept[torch.randint(len(kept), (particles,), generator=generator)]
        points, costs = points[chosen], costs[chosen]
        for _ in range(15):
            moved = math.sqrt(1 - size**2) * points + size * normal()
            at = cost(moved)
            inside = at <= level
            points, costs = torch.where(inside[:, None], moved, points), torch.where(inside, at, costs)
            size = min(1.0, max(1e-3, size * math.exp(0.2 * (float(inside.double().mean()) - 0.3))))
    share = float((costs <= cutoff).double().mean())
    return total + math.log(share), math.sqrt((levels + (1 - share) / share) / particles)
