"""Stacked experts: parameters whose first dimension counts the experts of a mixture."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lightning_goldy.core.naming import canonical_name

_COUNTS = ("num_experts", "num_local_experts", "n_experts", "n_routed_experts")
_OUTPUT = re.compile(r"down|w2|output|proj_out")


def stacked_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's own parameters of which each expert has a slice along the first dimension, by their own names.

    A matrix per expert tells the stack; vectors per expert beside it are its biases. A router has rows alone.

    Example:
        >>> from transformers import MixtralConfig
        >>> from transformers.models.mixtral.modeling_mixtral import MixtralExperts
        >>> config = MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=3)
        >>> {name: tuple(value.shape) for name, value in stacked_parameters(MixtralExperts(config)).items()}
        {'gate_up_proj': (3, 12, 8), 'down_proj': (3, 8, 6)}
    """
    counts = {value for name in _COUNTS if isinstance(value := getattr(module, name, None), int)}
    own = {name: value for name, value in module._parameters.items() if value is not None and value.ndim > 1}
    stacked = {name: value for name, value in own.items() if value.shape[0] in counts}
    return stacked if any(value.ndim == 3 for value in stacked.values()) else {}


def without_adapters(module: nn.Module) -> nn.Module:
    """The module below adapters, which PEFT nests where several parameters of one module are adapted."""
    while isinstance(base := getattr(module, "base_layer", None), nn.Module):
        module = base
    return module


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds stacked experts, adapted or not."""
    return bool(stacked_parameters(without_adapters(module)))


def output_weight(module: nn.Module) -> nn.Parameter | None:
    """The weight that makes the output of a projection or of a stack of experts, below adapters; None without.

    Of several stacked matrices the one that is named so, or the last.
    """
    base = without_adapters(module)
    matrices = [(name, value) for name, value in stacked_parameters(base).items() if value.ndim == 3]
    if not matrices:
        return base._parameters.get("weight")
    return next((value for name, value in matrices if _OUTPUT.search(name)), matrices[-1][1])


def expert_counts(model: nn.Module) -> Mapping[str, int]:
    """How many experts each stacked parameter of a model holds, by canonical name.

    Example:
        >>> expert_counts(nn.Linear(2, 2))
        {}
    """
    return {
        canonical_name(f"{path}.{name}" if path else name): len(value)
        for path, module in model.named_modules()
        for name, value in stacked_parameters(module).items()
    }


def expert_of(name: str) -> tuple[str, int | None]:
    """The stack and the number of an expert that is named by it; the name itself and None of anything else.

    Example:
        >>> expert_of("experts.down_proj[12]"), expert_of("router.weight")
        (('experts.down_proj', 12), ('router.weight', None))
    """
    match = re.fullmatch(r"(.+)\[(\d+)\]", name)
    return (match[1], int(match[2])) if match else (name, None)


def of_expert(name: str, stack: Tensor) -> Tensor:
    """The part of a parameter that a name means: one expert of a stack, or all of it."""
    expert = expert_of(name)[1]
    return stack if expert is None else stack[expert]


def expert_names(names: Iterable[str], experts: Mapping[str, int]) -> tuple[str, ...]:
    """Parameters by name, a stack expert by expert.

    Args:
        names: Canonical names.
        experts: What :func:`expert_counts` gave.

    Example:
        >>> expert_names(["router.weight", "experts.down_proj"], {"experts.down_proj": 2})
        ('router.weight', 'experts.down_proj[0]', 'experts.down_proj[1]')
    """
    return tuple(
        row
        for name in names
        for row in ([f"{name}[{expert}]" for expert in range(experts[name])] if name in experts else [name])
    )
