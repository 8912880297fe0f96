"""The parameters that heads are regrown from."""

from __future__ import annotations

from torch import nn

from lightning_goldy.core.gates import HeadGates
from lightning_goldy.core.space import ParameterSpace


def attention_space(model: nn.Module, gates: HeadGates) -> ParameterSpace:
    """The trainable parameters of all attention modules.

    Raises:
        ValueError: There is none.
    """
    space = ParameterSpace.of(model)
    inside = {id(each) for block in gates.architecture.blocks for each in block.attention.parameters()}
    names = [name for name, parameter in space.resolve(model).items() if id(parameter) in inside]
    if not names:
        raise ValueError(
            "no attention weight is trained, so regrown heads have nothing to begin again with: train the attention, "
            "or set the regrowth's fraction to 0"
        )
    return space.subspace(names)
