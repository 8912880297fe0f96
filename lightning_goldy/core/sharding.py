"""Sharded tensors and replicas: the only file that knows how parameters are spread over processes."""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.overrides import TorchFunctionMode

try:
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
except ImportError as error:  # pragma: no cover - depends on the installed torch
    raise ImportError(f"torch {torch.__version__} does not offer compute_local_shape_and_global_offset") from error

T = TypeVar("T")


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, spread over processes."""
    return isinstance(tensor, DTensor)


def splits_layers(tensor: Tensor) -> bool:
    """Whether a tensor is split in more than one way, as by FSDP2 and tensor parallelism; replicas do not count.

    Example:
        >>> splits_layers(torch.zeros(2))
        False
    """
    return isinstance(tensor, DTensor) and sum(not isinstance(p, Replicate) for p in tensor.placements) > 1


def is_tensor_parallel(part: nn.Module, model: nn.Module | None = None) -> bool:
    """Whether layers are split over processes that never see one whole, not even in its forward.

    Args:
        part: Whose parameters are looked at.
        model: What it lies in, whose modules FSDP2 may gather; by default the part.

    Example:
        >>> is_tensor_parallel(nn.Linear(2, 2))
        False
    """
    parameters = list(part.parameters())
    gathered = any(map(gathers_in_forward, (model or part).modules()))
    return any(map(splits_layers, parameters)) or (not gathered and any(map(is_sharded, parameters)))


def inside_parallel(module: nn.Module) -> nn.Module:
    """A module without the wrapper that trains it on several devices: DistributedDataParallel, DataParallel, Fabric's.

    Such a wrapper has names of its own, and would average the gradients that each process takes of other samples. What
    ``torch.compile`` made inside of it stays; a module without such a wrapper comes back.

    Args:
        module: Any module.

    Example:
        >>> layer = nn.Linear(1, 1)
        >>> inside_parallel(nn.DataParallel(layer)) is layer, inside_parallel(layer) is layer
        (True, True)
    """
    found = inner = module
    while True:
        if isinstance(inner, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            found = inner = inner.module
        elif {"_forward_module", "_original_module"} <= inner._modules.keys() | vars(inner).keys():
            found = inner = inner.get_submodule("_forward_module")
        elif "_orig_mod" in inner._modules:
            inner = inner.get_submodule("_orig_mod")
        else:
            return found


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
    return like(reference, own_part(full, reference).contiguous().to(reference.to_local().device))


def own_part(full: Tensor, reference: Tensor) -> Tensor:
    """A view of this process's slice of a full tensor, as ``reference`` is laid out."""
    shape, offset = local_box(reference)
    for dimension, (length, start) in enumerate(zip(shape, offset, strict=True)):
        full = full.narrow(dimension, min(start, full.shape[dimension]), length)
    return full


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor on every process; a collective when it is sharded."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    meet_within(f"the gathering of {tuple(tensor.shape)}")
    return tensor.full_tensor()


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
        meet_within(f"a sum over shards of {len(indices)} tensors")
        stacked = torch.stack([partial[index] for index in indices])
        total = DTensor.from_local(stacked, mesh, placements, run_check=False).full_tensor()
        for index, value in zip(indices, total, strict=True):
            result[index] = value
    return result


def modules_of(module: nn.Module) -> list[nn.Module]:
    """All modules in the order of ``module.modules()``, for a fraction of its time, which goes into their names.

    Example:
        >>> layers = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.ReLU()))
        >>> modules_of(layers) == list(layers.modules())
        True
    """
    found: dict[nn.Module, None] = {}
    waiting = [module]
    while waiting:
        child = waiting.pop()
        if child in found:
            continue
        kind = type(child)
        if kind.named_modules is not nn.Module.named_modules or kind.modules is not nn.Module.modules:
            return list(module.modules())
        found[child] = None
        waiting.extend([inner for inner in child._modules.values() if inner is not None][::-1])
    return list(found)


def parameters_of(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """What modules hold themselves, each once, in the order of ``parameters()``."""
    return [*dict.fromkeys(held for child in modules for held in child._parameters.values() if held is not None)]


def unshard_guard(module: nn.Module, children: Iterable[nn.Module] | None = None) -> None:
    """Frees unsharded copies that FSDP2 keeps after a forward, so that parameters are the sharded ones again.

    Args:
        module: The model.
        children: Its modules, where they are listed already.
    """
    for child in modules_of(module) if children is None else children:
        if gathers_in_forward(child):
            child.reshard()  # type: ignore[operator]


def gathers_in_forward(module: nn.Module) -> bool:
    """Whether FSDP2 splits a module's parameters, so that its forward has them whole.

    Example:
        >>> gathers_in_forward(nn.Linear(2, 2))
        False
    """
    # Asked of the class, whose answer costs a fraction of what a module takes to say that it has no such attribute.
    return hasattr(type(module), "reshard") and hasattr(type(module), "unshard")


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
        children = modules_of(module)
        unshard_guard(module, children)
        return cls() if any(map(is_sharded, parameters_of(children))) else cls.world()

    @classmethod
    def world(cls) -> Replicas:
        """All processes of the job, whatever they hold."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, items: Sequence[T]) -> list[T]:
        """Every ``size``-th item, starting with the ``rank``-th."""
        return list(items[self.rank :: self.size])

    def deal(self, items: Sequence[T]) -> list[T]:
        """This replica's share of items that go from the most work to the least, dealt to and fro.

        Example:
            >>> [Replicas(rank, 2).deal([7, 6, 5, 4, 3, 2, 1, 0]) for rank in range(2)]
            [[7, 4, 3, 0], [6, 5, 2, 1]]
        """
        turns = (self.rank, 2 * self.size - 1 - self.rank)
        return [item for place, item in enumerate(items) if place % (2 * self.size) in turns]

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sums a tensor over the replicas, in place."""
        if self.size > 1:
            meet_within(f"the sum of {tuple(tensor.shape)}, {tensor.dtype}")
            dist.all_reduce(tensor)
        return tensor

    def send_(self, tensor: Tensor, source: int) -> Tensor:
        """Gives every replica the tensor of one of them, in place."""
        if self.size > 1:
            meet_within(f"the sending of {tuple(tensor.shape)}, {tensor.dtype}")
            dist.broadcast(tensor, source)
        return tensor

    def gather_objects(self, value: T) -> list[T]:
        """The small objects of all replicas, in rank order, on every one of them."""
        if self.size == 1:
            return [value]
        meet_within("an exchange of objects")
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def gather_soon(self, value: T, seconds: float) -> list[T] | None:
        """As :meth:`gather_objects`, where a rank may be elsewhere; None when not all come in time."""
        if self.size == 1:
            return [value]
        try:
            _exchange(_OK, "an exchange of objects in time", timedelta(seconds=seconds))
        except (RankError, RuntimeError):
            return None
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=_group())
        return gathered

    def agree(self, what: str, value: Any) -> None:
        """Checks that a value (by its text) is the same on all ranks.

        Raises:
            ValueError: It is not, on every rank.

        Example:
            >>> Replicas().agree("the probe", "a1b2")
        """
        values = [str(other) for other in self.gather_objects(value)]
        different = [rank for rank, other in enumerate(values) if other != values[0]]
        if different:
            raise ValueError(
                f"{what} differs between ranks: ranks {different} have another one than rank 0, and every rank must "
                "have the same; build it from fixed seeds and without a sampler that divides it"
            )

    def meet(self, place: str) -> None:
        """Waits until every rank is at this place.

        Raises:
            RankError: A rank has failed, or is elsewhere.
        """
        if self.size > 1:
            _exchange(_OK, place)

    @contextmanager
    def together(self, work: str, *, patience: float | None = None) -> Iterator[None]:
        """A context that fails on every rank when it fails on one, wherever that rank then is.

        Within it ranks tell each other, before each collective of this file, that they are well and at the same place,
        on a process group of its own. So a rank that fails leaves no other one waiting, and no collective of one kind
        is answered by one of another. Collectives of a sharded model's own are not seen. A SIGTERM waits for the end of
        the work, where all ranks take it at one place: Lightning's handler of it communicates, too.

        Args:
            work: What is done, for the message.
            patience: Seconds that a rank which has failed waits for the others, who cannot answer from within a
                collective of a sharded model; by default as long as the group does.

        Raises:
            RankError: Another rank has failed, or is elsewhere.
        """
        if self.size == 1:
            yield
            return
        with _signal_waits() if not _within else nullcontext():
            _within.append(work)
            try:
                yield
                self.meet(f"the end of {work}")
            except BaseException as error:
                if not _told(error):
                    _tell(error, work, patience)
                raise
            finally:
                _within.pop()


class RankError(RuntimeError):
    """Another rank failed, or ranks are at different places.

    Args:
        message: What happened.
        final: Whether the ranks cannot go on together.
    """

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


_OK, _FAILED, _ENDED = 0, 1, 2
_SIGNAL_SECONDS = 10.0
"""So long does a rank wait for a signal that rank 0 has had."""
_within: list[str] = []
_groups: list[tuple[Any, Any]] = []


def meet_within(place: str) -> None:
    """Inside :meth:`Replicas.together`, waits until every rank is at this place; elsewhere nothing happens.

    Raises:
        RankError: A rank has failed, or is elsewhere.

    Example:
        >>> meet_within("nowhere")
    """
    if _within:
        Replicas.world().meet(place)


@contextmanager
def _signal_waits() -> Iterator[None]:
    """Keeps a SIGTERM back until all ranks are through, and then has its handler called on all of them at one place.

    A handler that communicates would cut into what this rank sends, and not into what the others do.
    """
    handler = signal.getsignal(signal.SIGTERM)
    mine = threading.current_thread() is threading.main_thread() and callable(handler)
    came: list[int] = []
    if mine:
        signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    final = False
    try:
        yield
    except BaseException as error:
        final = not isinstance(error, Exception) or (isinstance(error, RankError) and error.final)
        raise
    finally:
        try:
            if mine and not final:
                _wait_for_signal(came)
        finally:
            if mine:
                signal.signal(signal.SIGTERM, handler)
            if came:
                signal.raise_signal(signal.SIGTERM)


def _wait_for_signal(came: Sequence[int]) -> None:
    """Where rank 0 has been signalled, whose handler passes the signal on, the others wait for it."""
    flags = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(flags, torch.tensor([len(came)]), group=_group())
    if int(flags[0]) and dist.get_rank():
        until = time.monotonic() + _SIGNAL_SECONDS
        while not came and time.monotonic() < until:
            time.sleep(0.01)


def _group() -> Any:
    """A group of all ranks on the CPU, in which nothing else is sent; made once for each default group."""
    default = dist.group.WORLD
    if not _groups or _groups[0][0] is not default:
        if dist.get_backend() == "gloo":
            # A rank that is gone is told of here; the making of a group would wait for it until its timeout.
            dist.barrier()
        backend = "gloo" if dist.is_gloo_available() else None
        _groups[:] = [(default, dist.new_group(backend=backend))]
    return _groups[0][1]


def _exchange(state: int, text: str, timeout: timedelta | None = None) -> None:
    """Tells this rank's state and place to all, and compares with theirs."""
    group = _group()
    place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
    mine = torch.tensor([state, place])
    states = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    work = dist.all_gather(states, mine, group=group, async_op=True)
    _ = work.wait() if timeout is None else work.wait(timeout)
    found = torch.stack(states).tolist()
    if all(other == [_OK, place] for other in found):
        return
    texts: list[Any] = [None] * len(found)
    dist.all_gather_object(texts, text, group=group)
    final = any(other == _ENDED for other, _ in found)
    failed = [(rank, *texts[rank].partition("\0")) for rank, (other, _) in enumerate(found) if other != _OK]
    if failed:
        raise RankError("; ".join(f"{work} failed on rank {rank}: {why}" for rank, work, _, why in failed), final=final)
    places = "; ".join(f"rank {rank} at {text}" for rank, text in enumerate(texts))
    raise RankError(f"ranks are at different places, as with different models or probes: {places}")


def _tell(error: BaseException, work: str, patience: float | None) -> None:
    """Tells the others that this rank has failed."""
    state = _FAILED if isinstance(error, Exception) else _ENDED
    timeout = None if patience is None else timedelta(seconds=patience)
    try:
        _exchange(state, f"{work}\0{type(error).__name__}: {error}", timeout)
    except RankError:
        error.__dict__["_told_to_ranks"] = True
    except RuntimeError as silence:
        raise RankError(
            f"{work} failed on this rank ({type(error).__name__}: {error}), and the others have not answered: they may "
            "wait within a collective of the sharded model, so the run cannot go on",
            final=True,
        ) from silence


def _told(error: BaseException | None) -> bool:
    """Whether the ranks know of a failure already."""
    while error is not None:
        if isinstance(error, RankError) or getattr(error, "_told_to_ranks", False):
            return True
        error = error.__cause__
    return False


class UnseenByReducer(TorchFunctionMode):
    """Lets ``Tensor.backward`` reach the leaves without their hooks, which count for DistributedDataParallel.

    Its reducer hears of every gradient that a leaf accumulates, also outside of its own passes: with ``static_graph``
    it counts them, with ``find_unused_parameters`` it takes the parameter for used.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.backward:
            return _accumulate(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _accumulate(
    loss: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Sequence[Tensor] | None = None,
) -> None:
    """What ``loss.backward`` does, to the last bit, with the leaves' own hooks alone."""
    leaves = list(_leaves(loss) if inputs is None else [inputs] if isinstance(inputs, Tensor) else inputs)
    if not leaves:
        raise RuntimeError("the loss does not depend on a parameter, so it has no gradient")
    gradients = torch.autograd.grad(
        loss, leaves, gradient, retain_graph=retain_graph, create_graph=create_graph, allow_unused=True
    )
    taken: set[int] = set()
    for leaf, value in zip(leaves, gradients, strict=True):
        if value is not None:
            # Gradients of a sum are one tensor, and each leaf owns its own.
            value = value.clone() if value.data_ptr() in taken else value.contiguous()
            taken.add(value.data_ptr())
            leaf.grad = value if leaf.grad is None else leaf.grad + value
            for hook in list((getattr(leaf, "_post_accumulate_grad_hooks", None) or {}).values()):
                hook(leaf)


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The leaves that a loss depends on."""
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        waiting += [following for following, _ in node.next_functions]


def reducer_counts(trainer: Any) -> bool:
    """Whether a trainer's strategy takes account of gradients outside of its own passes."""
    strategy = getattr(trainer, "strategy", None)
    if any(base.__name__ == "DeepSpeedStrategy" for base in type(strategy).__mro__):
        # Its stages hook the nodes that accumulate.
        return True
    wrapped = getattr(strategy, "model", None)
    if not isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return False
    return bool(wrapped.static_graph or wrapped.find_unused_parameters)
