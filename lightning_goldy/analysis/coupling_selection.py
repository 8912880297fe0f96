"""Which tensors' gradients are compared."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any, Literal

from torch import nn

from lightning_goldy.core.architecture import Architecture, describe_architecture
from lightning_goldy.core.naming import canonical_name, suggestion
from lightning_goldy.core.space import ParameterSpace, SpaceError

Part = Literal["mlp_output", "attention_output"]
Select = Part | Sequence[str] | ParameterSpace
Layers = tuple[int, int] | str | None
PARTS = ("mlp_output", "attention_output")


def check_selection(select: Select, layers: Layers) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: ``select`` or ``layers`` is malformed.
    """
    if isinstance(select, str) and select not in PARTS:
        raise ValueError(
            f"unknown select {select!r}; {suggestion(select, PARTS)}, a list of patterns of parameter names such as "
            f"[{select!r}], or a ParameterSpace"
        )
    if not isinstance(select, (str, ParameterSpace)) and not (select and all(isinstance(each, str) for each in select)):
        raise ValueError(f"select must name at least one pattern of parameter names; got {select!r}")
    if layers is None:
        return
    if isinstance(layers, str):
        word, _, count = layers.partition(":")
        well = word == "last" and count.isdecimal() and int(count) >= 1
    else:
        well = len(layers) == 2 and all(isinstance(each, int) and not isinstance(each, bool) for each in layers)
    if not well:
        raise ValueError(
            f"layers is None, (a, b) for the layers from a up to but not including b, or 'last:4'; got {layers!r}"
        )


def selected_parameters(
    model: nn.Module, select: Select, layers: Layers = None, *, sample_batch: Any = None
) -> dict[str, nn.Parameter]:
    """The tensors to compare gradients of, whether they are trained or frozen.

    Args:
        model: Any module.
        select: ``mlp_output`` or ``attention_output`` for the weight of that projection in every block (under LoRA the
            weight that is adapted), patterns of parameter names, or a space.
        layers: Only blocks ``(a, b)``, from a up to but not including b, as Python counts; or the ``last:4``.
        sample_batch: What a model of an unregistered family can be called with.

    Returns:
        Parameters by canonical name, in the model's order.

    Raises:
        ValueError: An argument is malformed, or there are no such layers.
        SpaceError: A pattern, a name or the whole selection matches no parameter.
        UnsupportedArchitectureError: The projections cannot be found.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> list(selected_parameters(GPT2LMHeadModel(config), "mlp_output", "last:1"))
        ['transformer.h.1.mlp.c_proj.weight']
    """
    check_selection(select, layers)
    parameters = {canonical_name(name): parameter for name, parameter in model.named_parameters()}
    architecture = None
    if isinstance(select, str) or layers is not None:
        architecture = describe_architecture(model, sample_batch=sample_batch)
    if isinstance(select, str):
        assert architecture is not None
        chosen = _outputs(architecture, select, parameters)
    else:
        chosen = _matching(model, select, parameters)
    if layers is not None:
        assert architecture is not None
        chosen = _in_layers(architecture, layers, chosen, parameters)
    return {name: parameter for name, parameter in parameters.items() if name in chosen}


def _outputs(architecture: Architecture, select: str, parameters: dict[str, nn.Parameter]) -> set[str]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    chosen = set()
    for block in architecture.blocks:
        part: Any = block.mlp_output if select == "mlp_output" else block.attention_output
        weight = getattr(part, "base_layer", part)._parameters.get("weight")
        if weight is None:
            raise SpaceError(
                f"the {select} projection of {block.name} has no parameter called weight; select parameters by pattern"
            )
        chosen.add(names[id(weight)])
    return chosen


def _matching(
    model: nn.Module, select: Sequence[str] | ParameterSpace, parameters: dict[str, nn.Parameter]
) -> set[str]:
    if isinstance(select, ParameterSpace):
        chosen = set(select.resolve(model))
        for name in sorted(chosen):
            if not parameters[name].is_floating_point():
                raise SpaceError(f"{name} holds {parameters[name].dtype}, which has no gradient")
        return chosen
    floating = [name for name, parameter in parameters.items() if parameter.is_floating_point()]
    chosen = set()
    for pattern in select:
        found = [name for name in floating if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise SpaceError(f"pattern {pattern!r} matches no parameter; {suggestion(pattern, floating)}")
        chosen.update(found)
    return chosen


def _in_layers(
    architecture: Architecture, layers: tuple[int, int] | str, chosen: set[str], parameters: dict[str, nn.Parameter]
) -> set[str]:
    count = len(architecture.blocks)
    if isinstance(layers, str):
        wanted = int(layers.partition(":")[2])
        kept = range(count)[-wanted:] if wanted <= count else range(0)
    else:
        kept = range(count)[slice(*layers)]
    if not kept:
        raise ValueError(f"layers={layers!r} is none of the {count} layers, 0 to {count - 1}")
    owned = {id(each) for index in kept for each in architecture.blocks[index].module.parameters()}
    inside = {name for name in chosen if id(parameters[name]) in owned}
    if not inside:
        raise SpaceError(f"the selection has no parameter in layers {kept.start} to {kept.stop - 1}")
    return inside
