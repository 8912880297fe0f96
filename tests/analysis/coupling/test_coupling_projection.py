"""Random projections keep inner products to what they promise."""

from __future__ import annotations

import math

import pytest
import torch

from lightning_goldy.analysis import knowledge_coupling
from lightning_goldy.analysis.coupling import gram as coupling_projection
from lightning_goldy.analysis.coupling.gram import Projection, Rows
from tests.analysis.coupling.test_coupling_gram import dense, random_rows
from tests.references.coupling_models import pieces
from tests.references.models import build


def sketch_of_one(name, i, j, dimensions, seed, width_in, width_out):
    """Where one element of a weight's gradient goes and with which sign, told from the two hashes."""
    projection = Projection(dimensions, seed=seed)
    out, into = (
        projection._hash(f"{name}\0{side}", width, torch.device("cpu"))
        for side, width in (("out", width_out), ("in", width_in))
    )
    place = (int(out.buckets[i]) + int(into.buckets[j])) % dimensions
    return place, int(out.signs[i]) * int(into.signs[j])


@pytest.mark.parametrize("dimensions", [16, 17])
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_it_is_the_linear_map_that_sends_each_element_to_one_bucket(monkeypatch, dimensions, chunk):
    monkeypatch.setattr(coupling_projection, "_CHUNK", chunk)
    monkeypatch.setattr(coupling_projection, "_BLOCK", 4)
    rows, flat = random_rows(3, 4, 5, 6, dtype=torch.float64), Rows(torch.randn(3, 7, dtype=torch.float64))
    found = Projection(dimensions, seed=3)({"weight": rows, "bias": flat})
    expected = torch.zeros(3, dimensions, dtype=torch.float64)
    gradients = dense(rows).view(3, 6, 5)
    for i in range(6):
        for j in range(5):
            place, sign = sketch_of_one("weight", i, j, dimensions, 3, 5, 6)
            expected[:, place] += sign * gradients[:, i, j]
    reference = Projection(dimensions, seed=3)
    for at in range(7):
        hashed = reference._hash(f"bias\0{at // 4}", 4 if at < 4 else 3, torch.device("cpu"))
        expected[:, hashed.buckets[at % 4]] += hashed.signs[at % 4] * flat.gradients[:, at]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["correlated", "one element", "vectors"])
def test_errors_are_unbiased_and_within_the_bound(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "one element":
        # All weight on shared coordinates is the worst case.
        b, a = torch.zeros(2, 1, 6, dtype=torch.float64), torch.ones(2, 1, 2, dtype=torch.float64)
        b[:, :, :2] = 1
        parts = {"w": Rows(b, a)}
    else:
        parts = {"w": random_rows(2, 3, 8, 8, dtype=torch.float64), "v": random_rows(2, 2, 4, 4, dtype=torch.float64)}
        for rows in parts.values():
            rows.gradients[1] += rows.gradients[0]
        if kind == "vectors":
            parts = {name: Rows(dense(rows)) for name, rows in parts.items()}
    del generator
    whole = torch.cat([dense(rows) for rows in parts.values()], dim=1)
    exact = float(whole[0] @ whole[1])
    scale = float(whole[0].norm() * whole[1].norm())
    errors = []
    for seed in range(3000):
        first, second = Projection(32, seed=seed)(parts)
        errors.append((float(first @ second) - exact) / scale)
    found = torch.tensor(errors)
    bound = Projection(32).error(vectors_only=kind == "vectors")
    assert abs(found.mean()) < 4 * found.std() / math.sqrt(3000)
    assert 0.2 * bound < found.square().mean().sqrt() < bound


def test_cosines_of_a_model_are_near_and_norms_exact():
    model, batch = build("gpt2"), pieces([7, 12, 5, 9, 12, 8])
    for select in ("mlp_output", ["*"]):
        exact = knowledge_coupling(model, [batch], select=select)
        projected = [knowledge_coupling(model, [batch], select=select, projection=512, seed=seed) for seed in range(8)]
        torch.testing.assert_close(projected[0].norms, exact.norms)
        assert projected[0].matrix.diagonal().eq(1).all()
        errors = torch.stack([each.matrix - exact.matrix for each in projected])
        pairs = errors[:, ~torch.eye(6, dtype=torch.bool)]
        assert projected[0].projection_error == pytest.approx(math.sqrt(8 / 512))
        assert 0 < pairs.square().mean().sqrt() < projected[0].projection_error
        assert not torch.equal(projected[0].matrix, projected[1].matrix)
    vectors = knowledge_coupling(model, [batch], select=["*bias"], projection=512)
    assert vectors.projection_error == pytest.approx(math.sqrt(2 / 512))
    assert (vectors.projection, exact.projection_error) == (512, None)


def test_chunks_do_not_matter_to_a_projection():
    model, batch = build("llama").double(), pieces([7, 12, 5, 9])
    one, two = (knowledge_coupling(model, [batch], projection=64, chunk_size=size) for size in (1, 3))
    torch.testing.assert_close(one.matrix, two.matrix, rtol=1e-10, atol=1e-12)


def test_too_few_dimensions():
    with pytest.raises(ValueError, match="at least 2; got 1"):
        Projection(1)
