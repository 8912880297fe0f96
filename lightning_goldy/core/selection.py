"""Exact selection of the k largest elements, over plain tensors and shards, without sorting."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_goldy.core.sharding import (
    gather,
    holds_whole_rows,
    is_sharded,
    local,
    local_box,
    scatter_like,
    sum_over_shards,
)

# Elements looked at to bracket the k-th largest, and the width of the bracket in standard deviations. It is checked by
# counting, so a bad one costs time and never correctness; one in a thousand is bad. Neighbours that are alike tell less
# than as many others: then a wider one costs a look at all, and a partition of all twice their memory.
_PROBES, _SIGMAS = 1 << 13, (3.3, 15.0)
_LEAST_STRIDE = 64
_SMALL = 1 << 14
_TIE_CHUNK = 1 << 20
_CACHED = 1 << 17
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
    if len(scores) == 1 and not is_sharded(scores[0]) and _in_numpy(scores[0]):
        # What most of them are asked as; of small tensors all the rest takes longer than the choice.
        (mask,) = _chosen([scores[0].detach().numpy().reshape(-1)], k)
        return [torch.from_numpy(mask.reshape(scores[0].shape))]
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in scores))
    if any(is_sharded(tensor) for tensor in scores):
        return _select_sharded([tensor.detach().to(dtype) for tensor in scores], k)
    flats = [tensor.detach().to(dtype).reshape(-1) for tensor in scores]
    if all(map(_in_numpy, flats)):
        chosen = _chosen([flat.numpy() for flat in flats], k)
        return [torch.from_numpy(mask).view(tensor.shape) for mask, tensor in zip(chosen, scores, strict=True)]
    threshold = kth_largest(torch.cat(flats) if len(flats) > 1 else flats[0], k)
    masks = [flat > threshold for flat in flats]
    _add_ties(masks, flats, threshold, k - sum(int(mask.count_nonzero()) for mask in masks))
    return [mask.view(tensor.shape) for mask, tensor in zip(masks, scores, strict=True)]


def select_largest_of_each(scores: Tensor, k: int) -> Tensor:
    """Marks exactly the k largest elements of every slice along the first dimension, such as each of stacked experts.

    Args:
        scores: Real, plain or DTensor, without NaN, shape ``[E, ...]``.
        k: Number of elements of each slice, from 1 to all.

    Returns:
        This process's part of a boolean mask. Ties go to the smaller index.

    Raises:
        ValueError: k is out of range.

    Example:
        >>> select_largest_of_each(torch.tensor([[1.0, 3.0, 3.0], [9.0, 7.0, 8.0]]), 1).tolist()
        [[False, True, False], [True, False, False]]
    """
    if is_sharded(scores) and not holds_whole_rows(scores):
        return local(scatter_like(scores, select_largest_of_each(gather(scores), k)))
    rows = local(scores)
    return torch.stack([select_largest([row], k)[0] for row in rows]) if len(rows) else rows.bool()


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest element of a flat tensor, by partial selection rather than a sort.

    Example:
        >>> kth_largest(torch.tensor([4.0, 1.0, 3.0]), 2)
        tensor(3.)
    """
    if _in_numpy(values):
        place = values.numel() - k
        return torch.from_numpy(np.partition(values.numpy(), place)[place : place + 1])[0]
    if values.is_cuda:
        # There kthvalue works a flat tensor with a single thread block; topk spreads over the device.
        return values.topk(k, sorted=False).values.amin()
    return values.kthvalue(values.numel() - k + 1).values


def _in_numpy(values: Tensor) -> bool:
    """On the CPU NumPy selects, compares and counts several times as fast as torch, and on one thread."""
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)


def _chosen(flats: Sequence[NDArray[Any]], k: int) -> list[NDArray[np.bool_]]:
    """Marks the k largest of flat arrays, each of one dtype."""
    if sum(flat.size for flat in flats) > _SMALL:
        for sigmas in _SIGMAS:
            if (masks := _bracketed(flats, k, sigmas)) is not None:
                return masks
    return _partitioned(flats, k)


def _partitioned(flats: Sequence[NDArray[Any]], k: int) -> list[NDArray[np.bool_]]:
    """Selects after a partition of everything: short, and dear for many elements."""
    values = _joined(flats)
    threshold = np.partition(values, values.size - k)[values.size - k]
    masks = [flat >= threshold for flat in flats]
    if sum(map(np.count_nonzero, masks)) == k:
        return masks
    masks = [flat > threshold for flat in flats]
    _add_ties(masks, flats, threshold, k - sum(map(np.count_nonzero, masks)))
    return masks


def _bracketed(flats: Sequence[NDArray[Any]], k: int, sigmas: float) -> list[NDArray[np.bool_]] | None:
    """Selects among the few elements between two probes near the k-th largest; None when that is not between them.

    The second probe is chosen by how many exceed the first, so that the bracket is several times as narrow as one of
    two probes that are chosen at once.
    """
    total = sum(flat.size for flat in flats)
    # An odd stride does not fall into step with the rows of a matrix, whose lengths are even.
    stride = max(_LEAST_STRIDE, total // _PROBES) | 1
    probes = _joined([flat[::stride] for flat in flats])
    # Descending, of the probes those that matter: the guess, and what a step away from it may need.
    guess = min(k * probes.size // total, probes.size - 1)
    most = min(probes.size, guess + 2 + math.ceil(2 * sigmas * math.sqrt(guess + 1)))
    best = np.sort(np.partition(probes, probes.size - most)[probes.size - most :])[::-1]
    first = best[guess]
    above = [flat > first for flat in flats]
    missing = k - sum(map(np.count_nonzero, above))
    if not missing:
        return above
    step = abs(missing) / stride
    step = math.ceil(step + sigmas * math.sqrt(step + 1))
    if missing > 0:
        # The first probe bounds from above; a bracket of equal probes holds what equals them.
        second = best[min(guess + step, most - 1)]
        if second == first:
            # Mostly the zeros of embedding rows that the sample does not use.
            return above if _add_ties(above, flats, first, missing) else None
        positions = [_between(flat, mask, np.greater_equal, second) for flat, mask in zip(flats, above, strict=True)]
    else:
        # What equals the second probe lies within.
        second = best[guess - step] if guess >= step else np.inf
        positions = [_between(flat, mask, np.greater, second) for flat, mask in zip(flats, above, strict=True)]
        missing += sum(where.size for where in positions)
    return above if _add_largest(above, flats, positions, missing) else None


def _between(flat: NDArray[Any], above: NDArray[np.bool_], compare: np.ufunc, bound: Any) -> NDArray[np.int64]:
    """Positions at which a comparison says otherwise than a mask, which gets what it says where that is no."""
    positions = [np.empty(0, dtype=np.int64)]
    # In pieces that stay in the cache, because each is looked at several times.
    for start in range(0, flat.size, _CACHED):
        here = above[start : start + _CACHED].view(np.uint8)
        found = compare(flat[start : start + _CACHED], bound).view(np.uint8)
        # As bytes, whose exclusive or is vectorised and that of booleans is not.
        between = here ^ found
        here &= found
        positions.append(true_positions(between.view(np.bool_)) + start)
    return _joined(positions)


def _add_largest(
    masks: Sequence[NDArray[np.bool_]],
    flats: Sequence[NDArray[Any]],
    positions: Sequence[NDArray[np.int64]],
    wanted: int,
) -> bool:
    """Marks the ``wanted`` largest of those at ascending positions, too; False when that are not so many."""
    if not 0 <= wanted <= sum(where.size for where in positions):
        return False
    if wanted:
        values = _joined([flat[where] for flat, where in zip(flats, positions, strict=True)])
        threshold = np.partition(values, values.size - wanted)[values.size - wanted]
        chosen = values > threshold
        # The first ties are those with the smallest indices.
        chosen[np.flatnonzero(values == threshold)[: wanted - np.count_nonzero(chosen)]] = True
        ends = np.cumsum([where.size for where in positions])[:-1]
        for mask, where, mine in zip(masks, positions, np.split(chosen, ends), strict=True):
            mask[where[mine]] = True
    return True


def _joined(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _add_ties(masks: Sequence[Any], flats: Sequence[Any], threshold: Any, wanted: int) -> bool:
    """Marks the first ``wanted`` elements that equal the threshold; False when there are fewer."""
    for mask, flat in zip(masks, flats, strict=True):
        for start in range(0, len(flat), _TIE_CHUNK):
            if not wanted:
                return True
            equal = flat[start : start + _TIE_CHUNK] == threshold
            first = (np.flatnonzero(equal) if isinstance(equal, np.ndarray) else equal.nonzero().flatten())[:wanted]
            mask[first + start] = True
            wanted -= len(first)
    return not wanted


def true_positions(flags: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Ascending positions of the true elements of a flat mask, quick where they are few.

    Example:
        >>> true_positions(np.arange(20) % 9 == 4).tolist()
        [4, 13]
    """
    whole = flags.size - flags.size % 8
    # Eight booleans are one integer, so runs of false are passed over eight at a time.
    words = flags[:whole].view(np.int64)
    filled = np.flatnonzero(words != 0)
    inside = np.flatnonzero(words[filled].view(np.bool_))
    head = filled[inside >> 3] * 8 + (inside & 7)
    return np.concatenate([head, np.flatnonzero(flags[whole:]) + whole])


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
        bins = [
            ((key - prefix) >> shift) if shift + digit < bits else ((key >> shift) - (prefix >> shift)) for key in alive
        ]
        histograms = [torch.bincount(digits.long(), minlength=1 << digit) for digits in bins]
        counts = torch.stack(sum_over_shards(histograms, layouts)).sum(dim=0).flip(0).cumsum(0).cpu()  # from the top
        position = int(torch.searchsorted(counts, k - above))
        before = int(counts[position - 1]) if position else 0
        chosen = (1 << digit) - 1 - position
        equal, above = int(counts[position]) - before, above + before
        alive = [key[digits == chosen] for key, digits in zip(alive, bins, strict=True)]
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
