"""The sums over batches that a Taylor comparison is made of, by exact derivatives or by differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import divergence_sum
from lightning_goldy.core.autodiff import Substituted, directional_derivatives, nested_derivatives, polynomial
from lightning_goldy.core.batches import batch_tensors, map_batch
from lightning_goldy.core.objective import FunctionObjective, Objective, TargetLogits
from lightning_goldy.core.sharding import Replicas, unshard_guard
from lightning_goldy.core.vector import ParameterVector, reduce_tensors, substituted

Progress = Callable[[int, int], None] | None

# Step of the central differences, as a fraction of the finetune's own; the second is half of it. Two of them remove the
# error of second order, and their difference tells what is left.
_STEP = 0.2


@dataclass
class FunctionSums:
    """How well one order predicts logits, summed over target positions.

    Args:
        residual: Squared distance of the logits from the prediction.
        divergence: KL(p_t || p_k), nats.
        agreed: Positions where both prefer the same class.
    """

    residual: float = 0.0
    divergence: float = 0.0
    agreed: int = 0


@dataclass
class LossTerms:
    """Sums over the batches of one process.

    Args:
        loss: Of the losses at the present parameters, each times its number of targets, nats.
        derivatives: The same of the loss and its derivatives along the step, at the base.
        n_targets: Number of targets (of samples, where an objective has no targets).
        loss_shares: The same of g . Delta, by tensor.
        function_shares: <J Delta_b, J Delta>, by tensor.
        function_change: ||f_t - f_0||^2.
        function: By order.
        step_square: ||Delta||^2.
        gradient_norm: ||g|| of the mean loss at the base.
        error: Estimated error of the second-order term, nats.
    """

    loss: float = 0.0
    derivatives: list[float] = field(default_factory=list)
    n_targets: int = 0
    loss_shares: dict[str, float] = field(default_factory=dict)
    function_shares: dict[str, float] = field(default_factory=dict)
    function_change: float = 0.0
    function: dict[int, FunctionSums] = field(default_factory=dict)
    step_square: float = 0.0
    gradient_norm: float = math.nan
    error: float = 0.0

    def mean(self, total: float) -> float:
        """Per target."""
        return total / self.n_targets

    def add_derivatives(self, values: Sequence[float], weight: int) -> None:
        """Adds a batch's loss and derivatives."""
        self.derivatives = self.derivatives or [0.0] * len(values)
        self.derivatives = [total + weight * value for total, value in zip(self.derivatives, values, strict=True)]

    def normalised_function_shares(self) -> dict[str, float]:
        """Fractions of J Delta that add up to 1."""
        total = math.fsum(self.function_shares.values())
        return {name: share / total for name, share in self.function_shares.items()} if total else {}


@dataclass(frozen=True)
class TaylorWork:
    """What both routes need.

    Args:
        model: At the present parameters.
        base: theta_0.
        batches: This process's share.
        objective: The loss.
        orders: Ascending.
        shares: Whether to attribute changes to tensors.
        function_space: Whether to expand logits.
        replicas: The processes that share the batches out.
        progress: Called with (batches done, batches in all).
    """

    model: nn.Module
    base: ParameterVector
    batches: Sequence[Any]
    objective: Objective
    orders: tuple[int, ...]
    shares: bool
    function_space: bool
    replicas: Replicas
    progress: Progress

    def step(self) -> ParameterVector:
        """Delta, in at least the parameters' precision."""
        return ParameterVector.of(self.model, self.base.space, clone=False) - self.base

    def tell(self, done: int) -> None:
        """Reports progress."""
        if self.progress is not None:
            self.progress(done, len(self.batches))


def in_parts(batch: Any, count: int) -> list[Any]:
    """A batch cut into so many parts of whole samples, because every order doubles what a forward pass holds.

    A batch whose tensors do not share their first dimension stays whole.

    Example:
        >>> [len(part) for part in in_parts(torch.zeros(5, 2), 2)]
        [3, 2]
    """
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in batch_tensors(batch)}
    rows = lengths.pop() if len(lengths) == 1 else 0
    if rows < 2 or count < 2:
        return [batch]
    size = -(-rows // count)
    return [map_batch(batch, itemgetter(slice(at, at + size))) for at in range(0, rows, size)]


def exact_terms(work: TaylorWork) -> LossTerms:
    """By forward mode, nested as often as the highest order asks, and one gradient for the shares."""
    terms, step = LossTerms(), work.step()
    gradient: dict[str, Tensor] = {}
    for done, batch in enumerate(work.batches, 1):
        if work.function_space:
            weight = _function_terms(work, terms, step, batch)
        else:
            loss, weight = _present(work, batch)
            terms.loss += weight * loss
            terms.add_derivatives(_loss_derivatives(work, step, batch, max(work.orders)), weight)
        if work.shares:
            _gradient_terms(work, terms, step, batch, weight, gradient)
        terms.n_targets += weight
        work.tell(done)
    return _finished(work, terms, step, gradient)


def finite_terms(work: TaylorWork) -> LossTerms:
    """By exact gradients at the base and near it: central differences along the step, extrapolated once."""
    terms, step = LossTerms(), work.step()
    second = max(work.orders) > 1
    parameters = work.base.space.resolve(work.model)
    gradient: dict[str, Tensor] = {}
    slopes = dict.fromkeys((-1.0, -0.5, 0.5, 1.0) if second else (), 0.0)
    for done, batch in enumerate(work.batches, 1):
        loss, weight = _present(work, batch)
        terms.loss += weight * loss
        with substituted(work.model, work.base):
            value, gradients = _backward(work, batch, parameters)
        products = dict(zip(work.base, reduce_tensors(gradients, torch.dot, list(step.values())), strict=True))
        for name, tensor in zip(work.base, gradients, strict=True):
            gradient[name] = tensor * weight if name not in gradient else gradient[name].add_(tensor, alpha=weight)
            terms.loss_shares[name] = terms.loss_shares.get(name, 0.0) + weight * products[name]
        for place in slopes:
            with substituted(work.model, work.base + (place * _STEP) * step):
                _, gradients = _backward(work, batch, parameters)
            slopes[place] += weight * math.fsum(reduce_tensors(gradients, torch.dot, list(step.values())))
        terms.add_derivatives([value, math.fsum(products.values())], weight)
        terms.n_targets += weight
        work.tell(done)
    if second:
        whole, half = (slopes[1.0] - slopes[-1.0]) / (2 * _STEP), (slopes[0.5] - slopes[-0.5]) / _STEP
        terms.derivatives.append((4 * half - whole) / 3)
        terms.error = abs(half - whole) / 3 / 2 / max(terms.n_targets, 1)
    return _finished(work, terms, step, gradient)


def _function_terms(work: TaylorWork, terms: LossTerms, step: ParameterVector, batch: Any) -> int:
    """Expands logits, and the loss through them; returns the number of targets."""
    seen: list[TargetLogits] = []

    def logits(parameters: dict[str, Tensor]) -> Tensor:
        seen.append(work.objective.logits_and_targets(Substituted(work.model, parameters), batch))
        return seen[-1].logits

    highest = max(work.orders)
    with torch.no_grad():
        derivatives = directional_derivatives(logits, dict(work.base), dict(step), highest)
        with nested_derivatives():  # the same arithmetic, so that without a step nothing differs
            present = work.objective.logits_and_targets(work.model, batch)
        target = dataclasses.replace(present, logits=derivatives[0])
        weight = len(present.targets)
        if isinstance(work.objective, FunctionObjective):
            # Its loss need not be that of the targets.
            losses = _loss_derivatives(work, step, batch, highest)
            terms.loss += weight * float(work.objective.loss(work.model, batch))
        else:
            losses = _losses_of_logits(target, derivatives)
            terms.loss += weight * float(present.loss())
        terms.add_derivatives(losses, weight)
        _compare(terms, work.orders, derivatives, present.logits)
    if work.shares:
        shares = _function_shares(work, step, batch, derivatives[1])
        for name, share in shares.items():
            terms.function_shares[name] = terms.function_shares.get(name, 0.0) + share
    return weight


def _compare(terms: LossTerms, orders: Sequence[int], derivatives: Sequence[Tensor], present: Tensor) -> None:
    log_probs = torch.log_softmax(_wide(present), dim=-1)
    terms.function_change += float((present.double() - derivatives[0].double()).square().sum())
    for order in orders:
        predicted = polynomial(derivatives[: order + 1])
        sums = terms.function.setdefault(order, FunctionSums())
        sums.residual += float((present.double() - predicted.double()).square().sum())
        sums.divergence += divergence_sum(log_probs, predicted)
        sums.agreed += int((present.argmax(-1) == predicted.argmax(-1)).sum())


def _losses_of_logits(target: TargetLogits, derivatives: Sequence[Tensor]) -> list[float]:
    """Derivatives of the loss along the step from those of the logits, by the chain rule on their polynomial."""

    def loss(where: dict[str, Tensor]) -> Tensor:
        return dataclasses.replace(target, logits=_wide(polynomial(derivatives, where["t"]))).loss()

    zero = {"t": torch.zeros((), dtype=_wide(derivatives[0]).dtype, device=derivatives[0].device)}
    found = directional_derivatives(loss, zero, {"t": torch.ones_like(zero["t"])}, len(derivatives) - 1)
    return [float(value) for value in found]


def _loss_derivatives(work: TaylorWork, step: ParameterVector, batch: Any, order: int) -> list[float]:
    found = directional_derivatives(
        lambda parameters: work.objective.loss(Substituted(work.model, parameters), batch),
        dict(work.base),
        dict(step),
        order,
    )
    return [float(value) for value in found]


def _gradient_terms(
    work: TaylorWork, terms: LossTerms, step: ParameterVector, batch: Any, weight: int, gradient: dict[str, Tensor]
) -> None:
    """Adds the gradient at the base, and its product with the step tensor by tensor."""
    leaves = {name: value.detach().requires_grad_() for name, value in work.base.items()}
    loss = work.objective.loss(Substituted(work.model, leaves), batch)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    products = reduce_tensors(gradients, torch.dot, list(step.values()))
    for name, tensor, product in zip(leaves, gradients, products, strict=True):
        gradient[name] = tensor * weight if name not in gradient else gradient[name].add_(tensor, alpha=weight)
        terms.loss_shares[name] = terms.loss_shares.get(name, 0.0) + weight * product


def _function_shares(work: TaylorWork, step: ParameterVector, batch: Any, direction: Tensor) -> dict[str, float]:
    """<J Delta_b, J Delta> of every tensor, from one backward pass: J' v with v = J Delta."""
    leaves = {name: value.detach().requires_grad_() for name, value in work.base.items()}
    logits = work.objective.logits_and_targets(Substituted(work.model, leaves), batch).logits
    pulled = torch.autograd.grad(logits, list(leaves.values()), grad_outputs=direction.to(logits.dtype))
    return dict(zip(leaves, reduce_tensors(pulled, torch.dot, list(step.values())), strict=True))


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


def _present(work: TaylorWork, batch: Any) -> tuple[float, int]:
    """The loss at the present parameters, and what it is a mean over."""
    with torch.no_grad(), nested_derivatives():
        if isinstance(work.objective, FunctionObjective):
            return float(work.objective.loss(work.model, batch)), len(next(batch_tensors(batch)))
        present = work.objective.logits_and_targets(work.model, batch)
        return float(present.loss()), len(present.targets)


def _finished(work: TaylorWork, terms: LossTerms, step: ParameterVector, gradient: dict[str, Tensor]) -> LossTerms:
    """Adds up what the processes found; a collective."""
    parts = work.replicas.gather_objects(terms)
    total = parts[0]
    for part in parts[1:]:
        total = _sum(total, part)
    if not total.n_targets:
        raise ValueError("there is no batch to expand the loss on")
    total.step_square = step.dot(step)
    if work.shares or gradient:
        vectors = [work.replicas.sum_(gradient.get(name, torch.zeros_like(value))) for name, value in work.base.items()]
        squares = reduce_tensors(vectors, torch.dot, vectors)
        total.gradient_norm = math.sqrt(math.fsum(squares)) / total.n_targets
    total.loss_shares = {name: share / total.n_targets for name, share in total.loss_shares.items()}
    for value in (total.loss, *total.derivatives):
        if not math.isfinite(value):
            raise ValueError("the loss or one of its derivatives at the base is not finite")
    return total


def _sum(first: LossTerms, second: LossTerms) -> LossTerms:
    if not second.n_targets or not first.n_targets:
        return first if first.n_targets else second
    return LossTerms(
        loss=first.loss + second.loss,
        derivatives=[a + b for a, b in zip(first.derivatives, second.derivatives, strict=True)],
        n_targets=first.n_targets + second.n_targets,
        loss_shares={name: share + second.loss_shares[name] for name, share in first.loss_shares.items()},
        function_shares={name: share + second.function_shares[name] for name, share in first.function_shares.items()},
        function_change=first.function_change + second.function_change,
        function={
            order: FunctionSums(
                sums.residual + second.function[order].residual,
                sums.divergence + second.function[order].divergence,
                sums.agreed + second.function[order].agreed,
            )
            for order, sums in first.function.items()
        },
    )


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
