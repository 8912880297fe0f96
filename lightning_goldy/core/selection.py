"""Exact selection of the k largest elements, over plain tensors and shards, without sorting."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_goldy.core.sharding import is_sharded, local, local_box, sum_over_shards

# Elements looked at to bracket the k-th largest. The bracket is checked by counting, so a bad one costs time and never
# correctness; at four sigmas 2^15 probes bracket a 5 % quantile within 1 % of the elements, 2^13 within 2 %.
_PROBES = 1 << 15
_LEAST_STRIDE = 128
_SMALL = 1 << 14
_TIE_CHUNK = 1 << 20
_DIGIT = 11


def select_largest(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """Marks exactly the k largest elements of several tensors taken together.

    Args:
        scores: Real tensors, plain or DTensor, without NaN. Different dtypes are compared in their common dtype.
        k: Number of elements, from 1 to the total number.

    Returns:
        This process's part of a boolean mask for each tensor. Ties go to the earlier tensor and the smaller global
        (row-major) index.

    Raises:
        ValueError: k is out of range.

    Example:
        >>> select_largest([torch.tensor([1.0, 3.0, 2.0, 3.0])], 2)[0].tolist()
        [False, True, False, True]
        >>> select_largest([torch.tensor([1.0, 1.0]), torch.tensor([1.0, 5.0])], 2)[0].tolist()
        [True, False]
    """
    total = sum(tensor.numel() for tensor in scores)
    if not 1 <= k <= total:
        raise ValueError(f"k must lie between 1 and the {total} elements; got {k}")
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in scores))
    if any(is_sharded(tensor) for tensor in scores):
        return _select_sharded([tensor.detach().to(dtype) for tensor in scores], k)
    flats = [tensor.detach().to(dtype).reshape(-1) for tensor in scores]
    masks = _bracketed(flats, k) if total > _SMALL else None
    if masks is None:
        threshold = kth_largest(torch.cat(flats) if len(flats) > 1 else flats[0], k)
        masks = [flat > threshold for flat in flats]
        _add_ties(masks, flats, threshold, k - _count(masks))
    return [mask.view(tensor.shape) for mask, tensor in zip(masks, scores, strict=True)]


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest element of a flat tensor, by partial selection rather than a sort.

    Example:
        >>> kth_largest(torch.tensor([4.0, 1.0, 3.0]), 2)
        tensor(3.)
    """
    if values.is_cuda:
        # There kthvalue works a flat tensor with a single thread block; topk spreads over the device.
        return values.topk(k, sorted=False).values.amin()
    return values.kthvalue(values.numel() - k + 1).values


def _bracketed(flats: Sequence[Tensor], k: int) -> list[Tensor] | None:
    """Selects among the few elements inside a bracket around the k-th largest; None when the bracket misses it."""
    total = sum(flat.numel() for flat in flats)
    # An odd stride does not fall into step with the rows of a matrix, whose lengths are even.
    stride = max(_LEAST_STRIDE, total // _PROBES) | 1
    probes = torch.cat([flat[::stride] for flat in flats])
    count, share = probes.numel(), k / total
    margin = 4 * math.sqrt(share * (1 - share) / count) + 1 / count
    high = kth_largest(probes, max(1, math.floor((share - margin) * count)))
    low = kth_largest(probes, min(count, math.ceil((share + margin) * count)))
    masks = [_above(flat, high) for flat in flats]
    wanted = k - _count(masks)
    if wanted <= 0:
        return None
    if bool(low == high):
        # Mostly the zeros of embedding rows that the sample does not use.
        return masks if _add_ties(masks, flats, high, wanted) else None
    inside = [_above(flat, low, equal=True).logical_xor_(mask) for flat, mask in zip(flats, masks, strict=True)]
    if not wanted <= _count(inside) <= total // 4:
        return None
    positions = [true_positions(each) for each in inside]
    values = torch.cat([flat[where] for flat, where in zip(flats, positions, strict=True)])
    threshold = kth_largest(values, wanted)
    chosen = values > threshold
    # The positions ascend, so the first ties are those with the smallest indices.
    ties = (values == threshold).nonzero().flatten()[: wanted - int(chosen.count_nonzero())]
    chosen[ties] = True
    for mask, where, mine in zip(masks, positions, chosen.split([len(each) for each in positions]), strict=True):
        mask[where[mine]] = True
    return masks


# On the CPU NumPy compares and counts three times as fast as torch, on one thread.
def _above(flat: Tensor, bound: Tensor, *, equal: bool = False) -> Tensor:
    if flat.device.type != "cpu" or flat.dtype not in (torch.float32, torch.float64):
        return flat >= bound if equal else flat > bound
    compare = np.greater_equal if equal else np.greater
    return torch.from_numpy(compare(flat.numpy(), bound.numpy()))


def _count(masks: Sequence[Tensor]) -> int:
    return sum(
        int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.count_nonzero()) for mask in masks
    )


def _add_ties(masks: Sequence[Tensor], flats: Sequence[Tensor], threshold: Tensor, wanted: int) -> bool:
    """Marks the first ``wanted`` elements that equal the threshold; False when there are fewer."""
    for mask, flat in zip(masks, flats, strict=True):
        for start in range(0, flat.numel(), _TIE_CHUNK):
            if not wanted:
                return True
            first = (flat[start : start + _TIE_CHUNK] == threshold).nonzero().flatten()[:wanted]
            mask[first + start] = True
            wanted -= first.numel()
    return not wanted


def true_positions(mask: Tensor) -> Tensor:
    """Ascending positions of the true elements of a flat mask, quick where they are few.

    Example:
        >>> true_positions(torch.arange(20) % 9 == 4).tolist()
        [4, 13]
    """
    if mask.storage_offset() % 8:
        return mask.nonzero().flatten()
    whole = mask.numel() - mask.numel() % 8
    # Eight booleans are one integer, so runs of false are passed over eight at a time.
    words = mask[:whole].view(torch.int64).nonzero().flatten()  # [words with any]
    row, column = mask[:whole].view(-1, 8)[words].nonzero(as_tuple=True)
    return torch.cat([words[row] * 8 + column, mask[whole:].nonzero().flatten() + whole])


def _select_sharded(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    """The same over shards: radix selection on order-preserving bit patterns, three small sums per call."""
    parts = [local(tensor).contiguous() for tensor in scores]
    keys = [_ordered_bits(part).reshape(-1) for part in parts]
    bits = 64 if parts[0].dtype == torch.float64 else 32
    threshold, above, equal = _kth_key(keys, scores, k, bits)
    chosen = [key > threshold if above + equal != k else key >= threshold for key in keys]
    if above + equal != k:
        tied = [(key == threshold).nonzero().flatten() for key in keys]
        offset, indices = 0, []
        for tensor, where in zip(scores, tied, strict=True):
            # Counted down, so that the smallest global index is the largest key.
            indices.append(_LAST_INDEX - (_global_index(tensor, where) + offset))
            offset += tensor.numel()
        last, _, _ = _kth_key(indices, scores, k - above, 64)
        for mask, where, index in zip(chosen, tied, indices, strict=True):
            mask[where[index >= last]] = True
    return [mask.reshape(part.shape) for mask, part in zip(chosen, parts, strict=True)]


_LAST_INDEX = (1 << 62) - 1


def _ordered_bits(values: Tensor) -> Tensor:
    """Integers in the order of the floats."""
    if values.dtype == torch.float64:
        pattern, low = values.contiguous().view(torch.int64), (1 << 63) - 1
    else:
        pattern, low = values.float().contiguous().view(torch.int32), (1 << 31) - 1
    negative = pattern < 0
    # -0.0 equals 0.0 and must have the same key.
    return torch.where(values == 0, 0, torch.where(negative, pattern ^ low, pattern))


def _kth_key(keys: Sequence[Tensor], layouts: Sequence[Tensor], k: int, bits: int) -> tuple[int, int, int]:
    """The k-th largest signed integer over all shards, how many exceed it, and how many equal it."""
    above, shift, prefix, equal = 0, bits, -1 << (bits - 1), 0
    alive = list(keys)
    while shift > 0:
        digit = min(_DIGIT, shift)
        shift -= digit
        # [tensors, 2^digit]: how many candidates carry each digit next
        bins = [((key - prefix) >> shift) if shift + digit < bits else ((key >> shift) - (prefix >> shift)) for key in alive]
        histograms = [torch.bincount(each.long(), minlength=1 << digit) for each in bins]
        counts = torch.stack(sum_over_shards(histograms, layouts)).sum(dim=0).flip(0).cumsum(0).cpu()  # from the top
        position = int(torch.searchsorted(counts, k - above))
        before = int(counts[position - 1]) if position else 0
        chosen = (1 << digit) - 1 - position
        equal, above = int(counts[position]) - before, above + before
        alive = [key[each == chosen] for key, each in zip(alive, bins, strict=True)]
        prefix += chosen << shift
    return prefix, above, equal


def _global_index(tensor: Tensor, where: Tensor) -> Tensor:
    """Row-major index in the global tensor of flat positions in this process's part."""
    shape, offset = local_box(tensor)
    index, remaining = torch.zeros_like(where), where
    stride = 1
    for dimension in reversed(range(tensor.ndim)):
        length = max(shape[dimension], 1)
        index = index + (remaining % length + offset[dimension]) * stride
        remaining = remaining // length
        stride *= tensor.shape[dimension]
    return index
