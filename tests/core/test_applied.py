"""Moving the weights and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import pytest
import torch
from torch import Tensor, nn

from lightning_goldy.core import ParameterSpace, ParameterVector, SpaceError, applied, random_direction, substituted
from tests.references.models import build, token_batch


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert list(first) == list(second)
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [1.0, -1e-3, 1e4])
def test_applied_adds_and_restores_every_bit(dtype: torch.dtype, scale: float) -> None:
    module = build("gpt2").to(dtype)
    before = bits(module)
    direction = random_direction(ParameterSpace.of(module), 7, dtype=torch.float32)
    with applied(module, direction, scale) as moved:
        assert moved is module
        for name, parameter in module.named_parameters():
            wide = torch.promote_types(dtype, torch.float32)
            expected = (before[name].to(wide) + scale * direction[name].to(wide)).to(dtype)
            # The sum may be a fused one, which a float32 rounding or, at a tie, a bfloat16 one tells from two steps.
            torch.testing.assert_close(parameter.detach(), expected)
        assert not torch.equal(module.transformer.wte.weight.detach(), before["transformer.wte.weight"])
    assert_same(bits(module), before)


def test_adding_and_subtracting_would_not_restore() -> None:
    # Why values are copied back: the case above must be one where arithmetic drifts.
    module = build("gpt2").bfloat16()
    before = bits(module)
    direction = random_direction(ParameterSpace.of(module), 7)
    vector = ParameterVector.of(module, clone=False)
    vector.axpy_(1.0, direction).axpy_(-1.0, direction)
    assert any(not torch.equal(vector[name], before[name]) for name in vector)


def test_a_small_step_is_rounded_once() -> None:
    module = nn.Linear(64, 64, bias=False).bfloat16()
    direction = random_direction(ParameterSpace.of(module), 1, dtype=torch.bfloat16)
    exact = module.weight.detach().double() + direction["weight"].double() / 3
    exponent = exact.frexp().exponent
    half_a_place = torch.ldexp(torch.ones_like(exact), exponent - 9)  # bfloat16 has 8 significant bits
    twice = module.weight.detach() + (direction["weight"] / 3)
    assert ((twice.double() - exact).abs() > 1.001 * half_a_place).any()
    with applied(module, direction, 1 / 3):
        assert ((module.weight.detach().double() - exact).abs() <= 1.001 * half_a_place).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_applied_restores_when_the_block_raises(dtype: torch.dtype, error: type[BaseException]) -> None:
    module = build("gpt2").to(dtype)
    before = bits(module)

    def move_and_fail() -> None:
        with applied(module, random_direction(ParameterSpace.of(module), 0)), torch.no_grad():
            module.transformer.h[0].ln_1.weight.fill_(math.nan)  # whatever the block does to them
            raise error

    with pytest.raises(error):
        move_and_fail()
    assert_same(bits(module), before)


def test_applied_restores_when_the_move_itself_fails() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = bits(module)
    vector = ParameterVector.of(module)
    vector._tensors["1.bias"] = torch.zeros(5)
    with pytest.raises(RuntimeError), applied(module, vector):
        pytest.fail("the block must not run")
    assert_same(bits(module), before)


def test_applied_nests() -> None:
    module = nn.Linear(3, 3)
    before = bits(module)
    direction = random_direction(ParameterSpace.of(module), 0)
    with applied(module, direction):
        once = bits(module)
        with applied(module, direction, 2.0):
            assert not torch.equal(module.weight, once["weight"])
        assert_same(bits(module), once)
    assert_same(bits(module), before)


def test_applied_to_a_part_leaves_the_rest_and_the_parameters_themselves() -> None:
    module = nn.Linear(3, 3)
    parameters, storages = list(module.parameters()), [p.data_ptr() for p in module.parameters()]
    bias = module.bias.detach().clone()
    with applied(module, random_direction(ParameterSpace.of(module, include=["weight"]), 0)):
        assert torch.equal(module.bias, bias)
        assert all(now is then for now, then in zip(module.parameters(), parameters, strict=True))
    assert [p.data_ptr() for p in module.parameters()] == storages
    assert all(p.requires_grad and p.grad is None for p in parameters)


def test_gradients_can_be_taken_inside() -> None:
    module = nn.Linear(3, 1)
    step = random_direction(ParameterSpace.of(module), 3)
    with applied(module, step):
        (module(torch.ones(1, 3)) ** 2).sum().backward()
        expected = 2 * module(torch.ones(1, 3)).item()
    assert module.bias.grad.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_applied_without_gradients(mode: Callable[[], torch.no_grad]) -> None:
    module = nn.Linear(3, 3)
    before = bits(module)
    with mode(), applied(module, random_direction(ParameterSpace.of(module), 0)):
        assert not torch.equal(module.weight, before["weight"])
    assert_same(bits(module), before)
    module(torch.ones(1, 3)).sum().backward()


def test_a_mask_moves_by_the_scale_where_it_is_set() -> None:
    module = nn.Linear(2, 2, bias=False)
    before = module.weight.detach().clone()
    mask = ParameterVector(ParameterSpace.of(module), {"weight": torch.eye(2).bool()})
    with applied(module, mask, 0.5):
        assert torch.equal(module.weight.detach(), before + 0.5 * torch.eye(2))


def test_tied_weights_move_once() -> None:
    module = build("gpt2")
    before = module.lm_head.weight.detach().clone()
    ones = ParameterVector.of(module).map(torch.ones_like)
    with applied(module, ones):
        assert torch.equal(module.lm_head.weight.detach(), before + 1)


def test_inside_autocast_no_stale_weight_is_used() -> None:
    module, x = nn.Linear(16, 16), torch.randn(4, 16)
    direction = random_direction(ParameterSpace.of(module), 5)

    def fresh() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return module(x)

    at_base = fresh()
    with applied(module, direction):
        at_moved = fresh()
    assert not torch.equal(at_base, at_moved)
    # Weights are cached only where gradients are enabled.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x), at_base)
        with applied(module, direction):
            assert torch.equal(module(x), at_moved)
        assert torch.equal(module(x), at_base)
        with substituted(module, ParameterVector.of(module).map(torch.zeros_like)):
            assert not module(x).any()
        assert torch.equal(module(x), at_base)
        with suppress(KeyError), applied(module, direction):
            module(x)
            raise KeyError
        assert torch.equal(module(x), at_base)


def test_the_stale_cache_is_real() -> None:
    # If autocast stopped caching, the test above could not fail.
    module, x = nn.Linear(16, 16), torch.randn(4, 16)
    with torch.autocast("cpu", torch.bfloat16):
        before = module(x)
        module.weight.data.zero_()
        module.bias.data.zero_()
        assert torch.equal(module(x), before)


def test_substituted_gives_the_values_and_takes_them_back() -> None:
    module, other = build("gpt2"), build("gpt2", seed=1)
    before, values = bits(module), ParameterVector.of(other)
    batch = token_batch(2)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    module.eval()
    with torch.no_grad(), substituted(module, values):
        assert_same(bits(module), bits(other))
        assert torch.equal(module(**inputs).logits, other.eval()(**inputs).logits)
    assert_same(bits(module), before)
    with pytest.raises(ZeroDivisionError), substituted(module, values):
        raise ZeroDivisionError
    assert_same(bits(module), before)
    assert_same(dict(values), bits(other))


def test_a_vector_of_another_model_is_refused() -> None:
    vector = random_direction(ParameterSpace.of(nn.Linear(2, 2)), 0)
    for context in (applied, substituted):
        with (
            pytest.raises(SpaceError, match=r"weight: shape \(3, 2\) in the module, \(2, 2\) in the space"),
            context(nn.Linear(2, 3), vector),
        ):
            pytest.fail("the block must not run")
