"""How strongly a sample's loss depends on each element of a parameter."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lightning_goldy.core.registry import Registry

Score = Callable[[Tensor, Tensor], Tensor]
"""``score(gradient, value)``: both in at least float32, the gradient free to be overwritten; larger is stronger."""

SCORES: Registry[Score] = Registry("score")
register_score = SCORES.register


@register_score("gradient")
def gradient(gradient: Tensor, value: Tensor) -> Tensor:
    """Magnitude of the gradient, ``|g|``.

    Example:
        >>> import torch
        >>> gradient(torch.tensor([-2.0]), torch.tensor([3.0]))
        tensor([2.])
    """
    return gradient.abs_()


@register_score("taylor")
def taylor(gradient: Tensor, value: Tensor) -> Tensor:
    r"""First-order change of the loss when the element is set to zero, :math:`|g\,\theta|`."""
    return gradient.mul_(value).abs_()


@register_score("fisher")
def fisher(gradient: Tensor, value: Tensor) -> Tensor:
    r"""Squared first-order change, :math:`g^2 \theta^2`.

    Within one sample it ranks elements as ``taylor`` does, so the votes of both agree; their values differ.
    """
    return gradient.mul_(value).square_()
