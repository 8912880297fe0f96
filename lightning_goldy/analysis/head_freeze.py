"""Keeps the weights of closed heads exactly as they were, whatever the optimizer does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.head_slices import ParameterRows, head_rows
from lightning_goldy.core.gates import Head, HeadGates
from lightning_goldy.core.sharding import unshard_guard


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
