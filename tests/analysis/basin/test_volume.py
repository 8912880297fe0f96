from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf
from scipy.stats import ncx2
from torch import Tensor, nn

from lightning_goldy.analysis import local_volume
from lightning_goldy.analysis.basin import aggregate, best_of
from lightning_goldy.core import ParameterSpace
from tests.core.test_directions import Stretch
from tests.references.volume import gaussian_volume_reference, log_sphere_area


class Point(nn.Module):
    """A point of parameter space: D elements in two tensors."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        half = len(values) // 2
        self.first, self.second = nn.Parameter(values[:half].clone()), nn.Parameter(values[half:].clone())

    @property
    def value(self) -> Tensor:
        return torch.cat([self.first, self.second])


def quadratic(point: Point, curvature: Tensor | float = 1.0) -> Callable[[nn.Module], Tensor]:
    """Half the squared distance from where the point is now, weighted by a curvature."""
    anchor = point.value.detach().clone()
    return lambda module: 0.5 * (curvature * (module.value - anchor).square()).sum()


def zeros(dimension: int) -> Point:
    return Point(torch.zeros(dimension, dtype=torch.float64))


@pytest.mark.parametrize("dimension", [10, 50, 500, 5000])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("sigma", [1.0, 0.03])
def test_a_centred_ball_has_the_chi_square_probability(dimension: int, share: float, sigma: float) -> None:
    point = zeros(dimension)
    radius = share * sigma * math.sqrt(dimension)
    result = local_volume(point, quadratic(point), cutoff=radius**2 / 2, sigma=sigma, n_directions=3)
    with mp.workdps(40):
        inside = mp.gammainc(mpf(dimension) / 2, 0, mpf(radius / sigma) ** 2 / 2, regularized=True)
        expected = float(mp.log(inside))
    assert result.estimates.tolist() == pytest.approx([expected] * 3, abs=1e-6)
    assert result.spread == pytest.approx(0, abs=1e-6)
    assert result.evaluations[1:].tolist() == [1, 1]


@pytest.mark.parametrize(("dimension", "distance"), [(2, 1.0), (5, 3.0), (20, 2.0)])
def test_a_ball_off_centre_has_the_noncentral_chi_square_probability(dimension: int, distance: float) -> None:
    torch.manual_seed(0)
    values = torch.randn(dimension, dtype=torch.float64)
    point = Point(values * distance / values.norm())
    count, radius = 2000, 1.5
    result = local_volume(
        point, quadratic(point), cutoff=radius**2 / 2, sigma=1.0, n_directions=count, seed=4, directions="explicit"
    )
    weights = result.estimates.exp()
    error = float(weights.std()) / math.sqrt(count)
    assert abs(float(weights.mean()) - ncx2.cdf(radius**2, dimension, distance**2)) < 4 * error
    assert error < 0.1 * float(weights.mean())


@pytest.mark.parametrize("dimension", [2, 30, 3000])
def test_the_uniform_measure_is_volume(dimension: int) -> None:
    point = Point(torch.ones(dimension, dtype=torch.float64))
    result = local_volume(point, quadratic(point), cutoff=2.0, measure="uniform")
    expected = log_sphere_area(dimension) + dimension * math.log(2.0) - math.log(dimension)
    assert result.log_volume == pytest.approx(expected, abs=1e-6, rel=1e-9)
    assert result.scaling_exponent == pytest.approx(dimension / 2, rel=1e-6)


@pytest.mark.parametrize(("dimension", "angle"), [(3, 0.7), (3, 2.5), (50, 0.3), (2000, 1.2)])
def test_the_sphere_measure_is_a_cap(dimension: int, angle: float) -> None:
    torch.manual_seed(1)
    point = Point(3 * torch.randn(dimension, dtype=torch.float64))
    chord = 2 * float(point.value.detach().norm()) * math.sin(angle / 2)
    result = local_volume(point, quadratic(point), cutoff=chord**2 / 2, measure="sphere", n_directions=4, rtol=1e-5)
    with mp.workdps(40):
        half = mp.betainc(mpf(dimension - 1) / 2, mpf(1) / 2, 0, mp.sin(mpf(angle)) ** 2, regularized=True) / 2
        expected = float(mp.log(half if angle <= math.pi / 2 else 1 - half))
    assert result.radii.tolist() == pytest.approx([angle] * 4, rel=1e-6)
    assert result.estimates.tolist() == pytest.approx([expected] * 4, rel=1e-5, abs=1e-4)


def log_ellipsoid(curvature: Tensor, cutoff: float) -> float:
    dimension = len(curvature)
    axes = 0.5 * torch.log(2 * cutoff / curvature)
    return log_sphere_area(dimension) - math.log(dimension) + float(axes.sum())


def test_the_ideal_preconditioner_gives_the_ellipsoid_without_spread() -> None:
    torch.manual_seed(0)
    curvature = torch.logspace(-3, 3, 400, dtype=torch.float64)[torch.randperm(400)]
    point = Point(torch.randn(400, dtype=torch.float64))
    scale = curvature.rsqrt()
    scale = scale / scale.log().mean().exp()
    stretch = Stretch(ParameterSpace.of(point), {"first": scale[:200], "second": scale[200:]})
    cost = quadratic(point, curvature)
    result = local_volume(point, cost, cutoff=0.1, measure="uniform", preconditioner=stretch)
    assert result.estimates.tolist() == pytest.approx([log_ellipsoid(curvature, 0.1)] * 10, abs=1e-4)
    assert result.spread < 1e-4
    plain = local_volume(point, cost, cutoff=0.1, measure="uniform")
    # E log r = (log 2 cutoff - E log sum h u^2) / 2 by an independent sample of directions.
    u = torch.randn(4000, 400, dtype=torch.float64)
    log_radii = 0.5 * math.log(0.2) - 0.5 * ((u * u) @ curvature / (u * u).sum(1)).log()  # [4000]
    expected = log_sphere_area(400) - math.log(400) + 400 * log_radii
    error = float(expected.std()) * math.sqrt(1 / 10 + 1 / 4000)
    assert abs(plain.lower_bound - float(expected.mean())) < 4 * error
    assert plain.lower_bound < plain.log_volume < log_ellipsoid(curvature, 0.1) - 100
    best = best_of({"none": plain, "stretch": result})
    assert best.preconditioner == "stretch"
    assert best.proposals["none"]["lower_bound"] == plain.lower_bound


@settings(max_examples=25, deadline=None)
@given(
    spectrum=st.lists(st.floats(-4, 4), min_size=2, max_size=30),
    cutoff=st.floats(-6, 1),
    seed=st.integers(0, 2**40),
)
def test_any_spectrum_lower_bound_ideal_proposal_and_scaling_law(
    spectrum: list[float], cutoff: float, seed: int
) -> None:
    curvature = 10.0 ** torch.tensor(spectrum, dtype=torch.float64)
    half = len(curvature) // 2
    point = zeros(len(curvature))
    scale = curvature.rsqrt()
    scale = scale / scale.log().mean().exp()
    stretch = Stretch(ParameterSpace.of(point), {"first": scale[:half], "second": scale[half:]})
    level = 10.0**cutoff
    cost = quadratic(point, curvature)
    # The flattest spectrum at the largest cutoff lies beyond the default maximum of 100 sqrt(D).
    options = {"measure": "uniform", "n_directions": 4, "seed": seed, "max_radius": 1e6}
    exact = log_ellipsoid(curvature, level)
    ideal = local_volume(point, cost, cutoff=level, preconditioner=stretch, **options)
    assert ideal.estimates.tolist() == pytest.approx([exact] * 4, abs=1e-5)
    plain = local_volume(point, cost, cutoff=level, **options)
    assert plain.lower_bound <= plain.log_volume
    assert 1 - 1e-9 <= plain.effective_sample_size <= 4 + 1e-9
    larger = local_volume(point, cost, cutoff=4 * level, **options)
    # Four times the cutoff is twice the radius along every direction.
    expected = (plain.estimates + len(curvature) * math.log(2)).tolist()
    assert larger.estimates.tolist() == pytest.approx(expected, abs=1e-5)


TOYS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], list[float]]] = {
    # Zero at the origin, growing along every ray.
    "line": (lambda x: np.abs(x[0]) ** 3 + 0.3 * x[0] ** 2, [0.8]),
    "egg": (lambda x: x[0] ** 2 + 4 * x[1] ** 4 + 0.5 * x[0] ** 2 * x[1] ** 2, [0.5, -0.7]),
    "diamond": (lambda x: np.abs(x[0]) + 3 * np.abs(x[1]), [1.0, 0.4]),
    "bean": (lambda x: (x[0] ** 2 + x[1] ** 2 + 2 * x[2] ** 2) * np.exp(0.4 * x[0]), [0.3, -0.2, 0.6]),
    "four": (lambda x: (x**2).sum(0) + 2 * np.abs(x).sum(0) ** 3, [0.3, 0.1, -0.4, 0.6]),
}


class Flat(nn.Module):
    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(values, dtype=torch.float64))


def grid_probability(toy: Callable[[np.ndarray], np.ndarray], anchor: list[float], cutoff: float) -> float:
    # The region of the toy in four dimensions is small, and its grid must be coarse.
    points, reach = {1: (200_001, 2.5), 2: (2001, 2.5), 3: (201, 2.5), 4: (41, 0.75)}[len(anchor)]
    axis = np.linspace(-reach, reach, points)
    grid = np.stack(np.meshgrid(*[axis] * len(anchor), indexing="ij"))  # [D, points, ...]
    place = grid + np.array(anchor).reshape(-1, *[1] * len(anchor))
    density = np.exp(-0.5 * (place**2).sum(0)) / (2 * math.pi) ** (len(anchor) / 2)
    return float((density * (toy(grid) <= cutoff)).sum() * (axis[1] - axis[0]) ** len(anchor))


@pytest.mark.parametrize("name", TOYS)
def test_nonlinear_costs_in_few_dimensions_equal_a_grid(name: str) -> None:
    toy, anchor = TOYS[name]
    module = Flat(anchor)

    def cost(module: nn.Module) -> float:
        return float(toy(module.value.detach().numpy() - np.array(anchor)))

    count = 1500
    result = local_volume(module, cost, cutoff=0.8, sigma=1.0, n_directions=count, seed=2, directions="explicit")
    weights = result.estimates.exp()
    error = float(weights.std()) / math.sqrt(count)
    # The grid's own error is that of the cells at the boundary.
    assert abs(float(weights.mean()) - grid_probability(toy, anchor, 0.8)) < 4 * error + 4e-3 * float(weights.mean())


def test_equals_the_slow_reference_direction_by_direction() -> None:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(20, 4, dtype=torch.float64)
    target = module(x).detach()

    def cost(module: nn.Module) -> Tensor:
        return (module(x) - target).square().mean()

    expected = gaussian_volume_reference(module, lambda each: float(cost(each).detach()), cutoff=1e-2, n_directions=6)
    result = local_volume(module, cost, cutoff=1e-2, n_directions=6)
    assert result.estimates.tolist() == pytest.approx(expected, abs=result.tolerance)
    tight = local_volume(module, cost, cutoff=1e-2, n_directions=6, rtol=1e-6)
    assert tight.tolerance < 1e-3 * result.tolerance
    assert tight.estimates.tolist() == pytest.approx(expected, abs=1e-4)


def test_splitting_directions_into_two_estimates_changes_nothing() -> None:
    torch.manual_seed(0)
    point = Point(torch.randn(40, dtype=torch.float64))
    cost = quadratic(point, torch.rand(40, dtype=torch.float64) + 0.1)
    whole = local_volume(point, cost, cutoff=0.1, n_directions=7)
    parts = [
        local_volume(point, cost, cutoff=0.1, n_directions=count, first_direction=first)
        for first, count in ((0, 3), (3, 4))
    ]
    joined = aggregate(parts)
    assert joined.estimates.tolist() == pytest.approx(whole.estimates.tolist(), abs=1e-6)
    assert joined.total_evaluations == sum(part.total_evaluations for part in parts)
    with pytest.raises(ValueError, match="share direction 0 of seed 0"):
        aggregate([whole, parts[0]])
    other = local_volume(point, cost, cutoff=0.2, n_directions=2, first_direction=7)
    with pytest.raises(ValueError, match=r"differ in cutoff: 0.1 and 0.2"):
        aggregate([whole, other])


def test_the_result_goes_to_json_and_back() -> None:
    point = Point(torch.ones(6))
    result = local_volume(point, quadratic(point), cutoff=0.5, n_directions=3)
    again = type(result).from_json(result.to_json())
    assert torch.equal(again.estimates, result.estimates)
    assert again.summary() == result.summary()


def test_a_direction_that_stays_inside_is_unbounded_and_not_a_number() -> None:
    point = Point(torch.ones(2, dtype=torch.float64))

    def cost(module: nn.Module) -> float:
        # A valley: nothing happens to the left.
        return max(0.0, float(module.value.detach()[0]) - 1.0)

    result = local_volume(point, cost, cutoff=0.1, n_directions=12, max_radius=50.0)
    assert 0 < len(result.unbounded) < 12
    assert all(math.isnan(float(result.estimates[index])) for index in result.unbounded)
    assert math.isnan(result.log_volume)
    assert result.summary()["unbounded"] == len(result.unbounded)
    assert result.max_radius == 50.0
    assert type(result).from_json(result.to_json()).unbounded == result.unbounded


def test_l2_regularisation_adds_half_the_squared_distance() -> None:
    point = Point(torch.ones(30, dtype=torch.float64))
    cost = quadratic(point, 2.0)
    plain = local_volume(point, quadratic(point, 5.0), cutoff=0.1, n_directions=3)
    assert local_volume(point, cost, cutoff=0.1, n_directions=3, l2_reg=3.0).estimates.tolist() == pytest.approx(
        plain.estimates.tolist(), abs=1e-6
    )


def test_nothing_is_left_behind_and_progress_is_told() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).train()
    module[0].weight.grad = torch.ones(5, 5)
    x = torch.randn(9, 5)
    with torch.no_grad():
        target = module.eval()(x)
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random, seen = torch.get_rng_state(), []
    local_volume(
        module,
        lambda module: (module(x) - target).square().mean(),
        n_directions=3,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert module.training
    assert module[0].weight.grad.sum() == 25
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_directions": 0}, "n_directions must be at least 1; got 0"),
        ({"cutoff": 0.0}, "cutoff must be positive"),
        ({"cutoff": math.nan}, "cutoff must be positive"),
        ({"sigma": -1.0}, "sigma must be positive"),
        ({"rtol": 1.0}, "rtol must lie in"),
        ({"max_evaluations": 0}, "max_evaluations must be at least 1"),
        ({"measure": "gausian"}, "unknown measure 'gausian'.*gaussian"),
        ({"directions": "explicite"}, "unknown directions 'explicite'.*explicit"),
        ({"measure": "sphere", "max_radius": 4.0}, "at most pi"),
        ({"max_radius": -1.0}, "max_radius must be positive"),
    ],
)
def test_bad_arguments_are_refused(options: dict, message: str) -> None:
    point = Point(torch.ones(4))
    with pytest.raises(ValueError, match=message):
        local_volume(point, quadratic(point), **options)


def test_bad_costs_and_points_are_refused() -> None:
    point = Point(torch.ones(4))
    with pytest.raises(ValueError, match=r"cost at the anchor is 0\.5 nats and must be about 0"):
        local_volume(point, lambda module: 0.5)
    with pytest.raises(ValueError, match="cost at the anchor is nan"):
        local_volume(point, lambda module: math.nan)
    with pytest.raises(ValueError, match="all zero"):
        local_volume(zeros(4), quadratic(zeros(4)))
    with pytest.raises(ValueError, match="not all zero"):
        local_volume(zeros(4), quadratic(zeros(4)), measure="sphere")
    stretch = Stretch(ParameterSpace.of(point), {})
    with pytest.raises(ValueError, match="takes no preconditioner"):
        local_volume(point, quadratic(point), measure="sphere", preconditioner=stretch)
    broken = Point(torch.tensor([1.0, math.nan, 1.0, 1.0]))
    with pytest.raises(ValueError, match="first are not finite"):
        local_volume(broken, quadratic(broken))
