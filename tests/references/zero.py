"""Stand-ins, told by their names, for strategies whose packages or devices are absent where tests run."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


class FlatOptimizer(torch.optim.Optimizer):
    """What DeepSpeed makes of an optimizer at stages 1 and 2.

    Parameters become views of one flat tensor, of which each rank's optimizer has a part. At stage 2 a hook takes each
    gradient as soon as it is accumulated, and none is taken twice before a step.

    Args:
        optimizer: What ``configure_optimizers`` gave.
        stage: 1 or 2.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, stage: int) -> None:
        self.stage = stage
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        flat = _flatten_dense_tensors([parameter.data for parameter in self.parameters])
        self.length = -(-len(flat) // dist.get_world_size())
        self.flat = torch.cat([flat, flat.new_zeros(self.length * dist.get_world_size() - len(flat))])
        for parameter, view in zip(self.parameters, _unflatten_dense_tensors(self.flat, self.parameters), strict=False):
            parameter.data = view
        start = dist.get_rank() * self.length
        self.part = nn.Parameter(self.flat[start : start + self.length].clone())
        self.taken: dict[int, torch.Tensor] = {}
        super().__init__([self.part], {"lr": optimizer.param_groups[0]["lr"]})
        self.inner = type(optimizer)([self.part], lr=optimizer.param_groups[0]["lr"])
        self.state = self.inner.state
        if stage == 2:
            for number, parameter in enumerate(self.parameters):
                parameter.register_post_accumulate_grad_hook(lambda leaf, number=number: self._take(number, leaf))

    def _take(self, number: int, parameter: nn.Parameter) -> None:
        if number in self.taken:
            raise RuntimeError(f"The parameter {number} has already been reduced")
        dist.all_reduce(parameter.grad)
        self.taken[number], parameter.grad = parameter.grad / dist.get_world_size(), None

    def step(self, closure: Any = None) -> Any:
        loss = closure()
        if self.stage == 1:
            for number, parameter in enumerate(self.parameters):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self._take(number, parameter)
        whole = [self.taken.get(number, torch.zeros_like(held)) for number, held in enumerate(self.parameters)]
        self.taken.clear()
        gradient = torch.cat([_flatten_dense_tensors(whole), self.flat.new_zeros(len(self.flat))])
        start = dist.get_rank() * self.length
        self.part.grad = gradient[start : start + self.length].clone()
        self.inner.step()
        parts = [torch.empty_like(self.part.data) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, self.part.data)
        with torch.no_grad():
            self.flat.copy_(torch.cat(parts))
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The parts of all ranks, which DeepSpeed writes to files of their own."""
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, self.inner.state_dict())
        return {"parts": parts, "state": {}, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["parts"][dist.get_rank()])
        self.state = self.inner.state
        start = dist.get_rank() * self.length
        self.part.data.copy_(self.flat[start : start + self.length])


class DeepSpeedStrategy(DDPStrategy):
    """Stages 1 and 2 of ZeRO on the CPU, without mixed precision.

    Args:
        stage: Of ZeRO; at 3 it only says so.
        **options: Of DDPStrategy.
    """

    def __init__(self, stage: int, **options: Any) -> None:
        super().__init__(**options)
        self.config = {"zero_optimization": {"stage": stage}}

    def configure_ddp(self) -> None:
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            dist.broadcast(tensor.data, 0)

    def setup_optimizers(self, trainer: Any) -> None:
        super().setup_optimizers(trainer)
        stage = self.config["zero_optimization"]["stage"]
        if stage < 3 and self.optimizers:
            self.optimizers = [FlatOptimizer(optimizer, stage) for optimizer in self.optimizers]

    def teardown(self) -> None:
        self.cluster_environment.teardown()


class FSDPStrategy(SingleDeviceStrategy):
    """FSDP1, which Lightning refuses on the CPU."""


class SlowFSDP(FSDPStrategy):
    """A user's own."""


class OwnDeepSpeed(DeepSpeedStrategy):
    """A user's own."""
