"""Circuits: the edges that carry a behaviour, how they are chosen, and how two circuits compare."""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args
from xml.etree import ElementTree

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import agreement_of, interval_of, resampled, too_few
from lightning_goldy.analysis.attention.patterns import attention_maps
from lightning_goldy.analysis.circuits.graph import INPUT, OUTPUT, CircuitGraph, readers_of
from lightning_goldy.analysis.circuits.nulls import random_circuits
from lightning_goldy.analysis.circuits.runs import Ablation, CircuitOptions, Metric, Progress, measure, wired
from lightning_goldy.analysis.circuits.scores import Method, grouped_scores, node_scores
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.naming import require_at_least, require_choice, require_number
from lightning_goldy.core.pieces import PromptPairs
from lightning_goldy.core.sharding import Replicas

Selection = Literal["top", "greedy"]
Rank = Literal["magnitude", "signed"]


@dataclass(frozen=True)
class Circuit(AnalysisResult):
    """Scored edges of a model, and those that were chosen.

    Args:
        graph: The graph.
        scores: What the metric loses when the edge is patched (positive: the edge supports the behaviour), shape
            ``[readers, writers]``, float64, 0 where there is no edge.
        kept: True for the chosen edges, same shape.
        method: How they were scored.
        metric: Name of the metric.
        ablation: What patched edges bring.
        clean: The metric of the whole model, mean over the pairs.
        patched: The metric with every edge patched.
        n_pairs: Pairs of prompts.
        cost: Passes.
        prompts: Digests of the prompts, clean and corrupted, that scored the edges; empty where they are not known.
        left_out: Scores without each group of pairs, shape ``[groups, readers, writers]``; no group by default.
    """

    analysis: ClassVar[str] = "circuit"

    graph: CircuitGraph
    scores: Tensor
    kept: Tensor
    method: str
    metric: str
    ablation: str
    clean: float
    patched: float
    n_pairs: int
    cost: Cost = field(default=Cost(), compare=False)
    prompts: tuple[str, ...] = ()
    left_out: Tensor = field(default_factory=lambda: torch.empty(0, 0, 0, dtype=torch.float64))

    @property
    def n_edges(self) -> int:
        """Number of chosen edges."""
        return int(self.kept.sum())

    @property
    def share(self) -> float:
        """The chosen edges' share of all."""
        return self.n_edges / self.graph.n_edges

    @property
    def nodes(self) -> tuple[str, ...]:
        """The writers with a chosen edge, their own or into one of their inputs, in the order of the forward pass."""
        used = self.kept.any(0)
        for row, places in enumerate(self.graph.owners):
            for place in places:
                used[place] |= self.kept[row].any()
        return tuple(name for name, used_ in zip(self.graph.writers, used.tolist(), strict=True) if used_)

    def node_scores(self) -> dict[str, float]:
        """Score of every writer, the sum over its edges."""
        return dict(zip(self.graph.writers, node_scores(self.scores).tolist(), strict=True))

    def edges(self, n: int | None = None) -> list[tuple[str, float]]:
        """Chosen edges with their scores, the strongest first.

        Args:
            n: Only so many.
        """
        places = self.kept.nonzero().tolist()
        named = [(self.graph.name(row, column), float(self.scores[row, column])) for row, column in places]
        return sorted(named, key=lambda edge: -abs(edge[1]))[:n]

    def chosen(
        self,
        *,
        n_edges: int | None = None,
        threshold: float | None = None,
        select: Selection = "top",
        rank: Rank = "magnitude",
    ) -> Circuit:
        """The same scores with other edges chosen; see :func:`find_circuits`.

        Raises:
            ValueError: Both or neither of ``n_edges`` and ``threshold`` are given, or one is out of range.
        """
        check_selection(n_edges, threshold, select, rank)
        if n_edges is not None and n_edges > self.graph.n_edges:
            raise ValueError(f"n_edges lies between 0 and {self.graph.n_edges}, all edges; got {n_edges}")
        values = self.scores.abs() if rank == "magnitude" else self.scores
        values = values.masked_fill(~self.graph.edges(), -math.inf)
        count = self.graph.n_edges if n_edges is None else n_edges
        least = -math.inf if threshold is None else threshold
        pick = _top if select == "top" else _greedy
        return replace(self, kept=pick(self.graph, values, count, least), cost=Cost())

    def without_groups(self) -> list[Circuit]:
        """The circuit as it would score its edges without each group of its pairs; none is chosen yet."""
        return [replace(self, scores=scores, kept=self.kept & False) for scores in self.left_out]

    def pruned(self) -> Circuit:
        """The circuit without dead ends: edges that no path from ``input`` reaches, or from which none leads out.

        With ``counterfactual`` ablation they change nothing: what no kept edge reaches says what it says in the other
        run.
        """
        return replace(self, kept=prune(self.graph, self.kept))

    def to_graphml(self) -> str:
        """The chosen edges between nodes as GraphML, for Gephi, yEd or networkx; heads' inputs are edge attributes."""
        root = ElementTree.Element("graphml", xmlns="http://graphml.graphdrawing.org/xmlns")
        for key, of, kind in (
            ("layer", "node", "int"),
            ("score", "node", "double"),
            ("weight", "edge", "double"),
            ("reader", "edge", "string"),
        ):
            ElementTree.SubElement(root, "key", {"id": f"{of}_{key}", "for": of, "attr.name": key, "attr.type": kind})
        graph = ElementTree.SubElement(root, "graph", id="circuit", edgedefault="directed")
        told = self.details()
        last = max(self.graph.layers) + 1
        output = {"name": OUTPUT, "layer": last, "score": 0.0, "kept": True}
        for node in (*told["nodes"], output):
            if node["kept"]:
                element = ElementTree.SubElement(graph, "node", id=node["name"])
                for key in ("layer", "score"):
                    ElementTree.SubElement(element, "data", key=f"node_{key}").text = repr(node[key])
        kept = {node["name"] for node in (*told["nodes"], output) if node["kept"]}
        for edge in told["edges"]:
            for target in edge["targets"]:
                if target in kept:
                    element = ElementTree.SubElement(graph, "edge", source=edge["source"], target=target)
                    ElementTree.SubElement(element, "data", key="edge_weight").text = repr(edge["score"])
                    ElementTree.SubElement(element, "data", key="edge_reader").text = edge["reader"]
        return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"

    def metrics(self) -> dict[str, float | None]:
        """Size and the two ends of the metric."""
        return {
            "edges": float(self.n_edges),
            "share_of_edges": self.share,
            "nodes": float(len(self.nodes)),
            "metric_clean": self.clean,
            "metric_patched": self.patched,
        }

    def details(self) -> dict[str, Any]:
        """Nodes with block, score and whether chosen, and the chosen edges."""
        chosen, scores = set(self.nodes), self.node_scores()
        nodes = [
            {"name": name, "layer": layer, "score": scores[name], "kept": name in chosen}
            for name, layer in zip(self.graph.writers, self.graph.layers, strict=True)
        ]
        edges = []
        for row, column in self.kept.nonzero().tolist():
            ends = [self.graph.writers[place] for place in self.graph.owners[row]] or [OUTPUT]
            edges.append(
                {
                    "source": self.graph.writers[column],
                    "reader": self.graph.readers[row],
                    "targets": ends,
                    "score": float(self.scores[row, column]),
                }
            )
        told = {name: getattr(self, name) for name in ("method", "metric", "ablation", "clean", "patched", "n_pairs")}
        return {**told, "nodes": nodes, "edges": edges, "n_edges_all": self.graph.n_edges}

    def headline(self) -> str:
        """Size, and the strongest edges."""
        named = ", ".join(f"{name} ({score:+.2g})" for name, score in self.edges(3))
        return (
            f"{self.n_edges} of {self.graph.n_edges} edges between {len(self.nodes)} nodes by {self.method}; "
            f"strongest: {named or 'none'}"
        )


def check_selection(n_edges: int | None, threshold: float | None, select: str, rank: str) -> None:
    """Checks how edges are to be chosen.

    Raises:
        ValueError: Both or neither of size and threshold are given, one is negative, or a choice is unknown.
    """
    require_choice("select", select, get_args(Selection))
    require_choice("rank", rank, get_args(Rank))
    if (n_edges is None) == (threshold is None):
        raise ValueError(f"give one of n_edges= and threshold=; got n_edges={n_edges!r} and threshold={threshold!r}")
    if n_edges is not None:
        require_at_least("n_edges", n_edges, 0)
    if threshold is not None:
        require_number("threshold", threshold)
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold is a score of at least 0; got {threshold!r}")


def find_circuits(
    model: nn.Module,
    pairs: PromptPairs,
    metric: Metric = "logit_difference",
    *,
    method: Method = "eap_ig_inputs",
    steps: int = 5,
    threshold: float | None = None,
    n_edges: int | None = None,
    select: Selection = "top",
    rank: Rank = "magnitude",
    ablation: Ablation = "counterfactual",
    batch_size: int = 8,
    n_groups: int = 0,
    progress: Progress | None = None,
    split_over_ranks: bool = True,
) -> Circuit:
    r"""Scores every edge of a decoder by what the behaviour loses when it is patched, and chooses the strongest.

    .. math:: s_{uv} = m - m(\text{edge patched}) \approx
        \sum_t \big\langle u_t - u'_t, \; \nabla_{x_{v,t}} m \big\rangle

    with u what a head or MLP writes on the clean prompt, u' on the other, and the gradient at v's input before its
    norm: on the clean run (``eap``), averaged along the line between the two embeddings (``eap_ig_inputs``), or along
    the line of what u's layer writes, with all before it clean (``eap_ig_activations``, as many passes more as there
    are layers of heads and of MLPs). ``exact`` patches one edge after the other, a forward pass each. ``nodes`` scores
    nodes by ``eap`` and an edge by the weaker of its ends. Lines are cut at Gauss-Legendre nodes.

    A norm over what a layer writes (post-norm) is taken apart with its spread frozen at the run's own, so that what
    heads write sums up to what the layer writes; gradients go through it as it is.

    Args:
        model: A causal language model; it comes back as it was.
        pairs: Clean and corrupted prompts with their answers.
        metric: See :class:`CircuitOptions`. ``kl`` has no slope at the clean run, so ``eap`` and ``nodes`` refuse it.
        method: How edges are scored.
        steps: Nodes of the line, of ``eap_ig_inputs`` and ``eap_ig_activations``.
        threshold: Keeps edges whose score is at least that far from 0.
        n_edges: Keeps so many edges; a twentieth of all by default.
        select: ``top``: the strongest; ``greedy``: from the output on, always the strongest edge into what is there,
            and without dead ends.
        rank: By ``magnitude``, or ``signed``: those that support the behaviour first.
        ablation: What a patched edge brings.
        batch_size: Pairs per pass.
        n_groups: Groups of the pairs without each of which edges are scored, too, at no further pass, so that
            :func:`faithfulness` tells how far its value hangs on the pairs that chose; 0 for none, else 2 at least.
        progress: Called with (pairs done, pairs in all); of ``exact`` with runs.
        split_over_ranks: Whether to share pairs out over the ranks of an initialised process group; all must call.

    Returns:
        The circuit with the scores of all edges.

    Raises:
        ValueError: An argument is out of range, or metric or ablation need what the pairs lack.
        UnsupportedArchitectureError: The residual stream is no sum of what heads and MLPs write.

    Source: attribution patching of edges, Syed et al. 2023 (arXiv 2310.10348); integrated gradients, Hanna et al. 2024
        (arXiv 2403.17806); compared in Mueller et al. 2025 (arXiv 2504.13151).

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16))
        >>> pairs = PromptPairs(((3, 4, 5),), ((3, 6, 5),), ((4,),), ((6,),))
        >>> circuit = find_circuits(model, pairs, n_edges=10)
        >>> circuit.n_edges, circuit.graph.n_edges, circuit.cost
        (10, 46, Cost(forwards=10, backwards=5))
    """
    require_choice("method", method, get_args(Method))
    require_at_least("steps", steps, 1)
    options = CircuitOptions(metric, ablation, batch_size)
    check_groups(n_groups, len(pairs))
    if metric == "kl" and method in ("eap", "nodes"):
        raise ValueError(
            f"method {method!r} takes the slope at the clean run, where kl has none; choose eap_ig_inputs, "
            "eap_ig_activations or exact"
        )
    given = n_edges is not None or threshold is not None
    check_selection(n_edges if given else 0, threshold, select, rank)
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    with replicas.together("find_circuits"), wired(model, pairs, options) as wiring:
        whole = wiring.graph.edges()
        shared: dict[str, Any] = {"progress": progress, "replicas": replicas}
        shared |= {"method": method, "steps": steps, "n_groups": n_groups}
        scores, left_out, cost = grouped_scores(wiring, pairs, options, **shared)
        ends, more = measure(wiring, pairs, options, [whole, torch.zeros_like(whole)], replicas=replicas)
    clean, patched = ends.mean(1).tolist()
    found = Circuit(
        graph=wiring.graph,
        scores=scores,
        kept=torch.zeros_like(whole),
        method=method,
        metric=options.metric_name,
        ablation=ablation,
        clean=clean,
        patched=patched,
        n_pairs=len(pairs),
        prompts=tuple(sorted({*pairs.digests(), *pairs.digests("corrupted")})),
        left_out=left_out,
    )
    count = n_edges if given else max(1, wiring.graph.n_edges // 20)
    return replace(found.chosen(n_edges=count, threshold=threshold, select=select, rank=rank), cost=cost + more)


def check_groups(n_groups: int, n_pairs: int | None = None) -> None:
    """Checks the number of groups of pairs that are left out in turns.

    Raises:
        ValueError: It is negative or 1, or there are fewer pairs.
    """
    require_at_least("n_groups", n_groups, 0)
    if n_groups == 1 or (n_pairs is not None and n_groups > n_pairs):
        most = "" if n_pairs is None else f" and at most {n_pairs}, the number of pairs"
        raise ValueError(f"n_groups is 0, or at least 2{most}; got {n_groups}")


def node_effects(
    model: nn.Module,
    pairs: PromptPairs,
    metric: Metric = "logit_difference",
    *,
    ablation: Ablation = "counterfactual",
    batch_size: int = 8,
    progress: Progress | None = None,
    split_over_ranks: bool = True,
) -> dict[str, float]:
    """What the metric loses when all that a node tells is patched: a forward pass per node.

    Args:
        model: A causal language model; it comes back as it was.
        pairs: Clean and corrupted prompts.
        metric: See :class:`CircuitOptions`.
        ablation: What patched edges bring.
        batch_size: Pairs per pass.
        progress: Called with (runs done, runs in all).
        split_over_ranks: Whether to share pairs out over the ranks of an initialised process group; all must call.

    Returns:
        The mean over the pairs by node.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16))
        >>> list(node_effects(model, PromptPairs(((3, 4),), ((3, 6),), ((4,),), ((6,),))))
        ['input', 'a0.h0', 'a0.h1', 'm0']
    """
    options = CircuitOptions(metric, ablation, batch_size)
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    with replicas.together("node_effects"), wired(model, pairs, options) as wiring:
        whole = wiring.graph.edges()
        circuits = [whole]
        for column in range(len(wiring.graph.writers)):
            circuits.append(whole.clone())
            circuits[-1][:, column] = False
        values, _ = measure(wiring, pairs, options, circuits, progress=progress, replicas=replicas)
        means = values.mean(1)
    return dict(zip(wiring.graph.writers, (means[0] - means[1:]).tolist(), strict=True))


def _top(graph: CircuitGraph, values: Tensor, count: int, least: float) -> Tensor:
    kept = torch.zeros_like(values, dtype=torch.bool)
    order = values.flatten().argsort(descending=True, stable=True)[:count]
    kept.view(-1)[order] = True
    return kept & (values >= least) & graph.edges()


def _greedy(graph: CircuitGraph, values: Tensor, count: int, least: float) -> Tensor:
    """From the output on the strongest edge into what is there, one after the other; dead ends are taken out."""
    readers = readers_of(graph)
    kept = torch.zeros_like(values, dtype=torch.bool)
    waiting: list[tuple[float, int, int]] = []
    table, opened, reached = values.tolist(), set(), set()

    def open_reader(row: int) -> None:
        if row not in opened:
            opened.add(row)
            for column in range(graph.seen[row]):
                if table[row][column] >= least:
                    heapq.heappush(waiting, (-table[row][column], row, column))

    open_reader(len(graph.readers) - 1)
    while waiting and count > 0:
        _, row, column = heapq.heappop(waiting)
        kept[row, column], count = True, count - 1
        if column not in reached:
            reached.add(column)
            for reader in readers.get(column, ()):
                open_reader(reader)
    return prune(graph, kept)


def prune(graph: CircuitGraph, kept: Tensor) -> Tensor:
    """Edges that lie on a path from ``input`` to ``output``, shape ``[readers, writers]``."""
    rows = kept.tolist()
    reached = [name == INPUT for name in graph.writers]
    # A writer's readers come before every reader that sees it.
    for row, places in enumerate(graph.owners):
        if any(here and there for here, there in zip(rows[row], reached, strict=True)):
            for place in places:
                reached[place] = True
    leads = [False] * len(graph.writers)
    on_path = torch.zeros_like(kept)
    for row in range(len(rows) - 1, -1, -1):
        places = graph.owners[row]
        if places and not any(leads[place] for place in places):
            continue
        for column, here in enumerate(rows[row]):
            if here and reached[column]:
                on_path[row, column] = leads[column] = True
    return on_path


@dataclass(frozen=True)
class Mover(AnalysisResult):
    """A head that writes to the output, and what its last token looks at.

    Args:
        node: Such as ``a3.h1``.
        score: Of its edge into the output.
        right: Attention to the tokens of the right answers in the clean prompt, mean over the pairs, a fraction.
        wrong: That to the tokens of the wrong ones.
        low: Lower end of the 95 % bootstrap interval of right - wrong over the pairs; None of one pair.
        high: Upper end.
        n_pairs: Pairs whose prompt holds its right answer.
    """

    node: str
    score: float
    right: float
    wrong: float
    low: float | None
    high: float | None
    n_pairs: int

    @property
    def moves_names(self) -> bool:
        """Whether it supports the behaviour and surely looks more at the right answer than at the wrong one."""
        return self.score > 0 and self.low is not None and self.low > 0

    def headline(self) -> str:
        """What it looks at, and whether that makes it a name mover."""
        interval = "no interval: one pair" if self.low is None else f"difference [{self.low:.2f}, {self.high:.2f}]"
        kind = "a name mover" if self.moves_names else "no name mover"
        weak = too_few(self.n_pairs, "pairs") if self.low is not None else ""
        return (
            f"{self.node} ({self.score:+.2g} into the output) looks at the right answer with {self.right:.2f}, at the "
            f"wrong one with {self.wrong:.2f} ({interval}): {kind}{f'; WEAK: {weak}' if weak else ''}"
        )


def name_movers(model: nn.Module, circuit: Circuit, pairs: PromptPairs, n: int = 8) -> tuple[Mover, ...]:
    """The heads with the strongest edges into the output, and whether they look at the answer that they bring there.

    Name movers of the indirect-object circuit look from the last token at the name that is to come; so do the heads of
    induction. Attention is that of the clean run, summed over all places of an answer's tokens in the prompt.

    Args:
        model: A causal language model; it comes back as it was. A forward pass per pair.
        circuit: Of :func:`find_circuits`; whether an edge was chosen does not matter.
        pairs: Clean and corrupted prompts.
        n: Heads.

    Raises:
        ValueError: No prompt holds its right answer, or ``n`` is below 1.

    Source: Wang et al. 2022, "Interpretability in the Wild" (arXiv 2211.00593), section 3.1.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16))
        >>> pairs = PromptPairs(((4, 6, 5),), ((6, 4, 5),), ((4,),), ((6,),))
        >>> sorted(mover.node for mover in name_movers(model, find_circuits(model, pairs), pairs))
        ['a0.h0', 'a0.h1']
    """
    require_at_least("n", n, 1)
    order = circuit.scores[-1].abs().argsort(descending=True, stable=True).tolist()
    heads = [place for place in order if circuit.graph.writers[place].startswith("a")][:n]
    at = [tuple(map(int, circuit.graph.writers[place][1:].split(".h"))) for place in heads]
    rows = []
    for ids, *answers in zip(pairs.clean, pairs.answers, pairs.wrong, strict=True):
        right, wrong = ([token in tokens for token in ids] for tokens in answers)
        if any(right):
            maps = attention_maps(model, {"input_ids": torch.tensor([ids], device=next(model.parameters()).device)})
            last = torch.stack([maps.pattern(layer, head)[-1].double() for layer, head in at])  # [heads, T]
            rows.append(torch.stack([last[:, torch.tensor(held)].sum(1) for held in (right, wrong)]))
    if not rows:
        raise ValueError(f"no prompt holds its right answer, the first {pairs.names[0]!r}: no head can look at it")
    looks = torch.stack(rows)  # [pairs, 2, heads]
    drawn = resampled(len(looks)) @ (looks[:, 0] - looks[:, 1]) / len(looks)
    means, found = looks.mean(0), []
    for number, place in enumerate(heads):
        low, high = interval_of(drawn[:, number]) if len(looks) > 1 else (None, None)
        right, wrong = means[:, number].tolist()
        score = float(circuit.scores[-1, place])
        found.append(Mover(circuit.graph.writers[place], score, right, wrong, low, high, len(looks)))
    return tuple(found)


@dataclass(frozen=True)
class CircuitOverlap(AnalysisResult):
    """What two circuits of one graph share.

    Args:
        kept: Edges of both.
        created: Edges of the second alone.
        removed: Edges of the first alone.
        intersection_over_union: Of the chosen edges; NaN where neither has any.
        by_chance: Its mean between the first and random circuits of the second's size.
        above_chance: 99th percentile of the same.
        rank_correlation: Spearman's, of the magnitudes of all edges' scores; NaN where one is constant.
        noise: Intersection over union of the second circuit with one that differs from it in the seed alone; None where
            none was given.
        node_changes: By node how far its score moved.
        different: What the two were not found alike with: ``method``, ``metric``, ``ablation``, ``prompts``.
    """

    analysis: ClassVar[str] = "circuit_overlap"

    kept: tuple[str, ...]
    created: tuple[str, ...]
    removed: tuple[str, ...]
    intersection_over_union: float
    by_chance: float
    above_chance: float
    rank_correlation: float
    noise: float | None
    node_changes: dict[str, float]
    different: tuple[str, ...] = ()

    def metrics(self) -> dict[str, float | None]:
        """Numbers of edges, overlap with its nulls, rank correlation."""
        return {
            "overlap": _known(self.intersection_over_union),
            "overlap_by_chance": _known(self.by_chance),
            "overlap_noise": _known(self.noise),
            "rank_correlation": _known(self.rank_correlation),
            "kept": float(len(self.kept)),
            "created": float(len(self.created)),
            "removed": float(len(self.removed)),
        }

    def details(self) -> dict[str, Any]:
        """The edges and how far nodes moved."""
        names = ("kept", "created", "removed", "node_changes", "above_chance", "different")
        return {name: getattr(self, name) for name in names}

    def headline(self) -> str:
        """What remained of the circuit, beside chance and noise."""
        noise = "" if _known(self.noise) is None else f", {self.noise:.2f} between two seeds"
        overlap = f"overlap {self.intersection_over_union:.2f} ({self.by_chance:.2f} by chance{noise})"
        if _known(self.intersection_over_union) is None:
            overlap = "neither circuit has an edge"
        rank = _known(self.rank_correlation)
        scores = "" if rank is None else f", rank correlation of the scores {rank:.2f}"
        other = f"; found with different {', '.join(self.different)}" if self.different else ""
        moved = f"{len(self.kept)} edges kept, {len(self.created)} created, {len(self.removed)} removed"
        return f"{moved}: {overlap}{scores}{other}"


def circuit_overlap(
    first: Circuit, second: Circuit, *, seed: Circuit | None = None, n_random: int = 200
) -> CircuitOverlap:
    r"""What the second circuit kept, created and removed of the first, against what chance and noise would give.

    .. math:: \mathrm{IoU} = |A \cap B| \, / \, |A \cup B|

    Args:
        first: Such as of a base.
        second: Such as of its finetune.
        seed: Of a finetune that differs from the second in its seed alone, for the noise.
        n_random: Random circuits of the second's size.

    Raises:
        ValueError: The graphs differ, or ``n_random`` is below 1.

    Example:
        >>> graph = CircuitGraph(("input", "m0"), ("m0", "output"), (1, 2), ((1,), ()), (-1, 0))
        >>> scores = torch.tensor([[3.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
        >>> circuit = Circuit(graph, scores, scores > 1, "eap", "kl", "zero", 0.0, -1.0, 1)
        >>> other = circuit.chosen(n_edges=1)
        >>> circuit_overlap(circuit, other).removed, circuit_overlap(circuit, other).intersection_over_union
        (('m0->output',), 0.5)
    """
    require_at_least("n_random", n_random, 1)
    graph = first.graph
    for other in (second, seed):
        if other is not None and other.graph != graph:
            raise ValueError(
                f"the circuits are of different graphs: {graph.n_edges} edges between {len(graph.writers)} nodes, and "
                f"{other.graph.n_edges} between {len(other.graph.writers)}"
            )
    edges = graph.edges()
    old, new = first.scores[edges].abs(), second.scores[edges].abs()
    chance = [overlap_of(first.kept, kept) for kept in random_circuits(graph, second.n_edges, n_random)]
    before, after = first.node_scores(), second.node_scores()
    return CircuitOverlap(
        kept=_named(graph, first.kept & second.kept),
        created=_named(graph, second.kept & ~first.kept),
        removed=_named(graph, first.kept & ~second.kept),
        intersection_over_union=overlap_of(first.kept, second.kept),
        by_chance=sum(chance) / n_random,
        above_chance=sorted(chance)[math.ceil(0.99 * n_random) - 1],
        rank_correlation=agreement_of(old.numpy(), new.numpy()).spearman,
        noise=None if seed is None else overlap_of(second.kept, seed.kept),
        node_changes={name: after[name] - value for name, value in before.items()},
        different=_differences(first, second),
    )


def _differences(first: Circuit, second: Circuit) -> tuple[str, ...]:
    """What two circuits were not found alike with, as far as it is known."""
    names = ["method", "metric", "ablation", *(["prompts"] if first.prompts and second.prompts else [])]
    return tuple(name for name in names if getattr(first, name) != getattr(second, name))


def of_one_graph(circuit: Circuit, others: Mapping[str, Circuit]) -> Mapping[str, Circuit]:
    """The other circuits by name, all of the graph of this one.

    Raises:
        ValueError: They are not by name, or one is of another graph.
    """
    if not isinstance(others, Mapping) or not all(isinstance(other, Circuit) for other in others.values()):
        raise ValueError(f"others are circuits by name, as {{'greater_than': circuit}}; got {others!r}")
    for name, other in others.items():
        if other.graph != circuit.graph:
            raise ValueError(
                f"the circuit of {name!r} is of another graph, of {other.graph.n_edges} edges, than the one that is "
                f"measured, of {circuit.graph.n_edges}"
            )
    return others


def overlap_of(first: Tensor, second: Tensor) -> float:
    """Intersection over union of two sets of edges; NaN where both are empty.

    Example:
        >>> overlap_of(torch.tensor([True, True]), torch.tensor([True, False]))
        0.5
    """
    union = int((first | second).sum())
    return int((first & second).sum()) / union if union else math.nan


def _named(graph: CircuitGraph, kept: Tensor) -> tuple[str, ...]:
    places: Sequence[Sequence[int]] = kept.nonzero().tolist()
    return tuple(graph.name(row, column) for row, column in places)


def _known(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
