"""Classifiers, functions, and what all objectives share."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from lightning_goldy.core import CausalLMObjective, ClassifierObjective, FunctionObjective, Objective
from lightning_goldy.core.objective import TargetLogits
from tests.references.common import class_log_probs_reference
from tests.references.models import build, class_batch

# Classifiers


def test_bert_classification() -> None:
    model, batch = build("bert").eval(), class_batch()
    batch["attention_mask"][0, 6:] = 0
    objective = ClassifierObjective()
    with torch.no_grad():
        rows = []
        for sample in range(6):
            real = batch["attention_mask"][sample].bool()
            logits = model(input_ids=batch["input_ids"][sample][real][None]).logits
            rows += class_log_probs_reference(logits, batch["labels"][sample : sample + 1])
        assert objective.log_probs(model, batch).tolist() == pytest.approx(rows, abs=1e-5)
        assert objective.loss(model, batch).item() == pytest.approx(-math.fsum(rows) / 6, abs=1e-5)
        assert [objective.log_probs(model, each).item() for each in objective.samples(batch)] == pytest.approx(
            rows, abs=1e-5
        )
        found = objective.logits_and_targets(model, batch)
    assert found.sample.tolist() == list(range(6))
    assert torch.equal(found.targets, batch["labels"])


@pytest.mark.parametrize("output", [lambda logits: logits, lambda logits: SimpleNamespace(logits=logits)])
def test_pairs_of_any_module(output: Any) -> None:
    layer = nn.Linear(3, 5)
    x, y = torch.randn(4, 3), torch.tensor([0, 4, 2, 2])

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return output(layer(x))

    expected = class_log_probs_reference(layer(x).detach(), y)
    for batch in ((x, y), [x, y]):
        assert ClassifierObjective().log_probs(Model(), batch).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_masked_class_label_is_no_target() -> None:
    layer, x = nn.Linear(3, 5), torch.randn(3, 3)
    y = torch.tensor([1, -100, 4])
    found = ClassifierObjective().logits_and_targets(layer, (x, y))
    assert found.sample.tolist() == [0, 2]
    expected = class_log_probs_reference(layer(x[[0, 2]]).detach(), y[[0, 2]])
    assert ClassifierObjective().loss(layer, (x, y)).item() == pytest.approx(-sum(expected) / 2, abs=1e-6)
    with pytest.raises(ValueError, match=r"samples \[1\] of a batch of 3 have no target"):
        ClassifierObjective().log_probs(layer, (x, y))
    with pytest.raises(ValueError, match=r"a batch of 3 samples has no target: every label is masked \(-100\)"):
        ClassifierObjective().loss(layer, (x, torch.full((3,), -100)))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 3), "a pair .x, y. or a dict with 'labels'; this one is Tensor"),
        ((torch.zeros(2, 3),), "this one is tuple"),
        ({"input": torch.zeros(2, 3)}, r"this one is \['input'\]"),
        ((torch.zeros(2, 3), torch.zeros(2)), r"class indices of shape \[2\]; got torch.float32 of shape \(2,\)"),
        ((torch.zeros(2, 3), torch.zeros(2, 1).long()), r"got torch.int64 of shape \(2, 1\)"),
        ((torch.zeros(2, 3), torch.zeros(3).long()), r"got torch.int64 of shape \(3,\)"),
    ],
)
def test_class_batches_that_are_none(batch: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassifierObjective().loss(nn.Linear(3, 4), batch)


# Functions


def test_a_function_as_objective() -> None:
    layer, x = nn.Linear(3, 1), torch.randn(4, 3)
    objective = FunctionObjective(lambda model, batch: (model(batch["x"]) ** 2).mean())
    squares = (layer(x) ** 2).flatten().tolist()
    assert objective.log_probs(layer, {"x": x}).tolist() == pytest.approx([-square for square in squares])
    assert objective.loss(layer, {"x": x}).item() == pytest.approx(sum(squares) / 4)
    with pytest.raises(TypeError, match=r"has a loss but no logits; pass logits=, or use CausalLMObjective"):
        objective.logits_and_targets(layer, {"x": x})
    with pytest.raises(ValueError, match=r"must return a scalar; got shape \(4, 1\)"):
        FunctionObjective(lambda model, batch: model(batch)).loss(layer, x)


def test_a_function_with_logits() -> None:
    def logits(model: nn.Module, batch: Tensor) -> TargetLogits:
        return TargetLogits(model(batch), torch.zeros(len(batch)).long(), torch.arange(len(batch)), len(batch))

    found = FunctionObjective(lambda model, batch: batch.sum(), logits).logits_and_targets(
        nn.Identity(), torch.zeros(2, 3)
    )
    assert found.loss().item() == pytest.approx(math.log(3))


def test_what_an_objective_is() -> None:
    objectives = (CausalLMObjective(), ClassifierObjective(), FunctionObjective(lambda model, batch: batch))
    assert all(isinstance(objective, Objective) for objective in objectives)
    assert not isinstance(lambda model, batch: 0, Objective)


# Target logits


@given(st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_means_over_samples_and_over_tokens(counts: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    sample = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    sample = sample[torch.randperm(len(sample), generator=generator)]
    logits = 5 * torch.randn(len(sample), 7, generator=generator)
    targets = torch.randint(7, (len(sample),), generator=generator)
    tokens = class_log_probs_reference(logits, targets)
    found = TargetLogits(logits, targets, sample, len(counts))
    expected = [
        math.fsum(token for token, row in zip(tokens, sample.tolist(), strict=True) if row == index) / count
        for index, count in enumerate(counts)
    ]
    assert found.token_losses().tolist() == pytest.approx([-token for token in tokens], rel=1e-4, abs=1e-5)
    assert found.log_probs().tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found.loss().item() == pytest.approx(-math.fsum(tokens) / len(tokens), rel=1e-4, abs=1e-5)
