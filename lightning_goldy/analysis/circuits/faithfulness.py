"""How much of a behaviour a circuit keeps when everything outside of it is patched: at any size, and step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from numbers import Real
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import interval_of, per_sample, resampled, too_few
from lightning_goldy.analysis.attribution.path import ChangePath
from lightning_goldy.analysis.circuits.circuit import (
    Circuit,
    CircuitOverlap,
    Rank,
    Selection,
    check_groups,
    circuit_overlap,
    find_circuits,
    of_one_graph,
)
from lightning_goldy.analysis.circuits.nulls import NULLS, NullName, null_circuits, null_shares
from lightning_goldy.analysis.circuits.runs import (
    Ablation,
    CircuitOptions,
    Metric,
    MetricName,
    Progress,
    measure,
    wired,
)
from lightning_goldy.analysis.circuits.scores import Method
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.base import Base
from lightning_goldy.core.naming import require_at_least, require_choice, require_number
from lightning_goldy.core.pieces import PromptPairs
from lightning_goldy.core.sharding import Replicas

SHARES = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Sizes of a curve, as shares of all edges; none and all are known."""


@dataclass(frozen=True)
class Faithfulness(AnalysisResult):
    """What circuits of one ranking keep of a behaviour.

    Args:
        sizes: Numbers of edges, ascending.
        n_edges: Of the whole graph.
        values: By size the share of the metric's span between everything patched (0) and nothing (1) that is kept.
        complements: By size the same of all edges but the circuit's: near 0 where the circuit is complete.
        random: By size of random circuits as large, shape ``[sizes, circuits]``; ``[sizes, 0]`` without.
        joined: The same of random circuits whose every edge lies on a path from the input to the output.
        exchanged: The same of the circuit with the heads of every block exchanged; ``[sizes, 0]`` where none can be.
        shuffled: The same of the circuit with its edges drawn anew between the same layers.
        others: The same of the circuits of other tasks, shape ``[sizes, tasks]``.
        other_tasks: Their names.
        choices: By size of the circuits chosen without each group of the choosing pairs, shape ``[sizes, groups]``.
        clean: The metric of the whole model, mean over the pairs.
        patched: The metric with every edge patched.
        n_pairs: Pairs of prompts.
        intervals: By size the 95 % bootstrap interval of its value over the pairs that measure, the edges as they were
            chosen; none where there is one pair.
        span: That of what patching everything loses, ``clean - patched``; None where there is one pair.
        margins: By size the 95 % bootstrap interval of what the circuit keeps beyond the mean of its hardest null, over
            the same pairs; none where there is one pair or no null.
        n_shared: Pairs whose prompt is one of those that chose the edges; None where these are not known.
        metric: Name of the metric.
        ablation: What patched edges bring.
        cost: Passes.
        area_pairs: What the area is of each pair.
    """

    analysis: ClassVar[str] = "faithfulness"

    sizes: tuple[int, ...]
    n_edges: int
    values: tuple[float, ...]
    complements: tuple[float, ...]
    random: Tensor
    clean: float
    patched: float
    n_pairs: int = 1
    intervals: tuple[tuple[float, float], ...] = ()
    span: tuple[float, float] | None = None
    margins: tuple[tuple[float, float], ...] = ()
    n_shared: int | None = None
    metric: str = "the metric"
    ablation: str = ""
    cost: Cost = field(default=Cost(), compare=False)
    joined: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))
    exchanged: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))
    shuffled: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))
    others: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))
    other_tasks: tuple[str, ...] = ()
    choices: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))
    area_pairs: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def value(self) -> float:
        """That of the largest circuit."""
        return self.values[-1]

    @property
    def completeness(self) -> float:
        """One less what the complement of the largest circuit keeps: 1 where nothing is left outside of it."""
        return 1 - self.complements[-1]

    @property
    def area(self) -> float:
        r"""Area under the curve over the share of edges, from none (0) to all (1), by trapezoids.

        .. math:: A = \int_0^1 f(k) \, dk

        Above 1 where small circuits do better than the model.
        """
        return self._area(self.values, lambda value: value)

    @property
    def distance(self) -> float:
        r"""Area between the curve and 1, :math:`\int_0^1 |1 - f(k)| \, dk`: 0 where no edge is needed."""
        return self._area(self.values, lambda value: abs(1 - value))

    @property
    def random_area(self) -> float:
        """Area of the random circuits' mean; NaN without."""
        return self._mean_area(self.random)

    @property
    def joined_area(self) -> float:
        """Area of the joined random circuits' mean; NaN without."""
        return self._mean_area(self.joined)

    @property
    def exchanged_area(self) -> float:
        """Area of the mean of circuits with exchanged heads; NaN without."""
        return self._mean_area(self.exchanged)

    def _mean_area(self, null: Tensor) -> float:
        return self._area(null.mean(1).tolist(), lambda value: value) if null.numel() else math.nan

    def nulls(self) -> list[tuple[str, Tensor]]:
        """What the circuit has to beat, with what each keeps by size: the hardest first, by its mean at the largest."""
        held = [(short, getattr(self, name)) for name, (short, _) in NULLS.items()]
        held += [(f"circuit of {task}", self.others[:, [place]]) for place, task in enumerate(self.other_tasks)]
        known = [(name, null) for name, null in held if null.numel() and not null[-1].isnan().any()]
        return sorted(known, key=lambda named: -float(named[1][-1].mean()))

    def band(self, share: float = 0.9, *, null: NullName = "random") -> list[tuple[float, float]]:
        """By size the range that holds a share of the circuits of a null; empty without."""
        values: Tensor = getattr(self, null)
        if not values.numel():
            return []
        edges = torch.tensor([(1 - share) / 2, (1 + share) / 2], dtype=torch.float64)
        return [(low, high) for low, high in values.double().quantile(edges, dim=1).T.tolist()]

    @property
    def choice_errors(self) -> tuple[float, ...]:
        r"""By size the standard error that comes of which pairs chose the edges; none where no group was left out.

        .. math:: \sqrt{\tfrac{G - 1}{G} \sum_g (f_g - \bar f)^2}

        the jackknife's, of G groups of the choosing pairs.
        """
        if not self.choices.numel():
            return ()
        groups = self.choices.shape[1]
        return tuple((self.choices.std(1, unbiased=False) * math.sqrt(groups - 1)).tolist())

    @property
    def wide_intervals(self) -> tuple[tuple[float, float], ...]:
        """By size the 95 % interval over pairs that measure and pairs that choose, by their added variances."""
        if not self.intervals or not self.choice_errors:
            return ()
        found = []
        for value, (low, high), error in zip(self.values, self.intervals, self.choice_errors, strict=True):
            more = 1.96 * error
            found.append((value - math.hypot(value - low, more), value + math.hypot(high - value, more)))
        return tuple(found)

    @property
    def wide_margins(self) -> tuple[tuple[float, float], ...]:
        """By size the margin's interval over pairs that measure and, where it is known, pairs that choose."""
        errors, found = self.choice_errors or (0.0,) * len(self.margins), []
        for place, ((low, high), error) in enumerate(zip(self.margins, errors, strict=True)):
            middle, more = self._margin(place), 1.96 * error
            found.append((middle - math.hypot(middle - low, more), middle + math.hypot(high - middle, more)))
        return tuple(found)

    def _margin(self, place: int) -> float:
        """What a size keeps beyond the mean of its hardest null."""
        return self.values[place] - max(float(null[place].mean()) for _, null in self.nulls())

    def area_under(self, values: Sequence[float], whole: float) -> float:
        """Area under a curve of these sizes that ends at ``whole`` with all edges.

        Args:
            values: By size.
            whole: With all edges.
        """
        return self._area(values, lambda value: value, whole)

    def _area(self, values: Sequence[float], of: Any, whole: float = 1.0) -> float:
        known = {0: of(0.0), **{size: of(value) for size, value in zip(self.sizes, values, strict=True)}}
        known[self.n_edges] = of(whole)
        places = sorted(known)
        steps = pairwise(places)
        return sum((b - a) * (known[a] + known[b]) / 2 for a, b in steps) / self.n_edges

    def metrics(self) -> dict[str, float | None]:
        """Faithfulness and completeness of the largest circuit, areas, and the random circuits' mean."""
        low, high = self.intervals[-1] if self.intervals else (None, None)
        told = {
            "faithfulness": self.value,
            "faithfulness_low": low,
            "faithfulness_high": high,
            **{f"faithfulness_{name}": self._mean_of(name) for name in NULLS},
            "faithfulness_other_task": float(self.others[-1].max()) if self.others.numel() else None,
            "faithfulness_choice_error": self.choice_errors[-1] if self.choice_errors else None,
            "completeness": self.completeness,
            "area": self.area,
            "area_random": self.random_area,
            "area_joined": self.joined_area,
            "area_exchanged": self.exchanged_area,
            "area_shuffled": self._mean_area(self.shuffled),
            "distance": self.distance,
        }
        return {name: None if value is None or math.isnan(value) else value for name, value in told.items()}

    def _mean_of(self, null: NullName) -> float | None:
        values: Tensor = getattr(self, null)
        return float(values[-1].mean()) if values.numel() else None

    def details(self) -> dict[str, Any]:
        """The curve with its nulls and their bands, the hardest of them by name."""
        lists = {name: list(getattr(self, name)) for name in ("sizes", "values", "complements")}
        names = ("n_edges", "clean", "patched", "n_pairs", "n_shared", "metric", "ablation")
        told = {name: getattr(self, name) for name in names} | {"absent": self.absent(), "weak": self.weak()}
        ranges = {
            "band": self.band(),
            "joined_band": self.band(null="joined"),
            "exchanged_band": self.band(null="exchanged"),
            "shuffled_band": self.band(null="shuffled"),
            "intervals": self.intervals,
            "wide_intervals": self.wide_intervals,
            "margins": self.margins,
            "wide_margins": self.wide_margins,
        }
        spans = {name: [list(pair) for pair in held] for name, held in ranges.items()}
        pairs = {} if self.area_pairs is None else {"per_sample": {"area": self.area_pairs}}
        nulls: dict[str, Any] = {}
        for name in NULLS:
            null = getattr(self, name)
            nulls[name] = null.mean(1).tolist() if null.numel() else []
        nulls["others"] = {task: self.others[:, place].tolist() for place, task in enumerate(self.other_tasks)}
        nulls["hardest"] = next((name for name, _ in self.nulls()), "")
        return {**lists, **told, **nulls, **spans, "span": list(self.span or ()), **pairs}

    def absent(self) -> str:
        """Why there may be no behaviour to keep any share of; empty where the prompts show it."""
        if not self.clean > self.patched:
            return (
                f"the model does not show the behaviour on these prompts: {self.metric} is {self.clean:.3g}, and "
                f"{self.patched:.3g} with everything patched"
            )
        if self.span is not None and self.span[0] <= 0:
            return (
                f"whether these prompts show the behaviour is open: what patching everything loses in {self.metric}, "
                f"{self.clean - self.patched:.3g} [{self.span[0]:.3g}, {self.span[1]:.3g}], may be 0"
            )
        return ""

    def weak(self) -> str:
        """Why what the largest circuit keeps says nothing; empty where nothing speaks against it."""
        if absent := self.absent():
            return absent
        kinds = dict(NULLS.values())
        if self.margins:
            # Of the hardest: what it keeps on average, and then what the same pairs keep beyond it.
            bars = [(name, float(null[-1].mean()), 0.0) for name, null in self.nulls()[:1]]
            least = self.wide_margins[-1][0]
        else:
            bars = [(name, float(null[-1].max()), float(null[-1].max())) for name, null in self.nulls()]
            least = next((low for low, _ in (self.wide_intervals or self.intervals)[-1:]), math.inf)
        for name, most, _ in bars:
            if self.value <= most:
                return f"no more than {kinds.get(name, f'the {name}')}"
        for name, _, most in bars:
            if least <= most:
                return f"the interval reaches what {kinds.get(name, f'the {name}')} keeps"
        return too_few(self.n_pairs, "pairs of prompts")

    def headline(self) -> str:
        """What the largest circuit keeps, with its interval, beside its nulls from the hardest on, and what is weak."""
        weak = self.weak()
        return self.summary() + (f"; WEAK: {weak}" if weak else "")

    def summary(self) -> str:
        """The headline without its doubts."""
        if math.isnan(self.value):
            return f"what {self.sizes[-1]} of {self.n_edges} edges keep of the behaviour cannot be told{self._source()}"
        told_nulls = [f", {name} {float(null[-1].mean()):.2f}" for name, null in self.nulls()]
        for low, high in self.margins[-1:]:
            told_nulls[0] += f" (less by [{low:.2f}, {high:.2f}])"
        chance = "".join(told_nulls)
        told = f"{self.value:.2f} of the behaviour (no interval: one pair)"
        if self.intervals:
            low, high = self.intervals[-1]
            told = f"{self.value:.2f} [{low:.2f}, {high:.2f}] of the behaviour over {self.n_pairs} pairs"
            for low, high in self.wide_intervals[-1:]:
                told += f", [{low:.2f}, {high:.2f}] with the choice of the edges"
        return (
            f"{self.sizes[-1]} of {self.n_edges} edges keep {told}{chance}; without them {self.complements[-1]:.2f} is "
            f"left{self._source()}"
        )

    def _source(self) -> str:
        if self.n_shared is None:
            return ""
        if not self.n_shared:
            fixed = "" if self.wide_intervals or not self.intervals else "; the interval leaves out their choice"
            return f"; on other prompts than chose the edges{fixed}"
        some = "the" if self.n_shared == self.n_pairs else f"prompts {self.n_shared} of which are among the"
        return f"; on {some} prompts that chose the edges, which flatters"


class FlatMetricError(ValueError):
    """A metric is the same with nothing and with everything patched, so that no share of it can be told.

    Args:
        message: The metric and its value.
        value: Its value.
        cost: Passes that found it.
    """

    def __init__(self, message: str, value: float, cost: Cost) -> None:
        super().__init__(message)
        self.value, self.cost = value, cost


def faithfulness(
    model: nn.Module,
    circuit: Circuit,
    pairs: PromptPairs,
    metric: Metric | None = None,
    *,
    sizes: Sequence[int | float] | None = (),
    select: Selection = "top",
    rank: Rank = "magnitude",
    ablation: Ablation | None = None,
    n_random: int = 10,
    others: Mapping[str, Circuit] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    progress: Progress | None = None,
    split_over_ranks: bool = True,
) -> Faithfulness:
    r"""Runs the model with every edge outside a circuit patched, and says what remains of a behaviour.

    .. math:: f(C) = \frac{m(C) - m(\varnothing)}{m(\text{all}) - m(\varnothing)}

    of metrics averaged over the pairs: 1 for the whole graph and 0 for the empty one, exactly. Not bounded: edges that
    work against the behaviour, left out, give more than 1. Random circuits of the same size stand beside it, and
    random ones whose every edge lies on a path from the input to the output, as hardly any of few random edges does.
    Harder to beat are the circuit itself with the heads of every block exchanged (:func:`exchanged_circuits`), which
    asks whether it matters which heads these are, or with its edges drawn anew between the same layers
    (:func:`shuffled_circuits`), which asks whether more than their depth does, and the circuits of other tasks, which
    ask whether it is this behaviour that they carry, or what any task needs.
    Where the circuit has scores without groups of its pairs, the circuits that these would choose are measured, too.

    Args:
        model: A causal language model; it comes back as it was.
        circuit: Of :func:`find_circuits`.
        pairs: Clean and corrupted prompts; best others than the circuit was found on.
        metric: See :class:`CircuitOptions`; by default the one that chose the edges.
        sizes: Of a curve: numbers of edges, or shares of all below 1, chosen by the circuit's scores; None for
            ``SHARES``; empty for the circuit itself alone.
        select: How a curve's edges are chosen.
        rank: By which order.
        ablation: What patched edges bring; by default what they brought when they were scored.
        n_random: Random circuits of each kind per size; 0 for none.
        others: Circuits of other tasks by name, of the same model; of each as many edges are chosen in the same way.
        seed: Of the random ones.
        batch_size: Pairs per pass.
        progress: Called with (runs done, runs in all).
        split_over_ranks: Whether to share pairs out over the ranks of an initialised process group; all must call.

    Returns:
        The share that is kept, by size, with its interval over the pairs.

    Raises:
        ValueError: A size is out of range, the circuit is of another graph, or its metric is a function, which has to
            be given.
        FlatMetricError: The metric is the same with everything and with nothing patched, so that nothing can be told.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.analysis.circuits import find_circuits
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16))
        >>> pairs = PromptPairs(((3, 4, 5),), ((3, 6, 5),), ((4,),), ((6,),))
        >>> circuit = find_circuits(model, pairs, n_edges=46)
        >>> faithfulness(model, circuit, pairs, n_random=0).value
        1.0
    """
    require_at_least("n_random", n_random, 0)
    options = CircuitOptions(*_as_scored(circuit, metric, ablation), batch_size)
    how: dict[str, Any] = {"select": select, "rank": rank}
    ranked = [circuit.chosen(n_edges=count, **how) for count in _counts(circuit, sizes)] or [circuit]
    whole, others = circuit.graph.edges(), of_one_graph(circuit, others or {})
    rivals = [*others.values()], circuit.without_groups()
    beside = [
        [*null_circuits(circuit.graph, sized.kept, n_random, seed), *_chosen_like(sized, rivals, how)]
        for sized in ranked
    ]
    tried, counted = [whole, torch.zeros_like(whole)], [1, 1, *map(len, beside[0])]
    for sized, kinds in zip(ranked, beside, strict=True):
        tried += [sized.kept, whole & ~sized.kept, *chain.from_iterable(kinds)]
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    with replicas.together("faithfulness"), wired(model, pairs, options, circuit.graph) as wiring:
        values, cost = measure(wiring, pairs, options, tried, progress=progress, replicas=replicas)
    clean, patched, *means = values.mean(1).tolist()
    _require_a_difference(clean, patched, options, cost)
    # The added 0 makes a 0 of -0.
    shares = torch.tensor(means, dtype=torch.float64).sub(patched).div(clean - patched).add(0.0).view(len(ranked), -1)
    own, complements, *kept_by = shares.split(counted, 1)
    result = Faithfulness(
        sizes=tuple(sized.n_edges for sized in ranked),
        n_edges=circuit.graph.n_edges,
        values=tuple(own[:, 0].tolist()),
        complements=tuple(complements[:, 0].tolist()),
        **null_shares(kept_by, circuit.graph, [sized.kept for sized in ranked], beside),
        other_tasks=tuple(others),
        clean=clean,
        patched=patched,
        n_pairs=len(pairs),
        intervals=_intervals(values[:2], values[2 :: sum(counted)]),
        span=None if len(pairs) < 2 else _span(values[0] - values[1]),
        n_shared=_shared(circuit, pairs),
        metric=options.metric_name,
        ablation=options.ablation,
        cost=cost,
    )
    margins = _margins(result, values[:2], values[2:].view(*shares.shape, -1), counted)
    return replace(result, margins=margins, area_pairs=_area_pairs(result, values, sum(counted), pairs))


def _require_a_difference(clean: float, patched: float, options: CircuitOptions, cost: Cost) -> None:
    if clean == patched:
        raise FlatMetricError(
            f"{options.metric_name} is {clean:.4g} with nothing and with everything patched: the pairs do not tell the "
            "behaviour from its absence",
            clean,
            cost,
        )


def _area_pairs(result: Faithfulness, values: Tensor, per_size: int, pairs: PromptPairs) -> dict[str, Any] | None:
    """Of each pair the area under its own curve."""
    spans = (values[0] - values[1]).tolist()
    kept = (values[2::per_size] - values[1]).T.tolist()
    areas = [result.area_under(row, span) for row, span in zip(kept, spans, strict=True)]
    return per_sample(pairs.digests(), areas, spans)


def _chosen_like(sized: Circuit, rivals: Iterable[Sequence[Circuit]], how: Mapping[str, Any]) -> list[list[Tensor]]:
    """As many edges of other circuits, chosen in the same way, by kind of these."""
    return [[rival.chosen(n_edges=sized.n_edges, **how).kept for rival in kind] for kind in rivals]


def _as_scored(circuit: Circuit, metric: Metric | None, ablation: Ablation | None) -> tuple[Metric, Ablation]:
    """Metric and ablation, by default those that a circuit was found with."""
    known: Any = circuit.metric
    if metric is None and known not in get_args(MetricName):
        raise ValueError(f"the circuit was found with a function, {known!r}: give metric=, this or another")
    patched: Any = circuit.ablation
    return known if metric is None else metric, patched if ablation is None else ablation


def _span(losses: Tensor) -> tuple[float, float]:
    """The middle 95 % of the mean of pairs that are drawn anew."""
    return interval_of(resampled(len(losses)) @ losses / len(losses))


def _shared(circuit: Circuit, pairs: PromptPairs) -> int | None:
    return sum(digest in circuit.prompts for digest in pairs.digests()) if circuit.prompts else None


def _intervals(ends: Tensor, kept: Tensor) -> tuple[tuple[float, float], ...]:
    """The middle 95 % of what circuits keep when the pairs are drawn anew; none of a single pair.

    Args:
        ends: The metric of the whole and of the empty graph, shape ``[2, pairs]``.
        kept: Of the circuits, shape ``[circuits, pairs]``.
    """
    if kept.shape[1] < 2:
        return ()
    counts, (clean, patched) = resampled(kept.shape[1]), ends
    spans = counts @ (clean - patched)
    return tuple(interval_of((counts @ (one - patched)) / spans + 0.0) for one in kept)


def _margins(
    found: Faithfulness, ends: Tensor, values: Tensor, counted: Sequence[int]
) -> tuple[tuple[float, float], ...]:
    """By size the interval of what a circuit keeps beyond its hardest null, the pairs of both drawn anew together.

    Args:
        found: What circuits and nulls keep.
        ends: The metric of the whole and of the empty graph, shape ``[2, pairs]``.
        values: Of each size's circuits, shape ``[sizes, circuits, pairs]``.
        counted: Of these circuits how many are of each kind: the own, its complement, then each null, then choices.
    """
    _, _, *kinds, others, _ = values.split(list(counted), 1)
    held = [*zip((getattr(found, name) for name in NULLS), kinds, strict=True)]
    held += [(found.others[:, [place]], others[:, [place]]) for place in range(others.shape[1])]
    known = [pair for pair in held if pair[0].numel() and not pair[0].isnan().any()]
    if not known or values.shape[2] < 2:
        return ()
    margins: list[tuple[float, float]] = []
    for place, own in enumerate(values[:, 0]):
        _, hardest = max(known, key=lambda pair: float(pair[0][place].mean()))
        margins += _intervals(ends, (own - hardest[place].mean(0) + ends[1])[None])
    return tuple(margins)


def _counts(circuit: Circuit, sizes: Sequence[int | float] | None) -> list[int]:
    whole = circuit.graph.n_edges
    counts = []
    if isinstance(sizes, (str, int, float)):
        raise ValueError(f"sizes is a list of numbers of edges or of shares; got {sizes!r}")
    for size in SHARES if sizes is None else sizes:
        require_number("a size", size)
        count = round(size * whole) if isinstance(size, float) else size
        if size < 0 or not 0 <= count <= whole or (isinstance(size, float) and size > 1):
            raise ValueError(f"sizes are numbers of edges up to {whole}, or shares between 0 and 1; got {size!r}")
        counts.append(max(1, count) if size else 0)
    return sorted(set(counts))


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
        n_random: Random circuits of each kind per size.
        n_groups: Groups of the choosing pairs that are left out in turns; see :func:`find_circuits`.
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
    n_groups: int = 0

    def __post_init__(self) -> None:
        _ = self.patching
        for what, value, valid in (
            ("method", self.method, get_args(Method)),
            ("select", self.select, get_args(Selection)),
            ("rank", self.rank, get_args(Rank)),
        ):
            require_choice(what, value, valid)
        require_at_least("steps", self.steps, 1)
        require_at_least("n_random", self.n_random, 0)
        check_groups(self.n_groups)
        if isinstance(self.sizes, str) or not isinstance(self.sizes, Iterable):
            raise ValueError(f"sizes is a list of shares of all edges; got {self.sizes!r}")
        for name, shares in (("share is a share", (self.share,)), ("sizes are shares", self.sizes)):
            for share in shares:
                if isinstance(share, bool) or not isinstance(share, Real) or not 0 < share <= 1:
                    raise ValueError(f"{name} of all edges, above 0 and at most 1; got {share!r}")
        if not self.sizes:
            raise ValueError("sizes is empty: name at least one share of the edges")
        if self.metric == "kl" and self.method in ("eap", "nodes"):
            raise ValueError(f"kl has no slope at the clean run, where method {self.method!r} takes it")

    @property
    def patching(self) -> CircuitOptions:
        """What edges are patched with, and what that is measured by."""
        return CircuitOptions(self.metric, self.ablation, self.batch_size)

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
            n_groups=self.n_groups,
            progress=progress,
        )
        count = max(1, round(self.share * scored.graph.n_edges))
        chosen = scored.chosen(n_edges=count, select=self.select, rank=self.rank)
        return Circuit(**{**vars(chosen), "cost": scored.cost})

    def find_at_base(
        self,
        model: nn.Module,
        base: Base,
        pairs: PromptPairs,
        progress: Callable[[int, int], None] | None = None,
    ) -> Circuit:
        """The circuit of a model's base, of the merged weights where it has adapters; the model comes back as it was.

        Args:
            model: The finetuned model.
            base: Anything that :func:`~lightning_goldy.core.base.base_of` takes.
            pairs: Clean and corrupted prompts.
            progress: Called with (pairs done, pairs in all).
        """
        with ChangePath(model, base) as path:
            path.move_to(0.0)
            return self.find(model, pairs, progress)


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
            told[f"faithfulness_{100 * share:g}_percent".replace(".", "_")] = None if math.isnan(value) else value
        curve, overlap = self.curve.metrics(), {} if self.overlap is None else self.overlap.metrics()
        whole = ("faithfulness", "distance")
        told |= {name: value for name, value in curve.items() if name not in whole}
        told |= {"metric_clean": self.circuit.clean, "metric_patched": self.circuit.patched}
        told |= {name: overlap[name] for name in ("overlap", "overlap_by_chance", "rank_correlation") if overlap}
        if overlap.get("overlap_noise") is not None:
            told["overlap_noise"] = overlap["overlap_noise"]
        return told | {f"node/{name}": score for name, score in self.circuit.node_scores().items()}

    def details(self) -> dict[str, Any]:
        """The circuit, the curve and the overlap."""
        overlap = None if self.overlap is None else {**self.overlap.details(), **self.overlap.metrics()}
        return {**self.circuit.details(), "curve": self.curve.details(), "overlap": overlap}

    def headline(self) -> str:
        """What the largest size keeps, and of which circuit."""
        weak, kept, overlap = self.curve.weak(), "", self.overlap
        if overlap is not None:
            noise = "" if overlap.noise is None else f", {overlap.noise:.2f} between two seeds"
            kept = f"{overlap.intersection_over_union:.2f} ({overlap.by_chance:.2f} by chance{noise})"
            kept = f"; overlap with the base's {kept}"
        doubt = f"; WEAK: {weak}" if weak else ""
        return f"{self.curve.summary()}; {self.circuit.headline()}{kept}{doubt}"


def track_circuit(
    model: nn.Module,
    pairs: PromptPairs,
    options: TrackingOptions = TrackingOptions(),
    *,
    held_out: PromptPairs | None = None,
    others: Mapping[str, PromptPairs] | None = None,
    base: Circuit | None = None,
    seed: Circuit | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TrackedCircuit:
    """Finds a model's circuit, measures what it keeps, and compares it with an earlier one.

    Where the metric is the same with nothing and with everything patched, there is no behaviour to keep a share of:
    every share is NaN, and the headline says why.

    Args:
        model: A causal language model; it comes back as it was.
        pairs: Clean and corrupted prompts.
        options: The same at every step.
        held_out: Pairs that measure what the circuit keeps; by default those that chose it, which flatters it.
        others: Pairs of other tasks by name; the circuit of each is found in the same way, which costs another search,
            and stands beside this one.
        base: The circuit of what the model was.
        seed: That of a finetune that differs in its seed alone; its overlap with the model's is the noise of that.
        progress: Called with (pairs done, pairs in all).

    Returns:
        The circuit, its faithfulness and its overlap.

    Raises:
        ValueError: The pairs lack what the metric needs, or a value is not finite.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=11, n_positions=16))
        >>> pairs = PromptPairs(((3, 4, 5),), ((3, 6, 5),), ((4,),), ((6,),))
        >>> found = track_circuit(model, pairs, TrackingOptions(sizes=(1.0,)))
        >>> found.metrics()["faithfulness_100_percent"]
        1.0
    """
    circuit = options.find(model, pairs, progress)
    alone = replace(options, n_groups=0)
    rivals = {task: alone.find(model, held, progress) for task, held in (others or {}).items()}
    n_edges = circuit.graph.n_edges
    counts = sorted({max(1, round(share * n_edges)) for share in options.sizes})
    measuring = pairs if held_out is None else held_out
    settings: dict[str, Any] = {name: getattr(options, name) for name in ("select", "rank", "ablation", "n_random")}
    try:
        curve = faithfulness(
            model,
            circuit,
            measuring,
            options.metric,
            sizes=counts,
            batch_size=options.batch_size,
            others=rivals,
            **settings,
        )
        curve = replace(curve, cost=sum((rival.cost for rival in rivals.values()), curve.cost))
    except FlatMetricError as flat:
        curve = _flat(circuit, counts, options, measuring, flat)
    shares = {max(1, round(share * n_edges)): share for share in sorted(options.sizes, reverse=True)}
    overlap = None if base is None else circuit_overlap(base, circuit, seed=seed)
    return TrackedCircuit(circuit, curve, tuple(shares[count] for count in counts), overlap)


def _flat(
    circuit: Circuit, counts: Sequence[int], options: TrackingOptions, pairs: PromptPairs, flat: FlatMetricError
) -> Faithfulness:
    """The curve of a model without the behaviour: no share of it can be told."""
    chosen = (circuit.chosen(n_edges=count, select=options.select, rank=options.rank) for count in counts)
    unknown = (math.nan,) * len(counts)
    nothing = torch.full((len(counts), options.n_random), math.nan, dtype=torch.float64)
    return Faithfulness(
        sizes=tuple(one.n_edges for one in chosen),
        n_edges=circuit.graph.n_edges,
        values=unknown,
        complements=unknown,
        random=nothing,
        joined=nothing,
        exchanged=nothing,
        shuffled=nothing,
        clean=flat.value,
        patched=flat.value,
        n_pairs=len(pairs),
        n_shared=_shared(circuit, pairs),
        metric=circuit.metric,
        ablation=circuit.ablation,
        cost=flat.cost,
    )
