"""Masks in few bytes: a bit per element, or the indices of those that are set."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lightning_goldy.core.files import StoreError
from lightning_goldy.core.naming import suggestion


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
