"""Blocks of pieces, and the inner products between them, kept in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_goldy.analysis.coupling_gram import Rows
from lightning_goldy.core.sharding import Replicas


@dataclass
class Block:
    """What is kept of the gradients of several pieces.

    Args:
        indices: The numbers of the pieces among all, without those that failed.
        squares: Squared norm of each one's gradient.
        log_probs: Mean log-probability of each one's answer, nats.
        failures: Why pieces failed, by number.
        parts: Rows by the name of their tensor.
    """

    indices: list[int] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    parts: dict[str, Rows] = field(default_factory=dict)


class BlockStore(Protocol):
    """Where blocks are kept, and the inner products of each block with all before it and itself."""

    kept: torch.device
    """Where the rows of a block are gathered."""
    shared: bool
    """Whether every replica finds the products of all."""
    block_size: int
    """Pieces in a block; 0 where that is free."""

    def has_block(self, number: int) -> bool:
        """Whether a block is there."""
        ...

    def put_block(self, number: int, block: Block) -> None:
        """Keeps a block."""
        ...

    def exchange(self, n_blocks: int, replicas: Replicas) -> None:
        """Makes the blocks of every replica known to all; every replica must call, when all have put theirs."""
        ...

    def summary(self, number: int) -> Block:
        """A block without its rows."""
        ...

    def part(self, number: int, name: str) -> Rows:
        """The rows of one tensor, where products are made."""
        ...

    def has_products(self, number: int) -> bool:
        """Whether the inner products of a block are there."""
        ...

    def put_products(self, number: int, products: Tensor) -> None:
        """Keeps the inner products of a block, shape ``[M, pieces up to its last]``."""
        ...

    def products(self, number: int) -> Tensor | None:
        """The inner products of a block; None where another replica has them."""
        ...

    def finish(self, n_blocks: int) -> None:
        """Frees what only an unfinished run needs."""
        ...


class MemoryBlocks:
    """Blocks in memory.

    Args:
        kept: Where rows are kept.
        compute: Where products are made and collectives take place.
    """

    shared = False
    block_size = 0

    def __init__(self, kept: torch.device, compute: torch.device) -> None:
        self.kept, self.compute = kept, compute
        self._blocks: dict[int, Block] = {}
        self._products: dict[int, Tensor] = {}

    def has_block(self, number: int) -> bool:
        """See :class:`BlockStore`."""
        return number in self._blocks

    def put_block(self, number: int, block: Block) -> None:
        """See :class:`BlockStore`."""
        self._blocks[number] = block

    def exchange(self, n_blocks: int, replicas: Replicas) -> None:
        """See :class:`BlockStore`."""
        if replicas.size == 1:
            return
        layouts = {
            number: ({name: _layout(rows) for name, rows in block.parts.items()}, summary_of(block))
            for number, block in self._blocks.items()
        }
        known = {number: each for part in replicas.gather_objects(layouts) for number, each in part.items()}
        for number in range(n_blocks):
            layout, summary = known[number]
            own = self._blocks.get(number)
            parts = {}
            for name, kinds in layout.items():
                rows = (None, None) if own is None else own.parts[name]
                gradients, inputs = (self._shared(*each, replicas) for each in zip(rows, kinds, strict=True))
                assert gradients is not None
                parts[name] = Rows(gradients, inputs)
            self._blocks[number] = Block(**summary, parts=parts)

    def summary(self, number: int) -> Block:
        """See :class:`BlockStore`."""
        return self._blocks[number]

    def part(self, number: int, name: str) -> Rows:
        """See :class:`BlockStore`."""
        return self._blocks[number].parts[name].to(self.compute)

    def has_products(self, number: int) -> bool:
        """See :class:`BlockStore`."""
        return number in self._products

    def put_products(self, number: int, products: Tensor) -> None:
        """See :class:`BlockStore`."""
        self._products[number] = products

    def products(self, number: int) -> Tensor | None:
        """See :class:`BlockStore`."""
        return self._products.pop(number, None)

    def finish(self, n_blocks: int) -> None:
        """See :class:`BlockStore`."""
        self._blocks.clear()

    def _shared(self, tensor: Tensor | None, kind: tuple[Any, ...] | None, replicas: Replicas) -> Tensor | None:
        if kind is None:
            return None
        shape, dtype = kind
        # A sum with zeros changes nothing, and every backend can sum float32.
        sent = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=self.compute)
        if tensor is not None:
            sent.copy_(tensor)
        return (replicas.sum_(sent) if sent.numel() else sent).to(self.kept, dtype)


def _layout(rows: Rows) -> list[tuple[Any, ...] | None]:
    return [None if each is None else (tuple(each.shape), each.dtype) for each in rows]


def summary_of(block: Block) -> dict[str, Any]:
    """All of a block but its rows, by name."""
    return {name: value for name, value in vars(block).items() if name != "parts"}
