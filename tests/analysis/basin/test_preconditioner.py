from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from lightning_goldy.analysis import diagonal_preconditioner, tuned_preconditioner
from lightning_goldy.analysis.basin import local_volume
from lightning_goldy.core import ParameterSpace, ParameterVector, SpaceError
from tests.references.preconditioner import Small, dense_map, diagonal_scales


def curvature_of(module, *, dtype=torch.float32, spread=3.0):
    space = ParameterSpace.of(module)
    tensors = {
        name: (torch.randn(shape) * spread).exp().to(dtype) * torch.randn(shape).sign()
        for name, shape in zip(space.names, space.shapes, strict=True)
    }
    return ParameterVector(space, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("eps", "exponent", "eps_unit"),
    [(0.0, 0.5, "mean"), (0.1, 0.5, "mean"), (10.0, 1.0, "mean"), (0.3, 0.5, "absolute"), (0.01, 0.37, "absolute")],
)
def test_the_map_is_the_dense_diagonal_of_determinant_one(dtype, eps, exponent, eps_unit):
    curvature = curvature_of(Small(), dtype=dtype)
    preconditioner = diagonal_preconditioner(curvature, eps=eps, exponent=exponent, eps_unit=eps_unit)
    dense = dense_map(preconditioner)
    expected = diagonal_scales(list(curvature.values()), eps=eps, exponent=exponent, eps_unit=eps_unit)
    assert torch.allclose(dense, torch.diag(torch.tensor(expected, dtype=torch.float64)), rtol=1e-6, atol=0)
    assert abs(float(torch.linalg.slogdet(dense).logabsdet)) < 1e-6
    assert (preconditioner.name, preconditioner.whole_tensors) == ("diagonal", False)
    assert preconditioner.space is curvature.space


def test_slices_are_parts_of_the_whole_bit_for_bit_and_the_curvature_stays_as_it_was():
    space = ParameterSpace.of(nn.Linear(40, 30, bias=False))
    # float64 is where a careless conversion would write into the curvature itself.
    for tensor in (torch.randn(30, 40), torch.randn(30, 40, dtype=torch.float64), torch.randn(40, 30).T):
        before = tensor.clone()
        preconditioner = diagonal_preconditioner(ParameterVector(space, {"weight": tensor}), eps=0.1)
        direction = torch.randn(1200)
        whole = preconditioner.apply("weight", direction.clone(), 0)
        cuts = [0, 1, 7, 500, 1199, 1200]
        parts = [
            preconditioner.apply("weight", direction[start:stop].clone(), start)
            for start, stop in itertools.pairwise(cuts)
        ]
        assert torch.equal(torch.cat(parts), whole)
        assert torch.equal(tensor, before)
        expected = diagonal_scales([tensor.contiguous()], eps=0.1, exponent=0.5)
        assert torch.allclose(
            whole.double(), direction.double() * torch.tensor(expected, dtype=torch.float64), rtol=1e-6
        )


def test_the_direction_is_overwritten_not_copied():
    curvature = curvature_of(Small())
    direction = torch.ones(6)
    result = diagonal_preconditioner(curvature, eps=0.1).apply("layer.weight", direction, 0)
    assert result.data_ptr() == direction.data_ptr()
    assert result.dtype == torch.float32


def test_relative_damping_does_not_depend_on_the_scale_and_absolute_damping_does():
    curvature = curvature_of(Small())
    tiny = curvature * 2.0**-40
    for unit, same in (("mean", True), ("absolute", False)):
        first = diagonal_preconditioner(curvature, eps=0.5, eps_unit=unit).apply("layer.weight", torch.ones(6), 0)
        second = diagonal_preconditioner(tiny, eps=0.5, eps_unit=unit).apply("layer.weight", torch.ones(6), 0)
        assert torch.allclose(first, second, rtol=1e-6) is same


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_curvatures_whose_powers_float32_cannot_hold_still_have_determinant_one(exponent):
    space = ParameterSpace.of(nn.Linear(4, 1, bias=False))
    curvature = ParameterVector(space, {"weight": torch.tensor([[1e-30, 3e-30, 1e-28, 7e-29]])})
    preconditioner = diagonal_preconditioner(curvature, eps=0.0, exponent=exponent)
    scales = preconditioner.apply("weight", torch.ones(4), 0).double()
    expected = diagonal_scales([curvature["weight"]], eps=0.0, exponent=exponent)
    assert torch.allclose(scales, torch.tensor(expected, dtype=torch.float64), rtol=1e-5)
    assert abs(float(scales.log().sum())) < 1e-5


def test_more_damping_brings_the_map_closer_to_the_identity():
    curvature = curvature_of(Small())
    distances = [
        float((dense_map(diagonal_preconditioner(curvature, eps=eps)) - torch.eye(9)).norm())
        for eps in (0.0, 0.1, 1.0, 10.0, 1e4)
    ]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-2


def quadratic(module, diagonal):
    anchor = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}

    def cost(model):
        moved = dict(model.named_parameters())
        terms = [((moved[name] - anchor[name]).double() ** 2 * diagonal[name].double()).sum() for name in anchor]
        return 0.5 * float(sum(terms))

    return cost


def test_with_the_exact_hessian_a_quadratic_cost_is_the_same_in_every_direction():
    module = nn.Linear(9, 6).double()
    hessian = curvature_of(module, dtype=torch.float64, spread=2.0).map(torch.abs)
    cost = quadratic(module, hessian)
    options = {"measure": "uniform", "cutoff": 0.5, "n_directions": 8}
    result = local_volume(module, cost, preconditioner=diagonal_preconditioner(hessian, eps=0), **options)
    # The ellipsoid sum_i h_i x_i^2 / 2 <= c in D dimensions.
    size = hessian.space.numel
    log_ball = size / 2 * math.log(math.pi) - math.lgamma(size / 2 + 1)
    log_volume = (
        log_ball + size / 2 * math.log(2 * 0.5) - 0.5 * sum(float(tensor.log().sum()) for tensor in hessian.values())
    )
    assert result.estimates.numpy() == pytest.approx(log_volume, abs=1e-4)
    assert result.spread < 1e-4
    plain = local_volume(module, cost, **options)
    assert plain.spread > 1
    assert plain.lower_bound < log_volume - 5


@pytest.mark.parametrize("values", [[1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])
@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_a_curvature_that_is_not_finite_is_named(values, eps):
    module = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 3, bias=False))
    space = ParameterSpace.of(module)
    curvature = ParameterVector(space, {"0.weight": torch.ones(1, 3), "1.weight": torch.tensor(values)[:, None]})
    with pytest.raises(ValueError, match=r"no scales for 1\.weight: .* NaN or infinite"):
        diagonal_preconditioner(curvature, eps=eps)


def test_zeros_need_damping():
    space = ParameterSpace.of(nn.Linear(2, 1, bias=False))
    some, none = (ParameterVector(space, {"weight": torch.tensor([row])}) for row in ([0.0, 1.0], [0.0, 0.0]))
    with pytest.raises(ValueError, match=r"no scales for weight: .* zeros, and eps is 0"):
        diagonal_preconditioner(some, eps=0)
    with pytest.raises(ValueError, match="'adam 2' is zero everywhere"):
        diagonal_preconditioner(none, eps=0.1, name="adam 2")
    scales = diagonal_preconditioner(some, eps=0.5).apply("weight", torch.ones(2), 0)
    assert scales.tolist() == pytest.approx([math.sqrt(5), 1 / math.sqrt(5)], rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -0.1}, "eps must be finite and at least 0; got -0.1"),
        ({"eps": math.nan}, "eps must be finite"),
        ({"exponent": 0.0}, "exponent must be finite and above 0; got 0.0"),
        ({"eps_unit": "median"}, "unknown eps_unit 'median'; did you mean 'mean'"),
    ],
)
def test_arguments_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        diagonal_preconditioner(curvature_of(Small()), **{"eps": 0.1, **change})


def test_an_unknown_name_is_refused():
    with pytest.raises(SpaceError, match="no parameter 'weight'"):
        diagonal_preconditioner(curvature_of(Small()), eps=0.1).apply("weight", torch.ones(6), 0)


# Tuning


class Bound:
    """Stands for a volume result."""

    def __init__(self, lower_bound, evaluations=3):
        self.lower_bound = lower_bound
        self.total_evaluations = evaluations


GRID = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


@pytest.mark.parametrize("peak", range(5))
def test_the_highest_lower_bound_is_found_wherever_it_lies(peak):
    values = {eps: -float(abs(place - peak)) for place, eps in enumerate(GRID)}
    tuned = tuned_preconditioner(lambda eps: ("P", eps), lambda made: Bound(values[made[1]]), candidates=GRID[::-1])
    assert (tuned.preconditioner, tuned.eps) == (("P", GRID[peak]), GRID[peak])
    _, eps, results = tuned
    assert results[eps].lower_bound == 0
    assert tuned.evaluations == 3 * len(results)
    assert next(iter(results)) == GRID[2]


def test_each_side_is_left_after_two_that_are_worse():
    grid = [10.0**power for power in range(-4, 5)]
    tried = []

    def bound(eps):
        tried.append(eps)
        return Bound(-abs(math.log10(eps)))

    tuned = tuned_preconditioner(lambda eps: eps, bound, candidates=grid)
    assert tried == [1.0, 10.0, 100.0, 0.1, 0.01]
    assert list(tuned.results) == tried
    assert tuned.eps == 1.0


def test_an_unbounded_estimate_is_never_chosen():
    values = {1e-3: math.nan, 1e-2: -5.0, 1e-1: math.nan, 1.0: math.nan, 10.0: math.nan}
    tuned = tuned_preconditioner(lambda eps: eps, lambda eps: Bound(values[eps]), candidates=GRID)
    assert tuned.eps == 1e-2
    assert list(tuned.results) == [1e-1, 1.0, 10.0, 1e-2, 1e-3]
    with pytest.raises(ValueError, match=r"no damping of .* gives a lower bound"):
        tuned_preconditioner(lambda eps: eps, lambda eps: Bound(math.nan), candidates=GRID)


@pytest.mark.parametrize("candidates", [(), (0.1, 0.1), (-1.0, 1.0), (math.nan,)])
def test_candidates_are_distinct_dampings(candidates):
    with pytest.raises(ValueError, match="candidates are distinct dampings of at least 0"):
        tuned_preconditioner(lambda eps: eps, lambda eps: Bound(0.0), candidates=candidates)


def test_tuning_on_a_quadratic_with_its_exact_hessian_wants_little_damping():
    module = nn.Linear(5, 4)
    hessian = curvature_of(module, spread=1.0).map(torch.abs)
    cost = quadratic(module, hessian)
    tuned = tuned_preconditioner(
        lambda eps: diagonal_preconditioner(hessian, eps=eps),
        lambda made: local_volume(module, cost, preconditioner=made, n_directions=3, cutoff=0.01, measure="uniform"),
        candidates=(1e-3, 0.1, 10.0),
    )
    assert tuned.eps == 1e-3
    bounds = [tuned.results[eps].lower_bound for eps in sorted(tuned.results)]
    assert bounds == sorted(bounds, reverse=True)
    assert tuned.evaluations == sum(result.total_evaluations for result in tuned.results.values())
