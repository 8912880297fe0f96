"""What is composed for forward mode computes what the original does, with the derivatives that it ought to have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_goldy.core import autodiff
from lightning_goldy.core.autodiff import (
    ForwardModeError,
    call_with,
    difference_derivatives,
    directional_derivatives,
    forward_mode,
    nested_derivatives,
)
from lightning_goldy.core.composed import functions_by_parts
from tests.core.test_autodiff import chebyshev_derivatives


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


STATISTICS = {"running_mean": numbers(4), "running_var": 1 + numbers(4).square()}
OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch_norm, training": lambda x: F.batch_norm(x, None, None, numbers(4), numbers(4, seed=1), training=True),
    "batch_norm, evaluation": lambda x: F.batch_norm(x, **STATISTICS, weight=numbers(4), bias=numbers(4, seed=1)),
    "BatchNorm1d": lambda x: nn.BatchNorm1d(4, dtype=torch.float64)(x),
    "instance_norm": lambda x: F.instance_norm(x, weight=numbers(4), bias=numbers(4, seed=1)),
    "InstanceNorm1d": lambda x: nn.InstanceNorm1d(4, dtype=torch.float64)(x),
    "glu": lambda x: F.glu(x, dim=1),
    "hardsigmoid": lambda x: F.hardsigmoid(0.1 * x),
    "soft_margin_loss": lambda x: F.soft_margin_loss(x, torch.ones_like(x)),
    "weight_norm": lambda x: torch._weight_norm(x, numbers(3, 1, 1), 0),
    "solve": lambda x: torch.linalg.solve(x[0, :, :4] + 4 * torch.eye(4), x[0, :, 4:]),
    "solve, vector": lambda x: torch.linalg.solve(x[0, :, :4] + 4 * torch.eye(4), x[0, :, 5]),
    "solve, right": lambda x: torch.linalg.solve(x[0, :, :4] + 4 * torch.eye(4), x[1, :2, :4], left=False),
    "solve, batched vectors": lambda x: torch.linalg.solve(x[:, :, :4] + 4 * torch.eye(4), x[:, :, 5]),
    "tensorsolve": lambda x: torch.linalg.tensorsolve((x[0, :, :4] + 4 * torch.eye(4)).view(2, 2, 4), x[0, :2, :2]),
    "slogdet": lambda x: torch.linalg.slogdet(x[:, :, :4]).logabsdet,
    "det": lambda x: x[:, :, :4].det(),
    "logdet": lambda x: torch.logdet(x[:, :, :4].mT @ x[:, :, :4]),
    "cumprod": lambda x: torch.where(x.abs() < 0.3, 0.0, x).cumprod(dim=-1),
    "cumprod, one": lambda x: torch.cumprod(x[:1], 0),
    "cholesky_inverse": lambda x: torch.cholesky_inverse(x[:, :, :4].tril() + 4 * torch.eye(4)),
    "cholesky_inverse, upper": lambda x: torch.cholesky_inverse(x[:, :, :4].triu() + 4 * torch.eye(4), upper=True),
    "grouped_mm": lambda x: F.grouped_mm(x[0], numbers(3, 6, 5), offs=torch.tensor([1, 1, 3], dtype=torch.int32))[:3],
    "fft, as FNet mixes tokens": lambda x: torch.fft.fftn(x, dim=(1, 2)).real,
    "rfft and irfft": lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.arange(4), n=6),
    "absolute value of a spectrum": lambda x: torch.fft.fft(x).abs(),
    "rotation of complex pairs": lambda x: torch.view_as_real(
        torch.view_as_complex(x.view(3, 4, 3, 2)) * torch.polar(torch.ones(4, 3).double(), numbers(4, 3))
    ),
    "made complex": lambda x: (x.to(torch.complex128) * (1 + 2j) + x).square().imag,
    "product of complex matrices": lambda x: (torch.complex(x, x.square()) @ torch.complex(x, x).mH).real,
}
WITHOUT_KERNEL = ("grouped_mm",)  # for this precision


LAID_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "rms_norm": lambda x: F.rms_norm(x, x.shape[-1:]),
    "group_norm": lambda x: F.group_norm(x, 2),
    "batch_norm, training": lambda x: F.batch_norm(x, None, None, training=True),
    "batch_norm, evaluation": lambda x: F.batch_norm(x, **STATISTICS),
    "instance_norm": F.instance_norm,
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x) if x.ndim == 4 else x,
}


@pytest.mark.parametrize("name", list(LAID_OUT))
def test_what_is_composed_lies_in_the_memory_as_the_original(name: str) -> None:
    turned = numbers(2, 6, 4).mT, numbers(2, 6, 4, 8).transpose(1, 2), numbers(2, 5, 6, 4).permute(0, 3, 1, 2)
    for x in turned:
        original = LAID_OUT[name](x)
        with nested_derivatives():
            composed = LAID_OUT[name](x)
        # What follows may view it: a crash, or not, that another number of samples would not have shown.
        assert composed.stride() == original.stride(), x.stride()


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_composed_operations_are_the_original_with_right_derivatives(name: str) -> None:
    x, dx = numbers(3, 4, 6), 0.3 * numbers(3, 4, 6, seed=2)

    def along(t: Tensor) -> Tensor:
        found = OPERATIONS[name](x + t * dx)
        return (found * torch.linspace(0.5, 2, found.numel(), dtype=found.dtype).view(found.shape)).sin().sum()

    if name not in WITHOUT_KERNEL:
        with nested_derivatives():
            composed = OPERATIONS[name](x)
        torch.testing.assert_close(composed, OPERATIONS[name](x), rtol=1e-10, atol=1e-12)

    def at(t: float) -> Tensor:
        with torch.no_grad(), nested_derivatives():
            return along(torch.tensor(t, dtype=torch.float64))

    zero = torch.zeros((), dtype=torch.float64)
    found = directional_derivatives(lambda p: along(p["t"]), {"t": zero}, {"t": torch.ones_like(zero)}, 3)
    for value, expected in zip(found, chebyshev_derivatives(at, 3, radius=0.02), strict=True):
        assert float(value) == pytest.approx(float(expected), rel=1e-4, abs=1e-4)


def test_moving_statistics_move_as_they_would() -> None:
    x = numbers(5, 4, 3)
    for make in (nn.BatchNorm1d, lambda width: nn.InstanceNorm1d(width, track_running_stats=True)):
        layer, other = make(4).double(), make(4).double()
        layer(x)
        with nested_derivatives():
            other(x)
        assert all(
            torch.equal(buffer, expected) for buffer, expected in zip(other.buffers(), layer.buffers(), strict=True)
        )


GROUPS = torch.tensor([2, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("first", "second", "offs"),
    [
        ((8, 16), (3, 16, 8), GROUPS),
        ((3, 8, 16), (16, 8), GROUPS),
        ((8, 8), (8, 16), GROUPS),
        ((3, 8, 16), (3, 16, 8), None),
    ],
    ids=["rows", "columns", "sums", "batches"],
)
def test_products_over_groups_are_what_the_kernel_computes(first, second, offs) -> None:
    one, other = numbers(*first).float(), numbers(*second, seed=1).float()
    expected = F.grouped_mm(one, other, offs=offs)
    with nested_derivatives():
        found = F.grouped_mm(one, other, offs=offs)
    # What lies beyond the last group the kernel leaves as it was.
    place = (..., slice(5)) if first == (3, 8, 16) and offs is not None else slice(5) if first == (8, 16) else ...
    torch.testing.assert_close(found[place], expected[place], rtol=1e-5, atol=1e-5)


@torch.library.custom_op("goldy_tests::square", mutates_args=())
def square_of_a_library(x: Tensor) -> Tensor:
    return x * x


square_of_a_library.register_autograd(
    lambda ctx, gradient: 2 * ctx.x * gradient,
    setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0]),
)


class ProductOver(nn.Module):
    """Multiplies with what torch differentiates wrongly."""

    def forward(self, x: Tensor) -> Tensor:
        return x.new_ones(2).scatter_reduce(0, torch.tensor([0, 1, 1]), x, "prod")


class OfALibrary(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return square_of_a_library(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (
            OfALibrary(),
            r"Sequential has no forward-mode derivative in '1' \(OfALibrary\): .*goldy_tests::square, an op",
        ),
        (ProductOver(), r"in '1' \(ProductOver\): .*derivative of scatter_reduce is wrong"),
    ],
)
def test_an_operation_that_forward_mode_takes_for_a_constant_is_refused(layer: nn.Module, message: str) -> None:
    model = nn.Sequential(nn.Identity(), layer)
    x = {"x": torch.tensor([1.0, 2.0, 3.0])}
    with pytest.raises(ForwardModeError, match=message), forward_mode(model):
        directional_derivatives(lambda p: model(p["x"]), x, x, 1)
    found, _ = difference_derivatives(lambda p: model(p["x"]), x, x, 1)
    expected = torch.tensor([2.0, 8.0, 18.0]) if isinstance(layer, OfALibrary) else torch.tensor([1.0, 12.0])
    torch.testing.assert_close(found[1].float(), expected, rtol=1e-3, atol=1e-3)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught, forward_mode(nn.Identity()):
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert not isinstance(caught.value, ForwardModeError)


class Estimated(torch.autograd.Function):
    """A cube whose backward is not its derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        ctx.set_materialize_grads(False)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        return 7 * gradient


class WithSetup(torch.autograd.Function):
    @staticmethod
    def forward(x, power=3):
        return x**power

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient, None


class Hidden(torch.autograd.Function):
    """A cube that forward mode does not see."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.full_like(x, float(x)) ** 3

    @staticmethod
    def backward(ctx, gradient):
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


@pytest.mark.parametrize("function", [Estimated, WithSetup])
def test_custom_functions_are_differentiated_through_their_forward(function) -> None:
    x = {"x": torch.tensor(2.0, dtype=torch.float64)}
    found = directional_derivatives(lambda p: function.apply(p["x"]), x, {"x": torch.ones(())}, 3)
    assert [float(value) for value in found] == pytest.approx([8, 12, 12, 6])
    leaf = torch.tensor(2.0, requires_grad=True)
    with functions_by_parts(backward=True):
        function.apply(leaf).backward()
    assert float(leaf.grad) == 12
    with functions_by_parts():
        gradient = torch.autograd.grad(Estimated.apply(leaf), [leaf])
    assert float(gradient[0]) == 7


def test_a_custom_function_that_hides_its_derivative_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autodiff, "_COMPARED", set())
    x, step = {"x": torch.tensor(2.0)}, {"x": torch.tensor(0.1)}
    with pytest.raises(
        ForwardModeError, match=r"custom function tests\.core\.test_composed\.Hidden is not that of its v"
    ):
        directional_derivatives(lambda p: Hidden.apply(p["x"]) + p["x"], x, step, 1)
    directional_derivatives(lambda p: Estimated.apply(p["x"]), x, step, 1)
    assert {name for name, _ in autodiff._COMPARED} == {"tests.core.test_composed.Estimated"}


class Checkpointed(nn.Module):
    """Checkpoints its layer in either mode, and asks for gradients of what it is given."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant, self.layer = reentrant, nn.Linear(2, 2, dtype=torch.float64)
        self.embedding = nn.Linear(2, 2, dtype=torch.float64)
        self.embedding.register_forward_hook(lambda module, args, output: output.requires_grad_(True))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda h: self.layer(h).sin(), self.embedding(x), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_are_set_aside_and_come_back(reentrant: bool) -> None:
    import torch.utils.checkpoint as module

    torch.manual_seed(0)
    model, x = Checkpointed(reentrant), numbers(3, 2)
    plain = nn.Sequential(model.embedding, model.layer)
    values = {name: value.detach().clone() for name, value in model.named_parameters()}
    step = {name: torch.ones_like(value) for name, value in values.items()}
    before = module.CheckpointFunction
    found = directional_derivatives(lambda p: call_with(model, p, (x,), {}), values, step, 2)
    model.embedding._forward_hooks.clear()

    def expected(p: dict[str, Tensor]) -> Tensor:
        renamed = {name.replace("embedding", "0").replace("layer", "1"): value for name, value in p.items()}
        return call_with(plain, renamed, (x,), {}).sin()

    for value, right in zip(found, directional_derivatives(expected, values, step, 2), strict=True):
        torch.testing.assert_close(value, right)
    assert module.CheckpointFunction is before
    # A backward pass behind other values: a checkpoint would recompute with the model's own.
    leaves = {name: (value + 1).requires_grad_() for name, value in values.items()}
    gradients = torch.autograd.grad(call_with(model, leaves, (x,), {}).sum(), list(leaves.values()))
    right = torch.autograd.grad(expected(leaves).sum(), list(leaves.values()))
    for gradient, wanted in zip(gradients, right, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_recurrent_layers_have_forward_mode_in_single_precision() -> None:
    torch.manual_seed(0)
    layer, x = nn.LSTM(3, 3), numbers(4, 1, 3).float()
    values = {name: value.detach() for name, value in layer.named_parameters()}
    found = directional_derivatives(lambda p: call_with(layer, p, (x,), {})[0], values, values, 1)[1]
    wide = layer.double()
    values = {name: value.detach().double() for name, value in values.items()}
    right = directional_derivatives(lambda p: call_with(wide, p, (x.double(),), {})[0], values, values, 1)[1]
    torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)


def test_differences_are_exact_for_polynomials_and_tell_their_error() -> None:
    x, step = {"x": numbers(3)}, {"x": numbers(3, seed=1)}
    found, errors = difference_derivatives(lambda p: p["x"] ** 4, x, step, 3)
    right = directional_derivatives(lambda p: p["x"] ** 4, x, step, 3)
    for value, error, wanted in zip(found, errors, right, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-7, atol=1e-7)
        assert float(error.abs().max()) < 1e-4
    wild, errors = difference_derivatives(lambda p: (p["x"] * 40).sin(), x, {"x": torch.ones(())}, 2)
    right = directional_derivatives(lambda p: (p["x"] * 40).sin(), x, {"x": torch.ones_like(x["x"])}, 2)
    assert bool(((wild[2] - right[2]).abs() <= errors[2].abs() + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("place", [0.003, 0.02, 0.1, 0.5])
def test_differences_tell_an_error_that_covers_bends_and_rounding(place: float, dtype: torch.dtype) -> None:
    """Functions of one number whose derivatives at 0 are known: bends beside the base, and waves that are too short."""
    ramp = torch.relu
    known: list[tuple[Callable[[Tensor], Tensor], tuple[float, float, float]]] = [
        (lambda x: ramp(x - place), (0, 0, 0)),
        (lambda x: (x - place).abs(), (place, -1, 0)),
        (lambda x: ramp(x - place).square() + x * x, (0, 0, 2)),
        (lambda x: 0.1 * (x > place).to(dtype) + x, (0, 1, 0)),
        (lambda x: (x / place).sin(), (0, 1 / place, 0)) if place > 0.02 else (lambda x: x, (0, 1, 0)),
        (lambda x: torch.tanh(x / max(place, 0.02)), (0, 1 / max(place, 0.02), 0)),
        (lambda x: x * x, (0, 0, 2)),
    ]
    for function, right in known:
        zero = {"x": torch.zeros((), dtype=dtype)}
        found, errors = difference_derivatives(
            lambda p, f=function: f(p["x"]), zero, {"x": torch.ones((), dtype=dtype)}, 2
        )
        for value, error, wanted in zip(found, errors, right, strict=True):
            assert abs(float(value) - wanted) <= abs(float(error)) + 1e-12
    # Where nothing bends the error stays small.
    assert max(float(error.abs()) for error in errors) < (1e-2 if dtype is torch.float32 else 1e-6)


class TakesNumbers(nn.Module):
    """Takes numbers out of its activations, and scales by them or only looks."""

    def __init__(self, take: Callable[[Tensor], Any], *, used: bool) -> None:
        super().__init__()
        self.first, self.take, self.used = nn.Linear(3, 3), take, used

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        number = torch.as_tensor(self.take(hidden)).sum()
        return hidden * number if self.used else hidden + 0 * number


TAKING: list[Callable[[Tensor], Any]] = [
    lambda hidden: hidden.std().item(),
    lambda hidden: hidden.detach().cpu().numpy().copy(),
    lambda hidden: float(hidden.mean()),
    lambda hidden: hidden.tolist(),
]


@pytest.mark.parametrize("take", TAKING, ids=["item", "numpy", "float", "tolist"])
def test_numbers_that_leave_torch_are_no_constants(take: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(0)
    x, tried = numbers(4, 3).float(), {}
    for used in (False, True):
        model = TakesNumbers(take, used=used)
        values = {name: value.detach() for name, value in model.named_parameters()}

        def function(p: dict[str, Tensor], model: nn.Module = model) -> Tensor:
            return call_with(model, p, (x,), {})

        def derive(order: int, values: Any = values, function: Any = function) -> tuple[Tensor, ...]:
            return directional_derivatives(function, values, values, order)

        tried[used] = derive, difference_derivatives(function, values, values, 2)[0]
    derive, right = tried[False]
    for value, wanted in zip(derive(2), right, strict=True):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-2, atol=1e-2)
    for order in (1, 2):
        with pytest.raises(ForwardModeError, match=r"item\(\) or numpy\(\), in .*test_composed.py:\d+\) is not"):
            tried[True][0](order)
