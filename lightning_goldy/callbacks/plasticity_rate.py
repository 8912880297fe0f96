"""A higher learning rate for the attention of some layers, without parameter groups of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.head_freeze import plain_optimizer
from lightning_goldy.core.architecture import Architecture
from lightning_goldy.core.sharding import local, unshard_guard


class AttentionRate:
    r"""Multiplies what every optimizer step does to the attention parameters of chosen layers.

    .. math:: \theta \leftarrow \theta + m\,(\theta' - \theta)

    with :math:`\theta'` the optimizer's own result. For an optimizer whose update is linear in the learning rate (SGD,
    Adam, AdamW with its weight decay, and most others) that is the step with m times the rate, to rounding; moments are
    what they would be. Parameter groups, and so the layout of optimizer checkpoints, stay as they are.

    Args:
        model: The model.
        architecture: Its description.
        optimizers: Those of the training.

    Raises:
        ValueError: An optimizer searches along lines, so that its update is not linear in the rate.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.core.architecture import describe_architecture
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rate = AttentionRate(model, describe_architecture(model), [optimizer])
        >>> rate.multiply({1: 3.0})
        >>> weights = [block.attn.c_proj.weight for block in model.transformer.h]
        >>> before = [weight.detach().clone() for weight in weights]
        >>> sum(weight.sum() for weight in weights).backward()
        >>> optimizer.step()
        >>> [round((old - new).mean().item(), 4) for old, new in zip(before, weights)]
        [0.1, 0.3]
    """

    def __init__(self, model: nn.Module, architecture: Architecture, optimizers: Sequence[Any]) -> None:
        self._model, self._architecture = model, architecture
        plain = [plain_optimizer(optimizer) for optimizer in optimizers]
        for optimizer in plain:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError("the update of LBFGS is not linear in its learning rate; take another optimizer")
        self._layers: dict[int, float] = {}
        self._factors: list[tuple[nn.Parameter, float]] = []
        self._before: dict[int, list[tuple[nn.Parameter, float, Tensor]]] = {}
        self._handles = [
            handle
            for optimizer in plain
            for handle in (
                optimizer.register_step_pre_hook(self._save),
                optimizer.register_step_post_hook(self._scale),
            )
        ]

    def multiply(self, layers: Mapping[int, float]) -> None:
        """Sets the multipliers of the coming steps by layer; layers that are not named have 1."""
        layers = {layer: factor for layer, factor in layers.items() if factor != 1}
        if layers == self._layers:
            return
        if layers:
            # After a forward without gradients FSDP2's root holds whole parameters, which no optimizer knows.
            unshard_guard(self._model)
        factors: dict[int, tuple[nn.Parameter, float]] = {}
        for layer, factor in layers.items():
            for parameter in self._architecture.blocks[layer].attention.parameters():
                if parameter.requires_grad:
                    # Of layers that share their weights the larger multiplier counts.
                    known = factors.get(id(parameter), (parameter, factor))[1]
                    factors[id(parameter)] = (parameter, max(known, factor))
        self._layers, self._factors = layers, list(factors.values())

    def remove(self) -> None:
        """Lets the optimizers go."""
        for handle in self._handles:
            handle.remove()

    def _save(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._before[id(optimizer)] = [
            (parameter, factor, local(parameter).clone())
            for parameter, factor in self._factors
            if id(parameter) in held
        ]

    @torch.no_grad()
    def _scale(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, factor, before in self._before.pop(id(optimizer), ()):
            after = local(parameter)
            dtype = torch.promote_types(after.dtype, torch.float32)
            # What did not move stays to the last bit: torch's lerp starts from the end for weights above one half.
            after.copy_(torch.lerp(before.to(dtype), after.to(dtype), factor))
