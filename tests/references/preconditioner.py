"""Preconditioners as dense matrices over the whole parameter space, float64, and a model small enough for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """A matrix, a vector and a scalar."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.gain = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.layer(x) * self.gain


def diagonal_scales(curvature: Sequence[Tensor], *, eps: float, exponent: float, eps_unit: str = "mean") -> list[float]:
    """One scale per element, tensor after tensor; their product is 1."""
    magnitudes = [abs(value) ** exponent for tensor in curvature for value in tensor.double().flatten().tolist()]
    damping = eps * math.fsum(magnitudes) / len(magnitudes) if eps_unit == "mean" else eps
    logs = [-math.log(magnitude + damping) for magnitude in magnitudes]
    mean = math.fsum(logs) / len(logs)
    return [math.exp(log - mean) for log in logs]


def dense_map(preconditioner) -> Tensor:
    """The linear map column by column, from its answers to unit vectors, ``[D, D]``."""
    space = preconditioner.space
    columns = []
    for place, shape in enumerate(space.shapes):
        for element in range(math.prod(shape)):
            parts = [torch.zeros(each) for each in space.shapes]
            parts[place].view(-1)[element] = 1.0
            columns.append(applied_to(preconditioner, dict(zip(space.names, parts, strict=True))))
    return torch.stack(columns, dim=1)


def applied_to(preconditioner, direction: Mapping[str, Tensor]) -> Tensor:
    """P u as one flat vector, ``[D]``."""
    parts = []
    for name, part in direction.items():
        given = part.clone() if preconditioner.whole_tensors else part.flatten().clone()
        parts.append(preconditioner.apply(name, given, 0).flatten())
    return torch.cat(parts).double()


def adam_second_moment(gradients: Sequence[Tensor], beta: float) -> Tensor:
    """Weighted mean of the squared gradients, the latest with the most weight, weights that sum to 1."""
    weights = [beta ** (len(gradients) - 1 - step) for step in range(len(gradients))]
    total = sum(weight * gradient.double() ** 2 for weight, gradient in zip(weights, gradients, strict=True))
    return total / sum(weights)


def adam_first_moment(gradients: Sequence[Tensor], beta: float) -> Tensor:
    """The same of the gradients themselves."""
    weights = [beta ** (len(gradients) - 1 - step) for step in range(len(gradients))]
    total = sum(weight * gradient.double() for weight, gradient in zip(weights, gradients, strict=True))
    return total / sum(weights)
