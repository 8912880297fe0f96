"""Tests of what scoring leaves behind and refuses, and of which heads are cut and grown."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_goldy.analysis.heads import HeadScores, head_importance, heads_to_regrow, register_head_score
from lightning_goldy.analysis.heads.importance import HEAD_SCORES
from lightning_goldy.core.architecture import HeadError, HeadGates, UnsupportedArchitectureError
from lightning_goldy.core.objective import FunctionObjective
from tests.references.architecture_models import UNREGISTERED
from tests.references.head_subjects import build, subject
from tests.references.heads import (
    entropy_reference,
    magnitude_reference,
    mean_loss,
    sample_loss,
)

CLOSE = {"rtol": 2e-4, "atol": 1e-6}


@pytest.mark.parametrize("strategy", HEAD_SCORES)
@pytest.mark.parametrize("gated", [False, True])
def test_the_model_is_left_as_it_was(strategy: str, gated: bool) -> None:
    model, batch, _ = subject("gpt2")
    gates = HeadGates(model) if gated else None
    if gates is not None:
        gates.disable([(0, 2)])
    model.train()
    model.transformer.h[0].eval()
    model.transformer.wpe.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)

    def state() -> list[Any]:
        return [
            [parameter.clone() for parameter in model.state_dict().values()],
            [parameter.requires_grad for parameter in model.parameters()],
            [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()],
            [module.training for module in model.modules()],
            [len(module._forward_pre_hooks) for module in model.modules()],
            model.config.to_dict(),
            model.config._attn_implementation,
            torch.get_rng_state(),
            gates and gates.closed,
        ]

    before = state()
    head_importance(model, [batch], strategy=strategy)
    after = state()
    for one, other in zip(before, after, strict=True):
        same = (
            [torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, other, strict=True)]
            if isinstance(one, list)
            else [torch.equal(one, other) if isinstance(one, Tensor) else one == other]
        )
        assert all(same)


def test_an_error_inside_restores_the_attention_implementation() -> None:
    model, batch, _ = subject("llama")

    def fail(model: nn.Module, batch: Any) -> Tensor:
        model(input_ids=batch["input_ids"])
        raise ArithmeticError("planted")

    with pytest.raises(ArithmeticError, match="planted"):
        head_importance(model, [batch], FunctionObjective(fail))
    assert model.config._attn_implementation == "sdpa"
    assert HeadGates.of(model) is None


def test_closed_heads_are_scored_at_zero_and_stay_closed() -> None:
    model, batch, _ = subject("llama")
    gates = HeadGates(model)
    gates.disable([(0, 1), (1, 3)])
    found = head_importance(model, [batch], strategy="magnitude")
    assert found.closed == ((0, 1), (1, 3))
    gates.remove()
    torch.testing.assert_close(found.scores, magnitude_reference(model, batch, found.closed), **CLOSE)
    HeadGates(model).disable(found.closed)
    ablation = head_importance(model, [batch], strategy="ablation").scores
    HeadGates.of(model).enable([(0, 1)])
    opened = head_importance(model, [batch], strategy="ablation").scores
    # With the head closed or open, its score is the same difference.
    assert float(ablation[0, 1]) == pytest.approx(float(opened[0, 1]), abs=1e-12)


@pytest.mark.parametrize("family", ["bloom"])
def test_families_that_hide_their_attention_are_refused_by_name(family: str) -> None:
    model = build(family)
    batch = {"input_ids": torch.arange(2, 8)[None]}
    with pytest.raises(UnsupportedArchitectureError, match=r"Bloom.* ignores set_attn_implementation.*taylor"):
        head_importance(model, [batch], strategy="entropy")
    assert model.config._attn_implementation != "goldy_eager"
    found = head_importance(model, [batch], strategy="magnitude")
    assert torch.isfinite(found.scores).all()


@pytest.mark.parametrize("family", [name for name in UNREGISTERED if name not in ("bloom", "falcon")])
def test_probed_families_are_scored(family: str) -> None:
    model, batch, _ = subject("llama")
    model = build(family)
    found = head_importance(model, [batch], strategy="combined")
    torch.testing.assert_close(found.measured["entropy"], entropy_reference(model, batch), **CLOSE)
    torch.testing.assert_close(found.measured["magnitude"], magnitude_reference(model, batch), **CLOSE)


def test_users_add_strategies() -> None:
    name = "test_heads_gain"
    if name not in HEAD_SCORES:

        @register_head_score(name)
        def gain(probe):
            return probe.ablation() * 0 + probe.loss()

    model, batch, _ = subject("gpt2")
    found = head_importance(model, [batch], strategy=name)
    assert float(found.scores[0, 0]) == pytest.approx(mean_loss(model, batch), rel=1e-5)
    with pytest.raises(ValueError, match="registered already"):
        register_head_score("entropy")(lambda probe: None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "entrpy"}, "unknown head score 'entrpy'; did you mean 'entropy'"),
        ({"strategy": "combined", "weights": {"magnitud": 1}}, "did you mean 'magnitude'"),
        ({"strategy": "combined", "weights": {"combined": 1}}, "Valid: entropy, magnitude"),
        ({"strategy": "combined", "weights": {"entropy": -1.0}}, "finite number from 0; got -1"),
        ({"strategy": "combined", "weights": {"entropy": 0.0}}, "at least one must be above 0"),
        ({"strategy": "taylor", "weights": {"entropy": 1}}, "belong to the strategy 'combined'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    model, batch, _ = subject("gpt2")
    with pytest.raises(ValueError, match=message):
        head_importance(model, [batch], **options)


def test_what_cannot_be_scored() -> None:
    model, batch, _ = subject("gpt2")
    with pytest.raises(ValueError, match="batches are empty"):
        head_importance(model, [])
    with pytest.raises(UnsupportedArchitectureError, match="Linear"):
        head_importance(nn.Linear(2, 2), [batch])
    model.transformer.h[1].attn.c_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"magnitude score of head \(0, 0\) is nan"):
        head_importance(model, [batch], strategy="magnitude")


def scores(values: list[list[float]], *, groups: int | None = None, closed: tuple = ()) -> HeadScores:
    sizes = tuple(map(len, values))
    table = torch.full((len(values), max(sizes)), math.nan, dtype=torch.float64)
    for layer, row in enumerate(values):
        table[layer, : len(row)] = torch.tensor(row, dtype=torch.float64)
    each = tuple(groups or size for size in sizes)
    return HeadScores(table, {}, sizes, each, closed, "magnitude", 1)


def test_the_least_important_heads_are_cut() -> None:
    table = scores([[4.0, 1.0, 3.0, 2.0], [0.5, 5.0, 6.0, 0.1]])
    assert table.least_important(0) == ()
    assert table.least_important(0.25) == ((1, 3), (1, 0))
    assert table.least_important(0.5) == ((1, 3), (1, 0), (0, 1), (0, 3))
    assert table.least_important(0.25, min_heads_per_layer=3) == ((1, 3), (0, 1))
    assert table.ranking()[:3] == ((1, 3), (1, 0), (0, 1))
    with pytest.raises(HeadError, match=r"level 0.5 asks for 4 of 8 heads by head, but 2 can be cut"):
        table.least_important(0.5, min_heads_per_layer=3)
    for level in (1, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\)"):
            table.least_important(level)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        table.least_important(0.5, min_heads_per_layer=0)


def test_ties_go_by_layer_and_head_and_closed_heads_are_left_out() -> None:
    assert scores([[1.0, 1.0], [1.0, 1.0]]).least_important(0.5) == ((0, 0), (1, 0))
    assert scores([[1.0, 2.0, 3.0], [2.5, 1.5, 9.0]], closed=((0, 0),)).least_important(0.34) == ((1, 1), (0, 1))
    with pytest.raises(HeadError, match="1 are closed"):
        scores([[1.0, 2.0]], closed=((0, 0),)).least_important(0.5)


def test_one_head_layers_and_uneven_layers() -> None:
    with pytest.raises(HeadError, match="0 can be cut"):
        scores([[1.0], [2.0]]).least_important(0.5)
    assert scores([[1.0], [2.0, 3.0, 4.0]]).least_important(0.5) == ((1, 0), (1, 1))


def test_whole_groups_are_cut_together() -> None:
    table = scores([[0.0, 9.0, 3.0, 3.0], [1.0, 1.0, 8.0, 8.0]], groups=2)
    assert table.least_important(0.25, unit="group") == ((1, 0), (1, 1))
    assert table.least_important(0.5, unit="group") == ((1, 0), (1, 1), (0, 2), (0, 3))
    assert table.least_important(0.125, unit="group") == ((1, 0), (1, 1))
    with pytest.raises(HeadError, match="by group, but 0 can be cut"):
        scores([[0.0, 1.0, 2.0, 3.0]], groups=1).least_important(0.5, unit="group")
    with pytest.raises(ValueError, match=r"'row'.*Valid: head, group"):
        table.least_important(0.5, unit="row")  # type: ignore[arg-type]


def test_scores_go_to_json_and_back() -> None:
    model, batch, _ = subject("llama")
    HeadGates(model).disable([(1, 1)])
    found = head_importance(model, [batch], strategy="combined")
    again = HeadScores.from_json(found.to_json())
    assert torch.equal(again.scores, found.scores)
    assert again.closed == ((1, 1),)
    assert again.least_important(0.25) == found.least_important(0.25)


def test_what_grows_again_is_chosen() -> None:
    model, batch, _ = subject("llama")
    with pytest.raises(HeadError, match="no gates"):
        heads_to_regrow(model, count=1, strategy="random")
    gates = HeadGates(model)
    gates.disable([(0, 3), (1, 0)])
    gates.disable([(0, 0)])
    assert heads_to_regrow(model, count=2, strategy="last_pruned") == ((0, 0), (1, 0))
    chosen = {heads_to_regrow(model, count=1, strategy="random", seed=seed) for seed in range(20)}
    assert chosen == {((0, 0),), ((0, 3),), ((1, 0),)}
    assert heads_to_regrow(model, count=0) == ()
    wanted = head_importance(model, [batch], strategy="magnitude").scores
    order = sorted(gates.closed, key=lambda head: -float(wanted[head]))
    assert heads_to_regrow(model, [batch], count=3) == tuple(order)
    with pytest.raises(HeadError, match="4 heads cannot be grown again: 3 are closed"):
        heads_to_regrow(model, [batch], count=4)
    with pytest.raises(ValueError, match=r"'last'.*last_pruned"):
        heads_to_regrow(model, count=1, strategy="last")  # type: ignore[arg-type]


def test_losses_of_the_reference_are_the_objective_s() -> None:
    model, batch, objective = subject("gpt2")
    with torch.no_grad():
        rows = [
            float(sample_loss(model, dict(each)))
            for each in objective.samples({"input_ids": batch["input_ids"][:1], "labels": batch["labels"][:1]})
        ]
        assert rows[0] == pytest.approx(-float(objective.log_probs(model, batch)[0]), rel=1e-5)
