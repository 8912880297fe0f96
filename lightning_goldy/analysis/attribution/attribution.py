"""Change attribution: which parameters carry what a finetune did to a metric, by integrating its gradient."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import interval_of, per_sample, resampled, too_few
from lightning_goldy.analysis.attribution.path import ChangePath, Measure, Metric, MetricName, Passage, passages
from lightning_goldy.analysis.attribution.units import (
    HeadSums,
    intervals_over,
    levels_of,
    margins_of,
    mask_links,
    model_units,
    strongest,
    unit_row,
)
from lightning_goldy.analysis.divergence import precise
from lightning_goldy.analysis.gradients import (
    backward,
    gradient_part,
    only_these_require_gradients,
    zeros_like_parts,
)
from lightning_goldy.analysis.result import AnalysisResult, Cost, tensor_rows
from lightning_goldy.core.architecture.adapters import WeightSpace
from lightning_goldy.core.base import Base
from lightning_goldy.core.batches import move_batch, sample_count, sample_keys
from lightning_goldy.core.files import percentage
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.mask import ParameterMask, require_masks
from lightning_goldy.core.naming import (
    block_of,
    kind_of,
    require_at_least,
    require_choice,
    require_fractions,
    require_number,
)
from lightning_goldy.core.objective import FunctionObjective, Objective, objective_for
from lightning_goldy.core.sharding import (
    Replicas,
    gather,
    inside_parallel,
    is_sharded,
    like,
    sum_over_shards,
    unshard_guard,
)
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import ParameterVector

METRICS: tuple[str, ...] = get_args(MetricName)
AUTO_NODES = (4, 8, 16, 32, 64)
"""Numbers of nodes that ``nodes="auto"`` tries until the sum is complete."""
SHARES = (0.001, 0.01, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class ChangeAttributionResult(AnalysisResult):
    r"""What each parameter's change did to a metric.

    Args:
        metric: ``loss``, ``log_prob``, ``kl`` or ``function``.
        base_value: The metric at the base.
        value: The metric now.
        names: The parameters.
        contributions: Of each passage and parameter, shape ``[passages, parameters]``, float64; they add up to
            :attr:`total`.
        weights: What each passage counts for, shape ``[passages]``; they add up to 1.
        units: Sums by unit; rows of ``kind``, ``place`` and ``values``, of heads and key/value groups also
            ``passages``, the same of each passage, shape ``[passages, units]``.
        numels: Elements of each parameter.
        squared_changes: ||Delta||^2 of each parameter.
        n_samples: Samples.
        n_nodes: Nodes of the quadrature.
        tolerance: The gap that was asked for, a fraction.
        shares: Shares of all elements for which the strongest are known, ascending fractions.
        levels: Of each element the first of the shares whose strongest hold it, or their number where none does; uint8.
        scores: Of each element what it contributes; None unless asked for.
        interactions: Of each block, where asked for, its ``contribution``, the exact effect of its change ``alone``,
            and what goes where it is ``removed`` from the whole change, each of both with ``_low`` and ``_high``, its
            95 % interval over passages. All three agree where blocks do not interact.
        interaction_interval: That of :attr:`interaction`; None of a single passage.
        links: Of each mask that was given what it has to do with the contributions; see :func:`mask_links`.
        space: ``merged`` or ``adapters``; None of a model without adapters.
        cost: Passes of the model.
        passages: What the change is of each passage.
        cause: Why the sum cannot be complete, and what to do, where that is known.
    """

    analysis: ClassVar[str] = "change_attribution"

    metric: str
    base_value: float
    value: float
    names: tuple[str, ...]
    contributions: Tensor
    weights: Tensor
    units: tuple[dict[str, Any], ...]
    numels: tuple[int, ...]
    squared_changes: tuple[float, ...]
    n_samples: int
    n_nodes: int
    tolerance: float
    shares: tuple[float, ...]
    levels: ParameterVector | None
    scores: ParameterVector | None
    interactions: tuple[dict[str, Any], ...] = ()
    interaction_interval: tuple[float, float] | None = None
    links: tuple[dict[str, Any], ...] = ()
    space: str | None = None
    cost: Cost = field(default=Cost(), compare=False)
    passages: dict[str, Any] | None = field(default=None, compare=False)
    cause: str = ""

    @property
    def change(self) -> float:
        """The metric now less at the base."""
        return self.value - self.base_value

    @property
    def total(self) -> float:
        """What all parameters contribute together; the change, but for the gap."""
        return float(self.contributions.sum())

    @property
    def gap(self) -> float | None:
        """|total - change| / |change|, a fraction; None where nothing changed."""
        return abs(self.total - self.change) / abs(self.change) if self.change else None

    @property
    def complete(self) -> bool:
        """Whether the gap is within the tolerance."""
        return self.gap is None or self.gap <= self.tolerance

    @property
    def change_interval(self) -> tuple[float, float] | None:
        """95 % bootstrap interval of :attr:`change` over passages; None of a single one, or where none is known."""
        if self.passages is None or len(self.weights) < 2:
            return None
        counts = resampled(len(self.weights))
        parts = torch.tensor(self.passages["numerators"], dtype=torch.float64)
        return interval_of((counts @ parts) / (counts @ self.weights))

    @property
    def weak(self) -> str:
        """Why shares of the change are none: too few passages, or a change that may be none; nothing where they are."""
        low, high = self.change_interval or (1.0, 1.0)
        nothing = low <= 0 <= high and any(self.squared_changes)
        open_ = "the interval of the change includes 0, so that shares of it tell nothing" if nothing else ""
        return too_few(len(self.weights), "passages") or open_

    @property
    def by_tensor(self) -> dict[str, float]:
        """What each parameter contributes."""
        return dict(zip(self.names, self.contributions.sum(0).tolist(), strict=True))

    @property
    def interaction(self) -> float | None:
        """Share of the change that no block makes alone, (change - sum of all alone) / change; None if not measured."""
        if not self.interactions or not self.change:
            return None
        return 1 - math.fsum(row["alone"] for row in self.interactions) / self.change

    def grouped(self, group: Callable[[str], str]) -> dict[str, float]:
        """What groups of parameters contribute.

        Args:
            group: Of a parameter's name, such as :func:`~lightning_goldy.core.naming.block_of`.
        """
        sums: dict[str, float] = {}
        for name, value in self.by_tensor.items():
            sums[group(name)] = sums.get(group(name), 0.0) + value
        return sums

    @property
    def by_block(self) -> dict[str, float]:
        """What each block contributes."""
        return self.grouped(block_of)

    @property
    def by_kind(self) -> dict[str, float]:
        """What attention, MLPs, norms, embeddings and the rest contribute."""
        return self.grouped(kind_of)

    def interval(self, group: Callable[[str], str], of: str, *, share: bool = False) -> tuple[float, float]:
        """95 % percentile bootstrap interval of what a group contributes, over the passages; of one passage a point.

        Args:
            group: Of a parameter's name.
            of: The group.
            share: Of its share of the total, instead.
        """
        wanted = torch.tensor([group(name) == of for name in self.names])
        part, whole = self.contributions[:, wanted].sum(1), self.contributions.sum(1)  # [passages]
        counts = resampled(len(part))  # [resamples, passages]
        return interval_of((counts @ part) / ((counts @ whole) if share else (counts @ self.weights)))

    def mask(self, share: float) -> ParameterMask:
        """The share of all elements that did most of the change: the largest contributions of the change's own sign.

        Args:
            share: One of :attr:`shares`; any in (0, 1] where the scores were kept.

        Raises:
            ValueError: It is another.
        """
        require_number("share", share)
        if self.levels is not None and share in self.shares:
            return ParameterMask.of_vector(self.levels.map(lambda level: level <= self.shares.index(share)))
        if self.scores is None and not any(self.squared_changes):
            raise ValueError("no parameter has changed, so none of the elements is strongest")
        if self.scores is None:
            raise ValueError(
                f"the strongest {share:g} of the elements were not kept: there are {list(self.shares)}; "
                "name it in shares=, or keep all scores with keep_scores=True"
            )
        return strongest(self.scores, self.change, require_fractions("share", [share])[0])

    def metrics(self) -> dict[str, float | None]:
        """The change, how complete its attribution is, and the share of each kind of parameter."""
        kinds = {f"share/{kind}": value / self.total if self.total else None for kind, value in self.by_kind.items()}
        return {
            "effect": self.change,
            "base_value": self.base_value,
            "value": self.value,
            "gap": self.gap,
            "n_nodes": float(self.n_nodes),
            **kinds,
            **({"interaction": self.interaction} if self.interactions else {}),
            **{f"inside/{row['mask']}": row["attribution"] for row in self.links},
            **{f"inside_null/{row['mask']}": row["null"] for row in self.links},
        }

    def details(self) -> dict[str, Any]:
        """Contributions by parameter, block, kind and unit, with intervals."""
        changes = math.fsum(self.squared_changes) or 1.0
        tensors = tensor_rows(
            self.names,
            numel=self.numels,
            contribution=self.by_tensor.values(),
            squared_change=[value / changes for value in self.squared_changes],
        )
        return {
            "metric": self.metric,
            "complete": self.complete,
            "tolerance": self.tolerance,
            "n_samples": self.n_samples,
            **({} if self.passages is None else {"per_sample": {"effect": self.passages}}),
            "n_passages": len(self.weights),
            **({"weak": self.weak} if self.weak else {}),
            **({"cause": self.cause} if self.cause else {}),
            "total": self.total,
            "tensors": tensors,
            "blocks": self._group_rows(block_of),
            "kinds": self._group_rows(kind_of),
            "units": [unit_row(unit, self.weights) for unit in self.units],
            "places": self._place_rows(),
            "interactions": list(self.interactions),
            **({} if self.change_interval is None else {"effect_interval": list(self.change_interval)}),
            **({} if self.interaction_interval is None else {"interaction_interval": list(self.interaction_interval)}),
            "links": list(self.links),
            **({} if self.space is None else {"space": self.space}),
        }

    def _group_rows(self, group: Callable[[str], str]) -> list[dict[str, Any]]:
        whole, changes = sum(self.numels), math.fsum(self.squared_changes) or 1.0
        rows = []
        for label, value in self.grouped(group).items():
            places = [place for place, name in enumerate(self.names) if group(name) == label]
            low, high, share_low, share_high = (None,) * 4
            if len(self.weights) > 1:
                low, high = self.interval(group, label)
                share_low, share_high = self.interval(group, label, share=True)
            rows.append(
                {
                    "group": label,
                    "contribution": value,
                    "low": low,
                    "high": high,
                    "share": value / self.total if self.total else None,
                    "share_low": share_low,
                    "share_high": share_high,
                    "elements": sum(self.numels[place] for place in places) / whole,
                    "squared_change": math.fsum(self.squared_changes[place] for place in places) / changes,
                }
            )
        return rows

    def _place_rows(self) -> list[dict[str, Any]]:
        """What each block's parameters of each kind contribute, with intervals over passages, in the model's order."""
        pairs = [(block_of(name), kind_of(name)) for name in self.names]
        places = {pair: place for place, pair in enumerate(dict.fromkeys(pairs))}
        columns = torch.tensor([places[pair] for pair in pairs], dtype=torch.long)
        sums = self.contributions.new_zeros(len(self.weights), len(places)).index_add_(1, columns, self.contributions)
        spans = intervals_over(sums, self.weights)
        return [
            {"block": block, "kind": kind, "contribution": float(sums[:, place].sum()), "low": low, "high": high}
            for ((block, kind), place), (low, high) in zip(places.items(), spans, strict=True)
        ]

    def headline(self) -> str:
        """The change, and the kind of parameter that carries most of it against its share of the elements."""
        if not any(self.squared_changes):
            return "no parameter has changed, so there is nothing to attribute"
        if not self.change:
            return f"the {self.metric} has not changed on these samples, so there is nothing to attribute"
        if not self.total:
            return (
                f"the {self.metric} changed by {self.change:.4g}; INCOMPLETE: its gradient along the change is zero, "
                "so it tells nothing of what carries that"
            )
        kinds = {row["group"]: row for row in self._group_rows(kind_of)}
        label, row = max(kinds.items(), key=lambda item: item[1]["contribution"] / self.total)
        low, high = row["share_low"], row["share_high"]
        interval = f"[{percentage(low)}, {percentage(high)}]" if len(self.weights) > 1 else "(no interval: one passage)"
        share, size = row["contribution"] / self.total, f"which are {percentage(row['elements'])} of all"
        place = f"{percentage(share)} {interval} of it sits in {label} parameters, {size}"
        if share >= 1.005:
            place = (
                f"{label} parameters, {size}, make {percentage(share)} {interval} of it, of which the others take "
                f"{percentage(share - 1)} back, for parts of opposite sign cancel"
            )
        ends = "" if self.change_interval is None else " [{:.4g}, {:.4g}]".format(*self.change_interval)
        weak = self.weak
        if not weak and (low <= 0 or high - low > 1):
            weak = "that interval is too wide to tell where it sits"
        told = f"the {self.metric} changed by {self.change:.4g}{ends}: {place}{self._told_gap()}{self._told_parts()}"
        return f"{told}; WEAK: {weak}" if weak else told

    def _told_gap(self) -> str:
        """What must be known before the parts are believed."""
        if self.complete:
            return ""
        cause = f", for {self.cause}" if self.cause else ""
        told = f"the parts miss the change by {self.gap:.2g} of it with {self.n_nodes} nodes{cause}"
        return f"; INCOMPLETE: {told}"

    def _told_parts(self) -> str:
        alone = "" if self.interaction is None else f"; alone, blocks make {percentage(1 - self.interaction)} of it"
        if alone and self.interaction_interval is not None:
            high, low = (percentage(1 - end) for end in self.interaction_interval)
            alone += f" [{low}, {high}]"
        inside = "".join(
            f"; the {link['mask']} mask holds {percentage(link['attribution'])}, a random one of its size "
            f"{percentage(link['null'])} "
            f"[{percentage(link['null_low'])}, {percentage(link['null_high'])}]"
            for link in self.links
        )
        return alone + inside


def change_attribution(
    model: nn.Module,
    base: Base,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    metric: Metric = "loss",
    nodes: int | Literal["auto", "base"] = "auto",
    tolerance: float = 0.01,
    space: ParameterSpace | WeightSpace | None = None,
    n_samples: int | None = None,
    samples_per_pass: int | None = None,
    shares: Sequence[float] = SHARES,
    keep_scores: bool = False,
    interactions: bool = False,
    masks: Mapping[str, ParameterVector] | None = None,
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> ChangeAttributionResult:
    r"""Divides what a finetune did to a metric among the elements that changed.

    .. math::
        A_j = \Delta_j \int_0^1 \frac{\partial m}{\partial \theta_j}(\theta_0 + t \Delta)\, dt, \qquad
        \sum_j A_j = m(\theta_t) - m(\theta_0), \qquad \Delta = \theta_t - \theta_0

    The integral is a sum over Gauss-Legendre nodes, exact where the metric along the line is a polynomial of degree
    2 n; nodes are doubled until the relative gap to the true change is below the tolerance. A forward and a backward
    pass per sample and node, in evaluation mode. Beside the training's memory stand the base, the change, and one
    accumulator in at least float32. The model comes back as it was. On several ranks the passages are shared out; every
    rank must call.

    Args:
        model: The finetuned model, plain or sharded with FSDP2.
        base: Anything that :func:`~lightning_goldy.core.base.base_of` takes.
        batches: Batches that the objective understands, the same on every rank.
        objective: The loss; next-token prediction by default.
        metric: ``loss`` (mean over targets, nats), ``log_prob`` (of the responses, mean over samples, nats), ``kl``
            (KL(p_base || p), mean over targets, nats), or a function of model and batch that gives the mean over the
            batch's samples.
        nodes: Of the quadrature; ``auto`` tries 4, 8, ... 64; ``base`` takes the gradient at the base alone, the first
            order, which need not be complete.
        tolerance: Relative gap at which ``auto`` stops, a fraction.
        space: Which parameters move; the base's by default. The others stay where they are now. Or of a model with
            adapters ``merged`` (the default), the weights that they come to, or ``adapters``.
        n_samples: Only the first so many samples.
        samples_per_pass: Samples that go through the model together; intervals resample such passages. By default as
            many as leave 8 of them.
        shares: Shares of all elements whose strongest are to be told, fractions in (0, 1].
        keep_scores: Whether to return what every element contributes.
        interactions: Whether to measure each block's change alone, and all others' without it: two forward passes of
            the samples for every block.
        masks: Masks by name that the contributions are compared with, such as golden ones.
        progress: Called with (passages done, passages in all) of the present number of nodes, on this rank.
        split_over_ranks: Whether to share passages out over the ranks of an initialised process group.

    Returns:
        Contributions by parameter and unit, the strongest elements, and how complete the sum is.

    Raises:
        ValueError: An argument is out of range, there is no sample, or a value is not finite.
        SpaceError: The base or a mask is of another model.
        AdapterError: Merged weights cannot be told, or the model is sharded.

    Source: integrated gradients (Sundararajan et al. 2017, section 3) along the line between two checkpoints.

    Example:
        >>> from lightning_goldy.core import FunctionObjective
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> base = ParameterVector(ParameterSpace.of(layer), {"weight": torch.zeros(1, 2)})
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 3.0]]))
        >>> square = FunctionObjective(lambda model, x: model(x).square().mean())
        >>> found = change_attribution(layer, base, [torch.eye(2)], square, nodes=1, keep_scores=True)
        >>> found.change, found.scores["weight"].tolist(), found.gap
        (5.0, [[0.5, 4.5]], 0.0)
    """
    model = inside_parallel(model)
    shares = check_attribution(metric, nodes, tolerance, shares, samples_per_pass)
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    with preserved(model), replicas.together("change_attribution"), ChangePath(model, base, space) as path:
        work = _Integration(
            path, objective_for(model, objective), metric, batches, n_samples, samples_per_pass, replicas
        )
        work.progress = progress
        require_masks(masks or {}, path.space)
        work.measure_ends()
        effects = work.measure_blocks() if interactions and work.moved else None
        work.integrate_until(nodes, tolerance)
        return work.result(tolerance, shares, keep_scores, effects, masks or {})


def attribute_first_order(
    path: ChangePath, batches: Iterable[Any], objective: Objective, metric: Metric, shares: Sequence[float]
) -> dict[str, Tensor]:
    """The levels of the first order at the base, gradient times change; the model is left at the base.

    Args:
        path: From the base to the finetune, entered.
        batches: Samples that score.
        objective: The loss.
        metric: What is attributed.
        shares: Ascending fractions.

    Returns:
        As :func:`levels_of`.
    """
    work = _Integration(path, objective, metric, batches, None, None, Replicas())
    work.measure_ends()
    work.integrate(0)
    ends = (work.ends * work.weights).sum(1)
    return levels_of(work.scores(), shares, sign=float(ends[1] - ends[0]))


def check_attribution(
    metric: Metric, nodes: int | str, tolerance: float, shares: Sequence[float], samples_per_pass: int | None
) -> tuple[float, ...]:
    """Checks what can be checked before there is a model; returns the shares in ascending order.

    Raises:
        ValueError: An argument is unknown or out of range.
    """
    if not callable(metric):
        require_choice("metric", metric, METRICS)
    if isinstance(nodes, str):
        require_choice("nodes", nodes, ("auto", "base"))
    elif not isinstance(nodes, int) or isinstance(nodes, bool) or not 1 <= nodes <= 256:
        raise ValueError(f"nodes is 'auto', 'base' or lies between 1 and 256; got {nodes}")
    if not isinstance(tolerance, (int, float)) or not 0 < tolerance < 1:
        raise ValueError(f"tolerance must lie in (0, 1); got {tolerance}")
    if samples_per_pass is not None:
        require_at_least("samples_per_pass", samples_per_pass, 1)
    found = require_fractions("shares", shares)
    if len(found) > 200:
        raise ValueError(f"at most 200 shares can be told apart; got {len(found)}")
    return found


class _Integration:
    """One process's part of the work, and what all of them found."""

    def __init__(
        self,
        path: ChangePath,
        objective: Objective,
        metric: Metric,
        batches: Iterable[Any],
        n_samples: int | None,
        samples_per_pass: int | None,
        replicas: Replicas,
    ) -> None:
        self.path, self.measure, self.replicas = path, Measure(metric, objective), replicas
        self.progress: Callable[[int, int], None] | None = None
        self.device = next(path.model.parameters()).device
        samples: list[Passage] = passages(batches, objective, n_samples, samples_per_pass)
        self.samples = samples
        self.mine = replicas.share(range(len(samples)))
        self.ends = torch.zeros(2, len(samples), dtype=torch.float64)
        self.weights = torch.zeros(len(samples), dtype=torch.float64)
        self.contributions = torch.zeros(len(samples), len(path.space), dtype=torch.float64)
        self.products = torch.zeros(len(path.space), dtype=torch.float64, device=self.device)
        """Of the present passage, gradient times change of each parameter."""
        self.accumulated = zeros_like_parts(path.parameters)
        self.groups = model_units(path.model, path.space)
        self.heads = HeadSums(self.groups, path.parameters, len(samples), self.device)
        self.found = torch.zeros_like(self.contributions)
        """The contributions that all processes found."""
        self.index = {name: place for place, name in enumerate(path.space.names)}
        self.squares = path.squares()
        self.moved = any(self.squares)
        self.n_nodes = 0
        self.cost = Cost()

    def measure_ends(self) -> None:
        """The metric now and at the base, and what each passage counts for."""
        sizes = torch.zeros(len(self.samples), dtype=torch.float64)
        with torch.no_grad():
            for end, place in enumerate((0.0, 1.0)):
                self.path.move_to(place)
                for index, batch in self._batches():
                    if place == 0.0:
                        self.measure.keep_anchor(self.path.model, index, batch)
                    sums, counts = self.measure.by_sample(self.path.model, index, batch)
                    sizes[index] = counts.sum()
                    self.ends[end, index] = sums.sum() / counts.sum()
                    self.cost += Cost(forwards=(1 + (self.measure.metric == "kl" and not end)) * sample_count(batch))
        sizes, self.ends = self._summed(sizes), self._summed(self.ends)
        for where, values in zip(("base", "present parameters"), self.ends, strict=True):
            if not bool(values.isfinite().all()):
                broken = self._broken(where == "base")
                cause = f"; {broken!r} holds values that are not finite" if broken else ""
                raise ValueError(f"the metric is not finite at the {where}: {values.tolist()} of the passages{cause}")
        self.weights = sizes / sizes.sum()

    def _broken(self, base: bool) -> str | None:
        """The first parameter of which this process's part holds a value that is not finite."""
        values = ((name, self.path.starts[name] if base else self.path.present(name)) for name in self.path.space)
        return next((name for name, value in values if not bool(value.isfinite().all())), None)

    def measure_blocks(self) -> Tensor:
        """The metric with each block's change alone, and without it, shape ``[2, blocks, passages]``."""
        blocks = self.blocks()
        found = torch.zeros(2, len(blocks), len(self.samples), dtype=torch.float64)
        with torch.no_grad():
            for kind, (row, inside) in itertools.product((0, 1), enumerate(blocks.values())):
                # The block's change alone, then all changes but the block's.
                self._change_only(inside if kind == 0 else set(self.path.space) - inside)
                for index, batch in self._batches():
                    sums, counts = self.measure.by_sample(self.path.model, index, batch)
                    found[kind, row, index] = sums.sum() / counts.sum()
                    self.cost += Cost(forwards=sample_count(batch))
        return self._summed(found)

    def _change_only(self, names: set[str]) -> None:
        self.path.write(lambda name, base, present: present if name in names else base)

    def blocks(self) -> dict[str, set[str]]:
        """The names of each block's parameters, in the model's order."""
        blocks: dict[str, set[str]] = {}
        for name in self.path.space:
            blocks.setdefault(block_of(name), set()).add(name)
        return blocks

    def integrate_until(self, nodes: int | Literal["auto", "base"], tolerance: float) -> None:
        """Integrates with the nodes that are asked for, or with more and more of them until the sum is complete."""
        counts: Sequence[int] = AUTO_NODES if nodes == "auto" else (0,) if nodes == "base" else (nodes,)
        for count in counts if self.moved else counts[:1]:
            self.integrate(count)
            if self.gap <= tolerance or self.cause():
                break

    def integrate(self, n_nodes: int) -> None:
        """Adds up the gradients at the nodes; without one, that at the base."""
        self.n_nodes = max(1, n_nodes) if self.moved else 0
        self.contributions.zero_()
        self.heads.clear()
        for total in self.accumulated.values():
            total.zero_()
        if not self.moved:
            return
        places, weights = np.polynomial.legendre.leggauss(n_nodes) if n_nodes else (np.array([-1.0]), np.array([2.0]))
        hooks = self._hooks()
        with hooks:
            for node, (place, weight) in enumerate(zip((places + 1) / 2, weights / 2, strict=True)):
                self.path.move_to(float(place))
                for step, (index, batch) in enumerate(self._batches(), 1):
                    self.scale = float(weight) * float(self.weights[index])
                    self.products.zero_()
                    backward(self.measure.value(self.path.model, index, batch))
                    self._take_all()
                    # Once per passage, for a GPU would wait at every parameter.
                    self.contributions[index] += self.scale * self.products.cpu()
                    self.heads.keep(index, self.scale)
                    self.cost += Cost(sample_count(batch), sample_count(batch))
                    if self.progress is not None:
                        self.progress(node * len(self.mine) + step, self.n_nodes * len(self.mine))
        references = list(self.path.parameters.values())
        columns = sum_over_shards([column.to(self.device) for column in self.contributions.T], references)
        self.found = self._summed(torch.stack(columns, dim=1).cpu())
        self.heads.found = self._summed(self.heads.over_shards())
        if not bool(torch.isfinite(self.found).all()):
            broken = self.path.space.names[int((~torch.isfinite(self.found)).any(0).nonzero()[0])]
            raise ValueError(f"the gradient of {broken} is not finite along the change")

    @property
    def gap(self) -> float:
        """Relative distance of the sum from the change; 0 where nothing changed."""
        change = float(((self.ends[1] - self.ends[0]) * self.weights).sum())
        return abs(float(self.found.sum()) - change) / abs(change) if self.moved and change else 0.0

    def cause(self) -> str:
        """Why the sum misses the change, where a module tells: rows that are shortened while they are read."""
        known = {id(parameter): name for name, parameter in self.path.parameters.items()}
        for module in self.path.model.modules():
            if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or module.max_norm is None:
                continue
            name = known.get(id(module.weight))
            if name is None or is_sharded(self.path.parameters[name]):
                continue
            rows = torch.cat([self.path.starts[name], self.path.present(name)])
            longest = float(precise(rows).norm(module.norm_type, dim=1).max())
            if longest > module.max_norm:
                return (
                    f"the embedding {name!r} shortens rows to max_norm={module.max_norm:g} as they are read (the "
                    f"longest is {longest:.3g}), of which no gradient tells: shorten the rows of base and finetune "
                    "beforehand with torch.renorm, or leave it out of the parameters that are compared"
                )
        return ""

    def scores(self) -> dict[str, Tensor]:
        """The contribution of each element, of all processes; the accumulators become them, in place."""
        for name, total in self.accumulated.items():
            flat = self.replicas.sum_(total).view(-1)
            for piece, change in self.path.changes(name):
                flat[piece].mul_(change)
        return {name: like(self.path.parameters[name].detach(), total) for name, total in self.accumulated.items()}

    def interactions(self, effects: Tensor) -> tuple[dict[str, Any], ...]:
        """What :meth:`measure_blocks` found, as effects with intervals, beside the contributions."""
        changes = torch.stack([effects[0] - self.ends[0], self.ends[1] - effects[1]])  # [2, blocks, passages]
        counts = resampled(len(self.weights))
        rows = []
        for place, (block, names) in enumerate(self.blocks().items()):
            columns = [self.index[name] for name in names]
            row: dict[str, Any] = {"block": block, "contribution": float(self.found[:, columns].sum())}
            for kind, told in enumerate(("alone", "removed")):
                parts = changes[kind, place] * self.weights
                low, high = math.nan, math.nan
                if len(self.weights) > 1:
                    low, high = interval_of((counts @ parts) / (counts @ self.weights))
                row |= {told: float(parts.sum()), f"{told}_low": low, f"{told}_high": high}
            rows.append(row)
        return tuple(rows)

    def interaction_interval(self, effects: Tensor | None) -> tuple[float, float] | None:
        """That of the share of the change that no block makes alone, over passages."""
        if effects is None or len(self.weights) < 2:
            return None
        counts = resampled(len(self.weights)) * self.weights
        alone = (effects[0] - self.ends[0]).sum(0)
        return interval_of(1 - (counts @ alone) / (counts @ (self.ends[1] - self.ends[0])))

    def result(
        self,
        tolerance: float,
        shares: tuple[float, ...],
        keep_scores: bool,
        effects: Tensor | None,
        masks: Mapping[str, ParameterVector],
    ) -> ChangeAttributionResult:
        """Turns gradients into contributions, in place, and tells what they say."""
        space = self.path.space
        before, now = (float((values * self.weights).sum()) for values in self.ends)
        scores = self.scores()
        metric = self.measure.metric
        return ChangeAttributionResult(
            metric=metric if isinstance(metric, str) else "function",
            base_value=before,
            value=now,
            names=space.names,
            contributions=self.found,
            weights=self.weights,
            units=self._units(scores),
            numels=tuple(map(math.prod, space.shapes)),
            squared_changes=tuple(self.squares),
            n_samples=sum(sample_count(passage.batch) for passage in self.samples),
            n_nodes=self.n_nodes,
            tolerance=tolerance,
            shares=shares if self.moved else (),
            levels=ParameterVector(space, levels_of(scores, shares, sign=now - before))
            if self.moved and shares
            else None,
            scores=ParameterVector(space, {name: gather(score).cpu() for name, score in scores.items()})
            if keep_scores
            else None,
            interactions=self.interactions(effects) if effects is not None else (),
            interaction_interval=self.interaction_interval(effects),
            links=mask_links(ParameterVector(space, scores), masks, change=now - before) if self.moved else (),
            space=self.path.weight_space,
            cost=sum(self.replicas.gather_objects(self.cost), Cost()),
            cause="" if self.gap <= tolerance else self.cause(),
            passages=per_sample(
                ["".join(sample_keys(passage.batch)) for passage in self.samples],
                (self.weights * (self.ends[1] - self.ends[0])).tolist(),
                self.weights.tolist(),
            ),
        )

    def _units(self, scores: Mapping[str, Tensor]) -> tuple[dict[str, Any], ...]:
        space, margins = self.path.space, {name: margins_of(gather(score)) for name, score in scores.items()}
        return tuple(
            {"kind": group.kind, "place": group.place, "values": group.sums(margins), "size": group.size(space)}
            | self.heads.of(place)
            for place, group in enumerate(self.groups)
        )

    def _summed(self, mine: Tensor) -> Tensor:
        return torch.stack(self.replicas.gather_objects(mine)).sum(0)

    def _batches(self) -> Iterator[tuple[int, Any]]:
        for index in self.mine:
            yield index, move_batch(self.samples[index].batch, self.device)

    def _hooks(self) -> ExitStack:
        """Takes each gradient as soon as it is complete; FSDP2 writes sharded ones without running such hooks."""
        hooks = ExitStack()
        only_these_require_gradients(self.path.model, self.path.parameters)
        self._take_rows_alone(hooks)
        for name, parameter in self.path.parameters.items():
            if not is_sharded(parameter):
                hook = parameter.register_post_accumulate_grad_hook(lambda _, name=name: self._take(name))
                hooks.callback(hook.remove)
        return hooks

    def _take_rows_alone(self, hooks: ExitStack) -> None:
        """Has embeddings give the gradient of the rows that are read: a dense one is fresh memory, most of it zeros.

        On a CPU alone, where fresh pages are what it costs, and under losses whose graph is known: a sparse gradient
        has no second derivative.
        """
        known = isinstance(self.measure.metric, str) and not isinstance(self.measure.objective, FunctionObjective)
        own = {id(value) for value in self.path.parameters.values() if value.dtype in (torch.float32, torch.float64)}
        for child in self.path.model.modules() if known and self.device.type == "cpu" else ():
            if not isinstance(child, nn.Embedding) or child.weight._backward_hooks:
                continue  # A hook of the training's own may work on dense gradients alone.
            if id(child.weight) in own and not is_sharded(child.weight):
                child.sparse = True
                hooks.callback(setattr, child, "sparse", False)

    def _take_all(self) -> None:
        unshard_guard(self.path.model)
        for name, parameter in self.path.parameters.items():
            if parameter.grad is not None:
                self._take(name)
        for parameter in self.path.model.parameters():
            parameter.grad = None

    def _take(self, name: str) -> None:
        parameter = self.path.parameters[name]
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if gradient.layout is torch.sparse_coo:
            read = gradient.coalesce()
            rows, values = read.indices()[0], precise(read.values())
            inside = (values * self.path.change(name)[rows]).sum(dtype=torch.float64)
            self.products[self.index[name]] += inside
            self.accumulated[name].index_add_(0, rows, values, alpha=self.scale)
            return
        flat, total = gradient_part(gradient, parameter).reshape(-1), self.accumulated[name].view(-1)
        products = []
        for piece, change in self.path.changes(name):
            part = flat[piece]
            products.append(self.heads.take(name, piece, part, change) if name in self.heads else part.dot(change))
            total[piece].add_(part, alpha=self.scale)
        if products:
            self.products[self.index[name]] += torch.stack(products).sum(dtype=torch.float64)
