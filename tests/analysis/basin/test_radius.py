from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_goldy.analysis.basin.volume import find_radius
from tests.references.volume import radius_reference

SMOOTH: dict[str, Callable[[float], float]] = {
    "quadratic": lambda r: 3 * r * r,
    "cubic": lambda r: r**3,
    "root": lambda r: math.sqrt(r),
    "quadratic then quartic": lambda r: r**2 + 50 * r**4,
    "saturating": lambda r: 0.02 * math.tanh(r * r),
    "exponential": lambda r: 1e-3 * math.expm1(min(r, 700.0)),
    "very flat": lambda r: 1e-9 * r * r,
    "wavy": lambda r: 2 * r * r * (1 + 0.1 * math.sin(9 * r)),
}


@pytest.mark.parametrize("start", [1e-6, 1e-2, 1.0, 1e4])
@pytest.mark.parametrize("name", SMOOTH)
def test_the_cost_at_the_radius_is_the_cutoff_within_a_tenth_of_the_tolerance(name: str, start: float) -> None:
    cost = SMOOTH[name]
    crossing = find_radius(lambda r: cost(r) if r < 1e8 else math.inf, 1e-2, start)
    assert cost(crossing.radius) == pytest.approx(1e-2, rel=1e-3)
    assert crossing.cost == pytest.approx(1e-2, rel=1e-2)
    expected, spent = radius_reference(cost, 1e-2, start, 1e-6)
    assert crossing.radius == pytest.approx(expected, rel=2e-3)
    assert crossing.evaluations < spent


def test_the_slope_is_the_local_one() -> None:
    assert find_radius(lambda r: r**3, 1e-2, 0.2).slope == pytest.approx(3, rel=1e-6)
    assert find_radius(SMOOTH["quadratic then quartic"], 1e-2, 0.08).slope == pytest.approx(2.536, rel=2e-2)


def test_a_good_start_takes_two_evaluations_and_a_perfect_one_takes_one() -> None:
    assert find_radius(lambda r: r * r, 1e-2, 0.1).evaluations == 1
    assert find_radius(lambda r: r * r, 1e-2, 0.107).evaluations == 2


def test_a_slope_that_nothing_is_known_of_corrects_little() -> None:
    """A quartic missed by 0.2 % at first, of which the slope of a quadratic would make as much on the other side."""
    crossing = find_radius(lambda r: r**4 * (1 + r * r / 512), 1.0, 1.0)
    assert crossing.radius**4 * (1 + crossing.radius**2 / 512) == pytest.approx(1.0, rel=1e-3)
    assert find_radius(lambda r: r**4 * (1 + r * r / 512), 1.0, 1.0, slope=4.0).evaluations == 1


@pytest.mark.parametrize("beyond", [math.inf, math.nan, -math.inf, 5.0])
def test_a_jump_is_found_where_it_is(beyond: float) -> None:
    crossing = find_radius(lambda r: 0.5 * r * r if r < 0.05 else abs(beyond), 1e-2, 1e-3)
    assert crossing.radius == pytest.approx(0.05, rel=1e-4)
    assert crossing.evaluations < 40


@pytest.mark.parametrize("beyond", [math.inf, math.nan])
@pytest.mark.parametrize("start", [1e-3, 0.7, 40.0])
def test_a_cliff_between_zero_and_no_number_is_found(beyond: float, start: float) -> None:
    crossing = find_radius(lambda r: 0.0 if r < 0.05 else beyond, 1e-2, start)
    assert crossing.radius == pytest.approx(0.05, rel=1e-4)
    assert crossing.cost == 0.0
    assert crossing.evaluations < 40


def test_a_cost_that_is_exactly_zero_inside_is_walked_out_of() -> None:
    assert find_radius(lambda r: max(0.0, r - 3.0), 1e-2, 1e-4).radius == pytest.approx(3.01, rel=1e-4)


def test_what_never_reaches_the_cutoff_is_no_number() -> None:
    crossing = find_radius(lambda r: 5e-3 * math.tanh(r), 1e-2, 1e-2, max_radius=100.0)
    assert math.isnan(crossing.radius)
    assert crossing.cost < 1e-2
    assert crossing.evaluations < 10
    assert find_radius(lambda r: r, 1e-2, 5.0, max_radius=1.0).radius == pytest.approx(1e-2, rel=1e-3)


def test_too_few_evaluations_are_an_error_that_tells_the_bracket() -> None:
    with pytest.raises(ValueError, match=r"did not come within 0.01 of the cutoff 0.01 in 2 evaluations.*between"):
        find_radius(lambda r: r**5, 1e-2, 1e-3, max_evaluations=2)


@settings(max_examples=300, deadline=None)
@given(
    power=st.floats(0.5, 8),
    bend=st.floats(0, 30),
    scale=st.floats(-8, 8),
    start=st.floats(-10, 10),
    cutoff=st.floats(-6, 1),
    rtol=st.sampled_from([1e-1, 1e-2, 1e-3]),
)
def test_hypothesis_any_growing_cost(
    power: float, bend: float, scale: float, start: float, cutoff: float, rtol: float
) -> None:
    level = 10.0**cutoff

    def cost(radius: float) -> float:
        x = radius / 10.0**scale
        return level * x**power * (1 + bend * x * x) if x < 1e30 else math.inf

    crossing = find_radius(cost, level, 10.0**start, rtol=rtol)
    assert cost(crossing.radius) == pytest.approx(level, rel=rtol / 10 * 1.05)
