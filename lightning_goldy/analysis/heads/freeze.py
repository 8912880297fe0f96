"""Closed heads that stay as they are: their slices of weights and of the optimizer's state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_goldy.core.architecture import Architecture, Block, Head, HeadGates, HeadProjection, ParameterSlice
from lightning_goldy.core.sharding import local, local_box, unshard_guard

Role = Literal["query", "key", "value", "output"]

# Copying neighbours is several times quicker than by index on CPUs; elsewhere every copy is a launch, and one is best.
_BY_RUNS = ("cpu",)


@dataclass(frozen=True)
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
    return merged(
        part
        for (layer, _), role, index in owned_parts(architecture, heads, closed)
        for part in projection_of(architecture.blocks[layer], role).head_slice(index)
    )


def projection_of(block: Block, role: Role) -> HeadProjection:
    """The projection of a block with this role."""
    if role == "output":
        return block.output
    return {"query": block.query, "key": block.key, "value": block.value}[role]


def merged(parts: Iterable[ParameterSlice]) -> list[ParameterRows]:
    """Slices of the same parameter as one set of rows each; every slice of a parameter is along one dimension."""
    found: dict[str, list[ParameterSlice]] = {}
    for part in parts:
        found.setdefault(part.name, []).append(part)
    rows = []
    for name, slices in found.items():
        starts = sorted({(part.start, part.length) for part in slices})
        index = torch.cat([torch.arange(start, start + length) for start, length in starts])
        rows.append(ParameterRows(name, slices[0].parameter, slices[0].dim, index))
    return rows


class HeadFreeze:
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
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
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
        several = optimizers if isinstance(optimizers, (list, tuple)) else [optimizers]
        self._optimizers = [plain_optimizer(optimizer) for optimizer in several]
        self._planned: tuple[Head, ...] | None = None
        self._plan: list[ParameterRows] = []
        self._kept: dict[int, tuple[Any, list[_SavedRows]]] = {}
        self._saved: dict[int, list[_SavedRows]] = {}
        # Whether the family can be frozen shows now, and not once a head is closed in the middle of a run.
        head_rows(gates.architecture, gates.heads, gates.heads)
        self._handles = [
            handle
            for optimizer in self._optimizers
            for handle in (
                optimizer.register_step_pre_hook(self._before),
                optimizer.register_step_post_hook(self._after),
            )
        ]

    def zero_gradients(self) -> None:
        """Sets the gradients of closed heads to zero."""
        for rows in self._frozen_rows():
            if rows.parameter.grad is not None:
                rows.zero(rows.parameter.grad)

    def remove(self) -> None:
        """Lets the optimizers go."""
        for handle in self._handles:
            handle.remove()

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


class _SavedRows:
    """Rows of a parameter and of its optimizer state before a step."""

    def __init__(self, rows: ParameterRows, group: dict[str, Any]) -> None:
        self.rows = rows
        self._group = group
        self._value: Tensor | None = None
        self._state: dict[str, Tensor] = {}

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


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside a LightningOptimizer, or the optimizer itself.

    Raises:
        TypeError: It is neither.
    """
    # A LightningOptimizer borrows the class of what it wraps, so isinstance cannot tell.
    inner = getattr(optimizer, "_optimizer", None)
    optimizer = inner if isinstance(inner, torch.optim.Optimizer) else optimizer
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"an optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    return optimizer


def reset_moments(rows: Iterable[ParameterRows], optimizers: Any) -> None:
    """Sets what optimizers keep of these rows (everything of the parameter's shape) to zero.

    Args:
        rows: Rows of parameters.
        optimizers: One or several.
    """
    several = optimizers if isinstance(optimizers, (list, tuple)) else [optimizers]
    for optimizer in map(plain_optimizer, several):
        for each in rows:
            for value in optimizer.state.get(each.parameter, {}).values():
                if each.matches(value):
                    each.zero(value)
