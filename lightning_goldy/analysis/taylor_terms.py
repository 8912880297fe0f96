"""A model's Taylor terms along its step, by exact derivatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import divergence_sum
from lightning_goldy.analysis.taylor_parts import batch_parts, parts_of_order
from lightning_goldy.analysis.taylor_sums import FunctionSums, LossTerms, TaylorWork
from lightning_goldy.core.autodiff import (
    Substituted,
    directional_derivatives,
    nested_derivatives,
    polynomial,
    trainable_values,
)
from lightning_goldy.core.objective import FunctionObjective, TargetLogits
from lightning_goldy.core.vector import ParameterVector, reduce_tensors

# Logits are compared a piece at a time, in float64: so many pieces, of at least so many elements.
_PIECES = 16
_PIECE = 1 << 18


def exact_terms(work: TaylorWork) -> LossTerms:
    """By forward mode, nested as often as the highest order asks, and one gradient for the shares."""
    terms, step = LossTerms(), work.step()
    count = parts_of_order(max(work.orders), gradients=work.shares)
    for done, batch in enumerate(work.batches, 1):
        for part in batch_parts(batch, work.objective, count):
            terms.n_targets += _add_part(work, terms, step, part)
        work.tell(done)
    return work.finished(terms, step)


def _add_part(work: TaylorWork, terms: LossTerms, step: ParameterVector, part: Any) -> int:
    """Adds what some samples say; returns the number of their targets."""
    own_loss = isinstance(work.objective, FunctionObjective)  # it need not be that of the targets
    weight, direction = 0, None
    if work.function_space or not own_loss:
        weight, direction = _logit_terms(work, terms, step, part)
    if own_loss:
        loss, rows = work.present(part)
        weight = weight or rows
        terms.loss += weight * loss
        terms.add_derivatives(_loss_derivatives(work, step, part), weight)
    if work.function_space and work.shares and direction is not None:
        _add_function_shares(work, terms, step, part, direction)
    del direction
    if work.shares:
        _add_gradient(work, terms, step, part, weight)
    return weight


def _logit_terms(work: TaylorWork, terms: LossTerms, step: ParameterVector, part: Any) -> tuple[int, Tensor]:
    """Expands logits, and the loss through them; returns the number of targets and the logits' first derivative."""
    derivatives = _along(work, step, lambda model: work.objective.logits_and_targets(model, part).logits)
    with torch.no_grad():
        with nested_derivatives():  # the same arithmetic, so that without a step nothing differs
            present = work.objective.logits_and_targets(work.model, part)
        for rows in _pieces(present.logits):
            piece = dataclasses.replace(
                present, logits=present.logits[rows], targets=present.targets[rows], sample=present.sample[rows]
            )
            expansion = [_wide(derivative[rows]) for derivative in derivatives]
            if not isinstance(work.objective, FunctionObjective):
                weight = len(piece.targets)
                terms.loss += weight * float(piece.loss())
                terms.add_derivatives(_losses_of_logits(piece, expansion), weight)
            if work.function_space:
                _compare(terms, work.orders, expansion, piece.logits)
    return len(present.targets), derivatives[1]


def _compare(terms: LossTerms, orders: Sequence[int], expansion: Sequence[Tensor], present: Tensor) -> None:
    log_probs = torch.log_softmax(_wide(present), dim=-1)
    terms.function_change += _square_distance(present, expansion[0])
    for order in orders:
        predicted = polynomial(expansion[: order + 1])
        terms.function[order] = terms.function.get(order, FunctionSums()) + FunctionSums(
            residual=_square_distance(present, predicted),
            divergence=divergence_sum(log_probs, predicted),
            agreed=int((present.argmax(-1) == predicted.argmax(-1)).sum()),
        )


def _losses_of_logits(target: TargetLogits, expansion: Sequence[Tensor]) -> list[float]:
    """Derivatives of the loss along the step from those of the logits, by the chain rule on their polynomial."""

    def loss(where: dict[str, Tensor]) -> Tensor:
        return dataclasses.replace(target, logits=polynomial(expansion, where["t"])).loss()

    zero = {"t": torch.zeros((), dtype=expansion[0].dtype, device=expansion[0].device)}
    found = directional_derivatives(loss, zero, {"t": torch.ones_like(zero["t"])}, len(expansion) - 1)
    return [float(value) for value in found]


def _loss_derivatives(work: TaylorWork, step: ParameterVector, part: Any) -> list[float]:
    return [float(value) for value in _along(work, step, lambda model: work.objective.loss(model, part))]


def _along(work: TaylorWork, step: ParameterVector, output: Callable[[nn.Module], Tensor]) -> tuple[Tensor, ...]:
    """Derivatives of what a model gives, at the base and along the step."""
    # Without graphs: a parameter outside the base would have one kept for nothing.
    others = trainable_values(work.model)
    return directional_derivatives(
        lambda parameters: output(Substituted(work.model, {**others, **parameters})),
        dict(work.base),
        dict(step),
        max(work.orders),
    )


def _add_gradient(work: TaylorWork, terms: LossTerms, step: ParameterVector, part: Any, weight: int) -> None:
    """Adds the gradient at the base, and its product with the step tensor by tensor."""

    def take(name: str, gradient: Tensor, product: float) -> None:
        terms.add_gradient(name, gradient, product, weight)

    _pull_back(work, step, lambda model: work.objective.loss(model, part), None, take)


def _add_function_shares(
    work: TaylorWork, terms: LossTerms, step: ParameterVector, part: Any, direction: Tensor
) -> None:
    """Adds <J Delta_b, J Delta> of every tensor, from one backward pass: J' v with v = J Delta."""

    def take(name: str, gradient: Tensor, product: float) -> None:
        terms.add_function_share(name, product)

    _pull_back(work, step, lambda model: work.objective.logits_and_targets(model, part).logits, direction, take)


def _pull_back(
    work: TaylorWork,
    step: ParameterVector,
    output: Callable[[nn.Module], Tensor],
    vector: Tensor | None,
    take: Callable[[str, Tensor, float], None],
) -> None:
    """J' v of what a model gives at the base; each tensor's is taken with its product with the step, and freed."""
    leaves = {name: value.detach().requires_grad_() for name, value in work.base.items()}
    left = set(leaves)

    def taker(name: str) -> Callable[[Tensor], None]:
        def hook(leaf: Tensor) -> None:
            assert leaf.grad is not None
            gradient, leaf.grad = leaf.grad, None
            left.discard(name)
            take(name, gradient, reduce_tensors([gradient], torch.dot, [step[name]])[0])

        return hook

    for name, leaf in leaves.items():
        leaf.register_post_accumulate_grad_hook(taker(name))
    with torch.enable_grad():
        found = output(Substituted(work.model, {**trainable_values(work.model), **leaves}))
    torch.autograd.backward(found, None if vector is None else vector.to(found.dtype), inputs=list(leaves.values()))
    if left:
        raise ValueError(f"the objective does not depend on {min(left)}; leave it out of the base")


def _pieces(logits: Tensor) -> Iterator[slice]:
    rows = max(-(-len(logits) // _PIECES), _PIECE // logits.shape[-1], 1)
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _square_distance(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).square_().sum())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
