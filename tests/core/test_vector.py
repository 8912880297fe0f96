from __future__ import annotations

import math
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from lightning_goldy.core import ParameterSpace, ParameterVector, SpaceError
from lightning_goldy.core.vector import elements_in, reduce_tensors, require_finite
from tests.references.common import exact_dot, largest_reference, share_of


def one_tensor(values: Tensor) -> ParameterVector:
    return ParameterVector(ParameterSpace(("w",), (values.shape,), (values.dtype,)), {"w": values})


def vector_of(*tensors: Tensor) -> ParameterVector:
    names = tuple("abcdefgh"[: len(tensors)])
    space = ParameterSpace(names, tuple(t.shape for t in tensors), tuple(t.dtype for t in tensors))
    return ParameterVector(space, dict(zip(names, tensors, strict=True)))


# Construction and lookup


def test_tensors_follow_the_order_of_the_space() -> None:
    space = ParameterSpace.of(nn.Linear(2, 1))
    vector = ParameterVector(space, {"bias": torch.ones(1), "weight": torch.zeros(1, 2)})
    assert list(vector) == ["weight", "bias"]
    assert len(vector) == 2
    assert "bias" in vector
    assert repr(vector) == "ParameterVector(2 tensors, 3 elements, float32)"


def test_wrong_tensors_are_refused_by_name() -> None:
    space = ParameterSpace.of(nn.Linear(2, 1))
    good = {"weight": torch.zeros(1, 2), "bias": torch.zeros(1)}
    with pytest.raises(SpaceError, match="the vector lacks parameter 'bias'"):
        ParameterVector(space, {"weight": good["weight"]})
    with pytest.raises(SpaceError, match=r"no parameter 'extra' in this space.*Valid: weight, bias"):
        ParameterVector(space, {**good, "extra": torch.zeros(1)})
    with pytest.raises(SpaceError, match=r"weight: the vector has shape \(2, 1\), the space \(1, 2\)"):
        ParameterVector(space, {**good, "weight": torch.zeros(2, 1)})
    with pytest.raises(SpaceError, match=r"'wieght'.*did you mean 'weight'"):
        ParameterVector(space, good)["wieght"]


def test_copies_stay_and_views_follow() -> None:
    module = nn.Linear(2, 2)
    copy, view = ParameterVector.of(module), ParameterVector.of(module, clone=False)
    before = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    assert torch.equal(copy["weight"], before)
    assert torch.equal(view["weight"], before + 1)
    assert not view["weight"].requires_grad


# Arithmetic


def test_arithmetic_is_elementwise() -> None:
    a, b = vector_of(torch.randn(3, 2), torch.randn(5)), vector_of(torch.randn(3, 2), torch.randn(5))
    expected: dict[str, tuple[ParameterVector, Callable[[Tensor, Tensor], Tensor]]] = {
        "+": (a + b, lambda x, y: x + y),
        "-": (a - b, lambda x, y: x - y),
        "*": (a * b, lambda x, y: x * y),
        "scale": (2.5 * a, lambda x, y: x * 2.5),
        "scale on the right": (a * 2.5, lambda x, y: x * 2.5),
        "negation": (-a, lambda x, y: -x),
    }
    for result, function in expected.values():
        for name in a:
            assert torch.equal(result[name], function(a[name], b[name]))


def test_axpy_changes_in_place_and_returns_itself() -> None:
    a, b = vector_of(torch.randn(4, 2), torch.randn(3)), vector_of(torch.randn(4, 2), torch.randn(3))
    before, storage = a.map(torch.clone), a["a"].data_ptr()
    assert a.axpy_(-0.5, b) is a
    assert a["a"].data_ptr() == storage
    for name in a:
        assert torch.allclose(a[name], before[name] - 0.5 * b[name], rtol=0, atol=1e-7)


def test_axpy_on_views_of_parameters_needs_no_gradient_mode() -> None:
    module = nn.Linear(2, 2)
    before = module.weight.detach().clone()
    ParameterVector.of(module, clone=False).axpy_(1.0, ParameterVector.of(module))
    assert torch.equal(module.weight.detach(), 2 * before)
    assert module.weight.is_leaf


def test_vectors_of_different_spaces_do_not_combine() -> None:
    a, b = vector_of(torch.zeros(3)), vector_of(torch.zeros(4))
    for operation in (lambda: a + b, lambda: a - b, lambda: a * b, lambda: a.dot(b), lambda: a.axpy_(1.0, b)):
        with pytest.raises(SpaceError, match=r"a is \(3,\) and \(4,\)"):
            operation()


def test_to_changes_the_dtype_and_full_gives_plain_tensors() -> None:
    vector = vector_of(torch.randn(3), torch.randn(2))
    assert {tensor.dtype for tensor in vector.to(torch.bfloat16).values()} == {torch.bfloat16}
    assert torch.equal(vector.full()["a"], vector["a"])


# Reductions


@pytest.mark.parametrize("offset", [0.0, 1.0, 100.0])
def test_four_million_elements_with_a_mean(offset: float) -> None:
    values = torch.randn(4_000_003) + offset
    exact = exact_dot(values, values)
    if offset:
        naive = float(np.add.accumulate((values * values).numpy())[-1])
        assert abs(naive / exact - 1) > 1e-5, "the case must be one that float32 gets wrong"
    vector = one_tensor(values)
    assert abs(vector.dot(vector) / exact - 1) < 1e-12
    assert abs(vector.norm() / math.sqrt(exact) - 1) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dot_norm_and_tensor_norms_in_every_dtype(dtype: torch.dtype) -> None:
    a = vector_of(torch.randn(130, 70).to(dtype), torch.randn(()).to(dtype), torch.randn(0, 3).to(dtype))
    b = vector_of(torch.randn(130, 70).to(dtype), torch.randn(()).to(dtype), torch.randn(0, 3).to(dtype))
    dots = [exact_dot(a[name], b[name]) for name in a]
    assert a.tensor_dots(b) == pytest.approx(dots, rel=1e-12, abs=1e-12)
    assert a.dot(b) == pytest.approx(math.fsum(dots), rel=1e-12)
    squares = [exact_dot(a[name], a[name]) for name in a]
    assert a.tensor_norms() == pytest.approx([math.sqrt(square) for square in squares], rel=1e-12)
    assert a.norm() == pytest.approx(math.sqrt(math.fsum(squares)), rel=1e-12)


def test_squares_beyond_the_range_of_the_dtype() -> None:
    # 1e30^2 overflows float32, 1e3^2 overflows float16.
    assert one_tensor(torch.full((4,), 1e30)).norm() == pytest.approx(2e30, rel=1e-6)
    assert one_tensor(torch.full((4,), 1e3, dtype=torch.float16)).norm() == pytest.approx(2e3)
    assert one_tensor(torch.full((4,), 1e-30)).norm() == pytest.approx(2e-30, rel=1e-6)


def test_reductions_do_not_depend_on_the_memory_layout() -> None:
    matrix = torch.randn(40, 30)
    assert one_tensor(matrix.t()).dot(one_tensor(matrix.t().contiguous())) == pytest.approx(exact_dot(matrix, matrix))
    assert one_tensor(torch.ones(1).expand(10)).dot(one_tensor(torch.arange(10.0))) == 45


def test_reduce_tensors_chunks_every_partner_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_goldy.core.vector._CHUNK", 7)
    a, b, c = torch.randn(3, 9), torch.randn(3, 9), torch.randn(3, 9)
    found = reduce_tensors([a], lambda x, y, z: (x * y * z).sum(), [b], [c])
    assert found == pytest.approx([float((a.double() * b.double() * c.double()).sum())], rel=1e-12)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=4), st.floats(0, 1), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_count_is_the_number_of_nonzeros(lengths: list[int], density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(n, generator=generator) < density for n in lengths]
    assert vector_of(*masks).count() == [sum(mask.tolist()) for mask in masks]
    assert vector_of(*(mask.float() for mask in masks)).count() == [sum(mask.tolist()) for mask in masks]


# Selection


@pytest.mark.parametrize("percent", [0.01, 5, 33.3, 50, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_by_tensor_and_globally(percent: float, dtype: torch.dtype) -> None:
    vector = vector_of(*((torch.randn(shape) * 3).round().to(dtype) for shape in [(40, 50), (7,), (), (3, 3, 3)]))
    by_tensor = vector.top_k(percent)
    for name in vector:
        expected = largest_reference([vector[name]], share_of(percent, vector[name].numel()))[0]
        assert torch.equal(by_tensor[name], expected)
    tensors = list(vector.values())
    together = vector.top_k(percent, scope="global")
    assert sum(together.count()) == share_of(percent, vector.space.numel)
    for found, expected in zip(together.values(), largest_reference(tensors, sum(together.count())), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("percent", [0, -1, 100.1, math.nan, math.inf])
def test_a_share_outside_0_to_100_is_an_error(percent: float) -> None:
    with pytest.raises(ValueError, match=rf"top_k_percent must lie in \(0, 100\]; got {percent}"):
        elements_in(percent, 10)
    with pytest.raises(ValueError, match="got"):
        vector_of(torch.zeros(3)).top_k(percent)


def test_an_unknown_scope_is_an_error() -> None:
    with pytest.raises(ValueError, match="scope is 'tensor' or 'global'; got 'layer'"):
        vector_of(torch.zeros(3)).top_k(5, scope="layer")  # type: ignore[arg-type]


@given(st.integers(1, 10**9), st.integers(1, 400))
def test_elements_in_rounds_half_up_and_never_to_nothing(numel: int, quarters: int) -> None:
    percent = quarters / 4
    exact, remainder = divmod(numel * quarters, 400)
    assert elements_in(percent, numel) == max(1, exact + (2 * remainder >= 400))
    assert elements_in(percent, numel) <= max(1, numel)


# Finiteness


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named(dtype: torch.dtype, wrong: float) -> None:
    tensors = {"a": torch.randn(3).to(dtype), "b": torch.randn(40, 5).to(dtype), "empty": torch.zeros(0, dtype=dtype)}
    require_finite(tensors, "weights")
    tensors["b"][17, 3] = wrong
    with pytest.raises(ValueError, match=r"^the gradients of b are not finite$"):
        require_finite(tensors, "gradients")
