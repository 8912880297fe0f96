"""Slow and obvious versions of frozen attention and of linearised MLPs, on copies of the model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_goldy.core import ParameterVector
from lightning_goldy.core.architecture import Block, describe_architecture


def at_base(model: nn.Module, base: ParameterVector) -> Any:
    """A copy of the model that has the base's values."""
    found = copy.deepcopy(model).eval()
    parameters = dict(found.named_parameters())
    with torch.no_grad():
        for name, value in base.items():
            parameters[name].copy_(value)
    return found


@contextmanager
def softmax_of_base(model: Any, base: ParameterVector, batch: dict[str, Tensor], *, times: int = 1) -> Iterator[None]:
    """Inside, the k-th softmax of a pass gives what the k-th softmax of the base's pass gave, not what it is asked for.

    Under eager attention the patterns are the only softmaxes of a pass; ``times`` passes have to be made.
    """
    start = at_base(model, base)
    for each in (start, model):
        each.set_attn_implementation("eager")
    seen: list[Tensor] = []
    own = F.softmax

    def recorded(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(own(*args, **kwargs))
        return seen[-1]

    with torch.no_grad(), mock.patch.object(F, "softmax", recorded):
        start(**batch)
    with mock.patch.object(F, "softmax", side_effect=seen * times) as given:
        yield
    assert given.call_count == len(seen) * times


def mlp_of(model: nn.Module, block: Block) -> Callable[[Tensor], Tensor]:
    """From an MLP's input to the output of its last projection."""
    if block.mlp is not None:
        return block.mlp
    between = getattr(block.module, "activation_fn", lambda hidden: hidden)
    return lambda x: block.mlp_output(between(block.mlp_input(x)))


def mlp_inputs(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """What each MLP is given."""
    found: list[Tensor] = []
    blocks = describe_architecture(model).blocks
    handles = [block.mlp_input.register_forward_pre_hook(lambda part, args: found.append(args[0])) for block in blocks]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def linear_mlp_logits(model: Any, base: ParameterVector, batch: dict[str, Tensor], at: str) -> Tensor:
    """Logits with every MLP replaced by its expansion, whose derivative is a central difference of whole models."""
    start = at_base(model, base)
    base_inputs = mlp_inputs(start, batch)
    moved = {sign: at_base(model, base) for sign in (1, -1, 2, -2)}
    step = 1e-3
    present = dict(model.named_parameters())
    with torch.no_grad():
        for sign, each in moved.items():
            for name, parameter in each.named_parameters():
                if name in base:
                    parameter.add_(sign * step * (present[name] - base[name]))
    mlps = {key: _mlps(each) for key, each in {0: start, **moved}.items()}
    inputs: dict[int, Tensor] = {}
    handles = []
    for index, block in enumerate(describe_architecture(model).blocks):

        def enter(part: nn.Module, args: Any, index: int = index) -> None:
            inputs[index] = args[0]

        def leave(part: nn.Module, args: Any, output: Tensor, index: int = index) -> Tensor:
            x = inputs[index]
            x0 = base_inputs[index] if at == "base" else x
            value = {sign: mlps[sign][index](x0 + sign * step * (x - x0)) for sign in (0, 1, -1, 2, -2)}
            # Error of fourth order in the step.
            slope = (8 * (value[1] - value[-1]) - (value[2] - value[-2])) / (12 * step)
            return value[0] + slope

        handles.append(block.mlp_input.register_forward_pre_hook(enter))
        handles.append(block.mlp_output.register_forward_hook(leave))
    with torch.no_grad():
        logits = model(**batch).logits
    for handle in handles:
        handle.remove()
    return logits


def _mlps(model: nn.Module) -> list[Callable[[Tensor], Tensor]]:
    return [mlp_of(model, block) for block in describe_architecture(model).blocks]
