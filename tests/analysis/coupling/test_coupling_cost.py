"""What a result says it cost is what ran: samples that went through the model, either way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from torch import nn

from lightning_goldy.analysis import activation_similarity, knowledge_coupling
from lightning_goldy.analysis.result import Cost
from tests.references.coupling_models import TinyLM, pieces
from tests.references.models import build

LENGTHS = [7, 12, 5, 9, 12]


@contextmanager
def counted(model: nn.Module) -> Iterator[Counter[str]]:
    """Samples that the model has seen forward, and whose logits got a gradient."""
    seen: Counter[str] = Counter()

    def hook(module, args, kwargs, output):
        count = len(kwargs["input_ids"])
        seen["forwards"] += count
        if output.logits.requires_grad:
            output.logits.register_hook(lambda gradient: seen.update(backwards=count))

    handle = model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 6),  # the probe, and all
        ({"chunk_size": 2}, 6),
        ({"select": ["*"]}, 6),  # piece by piece
        ({"projection": 32, "center": True}, 6),
    ],
)
def test_a_coupling_costs_a_probe_and_a_pass_of_each_piece(options, expected):
    model = build("gpt2")
    with counted(model) as seen:
        cost = knowledge_coupling(model, [pieces(LENGTHS)], **options).cost
    assert cost == Cost(seen["forwards"], seen["backwards"]) == Cost(expected, expected)


def test_pieces_that_fail_cost_what_ran_of_them():
    model, batch = build("gpt2"), pieces(LENGTHS)
    batch["labels"][4] = -100
    with counted(model) as seen:
        result = knowledge_coupling(model, [batch], on_error="nan", chunk_size=2)
    assert [failure["index"] for failure in result.failed] == [4]
    assert result.cost == Cost(seen["forwards"], seen["backwards"])


def test_a_layer_that_must_see_one_piece_at_a_time_costs_the_pass_that_told():
    model = TinyLM("flat")
    with counted(model) as seen:
        cost = knowledge_coupling(model, [pieces(LENGTHS)], select=["layer.weight"]).cost
    assert cost == Cost(seen["forwards"], seen["backwards"])
    assert cost.forwards >= 6


def test_what_a_workspace_has_costs_nothing(tmp_path):
    model, batch = build("gpt2"), pieces(LENGTHS)
    first = knowledge_coupling(model, [batch], workspace=tmp_path).cost
    with counted(model) as seen:
        again = knowledge_coupling(model, [batch], workspace=tmp_path).cost
    assert (first, again) == (Cost(6, 6), Cost(1, 1))
    assert again == Cost(seen["forwards"], seen["backwards"])


def test_activations_cost_forward_passes_alone():
    model = build("gpt2")
    with counted(model) as seen:
        cost = activation_similarity(model, [pieces(LENGTHS)]).cost
    assert cost == Cost(seen["forwards"]) == Cost(5)
    assert seen["backwards"] == 0
