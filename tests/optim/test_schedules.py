"""Optimizer groups, warm-up and decay."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lightning_goldy.optim import OptimizerOptions, ScheduleOptions, build_optimizer, decay_groups, schedule_factor


def test_cosine_reaches_the_peak_after_the_warmup_and_the_final_fraction_at_the_end():
    factor = schedule_factor(ScheduleOptions("cosine", warmup_steps=4, final_fraction=0.2), 20)
    values = [factor(step) for step in range(21)]
    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4] == 1.0
    assert values[12] == pytest.approx(0.2 + 0.8 * 0.5)
    assert values[20] == pytest.approx(0.2)
    assert all(later <= earlier for earlier, later in pairwise(values[4:]))


def test_constant_stays_and_needs_no_end():
    factor = schedule_factor(ScheduleOptions("constant", warmup_steps=2), math.inf)
    assert [factor(step) for step in (0, 1, 2, 10**6)] == [0.5, 1.0, 1.0, 1.0]


def test_a_warmup_of_the_whole_run_never_decays():
    factor = schedule_factor(ScheduleOptions("linear", warmup_fraction=1.0), 5)
    assert [factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "cosin"}, "'cosin'.*cosine, linear, constant"),
        ({"warmup_steps": 1, "warmup_fraction": 0.1}, "not both"),
        ({"warmup_steps": -1}, "negative"),
        ({"warmup_fraction": 1.5}, r"warmup_fraction must lie in \[0, 1\]; got 1.5"),
        ({"final_fraction": -0.1}, "final_fraction"),
    ],
)
def test_schedule_options_refuse(options, message):
    with pytest.raises(ValueError, match=message):
        ScheduleOptions(**options)


@pytest.mark.parametrize(
    ("options", "total", "message"),
    [
        (ScheduleOptions(warmup_steps=11), 10, "11 is longer than the run of 10"),
        (ScheduleOptions("cosine"), math.inf, "known length"),
        (ScheduleOptions("constant", warmup_fraction=0.1), math.inf, "known length"),
    ],
)
def test_schedule_refuses_a_run(options, total, message):
    with pytest.raises(ValueError, match=message):
        schedule_factor(options, total)


@pytest.mark.parametrize(
    "options",
    [{"learning_rate": 0.0}, {"weight_decay": -1.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"learning_rate": math.nan}],
)
def test_optimizer_options_refuse(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        OptimizerOptions(**options)


class _Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm((2, 3))
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def test_only_trainable_matrices_outside_norms_decay_and_tied_ones_count_once():
    model = _Tied()
    decayed, plain = decay_groups(model, 0.1)
    assert [id(p) for p in decayed["params"]] == [id(model.embedding.weight)]
    assert {id(p) for p in plain["params"]} == {id(model.norm.weight), id(model.norm.bias), id(model.head.bias)}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_nothing_trainable_is_refused():
    with pytest.raises(ValueError, match="no trainable parameter"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimizerOptions())


def test_a_resumed_schedule_takes_the_new_length():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    old = LambdaLR(optimizer, schedule_factor(ScheduleOptions("linear", final_fraction=0.0), 10))
    new = LambdaLR(optimizer, schedule_factor(ScheduleOptions("linear", final_fraction=0.0), 100))
    new.load_state_dict(old.state_dict())
    assert new.lr_lambdas[0](50) == pytest.approx(0.5)
