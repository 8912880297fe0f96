"""Models of real families, moved from their base, for tests of frozen and linearised variants."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.linearized import FrozenAttention, LinearizedMLP, TangentModel
from lightning_goldy.core import ParameterVector
from tests.references import architecture_models

SERVED = ["gpt2", "llama", "gpt_neox", "qwen3", "gemma", "bert"]
AT = ("base", "current")


def build(family: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return architecture_models.build(family)


def eager(family: str) -> nn.Module:
    model = build(family)
    model.set_attn_implementation("eager")
    return model


def batch(length: int = 7, *, left: int = 0, right: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(2, 67, (3, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1:, :left] = 0
    mask[1:, length - right :] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def moved(model: nn.Module, size: float, *, only: str = "", seed: int = 3) -> ParameterVector:
    """Moves the parameters with ``only`` in their names; returns where all were."""
    base = ParameterVector.of(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if only in name:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return base


def logits(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> Tensor:
    with torch.no_grad():
        return model(**(inputs or batch())).logits


def variants_of(model: nn.Module, base: ParameterVector) -> list[nn.Module]:
    return [
        FrozenAttention(model, base),
        LinearizedMLP(model, base),
        LinearizedMLP(model, base, at="current"),
        TangentModel(model, base),
    ]
