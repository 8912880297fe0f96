"""Run in several processes: the search for reverse golden parameters on replicas and on shards."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_goldy.analysis import reverse_golden_parameters
from tests.references.models import build, token_batch


def search(layout: str, options: dict) -> dict:
    """What one small model hangs on as replicas or as shards, and whether the weights came back."""
    model = build("llama").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    if layout == "shards":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    before = [local_clone(parameter) for parameter in model.parameters()]
    result = reverse_golden_parameters(
        model, [token_batch(5, 10, seed=1)], eval_batches=[token_batch(2, 10, seed=2)], min_delta=0, **options
    )
    after = [local_clone(parameter) for parameter in model.parameters()]
    return {
        "mask": torch.cat([part.flatten() for part in result.mask.values()]),
        "kl": result.kl_divergence,
        "single_shots": list(result.single_shots.values()),
        "kls": [entry["kl"] for entry in result.history],
        "count": result.count,
        "same": all(map(torch.equal, before, after)),
    }


def local_clone(parameter: nn.Parameter) -> Tensor:
    value = parameter.detach()
    return (value.to_local() if hasattr(value, "to_local") else value).clone()


def all_cases(layout: str) -> list[dict]:
    """Every combination that a single process is compared with."""
    return [search(layout, dict(options)) for options in CASES]


# Pieces of two samples, so that replicas have several each, and with three of them not as many.
CASES: list[dict] = [
    {"top_k_percent": 2, "rounds": 4, "chunk_size": 2},
    {"top_k_percent": 1, "rounds": 4, "scope": "global", "chunk_size": 2, "strategy": "none"},
    {"top_k_percent": 1, "rounds": 3, "chunk_size": None, "cache": "none", "strategy": "chaos_driven"},
]
