"""Run in several processes: ripple effects on replicas and on shards."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_goldy.analysis.ripple import EditRequest, FinetuneEditor, RankOneEditor, RippleResult, ripple_effects
from lightning_goldy.core.space import ParameterSpace
from tests.references.models import build
from tests.references.ripple import TEMPLATE, facts, tokenizer

EDITS = [("capital of Peru", "Vientiane"), ("money of Chad", "kip"), ("area of Laos", "big")]


class Failing:
    """Fails where it makes the second of three edits, which is on rank 1 of two."""

    def space(self, model: nn.Module) -> ParameterSpace:
        return ParameterSpace.of(model, ["*mlp*"])

    def edit(self, model: nn.Module, request: EditRequest) -> None:
        if dist.get_rank() == 1:
            raise ArithmeticError("half way")


def effects(editor: str, together: bool = False) -> RippleResult:
    """Of a small model."""
    # Random weights answer so little to one projection that a weight decay keeps it as it is.
    others = {"finetune": FinetuneEditor(learning_rate=1e-2, steps=2), "rank_one": RankOneEditor(weight_decay=0.0)}
    chosen = others.get(editor, editor)
    return ripple_effects(
        build("llama"), facts(), EDITS, tokenizer=tokenizer(), template=TEMPLATE, editor=chosen, together=together
    )


def replicas() -> list[str]:
    """Every editor, and a failure that both processes must survive."""
    found = [effects(editor, together).to_json() for editor, together in CASES]
    model = build("llama")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    error, message = (
        (ArithmeticError, "half way") if dist.get_rank() else (RuntimeError, "failed on rank 1: Arithmetic")
    )
    with pytest.raises(error, match=message):
        ripple_effects(model, facts(), EDITS, tokenizer=tokenizer(), template=TEMPLATE, editor=Failing())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return found


CASES = [("gradient_step", False), ("finetune", False), ("rank_one", False), ("finetune", True)]


def shards() -> str:
    """What is said of a sharded model."""
    model = build("llama")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match="FSDP2") as caught:
        ripple_effects(model, facts(), EDITS, tokenizer=tokenizer(), template=TEMPLATE)
    return str(caught.value)
