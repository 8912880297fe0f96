"""Attention under the family's eager arithmetic: nothing but the kernel changes, and functions around it nest."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_goldy.analysis.attention.patterns import recorded_attention
from lightning_goldy.analysis.linearized import FrozenAttention
from lightning_goldy.core import ParameterVector
from lightning_goldy.core.architecture.families import AttentionKernelError, additive_mask, eager_attention
from tests.references.architecture_models import build, token_ids
from tests.references.attention import moved


def weights_of(model: nn.Module) -> list[Tensor]:
    found: list[Tensor] = []
    with recorded_attention(model, lambda module, weights, mask: found.append(weights)), torch.no_grad():
        model(input_ids=token_ids())
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_read_inside_frozen_attention_is_what_it_computes_with(family: str) -> None:
    base = build(family)
    model = moved(base, 0.1)
    own, before = weights_of(model), weights_of(base)
    assert all((first - second).abs().max() > 1e-3 for first, second in zip(own, before, strict=True))
    with FrozenAttention(model, ParameterVector.of(base)):
        # The base's own pass is read too, before the model's.
        for found, expected in zip(weights_of(model), [*before, *before], strict=True):
            assert torch.equal(found, expected)
    for found, expected in zip(weights_of(model), own, strict=True):
        assert torch.equal(found, expected)


def test_the_kernel_comes_back_after_an_error() -> None:
    model: Any = build("llama")
    model.set_attn_implementation("sdpa")

    def fails(call: Any, compute: Any) -> Any:
        raise RuntimeError("no heads today")

    with pytest.raises(RuntimeError, match="no heads today"), eager_attention(model, fails):
        model(input_ids=token_ids())
    assert model.config._attn_implementation == "sdpa"
    with eager_attention(model), torch.no_grad():
        assert model(input_ids=token_ids()).logits.isfinite().all()


def test_a_model_of_ones_own_is_refused() -> None:
    with pytest.raises(AttentionKernelError, match="Linear is no transformers model"), eager_attention(nn.Linear(2, 2)):
        pass


def test_no_mask_is_below_what_float32_can_hold() -> None:
    for mask in (torch.tensor([True, False]), torch.tensor([0.0, -math.inf], dtype=torch.float64)):
        found = additive_mask(mask, torch.float64)
        assert found is not None
        assert found.tolist() == [0.0, torch.finfo(torch.float32).min]
    single = torch.tensor([0.0, -math.inf])
    assert additive_mask(single, torch.float32) is single
