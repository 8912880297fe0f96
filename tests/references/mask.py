"""Masks as Python sets of (name, index), the obvious way."""

from __future__ import annotations

from itertools import product

from lightning_goldy.core import ParameterVector

Element = tuple[str, tuple[int, ...]]


def elements(mask: ParameterVector) -> set[Element]:
    """The elements of a mask."""
    return {element for element in universe(mask) if bool(mask[element[0]][element[1]])}


def universe(mask: ParameterVector) -> set[Element]:
    """All elements of the mask's space."""
    return {(name, index) for name in mask for index in product(*map(range, mask.space.shape(name)))}
