"""Batches of any nesting: cut into samples, mapped, searched for tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from typing import Any

from torch import Tensor


def split_batch(batch: Any) -> Iterator[Any]:
    """Cuts every tensor of a batch along its first dimension into batches of one.

    Raises:
        ValueError: The batch holds no tensor, or tensors of different lengths.

    Example:
        >>> import torch
        >>> [part["x"].shape for part in split_batch({"x": torch.zeros(2, 3)})]
        [torch.Size([1, 3]), torch.Size([1, 3])]
    """
    for index in range(batch_length(batch)):
        yield map_batch(batch, itemgetter(slice(index, index + 1)))


def batch_length(batch: Any) -> int:
    """Number of samples of a batch.

    Raises:
        ValueError: The batch holds no tensor, or tensors of different lengths.
    """
    shapes = [tuple(tensor.shape) for tensor in batch_tensors(batch)]
    if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
        raise ValueError(f"a batch's tensors must share their first dimension; found shapes {shapes}")
    return shapes[0][0]


def map_batch(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies a function to every tensor of nested dicts, lists and tuples; other values pass through."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_batch(value, function) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = [map_batch(value, function) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def batch_tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor in nested dicts, lists and tuples."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (Mapping, list, tuple)):
        values: Iterable[Any] = batch.values() if isinstance(batch, Mapping) else batch
        for value in values:
            yield from batch_tensors(value)
