"""Reverse golden parameters: the few elements whose zeroing changes most what the model says."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import Cache, check_cache, precise
from lightning_goldy.analysis.golden.budget import (
    Budget,
    ComputedScores,
    Element,
    Fluctuation,
    MeanGains,
    Outside,
    Scored,
    check_search_arguments,
    counts_by_expert,
    crossings,
    finite_scores,
    largest_activations,
)
from lightning_goldy.analysis.golden.golden import SCORES, SINGLE_SHOTS, MaskResult, single_shot_scores
from lightning_goldy.analysis.gradients import (
    NotDifferentiableError,
    SharedDivergence,
    only_these_require_gradients,
    pieces_of,
)
from lightning_goldy.analysis.result import Cost
from lightning_goldy.core.architecture.blocks import expert_counts
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.mask import MaskedModel, PackedMask, ParameterMask, Scope
from lightning_goldy.core.naming import require_at_least, require_kinds, suggestion
from lightning_goldy.core.objective import Objective, objective_for
from lightning_goldy.core.sharding import Replicas, gather, like
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import require_finite

# A forward and a backward pass in units of forward passes.
_PASS = 3
# Share of the rounds in which the mask grows to the whole budget, and their number at most; in the others its elements
# are exchanged.
_GROWTH, _GROWING = 0.7, 11
# Share of the rounds in which small masks grow and then, where so many are left at least, shrink.
_STARTING, _LEAST = 0.85, 12
# How many times the budget they shrink from, one way after another: the first in so many rounds at most, the others in
# equal parts of what is left, of so many rounds at least and at most.
_WIDTHS, _FIRST, _OTHERS = (30, 8, 16), 91, (30, 54)
# The widths that the best mask is widened to in turn, the rounds of each, and the share of all in which that happens.
_WIDER, _BREATH, _ENDING = (1.5, 2.0), 16, 0.95
# The share of a way in which the budget is reached.
_NARROWING = 0.8
# Exchanges tried for each round at most.
_TRIALS = 3
# Rounds where none are given: as a rule, of masks that shrink, and above so many elements, where one takes minutes.
_ROUNDS, _SHRINKING_ROUNDS, _LARGE_ROUNDS, _LARGE = 40, 280, 8, 100_000_000
# Elements from which on sums of scores are held one after the other, each with passes of its own.
_APART = 1_000_000_000
# The largest mask of which single elements are measured.
_FINE = 1 << 14
# Trials of pairs at most, for each element that may be measured alone.
_PAIR_TRIALS = 16
# Elements of a small mask that each candidate is tried for at most.
_PARTNERS = 8
# What a pool exceeds the budget by is divided by this after an exchange that brought nothing.
_SHRINKAGE = 4
_MOST_FAILURES = 8


@dataclass(frozen=True)
class Search:
    """How far and from where a search goes.

    Args:
        score: Registered score of the unmasked model to start from.
        rounds: Forward and backward passes under the masked model at most; one more scores the unmasked one. By default
            40, of masks of up to 16,384 elements 280, and 8 where more than 100 M elements may be masked.
        exact: Elements that are measured one by one, by a forward pass each, after at most sixteen times as many trials
            of pairs; none where a mask has more than 16,384.
        chunk_size: Samples of one forward and backward pass, to bound the memory; the batches' own size by default.
        max_stagnant_iterations: Rounds of exchanges without an improvement, after which single ones are measured.
        seed: Decides the strategies that draw numbers.
        cache: Where the unmasked model's log-probabilities are kept: ``device``, ``cpu``, ``none``, or ``auto``.

    Raises:
        ValueError: A value is unknown or out of range.

    Example:
        >>> Search(rounds=0)
        Traceback (most recent call last):
        ValueError: rounds must be at least 1; got 0
    """

    score: str = "fisher"
    rounds: int | None = None
    exact: int = 64
    chunk_size: int | None = None
    max_stagnant_iterations: int = 5
    seed: int = 0
    cache: Cache = "auto"

    def __post_init__(self) -> None:
        require_kinds(type(self), vars(self))
        SCORES[self.score]
        check_cache(self.cache, None)
        for name in ("rounds", "chunk_size", "max_stagnant_iterations"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        require_at_least("exact", self.exact, 0)

    def rounds_for(self, elements: int, budget: int) -> int:
        """The rounds that are given, or that so many elements to choose so many among allow.

        Example:
            >>> Search().rounds_for(10**7, 10**6), Search().rounds_for(10**7, 10**4), Search().rounds_for(10**9, 10**4)
            (40, 280, 8)
        """
        usual = _SHRINKING_ROUNDS if self.exact_for(budget) else _ROUNDS
        return self.rounds or (_LARGE_ROUNDS if elements > _LARGE else usual)

    def exact_for(self, budget: int) -> int:
        """The elements that are measured one by one where so many are masked."""
        return self.exact if budget <= _FINE else 0


@dataclass(frozen=True)
class ReverseGoldenResult(MaskResult):
    """The mask, what zeroing it does, and how it was found.

    Args:
        mask: True where zeroing does most; boolean, on the CPU, exactly the budget.
        masked: Masked elements of each tensor (of a stack each expert), in the mask's order.
        kl_divergence: Of the masked model on the evaluation batches, nats per target, which had no part in the search.
        search_divergence: On the batches that chose, nats per target.
        single_shots: Divergence on the evaluation batches of the masks of the same size that a score of the unmasked
            model gives without a search, nats per target, by name of the score.
        history: One entry per iteration: ``iteration``, ``passes`` (forward and backward passes so far), ``size`` and
            ``pool`` (elements), ``factor``, ``greedy_kl``, ``pool_kl`` (None without a pool) and ``kl`` of what was
            ``kept`` (``greedy``, ``pool``, ``smallest``, filled with the smallest weights, or at the end ``pairs`` and
            ``exact``), ``accepted`` (whether that was the pool's mask), ``best_kl`` (of the whole budget so far).
        passes: Forward and backward passes over the scoring samples.
        evaluations: Everything in forward passes over the scoring or the evaluation samples.
        n_samples: Samples that chose.
        n_eval_samples: Samples that measured.
        top_k_percent: The budget, percent.
        scope: ``tensor`` or ``global``.
        strategy: Name of the fluctuation strategy.
        score: Name of the score that the search started from.
        cost: Passes over samples, of both kinds.
    """

    analysis: ClassVar[str] = "reverse_golden_parameters"

    masked: tuple[int, ...]
    kl_divergence: float
    search_divergence: float
    single_shots: dict[str, float]
    history: tuple[dict[str, Any], ...]
    passes: int
    evaluations: int
    n_samples: int
    n_eval_samples: int
    top_k_percent: float
    scope: str
    strategy: str
    score: str
    cost: Cost = field(default=Cost(), compare=False)

    @property
    def count(self) -> int:
        """Number of masked elements."""
        return sum(self.masked)

    @property
    def density(self) -> float:
        """Share of the space's elements that are masked, a fraction."""
        return self.count / self.mask.space.numel

    @property
    def over_gradient(self) -> float:
        """The divergence, as a multiple of what the mask of the largest gradients reaches."""
        gradient = self.single_shots["gradient"]
        return self.kl_divergence / gradient if gradient > 0 else math.inf

    def metrics(self) -> dict[str, float | None]:
        """The divergence against single-shot masks, the size of the mask, and how often a pool was better."""
        return {
            "kl_divergence": self.kl_divergence,
            "search_divergence": self.search_divergence,
            **{f"single_shot/{name}": value for name, value in self.single_shots.items()},
            "over_gradient": self.over_gradient,
            "count": self.count,
            "density": self.density,
            "accepted_pools": sum(entry["accepted"] for entry in self.history),
        }

    def details(self) -> dict[str, Any]:
        """A JSON-able description without the mask: the settings, the course of the search, and counts by tensor."""
        settings = ("top_k_percent", "scope", "strategy", "score", "n_samples", "n_eval_samples")
        found = ("kl_divergence", "search_divergence", "single_shots", "passes")
        described = self.described((*settings, *found), masked=self.masked)
        tensors = described.pop("tensors")
        return {**described, "history": [dict(entry) for entry in self.history], "tensors": tensors}

    summary = details


def reverse_golden_parameters(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    eval_batches: Iterable[Any],
    top_k_percent: float = 30.0,
    scope: Scope = "tensor",
    strategy: str = "adaptive_sinusoidal",
    search: Search = Search(),
    fluctuation: Fluctuation = Fluctuation(),  # noqa: B008 - frozen
    space: ParameterSpace | None = None,
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
    **settings: Any,
) -> ReverseGoldenResult:
    r"""Searches for the mask of a given size whose zeroing changes the model's predictions most.

    .. math:: \max_{m \in \{0, 1\}^D,\; |m| = k} F(m), \qquad
        F(m) = \frac{1}{|T|} \sum_{t \in T} \mathrm{KL}\big(p_\theta(\cdot \mid x_{<t}) \,\|\,
        p_{\theta \odot (1 - m)}(\cdot \mid x_{<t})\big)

    over the whole vocabulary, at the target positions, in evaluation mode. The search starts from a second-order score,
    zeroes a part of the budget, and scores again with the gradient of F itself at the masked weights,
    :math:`s = -\nabla F \odot \theta`; round after round the mask grows to the budget. In each round the strategy
    sizes a pool somewhat larger than what is wanted, in which masked elements may lose their place; its best mask is
    kept when a forward pass shows it better than the greedy one. At the whole budget elements are exchanged until the
    single best exchange to first order brings nothing. Masks of up to 16,384 elements also shrink, from 30, 8 and 16
    times the budget, to the elements whose s was the largest on average over the way; the best of all is widened a
    little and shrinks again while that helps, and in what comes of it pairs and single candidates (also those of the
    largest activations) are exchanged where a measurement shows that it helps.
    What is returned is the best mask of the whole budget that was measured, the masks of all single-shot scores among
    them. The model comes back as it was, to the bit. On several ranks the samples are shared out; every rank must call.

    Args:
        model: A plain, DistributedDataParallel-unwrapped, or FSDP2-sharded module.
        batches: Batches that score and choose; the same on every rank.
        objective: Where the targets are; next-token prediction by default.
        eval_batches: Other batches, which only measure what is returned.
        top_k_percent: Budget, percent in (0, 100]: exactly so many elements, rounded half up, at least one.
        scope: The share of each ``tensor``, or of all elements together (``global``).
        strategy: ``adaptive_sinusoidal``, ``momentum_based``, ``exploration_decay``, ``harmonic_oscillator``,
            ``chaos_driven``, ``inflation``, a registered one of yours, or ``none`` for plain greedy growth.
        search: From which score and how far the search goes.
        fluctuation: Settings of the strategies.
        space: Which parameters; all trainable ones by default.
        progress: Called with (passes done, passes at most) on this rank.
        split_over_ranks: Whether to share samples out over the ranks of an initialised process group.
        **settings: Single fields of ``search`` and ``fluctuation`` by name, such as ``rounds`` or ``amplitude``.

    Returns:
        The mask, its divergence on the evaluation batches beside those of the single-shot masks, and the history.

    Raises:
        ValueError: An argument is out of range, there is no batch, a weight, a gradient or a divergence is not finite,
            or no parameter received a gradient.
        TypeError: The objective has no logits, or a setting is unknown.

    Example:
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> linear = nn.Linear(3, 2, bias=False)
        >>> linear.weight = nn.Parameter(torch.tensor([[3.0, 0.1, 0.1], [0.1, 0.1, 0.1]]))
        >>> batch = (torch.ones(2, 3), torch.tensor([0, 1]))
        >>> options = {"eval_batches": [batch], "top_k_percent": 16, "rounds": 2}
        >>> reverse_golden_parameters(linear, [batch], ClassifierObjective(), **options).mask["weight"].tolist()
        [[True, False, False], [False, False, False]]
    """
    search, fluctuation = _merge_settings(search, fluctuation, settings)
    check_search_arguments(top_k_percent, scope, strategy)
    objective = objective_for(model, objective)
    space = space or ParameterSpace.of(model)
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    choosing, measuring = list(batches), list(eval_batches)
    for argument, given in (("batches", choosing), ("eval_batches", measuring)):
        if not given:
            raise ValueError(f"there is no sample: {argument} is empty")
    with preserved(model), replicas.together("reverse_golden_parameters"):
        parameters = space.resolve(model)
        require_finite(parameters, "weights")
        only_these_require_gradients(model, parameters)
        samples, held_out = (
            SharedDivergence(model, pieces, objective, replicas, cache=search.cache, anchored=False)
            for pieces in (pieces_of(part, search.chunk_size) for part in (choosing, measuring))
        )
        with MaskedModel(model, space) as masked:
            experts = {name: count for name, count in expert_counts(model).items() if name in space}
            budget = Budget(parameters, top_k_percent, scope, experts)
            course = MaskSearch(masked, samples, budget, search, fluctuation, strategy, progress)
            single, kl_divergence, scored = _run_search(course, held_out, objective)
        assert course.best is not None
        whole = {name: gather(like(parameters[name].detach(), part)).cpu() for name, part in course.best.items()}
    return ReverseGoldenResult(
        mask=ParameterMask(space, whole),
        experts=experts,
        masked=counts_by_expert(whole, experts),
        kl_divergence=kl_divergence,
        search_divergence=course.best_divergence,
        single_shots=single,
        history=tuple(course.history),
        passes=course.passes + scored,
        evaluations=_PASS * (course.passes + scored) + course.evaluations + len(single) + 3,
        n_samples=samples.n_samples,
        n_eval_samples=held_out.n_samples,
        top_k_percent=top_k_percent,
        scope=scope,
        strategy=strategy,
        score=search.score,
        cost=samples.cost + held_out.cost,
    )


def _merge_settings(
    search: Search, fluctuation: Fluctuation, settings: Mapping[str, Any]
) -> tuple[Search, Fluctuation]:
    """Both with single fields of either put in their place."""
    names = [{field.name for field in fields(kind)} for kind in (Search, Fluctuation)]
    for name in settings:
        if name not in names[0] | names[1]:
            known = sorted(names[0] | names[1])
            raise TypeError(f"reverse_golden_parameters takes no {name!r}; {suggestion(name, known)}")
    of_search, of_fluctuation = ({name: settings[name] for name in settings if name in known} for known in names)
    return replace(search, **of_search), replace(fluctuation, **of_fluctuation)


def _run_search(
    course: MaskSearch, held_out: SharedDivergence, objective: Objective
) -> tuple[dict[str, float], float, int]:
    """Held-out divergences of the single-shot masks, which all compete, and of the best mask; passes of the scores."""
    masked, budget, score = course.masked, course.budget, course.settings.score
    names = tuple(dict.fromkeys((*SINGLE_SHOTS, score)))
    shots, rounds = {}, scoring_rounds(masked.space.numel, names)
    for wanted in rounds:
        scores = single_shot_scores(
            masked.model, course.divergence, objective, masked.parameters, wanted, value=masked.value
        )
        for name in wanted:
            checked = finite_scores(scores[name], f"{name} scores", budget)
            shots[name] = PackedMask(budget.selections(checked, budget.sizes()))
            if name == score:
                course.start(checked)
            if course.exact:
                course.note(each.element for each in budget.strongest(checked, course.exact))
            # Each sum is freed once no score needs it.
            del scores[name], checked
    # Not before: they fill memory beside the sums of the scores.
    with largest_activations(masked.model, masked.parameters) as seen:
        course.divergence.anchor(masked.model)
    if course.exact:
        course.note(crossings(seen, masked.parameters, course.divergence.replicas))
    held_out.anchor(masked.model)
    single = {}
    for name, mask in shots.items():
        course.offer(mask)
        single[name] = held_out(masked.model)
    course.run()
    masked.zero(course.best)
    return single, held_out(masked.model), len(rounds)


def scoring_rounds(elements: int, names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The scores that one pass over the samples sums: all, or of large models those of one sum, so that one is held.

    Example:
        >>> scoring_rounds(10_000, ("gradient", "taylor", "fisher")), scoring_rounds(8 * 10**9, ("taylor", "fisher"))
        ((('gradient', 'taylor', 'fisher'),), (('taylor',), ('fisher',)))
    """
    if elements < _APART:
        return (tuple(names),)
    of_one_sum = (tuple(name for name in names if name in ("gradient", "taylor")),)
    return of_one_sum + tuple((name,) for name in names if name not in of_one_sum[0])


class _Valued(NamedTuple):
    mask: PackedMask
    value: float


@dataclass
class MaskSearch:
    r"""Zeroes a growing part of the budget, scoring anew under the partly masked model each time.

    With :math:`F(m) = \mathrm{KL}(p_\theta \,\|\, p_{\theta \odot (1 - m)})` and its gradient G at the masked weights,
    :math:`s = -G \odot \theta` is to first order what masking an element adds to F, and what unmasking one takes away.
    Each round two masks of the wanted size are tried with a forward pass: the greedy one, which only adds the best
    elements, and the best of a pool somewhat larger, in which masked elements may lose their place. The better one is
    kept. Where both lose what was reached, the step was too long for a first-order score, and the budget is filled with
    the smallest weights instead, which change next to nothing. What a pool exceeds the budget by shrinks after each
    exchange that brought nothing, and grows again after each that did.

    Args:
        masked: The model.
        divergence: Over the samples that choose.
        budget: Of the mask.
        settings: How far it goes.
        fluctuation: Settings of the strategy; its ``min_delta`` is the growth that counts as an improvement.
        strategy: Name of what sizes the pool; under ``none`` the mask only grows, over all rounds.
        progress: Called with (gradient passes done, gradient passes at most).
    """

    masked: MaskedModel
    divergence: SharedDivergence
    budget: Budget
    settings: Search
    fluctuation: Fluctuation
    strategy: str
    progress: Callable[[int, int], None] | None = None
    best: PackedMask | None = field(default=None, init=False)
    """The best mask of the whole budget so far."""
    best_divergence: float = field(default=-math.inf, init=False)
    passes: int = field(default=0, init=False)
    """Forward and backward passes made."""
    evaluations: int = field(default=0, init=False)
    """Forward passes made for themselves."""
    history: list[dict[str, Any]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        marked, self._greedy = self.budget.total(self.budget.sizes()), self.strategy == "none"
        self.rounds = self.settings.rounds_for(sum(self.budget.numels), marked)
        self._steps = min(_GROWING, self.rounds if self._greedy else max(1, math.ceil(_GROWTH * self.rounds)))
        self._pool_factor = self.fluctuation.strategy(self.strategy, self.settings.seed)
        # A part of the budget, and many times the budget in several widths.
        self._started = PackedMask(())
        self._wide: list[tuple[int, int, PackedMask]] = []
        self._notable: list[list[Element]] = []
        self._alone: dict[Element, float] = {}
        self._outside = Outside()

    @property
    def exact(self) -> int:
        """Elements to be measured one by one; none where the budget is so large that they do not matter."""
        return 0 if self._greedy else self.settings.exact_for(self.budget.total(self.budget.sizes()))

    def offer(self, mask: Mapping[str, Tensor]) -> None:
        """Measures a mask of the whole budget by one forward pass, and keeps it if it is the best so far."""
        self._keep(self._measure(mask))

    def note(self, candidates: Iterable[Element]) -> None:
        """Takes elements, the most promising first, among which those to be measured one by one are chosen."""
        self._notable.append(list(candidates))

    def start(self, scores: Mapping[str, Tensor]) -> None:
        """Takes the first masks from scores of the unmasked model, which need not be held after it.

        Args:
            scores: This process's part of each tensor.
        """
        self._started = PackedMask(self.budget.selections(scores, self.budget.sizes(1 / (self._steps + 1))))
        for width, rounds in self._ways():
            pools = self.budget.pools(self.budget.sizes(), width)
            self._wide.append((width, rounds, PackedMask(self.budget.selections(scores, pools))))

    def _ways(self) -> list[tuple[int, int]]:
        """From how many times the budget a small mask shrinks, and in how many rounds; none where few are left."""
        left = int(_STARTING * self.rounds) - self._steps
        if not self.exact or left < _LEAST:
            return []
        others = _WIDTHS[1 : 1 + max(0, left - _FIRST) // _OTHERS[0]]
        each = min(_OTHERS[1], (left - _FIRST) // max(1, len(others)))
        return [(_WIDTHS[0], min(left, _FIRST)), *((width, each) for width in others)]

    def run(self) -> None:
        """Searches from where it was started until the rounds are spent or no exchange brings anything."""
        alone = self._measure_alone() if self.budget.total(self.budget.sizes()) < self.exact else None
        grown = self._grow(self._started)
        shrinks = bool(self._wide)
        while self._wide:
            width, rounds, wide = self._wide.pop(0)
            grown = max(grown, self._shrink(wide, width, rounds), key=lambda found: found.value)
        if not self._greedy:
            # Not from the best mask so far: that of a single shot may lead nowhere, and it is not forgotten.
            gain = self._exchange(grown)
            if self.exact:
                gain = self._exchange_pairs(self._breathe(gain) if shrinks else gain)
                assert self.best is not None
                self._exchange_one_by_one(_Valued(self.best, self.best_divergence), gain)
                if alone is not None:
                    self._exchange_one_by_one(alone, None)

    def _grow(self, started: PackedMask) -> _Valued:
        """Masks of growing size up to the whole budget, scored anew under each."""
        now, improvement, failures = self._measure(started), 0.0, 0
        gain: Mapping[str, Tensor] | None = None
        for step in range(1, self._steps + 1):
            gain = self._gains(now.mask) if gain is None else gain
            sizes = self.budget.sizes((step + 1) / (self._steps + 1))
            if gain is None:
                tried = {"greedy": now, "smallest": self._measure(self._filled(now.mask, sizes))}
                now = tried["smallest"]
                self._record(tried, "smallest", sizes, sizes, 1.0)
                if step == self._steps:
                    self._keep(now)
                continue
            factor = 1 + (self._pool_factor(len(self.history), improvement) - 1) / _SHRINKAGE**failures
            pools = self.budget.pools(sizes, factor)
            tried = self._try(gain, now, sizes, pools, fill=not self._greedy)
            # The first of equals: nothing is exchanged for nothing.
            kept = max(tried, key=lambda name: tried[name].value)
            improvement, moved = tried[kept].value - now.value, tried[kept].mask is not now.mask
            now = tried[kept]
            if step == self._steps:
                self._keep(now)
            self._record(tried, kept, sizes, pools, factor)
            failures = max(0, failures - 1) if moved else min(failures + 1, _MOST_FAILURES)
            gain = None if moved else gain
        return now

    def _shrink(self, now: PackedMask, width: float, rounds: int, means: MeanGains | None = None) -> _Valued:
        """Masks that shrink to the budget, made of the elements whose gains were the largest on average.

        Args:
            now: Of about so many times the budget.
            width: What the size starts from, as a multiple of the budget.
            rounds: Of which the last ones are at the budget.
            means: Of the gains so far, where a mask of the budget was widened; the strategy has no part then.
        """
        sizes, best, fluctuates = self.budget.sizes(), _Valued(now, -math.inf), means is None
        means = MeanGains(self.budget) if means is None else means
        for step in range(1, rounds + 1):
            gain = self._gains(now)
            if gain is None:
                break
            means.add(gain, now)
            factor = width ** max(0.0, 1 - step / (_NARROWING * rounds))
            factor *= self._pool_factor(step, 0.0) if fluctuates and factor > 1 else 1.0
            pools = self.budget.pools(sizes, factor)
            now = PackedMask(self.budget.selections(means.values, pools))
            if pools == sizes:
                found = self._measure(now)
                best = max(best, found, key=lambda each: each.value)
                self._keep(found)
                self._record({"greedy": found}, "greedy", sizes, sizes, 1.0)
        return best

    def _breathe(self, gain: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
        """Widens the best mask by what promises most and lets it shrink again, until no width brings anything."""
        failures, sizes = 0, self.budget.sizes()
        for width in itertools.cycle(_WIDER):
            if failures == len(_WIDER) or self.passes + _BREATH >= _ENDING * self.rounds:
                return gain
            assert self.best is not None
            before = self.best_divergence
            gain = self._gains(self.best) if gain is None else gain
            if gain is None:
                return None
            pools, means = self.budget.pools(sizes, width), MeanGains(self.budget)
            means.add(gain, self.best, weight=1.0)
            self._shrink(self._reselected(gain, self.best, pools, pools), width, _BREATH - 1, means)
            improved = self.best_divergence - before
            failures = 0 if improved > self.fluctuation.min_delta else failures + 1
            gain = None
        return gain

    def _exchange(self, now: _Valued) -> Mapping[str, Tensor] | None:
        """Exchanges of elements until the single best one to first order brings nothing; the scores at the end."""
        sizes = self.budget.sizes()
        gain: Mapping[str, Tensor] | None = None
        improvement, failures, stagnant, before = 0.0, 0, 0, now.value
        trials = self.evaluations + _TRIALS * self.rounds
        promises: dict[int, tuple[int, Tensor]] = {}
        while self.evaluations < trials:
            if gain is None:
                stagnant = 0 if now.value - before > self.fluctuation.min_delta or self.passes == 0 else stagnant + 1
                if self.passes == self.rounds or stagnant > self.settings.max_stagnant_iterations:
                    return None
                before, gain, promises = now.value, self._gains(now.mask), {}
                if gain is None:
                    return None
            factor = self._pool_factor(len(self.history), improvement)
            most = [pool - size for pool, size in zip(self.budget.pools(sizes, factor), sizes, strict=True)]
            total = max(1, sum(most) // _SHRINKAGE**failures)
            counts = self.budget.exchanges(gain, now.mask, most, total, promises, self._outside)
            if not any(counts):
                break
            pools = [size + count for size, count in zip(sizes, counts, strict=True)]
            tried = {"greedy": now, "pool": self._measure(self._reselected(gain, now.mask, sizes, pools))}
            kept = max(tried, key=lambda name: tried[name].value)
            improvement, moved = tried[kept].value - now.value, kept == "pool"
            now = tried[kept]
            self._keep(now)
            self._record(tried, kept, sizes, pools, factor)
            if not moved and total == 1:
                break
            failures = max(0, failures - 1) if moved else failures + 1
            gain = None if moved else gain
        return gain if now.mask is self.best else None

    def _candidates(self, first: Iterable[Element], mask: PackedMask | None) -> list[Element]:
        """The elements to be measured: the first of every list in turn, none twice and none that is masked."""
        held = set() if mask is None else {each.element for each in self.budget.marked(mask)}
        turns = itertools.zip_longest(first, *self._notable)
        order = dict.fromkeys(element for turn in turns for element in turn if element is not None)
        return [element for element in order if element not in held][: self.exact]

    def _measure_alone(self) -> _Valued:
        """Measures the most promising elements one at a time, and offers the mask of the best."""
        assert self.best is not None
        empty = PackedMask((name, torch.zeros_like(self.best[name])) for name in self.best)
        for element in self._candidates((), None):
            self._alone[element] = self._measure(self.budget.changed(empty, [element])).value
        slots: dict[tuple[int, int], list[Element]] = {}
        for element in sorted(self._alone, key=lambda each: -self._alone[each]):
            slots.setdefault(self.budget.slot(element), []).append(element)
        held = [each.element for each in self.budget.marked(self.best)]
        added, removed = [], []
        for slot, elements in slots.items():
            present = [element for element in held if self.budget.slot(element) == slot]
            wanted = elements[: len(present)]
            wanted += [element for element in present if element not in wanted][: len(present) - len(wanted)]
            added += [element for element in wanted if element not in present]
            removed += [element for element in present if element not in wanted]
        found = self._measure(self.budget.changed(self.best, added, removed))
        self._keep(found)
        return found

    def _exchange_pairs(self, gain: Mapping[str, Tensor] | None) -> Mapping[str, Tensor] | None:
        """Exchanges of the best pairs, halved where they do not help, round after round until none does."""
        assert self.best is not None
        now, sizes = _Valued(self.best, self.best_divergence), self.budget.sizes()
        trials = self.evaluations + _PAIR_TRIALS * self.exact
        while True:
            if gain is None:
                if self.passes == self.rounds or self.evaluations >= trials:
                    return None
                gain = self._gains(now.mask)
                if gain is None:
                    return None
            before, queue = now, [self.budget.pairs(gain, now.mask, self.exact)]
            while queue and self.evaluations < trials:
                pairs = queue.pop()
                added, removed = zip(*pairs, strict=True) if pairs else ((), ())
                if not pairs:
                    continue
                tried = self._measure(self.budget.changed(now.mask, added, removed))
                if tried.value > now.value:
                    now = tried
                elif len(pairs) > 1:
                    half = len(pairs) // 2
                    queue += [pairs[half:], pairs[:half]]
            self._keep(now)
            self._record({"greedy": before, "pairs": now}, "pairs", sizes, sizes, 1.0)
            if now.value - before.value <= self.fluctuation.min_delta:
                return gain if now is before else None
            gain = None

    def _exchange_one_by_one(self, now: _Valued, gain: Mapping[str, Tensor] | None) -> None:
        """Measures exchanges of single elements, each promising one for the worst of its slot, and keeps what helps."""
        if gain is None and self.passes == self.rounds:
            return
        start = now
        gain = self._gains(now.mask) if gain is None else gain
        if gain is None:
            return
        worst: dict[tuple[int, int], list[Scored]] = {}
        for held in self.budget.marked(now.mask, gain):
            worst.setdefault(self.budget.slot(held.element), []).append(held)
        outside = self.budget.strongest(gain, self.exact, now.mask)
        promised = [(each.score - worst[self.budget.slot(each.element)][0].score, each.element) for each in outside]
        ranked = [element for _, element in sorted(promised, key=lambda each: -each[0])]
        total = self.budget.total(self.budget.sizes())
        # Of small masks each candidate is tried for several elements, for a first order says little of them.
        partners = max(1, min(_PARTNERS, self.exact // total))
        while True:
            before = now
            for element in self._candidates(ranked, now.mask):
                row = worst[self.budget.slot(element)]
                if total == 1 and element in self._alone:
                    continue
                for index in range(min(partners, len(row))):
                    tried = self._measure(self.budget.changed(now.mask, [element], [row[index].element]))
                    if tried.value > now.value:
                        now = tried
                        # An element that has come in goes out last.
                        ranked.append(row[index].element)
                        row[index:] = [*row[index + 1 :], Scored(element, math.inf)]
                        break
            if partners == 1 or now is before:
                break
        self._keep(now)
        sizes = self.budget.sizes()
        self._record({"greedy": start, "exact": now}, "exact", sizes, sizes, 1.0)

    def _gains(self, mask: PackedMask) -> Mapping[str, Tensor] | None:
        """What masking each element adds, to first order, nats; None where nothing is known of it."""
        self.masked.zero(mask)
        self.passes, self._outside = self.passes + 1, Outside()
        try:
            # The value is known.
            _, gradients = self.divergence.gradients(self.masked.model, self.masked.parameters, measured=False, sign=-1)
        except NotDifferentiableError as error:
            # As where all of a token's embedding is masked: what every layer normalises is zero there.
            count = sum(map(mask.count, mask))
            warnings.warn(f"with {count:,} elements masked {error}: no score says what to add", stacklevel=2)
            gradients = None
        if self.progress is not None:
            self.progress(self.passes, self.rounds)
        if gradients is None:
            return None
        return {name: self.masked.multiply_(name, gradient) for name, gradient in gradients.items()}

    def _reselected(
        self, gain: Mapping[str, Tensor], mask: PackedMask, sizes: list[int], pools: list[int]
    ) -> PackedMask:
        """The best of a pool by the last scores; what stays is shared with the present mask."""
        return mask.replaced(self.budget.reselections(gain, mask, sizes, pools, self._outside))

    def _filled(self, mask: PackedMask, sizes: list[int]) -> PackedMask:
        """A mask that grows by the smallest weights, which change next to nothing."""
        smallest = ComputedScores(self.masked.parameters, lambda name: -precise(self.masked.value(name)).abs())
        return mask.replaced(self.budget.reselections(smallest, mask, sizes, sizes))

    def _try(
        self, gain: Mapping[str, Tensor], now: _Valued, sizes: list[int], pools: list[int], *, fill: bool
    ) -> dict[str, _Valued]:
        grows = self.budget.counts(now.mask) != sizes
        # The largest first: what the others take is part of it.
        wanted = {"pool": pools} if pools != sizes else {}
        wanted |= {"greedy": sizes} if grows else {}
        masks = {name: self._reselected(gain, now.mask, sizes, each) for name, each in wanted.items()}
        tried = {"greedy": self._measure(masks["greedy"]) if grows else now}
        if "pool" in masks:
            tried["pool"] = self._measure(masks["pool"])
        if fill and grows and max(each.value for each in tried.values()) < now.value:
            tried["smallest"] = self._measure(self._filled(now.mask, sizes))
        return tried

    def _measure(self, mask: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> _Valued:
        packed = (
            mask if isinstance(mask, PackedMask) else PackedMask(mask.items() if isinstance(mask, Mapping) else mask)
        )
        self.masked.zero(packed)
        self.evaluations += 1
        return _Valued(packed, self.divergence(self.masked.model))

    def _keep(self, found: _Valued) -> None:
        if found.value > self.best_divergence:
            self.best, self.best_divergence = found

    def _record(
        self, tried: Mapping[str, _Valued], kept: str, sizes: list[int], pools: list[int], factor: float
    ) -> None:
        elements = {"size": self.budget.total(sizes), "pool": self.budget.total(pools)}
        place = {"iteration": len(self.history), "passes": self.passes, **elements}
        values = {"greedy_kl": tried["greedy"].value, "pool_kl": tried["pool"].value if "pool" in tried else None}
        outcome = {"kl": tried[kept].value, "kept": kept, "accepted": kept == "pool", "best_kl": self.best_divergence}
        self.history.append({**place, "factor": factor, **values, **outcome})
