"""Catches what the gradient of one linear layer is made of."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.coupling_gram import Rows, without_empty_rows
from lightning_goldy.core.sharding import is_sharded


class CouplingError(ValueError):
    """Coupling cannot be computed for this model or piece; the message says which and why."""


class NotBatchedError(RuntimeError):
    """A layer sees something else than one row of inputs per piece."""


class Tap:
    """Catches one linear layer's inputs and the gradients at its outputs, piece by piece.

    Args:
        name: Canonical name of the layer's weight.
        module: The layer.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        weight: Tensor = module._parameters["weight"]  # type: ignore[assignment]
        self.inputs_first = not isinstance(module, nn.Linear)
        self.readable = weight.is_floating_point()
        rows, columns = weight.shape
        self.widths = (rows, columns) if self.inputs_first else (columns, rows)  # (in, out)
        self.batch_first = True
        self.begin(1)

    def begin(self, count: int) -> None:
        """Forgets what was caught and expects so many pieces."""
        self.count = count
        self._caught: list[Rows] = []

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
        """A forward hook; where nothing before the layer needs a gradient, the graph begins at its output.

        Raises:
            CouplingError: The layer is split over processes.
            NotBatchedError: The first dimension is not that of the pieces.
        """
        if not torch.is_grad_enabled():
            return None  # no gradient would reach the weight either
        given = args[0] if args else next(iter(kwargs.values()))
        seen = given.shape[-1], output.shape[-1]
        if is_sharded(given) or (self.readable and seen != self.widths):
            raise CouplingError(
                f"the layer of {self.name} sees inputs and outputs of width {seen[0]} and {seen[1]} where its weight "
                f"is {self.widths[0]} to {self.widths[1]}; under tensor parallelism no process sees a layer whole: use "
                "FSDP2 or replicas"
            )
        self.widths = seen
        if given.shape[0] != self.count:
            self.batch_first = False
            if self.count > 1:
                raise NotBatchedError(f"the layer of {self.name} sees {given.shape[0]} rows of {self.count} pieces")
        if not output.requires_grad:
            # A leaf must not be written to in place, as the model may do with its output.
            output = output.detach().requires_grad_().clone()
        output.register_hook(partial(self._catch, given.detach(), given._version))
        return output

    def rows(self) -> Rows:
        """All that was caught: the gradient of the weight."""
        if not self._caught:
            weight = self.module._parameters["weight"]
            assert weight is not None
            dtype = weight.dtype if self.readable else torch.float32
            empty = [torch.zeros(self.count, 0, width, dtype=dtype, device=weight.device) for width in self.widths]
            return Rows(empty[1], empty[0])
        if len(self._caught) == 1:
            return self._caught[0]
        # One layer called several times: its gradient is the sum over calls.
        inputs = torch.cat([each.inputs for each in self._caught if each.inputs is not None], dim=1)
        return Rows(torch.cat([each.gradients for each in self._caught], dim=1), inputs)

    def bias_rows(self) -> Rows:
        """The gradient of the bias, shape ``[M, d_out]``."""
        gradients = self.rows().gradients
        accurate = gradients if gradients.dtype == torch.float64 else gradients.float()
        return Rows(accurate.sum(dim=1))

    def _catch(self, given: Tensor, version: int, gradient: Tensor) -> None:
        if given._version != version:
            raise CouplingError(f"the model writes over the input of the layer of {self.name} after its call")
        inputs = given.reshape(self.count, -1, self.widths[0])  # [M, T, d_in]
        self._caught.append(without_empty_rows(inputs, gradient.detach().reshape(self.count, -1, self.widths[1])))
