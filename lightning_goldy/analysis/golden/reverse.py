"""Reverse golden parameters: the few elements whose zeroing changes most what the model says."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import Cache, check_cache
from lightning_goldy.analysis.golden.golden import SCORES
from lightning_goldy.analysis.golden.masked_divergence import (
    MaskedModel,
    SharedDivergence,
    only_these_require_gradients,
    pieces_of,
    taken_gradients,
    zeros_like_part,
)
from lightning_goldy.analysis.golden.search import STRATEGIES, Budget, Fluctuation, Mask, MaskSearch
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.batches import batch_tensors
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.mask import ParameterMask, Scope
from lightning_goldy.core.naming import block_of, kind_of, suggestion
from lightning_goldy.core.objective import CausalLMObjective, Objective
from lightning_goldy.core.sharding import Replicas, gather, like, local
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import Kind
from lightning_goldy.core.vector import ParameterVector, elements_in, require_finite

SINGLE_SHOTS = ("gradient", "taylor", "fisher")
"""The scores that every search is measured against."""


def single_shot_scores(
    model: nn.Module,
    samples: SharedDivergence,
    objective: Objective,
    parameters: Mapping[str, nn.Parameter],
    extra: str,
) -> dict[str, dict[str, Tensor]]:
    r"""Sums of scores over the forward and backward passes of all pieces, by name of the score.

    .. math:: \sum_i |g_i|, \qquad \sum_i |g_i \theta|, \qquad \sum_i g_i^2 \theta^2

    The last is, up to a factor, the second-order estimate of the divergence that zeroing one element causes, with the
    Fisher matrix's diagonal taken at the data's own labels. At the unmasked weights the divergence has no gradient.

    Args:
        model: The unmasked module.
        samples: The pieces; each is one pass.
        objective: Gives the log-probabilities to differentiate.
        parameters: Name to parameter.
        extra: Another registered score to sum; may be one of the three.

    Returns:
        Name of a score to name of a parameter to this process's part, in at least float32.

    Raises:
        ValueError: A parameter has received no gradient; it is named.
    """
    first = {name: zeros_like_part(parameter) for name, parameter in parameters.items()}
    second = {name: zeros_like_part(parameter) for name, parameter in parameters.items()}
    own = {} if extra in SINGLE_SHOTS else {name: zeros_like_part(parameter) for name, parameter in parameters.items()}
    seen = dict.fromkeys(parameters, 0)
    for piece in samples.pieces:
        objective.log_probs(model, piece).mean().backward()
        for name, gradient in taken_gradients(model, parameters):
            seen[name] = 1
            first[name] += gradient.abs()
            second[name].addcmul_(gradient, gradient)
            if own:
                value = local(parameters[name])
                own[name] += SCORES[extra](gradient.clone(), value.to(gradient.dtype))
    _require_all(seen, samples, next(iter(first.values())).device)
    for sums in (first, second, own):
        for each in sums.values():
            samples.replicas.sum_(each)
    values = {name: local(parameter).to(first[name].dtype) for name, parameter in parameters.items()}
    scores = {
        "gradient": first,
        "taylor": {name: first[name] * value.abs() for name, value in values.items()},
        "fisher": {name: second[name].mul_(value.square()) for name, value in values.items()},
    }
    return scores | ({extra: own} if own else {})


def _require_all(seen: dict[str, int], samples: SharedDivergence, device: torch.device) -> None:
    total = samples.replicas.sum_(torch.tensor(list(seen.values()), dtype=torch.int32, device=device))
    missing = [name for name, count in zip(seen, total.tolist(), strict=True) if not count]
    if missing:
        raise ValueError(
            f"the objective does not depend on {missing[0]} ({len(missing)} such parameters): no sample gave it a "
            "gradient; leave it out with exclude="
        )


# A forward and a backward pass in units of forward passes.
_PASS = 3


@dataclass(frozen=True)
class ReverseGoldenResult(AnalysisResult):
    """The mask, what zeroing it does, and how it was found.

    Args:
        mask: True where zeroing does most; boolean, on the CPU, exactly the budget.
        masked: Masked elements of each tensor, in the mask's order.
        kl_divergence: Of the masked model on the evaluation batches, nats per target, which had no part in the search.
        search_divergence: On the batches that chose, nats per target.
        single_shots: Divergence on the evaluation batches of the masks of the same size that a score of the unmasked
            model gives without a search, nats per target, by name of the score.
        history: One entry per iteration: ``iteration``, ``passes`` (forward and backward passes so far), ``size`` and
            ``pool`` (elements), ``factor``, ``greedy_kl``, ``pool_kl`` (None without a pool) and ``kl`` of what was
            ``kept`` (``greedy``, ``pool``, or ``smallest``, filled with the smallest weights), ``accepted`` (whether
            that was the pool's mask), ``best_kl`` (of the whole budget so far).
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

    mask: ParameterMask
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
        """The summary."""
        return self.summary()

    def vectors(self) -> dict[str, tuple[ParameterVector, Kind]]:
        """The mask."""
        return {"mask": (self.mask, "mask")}

    def summary(self) -> dict[str, Any]:
        """A JSON-able description without the mask: the settings, the course of the search, and counts by tensor."""
        rows = zip(self.mask.space.names, self.mask.space.shapes, self.masked, strict=True)
        return {
            "top_k_percent": self.top_k_percent,
            "scope": self.scope,
            "strategy": self.strategy,
            "score": self.score,
            "n_samples": self.n_samples,
            "n_eval_samples": self.n_eval_samples,
            "kl_divergence": self.kl_divergence,
            "search_divergence": self.search_divergence,
            "single_shots": dict(self.single_shots),
            "passes": self.passes,
            "history": [dict(each) for each in self.history],
            "tensors": [
                {
                    "name": name,
                    "block": block_of(name),
                    "kind": kind_of(name),
                    "numel": math.prod(shape),
                    "masked": masked,
                }
                for name, shape, masked in rows
            ],
        }


def reverse_golden_parameters(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    eval_batches: Iterable[Any],
    top_k_percent: float = 30.0,
    scope: Scope = "tensor",
    strategy: str = "adaptive_sinusoidal",
    score: str = "fisher",
    rounds: int = 11,
    chunk_size: int | None = None,
    inflation_step: float = 1.2,
    max_inflation_factor: float = 2.0,
    decay_factor: float = 0.9,
    min_delta: float = 0.01,
    max_stagnant_iterations: int = 5,
    amplitude: float = 0.3,
    frequency: float = 0.1,
    momentum: float = 0.8,
    temperature: float = 1.0,
    seed: int = 0,
    space: ParameterSpace | None = None,
    cache: Cache = "auto",
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> ReverseGoldenResult:
    r"""Searches for the mask of a given size whose zeroing changes the model's predictions most.

    .. math:: \max_{m \in \{0, 1\}^D,\; |m| = k} F(m), \qquad
        F(m) = \frac{1}{|T|} \sum_{t \in T} \mathrm{KL}\big(p_\theta(\cdot \mid x_{<t}) \,\|\,
        p_{\theta \odot (1 - m)}(\cdot \mid x_{<t})\big)

    over the whole vocabulary, at the target positions, in evaluation mode. The search starts from a second-order score,
    zeroes a part of the budget, and scores again with the gradient of F itself at the masked weights,
    :math:`s = -\nabla F \odot \theta`; round after round the mask grows to the budget. In each round the strategy
    sizes a pool somewhat larger than what is wanted, in which masked elements may lose their place; its best mask is
    kept when a forward pass shows it better than the greedy one. What is returned is the best mask of the whole budget
    that was measured, the masks of all single-shot scores among them. The model comes back as it was, to the bit. On
    several ranks the samples are shared out; every rank must call.

    Args:
        model: A plain, DistributedDataParallel-unwrapped, or FSDP2-sharded module.
        batches: Batches that score and choose; the same on every rank.
        objective: Where the targets are; next-token prediction by default.
        eval_batches: Other batches, which only measure what is returned.
        top_k_percent: Budget, percent in (0, 100]: exactly so many elements, rounded half up, at least one.
        scope: The share of each ``tensor``, or of all elements together (``global``).
        strategy: ``adaptive_sinusoidal``, ``momentum_based``, ``exploration_decay``, ``harmonic_oscillator``,
            ``chaos_driven``, ``inflation``, a registered one of yours, or ``none`` for plain greedy growth.
        score: Registered score of the unmasked model that the search starts from.
        rounds: Forward and backward passes under the masked model at most; one more scores the unmasked one.
        chunk_size: Samples of one forward and backward pass, to bound the memory; the batches' own size by default.
        inflation_step: Growth of the pool while nothing improves; strategy ``inflation``.
        max_inflation_factor: Largest pool as a multiple of the budget.
        decay_factor: Decay of the pool (``inflation``) or of the temperature (``exploration_decay``) per iteration.
        min_delta: Growth of the divergence that counts as an improvement, nats.
        max_stagnant_iterations: Iterations without one at the full budget, after which the search ends.
        amplitude: How far the pool exceeds the budget, a fraction of it.
        frequency: Oscillations per iteration.
        momentum: Share of its velocity that the pool keeps; ``momentum_based``, ``harmonic_oscillator``.
        temperature: Of ``exploration_decay``, nats.
        seed: Decides the strategies that draw numbers.
        space: Which parameters; all trainable ones by default.
        cache: Where the unmasked model's log-probabilities are kept: ``device``, ``cpu``, ``none``, or ``auto``.
        progress: Called with (passes done, passes at most) on this rank.
        split_over_ranks: Whether to share samples out over the ranks of an initialised process group.

    Returns:
        The mask, its divergence on the evaluation batches beside those of the single-shot masks, and the history.

    Raises:
        ValueError: An argument is out of range, there is no batch, a weight, a gradient or a divergence is not finite,
            or a parameter never received a gradient.
        TypeError: The objective has no logits.

    Example:
        >>> import torch
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> linear = nn.Linear(3, 2, bias=False)
        >>> linear.weight = nn.Parameter(torch.tensor([[3.0, 0.1, 0.1], [0.1, 0.1, 0.1]]))
        >>> batch = (torch.ones(2, 3), torch.tensor([0, 1]))
        >>> options = {"eval_batches": [batch], "top_k_percent": 16, "rounds": 2}
        >>> reverse_golden_parameters(linear, [batch], ClassifierObjective(), **options).mask["weight"].tolist()
        [[True, False, False], [False, False, False]]
    """
    settings = Fluctuation(
        amplitude, frequency, momentum, temperature, inflation_step, decay_factor, max_inflation_factor, min_delta
    )
    check_search_arguments(top_k_percent, scope, strategy, score, rounds, chunk_size, max_stagnant_iterations)
    check_cache(cache, None)
    objective = objective or CausalLMObjective()
    space = space or ParameterSpace.of(model)
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    choosing, measuring = _samples(batches, "batches"), _samples(eval_batches, "eval_batches")
    with preserved(model), replicas.together("reverse_golden_parameters"):
        parameters = space.resolve(model)
        require_finite(parameters, "weights")
        only_these_require_gradients(model, parameters)
        samples = SharedDivergence(model, pieces_of(choosing, chunk_size), objective, replicas, cache=cache)
        held_out = SharedDivergence(model, pieces_of(measuring, chunk_size), objective, replicas, cache=cache)
        with MaskedModel(model, space) as masked:
            search = MaskSearch(
                masked,
                samples,
                Budget(parameters, top_k_percent, scope),
                settings.strategy(strategy, seed),
                rounds,
                min_delta,
                max_stagnant_iterations,
                progress,
            )
            single, kl_divergence = _searched(search, held_out, objective, score, greedy=strategy == "none")
        assert search.best is not None
        cost = _cost(search, len(single), (_count(choosing), _count(measuring)), anchored=cache == "none")
        whole = {name: gather(like(parameters[name].detach(), part)).cpu() for name, part in search.best.items()}
    return ReverseGoldenResult(
        mask=ParameterMask(space, whole),
        masked=tuple(int(part.count_nonzero()) for part in whole.values()),
        kl_divergence=kl_divergence,
        search_divergence=search.best_divergence,
        single_shots=single,
        history=tuple(search.history),
        passes=search.passes + 1,
        evaluations=_PASS * (search.passes + 1) + search.evaluations + len(single) + 3,
        n_samples=_count(choosing),
        n_eval_samples=_count(measuring),
        top_k_percent=top_k_percent,
        scope=scope,
        strategy=strategy,
        score=score,
        cost=cost,
    )


def _cost(search: MaskSearch, n_single: int, samples: tuple[int, int], *, anchored: bool) -> Cost:
    """Passes over the scoring and the evaluation samples; ``anchored`` where each divergence runs the anchor again."""
    choosing, measuring = samples
    # Of the masked model; the returned mask is measured once more.
    compared = choosing * (search.passes + search.evaluations) + measuring * (n_single + 1)
    # To begin with the anchor passes over both sets, and the scores of the unmasked model are taken.
    forwards = compared * (2 if anchored else 1) + 2 * choosing + measuring
    return Cost(forwards=forwards, backwards=choosing * (search.passes + 1))


def _searched(
    search: MaskSearch, held_out: SharedDivergence, objective: Objective, score: str, *, greedy: bool
) -> tuple[dict[str, float], float]:
    """Held-out divergences of the single-shot masks and of the best mask that was found."""
    masked = search.masked
    scores = single_shot_scores(masked.model, search.divergence, objective, masked.parameters, score)
    single = _offer_all(search, held_out, scores)
    start = scores.pop(score)
    # The search needs their memory.
    scores.clear()
    search.run(start, greedy=greedy)
    masked.zero(search.best)
    return single, held_out(masked.model)


def _offer_all(
    search: MaskSearch, held_out: SharedDivergence, scores: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, float]:
    """Lets every single-shot mask compete, and measures it on the held-out samples."""
    found = {}
    for name in dict.fromkeys((*SINGLE_SHOTS, *scores)):
        require_finite(search.budget.laid_out(scores[name]), f"{name} scores")
        mask: Mask = search.budget.largest(scores[name], search.budget.sizes())
        search.offer(mask)
        found[name] = held_out(search.masked.model)
    search.masked.zero(None)
    return found


def check_search_arguments(
    top_k_percent: float,
    scope: str,
    strategy: str,
    score: str,
    rounds: int,
    chunk_size: int | None,
    max_stagnant_iterations: int,
) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: An argument is unknown or out of range.
    """
    elements_in(top_k_percent, 1)
    SCORES[score]
    STRATEGIES[strategy]
    if scope not in ("tensor", "global"):
        raise ValueError(f"unknown scope {scope!r}; {suggestion(str(scope), ('tensor', 'global'))}")
    counts = {"rounds": rounds, "chunk_size": chunk_size, "max_stagnant_iterations": max_stagnant_iterations}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")


def _samples(batches: Iterable[Any], argument: str) -> list[Any]:
    found = list(batches)
    if not found:
        raise ValueError(f"there is no sample: {argument} is empty")
    return found


def _count(batches: list[Any]) -> int:
    return sum(len(next(batch_tensors(batch))) for batch in batches)
