"""Circuits that mean nothing, of a circuit's size: what it has to beat."""

from __future__ import annotations

import math
import random
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_goldy.analysis.circuits.graph import INPUT, CircuitGraph, readers_of

NullName = Literal["random", "joined", "exchanged", "shuffled"]

NULLS: dict[NullName, tuple[str, str]] = {
    "random": ("random ones", "a random circuit"),
    "joined": ("joined from end to end", "a random circuit joined from end to end"),
    "exchanged": ("heads exchanged", "the circuit with its heads exchanged"),
    "shuffled": ("edges shuffled within layers", "the circuit with its edges shuffled within layers"),
}
"""What each is called in a list, and in a sentence."""


def null_circuits(graph: CircuitGraph, kept: Tensor, n_random: int, seed: int) -> list[list[Tensor]]:
    """Edges of circuits of each kind of :data:`NULLS`, in that order, as large as a circuit."""
    n_edges = int(kept.sum())
    drawn = [make(graph, n_edges, n_random, seed) for make in (random_circuits, joined_circuits)]
    return [*drawn, *(make(graph, kept, n_random, seed) for make in (exchanged_circuits, shuffled_circuits))]


def unmoved(graph: CircuitGraph, circuits: Sequence[Tensor], drawn: Sequence[Sequence[Tensor]]) -> Tensor:
    """Where a draw is the circuit itself, shape ``[sizes, draws]``: one of no heads has none to exchange.

    Args:
        graph: The graph.
        circuits: By size, each of shape ``[readers, writers]``; of none and of all edges no draw can be another.
        drawn: By size what was drawn from it.
    """
    rows = [
        [0 < int(kept.sum()) < graph.n_edges and torch.equal(kept, other) for other in draws]
        for kept, draws in zip(circuits, drawn, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.bool)


def null_shares(
    kept: Sequence[Tensor],
    graph: CircuitGraph,
    circuits: Sequence[Tensor],
    beside: Sequence[Sequence[Sequence[Tensor]]],
) -> dict[str, Any]:
    """What circuits beside others keep, by kind; NaN of an exchanged or a shuffled one that is the circuit itself.

    Args:
        kept: By kind, of shape ``[sizes, draws]``.
        graph: The graph.
        circuits: Those that they stand beside, by size.
        beside: By size and kind.
    """
    named = {name: part.clone() for name, part in zip((*NULLS, "others", "choices"), kept, strict=True)}
    for kind, name in enumerate(NULLS):
        if name in ("exchanged", "shuffled"):
            same = unmoved(graph, circuits, [kinds[kind] for kinds in beside])
            named[name].masked_fill_(same, math.nan)
    return named


def random_circuits(graph: CircuitGraph, n_edges: int, count: int, seed: int = 0) -> list[Tensor]:
    """Circuits of edges drawn at random, each of shape ``[readers, writers]``; the seed alone decides which.

    Example:
        >>> graph = CircuitGraph(("input", "m0"), ("m0", "output"), (1, 2), ((1,), ()), (-1, 0))
        >>> [int(kept.sum()) for kept in random_circuits(graph, 2, 3)]
        [2, 2, 2]
    """
    edges = graph.edges()
    places = edges.flatten().nonzero().flatten()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        kept = torch.zeros(edges.numel(), dtype=torch.bool)
        kept[places[torch.randperm(len(places), generator=generator)[:n_edges]]] = True
        found.append(kept.view_as(edges))
    return found


def joined_circuits(graph: CircuitGraph, n_edges: int, count: int, seed: int = 0) -> list[Tensor]:
    """Random circuits every edge of which lies on a path from ``input`` to ``output``; the seed alone decides which.

    Edges come in random order, each with a random way back to what the input reaches and one on to what reaches the
    output, where these fit into the number that is left. One or two edges fewer where nothing does.

    Example:
        >>> graph = CircuitGraph(("input", "m0"), ("m0", "output"), (1, 2), ((1,), ()), (-1, 0))
        >>> [kept.int().tolist() for kept in joined_circuits(graph, 1, 2)]
        [[[0, 0], [1, 0]], [[0, 0], [1, 0]]]
    """
    draw = random.Random(seed)
    return [_joined(graph, n_edges, draw) for _ in range(count)]


def _joined(graph: CircuitGraph, n_edges: int, draw: random.Random) -> Tensor:
    readers, kept = readers_of(graph), set[tuple[int, int]]()
    reached, leads = [name == INPUT for name in graph.writers], [False] * len(graph.writers)
    order = [(row, column) for row, seen in enumerate(graph.seen) for column in range(seen)]
    draw.shuffle(order)
    grown = True
    while grown and len(kept) < n_edges:
        grown = False
        for edge in order:
            if edge in kept:
                continue
            way = {edge}
            row, column = edge
            while not reached[column]:
                above = draw.choice(readers[column])
                column = draw.randrange(graph.seen[above])
                way.add((above, column))
            while graph.owners[row] and not leads[place := draw.choice(graph.owners[row])]:
                row = draw.randrange(bisect_right(graph.seen, place), len(graph.readers))
                way.add((row, place))
            if len(kept) + len(way - kept) > n_edges:
                continue
            grown = True
            kept |= way
            for row, column in way:
                leads[column] = True
                for place in graph.owners[row]:
                    reached[place] = True
            if len(kept) == n_edges:
                break
    found = torch.zeros(len(graph.readers), len(graph.writers), dtype=torch.bool)
    for row, column in kept:
        found[row, column] = True
    return found


def exchanged_circuits(graph: CircuitGraph, kept: Tensor, count: int, seed: int = 0) -> list[Tensor]:
    """A circuit with the heads of every block exchanged at random, so that each head's edges are another head's.

    Nothing else moves: as many edges run between any two blocks and kinds of inputs, every node hands its number of
    edges on, and what lay on a path lies on one. Heads that share keys and values go together to the place of another
    such group, or change places within the only one. A block of one head keeps it; where no block has two, there is
    no such circuit, and none is returned.

    Args:
        graph: The graph.
        kept: The circuit, shape ``[readers, writers]``.
        count: How many.
        seed: It alone decides which.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16))
        >>> graph = CircuitGraph.of(model)
        >>> kept = torch.zeros_like(graph.edges())
        >>> for edge in ("input->a0.h0.v", "a0.h0->m0", "m0->output"):
        ...     kept[graph.place(edge)] = True
        >>> [graph.name(*edge) for edge in exchanged_circuits(graph, kept, 1)[0].nonzero().tolist()]
        ['input->a0.h1.v', 'a0.h1->m0', 'm0->output']
    """
    groups = _groups_of(graph)
    if all(len(held) == 1 and len(held[0]) == 1 for held in groups):
        return []
    rows = {_role(graph, row, places): row for row, places in enumerate(graph.owners)}
    draw, found = random.Random(seed), []
    for _ in range(count):
        moved = list(range(len(graph.writers)))
        for held in groups:
            alone = len(held) == 1
            places: list[tuple[int, ...]] = [(head,) for head in held[0]] if alone else held
            for group, other in zip(places, _elsewhere(places, draw), strict=True):
                for head, new in zip(group, draw.sample(other, len(other)), strict=True):
                    moved[head] = new
        to = [rows[_role(graph, row, [moved[place] for place in held])] for row, held in enumerate(graph.owners)]
        changed = torch.zeros_like(kept)
        changed[torch.tensor(to)[:, None], torch.tensor(moved)[None]] = kept
        found.append(changed)
    return found


def shuffled_circuits(graph: CircuitGraph, kept: Tensor, count: int, seed: int = 0) -> list[Tensor]:
    """A circuit whose edges are drawn anew among those that run between the same two layers.

    As many edges run from each layer to each later one (and within it), so that what the depth of a circuit is worth
    stays; which heads and MLPs they join, through which of their inputs, is chance.

    Args:
        graph: The graph.
        kept: The circuit, shape ``[readers, writers]``.
        count: How many.
        seed: It alone decides which.

    Example:
        >>> graph = CircuitGraph(("input", "m0"), ("m0", "output"), (1, 2), ((1,), ()), (-1, 0))
        >>> kept = torch.tensor([[True, False], [False, True]])
        >>> torch.equal(shuffled_circuits(graph, kept, 1)[0], kept)
        True
    """
    last = max(graph.layers) + 1
    to = torch.tensor([graph.layers[places[0]] if places else last for places in graph.owners])
    # Layers count from -1, that of the input.
    pair = (to[:, None] * (last + 2) + torch.tensor(graph.layers)[None] + 1).flatten()
    edges, flat = graph.edges().flatten(), kept.flatten()
    places = [((pair == one) & edges).nonzero().flatten() for one in pair[flat].unique()]
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        changed = torch.zeros_like(flat)
        for among in places:
            order = torch.randperm(len(among), generator=generator)
            changed[among[order[: int(flat[among].sum())]]] = True
        found.append(changed.view_as(kept))
    return found


def _groups_of(graph: CircuitGraph) -> list[list[tuple[int, ...]]]:
    """By block the places of heads that share their keys, group by group."""
    blocks: dict[int, list[tuple[int, ...]]] = {}
    for name, places in zip(graph.readers, graph.owners, strict=True):
        if name.endswith(".k"):
            blocks.setdefault(graph.layers[places[0]], []).append(places)
    return list(blocks.values())


def _role(graph: CircuitGraph, row: int, places: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    """What tells a reader from all others: its kind of input, and whose it is."""
    return graph.readers[row].rpartition(".")[2], tuple(sorted(places))


def _elsewhere(places: list[tuple[int, ...]], draw: random.Random) -> list[tuple[int, ...]]:
    """The places in a random order in which none is where it was; one alone stays."""
    while True:
        drawn = draw.sample(places, len(places))
        if len(places) == 1 or all(new != old for new, old in zip(drawn, places, strict=True)):
            return drawn
