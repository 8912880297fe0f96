"""Where what gradients are made of is kept, and the products of all blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_goldy.analysis.coupling_blocks import Block, BlockStore, MemoryBlocks
from lightning_goldy.analysis.coupling_capture import CouplingError, Footprint
from lightning_goldy.analysis.coupling_gram import inner_products
from lightning_goldy.analysis.coupling_hashes import run_settings
from lightning_goldy.analysis.coupling_passes import Passes
from lightning_goldy.analysis.coupling_workspace import FolderBlocks
from lightning_goldy.core.sharding import Replicas

# Activations that a pass may keep on a CPU, bytes: passes of more rows are hardly faster there.
_CPU_ACTIVATIONS = 128 << 20
# Pieces in a block: so many that building gradients costs little beside multiplying them.
_BLOCK_SIZE, _FOLDER_BLOCK_SIZE = 256, 1024
_UNKNOWN_MEMORY = 8 << 30


class Gram(NamedTuple):
    """Inner products of the gradients of all pieces.

    Args:
        matrix: Shape ``[N, N]``, float64; zero where a piece failed.
        squares: Squared norms, exact also after a projection; NaN where a piece failed.
        log_probs: Mean log-probability of each answer, nats; NaN where a piece failed.
        failures: Why pieces failed, by number.
        error: Bound on the root mean square error of a cosine; None without a projection.
        precision: What the rows were multiplied in.
    """

    matrix: Tensor
    squares: Tensor
    log_probs: Tensor
    failures: dict[int, str]
    error: float | None
    precision: torch.dtype


class CouplingRun:
    """One computation of all inner products.

    Args:
        passes: Over the pieces.
    """

    def __init__(self, passes: Passes) -> None:
        self.passes, self.capture = passes, passes.capture
        self.options, self.replicas = passes.options, passes.replicas

    def gram(self) -> Gram:
        """Runs everything; every rank must call.

        Raises:
            CouplingError: A piece failed and that is an error, or the memory does not suffice.
            StoreError: The workspace is of another run.
        """
        replicas = self.replicas
        with self.capture.attached():
            with replicas.together("a first piece"):
                footprint = self.passes.probe()
            store, blocks = self._planned(footprint)
            with replicas.together("the passes over the pieces"):
                self.passes.fill(store, blocks)
        store.exchange(len(blocks), replicas)
        summaries = [store.summary(number) for number in range(len(blocks))]
        with replicas.together("the products of gradients"):
            for number in replicas.share(range(len(blocks) - 1, -1, -1)):
                if not store.has_products(number):
                    store.put_products(number, self._products(store, summaries, number))
        with replicas.together("the products of gradients"):
            result = self._assembled(store, summaries, vectors_only=not footprint.rows)
        store.finish(len(blocks))
        if not store.shared and replicas.size > 1:
            matrix = replicas.sum_(result.matrix.to(self.capture.device))
            result = result._replace(matrix=matrix.cpu())
        return result

    # Storage

    def _planned(self, footprint: Footprint) -> tuple[BlockStore, list[list[int]]]:
        """Where rows go, and which pieces make a block; the same on every rank."""
        # Sharded processes must make the same passes, so that they too must agree.
        ranks, device = Replicas.world() if self.capture.sharded else self.replicas, self.capture.device
        limit = self.options.memory_limit or _available_memory() // (2 * ranks.size)
        budget = _CPU_ACTIVATIONS if device.type != "cuda" else torch.cuda.mem_get_info(device)[0] // 3
        tokens = int(budget / max(1.0, footprint.activations))
        limit, self.passes.tokens = map(min, zip(*ranks.gather_objects((limit, tokens)), strict=True))
        projection, order = self.passes.projection, self.passes.order
        each = {index: footprint.rows * length + footprint.fixed for index, length in self.passes.lengths.items()}
        if projection is not None:
            each = dict.fromkeys(each, float(projection.dimensions * self.capture.precision.itemsize))
        total = math.fsum(each.values())
        if self.options.workspace is not None:
            store: BlockStore = self._folder(max(1, min(_FOLDER_BLOCK_SIZE, int(limit / 2 / max(each.values())))))
            size = store.block_size
        elif total <= limit:
            free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
            store = MemoryBlocks(device if total <= 0.4 * free else torch.device("cpu"), device)
            size = min(_BLOCK_SIZE, math.ceil(len(order) / self.replicas.size))
        else:
            raise CouplingError(
                f"the gradients of {len(order)} pieces need about {total / 2**30:.3g} GiB, more than the "
                f"{limit / 2**30:.3g} GiB of memory_limit: pass workspace=, a folder on a disk with room for them, or "
                "projection=8192, or select fewer layers"
            )
        return store, [order[at : at + size] for at in range(0, len(order), size)]

    def _folder(self, block_size: int) -> FolderBlocks:
        assert self.options.workspace is not None
        if self.capture.sharded:
            raise CouplingError("workspace= needs a model that every process holds whole; under FSDP2 pass projection=")
        settings = run_settings(self.capture, self.passes.pieces, self.options.projection, self.options.seed)
        # The first rank decides the size of the blocks; a folder that is there already has decided.
        for turn in (True, False):
            with self.replicas.together("opening the workspace"):
                if (self.replicas.rank == 0) is turn:
                    folder = FolderBlocks(
                        self.options.workspace, settings, block_size=block_size, compute=self.capture.device
                    )
        return folder

    # Products

    def _products(self, store: BlockStore, summaries: Sequence[Block], number: int) -> Tensor:
        sizes = [len(block.indices) for block in summaries[: number + 1]]
        total = torch.zeros(sizes[-1], sum(sizes), dtype=torch.float64, device=self.capture.device)
        for name in self.passes.names if sizes[-1] else ():
            own = store.part(number, name)
            for other, target in enumerate(total.split(sizes, dim=1)):
                if other == number:
                    target += inner_products(own)
                elif sizes[other]:
                    target += inner_products(own, store.part(other, name))
        return total.cpu()

    def _assembled(self, store: BlockStore, summaries: Sequence[Block], *, vectors_only: bool) -> Gram:
        pieces, projection = self.passes.pieces, self.passes.projection
        count = len(pieces.samples)
        matrix = torch.zeros(count, count, dtype=torch.float64)
        squares, log_probs = (torch.full((count,), math.nan, dtype=torch.float64) for _ in range(2))
        failures, before = dict(pieces.failures), torch.empty(0, dtype=torch.int64)
        for number, block in enumerate(summaries):
            own = torch.tensor(block.indices, dtype=torch.int64)
            before = torch.cat([before, own])
            products = store.products(number)
            if products is not None:
                matrix[own[:, None], before] = products
                matrix[before[:, None], own] = products.T
            squares[own] = torch.tensor(block.squares, dtype=torch.float64)
            log_probs[own] = torch.tensor(block.log_probs, dtype=torch.float64)
            failures.update(block.failures)
        error = None if projection is None else projection.error(vectors_only=vectors_only)
        return Gram(matrix, squares, log_probs, dict(sorted(failures.items())), error, self.capture.precision)


def _available_memory() -> int:
    """Bytes that new allocations can have; a guess where the system does not tell."""
    found = []
    with suppress(OSError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(1024 * int(lines["MemAvailable"].split()[0]))
    with suppress(OSError, ValueError):  # of a container; "max" where it has no limit of its own
        folder = Path("/sys/fs/cgroup")
        found.append(int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    return max(0, min(found, default=_UNKNOWN_MEMORY))
