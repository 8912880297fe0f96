"""Attention maps of chosen heads for one sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.attention_recording import show_patterns
from lightning_goldy.core.gates import Head, HeadGates
from lightning_goldy.core.objective import Objective


def attention_maps(
    model: nn.Module, sample: Any, objective: Objective, heads: Sequence[Head], *, length: int = 24
) -> Tensor:
    """What each head attends to: its softmax weights, also those of a head whose gate is closed.

    Args:
        model: Has :class:`~lightning_goldy.core.gates.HeadGates`; in evaluation mode.
        sample: A batch whose first row is shown, on the model's device.
        objective: Calls the model.
        heads: (layer, head) pairs.
        length: Tokens shown, from the first on.

    Returns:
        Shape ``[heads, T, T]``, rows are queries, float32, on the CPU.

    Raises:
        UnsupportedArchitectureError: The family's attention patterns cannot be read.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.core.objective import CausalLMObjective
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> _ = HeadGates(model)
        >>> sample = {"input_ids": torch.tensor([[1, 2, 3]])}
        >>> attention_maps(model, sample, CausalLMObjective(), [(0, 1)])[0, 0].tolist()
        [1.0, 0.0, 0.0]
    """
    gates = HeadGates.of(model)
    if gates is None:
        raise ValueError("the model has no gates; make HeadGates(model) first")
    found: dict[int, Tensor] = {}

    def sink(layer: int, weights: Tensor, mask: Tensor | None) -> None:
        found[layer] = weights[0, :, :length, :length].float().cpu()

    show_patterns(model, gates.architecture, sample, objective, sink, layers={layer for layer, _ in heads})
    return torch.stack([found[layer][head] for layer, head in heads])
