"""Random directions that are the same global vector on any number of processes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from lightning_goldy.core.sharding import like, local, local_box
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
            tensors[name] = torch.empty(shape, dtype=dtype or own, device="cpu")
            fill_direction_(tensors[name], name, seed)
        else:
            reference = layouts[name].detach()
            part = torch.empty(local_box(reference)[0], dtype=dtype or own, device=local(reference).device)
            tensors[name] = like(reference, part)
            fill_direction_(tensors[name], name, seed)
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
    digest = hashlib.blake2b(f"{seed}\0{index}".encode(), digest_size=8).digest()
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
        drawn[place : place + BLOCK].normal_(generator=_generator(name, seed, block))

    threads = min(torch.get_num_threads(), last + 1 - first)
    if threads > 1:
        # Made anew each time: threads do not survive the fork of a worker process.
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(draw, range(first, last + 1)))
    else:
        for block in range(first, last + 1):
            draw(block)
    return drawn[start - first * BLOCK : stop - first * BLOCK]


def _generator(name: str, seed: int, block: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}\0{name}\0{block}".encode(), digest_size=8).digest()
    # 63 bits: torch reads a larger seed as negative.
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
