"""What a callback analyses: the model inside a LightningModule, its objective, and the probe batches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from lightning_goldy.analysis.attention import Prompt
from lightning_goldy.analysis.attention.patterns import Stack, Tokens, with_decoder_tokens
from lightning_goldy.core.batches import move_batch, take_samples
from lightning_goldy.core.isolation import isolated_rng, preserved
from lightning_goldy.core.objective import (
    CausalLMObjective,
    ClassifierObjective,
    Objective,
    check_own_loss,
    objective_for,
)
from lightning_goldy.core.tasks import require_unscaled, transformers_model
from lightning_goldy.training.probe import Reading, probe_source, shared_reading, split_source


def find_model(pl_module: nn.Module, attribute: str | None) -> nn.Module:
    """The module that an analysis works on.

    Args:
        pl_module: The LightningModule.
        attribute: Dotted name of a submodule; by default ``model`` when there is one, else the whole LightningModule.

    Raises:
        ValueError: There is no such submodule; those that exist are named. Or its evaluation mode changes weights.
    """
    model = _submodule(pl_module, attribute)
    require_unscaled(model)
    return model


def _submodule(pl_module: nn.Module, attribute: str | None) -> nn.Module:
    if attribute is None:
        model = getattr(pl_module, "model", None)
        return model if isinstance(model, nn.Module) else pl_module
    try:
        return pl_module.get_submodule(attribute)
    except AttributeError as error:
        children = ", ".join(name for name, _ in pl_module.named_children()) or "none"
        raise ValueError(
            f"model_attribute={attribute!r}: {type(pl_module).__name__} has no such submodule; its children: {children}"
        ) from error


def check_strategy(strategy: Any, who: str, *, changes_training: bool = False) -> None:
    """Refuses strategies whose parameters are no tensors of the model's own, those of a user's own subclasses too.

    Args:
        strategy: The trainer's.
        who: What cannot work with it.
        changes_training: Whether it changes parameters and what the optimizer keeps of them.

    Raises:
        ValueError: It is FSDP1, or DeepSpeed at a stage of ZeRO that takes parameters apart; or DeepSpeed at any, for
            what changes parameters.

    Example:
        >>> class DeepSpeedStrategy:
        ...     config = {"zero_optimization": {"stage": 3}}
        >>> check_strategy(DeepSpeedStrategy(), "GoldenSnapshot")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: GoldenSnapshot cannot work with DeepSpeedStrategy at ZeRO stage 3, which keeps parameters in ...
    """
    kinds = {base.__name__ for base in type(strategy).__mro__}
    name, why = type(strategy).__name__, None
    if kinds & {"FSDPStrategy", "XLAFSDPStrategy"}:
        why = f"{name} (FSDP1), whose flat parameters merge weights across layers"
    elif "DeepSpeedStrategy" in kinds:
        stage = ((getattr(strategy, "config", None) or {}).get("zero_optimization") or {}).get("stage", 0)
        if stage not in (0, 1, 2):
            why = f"{name} at ZeRO stage {stage}, which keeps parameters in parts that only its own passes join"
        elif changes_training:
            why = f"{name}, whose optimizer steps on flat copies of the parameters and would undo its changes"
    if why is not None:
        raise ValueError(
            f"{who} cannot work with {why}; use ModelParallelStrategy with fully_shard (FSDP2), DDPStrategy or a "
            "single device"
        )


def find_objective(
    pl_module: nn.Module, model: nn.Module, given: Objective | None, batches: Sequence[Any] = ()
) -> Objective:
    """The given objective, the LightningModule's own ``objective``, or the one that the model and its batches ask for.

    Of a transformers model its class decides. Another one is a classifier where its batches are pairs (x, y), y class
    indices of shape ``[B]``, for which it gives logits of shape ``[B, classes]``.

    Args:
        pl_module: The LightningModule.
        model: The part that is analysed; it is run on one sample where nothing else tells.
        given: What was asked for.
        batches: The probe.

    Raises:
        ValueError: None of them applies; the message says what to pass and where to import it from.
    """
    if given is not None:
        return given
    own = getattr(pl_module, "objective", None)
    if isinstance(own, Objective):
        return own
    if transformers_model(model, anywhere=False) is not None:
        return objective_for(model)
    if callable(getattr(model, "prepare_inputs_for_generation", None)):
        return CausalLMObjective()
    why = _no_classifier(pl_module, model, batches)
    if not why:
        return ClassifierObjective()
    raise ValueError(
        f"{type(model).__name__} is no causal language model, and {why}, so the task is not known: pass "
        "objective=ClassifierObjective() (from lightning_goldy import ClassifierObjective), for any other loss "
        "objective=FunctionObjective(lambda model, batch: ...) (from lightning_goldy import FunctionObjective), or an "
        "object with the methods of lightning_goldy.core.Objective; or set self.objective in the LightningModule"
    )


def _no_classifier(pl_module: nn.Module, model: nn.Module, batches: Sequence[Any]) -> str:
    """Why a model is not taken for a classifier; empty where it is."""
    batch = next(iter(batches), None)
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    labels = batch[1] if pair and batch is not None else None
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
        return "its batches are no pairs (x, y) with class indices y of shape [B]"
    for name, child in pl_module.named_modules():
        if isinstance(child, _Loss) and not isinstance(child, (nn.CrossEntropyLoss, nn.NLLLoss)):
            return f"its loss {name} is {type(child).__name__}"
        if isinstance(child, _Loss) and (child.weight is not None or getattr(child, "label_smoothing", None)):
            return f"its loss {name} has weights or smooths labels"
        if isinstance(child, _Loss) and child.ignore_index >= 0:  # type: ignore[operator]
            return f"its loss {name} leaves class {child.ignore_index} out (ignore_index), where -100 is no target here"
    sample = move_batch(take_samples(batch, slice(0, 1)), next(model.parameters()).device)
    with preserved(model), torch.no_grad():
        output = model(sample[0])
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(output).__name__
    if not isinstance(logits, Tensor) or logits.ndim != 2 or int(labels.max()) >= logits.shape[1]:
        return f"it gives {shape} for one sample, not logits of shape [1, classes] for labels up to {int(labels.max())}"
    if logits.shape[1] > 1 and bool((logits >= 0).all()) and abs(float(logits.float().sum()) - 1) < _rounding(logits):
        return f"it gives what sums to 1 ({[round(p, 4) for p in logits[0, :4].tolist()]}), probabilities and no logits"
    return ""


def _rounding(values: Tensor) -> float:
    """By how much a sum of probabilities may miss 1."""
    return min(100 * torch.finfo(values.dtype).eps, 1e-2)


def find_probe(
    trainer: L.Trainer,
    pl_module: Any,
    given: Iterable[Any] | None,
    n_samples: int | None = None,
    *,
    wanted: Sequence[int | None] = (),
) -> Reading:
    """The batches that analyses use: the first that Lightning would feed, the same on every rank, on the CPU.

    Looked for in this order: the callback's ``probe``, a ``probe_dataloader()`` of the LightningModule or of the data
    module, the validation set, and with a warning the end of the training set. Every batch passes the hooks of a
    batch's transfer; no more batches are read than ``n_samples`` asks for, and whatever they come from stays as it was.

    Args:
        trainer: The trainer.
        pl_module: Its LightningModule.
        given: The callback's ``probe``.
        n_samples: Samples to read; None for all, of the validation set those that Lightning would take.
        wanted: Samples that all who share the reading need; the largest number is read.

    Raises:
        ValueError: There is none, or it is empty.
    """
    source = probe_source(trainer, pl_module, given)
    reading = shared_reading(trainer, source, n_samples, wanted)
    if not reading.batches:
        raise ValueError(f"the probe is empty: {source.name} gave no batch")
    return reading


def find_tokenizer(trainer: L.Trainer) -> Any:
    """The ``tokenizer`` of the LightningModule, or of the data module, or the pretrained model's; None without any."""
    owners = (trainer.lightning_module, trainer.datamodule)  # type: ignore[attr-defined]
    tokenizers = (getattr(owner, "tokenizer", None) for owner in owners)
    found = next((tokenizer for tokenizer in tokenizers if callable(tokenizer)), None)
    export = getattr(trainer.lightning_module, "export_tokenizer", None)
    return export() if found is None and callable(export) else found


@torch.no_grad()
def check_probe(
    model: nn.Module,
    objective: Objective,
    probe: Iterable[Any],
    n_samples: int | None,
    *,
    pl_module: Any = None,
    check: bool = True,
    lacking: Literal["error", "warn"] = "error",
) -> int:
    """One forward pass over the probe, so that a batch that cannot work fails before the first step.

    Args:
        model: The analysed model, in evaluation mode.
        objective: How its batches are read.
        probe: The batches.
        n_samples: Samples that an analysis needs.
        pl_module: The LightningModule; unless it trains by this very objective, the model's own loss is that of the
            batch as it is, as its training step would ask for it.
        check: Whether the objective's loss is held against the model's own; two more passes over two samples.
        lacking: What fewer samples than ``n_samples`` are.

    Returns:
        The samples that an analysis has.

    Raises:
        ValueError: There are fewer samples than ``n_samples``, a sample's log-probability is not finite, or the
            model's own loss is another one.
    """
    device = next(model.parameters()).device
    seen = 0
    for index, batch in enumerate(probe):
        if n_samples is not None and seen >= n_samples:
            return n_samples
        placed = move_batch(batch, device)
        values = objective.log_probs(model, placed)
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"probe batch {index}: the log-probability is {values.tolist()}, not finite")
        if check and index == 0:
            as_given = pl_module is not None and getattr(pl_module, "objective", None) is not objective
            check_own_loss(model, objective, placed, as_given=as_given)
        seen += len(values)
    if n_samples is not None and seen < n_samples:
        told = f"n_samples={n_samples}, but the probe holds only {seen} samples"
        if lacking == "error":
            raise ValueError(told)
        rank_zero_warn(f"{told}: those are used")
    return seen if n_samples is None else min(seen, n_samples)


def find_splits(
    trainer: L.Trainer, given: Mapping[str, Iterable[Any]] | bool, n_samples: int | None = None
) -> dict[str, list[Any]]:
    """The first batches of every split as Lightning would feed them, the same on every rank, on the CPU.

    Args:
        trainer: Its data module is asked for ``analysis_splits()`` when ``given`` is True.
        given: Batches or a DataLoader by name, or True.
        n_samples: Samples to read of each; None for all.

    Raises:
        ValueError: There are no splits, or one is empty or has a name that no tag can hold.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(given, Mapping) and not callable(getattr(datamodule, "analysis_splits", None)):
        raise ValueError(
            f"splits=True asks the data module for analysis_splits(), which {type(datamodule).__name__} lacks; "
            "pass splits={name: batches}, or None for the probe"
        )
    with isolated_rng():
        named = given if isinstance(given, Mapping) else datamodule.analysis_splits()
    check_split_names(named)
    splits = {}
    for name, batches in named.items():
        source = split_source(name, batches)
        splits[name] = shared_reading(trainer, source, n_samples).first(n_samples)
        if not splits[name]:
            raise ValueError(f"the split {name!r} is empty")
    return splits


def find_collateral(trainer: L.Trainer, given: Iterable[Any] | None, n_samples: int | None = None) -> list[Any]:
    """Batches of text that has nothing to do with the finetune, the same on every rank, on the CPU; empty without any.

    Args:
        trainer: Its LightningModule and data module are asked for a ``collateral_dataloader()``.
        given: The callback's ``collateral``, which comes first.
        n_samples: Samples to read; None for all.
    """
    owners = (trainer.lightning_module, trainer.datamodule)  # type: ignore[attr-defined]
    if given is None:
        makers = (getattr(owner, "collateral_dataloader", None) for owner in owners)
        maker = next((maker for maker in makers if callable(maker)), None)
        with isolated_rng():
            given = None if maker is None else maker()
    if given is None:
        return []
    batches = shared_reading(trainer, split_source("collateral", given), n_samples).first(n_samples)
    if not batches:
        raise ValueError("the collateral text is empty: it gave no batch")
    return batches


def check_split_names(names: Iterable[str]) -> None:
    """Refuses names that cannot be part of a logged tag.

    Raises:
        ValueError: There is none, or a name has other letters.

    Example:
        >>> check_split_names(["clean", "a/b"])
        Traceback (most recent call last):
        ValueError: split names become parts of tags: letters, digits, '-' and '_' only; got 'a/b'
    """
    names = list(names)
    if not names:
        raise ValueError("splits= names no set of samples")
    for name in names:
        if not re.fullmatch(r"[\w-]+", str(name), re.ASCII):
            raise ValueError(f"split names become parts of tags: letters, digits, '-' and '_' only; got {name!r}")


PROBE = "probe"
"""What the prompt is called that is taken from the probe when none is given."""

PromptTexts: TypeAlias = Mapping[str, "str | Sequence[int]"]


def find_prompts(
    trainer: L.Trainer,
    model: nn.Module,
    given: PromptTexts | None,
    probe: Sequence[Any],
    max_tokens: int,
    *,
    stack: Stack | None = None,
) -> tuple[Prompt, ...]:
    """The prompts with the run's tokenizer, each cut to its first tokens; by default the probe's first sample.

    Of a ``decoder`` they are its tokens, beside what the encoder reads in the probe's first sample.

    Raises:
        ValueError: A text needs a tokenizer and there is none, or a token is unknown to the model.
    """
    first = with_decoder_tokens(model, probe[0], stack)
    source = None
    if stack == "decoder" and isinstance(first, Mapping):
        inputs = {name: value for name, value in first.items() if name != "labels" and not name.startswith("decoder_")}
        source = take_samples(inputs, slice(0, 1))
    if given is None:
        tokens = Tokens.of(first, stack)
        # Without its padding, which the model does not see either.
        given = {PROBE: tokens.first_document(0).tolist()}
    tokenizer = find_tokenizer(trainer)
    for name, content in given.items():
        if isinstance(content, str) and tokenizer is None:
            raise ValueError(
                f"prompt {name!r} is a text, but neither {type(trainer.lightning_module).__name__} nor its data module "
                "has a tokenizer; give token ids instead"
            )
    pairs = given.items()
    return tuple(Prompt.of(name, content, model, tokenizer, max_tokens, source=source) for name, content in pairs)
