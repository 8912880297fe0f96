"""What head plasticity does to the training: a higher rate for some attention, and a copy to go back to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.heads.freeze import plain_optimizer
from lightning_goldy.core.architecture import Architecture
from lightning_goldy.core.sharding import like, local, unshard_guard
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


class AttentionRate:
    r"""Multiplies what every optimizer step does to the attention parameters of chosen layers.

    .. math:: \theta \leftarrow \theta + m\,(\theta' - \theta)

    with :math:`\theta'` the optimizer's own result. For an optimizer whose update is linear in the learning rate (SGD,
    Adam, AdamW with its weight decay, and most others) that is the step with m times the rate, to rounding; moments are
    what they would be. Parameter groups, and so the layout of optimizer checkpoints, stay as they are.

    Args:
        model: The model.
        architecture: Its description.
        optimizers: Those of the training.

    Raises:
        ValueError: An optimizer searches along lines, so that its update is not linear in the rate.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.core.architecture.describe import describe_architecture
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rate = AttentionRate(model, describe_architecture(model), [optimizer])
        >>> rate.multiply({1: 3.0})
        >>> weights = [block.attn.c_proj.weight for block in model.transformer.h]
        >>> before = [weight.detach().clone() for weight in weights]
        >>> sum(weight.sum() for weight in weights).backward()
        >>> optimizer.step()
        >>> [round((old - new).mean().item(), 4) for old, new in zip(before, weights)]
        [0.1, 0.3]
    """

    def __init__(self, model: nn.Module, architecture: Architecture, optimizers: Sequence[Any]) -> None:
        self._model, self._architecture = model, architecture
        plain = [plain_optimizer(optimizer) for optimizer in optimizers]
        for optimizer in plain:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError("the update of LBFGS is not linear in its learning rate; take another optimizer")
        self._layers: dict[int, float] = {}
        self._factors: list[tuple[nn.Parameter, float]] = []
        self._before: dict[int, list[tuple[nn.Parameter, float, Tensor]]] = {}
        self._handles = [
            handle
            for optimizer in plain
            for handle in (
                optimizer.register_step_pre_hook(self._save),
                optimizer.register_step_post_hook(self._scale),
            )
        ]

    def multiply(self, layers: Mapping[int, float]) -> None:
        """Sets the multipliers of the coming steps by layer; layers that are not named have 1."""
        layers = {layer: factor for layer, factor in layers.items() if factor != 1}
        if layers == self._layers:
            return
        if layers:
            # After a forward without gradients FSDP2's root holds whole parameters, which no optimizer knows.
            unshard_guard(self._model)
        factors: dict[int, tuple[nn.Parameter, float]] = {}
        for layer, factor in layers.items():
            for parameter in self._architecture.blocks[layer].attention.parameters():
                if parameter.requires_grad:
                    # Of layers that share their weights the larger multiplier counts.
                    known = factors.get(id(parameter), (parameter, factor))[1]
                    factors[id(parameter)] = (parameter, max(known, factor))
        self._layers, self._factors = layers, list(factors.values())

    def remove(self) -> None:
        """Lets the optimizers go."""
        for handle in self._handles:
            handle.remove()

    def _save(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._before[id(optimizer)] = [
            (parameter, factor, local(parameter).clone())
            for parameter, factor in self._factors
            if id(parameter) in held
        ]

    @torch.no_grad()
    def _scale(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, factor, before in self._before.pop(id(optimizer), ()):
            after = local(parameter)
            dtype = torch.promote_types(after.dtype, torch.float32)
            # What did not move stays to the last bit: torch's lerp starts from the end for weights above one half.
            after.copy_(torch.lerp(before.to(dtype), after.to(dtype), factor))
