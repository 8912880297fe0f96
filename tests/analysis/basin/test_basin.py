from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_goldy.analysis import basin_volume, local_volume
from lightning_goldy.analysis.basin import Estimator
from lightning_goldy.analysis.divergence import AnchoredDivergence
from lightning_goldy.core import CausalLMObjective, ClassifierObjective, ParameterSpace
from lightning_goldy.core.vector import Ray, direction_seed
from tests.core.test_directions import Stretch
from tests.references.models import build, token_batch
from tests.references.volume import flat_parameters, unit_direction


class ConvNeXtLike(nn.Module):
    """A depthwise convolution, a normalisation over channels and a pointwise MLP on a residual path."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 2, stride=2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.view(-1, 1, 8, 8))  # [B, width, 4, 4]
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))  # [B, 4, 4, width]
        y = self.down(nn.functional.gelu(self.up(y))) * self.scale
        return self.head((x + y.permute(0, 3, 1, 2)).mean(dim=(2, 3)))


def digits(count: int = 300) -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.data[:count] / 16, dtype=torch.float32), torch.tensor(found.target[:count])


def trained(model: nn.Module, steps: int = 150) -> nn.Module:
    x, y = digits()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


def subject(kind: str) -> tuple[nn.Module, list, object]:
    torch.manual_seed(0)
    if kind == "mlp":
        return (
            trained(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))),
            [digits(100)],
            ClassifierObjective(),
        )
    if kind == "convnext":
        return trained(ConvNeXtLike()), [digits(100)], ClassifierObjective()
    return build(kind).eval(), [token_batch(3, 12), token_batch(2, 12)], CausalLMObjective()


@pytest.mark.parametrize("cutoff", [1e-4, 1e-2, 0.1])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neox", "qwen3", "convnext", "mlp"])
def test_the_radius_has_the_divergence_it_says_and_the_model_comes_back(kind: str, cutoff: float) -> None:
    model, batches, objective = subject(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = basin_volume(model, batches, objective, cutoff=cutoff, n_directions=5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert result.deltas.tolist() == pytest.approx([cutoff] * 5, rel=1e-2)
    divergence = AnchoredDivergence(model, batches, objective)
    with Ray(model, ParameterSpace.of(model)) as ray:
        for index, radius in enumerate(result.radii.tolist()):
            ray.turn(direction_seed(0, index))
            ray.move(1.0, radius)
            assert divergence(model) == pytest.approx(cutoff, rel=1e-3)


def test_more_precise_radii_move_estimates_by_no_more_than_the_stated_tolerance() -> None:
    model, batches, objective = subject("mlp")
    rough = basin_volume(model, batches, objective, n_directions=6)
    fine = basin_volume(model, batches, objective, n_directions=6, rtol=1e-4)
    assert (rough.estimates - fine.estimates).abs().max() <= rough.tolerance
    assert fine.tolerance < rough.tolerance / 50


def softmax_regression() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(6, 4, bias=False).double()
    x = torch.randn(40, 6, dtype=torch.float64)
    with torch.no_grad():
        p = torch.softmax(model(x), -1)  # [N, C]
    covariance = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]  # [N, C, C]
    fisher = torch.einsum("nij,nk,nl->ikjl", covariance, x, x).reshape(24, 24) / len(x)  # [C in, C in]
    return model, x, fisher


@pytest.mark.parametrize("cutoff", [1e-8, 1e-6])
def test_softmax_regression_follows_second_order_theory_at_small_cutoffs(cutoff: float) -> None:
    model, x, fisher = softmax_regression()
    batches = [(x, torch.zeros(len(x), dtype=torch.long))]
    result = basin_volume(model, batches, ClassifierObjective(), cutoff=cutoff, n_directions=30, measure="uniform")
    for index, radius in enumerate(result.radii.tolist()):
        u = unit_direction(model, 0, index)
        # KL = r^2 u'Fu / 2 + O(r^3)
        expected = math.sqrt(2 * cutoff / float(u @ fisher @ u))
        assert radius == pytest.approx(expected, rel=30 * math.sqrt(cutoff) + 1e-5)
    assert result.slopes.tolist() == pytest.approx([2.0] * 30, rel=100 * math.sqrt(cutoff))
    assert result.scaling_exponent == pytest.approx(12, rel=1e-2)


def test_a_better_proposal_raises_the_bound_and_best_tells_both() -> None:
    model, x, fisher = softmax_regression()
    batches = [(x, torch.zeros(len(x), dtype=torch.long))]
    scale = (fisher.diagonal() + 1e-3).rsqrt()
    scale = scale / scale.log().mean().exp()
    stretch = Stretch(ParameterSpace.of(model), {"weight": scale})
    result = basin_volume(
        model,
        batches,
        ClassifierObjective(),
        n_directions=8,
        preconditioner={"none": None, "fisher": stretch},
    )
    assert set(result.proposals) == {"none", "fisher"}
    bounds = {name: numbers["lower_bound"] for name, numbers in result.proposals.items()}
    assert result.preconditioner == max(bounds, key=bounds.__getitem__)
    assert result.lower_bound == max(bounds.values())
    assert result.total_evaluations == sum(numbers["evaluations"] for numbers in result.proposals.values())


def test_options_change_what_is_compared() -> None:
    model, batches, objective = subject("gpt2")
    whole = basin_volume(model, batches, objective, n_directions=2)
    first = basin_volume(model, batches[:1], objective, n_directions=2)
    assert basin_volume(model, batches, objective, n_directions=2, n_samples=3).estimates.equal(first.estimates)
    assert not whole.estimates.equal(first.estimates)
    short = [{key: value[:, :6] for key, value in batch.items()} for batch in batches]
    cut = basin_volume(model, batches, objective, n_directions=2, max_seq_len=6)
    assert cut.estimates.equal(basin_volume(model, short, objective, n_directions=2).estimates)
    regular = basin_volume(model, batches, objective, n_directions=2, l2_reg=1.0)
    assert (regular.radii < whole.radii).all()
    part = ParameterSpace.of(model, include=["*.mlp.*"])
    assert basin_volume(model, batches, objective, n_directions=2, space=part).dimension == part.numel
    for cache in ("cpu", "none"):
        assert basin_volume(model, batches, objective, n_directions=2, cache=cache).estimates.equal(whole.estimates)
    for directions in ("implicit", "explicit"):
        other = basin_volume(model, batches, objective, n_directions=2, directions=directions)
        assert other.estimates.equal(whole.estimates)


def test_settings_go_whole_or_by_name() -> None:
    model, batches, objective = subject("mlp")
    settings = {"seed": 3, "rtol": 1e-3, "measure": "uniform", "l2_reg": 0.5, "first_direction": 2, "max_radius": 50.0}
    named = basin_volume(model, batches, objective, n_directions=2, **settings)
    whole = basin_volume(model, batches, objective, n_directions=2, estimator=Estimator(**settings))
    assert named.to_json() == dataclasses.replace(whole, seconds=named.seconds).to_json()
    assert (named.seed, named.rtol, named.measure, named.first_direction, named.max_radius) == (
        3,
        1e-3,
        "uniform",
        2,
        50.0,
    )
    with pytest.raises(ValueError, match="not both; got estimator= and seed, rtol"):
        basin_volume(model, batches, objective, estimator=Estimator(), seed=1, rtol=0.1)
    with pytest.raises(ValueError, match="not both; got estimator= and measure"):
        local_volume(model, lambda module: 0.0, estimator=Estimator(), measure="uniform")


def test_the_former_name_of_n_samples_is_taken_with_a_warning() -> None:
    model, batches, objective = subject("gpt2")
    expected = basin_volume(model, batches, objective, n_directions=1, n_samples=2)
    with pytest.warns(DeprecationWarning, match="val_size has become n_samples"):
        former = basin_volume(model, batches, objective, n_directions=1, val_size=2)
    assert former.estimates.equal(expected.estimates)
    with pytest.raises(ValueError, match="give n_samples= alone"), pytest.warns(match="has become"):
        basin_volume(model, batches, objective, n_samples=2, val_size=2)


def test_a_module_that_left_the_anchor_is_refused() -> None:
    model, batches, objective = subject("mlp")
    divergence = AnchoredDivergence(model, batches, objective)
    assert local_volume(model, divergence, n_directions=1).anchor_cost == 0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with pytest.raises(ValueError, match=r"the cost at the anchor is .* and must be about 0"):
        local_volume(model, divergence, n_directions=1)


def test_a_rounded_cache_states_its_bias() -> None:
    model, batches, objective = subject("gpt2")
    exact = basin_volume(model, batches, objective, n_directions=2)
    rounded = basin_volume(model, batches, objective, n_directions=2, cache_dtype=torch.float16)
    assert exact.anchor_cost == 0
    assert 0 < rounded.anchor_cost < 1e-5
    relative = 3 * math.sqrt(rounded.anchor_cost / 1e-2)
    assert rounded.radii.tolist() == pytest.approx(exact.radii.tolist(), rel=relative)


def test_a_bfloat16_model_is_walked_in_its_own_precision() -> None:
    torch.manual_seed(0)
    model = build("llama").to(torch.bfloat16).eval()
    before = flat_parameters(model)
    result = basin_volume(model, [token_batch(3, 12)], n_directions=3, cutoff=0.05)
    assert torch.equal(flat_parameters(model), before)
    assert not result.unbounded
    reference = basin_volume(model.float(), [token_batch(3, 12)], n_directions=3, cutoff=0.05)
    # Rounding weights to 8 bits moves the model by itself, so radii agree only roughly.
    assert result.radii.tolist() == pytest.approx(reference.radii.tolist(), rel=0.1)


def test_a_wide_gaussian_is_the_uniform_measure() -> None:
    model, batches, objective = subject("gpt2")
    uniform = basin_volume(model, batches, objective, n_directions=2, measure="uniform")
    wide = basin_volume(model, batches, objective, n_directions=2, sigma=1e4)
    assert wide.sigma == 1e4
    density = -wide.dimension / 2 * math.log(2 * math.pi * 1e8)
    expected = [value + density for value in uniform.estimates.tolist()]
    # Both start from radii of their own, so both tolerances count.
    assert wide.estimates.tolist() == pytest.approx(expected, abs=wide.tolerance + uniform.tolerance)
