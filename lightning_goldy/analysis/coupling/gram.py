"""Gram matrices of per-piece gradients, exact or projected, block by block, in memory or in a workspace on disk."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_goldy.analysis.gradients import exact_products
from lightning_goldy.core.files import StoreError, atomic_write, parse_json
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.store import open_tensors, write_tensors

# Rows of one tile of the product of rows with rows: small enough that a symmetric product is done by halves.
_TILE_ROWS_CPU, _TILE_ROWS = 256, 4096
# Elements of a gradient that one matrix product sums over; longer sums in float32 lose digits.
_SLICE = 1 << 15
# A batched product over few rows runs at about half the speed of a square one.
_OUTER_PRODUCT_COST = 2.0


class Rows(NamedTuple):
    r"""The gradients of several pieces with respect to one tensor, :math:`G_m = \sum_r b_{mr} \otimes a_{mr}`.

    Args:
        gradients: b, shape ``[M, R, d_out]``, rows of zeros where a piece has fewer; without inputs the gradients
            themselves, flat, shape ``[M, numel]``.
        inputs: a, shape ``[M, R, d_in]``.
    """

    gradients: Tensor
    inputs: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self if tensor is not None)

    def of(self, pieces: list[int]) -> Rows:
        """The rows of some pieces, by number."""
        return Rows(self.gradients[pieces], None if self.inputs is None else self.inputs[pieces])

    def to(self, device: torch.device) -> Rows:
        """The same rows on another device."""
        return Rows(self.gradients.to(device), None if self.inputs is None else self.inputs.to(device))

    def factors(self, at: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Inputs and gradients of some pieces that come as rows, in float32 or better."""
        assert self.inputs is not None
        return accurate(self.inputs[at]), accurate(self.gradients[at])


def without_empty_rows(inputs: Tensor, gradients: Tensor) -> Rows:
    """Drops positions whose gradient is zero, such as padding, so that they cost nothing.

    Args:
        inputs: Shape ``[M, T, d_in]``.
        gradients: Shape ``[M, T, d_out]``.

    Returns:
        Rows of the largest number of positions that one piece keeps, in order.

    Example:
        >>> b = torch.tensor([[[0.0], [2.0], [0.0]], [[1.0], [0.0], [0.0]]])
        >>> without_empty_rows(torch.arange(6.0).view(2, 3, 1), b).inputs.flatten().tolist()
        [1.0, 3.0]
    """
    kept = (gradients != 0).any(dim=-1)  # [M, T]
    if bool(kept.all()):
        return Rows(gradients, inputs)
    count = int(kept.sum(dim=1).max())
    place = kept.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :count]  # [M, R]
    empty = ~kept.gather(1, place)[:, :, None]  # [M, R, 1]

    def gathered(tensor: Tensor) -> Tensor:
        index = place[:, :, None].expand(-1, -1, tensor.shape[-1])
        return tensor.gather(1, index).masked_fill_(empty, 0)

    return Rows(gathered(gradients), gathered(inputs))


class RowBuffer:
    """Gathers the rows of pieces in one tensor as they come, so that they are never held twice.

    Args:
        count: Pieces that will come at most.
        device: Where they are gathered.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.device = count, device
        self._filled = 0
        self._tensors: list[Tensor | None] = [None, None]

    def add(self, rows: Rows) -> None:
        """Adds the rows of some pieces."""
        for place, tensor in enumerate(rows):
            if tensor is None:
                continue
            held = self._tensors[place]
            if held is None:
                held = torch.zeros(self.count, *tensor.shape[1:], dtype=tensor.dtype, device=self.device)
            elif tensor.ndim == 3 and tensor.shape[1] > held.shape[1]:
                held = F.pad(held, (0, 0, 0, tensor.shape[1] - held.shape[1]))
            self._tensors[place] = held
            held[self._filled : self._filled + len(tensor), : tensor.shape[1]].copy_(tensor)
        self._filled += len(rows.gradients)

    def rows(self) -> Rows:
        """All rows, those of shorter pieces filled up with zeros."""
        gradients, inputs = (None if tensor is None else tensor[: self._filled] for tensor in self._tensors)
        assert gradients is not None
        return Rows(gradients, inputs)


def squared_norms(rows: Rows) -> Tensor:
    r"""Squared norm of each piece's gradient, :math:`\sum_{r,s} (a_r \cdot a_s)(b_r \cdot b_s)`.

    Args:
        rows: Of M pieces.

    Returns:
        Shape ``[M]``, float64.

    Example:
        >>> rows = Rows(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]]))
        >>> squared_norms(rows).tolist()  # of [[3], [6]]
        [45.0]
    """
    with exact_products(rows.gradients.device):
        if rows.inputs is None:
            return accurate(rows.gradients).double().square().sum(dim=1)
        a, b = rows.factors()
        return (torch.bmm(a, a.mT) * torch.bmm(b, b.mT)).sum(dim=(1, 2), dtype=torch.float64)


def inner_products(first: Rows, second: Rows | None = None) -> Tensor:
    r"""Inner products of the gradients of two groups of pieces.

    .. math:: \langle G_i, G_j \rangle = \sum_{r,s} (a_{ir} \cdot a_{js}) (b_{ir} \cdot b_{js})

    Either so, in products of rows, or with the gradients built slice by slice: whichever costs less.

    Args:
        first: Of M pieces.
        second: Of N pieces and the same tensor; the first group again by default.

    Returns:
        Shape ``[M, N]``, float64.

    Example:
        >>> rows = Rows(torch.tensor([[[1.0, 2.0]], [[0.0, 1.0]]]), torch.tensor([[[3.0]], [[1.0]]]))
        >>> inner_products(rows).tolist()  # of [[3], [6]] and [[0], [1]]
        [[45.0, 6.0], [6.0, 1.0]]
    """
    other = first if second is None else second
    with exact_products(first.gradients.device):
        product = (_by_rows if _rows_are_cheaper(first, other) else _by_gradients)(first, other)
    return (product + product.T) / 2 if second is None else product  # symmetric to the last bit


def _rows_are_cheaper(first: Rows, other: Rows) -> bool:
    if first.inputs is None or 0 in (first.gradients.shape[1], other.gradients.shape[1]):
        return False
    width_in, width_out = first.inputs.shape[-1], first.gradients.shape[-1]
    (m, r), (n, s) = first.gradients.shape[:2], other.gradients.shape[:2]
    by_rows = m * n * r * s * (width_in + width_out) * (0.55 if other is first else 1.0)
    built = m * r if other is first else m * r + n * s
    return by_rows <= (m * n + _OUTER_PRODUCT_COST * built) * width_in * width_out


def _by_rows(first: Rows, other: Rows) -> Tensor:
    limit = _TILE_ROWS_CPU if first.gradients.device.type == "cpu" else _TILE_ROWS
    lefts, rights = ([*_tiles(rows, limit)] for rows in (first, other))
    result = torch.empty(len(first.gradients), len(other.gradients), dtype=torch.float64, device=first.gradients.device)
    for i, left in lefts:
        for j, right in rights:
            if other is first and j.start > i.start:
                continue
            value = _tile(left, right)
            result[i, j] = value
            if other is first:
                result[j, i] = value.T
    return result


def _tiles(rows: Rows, limit: int) -> list[tuple[slice, tuple[Tensor, Tensor]]]:
    size = max(1, limit // rows.gradients.shape[1])
    places = [slice(at, at + size) for at in range(0, len(rows.gradients), size)]
    return [(place, rows.factors(place)) for place in places]


def _tile(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
    (m, r), (n, s) = left[0].shape[:2], right[0].shape[:2]
    product, by_gradients = (one.flatten(0, 1) @ two.flatten(0, 1).T for one, two in zip(left, right, strict=True))
    product *= by_gradients  # [m r, n s]
    return product.view(m, r, n * s).sum(dim=1).view(m, n, s).sum(dim=2, dtype=torch.float64)  # -> [m, n]


def _by_gradients(first: Rows, other: Rows) -> Tensor:
    step = _SLICE if first.inputs is None else max(1, _SLICE // first.inputs.shape[-1])
    result = torch.zeros(len(first.gradients), len(other.gradients), dtype=torch.float64, device=first.gradients.device)
    for start in range(0, first.gradients.shape[-1], step):
        left = _built(first, start, step)  # [M, step d_in]
        result += left @ (left if other is first else _built(other, start, step)).T
    return result


def _built(rows: Rows, start: int, step: int) -> Tensor:
    """Some output dimensions of the gradients, flat."""
    gradients = accurate(rows.gradients[..., start : start + step])  # [M, R, step], or flat [M, step]
    return gradients if rows.inputs is None else torch.bmm(gradients.mT, accurate(rows.inputs)).flatten(1)


def accurate(tensor: Tensor) -> Tensor:
    """In float32, unless it is float64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


# Elements of a flat gradient that are hashed at a time.
_BLOCK = 1 << 20
# Elements of [rows, dimensions] that are worked on at a time.
_CHUNK = 1 << 22


class _Hash(NamedTuple):
    buckets: Tensor
    signs: Tensor


class Projection:
    r"""Maps the gradients over all tensors to a few numbers that keep their inner products on average.

    .. math::
        S(b \otimes a) = \mathcal F^{-1}\big(\mathcal F(C_1 b) \circ \mathcal F(C_2 a)\big), \qquad
        \mathbb E \langle S g, S h \rangle = \langle g, h \rangle, \qquad
        \mathrm{Var} \langle S g, S h \rangle \le \frac{8}{k} \lVert g \rVert^2 \lVert h \rVert^2

    with count sketches C of k buckets: every coordinate goes to a random bucket with a random sign. Tensors have hashes
    of their own and share the buckets. A gradient over nothing but vectors, such as biases, is count-sketched, with 2
    in the place of 8; most pairs of gradients come close to that anyway, at :math:`(1 + \cos^2) / k`.

    Args:
        dimensions: k.
        seed: Decides the hashes, on any device.

    Raises:
        ValueError: k is below 2.

    Source: Pham and Pagh, "Fast and scalable polynomial kernels via explicit feature maps" (2013); the variance over
        all of the tensor space as in Avron, Nguyen and Woodruff, "Subspace embeddings for the polynomial kernel"
        (2014), lemma 3.

    Example:
        >>> projection = Projection(4096)
        >>> rows = Rows(torch.ones(1, 1, 5), torch.ones(1, 1, 7))
        >>> sketch = projection({"weight": rows})
        >>> sketch.shape, abs(float(sketch.square().sum()) / 35 - 1) < 3 * projection.error()
        (torch.Size([1, 4096]), True)
    """

    def __init__(self, dimensions: int, *, seed: int = 0) -> None:
        if dimensions < 2:
            raise ValueError(f"projection is the number of dimensions to keep, at least 2; got {dimensions}")
        self.dimensions, self.seed = dimensions, seed
        self._hashes: dict[tuple[str, int, torch.device], _Hash] = {}

    def __call__(self, parts: Mapping[str, Rows]) -> Tensor:
        """The projected gradients.

        Args:
            parts: Rows of the same M pieces by the name of their tensor.

        Returns:
            Shape ``[M, k]``, float32, or float64 where the rows are.
        """
        first = next(iter(parts.values())).gradients
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        total = torch.zeros(len(first), self.dimensions, dtype=dtype, device=first.device)
        with exact_products(first.device):
            for name, rows in parts.items():
                if rows.inputs is None:
                    for number, part in enumerate(rows.gradients.split(_BLOCK, dim=1)):
                        total += self._count_sketch(f"{name}\0{number}", part.to(dtype)).to(total.device)
                elif rows.gradients.shape[1]:
                    sketch = self._tensor_sketch(name, rows.gradients.to(dtype), rows.inputs.to(dtype))
                    total += sketch.to(total.device)
        return total

    def error(self, *, vectors_only: bool = False) -> float:
        """Bound on the root mean square error of a cosine whose norms are known.

        Args:
            vectors_only: Whether every tensor's gradient comes as it is, none as rows.
        """
        return math.sqrt((2 if vectors_only else 8) / self.dimensions)

    def _tensor_sketch(self, name: str, gradients: Tensor, inputs: Tensor) -> Tensor:
        step = max(1, _CHUNK // (gradients.shape[1] * self.dimensions))
        sketches = []
        for b, a in zip(gradients.split(step), inputs.split(step), strict=True):
            spectra = [
                torch.fft.rfft(self._count_sketch(f"{name}\0{side}", each)) for side, each in (("out", b), ("in", a))
            ]  # [M, R, k / 2 + 1]
            sketches.append(torch.fft.irfft((spectra[0] * spectra[1]).sum(dim=1), n=self.dimensions))
        return torch.cat(sketches)

    def _count_sketch(self, key: str, values: Tensor) -> Tensor:
        hashed = self._hash(key, values.shape[-1], values.device)
        result = values.new_zeros(*values.shape[:-1], self.dimensions)
        return result.index_add_(-1, hashed.buckets, values * hashed.signs)

    def _hash(self, key: str, width: int, device: torch.device) -> _Hash:
        if (key, width, device) not in self._hashes:
            digest = hashlib.blake2b(f"{self.seed}\0projection\0{key}".encode(), digest_size=8).digest()
            # 63 bits: torch reads a larger seed as negative. On the CPU, so that every device has the same.
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
            buckets = torch.randint(self.dimensions, (width,), generator=generator, device="cpu")
            signs = torch.randint(2, (width,), generator=generator, dtype=torch.int8, device="cpu") * 2 - 1
            self._hashes[key, width, device] = _Hash(buckets.to(device), signs.to(device))
        return self._hashes[key, width, device]


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

    def exchange(self, n_blocks: int, replicas: Replicas, names: Collection[str]) -> None:
        """Makes the blocks of every replica known to all; every replica must call, when all have put theirs.

        Args:
            n_blocks: Of all replicas.
            replicas: Those that have put blocks.
            names: Tensors whose rows this replica needs, and keeps.
        """
        if replicas.size == 1:
            return
        layouts = {
            number: ({name: _layout(rows) for name, rows in block.parts.items()}, summary_of(block))
            for number, block in self._blocks.items()
        }
        known = {
            number: (rank, *layout)
            for rank, part in enumerate(replicas.gather_objects(layouts))
            for number, layout in part.items()
        }
        wanted = replicas.gather_objects(set(names))
        for number in range(n_blocks):
            source, layout, summary = known[number]
            own = self._blocks.get(number)
            parts = {}
            for name, kinds in layout.items():
                if any(name in asked for rank, asked in enumerate(wanted) if rank != source):
                    rows = (None, None) if own is None else own.parts[name]
                    made = [self._shared(*pair, replicas, source) for pair in zip(rows, kinds, strict=True)]
                elif own is not None:  # nobody else works on it
                    made = list(own.parts[name])
                if name in names:
                    gradients, inputs = made
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

    def _shared(
        self, tensor: Tensor | None, kind: tuple[Any, ...] | None, replicas: Replicas, source: int
    ) -> Tensor | None:
        if kind is None:
            return None
        shape, dtype = kind
        # Every backend can send float32.
        wide = torch.promote_types(dtype, torch.float32)
        if tensor is None:
            sent = torch.empty(shape, dtype=wide, device=self.compute)
        else:
            sent = tensor.to(self.compute, wide).contiguous()
        return (replicas.send_(sent, source) if sent.numel() else sent).to(self.kept, dtype)


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

    def exchange(self, n_blocks: int, replicas: Replicas, names: Collection[str]) -> None:
        """See :class:`MemoryBlocks`."""
        with replicas.together("reading the workspace"):
            for number in range(n_blocks):
                self.summary(number)

    def summary(self, number: int) -> Block:
        """See :class:`MemoryBlocks`."""
        path = self._path("summary", number)
        if not path.is_file():
            raise StoreError(f"{path}: no such file; the workspace must be one folder that every rank sees")
        try:
            fields = parse_json(path.read_bytes())
            self._check(path, fields.pop("run", None))
            failures = {int(index): reason for index, reason in fields.pop("failures").items()}
            block = Block(**fields, failures=failures)
            if not len(block.indices) == len(block.squares) == len(block.log_probs):
                raise ValueError("its lists differ in length")
        except StoreError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path}: not the summary of a block ({error}); delete the workspace") from error
        return block

    def part(self, number: int, name: str) -> Rows:
        """See :class:`MemoryBlocks`."""
        with self._open("rows", number) as file:
            present = set(file.keys())
            keys = [key for kind in Rows._fields if (key := f"{name}::{kind}") in present]
            if not keys:
                raise StoreError(f"{self._path('rows', number)}: holds no rows of {name!r}; delete the workspace")
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
        write_tensors(self._path(kind, number), tensors, {"run": self._run})

    @contextmanager
    def _open(self, kind: str, number: int) -> Iterator[Any]:
        path = self._path(kind, number)
        try:
            with open_tensors(path) as file:
                run = (file.metadata() or {}).get("run")
                if run == self._run:
                    yield file
        except StoreError as error:
            raise StoreError(f"{path}: not a whole block of this run ({error}); delete the workspace") from error
        self._check(path, run)

    def _check(self, path: Path, run: str | None) -> None:
        if run != self._run:
            raise StoreError(f"{path}: a block of another run; give every run a workspace of its own")


def _matching_size(header: Path, settings: Mapping[str, str]) -> int:
    """The size of the blocks that are there, if they are of this run."""
    try:
        fields = parse_json(header.read_bytes())
        known, size, version = fields["settings"], fields["block_size"], fields["format_version"]
        if not isinstance(known, dict) or type(size) is not int or not 0 < size < 2**31:
            raise TypeError(f"settings and a block_size of at least 1 are wanted, not {size!r:.60}")
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
    return size


BlockStore: TypeAlias = MemoryBlocks | FolderBlocks
"""Where blocks are kept."""
