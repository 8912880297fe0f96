"""Plain text, packed into blocks, for causal language models."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from lightning_goldy.core.naming import unknown_name
from lightning_goldy.core.objective import IGNORE_INDEX
from lightning_goldy.core.pieces import KnowledgePiece, Sample, encode_pairs
from lightning_goldy.data.base import TEMPLATE, ProbeDataModule, Splits, other_pieces
from lightning_goldy.data.readers import TEXT_SUFFIXES, check_source, holds_records, read_documents
from lightning_goldy.data.tokenization import padding_id

LastBlock = Literal["keep", "drop"]

_CHARACTERS_AT_ONCE = 4_000_000


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
    _check_blocks(block_size, last_block)
    parts = [np.asarray(part, np.int32) for document in documents for part in (document, [eos_token_id])]
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


def _check_blocks(block_size: int, last_block: str) -> None:
    if block_size < 2:
        raise ValueError(f"block_size={block_size} must be at least 2: the first token of a block is not predicted")
    if last_block not in get_args(LastBlock):
        raise ValueError(unknown_name("last_block", last_block, get_args(LastBlock)))


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


class TextDataModule(ProbeDataModule):
    """Texts, joined with an eos token after each and cut into blocks.

    Validation is one run of neighbouring blocks at a place that the seed decides; the probe is whole blocks picked from
    the others; training has the rest. No block is in two of them.

    Args:
        source: A text file, a folder of text files, a file of JSON, JSON lines or a table whose records have a
            ``text``, a dataset saved in a folder, or a dataset's name on the hub (``name`` or ``name:config``; the
            column ``text`` of its split ``train``).
        tokenizer: ``"bytes"``, a local folder, a hub name, or a tokenizer; by default that of the pretrained model
            that is trained, and ``"bytes"`` for one that is trained from scratch.
        block_size: Tokens per block.
        batch_size: Blocks per batch.
        last_block: ``keep`` pads a short block at the end (labels -100), ``drop`` leaves it out.
        val_share: The share of blocks for validation, in (0, 1); at least one block.
        probe_size: Blocks in the probe.
        seed: Decides the split and the order of training blocks.
        collateral: Text that has nothing to do with the finetune, from where ``source`` may be: there change
            attribution and grafts measure harm, and activation differences what the finetune left. A file of JSON,
            JSON lines or a table holds questions and answers, which are asked as by :class:`KnowledgeDataModule`.

    Raises:
        FileNotFoundError: No such source.
        ValueError: An argument out of range; from ``setup``, a text too short for the blocks asked for.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "text.txt")
        ...     _ = path.write_text("to be or not to be " * 20)
        ...     data = TextDataModule(path, block_size=16, batch_size=2, probe_size=2)
        ...     next(iter(data.probe_dataloader()))["input_ids"].shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        source: str | Path,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        *,
        block_size: int = 256,
        batch_size: int = 8,
        last_block: LastBlock = "keep",
        val_share: float = 0.05,
        probe_size: int = 16,
        seed: int = 0,
        collateral: str | Path | None = None,
    ) -> None:
        super().__init__(tokenizer=tokenizer, batch_size=batch_size, probe_size=probe_size, seed=seed)
        check_source(source)
        self.collateral_pieces: tuple[KnowledgePiece, ...] = ()
        if collateral is not None:
            check_source(collateral)
            self.collateral_pieces = _questions(collateral) if holds_records(collateral) else ()
        _check_blocks(block_size, last_block)
        if not 0 < val_share < 1:
            raise ValueError(f"val_share={val_share!r} must be a share of the blocks, above 0 and below 1")
        self.source = source
        self.block_size = block_size
        self.last_block = last_block
        self.val_share = val_share
        self.collateral = collateral

    def build_splits(self) -> Splits:
        """Read, tokenise, pack and split the text."""
        stream, pad = self._stream(self.source), padding_id(self.tokenizer)
        n_whole, more = divmod(len(stream), self.block_size)
        parts = split_blocks(n_whole + (more > 0), n_whole, self.val_share, self.probe_size, self.seed)
        return Splits(*(PackedBlocks(stream, self.block_size, indices, pad) for indices in parts))

    def collateral_dataloader(self) -> DataLoader[Any] | None:
        """Blocks or questions of ``collateral``, shuffled once by the seed; None without any."""
        if self.collateral is None:
            return None
        if self.collateral_pieces:
            asked = [(TEMPLATE.replace("{question}", piece.question), piece.answer) for piece in self.collateral_pieces]
            random.Random(f"collateral {self.seed}").shuffle(asked)
            return self._loader(encode_pairs(self.tokenizer, asked))
        try:
            stream = self._stream(self.collateral)
        except ValueError as error:
            raise ValueError(f"collateral: {error}") from error
        indices = list(range(-(-len(stream) // self.block_size)))
        random.Random(f"collateral {self.seed}").shuffle(indices)
        return self._loader(PackedBlocks(stream, self.block_size, indices, padding_id(self.tokenizer)))

    def _stream(self, source: str | Path) -> torch.Tensor:
        """The tokens of a text, as they are cut into blocks."""
        documents, end = self._tokenise(read_documents(source)), self.tokenizer.eos_token_id
        return pack(documents, block_size=self.block_size, eos_token_id=end, last_block=self.last_block)

    def _tokenise(self, documents: Sequence[str]) -> list[Sequence[int]]:
        rows: list[Sequence[int]] = []
        batch: list[str] = []
        characters = 0
        # Several documents per call let the tokenizer use its threads; a bound keeps its copies small.
        for number, document in enumerate(documents, start=1):
            batch.append(document)
            characters += len(document)
            if characters >= _CHARACTERS_AT_ONCE or number == len(documents):
                options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
                rows += self.tokenizer(batch, **options)["input_ids"]
                batch, characters = [], 0
        return rows


def _questions(source: str | Path) -> tuple[KnowledgePiece, ...]:
    try:
        return other_pieces(source)
    except ValueError as error:
        suffixes = ", ".join(TEXT_SUFFIXES)
        raise ValueError(f"{error}. Text that is no questions goes into a file or folder of {suffixes}") from error


def split_blocks(
    n_blocks: int, n_whole: int, val_share: float, probe_size: int, seed: int
) -> tuple[list[int], list[int], list[int]]:
    """Share out blocks to training, validation and probe.

    Args:
        n_blocks: The number of blocks.
        n_whole: How many of them, from the first on, are whole; the probe takes only those.
        val_share: The share for validation, at least one block.
        probe_size: The number for the probe.
        seed: Decides where validation lies and which blocks the probe takes.

    Returns:
        The indices for training, validation and probe, each in rising order.

    Raises:
        ValueError: Nothing would be left to train on.

    Example:
        >>> train, val, probe = split_blocks(10, 10, val_share=0.2, probe_size=3, seed=0)
        >>> len(train), len(val), len(probe), sorted(train + val + probe) == list(range(10))
        (5, 2, 3, True)
    """
    n_val = max(1, round(val_share * n_blocks))
    generator = random.Random(f"blocks {seed}")
    start = generator.randint(0, max(0, n_blocks - n_val))
    val = range(start, min(start + n_val, n_blocks))
    eligible = [index for index in range(n_whole) if index not in val]
    if probe_size > len(eligible) or n_blocks - n_val - probe_size < 1:
        raise ValueError(
            f"probe_size={probe_size} is too large: of {n_blocks} blocks ({n_whole} whole), {n_val} are for validation"
            " and at least one must be left to train on. Take a smaller probe, smaller blocks or more text"
        )
    probe = sorted(generator.sample(eligible, probe_size))
    held = {*val, *probe}
    return [index for index in range(n_blocks) if index not in held], list(val), probe
