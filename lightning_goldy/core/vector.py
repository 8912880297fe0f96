"""Vectors in parameter space, and the one way to perturbed weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_goldy.core.naming import require_number
from lightning_goldy.core.selection import select_largest
from lightning_goldy.core.sharding import gather, like, local, local_box, sum_over_shards, unshard_guard
from lightning_goldy.core.space import ParameterSpace, SpaceError

# Elements converted to float64 at a time: on the CPU so few that they stay in its cache, elsewhere so many that a
# reduction needs 8 MB beside the tensor and not a double copy.
_CACHED, _CHUNK = 1 << 15, 1 << 20


class ParameterVector(Mapping[str, Tensor]):
    """One tensor per parameter of a space: a snapshot, a direction or a mask.

    Args:
        space: The parameters that the tensors belong to.
        tensors: Name to tensor, each of its parameter's global shape, in the parameter's own layout (plain or DTensor).

    Raises:
        SpaceError: A name is missing or unknown, or a shape differs.

    Example:
        >>> module = nn.Linear(2, 1, bias=False)
        >>> space = ParameterSpace.of(module)
        >>> ones = ParameterVector(space, {"weight": torch.ones(1, 2)})
        >>> (ones + 2 * ones).dot(ones), ones.norm() ** 2
        (6.0, 2.0000000000000004)
    """

    def __init__(self, space: ParameterSpace, tensors: Mapping[str, Tensor]) -> None:
        for name in tensors:
            space.index(name)
        for name, shape in zip(space.names, space.shapes, strict=True):
            if name not in tensors:
                raise SpaceError(f"the vector lacks parameter {name!r}")
            if tensors[name].shape != shape:
                raise SpaceError(f"{name}: the vector has shape {tuple(tensors[name].shape)}, the space {tuple(shape)}")
        self.space = space
        self._tensors = {name: tensors[name] for name in space.names}

    @classmethod
    def of(cls, module: nn.Module, space: ParameterSpace | None = None, *, clone: bool = True) -> ParameterVector:
        """The module's present values; copies, unless ``clone=False`` asks for views that follow the training."""
        space = space or ParameterSpace.of(module)
        parameters = space.resolve(module)
        return cls(space, {name: p.detach().clone() if clone else p.detach() for name, p in parameters.items()})

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._tensors:
            self.space.index(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.values()})
        return f"ParameterVector({len(self)} tensors, {self.space.numel:,} elements, {'/'.join(dtypes)})"

    def map(self, function: Callable[[Tensor], Tensor]) -> ParameterVector:
        """Applies a function to each tensor; it must keep the shape."""
        return ParameterVector(self.space, {name: function(tensor) for name, tensor in self.items()})

    def zip_with(self, other: ParameterVector, function: Callable[[Tensor, Tensor], Tensor]) -> ParameterVector:
        """Combines two vectors of one space tensor by tensor."""
        self.space.require_same(other.space)
        return ParameterVector(self.space, {name: function(self[name], other[name]) for name in self})

    def __add__(self, other: ParameterVector) -> ParameterVector:
        return self.zip_with(other, torch.add)

    def __sub__(self, other: ParameterVector) -> ParameterVector:
        return self.zip_with(other, torch.sub)

    def __mul__(self, other: float | ParameterVector) -> ParameterVector:
        if isinstance(other, ParameterVector):
            return self.zip_with(other, torch.mul)
        return self.map(lambda tensor: tensor * other)

    __rmul__ = __mul__

    def __neg__(self) -> ParameterVector:
        return self.map(torch.neg)

    def axpy_(self, scale: float, other: ParameterVector) -> ParameterVector:
        """Adds ``scale * other`` in place and returns itself."""
        self.space.require_same(other.space)
        for name in self:
            local(self[name]).add_(local(other[name]), alpha=scale)
        return self

    def to(self, target: torch.dtype | torch.device | str) -> ParameterVector:
        """A vector of another dtype, or (plain tensors only) on another device."""
        return self.map(lambda tensor: tensor.to(target))

    def full(self, device: torch.device | str = "cpu") -> ParameterVector:
        """The whole vector as plain tensors on every process, gathered one tensor at a time."""
        return self.map(lambda tensor: gather(tensor).to(device))

    def dot(self, other: ParameterVector) -> float:
        """Inner product, accumulated in float64 over all shards."""
        return math.fsum(self.tensor_dots(other))

    def norm(self) -> float:
        """Euclidean norm, accumulated in float64 over all shards."""
        return math.sqrt(self.dot(self))

    def tensor_dots(self, other: ParameterVector) -> list[float]:
        """Inner product of each pair of tensors, in the space's order, float64."""
        self.space.require_same(other.space)
        return reduce_tensors(list(self.values()), lambda a, b: a @ b, list(other.values()))

    def tensor_norms(self) -> list[float]:
        """Euclidean norm of each tensor, in the space's order."""
        return [math.sqrt(square) for square in self.tensor_dots(self)]

    def count(self) -> list[int]:
        """Number of nonzero elements of each tensor, in the space's order: the size of a mask."""
        counts = [local(tensor).count_nonzero() for tensor in self.values()]
        return [int(count) for count in sum_over_shards(counts, list(self.values()))]

    def top_k(self, percent: float, *, scope: Literal["tensor", "global"] = "tensor") -> ParameterVector:
        """Boolean mask of the largest elements: exactly k of them, ties to the smaller index.

        Args:
            percent: Share to keep, in (0, 100].
            scope: ``tensor`` takes the share of each tensor, ``global`` of all together.

        Raises:
            ValueError: ``percent`` is out of range, or the scope unknown.
        """
        names, tensors = list(self), list(self.values())
        if scope == "global":
            masks = select_largest(tensors, elements_in(percent, self.space.numel))
        elif scope == "tensor":
            masks = [select_largest([tensor], elements_in(percent, tensor.numel()))[0] for tensor in tensors]
        else:
            raise ValueError(f"scope is 'tensor' or 'global'; got {scope!r}")
        layout = [like(tensor, mask) for tensor, mask in zip(tensors, masks, strict=True)]
        return ParameterVector(self.space, dict(zip(names, layout, strict=True)))


def elements_in(percent: float, numel: int) -> int:
    """How many elements a percentage of ``numel`` is: rounded half up, at least one.

    Raises:
        ValueError: ``percent`` is outside (0, 100].

    Example:
        >>> elements_in(5, 100), elements_in(30, 5), elements_in(1, 10)
        (5, 2, 1)
    """
    if isinstance(percent, bool) or not isinstance(percent, float):
        require_number("top_k_percent", percent)
    if not 0 < percent <= 100:
        raise ValueError(f"top_k_percent must lie in (0, 100]; got {percent}")
    return max(1, math.floor(numel * percent / 100 + 0.5))


def reduce_tensors(
    tensors: Sequence[Tensor], function: Callable[..., Tensor], *others: Sequence[Tensor]
) -> list[float]:
    """Sums ``function`` of flat float64 chunks of each tensor (and of its partners) over all shards."""
    totals = []
    for group in zip(tensors, *others, strict=True):
        flats = [local(tensor).reshape(-1) for tensor in group]
        total = torch.zeros((), dtype=torch.float64, device=flats[0].device)
        size = _CACHED if flats[0].device.type == "cpu" else _CHUNK
        for start in range(0, flats[0].numel(), size):
            total += function(*(flat[start : start + size].double() for flat in flats))
        totals.append(total)
    return [float(total) for total in sum_over_shards(totals, tensors)]


def reduce_rows(tensor: Tensor, function: Callable[..., Tensor], *others: Tensor) -> list[float]:
    """As :func:`reduce_tensors`, of every slice of one tensor along its first dimension.

    Example:
        >>> reduce_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.dot, torch.ones(2, 2))
        [3.0, 7.0]
    """
    parts = [local(part) for part in (tensor, *others)]
    sums = torch.zeros(tensor.shape[0], dtype=torch.float64, device=parts[0].device)
    start = local_box(tensor)[1][0]
    for row, slices in enumerate(zip(*parts, strict=True), start):
        sums[row] = reduce_tensors([slices[0]], function, *([part] for part in slices[1:]))[0]
    return sum_over_shards([sums], [tensor])[0].tolist()


def require_finite(parameters: Mapping[str, Tensor], what: str) -> None:
    """Checks that every tensor is finite; a collective when some are sharded, so that every process raises.

    Raises:
        ValueError: One is not; it is named.
    """
    flags = []
    for parameter in parameters.values():
        part = local(parameter)
        finite = not part.numel() or all(bool(torch.isfinite(extreme)) for extreme in part.aminmax())
        flags.append(torch.tensor(int(not finite), device=part.device))
    for name, broken in zip(parameters, sum_over_shards(flags, list(parameters.values())), strict=True):
        if broken:
            raise ValueError(f"the {what} of {name} are not finite")


@contextmanager
def applied(module: nn.Module, vector: ParameterVector, scale: float = 1.0) -> Iterator[nn.Module]:
    r"""Moves the module to :math:`\theta + \text{scale} \cdot v` for the length of a ``with`` block.

    The values are saved before and copied back after, also when the block raises: adding and then subtracting would
    leave rounding behind. The sum is formed in at least float32 and rounded once.

    Args:
        module: Any module; its parameters are changed in place.
        vector: The direction v, in the layout of the parameters.
        scale: Multiple of the direction.

    Raises:
        SpaceError: The vector belongs to another model.

    Example:
        >>> module = nn.Linear(1, 1, bias=False)
        >>> before = module.weight.item()
        >>> direction = ParameterVector(ParameterSpace.of(module), {"weight": torch.ones(1, 1)})
        >>> with applied(module, direction, 2.0):
        ...     moved = module.weight.item()
        >>> abs(moved - before - 2.0) < 1e-6, module.weight.item() == before
        (True, True)
    """

    def moved(parameter: Tensor, change: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(parameter.dtype, change.dtype), torch.float32)
        return parameter.to(dtype).add_(change.to(parameter.device, dtype), alpha=scale)

    with _edited(module, vector, moved):
        yield module


@contextmanager
def substituted(module: nn.Module, vector: ParameterVector) -> Iterator[nn.Module]:
    """Gives the module the values of a vector, such as a snapshot's, for the length of a ``with`` block."""
    with _edited(module, vector, lambda parameter, value: value):
        yield module


@contextmanager
def _edited(module: nn.Module, vector: ParameterVector, edit: Callable[[Tensor, Tensor], Any]) -> Iterator[None]:
    parameters = vector.space.resolve(module)
    parts = {name: local(parameter) for name, parameter in parameters.items()}
    with torch.no_grad():
        saved = {name: part.clone() for name, part in parts.items()}
    try:
        with torch.no_grad():
            for name, part in parts.items():
                part.copy_(edit(part, local(vector[name])))
        # Inside autocast a low-precision copy of the old weight may be cached and would be used in its place.
        torch.clear_autocast_cache()
        yield
    finally:
        unshard_guard(module)
        with torch.no_grad():
            for name, part in parts.items():
                part.copy_(saved[name])
        torch.clear_autocast_cache()
