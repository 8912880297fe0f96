"""Weights and optimizer state as a cycle began, on the CPU and in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.head_freeze import plain_optimizer
from lightning_goldy.core.sharding import like, local
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import load_vectors, save_vectors
from lightning_goldy.core.vector import ParameterVector

_VALUES = "values"
_State = dict[str, dict[str, Any]]


class CycleCopy:
    """A copy of all trainable parameters and of what the optimizers keep of them.

    What has a parameter's shape is kept in the parameter's layout, this process's part of it; the rest (step counts)
    as it is.

    Args:
        step: Optimizer step at which it was taken.
        parts: This process's part of each tensor, by kind (``values`` or the optimizer's key) and parameter.
        small: Everything else that the optimizers keep, by parameter and key.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> optimizer = torch.optim.AdamW(layer.parameters())
        >>> copy = CycleCopy.take(layer, [optimizer], step=0)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> copy.restore(layer, [optimizer])
        >>> len(optimizer.state)
        0
    """

    def __init__(self, step: int, parts: dict[str, dict[str, Tensor]], small: _State) -> None:
        self.step = step
        self._parts = parts
        self._small = small
        self._saved_in: Path | None = None

    @classmethod
    def take(cls, module: nn.Module, optimizers: Sequence[Any], *, step: int) -> CycleCopy:
        """Copies the present state."""
        parameters = ParameterSpace.of(module).resolve(module)
        parts: dict[str, dict[str, Tensor]] = {_VALUES: {name: _copy(each) for name, each in parameters.items()}}
        small: _State = {}
        for optimizer in map(plain_optimizer, optimizers):
            for name, parameter in parameters.items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                        parts.setdefault(key, {})[name] = _copy(value)
                    else:
                        small.setdefault(name, {})[key] = (
                            value.detach().cpu().clone() if isinstance(value, Tensor) else value
                        )
        return cls(step, parts, small)

    @torch.no_grad()
    def restore(self, module: nn.Module, optimizers: Sequence[Any]) -> None:
        """Puts the copied state back; what optimizers began to keep since then is forgotten."""
        parameters = ParameterSpace.of(module).resolve(module)
        for name, parameter in parameters.items():
            local(parameter).copy_(self._parts[_VALUES][name])
        for optimizer in map(plain_optimizer, optimizers):
            held = {id(each) for group in optimizer.param_groups for each in group["params"]}
            for name, parameter in parameters.items():
                if id(parameter) in held:
                    self._restore_state(optimizer.state, name, parameter)
        torch.clear_autocast_cache()

    def save(self, folder: Path, module: nn.Module, *, write: bool) -> dict[str, Any]:
        """Writes the tensors; every process must call.

        Returns:
            What :meth:`load` needs: step, file names by kind, and the small values.
        """
        parameters = ParameterSpace.of(module).resolve(module)
        files = {}
        for kind, parts in self._parts.items():
            name = f"cycle-{kind}-step={self.step:08d}.safetensors"
            # A second checkpoint of the cycle; the files' age tells which checkpoints need them.
            if self._saved_in != folder:
                space = ParameterSpace.of(module).subspace(parts)
                # Each process keeps its own parts: sharded tensors live on their mesh's device.
                tensors = {
                    each: like(parameters[each].detach(), parts[each].to(local(parameters[each]).device))
                    for each in space
                }
                vector = ParameterVector(space, tensors)
                save_vectors(folder / name, vector, kind="values", model=module, step=self.step, write=write)
            files[kind] = name
        self._saved_in = folder
        return {"step": self.step, "files": files, "small": self._small}

    @classmethod
    def load(cls, folder: Path, module: nn.Module, saved: Mapping[str, Any]) -> CycleCopy:
        """Reads what :meth:`save` wrote.

        Raises:
            StoreError: A file is missing, broken, or belongs to another model.
        """
        parts = {}
        for kind, name in saved["files"].items():
            vector, _ = load_vectors(folder / name, module)
            parts[kind] = {each: _copy(tensor) for each, tensor in vector.items()}
        copy = cls(saved["step"], parts, {name: dict(values) for name, values in saved["small"].items()})
        copy._saved_in = folder
        return copy

    def _restore_state(self, state: Any, name: str, parameter: nn.Parameter) -> None:
        present = state.get(parameter, {})
        kept: dict[str, Any] = {}
        for key, value in self._small.get(name, {}).items():
            now = present.get(key)
            kept[key] = now.copy_(value) if isinstance(now, Tensor) else _fresh(value)
        for key, parts in self._parts.items():
            if key == _VALUES or name not in parts:
                continue
            now = present.get(key)
            if isinstance(now, Tensor):
                local(now).copy_(parts[name])
                kept[key] = now
            else:
                kept[key] = like(parameter.detach(), parts[name].to(local(parameter).device, copy=True))
        state.pop(parameter, None)
        if kept:
            state[parameter] = kept


def _copy(tensor: Tensor) -> Tensor:
    return local(tensor).to("cpu", copy=True)


def _fresh(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
