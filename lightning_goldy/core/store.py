"""Vectors and masks as safetensors files with a JSON header; nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_goldy.core.files import StoreError, atomic_path
from lightning_goldy.core.files import atomic_write as atomic_write
from lightning_goldy.core.naming import model_class, require_choice, suggestion
from lightning_goldy.core.sharding import gather, scatter_like
from lightning_goldy.core.space import ParameterSpace, SpaceError
from lightning_goldy.core.vector import ParameterVector


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
        StoreError: Unknown encoding, a wrong number of bits, or an index out of range.
    """
    numel = math.prod(shape)
    if encoding == "bits":
        if packed.dtype != torch.uint8 or packed.numel() != (numel + 7) // 8:
            raise StoreError(f"{where}: {packed.numel()} bytes of {packed.dtype} cannot hold {numel} bits")
        return torch.from_numpy(np.unpackbits(packed.numpy(), count=numel)).bool().view(shape)
    if encoding in ("int32", "int64"):
        if packed.dtype != getattr(torch, encoding) or packed.ndim != 1:
            raise StoreError(f"{where}: {packed.dtype} of shape {tuple(packed.shape)} are not {encoding} indices")
        if packed.numel() and (int(packed.min()) < 0 or int(packed.max()) >= numel):
            raise StoreError(f"{where}: an index lies outside the {numel} elements")
        mask = torch.zeros(numel, dtype=torch.bool)
        mask[packed.long()] = True
        return mask.view(shape)
    raise StoreError(f"{where}: unknown encoding {encoding!r}; {suggestion(encoding, ('bits', 'int32', 'int64'))}")


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
        encodings: Per parameter how it is stored: ``dense``, or for masks ``bits``, ``int32`` or ``int64`` indices.
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

    Raises:
        ValueError: A mask that is not boolean, or an unknown kind.

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
    for name, tensor in vector.items():
        if kind == "mask":
            # Before the gathering, so that no process is left waiting in it.
            require_boolean(tensor, name)
        full = gather(tensor)
        if not write:
            continue
        if kind == "mask":
            stored[name], encoding = pack_mask(full, name)
        else:
            dense, encoding = full.to("cpu").contiguous(), "dense"
            storage = dense.untyped_storage().data_ptr()
            # safetensors refuses tensors that share memory.
            stored[name] = dense.clone() if storage in storages else dense
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
    with atomic_path(path) as temporary:
        save_file(stored, str(temporary), metadata={HEADER_KEY: json.dumps(asdict(header))})
    return Path(path)


def read_header(path: str | Path) -> VectorHeader:
    """Reads and checks the header of a vector file without its tensors.

    Raises:
        StoreError: The file is missing, truncated, not a safetensors file, without a header, or of a newer format.
    """
    return _opened(path, lambda file, header: header)


def load_vectors(path: str | Path, module: nn.Module | None = None) -> tuple[ParameterVector, VectorHeader]:
    """Loads a vector that :func:`save_vectors` wrote.

    Args:
        path: The file.
        module: When given, names, shapes and model class are checked against it, and each tensor takes the layout and
            device of its parameter. Otherwise plain CPU tensors.

    Returns:
        The vector and its header.

    Raises:
        StoreError: The file is broken, or belongs to another model; the first difference is named.
    """

    def read(file: Any, header: VectorHeader) -> ParameterVector:
        space, stored = header.space(), set(file.keys())
        if stored != set(space.names):
            different = sorted(stored ^ set(space.names))
            raise StoreError(f"{path}: header and tensors name different parameters, first {different[0]!r}")
        references = {} if module is None else _references(path, header, space, module)
        tensors = {}
        for name, shape, encoding in zip(space.names, space.shapes, header.encodings, strict=True):
            raw = file.get_tensor(name)
            full = raw if encoding == "dense" else unpack_mask(raw, shape, encoding, f"{path}: {name}")
            if full.shape != shape:
                stored_shape = tuple(full.shape)
                raise StoreError(f"{path}: {name} is stored with shape {stored_shape}, its header says {tuple(shape)}")
            tensors[name] = scatter_like(references[name], full) if references else full
        return ParameterVector(space, tensors)

    header = read_header(path)
    return _opened(path, read), header


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
        full = gather(tensor).cpu().contiguous()
        digest.update(f"{name}\0{tuple(full.shape)}\0{full.dtype}\0".encode())
        # NumPy knows no bfloat16; the bytes do not care.
        digest.update(full.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _opened(path: str | Path, read: Callable[[Any, VectorHeader], Any]) -> Any:
    if not Path(path).is_file():
        raise StoreError(f"{path}: no such file")
    try:
        with safe_open(str(path), framework="pt") as file:
            return read(file, _parse_header(path, file.metadata()))
    except SafetensorError as error:
        raise StoreError(f"{path}: not a whole safetensors file ({error}); pickled files are never read") from error


def _parse_header(path: str | Path, metadata: Mapping[str, str] | None) -> VectorHeader:
    text = (metadata or {}).get(HEADER_KEY)
    if text is None:
        raise StoreError(f"{path}: a safetensors file without the header that save_vectors writes")
    try:
        fields = json.loads(text)
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise StoreError(f"{path}: format version {version}; this release reads version {FORMAT_VERSION}")
        header = VectorHeader(**fields)
        _check_fields(path, header)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: malformed header ({type(error).__name__}: {error})") from error
    return header


def _check_fields(path: str | Path, header: VectorHeader) -> None:
    texts = (header.names, header.dtypes, header.encodings)
    if not all(isinstance(item, str) for items in texts for item in items):
        raise TypeError("names, dtypes and encodings are lists of strings")
    if not all(type(length) is int and length >= 0 for shape in header.shapes for length in shape):
        raise TypeError("shapes are lists of lengths")
    if len({*map(len, texts), len(header.shapes)}) != 1 or len(set(header.names)) != len(header.names):
        raise StoreError(f"{path}: the header's lists of names, shapes, dtypes and encodings do not match")
    if header.kind not in KINDS:
        raise StoreError(f"{path}: unknown kind {header.kind!r}; {suggestion(str(header.kind), KINDS)}")
    for name, encoding in zip(header.names, header.encodings, strict=True):
        if (encoding == "dense") == (header.kind == "mask"):
            raise StoreError(f"{path}: {name} is stored as {encoding}, which no {header.kind} is")
    header.space()


def _references(path: Any, header: VectorHeader, space: ParameterSpace, module: nn.Module) -> dict[str, nn.Parameter]:
    if header.model_class != model_class(module):
        raise StoreError(f"{path}: written for {header.model_class}, the model is {model_class(module)}")
    try:
        return space.resolve(module)
    except SpaceError as error:
        raise StoreError(f"{path}: {error}") from error


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None) if isinstance(name, str) else None
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name!r} is no dtype")
    return dtype
