"""Attention computed by the family's own eager arithmetic, under any kernel, with functions around it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_goldy.core.architecture.blocks import UnsupportedArchitectureError
from lightning_goldy.core.naming import model_class

_NAME = "goldy_eager"


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What an attention function is asked for.

    Args:
        module: The attention module.
        value: Values, shape ``[B, G, Tk, D]``, G groups of heads.
        mask: Additive, broadcasts to ``[B, H, Tq, Tk]`` and may have more keys; None when every key is visible.
        dropout: Share of the weights that is dropped in training.
    """

    module: nn.Module
    value: Tensor
    mask: Tensor | None
    dropout: float


Attended: TypeAlias = "tuple[Tensor, Tensor | None]"
"""Heads, shape ``[B, Tq, H, D]``, and their weights, shape ``[B, H, Tq, Tk]``."""

Around: TypeAlias = Callable[[AttentionCall, Callable[[], Attended]], Attended]
"""``around(call, compute)`` gives what takes the place of ``compute()``."""

# By identity of the modules. No context variable: a backward pass that computes again may run in another thread.
_AROUND: dict[int, tuple[Around, ...]] = {}


class AttentionKernelError(UnsupportedArchitectureError):
    """A model's attention cannot be computed by its family's eager arithmetic; the message names the model."""


@contextmanager
def eager_attention(model: nn.Module, around: Around | None = None) -> Iterator[None]:
    """Has a model compute attention by its family's eager arithmetic, whatever implementation it is set to.

    Blocks may be nested: the function of the inner one is called first, and computes through that of the outer one.

    Args:
        model: A transformers model or anything that contains one; its implementation is restored after. Nothing else of
            it changes, so a sharded model stays as it is.
        around: Called in the place of each attention function.

    Raises:
        AttentionKernelError: The model does not take its attention function from ``AttentionInterface``.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model, shapes = GPT2LMHeadModel(config), []
        >>> def see(call, compute):
        ...     heads, weights = compute()
        ...     shapes.append(tuple(weights.shape))
        ...     return heads, weights
        >>> with eager_attention(model, see):
        ...     _ = model(input_ids=torch.tensor([[1, 2, 3]]))
        >>> shapes, model.config._attn_implementation
        ([(1, 2, 3, 3), (1, 2, 3, 3)], 'sdpa')
    """
    _register()
    owner: Any = next((part for part in model.modules() if hasattr(part, "set_attn_implementation")), None)
    if owner is None:
        raise AttentionKernelError(f"{model_class(model)} is no transformers model")
    configs = _configurations(model)
    before = [config._attn_implementation_internal for config in configs]
    parts = [] if around is None else [id(part) for part in model.modules()]
    functions = {part: _AROUND[part] for part in parts if part in _AROUND}
    try:
        if any(name != _NAME for name in before):
            owner.set_attn_implementation(_NAME)
        if any(config._attn_implementation_internal != _NAME for config in configs):
            raise _ignored(owner)
        _AROUND.update({part: (*functions.get(part, ()), around) for part in parts if around is not None})
        yield
    finally:
        for part in parts:
            _AROUND.pop(part, None)
        _AROUND.update(functions)
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as eager attention adds it to the scores.

    A batch may bring a boolean one for its own kernel, which would be added as 0 and 1. No number is below the lowest
    of float32, in which families take the softmax of any type: a row of padding that sees nothing would become NaN.

    Args:
        mask: Boolean, True where visible, or additive.
        dtype: Of the scores.

    Example:
        >>> additive_mask(torch.tensor([True, False]), torch.float16).tolist()
        [0.0, -65504.0]
    """
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask.clamp(min=torch.finfo(torch.float32).min) if mask.dtype == torch.float64 else mask


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, _attention)
    # Without a mask function of its own, the mask would be None and attention silently not causal.
    AttentionMaskInterface.register(_NAME, eager_mask)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Attended:
    # The family's own: it knows of soft caps, sinks and groups. FSDP2 puts a class of its own before the family's.
    homes = (sys.modules.get(parent.__module__) for parent in type(module).__mro__)
    functions: Iterator[Any] = (getattr(home, "eager_attention_forward", None) for home in homes)
    eager = next((function for function in functions if function is not None), None)
    if eager is None:
        raise _ignored(module)
    mask = additive_mask(attention_mask, query.dtype)
    call = AttentionCall(module, value, mask, options.get("dropout") or 0.0)
    compute: Callable[[], Attended] = partial(eager, module, query, key, value, mask, **options)
    for around in _AROUND.get(id(module), ()):
        compute = partial(around, call, compute)
    return compute()


def _configurations(model: nn.Module) -> list[Any]:
    found = (getattr(part, "config", None) for part in model.modules())
    return list({id(config): config for config in found if hasattr(config, "_attn_implementation_internal")}.values())


def _ignored(module: nn.Module) -> AttentionKernelError:
    return AttentionKernelError(f"{model_class(module)} ignores set_attn_implementation")
