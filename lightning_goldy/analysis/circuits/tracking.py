"""A circuit with its measured faithfulness and what it kept of another: what a run is followed by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

from torch import nn

from lightning_goldy.analysis.circuits.circuit import (
    Circuit,
    CircuitOverlap,
    Rank,
    Selection,
    circuit_overlap,
    find_circuits,
)
from lightning_goldy.analysis.circuits.faithfulness import Faithfulness, faithfulness
from lightning_goldy.analysis.circuits.scores import Ablation, CircuitOptions, Method, Metric
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.naming import require_at_least, require_choice
from lightning_goldy.core.pieces import PromptPairs


@dataclass(frozen=True)
class TrackingOptions:
    """How a circuit is found and measured, the same at every step of a run.

    Args:
        metric: See :class:`CircuitOptions`.
        method: See :func:`find_circuits`.
        steps: Nodes of the line.
        ablation: What patched edges bring.
        share: Of all edges that the circuit has, in (0, 1].
        sizes: Shares of all edges at which faithfulness is measured.
        n_random: Random circuits per size.
        select: ``top`` or ``greedy``.
        rank: ``magnitude`` or ``signed``.
        batch_size: Pairs per pass.

    Raises:
        ValueError: A setting is out of range; it is named.

    Example:
        >>> TrackingOptions(sizes=(0.0, 0.5))
        Traceback (most recent call last):
        ValueError: sizes are shares of all edges, above 0 and at most 1; got 0.0
    """

    metric: Metric = "logit_difference"
    method: Method = "eap_ig_inputs"
    steps: int = 5
    ablation: Ablation = "counterfactual"
    share: float = 0.05
    sizes: tuple[float, ...] = (0.01, 0.03, 0.1)
    n_random: int = 3
    select: Selection = "top"
    rank: Rank = "magnitude"
    batch_size: int = 8

    def __post_init__(self) -> None:
        CircuitOptions(self.metric, self.ablation, self.batch_size)
        for what, value, valid in (
            ("method", self.method, get_args(Method)),
            ("select", self.select, get_args(Selection)),
            ("rank", self.rank, get_args(Rank)),
        ):
            require_choice(what, value, valid)
        require_at_least("steps", self.steps, 1)
        require_at_least("n_random", self.n_random, 0)
        for name, shares in (("share is a share", (self.share,)), ("sizes are shares", self.sizes)):
            for share in shares:
                if not 0 < share <= 1:
                    raise ValueError(f"{name} of all edges, above 0 and at most 1; got {share!r}")
        if not self.sizes:
            raise ValueError("sizes is empty: name at least one share of the edges")
        if self.metric == "kl" and self.method in ("eap", "nodes"):
            raise ValueError(f"kl has no slope at the clean run, where method {self.method!r} takes it")

    def find(self, model: nn.Module, pairs: PromptPairs, progress: Callable[[int, int], None] | None = None) -> Circuit:
        """The circuit of a model; see :func:`find_circuits`."""
        scored = find_circuits(
            model,
            pairs,
            self.metric,
            method=self.method,
            steps=self.steps,
            n_edges=0,
            ablation=self.ablation,
            batch_size=self.batch_size,
            progress=progress,
        )
        count = max(1, round(self.share * scored.graph.n_edges))
        chosen = scored.chosen(n_edges=count, select=self.select, rank=self.rank)
        return Circuit(**{**vars(chosen), "cost": scored.cost})


@dataclass(frozen=True)
class TrackedCircuit(AnalysisResult):
    """The circuit of one step.

    Args:
        circuit: Its edges and the scores of all.
        curve: Faithfulness at the sizes.
        shares: The sizes, as shares of all edges.
        overlap: With the base's circuit; None without a base.
    """

    analysis: ClassVar[str] = "circuit_tracker"

    circuit: Circuit
    curve: Faithfulness
    shares: tuple[float, ...]
    overlap: CircuitOverlap | None

    @property
    def cost(self) -> Cost:
        """Passes of the search and of the measurement."""
        return self.circuit.cost + self.curve.cost

    def metrics(self) -> dict[str, float | None]:
        """Faithfulness by size, completeness and area, the overlap, and each node's score below ``node/``."""
        told: dict[str, float | None] = {}
        for share, value in zip(self.shares, self.curve.values, strict=True):
            told[f"faithfulness_{100 * share:g}_percent".replace(".", "_")] = value
        curve, overlap = self.curve.metrics(), {} if self.overlap is None else self.overlap.metrics()
        told |= {name: curve[name] for name in ("faithfulness_random", "completeness", "area", "area_random")}
        told |= {"metric_clean": self.circuit.clean, "metric_patched": self.circuit.patched}
        told |= {name: overlap[name] for name in ("overlap", "overlap_by_chance", "rank_correlation") if overlap}
        return told | {f"node/{name}": score for name, score in self.circuit.node_scores().items()}

    def details(self) -> dict[str, Any]:
        """The circuit, the curve and the overlap."""
        overlap = None if self.overlap is None else {**self.overlap.details(), **self.overlap.metrics()}
        return {**self.circuit.details(), "curve": self.curve.details(), "overlap": overlap}

    def headline(self) -> str:
        """What the largest size keeps, and of which circuit."""
        weak = ""
        if self.curve.random.numel() and self.curve.value <= float(self.curve.random[-1].max()):
            weak = "; WEAK: no more than a random circuit"
        kept = "" if self.overlap is None else f"; overlap with the base's {self.overlap.intersection_over_union:.2f}"
        return f"{self.curve.headline()}; {self.circuit.headline()}{kept}{weak}"


def track_circuit(
    model: nn.Module,
    pairs: PromptPairs,
    options: TrackingOptions = TrackingOptions(),
    *,
    base: Circuit | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TrackedCircuit:
    """Finds a model's circuit, measures what it keeps, and compares it with an earlier one.

    Args:
        model: A causal language model; it comes back as it was.
        pairs: Clean and corrupted prompts.
        options: The same at every step.
        base: The circuit of what the model was.
        progress: Called with (pairs done, pairs in all).

    Returns:
        The circuit, its faithfulness and its overlap.

    Raises:
        ValueError: The pairs do not tell the behaviour from its absence.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16))
        >>> pairs = PromptPairs(((3, 4, 5),), ((3, 6, 5),), ((4,),), ((6,),))
        >>> found = track_circuit(model, pairs, TrackingOptions(sizes=(1.0,)))
        >>> found.metrics()["faithfulness_100_percent"]
        1.0
    """
    circuit = options.find(model, pairs, progress)
    n_edges = circuit.graph.n_edges
    counts = sorted({max(1, round(share * n_edges)) for share in options.sizes})
    curve = faithfulness(
        model,
        circuit,
        pairs,
        options.metric,
        sizes=counts,
        select=options.select,
        rank=options.rank,
        ablation=options.ablation,
        n_random=options.n_random,
        batch_size=options.batch_size,
    )
    shares = {max(1, round(share * n_edges)): share for share in sorted(options.sizes, reverse=True)}
    overlap = None if base is None else circuit_overlap(base, circuit)
    return TrackedCircuit(circuit, curve, tuple(shares[count] for count in counts), overlap)
