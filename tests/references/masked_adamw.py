"""Slow, obvious versions: AdamW element by element in float64, and two whole AdamWs to choose from."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def element_loop(
    start: Tensor, gradients: list[Tensor], mask: Tensor, inside: float, outside: float, **settings
) -> Tensor:
    """The parameter after all steps, one element after the other, by the published update."""
    beta1, beta2 = settings.get("betas", (0.9, 0.999))
    eps, decay = settings.get("eps", 1e-8), settings.get("weight_decay", 0.01)
    values = []
    for index in range(start.numel()):
        value, first, second, largest = float(start.flatten()[index]), 0.0, 0.0, 0.0
        rate = inside if mask.flatten()[index] else outside
        for step, gradient in enumerate(gradients, 1):
            g = float(gradient.flatten()[index]) * (-1 if settings.get("maximize") else 1)
            first = beta1 * first + (1 - beta1) * g
            second = beta2 * second + (1 - beta2) * g * g
            largest = max(largest, second)
            used = largest if settings.get("amsgrad") else second
            value -= rate * decay * value
            value -= rate * (first / (1 - beta1**step)) / (math.sqrt(used / (1 - beta2**step)) + eps)
        values.append(value)
    return torch.tensor(values, dtype=torch.float64).view(start.shape)


def two_whole_runs(
    starts: dict[str, Tensor],
    gradients: list[dict[str, Tensor]],
    masks: dict[str, Tensor],
    rates: list[tuple[float, float]],
    **settings,
) -> dict[str, Tensor]:
    """What torch.optim.AdamW makes of all elements at each rate, and of each element the one that its mask names.

    An element whose rate is 0 keeps its value; torch may turn -0.0 into 0.0.
    """
    ends = []
    for side in (0, 1):
        values = {name: start.clone().requires_grad_() for name, start in starts.items()}
        optimizer = torch.optim.AdamW(values.values(), lr=rates[0][side], **settings)
        for gradient, rate in zip(gradients, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate[side]
            for name, value in values.items():
                value.grad = gradient[name].clone()
            optimizer.step()
        still = all(rate[side] == 0 for rate in rates)
        ends.append(starts if still else {name: value.detach() for name, value in values.items()})
    empty = {name: torch.zeros(start.shape, dtype=torch.bool) for name, start in starts.items()}
    return {name: torch.where((empty | masks)[name], ends[0][name], ends[1][name]) for name in starts}
