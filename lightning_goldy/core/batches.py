"""Batches of any nesting: mapped, cut into samples, searched for tensors."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor


def split_batch(batch: Any) -> Iterator[Any]:
    """Cuts a batch along its first dimension into batches of one, as :func:`take_samples` does.

    Raises:
        ValueError: The batch holds no tensor, or tensors of different lengths.

    Example:
        >>> import torch
        >>> [part["x"].shape for part in split_batch({"x": torch.zeros(2, 3)})]
        [torch.Size([1, 3]), torch.Size([1, 3])]
    """
    for index in range(batch_length(batch)):
        yield take_samples(batch, slice(index, index + 1))


def batch_length(batch: Any) -> int:
    """Number of samples of a batch: the first dimension of its tensors, but for those of length 1, which serve all.

    Where lists hold tensors, or dicts of tensors, of different sizes, one for each sample (as collated for detection),
    it is the length of the lists, with which the first dimension of all other tensors must agree.

    Raises:
        ValueError: The batch holds no tensor, or tensors of different lengths.

    Example:
        >>> import torch
        >>> batch_length({"input_ids": torch.zeros(4, 7), "position_ids": torch.arange(7)[None]})
        4
        >>> boxes = [{"boxes": torch.zeros(3, 4)}, {"boxes": torch.zeros(1, 4)}]
        >>> batch_length(([torch.zeros(3, 8, 8), torch.zeros(3, 6, 8)], boxes))
        2
    """
    listed, shared = _listed_length(batch), _shared_length(batch)
    if listed is None and shared is None:
        shapes = [tuple(tensor.shape) for tensor in batch_tensors(batch)]
        raise ValueError(
            f"a batch's tensors must share their first dimension; found shapes {shapes} in a {type(batch).__name__}"
        )
    return int(shared if listed is None else listed)  # type: ignore[arg-type]


def _shared_length(value: Any) -> int | None:
    """The first dimension of all tensors but those of length 1; None where there is no such one."""
    lengths = {tuple(tensor.shape[:1]) for tensor in batch_tensors(value)}
    if len(lengths) > 1:
        lengths.discard((1,))
    return lengths.pop()[0] if len(lengths) == 1 and lengths != {()} else None


def _listed_length(batch: Any) -> int | None:
    """The length of lists with an entry for each sample; None where the first dimension of tensors tells."""
    lists: list[Any] = []
    others: list[Tensor] = []
    _collect(batch, lists, others, outermost=True)
    told = {len(items) for items in lists if not isinstance(items[0], Tensor) or _shared_length(items) is None}
    if len(told) != 1:
        return None
    (length,) = told
    others += [tensor for items in lists if len(items) != length for tensor in items if isinstance(tensor, Tensor)]
    if any(tuple(tensor.shape[:1]) not in ((length,), (1,)) for tensor in others):
        return None
    if any(len(items) != length and not isinstance(items[0], Tensor) for items in lists):
        return None
    shared = _shared_length(batch)
    if shared is None or (shared != length and any(isinstance(items[0], Tensor) for items in lists)):
        return length
    # Views of one batch in a list agree in every tensor; what belongs to single samples seldom does.
    return None if all(len(tensor) == shared for items in lists for tensor in batch_tensors(items)) else length


def _collect(value: Any, lists: list[Any], others: list[Tensor], *, outermost: bool = False) -> None:
    if isinstance(value, Tensor):
        others.append(value)
    elif _is_list_of_samples(value, outermost=outermost):
        lists.append(value)
    else:
        for part in _parts(value) or ():
            _collect(part, lists, others)


def _is_list_of_samples(value: Any, *, outermost: bool) -> bool:
    """Whether a list could have an entry with tensors for each sample.

    The batch itself is one only where an entry cannot be a batch of its own, as of several loaders.
    """
    if not isinstance(value, (list, tuple)) or hasattr(value, "_fields") or not value:
        return False
    if all(isinstance(item, Tensor) for item in value):
        return not outermost
    held = all(isinstance(item, Mapping) or _attributes(item) is not None for item in value)
    if not held or any(next(batch_tensors(item), None) is None for item in value):
        return False
    return not outermost or any(_shared_length(item) is None for item in value)


def is_divisible(batch: Any) -> bool:
    """Whether the batch's tensors agree on its number of samples."""
    try:
        batch_length(batch)
    except ValueError:
        return False
    return True


def sample_count(batch: Any) -> int:
    """Number of samples, also of a batch that cannot be cut: the first dimension of its first tensor, 1 without any.

    Example:
        >>> import torch
        >>> sample_count((torch.zeros(4, 2), torch.tensor(0.5))), sample_count(["text"])
        (4, 1)
    """
    if is_divisible(batch):
        return batch_length(batch)
    first = next(batch_tensors(batch), None)
    return len(first) if first is not None and first.ndim else 1


def sample_keys(batch: Any) -> list[str]:
    """A short hash of each sample's tensors, by which the values of two runs are paired; one of an undivided batch.

    Floats are hashed by their values, whatever their precision.

    Example:
        >>> import torch
        >>> keys = sample_keys({"x": torch.tensor([[1, 2], [3, 4], [1, 2]])})
        >>> keys[0] == keys[2] != keys[1], len(keys[0])
        (True, 12)
    """
    batch = move_batch(batch, torch.device("cpu"))
    keys = []
    for sample in split_batch(batch) if is_divisible(batch) else [batch]:
        digest = hashlib.blake2b(digest_size=6)
        for tensor in batch_tensors(sample):
            values = (tensor.double() if tensor.is_floating_point() else tensor).detach().contiguous()
            digest.update(f"{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
        keys.append(digest.hexdigest())
    return keys


def take_samples(batch: Any, rows: slice | Tensor) -> Any:
    """Some samples of a batch.

    Tensors and arrays are indexed along their first dimension, and so is a list or tuple of other values (texts, names)
    that has one for each sample, also one of tensors or dicts where :func:`batch_length` goes by it. A tensor whose
    first dimension is 1 serves all samples, as do scalars, and stays.

    Args:
        batch: The batch, of any nesting.
        rows: A slice, or indices of shape ``[n]``.

    Raises:
        ValueError: The batch holds no tensor, or tensors of different lengths.

    Example:
        >>> import torch
        >>> take_samples({"x": torch.arange(3), "text": ["a", "b", "c"], "scale": 0.5}, slice(1, None))
        {'x': tensor([1, 2]), 'text': ['b', 'c'], 'scale': 0.5}
    """
    listed = _listed_length(batch)
    if listed is not None and _is_list_of_samples(batch, outermost=True):
        return _indexed(batch, rows)
    return _take(batch, rows, batch_length(batch), listed=listed is not None)


def _take(value: Any, rows: slice | Tensor, length: int, *, listed: bool) -> Any:
    if isinstance(value, Tensor):
        if len(value) != length:
            return value
        return value[rows] if isinstance(rows, slice) else value[rows.to(value.device)]
    if isinstance(value, np.ndarray):
        if value.shape[:1] != (length,):
            return value
        return value[rows if isinstance(rows, slice) else rows.cpu().numpy()]
    if _is_per_sample(value, length):
        return _indexed(value, rows)
    if listed and _is_list_of_samples(value, outermost=False) and len(value) == length:
        return _indexed(value, rows)
    return _rebuilt(value, lambda part: _take(part, rows, length, listed=listed))


def _indexed(value: Any, rows: slice | Tensor) -> Any:
    indices = range(len(value))[rows] if isinstance(rows, slice) else rows.tolist()
    return type(value)([value[index] for index in indices])


def _is_per_sample(value: Any, length: int) -> bool:
    if not isinstance(value, (list, tuple)) or hasattr(value, "_fields") or len(value) != length:
        return False
    if any(True for _ in batch_tensors(value)) or any(isinstance(item, np.ndarray) for item in value):
        return False
    # Columns of as many entries as there are samples, as collating pairs of texts gives.
    return not all(isinstance(item, (list, tuple)) and len(item) == length for item in value)


def map_batch(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies a function to every tensor of a batch, whose structure and types stay; other values pass through.

    Looks into mappings, lists, tuples, named tuples, dataclasses, and objects of any class with a method ``to``, as
    Lightning moves them. What is given is not changed.

    Raises:
        ValueError: An object with a method ``to`` keeps what it holds out of reach.

    Example:
        >>> import torch
        >>> map_batch({"x": torch.ones(2), "text": "a"}, lambda tensor: tensor + 1)
        {'x': tensor([2., 2.]), 'text': 'a'}
    """
    if isinstance(batch, Tensor):
        return function(batch)
    return _rebuilt(batch, lambda part: map_batch(part, function))


def move_batch(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on a device."""
    return map_batch(batch, lambda tensor: tensor.to(device))


def batch_tensors(batch: Any) -> Iterator[Tensor]:
    """Every tensor of a batch, wherever :func:`map_batch` looks."""
    if isinstance(batch, Tensor):
        yield batch
        return
    for part in _parts(batch) or ():
        yield from batch_tensors(part)


def _rebuilt(value: Any, function: Callable[[Any], Any]) -> Any:
    if isinstance(value, Mapping):
        return _rebuilt_mapping(value, function)
    if isinstance(value, (list, tuple, deque)):
        parts = [function(item) for item in value]
        # A named tuple's class takes its fields one by one, and may have a constructor of its own.
        return type(value)._make(parts) if hasattr(value, "_make") else type(value)(parts)
    names = _attributes(value)
    if names is None:
        if callable(getattr(value, "to", None)) and not isinstance(value, type):
            raise ValueError(
                f"a batch holds a {type(value).__qualname__}, whose tensors cannot be reached: give tensors in a dict, "
                "list, tuple, dataclass or an object with attributes"
            )
        return value
    rebuilt = copy.copy(value)
    for name in names:
        # Also of frozen dataclasses, and without what a setter would do.
        object.__setattr__(rebuilt, name, function(getattr(value, name)))
    return rebuilt


def _rebuilt_mapping(value: Mapping[Any, Any], function: Callable[[Any], Any]) -> Any:
    parts = {key: function(item) for key, item in value.items()}
    if type(value) is dict or not isinstance(value, MutableMapping):
        return parts
    if isinstance(value, defaultdict):
        return defaultdict(value.default_factory, parts)
    rebuilt = copy.copy(value)
    for key, part in parts.items():
        rebuilt[key] = part
    return rebuilt


def _parts(value: Any) -> list[Any] | None:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple, deque)):
        return list(value)
    names = _attributes(value)
    return None if names is None else [getattr(value, name) for name in names]


def _attributes(value: Any) -> list[str] | None:
    """The attributes of an object that is a batch, None of any other value."""
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value) if hasattr(value, field.name)]
    if not callable(getattr(value, "to", None)) or isinstance(value, torch.nn.Module):
        return None
    return list(vars(value)) if hasattr(value, "__dict__") else None
