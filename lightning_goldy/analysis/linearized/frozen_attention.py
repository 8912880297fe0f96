"""A model with the attention patterns of its base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_goldy.analysis.linearized.base_relative import Intervention
from lightning_goldy.core.architecture import UnsupportedArchitectureError, describe_architecture
from lightning_goldy.core.architecture.kernels import Attended, AttentionCall, AttentionKernelError, eager_attention
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.naming import model_class
from lightning_goldy.core.vector import ParameterVector


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
        with self._eager():  # refuses a family that ignores it
            pass

    @contextmanager
    def _changed(self) -> Iterator[None]:
        self._blocks = {id(part): name for part, name in self._parts}
        with self._alone(self._blocks, "the attention of {!r} is frozen already"), self._eager():
            try:
                yield
            finally:
                self._patterns.clear()

    @contextmanager
    def _eager(self) -> Iterator[None]:
        try:
            with eager_attention(self.model, self._attend):
                yield
        except AttentionKernelError as error:
            raise UnsupportedArchitectureError(f"{error}, so its attention patterns cannot be kept") from error

    def _attend(self, call: AttentionCall, compute: Callable[[], Attended]) -> Attended:
        name = self._blocks.get(id(call.module))
        if name is None or self.stands_aside:
            return compute()
        if self.base_runs:
            return self._recorded(call, name, compute())
        pattern = self._patterns.get(id(call.module))
        if pattern is None:
            raise UnsupportedArchitectureError(f"{name!r} did not run in the base's pass, so it has no pattern to keep")
        dropped = F.dropout(pattern, p=call.dropout, training=call.module.training)
        return _weighted(dropped, call.value), dropped

    def _recorded(self, call: AttentionCall, name: str, computed: Attended) -> Attended:
        heads, pattern = computed
        if id(call.module) not in self._checked:
            if pattern is None or not _alike(heads, _weighted(pattern, call.value)):
                raise UnsupportedArchitectureError(
                    f"the heads of {name!r} ({model_class(call.module)}) are not patterns times values, so patterns "
                    "cannot be kept"
                )
            self._checked.add(id(call.module))
        if pattern is not None:
            self._patterns[id(call.module)] = pattern
        return computed


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
