"""A model with the attention patterns of its base."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_goldy.analysis.attention.rows import additive_mask
from lightning_goldy.analysis.linearized.base_relative import Intervention
from lightning_goldy.core.architecture import UnsupportedArchitectureError, describe_architecture
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.naming import model_class
from lightning_goldy.core.vector import ParameterVector

_NAME = "goldy_frozen"
# By identity of the attention module; modules cannot be told apart otherwise inside an attention function.
_FROZEN: dict[int, FrozenAttention] = {}


class FrozenAttention(Intervention):
    r"""A model whose heads look where those of its base look, at the same batch.

    .. math:: \mathrm{head}_h(x) = A_h(x; \theta_0) \, V_h(x; \theta)

    Patterns A are what the base computes with its own activations throughout; values, output projections, MLPs and all
    else are the model's present ones. Use it as a context manager, inside which the model itself computes so, or call
    it: it is a module with the model's parameters, which trains without the gradient through the patterns (queries and
    keys get none). With DistributedDataParallel those are unused parameters.

    The patterns come from a pass of the base in evaluation mode without gradients, at every call. Attention is computed
    by the family's eager arithmetic, so that with base and present equal the model with eager attention is reproduced
    bit for bit; a model with another kernel (sdpa) to that kernel's rounding. In training, patterns are dropped as the
    model drops them, but no other dropout reaches them.

    Args:
        model: A transformers model, or anything that contains one, that takes its attention function from
            ``AttentionInterface``.
        base: theta_0.

    Raises:
        UnsupportedArchitectureError: The family ignores ``AttentionInterface``, or its heads are not patterns times
            values.
        SpaceError: The base is of another model.
        ValueError: The model is sharded; at a call, past keys and values or gradient checkpointing.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> model.set_attn_implementation("eager")
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> with torch.no_grad(), FrozenAttention(model, ParameterVector.of(model)):
        ...     frozen = model(input_ids=ids).logits
        >>> torch.equal(frozen, model(input_ids=ids).logits)
        True
    """

    def __init__(self, model: nn.Module, base: BaseParameters | ParameterVector) -> None:
        super().__init__(model, base)
        # The modules and not their identities, so that a deep copy freezes its own. In a tuple: they are the model's.
        self._parts = tuple(
            (part, block.attention_name)
            for block in describe_architecture(model).blocks
            for part in block.attention.modules()
        )
        self._blocks: dict[int, str] = {}
        self._patterns: dict[int, Tensor] = {}
        self._checked: set[int] = set()
        with eager_attention(model):  # refuses a family that ignores it
            pass

    @contextmanager
    def _changed(self) -> Iterator[None]:
        self._blocks = {id(part): name for part, name in self._parts}
        for key, name in self._blocks.items():
            if key in _FROZEN:
                raise RuntimeError(f"the attention of {name!r} is frozen already; one FrozenAttention at a time")
        with eager_attention(self.model):
            _FROZEN.update(dict.fromkeys(self._blocks, self))
            try:
                yield
            finally:
                for key in self._blocks:
                    del _FROZEN[key]
                self._patterns.clear()

    def heads(
        self, module: nn.Module, value: Tensor, computed: tuple[Tensor, Tensor | None] | None, dropout: float
    ) -> tuple[Tensor, Tensor | None]:
        """The heads of one attention module, shape ``[B, T, H, D]``, and the pattern that they have.

        Args:
            module: Which one.
            value: Shape ``[B, G, T, D]``, G groups.
            computed: What its own attention gives, where the base runs; None elsewhere.
            dropout: Share of the pattern that is dropped in training.
        """
        if computed is not None:
            self._record(module, value, computed)
            return computed
        pattern = self._patterns.get(id(module))
        if pattern is None:
            raise UnsupportedArchitectureError(
                f"{self._blocks[id(module)]!r} did not run in the base's pass, so it has no pattern to keep"
            )
        dropped = F.dropout(pattern, p=dropout, training=module.training)
        return _weighted(dropped, value), dropped

    def _record(self, module: nn.Module, value: Tensor, computed: tuple[Tensor, Tensor | None]) -> None:
        output, pattern = computed
        if id(module) not in self._checked:
            if pattern is None or not _alike(output, _weighted(pattern, value)):
                raise UnsupportedArchitectureError(
                    f"the heads of {self._blocks[id(module)]!r} ({model_class(module)}) are not patterns times values, "
                    "so patterns cannot be kept"
                )
            self._checked.add(id(module))
        if pattern is not None:
            self._patterns[id(module)] = pattern


@contextmanager
def eager_attention(model: nn.Module) -> Iterator[None]:
    """Has a model compute attention by its family's eager arithmetic, whatever implementation it is set to.

    Args:
        model: A transformers model or anything that contains one; its implementation is restored after.

    Raises:
        UnsupportedArchitectureError: The model does not take its attention function from ``AttentionInterface``.
    """
    _register()
    owner: Any = next((part for part in model.modules() if hasattr(part, "set_attn_implementation")), None)
    if owner is None:
        raise UnsupportedArchitectureError(
            f"{model_class(model)} is no transformers model, so its attention cannot be replaced"
        )
    found = (getattr(part, "config", None) for part in model.modules())
    configs: Any = {id(each): each for each in found if hasattr(each, "_attn_implementation_internal")}.values()
    before = [config._attn_implementation_internal for config in configs]
    try:
        if any(name != _NAME for name in before):
            owner.set_attn_implementation(_NAME)
        if any(config._attn_implementation_internal != _NAME for config in configs):
            _refuse(owner)
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(_NAME, _attention)
    # Without a mask function of its own, the mask would be None and attention silently not causal.
    AttentionMaskInterface.register(_NAME, eager_mask)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor | None]:
    frozen = _FROZEN.get(id(module))
    if frozen is not None and not frozen.base_runs and not frozen.stands_aside:
        return frozen.heads(module, value, None, options.get("dropout") or 0.0)
    attention_mask = additive_mask(attention_mask, query.dtype)
    if attention_mask is not None and attention_mask.dtype == torch.float64:
        # Where a family takes the softmax in float32, padding that sees nothing would otherwise become NaN.
        attention_mask = attention_mask.clamp(min=torch.finfo(torch.float32).min)
    computed = _eager(module)(module, query, key, value, attention_mask, **options)
    return computed if frozen is None or frozen.stands_aside else frozen.heads(module, value, computed, 0.0)


def _eager(module: nn.Module) -> Any:
    # The family's own knows of soft caps and groups.
    homes = (sys.modules.get(parent.__module__) for parent in type(module).__mro__)
    found: Iterator[Any] = (getattr(home, "eager_attention_forward", None) for home in homes)
    return next((function for function in found if function is not None), None) or _refuse(module)


def _weighted(pattern: Tensor, value: Tensor) -> Tensor:
    groups = pattern.shape[1] // value.shape[1]
    shared = value if groups == 1 else value.repeat_interleave(groups, dim=1)  # [B, G, T, D] -> [B, H, T, D]
    return torch.matmul(pattern, shared).transpose(1, 2).contiguous()  # [B, H, T, D] -> [B, T, H, D]


def _alike(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape:
        return False
    # As far apart as two kernels may be in the lowest precision, not as two formulas are.
    apart = (first - second).abs().nan_to_num(0.0)
    return bool(apart.max() <= 1e-2 * first.abs().nan_to_num(0.0).max())


def _refuse(module: nn.Module) -> Any:
    raise UnsupportedArchitectureError(
        f"{model_class(module)} ignores set_attn_implementation, so its attention patterns cannot be kept"
    )
