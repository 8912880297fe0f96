from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_goldy.core import autodiff, composed
from lightning_goldy.core.autodiff import (
    Jet,
    Substituted,
    call_with,
    directional_derivatives,
    nested_derivatives,
    polynomial,
    trainable_values,
)
from lightning_goldy.core.objective import CausalLMObjective, accepts
from tests.references.models import build, token_batch


def chebyshev_derivatives(function, order: int, radius: float = 0.2, points: int = 21) -> list[np.ndarray]:
    """Derivatives at 0 of an analytic function of one number, from its values on a Chebyshev grid."""
    nodes = np.cos(np.pi * (np.arange(points) + 0.5) / points)
    values = np.stack([function(radius * float(node)).double().numpy() for node in nodes])  # [points, ...]
    fit = np.polynomial.chebyshev.chebfit(nodes, values.reshape(points, -1), points - 1)
    found = []
    for k in range(order + 1):
        derivative = np.polynomial.chebyshev.chebder(fit, k) if k else fit
        found.append(np.polynomial.chebyshev.chebval(0.0, derivative).reshape(values.shape[1:]) / radius**k)
    return found


def line(family: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], dict]:
    torch.manual_seed(0)
    model = build(family).double().eval()
    values = {name: value.clone() for name, value in trainable_values(model).items()}
    direction = {name: 0.01 * torch.randn_like(value) for name, value in values.items()}
    return model, values, direction, {"input_ids": token_batch(2, 7)["input_ids"]}


@pytest.fixture
def without_casts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Families cast to float32 inside; their references in float64 need those casts away."""
    original = Tensor.to

    def to(tensor: Tensor, *args, **kwargs):
        if tensor.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values()):
            return tensor
        return original(tensor, *args, **kwargs)

    softmax = F.softmax

    def wide_softmax(input: Tensor, *args, dtype=None, **kwargs):
        return softmax(input, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(
        Tensor, "float", lambda tensor: tensor if tensor.dtype == torch.float64 else original(tensor, torch.float32)
    )
    monkeypatch.setattr(F, "softmax", wide_softmax)


@pytest.fixture(params=["whole", "row by row"])
def attention_pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Attention at once, and in pieces of one query."""
    if request.param == "row by row":
        monkeypatch.setattr(composed, "_SCORES_PER_QUERY", 0)
        monkeypatch.setattr(composed, "_SCORES", 1)
    return request.param


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3"])
@pytest.mark.usefixtures("without_casts", "attention_pieces")
def test_derivatives_of_logits_equal_chebyshev_interpolation(family: str) -> None:
    model, values, direction, inputs = line(family)
    derivatives = directional_derivatives(
        lambda parameters: call_with(model, parameters, (), {**inputs, "use_cache": False}).logits, values, direction, 3
    )

    def at(t: float) -> Tensor:
        moved = {name: value + t * direction[name] for name, value in values.items()}
        with torch.no_grad():
            return call_with(model, moved, (), inputs).logits

    expected = chebyshev_derivatives(at, 3)
    for order, tolerance in ((0, 1e-12), (1, 1e-9), (2, 1e-9), (3, 1e-7)):
        size = np.abs(expected[order]).max()
        assert np.abs(derivatives[order].numpy() - expected[order]).max() <= tolerance * size


ATTENTION = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal, fewer keys": {"is_causal": True, "keys": 3},
    "causal, more keys": {"is_causal": True, "keys": 9},
    "boolean mask": {"attn_mask": torch.ones(2, 1, 5, 5, dtype=torch.bool).tril()},
    "additive mask": {"attn_mask": torch.linspace(-2, 2, 25, dtype=torch.float64).view(1, 1, 5, 5)},
    "mask of keys": {"attn_mask": torch.tensor([True, False, True, True, True]).view(1, 1, 1, 5)},
    "mask without batch": {"attn_mask": torch.ones(5, 5, dtype=torch.bool).tril()},
    "scale": {"scale": 0.3, "is_causal": True},
    "grouped heads": {"enable_gqa": True, "heads": 2, "is_causal": True},
}


@pytest.mark.parametrize("call", list(ATTENTION))
@pytest.mark.parametrize("rows", [1, 2])
def test_attention_in_pieces_is_attention(call: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(ATTENTION[call])
    keys, heads = options.pop("keys", 5), options.pop("heads", 4)
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 3, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, 2, heads, keys, 3, generator=generator, dtype=torch.float64).unbind()
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    monkeypatch.setattr(composed, "_SCORES_PER_QUERY", 0)
    monkeypatch.setattr(composed, "_SCORES", rows * 2 * 4 * keys)
    calls = []

    def counted(*args, **kwargs):
        calls.append(args[0].shape[-2])
        return attention(*args, **kwargs)

    attention = F.scaled_dot_product_attention
    with nested_derivatives():
        nested = attention(query, key, value, **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    found = composed._attention(query, key, value, **options)
    torch.testing.assert_close(nested, expected, rtol=1e-12, atol=1e-12)
    assert calls == [rows] * (5 // rows) + [5 % rows] * (5 % rows > 0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    calls.clear()
    # A graph would hold all pieces.
    composed._attention(query.requires_grad_(), key, value, **options)
    assert calls == [5]


def norm_line(norm, x: Tensor, dx: Tensor, order: int) -> float:
    weight = torch.linspace(0.5, 2, x.shape[-1], dtype=x.dtype)

    def function(parameters: dict[str, Tensor]) -> Tensor:
        return (norm(parameters["x"]) * weight).sin().sum()

    return float(directional_derivatives(function, {"x": x}, {"x": dx}, order)[-1])


@pytest.mark.parametrize(
    "norm",
    [
        lambda x: F.layer_norm(x, (6,), torch.full((6,), 1.3, dtype=x.dtype), torch.full((6,), 0.2, dtype=x.dtype)),
        lambda x: F.rms_norm(x, (6,)),
        lambda x: nn.LayerNorm(6, dtype=torch.float64)(x),
        lambda x: nn.GroupNorm(2, 6, dtype=torch.float64)(x),
    ],
    ids=["layer_norm", "rms_norm", "LayerNorm", "GroupNorm"],
)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_normalisations_have_right_nested_derivatives(norm, order: int) -> None:
    torch.manual_seed(0)
    x, dx = torch.randn(2, 3, 6, dtype=torch.float64).unbind()
    weight = torch.linspace(0.5, 2, 6, dtype=x.dtype)

    def at(t: float) -> Tensor:
        with torch.no_grad():
            return (norm(x + t * dx) * weight).sin().sum()

    expected = float(chebyshev_derivatives(at, order, radius=0.1)[-1])
    assert norm_line(norm, x, dx, order) == pytest.approx(expected, rel=1e-8)


def test_the_native_layer_norm_is_wrong_and_the_composed_one_is_why_ours_is_right() -> None:
    torch.manual_seed(0)
    x, dx = torch.randn(2, 3, 6, dtype=torch.float64).unbind()

    def along(t: Tensor) -> Tensor:
        return F.layer_norm(x + t * dx, (6,)).pow(3).sum()

    def first(t: Tensor) -> Tensor:
        return torch.func.jvp(along, (t,), (torch.ones_like(t),))[1]

    zero = torch.zeros((), dtype=torch.float64)
    native = float(torch.func.jvp(first, (zero,), (torch.ones_like(zero),))[1])
    with nested_derivatives():
        found = float(torch.func.jvp(first, (zero,), (torch.ones_like(zero),))[1])
    expected = float(chebyshev_derivatives(lambda t: along(torch.tensor(t, dtype=torch.float64)), 2)[2])
    assert found == pytest.approx(expected, rel=1e-9)
    assert native != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_composed_normalisations_compute_what_fused_ones_do(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(4, 8) + 1).to(dtype)
    weight, bias = torch.rand(8).to(dtype), torch.rand(8).to(dtype)
    calls = (
        lambda: F.layer_norm(x, (8,), weight, bias, 1e-3),
        lambda: F.rms_norm(x, (8,), weight, 1e-3),
        lambda: F.group_norm(x, 4, weight, bias, 1e-3),
    )
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 2e-2}[dtype]
    for call in calls:
        fused = call()
        with nested_derivatives():
            found = call()
        assert found.dtype == fused.dtype
        torch.testing.assert_close(found, fused, rtol=tolerance, atol=tolerance)


def test_the_taylor_polynomial_of_a_polynomial_is_itself() -> None:
    x, dx = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.5, 3.0]).double()
    derivatives = directional_derivatives(lambda p: p["x"] ** 3 - 2 * p["x"], {"x": x}, {"x": dx}, 3)
    assert torch.allclose(polynomial(derivatives), (x + dx) ** 3 - 2 * (x + dx))
    assert torch.allclose(polynomial(derivatives, 0.3), (x + 0.3 * dx) ** 3 - 2 * (x + 0.3 * dx))


def test_tied_weights_move_together() -> None:
    model, values, direction, inputs = line("gpt2")
    assert "lm_head.weight" not in values
    (_, first) = directional_derivatives(
        lambda parameters: call_with(model, parameters, (), inputs).logits, values, direction, 1
    )
    step = 1e-4
    ends = []
    for sign in (1, -1):
        moved = {name: value + sign * step * direction[name] for name, value in values.items()}
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(moved[name])
            ends.append(model(**inputs).logits)
    torch.testing.assert_close(first, (ends[0] - ends[1]) / (2 * step), rtol=1e-5, atol=1e-7)


class Twice(nn.Module):
    """One module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def test_a_module_under_two_names_has_its_own_parameters_back() -> None:
    model = Twice()
    weight = model.first.weight
    with torch.no_grad():
        model.first.bias.zero_()
        expected = 4 * model(torch.ones(1, 2))
        values = {name: 2 * value for name, value in model.named_parameters()}
        torch.testing.assert_close(call_with(model, values, (torch.ones(1, 2),), {}), expected)
    assert model.first.weight is weight


def test_what_a_forward_detaches_is_differentiated() -> None:
    x = {"x": torch.tensor(2.0, dtype=torch.float64)}
    for detached in (torch.detach, Tensor.detach, lambda value: value.data):
        found = directional_derivatives(lambda p, d=detached: p["x"] * d(p["x"]) ** 2, x, {"x": torch.ones(())}, 3)
        assert [float(value) for value in found] == [8.0, 12.0, 12.0, 6.0]


def test_an_objective_sees_a_substituted_model_as_the_model() -> None:
    model, values, direction, inputs = line("llama")
    moved = {name: value + direction[name] for name, value in values.items()}
    substituted = Substituted(model, moved)
    assert accepts(substituted, "logits_to_keep") == accepts(model, "logits_to_keep")
    assert not list(substituted.parameters())
    with torch.no_grad():
        found = CausalLMObjective().loss(substituted, inputs)
        for name, parameter in model.named_parameters():
            parameter.copy_(moved[name])
        assert float(found) == pytest.approx(float(CausalLMObjective().loss(model, inputs)), rel=1e-12)


def test_errors_and_math() -> None:
    x = {"x": torch.ones(())}
    with pytest.raises(ValueError, match="order must be at least 0; got -1"):
        directional_derivatives(lambda p: p["x"], x, x, -1)
    with pytest.raises(ValueError, match="'y', which is no parameter"):
        directional_derivatives(lambda p: p["x"], x, {"y": torch.ones(())}, 1)
    assert float(polynomial([torch.tensor(1.0)] * 9)) == pytest.approx(math.e, rel=1e-5)


def nested(function, values: dict[str, Tensor], direction: dict[str, Tensor], order: int) -> tuple[Tensor, ...]:
    """By forward mode nested around the whole function."""
    with nested_derivatives(), torch.enable_grad():
        return autodiff._derivatives(function, direction, order)(values)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.usefixtures("without_casts")
def test_carried_derivatives_are_those_of_nested_forward_mode(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, values, direction, batch = line(family)

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        return call_with(model, parameters, (), batch).logits

    expected = nested(logits, values, direction, 3)

    def refused(*args):
        raise AssertionError("an operation did not carry its derivatives")

    monkeypatch.setattr(autodiff, "_derivatives", refused)
    found = directional_derivatives(logits, values, direction, 3)
    assert torch.equal(found[0], expected[0])
    for carried, reference in zip(found, expected, strict=True):
        assert float((carried - reference).norm() / reference.norm()) < 1e-12


OPERATIONS = {
    "sums": lambda x, w: (
        1.5 - (x + 2 * w) - torch.add(x, w, alpha=3) + (w - x) / 4 + x.sum(0) + w.mean(-1, keepdim=True)
    ),
    "products": lambda x, w: (
        (x * w) @ w.T + torch.addmm(w, x, w) + F.linear(x, w, w[0]) + x**2 + torch.bmm(x[None], w[None])[0]
    ),
    "shapes": lambda x, w: (
        torch.cat([x[:1], torch.stack([w[0], x[1]])]).transpose(0, 1).reshape(9)[::2] * w.T.flatten()[4:]
    ),
    "splits": lambda x, w: sum((a * b for a, b in zip(x.chunk(3), w.unbind(0), strict=True)), torch.zeros(())),
    "any": lambda x, w: F.softmax(x, -1) / w.cosh() + F.silu(x * w) + torch.maximum(x, w) + x.max(dim=0).values,
    "constants": lambda x, w: (
        torch.where(x > w, x, w.detach()) * torch.ones_like(x) + F.embedding(torch.tensor([2, 0, 2]), x)
    ),
    "one side": lambda x, w: (
        F.linear(torch.ones(3, 3).double(), torch.eye(3).double(), w[1]) + F.linear(x, torch.eye(3).double())
    ),
}


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_each_operation_carries_its_derivatives(name: str) -> None:
    generator = torch.Generator().manual_seed(4)
    parts = [torch.randn(2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2)]
    values, direction = ({"x": part[0], "w": part[1]} for part in parts)

    def function(parameters: dict[str, Tensor]) -> Tensor:
        return OPERATIONS[name](parameters["x"], parameters["w"])

    with nested_derivatives(), torch.enable_grad():
        found = function({key: Jet((values[key], direction[key], None, None)) for key in values}).parts
    for carried, reference in zip(found, nested(function, values, direction, 3), strict=True):
        carried = torch.zeros_like(reference) if carried is None else carried
        torch.testing.assert_close(carried, reference, rtol=1e-11, atol=1e-12)


def test_what_changes_a_tensor_in_place_goes_another_way() -> None:
    def function(parameters: dict[str, Tensor]) -> Tensor:
        y = parameters["x"] * 1.0
        y += parameters["x"] ** 3
        y[0] = y[1] * y[2]
        return y

    values, direction = {"x": torch.tensor([1.0, 2.0, 3.0])}, {"x": torch.ones(3)}
    with pytest.raises(NotImplementedError, match="changes a tensor that carries derivatives"):
        function({"x": Jet((values["x"], direction["x"], None))})
    found = directional_derivatives(function, values, direction, 2)
    for carried, reference in zip(found, nested(function, values, direction, 2), strict=True):
        assert torch.equal(carried, reference)


def test_what_does_not_ask_for_derivatives_is_refused() -> None:
    jet = Jet((torch.ones(2), torch.ones(2), None))
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(NotImplementedError, match="does not see the derivat"):
        torch.mul(jet, 2)
