"""Trains a module's model again, from given weights, with another optimizer and nothing else changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from torch import nn

from lightning_goldy.core.isolation import isolated_rng
from lightning_goldy.core.vector import ParameterVector
from lightning_goldy.module import GoldyModule
from lightning_goldy.optim.schedules import OptimizerOptions
from lightning_goldy.quiet import progress_only

Contender = Literal["full", "random"]


@dataclass(frozen=True)
class Finetune:
    """What one finetune came to.

    Args:
        name: How it was trained.
        elements: How many elements it trained.
        change: Norm of the difference to the start.
        losses: ``train/loss`` and ``val/loss`` in nats, in evaluation mode, and the other validation metrics.
    """

    name: str
    elements: int
    change: float
    losses: dict[str, float]


class _StopAt(L.Callback):
    """Ends a training at a step, for the schedule may be that of a longer one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks the trainer to stop."""
        if trainer.global_step >= self.step:
            trainer.should_stop = True


class Rerun:
    """Repeats a training on one device. Buffers start as they are at its end.

    Args:
        trainer: Whose length, precision, accumulation, clipping and limits are taken.
        pl_module: Whose model, objective and schedule are taken.
        start: The weights to start from.
        modes: Training mode of each submodule, by name.
        seed: Of the random numbers drawn.
    """

    def __init__(
        self, trainer: L.Trainer, pl_module: GoldyModule, start: ParameterVector, modes: Mapping[str, bool], seed: int
    ) -> None:
        self._trainer, self._module, self._start = trainer, pl_module, start
        self._modes, self._seed = modes, seed

    def trained(self, mask: Path | None) -> ParameterVector:
        """Trains at the rate that the module has inside its mask.

        Args:
            mask: A mask file, outside of which nothing moves; None trains everything.

        Returns:
            The weights.
        """
        options = self._module.optimizer_options
        inside, _ = options.rates
        chosen = OptimizerOptions(
            learning_rate=inside or options.learning_rate,
            weight_decay=options.weight_decay,
            betas=options.betas,
            eps=options.eps,
            name="adamw" if mask is None else "masked_adamw",
            mask=None if mask is None else str(mask),
        )
        module = self._module_with(self._start, chosen)
        with _apart():
            L.seed_everything(self._seed, verbose=False)
            trainer = self._new_trainer(
                max_epochs=self._trainer.max_epochs,
                max_steps=self._trainer.max_steps,
                limit_train_batches=self._trainer.limit_train_batches,
                accumulate_grad_batches=self._trainer.accumulate_grad_batches,
                gradient_clip_val=self._trainer.gradient_clip_val,
                gradient_clip_algorithm=self._trainer.gradient_clip_algorithm,
                limit_val_batches=0,
                callbacks=[_StopAt(self._trainer.global_step)],
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
        with _apart():
            data = self._data()
            on_validation = self._new_trainer(limit_val_batches=self._trainer.limit_val_batches)
            (found,) = on_validation.validate(module, datamodule=data, verbose=False)
            on_training = self._new_trainer(limit_val_batches=self._trainer.limit_train_batches)
            (seen,) = on_training.validate(module, data.train_dataloader(), verbose=False)
        losses = {"train/loss": float(seen["val/loss"]), **{key: float(value) for key, value in found.items()}}
        start = self._start.to(next(iter(weights.values())).device)
        return Finetune(name, elements, (weights - start).norm(), losses)

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

    def _data(self) -> Any:
        # A copy, because a trainer writes itself into its data module.
        return copy.copy(self._trainer.datamodule)  # type: ignore[attr-defined]

    def _new_trainer(self, **options: Any) -> L.Trainer:
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
            **options,
        )


@contextmanager
def _apart() -> Iterator[None]:
    """Keeps random numbers from the training around it, and Lightning's notices from the console."""
    with isolated_rng(), progress_only():
        yield
