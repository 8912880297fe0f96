"""Blocks of the Gram matrix, in memory or in a workspace on disk that a stopped run goes on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_goldy.analysis.coupling.gram import Rows
from lightning_goldy.core.files import StoreError, atomic_path, atomic_write
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


class MemoryBlocks:
    """Blocks in memory, and the inner products of each block with all before it and itself.

    Args:
        kept: Where rows are kept.
        compute: Where products are made and collectives take place.
    """

    shared = False
    """Whether every replica finds the products of all."""

    def __init__(self, kept: torch.device, compute: torch.device) -> None:
        self.kept, self.compute = kept, compute
        self._blocks: dict[int, Block] = {}
        self._products: dict[int, Tensor] = {}

    def has_block(self, number: int) -> bool:
        """Whether a block is there."""
        return number in self._blocks

    def put_block(self, number: int, block: Block) -> None:
        """Keeps a block."""
        self._blocks[number] = block

    def exchange(self, n_blocks: int, replicas: Replicas) -> None:
        """Makes the blocks of every replica known to all; every replica must call, when all have put theirs."""
        if replicas.size == 1:
            return
        layouts = {
            number: ({name: _layout(rows) for name, rows in block.parts.items()}, summary_of(block))
            for number, block in self._blocks.items()
        }
        known = {number: layout for part in replicas.gather_objects(layouts) for number, layout in part.items()}
        for number in range(n_blocks):
            layout, summary = known[number]
            own = self._blocks.get(number)
            parts = {}
            for name, kinds in layout.items():
                rows = (None, None) if own is None else own.parts[name]
                gradients, inputs = (self._shared(*pair, replicas) for pair in zip(rows, kinds, strict=True))
                assert gradients is not None
                parts[name] = Rows(gradients, inputs)
            self._blocks[number] = Block(**summary, parts=parts)

    def summary(self, number: int) -> Block:
        """A block without its rows."""
        return self._blocks[number]

    def part(self, number: int, name: str) -> Rows:
        """The rows of one tensor, where products are made."""
        return self._blocks[number].parts[name].to(self.compute)

    def has_products(self, number: int) -> bool:
        """Whether the inner products of a block are there."""
        return number in self._products

    def put_products(self, number: int, products: Tensor) -> None:
        """Keeps the inner products of a block, shape ``[M, pieces up to its last]``."""
        self._products[number] = products

    def products(self, number: int) -> Tensor | None:
        """The inner products of a block; None where another replica has them."""
        return self._products.pop(number, None)

    def finish(self, n_blocks: int) -> None:
        """Frees what only an unfinished run needs."""
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
    return [None if tensor is None else (tuple(tensor.shape), tensor.dtype) for tensor in rows]


def summary_of(block: Block) -> dict[str, Any]:
    """All of a block but its rows, by name."""
    return {name: value for name, value in vars(block).items() if name != "parts"}


FORMAT_VERSION = 1
HEADER = "coupling.json"


class FolderBlocks:
    """Blocks in files, each whole or absent, so that a run that was interrupted goes on where it stopped.

    Args:
        folder: Holds nothing else; made when missing.
        settings: All that decides the numbers, by name.
        block_size: Pieces in a block, unless the folder holds blocks already.
        compute: Where products are made.

    Raises:
        StoreError: The folder holds blocks of other pieces, of other weights or from other settings.
    """

    shared = True
    kept = torch.device("cpu")

    def __init__(
        self, folder: str | Path, settings: Mapping[str, str], *, block_size: int, compute: torch.device
    ) -> None:
        self.folder, self.compute = Path(folder), compute
        header = self.folder / HEADER
        if header.is_file():
            self.block_size = _matching_size(header, settings)
        else:
            self.block_size = block_size
            fields = {"format_version": FORMAT_VERSION, "block_size": block_size, "settings": dict(settings)}
            atomic_write(header, json.dumps(fields, indent=1))
        self._run = hashlib.blake2b(json.dumps(dict(settings)).encode(), digest_size=16).hexdigest()

    def has_block(self, number: int) -> bool:
        """See :class:`MemoryBlocks`."""
        return self._path("summary", number).is_file() and self._path("rows", number).is_file()

    def put_block(self, number: int, block: Block) -> None:
        """See :class:`MemoryBlocks`."""
        tensors: dict[str, Tensor] = {}
        for name, rows in block.parts.items():
            for kind, tensor in zip(Rows._fields, rows, strict=True):
                if tensor is not None:
                    tensors[f"{name}::{kind}"] = tensor.contiguous()
        self._save("rows", number, tensors)
        # Last, as the sign that the rows are there.
        atomic_write(self._path("summary", number), json.dumps({"run": self._run, **summary_of(block)}))

    def exchange(self, n_blocks: int, replicas: Replicas) -> None:
        """See :class:`MemoryBlocks`."""
        with replicas.together("reading the workspace"):
            for number in range(n_blocks):
                self.summary(number)

    def summary(self, number: int) -> Block:
        """See :class:`MemoryBlocks`."""
        path = self._path("summary", number)
        if not path.is_file():
            raise StoreError(f"{path}: no such file; the workspace must be one folder that every rank sees")
        fields = json.loads(path.read_text())
        self._check(path, fields.pop("run", None))
        failures = {int(index): reason for index, reason in fields.pop("failures").items()}
        return Block(**fields, failures=failures)

    def part(self, number: int, name: str) -> Rows:
        """See :class:`MemoryBlocks`."""
        with self._open("rows", number) as file:
            present = set(file.keys())
            keys = [key for kind in Rows._fields if (key := f"{name}::{kind}") in present]
            return Rows(*(file.get_tensor(key).to(self.compute) for key in keys))

    def has_products(self, number: int) -> bool:
        """See :class:`MemoryBlocks`."""
        return self._path("products", number).is_file()

    def put_products(self, number: int, products: Tensor) -> None:
        """See :class:`MemoryBlocks`."""
        self._save("products", number, {"products": products.contiguous()})

    def products(self, number: int) -> Tensor | None:
        """See :class:`MemoryBlocks`."""
        with self._open("products", number) as file:
            tensor: Tensor = file.get_tensor("products")
            return tensor

    def finish(self, n_blocks: int) -> None:
        """See :class:`MemoryBlocks`."""
        for number in range(n_blocks):
            self._path("rows", number).unlink(missing_ok=True)

    def _path(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:05d}.{'json' if kind == 'summary' else 'safetensors'}"

    def _save(self, kind: str, number: int, tensors: dict[str, Tensor]) -> None:
        # One gradient may serve two layers, as where attention and MLP run in parallel; the file needs it twice.
        owners = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        tensors = {name: kept if owners[kept.data_ptr()] == name else kept.clone() for name, kept in tensors.items()}
        with atomic_path(self._path(kind, number)) as temporary:
            save_file(tensors, temporary, metadata={"run": self._run})

    def _open(self, kind: str, number: int) -> Any:
        path = self._path(kind, number)
        try:
            file = safe_open(str(path), framework="pt")
            self._check(path, (file.metadata() or {}).get("run"))
        except (SafetensorError, FileNotFoundError) as error:
            raise StoreError(f"{path}: not a whole block of this run ({error}); delete the workspace") from error
        return file

    def _check(self, path: Path, run: str | None) -> None:
        if run != self._run:
            raise StoreError(f"{path}: a block of another run; give every run a workspace of its own")


def _matching_size(header: Path, settings: Mapping[str, str]) -> int:
    """The size of the blocks that are there, if they are of this run."""
    try:
        fields = json.loads(header.read_text())
        known, size, version = fields["settings"], fields["block_size"], fields["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{header}: not the header of a coupling workspace ({error})") from error
    if version != FORMAT_VERSION:
        raise StoreError(f"{header}: format version {version}; this release reads version {FORMAT_VERSION}")
    for name in sorted({*settings, *known}):
        if settings.get(name) != known.get(name):
            raise StoreError(
                f"{header.parent} holds coupling blocks with other {name}: {known.get(name)} there, "
                f"{settings.get(name)} now; choose another workspace, or delete this one"
            )
    return int(size)


BlockStore: TypeAlias = MemoryBlocks | FolderBlocks
"""Where blocks are kept."""
