"""The one representation of parameter space: which parameters, and vectors of them matched by name."""

from __future__ import annotations

import fnmatch
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_goldy.core.files import PlainError
from lightning_goldy.core.naming import bare_name, canonical_name, require_kinds, suggestion
from lightning_goldy.core.sharding import inside_parallel, unshard_guard


class SpaceError(PlainError):
    """Two parameter spaces differ, or a selection is empty; the message names the first difference."""


class UnknownParameterError(SpaceError, KeyError):
    """A name that a space lacks; a KeyError too, so that ``in`` and ``get`` of mappings work."""

    __str__ = ValueError.__str__


@dataclass(frozen=True)
class ParameterSpace:
    """An ordered selection of a module's trainable parameters, tied weights once.

    Args:
        names: Canonical names, in the module's order.
        shapes: Global shapes.
        dtypes: The parameters' dtypes.

    Example:
        >>> space = ParameterSpace.of(nn.Linear(3, 2))
        >>> space.names, space.numel
        (('weight', 'bias'), 8)
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    _index: dict[str, int] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", {name: index for index, name in enumerate(self.names)})

    @classmethod
    def of(
        cls,
        module: nn.Module,
        include: Iterable[str] = ("*",),
        exclude: Iterable[str] = (),
        last_layers: float | int | None = None,
    ) -> ParameterSpace:
        """Selects trainable parameters by name.

        Args:
            module: The model; a wrapper of ``torch.compile`` or activation checkpointing does not change names.
            include: Glob patterns; a parameter is taken when at least one matches its name.
            exclude: Glob patterns that take parameters out again.
            last_layers: Keep only parameters of the last blocks: a fraction in (0, 1] of the blocks, rounded up, or
                their number as an int. Parameters outside the blocks are left out.

        Raises:
            SpaceError: A pattern or the whole selection matches nothing, or the module is wrapped by FSDP1.
        """
        for name, value in (("include", include), ("exclude", exclude)):
            if isinstance(value, str):
                raise SpaceError(f"{name} is a list of patterns; got the string {value!r}, write [{value!r}]")
        include, exclude = tuple(include), tuple(exclude)
        # FSDP2 leaves the root's parameters unsharded after a forward, perhaps in another dtype.
        unshard_guard(module)
        parameters = dict(trainable_parameters(module))
        if not parameters:
            raise SpaceError(
                f"{type(module).__name__} has no trainable parameter: every requires_grad is False, or all are empty"
            )
        for pattern in (*include, *exclude):
            if not any(fnmatch.fnmatchcase(name, pattern) for name in parameters):
                raise SpaceError(
                    f"pattern {pattern!r} matches no trainable parameter; {suggestion(pattern, parameters)}"
                )
        kept = set(parameters) if last_layers is None else _in_last_layers(module, parameters, last_layers)
        chosen = {
            name: parameter
            for name, parameter in parameters.items()
            if name in kept
            and any(fnmatch.fnmatchcase(name, pattern) for pattern in include)
            and not any(fnmatch.fnmatchcase(name, pattern) for pattern in exclude)
        }
        if not chosen:
            raise SpaceError(
                f"include={list(include)}, exclude={list(exclude)}, last_layers={last_layers} select none of the "
                f"{len(parameters)} trainable parameters of {type(module).__name__}"
            )
        return cls.of_tensors(chosen)

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> ParameterSpace:
        """The space of tensors by canonical name."""
        values = tensors.values()
        return cls(tuple(tensors), tuple(value.shape for value in values), tuple(value.dtype for value in values))

    @property
    def numel(self) -> int:
        """Number of elements in all."""
        return sum(math.prod(shape) for shape in self.shapes)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def shape(self, name: str) -> torch.Size:
        """Global shape of one parameter."""
        return self.shapes[self.index(name)]

    def index(self, name: str) -> int:
        """Position of a name.

        Raises:
            UnknownParameterError: The space lacks it.
        """
        if name not in self._index:
            raise UnknownParameterError(f"no parameter {name!r} in this space; {suggestion(name, self.names)}")
        return self._index[name]

    def resolve(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The module's own parameters of this space, by name, also those of layers that PEFT has wrapped since.

        Raises:
            SpaceError: One is missing or has another shape.
        """
        unshard_guard(module)
        available = known_parameters(module)
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in available:
                made = name.endswith(("_orig", "_g", "_v")) or ".parametrizations." in f".{name}"
                why = " (was a pruning or a norm of weights made permanent?)" if made else ""
                if ".lora_" in name or name.startswith("base_model.model."):
                    raise SpaceError(
                        f"{type(module).__name__} has no parameter {name!r} of an adapter: was it deleted, or merged "
                        "and unloaded? Keep it while analyses compare with it, in a training until trainer.fit returns"
                    )
                raise SpaceError(
                    f"{type(module).__name__} has no parameter {name!r}{why}; {suggestion(name, available)}"
                )
            found = tuple(available[name].shape)
            if found != tuple(shape):
                raise SpaceError(f"{name}: shape {found} in the module, {tuple(shape)} in the space")
        return {name: available[name] for name in self.names}

    def require_same(self, other: ParameterSpace) -> None:
        """Checks that two spaces hold the same names and shapes in the same order.

        Raises:
            SpaceError: They differ; the message names the first difference.
        """
        if self is other:
            return
        for mine, theirs in zip(self.names, other.names, strict=False):
            if mine != theirs:
                raise SpaceError(f"two parameter spaces differ: {mine!r} in one, {theirs!r} in the other")
        if len(self) != len(other):
            longer = max(self, other, key=len)
            extra = longer.names[min(len(self), len(other))]
            raise SpaceError(f"two parameter spaces differ: only one of them has {extra!r}")
        for name, mine_shape, their_shape in zip(self.names, self.shapes, other.shapes, strict=True):
            if mine_shape != their_shape:
                raise SpaceError(f"two parameter spaces differ: {name} is {tuple(mine_shape)} and {tuple(their_shape)}")

    def joined(self, other: ParameterSpace) -> ParameterSpace:
        """This space and behind it the parameters of another.

        Raises:
            SpaceError: Both have a parameter.
        """
        both = next((name for name in other.names if name in self), None)
        if both is not None:
            raise SpaceError(f"both of two spaces have the parameter {both!r}")
        return ParameterSpace(self.names + other.names, self.shapes + other.shapes, self.dtypes + other.dtypes)

    def shared(self, other: ParameterSpace) -> tuple[str, ...]:
        """Names that another space has, too, with the same shape.

        Example:
            >>> layer = nn.Linear(2, 1)
            >>> ParameterSpace.of(layer).shared(ParameterSpace.of(layer, ["bias"]))
            ('bias',)
        """
        return tuple(name for name in self.names if name in other and self.shape(name) == other.shape(name))

    def subspace(self, names: Iterable[str]) -> ParameterSpace:
        """The part with these names, in this space's order."""
        keep = sorted({self.index(name) for name in names})
        columns: list[Any] = [
            tuple(column[index] for index in keep) for column in (self.names, self.shapes, self.dtypes)
        ]
        return ParameterSpace(*columns)


@dataclass(frozen=True)
class Selection:
    """Which parameters move.

    Args:
        include: Glob patterns of parameter names.
        exclude: Glob patterns taken out again.
        last_layers: Only the last blocks: a fraction, or their number.

    Example:
        >>> Selection(exclude=["bias"]).space(nn.Linear(2, 1)).names
        ('weight',)
    """

    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = ()
    last_layers: float | int | None = None

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):
            if isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name} is a list of patterns; got the string {value!r}, write [{value!r}]")
        require_kinds(type(self), vars(self))
        if self.last_layers is not None and not (
            0 < self.last_layers <= 1 or (self.last_layers > 1 and isinstance(self.last_layers, int))
        ):
            raise ValueError(
                f"last_layers is a fraction in (0, 1] or a number of blocks, at least 1; got {self.last_layers!r}"
            )

    def space(self, model: nn.Module) -> ParameterSpace:
        """The selected part of a model.

        Raises:
            SpaceError: It is empty, or a pattern matches nothing.
        """
        return ParameterSpace.of(model, self.include, self.exclude, self.last_layers)


def known_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by canonical name, and where PEFT renames one, by the name that it had before, too.

    Example:
        >>> wrapped = nn.ModuleDict({"layer": nn.ModuleDict({"base_layer": nn.Linear(1, 1, bias=False)})})
        >>> list(known_parameters(wrapped))
        ['layer.base_layer.weight', 'layer.weight']
    """
    named = inside_parallel(module).named_parameters()
    known = {canonical_name(name): parameter for name, parameter in named}
    for name, parameter in list(known.items()):
        known.setdefault(bare_name(name), parameter)
    return known


def trainable_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Canonical names and parameters that require gradients, tied weights once; without those that have no elements.

    Raises:
        SpaceError: The module is wrapped by FSDP1, whose flat parameters have no meaning one by one.
    """
    for name, parameter in inside_parallel(module).named_parameters():
        # FSDP1 marks what it has flattened; with use_orig_params only that mark tells, name and type look as ever.
        if "_flat_param" in name or getattr(parameter, "_fsdp_flattened", False):
            raise SpaceError(
                f"{name} is part of a flat parameter of FullyShardedDataParallel (FSDP1), which merges weights across "
                "layers; use FSDP2: ModelParallelStrategy with torch.distributed.fsdp.fully_shard in configure_model"
            )
        if parameter.requires_grad and parameter.numel():
            yield canonical_name(name), parameter


def newly_trainable(module: nn.Module, known: Collection[str]) -> dict[str, nn.Parameter]:
    """Parameters that require gradients and are not known, nor what known ones have come to be computed of.

    Example:
        >>> list(newly_trainable(prune.identity(nn.Linear(2, 2), "weight"), ["weight"]))
        ['bias']
    """
    old = {*known, *hidden_parts(module, known)}
    return {name: parameter for name, parameter in trainable_parameters(module) if name not in old}


def parameter_names(module: nn.Module) -> set[str]:
    """Canonical names of all parameters, and the plain ones of those that are computed of others.

    Example:
        >>> sorted(parameter_names(prune.identity(nn.Linear(2, 2), "weight")))
        ['bias', 'weight', 'weight_orig']
    """
    named = {canonical_name(name) for name, _ in inside_parallel(module).named_parameters()}
    return named | {found.plain for found in reparametrized(module)}


def _in_last_layers(module: nn.Module, parameters: dict[str, nn.Parameter], last_layers: float | int) -> set[str]:
    prefix, count = block_list(module)
    if isinstance(last_layers, bool) or not (
        (isinstance(last_layers, int) and 1 <= last_layers <= count)
        or (isinstance(last_layers, float) and 0 < last_layers <= 1)
    ):
        raise SpaceError(
            f"last_layers is a fraction in (0, 1] or a number of blocks from 1 to {count}; got {last_layers!r}"
        )
    # 0.28 * 25 is 7.000000000000001 in floating point and must stay 7 blocks.
    keep = last_layers if isinstance(last_layers, int) else math.ceil(last_layers * count - 1e-9)
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    indices = {name: int(match[1]) for name in parameters if (match := pattern.match(name))}
    return {name for name, index in indices.items() if index >= count - keep}


def block_list(module: nn.Module) -> tuple[str, int]:
    """Name and length of the module list that holds the most parameters: a transformer's blocks.

    Raises:
        SpaceError: The module has no such list.
    """
    sizes = {
        path: (sum(parameter.numel() for parameter in child.parameters()), len(child))
        for name, child in module.named_modules()
        if isinstance(child, (nn.ModuleList, nn.Sequential))
        and len(child)
        and (path := canonical_name(f"{name}.").rstrip("."))
    }
    if not sizes:
        raise SpaceError(f"{type(module).__name__} has no list of blocks, so last_layers cannot be resolved")
    name = max(sizes, key=lambda key: (sizes[key][0], -key.count(".")))
    return name, sizes[name][1]


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
