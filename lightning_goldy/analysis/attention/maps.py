"""Attention patterns of a few prompts, and their singular values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.attention.patterns import show_patterns, to_device_of
from lightning_goldy.analysis.attention.rows import Tokens
from lightning_goldy.analysis.result import AnalysisResult
from lightning_goldy.core.architecture import describe_architecture
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import Replicas

NameTokens = Callable[[Sequence[int]], Sequence[str]]


@dataclass(frozen=True)
class AttentionMaps(AnalysisResult):
    """Attention patterns of every head of some layers on one batch.

    Args:
        layers: Indices of the layers.
        patterns: Softmax weights of each layer, shape ``[B, H, T, T]``, rows are queries; at least float32, on the CPU.
        valid: True where a token is no padding, shape ``[B, T]``.
        tokens: What each token is called, for each sample, padding included.
    """

    layers: tuple[int, ...]
    patterns: tuple[Tensor, ...]
    valid: Tensor
    tokens: tuple[tuple[str, ...], ...]

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """All (layer, head) pairs, in order of depth."""
        pairs = zip(self.layers, self.patterns, strict=True)
        return tuple((layer, head) for layer, pattern in pairs for head in range(pattern.shape[1]))

    def pattern(self, layer: int, head: int, *, sample: int = 0) -> Tensor:
        """What one head attends to, without padding.

        Args:
            layer: One of ``layers``.
            head: From 0.
            sample: Row of the batch.

        Returns:
            Shape ``[n, n]`` with n the sample's tokens; rows are queries and sum to 1.

        Raises:
            IndexError: There is no such layer, head or sample.
        """
        if layer not in self.layers:
            raise IndexError(f"layer {layer} was not recorded; those recorded: {list(self.layers)}")
        found = self.patterns[self.layers.index(layer)]
        for what, value, count in (("head", head, found.shape[1]), ("sample", sample, len(found))):
            if not 0 <= value < count:
                raise IndexError(f"{what} {value}: there are {count}, from 0 to {count - 1}")
        kept = self.valid[sample]
        return found[sample, head][kept][:, kept]

    def token_names(self, sample: int = 0) -> tuple[str, ...]:
        """Names of a sample's tokens without padding, in the order of :meth:`pattern`'s rows."""
        kept = self.valid[sample].tolist()
        return tuple(name for name, keep in zip(self.tokens[sample], kept, strict=True) if keep)

    def singular_values(self, top: int = 4, *, sample: int = 0) -> Tensor:
        """Largest singular values of each head's pattern on one sample, padding left out.

        A head that looks at the same place from everywhere has one large value (of the order of the root of the number
        of tokens); one that shifts, as a previous-token head, has many values of 1.

        Args:
            top: How many values.
            sample: Row of the batch.

        Returns:
            Shape ``[layers, heads, top]``, descending, float64; NaN beyond a layer's heads or the number of tokens.

        Raises:
            ValueError: ``top`` is below 1.
        """
        if top < 1:
            raise ValueError(f"top must be at least 1; got {top}")
        most = max(pattern.shape[1] for pattern in self.patterns)
        values = torch.full((len(self.layers), most, top), math.nan, dtype=torch.float64)
        kept = self.valid[sample]
        for index, pattern in enumerate(self.patterns):
            found = torch.linalg.svdvals(pattern[sample][:, kept][:, :, kept].double())[:, :top]  # [H, min(n, top)]
            values[index, : found.shape[0], : found.shape[1]] = found
        return values


def attention_maps(
    model: nn.Module,
    batch: Any,
    objective: Objective | None = None,
    *,
    layers: Sequence[int] | None = None,
    name_tokens: NameTokens | None = None,
) -> AttentionMaps:
    """Records what every head attends to, under any attention kernel.

    The patterns are the family's own eager softmax weights, in evaluation mode. All of them are kept: this is for a few
    short prompts, :func:`~lightning_goldy.analysis.attention_statistics` for everything else. The model comes
    back as it was; under FSDP2 every rank must call.

    Args:
        model: A transformers model or anything that contains one.
        batch: A dict with ``input_ids`` of shape ``[B, T]`` and optionally ``attention_mask``.
        objective: How the model is called; by default with everything of the batch but its labels.
        layers: Only these blocks; all by default.
        name_tokens: Turns a list of token ids into as many labels, such as a tokenizer's ``convert_ids_to_tokens``; by
            default the ids themselves are shown.

    Returns:
        The patterns, on the CPU.

    Raises:
        UnsupportedArchitectureError: The family's patterns cannot be read; it is named.
        ValueError: The batch is of another kind, a layer does not exist, or a pattern is not finite.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> maps = attention_maps(GPT2LMHeadModel(config), {"input_ids": torch.tensor([[1, 2, 3]])})
        >>> maps.pattern(1, 0)[0].tolist(), maps.token_names()
        ([1.0, 0.0, 0.0], ('1', '2', '3'))
    """
    with preserved(model), Replicas.of(model).together("attention_maps"):
        architecture = describe_architecture(model)
        known = [block.index for block in architecture.blocks]
        chosen = known if layers is None else sorted(set(layers))
        for layer in chosen:
            if layer not in known:
                raise ValueError(f"layers: there is no layer {layer}; the model has {len(known)}, from 0")
        tokens = Tokens.of(batch)
        names = _names(tokens, name_tokens)
        found: dict[int, Tensor] = {}

        def keep(layer: int, weights: Tensor, mask: Tensor | None) -> None:
            found[layer] = weights.to(torch.promote_types(weights.dtype, torch.float32)).cpu()

        show_patterns(model, architecture, to_device_of(model, batch), objective, keep, layers=chosen)
    for layer, pattern in found.items():
        if not bool(torch.isfinite(pattern).all()):
            raise ValueError(f"the attention of layer {layer} is not finite")
    return AttentionMaps(tuple(chosen), tuple(found[layer] for layer in chosen), tokens.valid.cpu(), names)


def _names(tokens: Tokens, name_tokens: NameTokens | None) -> tuple[tuple[str, ...], ...]:
    named = []
    for row in tokens.ids.tolist():
        names = tuple(map(str, row if name_tokens is None else name_tokens(row)))
        if len(names) != len(row):
            raise ValueError(f"name_tokens gave {len(names)} names for {len(row)} tokens")
        named.append(names)
    return tuple(named)
