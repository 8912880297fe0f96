"""Sharded tensors and replicas: the only file that knows how parameters are spread over processes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

try:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
except ImportError as error:  # pragma: no cover - depends on the installed torch
    raise ImportError(f"torch {torch.__version__} does not offer compute_local_shape_and_global_offset") from error

T = TypeVar("T")


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, spread over processes."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing memory with the tensor and detached from autograd.

    Example:
        >>> weight = torch.ones(2, requires_grad=True)
        >>> local(weight).data_ptr() == weight.data_ptr()
        True
    """
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_box(tensor: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape of this process's part and its offset within the global tensor."""
    if isinstance(tensor, DTensor):
        shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
        return tuple(shape), tuple(offset)
    return tuple(tensor.shape), (0,) * tensor.ndim


def holds_whole_rows(tensor: Tensor) -> bool:
    """Whether every process holds its slices along the first dimension whole, the same answer on every process."""
    if not isinstance(tensor, DTensor):
        return True
    return all(placed.is_replicate() or placed.is_shard(0) for placed in tensor.placements)


def like(reference: Tensor, part: Tensor) -> Tensor:
    """Wraps this process's part in the layout of ``reference``, without communication."""
    if not isinstance(reference, DTensor):
        return part
    return DTensor.from_local(
        part,
        reference.device_mesh,
        reference.placements,
        run_check=False,
        shape=reference.shape,
        stride=tuple(math.prod(reference.shape[dimension + 1 :]) for dimension in range(reference.ndim)),
    )


def align(tensor: Tensor, reference: Tensor) -> Tensor:
    """The tensor in the placements of ``reference``; tensor parallelism may leave gradients in others."""
    if isinstance(tensor, DTensor) and isinstance(reference, DTensor) and tensor.placements != reference.placements:
        return tensor.redistribute(reference.device_mesh, reference.placements)
    return tensor


def scatter_like(reference: Tensor, full: Tensor) -> Tensor:
    """This process's slice of a full tensor that every process holds, in the layout of ``reference``."""
    if not isinstance(reference, DTensor):
        return full.to(reference.device)
    shape, offset = local_box(reference)
    part = full
    for dimension, (length, start) in enumerate(zip(shape, offset, strict=True)):
        part = part.narrow(dimension, min(start, part.shape[dimension]), length)
    return like(reference, part.contiguous().to(reference.to_local().device))


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor on every process; a collective when it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sum_over_shards(partial: Sequence[Tensor], references: Sequence[Tensor]) -> list[Tensor]:
    """Sums per-process results into global ones, one collective per layout.

    Args:
        partial: One tensor per reference (all of one shape and dtype), computed from this process's part.
        references: The tensors whose layouts say which processes hold different parts. Replicas of the same part are
            counted once, as under hybrid sharding.

    Returns:
        The global sums, the same on every process.
    """
    result = list(partial)
    groups: dict[Any, list[int]] = defaultdict(list)
    for index, reference in enumerate(references):
        if isinstance(reference, DTensor):
            # Asked the other way round, because the strided shards of tensor parallelism plus FSDP2 say that they are
            # no shards.
            split = tuple(not placement.is_replicate() for placement in reference.placements)
            if any(split):
                groups[(reference.device_mesh, split)].append(index)
    for (mesh, split), indices in groups.items():
        placements = [Partial() if sharded else Replicate() for sharded in split]
        stacked = torch.stack([partial[index] for index in indices])
        total = DTensor.from_local(stacked, mesh, placements, run_check=False).full_tensor()
        for index, value in zip(indices, total, strict=True):
            result[index] = value
    return result


def unshard_guard(module: nn.Module) -> None:
    """Frees unsharded copies that FSDP2 keeps after a forward, so that parameters are the sharded ones again."""
    for child in module.modules():
        reshard = getattr(child, "reshard", None)
        if callable(reshard) and hasattr(child, "unshard"):
            reshard()


@dataclass(frozen=True)
class Replicas:
    """The processes that hold the same parameters and can share out samples, directions or pieces.

    Args:
        rank: This process among the replicas.
        size: Their number.

    Example:
        >>> Replicas(rank=1, size=2).share(["a", "b", "c"])
        ['b']
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of(cls, module: nn.Module) -> Replicas:
        """All processes of the job when each holds the whole module; one replica when parameters are sharded.

        Sharded processes take part in every forward of every sample, so they cannot share samples out.
        """
        unshard_guard(module)
        return cls() if any(map(is_sharded, module.parameters())) else cls.world()

    @classmethod
    def world(cls) -> Replicas:
        """All processes of the job, whatever they hold."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``size``-th item, starting with the ``rank``-th."""
        return list(items[self.rank :: self.size])

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the replicas, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather_objects(self, value: T) -> list[T]:
        """The small objects of all replicas, in rank order, on every one of them."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    @contextmanager
    def together(self, work: str) -> Iterator[None]:
        """A context whose end every replica reaches, so that a failure on one does not leave the others waiting."""
        try:
            yield
        except BaseException as error:
            self.gather_objects(f"{type(error).__name__}: {error}")
            raise
        for rank, failure in enumerate(self.gather_objects("")):
            if failure:
                raise RuntimeError(f"{work} failed on rank {rank}: {failure}")
