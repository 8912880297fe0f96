"""The base parameters that a finetune is compared with, and the change since then."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightning_goldy.core.files import StoreError, parse_json
from lightning_goldy.core.naming import bare_name, canonical_name, suggestion
from lightning_goldy.core.sharding import gather, inside_parallel, is_sharded, like, local, scatter_like
from lightning_goldy.core.space import ParameterSpace, SpaceError, known_parameters
from lightning_goldy.core.store import HEADER_KEY, load_vectors, open_tensors
from lightning_goldy.core.tasks import transformers_model
from lightning_goldy.core.vector import ParameterVector

BASE_FILE = "base.safetensors"
"""What a golden snapshot calls its base as the training began."""
ADDED_FILES = "base-added-*.safetensors"
"""What it calls the files beside it, of parameters that became trainable later."""


class Change(NamedTuple):
    """One parameter's change since the base.

    Args:
        name: Canonical name.
        base: Its value in the base, at least float32, in the parameter's layout.
        delta: Present value minus base, likewise.
    """

    name: str
    base: Tensor
    delta: Tensor


class BaseParameters:
    """A copy of parameter values, kept on the CPU, that gives the change since then one tensor at a time.

    Args:
        vector: The values.
        copy: Whether to copy them; else the vector's own tensors are kept, where they are.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> base = BaseParameters(ParameterVector.of(layer))
        >>> layer.weight.data += 1
        >>> [(change.name, round(change.delta.item(), 5)) for change in base.changes(layer)]
        [('weight', 1.0)]
    """

    def __init__(self, vector: ParameterVector, *, copy: bool = True) -> None:
        self.space = vector.space
        # Only this process's shards: a sharded tensor cannot live on another device than its mesh.
        parts = {name: local(tensor) for name, tensor in vector.items()}
        self._parts = {name: part.to("cpu", copy=True) for name, part in parts.items()} if copy else parts
        self.laid_on: Mapping[str, Mapping[str, float]] | None = None
        """Which adapters the base was computed with, as ``laid_on`` of the model said; None: those of the present."""

    def grow(self, vector: ParameterVector) -> None:
        """Adds copies of further parameters' values, such as of what becomes trainable; who holds the base sees them.

        Raises:
            SpaceError: It has one of them already.

        Example:
            >>> layer = nn.Linear(1, 1)
            >>> base = BaseParameters(ParameterVector.of(layer, ParameterSpace.of(layer, ["bias"])))
            >>> base.grow(ParameterVector.of(layer, ParameterSpace.of(layer, ["weight"])))
            >>> base.space.names
            ('bias', 'weight')
        """
        self.space = self.space.joined(vector.space)
        self._parts.update({name: local(tensor).to("cpu", copy=True) for name, tensor in vector.items()})

    def vector(self, module: nn.Module) -> ParameterVector:
        """The base as a vector in the layout and on the device of the module's parameters."""
        parameters = self.space.resolve(module)
        return ParameterVector(self.space, {name: self.placed(name, parameters[name]) for name in self.space})

    def changes(self, module: nn.Module) -> Iterator[Change]:
        """The change of each parameter, with the memory of one tensor at a time."""
        for name, parameter in self.space.resolve(module).items():
            yield self.change(name, parameter)

    def change(self, name: str, parameter: nn.Parameter) -> Change:
        """The change of one parameter."""
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        base = self.placed(name, parameter).to(dtype)
        return Change(name, base, parameter.detach().to(dtype) - base)

    def placed(self, name: str, parameter: nn.Parameter) -> Tensor:
        """The base's value of one parameter, in its layout and on its device."""
        return like(parameter.detach(), self._parts[name].to(local(parameter).device))


# Where PEFT saves adapters, and of what they lie on at most the embeddings.
ADAPTERS_FILE = "adapter_model.safetensors"

Base: TypeAlias = nn.Module | ParameterVector | BaseParameters | str | Path
"""What a base may be given as; see :func:`base_of`."""


def base_of(base: Base, model: nn.Module, space: ParameterSpace | None = None) -> BaseParameters:
    r"""Base parameters :math:`\theta_0` from anything that can be a base of a model.

    Args:
        base: A module, whose values are copied; a vector, whose tensors are kept without a copy; base parameters, which
            come back; or the path of a vector file, a folder of ``save_pretrained``, a ``.safetensors`` file or a
            Lightning checkpoint.
        model: The model that it is the base of.
        space: The parameters wanted; by default those of a vector or of base parameters, and else the model's trainable
            ones.

    Returns:
        The values; those of a module and of a file in the dtypes of the model's parameters.

    Raises:
        TypeError: It is none of these.
        SpaceError: It is of another model, lacks a parameter of the space, has more blocks than the model, or two
            values of what the model ties.
        StoreError: The file is none of these, lacks a parameter, holds it in another shape, or has more blocks.

    Warns:
        UserWarning: No space is given, and the base differs in a frozen parameter, which stays as it is now.

    Example:
        >>> layer, before = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        >>> [change.name for change in base_of(before, layer).changes(layer)]
        ['weight']
        >>> base_of(0.5, layer)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: a base is a module, a ParameterVector, BaseParameters, or the path of a vector file, ...; got float
    """
    laid_on = base.laid_on if isinstance(base, BaseParameters) else None
    if isinstance(base, BaseParameters):
        base.space.resolve(model)
        if space is None:
            return base
        base = base.vector(model)
    if isinstance(base, ParameterVector):
        if (more := _further_blocks(base.space.names, model)) is not None:
            raise SpaceError(f"the base is of another model: {more}")
        space = base.space if space is None else base.space.subspace(space.names)
        vector = ParameterVector(space, {name: _fit(base[name], own) for name, own in space.resolve(model).items()})
        made = BaseParameters(vector, copy=False)
        made.laid_on = laid_on
        return made
    if not isinstance(base, (nn.Module, str, Path)):
        raise TypeError(
            "a base is a module, a ParameterVector, BaseParameters, or the path of a vector file, a folder of "
            f"save_pretrained, a .safetensors file or a Lightning checkpoint; got {type(base).__name__}"
        )
    asked, space = space, space or ParameterSpace.of(model)
    if not isinstance(base, nn.Module):
        tensors = _read_tensors(Path(base), model, space, None)
        _require_adapters(f"{base}: the base", tensors, model, space)
        if asked is None:
            _tell_frozen(tensors, model, space)
        return BaseParameters(_values_of(tensors, Path(base), model, space), copy=False)
    if (more := _further_blocks(known_parameters(base), model)) is not None:
        raise SpaceError(f"the base is of another model: {more}")
    parameters, held = space.resolve(model), _every_name(base)
    _require_adapters(f"the base, a {type(base).__name__},", held, model, space)
    if (untied := _held_apart(held, model, space)) is not None:
        raise SpaceError(untied)
    if asked is None and base is not model:
        _tell_frozen(held, model, space)
    return _values_in(base, held, parameters, space)


def _values_in(
    base: nn.Module, held: Mapping[str, nn.Parameter], parameters: Mapping[str, nn.Parameter], space: ParameterSpace
) -> BaseParameters:
    """Copies of a module's values, in the dtypes of the model's parameters."""
    # Of a model with two weights that its base ties both began as the one.
    own_names = known_parameters(base).keys()
    lacking = {name: held[name] for name in space.names if name not in own_names and name in held}
    there = space.subspace(name for name in space.names if name not in lacking)
    values = {**ParameterVector.of(base, there, clone=False), **{name: own.detach() for name, own in lacking.items()}}
    return BaseParameters(
        ParameterVector(space, {name: _fit(values[name], own).to(own.dtype) for name, own in parameters.items()})
    )


def plain_base(
    base: Base, model: nn.Module, below: Collection[str], beside: Collection[str], rename: Callable[[str], str]
) -> BaseParameters | None:
    """The base of a model with adapters that is given as the plain model which they lie on; None where it is not.

    Args:
        base: As for :func:`base_of`.
        model: With adapters.
        below: Canonical names of the parameters that adapters lie on.
        beside: Those of what else trains.
        rename: From a canonical name to that in the plain model.

    Returns:
        The values of all these names; no adapter is laid on.

    Raises:
        SpaceError: The plain model lacks one, has it in another shape, or two values of what the model ties.
        StoreError: It is no file of parameters.

    Warns:
        UserWarning: It differs in a frozen parameter that has no adapter, which stays as it is now.
    """
    every = _every_name(model)
    own = {name: every[name] for name in (*below, *beside)}
    space = ParameterSpace.of_tensors(own)
    given = _given_values(base, model, ParameterSpace.of_tensors({rename(name): value for name, value in own.items()}))
    held = {name: given[rename(name)] for name in every if rename(name) in given}
    # What a plain model ties it may have under the name of either.
    tied = {id(parameter): held[name] for name, parameter in every.items() if name in held}
    held |= {name: tied[id(value)] for name, value in own.items() if name not in held and id(value) in tied}
    if not any(name in held for name in below):
        return None
    if (more := _further_blocks(given, model)) is not None:
        raise SpaceError(f"the base is of another model: {more}")
    if (untied := _held_apart(held, model, space)) is not None:
        raise SpaceError(untied)
    for name, value in own.items():
        if name not in held:
            raise SpaceError(f"the base has no parameter {rename(name)!r}; {suggestion(rename(name), given)}")
        if held[name].shape != value.shape:
            shapes = f"{tuple(held[name].shape)} in the base, {tuple(value.shape)} in {type(model).__name__}"
            raise SpaceError(f"{rename(name)} has shape {shapes}")
    _tell_frozen(held, model, space)
    values = {name: _fit(held[name].detach(), value).to(value.dtype) for name, value in own.items()}
    made = BaseParameters(ParameterVector(space, values))
    made.laid_on = {}
    return made


def _given_values(base: Base, model: nn.Module, space: ParameterSpace) -> Mapping[str, Tensor]:
    """What a base holds by canonical name; nothing of one that knows its adapters, for that is the model's own."""
    if isinstance(base, (str, Path)):
        return _read_tensors(Path(base), model, space, None)
    if isinstance(base, nn.Module):
        return _every_name(base)
    if isinstance(base, BaseParameters) and base.laid_on is None:
        return base._parts
    return base if isinstance(base, ParameterVector) else {}


def _require_adapters(told: str, held: Mapping[str, Tensor], model: nn.Module, space: ParameterSpace) -> None:
    """Says what to compare where a model has adapters and its base is the plain model that they lie on."""
    lacking = next((name for name in space.names if ".lora_" in name and name not in held), None)
    if lacking is not None and not any(".lora_" in name for name in held):
        raise SpaceError(
            f"{told} has no adapters, of which {type(model).__name__} has {lacking!r}: give the model as it was with "
            "its new adapters (copy.deepcopy before it is trained) or a golden snapshot, or compare merged weights "
            "with the plain base: with space='merged', or those of copy.deepcopy(model).merge_and_unload()"
            ".requires_grad_(True)"
        )


def _every_name(module: nn.Module) -> dict[str, nn.Parameter]:
    """A module's parameters by canonical name, tied ones under each of theirs."""
    named = inside_parallel(module).named_parameters(remove_duplicate=False)
    return {canonical_name(name): parameter for name, parameter in named}


def _held_apart(base: Mapping[str, Tensor], model: nn.Module, space: ParameterSpace) -> str | None:
    """What a base holds in two places with two values and the model in one, in words: no point between them is a model.

    Args:
        base: Values by canonical name.
        model: The model that it is the base of.
        space: The parameters that are compared.
    """
    firsts: dict[int, str] = {}
    for name, parameter in _every_name(model).items():
        first = firsts.setdefault(id(parameter), name)
        if first != name and first in space.names and first in base and name in base:
            one, other = base[first], base[name]
            if one is not other and not _same(one, other):
                return (
                    f"the base holds values of its own in {name!r}, which {type(model).__name__} ties to {first!r}: "
                    "untie the model, or give a base with tied weights"
                )
    return None


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal in the second's dtype; taken as given where that cannot be asked."""
    if is_sharded(first) or is_sharded(second) or first.is_meta or second.is_meta or first.shape != second.shape:
        return True
    return first is second or torch.equal(first.detach().to(second.device, second.dtype), second.detach())


def _tell_frozen(base: Mapping[str, Tensor], model: nn.Module, space: ParameterSpace) -> None:
    """Warns where a base differs from the model in what is frozen, and so is left as it is now."""
    if (told := _frozen_apart(base, model, space)) is not None:
        warnings.warn(
            f"{told}; let them require gradients first to compare with the whole base",
            stacklevel=3,
        )


def _frozen_apart(base: Mapping[str, Tensor], model: nn.Module, space: ParameterSpace) -> str | None:
    """In what that is frozen, and so is left as it is now, a base differs from the model, in words."""
    moved = [
        name
        for name, own in known_parameters(model).items()
        if name not in space.names
        and not own.requires_grad
        and name in base
        # Codes of a quantised form mean nothing beside values.
        and _is_plain_float(base[name])
        and _is_plain_float(own)
        and (base[name].shape != own.shape or not _same(base[name], own))
    ]
    if not moved:
        return None
    more = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
    shape, now = base[moved[0]].shape, known_parameters(model)[moved[0]].shape
    sizes = "" if shape == now else f" (shape {tuple(shape)} there, {tuple(now)} now)"
    return (
        f"the base differs from {type(model).__name__} in {moved[0]!r}{sizes}{more}, which require no gradient: such "
        "parameters stay as they are now, at the base too"
    )


def frozen_apart(source: str | Path, model: nn.Module, space: ParameterSpace, *, prefix: str = "") -> str | None:
    """What a saved base has otherwise in parameters that are frozen, in words; None where it has nothing otherwise.

    Args:
        source: As for :func:`read_base`.
        model: With the weights that are compared with it.
        space: What is compared anyway.
        prefix: As for :func:`read_base`.
    """
    return _frozen_apart(_read_tensors(Path(source), model, space, prefix), model, space)


def _further_blocks(names: Iterable[str], model: nn.Module) -> str | None:
    """What a base has more of than a model, in words: entries of a list that both have, such as blocks."""
    own, there = _list_lengths(known_parameters(model)), _list_lengths(names)
    for place, count in there.items():
        if place in own and count > own[place]:
            return f"it has {count} of {place!r}, {type(model).__name__} has {own[place]}"
    return None


def _list_lengths(names: Iterable[str]) -> dict[str, int]:
    """The number of entries of each list of modules, by its name, where parameters are called so.

    Example:
        >>> _list_lengths(["h.0.weight", "h.1.experts.3.weight"])
        {'h': 2, 'h.1.experts': 4}
    """
    found: dict[str, int] = {}
    for name in names:
        parts = bare_name(canonical_name(name)).split(".")
        for place, part in enumerate(parts[:-1]):
            if place and part.isdigit():
                key = ".".join(parts[:place])
                found[key] = max(found.get(key, 0), int(part) + 1)
    return found


def _fit(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """A tensor in the parameter's layout: whole where that is whole, shards where that is sharded."""
    if is_sharded(tensor) == is_sharded(parameter):
        return tensor
    return scatter_like(parameter.detach(), gather(tensor))


def read_base(
    source: str | Path, model: nn.Module, space: ParameterSpace, *, prefix: str | None = ""
) -> ParameterVector:
    """Reads base parameters from any of the places where a model may have been saved.

    Args:
        source: A file of :func:`~lightning_goldy.core.store.save_vectors`, a Hugging Face folder or ``.safetensors``
            file, or a Lightning checkpoint (``.ckpt``). The folder or ``base.safetensors`` of a golden snapshot stands
            for that file and those beside it of what became trainable later.
        model: The model that they belong to.
        space: The parameters wanted.
        prefix: What a Lightning checkpoint puts before the model's names, such as ``model.``; None to find it: nothing
            or ``model.`` where all parameters are there, and else the only place where they are.

    Returns:
        The values, in the layout of the model's parameters and in their dtypes.

    Raises:
        StoreError: The source is none of these, lacks a parameter, holds it in another shape, has all of them in
            several places, has more blocks than the model, or two values of what the model ties.
    """
    path = Path(source)
    tensors = _read_tensors(path, model, space, prefix)
    _require_adapters(f"{path}: the base", tensors, model, space)
    return _values_of(tensors, path, model, space)


def _read_tensors(path: Path, model: nn.Module, space: ParameterSpace, prefix: str | None) -> dict[str, Tensor]:
    """All tensors that :func:`read_base` finds, by canonical name; refuses those of another model."""
    if path.is_file() and path.suffix == ".ckpt":
        tensors = _checkpoint_tensors(path, prefix, space)
    else:
        files = base_files(path)
        if not files:
            raise StoreError(
                f"{path}: neither a vector file, a .ckpt, nor a folder with .safetensors files; "
                "a hub name must be downloaded first"
            )
        tensors = {}
        for file in files:
            tensors = {**_read_safetensors(file), **tensors}
        tensors |= _tied_values(tensors, files, model)
        tensors |= _adapter_values(tensors, files, model)
    if (more := _further_blocks(tensors, model)) is not None:
        raise StoreError(f"{path}: the base is of another model: {more}")
    if (untied := _held_apart(tensors, model, space)) is not None:
        raise StoreError(f"{path}: {untied}")
    return tensors


def _tied_values(tensors: Mapping[str, Tensor], files: Iterable[Path], model: nn.Module) -> dict[str, Tensor]:
    """What a saved model leaves out because it is tied, under the names that a model has that does not tie it.

    Args:
        tensors: Those that it holds, by canonical name.
        files: Where they come from; a ``config.json`` beside them may say that nothing is tied.
        model: A finetune that may have untied them.
    """
    head = transformers_model(model)
    for file in files:
        if file.name == ADAPTERS_FILE or _is_vector_file(file) or _says_untied(file.parent / "config.json"):
            return {}
    pairs: list[tuple[Any, Any]] = []
    if head is not None:
        first, last = head.get_input_embeddings(), head.get_output_embeddings()
        pairs.append((getattr(last, "weight", None), getattr(first, "weight", None)))
        own, keys = dict(head.named_parameters()), getattr(head, "_tied_weights_keys", None)
        pairs += [(own.get(name), own.get(of)) for name, of in (keys.items() if isinstance(keys, dict) else ())]
    names: dict[int, list[str]] = {}
    for name, parameter in _every_name(model).items():
        names.setdefault(id(parameter), []).append(name)
    found: dict[str, Tensor] = {}
    for left_out, kept in pairs:
        value = next((tensors[name] for name in names.get(id(kept), ()) if name in tensors), None)
        if value is not None:
            found |= {name: value for name in names.get(id(left_out), ()) if name not in tensors}
    return found


def _adapter_values(tensors: Mapping[str, Tensor], files: Iterable[Path], model: nn.Module) -> dict[str, Tensor]:
    """What PEFT has saved of an adapter, without the adapter's name, under the names that a model has.

    Args:
        tensors: Those that the files hold, by canonical name.
        files: Where they come from; an ``adapter_config.json`` beside them says how the adapter is laid on.
        model: With adapters; the one is meant that is called as the folder is, or else ``default``, or the only one.

    Raises:
        StoreError: The adapter was scaled otherwise than the model's, so that its values mean another change.
    """
    file = next((file for file in files if file.name == ADAPTERS_FILE), None)
    held = [getattr(module, "peft_config", None) for module in model.modules()] if file is not None else []
    configs = next((config for config in held if isinstance(config, Mapping) and config), None)
    if file is None or configs is None:
        return {}
    usual = (name for name in (file.parent.name, "default") if name in configs)
    adapter = next(usual, next(iter(configs)) if len(configs) == 1 else None)
    if adapter is None:
        return {}
    told = _told_by(file.with_name("adapter_config.json"))
    for key in ("lora_alpha", "use_rslora", "use_dora"):
        own = getattr(configs[adapter], key, None)
        if key in told and own is not None and told[key] != own:
            raise StoreError(f"{file.parent}: its adapter has {key}={told[key]}, that of {type(model).__name__} {own}")
    found = {}
    for name in _every_name(model):
        saved = [part for part in name.split(".") if part not in (adapter, "modules_to_save")]
        # DoRA's magnitudes are saved without the name of their only parameter.
        choices = (".".join(saved), ".".join(saved[:-1]))
        value = next((tensors[choice] for choice in choices if choice in tensors), None)
        if value is not None and adapter in name.split("."):
            found[name] = value
    return found


def _says_untied(config: Path) -> bool:
    """Whether a model's configuration says that no embeddings are tied; one that is absent or broken says nothing."""
    told = _told_by(config)
    parts = [told, told.get("text_config")]
    said = [part["tie_word_embeddings"] for part in parts if isinstance(part, dict) and "tie_word_embeddings" in part]
    return bool(said) and not any(said)


def _told_by(config: Path) -> dict[str, Any]:
    """What a configuration says; one that is absent or broken says nothing."""
    try:
        told = parse_json(config.read_text(), constants="float") if config.is_file() else {}
    except ValueError:
        told = {}
    return told if isinstance(told, dict) else {}


def _is_vector_file(file: Path) -> bool:
    with open_tensors(file) as opened:
        return HEADER_KEY in (opened.metadata() or {})


def _values_of(tensors: Mapping[str, Tensor], path: Path, model: nn.Module, space: ParameterSpace) -> ParameterVector:
    values = {}
    for name, parameter in space.resolve(model).items():
        if name not in tensors:
            raise StoreError(f"{path} has no parameter {name!r}; {suggestion(name, tensors)}")
        if tensors[name].shape != parameter.shape:
            raise StoreError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, the model {tuple(parameter.shape)}"
            )
        if parameter.is_floating_point() and not _is_plain_float(tensors[name]):
            raise StoreError(
                f"{path}: {name} is stored as {str(tensors[name].dtype).removeprefix('torch.')}, a quantised form that "
                "means nothing without its scales; give a base in float32, bfloat16 or float16"
            )
        # A copy: the file may be mapped into memory, and be overwritten later.
        values[name] = scatter_like(parameter.detach(), tensors[name].to(parameter.dtype, copy=True))
    return ParameterVector(space, values)


def _is_plain_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() > 1


def base_files(path: Path) -> list[Path]:
    """The files of a base that was saved at a place: of a golden snapshot the first and those of later additions.

    Args:
        path: A file or a folder.

    Raises:
        StoreError: Two additions to a snapshot have different values of one parameter.
    """
    first = path / BASE_FILE if path.is_dir() else path
    if first.name != BASE_FILE or not first.is_file():
        return [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    known: dict[str, tuple[Path, Tensor]] = {}
    added = sorted(first.parent.glob(ADDED_FILES))
    # Resumed runs may have added the same parameters at different steps.
    for file in added:
        for name, tensor in _read_safetensors(file).items():
            other, value = known.setdefault(name, (file, tensor))
            if not torch.equal(value, tensor):
                raise StoreError(f"{other} and {file} hold different values of {name}; take away those of another run")
    return [first, *added]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A Lightning checkpoint, of which no code is run.

    Args:
        path: The file.

    Raises:
        StoreError: It is empty, not a whole checkpoint of plain data, or has no ``state_dict``.
    """
    if path.is_file() and not path.stat().st_size:
        raise StoreError(
            f"{path}: not a whole checkpoint of plain data; no code in it is run (the file is empty, 0 bytes)"
        )
    try:
        # weights_only: a checkpoint is data, and nothing in it may run.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of damaged bytes torch says anything, KeyError and AssertionError included
        raise StoreError(f"{path}: not a whole checkpoint of plain data; no code in it is run ({error})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        found = sorted(map(str, checkpoint))[:20] if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise StoreError(f"{path}: a Lightning checkpoint has a 'state_dict'; this one has {found}")
    return checkpoint


def _checkpoint_tensors(path: Path, prefix: str | None, space: ParameterSpace) -> dict[str, Tensor]:
    # Modules may keep other values beside their tensors.
    kept = read_checkpoint(path)["state_dict"].items()
    state = {name: value for name, value in kept if isinstance(name, str) and isinstance(value, Tensor)}
    if not state:
        raise StoreError(f"{path}: its state_dict holds no tensor")
    if prefix is None:
        state = {canonical_name(name): value for name, value in state.items()}
        prefix = _find_prefix(path, state, space)
    tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not tensors:
        raise StoreError(f"{path}: no parameter starts with {prefix!r}; the names are like {list(state)[:3]}")
    return {canonical_name(name): value for name, value in tensors.items()}


def _find_prefix(path: Path, names: Collection[str], space: ParameterSpace) -> str:
    first = space.names[0]
    places = [name.removesuffix(first) for name in names if f".{name}".endswith(f".{first}")]
    fitting = [place for place in places if all(f"{place}{name}" in names for name in space)]
    usual = [place for place in ("", "model.") if place in fitting]
    if len(fitting) > 1 and not usual:
        raise StoreError(f"{path} has all parameters below each of {fitting}; say which with read_base(..., prefix=)")
    return (usual or fitting or [""])[0]


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    with open_tensors(path) as file:
        if HEADER_KEY not in (file.metadata() or {}):
            return {canonical_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    vector, header = load_vectors(path)
    if header.kind != "values":
        raise StoreError(f"{path}: a base is a file of values; this is a {header.kind}")
    return dict(vector)
