"""Small models, and the ways in which parameters are spread over processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from tests.references.models import build as build_family
from tests.references.models import token_batch


class Odd(nn.Module):
    """No length divides by 2 or 3, some are shorter than the number of processes, one weight has three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.conv = nn.Conv1d(1, 5, 3, padding=1)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(self.first(x).tanh()[:, None]).mean(dim=1)
        return self.last(self.norm(hidden))


class Even(nn.Module):
    """Two layers that tensor parallelism can split by columns and by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def build(kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A model, the same on every process, and a forward that gives its outputs."""
    torch.manual_seed(11)
    if kind == "gpt2":
        ids = token_batch(2, 6)["input_ids"]
        return build_family("gpt2").eval(), lambda model: model(input_ids=ids).logits
    if kind == "even":
        x = torch.randn(3, 6)
        return Even(), lambda model: model(x)
    x = torch.randn(3, 7)
    return Odd(), lambda model: model(x)


def shard(module: nn.Module, layout: str, mesh: DeviceMesh) -> nn.Module:
    if layout == "tensor parallel":
        parallelize_module(module, mesh["model"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return fully_shard(module, mesh=mesh["data"])
    if layout == "columns":
        # As tensor parallelism leaves it: some split by columns, some by rows, some everywhere, some no DTensor at all.
        for name, parameter in list(module.named_parameters()):
            if name.endswith("norm.bias"):
                continue
            owner = module.get_submodule(name.rpartition(".")[0])
            place = Shard(1) if parameter.ndim > 1 else Replicate() if name.endswith("norm.weight") else Shard(0)
            sharded = distribute_tensor(parameter.detach(), mesh, [place])
            owner.register_parameter(name.rpartition(".")[2], nn.Parameter(sharded))
        return module
    if hasattr(module, "transformer"):
        for block in module.transformer.h:
            fully_shard(block, mesh=mesh)
    elif layout == "by layer":
        fully_shard(module.first, mesh=mesh)
    return fully_shard(module, mesh=mesh)
