from __future__ import annotations

import dataclasses
import importlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_goldy.analysis import TaylorApproximation, TaylorDiffResult, taylor_diff
from lightning_goldy.analysis.result import Cost
from lightning_goldy.analysis.taylor.result import Sums
from lightning_goldy.analysis.taylor.taylor import Expansion, expansion_route
from lightning_goldy.core import CausalLMObjective, ClassifierObjective, FunctionObjective, ParameterVector
from lightning_goldy.core.autodiff import trainable_values
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.sharding import Replicas
from tests.core.test_autodiff import without_casts  # noqa: F401  a fixture
from tests.references.model_zoo import batch_for, build_family
from tests.references.models import build, class_batch, token_batch


def moved(model: nn.Module, size: float, seed: int = 3) -> ParameterVector:
    """Moves a model by a random step; returns where it was."""
    base = ParameterVector.of(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in base.space.resolve(model).values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return base


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Parameter(torch.randn(3, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(2, dtype=torch.float64))
        matrix = torch.randn(5, 5, dtype=torch.float64)
        self.register_buffer("matrix", matrix + matrix.t())
        self.register_buffer("vector", torch.randn(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        theta = torch.cat([self.a, self.b])
        return x.mean() * (theta @ self.matrix @ theta / 2 + self.vector @ theta)


VALUE = FunctionObjective(lambda model, x: model(x))


def test_a_quadratic_is_its_own_second_order_expansion() -> None:
    model = Quadratic()
    base = moved(model, 1.0)
    x = torch.ones(4, dtype=torch.float64)
    found = taylor_diff(model, base, [x, 2 * x], VALUE, function_space=False, by="tensor")
    start = torch.cat(list(base.values()))
    step = torch.cat([model.a, model.b]).detach() - start
    gradient = 1.5 * (model.matrix @ start + model.vector)
    assert found.first_order == pytest.approx(float(gradient @ step), rel=1e-12)
    assert found.second_order == pytest.approx(1.5 * float(step @ model.matrix @ step) / 2, rel=1e-12)
    assert found.orders[1].residual == pytest.approx(0, abs=1e-12)
    assert found.orders[0].residual == pytest.approx(found.second_order, rel=1e-10)
    assert found.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-12)
    assert found.step_norm == pytest.approx(float(step.norm()), rel=1e-12)
    assert found.loss_shares["a"] == pytest.approx(float(gradient[:3] @ step[:3]), rel=1e-10)
    assert math.fsum(found.loss_shares.values()) == pytest.approx(found.first_order, rel=1e-12)
    assert found.second_to_first == pytest.approx(abs(found.second_order / found.first_order))
    assert TaylorDiffResult.from_json(found.to_json()) == found


def test_a_model_that_is_linear_in_its_parameters_is_lazy_whatever_the_step() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    base = moved(model, 5.0)
    batch = (torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2]))
    found = taylor_diff(model, base, [batch], ClassifierObjective())
    first = found.orders[0]
    assert first.relative_error == pytest.approx(0, abs=1e-12)
    assert first.kl_divergence == pytest.approx(0, abs=1e-12)
    assert first.top1_agreement == 1
    assert found.regime == "lazy"
    # The loss is not linear in the logits, so its own expansion does have a remainder.
    assert abs(first.residual) > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "bert"])
@pytest.mark.usefixtures("without_casts")
def test_the_remainder_falls_with_the_power_after_the_order(family: str) -> None:
    objective = ClassifierObjective() if family == "bert" else CausalLMObjective()
    batch = class_batch(3, 8) if family == "bert" else token_batch(3, 8)

    def slopes(sizes: list[float], orders: tuple[int, ...], measure) -> dict[int, float]:
        found: dict[int, list[float]] = {order: [] for order in orders}
        for size in sizes:
            model = build(family).double().eval()
            base = moved(model, size)
            result = taylor_diff(model, base, [batch], objective, orders=orders, by=None)
            with torch.no_grad():
                start = TaylorApproximation(model, base, 1, parameters=base)
                change = objective.logits_and_targets(model, batch).logits
                change = change - objective.logits_and_targets(start, batch).logits
            for fit in result.orders:
                found[fit.order].append(measure(fit, float(change.norm())))
        return {order: float(np.polyfit(np.log(sizes), np.log(values), 1)[0]) for order, values in found.items()}

    logits = slopes([2e-4, 4e-4, 8e-4], (1, 2, 3), lambda fit, change: fit.relative_error * change)
    assert logits == pytest.approx({1: 2, 2: 3, 3: 4}, abs=0.1)
    # The loss's terms may cancel at larger steps, and its third remainder drowns in rounding at smaller ones.
    losses = slopes([2e-5, 4e-5, 8e-5], (1, 2), lambda fit, change: abs(fit.residual))
    assert losses == pytest.approx({1: 2, 2: 3}, abs=0.1)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_function_space_and_loss_space_tell_the_same_of_the_loss(family: str) -> None:
    model = build(family).double().eval()
    base = moved(model, 0.02)
    batches = [token_batch(3, 8), token_batch(2, 6, seed=5)]
    one = taylor_diff(model, base, batches)
    other = taylor_diff(model, BaseParameters(base), batches, function_space=False)
    for name in ("base_loss", "loss", "first_order", "second_order", "gradient_norm", "step_norm", "n_targets"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-6)
    assert one.loss_shares == pytest.approx(other.loss_shares, rel=1e-6, abs=1e-12)
    assert math.fsum(one.function_shares.values()) == pytest.approx(1, rel=1e-12)
    assert other.function_shares == {}
    # In the order of the model, not in that of the backward pass.
    for shares in (one.loss_shares, one.function_shares):
        assert next(iter(shares)) == "embeddings"
        assert [*shares][-1] in ("final", "head")
    assert set(one.loss_shares) >= {"embeddings", "final"}


def test_the_loss_is_the_mean_over_all_targets_of_all_batches() -> None:
    model = build("gpt2").eval()
    base = moved(model, 0.05)
    batches = [token_batch(3, 8), token_batch(2, 12, seed=5)]
    found = taylor_diff(model, base, batches, by=None)
    objective = CausalLMObjective()
    with torch.no_grad():
        losses = torch.cat([objective.logits_and_targets(model, batch).token_losses() for batch in batches])
    assert found.loss == pytest.approx(float(losses.mean()), rel=1e-6)
    assert found.n_targets == len(losses)
    assert found.loss_shares == {}


def test_shares_of_the_function_are_projections_of_each_tensors_own_change() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    base = moved(model, 0.1)
    batch = (torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.long))
    found = taylor_diff(model, base, [batch], ClassifierObjective(), by="tensor")
    names = list(base)
    parts = []
    for name in names:
        alone = ParameterVector(
            base.space, {each: model.get_parameter(each).detach() if each == name else base[each] for each in names}
        )
        expansion = TaylorApproximation(model, base, 1, parameters=alone)
        start = TaylorApproximation(model, base, 1, parameters=base)
        parts.append(expansion(batch[0]) - start(batch[0]))
    whole = torch.stack(parts).sum(0)
    expected = {
        name: float((part * whole).sum() / (whole * whole).sum()) for name, part in zip(names, parts, strict=True)
    }
    assert found.function_shares == pytest.approx(expected, rel=1e-9)


def test_an_approximation_follows_the_model_and_serves_in_an_evaluation_loop() -> None:
    model = build("gpt2").double().eval()
    base = ParameterVector.of(model)
    second = TaylorApproximation(model, base, 2)
    batch = token_batch(3, 8)
    objective = CausalLMObjective()
    assert float(objective.loss(second, batch)) == pytest.approx(
        float(objective.loss(model, batch).detach()), rel=1e-12
    )
    moved(model, 1e-3)
    near = abs(float(objective.loss(second, batch)) - float(objective.loss(model, batch).detach()))
    first = abs(
        float(objective.loss(TaylorApproximation(model, base, 1), batch)) - float(objective.loss(model, batch).detach())
    )
    assert near < 0.2 * first
    assert not list(second.parameters())
    given = TaylorApproximation(model, base, 1, parameters=base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(base[name])
        torch.testing.assert_close(
            given(batch["input_ids"]).logits, model(batch["input_ids"]).logits, rtol=1e-9, atol=1e-12
        )


def test_bfloat16_agrees_with_float32_to_its_precision() -> None:
    model = build("llama").eval()
    base = moved(model, 0.03)
    exact = taylor_diff(model, base, [token_batch(3, 8)], by=None)
    narrow = taylor_diff(model.bfloat16(), base.to(torch.bfloat16), [token_batch(3, 8)], by=None)
    assert narrow.base_loss == pytest.approx(exact.base_loss, rel=2e-2)
    assert narrow.first_order == pytest.approx(exact.first_order, rel=0.1)
    assert narrow.nonlinearity == pytest.approx(exact.nonlinearity, abs=0.1)


def test_no_change_is_a_defined_result() -> None:
    model = build("gpt2").eval()
    found = taylor_diff(model, ParameterVector.of(model), [token_batch(2, 6)])
    assert found.regime == "unchanged"
    assert (found.step_norm, found.first_order, found.second_order, found.change) == (0, 0, 0, 0)
    assert found.nonlinearity == 0
    assert all(fit.relative_error == 0 and fit.top1_agreement == 1 for fit in found.orders)


def test_regimes_have_the_thresholds_that_are_stated() -> None:
    model = build("gpt2").eval()
    base = moved(model, 0.05)
    found = taylor_diff(model, base, [token_batch(2, 6)], by=None)

    def with_error(error: float) -> str:
        fits = tuple({**fit, "relative_error": error} for fit in found.fits)
        return dataclasses.replace(found, fits=fits).regime

    assert [with_error(error) for error in (0.0, 0.0999, 0.1, 0.4999, 0.5, 3.0)] == [
        "lazy",
        "lazy",
        "weakly nonlinear",
        "weakly nonlinear",
        "nonlinear",
        "nonlinear",
    ]


def test_the_model_comes_back_as_it_was() -> None:
    model = build("gpt2").train()
    base = moved(model, 0.02)
    model.transformer.wte.weight.grad = torch.ones_like(model.transformer.wte.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    for function_space in (True, False):
        taylor_diff(model, base, [token_batch(2, 6)], function_space=function_space)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert float(model.transformer.wte.weight.grad.mean()) == 1


def test_bad_input_is_refused() -> None:
    model = build("gpt2")
    base = ParameterVector.of(model)
    batch = token_batch(2, 6)
    for options, message in (
        ({"orders": (0, 1)}, r"orders lie between 1 and 3; got 0"),
        ({"orders": (1, 4)}, r"orders lie between 1 and 3; got 4"),
        ({"orders": (2,)}, "orders must hold 1"),
        ({"by": "layer"}, "unknown by='layer'"),
    ):
        with pytest.raises(ValueError, match=message):
            taylor_diff(model, base, [batch], **options)
    with pytest.raises(ValueError, match="there is no batch"):
        taylor_diff(model, base, [])
    with pytest.raises(ValueError, match="order must lie between 1 and 3; got 0"):
        TaylorApproximation(model, base, 0)
    other = ParameterVector.of(build("llama"))
    with pytest.raises(ValueError, match=r"wte|embed|parameter"):
        taylor_diff(model, other, [batch])
    assert trainable_values(model)


# Anything that a base can be


def test_a_base_is_given_in_any_form(tmp_path: Path) -> None:
    model, before = build("gpt2").double().eval(), build("gpt2", seed=7).double().eval()
    batch = token_batch(2, 6)
    before.save_pretrained(tmp_path / "before")
    vector = ParameterVector.of(before)
    wanted = taylor_diff(model, vector, [batch])
    logits = TaylorApproximation(model, vector, 1)(**batch).logits
    for base in (before, BaseParameters(vector), tmp_path / "before", str(tmp_path / "before")):
        assert taylor_diff(model, base, [batch]) == wanted
        assert torch.equal(TaylorApproximation(model, base, order=1)(**batch).logits, logits)
    for wrong in (None, dict(vector), 1.0):
        message = rf"a base is a module, .*; got {type(wrong).__name__}"
        with pytest.raises(TypeError, match=message):
            taylor_diff(model, wrong, [batch])
        with pytest.raises(TypeError, match=message):
            TaylorApproximation(model, wrong, order=1)


# What it costs, and the row


def passes_of(model: nn.Module) -> Counter[str]:
    """Counts the samples of all passes from here on, by the model's own hooks."""
    passes: Counter[str] = Counter()

    def forward(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        samples = len(output.logits)
        passes["forwards"] += samples
        if output.logits.requires_grad:
            output.logits.register_hook(lambda gradient: passes.update(backwards=samples))

    model.register_forward_hook(forward, with_kwargs=True)
    return passes


@pytest.mark.parametrize("by", [None, "block"])
@pytest.mark.parametrize("function_space", [True, False])
@pytest.mark.parametrize("own_loss", [True, False])
def test_the_cost_is_what_ran(by: Any, function_space: bool, own_loss: bool) -> None:
    model = build("gpt2").eval()
    base = moved(model, 0.02)
    objective = CausalLMObjective()
    loss = FunctionObjective(objective.loss, objective.logits_and_targets) if own_loss else objective
    short = token_batch(3, 8)
    short["attention_mask"][1, 1:] = 0  # a sample without a target is never run under the known objective
    passes = passes_of(model)
    found = taylor_diff(model, base, [token_batch(2, 8), short], loss, by=by, function_space=function_space)
    assert vars(found.cost) == {"forwards": passes["forwards"], "backwards": passes["backwards"]}
    samples, backwards = 5 if own_loss else 4, 0 if by is None else 1 + function_space
    assert found.cost.backwards == samples * backwards
    expansions = 2 if own_loss and function_space else 1
    shared = bool(by) and function_space and not own_loss  # the two backward passes are of one forward
    assert found.cost.forwards == samples * (2 * expansions + backwards - shared)


def test_differences_find_what_forward_mode_finds_and_count_their_passes() -> None:
    model = build("gpt2").double().eval()
    base = moved(model, 0.01)
    objective, batches = CausalLMObjective(), [token_batch(3, 8), token_batch(2, 8)]

    def work(orders: tuple[int, ...]) -> Expansion:
        return Expansion(model, base, batches, objective, orders, True, False, Replicas())

    passes = passes_of(model)
    first = work((1,)).finite()
    assert vars(first.cost) == {"forwards": 10, "backwards": 5} == dict(passes)
    passes.clear()
    found = work((1, 2)).finite()
    # The present model; the base and four places near it, each with a gradient.
    assert vars(found.cost) == {"forwards": 30, "backwards": 25} == dict(passes)
    exact = work((1, 2)).whole()
    for order in (0, 1):
        assert found.mean("derivative", order) == pytest.approx(exact.mean("derivative", order), rel=1e-9)
    off = abs(found.mean("derivative", 2) - exact.mean("derivative", 2)) / 2
    assert 0 < off < abs(found.mean("difference")) / 6 < 0.05 * abs(exact.mean("derivative", 2))
    assert found.gradient_norm == pytest.approx(exact.gradient_norm, rel=1e-9)


def test_what_two_processes_find_adds_up() -> None:
    one, other = Sums(n_targets=3, cost=Cost(6, 3)), Sums(n_targets=1, cost=Cost(2, 1))
    one.add("derivative", enumerate([2.0, 4.0]), 3)
    other.add("derivative", enumerate([6.0, 8.0]))
    other.add("difference", [(None, 0.5)])
    nothing = Sums()
    for part in (other, nothing):
        one.merge(part)
    assert [one.mean("derivative", order) for order in (0, 1)] == [3.0, 5.0]
    assert (one.mean("difference"), one.n_targets, one.cost) == (0.125, 4, Cost(8, 4))


def test_the_row_tells_the_regime_and_what_it_is_told_by() -> None:
    model = build("gpt2").eval()
    base = moved(model, 0.02)
    found = taylor_diff(model, base, [token_batch(2, 6)], by="tensor")
    row = found.row()
    assert (row.analysis, row.cost) == ("taylor_diff", found.cost)
    assert row.metrics["residual/order2"] == found.orders[1].residual
    assert row.metrics["change"] == found.loss - found.base_loss
    assert list(row.metrics)[:9] == [
        *("base_loss", "loss", "change", "first_order", "second_order", "second_to_first", "step_norm"),
        *("gradient_norm", "nonlinearity"),
    ]
    assert row.result["thresholds"] == {"lazy": 0.1, "nonlinear": 0.5}
    assert (row.result["regime"], row.result["by"]) == (found.regime, "tensor")
    assert row.result["fits"] == list(found.fits)
    assert row.headline.startswith(f"the step is {found.regime} (nonlinearity ")
    assert TaylorDiffResult.from_json(found.to_json()) == found


@pytest.mark.parametrize("module", ["lightning_goldy.analysis", "lightning_goldy.analysis.taylor"])
def test_the_former_name_of_the_result_leads_to_it(module: str) -> None:
    with pytest.warns(DeprecationWarning, match="TaylorDiff has become TaylorDiffResult"):
        former = importlib.import_module(module).TaylorDiff
    assert former is TaylorDiffResult
    with pytest.raises(AttributeError, match="has no attribute 'TaylorDif'"):
        _ = importlib.import_module(module).TaylorDif


class Normed(nn.Module):
    """Divides by a norm that it detaches, as DoRA does, and can take half of its loss without gradients."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64))
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.hidden):
            factor = self.weight.square().sum()
        return (x @ self.weight / self.weight.norm().detach()).square().sum() * factor


SQUARES = FunctionObjective(lambda model, x: model(x))


def test_what_a_model_detaches_is_expanded_and_shared_out() -> None:
    model, x = Normed(hidden=False), torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    base = moved(model, 0.1)
    found = taylor_diff(model, base, [x], SQUARES, by="tensor", function_space=False)
    step, start = model.weight.detach() - base["weight"], base["weight"].clone()

    def loss(t: float) -> float:
        weight = start + t * step
        return float((x @ weight / weight.norm()).square().sum() * weight.square().sum())

    assert found.first_order == pytest.approx((loss(1e-4) - loss(-1e-4)) / 2e-4, rel=1e-6)
    assert found.second_order == pytest.approx((loss(1e-3) + loss(-1e-3) - 2 * loss(0)) / 2e-6, rel=1e-4)
    assert found.loss_shares == {"weight": pytest.approx(found.first_order)}


def test_shares_of_a_gradient_that_is_not_that_of_the_values_are_refused() -> None:
    model, x = Normed(hidden=True), torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    base = moved(model, 0.1)
    for attempt in (
        lambda: taylor_diff(model, base, [x], SQUARES, function_space=False),
        lambda: expansion_route(model, x, SQUARES, function_space=False),
    ):
        with pytest.raises(ValueError, match=r"gradient of Normed is not the derivative of its loss.*Pass by=None"):
            attempt()
    without = taylor_diff(model, base, [x], SQUARES, by=None, function_space=False)
    model.hidden = False
    assert without.first_order == pytest.approx(
        taylor_diff(model, base, [x], SQUARES, function_space=False).first_order
    )


@pytest.mark.filterwarnings("ignore:the base differs from HrmTextForCausalLM in 'model.z_L_init'")
def test_shares_beside_differences_are_held_against_them() -> None:
    model, base = (build_family("HRM").float() for _ in range(2))
    with torch.no_grad():
        for place, parameter in enumerate(model.parameters()):
            parameter.add_(1e-2 * torch.sin(torch.arange(parameter.numel()) + place).view(parameter.shape))
    batch = batch_for(model)
    with pytest.raises(ValueError, match=r"gradient of HrmTextForCausalLM is not the derivative of its loss"):
        taylor_diff(model, base, [batch], by="tensor", function_space=False)
    assert taylor_diff(model, base, [batch], by=None, function_space=False).route == "differences"


def test_an_objective_without_logits_is_told_how_to_go_on() -> None:
    model = Quadratic()
    for attempt in (
        lambda: taylor_diff(model, model, [torch.ones(1)], VALUE),
        lambda: expansion_route(model, torch.ones(1), VALUE),
    ):
        with pytest.raises(ValueError, match=r"but no logits: give it logits=, or pass function_space=False"):
            attempt()
