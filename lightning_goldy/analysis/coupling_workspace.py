"""Blocks of pieces, and the inner products between them, in a folder: for more than memory holds, and to go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lightning_goldy.analysis.coupling_blocks import Block, summary_of
from lightning_goldy.analysis.coupling_gram import Rows
from lightning_goldy.core.files import StoreError, atomic_path, atomic_write
from lightning_goldy.core.sharding import Replicas

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
        """See :class:`~lightning_goldy.analysis.coupling_blocks.BlockStore`."""
        return self._path("summary", number).is_file() and self._path("rows", number).is_file()

    def put_block(self, number: int, block: Block) -> None:
        """See :class:`~lightning_goldy.analysis.coupling_blocks.BlockStore`."""
        tensors: dict[str, Tensor] = {}
        for name, rows in block.parts.items():
            for kind, tensor in zip(Rows._fields, rows, strict=True):
                if tensor is not None:
                    tensors[f"{name}::{kind}"] = tensor.contiguous()
        self._save("rows", number, tensors)
        # Last, as the sign that the rows are there.
        atomic_write(self._path("summary", number), json.dumps({"run": self._run, **summary_of(block)}))

    def exchange(self, n_blocks: int, replicas: Replicas) -> None:
        """See :class:`~lightning_goldy.analysis.coupling_blocks.BlockStore`."""
        with replicas.together("reading the workspace"):
            for number in range(n_blocks):
                self.summary(number)

    def summary(self, number: int) -> Block:
        """See :class:`~lightning_goldy.analysis.coupling_blocks.BlockStore`."""
        path = self._path("summary", number)
        if not path.is_file():
            raise StoreError(f"{path}: no such file; the workspace must be one folder that every rank sees")
        fields = json.loads(path.read_text())
        self._check(path, fields.pop("run", None))
        failures = {int(index): reason for index, reason in fields.pop("failures").items()}
        return Block(**fields, failures=failures)

    def part(self, number: int, name: str) -> Rows:
        """See :class:`~lightning_goldy.analysis.coupling_blocks.BlockStore`."""
        with self._open("rows", number) as file:
            present = set(file.keys())
            keys = [key for kind in Rows._fields if (key := f"{name}::{kind}") in present]
            return Rows(*(file.get_tensor(key).to(self.compute) for key in keys))

    def has_products(self, number: int) -> bool:
        """See :class:`~lightning_goldy.analysis.coupling_blocks.BlockStore`."""
        return self._path("products", number).is_file()

    def put_products(self, number: int, products: Tensor) -> None:
        """See :class:`~lightning_goldy.analysis.coupling_blocks.BlockStore`."""
        self._save("products", number, {"products": products.contiguous()})

    def products(self, number: int) -> Tensor | None:
        """See :class:`~lightning_goldy.analysis.coupling_blocks.BlockStore`."""
        with self._open("products", number) as file:
            tensor: Tensor = file.get_tensor("products")
            return tensor

    def finish(self, n_blocks: int) -> None:
        """See :class:`~lightning_goldy.analysis.coupling_blocks.BlockStore`."""
        for number in range(n_blocks):
            self._path("rows", number).unlink(missing_ok=True)

    def _path(self, kind: str, number: int) -> Path:
        return self.folder / f"{kind}-{number:05d}.{'json' if kind == 'summary' else 'safetensors'}"

    def _save(self, kind: str, number: int, tensors: dict[str, Tensor]) -> None:
        # One gradient may serve two layers, as where attention and MLP run in parallel; the file needs it twice.
        owners = {tensor.data_ptr(): name for name, tensor in tensors.items()}
        tensors = {name: each if owners[each.data_ptr()] == name else each.clone() for name, each in tensors.items()}
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
        found, size, version = fields["settings"], fields["block_size"], fields["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{header}: not the header of a coupling workspace ({error})") from error
    if version != FORMAT_VERSION:
        raise StoreError(f"{header}: format version {version}; this release reads version {FORMAT_VERSION}")
    for name in sorted({*settings, *found}):
        if settings.get(name) != found.get(name):
            raise StoreError(
                f"{header.parent} holds coupling blocks with other {name}: {found.get(name)} there, "
                f"{settings.get(name)} now; choose another workspace, or delete this one"
            )
    return int(size)
