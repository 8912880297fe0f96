"""Runs the search for reverse golden parameters on a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
from torch import nn

from lightning_goldy.analysis.basin import Selection
from lightning_goldy.analysis.continuations import check_generation_arguments, compare_generations
from lightning_goldy.analysis.divergence import shortened
from lightning_goldy.analysis.forecast import Forecast, Plan, ReverseSettings, Run, forecast_reverse
from lightning_goldy.analysis.golden import (
    Fluctuation,
    ReverseGoldenResult,
    Search,
    check_search_arguments,
    reverse_golden_parameters,
)
from lightning_goldy.analysis.result import Row
from lightning_goldy.callbacks.base import AnalysisContext
from lightning_goldy.callbacks.golden_parameters import MaskCallback
from lightning_goldy.core.batches import sample_count, take_samples
from lightning_goldy.core.mask import Scope
from lightning_goldy.core.naming import options_of, require_kinds, require_number
from lightning_goldy.core.objective import CausalLMObjective, Objective
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import elements_in
from lightning_goldy.training.subject import find_tokenizer


@dataclass(frozen=True)
class Generations:
    """Prompts that are continued with and without the mask.

    Args:
        prompts: Texts; none by default.
        max_new_tokens: Longest continuation, tokens.
        do_sample: Draw tokens; otherwise take the most probable one.
        temperature: Of the drawing.
        seed: Decides the draws.

    Raises:
        ValueError: A value is out of range, or the prompts are one string.

    Example:
        >>> Generations(prompts="hello")
        Traceback (most recent call last):
        ValueError: prompts is a list of texts; got the string 'hello', write ['hello']
    """

    prompts: Sequence[str] = ()
    max_new_tokens: int = 40
    do_sample: bool = False
    temperature: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.prompts, str):
            raise ValueError(f"prompts is a list of texts; got the string {self.prompts!r}, write [{self.prompts!r}]")
        require_kinds(type(self), vars(self))
        check_generation_arguments(self.max_new_tokens, self.temperature)


class ReverseGoldenParameters(MaskCallback[ReverseGoldenResult]):
    """Which few parameters the predictions hang on: the mask whose zeroing changes them most.

    The first half of the probe samples chooses, the second half measures. Logs the divergence of the masked model
    beside those of single-shot masks, the overlap with the previous mask and, when a :class:`GoldenSnapshot` runs
    beside it, the share of the squared change inside the mask. Saves the mask.

    Args:
        top_k_percent: Budget, percent in (0, 100].
        scope: The share of each ``tensor``, or of all elements together (``global``).
        strategy: Sizes the pool of candidates, or ``none`` for plain greedy growth.
        n_samples: Probe samples used; half of them, rounded up, choose.
        search: How the search goes.
        fluctuation: Settings of the strategies.
        selection: Which parameters may be masked.
        generations: Prompts to continue with and without the mask; none by default.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> ReverseGoldenParameters(n_samples=1)
        Traceback (most recent call last):
        ValueError: n_samples must be at least 2, one to choose and one to measure; got 1
    """

    dials: Mapping[str, int] = {"n_samples": 2, "search.rounds": 2}

    def __init__(
        self,
        top_k_percent: float = 1.0,
        *,
        scope: Scope = "tensor",
        strategy: str = "adaptive_sinusoidal",
        n_samples: int = 16,
        search: Search = Search(),  # noqa: B008 - frozen
        fluctuation: Fluctuation = Fluctuation(),  # noqa: B008 - frozen
        selection: Selection = Selection(),  # noqa: B008 - frozen
        generations: Generations = Generations(),
        **options: Any,
    ) -> None:
        require_kinds(ReverseGoldenParameters.__init__, locals())
        super().__init__(**options)
        check_search_arguments(top_k_percent, scope, strategy)
        require_number("n_samples", n_samples, whole=True)
        if n_samples < 2:
            raise ValueError(f"n_samples must be at least 2, one to choose and one to measure; got {n_samples}")
        self.top_k_percent, self.scope, self.strategy, self.n_samples = top_k_percent, scope, strategy, n_samples
        self.search = options_of(Search, "search", search)
        self.fluctuation = options_of(Fluctuation, "fluctuation", fluctuation)
        self.selection = options_of(Selection, "selection", selection)
        self.generations = options_of(Generations, "generations", generations)

    def probe_samples(self) -> int | None:
        """The samples that choose and those that measure."""
        return self.n_samples

    def space(self, model: nn.Module) -> ParameterSpace:
        """The selected parameters."""
        return self.selection.space(model)

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Checks the selection and the tokenizer, and takes up the last mask of a run that is resumed."""
        super().prepare(trainer, model)
        if self.generations.prompts:
            _tokenizer(trainer)

    def limited(self) -> dict[str, Any] | None:
        """The whole search is opt-in."""
        return None

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """A gradient per round, and the trials of what each proposes."""
        space = self.space(plan.model)
        settings = ReverseSettings.of(
            self._rounds(space),
            self.search.score,
            self.strategy,
            cache=self.search.cache,
            chunk_size=self.search.chunk_size,
            top_k_percent=self.top_k_percent,
            alone=self.search.exact_for(elements_in(self.top_k_percent, space.numel)),
        )
        return forecast_reverse(plan, space, self.n_samples, settings)

    def _rounds(self, space: ParameterSpace) -> int:
        return self.search.rounds_for(space.numel, elements_in(self.top_k_percent, space.numel))

    def dialled(self, share: float, given: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
        """Rounds that are not given are those that the parameters allow, and none are derived that equal them."""
        rounds = self._rounds(self.space(plan.model))
        found = super().dialled(share, {**given, "search.rounds": rounds}, plan)
        return {**found, "search.rounds": given["search.rounds"]} if found["search.rounds"] == rounds else found

    def compute(self, context: AnalysisContext) -> ReverseGoldenResult:
        """Searches on one half of the probe and measures on the other."""
        objective = context.objective or CausalLMObjective()
        choosing, measuring = halves(context.probe, objective, min(self.n_samples, self.probe_size))
        return reverse_golden_parameters(
            context.model,
            choosing,
            objective,
            eval_batches=measuring,
            top_k_percent=self.top_k_percent,
            scope=self.scope,
            strategy=self.strategy,
            search=self.search,
            fluctuation=self.fluctuation,
            space=self.space(context.model),
            progress=context.progress,
        )

    def describe(self, result: ReverseGoldenResult, context: AnalysisContext) -> Row:
        """Adds what the mask has to do with the last one and the change, and what the masked model says."""
        row = super().describe(result, context)
        if not self.generations.prompts:
            return row
        tokenizer = _tokenizer(context.trainer)
        told = self.generations
        found = compare_generations(
            context.model,
            tokenizer,
            told.prompts,
            result.mask,
            max_new_tokens=told.max_new_tokens,
            do_sample=told.do_sample,
            temperature=told.temperature,
            seed=told.seed,
        )
        metrics = {"token_agreement": found.mean_agreement, "kl_per_token": found.mean_kl_per_token}
        return row.extended(metrics, {"generations": found.rows()}, cost=found.cost)


def halves(batches: Sequence[Any], objective: Objective, n_samples: int) -> tuple[list[Any], list[Any]]:
    """The first ``n_samples`` samples in two halves, the first the larger; no sample is in both.

    Raises:
        ValueError: There are fewer samples.

    Example:
        >>> import torch
        >>> first, second = halves([{"x": torch.arange(3)}, {"x": torch.arange(3, 6)}], CausalLMObjective(), 5)
        >>> [part["x"].tolist() for part in first], [part["x"].tolist() for part in second]
        ([[0, 1, 2]], [[3, 4]])
    """
    left = (n_samples + 1) // 2
    first, second = [], []
    for batch in shortened(batches, objective, n_samples, None):
        size = sample_count(batch)
        take = min(size, left)
        left -= take
        if take:
            first.append(take_samples(batch, slice(take)))
        if take < size:
            second.append(take_samples(batch, slice(take, None)))
    return first, second


def _tokenizer(trainer: L.Trainer) -> Any:
    tokenizer = find_tokenizer(trainer)
    if not callable(tokenizer):
        raise ValueError(
            "prompts need a tokenizer: give the LightningModule or the data module an attribute `tokenizer`, or leave "
            "generations=Generations(prompts=...) out"
        )
    return tokenizer
