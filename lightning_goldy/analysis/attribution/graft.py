"""Grafting: how much of a finetune a part of its change recovers, at what harm, and the models that come of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import too_few
from lightning_goldy.analysis.attribution.attribution import (
    ChangeAttributionResult,
    attribute_first_order,
    check_attribution,
)
from lightning_goldy.analysis.attribution.learned import LearnOptions, learn_along, metric_of, require_same_change
from lightning_goldy.analysis.attribution.path import (
    Bench,
    ChangePath,
    Metric,
    Worth,
    interleaved,
)
from lightning_goldy.analysis.attribution.units import Pieces, chosen_masks, element_space, unread_levels
from lightning_goldy.analysis.divergence import precise
from lightning_goldy.analysis.result import AnalysisResult, Cost, counted_passes
from lightning_goldy.core.base import Base
from lightning_goldy.core.batches import sample_count
from lightning_goldy.core.files import percentage
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import (
    block_of,
    require_at_least,
    require_choice,
    require_fractions,
    require_number,
)
from lightning_goldy.core.objective import Objective, objective_for
from lightning_goldy.core.sharding import inside_parallel, is_sharded, local, scatter_like
from lightning_goldy.core.vector import ParameterVector

Baseline = Literal["magnitude", "random", "gradient", "interpolation", "drop_and_rescale", "learned"]
BASELINES: tuple[Baseline, ...] = ("magnitude", "random", "gradient", "interpolation", "drop_and_rescale")
"""What stands beside attribution by default; a mask that is learned costs many backward passes."""
FACTORS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""Of the change, by which interpolation adds it to the base."""
# Blocks that a step of the greedy search tries, those that contribute most of what fits.
CANDIDATES = 12
# Width of an interval of the recovered effect from which on nothing is told.
_UNCERTAIN = 0.5


@dataclass(frozen=True)
class GraftPoint(AnalysisResult):
    """A model between the base and the finetune, and what it has of both.

    Args:
        method: ``attribution``, a baseline, ``greedy`` of whole blocks, or ``finetune``.
        share: Share of the elements that differ from the base, a fraction.
        factor: What the change is multiplied with there.
        value: The metric on held-out samples.
        recovered: (value - base) / (finetune - base) there, a fraction; None where the finetune changed nothing.
        low: Lower end of its 95 % bootstrap interval over samples; None of a single one.
        high: Upper end.
        harm: Loss on other text less that of the base, nats; None without other text.
        harm_low: Lower end of its interval.
        harm_high: Upper end.
        kl: KL(p_base || p) on other text, mean over targets, nats; None without other text or logits.
        on_frontier: Whether no other point recovers as much with less harm.
        draws: Of random elements what each draw recovers, this point's first; empty of other methods.
    """

    method: str
    share: float
    factor: float
    value: float
    recovered: float | None
    low: float | None
    high: float | None
    harm: float | None = None
    harm_low: float | None = None
    harm_high: float | None = None
    kl: float | None = None
    on_frontier: bool = False
    draws: tuple[float, ...] = ()


@dataclass(frozen=True)
class GraftCurve(AnalysisResult):
    """What shares of a change recover on samples that did not choose them, and what they do to other text.

    Args:
        points: One record per graft, the whole finetune last.
        metric: What is recovered.
        pieces: What was grafted: ``elements``, ``units``, ``tensors`` or ``blocks``.
        base_value: The metric of the base on held-out samples.
        value: That of the finetune.
        base_collateral: Loss of the base on other text, nats; None without any.
        n_held_out: Held-out samples.
        n_collateral: Samples of other text.
        n_values: What intervals of the recovered effect resample: held-out samples, or passages under a metric that is
            not told sample by sample.
        n_harms: Likewise of the harm.
        pairs: What the harm of the finetune, and what each share of the attributed elements recovers, are of each
            sample, as :func:`~lightning_goldy.analysis.agreement.per_sample` gives it.
        cost: Forward passes.
    """

    analysis: ClassVar[str] = "graft_curve"

    points: tuple[dict[str, Any], ...]
    metric: str
    pieces: str
    base_value: float
    value: float
    base_collateral: float | None
    n_held_out: int
    n_collateral: int
    n_values: int = 0
    n_harms: int = 0
    pairs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cost: Cost = field(default=Cost(), compare=False)

    @property
    def records(self) -> tuple[GraftPoint, ...]:
        """The points as records."""
        return tuple(GraftPoint(**point) for point in self.points)

    def of(self, method: str) -> tuple[GraftPoint, ...]:
        """The points of one method, by share and factor."""
        return tuple(point for point in self.records if point.method == method)

    @property
    def weak(self) -> str:
        """Why intervals of what is recovered are none; nothing where there are samples enough."""
        count = self.n_values or self.n_held_out
        return too_few(count, "held-out samples" if count == self.n_held_out else "held-out passages")

    @property
    def harm_weak(self) -> str:
        """Likewise of the harm; nothing where it was not measured."""
        count = self.n_harms or self.n_collateral
        named = "samples of other text" if count == self.n_collateral else "passages of other text"
        return too_few(count, named) if count else ""

    def share_for(self, recovered: float, method: str = "attribution") -> float | None:
        """The smallest share tried that recovers so much; None where none does.

        Args:
            recovered: A fraction.
            method: Which method's points count.
        """
        enough = [point.share for point in self.of(method) if (point.recovered or 0.0) >= recovered]
        return min(enough, default=None)

    @property
    def frontier(self) -> tuple[GraftPoint, ...]:
        """The points that no other beats in both, by what they recover."""
        return tuple(sorted((p for p in self.records if p.on_frontier), key=lambda point: point.recovered or 0.0))

    def choose(
        self, *, recover: float | None = None, harm: float | None = None, methods: Sequence[str] | None = None
    ) -> GraftPoint:
        """The graft with the least harm that recovers enough, or the one that recovers most within a harm.

        Without other text the least share stands for the least harm.

        Args:
            recover: Share of the effect that is wanted, a fraction.
            harm: Nats of loss on other text that are allowed.
            methods: Only points of these.

        Raises:
            ValueError: Not exactly one of both is given, a method is unknown, harm was not measured, nothing changed,
                or no point serves.
        """
        if (recover is None) == (harm is None):
            raise ValueError("choose by one of recover= and harm=")
        for name, value in (("recover", recover), ("harm", harm)):
            if value is not None:
                require_number(name, value)
        tried = list(dict.fromkeys(point.method for point in self.records))
        if methods is not None and not methods:
            raise ValueError(f"methods is empty: name at least one of {', '.join(tried)}")
        for method in methods or ():
            require_choice("method", method, tried)
        points = [p for p in self.records if p.recovered is not None and (methods is None or p.method in methods)]
        if not points:
            raise ValueError("the finetune changed nothing on the held-out samples, so nothing can be recovered")
        if harm is not None:
            if any(point.harm is None for point in points):
                raise ValueError("harm was not measured: the curve has no collateral text")
            fitting = [point for point in points if (point.harm or 0.0) <= harm]
            least = min(point.harm or 0.0 for point in points)
            wanted, most = f"harms other text by at most {harm:g} nats", f"the least that one does is {least:.4g} nats"
        else:
            fitting = [point for point in points if (point.recovered or 0.0) >= (recover or 0.0)]
            best = max(point.recovered or 0.0 for point in points)
            wanted = f"recovers {percentage(recover)} of the effect"
            most = f"the most that one recovers is {percentage(best)}"
        if not fitting:
            raise ValueError(f"no graft tried {wanted}; {most}")
        if harm is not None:
            return max(fitting, key=lambda point: point.recovered or 0.0)
        return min(fitting, key=lambda point: (point.harm if point.harm is not None else point.share, point.share))

    def metrics(self) -> dict[str, float | None]:
        """Shares that recover half and 95 %, that of magnitude, and what half of the change recovers everywhere."""
        half = next((point for point in self.of("interpolation") if point.factor == 0.5), None)
        return {
            "share_for_95": self.share_for(0.95),
            "share_for_50": self.share_for(0.5),
            "magnitude_share_for_50": self.share_for(0.5, "magnitude"),
            "interpolated_half": half.recovered if half else None,
            "harm": self.of("finetune")[0].harm,
        }

    def details(self) -> dict[str, Any]:
        """The points, and between what they lie."""
        names = ("metric", "pieces", "base_value", "value", "base_collateral", "n_held_out", "n_collateral")
        told = {**{name: getattr(self, name) for name in names}, "points": [dict(point) for point in self.points]}
        told |= {name: doubt for name, doubt in (("weak", self.weak), ("harm_weak", self.harm_weak)) if doubt}
        return told | ({"per_sample": dict(self.pairs)} if self.pairs else {})

    def headline(self) -> str:
        """The share that recovers 95 % with its interval, and what is best in gain against harm."""
        tried = (*self.of("attribution"), *self.of("greedy"))
        best = max(tried, key=lambda point: point.recovered or 0.0, default=None)
        enough = [point for point in tried if (point.recovered or 0.0) >= 0.95]
        if self.value == self.base_value:
            return "the finetune changed nothing on the held-out samples, so nothing can be recovered"
        shown = min(enough, key=lambda point: point.share, default=best)
        if shown is None:
            told = f"{len(self.points)} grafts were tried"
        else:
            part, share = self._with_interval(shown), share_of_elements(shown.share)
            told = f"{share} recover {part} of the effect on held-out samples"
            told = told if enough else f"of the shares tried {share} recover most, {part} of the effect"
            told += self._beside(shown)
        if self.weak:
            told = f"{told}; WEAK: {self.weak}"
        elif best is not None and (rough := self.roughness(best)):
            told = f"{told}; WEAK: {rough}"
        if self.base_collateral is None:
            return f"{told}; harm to other text was not measured"
        methods = sorted({point.method for point in self.frontier} - {"finetune"})
        return f"{told}; in gain against harm the frontier has {', '.join(methods) or 'the finetune alone'}"

    def roughness(self, point: GraftPoint) -> str:
        """Why the interval of a point tells nothing of what it recovers, for its width; nothing where it does."""
        wide = (point.high or 0.0) - (point.low or 0.0) > _UNCERTAIN
        return f"{self.n_held_out} held-out samples tell the effect too roughly" if wide else ""

    def _beside(self, point: GraftPoint) -> str:
        """What as many random elements and the largest changes recover, and whether the chosen ones do better."""
        named = {"random": "as many random ones", "magnitude": "those that changed most"}
        same = [other for other in self.records if other.method in named and other.share == point.share < 1]
        if not same:
            return ""
        told = ", ".join(f"{named[other.method]} {self._with_interval(other)}{_band(other)}" for other in same)
        beaten = max(max(other.recovered or 0.0, *other.draws, -math.inf) for other in same) >= (point.recovered or 0.0)
        return f" ({told}{'; WEAK: no more than others of that number' if beaten else ''})"

    def _with_interval(self, point: GraftPoint) -> str:
        if point.low is None:
            return f"{percentage(point.recovered)} (no interval: one {'sample' if self.n_held_out == 1 else 'passage'})"
        return f"{percentage(point.recovered)} [{percentage(point.low)}, {percentage(point.high)}]"


def share_of_elements(share: float, digits: int = 2) -> str:
    """How many of the elements a graft has, in words.

    Example:
        >>> share_of_elements(0.1), share_of_elements(1.0)
        ('0.1 of the elements', 'all elements')
    """
    return "all elements" if share == 1 else f"{share:.{digits}g} of the elements"


def _band(point: GraftPoint) -> str:
    """Between what all draws of random elements lie; nothing of one."""
    if len(point.draws) < 2:
        return ""
    return f" ({percentage(min(point.draws))} to {percentage(max(point.draws))} over {len(point.draws)} draws)"


def graft_curve(
    model: nn.Module,
    base: Base,
    attribution: ChangeAttributionResult,
    batches: Iterable[Any],
    held_out: Iterable[Any],
    collateral: Iterable[Any] | None = None,
    *,
    objective: Objective | None = None,
    metric: Metric | None = None,
    pieces: Pieces = "elements",
    shares: Sequence[float] | None = None,
    baselines: Sequence[Baseline] = BASELINES,
    factors: Sequence[float] = FACTORS,
    masks: Mapping[str, ParameterVector | Sequence[ParameterVector]] | None = None,
    learn: LearnOptions = LearnOptions(),  # noqa: B008 - frozen
    samples_per_pass: int | None = None,
    seed: int = 0,
    n_draws: int = 5,
    progress: Callable[[int, int], None] | None = None,
) -> GraftCurve:
    r"""Recovered effect against the share of a change that is kept, beside its baselines, and the harm of each.

    .. math::
        \theta_S = \theta_0 + 1_S \Delta, \qquad
        \text{recovered}(S) = \frac{m(\theta_S) - m(\theta_0)}{m(\theta_t) - m(\theta_0)}

    S are the elements (or units, tensors, blocks) that contribute most by :func:`change_attribution`. Beside it stand
    the largest changes (``magnitude``), random elements, the first order at the base (``gradient``), interpolation
    :math:`\theta_0 + a \Delta`, and drop-and-rescale, random elements times the inverse of their share; where asked
    for masks that are ``learned`` (:func:`~lightning_goldy.analysis.attribution.learned.learn_mask`). Every point costs
    a forward pass of the held-out samples and two of the other text; every further draw of random elements one of the
    held-out samples for each share. The model comes back as it was.

    Args:
        model: The finetuned model.
        base: Anything that :func:`~lightning_goldy.core.base.base_of` takes.
        attribution: What chose the elements, of the same change.
        batches: The samples that scored; only ``gradient``, ``learned`` and the search of blocks read them.
        held_out: Samples that did not.
        collateral: Text that has nothing to do with the finetune, on which harm is measured; where a mask is learned
            every other sample of it teaches and is not measured.
        objective: The loss; next-token prediction by default.
        metric: What is recovered; the attribution's by default, which must be given again where it is a function.
        pieces: What is grafted: single ``elements``, ``units`` (heads, key/value groups, neurons, token rows), whole
            ``tensors`` or ``blocks``, those first that contribute most by element. Of blocks also a ``greedy`` search:
            one after the other the block that recovers most of the effect on the samples that score, as the model
            itself says, of those that fit into the largest share; a step tries 12 at most, those that contribute most.
        shares: Shares of all elements; the attribution's by default.
        baselines: What stands beside it; those of elements only where elements are grafted. Of random elements as many
            as each graft of whole pieces has.
        factors: The a of interpolation.
        masks: Further masks to graft, one or several by the name of their method, such as golden ones.
        learn: How masks are learned.
        samples_per_pass: Samples that go through the model together; whole batches by default.
        seed: Of random elements.
        n_draws: Of as many random elements, by this seed and those that follow, which tell how far ``random`` hangs on
            the draw; harm is measured of the first alone.
        progress: Called with (points done, points in all).

    Returns:
        The points with intervals, and the frontier of gain against harm.

    Raises:
        ValueError: An argument is unknown, the attribution is of another change or lacks a share, or there is
            no sample.

    Source: grafting (Panigrahi et al. 2023, arXiv 2302.06600, section 2); drop-and-rescale (Yu et al. 2024, arXiv
        2311.03099, section 3).

    Example:
        >>> from lightning_goldy.analysis import change_attribution
        >>> from lightning_goldy.core import FunctionObjective, ParameterSpace, ParameterVector
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> base = ParameterVector(ParameterSpace.of(layer), {"weight": torch.zeros(1, 4)})
        >>> _ = layer.weight.data.copy_(torch.tensor([[0.0, 3.0, 0.1, 0.1]]))
        >>> square = FunctionObjective(lambda model, x: model(x).square().mean())
        >>> found = change_attribution(layer, base, [torch.eye(4)], square, shares=[0.25])
        >>> curve = graft_curve(layer, base, found, [], [torch.eye(4)], objective=square, baselines=["random"])
        >>> round(curve.of("attribution")[0].recovered, 3), curve.of("finetune")[0].recovered
        (0.998, 1.0)
    """
    model = inside_parallel(model)
    objective = objective_for(model, objective)
    metric = metric_of(attribution, metric)
    if attribution.scores is None and not any(attribution.squared_changes):
        raise ValueError("no parameter has changed, so there is nothing to graft")
    shares = check_graft(metric, attribution.shares if shares is None else shares, baselines, pieces, factors)
    require_at_least("n_draws", n_draws, 1)
    taken = {"attribution", "greedy", "finetune", *baselines}
    if twice := sorted(taken & set(masks or {})):
        raise ValueError(f"masks may not be called {', '.join(map(repr, twice))}, as grafts of the curve are")
    teaching: Sequence[Any] = ()
    if collateral is not None and "learned" in baselines:
        collateral, teaching = interleaved(collateral, sys.maxsize)
    within = attribution.space
    with preserved(model), ChangePath(model, base, within) as path, torch.no_grad(), counted_passes(model) as passes:
        require_same_change(attribution, path)
        bench = Bench(path, objective, metric, held_out, collateral, samples_per_pass)
        grafts = _Grafts(path, attribution, objective, metric, tuple(shares), seed)
        batches = list(batches)
        plan = [*grafts.chosen(pieces), *(grafts.greedy(batches) if pieces == "blocks" else ())]
        if pieces != "elements":
            # Whole pieces are seldom as many elements as a share, and are compared with as many random ones.
            grafts.sizes = tuple(sorted({share for _, share, _, _ in plan}))
        plan += grafts.baselines(baselines, factors, batches, pieces)
        plan += grafts.of_masks(masks or {})
        if "learned" in baselines:
            plan += grafts.learned(batches, list(teaching) or None, learn)
        points = _measured(plan, bench, progress)
        if "random" in baselines:
            grafts.draw_again([point for point in points if point["method"] == "random"], n_draws, bench)
        cost = passes()
    return _curve(points, bench, metric=attribution.metric, pieces=pieces, cost=cost)


def check_graft(
    metric: Metric,
    shares: Sequence[float],
    baselines: Sequence[str],
    pieces: str,
    factors: Sequence[float] = FACTORS,
) -> tuple[float, ...]:
    """Checks what can be checked before there is a model; returns the shares in ascending order.

    Raises:
        ValueError: An argument is unknown or out of range.
    """
    if isinstance(baselines, str):
        raise ValueError(f"baselines is a list of methods; got {baselines!r}")
    for baseline in baselines:
        require_choice("baseline", baseline, get_args(Baseline))
    require_choice("pieces", pieces, get_args(Pieces))
    twice = next((name for place, name in enumerate(baselines) if name in baselines[:place]), None)
    if twice is not None:
        raise ValueError(f"baselines name {twice!r} twice")
    if not require_fractions("factors", factors) and "interpolation" in baselines:
        raise ValueError("factors is empty: name at least one fraction in (0, 1], or leave interpolation out")
    found = check_attribution(metric, "auto", 0.01, shares, None)
    if not found:
        raise ValueError("shares is empty: name at least one fraction in (0, 1]")
    return found


def _marked(points: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points, each with whether another beats it in one of gain and harm without losing in the other."""

    def beats(other: dict[str, Any], point: dict[str, Any]) -> bool:
        better = (other["recovered"] - point["recovered"], point["harm"] - other["harm"])
        return min(better) >= 0 and max(better) > 0

    known = [point for point in points if point.get("harm") is not None and point["recovered"] is not None]
    best = [point for point in known if not any(beats(other, point) for other in known)]
    return [vars(GraftPoint(**point, on_frontier=any(point is one for one in best))) for point in points]


Planned = tuple[str, float, float, Callable[[], None]]


def _measured(
    plan: Sequence[Planned], bench: Bench, progress: Callable[[int, int], None] | None
) -> list[dict[str, Any]]:
    """What each planned graft recovers and harms."""
    points = []
    for done, (method, share, factor, write) in enumerate(plan, 1):
        write()
        points.append(bench.point(method, share, factor))
        if progress is not None:
            progress(done, len(plan))
    return points


def _curve(points: Sequence[dict[str, Any]], bench: Bench, **told: Any) -> GraftCurve:
    """The grafts, the whole finetune as the last of them, and what they were measured on."""
    return GraftCurve(
        points=tuple(_marked([*points, bench.finetune])),
        base_value=bench.base_value,
        value=bench.value,
        base_collateral=bench.base_collateral,
        n_held_out=sum(sample_count(passage.batch) for passage in bench.held_out),
        n_collateral=sum(sample_count(passage.batch) for passage in bench.collateral),
        n_values=len(bench.base),
        n_harms=len(bench.base_loss),
        pairs=bench.pairs,
        **told,
    )


class _Grafts:
    """The models to try, each as a function that moves the weights there."""

    def __init__(
        self,
        path: ChangePath,
        attribution: ChangeAttributionResult,
        objective: Objective,
        metric: Metric,
        shares: tuple[float, ...],
        seed: int,
    ) -> None:
        self.path, self.attribution, self.objective, self.metric = path, attribution, objective, metric
        self.shares, self.sizes, self.seed = shares, shares, seed

    def chosen(self, pieces: Pieces) -> list[Planned]:
        """Those that the attribution chooses."""
        if pieces == "elements":
            masks = [(share, self.attribution.mask(share)) for share in self.shares]
        else:
            space = element_space(self.attribution, self.path.model)
            masks = list(chosen_masks(self.attribution, space, self.path.model, pieces, self.shares))
        return [("attribution", share, 1.0, self._keep(mask)) for share, mask in masks]

    def greedy(self, batches: Sequence[Any]) -> list[Planned]:
        """Whole blocks, one after the other the one with which the model recovers most on the samples that score."""
        path, sizes = self.path, dict(zip(self.path.space, map(math.prod, self.path.space.shapes), strict=True))
        blocks: dict[str, set[str]] = {}
        for name in path.space:
            blocks.setdefault(block_of(name), set()).add(name)
        numel = {block: sum(sizes[name] for name in names) for block, names in blocks.items()}
        sign, part = math.copysign(1.0, self.attribution.change), self.attribution.by_block
        left = sorted(blocks, key=lambda block: -sign * part[block] / numel[block])
        room, inside = self.shares[-1] * path.space.numel, set[str]()
        worth = Worth(path, self.objective, self.metric, batches)
        found: list[Planned] = []
        while fitting := [block for block in left if numel[block] <= room] or ([] if found else left):
            tried = {block: sign * worth.of(inside | blocks[block]) for block in fitting[:CANDIDATES]}
            best = max(tried, key=lambda block: tried[block])
            left.remove(best)
            inside, room = inside | blocks[best], room - numel[best]
            share = sum(sizes[name] for name in inside) / path.space.numel
            found.append(("greedy", share, 1.0, partial(worth.move, inside)))
        return found

    def baselines(
        self, names: Sequence[str], factors: Sequence[float], batches: Iterable[Any], pieces: Pieces
    ) -> list[Planned]:
        """What stands beside them."""
        found: list[Planned] = []
        for name in names:
            if name == "interpolation":
                found += [(name, 1.0, factor, self._interpolate(factor)) for factor in factors]
            elif name != "learned" and (pieces == "elements" or name in ("random", "drop_and_rescale")):
                levels = self._levels(name, batches)
                for place, share in enumerate(self.sizes):
                    factor = 1 / share if name == "drop_and_rescale" else 1.0
                    found.append((name, share, factor, self._keep_levels(levels, place, factor)))
        return found

    def draw_again(self, points: Sequence[dict[str, Any]], n_draws: int, bench: Bench) -> None:
        """Adds what further draws of as many random elements recover; all elements have but one draw."""
        points = [point for point in points if point["recovered"] is not None and point["share"] < 1]
        for point in points:
            point["draws"] = (point["recovered"],)
        for seed in range(self.seed + 1, self.seed + n_draws):
            levels = unread_levels(self.path, "random", self.sizes, seed) if points else {}
            for point in points:
                self._keep_levels(levels, self.sizes.index(point["share"]), 1.0)()
                point["draws"] += (bench.recovered(),)

    def of_masks(self, masks: Mapping[str, ParameterVector | Sequence[ParameterVector]]) -> list[Planned]:
        """Those of masks that are given."""
        found: list[Planned] = []
        for method, held in masks.items():
            for mask in map(ParameterMask.of_vector, [held] if isinstance(held, ParameterVector) else held):
                self.path.space.require_same(mask.space)
                found.append((method, mask.density, 1.0, self._keep(mask)))
        return found

    def learned(self, batches: Sequence[Any], teaching: Sequence[Any] | None, options: LearnOptions) -> list[Planned]:
        """A mask for each share, learned when its turn comes."""

        def write(share: float) -> None:
            args = self.path, self.attribution, batches, teaching, share, self.objective, self.metric, options
            self._keep(learn_along(*args).mask)()

        return [("learned", share, 1.0, partial(write, share)) for share in self.shares]

    def _levels(self, name: str, batches: Iterable[Any]) -> dict[str, Tensor]:
        if name == "gradient":
            with torch.enable_grad():
                return attribute_first_order(self.path, batches, self.objective, self.metric, self.shares)
        return unread_levels(self.path, name, self.sizes, self.seed)

    def _keep(self, mask: ParameterMask) -> Callable[[], None]:
        return self._keep_levels({name: (~flags).to(torch.uint8) for name, flags in mask.items()}, 0, 1.0)

    def _keep_levels(self, levels: Mapping[str, Tensor], place: int, factor: float) -> Callable[[], None]:
        def value(name: str, base: Tensor, present: Tensor) -> Tensor:
            own = levels[name].to(base.device) if not is_sharded(self.path.parameters[name]) else levels[name]
            inside = local(scatter_like(self.path.parameters[name].detach(), own <= place))
            if factor == 1.0:
                return torch.where(inside, present, base)
            return torch.where(inside, precise(base) + factor * (precise(present) - precise(base)), precise(base))

        return lambda: self.path.write(value)

    def _interpolate(self, factor: float) -> Callable[[], None]:
        return lambda: self.path.move_to(factor)


def baseline_mask(
    model: nn.Module, base: Base, attribution: ChangeAttributionResult, method: str, share: float, *, seed: int = 0
) -> ParameterMask:
    """The elements that a baseline of :func:`graft_curve` keeps, the same ones.

    Args:
        model: The finetuned model.
        base: Anything that :func:`~lightning_goldy.core.base.base_of` takes.
        attribution: Of the same change.
        method: ``magnitude``, ``random`` or ``drop_and_rescale``.
        share: Of all elements, a fraction.
        seed: Of random elements.

    Raises:
        ValueError: The method is another, or the attribution of another change.
    """
    model = inside_parallel(model)
    require_choice("method", method, ("magnitude", "random", "drop_and_rescale"))
    with preserved(model), ChangePath(model, base, attribution.space) as path, torch.no_grad():
        require_same_change(attribution, path)
        levels = unread_levels(path, method, (share,), seed)
        return ParameterMask(path.space, {name: level == 0 for name, level in levels.items()})
