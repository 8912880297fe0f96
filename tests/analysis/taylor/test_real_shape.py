"""The second order on the shape of a real model: 30 Llama layers with grouped queries and tied embeddings."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_goldy.analysis import TaylorDiffResult, taylor_diff
from lightning_goldy.analysis.precision import float64_throughout
from lightning_goldy.core import CausalLMObjective, ParameterVector
from lightning_goldy.core.autodiff import directional_derivatives
from tests.references.models import token_batch

# Of what is wanted of the second order in float32, a fraction.
TOLERANCE = 1e-4
STEP = 0.02


@functools.cache
def subject() -> tuple[nn.Module, ParameterVector]:
    """A model of the depth, head counts and options of SmolLM2 at a sixteenth of its width, and where it came from."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        hidden_size=36,
        intermediate_size=96,
        vocab_size=64,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        rms_norm_eps=1e-5,
        initializer_range=0.15,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = hf.LlamaForCausalLM(config).eval()
    base = ParameterVector.of(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.004 * torch.randn_like(parameter))
    return model, base


def wide() -> tuple[nn.Module, ParameterVector]:
    """The same two places in float64."""
    model, base = subject()
    before = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in base.space.resolve(before).items():
            parameter.copy_(base[name])
    return copy.deepcopy(model).double(), ParameterVector.of(before.double())


@functools.cache
def found(double: bool) -> TaylorDiffResult:
    model, base = wide() if double else subject()
    return taylor_diff(model, base, [token_batch(1, 8)], by=None)


def second_difference(step: float) -> float:
    """Half the second derivative of the loss along the step, from values of the float64 model on both sides."""
    model, base = wide()
    delta = ParameterVector.of(model) - base
    values = []
    for place in (-2, -1, 0, 1, 2):
        with torch.no_grad():
            for name, parameter in base.space.resolve(model).items():
                parameter.copy_(base[name] + place * step * delta[name])
            values.append(float(CausalLMObjective().loss(model, token_batch(1, 8))))
    weights = (-1, 16, -30, 16, -1)
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / (24 * step**2)


def test_the_second_order_in_float32_is_that_of_float64_and_of_differences_without_casts() -> None:
    narrow, exact = found(False), found(True)
    with float64_throughout(wide()[0]):
        difference = second_difference(STEP)
    assert abs(exact.second_order) > 0.1 * abs(exact.first_order)  # there is a curvature to get right
    assert exact.second_order == pytest.approx(difference, rel=1e-6)
    assert narrow.second_order == pytest.approx(exact.second_order, rel=TOLERANCE)
    assert narrow.first_order == pytest.approx(exact.first_order, rel=TOLERANCE)
    assert narrow.orders[1].relative_error == pytest.approx(exact.orders[1].relative_error, rel=TOLERANCE)


def test_a_second_difference_through_casts_is_noise() -> None:
    """Why there is a way to set them aside: at a step that is good without them, it is off by more than its size."""
    exact, step = found(True).second_order, 1e-4
    with float64_throughout(wide()[0]):
        assert second_difference(step) == pytest.approx(exact, rel=1e-4)
    assert second_difference(step) != pytest.approx(exact, rel=1)


def test_only_a_float64_model_is_kept_in_float64() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with float64_throughout(nn.Linear(2, 2).to(dtype)) as kept:
            assert not kept
            assert torch.zeros(1, dtype=torch.float64).float().dtype == torch.float32
    with float64_throughout(nn.Linear(2, 2).double()) as kept:
        assert kept
        assert torch.arange(2, dtype=torch.float32).dtype == torch.float64
    assert torch.zeros(1, dtype=torch.float64).float().dtype == torch.float32


class Squares(TorchFunctionMode):
    """Counts how often an operation squares a tensor."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.Tensor.square
        return func(*args, **(kwargs or {}))


def test_the_size_of_the_parameters_is_looked_at_only_where_a_custom_function_has_to_be_checked() -> None:
    with Squares() as seen:
        directional_derivatives(lambda p: p["x"] * p["x"], {"x": torch.ones(3)}, {"x": torch.ones(3)}, 2)
    assert seen.count == 0
