from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from lightning_goldy.core import selection
from lightning_goldy.core.selection import select_largest, true_positions
from tests.references.common import largest_reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Few different values, so that ties are the rule; two zeros that compare equal, and infinities.
POOL = (0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 1e-3, -2.0, math.inf, -math.inf)


@st.composite
def tied_tensors(draw: st.DrawFn, most: int = 60) -> tuple[list[Tensor], int]:
    lengths = draw(st.lists(st.integers(0, most), min_size=1, max_size=4).filter(any))
    values = draw(st.sampled_from([POOL, POOL[:2], POOL[:5]]))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    if draw(st.booleans()):
        tensors = [
            torch.tensor(values, dtype=dtype)[torch.randint(len(values), (n,), generator=generator)] for n in lengths
        ]
    else:
        tensors = [torch.randn(n, generator=generator).to(dtype) for n in lengths]
    k = draw(st.one_of(st.integers(1, sum(lengths)), st.sampled_from([1, sum(lengths)])))
    return tensors, k


def assert_selects(tensors: list[Tensor], k: int) -> None:
    found = select_largest(tensors, k)
    for tensor, mask, expected in zip(tensors, found, largest_reference(tensors, k), strict=True):
        assert mask.dtype is torch.bool
        assert mask.shape == tensor.shape
        assert torch.equal(mask, expected), f"k={k}, first at {(mask != expected).nonzero()[:1].tolist()}"
    assert sum(int(mask.count_nonzero()) for mask in found) == k


@given(tied_tensors())
@settings(max_examples=150, deadline=None)
def test_small_inputs_equal_a_stable_sort(case: tuple[list[Tensor], int]) -> None:
    assert_selects(*case)


@given(tied_tensors(most=300), st.sampled_from([2, 3, 8]), st.sampled_from([16, 64]))
@settings(max_examples=250, deadline=None)
def test_brackets_equal_a_stable_sort(case: tuple[list[Tensor], int], stride: int, probes: int) -> None:
    # Brackets are meant for large tensors; lowered limits send small ones through the same code.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_SMALL", 4)
        patch.setattr(selection, "_LEAST_STRIDE", stride)
        patch.setattr(selection, "_PROBES", probes)
        patch.setattr(selection, "_TIE_CHUNK", 7)
        assert_selects(*case)


@given(tied_tensors(most=80))
@settings(max_examples=250, deadline=None)
def test_radix_selection_equals_a_stable_sort(case: tuple[list[Tensor], int]) -> None:
    tensors, k = case
    found = selection._select_sharded(tensors, k)
    for mask, expected in zip(found, largest_reference(tensors, k), strict=True):
        assert torch.equal(mask, expected)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=80), st.data())
@settings(max_examples=150, deadline=None)
def test_radix_selection_orders_every_float(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(values)))
    for dtype in (torch.float32, torch.float64):
        tensor = torch.tensor(values, dtype=dtype)
        assert torch.equal(selection._select_sharded([tensor], k)[0], largest_reference([tensor], k)[0])


def test_dtypes_are_compared_in_their_common_dtype() -> None:
    # 1 + 2^-10 rounds to 1 in bfloat16, but is compared in float32.
    tensors = [torch.tensor([1.0, 0.5], dtype=torch.bfloat16), torch.tensor([1.0 + 2**-10, 1.0])]
    masks = select_largest(tensors, 2)
    assert [mask.tolist() for mask in masks] == [[True, False], [True, False]]


def _normal(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(n))


STRIDE = selection._LEAST_STRIDE | 1
SHAPES = {
    "normal": _normal,
    "absolute": lambda n: _normal(n).abs(),
    "ascending": lambda n: torch.arange(n).float(),
    "descending": lambda n: -torch.arange(n).float(),
    "all equal": lambda n: torch.full((n,), 3.0),
    "all equal but few": lambda n: torch.zeros(n).index_fill(0, torch.arange(5, n, n // 7), 1.0),
    "all equal but few lower": lambda n: torch.zeros(n).index_fill(0, torch.arange(5, n, n // 7), -1.0),
    "mostly zero": lambda n: _normal(n).abs() * (_normal(n + 1)[:n] > 1.5),
    "half zero": lambda n: _normal(n).abs() * (_normal(n + 1)[:n] > 0),
    "large where the probes look": lambda n: _normal(n) + 100.0 * (torch.arange(n) % STRIDE == 0),
    "small where the probes look": lambda n: _normal(n) - 100.0 * (torch.arange(n) % STRIDE == 0),
    "periodic with the stride": lambda n: (torch.arange(n) % STRIDE).float(),
    "large at the end": lambda n: torch.cat([_normal(n - n // 9), 50 + _normal(n // 9)]),
    "few values": lambda n: (_normal(n) * 2).round(),
    "one infinite": lambda n: _normal(n).index_fill(0, torch.tensor([n // 2]), math.inf),
    "denormal": lambda n: _normal(n) * 1e-42,
}


@pytest.mark.parametrize("shape", SHAPES)
def test_adversarial_inputs_around_the_bracket_limit(shape: str) -> None:
    for n in (selection._SMALL, selection._SMALL + 1, 50_001):
        values = SHAPES[shape](n)
        for k in (1, 2, n // 20, n // 2, n - 1, n):
            assert_selects([values], k)


@pytest.mark.parametrize("shape", ["normal", "mostly zero", "few values", "periodic with the stride"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_hundred_thousand_elements_in_several_tensors(shape: str, dtype: torch.dtype) -> None:
    values = SHAPES[shape](200_003).to(dtype)
    matrix, vector, one, rest = values.split([300 * 400, 77, 1, 200_003 - 300 * 400 - 78])
    tensors = [matrix.view(300, 400), vector, one.view(()), rest]
    for k in (1, 1_000, 10_000, 200_002):
        assert_selects(tensors, k)


def test_a_bracket_leaves_little_to_select_from(monkeypatch: pytest.MonkeyPatch) -> None:
    # Otherwise every case above would also pass by the full selection that a bracket is there to avoid.
    sizes = []

    partitioned = selection._partitioned

    def recorded(flats: list, k: int) -> list:
        sizes.append(sum(flat.size for flat in flats))
        return partitioned(flats, k)

    monkeypatch.setattr(selection, "_partitioned", recorded)
    assert_selects([_normal(200_000).abs()], 10_000)
    assert_selects([SHAPES["mostly zero"](200_000)], 50_000)  # the k-th largest is a zero
    assert sizes == []
    assert_selects([_normal(1000)], 10)  # too small for a bracket to pay
    assert sizes == [1000]


def test_a_bracket_that_misses_is_made_wider_before_everything_is_partitioned(monkeypatch: pytest.MonkeyPatch) -> None:
    # Probes of which more are large than of the others, as where neighbours are alike, and more just below the first.
    values = _normal(1 << 20)
    probes = torch.arange(0, len(values), (len(values) // selection._PROBES) | 1)
    values[probes[:300]], values[probes[300:500]] = 9.0, 2.0
    (flat,), k = [values.numpy()], len(values) // 20
    assert selection._bracketed([flat], k, 3.3) is None
    monkeypatch.setattr(selection, "_partitioned", None)
    assert_selects([values], k)


def test_layout_does_not_matter_only_row_major_order() -> None:
    values = (_normal(130 * 140) * 3).round()
    matrix = values.view(140, 130).t()
    assert not matrix.is_contiguous()
    assert_selects([matrix], 999)


def test_gradients_do_not_follow() -> None:
    values = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not select_largest([values], 1)[0].requires_grad


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_out_of_range_is_an_error(k: int) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and the 4 elements; got {k}"):
        select_largest([torch.zeros(3), torch.zeros(1)], k)


@given(st.integers(0, 200), st.integers(0, 20), st.floats(0, 1), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_true_positions_of_any_slice(length: int, offset: int, density: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(offset + length, generator=generator) < density)[offset:]
    assert true_positions(mask.numpy()).tolist() == [index for index, value in enumerate(mask.tolist()) if value]
