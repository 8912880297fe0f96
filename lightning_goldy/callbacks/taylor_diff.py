"""Compares the finetune with its Taylor expansion around the base, on a schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_goldy.analysis.divergence import shortened
from lightning_goldy.analysis.forecast import Forecast, Plan, Run, forecast_taylor
from lightning_goldy.analysis.result import Row
from lightning_goldy.analysis.taylor import (
    check_orders,
    expansion_route,
    require_differences,
    require_logits,
    taylor_diff,
)
from lightning_goldy.analysis.taylor.result import By, TaylorDiffResult
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.callbacks.engine.weights import Frozen, adapters_apart
from lightning_goldy.callbacks.golden_snapshot import find_snapshot
from lightning_goldy.callbacks.preflight import dialled
from lightning_goldy.core.architecture.adapters import WeightSpace, check_space, laid_on, require_line
from lightning_goldy.core.base import BaseParameters, base_of
from lightning_goldy.core.naming import require_at_least, require_kinds, suggestion
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import Replicas, is_sharded, unshard_guard
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import load_vectors, save_vectors
from lightning_goldy.core.vector import ParameterVector
from lightning_goldy.training.subject import find_model

Reset = Literal["never", "each", "epoch"]


class TaylorDiff(AnalysisCallback[TaylorDiffResult]):
    """Whether the finetune is still a small step: actual against predicted change of the loss and of the logits.

    Logs losses, the prediction of each order with its residual, the relative error, KL divergence and agreement in
    function space, the first- and second-order terms and the nonlinearity that the regime is told by. With the base
    that never moves a ``GoldenSnapshot`` must be among the callbacks.

    Args:
        orders: Orders of the expansion, from 1 to 3.
        by: Attribute the change by ``block``, by ``tensor``, or not (None).
        function_space: Whether to expand the logits too.
        reset: ``never`` expands around the golden snapshot; ``each`` around where the last analysis of the training's
            own weights was (one of averages leaves the base), ``epoch`` around where the epoch began.
        n_samples: Probe samples used.
        space: Of a model with adapters ``merged``, along the weights that they come to, or ``adapters``.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> TaylorDiff(orders=[4])
        Traceback (most recent call last):
        ValueError: orders lie between 1 and 3; got 4
    """

    compares = True
    dials: Mapping[str, Any] = {"n_samples": 2, "orders": (1,)}

    def __init__(
        self,
        orders: Sequence[int] = (1, 2),
        *,
        by: By | None = "block",
        function_space: bool = True,
        reset: Reset = "never",
        n_samples: int | None = 16,
        space: WeightSpace = "merged",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_space(space)
        self.space = space
        self.orders = check_orders(orders, by)
        if reset not in get_args(Reset):
            raise ValueError(f"unknown reset={reset!r}; {suggestion(str(reset), get_args(Reset))}")
        if n_samples is not None:
            require_at_least("n_samples", n_samples, 1)
        require_kinds(TaylorDiff.__init__, locals())
        self.by, self.function_space, self.reset, self.n_samples = by, function_space, reset, n_samples
        self.compares = reset == "never"

    def forget(self) -> None:
        """Drops a base that moves."""
        super().forget()
        self._base: BaseParameters | None = None
        self._base_step = 0
        self._base_file: str | None = None
        self._frozen: Frozen | None = None

    def probe_samples(self) -> int | None:
        """The samples that the loss is taken over."""
        return self.n_samples

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Checks the objective; finds the base, or takes up the one of the run that is resumed."""
        require_logits(self.task(trainer.lightning_module, model), self.function_space)
        if any(map(is_sharded, model.parameters())):
            require_differences(self.orders)
        # In a model whose adapters are merged at the time they are taken apart for the analysis.
        with adapters_apart(model):
            require_line(model, self.space)
        if self.reset == "never":
            if find_snapshot(trainer) is None:
                raise ValueError(
                    f"{self.name} expands around the golden snapshot: add GoldenSnapshot() to the callbacks, or let "
                    "the base move with reset='each' or reset='epoch'"
                )
            return
        if self._resumed and self._previous_folder is not None and self._base_file is not None:
            assert self._store is not None
            self._store.carry(Path(self._previous_folder) / self._base_file)
            Replicas.world().meet(self.name)
            self._base = BaseParameters(load_vectors(self.folder / self._base_file, model)[0])
            self._base.laid_on = self._base_laid_on
            self._trained |= set(self._base.space)
        elif self._base is None or not self._goes_on:
            self._move_base(model, trainer.global_step)

    def follow(self, trainer: L.Trainer, model: nn.Module, callback: AnalysisCallback[Any]) -> list[str]:
        """Adds to a base that moves what has moved below adapters although it was frozen.

        Args:
            trainer: The trainer.
            model: The one that is analysed.
            callback: Which is about to; others do not compare with this base.

        Returns:
            What to say of it.
        """
        if callback is not self or self._base is None or self._frozen is None:
            return []
        merged = self.space == "merged"
        notes = self._frozen.follow(model, self._base, self._base.grow, merged=merged, who=self.name)
        self._base_file = None if notes else self._base_file
        return notes

    def became_trainable(self, trainer: L.Trainer, model: nn.Module, space: ParameterSpace) -> None:
        """Adds what becomes trainable to a base that moves: it has been where it is since the base was taken."""
        if self._base is not None:
            self._base.grow(ParameterVector.of(model, space.subspace(set(space) - set(self._base.space))))
            self._base_file = None

    def try_route(self, model: nn.Module, objective: Objective, sample: Any) -> None:
        """Expands one sample around the present weights, and says where that goes by differences."""
        _, why = expansion_route(
            model,
            sample,
            objective,
            orders=self.orders,
            by=self.by,
            function_space=self.function_space,
            space=self.space,
        )
        if why:
            rank_zero_warn(
                f"{self.name}: {why}; derivatives along the step are central differences (route 'differences'), whose "
                "error each row states"
            )

    def limited(self) -> dict[str, Any] | None:
        """Orders above the first are opt-in."""
        return {} if max(self.orders) == 1 else {"orders": (1,)}

    def dialled(self, share: float, given: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
        """The first order alone below half of the samples."""
        samples = dialled({"n_samples": 2}, share, given, plan.n_samples)
        return {**samples, "orders": given["orders"] if share > 0.5 else (1,)}

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """Forward mode along the step, the present logits, and a gradient or two for the shares."""
        return forecast_taylor(
            plan,
            self.orders,
            shares=self.by is not None,
            function_space=self.function_space,
            n_samples=self.n_samples,
            keeps_base=self.reset != "never",
        )

    def compute(self, context: AnalysisContext) -> TaylorDiffResult:
        """Expands around the base."""
        assert context.objective is not None
        snapshot = find_snapshot(context.trainer)
        base = snapshot.base if self.reset == "never" and snapshot is not None else self._base
        assert base is not None
        return taylor_diff(
            context.model,
            base,
            shortened(context.probe, context.objective, self.used_samples, None),
            context.objective,
            orders=self.orders,
            by=self.by,
            function_space=self.function_space,
            space=self.space,
            progress=context.progress,
        )

    def describe(self, result: TaylorDiffResult, context: AnalysisContext) -> Row:
        """The result's row, with the step of the base; then the base moves with ``reset="each"``.

        It stays after an analysis of other weights than the training's, which the training does not go on from.
        """
        row = result.row().extended(result={"base_step": self._base_step})
        if self.reset == "each" and context.weights == "training":
            self._move_base(context.model, context.step)
        return row

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Analyses when scheduled, and then moves the base with ``reset="epoch"``."""
        super().on_train_epoch_end(trainer, pl_module)
        if self.reset != "epoch":
            return
        unshard_guard(pl_module)
        if self.has_training_weights(trainer, pl_module):
            model = find_model(pl_module, self.model_attribute)
            self.attempt(trainer, "to move the base", lambda: self._move_base(model, trainer.global_step))
        else:
            self._notes.append(
                f"the base stayed at step {self._base_step}, for epoch {trainer.current_epoch} ended "
                "with other weights than those of the training"
            )

    def save_files(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Writes a base that moves, which a resume goes on from."""
        if self._base is None:
            return
        name = f"base-step={self._base_step:08d}.safetensors"
        if name == self._base_file and (self.folder / name).is_file():
            return
        save_vectors(
            self.folder / name,
            self._base.vector(model),
            kind="values",
            model=model,
            step=self._base_step,
            write=trainer.is_global_zero,
        )
        self._base_file = name

    def state_dict(self) -> dict[str, Any]:
        """Adds where the base was taken."""
        laid = None if self._base is None else self._base.laid_on
        own = {"base_step": self._base_step, "base_file": self._base_file, "base_laid_on": laid}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Notes what the interrupted run left."""
        super().load_state_dict(state_dict)
        self._base_step, self._base_file = state_dict["base_step"], state_dict["base_file"]
        self._base_laid_on = state_dict.get("base_laid_on")

    def _move_base(self, model: nn.Module, step: int) -> None:
        space = ParameterSpace.of(model) if self._base is None else self._base.space
        self._base, self._base_step = base_of(model, model, space), step
        self._base.laid_on = laid_on(model)
        self._frozen = Frozen.of(model)
