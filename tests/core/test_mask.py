"""ParameterMask against Python sets, closed forms, and files that are not what they should be."""

from __future__ import annotations

import math
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_goldy import ParameterMask, ParameterSpace, ParameterVector
from lightning_goldy.core import SpaceError, StoreError, save_vectors
from lightning_goldy.core.store import pack_mask, unpack_mask
from tests.references.mask import elements, universe
from tests.references.models import build

SPACE = ParameterSpace(
    ("h.0.weight", "h.0.bias", "h.1.weight", "wte.weight"),
    (torch.Size((3, 4)), torch.Size((4,)), torch.Size((2, 1, 5)), torch.Size(())),
    (torch.float32, torch.bfloat16, torch.float16, torch.float64),
)


@st.composite
def masks(draw, space=SPACE):
    density = draw(st.sampled_from([0.0, 0.02, 0.3, 0.9, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    drawn = {
        name: torch.rand(shape, generator=generator) < density
        for name, shape in zip(space.names, space.shapes, strict=True)
    }
    return ParameterMask(space, drawn)


@given(masks(), masks())
@settings(deadline=None)
def test_operations_are_those_of_sets(first, second):
    a, b, everything = elements(first), elements(second), universe(first)
    for found, expected in (
        (first & second, a & b),
        (first | second, a | b),
        (first ^ second, a ^ b),
        (first - second, a - b),
        (~first, everything - a),
    ):
        assert isinstance(found, ParameterMask)
        assert elements(found) == expected
    assert first.total == len(a)
    assert first.density == len(a) / len(everything)
    assert first.iou(second) == (len(a & b) / len(a | b) if a | b else 1.0)


@given(masks(), masks())
@settings(deadline=None)
def test_chance_corrected_overlap_by_counting(first, second):
    a, b = elements(first), elements(second)
    expected = most = 0.0
    for name in first:
        mine, theirs = sum(n == name for n, _ in a), sum(n == name for n, _ in b)
        expected += mine * theirs / math.prod(SPACE.shape(name))
        most += min(mine, theirs)
    assert first.chance_overlap(second) == pytest.approx(expected, rel=1e-12)
    found = first.chance_corrected_overlap(second)
    if most - expected < 1e-6:
        assert found is None
    else:
        assert found == pytest.approx((len(a & b) - expected) / (most - expected), rel=1e-9, abs=1e-12)
    for scope in ("tensor", "global"):
        value = first.chance_corrected_overlap(second, scope=scope)
        assert value == second.chance_corrected_overlap(first, scope=scope)
        if value is not None and a <= b and scope == "global":
            assert value == pytest.approx(1.0)


def test_random_masks_overlap_by_chance():
    space = ParameterSpace.of(nn.Linear(400, 400, bias=False))
    first, second = (ParameterMask.random(space, 5, seed=seed) for seed in (0, 1))
    # The intersection is hypergeometric: mean 400, standard deviation below 19.5 of 160,000 elements.
    assert (first & second).total == pytest.approx(first.chance_overlap(second), abs=4 * 19.5)
    assert first.chance_overlap(second) == 400
    assert abs(first.chance_corrected_overlap(second)) < 4 * 19.5 / 7600
    assert first.chance_corrected_overlap(first) == 1.0


def test_global_chance_counts_a_shared_preference_for_tensors():
    space = ParameterSpace(("a", "b"), (torch.Size((100,)),) * 2, (torch.float32,) * 2)
    first, second = (ParameterMask.random(space, {"a": 50, "b": 0}, seed=seed) for seed in (0, 1))
    assert first.chance_overlap(second) == 25
    assert first.chance_overlap(second, scope="global") == 12.5


def test_blocks_are_counted_in_order():
    mask = ParameterMask.from_indices(SPACE, {"h.0.weight": torch.tensor([0, 5]), "h.0.bias": torch.tensor([3])})
    found = [(each.block, each.count, each.numel, each.density) for each in mask.block_summary()]
    assert found == [("h.0", 3, 16, 3 / 16), ("h.1", 0, 10, 0.0), ("embeddings", 0, 1, 0.0)]


@given(masks())
@settings(deadline=None)
def test_indices_dense_and_sparse_give_the_mask_back(mask):
    for back in (
        ParameterMask.from_indices(SPACE, mask.indices()),
        ParameterMask.from_dense(SPACE, mask.to_dense()),
        ParameterMask.from_dense(SPACE, mask.to_sparse_coo()),
    ):
        assert all(torch.equal(back[name], mask[name]) for name in mask)
    for name, sparse in mask.to_sparse_coo().items():
        assert sparse.layout == torch.sparse_coo
        assert sparse.is_coalesced()
        assert sparse._nnz() == int(mask[name].count_nonzero())
    assert all(index.tolist() == sorted(index.tolist()) for index in mask.indices().values())


@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    density=st.sampled_from([0.0, 0.001, 0.02, 1 / 32, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 99),
)
@settings(deadline=None)
def test_packing_gives_every_shape_and_density_back(shape, density, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    packed, encoding = pack_mask(mask)
    assert torch.equal(unpack_mask(packed, mask.shape, encoding), mask)
    count, numel = int(mask.count_nonzero()), mask.numel()
    assert packed.nbytes == (4 * count if count * 32 < numel else (numel + 7) // 8)


@given(mask=masks())
@settings(deadline=None, max_examples=20)
def test_files_give_the_mask_back(tmp_path_factory, mask):
    path = mask.save(tmp_path_factory.mktemp("mask") / "m.safetensors", model="Tiny", step=3)
    found = ParameterMask.load(path)
    assert found.space == mask.space
    assert all(torch.equal(found[name], mask[name]) for name in mask)


def test_a_mask_of_one_percent_takes_45_bytes_per_thousand_elements(tmp_path):
    space = ParameterSpace.of(nn.Linear(2000, 1000, bias=False))
    path = ParameterMask.random(space, 1).save(tmp_path / "mask.safetensors", model="Linear")
    # 45 MB at 1 B parameters.
    assert path.stat().st_size <= 0.045 * space.numel


@pytest.mark.parametrize(("counts", "expected"), [({"weight": 5, "bias": 0}, [5, 0]), (30, [30, 3]), (0.1, [1, 1])])
def test_random_draws_exactly_as_many(counts, expected):
    space = ParameterSpace.of(nn.Linear(10, 10))
    mask = ParameterMask.random(space, counts, seed=4)
    assert mask.count() == expected
    again, other = (ParameterMask.random(space, counts, seed=seed) for seed in (4, 5))
    assert torch.equal(again["weight"], mask["weight"])
    assert not torch.equal(other["weight"], mask["weight"])


def test_a_mask_restricts_a_direction():
    mask = ParameterMask.from_indices(SPACE, {"h.0.bias": torch.tensor([1])})
    direction = ParameterVector(SPACE, {name: torch.full(SPACE.shape(name), 2.0) for name in SPACE})
    assert (direction * mask)["h.0.bias"].tolist() == [0, 2, 0, 0]
    assert (direction * mask).norm() == 2


OTHER = ParameterSpace(("h.0.weight",), (torch.Size((3, 4)),), (torch.float32,))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda m: ParameterMask(OTHER, {"h.0.weight": torch.ones(3, 4)}), ValueError, "h.0.weight: a mask is boolean"),
        (lambda m: m & ParameterMask.from_indices(OTHER, {}), SpaceError, "spaces differ.*only one.*'h.0.bias'"),
        (lambda m: m.chance_overlap(ParameterMask.from_indices(OTHER, {})), SpaceError, "spaces differ"),
        (lambda m: m.chance_corrected_overlap(m, scope="block"), ValueError, "unknown scope 'block'.*tensor, global"),
        (
            lambda m: ParameterMask.from_indices(OTHER, {"h.0.weight": torch.tensor([12])}),
            ValueError,
            "index 12 lies out",
        ),
        (
            lambda m: ParameterMask.from_indices(OTHER, {"h.0.weight": torch.tensor([-1])}),
            ValueError,
            "index -1 lies out",
        ),
        (lambda m: ParameterMask.from_indices(OTHER, {"h.0.weight": torch.tensor([0.5])}), ValueError, "are integers"),
        (
            lambda m: ParameterMask.from_indices(OTHER, {"h.0.weigh": torch.tensor([0])}),
            SpaceError,
            "mean 'h.0.weight'",
        ),
        (lambda m: ParameterMask.from_dense(OTHER, {"h.0.weight": torch.ones(3)}), ValueError, "is boolean"),
        (lambda m: ParameterMask.from_dense(OTHER, {"h.0.weight": torch.ones(3).bool()}), SpaceError, r"\(3,\)"),
        (lambda m: ParameterMask.random(OTHER, {"h.0.weight": 13}), ValueError, "between 0 and the 12.*got 13"),
        (lambda m: ParameterMask.random(OTHER, 0), ValueError, r"\(0, 100\]"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make(ParameterMask.from_indices(SPACE, {}))


def _truncated(path, mask):
    path.write_bytes(path.read_bytes()[:-3])


def _pickled(path, mask):
    path.write_bytes(pickle.dumps({"weight": [True]}))


def _values(path, mask):
    save_vectors(
        path, ParameterVector(SPACE, {n: torch.zeros(SPACE.shape(n)) for n in SPACE}), kind="values", model="T"
    )


def _another_header(path, mask):
    data = path.read_bytes()
    # As long as before, so that the file's own table of contents still holds.
    assert data.count(b"[3, 4]") == 1
    path.write_bytes(data.replace(b"[3, 4]", b"[3, 9]"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path, mask: path.unlink(), "no such file"),
        (_truncated, "not a whole safetensors file"),
        (_pickled, "pickled files are never read"),
        (_values, "holds values, not a mask"),
        (_another_header, "h.0.weight.*cannot hold 27 bits"),
        (lambda path, mask: mask.save(path, model="Other"), "written for Other, the model is GPT2LMHeadModel"),
        (lambda path, mask: mask.save(path, model="GPT2LMHeadModel"), "has no parameter 'h.0.weight'"),
    ],
    ids=["missing", "truncated", "pickle", "values", "wrong shape", "other model", "other names"],
)
def test_a_malformed_file_says_what_is_wrong(tmp_path, spoil, message):
    path = tmp_path / "mask.safetensors"
    mask = ParameterMask.from_indices(SPACE, {"h.0.weight": torch.arange(9)})
    mask.save(path, model="Tiny")
    spoil(path, mask)
    module = build("gpt2") if re.search("GPT2|has no parameter", message) else None
    with pytest.raises(StoreError, match=message) as error:
        ParameterMask.load(path, module)
    assert str(path) in str(error.value)
