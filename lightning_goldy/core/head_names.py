"""Attention heads by name: pairs of a layer and a head."""

from __future__ import annotations

from collections.abc import Iterable

Head = tuple[int, int]
"""A head: (layer, head), both from 0."""


class HeadError(ValueError):
    """A head does not exist, is named twice, or must not be closed or opened now; the message names it."""


def check_heads(heads: Iterable[Head], heads_per_layer: tuple[int, ...]) -> tuple[Head, ...]:
    """The heads as pairs of integers, in the given order.

    Args:
        heads: (layer, head) pairs.
        heads_per_layer: Number of heads of each layer.

    Raises:
        HeadError: A head is no such pair, does not exist, or is named twice.

    Example:
        >>> check_heads([(0, 1), (2, 0)], (2, 2))
        Traceback (most recent call last):
        lightning_goldy.core.head_names.HeadError: there is no head (2, 0): the model has 2 layers of 2 heads, from 0
    """
    checked: dict[Head, None] = {}
    for pair in heads:
        parts = tuple(pair) if isinstance(pair, (tuple, list)) else ()
        if len(parts) != 2 or not all(isinstance(part, int) and not isinstance(part, bool) for part in parts):
            raise HeadError(f"a head is a pair (layer, head) of integers; got {pair!r}")
        layer, head = parts
        if not (0 <= layer < len(heads_per_layer) and 0 <= head < heads_per_layer[layer]):
            raise HeadError(f"there is no head {parts}: the model has {described_heads(heads_per_layer)}, from 0")
        if parts in checked:
            raise HeadError(f"head {parts} is named twice")
        checked[layer, head] = None
    return tuple(checked)


def described_heads(sizes: tuple[int, ...]) -> str:
    """How many heads a model has, for messages.

    Example:
        >>> described_heads((4, 4)), described_heads((4, 3))
        ('2 layers of 4 heads', '2 layers of 4, 3 heads')
    """
    if len(set(sizes)) == 1:
        return f"{len(sizes)} layers of {sizes[0]} heads"
    return f"{len(sizes)} layers of {', '.join(map(str, sizes))} heads"
