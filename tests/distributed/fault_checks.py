"""Run in several processes: what the others do when one rank fails, wherever they are."""

from __future__ import annotations

import os
import signal
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_goldy.core.isolation import preserved, undisturbed
from lightning_goldy.core.sharding import RankError, Replicas, gather, sum_over_shards


def survived() -> dict[str, object]:
    """What each rank saw in every case, and that they are together afterwards."""
    world = Replicas.world()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    mesh = init_device_mesh("cpu", (world.size,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    places = {
        "before a sum": lambda: world.sum_(torch.ones(3)),
        "before objects": lambda: world.gather_objects("x"),
        "before the end": lambda: None,
        "before gathering": lambda: gather(model[0].weight),
        "before a sum over shards": lambda: sum_over_shards([torch.ones(1)], [model[0].weight]),
        "before a forward pass": lambda: model(torch.ones(1, 4)),
        "inside a nested context": lambda: _nested(world),
    }
    seen: dict[str, object] = {name: _failing(world, model, place) for name, place in places.items()}
    seen["elsewhere"] = _elsewhere(world)
    seen["another value"] = _disagreement(world)
    seen["a signal"] = _signalled(world)
    seen["in time"] = world.gather_soon(world.rank, 20.0)
    started = time.monotonic()
    seen["alone"] = world.gather_soon(0, 1.0) if world.rank == 0 else None
    seen["waited"] = time.monotonic() - started
    return seen


def _nested(world: Replicas) -> None:
    with world.together("the inner work"):
        world.sum_(torch.ones(1))


def _failing(world: Replicas, model: nn.Module, place) -> str:
    try:
        with world.together("the work"), preserved(model):
            place()  # all ranks come this far
            if world.rank == 1:
                raise MemoryError("no room")
            place()
    except (RankError, MemoryError) as error:
        world.meet("after the failure")
        return f"{type(error).__name__}: {error}"
    return "nothing"


def _elsewhere(world: Replicas) -> str:
    with pytest.raises(RankError) as caught, world.together("the work"):
        world.sum_(torch.ones(2 if world.rank else 3))
    return str(caught.value)


def _disagreement(world: Replicas) -> str:
    world.agree("the same", "value")
    with pytest.raises(ValueError, match="differs") as caught:
        world.agree("the probe", world.rank)
    return str(caught.value)


def _signalled(world: Replicas) -> list[str]:
    """Rank 0 is told to end in the middle of common work, and its handler tells the other one and communicates."""
    pids, log = world.gather_objects(os.getpid()), []

    def handler(number: int, frame: object) -> None:
        if world.rank == 0:
            os.kill(pids[1], number)
        dist.broadcast(torch.ones(1), 0)
        log.append("heard")

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with world.together("the work"):
            world.sum_(torch.ones(1))
            if world.rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            log.append(str(float(world.sum_(torch.ones(1)))))
        log.append(str(float(world.sum_(torch.ones(1)))))
    finally:
        signal.signal(signal.SIGTERM, before)
    return log


class _Parts(nn.Module):
    """Of two layers a forward uses those that it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x: torch.Tensor, both: bool) -> torch.Tensor:
        return self.first(x) + (self.second(x) if both else 0)


def trained(analysed: bool, **options) -> list[list[float] | None]:
    """Weights, and gradients of the last step, of a training under DistributedDataParallel."""
    torch.manual_seed(0)
    module = _Parts()
    wrapped = DistributedDataParallel(module, **options)
    trainer = SimpleNamespace(
        strategy=SimpleNamespace(model=wrapped), precision_plugin=SimpleNamespace(forward_context=nullcontext)
    )
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    both = "static_graph" in options
    for step in range(3):
        if analysed:
            with undisturbed(trainer, module):
                module(torch.ones(2, 2), True).sum().backward()
                assert all(parameter.grad is not None for parameter in module.parameters())
        optimizer.zero_grad()
        wrapped(torch.full((2, 2), 1.0 + step + dist.get_rank()), both).sum().backward()
        optimizer.step()
    gradients = [None if each.grad is None else each.grad.flatten().tolist() for each in module.parameters()]
    return [each.flatten().tolist() for each in module.parameters()] + gradients


def reducers() -> dict[str, bool]:
    """Whether trainings are the same with and without an analysis that runs backward passes."""
    cases = [
        {"static_graph": True},
        {"find_unused_parameters": True},
        {"static_graph": True, "gradient_as_bucket_view": True},
    ]
    return {str(options): trained(False, **options) == trained(True, **options) for options in cases}


def left_behind() -> float | None:
    """Seconds until a rank hears that the other one ended before any of them had anything to do together."""
    dist.barrier()
    waited = None
    if not dist.get_rank():
        started = time.monotonic()
        with pytest.raises(RuntimeError):
            Replicas.world().meet("the start")
        waited = time.monotonic() - started
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return waited
