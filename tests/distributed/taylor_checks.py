"""Run in several processes: Taylor comparisons on replicas and on shards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_goldy.analysis import TaylorDiffResult, taylor_diff
from lightning_goldy.core import ParameterSpace, ParameterVector, random_direction
from tests.references.models import build, token_batch


def compare(layout: str, size: float, function_space: bool) -> TaylorDiffResult:
    """One small step of one small model, as replicas or as shards."""
    model = build("llama").eval()
    if layout == "shards":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    space = ParameterSpace.of(model)
    base = ParameterVector.of(model, space)
    step = random_direction(space, 3, module=model)
    with torch.no_grad():
        for name, parameter in space.resolve(model).items():
            parameter.add_(step[name], alpha=size)
    batches = [token_batch(3, 8), token_batch(2, 10, seed=4), token_batch(1, 9, seed=5)]
    return taylor_diff(model, base, batches, function_space=function_space)


def compared(layout: str) -> list[str]:
    """Both spaces, as JSON."""
    return [compare(layout, 0.01, function_space).to_json() for function_space in (True, False)]
