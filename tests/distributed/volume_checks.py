"""Run in several processes: volumes on replicas and on shards."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_goldy.analysis import basin_volume
from lightning_goldy.analysis.basin import BridgeSettings
from lightning_goldy.core import CausalLMObjective, ParameterSpace
from tests.references.models import build, token_batch


class Doubling:
    """Needs whole tensors; mixes rows, so that a shard alone would not do."""

    name, whole_tensors = "doubling", True

    def __init__(self, space: ParameterSpace) -> None:
        self.space = space

    def apply(self, name: str, direction: Tensor, start: int) -> Tensor:
        return direction.flip(0)


def estimates(layout: str, options: dict) -> dict:
    """The volume of one small model as replicas or as shards, and whether the weights came back."""
    torch.manual_seed(0)
    model = build("llama").eval()
    if layout == "shards":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    preconditioner = Doubling(ParameterSpace.of(model)) if options.pop("mixing", False) else None
    before = [local_clone(parameter) for parameter in model.parameters()]
    passed: list[int] = []
    model.register_forward_hook(lambda module, args, output: passed.append(len(output.logits)))
    result = basin_volume(model, [token_batch(3, 10)], CausalLMObjective(), preconditioner=preconditioner, **options)
    after = [local_clone(parameter) for parameter in model.parameters()]
    return {
        "estimates": result.estimates.tolist(),
        "radii": result.radii.tolist(),
        "evaluations": result.total_evaluations,
        "cost": result.cost.forwards,
        "passed": sum(passed),
        "same": all(map(torch.equal, before, after)),
    }


def local_clone(parameter: nn.Parameter) -> Tensor:
    value = parameter.detach()
    return (value.to_local() if hasattr(value, "to_local") else value).clone()


def all_cases(layout: str) -> list[dict]:
    """Every combination that a single process is compared with."""
    return [estimates(layout, dict(options)) for options in CASES]


class PowerFailureError(Exception):
    """Ends a bridge in its middle."""


def bridged(folder: str | None = None) -> dict:
    """A short bridge around one small model, its chains shared out over the processes.

    Args:
        folder: Where its state is kept; then it is ended in its middle and goes on there.
    """
    torch.manual_seed(0)
    model = build("llama").eval()
    before = [local_clone(parameter) for parameter in model.parameters()]
    passed: list[int] = []
    model.register_forward_hook(lambda module, args, output: passed.append(len(output.logits)))
    settings = BridgeSettings(chains=3, nodes=2, max_gradients=300, keep_in=folder)
    options = {"method": "bridge", "bridge": settings}

    def dying(done: int, total: int) -> None:
        if done > 200:
            raise PowerFailureError

    if folder is not None:
        with contextlib.suppress(PowerFailureError):
            basin_volume(model, [token_batch(3, 10)], CausalLMObjective(), progress=dying, **options)
        passed.clear()
    result = basin_volume(model, [token_batch(3, 10)], CausalLMObjective(), **options)
    return {
        "numbers": [result.log_volume, result.error, result.inverse_temperature],
        "gradients": result.gradients,
        "cost": (result.cost.forwards, result.cost.backwards),
        "passed": sum(passed),
        "same": all(map(torch.equal, before, [local_clone(parameter) for parameter in model.parameters()])),
    }


def replicas_cases(folder: str) -> tuple[list[dict], dict, dict]:
    """All that replicas are compared in, in one world."""
    return all_cases("replicas"), bridged(), bridged(folder)


CASES: list[dict] = [
    {"n_directions": 5},
    {"n_directions": 3, "mixing": True},
    {"n_directions": 2, "measure": "sphere"},
    {"n_directions": 2, "cache": "none", "directions": "implicit"},
]
