"""Products of rows, and the gathering of rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_goldy.analysis.coupling import gram as coupling_gram
from lightning_goldy.analysis.coupling.gram import RowBuffer, Rows, inner_products, squared_norms, without_empty_rows

SIZES = st.integers(1, 6)


def random_rows(m, r, width_in, width_out, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    b, a = (torch.randn(m, r, width, generator=generator, dtype=torch.float64) for width in (width_out, width_in))
    return Rows(b.to(dtype), a.to(dtype))


def dense(rows):
    """Whole gradients, float64."""
    if rows.inputs is None:
        return rows.gradients.double()
    return torch.einsum("mro,mri->moi", rows.gradients.double(), rows.inputs.double()).flatten(1)


@given(m=SIZES, n=SIZES, r=SIZES, s=SIZES, width_in=SIZES, width_out=SIZES, tile=SIZES, piece=SIZES)
def test_both_routes_equal_the_gradients_whatever_the_tiles(m, n, r, s, width_in, width_out, tile, piece):
    first = random_rows(m, r, width_in, width_out, dtype=torch.float64)
    second = random_rows(n, s, width_in, width_out, seed=1, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coupling_gram, "_TILE_ROWS_CPU", tile)
        patch.setattr(coupling_gram, "_SLICE", piece)
        for route in (coupling_gram._by_rows, coupling_gram._by_gradients):
            torch.testing.assert_close(route(first, second), dense(first) @ dense(second).T)
            torch.testing.assert_close(route(first, first), dense(first) @ dense(first).T)
        flat = Rows(dense(first)), Rows(dense(second))
        torch.testing.assert_close(inner_products(*flat), dense(first) @ dense(second).T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_products_and_norms_are_accurate(dtype):
    rows = random_rows(5, 3, 40, 30, dtype=dtype)
    expected = dense(rows) @ dense(rows).T
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6
    found = inner_products(rows)
    assert found.dtype == torch.float64
    assert float((found - expected).abs().max() / expected.max()) < tolerance
    assert torch.equal(found, found.T)
    torch.testing.assert_close(squared_norms(rows), expected.diagonal(), rtol=tolerance, atol=0.0)
    flat = Rows(dense(rows).to(dtype))
    torch.testing.assert_close(squared_norms(flat), dense(flat).square().sum(dim=1), rtol=tolerance, atol=0.0)


def test_a_long_flat_gradient_does_not_lose_digits():
    # One product over a million elements of one sign would be off by more.
    values = torch.rand(2, 1 << 20, generator=torch.Generator().manual_seed(0)) + 1
    exact = values.double() @ values.double().T
    assert float((inner_products(Rows(values)) / exact - 1).abs().max()) < 2e-6


def test_the_cheaper_route_is_taken():
    few, many = random_rows(4, 2, 64, 64), random_rows(64, 40, 16, 16)
    assert coupling_gram._rows_are_cheaper(few, few)
    assert coupling_gram._rows_are_cheaper(few, few)
    assert not coupling_gram._rows_are_cheaper(many, many)
    assert not coupling_gram._rows_are_cheaper(many, many)


def test_rows_without_gradient_drop_out_and_nothing_else():
    rows = random_rows(4, 6, 3, 2)
    empty = torch.tensor([[0, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [0, 1, 0, 1, 1, 1]]).bool()
    gradients, inputs = rows.gradients.masked_fill(empty[:, :, None], 0), rows.inputs.clone()
    inputs[0, 1] = torch.nan  # what padding holds does not count
    found = without_empty_rows(inputs, gradients)
    assert found.gradients.shape == (4, 5, 2)
    torch.testing.assert_close(dense(found), dense(Rows(gradients, rows.inputs)))
    nothing = without_empty_rows(rows.inputs, torch.zeros(4, 6, 2))
    assert nothing.gradients.shape == (4, 0, 2)
    assert inner_products(nothing, rows).eq(0).all()
    assert squared_norms(nothing).eq(0).all()
    assert without_empty_rows(rows.inputs, rows.gradients).inputs is rows.inputs


@pytest.mark.parametrize("counts", [[3, 5, 1], [5, 3], [0, 4]])
def test_a_buffer_holds_rows_of_several_lengths(counts):
    parts = [random_rows(2, count, 3, 4, seed=count) for count in counts]
    buffer = RowBuffer(10, torch.device("cpu"))
    for part in parts:
        buffer.add(part)
    torch.testing.assert_close(dense(buffer.rows()), torch.cat([dense(part) for part in parts]))
    flat = RowBuffer(10, torch.device("cpu"))
    for part in parts:
        flat.add(Rows(dense(part)))
    assert torch.equal(flat.rows().gradients, torch.cat([dense(part) for part in parts]))
    assert flat.rows().inputs is None
