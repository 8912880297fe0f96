from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from lightning_goldy.analysis.circuits import Circuit, CircuitGraph, circuit_overlap, faithfulness, find_circuits
from lightning_goldy.analysis.circuits.circuit import overlap_of, prune
from lightning_goldy.analysis.circuits.faithfulness import Faithfulness
from lightning_goldy.analysis.circuits.nulls import (
    exchanged_circuits,
    joined_circuits,
    random_circuits,
    shuffled_circuits,
    unmoved,
)
from tests.analysis.circuits.test_scores import prompts
from tests.references.architecture_models import build

GRAPH = CircuitGraph(
    writers=("input", "a0.h0", "m0", "a1.h0", "m1"),
    readers=("a0.h0.q", "a0.h0.k", "a0.h0.v", "m0", "a1.h0.q", "a1.h0.k", "a1.h0.v", "m1", "output"),
    seen=(1, 1, 1, 2, 3, 3, 3, 4, 5),
    owners=((1,), (1,), (1,), (2,), (3,), (3,), (3,), (4,), ()),
    layers=(-1, 0, 0, 1, 1),
)


def circuit(seed: int = 0) -> Circuit:
    scores = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * GRAPH.edges()
    return Circuit(GRAPH, scores, GRAPH.edges() & False, "eap", "kl", "zero", 1.0, 0.0, 4)


def paths(kept: Tensor) -> set[tuple[int, int]]:
    """All edges on a path from the input to the output, by walking every path."""
    found: set[tuple[int, int]] = set()

    def walk(writer: int, trail: tuple[tuple[int, int], ...]) -> None:
        for row in range(len(GRAPH.readers)):
            if kept[row, writer]:
                longer = (*trail, (row, writer))
                if not GRAPH.owners[row]:
                    found.update(longer)
                for owner in GRAPH.owners[row]:
                    walk(owner, longer)

    walk(0, ())
    return found


@pytest.mark.parametrize("seed", range(20))
def test_pruning_leaves_what_lies_on_a_path(seed: int):
    (kept,) = random_circuits(GRAPH, 12, 1, seed)
    assert {tuple(place) for place in prune(GRAPH, kept).nonzero().tolist()} == paths(kept)


@pytest.mark.parametrize("graph", [GRAPH, CircuitGraph.of(build("llama"))])
def test_joined_circuits_are_as_large_and_lie_on_paths_alone(graph: CircuitGraph):
    for n_edges in (1, 3, 8, graph.n_edges // 2, graph.n_edges):
        found = joined_circuits(graph, n_edges, 5, seed=1)
        for kept in found:
            assert torch.equal(prune(graph, kept), kept)
            assert not (kept & ~graph.edges()).any()
            assert n_edges - 2 <= int(kept.sum()) <= n_edges
        again = joined_circuits(graph, n_edges, 5, seed=1)
        assert all(map(torch.equal, found, again))
    assert len({tuple(kept.flatten().tolist()) for kept in joined_circuits(graph, 8, 5)}) > 1
    assert not any(kept.any() for kept in joined_circuits(graph, 0, 2))
    # Of plainly random edges few lie on a path.
    assert sum(int(prune(graph, kept).sum()) for kept in random_circuits(graph, 3, 10)) < 10


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_exchanged_heads_hand_all_their_edges_to_others_of_their_block(family: str):
    graph = CircuitGraph.of(build(family))
    heads = [place for place, name in enumerate(graph.writers) if name.startswith("a")]
    (kept,) = random_circuits(graph, graph.n_edges // 3, 1, seed=1)
    found = exchanged_circuits(graph, kept, 6, seed=1)
    assert all(map(torch.equal, found, exchanged_circuits(graph, kept, 6, seed=1)))
    assert len({tuple(other.flatten().tolist()) for other in found}) > 1
    own = {place: kept[:, place].sum() for place in range(len(graph.writers))}
    for other in found:
        assert not (other & ~graph.edges()).any()
        assert int(other.sum()) == int(kept.sum())
        assert int(prune(graph, other).sum()) == int(prune(graph, kept).sum())
        for layer in range(2):
            block = [place for place in heads if graph.layers[place] == layer]
            assert sorted(int(other[:, place].sum()) for place in block) == sorted(int(own[place]) for place in block)
        for place in set(own) - set(heads):
            assert other[:, place].sum() == own[place]
        assert torch.equal(other[-1][[0, -1]], kept[-1][[0, -1]])
    # No head stays: one whose edge alone is chosen has it no more.
    for place in heads:
        one = torch.zeros_like(kept)
        one[-1, place] = True
        for other in exchanged_circuits(graph, one, 4):
            (column,) = other[-1].nonzero().flatten().tolist()
            assert column != place
            assert graph.layers[column] == graph.layers[place]


def test_heads_of_one_group_change_places_within_it_and_a_single_head_with_none():
    owners = ((1,), (2,), (1, 2), (1, 2), (3,), ())
    readers = ("a0.h0.q", "a0.h1.q", "a0.g0.k", "a0.g0.v", "m0", "output")
    graph = CircuitGraph(("input", "a0.h0", "a0.h1", "m0"), readers, (1, 1, 1, 1, 3, 4), owners, (-1, 0, 0, 0))
    kept = torch.zeros(6, 4, dtype=torch.bool)
    for edge in ("input->a0.h0.q", "input->a0.g0.k", "a0.h0->output", "m0->output"):
        kept[graph.place(edge)] = True
    (other,) = exchanged_circuits(graph, kept, 1)
    told = {graph.name(row, column) for row, column in other.nonzero().tolist()}
    assert told == {"input->a0.h1.q", "input->a0.g0.k", "a0.h1->output", "m0->output"}
    assert exchanged_circuits(GRAPH, random_circuits(GRAPH, 9, 1)[0], 3) == []


def layers_joined(graph: CircuitGraph, kept: Tensor) -> dict[tuple[int, int], int]:
    """How many edges run from each layer to each, counted one by one; the output is a layer of its own."""
    counts: dict[tuple[int, int], int] = {}
    for row, column in kept.nonzero().tolist():
        ends = graph.owners[row]
        to = graph.layers[ends[0]] if ends else 99
        pair = (graph.layers[column], to)
        counts[pair] = counts.get(pair, 0) + 1
    return counts


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_shuffled_edges_keep_how_many_run_between_layers_and_nothing_else(family: str):
    graph = CircuitGraph.of(build(family))
    (kept,) = random_circuits(graph, graph.n_edges // 3, 1, seed=1)
    found = shuffled_circuits(graph, kept, 400, seed=1)
    assert all(map(torch.equal, found[:3], shuffled_circuits(graph, kept, 3, seed=1)))
    assert not torch.equal(found[0], shuffled_circuits(graph, kept, 1, seed=2)[0])
    counts, whole = layers_joined(graph, kept), layers_joined(graph, graph.edges())
    assert all(layers_joined(graph, other) == counts for other in found)
    assert not any((other & ~graph.edges()).any() for other in found)
    # Every edge is drawn as often as any other of its layers.
    often = torch.stack(found).double().mean(0)
    for row, column in graph.edges().nonzero().tolist():
        ends = graph.owners[row]
        pair = (graph.layers[column], graph.layers[ends[0]] if ends else 99)
        share = counts.get(pair, 0) / whole[pair]
        assert abs(float(often[row, column]) - share) <= 5 * math.sqrt(share * (1 - share) / 400)


def test_a_draw_that_is_the_circuit_itself_is_told():
    kept = torch.zeros_like(GRAPH.edges())
    # Each of these is the only edge between its layers.
    for edge in ("input->output", "input->a0.h0.q", "input->a0.h0.k", "input->a0.h0.v", "input->m0"):
        kept[GRAPH.place(edge)] = True
    same = shuffled_circuits(GRAPH, kept, 2)
    other = shuffled_circuits(GRAPH, GRAPH.edges(), 2)
    circuits = [kept, GRAPH.edges(), kept & False]
    none = shuffled_circuits(GRAPH, kept & False, 2)
    assert unmoved(GRAPH, circuits, [same, other, none]).tolist() == [[True, True], [False, False], [False, False]]


def test_edges_are_chosen_by_number_threshold_magnitude_and_sign():
    found = circuit()
    values = sorted((float(value) for value in found.scores[GRAPH.edges()]), key=abs, reverse=True)
    five = found.chosen(n_edges=5)
    assert [score for _, score in five.edges()] == values[:5]
    assert torch.equal(found.chosen(threshold=abs(values[4])).kept, five.kept)
    signed = [score for _, score in found.chosen(n_edges=5, rank="signed").edges()]
    assert sorted(signed) == sorted(sorted(values)[-5:])
    assert found.chosen(n_edges=0).n_edges == 0
    assert found.chosen(n_edges=GRAPH.n_edges).share == 1.0
    assert GRAPH.n_edges == 23
    with pytest.raises(ValueError, match="threshold is a score of at least 0; got -1"):
        found.chosen(threshold=-1)


@pytest.mark.parametrize("seed", range(10))
def test_greedy_circuits_grow_from_the_output_without_dead_ends(seed: int):
    found = circuit(seed).chosen(n_edges=8, select="greedy")
    assert {tuple(place) for place in found.kept.nonzero().tolist()} == paths(found.kept)
    assert found.n_edges <= 8
    # The strongest edge into the output comes first, whenever what writes it is reached.
    one = circuit(seed).chosen(n_edges=GRAPH.n_edges, select="greedy")
    assert torch.equal(one.kept, GRAPH.edges())


def test_dead_ends_change_nothing():
    model, pairs = build("llama").double(), prompts(2)
    found = find_circuits(model, pairs, method="eap", n_edges=1)
    found = replace(found, kept=random_circuits(found.graph, 40, 1)[0])
    pruned = found.pruned()
    assert pruned.n_edges < found.n_edges
    values = [faithfulness(model, one, pairs, n_random=0).value for one in (found, pruned)]
    assert values[0] == pytest.approx(values[1], abs=1e-9)


def test_overlap_against_chance_and_seeds():
    first = circuit(0).chosen(n_edges=8)
    second = circuit(1).chosen(n_edges=8)
    found = circuit_overlap(first, second, seed=first)
    names = {name for name, _ in first.edges()}, {name for name, _ in second.edges()}
    assert set(found.kept) == names[0] & names[1]
    assert set(found.created) == names[1] - names[0]
    assert set(found.removed) == names[0] - names[1]
    assert found.intersection_over_union == len(names[0] & names[1]) / len(names[0] | names[1])
    assert found.noise == found.intersection_over_union
    # Of 8 edges out of 23 the mean overlap of two draws, counted out.
    ways = [math.comb(8, k) * math.comb(15, 8 - k) for k in range(9)]
    mean = sum(way * k / (16 - k) for k, way in enumerate(ways)) / sum(ways)
    many = circuit_overlap(first, second, n_random=3000)
    assert many.by_chance == pytest.approx(mean, abs=0.01)
    same = circuit_overlap(first, first)
    assert (same.intersection_over_union, same.rank_correlation, same.created) == (1.0, pytest.approx(1.0), ())
    assert math.isnan(overlap_of(first.kept & False, first.kept & False))
    empty = replace(first, kept=first.kept & False)
    told = circuit_overlap(empty, empty).headline()
    assert told.startswith("0 edges kept, 0 created, 0 removed: neither circuit has an edge")
    assert "nan" not in told
    with pytest.raises(ValueError, match="of different graphs"):
        circuit_overlap(first, find_circuits(build("gpt2"), prompts(1), method="eap"))


def test_areas_are_those_of_trapezoids():
    random = torch.tensor([[0.0, 0.2], [0.4, 0.8]], dtype=torch.float64)
    curve = Faithfulness((10, 50), 100, (0.5, 1.5), (0.4, 0.1), random, 2.0, 1.0)
    points = [(0, 0), (0.1, 0.5), (0.5, 1.5), (1, 1)]
    assert curve.area == pytest.approx(sum((b - a) * (x + y) / 2 for (a, x), (b, y) in itertools.pairwise(points)))
    away = [(a, abs(1 - x)) for a, x in points]
    assert curve.distance == pytest.approx(sum((b - a) * (x + y) / 2 for (a, x), (b, y) in itertools.pairwise(away)))
    assert curve.random_area == pytest.approx(0.005 + 0.4 * 0.35 + 0.5 * 0.8)
    assert curve.completeness == 0.9
    assert curve.band(1.0) == [(0.0, 0.2), (0.4, 0.8)]


def test_results_go_to_json_and_come_back():
    model, pairs = build("gpt2"), prompts(2)
    found = find_circuits(model, pairs, method="nodes", n_edges=20)
    again = Circuit.from_json(found.to_json())
    assert again.graph == found.graph
    assert torch.equal(again.kept, found.kept)
    assert torch.equal(again.scores, found.scores)
    curve = faithfulness(model, found, pairs, sizes=[0.1, 5], n_random=3)
    assert Faithfulness.from_json(curve.to_json()).metrics() == curve.metrics()
    # By nodes: whatever two kept ends share is kept before an edge of a weaker node.
    weakest = min(abs(score) for _, score in found.edges())
    assert all(abs(value) <= weakest for value in found.scores[~found.kept].tolist())
    assert found.row().result["n_edges_all"] == found.graph.n_edges
