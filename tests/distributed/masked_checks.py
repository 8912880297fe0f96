"""Run in several processes: MaskedAdamW on replicas and on shards, and a masked Lightning run."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from lightning_goldy import MaskedAdamW, ParameterMask, ParameterSpace
from lightning_goldy.core.sharding import gather
from tests.distributed.sharded_models import build, shard


def train(
    layout: str, rates: tuple[float, float], folder: str, *, kind: str = "odd", resumed: bool = False, **options
) -> dict[str, Tensor]:
    """Parameters after five steps on the same data everywhere, whole; the mask comes from a file that rank 0 wrote."""
    model, forward = build(kind)
    space = ParameterSpace.of(model)
    path = Path(folder) / f"{kind}.safetensors"
    together = dist.is_initialized()
    if not together or dist.get_rank() == 0:
        ParameterMask.random(space, 30, seed=5).save(path, model=model)
    if together:
        dist.barrier()
    trained = placed(model, layout)
    names = trained.module if layout == "replicas" else trained
    optimizer = make(names, path, rates, options)
    for step in range(5):
        if resumed and step == 2:
            optimizer = moved_through_state(names, optimizer, make(names, None, rates, options))
        optimizer.zero_grad()
        forward(trained).square().mean().backward()
        optimizer.step()
    return {name: gather(parameter).clone() for name, parameter in names.named_parameters()}


def placed(model: nn.Module, layout: str) -> nn.Module:
    if layout == "replicas":
        return DistributedDataParallel(model)
    if layout == "shards":
        return shard(model, "by layer", init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def make(model: nn.Module, path: Path | None, rates: tuple[float, float], options: dict) -> MaskedAdamW:
    mask = None if path is None else ParameterMask.load(path, model)
    return MaskedAdamW(model.named_parameters(), mask, *rates, weight_decay=0.1, **options)


def moved_through_state(model: nn.Module, optimizer: MaskedAdamW, fresh: MaskedAdamW) -> MaskedAdamW:
    """Through the whole state on every process, as a checkpoint holds it."""
    whole = StateDictOptions(full_state_dict=True)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=whole))
    before = {name: gather(parameter).clone() for name, parameter in model.named_parameters()}
    optimizer.zero_grad()
    # Makes a step at rate 0 to fill the state, before any mask is there.
    set_optimizer_state_dict(model, fresh, state, options=whole)
    assert all(torch.equal(gather(parameter), before[name]) for name, parameter in model.named_parameters())
    mask = optimizer.mask
    assert mask is not None
    fresh.set_mask(mask.to_dense())
    return fresh


def all_cases(layout: str, folder: str) -> list[dict[str, Tensor]]:
    """Every combination that a single process is compared with."""
    return [train(layout, rates, folder, **options) for rates, options in CASES]


def resumed_cases(layout: str, folder: str) -> list[dict[str, Tensor]]:
    """The same, with the optimizer's state gathered and scattered again on the way."""
    return [train(layout, rates, folder, **options, resumed=True) for rates, options in CASES]


CASES: list[tuple[tuple[float, float], dict]] = [
    ((1e-2, 0.0), {}),
    ((0.0, 1e-2), {"foreach": True}),
    ((1e-2, 1e-3), {"foreach": True, "amsgrad": True}),
    ((1e-2, 1e-3), {"kind": "gpt2"}),
    ((1e-2, 1e-2), {}),
]


def mask_answers() -> dict:
    """Set operations and counts on shards."""
    model, _ = build("odd")
    space = ParameterSpace.of(model)
    whole = [ParameterMask.random(space, 30, seed=seed) for seed in (0, 1)]
    placed_model = placed(model, "shards") if dist.is_initialized() else model
    first, second = (ParameterMask.random(space, 30, seed=seed, module=placed_model) for seed in (0, 1))
    assert all(torch.equal(gather(first[name]), whole[0][name]) for name in first)
    found = {"iou": first.iou(second), "overlap": first.chance_corrected_overlap(second), "density": first.density}
    found["blocks"] = [(each.block, each.count) for each in first.block_summary()]
    found["minus"] = {name: index.tolist() for name, index in ((first | second) - (~first)).indices().items()}
    return found
