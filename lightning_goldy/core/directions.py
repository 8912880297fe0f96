"""Random directions that do not depend on the world size, and rays of parameters along them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_goldy.core.sharding import like, local, local_box, sum_over_shards, unshard_guard
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import ParameterVector

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
            part = _box(whole, parameter).reshape(-1)
            if squares is not None:
                squares.append(_dot(part, part).to(device))
            # Every process maps, also one without a part: a preconditioner may communicate.
            mapped = self.preconditioner.apply(name, whole.to(device), 0)
            if part.numel():
                yield 0, _box(mapped, parameter).reshape(-1)
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


def _box(whole: Tensor, reference: Tensor) -> Tensor:
    shape, offset = local_box(reference)
    for dimension, (length, start) in enumerate(zip(shape, offset, strict=True)):
        whole = whole.narrow(dimension, min(start, whole.shape[dimension]), length)
    return whole


def _dot(first: Tensor, second: Tensor) -> Tensor:
    # In pieces, so that the float64 copies stay small.
    pieces = zip(first.split(BLOCK), second.split(BLOCK), strict=True)
    return sum((a.double() @ b.double() for a, b in pieces), torch.zeros((), dtype=torch.float64, device=first.device))
