"""Tests of stacked experts: each is analysed as a tensor of its own, however the stack is spread over processes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_goldy.analysis import (
    golden_parameters,
    knowledge_coupling,
    parameter_distribution,
    reverse_golden_parameters,
    taylor_diff,
)
from lightning_goldy.analysis.change import weight_change
from lightning_goldy.analysis.coupling.coupling import layer_gradient_norms
from lightning_goldy.core import ParameterVector, SpaceError
from lightning_goldy.core.architecture.blocks import expert_counts
from lightning_goldy.core.objective import objective_for
from lightning_goldy.core.vector import elements_in
from tests.references.model_zoo import VOCABULARY, batch_for, build_family

STACK = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def model() -> Any:
    model = build_family("Mixtral")
    model.set_experts_implementation("eager")  # which has forward mode
    return model


@pytest.fixture(scope="module")
def changed(model: Any) -> Any:
    changed, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.add_(1e-2 * torch.randn(parameter.shape, generator=generator))
    return changed


def by_name(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows}


def gradients(model: Any, batch: Any) -> dict[str, Tensor]:
    model.zero_grad()
    objective_for(model).log_probs(model, batch).mean().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_one_sample_marks_its_share_of_each_expert(model: Any, scope: Any) -> None:
    sample = {name: value[:1] for name, value in batch_for(model).items()}
    result = golden_parameters(model, [sample], top_k_percent=10, scope=scope)
    rows, scores = by_name(result.details()["tensors"]), gradients(model, sample)[STACK].abs()
    assert STACK not in rows
    assert len(result.golden) == len(rows) == len(result.expected)
    assert sum(result.golden) == result.mask.total
    for expert, (score, marked) in enumerate(zip(scores, result.mask[STACK], strict=True)):
        row = rows[f"{STACK}[{expert}]"]
        assert (row["block"], row["kind"], row["numel"]) == ("model.layers.0", "mlp", score.numel())
        assert row["golden"] == int(marked.sum())
        if scope == "tensor":
            assert row["k"] == row["golden"] == elements_in(10, score.numel())
            if score.any():
                assert score[marked].min() >= score[~marked].max()
    assert type(result).from_json(result.to_json()).details() == result.details()


def test_a_reverse_search_keeps_its_budget_in_each_expert(model: Any) -> None:
    batch = batch_for(model)
    result = reverse_golden_parameters(model, [batch], eval_batches=[batch], top_k_percent=10, rounds=3)
    rows = by_name(result.details()["tensors"])
    for expert, marked in enumerate(result.mask[STACK]):
        assert rows[f"{STACK}[{expert}]"]["masked"] == int(marked.sum()) == elements_in(10, marked.numel())
    assert result.history[-1]["size"] == result.count


def test_changes_and_their_distribution_are_told_by_expert(model: Any, changed: Any) -> None:
    delta = dict(changed.named_parameters())[STACK].detach() - dict(model.named_parameters())[STACK].detach()
    change = weight_change(changed, model)
    rows = by_name(list(change.rows()))
    distribution = by_name(list(parameter_distribution(changed, model, top=2).rows))
    for expert, part in enumerate(delta):
        name = f"{STACK}[{expert}]"
        assert rows[name]["delta_norm"] == pytest.approx(float(part.double().norm()), rel=1e-6)
        spectrum = torch.linalg.svdvals(part.double())
        assert distribution[name]["singular_values"] == pytest.approx(spectrum[:2].tolist(), rel=1e-4)
    assert change.delta_norm == pytest.approx((ParameterVector.of(changed) - ParameterVector.of(model)).norm())


def test_shares_of_an_expansion_are_those_of_each_expert(model: Any, changed: Any) -> None:
    batch = batch_for(model)
    result = taylor_diff(changed, model, [batch], orders=(1,), by="tensor")
    step = ParameterVector.of(changed) - ParameterVector.of(model)
    model.zero_grad()
    objective_for(model).loss(model, batch).backward()
    gradient = dict(model.named_parameters())[STACK].grad
    model.zero_grad()
    assert gradient is not None
    for expert, (slope, moved) in enumerate(zip(gradient, step[STACK], strict=True)):
        expected = float((slope * moved).sum())
        assert result.loss_shares[f"{STACK}[{expert}]"] == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert sum(result.loss_shares.values()) == pytest.approx(result.first_order, rel=1e-3)
    assert sum(result.function_shares.values()) == pytest.approx(1)


def test_coupling_in_single_experts_adds_up_to_that_in_their_stack(model: Any) -> None:
    ids = torch.randint(2, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(4))
    batch = {"input_ids": ids, "labels": ids}  # long enough for every expert to be chosen

    def inner(*select: str) -> Tensor:
        return knowledge_coupling(model, [batch], select=list(select), normalize=False).matrix

    single = [inner(f"{STACK}[{expert}]") for expert in range(4)]
    torch.testing.assert_close(sum(single), inner(STACK))
    assert not torch.allclose(single[0], single[1])
    torch.testing.assert_close(inner("*.0.*down_proj[1]", f"{STACK}[3]"), single[1] + single[3])
    torch.testing.assert_close(inner(STACK, f"{STACK}[3]"), inner(STACK))  # of what is named twice the whole
    norms = layer_gradient_norms(model, [batch], select=[f"{STACK}[1]"])["model.layers.0"]
    torch.testing.assert_close(norms.square(), single[1].diagonal().double())
    with pytest.raises(SpaceError, match=r"down_proj\[4\]' matches no parameter"):
        inner(f"{STACK}[4]")


def test_a_router_is_no_stack(model: Any) -> None:
    assert set(expert_counts(model).values()) == {4}
    assert all(name.endswith(("gate_up_proj", "down_proj")) for name in expert_counts(model))
    assert not expert_counts(nn.Linear(4, 4))
