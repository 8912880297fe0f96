from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from lightning_goldy.analysis.basin.result import (
    log_cap_integral,
    log_gaussian_integral,
    log_sphere_area,
    log_uniform_integral,
)
from tests.references.volume import log_radial_integral


@pytest.mark.parametrize("dimension", [1, 2, 3, 10, 50, 500, 5000])
def test_a_centred_ball_has_the_chi_square_probability(dimension: int) -> None:
    radii = np.array([0.1, 0.5, 1.0, 2.0]) * math.sqrt(dimension)
    found = log_gaussian_integral(radii, dimension, linear=0.0, quadratic=1.0).log_integral
    found = found + log_sphere_area(dimension) - dimension / 2 * math.log(2 * math.pi)
    with mp.workdps(40):
        expected = [float(mp.log(mp.gammainc(mpf(dimension) / 2, 0, mpf(r) ** 2 / 2, regularized=True))) for r in radii]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("dimension", "linear", "quadratic", "radius"),
    [
        (1, -2.0, 1.0, 5.0),
        (1, 2.0, 1.0, 5.0),
        (2, -40.0, 1.0, 60.0),
        (3, 1e3, 1e-3, 2.0),
        (10, 3.0, 2.0, 1.5),
        (200, -5.0, 1.0, 30.0),
        (200, 50.0, 1.0, 3.0),
        (100_000, -30.0, 1.0, 331.0),
        (100_000, 30.0, 1.0, 200.0),
        (1_000_000, 0.0, 1e6, 1e-3),
    ],
)
def test_equals_adaptive_quadrature(dimension: int, linear: float, quadratic: float, radius: float) -> None:
    found = log_gaussian_integral(radius, dimension, linear=linear, quadratic=quadratic).log_integral[0]
    expected = log_radial_integral(radius, dimension, linear, quadratic)
    # Values near 0 are compared as integrals are: relative to the integral, absolute in its logarithm.
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dimension", [2, 3, 10, 500, 5000])
@pytest.mark.parametrize("angle", [1e-3, 0.1, 0.5, 1.5, 1.6, 2.0, 3.0])
def test_a_cap_has_the_incomplete_beta_area(dimension: int, angle: float) -> None:
    found = log_cap_integral(angle, dimension).log_integral[0] + log_sphere_area(dimension - 1)
    with mp.workdps(40):
        half = mp.betainc(mpf(dimension - 1) / 2, mpf(1) / 2, 0, mp.sin(mpf(angle)) ** 2, regularized=True) / 2
        share = half if angle <= math.pi / 2 else 1 - half
        expected = float(mp.log(share))
    assert found - log_sphere_area(dimension) == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_the_whole_space_and_the_whole_sphere_have_probability_one() -> None:
    for dimension in (1, 2, 7, 10_000):
        whole = log_gaussian_integral(math.inf, dimension, linear=0.0, quadratic=1.0).log_integral[0]
        assert whole + log_sphere_area(dimension) == pytest.approx(dimension / 2 * math.log(2 * math.pi), rel=1e-12)
    for dimension in (2, 3, 1000):
        whole = log_cap_integral(math.pi, dimension).log_integral[0]
        assert whole + log_sphere_area(dimension - 1) == pytest.approx(log_sphere_area(dimension), abs=1e-10)


def test_a_uniform_ball_has_its_volume() -> None:
    for dimension, volume in ((1, 2.0), (2, math.pi), (3, 4 / 3 * math.pi)):
        found = log_uniform_integral(1.0, dimension).log_integral[0] + log_sphere_area(dimension)
        assert found == pytest.approx(math.log(volume), abs=1e-14)


@settings(max_examples=200, deadline=None)
@given(
    dimension=st.one_of(st.integers(1, 50), st.integers(51, 10**9)),
    linear=st.floats(-1e6, 1e6),
    quadratic=st.floats(1e-6, 1e12),
    radius=st.floats(1e-9, 1e6),
)
def test_never_raises_grows_with_the_radius_and_tells_how_fast(
    dimension: int, linear: float, quadratic: float, radius: float
) -> None:
    step = 1e-4
    radii = radius * np.exp([-step, 0.0, step])
    with np.errstate(all="raise", under="ignore"):
        found = log_gaussian_integral(radii, dimension, linear=linear, quadratic=quadratic)
    assert np.isfinite(found.log_integral).all()
    size = 1 + np.abs(found.log_integral).max()
    assert (np.diff(found.log_integral) >= -1e-12 * size).all()
    assert (found.sensitivity >= 0).all()
    if found.sensitivity[1] * step < 1e-3:
        numerical = (found.log_integral[2] - found.log_integral[0]) / (2 * step)
        # The difference quotient itself is off by the rounding of the values and by the change of the slope.
        bend = abs(found.sensitivity[2] - found.sensitivity[0])
        assert numerical == pytest.approx(found.sensitivity[1], abs=bend + 1e-11 * size / step, rel=1e-3)
