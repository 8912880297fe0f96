"""Compares the losses of variants that are trained side by side, on a schedule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import lightning.pytorch as L
import torch

from lightning_goldy.analysis.divergence import counted_forwards, own_share, shortened
from lightning_goldy.analysis.forecast import Forecast, Plan, Run, forecast_losses
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.core.batches import sample_count
from lightning_goldy.core.naming import require_at_least, require_kinds
from lightning_goldy.core.objective import FunctionObjective
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.training import VariantsModule


@dataclass(frozen=True)
class VariantLossesResult(AnalysisResult):
    """What each variant loses on the probe.

    Args:
        losses: Mean over the targets by variant, nats.
        n_targets: Number of targets.
        cost: Passes of the variants.
    """

    analysis: ClassVar[str] = "variant_losses"

    losses: Mapping[str, float]
    n_targets: int
    cost: Cost = field(default=Cost(), compare=False)

    def metrics(self) -> dict[str, float | None]:
        """The losses."""
        return {f"loss/{name}": loss for name, loss in self.losses.items()}

    def details(self) -> dict[str, Any]:
        """The number of targets."""
        return {"n_targets": self.n_targets}


class VariantLosses(AnalysisCallback[VariantLossesResult]):
    """The probe's loss under each variant of :class:`~lightning_goldy.training.variants.VariantsModule`, over the run.

    Args:
        n_samples: Probe samples used, None for all.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> VariantLosses(n_samples=0)
        Traceback (most recent call last):
        ValueError: n_samples must be at least 1; got 0
    """

    dials: Mapping[str, int] = {"n_samples": 2}

    def __init__(self, *, n_samples: int | None = None, **options: Any) -> None:
        require_kinds(VariantLosses.__init__, locals())
        super().__init__(**options)
        if n_samples is not None:
            require_at_least("n_samples", n_samples, 1)
        self.n_samples = n_samples

    def probe_samples(self) -> int | None:
        """The samples that the losses are taken over."""
        return self.n_samples

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a module without variants."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and not isinstance(pl_module, VariantsModule):
            raise ValueError(
                f"{self.name} compares the variants of a lightning_goldy.training.variants.VariantsModule; "
                f"this is a {type(pl_module).__name__}"
            )

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """A forward pass of every variant over the samples."""
        return forecast_losses(plan, self.n_samples, plan.variants)

    def compute(self, context: AnalysisContext) -> VariantLossesResult:
        """Takes every variant's loss on the probe."""
        module, objective = context.pl_module, context.objective
        assert isinstance(module, VariantsModule)
        assert objective is not None
        replicas = Replicas.world()
        batches = shortened(context.probe, objective, self.used_samples, None)
        trained = module.trained_models()
        totals: dict[str, float] = dict.fromkeys(module.variants, 0.0)
        count, passes = 0, {"forwards": 0.0}
        for batch in own_share(batches, module, replicas, context.progress):
            weight = 0
            for name, model in module.variant_models().items():
                with counted_forwards(trained[name], passes), torch.no_grad():
                    if isinstance(objective, FunctionObjective):
                        loss, weight = float(objective.loss(model, batch)), sample_count(batch)
                    else:
                        target = objective.logits_and_targets(model, batch)
                        loss, weight = float(target.loss()), len(target.targets)
                totals[name] += weight * loss
            count += weight
        parts = replicas.gather_objects((totals, count, int(passes["forwards"])))
        n_targets = sum(part[1] for part in parts)
        losses = {name: sum(part[0][name] for part in parts) / n_targets for name in totals}
        return VariantLossesResult(losses, n_targets, Cost(forwards=sum(part[2] for part in parts)))
