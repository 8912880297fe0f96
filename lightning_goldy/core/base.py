"""The base parameters that a finetune is compared with, and the change since then."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lightning_goldy.core.naming import canonical_name, suggestion
from lightning_goldy.core.sharding import like, local, scatter_like
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import HEADER_KEY, StoreError, load_vectors
from lightning_goldy.core.vector import ParameterVector


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

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> base = BaseParameters(ParameterVector.of(layer))
        >>> layer.weight.data += 1
        >>> [(change.name, round(change.delta.item(), 5)) for change in base.changes(layer)]
        [('weight', 1.0)]
    """

    def __init__(self, vector: ParameterVector) -> None:
        self.space = vector.space
        # Only this process's shards: a sharded tensor cannot live on another device than its mesh.
        self._parts = {name: local(tensor).to("cpu", copy=True) for name, tensor in vector.items()}

    def vector(self, module: nn.Module) -> ParameterVector:
        """The base as a vector in the layout and on the device of the module's parameters."""
        parameters = self.space.resolve(module)
        return ParameterVector(self.space, {name: self._placed(name, parameters[name]) for name in self.space})

    def changes(self, module: nn.Module) -> Iterator[Change]:
        """The change of each parameter, with the memory of one tensor at a time."""
        for name, parameter in self.space.resolve(module).items():
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            base = self._placed(name, parameter).to(dtype)
            yield Change(name, base, parameter.detach().to(dtype) - base)

    def _placed(self, name: str, parameter: nn.Parameter) -> Tensor:
        return like(parameter.detach(), self._parts[name].to(local(parameter).device))


def read_base(source: str | Path, model: nn.Module, space: ParameterSpace, *, prefix: str = "") -> ParameterVector:
    """Reads base parameters from any of the places where a model may have been saved.

    Args:
        source: A file of :func:`~lightning_goldy.core.store.save_vectors`, a Hugging Face folder or ``.safetensors``
            file, or a Lightning checkpoint (``.ckpt``).
        model: The model that they belong to.
        space: The parameters wanted.
        prefix: What a Lightning checkpoint puts before the model's names, such as ``model.``.

    Returns:
        The values, in the layout of the model's parameters and in their dtypes.

    Raises:
        StoreError: The source is none of these, or lacks a parameter, or holds it in another shape.
    """
    path = Path(source)
    if path.is_file() and path.suffix == ".ckpt":
        tensors = _read_checkpoint(path, prefix)
    else:
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        if not files:
            raise StoreError(
                f"{path}: neither a vector file, a .ckpt, nor a folder with .safetensors files; "
                "a hub name must be downloaded first"
            )
        tensors = {}
        for each in files:
            tensors.update(_read_safetensors(each))
    values = {}
    for name, parameter in space.resolve(model).items():
        if name not in tensors:
            raise StoreError(f"{path} has no parameter {name!r}; {suggestion(name, tensors)}")
        if tensors[name].shape != parameter.shape:
            raise StoreError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, the model {tuple(parameter.shape)}"
            )
        # A copy: the file may be mapped into memory, and be overwritten later.
        values[name] = scatter_like(parameter.detach(), tensors[name].to(parameter.dtype, copy=True))
    return ParameterVector(space, values)


def _read_checkpoint(path: Path, prefix: str) -> dict[str, Tensor]:
    try:
        # weights_only: a checkpoint is data, and nothing in it may run.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise StoreError(f"{path}: not a whole checkpoint of plain data; no code in it is run ({error})") from error
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise StoreError(f"{path}: a Lightning checkpoint has a 'state_dict'; this one has {found}")
    tensors = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    if not tensors:
        raise StoreError(f"{path}: no parameter starts with {prefix!r}; the names are like {list(state)[:3]}")
    return {canonical_name(name): value for name, value in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            if HEADER_KEY not in (file.metadata() or {}):
                return {canonical_name(name): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise StoreError(f"{path}: not a whole safetensors file ({error})") from error
    vector, header = load_vectors(path)
    if header.kind != "values":
        raise StoreError(f"{path}: a base is a file of values; this is a {header.kind}")
    return dict(vector)
