"""Describes the shape of the change since the golden snapshot, on a schedule."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from torch import nn

from lightning_goldy.analysis.change import (
    Directions,
    ParameterDistributionResult,
    check_distribution_arguments,
    parameter_distribution,
)
from lightning_goldy.analysis.forecast import Forecast, Plan, Run, forecast_distribution
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.callbacks.golden_snapshot import require_snapshot
from lightning_goldy.core.architecture.adapters import WeightSpace, check_space, require_merged
from lightning_goldy.core.naming import require_kinds


class ParameterDistribution(AnalysisCallback[ParameterDistributionResult]):
    """The shape of the change since the golden snapshot: ranks, singular values, alignment, drift of histograms.

    Logs, for the model and by block, the stable and the effective rank of the change, its alignment with the base's top
    singular directions over chance, its relative size, the drift of the weights' histograms, and the share of the
    present weights' top singular directions that resemble none of the base's, beside that of a random change. A
    ``GoldenSnapshot`` must be among the callbacks.

    Args:
        top: Singular values and directions kept of each matrix.
        exact_below: Largest smaller side of a matrix whose whole spectrum is computed; None computes it of all.
        seed: Of the randomised decomposition of larger ones.
        intruders_below: Cosine below which a direction resembles another no more; None looks for no such intruders.
        space: Of a model with adapters ``merged``, the change of the weights that they come to, or ``adapters``.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> ParameterDistribution(top=0)
        Traceback (most recent call last):
        ValueError: top must be at least 1; got 0
    """

    compares = True
    needs_probe = False
    weights_alone = True

    def __init__(
        self,
        top: int = 8,
        *,
        exact_below: int | None = 256,
        seed: int = 0,
        intruders_below: float | None = 0.5,
        space: WeightSpace = "merged",
        **options: Any,
    ) -> None:
        require_kinds(ParameterDistribution.__init__, locals())
        super().__init__(**options)
        check_distribution_arguments(top, exact_below, intruders_below)
        check_space(space)
        self.top, self.exact_below, self.seed, self.space = top, exact_below, seed, space
        self.intruders_below = intruders_below

    def forget(self) -> None:
        """Drops the base's singular directions, which later analyses of a run use again."""
        super().forget()
        self._directions: Directions = {}

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Checks that there is a snapshot to compare with."""
        require_snapshot(trainer, self.name)
        require_merged(model, self.space)

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """Two decompositions of each matrix, and two more for intruders; no pass of the model."""
        looked = self.intruders_below is not None
        return forecast_distribution(plan, top=self.top, exact_below=self.exact_below, intruders=looked)

    def compute(self, context: AnalysisContext) -> ParameterDistributionResult:
        """Describes the change of every tensor."""
        return parameter_distribution(
            context.model,
            require_snapshot(context.trainer, self.name).base,
            top=self.top,
            exact_below=self.exact_below,
            seed=self.seed,
            space=self.space,
            progress=context.progress,
            directions=self._directions,
            intruders_below=self.intruders_below,
        )
