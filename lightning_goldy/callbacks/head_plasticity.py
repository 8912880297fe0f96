"""Prunes and regrows attention heads on a schedule while the model trains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_goldy.analysis.forecast import Forecast, Plan, Run, forecast_heads
from lightning_goldy.analysis.heads import (
    PlasticityResult,
    PlasticityRun,
    PlasticitySettings,
    PlasticitySubject,
    PruningSchedule,
    Recovery,
    Regrowth,
    Scoring,
    first_samples,
    load_gates,
)
from lightning_goldy.analysis.heads.importance import DEFAULT_STRATEGY
from lightning_goldy.analysis.heads.schedule import check_regrowth, plan_from
from lightning_goldy.analysis.result import Cost
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext, Trigger
from lightning_goldy.callbacks.engine.store import steps_so_far, training_length
from lightning_goldy.callbacks.engine.weights import undefined_weights
from lightning_goldy.callbacks.golden_snapshot import TrainingBase
from lightning_goldy.core.architecture import HeadGates, UnsupportedArchitectureError
from lightning_goldy.core.isolation import undisturbed
from lightning_goldy.core.naming import options_of, require_kinds
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.report.loggers import log_scalars
from lightning_goldy.training.subject import find_model, find_objective


class HeadPlasticity(AnalysisCallback[PlasticityResult]):
    """Which heads does the finetune need? Closes the least important ones, lets the model recover, regrows the wanted.

    Each cycle: heads are scored and cut along a ramp until ``pruning_level`` of them are closed, the attention of the
    layers that were cut trains with a higher learning rate, then a share of the closed heads opens again and trains on.
    A cycle that costs too much loss can be rolled back. Closed heads stay closed when the training ends; their weights
    receive no update while they are. Scores and losses are of the probe, in evaluation mode.

    Unlike the other callbacks it changes the training. Scoring and measuring leave no trace all the same.

    Args:
        strategy: How heads are scored: ``taylor``, ``first_order``, ``magnitude``, ``entropy``, ``combined``,
            ``ablation``, ``random``, or a registered score of yours.
        pruning_level: Share of all heads that is closed after the last cut of a cycle, a fraction in (0, 1).
        cycles: Number of cycles.
        min_heads_per_layer: Heads that stay open in every layer.
        scoring: Samples, weights, seed, single heads or whole groups.
        schedule: Warm-up, length of a cycle, ramp, time of regrowth.
        regrowth: How many heads regrow, which, and from what.
        recovery: Learning rate after a cut, measurements, tolerance.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> HeadPlasticity(pruning_level=1.0)
        Traceback (most recent call last):
        ValueError: pruning_level is the share of all heads to cut, above 0 and below 1; got 1.0
    """

    changes_training = True

    def __init__(
        self,
        strategy: str = DEFAULT_STRATEGY,
        *,
        pruning_level: float = 0.2,
        cycles: int = 1,
        min_heads_per_layer: int = 1,
        scoring: Scoring = Scoring(),  # noqa: B008 - frozen
        schedule: PruningSchedule = PruningSchedule(),  # noqa: B008 - frozen
        regrowth: Regrowth = Regrowth(),  # noqa: B008 - frozen
        recovery: Recovery = Recovery(),  # noqa: B008 - frozen
        **options: Any,
    ) -> None:
        require_kinds(HeadPlasticity.__init__, locals())
        super().__init__(**options)
        self.settings = PlasticitySettings(
            strategy,
            pruning_level,
            cycles,
            min_heads_per_layer,
            options_of(Scoring, "scoring", scoring),
            options_of(PruningSchedule, "schedule", schedule),
            options_of(Regrowth, "regrowth", regrowth),
            options_of(Recovery, "recovery", recovery),
        )

    def forget(self) -> None:
        """Drops the plan and its state; heads that are closed in the last model stay closed."""
        super().forget()
        if getattr(self, "_plasticity", None) is not None:
            self.plasticity.remove()
        self._plasticity: PlasticityRun | None = None
        self._loaded: dict[str, Any] | None = None
        self._base = TrainingBase()
        self._told, self._undefined = -1, False

    @property
    def plasticity(self) -> PlasticityRun:
        """The run's plan, state and history.

        Raises:
            RuntimeError: Training has not started yet.
        """
        if self._plasticity is None:
            raise RuntimeError(f"{self.name}: heads are cut once training has started")
        return self._plasticity

    def probe_samples(self) -> int | None:
        """The samples that heads are scored and losses measured on."""
        return self.settings.scoring.n_samples

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Checks that the plan can be carried out, and takes up the state of a run that is resumed."""
        self._batches = first_samples(self._batches, self.settings.scoring.n_samples)
        gates = HeadGates.of(model) or HeadGates(model)
        check_regrowth(gates, self.settings.regrowth)
        earlier = self._plasticity
        saved = self._loaded if self._resumed else None
        if earlier is not None:
            earlier.remove()
            # The same trainer goes on with another fit.
            earlier.save_files(self.folder, write=trainer.is_global_zero)
            Replicas.world().meet(self.name)
            saved = earlier.state_dict()
        if saved is not None:
            load_gates(gates, saved)
        if self._resumed:
            self._carry(trainer)
        if saved is None:
            plan = self.settings.plan(gates, training_length(trainer))
        else:
            # A resumed run may have another length; fractions stay those of the length that it began with.
            plan = plan_from(saved["plan"], self.settings.recovery)
        base = None
        if self.settings.needs_base:
            base = self._base.find(trainer, model, attention_space(model, gates), self.folder)
        self._plasticity = PlasticityRun(
            self.settings,
            plan,
            gates,
            module=trainer.lightning_module,
            model=model,
            optimizers=trainer.optimizers,
            base=base,
        )
        if saved is not None:
            self._plasticity.load_state_dict(saved, self.folder)
        self._check(trainer, model)

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins the first cycle when there is no warm-up."""
        super().begin(trainer, pl_module)
        self._loaded = None
        self._act(trainer, pl_module, "start")
        self.plasticity.prepare_step(steps_so_far(trainer))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Does what is due after an optimizer step, or measures the recovery."""
        stepped, step = trainer.global_step != self._seen_step, steps_so_far(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not stepped:
            return
        self._act(trainer, pl_module, "step")
        if self.plasticity.measures(step) and not self._undefined:
            self._measure(trainer, pl_module)
        self.plasticity.prepare_step(step)

    def _act(self, trainer: L.Trainer, pl_module: L.LightningModule, trigger: Trigger) -> None:
        """Carries out what is due."""
        if self.plasticity.due(steps_so_far(trainer)) is None or self._undefined:
            return
        self.run(trainer, pl_module, trigger)
        # Of weights that are no numbers nothing is carried out, and one row tells so.
        if self.plasticity.due(steps_so_far(trainer)) is not None:
            self._undefined = bool(undefined_weights(find_model(pl_module, self.model_attribute)))
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, AnalysisCallback):
                callback.training_changed_weights()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Keeps closed heads out of the gradient's norm, before it is clipped."""
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._plasticity is not None:
            self._plasticity.zero_gradients()

    def try_route(self, model: nn.Module, objective: Objective, sample: Any) -> None:
        """Scores heads on one sample; ablation needs forward passes alone."""
        scoring, regrowth = replace(self.settings.scoring, n_samples=1), self.settings.regrowth
        strategies = {self.settings.strategy} - {"ablation"}
        if regrowth.fraction > 0 and regrowth.choice == "gradient":
            strategies.add("magnitude")
        for strategy in sorted(strategies):
            PlasticitySubject(model, self.plasticity.gates, [sample], objective, scoring).scores(strategy, 0)

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """Scores before each cut and at the regrowth, and losses around both."""
        settings = self.settings
        scored = 1 + (settings.regrowth.fraction > 0 and settings.regrowth.choice == "gradient")
        found = forecast_heads(plan, n_samples=settings.scoring.n_samples, gradients=scored)
        return replace(found, kept=found.kept * settings.needs_base)

    def forecast(self, plan: Plan, run: Run) -> Forecast:
        """The plan's cuts and regrowths are firings beside those of the schedule."""
        found, settings = super().forecast(plan, run), self.settings
        events = settings.cycles * (settings.schedule.cuts + (settings.regrowth.fraction > 0) + 1)
        return replace(found, firings=found.firings + events)

    def compute(self, context: AnalysisContext) -> PlasticityResult:
        """Carries out what is due, and tells decisions, scores, maps and what changed since the last row."""
        assert context.objective is not None
        self._subject = subject = self._subject_of(context.model, context.objective)
        step, run = steps_so_far(context.trainer), self.plasticity
        events = run.carry_out(subject, step, context.progress)
        loss = subject.loss()
        if run.measures(step) or not events:
            run.observe(step, loss)
        after, self._told = self._told, step
        return run.result(events, loss=loss, step=step, after=after, cost=subject.cost)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Closes the heads of a loaded checkpoint, also when nothing is trained; likewise at tests and predictions."""
        if self._plasticity is None and self._loaded is not None:
            model = find_model(pl_module, self.model_attribute)
            load_gates(HeadGates.of(model) or HeadGates(model), self._loaded)

    on_test_start = on_predict_start = on_validation_start

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets the optimizers go; closed heads stay closed."""
        super().teardown(trainer, pl_module, stage)
        if stage == "fit" and self._plasticity is not None:
            self._plasticity.remove()

    def save_files(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Writes the weights that a cycle may be rolled back to."""
        self.plasticity.save_files(self.folder, write=trainer.is_global_zero)

    def state_dict(self) -> dict[str, Any]:
        """Adds the plan, where it stands, the gates, and the names of the files."""
        run = self._loaded if self._plasticity is None else self._plasticity.state_dict()
        told = {"plasticity": run, "told": self._told, "model_attribute": self.model_attribute}
        return {**super().state_dict(), **told, **self._base.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Notes what the interrupted run left."""
        super().load_state_dict(state_dict)
        self._loaded, self._base = state_dict["plasticity"], TrainingBase(state_dict)
        self._told = state_dict.get("told", self._last_step)

    def _subject_of(self, model: nn.Module, objective: Objective) -> PlasticitySubject:
        return PlasticitySubject(model, self.plasticity.gates, self._batches, objective, self.settings.scoring)

    def _measure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def measured() -> float:
            with undisturbed(trainer, pl_module):
                model = find_model(pl_module, self.model_attribute)
                return self._subject_of(model, find_objective(pl_module, model, self.objective)).loss()

        if told := undefined_weights(find_model(pl_module, self.model_attribute)):
            step = steps_so_far(trainer)
            rank_zero_warn(f"{self.name} failed to measure the recovery at step {step} and training goes on: {told}")
            return
        loss = self.attempt(trainer, "to measure the recovery", measured)
        if loss is None:
            return
        step = steps_so_far(trainer)
        self.plasticity.observe(step, loss)
        if trainer.is_global_zero:
            scalars = self.plasticity.result((), loss=loss, step=step, after=step, cost=Cost()).running()
            tagged = {f"goldy/{self.name}/{key}": value for key, value in scalars.items()}
            try:
                log_scalars(trainer.loggers, tagged, step)
            except Exception as error:  # noqa: BLE001 - a service may raise anything
                rank_zero_warn(f"{self.name}: the loss of step {step} is not logged: {error}")

    def _carry(self, trainer: L.Trainer) -> None:
        """Brings the files that the resumed checkpoint needs into this run's folder."""
        assert self._store is not None
        if self._loaded is not None and self._previous_folder is not None:
            copied = self._loaded["copied"] or {"files": {}}
            for name in [*copied["files"].values(), *self._base.files]:
                self._store.carry(Path(self._previous_folder) / name)
        Replicas.world().meet(self.name)

    def _check(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Tells before the first step what will not happen, and tries what needs the family's help."""
        last, total = self.plasticity.plan.last_step, training_length(trainer)
        if last > total:
            rank_zero_warn(
                f"{self.name}: the last cycle ends at step {last}, the training at {total}; what comes later does not "
                "happen"
            )
        if not self.settings.needs_patterns and not self.plasticity.shows_maps:
            return
        try:
            with undisturbed(trainer, trainer.lightning_module):
                objective = find_objective(trainer.lightning_module, model, self.objective)
                self._subject_of(model, objective).maps([self.plasticity.gates.heads[0]])
        except UnsupportedArchitectureError as error:
            if self.settings.needs_patterns:
                raise
            self.plasticity.shows_maps = False
            rank_zero_warn(f"{self.name}: attention maps are left out: {error}")


def attention_space(model: nn.Module, gates: HeadGates) -> ParameterSpace:
    """The trainable parameters of all attention modules.

    Raises:
        ValueError: There is none.
    """
    space = ParameterSpace.of(model)
    inside = {id(each) for block in gates.architecture.attention_blocks for each in block.attention.parameters()}
    names = [name for name, parameter in space.resolve(model).items() if id(parameter) in inside]
    if not names:
        raise ValueError(
            "no attention weight is trained, so regrown heads have nothing to begin again with: train the attention, "
            "or set the regrowth's fraction to 0"
        )
    return space.subspace(names)
