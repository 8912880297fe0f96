from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from lightning_goldy.analysis.coupling import CouplingDrift, CouplingResult, coupling_drift, knowledge_coupling
from tests.references.coupling_models import pieces
from tests.references.models import build

CLASSES = ("edited", "untouched", "edited", "untouched", "rehearsed", "untouched")


def coupled(seed: int, **options) -> CouplingResult:
    return knowledge_coupling(build("gpt2", seed), [pieces([5, 7, 6, 4, 8, 5])], **options)


def without(result: CouplingResult, place: int) -> CouplingResult:
    """The result as it is when a piece failed."""
    matrix, norms = result.matrix.clone(), result.norms.clone()
    matrix[place], matrix[:, place], norms[place] = torch.nan, torch.nan, torch.nan
    return dataclasses.replace(result, matrix=matrix, norms=norms)


@pytest.mark.parametrize("failed", [(), (1,), (1, 4)])
def test_every_number_is_that_of_a_loop_over_pairs(failed: tuple[int, ...]) -> None:
    base, now = coupled(0), coupled(1)
    for number, place in enumerate(failed):
        # One of them failed then, the other now.
        base, now = (without(base, place), now) if number else (base, without(now, place))
    found = coupling_drift(base, now, CLASSES)
    kept = [place for place in range(6) if place not in failed]
    pairs = [(i, j) for i in kept for j in kept if i < j]
    before, after = ([float(each.matrix[i, j]) for i, j in pairs] for each in (base, now))
    sizes = {pair: abs(b - a) for pair, a, b in zip(pairs, before, after, strict=True)}
    assert (found.n_pieces, found.n_pairs) == (len(kept), len(pairs))
    assert found.mean_absolute_difference == pytest.approx(np.mean(list(sizes.values())))
    assert found.mean_difference == pytest.approx(np.mean(after) - np.mean(before))
    assert found.correlation == pytest.approx(np.corrcoef(before, after)[0, 1])
    by_class: dict[frozenset, list[float]] = {}
    for (i, j), size in sizes.items():
        by_class.setdefault(frozenset((CLASSES[i], CLASSES[j])), []).append(size)
    assert {frozenset(name.split("_")): value for name, value in found.by_class.items()} == {
        name: pytest.approx(np.mean(values)) for name, values in by_class.items()
    }
    for place in range(6):
        mine = [size for pair, size in sizes.items() if place in pair]
        expected = pytest.approx(np.mean(mine)) if mine else pytest.approx(math.nan, nan_ok=True)
        assert float(found.piece_drift[place]) == expected


def test_inner_products_are_compared_as_cosines() -> None:
    plain, normal = coupling_drift(coupled(0, normalize=False), coupled(1)), coupling_drift(coupled(0), coupled(1))
    assert plain.mean_absolute_difference == pytest.approx(normal.mean_absolute_difference, rel=1e-5)


def test_without_pairs_there_is_nothing_to_say() -> None:
    result = coupled(0)
    for place in range(1, 6):
        result = without(result, place)
    found = coupling_drift(result, coupled(1), CLASSES)
    assert (found.n_pieces, found.n_pairs, found.by_class) == (1, 0, {})
    assert found.mean_absolute_difference is found.mean_difference is found.correlation is None
    again = CouplingDrift.from_json(found.to_json())
    assert bool(again.piece_drift.isnan().all())


def test_other_pieces_are_refused() -> None:
    result = coupled(0)
    renamed = dataclasses.replace(result, pieces=({**result.pieces[0], "id": "x"}, *result.pieces[1:]))
    with pytest.raises(ValueError, match="of other pieces: '0' and 'x'"):
        coupling_drift(result, renamed)
    with pytest.raises(ValueError, match="of other pieces: 6 and 5 pieces"):
        coupling_drift(result, dataclasses.replace(result, pieces=result.pieces[:5]))
    with pytest.raises(ValueError, match="there are 2 classes for 6 pieces"):
        coupling_drift(result, result, ("edited", "untouched"))
