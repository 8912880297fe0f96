"""The passes over the pieces, which fill blocks with what gradients are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lightning_goldy.analysis.coupling.blocks import Block, BlockStore
from lightning_goldy.analysis.coupling.capture import Capture, CouplingError, Footprint
from lightning_goldy.analysis.coupling.gram import Projection, RowBuffer, Rows, squared_norms
from lightning_goldy.analysis.coupling.pieces import PieceSamples, joined_batch, sample_length, signature
from lightning_goldy.core.sharding import Replicas

OnError = Literal["raise", "nan"]
Progress = Callable[[int, int], None]
RECOVERABLE = (ValueError, IndexError, RuntimeError)
"""What one piece may raise where others go well."""

PROJECTED = "projected gradient"


@dataclass(frozen=True)
class RunOptions:
    """How a coupling is computed; see ``knowledge_coupling``."""

    chunk_size: int | Literal["auto"] = "auto"
    projection: int | None = None
    seed: int = 0
    workspace: str | Path | None = None
    memory_limit: int | None = None
    on_error: OnError = "raise"


class Passes:
    """Forward and backward passes over pieces.

    Args:
        capture: Gives gradients of pieces.
        pieces: The samples.
        options: How to go about it.
        replicas: Share the blocks.
        progress: Called with (pieces done, pieces in all) on this rank.
    """

    def __init__(
        self, capture: Capture, pieces: PieceSamples, options: RunOptions, replicas: Replicas, progress: Progress | None
    ) -> None:
        self.capture, self.pieces, self.options = capture, pieces, options
        self.replicas, self.progress = replicas, progress
        self.samples = {index: sample for index, sample in enumerate(pieces.samples) if sample is not None}
        self.lengths = {index: sample_length(sample) for index, sample in self.samples.items()}
        # The longest first, so that memory that does not suffice is found out at once.
        order = [(-self.lengths[index], signature(sample), index) for index, sample in self.samples.items()]
        self.order = [index for *_, index in sorted(order)]
        self.projection = None if options.projection is None else Projection(options.projection, seed=options.seed)
        self.names = list(capture.parameters) if self.projection is None else [PROJECTED]
        self.tokens = 1
        """Tokens in one pass, unless the number of pieces is given."""

    def probe(self) -> Footprint:
        """Tries pieces until one runs; says what the others will need.

        Raises:
            CouplingError: A piece failed and that is an error, or all did.
        """
        reasons = dict(self.pieces.failures)
        for index, reason in reasons.items():
            self.failed(index, reason)
        for index in self.order:
            batch = joined_batch([self.samples[index]], self.capture.device)
            try:
                return self.capture.probe(batch, self.lengths[index])
            except (CouplingError, torch.OutOfMemoryError):
                raise
            except RECOVERABLE as error:
                reasons[index] = self.failed(index, str(error), error)
        index, reason = next(iter(reasons.items()))
        raise CouplingError(f"every piece failed, the first so: {self.pieces.name(index)}: {reason}")

    def fill(self, store: BlockStore, blocks: Sequence[list[int]]) -> None:
        """Captures this replica's share of the blocks, unless they are there."""
        numbers = self.replicas.share(range(len(blocks)))
        total, done = sum(len(blocks[number]) for number in numbers), 0
        # Of a folder where some products are there, only the rows that others need.
        missing = [number for number in range(len(blocks)) if not store.has_products(number)]
        for number in numbers:
            needed = any(number <= other for other in missing)
            if needed and not store.has_block(number):
                store.put_block(number, self._captured(blocks[number], store.kept, done, total))
            done += len(blocks[number])
            if self.progress is not None:
                self.progress(done, total)

    def _captured(self, indices: list[int], kept: torch.device, done: int, total: int) -> Block:
        block = Block()
        buffers = {name: RowBuffer(len(indices), kept) for name in self.names}
        pending = self._chunks(indices)[::-1]
        while pending:
            chunk = pending.pop()
            try:
                batch = joined_batch([self.samples[index] for index in chunk], self.capture.device)
                log_probs, rows = self.capture.run(batch, len(chunk))
            except torch.OutOfMemoryError:
                if len(chunk) == 1 or self.options.chunk_size != "auto":
                    raise
                torch.cuda.empty_cache()
                self.tokens = max(1, self.tokens // 2)
                pending += [chunk[len(chunk) // 2 :], chunk[: len(chunk) // 2]]
            except CouplingError:
                raise
            except RECOVERABLE as error:
                if len(chunk) > 1:
                    pending += [[index] for index in chunk[::-1]]
                    continue
                block.failures[chunk[0]] = self.failed(chunk[0], str(error), error)
            else:
                self._add(block, buffers, chunk, log_probs, rows)
            if self.progress is not None:
                self.progress(done + len(block.indices) + len(block.failures), total)
        if block.indices:
            block.parts = {name: buffer.rows() for name, buffer in buffers.items()}
        return block

    def _add(
        self,
        block: Block,
        buffers: dict[str, RowBuffer],
        chunk: list[int],
        log_probs: Tensor,
        rows: dict[str, Rows],
    ) -> None:
        squares = torch.stack(
            [squared_norms(each).to(log_probs.device) for each in rows.values()]
        ).cpu()  # [tensors, M]
        known = log_probs.double().tolist()
        good = []
        for at, index in enumerate(chunk):
            reason = _reason(known[at], squares[:, at], list(rows))
            if reason:
                block.failures[index] = self.failed(index, reason)
            else:
                good.append(at)
        if not good:
            return
        if len(good) < len(chunk):
            rows = {name: _taken(each, good) for name, each in rows.items()}
        block.indices += [chunk[at] for at in good]
        block.squares += squares.sum(dim=0)[good].tolist()
        block.log_probs += [known[at] for at in good]
        if self.projection is not None:
            rows = {PROJECTED: Rows(self.projection(rows))}
        for name, each in rows.items():
            buffers[name].add(each)

    def _chunks(self, indices: Sequence[int]) -> list[list[int]]:
        """Neighbours in length that can share a pass."""
        chunks: list[list[int]] = []
        for index in indices:
            if chunks and self._fits(chunks[-1], index):
                chunks[-1].append(index)
            else:
                chunks.append([index])
        return chunks

    def _fits(self, chunk: list[int], index: int) -> bool:
        if not self.capture.batched or signature(self.samples[chunk[0]]) != signature(self.samples[index]):
            return False
        if self.options.chunk_size != "auto":
            return len(chunk) < self.options.chunk_size
        return (len(chunk) + 1) * self.lengths[chunk[0]] <= self.tokens

    def failed(self, index: int, reason: str, error: Exception | None = None) -> str:
        """The reason, where a failed piece is no error."""
        if self.options.on_error == "raise":
            raise CouplingError(f"{self.pieces.name(index)}: {reason}") from error
        return reason


def _reason(log_prob: float, squares: Tensor, names: Sequence[str]) -> str:
    """Why a piece has no direction to compare; empty when it has one."""
    if not math.isfinite(log_prob):
        return f"the mean log-probability of its answer is {log_prob}"
    for name, square in zip(names, squares.tolist(), strict=True):
        if not math.isfinite(square):
            return f"its gradient with respect to {name} is not finite"
    if not float(squares.sum()) > 0:
        return "its gradient with respect to the selected parameters is zero, so it has no direction"
    return ""


def _taken(rows: Rows, places: list[int]) -> Rows:
    return Rows(rows.gradients[places], None if rows.inputs is None else rows.inputs[places])
