"""Vectors in parameter space, random directions and those that lead a matrix, and the one way to perturbed weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_goldy.core.naming import require_number
from lightning_goldy.core.selection import select_largest
from lightning_goldy.core.sharding import gather, like, local, local_box, own_part, sum_over_shards, unshard_guard
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


BLOCK = 1 << 16
"""Elements drawn from one generator."""

# torch fills 16 elements at a time, and draws the last 16 anew when they are not whole. So a block's first elements are
# the same however much of it is drawn, as long as that is a multiple of this.
_GROUP = 16

# Elements generated before they are sliced and copied out; bounds the memory beside the result.
_BUFFER_BLOCKS = 16


def random_direction(
    space: ParameterSpace, seed: int, *, module: nn.Module | None = None, dtype: torch.dtype | None = None
) -> ParameterVector:
    r"""A standard normal direction, a function of (seed, canonical parameter name, element index) alone.

    .. math:: v_{p, i} \sim \mathcal N(0, 1)

    Neither the number of processes nor the layout, the dtype, the device or which other parameters the space holds
    changes an element. Only this process's shards are ever stored.

    Args:
        space: The parameters to draw for.
        seed: Any integer.
        module: Gives each tensor the layout and the device of the module's parameter; plain CPU tensors without it.
        dtype: Of the result; the parameters' own by default. Draws are float32 and rounded once.

    Returns:
        A vector of independent standard normal elements. Divide by ``norm()`` for a point on the unit sphere.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> whole = random_direction(ParameterSpace.of(layer), seed=1)
        >>> part = random_direction(ParameterSpace.of(layer, include=["bias"]), seed=1)
        >>> torch.equal(whole["bias"], part["bias"])
        True
    """
    layouts = space.resolve(module) if module is not None else None
    tensors = {}
    for name, shape, own in zip(space.names, space.shapes, space.dtypes, strict=True):
        if layouts is None:
            tensor = torch.empty(shape, dtype=dtype or own, device="cpu")
        else:
            reference = layouts[name].detach()
            part = torch.empty(local_box(reference)[0], dtype=dtype or own, device=local(reference).device)
            tensor = like(reference, part)
        tensors[name] = fill_direction_(tensor, name, seed)
    return ParameterVector(space, tensors)


def fill_direction_(tensor: Tensor, name: str, seed: int) -> Tensor:
    """Writes this process's part of the direction of one parameter into ``tensor``.

    Args:
        tensor: Plain or DTensor; its global shape is the parameter's.
        name: Canonical parameter name.
        seed: Any integer.

    Returns:
        The same tensor.
    """
    part = local(tensor)
    if part.is_contiguous():
        flat = part.view(-1)
        for start, block in direction_blocks(tensor, name, seed):
            flat[start : start + len(block)].copy_(block)
    else:
        drawn = [block for _, block in direction_blocks(tensor, name, seed)]
        if drawn:
            part.copy_(torch.cat(drawn).view(part.shape))
    return tensor


def direction_blocks(reference: Tensor, name: str, seed: int) -> Iterator[tuple[int, Tensor]]:
    """The direction of one parameter piece by piece, so that the whole of it never has to exist.

    Args:
        reference: Plain or DTensor of the parameter's global shape; its values do not matter.
        name: Canonical parameter name.
        seed: Any integer.

    Yields:
        The place of a piece in this process's flattened part, and the piece: flat, float32, on the CPU.
    """
    shape, offset = local_box(reference)
    if math.prod(shape) == 0:
        return
    if reference.ndim == 0:
        yield 0, _normals(name, seed, 0, 1)
        return
    row = math.prod(reference.shape[1:])  # elements of one global row
    mine = math.prod(shape[1:])
    step = max(1, (_BUFFER_BLOCKS * BLOCK) // max(row, 1))
    for start in range(0, shape[0], step):
        rows = min(step, shape[0] - start)
        first = (offset[0] + start) * row
        drawn = _normals(name, seed, first, first + rows * row).view(rows, *reference.shape[1:])  # [rows, ...]
        for dimension in range(1, reference.ndim):
            drawn = drawn.narrow(dimension, offset[dimension], shape[dimension])
        yield start * mine, drawn.reshape(-1)


def direction_seed(seed: int, index: int) -> int:
    """The seed of one of many directions, 63 bits of a hash of both numbers.

    Example:
        >>> direction_seed(0, 1) == direction_seed(0, 1), direction_seed(0, 1) == direction_seed(1, 0)
        (True, False)
    """
    return derived_seed(seed, index)


def derived_seed(*parts: object) -> int:
    """63 bits of a hash of all parts: torch reads a larger seed as negative.

    Example:
        >>> derived_seed(0, "labels", 1) == derived_seed(0, "labels", 2)
        False
    """
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _normals(name: str, seed: int, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a parameter's endless stream of normals, float32 on the CPU."""
    first, last = start // BLOCK, (stop - 1) // BLOCK
    # Most tensors of a model are far smaller than a block, so its end is not drawn where nobody asks for it.
    needed = _GROUP * math.ceil((stop - first * BLOCK) / _GROUP)
    drawn = torch.empty(needed, dtype=torch.float32, device="cpu")

    def draw(block: int) -> None:
        # One block is drawn by one thread, so the number of threads changes nothing but the time.
        place = (block - first) * BLOCK
        generator = torch.Generator("cpu").manual_seed(derived_seed(seed, name, block))
        drawn[place : place + BLOCK].normal_(generator=generator)

    threads = min(torch.get_num_threads(), last + 1 - first)
    if threads > 1:
        # Made anew each time: threads do not survive the fork of a worker process.
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, range(first, last + 1)))
    else:
        for block in range(first, last + 1):
            draw(block)
    return drawn[start - first * BLOCK : stop - first * BLOCK]


class Preconditioner(Protocol):
    r"""A linear map P of parameter space with determinant 1, given parameter by parameter.

    Attributes:
        name: What results call it.
        space: The parameters that it maps.
        whole_tensors: Whether ``apply`` needs a parameter's whole global tensor.
    """

    name: str
    space: ParameterSpace
    whole_tensors: bool

    def apply(self, name: str, direction: Tensor, start: int) -> Tensor:
        """P u for one parameter, in the shape given; ``direction`` may be overwritten.

        Args:
            name: Canonical parameter name.
            direction: Float32 on the parameter's device. Either flat, the elements from ``start`` on of this process's
                flattened part; or, with ``whole_tensors``, of the parameter's global shape, the same on every process.
            start: Place of the first element; 0 for whole tensors.
        """
        ...


class Proposal(NamedTuple):
    r"""One direction, as far as it is known without storing it.

    Args:
        seed: Which direction.
        raw_norm: Length of the standard normal vector g that it is made from; u = g / \|g\| lies on the unit sphere.
        length: \|P u\|, parameter units.
        projection: Inner product of the anchor with P u.
    """

    seed: int
    raw_norm: float
    length: float
    projection: float


class Ray:
    r"""Moves a module to :math:`\alpha\,\theta_A + \beta\,P u`, and back to the anchor when the ``with`` block ends.

    The direction is drawn again, block by block, at every move, so that one copy of the selected parameters (the
    anchor) and a block are all that is held; ``explicit`` holds the direction too. A sum is formed in at least float32
    and rounded once. The anchor is copied back, so the module ends bit-identical.

    Args:
        module: Its selected parameters are changed in place.
        space: Which parameters move.
        preconditioner: P; the identity without one.
        explicit: Keep the present direction in memory: faster, one more copy.

    Example:
        >>> module = nn.Linear(1, 1, bias=False)
        >>> before = module.weight.item()
        >>> with Ray(module, ParameterSpace.of(module)) as ray:
        ...     proposal = ray.turn(seed=3)
        ...     ray.move(1.0, 0.5)
        ...     moved = module.weight.item()
        >>> abs(abs(moved - before) - 0.5) < 1e-6, proposal.length, module.weight.item() == before
        (True, 1.0, True)
    """

    def __init__(
        self,
        module: nn.Module,
        space: ParameterSpace,
        *,
        preconditioner: Preconditioner | None = None,
        explicit: bool = False,
    ) -> None:
        if preconditioner is not None:
            space.require_same(preconditioner.space)
        self.module, self.space = module, space
        self.preconditioner, self.explicit = preconditioner, explicit
        self._proposal: Proposal | None = None
        self._held: dict[str, list[tuple[int, Tensor]]] = {}
        self._anchor: dict[str, Tensor] = {}

    def __enter__(self) -> Ray:
        unshard_guard(self.module)
        self._parameters = self.space.resolve(self.module)
        self._anchor = {name: local(parameter).clone() for name, parameter in self._parameters.items()}
        squares = [_dot(part.reshape(-1), part.reshape(-1)) for part in self._anchor.values()]
        (self.anchor_square,) = self._total(squares)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.return_to_anchor()
        self._anchor, self._held, self._proposal = {}, {}, None

    def turn(self, seed: int) -> Proposal:
        """Chooses the direction of the next moves; measures it in one pass, in float64 over all shards."""
        sums = []
        self._held = {}
        for name, parameter in self._parameters.items():
            anchor = self._anchor[name].reshape(-1)
            squares: list[Tensor] = []
            rest = torch.zeros(2, dtype=torch.float64, device=anchor.device)
            held = []
            for start, block in self._blocks(name, parameter, seed, squares):
                # Without a preconditioner P g is g.
                own = squares[-1] if self.preconditioner is None else _dot(block, block)
                rest += torch.stack([own, _dot(block, anchor[start : start + len(block)])])
                if self.explicit:
                    held.append((start, block))
            self._held[name] = held
            sums.append(torch.cat([sum(squares, rest.new_zeros(())).reshape(1), rest]))  # [3]
        raw, square, projection = self._total(sums)
        norm = math.sqrt(raw)
        self._proposal = Proposal(seed, norm, math.sqrt(square) / norm, projection / norm)
        return self._proposal

    def move(self, anchor_scale: float, direction_scale: float) -> None:
        """Puts the module at ``anchor_scale * anchor + direction_scale * P u``."""
        if self._proposal is None:
            raise RuntimeError("there is no direction yet: call turn() first")
        unshard_guard(self.module)
        step = direction_scale / self._proposal.raw_norm
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                part, anchor = local(parameter), self._anchor[name].reshape(-1)
                dtype = torch.promote_types(part.dtype, torch.float32)
                moved = part if part.is_contiguous() else torch.empty_like(part, memory_format=torch.contiguous_format)
                flat = moved.view(-1)
                blocks = self._held[name] if self.explicit else self._blocks(name, parameter, self._proposal.seed)
                for start, block in blocks:
                    for begin in range(0, len(block), BLOCK):
                        piece = slice(start + begin, min(start + begin + BLOCK, start + len(block)))
                        base = anchor[piece].to(dtype)
                        base = base if anchor_scale == 1 else base * anchor_scale
                        flat[piece].copy_(torch.add(base, block[begin : begin + BLOCK].to(dtype), alpha=step))
                if moved is not part:
                    part.copy_(moved)
        # Inside one autocast context a changed weight would be used as it was cast before.
        torch.clear_autocast_cache()

    def return_to_anchor(self) -> None:
        """Puts the module back, bit for bit."""
        unshard_guard(self.module)
        with torch.no_grad():
            for name, anchor in self._anchor.items():
                local(self._parameters[name]).copy_(anchor)
        torch.clear_autocast_cache()

    def _blocks(
        self, name: str, parameter: Tensor, seed: int, squares: list[Tensor] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """Pieces of P g in this process's flattened part; adds the squares of the same pieces of g to a list."""
        device = local(parameter).device
        if self.preconditioner is not None and self.preconditioner.whole_tensors:
            whole = fill_direction_(torch.empty(parameter.shape, dtype=torch.float32, device="cpu"), name, seed)
            part = own_part(whole, parameter).reshape(-1)
            if squares is not None:
                squares.append(_dot(part, part).to(device))
            # Every process maps, also one without a part: a preconditioner may communicate.
            mapped = self.preconditioner.apply(name, whole.to(device), 0)
            if part.numel():
                yield 0, own_part(mapped, parameter).reshape(-1)
            return
        for start, drawn in direction_blocks(parameter.detach(), name, seed):
            block = drawn.to(device)
            if squares is not None:
                squares.append(_dot(block, block))
            yield start, block if self.preconditioner is None else self.preconditioner.apply(name, block, start)

    def _total(self, partial: list[Tensor]) -> list[float]:
        """Sums over parameters and shards, column by column."""
        totals = sum_over_shards(partial, list(self._parameters.values()))
        return [math.fsum(column) for column in zip(*(total.reshape(-1).tolist() for total in totals), strict=True)]


def _dot(first: Tensor, second: Tensor) -> Tensor:
    # In pieces, so that the float64 copies stay small.
    pieces = zip(first.split(BLOCK), second.split(BLOCK), strict=True)
    return sum((a.double() @ b.double() for a, b in pieces), torch.zeros((), dtype=torch.float64, device=first.device))


_OVERSAMPLED = 8
_POWER_ITERATIONS = 4
# Directions of which a block has columns, and how many beyond them ask for one more power.
_BLOCK, _PER_POWER = 8, 6
# Operations of a product that factorising a thin matrix takes as long as, per row and squared column.
_FACTORISED = 5.0
# Columns of a thin matrix that are held in float64 at a time.
_PIECE = 4096
# Of a unit row the square that may lie within the others, and how often what has more is drawn anew.
_WITHIN, _ATTEMPTS = 0.5, 3
# Machine epsilons of the largest value, below which another is rounding: half of one is left where there is no other.
_ROUNDING = 4


def leading_directions(
    matrix: Tensor, top: int, name: str, seed: int, *, exact: bool
) -> tuple[Tensor, Tensor, Tensor, float]:
    """The largest singular values with left and right directions, and the largest relative error among them."""
    count = min(top, *matrix.shape)
    if matrix.shape[0] > matrix.shape[1]:
        values, right, left, error = leading_directions(matrix.t(), top, name, seed, exact=exact)
        return values, left, right, error
    if exact:
        return *_by_gram(matrix, count), 0.0
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    # A start that is the same on every machine, and draws from no random state.
    width, powers = _krylov(min(matrix.shape), count)
    probe = torch.empty(matrix.shape[1], width, dtype=torch.float32)
    # Directions are rows throughout: products of few rows take up to a tenth of those of as few columns.
    block = fill_direction_(probe, name, seed).to(wide).t() @ wide.t()
    basis, moved = (wide.new_empty(width * (powers + 1), side) for side in wide.shape)
    for start in range(0, len(basis), width):
        own, found = slice(start, start + width), basis[:start]
        basis[own] = _beside(block, found, name, seed)  # of every power, not of the last alone
        moved[own] = basis[own] @ wide
        block = moved[own] @ wide.t() if start + width < len(basis) else block
    values, inner = _gram_spectrum(moved, count)
    left, right = _combined(inner, basis), _combined(inner, moved, values)
    return values, left.t(), right.t(), _relative_residual(right @ wide.t(), left, values)


def _beside(block: Tensor, found: Tensor, name: str, seed: int) -> Tensor:
    """Orthonormal rows of what a block has beside orthonormal ones, and random rows where it has rounding alone."""

    def rest(rows: Tensor) -> Tensor:
        return torch.linalg.qr((rows - rows @ found.t() @ found).t()).Q.t()

    block = rest(block)
    for attempt in range(_ATTEMPTS):
        # What lies within those found by so much is as much rounding after another time.
        lost = (block @ found.t()).square().sum(dim=1) > _WITHIN
        if not bool(lost.any()):
            break
        fresh = torch.empty(block.shape, dtype=torch.float32)
        fill_direction_(fresh, f"{name}/{len(found)}/{attempt}", seed)
        block = rest(torch.where(lost[:, None], fresh.to(block) / math.sqrt(block.shape[1]), block))
    return rest(block)


def _krylov(short: int, count: int) -> tuple[int, int]:
    """Columns of a block, and powers beyond the first.

    For many directions a block stays narrow and has more powers: in less time they come nearer than few powers of a
    wide one. Where the smaller side has no room for them a wide one holds more of it.
    """
    width, powers = min(count, _BLOCK) + _OVERSAMPLED, _POWER_ITERATIONS + max(0, -(-(count - _BLOCK) // _PER_POWER))
    if width * (powers + 1) <= short:
        return width, powers
    width = min(short, count + _OVERSAMPLED)
    return width, min(_POWER_ITERATIONS, short // width - 1)


def _by_gram(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest singular values of a matrix of few rows in float64, with left and right directions."""
    values, left = _gram_spectrum(wide := matrix.double(), count)
    return values, left, wide.t() @ left / values.clamp(min=1e-300)


def _gram_spectrum(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As :func:`_by_gram` without the right directions, in float64 a piece at a time."""
    gram = torch.zeros(len(matrix), len(matrix), dtype=torch.float64, device=matrix.device)
    for piece in matrix.split(_PIECE, dim=1):
        gram.addmm_(wide := piece.double(), wide.t())
    squares, vectors = torch.linalg.eigh(gram)
    return squares.clamp(min=0).sqrt().flip(0)[:count], vectors.flip(1)[:, :count]


def _combined(weights: Tensor, rows: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Weighted sums of rows, over their lengths where these are given; shorter where a length is rounding alone."""
    if lengths is not None:
        weights = weights / lengths.clamp(min=max(1e-12 * float(lengths[0]), torch.finfo(rows.dtype).tiny))
    return weights.t().to(rows.dtype).contiguous() @ rows


def _relative_residual(moved: Tensor, found: Tensor, values: Tensor) -> float:
    """The largest over the values that products in this dtype can tell from zero."""
    residuals = (moved - found * values.to(found)[:, None]).norm(dim=1).double() / math.sqrt(2)
    told = values > _ROUNDING * torch.finfo(found.dtype).eps * values[0]
    return float((residuals[told] / values[told]).max()) if bool(told.any()) else 0.0


def randomised_operations(rows: int, columns: int, top: int) -> float:
    """Operations of a randomised decomposition, about; those of factorisations count as much as they take longer.

    Example:
        >>> round(randomised_operations(1024, 512, 8) / randomised_operations(512, 256, 8), 1)
        3.3
    """
    short, long = sorted((rows, columns))
    width, powers = _krylov(short, top)
    basis = width * (powers + 1)
    products = 2.0 * short * long * (2 * basis + top)
    return products + _FACTORISED * basis**2 * (short + long)


def randomised_bytes(rows: int, columns: int, top: int) -> int:
    """Bytes that a randomised decomposition holds at most, beside what it gives: its longer side, a piece twice.

    Example:
        >>> randomised_bytes(1024, 512, 8)
        983040
    """
    short, long = sorted((rows, columns))
    width, powers = _krylov(short, top)
    return (4 * long + 8 * min(long, _PIECE)) * width * (powers + 1)


def refined_operations(rows: int, columns: int, start: int, top: int) -> float:
    """Operations of :func:`refined_directions` from so many directions, as :func:`randomised_operations` counts them.

    Example:
        >>> refined_operations(512, 1024, 24, 8) < randomised_operations(512, 1024, 8) / 2
        True
    """
    return 2.0 * rows * columns * (2 * start + top) + _FACTORISED * start**2 * (rows + columns)


def refined_directions(matrix: Tensor, start: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor, float]:
    r"""As the randomised :func:`leading_directions`, from left directions that are nearly right.

    .. math:: Q = \mathrm{orth}(A^T S), \qquad A Q = U \Sigma W^T, \qquad V = Q W

    Args:
        matrix: A, shape ``[rows, columns]``.
        start: S, shape ``[rows, n]``; what is orthogonal to all of them is not found.
        top: Values and directions.

    Returns:
        The same, with the residual :math:`\|A^T u_i - \sigma_i v_i\| / \sqrt2` in the error.

    Example:
        >>> matrix, start = torch.diag(torch.tensor([3.0, 2.0, 1.0])), torch.eye(3)[:, :2]
        >>> values, _, _, error = refined_directions(matrix, start, 2)
        >>> [round(value, 6) for value in values.tolist()], error < 1e-6
        ([3.0, 2.0], True)
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    basis = torch.linalg.qr((start.to(wide).t().contiguous() @ wide).t()).Q.t().contiguous()  # [n, columns]
    moved = basis @ wide.t()
    values, inner = _gram_spectrum(moved, min(top, len(basis)))
    left, right = _combined(inner, moved, values), _combined(inner, basis)
    return values, left.t(), right.t(), _relative_residual(left @ wide, right, values)
