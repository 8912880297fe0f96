"""Objectives: how a batch becomes logits at target positions, log-probabilities per sample, and a loss."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_goldy.core.batches import batch_tensors as batch_tensors
from lightning_goldy.core.batches import map_batch as map_batch
from lightning_goldy.core.batches import split_batch

IGNORE_INDEX = -100
"""The label that marks a position without a target (the Hugging Face convention)."""


@dataclass(frozen=True)
class TargetLogits:
    """The logits where there is something to predict.

    Args:
        logits: Shape ``[N, V]``, one row per target.
        targets: Shape ``[N]``, class or token indices.
        sample: Shape ``[N]``, the row of the batch that each target belongs to.
        n_samples: The number of rows of the batch.

    Example:
        >>> target = TargetLogits(torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.tensor([0, 0, 1]), 2)
        >>> target.log_probs().tolist() == [-torch.tensor(4.0).log().item()] * 2
        True
    """

    logits: Tensor
    targets: Tensor
    sample: Tensor
    n_samples: int

    def token_losses(self) -> Tensor:
        """Negative log-probability of each target, shape ``[N]``, nats; at least float32."""
        logits = self.logits if self.logits.dtype in (torch.float32, torch.float64) else self.logits.float()
        return F.cross_entropy(logits, self.targets, reduction="none")

    def log_probs(self) -> Tensor:
        """Mean log-probability of each sample's targets, shape ``[n_samples]``, nats.

        Raises:
            ValueError: A sample has no target, so its mean is undefined.
        """
        losses = self.token_losses()
        counts = torch.bincount(self.sample, minlength=self.n_samples)
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"samples {empty[:5]} of a batch of {self.n_samples} have no target: every label is masked"
            )
        total = losses.new_zeros(self.n_samples).index_add(0, self.sample, losses)
        return -total / counts

    def loss(self) -> Tensor:
        """Mean negative log-probability over all targets, a scalar, nats."""
        return self.token_losses().mean()


@runtime_checkable
class Objective(Protocol):
    """What an analysis needs to know of a task; anything with these four methods serves.

    A subclass needs the first alone: log-probabilities and losses are by default those of its logits.
    """

    def logits_and_targets(self, model: nn.Module, batch: Any) -> TargetLogits:
        """Logits at target positions and their targets."""
        ...

    def log_probs(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean log-probability of each sample's targets, shape ``[B]``, nats."""
        return self.logits_and_targets(model, batch).log_probs()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean negative log-probability over the target positions of the batch, a scalar, nats."""
        return self.logits_and_targets(model, batch).loss()

    def samples(self, batch: Any) -> Iterator[Any]:
        """The batch cut into batches of one sample."""
        return split_batch(batch)


class CausalLMObjective(Objective):
    r"""Next-token prediction on Hugging Face batches.

    .. math:: \log p(\text{response} \mid \text{query}) = \frac{1}{|T|} \sum_{t \in T} \log p(x_t \mid x_{<t})

    where T are the positions with a label other than -100 whose own attention mask and whose predecessor's are not 0
    (the first token after padding on the left has nothing to be predicted from). Without labels every non-padding next
    token is a target. Only the needed logits are computed where the model can do so
    (``logits_to_keep``) and fewer than half of the positions are targets.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=11, n_positions=16)).eval()
        >>> ids = torch.tensor([[1, 2, 3, 4]])
        >>> loss = CausalLMObjective().loss(model, {"input_ids": ids})
        >>> torch.allclose(loss, model(input_ids=ids, labels=ids).loss)
        True
    """

    def logits_and_targets(self, model: nn.Module, batch: Mapping[str, Any]) -> TargetLogits:
        """Logits and targets at every target position.

        Args:
            model: A causal language model whose output has ``logits`` of shape ``[B, T, V]``.
            batch: ``input_ids`` of shape ``[B, T]`` and optionally ``attention_mask`` and ``labels`` of that shape.

        Raises:
            ValueError: The batch lacks ``input_ids``, its shapes differ, or every target is masked.
        """
        labels = self._labels(batch)
        n_samples, length = labels.shape
        valid = labels[:, 1:] != IGNORE_INDEX  # [B, T-1]; position t predicts token t+1
        if batch.get("attention_mask") is not None:
            valid &= batch["attention_mask"][:, :-1] != 0
        if not valid.any():
            raise ValueError(
                f"a batch of {n_samples} samples of {length} tokens has no target: every label is masked "
                "(-100 or padding)"
            )
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        padded = inputs.get("attention_mask") is not None
        if padded and "position_ids" not in inputs and accepts(model, "position_ids"):
            inputs.update(left_padding_positions(inputs["attention_mask"]))
        if accepts(model, "use_cache"):
            inputs["use_cache"] = False
        positions = valid.any(dim=0).nonzero().flatten()  # [K]
        if len(positions) < length // 2 and accepts(model, "logits_to_keep"):
            logits = model(**inputs, logits_to_keep=positions).logits  # [B, K, V]
        else:
            logits = _columns(model(**inputs).logits, positions)  # [B, T, V] -> [B, K, V]
        kept = valid[:, positions]  # [B, K]
        targets = labels[:, 1:][:, positions]
        sample = torch.arange(n_samples, device=labels.device)[:, None].expand_as(kept)
        if bool(kept.all()):
            return TargetLogits(logits.flatten(0, 1), targets.flatten(), sample.flatten(), n_samples)
        return TargetLogits(logits[kept], targets[kept], sample[kept], n_samples)

    @staticmethod
    def _labels(batch: Mapping[str, Any]) -> Tensor:
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"a causal language model's batch is a dict with 'input_ids'; this one is {found}")
        ids = batch["input_ids"]
        labels = batch.get("labels")
        labels = ids if labels is None else labels
        mask = batch.get("attention_mask")
        for name, tensor in (("labels", labels), ("attention_mask", mask)):
            if tensor is not None and tensor.shape != ids.shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, input_ids {tuple(ids.shape)}")
        return labels if mask is None else labels.masked_fill(mask == 0, IGNORE_INDEX)


class ClassifierObjective(Objective):
    r"""Classification by any module: ``(x, y)`` batches, or dicts with ``labels``.

    .. math:: \log p(y \mid x) = \log \mathrm{softmax}(f(x))_y

    Example:
        >>> batch = (torch.ones(2, 3), torch.tensor([0, 1]))
        >>> ClassifierObjective().log_probs(nn.Linear(3, 2), batch).shape
        torch.Size([2])
    """

    def logits_and_targets(self, model: nn.Module, batch: Any) -> TargetLogits:
        """Logits of shape ``[B, classes]`` and the labels of shape ``[B]``; a label of -100 is no target.

        Raises:
            ValueError: The batch is neither an (x, y) pair nor a dict with ``labels``, the labels are not class indices
                of shape ``[B]``, or all are masked.
        """
        if isinstance(batch, Mapping) and "labels" in batch:
            labels = batch["labels"]
            output = model(**{key: value for key, value in batch.items() if key != "labels"})
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            inputs, labels = batch
            output = model(inputs)
        else:
            found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(f"a classifier's batch is a pair (x, y) or a dict with 'labels'; this one is {found}")
        logits = output if isinstance(output, Tensor) else output.logits
        if labels.is_floating_point() or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"labels must be class indices of shape [{logits.shape[0]}]; "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        kept = labels != IGNORE_INDEX  # [B]
        if not kept.any():
            raise ValueError(f"a batch of {len(labels)} samples has no target: every label is masked (-100)")
        return TargetLogits(logits[kept], labels[kept], kept.nonzero().flatten(), len(labels))


class FunctionObjective(Objective):
    """Any scalar loss as an objective.

    Args:
        function: ``function(model, batch) -> scalar`` loss, taken for a mean negative log-probability in nats.
        logits: Optional ``logits(model, batch) -> TargetLogits`` for the analyses that compare distributions.

    Example:
        >>> objective = FunctionObjective(lambda model, batch: (model(batch) ** 2).mean())
        >>> objective.log_probs(nn.Identity(), torch.tensor([[1.0], [2.0]])).tolist()
        [-1.0, -4.0]
    """

    def __init__(
        self,
        function: Callable[[nn.Module, Any], Tensor],
        logits: Callable[[nn.Module, Any], TargetLogits] | None = None,
    ) -> None:
        self.function = function
        self.logits = logits

    def logits_and_targets(self, model: nn.Module, batch: Any) -> TargetLogits:
        """What the given ``logits`` function returns.

        Raises:
            TypeError: None was given, so analyses of distributions cannot run on this objective.
        """
        if self.logits is None:
            raise TypeError(
                "this FunctionObjective has a loss but no logits; "
                "pass logits=, or use CausalLMObjective or ClassifierObjective"
            )
        return self.logits(model, batch)

    def log_probs(self, model: nn.Module, batch: Any) -> Tensor:
        """Minus the loss of each sample on its own, shape ``[B]``."""
        return torch.stack([-self.loss(model, sample) for sample in self.samples(batch)])

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The function's value on the whole batch, a scalar."""
        value = self.function(model, batch)
        if value.ndim:
            raise ValueError(f"the objective's function must return a scalar; got shape {tuple(value.shape)}")
        return value


def accepts(model: nn.Module, argument: str) -> bool:
    """Whether the model's forward names this argument; looks through PEFT and ``torch.compile`` wrappers."""
    inner: Any = getattr(model, "_orig_mod", model)
    base = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return argument in inspect.signature(base.forward).parameters


def _columns(logits: Tensor, positions: Tensor) -> Tensor:
    # A run of positions is a view; any others cost a copy here and a scatter in the backward pass.
    first, last = int(positions[0]), int(positions[-1])
    return logits[:, first : last + 1] if last - first + 1 == len(positions) else logits[:, positions]


def left_padding_positions(attention_mask: Tensor) -> dict[str, Tensor]:
    """The ``position_ids`` that a batch with padding on the left needs; none without such padding."""
    # With padding on the left, positions must count from each sample's first token, or the padding would matter.
    if attention_mask.ndim != 2 or bool((attention_mask[:, 0] != 0).all()):
        return {}
    return {"position_ids": (attention_mask.long().cumsum(dim=1) - 1).clamp_(min=0)}
