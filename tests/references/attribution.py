"""Change attribution the slow obvious way: a midpoint sum over many models between base and finetune."""

from __future__ import annotations

import copy

import torch
from torch import nn


def riemann_attribution(model: nn.Module, base: nn.Module, value, points: int = 512) -> dict[str, torch.Tensor]:
    """Of every element its change times the mean gradient of ``value(model)`` along the straight line."""
    between = copy.deepcopy(model).eval()
    ends = [dict(end.named_parameters()) for end in (base, model)]
    total = {name: torch.zeros_like(parameter) for name, parameter in between.named_parameters()}
    for point in range(points):
        t = (point + 0.5) / points
        with torch.no_grad():
            for name, parameter in between.named_parameters():
                parameter.copy_((1 - t) * ends[0][name] + t * ends[1][name])
        names, parameters = zip(*between.named_parameters(), strict=True)
        gradients = torch.autograd.grad(value(between), parameters, allow_unused=True)
        for name, gradient in zip(names, gradients, strict=True):
            if gradient is not None:
                total[name] += gradient / points
    return {name: (ends[1][name] - ends[0][name]).detach() * gradient for name, gradient in total.items()}


def moved(base: nn.Module, other: nn.Module, step: float) -> nn.Module:
    """The base, a part of the way towards another model of its shapes."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter, target in zip(model.parameters(), other.parameters(), strict=True):
            parameter.lerp_(target, step)
    return model
