"""Frozen and linearised variants of a model: what remains when parts of it may not leave the base."""

from __future__ import annotations

from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.func import jvp

from lightning_goldy.analysis.linearized.base_relative import BaseRelative
from lightning_goldy.analysis.linearized.frozen_attention import FrozenAttention
from lightning_goldy.analysis.linearized.linear_mlp import LinearizedMLP
from lightning_goldy.core.autodiff import call_with, nested_derivatives
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.vector import ParameterVector

__all__ = ["FrozenAttention", "LinearizedMLP", "TangentModel", "Variant", "build_variant"]

Variant = Literal["full", "frozen_attention", "linear_mlp", "tangent"]


class TangentModel(BaseRelative):
    r"""A model that is linear in its parameters: its tangent at the base.

    .. math:: f_1(x) = f(\theta_0; x) + J(\theta_0; x) (\theta - \theta_0)

    A module with the model's parameters that can be trained in its place: the gradient is that of the linear model,
    :math:`J(\theta_0)^\top v`. Without training,
    :class:`~lightning_goldy.analysis.taylor.taylor.TaylorApproximation` of order 1 gives the same logits.

    Args:
        model: Any model that returns a tensor or an output with ``logits``.
        base: theta_0.

    Raises:
        SpaceError: The base is of another model.
        ValueError: The model is sharded.

    Source: Jacot et al. 2018 ("Neural Tangent Kernel").

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> base = ParameterVector.of(model)
        >>> _ = model.weight.data.mul_(3)
        >>> x = torch.ones(1, 2)
        >>> torch.allclose(TangentModel(model, base)(x), model(x))  # linear in its parameters already
        True
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output with the tangent's logits; a tensor where the model gives one."""
        base = dict(self.base_values())
        present = self._space.resolve(self.model)
        outputs: list[Any] = []

        def logits(parameters: dict[str, Tensor]) -> Tensor:
            outputs.append(call_with(self.model, parameters, args, kwargs))
            return outputs[-1] if isinstance(outputs[-1], Tensor) else outputs[-1].logits

        with nested_derivatives():
            value, change = jvp(logits, (base,), ({name: present[name] - base[name] for name in base},))[:2]
        found = value + change
        return found if isinstance(outputs[-1], Tensor) else type(outputs[-1])(logits=found)


def build_variant(variant: Variant, model: nn.Module, base: BaseParameters | ParameterVector) -> nn.Module:
    """The model in one of its variants, with the model's own parameters.

    Args:
        variant: ``full`` (the model itself), ``frozen_attention``, ``linear_mlp`` (at the base's inputs) or
            ``tangent``.
        model: The model.
        base: theta_0.

    Raises:
        ValueError: The variant is unknown.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> build_variant("full", model, ParameterVector.of(model)) is model
        True
    """
    if variant == "full":
        return model
    kinds: dict[str, Any] = {"frozen_attention": FrozenAttention, "linear_mlp": LinearizedMLP, "tangent": TangentModel}
    if variant not in kinds:
        raise ValueError(f"unknown variant {variant!r}; {suggestion(str(variant), get_args(Variant))}")
    built: nn.Module = kinds[variant](model, base)
    return built
