r"""Adapters of PEFT as what they do to the weights: their merged change, tensor by tensor, and the line along it.

A merged weight is what the forward of an adapted layer multiplies with:

.. math:: W' = W + \sum_a s_a B_a A_a \ (\text{LoRA, rsLoRA}), \qquad
    W' = m \frac{W + s B A}{\lVert W + s B A \rVert} \ (\text{DoRA}), \qquad W' = W \odot l \ (\text{IA3})

and so on for whatever PEFT can merge; of several active adapters the sum, of ``modules_to_save`` the copy that trains.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from lightning_goldy.core.architecture.blocks import is_experts, without_adapters
from lightning_goldy.core.base import Base, BaseParameters, Change, base_of, plain_base
from lightning_goldy.core.files import PlainError
from lightning_goldy.core.naming import canonical_name, model_class, require_choice
from lightning_goldy.core.sharding import gather, is_sharded, is_tensor_parallel
from lightning_goldy.core.space import ParameterSpace, trainable_parameters
from lightning_goldy.core.vector import ParameterVector, reduce_tensors, substituted

T = TypeVar("T")
WeightSpace = Literal["merged", "adapters"]
"""Where the change of an adapted model is looked at: in the weights that it comes to, or in the adapters themselves."""

# What PEFT puts between a model's own names.
_OF_PEFT = re.compile(
    r"(?:^|(?<=\.))(?:base_model\.model|base_layer|token_adapter|original_module|modules_to_save\.[^.]+)\."
)
# Where a layer keeps its merged weights meanwhile.
_MADE = "_goldy_merged"
_PLACE = "goldy_place"


class AdapterError(PlainError):
    """Merged weights of this model cannot be told; the message names the layer and the way out."""


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is a layer of PEFT around one of the model's own, with which it can be merged."""
    wraps = isinstance(getattr(module, "base_layer", None), nn.Module) and hasattr(module, "merged_adapters")
    return wraps and callable(getattr(module, "merge", None))


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost adapter layers of a model by canonical name.

    Example:
        >>> adapted_layers(nn.Linear(2, 2))
        {}
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        path = canonical_name(f"{name}.").removesuffix(".")
        if is_adapter(module) and not any(path.startswith(f"{outer}.") for outer in found):
            found[path] = module
    return found


def laid_on(model: nn.Module) -> dict[str, dict[str, float]]:
    """Which adapters each adapter layer computes with, and their scaling (1 of those that have none).

    Args:
        model: With adapters or without.

    Returns:
        By canonical name of the layer, the active adapters that it has; none where they are switched off.

    Example:
        >>> laid_on(nn.Linear(2, 2))
        {}
    """
    return dict(_laid_on("", model))


def _laid_on(path: str, layer: nn.Module) -> Iterator[tuple[str, dict[str, float]]]:
    for name, part in _parts(path, layer):
        scaling = part.scaling if isinstance(getattr(part, "scaling", None), Mapping) else {}
        active = () if getattr(part, "disable_adapters", False) else part.active_adapters
        yield name, {adapter: float(scaling.get(adapter, 1)) for adapter in active if adapter in _held_adapters(part)}


def _parts(path: str, layer: nn.Module) -> list[tuple[str, Any]]:
    """The adapter layers inside one at a path, itself among them, by canonical name in the model."""
    named = ((canonical_name(f"{name}."), part) for name, part in layer.named_modules() if is_adapter(part))
    return [(f"{path}.{name}".strip("."), part) for name, part in named]


def _held_adapters(part: Any) -> set[str]:
    return {adapter for name in part.adapter_layer_names for adapter in getattr(part, name, ())}


@contextmanager
def _as_laid_on(path: str, layer: nn.Module, was: Mapping[str, Mapping[str, float]] | None) -> Iterator[None]:
    """Has a layer compute with the adapters, and their scaling, of another time, for the length of a ``with`` block.

    Args:
        path: Where it is.
        layer: An adapter layer.
        was: What :func:`laid_on` said then; None to leave it as it is.

    Raises:
        AdapterError: It has lost one of them.
    """
    kept: list[tuple[Any, dict[str, Any]]] = []
    try:
        for name, part in [] if was is None else _parts(path, layer):
            wanted = dict(was.get(name, {})) if was is not None else {}
            if lacking := sorted(set(wanted) - _held_adapters(part)):
                raise AdapterError(
                    f"{name}: the base was computed with the adapter {lacking[0]!r}, which is gone, so the change of "
                    "merged weights cannot be told; keep it (set_adapter() takes it out of use), or delete it after "
                    "the training"
                )
            held = vars(part)
            kept.append(
                (part, {key: held[key] for key in ("_active_adapter", "_disable_adapters", "scaling") if key in held})
            )
            part._active_adapter, part._disable_adapters = list(wanted), False
            if isinstance(getattr(part, "scaling", None), Mapping):
                part.scaling = {**part.scaling, **wanted}
        yield
    finally:
        for part, before in kept:
            for key in ("_active_adapter", "_disable_adapters"):
                vars(part).pop(key, None)
            vars(part).update(before)


def _laid_otherwise(path: str, layer: nn.Module, base: BaseParameters) -> bool:
    return base.laid_on is not None and any(base.laid_on.get(name, {}) != now for name, now in _laid_on(path, layer))


def laid_otherwise(model: nn.Module, base: BaseParameters) -> list[str]:
    """The adapted layers that compute with other adapters than in a base, or with another scaling.

    Example:
        >>> laid_otherwise(nn.Linear(2, 2), BaseParameters(ParameterVector.of(nn.Linear(2, 2))))
        []
    """
    return [path for path, layer in adapted_layers(model).items() if _laid_otherwise(path, layer, base)]


def base_values(model: nn.Module, base: BaseParameters) -> ParameterVector:
    """The values that make a model the base when they are put into it.

    Raises:
        AdapterError: No values do, because other adapters are in use than in the base, or with another scaling.
    """
    if moved := laid_otherwise(model, base):
        raise AdapterError(
            f"{moved[0]}: its adapters are not those that the base was computed with, or scaled otherwise "
            "(set_adapter, add_adapter, set_scale?), so the base cannot be run; GoldenSnapshot, ParameterDistribution, "
            "TaylorDiff and ChangeAttribution compare with it all the same"
        )
    return base.vector(model)


def base_run(model: nn.Module, base: Base) -> Callable[[], AbstractContextManager[Any]]:
    """What has a model compute as its base does for the length of a ``with`` block, as often as it is entered.

    Args:
        model: As it is now.
        base: Anything that ``base_of`` takes; with adapters also the plain model below, which is run without them.

    Raises:
        AdapterError: No values do, because other adapters are in use than in the base, or with another scaling.
        SpaceError: The base is of another model.
        TypeError: It cannot be a base.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> base = ParameterVector(ParameterSpace.of(layer), {"weight": layer.weight.detach() - layer.weight.detach()})
        >>> with base_run(layer, base)():
        ...     layer.weight.item()
        0.0
    """
    found = base_within(base, model)
    if found.laid_on == {} and adapted_layers(model):
        return partial(_run_without, model, found.vector(model))
    return partial(substituted, model, base_values(model, found))


@contextmanager
def _run_without(model: nn.Module, values: ParameterVector) -> Iterator[None]:
    """Values of what adapters lie on, with no adapter laid on."""
    with ExitStack() as stack:
        for path, layer in adapted_layers(model).items():
            stack.enter_context(_as_laid_on(path, layer, {}))
        stack.enter_context(substituted(model, values))
        yield


def base_within(base: Base, model: nn.Module, space: str = "merged") -> BaseParameters:
    """As :func:`~lightning_goldy.core.base.base_of`; in merged weights also the plain model that adapters lie on.

    Args:
        base: Anything that ``base_of`` takes. Of a model with adapters it may in merged weights be without: any of
            these with the names that ``merge_and_unload()`` gives.
        model: With adapters or without.
        space: ``merged`` or ``adapters``.

    Raises:
        AdapterError: The weights below adapters are quantised.
        SpaceError: The base is of another model, or a plain one in the space of adapters, which it has not.
        StoreError: It is no file of parameters.
        ValueError: The space is unknown.
    """
    plain = plain_below(base, model) if chosen_space(model, space) == "merged" else None
    return base_of(base, model) if plain is None else plain


def plain_below(base: Base, model: nn.Module) -> BaseParameters | None:
    """The base of a model with adapters that is given as the plain model which they lie on; None where it is not.

    Args:
        base: Anything that ``base_of`` takes.
        model: With adapters; of others there is none.

    Raises:
        AdapterError: The weights below adapters are quantised.
        SpaceError: It is of another model.
        StoreError: It is no file of parameters.
    """
    layers, below = adapted_layers(model), dict[int, str]()
    for path, layer in layers.items():
        inner = {id(parameter) for parameter in without_adapters(layer).parameters()}
        named = layer.named_parameters()
        below |= {id(own): canonical_name(f"{path}.{name}".strip(".")) for name, own in named if id(own) in inner}
    inside = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    beside = [name for name, own in trainable_parameters(model) if id(own) not in inside]
    plain = plain_base(base, model, list(below.values()), beside, merged_name) if layers else None
    if plain is not None:
        require_merged(model)
    return plain


def chosen_space(model: nn.Module, space: str) -> WeightSpace | None:
    """The space in which a model's change is looked at; None where the model has no adapters, and there is only one.

    Args:
        model: With adapters or without.
        space: ``merged`` or ``adapters``.

    Raises:
        ValueError: The space is neither.

    Example:
        >>> chosen_space(nn.Linear(2, 2), "merged") is None
        True
        >>> chosen_space(nn.Linear(2, 2), "adapter")
        Traceback (most recent call last):
        ValueError: unknown space 'adapter'; did you mean 'adapters'? Valid: merged, adapters
    """
    check_space(space)
    return space if adapted_layers(model) else None  # type: ignore[return-value]


def check_space(space: str) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: The space is unknown.
    """
    require_choice("space", space, get_args(WeightSpace))


def merged_name(name: str) -> str:
    """What a parameter is called in the model that ``merge_and_unload()`` gives.

    Example:
        >>> merged_name("base_model.model.transformer.h.0.attn.c_attn.base_layer.weight")
        'transformer.h.0.attn.c_attn.weight'
        >>> merged_name("base_model.model.score.modules_to_save.default.weight")
        'score.weight'
    """
    return _OF_PEFT.sub("", name)


def changes_in(model: nn.Module, base: BaseParameters, space: str = "merged") -> Iterator[Change]:
    """The change of each weight since the base, with the memory of one layer's weights in float64 at a time.

    On sharded models merged weights come whole, the same on every process, which must all go through.

    Args:
        model: As it is now; its base weights may be frozen, its adapters must not be merged into them.
        base: What was trained, as it was; adapters that it lacks count as unchanged.
        space: ``merged`` (for a model without adapters this is the plain change) or ``adapters``.

    Yields:
        Changes under merged names: of every layer with an adapter among what was trained its weight, and of all else
        that was trained the parameters. Those of plain LoRA are a :class:`LowRankChange`.

    Raises:
        AdapterError: The merged weights of a layer cannot be told.
        ValueError: The space is unknown.
    """
    if chosen_space(model, space) != "merged":
        yield from base.changes(model)
        return
    layers, parameters = adapted_layers(model), base.space.resolve(model)
    # Layers that share every parameter, as tied embeddings whose token rows train, are one weight.
    weights = {path: frozenset(map(id, layer.parameters())) for path, layer in layers.items()}
    told: set[frozenset[int]] = set()
    for name, owners in [*_owners(parameters, layers).items(), ("", laid_otherwise(model, base))]:
        if not owners and name:
            yield base.change(name, parameters[name])._replace(name=merged_name(name))
        for owner in owners:
            if weights[owner] not in told:
                told.add(weights[owner])
                yield from _layer_changes(owner, layers[owner], base, parameters)


def _owners(parameters: Mapping[str, nn.Parameter], layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """The adapter layers that hold each parameter, more than one where they share it; none outside of all."""
    holders: dict[int, list[str]] = {}
    for path, layer in layers.items():
        for parameter in layer.parameters():
            holders.setdefault(id(parameter), []).append(path)
    return {name: holders.get(id(parameter), []) for name, parameter in parameters.items()}


def _inside(path: str, layer: nn.Module, parameters: Mapping[str, nn.Parameter]) -> dict[str, tuple[str, nn.Parameter]]:
    """A layer's parameters by their name in the model, each with that in the layer.

    One that several layers share has one name in the model, which may be that of another layer.
    """
    prefix = f"{path}." if path else ""
    names = {id(parameter): name for name, parameter in parameters.items()}
    return {
        names.get(id(value), f"{prefix}{canonical_name(name)}"): (name, value)
        for name, value in layer.named_parameters()
    }


def _layer_changes(
    path: str, layer: nn.Module, base: BaseParameters, parameters: Mapping[str, nn.Parameter]
) -> Iterator[Change]:
    inside = _inside(path, layer, parameters)
    before = {name: base.placed(full, own) for full, (name, own) in inside.items() if full in base.space}
    wrapped = without_adapters(layer)
    _require_plain(path, wrapped)
    own = set(map(id, wrapped.parameters()))
    factors = None
    if not any(id(inside_own) in own for full, (_, inside_own) in inside.items() if full in base.space):
        factors = _at(path, layer, None, {}, _low_rank), _at(path, layer, base, before, _low_rank)
    if factors is not None and factors[0] is not None and factors[1] is not None:
        yield _low_rank_change(path, wrapped, factors[0], factors[1])
        return
    merged = partial(_merged, path)
    was, now = _at(path, layer, base, before, merged), _at(path, layer, None, {}, merged)
    targets = {getattr(child, "parameter_name", "weight") for child in layer.modules() if is_adapter(child)}
    # Some adapters have a bias, too, which is merged into that below.
    if any(name.endswith(".bias") and id(value) not in own for name, value in inside.values()):
        targets.add("bias")
    trained = {merged_name(full) for full, (_, value) in inside.items() if full in base.space and id(value) in own}
    for name, value in was.items():
        told = merged_name(f"{path}.{name}" if path else name)
        if name in targets or told in trained:
            frozen = wrapped.get_parameter(name)
            dtype = torch.promote_types(frozen.dtype, torch.float32)
            if told not in trained:
                value = _or_frozen(value, gather(frozen))
            yield Change(told, value.to(dtype), (now[name] - value).to(dtype))


def _at(
    path: str,
    layer: nn.Module,
    base: BaseParameters | None,
    values: Mapping[str, Tensor],
    told: Callable[[nn.Module, Mapping[str, Tensor]], T],
) -> T:
    """What a layer comes to in a base, with its adapters as they were laid on then, or at present."""
    with _as_laid_on(path, layer, dict(_laid_on(path, layer)) if base is None else base.laid_on):
        return told(layer, values)


def _or_frozen(merged: Tensor, frozen: Tensor) -> Tensor:
    """The frozen weight where adapters make it but for rounding, as new ones of DoRA do, else the merged one."""
    tolerance = torch.finfo(frozen.dtype).eps * (8 if frozen.dtype in (torch.float32, torch.float64) else 1)
    whole = frozen.detach().to(merged)
    return whole if torch.allclose(merged, whole, rtol=tolerance, atol=0) else merged


def _require_plain(path: str, wrapped: nn.Module) -> None:
    for parameter in wrapped.parameters():
        if not parameter.is_floating_point() or parameter.element_size() < 2:
            raise AdapterError(
                f"{path}: the weight below the adapter is quantised ({str(parameter.dtype).removeprefix('torch.')}), "
                "so there is no merged weight; use space='adapters'"
            )


Factors = tuple[Tensor, Tensor]


class LowRankChange(Change):
    """A change whose factors are known exactly."""

    factors: Factors
    """Left [rows, R] and right [columns, R], float64; delta is left @ right.T."""


def _low_rank(layer: nn.Module, values: Mapping[str, Tensor]) -> Factors | None:
    """Left [out, R] and right [in, R], float64, whose product is what plain LoRA adds; None for any other adapter."""
    kind = type(layer).__name__ if type(layer).__module__ == "peft.tuners.lora.layer" else ""
    if kind not in ("Linear", "Embedding") or getattr(layer, "merged", False):
        return None
    parts: Any = layer
    held = ("lora_A", "lora_B") if kind == "Linear" else ("lora_embedding_A", "lora_embedding_B")
    left, right = [], []
    for adapter in parts.active_adapters:
        if adapter not in getattr(parts, held[0]):
            continue
        if adapter in parts.lora_variant or parts.lora_bias.get(adapter):
            return None
        suffix = ".weight" if kind == "Linear" else ""
        names = [f"{name}.{adapter}{suffix}" for name in held]
        inner, outer = (
            gather(values.get(name, layer.get_parameter(name))).double() for name in names
        )  # [r, in], [out, r]
        # Conv1D keeps its weight, and an embedding its rows, the other way round.
        turned = kind == "Embedding" or parts.fan_in_fan_out
        scaled = outer * parts.scaling[adapter]
        left.append(inner.t() if turned else scaled)
        right.append(scaled if turned else inner.t())
    if not left:
        rows, columns = without_adapters(layer).get_parameter("weight").shape
        nothing = torch.zeros(1, 0, dtype=torch.float64, device=next(layer.parameters()).device)
        return None if parts.active_adapters else (nothing.expand(rows, 0), nothing.expand(columns, 0))
    return torch.cat(left, dim=1), torch.cat(right, dim=1)


def _low_rank_change(path: str, wrapped: nn.Module, now: Factors, was: Factors) -> Change:
    weight = gather(wrapped.get_parameter("weight"))
    dtype = torch.promote_types(weight.dtype, torch.float32)
    before = weight.double()
    if bool(was[0].any()) and bool(was[1].any()):
        before = before + was[0] @ was[1].t()
        now = torch.cat([now[0], -was[0]], dim=1), torch.cat([now[1], was[1]], dim=1)
    delta = (now[0] @ now[1].t()).to(dtype)
    change = LowRankChange(merged_name(f"{path}.weight" if path else "weight"), before.to(dtype), delta)
    change.factors = now
    return change


def _merged(path: str, layer: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters below an adapter layer, with the adapters merged as PEFT merges them, float64."""
    memo: dict[int, Any] = {}
    for child in layer.modules():
        # Hooks belong to the layer that runs, and may hold the whole model.
        memo.update({id(held): type(held)() for name, held in vars(child).items() if name.endswith("hooks")})
    for name, parameter in layer.named_parameters():
        # A copy always, because merging writes into it.
        whole = gather(values.get(name, parameter)).to(torch.float64, copy=True)
        memo[id(parameter)] = nn.Parameter(whole, requires_grad=False)
    try:
        made = copy.deepcopy(layer, memo).double()
        with torch.no_grad(), torch.autocast(next(iter(made.parameters())).device.type, enabled=False):
            for child in reversed([child for child in made.modules() if is_adapter(child)]):
                part: Any = child
                if part.merged:
                    part.unmerge()
                part.merge()
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise AdapterError(
            f"{path}: {model_class(layer)} of PEFT cannot be merged ({type(error).__name__}: {error}); use "
            "space='adapters'"
        ) from error
    return {name: value.detach() for name, value in without_adapters(made).named_parameters()}


@dataclass(frozen=True, eq=False)
class Line:
    r"""The straight line in weights from a base to the present model, as something that can be differentiated along.

    With merged adapters each adapted layer has a place t on it, a parameter of one element, between

    .. math:: W(t) = (1 - t) W'_0 + t W'_1, \qquad \frac{\partial L}{\partial t} = \langle \nabla_W L, \Delta W \rangle

    and no merged weight is ever made: a layer that is linear in its weight mixes its two outputs.

    Args:
        start: The base: places of 0, and the values of all else that was trained.
        step_norm: ||Delta||, in the space that is looked at.
        space: Which space that is; None without adapters.
    """

    start: ParameterVector
    step_norm: float
    space: WeightSpace | None

    def told(self, name: str) -> str:
        """What a parameter of the line is called in results."""
        if self.space != "merged":
            return name
        return merged_name(re.sub(rf"{_PLACE}$", "weight", name))


@contextmanager
def line_from(model: nn.Module, base: BaseParameters, space: str = "merged") -> Iterator[Line]:
    """Puts a model on the line from its base, for the length of a ``with`` block.

    Inside, the model computes what it did, bit for bit. Outside it is as it was.

    Args:
        model: In evaluation mode.
        base: theta_0.
        space: ``merged`` or ``adapters``.

    Raises:
        AdapterError: A layer's merged weights cannot be told, or the model is sharded.
        ValueError: The space is unknown.
    """
    chosen = chosen_space(model, space)
    if chosen != "merged":
        start = base.vector(model)
        present = base.space.resolve(model)
        start = ParameterVector(base.space, {name: _as_wide(value, present[name]) for name, value in start.items()})
        step = ParameterVector.of(model, start.space, clone=False) - start
        yield Line(start, step.norm(), chosen)
        return
    require_line(model, space)
    squares = [reduce_tensors([change.delta], lambda x: x @ x)[0] for change in changes_in(model, base, space)]
    layers, parameters = adapted_layers(model), base.space.resolve(model)
    with ExitStack() as stack:
        tensors: dict[str, Tensor] = {}
        for name, owners in _owners(parameters, layers).items():
            own = parameters[name]
            if not owners or any(own is part for part in without_adapters(layers[owners[0]]).parameters()):
                tensors[name] = _as_wide(base.placed(name, own), own)
                continue
            for owner in owners:
                place = f"{owner}.{_PLACE}" if owner else _PLACE
                if place in tensors:
                    continue
                layer = layers[owner]
                before = {
                    inside: _as_wide(base.placed(full, value), value)
                    for full, (inside, value) in _inside(owner, layer, parameters).items()
                    if full in base.space and not any(value is part for part in without_adapters(layer).parameters())
                }
                tensors[place] = stack.enter_context(_placed_between(owner, layer, before, base))
        for path in laid_otherwise(model, base):
            place = f"{path}.{_PLACE}" if path else _PLACE
            if place not in tensors:
                tensors[place] = stack.enter_context(_placed_between(path, layers[path], {}, base))
        line = ParameterVector(ParameterSpace.of_tensors(tensors), tensors)
        yield Line(line, math.sqrt(math.fsum(squares)), chosen)


def _as_wide(value: Tensor, present: Tensor) -> Tensor:
    """A value in at least the present dtype, which may be wider for the time of an analysis."""
    return value.to(torch.promote_types(value.dtype, present.dtype))


def require_merged(model: nn.Module, space: str = "merged") -> None:
    """Tries the merging of one layer of each kind, so that what cannot be merged is refused early; all ranks call.

    Raises:
        AdapterError: A layer cannot be merged.
        ValueError: The space is unknown.
    """
    if chosen_space(model, space) != "merged":
        return
    tried: set[type] = set()
    for path, layer in adapted_layers(model).items():
        _require_plain(path, without_adapters(layer))
        if type(layer) not in tried:
            tried.add(type(layer))
            _merged(path, layer, {})


def require_line(model: nn.Module, space: str = "merged") -> None:
    """Checks that a model can be put on the line through its merged weights.

    Raises:
        AdapterError: It is sharded, its adapters are merged, or an adapted layer is not linear in its weights.
        ValueError: The space is unknown.
    """
    if chosen_space(model, space) != "merged":
        return
    if any(map(is_sharded, model.parameters())):
        raise AdapterError(
            "derivatives along merged weights need each process to hold the whole model, and this one is sharded: use "
            "space='adapters', or DDPStrategy"
        )
    for path, layer in adapted_layers(model).items():
        wrapped = without_adapters(layer)
        if getattr(layer, "merged", False):
            raise AdapterError(f"{path}: the adapter is merged; take it apart first, with unmerge_adapter()")
        if is_experts(layer) or next(wrapped.children(), None) is not None:
            raise AdapterError(
                f"{path}: {model_class(wrapped)} is no single layer that is linear in its weights, so there are no "
                "exact derivatives along its merged weights; use space='adapters'"
            )


def merged_names(model: nn.Module) -> set[str]:
    """What the parameters are called that may change in merged weights: those below adapters, and those that train.

    Args:
        model: With or without adapters.

    Example:
        >>> sorted(merged_names(nn.Linear(2, 2)))
        ['bias', 'weight']
    """
    below = {
        merged_name(f"{path}.{name}" if path else name)
        for path, layer in adapted_layers(model).items()
        for name, _ in without_adapters(layer).named_parameters()
    }
    return below | {merged_name(name) for name, _ in trainable_parameters(model)}


@contextmanager
def merged_weights(model: nn.Module, base: BaseParameters) -> Iterator[tuple[BaseParameters, dict[str, nn.Parameter]]]:
    """Lets adapted layers compute with one merged weight each, for the length of a ``with`` block.

    Inside, the merged weights are parameters that can be moved and differentiated like any others. Outside the model
    is as it was. Beside it stand a copy of the adapted weights and one of their base, under FSDP2 on every process.

    Args:
        model: In evaluation mode, plain or under FSDP2.
        base: theta_0, of what was trained; adapters that it lacks count as unchanged.

    Yields:
        The base and the parameters of all that was trained, both under merged names.

    Raises:
        AdapterError: A layer is split over processes by tensor parallelism, or its merged weights cannot be told.
    """
    require_merged_parameters(model)
    layers, parameters = adapted_layers(model), base.space.resolve(model)
    starts: dict[str, Tensor] = {}
    found: dict[str, nn.Parameter] = {}
    moving = dict.fromkeys(laid_otherwise(model, base))
    with ExitStack() as stack:
        for name, owners in _owners(parameters, layers).items():
            if not owners:
                starts[merged_name(name)] = base.placed(name, parameters[name])
                found[merged_name(name)] = parameters[name]
            moving.update(dict.fromkeys(owners))
        for path in [*moving]:
            layer = layers.pop(path)
            changes = {change.name: change for change in _layer_changes(path, layer, base, parameters)}
            held = {_below(path, name): change.base + change.delta for name, change in changes.items()}
            made = stack.enter_context(_merged_layer(layer, held))
            found.update({name: made[_below(path, name)] for name in changes})
            starts.update({name: change.base.to(found[name].dtype) for name, change in changes.items()})
        for path, layer in layers.items():  # that were not trained
            stack.enter_context(_merged_layer(layer, _at(path, layer, None, {}, partial(_merged, path))))
        yield BaseParameters(ParameterVector(ParameterSpace.of_tensors(found), starts), copy=False), found


def require_merged_parameters(model: nn.Module, space: str = "merged") -> None:
    """Checks that a model's merged weights can be made parameters, one layer of each kind for all; all ranks call.

    Raises:
        AdapterError: A layer is split by tensor parallelism, its adapters are merged already, or it cannot be merged.
        ValueError: The space is unknown.
    """
    if chosen_space(model, space) != "merged":
        return
    for path, layer in adapted_layers(model).items():
        if getattr(layer, "merged", False):
            raise AdapterError(f"{path}: the adapter is merged; take it apart first, with unmerge_adapter()")
        if is_tensor_parallel(layer, model):
            raise AdapterError(
                f"{path}: under tensor parallelism no process computes with a whole layer, so none can with its merged "
                "weights: use space='adapters', FSDP2 or DDPStrategy"
            )
    require_merged(model, space)


def _below(path: str, name: str) -> str:
    """A merged name as it is called inside the layer at a path."""
    return name.removeprefix(f"{merged_name(f'{path}.')}" if path else "")


@contextmanager
def _holding(entries: Sequence[tuple[dict[str, Any], str, Tensor]]) -> Iterator[None]:
    """Has modules hold other tensors, each of a table of parameters and a name in it, for a ``with`` block."""
    present = [held[leaf] for held, leaf, _ in entries]
    try:
        for held, leaf, value in entries:
            held[leaf] = value
        yield
    finally:
        for (held, leaf, _), own in zip(entries, present, strict=True):
            held[leaf] = own


@contextmanager
def _merged_layer(layer: nn.Module, values: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """Lets a layer compute as the one below its adapters with other values of that one's parameters."""
    wrapped = without_adapters(layer)
    plain, patched = layer.forward, "forward" in vars(layer)
    kept: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    made: dict[str, nn.Parameter] = {}
    sharded = any(map(is_sharded, layer.parameters()))

    def merged(*args: Any, **options: Any) -> Any:
        """Puts the values in for a pass, for FSDP2 needs its own between passes; maybe in lower precision."""
        own = zip(kept, made.values(), strict=True)
        with _holding([(held, leaf, value.to(held[leaf].dtype)) for (held, leaf, _), value in own]):
            return wrapped(*args, **options)

    try:
        for name, value in values.items():
            module, _, leaf = name.rpartition(".")
            held = vars(wrapped.get_submodule(module))["_parameters"]
            kept.append((held, leaf, held[leaf]))
            made[name] = nn.Parameter(value.to(held[leaf].dtype))
            if not sharded:
                held[leaf] = made[name]
        vars(layer)[_MADE] = made
        layer.forward = merged if sharded else wrapped.__call__
        yield made
    finally:
        vars(layer).pop(_MADE, None)
        for held, leaf, parameter in kept if not sharded else ():
            held[leaf] = parameter
        if patched:
            layer.forward = plain
        else:
            vars(layer).pop("forward", None)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state inside :func:`merged_weights` under the names of ``merge_and_unload()``, without adapters.

    Example:
        >>> list(merged_state(nn.Linear(1, 1)))
        ['weight', 'bias']
    """
    layers = adapted_layers(model)
    own = {
        id(value) for layer in layers.values() for value in without_adapters(layer).state_dict(keep_vars=True).values()
    }
    made = {
        id(without_adapters(layer).get_parameter(name)): value
        for layer in layers.values()
        for name, value in vars(layer).get(_MADE, {}).items()
    }
    state = {}
    for name, value in model.state_dict(keep_vars=True).items():
        path = canonical_name(name)
        inside = any(path.startswith(f"{layer}." if layer else "") for layer in layers)
        # Of a module that is trained beside adapters the copy counts, not the one that it was made of.
        if (not inside or id(value) in own) and ".original_module." not in f".{path}":
            state[merged_name(path)] = made.get(id(value), value)
    return state


@contextmanager
def _placed_between(
    path: str, layer: nn.Module, before: Mapping[str, Tensor], base: BaseParameters
) -> Iterator[Tensor]:
    """Lets a layer compute between its base and its present state; gives the place of the base."""
    plain, patched = layer.forward, "forward" in vars(layer)
    own = next(layer.parameters())
    laid = base.laid_on if _laid_otherwise(path, layer, base) else None
    entries: list[tuple[dict[str, Any], str, Tensor]] = []
    for name, value in before.items():
        module, _, leaf = name.rpartition(".")
        entries.append((vars(layer.get_submodule(module))["_parameters"], leaf, value))

    def mixed(*args: Any, **kwargs: Any) -> Tensor:
        now = plain(*args, **kwargs)
        with _holding(entries), _as_laid_on(path, layer, laid):
            start = plain(*args, **kwargs)
        # Exact at either end, and its derivative by the place is the difference, not one of two sums that cancel.
        return torch.lerp(start, now, getattr(layer, _PLACE).to(start.dtype))

    dtype = torch.promote_types(own.dtype, torch.float32)
    layer.register_parameter(_PLACE, nn.Parameter(torch.ones((), dtype=dtype, device=own.device)))
    layer.forward = mixed
    try:
        yield torch.zeros((), dtype=dtype, device=own.device)
    finally:
        if patched:
            layer.forward = plain
        else:
            del layer.forward
        del layer._parameters[_PLACE]
