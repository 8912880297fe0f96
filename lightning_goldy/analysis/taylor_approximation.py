"""A model's Taylor expansion, callable like the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.taylor_parts import logits_by_parts, parts_of_order
from lightning_goldy.core.autodiff import (
    Substituted,
    call_with,
    directional_derivatives,
    polynomial,
    trainable_values,
)
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.sharding import is_sharded
from lightning_goldy.core.vector import ParameterVector

HIGHEST_ORDER = 3


class TaylorApproximation(nn.Module):
    r"""A callable like the model, whose logits are those of its Taylor expansion around a base.

    .. math:: f_n(x) = \sum_{k \le n} \frac{1}{k!} \frac{d^k}{dt^k} f(\theta_0 + t (\theta - \theta_0); x) \Big|_0

    with theta the model's present values at each call, so that it follows a training, or values that are given. Use it
    where a model is evaluated: ``objective.loss(TaylorApproximation(model, base, order=1), batch)``. A language model's
    arguments are worked through in 2^n parts of whole samples, which bounds the memory; any other call goes at once.

    Args:
        model: The model; its values are read at each call.
        base: theta_0.
        order: n, from 1 to 3.
        parameters: theta; the model's present values by default.

    Raises:
        ValueError: The order is out of range.
        SpaceError: The base is of another model.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> base = ParameterVector.of(model)
        >>> _ = model.weight.data.mul_(3)
        >>> x = torch.ones(1, 2)
        >>> torch.allclose(TaylorApproximation(model, base, order=1)(x), model(x))  # linear in its parameters
        True
    """

    def __init__(
        self,
        model: nn.Module,
        base: BaseParameters | ParameterVector,
        order: int,
        *,
        parameters: ParameterVector | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= order <= HIGHEST_ORDER:
            raise ValueError(f"order must lie between 1 and {HIGHEST_ORDER}; got {order}")
        if any(map(is_sharded, model.parameters())):
            raise ValueError("a sharded model has no forward-mode derivatives; expand the loss with taylor_diff")
        start = base if isinstance(base, ParameterVector) else base.vector(model)
        start.space.resolve(model)
        if parameters is not None:
            start.space.require_same(parameters.space)
        # In tuples, so that the model does not become part of this module.
        self._model, self._base, self._given = (model,), (start,), (parameters,)
        self.order = order

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self._model[0].config

    def get_base_model(self) -> nn.Module:
        """The model, whose forward names the arguments."""
        return Substituted(self._model[0], {}).get_base_model()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with the expansion's logits; a tensor where the model gives one."""
        model, base, given = self._model[0], self._base[0], self._given[0]
        present: Mapping[str, Tensor] = base.space.resolve(model) if given is None else given
        delta = {name: present[name].detach() - value for name, value in base.items()}
        # Without graphs: a parameter outside the base would have one kept for nothing.
        others = trainable_values(model)
        kinds: list[Any] = []

        def expand(some: Sequence[Any], named: Mapping[str, Any]) -> Tensor:
            def logits(parameters: Mapping[str, Tensor]) -> Tensor:
                output = call_with(model, {**others, **parameters}, some, named)
                kinds.append(type(output))
                return output if isinstance(output, Tensor) else output.logits

            return polynomial(directional_derivatives(logits, dict(base), delta, self.order))

        found = logits_by_parts(model, expand, args, kwargs, parts_of_order(self.order))
        return found if issubclass(kinds[-1], Tensor) else kinds[-1](logits=found)
