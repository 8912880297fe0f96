"""What a training may do to heads: closed ones stay as they are, cut layers move faster, and a copy to go back to."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_goldy.core.architecture import Architecture, Head, HeadGates, ParameterSlice
from lightning_goldy.core.sharding import like, local, local_box, unshard_guard
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import load_vectors, save_vectors
from lightning_goldy.core.vector import ParameterVector

Role = Literal["query", "key", "value", "output"]

# Copying neighbours is several times quicker than by index on CPUs; elsewhere every copy is a launch, and one is best.
_BY_RUNS = ("cpu",)
_VALUES = "values"
_State = dict[str, dict[str, Any]]
Hook = Callable[[torch.optim.Optimizer, Any, Any], None]


class _AroundSteps:
    """Does something before and after every step of some optimizers, until it is removed."""

    def __init__(self, optimizers: Any, before: Hook, after: Hook) -> None:
        self._handles = []
        for optimizer in plain_optimizers(optimizers):
            self._handles += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    def remove(self) -> None:
        """Lets the optimizers go."""
        for handle in self._handles:
            handle.remove()


class HeadFreeze(_AroundSteps):
    """Lets no optimizer step change the weights of closed heads or their moments, weight decay included.

    Around every step the slices of parameters and of optimizer state are saved and copied back, so it holds for any
    ``torch.optim.Optimizer``, under FSDP2 too, and to the last bit. It follows the gates: heads that are closed later
    freeze from the next step, opened ones thaw. Key and value rows freeze when the whole group is closed.

    A closed head's gradient is zero already, unless the loss has terms of the weights themselves. Call
    :meth:`zero_gradients` between backward and clipping (Lightning's ``on_before_optimizer_step``), so that those
    neither count in the norm nor reach momenta.

    Args:
        model: The gated model.
        optimizers: One or several; a LightningOptimizer will do.

    Raises:
        ValueError: The model has no gates.
        UnsupportedArchitectureError: Which weights belong to a head is not known.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
        >>> HeadGates(model).disable([(0, 1)])
        >>> before = model.transformer.h[0].attn.c_proj.weight.detach().clone()
        >>> with HeadFreeze(model, optimizer):
        ...     model(input_ids=torch.tensor([[1, 2]])).logits.sum().backward()
        ...     optimizer.step()
        >>> (model.transformer.h[0].attn.c_proj.weight == before).all(dim=1).tolist()
        [False, False, False, False, True, True, True, True]
    """

    def __init__(self, model: nn.Module, optimizers: Any) -> None:
        gates = HeadGates.of(model)
        if gates is None:
            raise ValueError("the model has no gates, so no head can be closed: make HeadGates(model) first")
        self._model, self._gates = model, gates
        self._planned: tuple[Head, ...] | None = None
        self._plan: list[ParameterRows] = []
        self._kept: dict[int, tuple[Any, list[_SavedRows]]] = {}
        self._saved: dict[int, list[_SavedRows]] = {}
        # Whether the family can be frozen shows now, and not once a head is closed in the middle of a run.
        head_rows(gates.architecture, gates.heads, gates.heads)
        super().__init__(optimizers, self._before, self._after)

    def zero_gradients(self) -> None:
        """Sets the gradients of closed heads to zero."""
        for rows in self._frozen_rows():
            if rows.parameter.grad is not None:
                rows.zero(rows.parameter.grad)

    def __enter__(self) -> HeadFreeze:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _frozen_rows(self) -> list[ParameterRows]:
        closed = self._gates.closed
        if closed != self._planned:
            # After a forward without gradients FSDP2's root holds whole parameters, which no optimizer knows.
            unshard_guard(self._model)
            self._plan = head_rows(self._gates.architecture, closed, closed)
            self._planned = closed
        return self._plan

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.zero_gradients()
        # Heads may be closed or opened inside the step, by its closure; what is saved now is what comes back.
        self._saved[id(optimizer)] = self._rows_of(optimizer)
        for saved in self._saved[id(optimizer)]:
            saved.save(optimizer.state.get(saved.rows.parameter, {}))

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for saved in self._saved.pop(id(optimizer), ()):
            saved.restore(optimizer.state.get(saved.rows.parameter, {}))

    def _rows_of(self, optimizer: torch.optim.Optimizer) -> list[_SavedRows]:
        """What this optimizer could move, with memory that serves until heads or parameter groups change."""
        rows, groups = self._frozen_rows(), optimizer.param_groups
        key = (self._planned, tuple((id(group), len(group["params"])) for group in groups))
        known, kept = self._kept.get(id(optimizer), (None, []))
        if known != key:
            owners = {id(parameter): group for group in groups for parameter in group["params"]}
            kept = [_SavedRows(each, owners[id(each.parameter)]) for each in rows if id(each.parameter) in owners]
            self._kept[id(optimizer)] = (key, kept)
        return kept


@dataclass
class _SavedRows:
    """Rows of a parameter and of its optimizer state before a step."""

    rows: ParameterRows
    _group: dict[str, Any]
    _value: Tensor | None = None
    _state: dict[str, Tensor] = field(default_factory=dict)

    def save(self, state: dict[str, Any]) -> None:
        # Fresh memory at every step would cost more than the copies.
        self._value = self.rows.read(self.rows.parameter, self._value)
        moments = {key: value for key, value in state.items() if self.rows.matches(value)}
        self._state = {key: self.rows.read(value, self._state.get(key)) for key, value in moments.items()}

    def restore(self, state: dict[str, Any]) -> None:
        assert self._value is not None
        self.rows.write(self.rows.parameter, self._value)
        for key, value in state.items():
            if key in self._state:
                self.rows.write(value, self._state[key])
            elif self._group.get("weight_decay") and self.rows.matches(value):
                # Made by this very step, from nothing but weight decay, for the gradient is zero.
                self.rows.zero(value)


class AttentionRate(_AroundSteps):
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
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11))
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
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in plain_optimizers(optimizers)):
            raise ValueError("the update of LBFGS is not linear in its learning rate; take another optimizer")
        self._layers: dict[int, float] = {}
        self._factors: list[tuple[nn.Parameter, float]] = []
        self._saved: dict[int, list[tuple[nn.Parameter, float, Tensor]]] = {}
        super().__init__(optimizers, self._before, self._after)

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

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        self._saved[id(optimizer)] = [
            (parameter, factor, local(parameter).clone())
            for parameter, factor in self._factors
            if id(parameter) in held
        ]

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, factor, before in self._saved.pop(id(optimizer), ()):
            after = local(parameter)
            dtype = torch.promote_types(after.dtype, torch.float32)
            # What did not move stays to the last bit: torch's lerp starts from the end for weights above one half.
            after.copy_(torch.lerp(before.to(dtype), after.to(dtype), factor))


@dataclass
class CycleCopy:
    """A copy of all trainable parameters and of what the optimizers keep of them.

    What has a parameter's shape is kept in the parameter's layout, this process's part of it; the rest (step counts)
    as it is.

    Args:
        step: Optimizer step at which it was taken.
        parts: This process's part of each tensor, by kind (``values`` or the optimizer's key) and parameter.
        small: Everything else that the optimizers keep, by parameter and key.
        saved_in: Folder that its files are in, if any.

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

    step: int
    parts: dict[str, dict[str, Tensor]]
    small: _State
    saved_in: Path | None = None

    @classmethod
    def take(cls, module: nn.Module, optimizers: Sequence[Any], *, step: int) -> CycleCopy:
        """Copies the present state."""
        parameters = ParameterSpace.of(module).resolve(module)
        parts: dict[str, dict[str, Tensor]] = {_VALUES: {name: _copy(each) for name, each in parameters.items()}}
        small: _State = {}
        for optimizer in plain_optimizers(optimizers):
            for name, parameter in parameters.items():
                for key, value in optimizer.state.get(parameter, {}).items():
                    plain = not isinstance(value, Tensor)
                    if not plain and value.ndim and value.shape == parameter.shape:
                        parts.setdefault(key, {})[name] = _copy(value)
                    else:
                        small.setdefault(name, {})[key] = value if plain else value.detach().cpu().clone()
        return cls(step, parts, small)

    @torch.no_grad()
    def restore(self, module: nn.Module, optimizers: Sequence[Any]) -> None:
        """Puts the copied state back; what optimizers began to keep since then is forgotten."""
        parameters = ParameterSpace.of(module).resolve(module)
        for name, parameter in parameters.items():
            local(parameter).copy_(self.parts[_VALUES][name])
        for optimizer in plain_optimizers(optimizers):
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
        for kind, parts in self.parts.items():
            name = f"cycle-{kind}-step={self.step:08d}.safetensors"
            # A second checkpoint of the cycle names the same files.
            if self.saved_in != folder:
                space = ParameterSpace.of(module).subspace(parts)
                # Each process keeps its own parts: sharded tensors live on their mesh's device.
                tensors = {
                    each: like(parameters[each].detach(), parts[each].to(local(parameters[each]).device))
                    for each in space
                }
                vector = ParameterVector(space, tensors)
                save_vectors(folder / name, vector, kind="values", model=module, step=self.step, write=write)
            files[kind] = name
        self.saved_in = folder
        return {"step": self.step, "files": files, "small": self.small}

    @classmethod
    def load(cls, folder: Path, module: nn.Module, saved: Mapping[str, Any]) -> CycleCopy:
        """Reads what :meth:`save` wrote.

        Raises:
            StoreError: A file is missing, broken, or belongs to another model.
        """
        vectors = {kind: load_vectors(folder / name, module)[0] for kind, name in saved["files"].items()}
        parts = {kind: {name: _copy(part) for name, part in vector.items()} for kind, vector in vectors.items()}
        return cls(saved["step"], parts, {name: dict(values) for name, values in saved["small"].items()}, folder)

    def _restore_state(self, state: Any, name: str, parameter: nn.Parameter) -> None:
        present = state.get(parameter, {})
        kept: dict[str, Any] = {}
        for key, value in self.small.get(name, {}).items():
            now = present.get(key)
            if isinstance(now, Tensor):
                kept[key] = now.copy_(value)
            else:
                kept[key] = value.clone() if isinstance(value, Tensor) else value
        for key, parts in self.parts.items():
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


@dataclass(frozen=True, eq=False)
class ParameterRows:
    """Indices along one dimension of one parameter.

    Args:
        name: Canonical name within the model.
        parameter: The parameter; a DTensor when sharded.
        dim: The dimension.
        index: Global indices, ascending, shape ``[n]``.

    Example:
        >>> rows = ParameterRows("weight", nn.Parameter(torch.eye(3)), 0, torch.tensor([2]))
        >>> rows.read(rows.parameter)
        tensor([[0., 0., 1.]])
    """

    name: str
    parameter: nn.Parameter
    dim: int
    index: Tensor

    def read(self, tensor: Tensor, out: Tensor | None = None) -> Tensor:
        """This process's part of these rows of a tensor in the parameter's layout; a copy, in ``out`` when given."""
        part = local(tensor)
        if part.device.type in _BY_RUNS and self._runs:
            return torch.cat([part.narrow(self.dim, *run) for run in self._runs], dim=self.dim, out=out)
        return torch.index_select(part, self.dim, self._inside.to(part.device), out=out)

    @torch.no_grad()
    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Copies what :meth:`read` gave back into a tensor in the parameter's layout."""
        part = local(tensor)
        if part.device.type not in _BY_RUNS:
            part.index_copy_(self.dim, self._inside.to(part.device), values)
            return
        for run, value in zip(self._runs, values.split([length for _, length in self._runs], self.dim), strict=True):
            part.narrow(self.dim, *run).copy_(value)

    @torch.no_grad()
    def zero(self, tensor: Tensor) -> None:
        """Sets these rows of a tensor in the parameter's layout to zero."""
        part = local(tensor)
        if part.device.type not in _BY_RUNS:
            part.index_fill_(self.dim, self._inside.to(part.device), 0)
            return
        for run in self._runs:
            part.narrow(self.dim, *run).zero_()

    def matches(self, tensor: object) -> bool:
        """Whether a tensor has the parameter's shape, so that its rows are the heads' too (moments have)."""
        return isinstance(tensor, Tensor) and tensor.ndim > 0 and tensor.shape == self.parameter.shape

    @cached_property
    def _inside(self) -> Tensor:
        """The indices within this process's part."""
        shape, offset = local_box(self.parameter)
        index = self.index - offset[self.dim]
        return index[(index >= 0) & (index < shape[self.dim])].to(local(self.parameter).device)

    @cached_property
    def _runs(self) -> list[tuple[int, int]]:
        """The same indices as (start, length) of neighbours."""
        runs: list[tuple[int, int]] = []
        for place in self._inside.tolist():
            start, length = runs[-1] if runs else (place, 0)
            if place == start + length:
                runs[-1:] = [(start, length + 1)]
            else:
                runs.append((place, 1))
        return runs


def owned_parts(
    architecture: Architecture, heads: Iterable[Head], closed: Iterable[Head]
) -> Iterator[tuple[Head, Role, int]]:
    """What heads own: query rows, output columns, and key and value rows of groups of which every head is closed.

    Args:
        architecture: Of the model.
        heads: The heads.
        closed: All closed heads; the key and value rows of a group belong to the heads only if all of it is closed.

    Yields:
        The head, what the projection is for, and the head or key/value group within it.
    """
    closed, seen = set(closed), set()
    for layer, head in heads:
        block = architecture.blocks[layer]
        group = block.key_value_head(head)
        yield (layer, head), "query", head
        yield (layer, head), "output", head
        if (layer, group) not in seen and all((layer, other) in closed for other in block.query_heads(group)):
            seen.add((layer, group))
            yield (layer, head), "key", group
            yield (layer, head), "value", group


def head_rows(architecture: Architecture, heads: Iterable[Head], closed: Iterable[Head]) -> list[ParameterRows]:
    """What heads own, as one set of rows per parameter; see :func:`owned_parts`.

    Raises:
        UnsupportedArchitectureError: Which weights belong to a head is not known.
    """
    by_name: dict[str, list[ParameterSlice]] = {}
    for (layer, _), role, index in owned_parts(architecture, heads, closed):
        for part in getattr(architecture.blocks[layer], role).head_slice(index):
            by_name.setdefault(part.name, []).append(part)
    rows = []
    # Every slice of a parameter is along one dimension.
    for name, slices in by_name.items():
        starts = sorted({(part.start, part.length) for part in slices})
        index_of_all = torch.cat([torch.arange(start, start + length) for start, length in starts])
        rows.append(ParameterRows(name, slices[0].parameter, slices[0].dim, index_of_all))
    return rows


def plain_optimizers(optimizers: Any) -> list[torch.optim.Optimizer]:
    """The torch optimizers of one or several, each a torch optimizer or a LightningOptimizer around one.

    Raises:
        TypeError: One is neither.
    """
    plain = []
    for optimizer in optimizers if isinstance(optimizers, (list, tuple)) else [optimizers]:
        # A LightningOptimizer borrows the class of what it wraps, so isinstance cannot tell.
        inner = getattr(optimizer, "_optimizer", None)
        plain.append(inner if isinstance(inner, torch.optim.Optimizer) else optimizer)
        if not isinstance(plain[-1], torch.optim.Optimizer):
            raise TypeError(f"an optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    return plain


def reset_moments(rows: Iterable[ParameterRows], optimizers: Any) -> None:
    """Sets what optimizers keep of these rows (everything of the parameter's shape) to zero.

    Args:
        rows: Rows of parameters.
        optimizers: One or several.
    """
    for optimizer, row in itertools.product(plain_optimizers(optimizers), rows):
        for value in optimizer.state.get(row.parameter, {}).values():
            if row.matches(value):
                row.zero(value)
