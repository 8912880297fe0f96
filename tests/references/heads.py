"""Importance of heads the slow, obvious way: one sample at a time, without its padding, one head at a time."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_goldy.core.architecture import describe_architecture


def single_samples(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Each row alone, without its padding."""
    rows = []
    for row in range(len(batch["input_ids"])):
        real = batch["attention_mask"][row].bool()
        labels = batch["labels"][row]
        rows.append(
            {
                "input_ids": batch["input_ids"][row][real][None],
                "labels": labels[real][None] if labels.ndim else labels[None],
            }
        )
    return rows


def sample_loss(model: nn.Module, sample: dict[str, Tensor]) -> Tensor:
    """Mean negative log-probability of one sample's targets, nats."""
    logits, labels = model(input_ids=sample["input_ids"]).logits, sample["labels"]
    if labels.ndim == 1:
        return F.cross_entropy(logits.double(), labels)
    return F.cross_entropy(logits[0, :-1].double(), labels[0, 1:], ignore_index=-100)


def n_targets(sample: dict[str, Tensor]) -> int:
    labels = sample["labels"]
    return 1 if labels.ndim == 1 else int((labels[0, 1:] != -100).sum())


def gate_gradients(model: nn.Module, sample: dict[str, Tensor], closed: tuple = ()) -> Tensor:
    """Gradient of one sample's loss in a factor on each head's output, [layers, heads]."""
    architecture = describe_architecture(model)
    factors, handles = [], []
    for block in architecture.blocks:
        factor = torch.ones(block.n_heads)
        for layer, head in closed:
            if layer == block.index:
                factor[head] = 0
        factor.requires_grad_()

        def scale(module: nn.Module, args: Any, factor: Tensor = factor) -> tuple:
            parts = args[0].unflatten(-1, (len(factor), -1)) * factor[:, None]
            return (parts.flatten(-2),)

        handles.append(block.attention_output.register_forward_pre_hook(scale))
        factors.append(factor)
    sample_loss(model, sample).backward()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return torch.stack([factor.grad for factor in factors]).double()


def magnitude_reference(model: nn.Module, batch: dict[str, Tensor], closed: tuple = ()) -> Tensor:
    return torch.stack([gate_gradients(model, each, closed).abs() for each in single_samples(batch)]).mean(dim=0)


def taylor_reference(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    costs = []
    for sample in single_samples(batch):
        gradient = gate_gradients(model, sample)
        costs.append(-gradient + 0.5 * n_targets(sample) * gradient**2)
    return torch.stack(costs).mean(dim=0)


def closed_copy(model: nn.Module, heads: Any) -> nn.Module:
    """A copy in which the heads' output weights are zero."""
    other = copy.deepcopy(model)
    blocks = describe_architecture(other).blocks
    with torch.no_grad():
        for layer, head in heads:
            for part in blocks[layer].output_slice(head):
                part.of(part.parameter).zero_()
    return other


@torch.no_grad()
def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> float:
    return math.fsum(float(sample_loss(model, each)) for each in single_samples(batch)) / len(batch["input_ids"])


def ablation_reference(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    blocks = describe_architecture(model).blocks
    before = mean_loss(model, batch)
    return torch.tensor(
        [
            [mean_loss(closed_copy(model, [(block.index, head)]), batch) - before for head in range(block.n_heads)]
            for block in blocks
        ],
        dtype=torch.float64,
    )


@torch.no_grad()
def entropy_reference(model: nn.Module, batch: dict[str, Tensor], *, window: int | None = None) -> Tensor:
    """Entropy of each attention row over the logarithm of what it sees, averaged over rows and then over samples."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    causal = getattr(eager, "lm_head", getattr(eager, "embed_out", None)) is not None
    samples = []
    for sample in single_samples(batch):
        patterns = eager(input_ids=sample["input_ids"], output_attentions=True).attentions
        layers = []
        for pattern in patterns:
            heads = []
            for rows in pattern[0].double().tolist():
                shares = []
                for query, row in enumerate(rows):
                    first = 0 if window is None else max(0, query - window + 1)
                    seen = row[first : query + 1] if causal else row
                    if len(seen) > 1:
                        entropy = -math.fsum(weight * math.log(weight) for weight in seen if weight > 0)
                        shares.append(entropy / math.log(len(seen)))
                heads.append(math.fsum(shares) / len(shares))
            layers.append(heads)
        samples.append(layers)
    return torch.tensor(samples, dtype=torch.float64).mean(dim=0)
