"""Runs the golden parameter analysis on a schedule, and tells how its mask moves from one time to the next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_goldy.analysis.forecast import Forecast, Plan, Run, forecast_golden
from lightning_goldy.analysis.golden import GoldenResult, check_golden_arguments, golden_parameters, vocabulary_of
from lightning_goldy.callbacks.base import AnalysisContext
from lightning_goldy.callbacks.golden_snapshot import MaskCallback
from lightning_goldy.core.mask import Scope
from lightning_goldy.core.naming import require_kinds
from lightning_goldy.core.space import ParameterSpace, Selection


class GoldenParameters(MaskCallback[GoldenResult]):
    """Which parameters sample after sample depends on, and how much of the change they carry.

    Logs the count, as a multiple of what shared rows and columns explain with its interval over the samples, and that
    of random tokens; the Jaccard index with the previous mask and, when a ``GoldenSnapshot`` runs beside it, the share
    of the squared change inside the mask. Saves the mask.

    Args:
        top_k_percent: Share that each sample marks, percent in (0, 100].
        score: ``gradient``, ``taylor``, ``fisher`` or a registered score of yours.
        scope: The share of each ``tensor``, or of all elements together (``global``).
        quorum: Share of the samples that must agree, a fraction in (0, 1].
        n_samples: Probe samples used.
        control: Whether to repeat it with random tokens of the same lengths, at the same cost once more.
        include: Glob patterns of parameter names.
        exclude: Glob patterns taken out again.
        last_layers: Only the last blocks: a fraction, or their number.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> GoldenParameters(top_k_percent=0)
        Traceback (most recent call last):
        ValueError: top_k_percent must lie in (0, 100]; got 0
    """

    dials: Mapping[str, int] = {"n_samples": 2}

    def __init__(
        self,
        top_k_percent: float = 5.0,
        *,
        score: str = "gradient",
        scope: Scope = "tensor",
        quorum: float = 1.0,
        n_samples: int | None = 16,
        control: bool = True,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        last_layers: float | int | None = None,
        **options: Any,
    ) -> None:
        require_kinds(GoldenParameters.__init__, locals())
        super().__init__(**options)
        check_golden_arguments(top_k_percent, score, scope, quorum, n_samples)
        self.top_k_percent, self.score, self.scope, self.quorum = top_k_percent, score, scope, quorum
        self.n_samples, self.control = n_samples, control
        self.selection = Selection(include, exclude, last_layers)

    def probe_samples(self) -> int | None:
        """The samples that vote."""
        return self.n_samples

    def space(self, model: nn.Module) -> ParameterSpace:
        """The selected parameters."""
        return self.selection.space(model)

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """A gradient of each sample, and a selection out of it."""
        options: dict[str, Any] = {"top_k_percent": self.top_k_percent, "whole": self.scope == "global"}
        options["control"] = self.control and vocabulary_of(plan.model) is not None
        return forecast_golden(plan, self.space(plan.model), self.n_samples, **options)

    def compute(self, context: AnalysisContext) -> GoldenResult:
        """Finds the golden parameters of the probe."""
        return golden_parameters(
            context.model,
            context.probe,
            context.objective,
            top_k_percent=self.top_k_percent,
            score=self.score,
            scope=self.scope,
            quorum=self.quorum,
            n_samples=self.used_samples,
            space=self.space(context.model),
            control=self.control,
            progress=context.progress,
        )
