"""A small training whose loss has terms of the weights, and what heads own told from the plain rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.core.architecture import describe_architecture
from tests.references.architecture_models import build as built

BATCH = {"input_ids": torch.randint(2, 60, (3, 7), generator=torch.Generator().manual_seed(1))}
# All of the first key/value group of layer 0, half of one in layer 1.
CUT = [(0, 0), (0, 1), (1, 2)]


def build(family: str) -> Any:
    torch.manual_seed(0)
    return built(family)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def owned(model: nn.Module, heads: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Boolean masks of what heads own, told from the plain rules."""
    masks: dict[str, Tensor] = {}
    for block in describe_architecture(model).blocks:
        mine = [head for layer, head in heads if layer == block.index]
        parts = [part for head in mine for part in (*block.query.head_slice(head), *block.output_slice(head))]
        for group in range(block.n_key_value_heads):
            if set(block.query_heads(group)) <= set(mine):
                parts += [*block.key.head_slice(group), *block.value.head_slice(group)]
        for part in parts:
            mask = masks.setdefault(part.name, torch.zeros(part.parameter.shape, dtype=torch.bool))
            part.of(mask).fill_(True)
    return masks


def penalised(model: nn.Module) -> Tensor:
    """A loss with a term of the weights, so that closed heads have gradients too."""
    task = model(**BATCH).logits.square().mean()
    return task + 0.3 * sum(parameter.square().mean() for parameter in model.parameters())


def train(model: nn.Module, optimizer: Any, steps: int, before_step: Callable[[], Any] = lambda: None) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        penalised(model).backward()
        before_step()
        optimizer.step()
