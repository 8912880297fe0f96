"""A LightningModule that trains one model full, with frozen attention, with linear MLPs and linear, side by side."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from lightning_goldy.analysis.linearized import Variant, build_variant
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import ParameterVector
from lightning_goldy.optim.schedules import (
    OptimizerName,
    OptimizerOptions,
    ScheduleOptions,
    build_optimizer,
    schedule_factor,
)
from lightning_goldy.training.models import WeightDtype, check_length
from lightning_goldy.training.module import GoldyModule, ObjectiveName, Stage, StageMetrics


class VariantsModule(GoldyModule):
    r"""Trains copies of one model on the same batches, each as another variant of it around where all began.

    .. math:: L = \sum_v L_v(\theta_v), \qquad \theta_v(0) = \theta_0 \text{ for every } v

    The copies share nothing but the batches and theta_0: gradients, their clipping and the optimizer's moments are each
    copy's own. Logs ``train/loss/VARIANT`` and ``val/loss/VARIANT`` beside what :class:`GoldyModule` logs of the first
    variant, whose model is ``model``; that is what callbacks analyse and what is exported. theta_0 is part of the
    checkpoint. Memory is that of one training per variant and of one more copy of the weights.

    Args:
        model: As for :class:`GoldyModule`; a transformers model of a known architecture.
        variants: Some of ``full``, ``frozen_attention``, ``linear_mlp`` and ``tangent``, each once.
        tokenizer: As for :class:`GoldyModule`.
        objective: As for :class:`GoldyModule`.
        optimizer: AdamW's settings; a masked one is refused.
        schedule: The learning rate's course.
        dtype: The weights' type.

    Raises:
        ValueError: A variant is unknown or named twice, or none is named; what :class:`GoldyModule` refuses.

    Example:
        >>> config = {"model_type": "gpt2", "vocab_size": 8, "n_layer": 1, "n_embd": 4, "n_head": 1}
        >>> module = VariantsModule(config, variants=["full", "tangent"])
        >>> module.configure_model()
        >>> list(module.variant_models())
        ['full', 'tangent']
    """

    def __init__(
        self,
        model: nn.Module | str | dict[str, Any],
        *,
        variants: Sequence[Variant] = ("full", "frozen_attention", "linear_mlp", "tangent"),
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        objective: Objective | ObjectiveName | None = None,
        optimizer: OptimizerOptions | OptimizerName = OptimizerOptions(),  # noqa: B008 - frozen
        schedule: ScheduleOptions = ScheduleOptions(),  # noqa: B008 - frozen
        dtype: WeightDtype = "float32",
    ) -> None:
        super().__init__(
            model, tokenizer=tokenizer, objective=objective, optimizer=optimizer, schedule=schedule, dtype=dtype
        )
        if self.optimizer_options.name != "adamw":
            raise ValueError(f"variants train with optimizer.name='adamw'; got {self.optimizer_options.name!r}")
        for variant in variants:
            if variant not in get_args(Variant):
                raise ValueError(f"unknown variant {variant!r}; {suggestion(str(variant), get_args(Variant))}")
        if not variants or len(set(variants)) < len(variants):
            raise ValueError(f"variants must name each of some variants once; got {list(variants)}")
        self.variants: tuple[Variant, ...] = tuple(variants)
        self.save_hyperparameters({"variants": list(variants)})
        kept = {f"{stage}_{name}": StageMetrics(self.objective) for stage in get_args(Stage) for name in variants[1:]}
        self.variant_metrics = nn.ModuleDict(kept)
        self._built: dict[Variant, nn.Module] = {}

    def configure_model(self) -> None:
        """Builds the model, and copies it for every variant.

        Raises:
            ValueError: The strategy shards parameters; what :class:`GoldyModule` refuses.
            UnsupportedArchitectureError: A variant of this family cannot be made.
        """
        if self.device_mesh is not None:
            raise ValueError("variants need whole parameters: train on one device or under DistributedDataParallel")
        super().configure_model()
        if "base" in self._modules:
            return
        self.base = copy.deepcopy(self.model).requires_grad_(False)
        self.copies = nn.ModuleDict({name: copy.deepcopy(self.model) for name in self.variants[1:]})
        self.variant_models()  # refuses a family before the first step
        self._built.clear()

    def variant_models(self) -> dict[Variant, nn.Module]:
        """What each variant computes with, as modules whose parameters are trained."""
        if not self._built:
            space = ParameterSpace.of(self.model)
            start = {name: value.detach() for name, value in space.resolve(self.base).items()}
            for name, model in self.trained_models().items():
                self._built[name] = build_variant(name, model, ParameterVector(space, start))
        return self._built

    def trained_models(self) -> dict[Variant, nn.Module]:
        """The copies themselves, as plain models."""
        copies = (self.copies[name] for name in self.variants[1:])
        return dict(zip(self.variants, (self.model, *copies), strict=True))

    def configure_optimizers(self) -> Any:
        """One AdamW over all copies, with a learning rate that moves at every optimizer step."""
        factor = schedule_factor(self.schedule_options, self.trainer.estimated_stepping_batches)
        optimizer = build_optimizer(nn.ModuleList(self.trained_models().values()), self.optimizer_options)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips each copy by its own gradient, as in a training of its own."""
        if not gradient_clip_val:
            return
        for model in self.trained_models().values():
            if gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(model.parameters(), gradient_clip_val)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clip_val)

    def _measure(self, stage: Stage, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        if self._position_limit is not None and isinstance(batch, Mapping):
            check_length(batch["input_ids"], self._position_limit)
        losses: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        size = 0
        for name, model in self.variant_models().items():
            loss, scalars, size = self._variant_metrics(stage, name).measure(self.objective, model, batch)
            found = found or scalars
            losses[f"loss/{name}"] = loss
        return torch.stack([*losses.values()]).sum(), {**found, **{k: v.detach() for k, v in losses.items()}}, size

    def _log_epoch(self, stage: Stage, size: int, suffix: str = "") -> None:
        super()._log_epoch(stage, size, suffix)
        for name in self.variants:
            metric = self._variant_metrics(stage, name).loss
            self.log(f"{stage}/loss/{name}{suffix}", metric, on_step=False, on_epoch=True, batch_size=size)

    def _variant_metrics(self, stage: Stage, name: Variant) -> StageMetrics:
        if name == self.variants[0]:
            return self._metrics(stage)
        found = self.variant_metrics[f"{stage}_{name}"]
        assert isinstance(found, StageMetrics)
        return found
