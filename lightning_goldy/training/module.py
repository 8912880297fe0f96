"""The LightningModule around a language model, what its stages measure, its mixin of analyses, and masked training."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric
from transformers import PreTrainedTokenizerBase

from lightning_goldy.core.files import StoreError, percentage
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import options_of, require_choice, suggestion
from lightning_goldy.core.objective import (
    CausalLMObjective,
    ClassifierObjective,
    FunctionObjective,
    MaskedLMObjective,
    Objective,
    Seq2SeqObjective,
    SpanObjective,
    TokenClassifierObjective,
    objective_for,
)
from lightning_goldy.core.sharding import gather
from lightning_goldy.core.store import pack_mask, read_header, unpack_mask
from lightning_goldy.data.base import follow_training
from lightning_goldy.data.tokenization import load_tokenizer, own_tokenizer
from lightning_goldy.optim.masked_adamw import MaskedAdamW
from lightning_goldy.optim.schedules import (
    OptimizerName,
    OptimizerOptions,
    ScheduleOptions,
    build_optimizer,
    optimizer_options,
    schedule_factor,
)
from lightning_goldy.training.models import (
    CheckpointOptions,
    Head,
    LoraOptions,
    WeightDtype,
    add_lora,
    attach_export,
    build_model,
    check_length,
    check_vocabulary,
    complete_config,
    enable_gradient_checkpointing,
    full_state_dict,
    load_model,
    position_limit,
    save_final,
    shard_blocks,
    write_pretrained,
)
from lightning_goldy.training.subject import find_model, find_objective, find_probe

if TYPE_CHECKING:
    from lightning_goldy.analysis import GoldenResult, TaylorDiffResult, VolumeResult
    from lightning_goldy.core.base import Base


class TargetMean(Metric):
    """The mean over targets of batch means, each counting as often as its batch has targets; NaN stays NaN.

    Not torchmetrics' MeanMetric, which either leaves NaN out or (``nan_strategy="disable"``) ignores the weights.

    Example:
        >>> metric = TargetMean()
        >>> metric.update(torch.tensor(1.0), 3)
        >>> metric.update(torch.tensor(5.0), 1)
        >>> metric.compute().item()
        2.0
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.tensor(0.0), dist_reduce_fx="sum")
        # Integers: float32 could not count an epoch's tokens.
        self.add_state("count", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, mean: Tensor, count: int) -> None:
        """Adds a batch.

        Args:
            mean: Over the batch, a scalar.
            count: Its targets.
        """
        self.total += mean.float() * count
        self.count += count

    def compute(self) -> Tensor:
        """The mean over everything."""
        return self.total / self.count


class Perplexity(TargetMean):
    """The exponential of the mean loss.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.tensor(8.0).log(), 3)
        >>> round(metric.compute().item(), 4)
        8.0
    """

    def compute(self) -> Tensor:
        """The exponential of the mean over everything."""
        return super().compute().exp()


class StageMetrics(nn.Module):
    """Loss, perplexity and accuracy of one stage, each target counting once.

    Args:
        objective: Decides which of the three there are.

    Example:
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> objective = ClassifierObjective()
        >>> metrics = StageMetrics(objective)
        >>> batch = (torch.ones(4, 3), torch.tensor([0, 0, 0, 1]))
        >>> loss, scalars, size = metrics.measure(objective, nn.Linear(3, 2), batch)
        >>> sorted(metrics.named()), sorted(scalars), size
        (['accuracy', 'loss'], ['accuracy', 'loss'], 4)
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self._has_logits = not (isinstance(objective, FunctionObjective) and objective.logits is None)
        self._predicts_tokens = isinstance(objective, (CausalLMObjective, MaskedLMObjective, Seq2SeqObjective))
        self._accuracy_name = "token_accuracy" if self._predicts_tokens else "accuracy"
        self.loss = TargetMean()
        self.accuracy = TargetMean()
        self.perplexity = Perplexity()

    def measure(self, objective: Objective, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        """One forward pass.

        Args:
            objective: How the batch becomes logits and targets.
            model: What the objective applies to.
            batch: What the objective understands.

        Returns:
            The mean loss over the targets (nats, with its graph), the batch's own scalars, and the number of samples.
        """
        if not self._has_logits:
            loss = objective.loss(model, batch)
            size = sum(1 for _ in objective.samples(batch))
            self.loss.update(loss.detach(), size)
            return loss, {"loss": loss.detach()}, size
        target = objective.logits_and_targets(model, batch)
        loss = target.loss()
        accuracy = (target.logits.detach().argmax(dim=-1) == target.targets).float().mean()
        count = len(target.targets)
        self.loss.update(loss.detach(), count)
        self.accuracy.update(accuracy, count)
        scalars = {"loss": loss.detach(), self._accuracy_name: accuracy}
        if self._predicts_tokens:
            self.perplexity.update(loss.detach(), count)
            scalars["perplexity"] = loss.detach().exp()
        return loss, scalars, target.n_samples

    def named(self) -> dict[str, TargetMean]:
        """The metrics that this objective has, by name."""
        metrics: dict[str, TargetMean] = {"loss": self.loss}
        if self._has_logits:
            metrics[self._accuracy_name] = self.accuracy
        if self._predicts_tokens:
            metrics["perplexity"] = self.perplexity
        return metrics


class GoldyMixin:
    """Gives a LightningModule the analyses as methods.

    Put it before ``LightningModule`` among the bases. The callbacks find the model, the objective and the probe of a
    module in the same way.

    Example:
        >>> import lightning.pytorch as L, torch
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> class Mine(GoldyMixin, L.LightningModule):
        ...     goldy_model_attribute = "network"
        ...     objective = ClassifierObjective()
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = nn.Linear(4, 2)
        >>> batch = (torch.randn(3, 4), torch.tensor([0, 1, 1]))
        >>> Mine().golden_parameters([batch], top_k_percent=50.0).n_samples
        3
    """

    goldy_model_attribute: str | None = None
    """Dotted name of the submodule to analyse: ``model`` by default when there is one, else the whole module."""

    @property
    def goldy_model(self) -> nn.Module:
        """The module that the analyses look at.

        Raises:
            ValueError: There is no such submodule.
        """
        return find_model(cast("nn.Module", self), self.goldy_model_attribute)

    @property
    def goldy_objective(self) -> Objective:
        """``self.objective``, or next-token prediction when the model is a causal language model.

        Raises:
            ValueError: Neither applies.
        """
        return find_objective(cast("nn.Module", self), self.goldy_model, None)

    def golden_parameters(self, batches: Iterable[Any] | None = None, **options: Any) -> GoldenResult:
        """Which parameters carry what these batches ask for; see :func:`lightning_goldy.analysis.golden_parameters`.

        Args:
            batches: What to analyse; by default the probe that a callback on the attached trainer would use.
            **options: Passed on, such as ``top_k_percent`` or ``score``.

        Returns:
            The result, its tensors on the CPU.

        Raises:
            ValueError: There are no batches, or an option is out of range.
        """
        # Imported here, so that a module can be defined and trained without loading the analyses.
        from lightning_goldy.analysis import golden_parameters

        return golden_parameters(self.goldy_model, self.goldy_probe(batches), self.goldy_objective, **options)

    def basin_volume(self, batches: Iterable[Any] | None = None, **options: Any) -> VolumeResult:
        """How robust the predictions on these batches are; see :func:`lightning_goldy.analysis.basin_volume`.

        Args:
            batches: What the predictions are compared on; by default the probe.
            **options: Passed on, such as ``n_directions`` or ``cutoff``.

        Returns:
            The estimates, direction by direction.

        Raises:
            ValueError: There are no batches, or an option is out of range.
        """
        from lightning_goldy.analysis import basin_volume

        return basin_volume(self.goldy_model, self.goldy_probe(batches), self.goldy_objective, **options)

    def taylor_diff(self, base: Base, batches: Iterable[Any] | None = None, **options: Any) -> TaylorDiffResult:
        """Whether the step since a base is small; see :func:`lightning_goldy.analysis.taylor_diff`.

        Args:
            base: Where the expansion is made, such as a ``GoldenSnapshot``'s ``base``: anything that
                :func:`~lightning_goldy.core.base.base_of` takes.
            batches: What the loss is taken over; by default the probe.
            **options: Passed on, such as ``orders``.

        Returns:
            Losses, predictions, shares and the regime.

        Raises:
            ValueError: There are no batches, or an option is out of range.
        """
        from lightning_goldy.analysis import taylor_diff

        return taylor_diff(self.goldy_model, base, self.goldy_probe(batches), self.goldy_objective, **options)

    def goldy_probe(self, batches: Iterable[Any] | None = None) -> Iterable[Any]:
        """The given batches; without any, the probe of this module, the data module, or the validation set.

        Raises:
            ValueError: There is none, or it is empty.
        """
        if batches is not None:
            return batches
        trainer = getattr(self, "_trainer", None)
        if trainer is None:
            raise ValueError(
                f"{type(self).__name__} is attached to no trainer whose data could be analysed: pass batches="
            )
        return find_probe(trainer, self, None).batches


ObjectiveName = Literal["causal_lm", "classifier", "seq2seq", "masked_lm", "token_classifier", "question_answering"]
Stage = Literal["train", "val", "test"]

_OBJECTIVES: dict[str, type[Objective]] = {
    "causal_lm": CausalLMObjective,
    "classifier": ClassifierObjective,
    "seq2seq": Seq2SeqObjective,
    "masked_lm": MaskedLMObjective,
    "token_classifier": TokenClassifierObjective,
    "question_answering": SpanObjective,
}
_HEADS: dict[type[Objective], Head] = {
    ClassifierObjective: "sequence_classification",
    Seq2SeqObjective: "seq2seq_lm",
    MaskedLMObjective: "masked_lm",
    TokenClassifierObjective: "token_classification",
    SpanObjective: "question_answering",
}


class GoldyModule(GoldyMixin, L.LightningModule):
    """Trains a language model, or any module, and offers the analyses as methods.

    Args:
        model: A name on the Hugging Face hub, a local folder, the keys of a configuration for random weights
            (``{"model_type": "gpt2", "n_layer": 2}``; a missing ``vocab_size`` and the special tokens come from the
            tokenizer), or any ``torch.nn.Module``, taken in the training or evaluation mode that it is in.
        tokenizer: Saved beside the model; an object, a name or a folder. By default the trainer's data module's, or the
            pretrained model's own.
        objective: ``causal_lm``, ``classifier``, ``seq2seq``, ``masked_lm``, ``token_classifier``,
            ``question_answering`` or an object; by default what a given model's class was made for, and ``causal_lm``
            for a model to be built. A named model gets the head that belongs to it.
        optimizer: AdamW's settings, or the name of one with settings as they are: ``adamw``, ``masked_adamw``.
        schedule: The learning rate's course.
        lora: Trains low-rank adapters in place of the weights.
        gradient_checkpointing: Recomputes activations in the backward pass.
        dtype: The weights' type. For mixed precision keep float32 and set the trainer's ``precision``.
        checkpoints: What checkpoints hold, and whether the model is saved when the training ends.
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
        checkpoints: CheckpointOptions = CheckpointOptions(),  # noqa: B008 - frozen
        mask: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.optimizer_options = optimizer_options(optimizer, mask)
        self._masked_training = MaskedTraining(self.optimizer_options)
        self.schedule_options = options_of(ScheduleOptions, "schedule", schedule)
        self.lora_options = None if lora is None else options_of(LoraOptions, "lora", lora)
        self.objective: Objective = _objective(objective, model)
        self.checkpoint_options = options_of(CheckpointOptions, "checkpoints", checkpoints)
        self.gradient_checkpointing = gradient_checkpointing
        require_choice("dtype", dtype, get_args(WeightDtype))
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
            attach_export(self.trainer, self.checkpoint_options)

    def configure_optimizers(self) -> Any:
        """AdamW with decay groups, and a learning rate that moves at every optimizer step."""
        total_steps = self.trainer.estimated_stepping_batches if self._trainer is not None else math.inf
        factor = schedule_factor(self.schedule_options, total_steps)
        optimizer = build_optimizer(self.model, self.optimizer_options)
        self._masked_training.read_file(optimizer, self.model)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}

    def on_train_start(self) -> None:
        """Has a resumed epoch go on with its next batch, and gives a masked optimizer its mask.

        The mask is that which a callback has just made, or that of the resumed checkpoint.
        """
        follow_training(self.trainer)
        self._masked_training.start(self.trainer, self.model)

    def on_train_end(self) -> None:
        """Saves the model, before the analyses at the end, unless a checkpoint of this step holds it."""
        if self.checkpoint_options.final:
            save_final(self.trainer)

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
        """The given tokenizer, or the trainer's data module's, or the pretrained model's own; None without any."""
        if self.tokenizer is not None:
            return self.tokenizer
        datamodule = getattr(self._trainer, "datamodule", None)
        fed = getattr(datamodule, "tokenizer", None)
        return self._own_tokenizer if fed is None else fed

    @functools.cached_property
    def _own_tokenizer(self) -> PreTrainedTokenizerBase | None:
        """That of the folder or name that the model was loaded from; not all have one."""
        owner = own_tokenizer(self)
        try:
            return None if owner is None else load_tokenizer(owner)
        except ValueError:
            return None

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
        return next((head for kind, head in _HEADS.items() if isinstance(self.objective, kind)), "causal_lm")

    def _measure(self, stage: Stage, batch: Any) -> tuple[Tensor, dict[str, Tensor], int]:
        if self._position_limit is not None and isinstance(batch, Mapping) and "input_ids" in batch:
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
                "objective": next((name for name, kind in _OBJECTIVES.items() if type(self.objective) is kind), None),
                "optimizer": dataclasses.asdict(self.optimizer_options),
                "schedule": dataclasses.asdict(self.schedule_options),
                "lora": None if self.lora_options is None else dataclasses.asdict(self.lora_options),
                "gradient_checkpointing": self.gradient_checkpointing,
                "dtype": self.dtype_name,
                "checkpoints": dataclasses.asdict(self.checkpoint_options),
            }
        )


def _objective(objective: Objective | str | None, model: Any) -> Objective:
    if objective is None:
        return objective_for(model) if isinstance(model, nn.Module) else CausalLMObjective()
    if isinstance(objective, str):
        if objective not in _OBJECTIVES:
            raise ValueError(f"unknown objective {objective!r}; {suggestion(objective, _OBJECTIVES)} or an object")
        return _OBJECTIVES[objective]()
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{type(objective).__name__} is no objective: it needs logits_and_targets, log_probs, loss and samples"
        )
    return objective


def _check_model(model: Any) -> None:
    if isinstance(model, nn.Module):
        if next(model.parameters(), None) is None:
            raise ValueError(f"the model {type(model).__name__} has no parameters; there is nothing to train")
    elif not isinstance(model, (str, Mapping)) or not model:
        raise ValueError(
            f"model must be a name, a folder, a dict with model_type, or a torch.nn.Module; got {model!r}. A "
            "checkpoint made with a module object needs load_from_checkpoint(path, model=module)"
        )


MASK_CALLBACKS = {"golden": "GoldenParameters", "reverse_golden": "ReverseGoldenParameters"}
"""Names that ``optimizer.mask`` may have besides a file's, and the callbacks that they stand for."""

CHECKPOINT_KEY = "goldy_mask"


class MaskedTraining:
    """Finds the mask of a run, keeps it in checkpoints and takes it up again; does nothing without a masked optimizer.

    Args:
        options: The optimizer's; ``mask`` names the source.

    Example:
        >>> MaskedTraining(OptimizerOptions()).is_masked
        False
    """

    def __init__(self, options: OptimizerOptions) -> None:
        self.source = options.mask or ""
        self.is_masked = options.name == "masked_adamw"
        self._noted: Mapping[str, Any] | None = None

    def check(self, trainer: L.Trainer) -> None:
        """Checks, before anything is loaded, that the mask will be there.

        Raises:
            ValueError: The callback is missing, or does not run before the first step.
            StoreError: The file is missing or holds no mask.
        """
        self._noted = None
        if not self.is_masked:
            return
        if self.source in MASK_CALLBACKS:
            self._callback(trainer)
            return
        if not Path(self.source).is_file():
            raise StoreError(
                f"optimizer.mask={self.source!r}: no such file, nor a callback's name; "
                f"{suggestion(self.source, MASK_CALLBACKS)}"
            )
        header = read_header(self.source)
        if header.kind != "mask":
            raise StoreError(f"optimizer.mask={self.source}: holds {header.kind}, not a mask")

    def read_file(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Gives the optimizer the mask of a file; that of a callback comes as training starts."""
        if isinstance(optimizer, MaskedAdamW) and self.source not in MASK_CALLBACKS:
            optimizer.set_mask(ParameterMask.load(self.source, model))

    def start(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Gives the optimizer its mask right before the first step; every rank must call.

        Raises:
            ValueError: The file's mask is not the one that the resumed run was trained with.
            FileNotFoundError: The callback has made none.
        """
        if not self.is_masked:
            return
        optimizer = _masked_optimizer(trainer)
        if optimizer is None:
            raise ValueError("optimizer.name='masked_adamw', but the trainer's optimizer is another one")
        if self._noted is not None:
            resumed = _unpacked(self._noted)
            # Every tensor is gathered before the answer, because the ranks must gather alike.
            present = None if optimizer.mask is None else optimizer.mask.to_dense()
            if present is not None and not (
                present.keys() == resumed.keys() and all(torch.equal(present[name], resumed[name]) for name in present)
            ):
                raise ValueError(
                    f"the mask in {self.source} is not the one that the checkpoint was trained with; resume with that "
                    "file, or start a new run from the weights"
                )
            optimizer.set_mask(resumed)
        elif self.source in MASK_CALLBACKS:
            optimizer.set_mask(ParameterMask.load(self._made_file(trainer), model))
        self._noted = None
        mask = optimizer.mask
        assert mask is not None
        everything = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        inside = mask.total
        share = percentage(inside / everything, 2)
        rank_zero_info(f"mask from {self.source}: {inside:,} of {everything:,} elements ({share})")

    def save(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
        """Adds the packed mask to a checkpoint; a collective when it is sharded."""
        optimizer = _masked_optimizer(trainer)
        if optimizer is None or (mask := optimizer.mask) is None:
            return
        packed: dict[str, Any] = {}
        for name, tensor in mask.items():
            full = gather(tensor)
            if trainer.is_global_zero:
                bits, encoding = pack_mask(full, name)
                packed[name] = {"packed": bits, "encoding": encoding, "shape": list(full.shape)}
        checkpoint[CHECKPOINT_KEY] = packed

    def note(self, checkpoint: Mapping[str, Any]) -> None:
        """Notes the mask of a checkpoint; a later ``check`` forgets it, so that only a resumed run uses it."""
        self._noted = checkpoint.get(CHECKPOINT_KEY)

    def _callback(self, trainer: L.Trainer) -> Any:
        wanted = MASK_CALLBACKS[self.source]
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        found = [each for each in callbacks if wanted in (base.__name__ for base in type(each).__mro__)]
        if not found:
            attached = ", ".join(type(each).__name__ for each in callbacks)
            raise ValueError(f"optimizer.mask={self.source!r} needs the callback {wanted}; the trainer has {attached}")
        starting = [each for each in found if "start" in each.at]
        if len(starting) != 1:
            raise ValueError(
                f"optimizer.mask={self.source!r} needs one {wanted} with at=['start', ...], whose mask exists before "
                f"the first step; {len(starting)} of {len(found)} have it"
            )
        return starting[0]

    def _made_file(self, trainer: L.Trainer) -> Path:
        callback = self._callback(trainer)
        path = Path(callback.folder) / f"mask-step={trainer.global_step:08d}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: {type(callback).__name__} has made no mask before the first step")
        return path


def _unpacked(noted: Mapping[str, Any]) -> dict[str, Tensor]:
    """The mask that a checkpoint holds, by parameter."""
    try:
        return {
            name: unpack_mask(
                packed["packed"].cpu(), torch.Size(packed["shape"]), packed["encoding"], f"the checkpoint's {name}"
            )
            for name, packed in noted.items()
        }
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise StoreError(f"the checkpoint's {CHECKPOINT_KEY!r} is no packed mask ({error})") from error


def _masked_optimizer(trainer: L.Trainer) -> MaskedAdamW | None:
    return next((each for each in trainer.optimizers if isinstance(each, MaskedAdamW)), None)
