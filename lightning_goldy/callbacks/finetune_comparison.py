"""Compares a masked finetune with a full one and with one of a random mask, from the same start, in one table."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as L
import torch
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import nn

from lightning_goldy.analysis.attribution import change_attribution
from lightning_goldy.analysis.forecast import Forecast, Passes, Plan, Run, Work
from lightning_goldy.analysis.result import AnalysisResult, Cost, Row
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.core.architecture.adapters import WeightSpace, changes_in, check_space, chosen_space
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.batches import sample_count
from lightning_goldy.core.files import percentage, printable
from lightning_goldy.core.isolation import isolated_rng
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import require_at_least, require_choice, require_kinds
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import load_vectors, save_vectors
from lightning_goldy.core.vector import ParameterVector
from lightning_goldy.optim.masked_adamw import MaskedAdamW
from lightning_goldy.optim.schedules import OptimizerOptions
from lightning_goldy.report.formatting import show
from lightning_goldy.training.module import GoldyModule
from lightning_goldy.training.quiet import progress_only

Contender = Literal["full", "random", "attribution"]


@dataclass(frozen=True)
class Finetune(AnalysisResult):
    """What one finetune came to.

    Args:
        name: How it was trained.
        elements: How many elements it trained.
        change: Norm of the difference to the start.
        losses: ``train/loss`` and ``val/loss`` in nats, in evaluation mode, the other validation metrics, and where the
            data module has a ``collateral_dataloader()``, ``other/loss``, that on text which the finetune is not about.
    """

    name: str
    elements: int
    change: float
    losses: dict[str, float]


@dataclass(frozen=True)
class FinetuneComparisonResult(AnalysisResult):
    """Finetunes of one start, side by side.

    Args:
        finetunes: What was measured, the start first.
        numel: Elements of the model.
        cost: Passes of the other trainings and of all measurements.
        space: Of the changes: ``merged`` or ``adapters``; None of a model without adapters.
    """

    analysis: ClassVar[str] = "finetune_comparison"

    finetunes: tuple[Finetune, ...]
    numel: int
    cost: Cost = field(default=Cost(), compare=False)
    space: str | None = None

    def metrics(self) -> dict[str, float | None]:
        """Of each finetune the norm of the change, and its losses."""
        found: dict[str, float | None] = {}
        for row in self.finetunes:
            found[f"{row.name}/delta_norm"] = row.change
            found.update({f"{row.name}/{name.replace('/', '_')}": value for name, value in row.losses.items()})
        return found

    def details(self) -> dict[str, Any]:
        """The finetunes."""
        told = {} if self.space is None else {"space": self.space}
        return {"numel": self.numel, "rows": [vars(row) for row in self.finetunes], **told}


class _Watch(L.Callback):
    """Counts the passes that a trainer makes, and ends at a step, for the schedule may be that of a longer training."""

    def __init__(self, rerun: Rerun, last_step: int | None) -> None:
        self.rerun, self.last_step = rerun, last_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts, and asks the trainer to stop."""
        size = sample_count(batch)
        self.rerun.cost += Cost(forwards=size, backwards=size)
        if self.last_step is not None and trainer.global_step >= self.last_step:
            trainer.should_stop = True

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts."""
        self.rerun.cost += Cost(forwards=sample_count(batch))


class Rerun:
    """Repeats a training on one device. Buffers start as they are at its end.

    Args:
        trainer: Whose length, precision, accumulation, clipping and limits are taken.
        pl_module: Whose model, objective and schedule are taken.
        start: The weights to start from.
        modes: Training mode of each submodule, by name.
        seed: Of the random numbers drawn.
        space: Where changes are measured: ``merged`` or ``adapters``.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        pl_module: GoldyModule,
        start: ParameterVector,
        modes: Mapping[str, bool],
        seed: int,
        space: WeightSpace = "merged",
    ) -> None:
        self._trainer, self._module, self._start = trainer, pl_module, start
        self._modes, self._seed, self._space = modes, seed, space
        self.cost = Cost()
        """Passes made so far."""

    def trained(self, mask: Path | None) -> ParameterVector:
        """Trains at the rate that the module has inside its mask.

        Args:
            mask: A mask file, outside of which nothing moves; None trains everything.

        Returns:
            The weights.
        """
        options = self._module.optimizer_options
        inside, _ = options.rates
        chosen = replace(
            options,
            learning_rate=inside or options.learning_rate,
            name="adamw" if mask is None else "masked_adamw",
            mask=None if mask is None else str(mask),
            lr_inside=None,
            lr_outside=0.0,
        )
        module = self._module_with(self._start, chosen)
        # Random numbers are kept from the training around it, and Lightning's notices from the console.
        with isolated_rng(), progress_only():
            L.seed_everything(self._seed, verbose=False)
            trainer = self._new_trainer(
                max_epochs=self._trainer.max_epochs,
                max_steps=self._trainer.max_steps,
                limit_train_batches=self._trainer.limit_train_batches,
                accumulate_grad_batches=self._trainer.accumulate_grad_batches,
                gradient_clip_val=self._trainer.gradient_clip_val,
                gradient_clip_algorithm=self._trainer.gradient_clip_algorithm,
                limit_val_batches=0,
                last_step=self._trainer.global_step,
            )
            trainer.fit(module, datamodule=self._data())
        return ParameterVector.of(module.model)

    def measured(self, name: str, elements: int, weights: ParameterVector) -> Finetune:
        """Losses and distance of some weights.

        Args:
            name: For the table.
            elements: How many were trained.
            weights: The weights.
        """
        module = self._module_with(weights, OptimizerOptions())
        with isolated_rng(), progress_only():
            data = self._read
            on_validation = self._new_trainer(limit_val_batches=self._trainer.limit_val_batches)
            (found,) = on_validation.validate(module, datamodule=data, verbose=False)
            on_training = self._new_trainer(limit_val_batches=self._trainer.limit_train_batches)
            (seen,) = on_training.validate(module, data.train_dataloader(), verbose=False)
            other = self._other
            if other is not None:
                (harmed,) = self._new_trainer().validate(module, other, verbose=False)
        losses = {"train/loss": float(seen["val/loss"]), **{key: float(value) for key, value in found.items()}}
        if other is not None:
            losses["other/loss"] = float(harmed["val/loss"])
        start = BaseParameters(self._start.to(next(iter(weights.values())).device), copy=False)
        squares = [change.delta.double().square().sum() for change in changes_in(module.model, start, self._space)]
        return Finetune(name, elements, math.sqrt(sum(map(float, squares))), losses)

    def model_with(self, weights: ParameterVector) -> nn.Module:
        """A copy of the model with some weights."""
        return self._module_with(weights, OptimizerOptions()).model

    def _module_with(self, weights: ParameterVector, options: OptimizerOptions) -> GoldyModule:
        model: nn.Module = copy.deepcopy(self._module.model)
        with torch.no_grad():
            for name, parameter in weights.space.resolve(model).items():
                parameter.copy_(weights[name])
        for name, child in model.named_modules():
            child.training = self._modes.get(name, child.training)
        return GoldyModule(
            model,
            tokenizer=self._module.export_tokenizer(),
            objective=self._module.objective,
            optimizer=options,
            schedule=self._module.schedule_options,
        )

    @functools.cached_property
    def _read(self) -> Any:
        """The data that every measurement reads: its samples are made once."""
        return self._data()

    @functools.cached_property
    def _other(self) -> Any:
        """What the finetune is not meant to change; None where the data has none. A trainer holds the data by then."""
        return getattr(self._read, "collateral_dataloader", lambda: None)()

    def _data(self) -> Any:
        # A copy, because a trainer writes itself into its data module.
        return copy.copy(self._trainer.datamodule)  # type: ignore[attr-defined]

    def _new_trainer(self, *, last_step: int | None = None, **options: Any) -> L.Trainer:
        device = self._module.device
        return L.Trainer(
            accelerator=device.type if device.type == "cpu" else "gpu",
            devices=1 if device.index is None else [device.index],
            precision=self._trainer.precision,
            default_root_dir=self._trainer.default_root_dir,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[_Watch(self, last_step)],
            **options,
        )


START_FILE = "start.safetensors"
RANDOM_FILE, ATTRIBUTION_FILE = "random.safetensors", "attribution.safetensors"


class FinetuneComparison(AnalysisCallback[FinetuneComparisonResult]):
    """At the end of a masked training, trains the same model again, from the same start, in other ways.

    Prints one table: elements trained, the norm of the change, losses on the training and the validation set. Each
    other way costs a training of the same length. It needs a ``GoldyModule`` with ``masked_adamw``, a data module and
    a single device.

    Args:
        against: Other ways: ``full`` trains all elements, ``random`` as many of each tensor as the mask holds, drawn at
            random, ``attribution`` as many as the mask holds of those that carried most of a full finetune's effect on
            the probe. All at the masked training's rate inside.
        n_samples: Samples of the probe on which the effect is attributed.
        seed: Decides the random mask, and the random numbers of the other trainings.
        name: Folder and metric prefix.
        space: Of a model with adapters, where changes are measured: ``merged``, the weights that they come to, or
            ``adapters``.

    Raises:
        ValueError: A way or the space is unknown, or no way is given.

    Example:
        >>> FinetuneComparison(["fall"])
        Traceback (most recent call last):
        ValueError: unknown finetune 'fall'; did you mean 'full'? Valid: full, random, attribution
    """

    needs_probe = False

    def __init__(
        self,
        against: Sequence[Contender] = ("full", "random"),
        *,
        n_samples: int = 16,
        seed: int = 0,
        name: str | None = None,
        space: WeightSpace = "merged",
    ) -> None:
        require_kinds(FinetuneComparison.__init__, locals())
        super().__init__(at=("end",), name=name)
        check_space(space)
        require_at_least("n_samples", n_samples, 1)
        self.space, self.n_samples = space, n_samples
        self.needs_probe = "attribution" in against
        against = (against,) if isinstance(against, str) else tuple(against)  # type: ignore[assignment]
        for contender in against:
            require_choice("finetune", contender, get_args(Contender))
        if not against:
            raise ValueError(f"against names nothing to compare with; choose from {', '.join(get_args(Contender))}")
        self.against, self.seed = against, seed

    def forget(self) -> None:
        """Drops the modes of the start."""
        super().forget()
        self._modes: dict[str, bool] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses trainings that it cannot repeat."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not (isinstance(pl_module, GoldyModule) and pl_module.optimizer_options.name == "masked_adamw"):
            raise ValueError("FinetuneComparison needs a GoldyModule with optimizer.name='masked_adamw'")
        if trainer.datamodule is None:  # type: ignore[attr-defined]
            raise ValueError("FinetuneComparison needs a data module, from which each training takes its data anew")
        if trainer.world_size != 1:
            raise ValueError(f"FinetuneComparison repeats trainings on one device; got {trainer.world_size}")

    def probe_samples(self) -> int | None:
        """The samples on which the effect is attributed."""
        return self.n_samples

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Keeps the start in a file, or brings it from the run that is resumed."""
        assert self._store is not None
        self._modes = {name: child.training for name, child in model.named_modules()}
        if self._resumed and self._previous_folder is not None:
            self._store.carry(Path(self._previous_folder) / START_FILE)
        else:
            save_vectors(self.folder / START_FILE, ParameterVector.of(model), kind="values", model=model)

    def became_trainable(self, trainer: L.Trainer, model: nn.Module, space: ParameterSpace) -> None:
        """Refuses a training that unfreezes parameters on the way, which a repetition would not."""
        raise ValueError(
            f"{self.name} repeats the training from its start, but {space.names[0]} became trainable at step "
            f"{trainer.global_step}: train all parameters from the start, or leave {type(self).__name__} out"
        )

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """A training of the same length for every other way, on one device."""
        rows, tokens = max(plan.rows, default=(1, 1))
        calls = len(self.against) * run.steps
        work = Work(backward=Passes(calls * rows, calls, calls * rows * tokens), elements=8.0 * calls * plan.elements())
        size = plan.bytes()
        return Forecast(work, memory=5 * size, disk=len(self.against) * size, disk_once=size, exact=False)

    def compute(self, context: AnalysisContext) -> FinetuneComparisonResult:
        """Measures the start and the masked finetune, then trains and measures the others."""
        assert isinstance(context.pl_module, GoldyModule)
        start, _ = load_vectors(self.folder / START_FILE, context.model)
        (optimizer,) = (each for each in context.trainer.optimizers if isinstance(each, MaskedAdamW))
        held = optimizer.mask
        assert held is not None
        space = ParameterSpace.of(context.model)
        mask = ParameterMask.from_dense(space, held.to_dense())
        rerun = Rerun(context.trainer, context.pl_module, start, self._modes, self.seed, self.space)
        found = [
            rerun.measured("start", 0, start),
            rerun.measured("masked", mask.total, ParameterVector.of(context.model)),
        ]
        whole = rerun.trained(None) if {"full", "attribution"} & {*self.against} else None
        cost = Cost()
        for done, contender in enumerate(self.against, 1):
            elements, weights = space.numel, whole
            if contender != "full":
                if contender == "random":
                    counts = dict(zip(space.names, mask.count(), strict=True))
                    chosen, file = ParameterMask.random(space, counts, seed=self.seed), RANDOM_FILE
                else:
                    assert whole is not None
                    chosen, spent = self._carriers(context, rerun.model_with(whole), start, mask.total)
                    cost, file = cost + spent, ATTRIBUTION_FILE
                elements = chosen.total
                weights = rerun.trained(chosen.save(self.folder / file, model=context.model))
            assert weights is not None
            found.append(rerun.measured(contender, elements, weights))
            context.progress(done, len(self.against))
        told = chosen_space(context.model, self.space)
        return FinetuneComparisonResult(tuple(found), space.numel, rerun.cost + cost, told)

    def _carriers(
        self, context: AnalysisContext, model: nn.Module, start: ParameterVector, count: int
    ) -> tuple[ParameterMask, Cost]:
        """So many elements that carried most of a finetune's effect on the probe, and what that cost."""
        share = count / start.space.numel
        options: dict[str, Any] = {"shares": [share], "space": start.space, "n_samples": self.used_samples}
        found = change_attribution(model, start, context.probe, context.objective, **options)
        return found.mask(share), found.cost

    def describe(self, result: FinetuneComparisonResult, context: AnalysisContext) -> Row:
        """Prints the table, too."""
        show(comparison_table(result.finetunes, result.numel))
        return result.row()


def comparison_table(rows: Sequence[Finetune], numel: int) -> Table:
    """The finetunes side by side.

    Args:
        rows: What was measured.
        numel: Elements of the model.

    Example:
        >>> comparison_table([Finetune("full", 4, 0.5, {"val/loss": 1.25})], 4).row_count
        1
    """
    # A perplexity says what its loss says.
    names = [name for name in rows[0].losses if "perplexity" not in name]
    table = Table(title="the same start, data and steps; change: norm of the difference to the start")
    for column in ("trained", "elements", "share", "change", *names):
        justify = "left" if column == "trained" else "right"
        table.add_column(escape(printable(column.replace("_", " "))), justify=justify, no_wrap=column not in names)  # type: ignore[arg-type]
    for row in rows:
        losses = [f"{row.losses[name]:.4f}" for name in names]
        table.add_row(
            Text(printable(row.name)),
            f"{row.elements:,}",
            percentage(row.elements / numel, 2),
            f"{row.change:.4g}",
            *losses,
        )
    return table
