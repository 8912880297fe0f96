"""Samples of several lengths into one batch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_goldy.core.encoding import Sample
from lightning_goldy.core.objective import IGNORE_INDEX


class PadCollator:
    """Pads on the right to the longest sample of the batch.

    Args:
        pad_token_id: Fills ``input_ids``; ``attention_mask`` is filled with 0 and ``labels`` with -100.

    Example:
        >>> import torch
        >>> def sample(n):
        ...     return dict.fromkeys(("input_ids", "attention_mask", "labels"), torch.ones(n, dtype=torch.int64))
        >>> batch = PadCollator(9)([sample(1), sample(2)])
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
        ([[1, 9], [1, 1]], [[1, 0], [1, 1]], [[1, -100], [1, 1]])
    """

    def __init__(self, pad_token_id: int) -> None:
        self.fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """One batch, each tensor of shape ``[B, T]``."""
        return {
            key: pad_sequence([sample[key] for sample in samples], batch_first=True, padding_value=value)
            for key, value in self.fill.items()
        }
