"""Run in several processes by test_experts: stacked experts in shards are analysed as in one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from lightning_goldy.analysis import (
    golden_parameters,
    parameter_distribution,
    reverse_golden_parameters,
    taylor_diff,
)
from lightning_goldy.analysis.change import weight_change
from lightning_goldy.core import ParameterSpace, ParameterVector, random_direction
from tests.references.model_zoo import batch_for, build_family

STACKS = ["*experts*"]


def within_experts(value: nn.Parameter) -> Shard:
    """Along what divides by three, so that each process has a part of every expert."""
    return Shard(0 if value.ndim < 3 else 1 if value.shape[1] % 3 == 0 else 2)


def build(layout: str) -> Any:
    model = build_family("Mixtral")
    model.set_experts_implementation("eager")
    model.model.layers = model.model.layers[:1]
    if layout == "alone":
        return model
    options: dict[str, Any] = {"mesh": init_device_mesh("cpu", (dist.get_world_size(),))}
    if layout == "columns":
        # What divides by three; each process then has a part of every expert.
        options["shard_placement_fn"] = lambda value: Shard(
            0 if value.ndim < 3 else 1 if value.shape[1] % 3 == 0 else 2
        )
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def results(layout: str) -> dict[str, Any]:
    """Rows and numbers of every analysis that goes expert by expert."""
    model = build(layout)
    batch, space = batch_for(build_family("Mixtral")), ParameterSpace.of(model, STACKS)
    base = ParameterVector.of(model, space)
    step = random_direction(space, 3, module=model)
    with torch.no_grad():
        for name, parameter in space.resolve(model).items():
            parameter.add_(step[name], alpha=1e-2)
    golden = golden_parameters(model, [batch], top_k_percent=10, space=space, quorum=0.5)
    reverse = reverse_golden_parameters(
        model, [batch], eval_batches=[batch], top_k_percent=10, space=space, strategy="none", rounds=1
    )
    taylor = taylor_diff(model, base, [batch], function_space=False, orders=(1,), by="tensor")
    return {
        "golden": (golden.golden, golden.marked, golden.names, golden.mask.to_dense()),
        "reverse": (reverse.masked, reverse.kl_divergence),
        "taylor": taylor.loss_shares,
        "change": weight_change(model, base).rows(),
        "distribution": parameter_distribution(model, base, top=2).rows,
    }


def compare(found: dict[str, Any], expected: dict[str, Any]) -> None:
    *counts, mask = found["golden"]
    *wanted, whole = expected["golden"]
    assert counts == wanted
    assert all(torch.equal(mask[name], whole[name]) for name in whole)
    assert found["reverse"][0] == expected["reverse"][0]
    assert found["reverse"][1] == pytest.approx(expected["reverse"][1], rel=1e-4)
    assert list(found["taylor"]) == list(expected["taylor"])
    assert found["taylor"] == pytest.approx(expected["taylor"], rel=1e-3, abs=1e-7)
    for name in ("change", "distribution"):
        for row, other in zip(found[name], expected[name], strict=True):
            assert row.keys() == other.keys()
            for key, value in row.items():
                same = isinstance(value, str) or value is None
                assert value == (other[key] if same else pytest.approx(other[key], rel=1e-5)), key


def check_all(layout: str, expected: dict[str, Any]) -> int:
    compare(results(layout), expected)
    return dist.get_rank()
