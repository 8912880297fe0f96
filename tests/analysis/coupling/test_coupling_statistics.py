"""Statistics of coupling matrices against the plain sums that they stand for."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch

from lightning_goldy.analysis import CouplingResult, CouplingStatistics, coupling_statistics

DESCRIPTION = dict.fromkeys(("question", "answer", "category", "group", "hop"))


def result_of(vectors, failed=(), normalize=True, **columns):
    """A result whose gradients are these vectors."""
    vectors = torch.as_tensor(vectors, dtype=torch.float64)
    norms = vectors.norm(dim=1)
    matrix = vectors @ vectors.T
    if normalize:
        matrix = matrix / norms[:, None] / norms
        matrix.fill_diagonal_(1)
    for index in failed:
        matrix[index], matrix[:, index], norms[index] = torch.nan, torch.nan, torch.nan
    pieces = tuple(
        {**DESCRIPTION, "id": f"p{i}", **{name: values[i] for name, values in columns.items()}}
        for i in range(len(vectors))
    )
    return CouplingResult(
        matrix=matrix.float(),
        norms=norms,
        log_probs=torch.zeros(len(vectors)),
        pieces=pieces,
        failed=tuple({"index": i, "id": f"p{i}", "reason": "for the test"} for i in failed),
        parameters=("h.0.mlp.weight",),
        measure="gradient",
        normalize=normalize,
        center=False,
        projection=None,
        projection_error=None,
        seconds=0.0,
    )


def random_vectors(count=12, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) + 0.4


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("failed", [(), (2, 7)])
def test_the_distribution_is_that_of_all_pairs(failed, normalize):
    result = result_of(random_vectors(), failed, normalize)
    found = coupling_statistics(result, high=0.5, moderate=0.2, top=5)
    kept = [i for i in range(12) if i not in failed]
    pairs = {(i, j): float(result.cosines[i, j]) for i, j in itertools.combinations(kept, 2)}
    values = sorted(pairs.values())
    assert (found.n_pieces, found.n_failed, found.n_pairs) == (len(kept), len(failed), len(pairs))
    assert found.mean == pytest.approx(sum(values) / len(values))
    assert found.std == pytest.approx(math.sqrt(sum((v - found.mean) ** 2 for v in values) / len(values)))
    assert (found.minimum, found.maximum) == (values[0], values[-1])
    assert found.high == sum(v >= 0.5 for v in values)
    assert found.moderate == sum(0.2 <= v < 0.5 for v in values)
    assert found.low == sum(v < 0.2 for v in values)
    assert found.negative == sum(v < 0 for v in values)
    assert min(found.high, found.moderate, found.low, found.negative) > 0
    assert found.thresholds == {"moderate": 0.2, "high": 0.5}
    assert sum(found.histogram) == len(values)
    edges = [-1 + 0.05 * k for k in range(41)]
    assert found.histogram[25] == sum(edges[25] <= v < edges[26] for v in values)
    middle = len(values) // 2
    median = values[middle] if len(values) % 2 else (values[middle - 1] + values[middle]) / 2
    assert found.quantiles["0.5"] == pytest.approx(median, abs=1e-6)
    best = sorted(pairs, key=lambda pair: (-pairs[pair], pair))[:5]
    worst = sorted(pairs, key=lambda pair: (pairs[pair], pair))[:5]
    for listed, expected in ((found.top, best), (found.bottom, worst)):
        assert [(each["first"], each["second"]) for each in listed] == expected
        assert [each["cosine"] for each in listed] == [pairs[pair] for pair in expected]
        assert listed[0]["ids"] == tuple(f"p{i}" for i in expected[0])


def test_ties_go_to_the_smaller_numbers():
    found = coupling_statistics(result_of(torch.ones(6, 2)), top=4)
    assert [(each["first"], each["second"]) for each in found.top] == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert coupling_statistics(result_of(torch.ones(6, 2)), top=0).top == ()


def test_contrasts_are_differences_of_means():
    answers = ["Lima", "lima ", "Paris", None, "Paris", "Rome", "Rome", "Oslo", "Bern", "Kiev", "Riga", "Lima"]
    categories = ["capital"] * 5 + ["river"] * 7
    groups = ["a", "a", "b", "b", None, None, "c", "c", "c", "d", "e", "f"]
    result = result_of(random_vectors(), (10,), answer=answers, category=categories, group=groups)
    found = coupling_statistics(result).contrasts
    folded = [answer and answer.strip().casefold() for answer in answers]
    for name, labels in (("answer", folded), ("category", categories), ("group", groups)):
        same, different = [], []
        for i, j in itertools.combinations([i for i in range(12) if i != 10], 2):
            if labels[i] is not None and labels[j] is not None:
                (same if labels[i] == labels[j] else different).append(float(result.matrix[i, j]))
        means = [sum(values) / len(values) for values in (same, different)]
        assert (found[name]["n_same"], found[name]["n_different"]) == (len(same), len(different))
        assert [found[name]["same"], found[name]["different"]] == pytest.approx(means)
        assert found[name]["difference"] == pytest.approx(means[0] - means[1])
        scatter = sum((v - mean) ** 2 for values, mean in zip((same, different), means, strict=True) for v in values)
        pooled = math.sqrt(scatter / (len(same) + len(different) - 2))
        assert found[name]["effect_size"] == pytest.approx((means[0] - means[1]) / pooled)


def test_a_contrast_without_one_side_says_so():
    found = coupling_statistics(result_of(random_vectors(3), category=["x"] * 3, answer=["a", None, None])).contrasts
    assert set(found) == {"category"}
    assert found["category"]["different"] is None
    assert found["category"]["difference"] is found["category"]["effect_size"] is None


def test_hops_of_one_question_are_paired_by_number():
    groups = ["q", "q", "q", "r", "r", None, "s"]
    hops = [1, 2, 3, 2, 1, 1, None]
    result = result_of(random_vectors(7), group=groups, hop=hops)
    found = {each["hops"]: (each["mean"], each["n_pairs"]) for each in coupling_statistics(result).hops}
    matrix = result.matrix.double()
    assert set(found) == {(1, 2), (1, 3), (2, 3)}
    assert found[1, 2] == (pytest.approx(float(matrix[0, 1] + matrix[3, 4]) / 2), 2)
    assert found[1, 3] == (pytest.approx(float(matrix[0, 2])), 1)


def test_alike_pieces_are_neighbours_and_make_a_cluster():
    generator = torch.Generator().manual_seed(1)
    centres = torch.eye(3).repeat(4, 1)  # pieces 0, 3, 6, 9 are alike, and so on
    result = result_of(centres + 0.1 * torch.randn(12, 3, generator=generator), failed=(4,))
    found = coupling_statistics(result)
    assert found.n_clusters == 3
    assert sorted(found.order) == [i for i in range(12) if i != 4]
    members = {}
    for piece, cluster in zip(found.order, found.clusters, strict=True):
        members.setdefault(cluster, set()).add(piece % 3)
    assert sorted(map(tuple, members.values())) == [(0,), (1,), (2,)]
    assert list(dict.fromkeys(found.clusters)) == [0, 1, 2]
    assert coupling_statistics(result, cluster_at=-0.9).n_clusters == 1
    assert coupling_statistics(result, cluster_at=1.0).n_clusters == 11


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_effective_rank_counts_orthogonal_directions(rank):
    directions = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    found = coupling_statistics(result_of(directions[:rank].repeat(4, 1)))
    assert found.effective_rank == pytest.approx(rank, rel=1e-4)
    assert found.participation_ratio == pytest.approx(rank, rel=1e-4)
    cheap = coupling_statistics(result_of(directions[:rank].repeat(4, 1)), spectrum_below=2)
    assert cheap.effective_rank is None
    assert cheap.participation_ratio == found.participation_ratio


def test_few_pieces_have_no_statistics_but_no_errors():
    for count, failed in ((1, ()), (2, (0, 1)), (2, (0,))):
        found = coupling_statistics(result_of(random_vectors(count), failed))
        assert (found.n_pairs, found.mean, found.quantiles, found.top) == (0, None, {}, ())
        assert found.n_pieces == len(found.order) == len(found.clusters)
        assert "mean" not in found.metrics()


def test_scalars_and_json():
    found = coupling_statistics(result_of(random_vectors(), category=["x", "y"] * 6))
    scalars = found.metrics()
    assert scalars["category/difference"] == found.contrasts["category"]["difference"]
    assert scalars["high_share"] == found.high / found.n_pairs
    assert all(isinstance(value, float) for value in scalars.values())
    back = CouplingStatistics.from_json(found.to_json())
    assert back == found


def test_arguments_and_a_missing_library(monkeypatch):
    result = result_of(random_vectors(3))
    for options in ({"high": 0.1, "moderate": 0.4}, {"high": 1.5}, {"moderate": -2}):
        with pytest.raises(ValueError, match="thresholds must be in order"):
            coupling_statistics(result, **options)
    with pytest.raises(ValueError, match="at least 0; got -1"):
        coupling_statistics(result, top=-1)
    monkeypatch.setitem(sys.modules, "scipy.cluster.hierarchy", None)
    with pytest.raises(ImportError, match="pip install scipy"):
        coupling_statistics(result)
