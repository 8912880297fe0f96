"""Models that use their weights in ways that break a naive reading of layers, and pieces of several lengths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutput

from tests.references.models import VOCABULARY


def pieces(lengths: list[int], *, side: str = "right", seed: int = 1, width: int | None = None) -> dict[str, Tensor]:
    """Random pieces of given lengths in one batch, the last third of each (at least one token) a target."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    batch = {
        "input_ids": torch.full((len(lengths), width), 3),
        "attention_mask": torch.zeros(len(lengths), width, dtype=torch.int64),
        "labels": torch.full((len(lengths), width), -100),
    }
    for row, length in enumerate(lengths):
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator)
        place = slice(0, length) if side == "right" else slice(width - length, width)
        batch["input_ids"][row, place], batch["attention_mask"][row, place] = ids, 1
        answer = max(1, length // 3)
        batch["labels"][row, place] = torch.where(torch.arange(length) >= length - answer, ids, -100)
    return batch


class TinyLM(nn.Module):
    """A causal model of running means, so that positions bear on later ones, with one odd layer.

    Args:
        odd: ``functional`` uses the weight without calling its layer, ``partly`` calls it too, ``twice`` calls it
            twice, ``flat`` gives it all tokens in one dimension, ``sequence first`` swaps batch and sequence, ``tied``
            shares its weight with another layer, ``idle`` does not use it, ``in place`` writes over its output,
            ``overwritten`` over its input, ``checkpoint`` computes it again in the backward pass, ``plain`` nothing.
    """

    def __init__(self, odd: str = "plain", width: int = 12) -> None:
        super().__init__()
        self.odd = odd
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.first = nn.Linear(width, width)
        self.layer = nn.Linear(width, width)
        self.other = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if odd == "tied":
            self.other.weight = self.layer.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False
    ) -> CausalLMOutput:
        x = self.embedding(input_ids)
        x = x + self._mixed(self.first(x).tanh())
        x = x + self._mixed(self._odd(x).tanh())
        x = x + self.other(x).tanh()
        return CausalLMOutput(logits=self.head(self.norm(x)))

    @staticmethod
    def _mixed(x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        return x.cumsum(dim=1) / counts

    def _odd(self, x: Tensor) -> Tensor:
        if self.odd == "functional":
            return F.linear(x, self.layer.weight, self.layer.bias)
        if self.odd == "partly":
            return self.layer(x) + F.linear(x.flip(-1), self.layer.weight)
        if self.odd == "twice":
            return self.layer(self.layer(x).tanh())
        if self.odd == "flat":
            return self.layer(x.flatten(0, 1)).view_as(x)
        if self.odd == "in place":
            return self.layer(x).mul_(2.0)
        if self.odd == "checkpoint":
            return checkpoint(lambda given: self.layer(given).tanh(), x, use_reentrant=False)
        if self.odd == "overwritten":
            copy = x.clone()
            output = self.layer(copy)
            copy.zero_()
            return output
        if self.odd == "sequence first":
            return self.layer(x.transpose(0, 1)).transpose(0, 1)
        return x if self.odd == "idle" else self.layer(x)
