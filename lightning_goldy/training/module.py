"""A LightningModule around a Hugging Face model or any other module."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import lightning.pytorch as L
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.objective import CausalLMObjective, ClassifierObjective, Objective
from lightning_goldy.data.tokenization import load_tokenizer
from lightning_goldy.optim.schedules import (
    OptimizerName,
    OptimizerOptions,
    ScheduleOptions,
    build_optimizer,
    optimizer_options,
    options_of,
    schedule_factor,
)
from lightning_goldy.training.export import attach_export, write_pretrained
from lightning_goldy.training.masks import MaskedTraining
from lightning_goldy.training.metrics import StageMetrics
from lightning_goldy.training.mixin import GoldyMixin
from lightning_goldy.training.models import (
    Head,
    LoraOptions,
    WeightDtype,
    add_lora,
    build_model,
    check_length,
    check_vocabulary,
    complete_config,
    enable_gradient_checkpointing,
    full_state_dict,
    load_model,
    position_limit,
    shard_blocks,
)

ObjectiveName = Literal["causal_lm", "classifier"]
Stage = Literal["train", "val", "test"]

_OBJECTIVES: dict[str, type[CausalLMObjective] | type[ClassifierObjective]] = {
    "causal_lm": CausalLMObjective,
    "classifier": ClassifierObjective,
}


class GoldyModule(GoldyMixin, L.LightningModule):
    """Trains a language model, or any module, and offers the analyses as methods.

    Args:
        model: A name on the Hugging Face hub, a local folder, the keys of a configuration for random weights
            (``{"model_type": "gpt2", "n_layer": 2}``; a missing ``vocab_size`` and the special tokens come from the
            tokenizer), or any ``torch.nn.Module``, taken in the training or evaluation mode that it is in.
        tokenizer: Saved beside the model; an object, a name or a folder. By default the trainer's data module's.
        objective: ``causal_lm``, ``classifier`` or an object. With ``classifier``, a named model gets a classification
            head.
        optimizer: AdamW's settings, or the name of one with settings as they are: ``adamw``, ``masked_adamw``.
        schedule: The learning rate's course.
        lora: Trains low-rank adapters in place of the weights.
        gradient_checkpointing: Recomputes activations in the backward pass.
        dtype: The weights' type. For mixed precision keep float32 and set the trainer's ``precision``.
        mask: For ``masked_adamw``, in place of ``optimizer.mask``.

    Raises:
        ValueError: A value cannot be what the argument asks for; the message says what can.
        ImportError: LoRA without PEFT.

    Example:
        >>> import torch
        >>> module = GoldyModule({"model_type": "gpt2", "vocab_size": 8, "n_layer": 1, "n_embd": 4, "n_head": 1})
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]])}
        >>> bool(module.objective.loss(module.model, batch) > 0)
        True
    """

    model: nn.Module

    def __init__(
        self,
        model: nn.Module | str | dict[str, Any],
        *,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        objective: Objective | ObjectiveName | None = None,
        optimizer: OptimizerOptions | OptimizerName = OptimizerOptions(),  # noqa: B008 - frozen
        schedule: ScheduleOptions = ScheduleOptions(),  # noqa: B008 - frozen
        lora: LoraOptions | None = None,
        gradient_checkpointing: bool = False,
        dtype: WeightDtype = "float32",
        mask: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.optimizer_options = optimizer_options(optimizer, mask)
        self._masked_training = MaskedTraining(self.optimizer_options)
        self.schedule_options = options_of(ScheduleOptions, "schedule", schedule)
        self.lora_options = None if lora is None else options_of(LoraOptions, "lora", lora)
        self.objective: Objective = _objective(objective)
        self.gradient_checkpointing = gradient_checkpointing
        if dtype not in get_args(WeightDtype):
            raise ValueError(f"unknown dtype {dtype!r}; choose one of {', '.join(get_args(WeightDtype))}")
        self.dtype_name: WeightDtype = dtype
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self._save_hyperparameters(model, tokenizer)
        self.train_metrics, self.val_metrics, self.test_metrics = (StageMetrics(self.objective) for _ in range(3))
        _check_model(model)
        self._config: dict[str, Any] = dict(model) if isinstance(model, Mapping) else {}
        if isinstance(model, nn.Module):
            self._take(model)
        elif isinstance(model, str):
            self._take(load_model(model, self._head, self.dtype_name))
        else:
            self._build_if_known()

    def configure_model(self) -> None:
        """Builds what waited for the tokenizer, and shards the model under ``ModelParallelStrategy``.

        Raises:
            ValueError: The vocabulary size is unknown, or does not fit the tokenizer.
        """
        if not self._is_built:
            self._build_if_known()
        if not self._is_built:
            raise ValueError(
                "the model configuration has no vocab_size, and neither tokenizer= nor the trainer's data module gives "
                f"a tokenizer to take it from; got {self._config}"
            )
        check_vocabulary(self.model, self.export_tokenizer())
        if self.device_mesh is not None:
            shard_blocks(self.model, self.device_mesh)

    def setup(self, stage: str) -> None:
        """Arranges the pretrained folder beside each checkpoint, and checks where a mask is to come from."""
        if stage == "fit":
            self._masked_training.check(self.trainer)
        if stage == "fit" and self.exports_pretrained:
            attach_export(self.trainer)

    def configure_optimizers(self) -> Any:
        """AdamW with decay groups, and a learning rate that moves at every optimizer step."""
        total_steps = self.trainer.estimated_stepping_batches if self._trainer is not None else math.inf
        factor = schedule_factor(self.schedule_options, total_steps)
        optimizer = build_optimizer(self.model, self.optimizer_options)
        self._masked_training.read_file(optimizer, self.model)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_train_start(self) -> None:
        """Gives a masked optimizer the mask that a callback has just made, or that of the resumed checkpoint."""
        self._masked_training.start(self.trainer, self.model)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the mask that the training runs with."""
        self._masked_training.save(self.trainer, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Notes the mask of a run that is resumed."""
        self._masked_training.note(checkpoint)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass."""
        return self.model(*args, **kwargs)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The batch's mean loss over its targets."""
        loss, scalars, size = self._measure("train", batch)
        self.log("train/loss", scalars.pop("loss"), prog_bar=True, batch_size=size)
        self.log_dict({f"train/{name}": value for name, value in scalars.items()}, batch_size=size)
        self.log("train/learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=size)
        self._log_epoch("train", size, suffix="_epoch")
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The batch's mean loss over its targets."""
        loss, _, size = self._measure("val", batch)
        self._log_epoch("val", size)
        return loss

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The batch's mean loss over its targets."""
        loss, _, size = self._measure("test", batch)
        self._log_epoch("test", size)
        return loss

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the model (or its adapter) and the tokenizer in Hugging Face format.

        When the model is sharded every process must call this; the first one writes.

        Args:
            folder: Replaced when it exists.

        Returns:
            The folder.

        Raises:
            TypeError: The model is neither a transformers nor a PEFT model.
        """
        state = full_state_dict(self.model)
        if self._trainer is None or self.trainer.is_global_zero:
            write_pretrained(self.model, folder, state=state, tokenizer=self.export_tokenizer())
        return Path(folder)

    def export_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The given tokenizer, or the trainer's data module's; None when there is neither."""
        if self.tokenizer is not None:
            return self.tokenizer
        datamodule = getattr(self._trainer, "datamodule", None)
        return getattr(datamodule, "tokenizer", None)

    @property
    def exports_pretrained(self) -> bool:
        """Whether a folder in Hugging Face format can be written: not for a module of another kind."""
        return not self._is_built or hasattr(self.model, "save_pretrained")

    @property
    def _is_built(self) -> bool:
        return "model" in self._modules

    def _build_if_known(self) -> None:
        self._config = complete_config(self._config, self.export_tokenizer())
        if "vocab_size" in self._config:
            self.hparams["model"] = dict(self._config)
            self._take(build_model(self._config, self._head, self.dtype_name))

    def _take(self, model: nn.Module) -> None:
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        self.model = model if self.lora_options is None else add_lora(model, self.lora_options)
        self._position_limit = position_limit(model)

    @property
    def _head(self) -> Head:
        return "sequence_classification" if isinstance(self.objective, ClassifierObjective) else "causal_lm"

    def _measure(self, stage: Stage, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        if self._position_limit is not None and isinstance(batch, Mapping):
            check_length(batch["input_ids"], self._position_limit)
        return self._metrics(stage).measure(self.objective, self.model, batch)

    def _metrics(self, stage: Stage) -> StageMetrics:
        return {"train": self.train_metrics, "val": self.val_metrics, "test": self.test_metrics}[stage]

    def _log_epoch(self, stage: Stage, size: int, suffix: str = "") -> None:
        for name, metric in self._metrics(stage).named().items():
            shown = stage == "val" and name == "loss"
            tag = f"{stage}/{name}{suffix}"
            self.log(tag, metric, on_step=False, on_epoch=True, prog_bar=shown, batch_size=size)

    def _save_hyperparameters(self, model: Any, tokenizer: Any) -> None:
        """Keeps only what ``weights_only`` loading gives back; objects must be passed to ``load_from_checkpoint``."""
        self.save_hyperparameters(
            {
                "model": None if isinstance(model, nn.Module) else model,
                "tokenizer": tokenizer if isinstance(tokenizer, str) else None,
                "objective": _objective_name(self.objective),
                "optimizer": dataclasses.asdict(self.optimizer_options),
                "schedule": dataclasses.asdict(self.schedule_options),
                "lora": None if self.lora_options is None else dataclasses.asdict(self.lora_options),
                "gradient_checkpointing": self.gradient_checkpointing,
                "dtype": self.dtype_name,
            }
        )


def _objective(objective: Objective | str | None) -> Objective:
    if objective is None:
        return CausalLMObjective()
    if isinstance(objective, str):
        if objective not in _OBJECTIVES:
            raise ValueError(f"unknown objective {objective!r}; {suggestion(objective, _OBJECTIVES)} or an object")
        return _OBJECTIVES[objective]()
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{type(objective).__name__} is no objective: it needs logits_and_targets, log_probs, loss and samples"
        )
    return objective


def _objective_name(objective: Objective) -> str | None:
    return next((name for name, kind in _OBJECTIVES.items() if type(objective) is kind), None)


def _check_model(model: Any) -> None:
    if isinstance(model, nn.Module):
        if next(model.parameters(), None) is None:
            raise ValueError(f"the model {type(model).__name__} has no parameters; there is nothing to train")
    elif not isinstance(model, (str, Mapping)) or not model:
        raise ValueError(
            f"model must be a name, a folder, a dict with model_type, or a torch.nn.Module; got {model!r}. A "
            "checkpoint made with a module object needs load_from_checkpoint(path, model=module)"
        )
