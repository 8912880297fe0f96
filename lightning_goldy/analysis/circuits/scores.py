"""Scores of edges: what a metric loses when an edge is patched, measured edge by edge or estimated by gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lightning_goldy.analysis.circuits.graph import Wiring
from lightning_goldy.analysis.circuits.runs import Gradients, Recorded, patched_logits, record
from lightning_goldy.analysis.divergence import precise
from lightning_goldy.analysis.result import Cost
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import require_at_least, require_choice
from lightning_goldy.core.pieces import PromptPairs

Method = Literal["eap", "eap_ig_inputs", "eap_ig_activations", "nodes", "exact"]
Ablation = Literal["counterfactual", "mean", "zero"]
MetricName = Literal["logit_difference", "kl", "probability", "probability_difference"]
MetricFunction: TypeAlias = Callable[[Tensor, PromptPairs, Tensor], Tensor]
"""``metric(logits [B, V], the B pairs, logits of the clean run [B, V])``: a value of each pair, shape ``[B]``."""
Metric: TypeAlias = "MetricName | MetricFunction"
Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class CircuitOptions:
    """How edges are patched and what that is measured by.

    Args:
        metric: Higher is better. ``logit_difference``: log-odds of the right against the wrong answers, nats;
            ``probability`` of the right ones, ``probability_difference`` less that of the wrong ones; ``kl``: minus
            KL(p_clean || p), nats; or a function of (logits ``[B, V]``, pairs, clean logits ``[B, V]``).
        ablation: What a patched edge brings: what its writer writes on the ``counterfactual`` prompt, its ``mean`` over
            the clean prompts of the same length at each position, or ``zero``.
        batch_size: Pairs per pass.

    Raises:
        ValueError: A choice is unknown or the batch size below 1.

    Example:
        >>> CircuitOptions(ablation="means")
        Traceback (most recent call last):
        ValueError: unknown ablation 'means'; did you mean 'mean'? Valid: counterfactual, mean, zero
    """

    metric: Metric = "logit_difference"
    ablation: Ablation = "counterfactual"
    batch_size: int = 8

    def __post_init__(self) -> None:
        require_choice("ablation", self.ablation, get_args(Ablation))
        require_at_least("batch_size", self.batch_size, 1)
        if not callable(self.metric):
            require_choice("metric", self.metric, get_args(MetricName))

    @property
    def metric_name(self) -> str:
        """What the metric is called."""
        return getattr(self.metric, "__name__", "metric") if callable(self.metric) else self.metric

    def check(self, pairs: PromptPairs) -> None:
        """Checks that pairs have what metric and ablation need.

        Raises:
            ValueError: They have not; the prompt is named.
        """
        if self.metric in ("logit_difference", "probability_difference"):
            lacking = next((name for name, wrong in zip(pairs.names, pairs.wrong, strict=True) if not wrong), None)
            if lacking is not None:
                raise ValueError(f"metric {self.metric!r} needs wrong answers, of which prompt {lacking!r} has none")
        if self.ablation == "mean":
            for group in pairs.batches(len(pairs)):
                if len(group) == 1:
                    raise ValueError(
                        f"ablation 'mean' takes the mean over prompts of one length, and {pairs.names[group[0]]!r} is "
                        f"the only one of {len(pairs.clean[group[0]])} tokens"
                    )

    def value(self, logits: Tensor, pairs: PromptPairs, clean: Tensor) -> Tensor:
        """The metric of each pair, shape ``[B]``."""
        if callable(self.metric):
            return self.metric(logits, pairs, clean)
        logs = precise(logits).log_softmax(-1)
        if self.metric == "kl":
            before = precise(clean).detach().log_softmax(-1)
            return -(before.exp() * (before - logs)).sum(-1)
        right = _sums(logs, pairs.answers)
        if self.metric == "probability":
            return right.exp()
        wrong = _sums(logs, pairs.wrong)
        return right - wrong if self.metric == "logit_difference" else right.exp() - wrong.exp()


def _sums(logs: Tensor, tokens: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of sets of tokens, shape ``[B]``."""
    return torch.stack([row[list(ids)].logsumexp(0) for row, ids in zip(logs, tokens, strict=True)])


@dataclass(frozen=True)
class Batch:
    """Pairs of one length, their clean tokens, and the run that is patched in."""

    places: list[int]
    pairs: PromptPairs
    ids: Tensor
    other: Recorded


@contextmanager
def wired(model: nn.Module, pairs: PromptPairs, options: CircuitOptions) -> Iterator[Wiring]:
    """The wiring of a model that is put back as it was, with parameters that ask for no gradient."""
    options.check(pairs)
    device = next(model.parameters()).device
    wiring = Wiring.of(model, torch.tensor(pairs.clean[0], device=device)[None])
    with preserved(model):
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        yield wiring


def batches(wiring: Wiring, pairs: PromptPairs, options: CircuitOptions, done: list[Cost]) -> Iterator[Batch]:
    """The pairs in batches with what is patched in.

    Args:
        wiring: Of the model.
        pairs: The pairs.
        options: Ablation and batch size.
        done: The cost of the passes is added.
    """
    device = next(wiring.model.parameters()).device
    means: dict[int, Recorded] = {}
    for places in pairs.batches(options.batch_size):
        chosen = pairs.take(places)
        ids = torch.tensor(chosen.clean, device=device)
        length = ids.shape[1]
        if options.ablation == "counterfactual":
            other = record(wiring, torch.tensor(chosen.corrupted, device=device))
            done.append(Cost(forwards=len(places)))
        else:
            if length not in means:
                means[length] = _constant(wiring, pairs, length, options, done)
            other = means[length].expanded(len(places))
        yield Batch(places, chosen, ids, other)


def _constant(wiring: Wiring, pairs: PromptPairs, length: int, options: CircuitOptions, done: list[Cost]) -> Recorded:
    """The mean run over all clean prompts of a length, or nothing at all, as the run of one sample."""
    device = next(wiring.model.parameters()).device
    group = [ids for ids in pairs.clean if len(ids) == length]
    if options.ablation == "zero":
        shown = record(wiring, torch.tensor(group[:1], device=device))
        done.append(Cost(forwards=1))
        return Recorded(torch.zeros_like(shown.writes), [torch.zeros_like(one) for one in shown.streams])
    writes: Tensor | None = None
    streams: list[Tensor] = []
    for start in range(0, len(group), options.batch_size):
        shown = record(wiring, torch.tensor(group[start : start + options.batch_size], device=device))
        sums = shown.writes.sum(1, keepdim=True)
        parts = [precise(one).sum(0, keepdim=True) for one in shown.streams]
        writes = sums if writes is None else writes + sums
        streams = parts if not streams else [old + new for old, new in zip(streams, parts, strict=True)]
        done.append(Cost(forwards=len(shown.logits)))
    assert writes is not None
    return Recorded(writes / len(group), [one / len(group) for one in streams])


def measure(
    wiring: Wiring,
    pairs: PromptPairs,
    options: CircuitOptions,
    circuits: Sequence[Tensor],
    *,
    progress: Progress | None = None,
) -> tuple[Tensor, Cost]:
    """The metric of patched runs, one per circuit and pair.

    Args:
        wiring: Of the model, within :func:`wired`.
        pairs: The pairs.
        options: Metric and ablation.
        circuits: True where an edge is kept, each of shape ``[readers, writers]``.
        progress: Called with (runs done, runs in all).

    Returns:
        Values, shape ``[circuits, pairs]``, float64, and the passes.
    """
    values = torch.empty(len(circuits), len(pairs), dtype=torch.float64)
    done: list[Cost] = []
    whole, finished = wiring.graph.edges(), 0
    with torch.no_grad():
        for batch in batches(wiring, pairs, options, done):
            clean = patched_logits(wiring, batch.ids, whole, batch.other)
            for row, kept in enumerate(circuits):
                logits = clean if torch.equal(kept, whole) else patched_logits(wiring, batch.ids, kept, batch.other)
                values[row, batch.places] = options.value(logits, batch.pairs, clean).double().cpu()
                finished += len(batch.places)
                if progress is not None:
                    progress(finished, len(pairs) * len(circuits))
            runs = 1 + sum(not torch.equal(kept, whole) for kept in circuits)
            done.append(Cost(forwards=len(batch.places) * runs))
    return values, sum(done, Cost())


def edge_scores(
    wiring: Wiring,
    pairs: PromptPairs,
    options: CircuitOptions,
    *,
    method: Method = "eap_ig_inputs",
    steps: int = 5,
    progress: Progress | None = None,
) -> tuple[Tensor, Cost]:
    """Scores of all edges, the mean over the pairs; see :func:`~lightning_goldy.analysis.circuits.find_circuits`.

    Returns:
        Shape ``[readers, writers]``, float64, 0 where there is no edge, and the passes.
    """
    if method == "exact":
        return _exact(wiring, pairs, options, progress)
    total = torch.zeros(len(wiring.graph.readers), len(wiring.graph.writers), dtype=torch.float64)
    done: list[Cost] = []
    estimate = _eap_ig_activations if method == "eap_ig_activations" else _eap_ig_inputs
    finished = 0
    for batch in batches(wiring, pairs, options, done):
        size = len(batch.places)
        if method in ("eap", "nodes"):
            total += _eap(wiring, batch, options).cpu()
            done.append(Cost(size, size))
        else:
            found, passes = estimate(wiring, batch, options, steps)
            total += found.cpu()
            done.append(Cost(size * (passes + 1), size * passes))
        finished += size
        if progress is not None:
            progress(finished, len(pairs))
    scores = total / len(pairs)
    return (by_nodes(wiring.graph.owners, scores) if method == "nodes" else scores), sum(done, Cost())


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
    wiring: Wiring, pairs: PromptPairs, options: CircuitOptions, progress: Progress | None
) -> tuple[Tensor, Cost]:
    whole = wiring.graph.edges()
    places = whole.nonzero().tolist()
    circuits = [whole]
    for row, column in places:
        circuits.append(whole.clone())
        circuits[-1][row, column] = False
    values, cost = measure(wiring, pairs, options, circuits, progress=progress)
    scores = torch.zeros(whole.shape, dtype=torch.float64)
    lost = (values[:1] - values[1:]).mean(1)
    scores[whole] = lost
    return scores, cost
