"""Documents into blocks of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch.utils.data import Dataset

from lightning_goldy.core.encoding import Sample
from lightning_goldy.core.objective import IGNORE_INDEX
from lightning_goldy.data.names import unknown_name

LastBlock = Literal["keep", "drop"]


def pack(
    documents: Sequence[Sequence[int]], *, block_size: int, eos_token_id: int, last_block: LastBlock = "keep"
) -> torch.Tensor:
    """Join documents into the stream of tokens that blocks are cut from.

    Args:
        documents: The tokens of each document; an empty document is an eos token alone.
        block_size: Tokens per block.
        eos_token_id: Follows every document.
        last_block: Whether a short block at the end is kept. A last block of a single token is never kept: there is
            nothing in it to predict.

    Returns:
        The stream, int32 of shape ``[N]``; block ``i`` is ``stream[i * block_size : (i + 1) * block_size]``.

    Raises:
        ValueError: ``block_size`` below 2 or longer than the stream, or an unknown ``last_block``.

    Example:
        >>> pack([[1, 2], [3]], block_size=2, eos_token_id=0).tolist()
        [1, 2, 0, 3]
        >>> pack([[1, 2], [3]], block_size=3, eos_token_id=0, last_block="keep").tolist()
        [1, 2, 0, 3, 0]
    """
    if block_size < 2:
        raise ValueError(f"block_size={block_size} must be at least 2: the first token of a block is not predicted")
    if last_block not in get_args(LastBlock):
        raise ValueError(unknown_name("last_block", last_block, get_args(LastBlock)))
    parts = [
        part
        for document in documents
        for part in (np.asarray(document, np.int32), np.asarray([eos_token_id], np.int32))
    ]
    stream = np.concatenate(parts) if parts else np.empty(0, np.int32)
    if len(stream) < block_size:
        raise ValueError(
            f"block_size={block_size} is longer than the text, which has {len(stream)} tokens in {len(documents)}"
            " documents (with an eos token after each)"
        )
    short = len(stream) % block_size
    if last_block == "drop" or short == 1:
        stream = stream[: len(stream) - short]
    return torch.from_numpy(stream)


class PackedBlocks(Dataset[Sample]):
    """Some of the blocks of a stream, as samples in which every token is a target.

    Args:
        stream: Tokens, shape ``[N]``.
        block_size: Tokens per block.
        indices: Which blocks, in which order.
        pad_token_id: Fills a short last block up to ``block_size`` (masked, labels -100).

    Example:
        >>> blocks = PackedBlocks(torch.tensor([5, 6, 7]), 2, [1], pad_token_id=0)
        >>> {key: value.tolist() for key, value in blocks[0].items()}
        {'input_ids': [7, 0], 'attention_mask': [1, 0], 'labels': [7, -100]}
    """

    def __init__(self, stream: torch.Tensor, block_size: int, indices: Sequence[int], pad_token_id: int) -> None:
        self.stream = stream
        self.block_size = block_size
        self.indices = list(indices)
        self.pad_token_id = pad_token_id

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Sample:
        start = self.indices[index] * self.block_size
        tokens = self.stream[start : start + self.block_size].long()
        missing = self.block_size - len(tokens)
        return {
            "input_ids": torch.cat([tokens, tokens.new_full((missing,), self.pad_token_id)]),
            "attention_mask": torch.cat([torch.ones_like(tokens), tokens.new_zeros(missing)]),
            "labels": torch.cat([tokens, tokens.new_full((missing,), IGNORE_INDEX)]),
        }
