"""Run in several processes by the tests of preconditioners: shards against the same model whole."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from lightning_goldy.analysis import (
    adam_curvature,
    adam_preconditioner,
    diagonal_preconditioner,
    kronecker_preconditioner,
    local_volume,
)
from lightning_goldy.core import ParameterSpace, ParameterVector, random_direction
from lightning_goldy.core.sharding import is_sharded, local, local_box
from tests.distributed.sharded_models import Odd
from tests.references.models import build, token_batch


def box_of(tensor, reference):
    """This process's part of a whole tensor, flat."""
    shape, offset = local_box(reference)
    return tensor[tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))].flatten()


def trained(module: nn.Module, x: torch.Tensor) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        # Every process sees the same samples, so the mean over processes is each one's own gradient.
        module(x).square().mean().backward()
        optimizer.step()
    return optimizer


def check_diagonal() -> bool:
    mesh = DeviceMesh("cpu", torch.arange(dist.get_world_size()))
    torch.manual_seed(11)
    whole = Odd()
    torch.manual_seed(11)
    spread = Odd()
    fully_shard(spread.first, mesh=mesh)
    fully_shard(spread, mesh=mesh)
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(5))
    optimizers = trained(whole, x), trained(spread, x)
    spaces = ParameterSpace.of(whole), ParameterSpace.of(spread)
    parameters = spaces[1].resolve(spread)
    assert any(map(is_sharded, parameters.values()))
    moments = [
        adam_curvature(optimizer, space, module=module)
        for optimizer, space, module in zip(optimizers, spaces, (whole, spread), strict=True)
    ]
    for name, parameter in parameters.items():
        assert is_sharded(moments[1][name]) == is_sharded(parameter)
        expected = box_of(moments[0][name], parameter)
        assert torch.allclose(local(moments[1][name]).flatten(), expected, rtol=1e-4, atol=1e-12), name
    pairs = [
        [
            adam_preconditioner(optimizer, space, module=module, eps=0.1)
            for optimizer, space, module in zip(optimizers, spaces, (whole, spread), strict=True)
        ],
        [
            diagonal_preconditioner(random_direction(space, 3, module=module), eps=0.01, exponent=1.0)
            for space, module in zip(spaces, (whole, spread), strict=True)
        ],
    ]
    for tolerance, (one, many) in zip((1e-4, 1e-6), pairs, strict=True):
        assert abs(one.log_mean - many.log_mean) < tolerance
        for name, parameter in parameters.items():
            ones = torch.ones(parameter.shape)
            expected = box_of(one.apply(name, ones.flatten(), 0).view(ones.shape), parameter)
            found = many.apply(name, torch.ones(expected.numel()), 0)
            assert torch.allclose(found, expected, rtol=tolerance), name
            middle = expected.numel() // 2
            assert torch.equal(many.apply(name, torch.ones(expected.numel() - middle), middle), found[middle:])
    return True


def check_kronecker() -> bool:
    mesh = DeviceMesh("cpu", torch.arange(dist.get_world_size()))
    batches = [token_batch(3, 10, seed=number) for number in range(3)]
    whole, spread = build("gpt2"), build("gpt2")
    for block in spread.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(spread, mesh=mesh)
    alone = kronecker_preconditioner(whole, batches, split_over_ranks=False)
    for module in (whole, spread):
        # Replicas share the batches out; sharded processes make every pass together.
        together = kronecker_preconditioner(module, batches)
        assert together.factored == alone.factored
        assert abs(together.log_mean - alone.log_mean) < 1e-5
        for name, shape in zip(alone.space.names, alone.space.shapes, strict=True):
            direction = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            found, expected = (each.apply(name, direction.clone(), 0) for each in (together, alone))
            assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())), name
    results = [
        local_volume(module, distance_from(module), preconditioner=alone, n_directions=3, cutoff=1.0)
        for module in (whole, spread)
    ]
    assert torch.allclose(results[0].props, results[1].props, rtol=1e-6)
    return True


def distance_from(module: nn.Module):
    """Squared distance from the present parameters, summed over all shards."""
    anchor = ParameterVector.of(module)

    def cost(model: nn.Module) -> float:
        moved = ParameterVector.of(model, anchor.space, clone=False)
        return (moved - anchor).norm() ** 2

    return cost
