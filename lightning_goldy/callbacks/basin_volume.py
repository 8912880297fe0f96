"""Runs the basin volume analysis on a schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_goldy.analysis.basin import (
    BasinVolumes,
    BridgeSettings,
    Estimator,
    Method,
    Selection,
    VolumeSurvey,
    adam_preconditioner,
)
from lightning_goldy.analysis.basin.survey import ONLY_SPLIT, Make, PreconditionerName
from lightning_goldy.analysis.forecast import BasinSettings, Forecast, Plan, Run, Work, forecast_basin, forecast_bridge
from lightning_goldy.callbacks.base import (
    AnalysisCallback,
    AnalysisContext,
    Trigger,
    fingerprint_batches,
    try_gradients,
)
from lightning_goldy.core.isolation import undisturbed
from lightning_goldy.core.naming import options_of, require_kinds
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.training.subject import check_probe, check_split_names, find_splits


def find_adam(trainer: L.Trainer, space: ParameterSpace, model: nn.Module) -> Optimizer:
    """The optimizer of the Adam family that holds the parameters of a space.

    Raises:
        ValueError: None holds all of them, or the one that does keeps no second moments.
    """
    wanted = {id(parameter) for parameter in space.resolve(model).values()}
    for optimizer in trainer.optimizers:
        if not wanted <= {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}:
            continue
        if "betas" in optimizer.param_groups[0]:
            return optimizer
        raise ValueError(
            f"{type(optimizer).__name__} keeps no second moments; preconditioner='adam' and 'best' need an optimizer "
            "of the Adam family: use one, or preconditioner='none'"
        )
    raise ValueError(
        f"a preconditioner needs one optimizer that holds all {len(space)} selected parameters; none of "
        f"{[type(optimizer).__name__ for optimizer in trainer.optimizers]} does: narrow the selection, or use "
        "preconditioner='none'"
    )


class BasinVolume(AnalysisCallback[BasinVolumes]):
    """How robust the model is: the volume of the region around it in which its predictions stay the same.

    Logs a lower bound of the log-volume along rays, bits per parameter, spread, effective sample size, scaling
    exponent, tolerance, unbounded directions and evaluations, for each split and cutoff; with several cutoffs, the
    slope over them. A bound takes two to three forward passes over the samples per direction. With ``method="bridge"``
    the volume itself with its standard error at the start, at checkpoints and at the end.

    Args:
        n_directions: Directions per volume.
        cutoff: Mean divergence at the boundary, nats per target, or several.
        preconditioner: ``none``; ``adam``, from the optimizer's second moments; ``kronecker``, from the Fisher
            information of the samples, for one forward and backward pass more; ``best``, the best of all of them, at
            three times the cost. The damping is chosen once, by a pilot.
        sigma: Standard deviation of the Gaussian measure: a number, ``first`` to keep the root mean square of the
            first analysis for the whole run, or None to take it anew each time, so that volumes do not compare.
        splits: Sets of samples by name, True for those of the data module's ``analysis_splits()``, or None for the
            probe.
        n_samples: Samples used of the probe, or of each split.
        selection: Which parameters move.
        estimator: How a volume is estimated.
        method: ``rays``, a lower bound; ``bridge``, the volume too, in thousands of gradients; ``auto``, the bridge
            where it can be walked. It is walked at the moments of ``at``, never between them.
        bridge: How it is walked, and its budget of gradients. Its state is kept in the callback's folder where
            ``keep_in`` names none: a run that is killed within a bridge goes on with it at the same weights.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> BasinVolume(cutoff=0.0)
        Traceback (most recent call last):
        ValueError: cutoff must be positive and finite; got 0.0
    """

    dials: Mapping[str, int] = {"survey.n_samples": 2, "survey.n_directions": 2}

    def __init__(
        self,
        n_directions: int = 5,
        *,
        cutoff: float | Sequence[float] = 1e-2,
        preconditioner: PreconditionerName = "none",
        sigma: float | Literal["first"] | None = "first",
        splits: bool | Mapping[str, Iterable[Any]] | None = None,
        n_samples: int | None = 16,
        selection: Selection = Selection(),  # noqa: B008 - frozen
        estimator: Estimator = Estimator(),  # noqa: B008 - frozen
        method: Method = "rays",
        bridge: BridgeSettings = BridgeSettings(),  # noqa: B008 - frozen
        **options: Any,
    ) -> None:
        require_kinds(BasinVolume.__init__, locals())
        super().__init__(**options)
        self.survey = VolumeSurvey(
            n_directions=n_directions,
            cutoffs=(cutoff,) if isinstance(cutoff, (int, float)) else tuple(cutoff),
            preconditioner=preconditioner,
            sigma=sigma,
            n_samples=n_samples,
            selection=options_of(Selection, "selection", selection),
            estimator=options_of(Estimator, "estimator", estimator),
            method=method,
            bridge=options_of(BridgeSettings, "bridge", bridge),
        )
        self._walks, self._keeps_here = False, self.survey.bridge.keep_in is None
        if isinstance(splits, Mapping):
            check_split_names(splits)
        self.splits = splits or None
        if self.splits is not None and self.probe is not None:
            raise ValueError("give probe= or splits=, not both: the splits are what is analysed")
        self.needs_probe = self.splits is None

    def forget(self) -> None:
        """Drops the splits, and the sigma and the damping of the first analysis."""
        super().forget()
        self._split_batches: dict[str, list[Any]] = {}
        self._told = False
        if hasattr(self, "survey"):
            self.survey.load({"sigma": None, "eps": None})

    def probe_samples(self) -> int | None:
        """The samples that the divergence is taken over."""
        return self.survey.n_samples

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Checks the selection and the optimizer, and tries every split."""
        space = self.survey.space(model)
        if self.needs_probe:
            self.survey.n_samples = self.used_samples
        if self.survey.needs_adam:
            find_adam(trainer, space, model)
        if self.survey.sigma is None:
            rank_zero_warn(
                f"{self.name}: with sigma=None every analysis has a measure of its own, so its volumes do not compare; "
                "sigma='first' keeps the first one's"
            )
        if self.splits is not None:
            self._split_batches = find_splits(trainer, self.splits, self.survey.n_samples)
            with undisturbed(trainer, trainer.lightning_module):
                objective = self.task(trainer.lightning_module, model)
                for split, batches in self._split_batches.items():
                    Replicas.world().agree(f"{self.name}: the split {split!r}", fingerprint_batches(batches))
                    check_probe(
                        model,
                        objective,
                        batches,
                        self.survey.n_samples,
                        pl_module=trainer.lightning_module,
                        check=self.check,
                    )

    def tried_batches(self) -> Sequence[Any]:
        """The probe, or the first split."""
        return next(iter(self._split_batches.values()), self._batches)

    def try_route(self, model: nn.Module, objective: Objective, sample: Any) -> None:
        """A backward pass of one sample where the Fisher information is wanted; volumes need forward passes alone."""
        if self.survey.preconditioner in ("kronecker", "best") or self.survey.method != "rays":
            try_gradients(model, self.survey.space(model).resolve(model), objective, sample)

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """The anchor's predictions, and two forward passes or so for each direction."""
        return forecast_basin(plan, self.survey.space(plan.model), self._settings())

    def forecast(self, plan: Plan, run: Run) -> Forecast:
        """Bridges are walked at the moments of ``at`` alone."""
        found = super().forecast(plan, run)
        if self.survey.method == "rays" or (plan.shards > 1 and self.survey.method == "auto"):
            return found
        bridge = self.survey.bridge
        walk = forecast_bridge(
            plan,
            self.survey.space(plan.model),
            self._settings(),
            max_gradients=bridge.max_gradients,
            chains=bridge.chains,
        )
        moments = len(run.firings(every_n_steps=None, every_n_epochs=None, at=self.at))
        return replace(
            found, once=sum((walk.work for _ in range(moments)), Work()), memory=max(found.memory, walk.memory)
        )

    def _settings(self) -> BasinSettings:
        survey, asked = self.survey, self.survey.preconditioner
        return BasinSettings(
            n_directions=survey.n_directions,
            cutoffs=len(survey.cutoffs),
            splits=len(self.splits) if isinstance(self.splits, Mapping) else 1,
            proposals=3 if asked == "best" else 1,
            preconditioned=asked != "none",
            fisher=asked in ("kronecker", "best"),
            n_samples=survey.n_samples,
            max_tokens=survey.estimator.max_seq_len,
            cached=survey.estimator.cache != "none",
        )

    def _analyse(self, trainer: L.Trainer, pl_module: L.LightningModule, trigger: Trigger, *rest: Any) -> Any:
        self._walks = trigger not in ("step", "epoch")
        return super()._analyse(trainer, pl_module, trigger, *rest)

    def compute(self, context: AnalysisContext) -> BasinVolumes:
        """Measures the volumes."""
        objective = context.objective or self.task(context.pl_module, context.model)
        if self._keeps_here:
            self.survey.bridge = replace(self.survey.bridge, keep_in=str(self.folder))
        found = self.survey.measure(
            context.model,
            objective,
            self._split_batches or {ONLY_SPLIT: list(context.probe)},
            adam=self._adam(context),
            bridged=self._walks,
            progress=context.progress,
        )
        if self._keeps_here and self._walks and context.trainer.is_global_zero:
            # All bridges of this moment have ended; what is left is of walks whose weights never came back.
            for left in self.folder.glob("bridge-*.safetensors"):
                left.unlink()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Adds the sigma and the damping that the run keeps."""
        return {**super().state_dict(), **self.survey.state()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Notes what the interrupted run left."""
        super().load_state_dict(state_dict)
        self.survey.load(state_dict)

    def _adam(self, context: AnalysisContext) -> Make | None:
        if not self.survey.needs_adam:
            return None
        space = self.survey.space(context.model)
        optimizer = find_adam(context.trainer, space, context.model)
        if not any(optimizer.state.values()):
            if not self._told:
                rank_zero_warn(
                    f"{self.name}: the optimizer has made no step yet, so at step {context.step} volumes are measured "
                    "without a preconditioner; do not compare them with later ones"
                )
            self._told = True
            return None
        return lambda eps: adam_preconditioner(optimizer, space, module=context.model, eps=eps)
