"""The attention of one step as one result: it goes to JSON and back, and its row is made of it alone."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_goldy.analysis.attention import (
    Prompt,
    TrackedAttention,
    attention_maps,
    attention_statistics,
    track_attention,
)
from lightning_goldy.analysis.result import Cost
from lightning_goldy.core import ParameterVector
from lightning_goldy.core.base import BaseParameters
from tests.analysis.attention.test_attention import batch_of
from tests.references.architecture_models import build
from tests.references.attention import moved

PROMPTS = {"one": [3, 4, 5, 3], "two": [6, 7]}


def tracked(**options: object) -> TrackedAttention:
    base = build("gpt2")
    model = moved(base, 0.05)
    prompts = [Prompt.of(name, ids, model, None, 3) for name, ids in PROMPTS.items()]
    options = {"base": ParameterVector.of(base), "prompts": prompts, **options}
    return track_attention(model, [batch_of()], **options)  # type: ignore[arg-type]


def test_it_is_what_its_parts_find_and_costs_what_ran() -> None:
    base = build("gpt2")
    model, vector = moved(base, 0.05), ParameterVector.of(base)
    prompt = Prompt.of("one", [3, 4, 5, 3], model, None, 3)
    passes = []
    hook = model.register_forward_hook(lambda module, inputs, output: passes.append(len(output.logits)))
    for given in (vector, BaseParameters(vector)):
        passes.clear()
        found = track_attention(model, [batch_of()], base=given, prompts=[prompt], heads=[(1, 2)])
        assert found.cost == Cost(forwards=sum(passes)) == Cost(forwards=4 * 2 + 2)
        assert torch.equal(found.statistics.drift, attention_statistics(model, [batch_of()], base=vector).drift)
        (shown,) = found.prompts
        ids = {"input_ids": torch.tensor([[3, 4, 5]])}
        assert torch.equal(shown.maps.pattern(1, 2), attention_maps(model, ids).pattern(1, 2))
        assert torch.equal(shown.base.pattern(1, 2), attention_maps(base, ids).pattern(1, 2))
    hook.remove()


def test_it_comes_back_from_json_with_the_same_row() -> None:
    found = tracked(heads="all", n_singular_values=2)
    again = TrackedAttention.from_json(found.to_json())
    assert json.dumps(again.row().to_dict()) == json.dumps(found.row().to_dict())
    assert again.heads == tuple((layer, head) for layer in range(2) for head in range(4))
    assert [prompt["n_tokens"] for prompt in again.row().result["prompts"]] == [4, 2]
    assert [len(prompt["maps"]) for prompt in again.row().result["prompts"]] == [8, 8]
    with pytest.raises(ValueError, match="unknown result 'TrakedAttention'"):
        TrackedAttention.from_json(found.to_json().replace("PromptAttention", "TrakedAttention"))
