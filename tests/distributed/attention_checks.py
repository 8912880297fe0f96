"""Run in several processes: attention statistics on replicas and on shards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_goldy.analysis.attention import attention_maps, attention_statistics
from lightning_goldy.core import ParameterSpace, ParameterVector
from lightning_goldy.core.sharding import scatter_like
from tests.references.models import build, token_batch


def statistics(layout: str) -> dict:
    """Every statistic of a small model, the drift from another, a map, and whether the weights came back."""
    torch.manual_seed(0)
    model = build("llama").eval()
    if layout == "shards":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    space, other = ParameterSpace.of(model), ParameterVector.of(build("llama", seed=1))
    parameters = space.resolve(model)
    base = ParameterVector(space, {name: scatter_like(parameters[name].detach(), other[name]) for name in space})
    before = [local_clone(parameter) for parameter in model.parameters()]
    batches = [token_batch(3, 10), token_batch(2, 7, padding=2, seed=5), token_batch(1, 10, seed=6)]
    pieces = attention_statistics(model, batches, base=base, memory=2 * 2 * 4 * 10 * 10 * 4)
    alone = attention_statistics(model, batches, n_samples=5)
    maps = attention_maps(model, batches[1])
    after = [local_clone(parameter) for parameter in model.parameters()]
    return {
        "statistics": {name: pieces.statistic(name) for name in pieces.names},
        "without_base": {name: alone.statistic(name) for name in alone.names},
        "queries": pieces.queries,
        "samples": (pieces.n_samples, alone.n_samples),
        "forwards": pieces.cost.forwards,
        "map": maps.pattern(1, 3),
        "same": all(map(torch.equal, before, after)),
    }


def local_clone(parameter: nn.Parameter) -> torch.Tensor:
    value = parameter.detach()
    return (value.to_local() if hasattr(value, "to_local") else value).clone()
