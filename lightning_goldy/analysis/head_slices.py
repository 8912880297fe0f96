"""The weights that closed or regrown heads own, merged parameter by parameter, on whole and on sharded tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_goldy.core.architecture import Architecture, Block, HeadProjection, ParameterSlice
from lightning_goldy.core.gates import Head
from lightning_goldy.core.sharding import local, local_box

Role = Literal["query", "key", "value", "output"]

# Copying neighbours is several times quicker than by index on CPUs; elsewhere every copy is a launch, and one is best.
_BY_RUNS = ("cpu",)


@dataclass(frozen=True)
class ParameterRows:
    """Indices along one dimension of one parameter.

    Args:
        name: Canonical name within the model.
        parameter: The parameter; a DTensor when sharded.
        dim: The dimension.
        index: Global indices, ascending, shape ``[n]``.

    Example:
        >>> rows = ParameterRows("weight", nn.Parameter(torch.eye(3)), 0, torch.tensor([2]))
        >>> rows.read(rows.parameter)
        tensor([[0., 0., 1.]])
    """

    name: str
    parameter: nn.Parameter
    dim: int
    index: Tensor

    def read(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """This process's part of these rows of a tensor in the parameter's layout; a copy, in ``out`` when given."""
        part = local(tensor)
        if part.device.type in _BY_RUNS and self._runs:
            return torch.cat([part.narrow(self.dim, *run) for run in self._runs], dim=self.dim, out=out)
        return torch.index_select(part, self.dim, self._inside.to(part.device), out=out)

    @torch.no_grad()
    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Copies what :meth:`read` gave back into a tensor in the parameter's layout."""
        part = local(tensor)
        if part.device.type not in _BY_RUNS:
            part.index_copy_(self.dim, self._inside.to(part.device), values)
            return
        for run, value in zip(self._runs, values.split([length for _, length in self._runs], self.dim), strict=True):
            part.narrow(self.dim, *run).copy_(value)

    @torch.no_grad()
    def zero(self, tensor: Tensor) -> None:
        """Sets these rows of a tensor in the parameter's layout to zero."""
        part = local(tensor)
        if part.device.type not in _BY_RUNS:
            part.index_fill_(self.dim, self._inside.to(part.device), 0)
            return
        for run in self._runs:
            part.narrow(self.dim, *run).zero_()

    def matches(self, tensor: object) -> bool:
        """Whether a tensor has the parameter's shape, so that its rows are the heads' too (moments have)."""
        return isinstance(tensor, Tensor) and tensor.ndim > 0 and tensor.shape == self.parameter.shape

    @cached_property
    def _inside(self) -> Tensor:
        """The indices within this process's part."""
        shape, offset = local_box(self.parameter)
        index = self.index - offset[self.dim]
        return index[(index >= 0) & (index < shape[self.dim])].to(local(self.parameter).device)

    @cached_property
    def _runs(self) -> list[tuple[int, int]]:
        """The same indices as (start, length) of neighbours."""
        runs: list[tuple[int, int]] = []
        for place in self._inside.tolist():
            start, length = runs[-1] if runs else (place, 0)
            if place == start + length:
                runs[-1:] = [(start, length + 1)]
            else:
                runs.append((place, 1))
        return runs


def owned_parts(
    architecture: Architecture, heads: Iterable[Head], closed: Iterable[Head]
) -> Iterator[tuple[Head, Role, int]]:
    """What heads own: query rows, output columns, and key and value rows of groups of which every head is closed.

    Args:
        architecture: Of the model.
        heads: The heads.
        closed: All closed heads; the key and value rows of a group belong to the heads only if all of it is closed.

    Yields:
        The head, what the projection is for, and the head or key/value group within it.
    """
    closed, seen = set(closed), set()
    for layer, head in heads:
        block = architecture.blocks[layer]
        group = block.key_value_head(head)
        yield (layer, head), "query", head
        yield (layer, head), "output", head
        if (layer, group) not in seen and all((layer, other) in closed for other in block.query_heads(group)):
            seen.add((layer, group))
            yield (layer, head), "key", group
            yield (layer, head), "value", group


def head_rows(architecture: Architecture, heads: Iterable[Head], closed: Iterable[Head]) -> list[ParameterRows]:
    """What heads own, as one set of rows per parameter; see :func:`owned_parts`.

    Raises:
        UnsupportedArchitectureError: Which weights belong to a head is not known.
    """
    return merged(
        part
        for (layer, _), role, index in owned_parts(architecture, heads, closed)
        for part in projection_of(architecture.blocks[layer], role).head_slice(index)
    )


def projection_of(block: Block, role: Role) -> HeadProjection:
    """The projection of a block with this role."""
    if role == "output":
        return block.output
    return {"query": block.query, "key": block.key, "value": block.value}[role]


def merged(parts: Iterable[ParameterSlice]) -> list[ParameterRows]:
    """Slices of the same parameter as one set of rows each; every slice of a parameter is along one dimension."""
    found: dict[str, list[ParameterSlice]] = {}
    for part in parts:
        found.setdefault(part.name, []).append(part)
    rows = []
    for name, slices in found.items():
        starts = sorted({(part.start, part.length) for part in slices})
        index = torch.cat([torch.arange(start, start + length) for start, length in starts])
        rows.append(ParameterRows(name, slices[0].parameter, slices[0].dim, index))
    return rows
