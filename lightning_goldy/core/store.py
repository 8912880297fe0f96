"""Vectors and masks as safetensors files with a JSON header; nothing is ever unpickled."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_goldy.core.files import StoreError, atomic_path, parse_json
from lightning_goldy.core.files import atomic_write as atomic_write
from lightning_goldy.core.naming import model_class, require_choice, suggestion
from lightning_goldy.core.sharding import gather, scatter_like
from lightning_goldy.core.space import ParameterSpace, SpaceError
from lightning_goldy.core.vector import ParameterVector

MOST_ELEMENTS = 2**36
"""Elements that a tensor may claim to have, several times those of the largest that any model has."""

_MOST_DIMENSIONS = 64
_MOST_STEPS = 2**53
_UNKNOWN_MEMORY = 8 << 30


def available_memory() -> int:
    """Bytes that new allocations can have; a guess where the system does not tell."""
    limits = []
    with contextlib.suppress(OSError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        limits.append(1024 * int(lines["MemAvailable"].split()[0]))
    with contextlib.suppress(OSError, ValueError):  # of a container; "max" where it has no limit of its own
        folder = Path("/sys/fs/cgroup")
        limits.append(int((folder / "memory.max").read_text()) - int((folder / "memory.current").read_text()))
    return max(0, min(limits, default=_UNKNOWN_MEMORY))


def require_boolean(mask: Tensor, name: str) -> None:
    """Checks that a mask is one.

    Raises:
        ValueError: The tensor is not boolean.
    """
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}: a mask is boolean; got {mask.dtype}")


def pack_mask(mask: Tensor, name: str = "mask") -> tuple[Tensor, str]:
    """Packs a boolean tensor: bits, or sorted indices where fewer than 1 in 32 elements are set.

    Returns:
        The packed tensor and its encoding: ``bits``, ``int32`` or ``int64``.

    Raises:
        ValueError: The tensor is not boolean.
    """
    require_boolean(mask, name)
    flat = mask.detach().cpu().reshape(-1)
    if int(flat.count_nonzero()) * 32 < flat.numel():
        index_dtype = torch.int32 if flat.numel() <= 2**31 else torch.int64
        return flat.nonzero().flatten().to(index_dtype), str(index_dtype).removeprefix("torch.")
    return torch.from_numpy(np.packbits(flat.numpy())), "bits"


def unpack_mask(packed: Tensor, shape: torch.Size, encoding: str, where: str = "mask") -> Tensor:
    """Undoes :func:`pack_mask`.

    Raises:
        StoreError: Unknown encoding, a wrong number of bits, an index out of range or order, or a size that no model
            or this machine's memory has.
    """
    numel = math.prod(shape)
    if encoding == "bits":
        if packed.dtype != torch.uint8 or packed.numel() != (numel + 7) // 8:
            raise StoreError(f"{where}: {packed.numel()} bytes of {packed.dtype} cannot hold {numel} bits")
        if numel % 8 and int(packed.reshape(-1)[-1]) & (0xFF >> numel % 8):
            raise StoreError(f"{where}: bits are set beyond the {numel} elements")
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=numel)).bool().view(shape)
    if encoding in ("int32", "int64"):
        if packed.dtype != getattr(torch, encoding) or packed.ndim != 1:
            raise StoreError(f"{where}: {packed.dtype} of shape {tuple(packed.shape)} are not {encoding} indices")
        _require_room({where: numel})
        if packed.numel() and (int(packed.min()) < 0 or int(packed.max()) >= numel):
            raise StoreError(f"{where}: an index lies outside the {numel} elements")
        if bool((packed[1:] <= packed[:-1]).any()):
            raise StoreError(f"{where}: the indices do not ascend")
        mask = torch.zeros(numel, dtype=torch.bool)
        mask[packed.long()] = True
        return mask.view(shape)
    raise StoreError(f"{where}: unknown encoding {encoding!r}; {suggestion(str(encoding), ('bits', 'int32', 'int64'))}")


PLANES = "planes:"
"""How the encoding of packed values begins; the bytes of each plane follow, most significant first."""
# Smaller tensors are not worth it; nor are planes whose bytes have more bits of entropy.
_PACKED_FROM, _WORTHWHILE = 1 << 12, 7.0
_SAMPLED = 1 << 14


def pack_values(values: Tensor) -> tuple[Tensor, str]:
    """Packs floats without loss: by planes of bytes, of which signs and exponents repeat, and trailing zeros vanish.

    A float32 that a bfloat16 holds exactly takes about a third so, any other at most what it took.

    Args:
        values: On the CPU, of any shape.

    Returns:
        The bytes and their encoding; the values themselves and ``dense`` where that saves less than a twentieth.

    Example:
        >>> packed, encoding = pack_values(torch.arange(-4096.0, 4096.0))
        >>> packed.numel() < 4 * 8192, encoding.split(",")[-1]
        (True, '0')
        >>> unpack_values(packed, torch.Size([8192]), torch.float32, encoding).equal(torch.arange(-4096.0, 4096.0))
        True
    """
    size = values.numel() * values.element_size()
    if values.numel() < _PACKED_FROM or not values.is_floating_point():
        return values, "dense"
    parts = []
    for plane in _byte_planes(values):
        counts = _byte_counts(plane)
        whole = plane.numpy().tobytes() if int(counts[0]) < plane.numel() else b""
        squeezed = whole
        if whole and _entropy(counts) <= _WORTHWHILE:
            squeezer = zlib.compressobj(1, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
            squeezed = squeezer.compress(whole) + squeezer.flush()
        parts.append(squeezed if len(squeezed) < len(whole) else whole)
    if sum(map(len, parts)) > 0.95 * size:
        return values, "dense"
    encoding = PLANES + ",".join(str(len(part)) for part in parts)
    return torch.from_numpy(np.frombuffer(b"".join(parts), np.uint8).copy()), encoding


def unpack_values(
    packed: Tensor, shape: torch.Size, dtype: torch.dtype, encoding: str, where: str = "values"
) -> Tensor:
    """Undoes :func:`pack_values`.

    Raises:
        StoreError: An encoding that it does not make, or bytes that are not those of so many values.
    """
    numel, sizes = math.prod(shape), encoding.removeprefix(PLANES).split(",")
    if not all(size.isascii() and size.isdigit() and len(size) < 16 for size in sizes) or len(sizes) != dtype.itemsize:
        raise StoreError(f"{where}: unknown encoding {encoding!r:.60} of {str(dtype).removeprefix('torch.')}")
    lengths = [int(size) for size in sizes]
    if packed.dtype != torch.uint8 or packed.ndim != 1 or sum(lengths) != packed.numel() or max(lengths) > numel:
        raise StoreError(
            f"{where}: {packed.numel()} bytes of {packed.dtype} are not {numel} values in {encoding!r:.60}"
        )
    found = torch.zeros(numel, dtype.itemsize, dtype=torch.uint8)
    for place, part in enumerate(packed.split(lengths)):
        if len(part):
            plane = part if len(part) == numel else _inflated(part, numel, where)
            found[:, dtype.itemsize - 1 - place] = plane
    return found.view(dtype).view(shape)


def packed_share(tensors: Iterable[Tensor]) -> float:
    """Bytes that values take packed, over those that they have, about: from evenly spaced elements of each.

    Example:
        >>> round(packed_share([torch.ones(4096)]), 2), packed_share([torch.ones(4096, device="meta")])
        (0.06, 1.0)
    """
    taken = whole = 0.0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        whole += size
        if tensor.is_meta or tensor.numel() < _PACKED_FROM or not tensor.is_floating_point():
            taken += size
            continue
        sample = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // _SAMPLED)].cpu()
        bits = [_plane_bits(_byte_counts(plane)) for plane in _byte_planes(sample)]
        share = sum(bits) / 8 / len(bits)
        taken += size * (share if share <= 0.95 else 1.0)
    return taken / whole if whole else 1.0


def _plane_bits(counts: Tensor) -> float:
    """Bits that each byte of a plane takes; a code has none shorter than one bit."""
    if int(counts[0]) == int(counts.sum()):
        return 0.0
    entropy = _entropy(counts)
    return max(1.0, entropy) if entropy <= _WORTHWHILE else 8.0


def _byte_planes(values: Tensor) -> Iterator[Tensor]:
    """The most significant byte of every value, then the next."""
    columns = values.detach().contiguous().view(-1).view(torch.uint8).view(-1, values.element_size())
    for place in reversed(range(values.element_size())):
        yield columns[:, place].contiguous()


def _byte_counts(plane: Tensor) -> Tensor:
    return torch.bincount(plane, minlength=256)


def _entropy(counts: Tensor) -> float:
    shares = counts / counts.sum()
    return -float(torch.special.xlogy(shares, shares).sum()) / math.log(2)


def _inflated(part: Tensor, numel: int, where: str) -> Tensor:
    inflater = zlib.decompressobj()
    try:
        plane = inflater.decompress(part.numpy().tobytes(), numel + 1)
    except zlib.error as error:
        raise StoreError(f"{where}: its bytes cannot be unpacked ({error})") from error
    if len(plane) != numel or not inflater.eof or inflater.unused_data:
        raise StoreError(f"{where}: its bytes do not unpack to {numel} values")
    return torch.from_numpy(np.frombuffer(plane, np.uint8).copy())


def _require_room(numels: Mapping[str, int]) -> None:
    """Refuses masks of few indices that claim more elements than can be: their files tell no limit."""
    for where, numel in numels.items():
        if numel > MOST_ELEMENTS:
            raise StoreError(
                f"{where}: claims {numel:.4g} elements; no tensor of a model has more than {MOST_ELEMENTS:,}"
            )
    _require_memory(numels, "masks", "elements")


def _require_memory(sizes: Mapping[str, int], what: str, unit: str) -> None:
    wanted, free = sum(sizes.values()), available_memory()
    if wanted > free:
        where = max(sizes, key=lambda name: sizes[name])
        raise StoreError(
            f"{where}: {what} of {wanted:,} {unit} in all do not fit into the {free:,} bytes of free memory"
        )


FORMAT_VERSION = 1
HEADER_KEY = "goldy"
Kind = Literal["values", "direction", "mask", "result"]
KINDS = get_args(Kind)


@dataclass(frozen=True)
class VectorHeader:
    """What a vector file says of itself.

    Args:
        kind: ``values`` (a snapshot), ``direction``, ``mask``, or ``result``: tensors of a result by their own names.
        model_class: Class name of the module that the vector belongs to.
        step: Optimizer steps at which it was taken.
        base_hash: Fingerprint of the base parameters it was computed against, if any.
        names: Parameter names, in order.
        shapes: Their global shapes.
        dtypes: Their parameters' dtypes, such as ``float32``.
        encodings: Per parameter how it is stored: ``dense``, of packed values ``planes:`` and the bytes of each, or for
            masks ``bits``, ``int32`` or ``int64`` indices.
        format_version: Version of this layout.
    """

    kind: Kind
    model_class: str
    step: int | None
    base_hash: str | None
    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    encodings: list[str]
    format_version: int = FORMAT_VERSION

    def space(self) -> ParameterSpace:
        """The parameter space that the file describes."""
        dtypes = tuple(_dtype(name) for name in self.dtypes)
        return ParameterSpace(tuple(self.names), tuple(torch.Size(shape) for shape in self.shapes), dtypes)


def save_vectors(
    path: str | Path,
    vector: ParameterVector,
    *,
    kind: Kind,
    model: nn.Module | str,
    step: int | None = None,
    base_hash: str | None = None,
    write: bool = True,
    packed: bool = False,
) -> Path:
    """Saves one vector: values, a direction, a mask, or the tensors of a result.

    Sharded tensors are gathered one at a time, so every process must call; only the one with ``write`` keeps them and
    writes. Masks are packed: bits, or indices where fewer than 1 in 32 elements are set.

    Args:
        path: Target file.
        vector: Plain or sharded; a mask is boolean.
        kind: What it is.
        model: The module that the vector belongs to, or its class name.
        step: Optimizer steps at which it was taken.
        base_hash: Fingerprint of the base it refers to.
        write: Whether this process writes.
        packed: Whether values in their parameter's dtype are packed without loss (:func:`pack_values`).

    Raises:
        ValueError: A mask that is not boolean, a tensor in a dtype that its parameter cannot have, or an unknown kind.
        OSError: The file cannot be written, as on a full disk; the message names it.

    Example:
        >>> space = ParameterSpace.of(nn.Linear(2, 2))
        >>> mask = ParameterVector(space, {"weight": torch.eye(2).bool(), "bias": torch.zeros(2).bool()})
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = save_vectors(f"{folder}/mask.safetensors", mask, kind="mask", model="Linear")
        ...     loaded, header = load_vectors(path)
        >>> loaded["weight"].equal(mask["weight"]), header.encodings
        (True, ['bits', 'int32'])
    """
    require_choice("kind", kind, KINDS)
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    encodings = []
    for (name, tensor), dtype in zip(vector.items(), vector.space.dtypes, strict=True):
        if kind == "mask":
            # Before the gathering, so that no process is left waiting in it.
            require_boolean(tensor, name)
        elif kind != "values" and not _may_be_kept(tensor.dtype, dtype, kind):
            raise ValueError(f"{name}: {kind} of a parameter in {dtype} cannot be saved in {tensor.dtype}")
        full = gather(tensor)
        if not write:
            continue
        if kind == "mask":
            stored[name], encoding = pack_mask(full, name)
        else:
            # Values that are not in their parameter's dtype are kept in one that holds both.
            kept = full.dtype if kind != "values" else torch.promote_types(full.dtype, dtype)
            dense, encoding = full.to("cpu", kept).contiguous(), "dense"
            storage = dense.untyped_storage().data_ptr()
            # safetensors refuses tensors that share memory.
            stored[name] = dense.clone() if storage in storages else dense
            if packed and kind == "values" and kept == dtype:
                stored[name], encoding = pack_values(stored[name])
            storages.add(storage)
        encodings.append(encoding)
    if not write:
        return Path(path)
    header = VectorHeader(
        kind=kind,
        model_class=model if isinstance(model, str) else model_class(model),
        step=step,
        base_hash=base_hash,
        names=list(vector.space.names),
        shapes=[list(shape) for shape in vector.space.shapes],
        dtypes=[str(dtype).removeprefix("torch.") for dtype in vector.space.dtypes],
        encodings=encodings,
    )
    return write_tensors(path, stored, {HEADER_KEY: json.dumps(asdict(header))})


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Writes a safetensors file at once.

    Args:
        path: Target; its folder is made when missing.
        tensors: On the CPU, contiguous, none sharing memory with another.
        metadata: Texts by name.

    Returns:
        The path.

    Raises:
        OSError: It cannot be written, as on a full disk; the message names it.
    """
    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), str(temporary), metadata=dict(metadata))
        except SafetensorError as error:
            # The library tells the system's error in words only, and not the file.
            code = re.search(r"os error (\d+)", str(error))
            raise OSError(int(code[1]) if code else errno.EIO, str(error), str(path)) from error
    return Path(path)


def read_header(path: str | Path) -> VectorHeader:
    """Reads and checks the header of a vector file without its tensors.

    Raises:
        StoreError: The file is missing, truncated, not a safetensors file, without a header, or of a newer format, or
            the header contradicts itself.
    """
    with open_tensors(path) as file:
        return _parse_header(path, file.metadata())


def load_vectors(path: str | Path, module: nn.Module | None = None) -> tuple[ParameterVector, VectorHeader]:
    """Loads a vector that :func:`save_vectors` wrote.

    Args:
        path: The file.
        module: When given, names, shapes and model class are checked against it, and each tensor takes the layout and
            device of its parameter. Otherwise plain CPU tensors.

    Returns:
        The vector and its header.

    Raises:
        StoreError: The file is broken, its header contradicts its tensors, or it belongs to another model; the first
            difference is named. It is found before anything of a size that only the header claims is allocated.
    """
    with open_tensors(path) as file:
        header = _parse_header(path, file.metadata())
        space = header.space()
        _check_stored(path, file, header, space)
        references = {} if module is None else _references(path, header, space, module)
        stored = [*zip(space.names, space.shapes, space.dtypes, header.encodings, strict=True)]
        sparse = {name: math.prod(shape) for name, shape, _, encoding in stored if encoding in _INDICES}
        _require_room({f"{path}: {name}": numel for name, numel in sparse.items()})
        packed = {n: math.prod(shape) * dtype.itemsize for n, shape, dtype, how in stored if how.startswith(PLANES)}
        _require_memory({f"{path}: {name}": size for name, size in packed.items()}, "values", "bytes")
        tensors = {}
        for name, shape, dtype, encoding in stored:
            full, where = file.get_tensor(name), f"{path}: {name}"
            if encoding.startswith(PLANES):
                full = unpack_values(full, shape, dtype, encoding, where)
            elif encoding != "dense":
                full = unpack_mask(full, shape, encoding, where)
            tensors[name] = scatter_like(references[name], full) if references else full
        return ParameterVector(space, tensors), header


def fingerprint(vector: ParameterVector) -> str:
    """Hash of a vector's names, shapes and values, independent of how it is sharded.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> first = fingerprint(ParameterVector.of(layer))
        >>> layer.bias.data[0] += 1
        >>> first == fingerprint(ParameterVector.of(layer))
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in vector.items():
        full = gather(tensor)
        digest.update(f"{name}\0{tuple(full.shape)}\0{full.dtype}\0".encode())
        digest.update(raw_bytes(full))
    return digest.hexdigest()


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor's elements in their order; NumPy knows no bfloat16, but bytes do not care.

    Example:
        >>> raw_bytes(torch.tensor([1, 2], dtype=torch.int16)).tolist()
        [1, 0, 2, 0]
    """
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


@contextlib.contextmanager
def open_tensors(path: str | Path) -> Iterator[Any]:
    """A safetensors file, open for reading.

    Args:
        path: The file.

    Raises:
        StoreError: It is missing, no file, or not a whole file of this kind; also within the block.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise StoreError(f"{path}: no such file" + ("; a folder is there" if path.is_dir() else ""))
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise StoreError(f"{path}: not a whole safetensors file ({error}); pickled files are never read") from error


_INDICES = ("int32", "int64")
_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_STORED = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    **{f"I{bits}": _DTYPES[f"int{bits}"] for bits in (8, 16, 32, 64)},
    **{f"F{bits}": _DTYPES[f"float{bits}"] for bits in (16, 32, 64)},
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    **{f"U{bits}": _DTYPES[f"uint{bits}"] for bits in (16, 32, 64)},
}
"""Dtypes as safetensors calls them."""


def _parse_header(path: str | Path, metadata: Mapping[str, str] | None) -> VectorHeader:
    text = (metadata or {}).get(HEADER_KEY)
    if text is None:
        raise StoreError(f"{path}: a safetensors file without the header that save_vectors writes")
    try:
        fields = parse_json(text)
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise StoreError(f"{path}: format version {version!r:.60}; this release reads version {FORMAT_VERSION}")
        header = VectorHeader(**fields)
        _check_fields(path, header)
    except StoreError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: malformed header ({type(error).__name__}: {error})") from error
    return header


def _check_fields(path: str | Path, header: VectorHeader) -> None:
    texts = (header.names, header.dtypes, header.encodings)
    if not all(isinstance(items, list) and all(isinstance(item, str) for item in items) for items in texts):
        raise TypeError("names, dtypes and encodings are lists of strings")
    if not isinstance(header.shapes, list) or not all(_is_shape(shape) for shape in header.shapes):
        raise TypeError("shapes are lists of lengths")
    if not isinstance(header.model_class, str) or not isinstance(header.base_hash, str | None):
        raise TypeError("model_class and base_hash are texts")
    if header.step is not None and not (type(header.step) is int and 0 <= header.step < _MOST_STEPS):
        raise TypeError(f"step is a number of optimizer steps, not {header.step!r:.60}")
    if len({*map(len, texts), len(header.shapes)}) != 1 or len(set(header.names)) != len(header.names):
        raise StoreError(f"{path}: the header's lists of names, shapes, dtypes and encodings do not match")
    if header.kind not in KINDS:
        raise StoreError(f"{path}: unknown kind {header.kind!r:.60}; {suggestion(str(header.kind), KINDS)}")
    for name, shape, encoding in zip(header.names, header.shapes, header.encodings, strict=True):
        packed = header.kind == "values" and encoding.startswith(PLANES)
        if (encoding == "dense" or packed) == (header.kind == "mask"):
            raise StoreError(f"{path}: {name} is stored as {encoding}, which no {header.kind} is")
        if math.prod(shape) > MOST_ELEMENTS:
            raise StoreError(f"{path}: {name} of shape {shape} is larger than any tensor of a model")
    header.space()


def _is_shape(shape: Any) -> bool:
    # With a bound for each, so that their product is soon told.
    lengths = isinstance(shape, list) and all(type(length) is int and 0 <= length < 2**63 for length in shape)
    return lengths and len(shape) <= _MOST_DIMENSIONS


def _check_stored(path: str | Path, file: Any, header: VectorHeader, space: ParameterSpace) -> None:
    """Compares what the header says of each tensor with what is stored, of which nothing is read."""
    stored = set(file.keys())
    if stored != set(space.names):
        different = sorted(stored ^ set(space.names))
        raise StoreError(f"{path}: header and tensors name different parameters, first {different[0]!r}")
    for name, shape, dtype, encoding in zip(space.names, space.shapes, space.dtypes, header.encodings, strict=True):
        part = file.get_slice(name)
        kind, found = _STORED.get(str(part.get_dtype())), tuple(part.get_shape())
        if kind is None:
            raise StoreError(f"{path}: {name} is stored as {part.get_dtype()}; those known are {', '.join(_STORED)}")
        if header.kind == "mask" or encoding.startswith(PLANES):
            continue
        if found != tuple(shape):
            raise StoreError(f"{path}: {name} is stored with shape {found}, its header says {tuple(shape)}")
        if not _may_be_kept(kind, dtype, header.kind):
            names = [str(each).removeprefix("torch.") for each in (kind, dtype)]
            raise StoreError(f"{path}: {name} is stored as {names[0]}, its header says {names[1]}")


def _may_be_kept(stored: torch.dtype, parameter: torch.dtype, kind: Kind) -> bool:
    """Whether a tensor of a parameter may have a dtype: a direction any of floats, values also a wider one."""
    floats = stored.is_floating_point and parameter.is_floating_point
    wider = kind == "direction" or (kind == "values" and stored.itemsize > parameter.itemsize)
    return stored == parameter or (floats and wider)


def _references(path: Any, header: VectorHeader, space: ParameterSpace, module: nn.Module) -> dict[str, nn.Parameter]:
    if header.model_class != model_class(module):
        raise StoreError(f"{path}: written for {header.model_class}, the model is {model_class(module)}")
    try:
        return space.resolve(module)
    except SpaceError as error:
        raise StoreError(f"{path}: {error}") from error


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise TypeError(f"{name!r} is no dtype")
    return _DTYPES[name]
