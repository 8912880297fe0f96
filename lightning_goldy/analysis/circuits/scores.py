"""Scores of edges: what a metric loses when an edge is patched, measured edge by edge or estimated by gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_goldy.analysis.circuits.graph import Wiring
from lightning_goldy.analysis.circuits.runs import (
    Batch,
    CircuitOptions,
    Gradients,
    Progress,
    Recorded,
    batch_size_of,
    batches,
    measure,
    record,
    shared_places,
)
from lightning_goldy.analysis.result import Cost, total_cost
from lightning_goldy.core.pieces import PromptPairs
from lightning_goldy.core.sharding import Replicas

Method = Literal["eap", "eap_ig_inputs", "eap_ig_activations", "nodes", "exact"]


def grouped_scores(
    wiring: Wiring,
    pairs: PromptPairs,
    options: CircuitOptions,
    *,
    method: Method = "eap_ig_inputs",
    steps: int = 5,
    n_groups: int = 0,
    progress: Progress | None = None,
    replicas: Replicas = Replicas(),  # noqa: B008 - frozen
) -> tuple[Tensor, Tensor, Cost]:
    """Scores of all edges by all pairs, and by all but each of so many groups of them.

    They are means over the pairs; see :func:`~lightning_goldy.analysis.circuits.find_circuits`.

    Returns:
        Shapes ``[readers, writers]`` and ``[groups, readers, writers]``, float64, 0 where there is no edge, and the
        passes, all three of all replicas.

    Raises:
        ValueError: A score is not finite; the edge is named.
    """
    # A batch goes into one group, so there are at least as many batches.
    size = min(options.batch_size, len(pairs) // n_groups) if n_groups else options.batch_size
    options = replace(options, batch_size=size)
    if method == "exact":
        lost, cost = _exact(wiring, pairs, options, progress, replicas)
        group = torch.arange(len(pairs)) % max(1, n_groups)
        sums = torch.stack([lost[:, group == place].sum(1) for place in range(max(1, n_groups))])
        totals = torch.zeros(len(sums), len(wiring.graph.readers), len(wiring.graph.writers), dtype=torch.float64)
        totals[:, wiring.graph.edges()] = sums
    else:
        totals, cost = _estimated(wiring, pairs, options, method, steps, max(1, n_groups), progress, replicas)
    total = totals.sum(0)
    found = [total / len(pairs), *((total - part) / len(pairs) for part in totals[:n_groups])]
    if method == "nodes":
        found = [by_nodes(wiring.graph.owners, scores) for scores in found]
    left_out = torch.stack(found[1:]) if n_groups else torch.empty(0, 0, 0, dtype=torch.float64)
    return found[0], left_out, cost


def _estimated(
    wiring: Wiring,
    pairs: PromptPairs,
    options: CircuitOptions,
    method: Method,
    steps: int,
    n_groups: int,
    progress: Progress | None,
    replicas: Replicas,
) -> tuple[Tensor, Cost]:
    """Sums of the scores by gradients over the pairs of each group, shape ``[groups, readers, writers]``."""
    totals = torch.zeros(n_groups, len(wiring.graph.readers), len(wiring.graph.writers), dtype=torch.float64)
    done: list[Cost] = []
    estimate = _eap_ig_activations if method == "eap_ig_activations" else _eap_ig_inputs
    finished, mine = 0, sum(map(len, shared_places(pairs, options, replicas)))
    every = shared_places(pairs, replace(options, batch_size=batch_size_of(pairs, options, replicas)), Replicas())
    group = {places[0]: number % n_groups for number, places in enumerate(every)}
    for batch in batches(wiring, pairs, options, done, replicas):
        size = len(batch.places)
        total = totals[group[batch.places[0]]]
        if method in ("eap", "nodes"):
            total += _eap(wiring, batch, options).cpu()
            done.append(Cost(size, size))
        else:
            found, passes = estimate(wiring, batch, options, steps)
            total += found.cpu()
            done.append(Cost(size * (passes + 1), size * passes))
        finished += size
        if progress is not None:
            progress(finished, mine)
    sums = torch.stack(replicas.gather_objects(totals)).sum(0)
    broken = (~sums.sum(0).isfinite()).nonzero().tolist()
    if broken:
        raise ValueError(
            f"the score of {wiring.graph.name(*broken[0])} is not finite: {options.metric_name} has no finite gradient"
        )
    return sums, total_cost(replicas, sum(done, Cost()))


def node_scores(scores: Tensor) -> Tensor:
    r"""Score of every writer, shape ``[writers]``: what patching all that it tells is estimated to lose.

    .. math:: s_u = \sum_v s_{uv}

    which is attribution patching of the node where edges are scored by gradients at one point.

    Args:
        scores: Of the edges, shape ``[readers, writers]``.
    """
    return scores.sum(0)


def by_nodes(owners: Sequence[Sequence[int]], scores: Tensor) -> Tensor:
    """Edges scored by nodes alone: each by the weaker of its two ends, so that the strongest nodes bring their edges.

    Args:
        owners: Of the graph.
        scores: Of the edges, shape ``[readers, writers]``.
    """
    nodes = node_scores(scores)
    strongest = [max((nodes[place] for place in places), key=abs, default=nodes.abs().max()) for places in owners]
    ends = torch.stack([torch.as_tensor(one) for one in strongest])  # [readers]
    weaker = torch.where(ends[:, None].abs() < nodes[None].abs(), ends[:, None], nodes[None])
    return weaker * (scores != 0)


def _differences(clean: Recorded, other: Recorded) -> Tensor:
    return clean.writes.sub_(other.writes)


def _eap(wiring: Wiring, batch: Batch, options: CircuitOptions) -> Tensor:
    run = Gradients(wiring, keep=True)
    logits = run.logits(batch.ids)
    assert run.writes is not None
    total = options.value(logits, batch.pairs, logits.detach()).sum()
    return run.products(total, run.writes.sub_(batch.other.writes))


def places_between(steps: int) -> list[tuple[float, float]]:
    """Gauss-Legendre nodes and weights on [0, 1], exact for a metric that is a polynomial of degree 2 steps there.

    Example:
        >>> places_between(1)
        [(0.5, 1.0)]
    """
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return [(float(node + 1) / 2, float(weight) / 2) for node, weight in zip(nodes, weights, strict=True)]


def _eap_ig_inputs(wiring: Wiring, batch: Batch, options: CircuitOptions, steps: int) -> tuple[Tensor, int]:
    """Gradients along the line of the embeddings; everything behind them is computed anew at each node."""
    clean = record(wiring, batch.ids)
    start, difference = batch.other.writes[0], clean.writes[0] - batch.other.writes[0]
    differences = _differences(clean, batch.other)
    total = torch.zeros(1, dtype=torch.float64)
    for place, weight in places_between(steps):
        run = Gradients(wiring, entry=start + place * difference, keep=False)
        value = options.value(run.logits(batch.ids), batch.pairs, clean.logits).sum()
        total = total + weight * run.products(value, differences).cpu()
    return total, steps


def _eap_ig_activations(wiring: Wiring, batch: Batch, options: CircuitOptions, steps: int) -> tuple[Tensor, int]:
    """Gradients along the line of what one stage writes, stage by stage, with all before it as in the clean run."""
    clean = record(wiring, batch.ids)
    differences = _differences(clean, batch.other)
    total = torch.zeros(1, dtype=torch.float64)
    for stage in range(-1, len(wiring.stages)):
        columns = range(1) if stage < 0 else wiring.stages[stage].writers
        scale = 1.0 if stage < 0 else wiring.stages[stage].scale
        rows = slice(columns.start, columns.stop)
        start = batch.other.writes[rows].sum(0) / scale
        difference = differences[rows].sum(0) / scale
        for place, weight in places_between(steps):
            value = start + place * difference
            changed = {} if stage < 0 else {stage: value}
            run = Gradients(wiring, entry=value if stage < 0 else None, changed=changed, keep=False)
            metric = options.value(run.logits(batch.ids), batch.pairs, clean.logits).sum()
            total = total + weight * run.products(metric, differences, columns).cpu()
    return total, steps * (len(wiring.stages) + 1)


def _exact(
    wiring: Wiring, pairs: PromptPairs, options: CircuitOptions, progress: Progress | None, replicas: Replicas
) -> tuple[Tensor, Cost]:
    """What each pair loses with each edge patched, shape ``[edges, pairs]``."""
    whole = wiring.graph.edges()
    places = whole.nonzero().tolist()
    circuits = [whole]
    for row, column in places:
        circuits.append(whole.clone())
        circuits[-1][row, column] = False
    values, cost = measure(wiring, pairs, options, circuits, progress=progress, replicas=replicas)
    return values[:1] - values[1:], cost
