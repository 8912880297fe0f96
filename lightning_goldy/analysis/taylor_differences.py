"""A loss's Taylor terms by exact gradients at the base and near it: what a sharded model allows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.taylor_sums import LossTerms, TaylorWork
from lightning_goldy.core.sharding import unshard_guard
from lightning_goldy.core.vector import reduce_tensors, substituted

# Step of the central differences, as a fraction of the finetune's own; the second is half of it. Two of them remove the
# error of second order, and their difference tells what is left.
_STEP = 0.2


def finite_terms(work: TaylorWork) -> LossTerms:
    """By exact gradients at the base and near it: central differences along the step, extrapolated once."""
    terms, step = LossTerms(), work.step()
    second = max(work.orders) > 1
    parameters = work.base.space.resolve(work.model)
    slopes = dict.fromkeys((-1.0, -0.5, 0.5, 1.0) if second else (), 0.0)
    for done, batch in enumerate(work.batches, 1):
        loss, weight = work.present(batch)
        terms.loss += weight * loss
        with substituted(work.model, work.base):
            value, gradients = _backward(work, batch, parameters)
        products = reduce_tensors(gradients, torch.dot, list(step.values()))
        for name, tensor, product in zip(work.base, gradients, products, strict=True):
            terms.add_gradient(name, tensor, product, weight)
        for place in slopes:
            with substituted(work.model, work.base + (place * _STEP) * step):
                _, gradients = _backward(work, batch, parameters)
            slopes[place] += weight * math.fsum(reduce_tensors(gradients, torch.dot, list(step.values())))
        terms.add_derivatives([value, math.fsum(products)], weight)
        terms.n_targets += weight
        work.tell(done)
    if second:
        whole, half = (slopes[1.0] - slopes[-1.0]) / (2 * _STEP), (slopes[0.5] - slopes[-0.5]) / _STEP
        terms.derivatives.append((4 * half - whole) / 3)
        terms.error = abs(half - whole) / 3 / 2 / max(terms.n_targets, 1)
    return work.finished(terms, step)


def _backward(work: TaylorWork, batch: Any, parameters: dict[str, nn.Parameter]) -> tuple[float, list[Tensor]]:
    for parameter in parameters.values():
        parameter.grad = None
    value = work.objective.loss(work.model, batch)
    value.backward()
    unshard_guard(work.model)
    gradients = []
    for name, parameter in parameters.items():
        if parameter.grad is None:
            raise ValueError(f"the objective does not depend on {name}; leave it out of the base")
        gradients.append(parameter.grad)
        parameter.grad = None
    return float(value.detach()), gradients
