"""Parameters that a module computes of others: pruning, weight and spectral norms, ``torch.nn.utils.parametrize``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_goldy.core.naming import canonical_name
from lightning_goldy.core.space import SpaceError


class Reparametrized(NamedTuple):
    """A tensor that is computed of parameters.

    Args:
        module: Which has it.
        path: The module's canonical name.
        name: The tensor's own, such as ``weight``.
        kind: What computes it.
        parts: Own names of the parameters, as ``weight_orig``.
        value: Computes it.
    """

    module: nn.Module
    path: str
    name: str
    kind: str
    parts: tuple[str, ...]
    value: Callable[[], Tensor]

    @property
    def plain(self) -> str:
        """What the parameter is called where nothing computes it."""
        return f"{self.path}.{self.name}" if self.path else self.name

    @property
    def hidden(self) -> tuple[str, ...]:
        """Canonical names of the parameters that it is computed of."""
        return tuple(f"{self.path}.{part}" if self.path else part for part in self.parts)


def reparametrized(model: nn.Module) -> list[Reparametrized]:
    """All tensors of a model that are computed of parameters, by what torch has for that.

    Example:
        >>> layer = prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5)
        >>> [(found.plain, found.kind, found.hidden) for found in reparametrized(layer)]
        [('weight', 'prune', ('weight_orig',))]
    """
    found = []
    for path, module in model.named_modules():
        path = canonical_name(f"{path}.").removesuffix(".")
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, prune.BasePruningMethod):
                name, value = hook._tensor_name, _call(hook.apply_mask, module)
                found.append(Reparametrized(module, path, name, "prune", (f"{name}_orig",), value))
            elif isinstance(hook, WeightNorm):
                parts, value = (f"{hook.name}_g", f"{hook.name}_v"), _call(hook.compute_weight, module)
                found.append(Reparametrized(module, path, hook.name, "weight_norm", parts, value))
            elif isinstance(hook, SpectralNorm):
                value = _call(hook.compute_weight, module, do_power_iteration=False)
                found.append(Reparametrized(module, path, hook.name, "spectral_norm", (f"{hook.name}_orig",), value))
        if parametrize.is_parametrized(module):
            for name, parts in module.parametrizations.items():
                inner = tuple(f"parametrizations.{name}.{part}" for part, _ in parts.named_parameters())
                found.append(Reparametrized(module, path, name, "parametrize", inner, _call(getattr, module, name)))
    return found


def _call(function: Callable[..., Any], *args: Any, **options: Any) -> Callable[[], Any]:
    return lambda: function(*args, **options)


def hidden_parts(model: nn.Module, known: Collection[str]) -> set[str]:
    """Parameters of which those that are known under their plain names are computed.

    Args:
        model: The model.
        known: Canonical names.
    """
    return {part for found in reparametrized(model) if found.plain in known for part in found.hidden}


@contextmanager
def plain_parameters(model: nn.Module, known: Collection[str], *, changes: str = "") -> Iterator[list[str]]:
    """Gives parameters that have come to be computed of others back as what they come to, for a ``with`` block.

    Pruning, weight norm and the like take a parameter away and put others in its place: what was ``weight`` is then
    ``weight_orig`` times a mask. Inside, it is a parameter of the values that the module computes with.

    Args:
        model: In evaluation mode.
        known: Canonical names of the parameters that are asked for; what is none of them stays as it is.
        changes: Who would change the parameters, which the module would not take over; nobody where it is empty.

    Yields:
        What to say of it; nothing where all is plain.

    Raises:
        SpaceError: Somebody would change them.

    Example:
        >>> layer = prune.l1_unstructured(nn.Linear(2, 2), "weight", 0.5)
        >>> with plain_parameters(layer, ["weight", "bias"]) as told:
        ...     print(sorted(dict(layer.named_parameters())), int((layer.weight == 0).sum()))
        ['bias', 'weight'] 2
        >>> sorted(dict(layer.named_parameters())), told
        (['bias', 'weight_orig'], ['weight is computed of other parameters (prune): its values are those that the ...
    """
    asked = [found for found in reparametrized(model) if found.plain in known]
    if asked and changes:
        raise SpaceError(
            f"{changes} changes parameters, and {asked[0].plain} has come to be computed of others ({asked[0].kind}), "
            f"such as {asked[0].hidden[0]}: make that permanent, or leave one of the two out"
        )
    with ExitStack() as stack, torch.no_grad():
        values = [found.value().detach().clone() for found in asked]
        for found, value in zip(asked, values, strict=True):
            stack.callback(_replace(found, value))
        with torch.enable_grad():
            yield _told(asked)


def _told(asked: list[Reparametrized]) -> list[str]:
    if not asked:
        return []
    more, kinds = f" and {len(asked) - 1} more" if len(asked) > 1 else "", sorted({found.kind for found in asked})
    return [
        f"{asked[0].plain}{more} {'are' if more else 'is'} computed of other parameters ({', '.join(kinds)}): its "
        "values are those that the module computes with"
    ]


def _replace(found: Reparametrized, value: Tensor) -> Callable[[], None]:
    """Puts a plain parameter in the place of a computed one; gives what undoes it."""
    module, kind = found.module, type(found.module)
    held: list[dict[Any, Any]] = [vars(module)[slot] for slot in ("_parameters", "_modules", "_forward_pre_hooks")]
    held.append(vars(module))
    if found.kind == "parametrize":
        held.append(module.parametrizations._modules)  # type: ignore[union-attr]
    before = [dict(entries) for entries in held]
    accessor = vars(kind).get(found.name)
    if found.kind == "parametrize":
        # The class is this module's own, made for its parametrisations.
        delattr(kind, found.name)
        del held[-1][found.name]
        if not held[-1]:
            del module._modules["parametrizations"]
    else:
        for part in found.parts:
            module._parameters.pop(part, None)
        vars(module).pop(found.name, None)
        for key, hook in before[2].items():
            named = getattr(hook, "_tensor_name", getattr(hook, "name", None))
            if isinstance(hook, (prune.BasePruningMethod, WeightNorm, SpectralNorm)) and named == found.name:
                del module._forward_pre_hooks[key]
    module.register_parameter(found.name, nn.Parameter(value))

    def undo() -> None:
        if found.kind == "parametrize":
            setattr(kind, found.name, accessor)
        for entries, values in zip(held, before, strict=True):
            entries.clear()
            entries.update(values)

    return undo
