"""Run in several processes: coupling and activation similarity on replicas and on shards."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_goldy.analysis import CouplingResult, activation_similarity, knowledge_coupling
from lightning_goldy.analysis.coupling import coupling as coupling_run
from lightning_goldy.analysis.coupling.coupling import CouplingRun
from lightning_goldy.analysis.result import Cost
from lightning_goldy.core.sharding import local
from tests.analysis.coupling.test_coupling_cost import counted
from tests.references.coupling_models import TinyLM, pieces
from tests.references.models import build

LENGTHS = [7, 12, 5, 9, 12, 8, 6]
CASES: list[dict] = [
    {},
    {"select": ["*q_proj*", "*norm*", "*embed*"], "center": True},
    {"projection": 128, "normalize": False},
    {"on_error": "nan", "chunk_size": 2},
]
SHARDED_CASES = [CASES[0], CASES[2], CASES[3], {"select": ["*proj*"], "chunk_size": 3}]


def model_of(layout: str) -> nn.Module:
    if layout in ("functional", "partly"):
        torch.manual_seed(0)
        return fully_shard(TinyLM(layout), mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    model = build("llama").double()
    if layout == "shards":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    elif layout == "tensor parallel":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            plan = {
                "mlp.gate_proj": ColwiseParallel(),
                "mlp.up_proj": ColwiseParallel(),
                "mlp.down_proj": RowwiseParallel(),
            }
            parallelize_module(layer, mesh, plan)
    return model


def batch_of(options: dict) -> dict[str, torch.Tensor]:
    batch = pieces(LENGTHS)
    if options.get("on_error") == "nan":
        batch["labels"][[1, 6]] = -100
    return batch


def all_cases(layout: str, cases: list[dict]) -> list[str]:
    """Every case as JSON; the model must come back as it was."""
    model, results = model_of(layout), []
    before = [local(parameter).clone() for parameter in model.parameters()]
    for options in cases:
        with counted(model) as seen:
            result = knowledge_coupling(model, [batch_of(options)], **options)
        if layout == "replicas":
            # Every replica tries a first piece, which counts once.
            again = dist.get_world_size() - 1 if dist.is_initialized() else 0
            assert result.cost + Cost(again, again) == total(seen), (options, result.cost, seen)
        results.append(result.to_json())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for pooling in ("last", "mean"):
        results.append(activation_similarity(model, [batch_of({})], pooling=pooling).to_json())
    assert all(map(torch.equal, before, map(local, model.parameters())))
    return results


def total(seen: Counter[str]) -> Cost:
    """What hooks on every rank's model have counted."""
    parts: list[Counter[str]] = [seen]
    if dist.is_initialized():
        parts = [Counter() for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, seen)
    return Cost(*(sum(part[name] for part in parts) for name in ("forwards", "backwards")))


def alone(cases: list[dict]) -> list[CouplingResult]:
    return [CouplingResult.from_json(text) for text in all_cases("replicas", cases)]


class StopHereError(Exception):
    """An interruption."""


def through_a_folder(folder: str) -> str:
    """A run that stops on one rank after some blocks, and its continuation."""
    coupling_run._FOLDER_BLOCK_SIZE = 2
    model, batch = model_of("replicas"), batch_of({})
    original = CouplingRun._captured

    def stopping(self: CouplingRun, indices: list[int], *args: object) -> object:
        if dist.get_rank() == 1 and len(indices) == 1:
            raise StopHereError("enough")
        return original(self, indices, *args)

    CouplingRun._captured = stopping
    with pytest.raises((StopHereError, RuntimeError), match="enough"):
        knowledge_coupling(model, [batch], workspace=folder)
    CouplingRun._captured = original
    assert len(list(Path(folder).glob("rows-*"))) == 3
    return knowledge_coupling(model, [batch], workspace=folder).to_json()


def refusals() -> list[str]:
    """What is said of models that are split in ways that hide layers or gradients."""
    found = []
    for layout, options in (
        ("tensor parallel", {}),
        ("shards", {"select": ["*norm*"]}),
        ("functional", {"select": ["layer.weight"]}),
        ("partly", {"select": ["layer.weight"]}),
        ("shards", {"workspace": "/nowhere"}),
        ("replicas", {"memory_limit": 10}),
    ):
        try:
            knowledge_coupling(model_of(layout), [batch_of({})], **options)
        except ValueError as error:
            found.append(str(error))
    broken = batch_of({"on_error": "nan"})
    try:
        knowledge_coupling(model_of("replicas"), [broken])
    except (ValueError, RuntimeError) as error:
        found.append(str(error))
    return found
