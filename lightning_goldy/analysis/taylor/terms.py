"""Terms of the Taylor expansion: sums over a batch, exact derivatives along the change, and finite differences."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import divergence_sum
from lightning_goldy.analysis.result import Cost
from lightning_goldy.analysis.taylor.approximation import batch_parts, parts_of_order
from lightning_goldy.core.autodiff import (
    Substituted,
    directional_derivatives,
    nested_derivatives,
    polynomial,
    trainable_values,
)
from lightning_goldy.core.batches import batch_tensors
from lightning_goldy.core.objective import FunctionObjective, Objective, TargetLogits
from lightning_goldy.core.sharding import Replicas, unshard_guard
from lightning_goldy.core.vector import ParameterVector, reduce_tensors, substituted


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

    def __add__(self, other: FunctionSums) -> FunctionSums:
        return FunctionSums(
            self.residual + other.residual, self.divergence + other.divergence, self.agreed + other.agreed
        )


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
        gradient: The gradient of the loss at the base, times the number of targets, by tensor; at least float32.
        step_square: ||Delta||^2.
        gradient_norm: ||g|| of the mean loss at the base.
        error: Estimated error of the second-order term, nats.
        cost: Passes of the model.
    """

    loss: float = 0.0
    derivatives: list[float] = field(default_factory=list)
    n_targets: int = 0
    loss_shares: dict[str, float] = field(default_factory=dict)
    function_shares: dict[str, float] = field(default_factory=dict)
    function_change: float = 0.0
    function: dict[int, FunctionSums] = field(default_factory=dict)
    gradient: dict[str, Tensor] = field(default_factory=dict)
    step_square: float = 0.0
    gradient_norm: float = math.nan
    error: float = 0.0
    cost: Cost = field(default_factory=Cost)

    def ran(self, part: Any, *, backward: bool = False) -> None:
        """Counts a forward pass of some samples, and the backward pass after it."""
        samples = len(next(batch_tensors(part)))
        self.cost += Cost(samples, samples * backward)

    def mean(self, total: float) -> float:
        """Per target."""
        return total / self.n_targets

    def add_derivatives(self, values: Sequence[float], weight: int) -> None:
        """Adds a batch's loss and derivatives."""
        self.derivatives = self.derivatives or [0.0] * len(values)
        self.derivatives = [total + weight * value for total, value in zip(self.derivatives, values, strict=True)]

    def add_gradient(self, name: str, gradient: Tensor, product: float, weight: int) -> None:
        """Adds one tensor's gradient of a batch's mean loss, and its product with the step."""
        if name not in self.gradient:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            self.gradient[name] = torch.zeros_like(gradient, dtype=dtype)
        self.gradient[name].add_(gradient, alpha=weight)
        self.loss_shares[name] = self.loss_shares.get(name, 0.0) + weight * product

    def add_function_share(self, name: str, share: float) -> None:
        """Adds one tensor's part of ||J Delta||^2."""
        self.function_shares[name] = self.function_shares.get(name, 0.0) + share

    def normalised_function_shares(self) -> dict[str, float]:
        """Fractions of J Delta that add up to 1."""
        total = math.fsum(self.function_shares.values())
        return {name: share / total for name, share in self.function_shares.items()} if total else {}

    def __add__(self, other: LossTerms) -> LossTerms:
        if not other.n_targets or not self.n_targets:
            return self if self.n_targets else other
        return LossTerms(
            loss=self.loss + other.loss,
            derivatives=[a + b for a, b in zip(self.derivatives, other.derivatives, strict=True)],
            n_targets=self.n_targets + other.n_targets,
            loss_shares={name: share + other.loss_shares[name] for name, share in self.loss_shares.items()},
            function_shares={name: share + other.function_shares[name] for name, share in self.function_shares.items()},
            function_change=self.function_change + other.function_change,
            function={order: sums + other.function[order] for order, sums in self.function.items()},
            cost=self.cost + other.cost,
        )


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
    progress: Callable[[int, int], None] | None

    def step(self) -> ParameterVector:
        """Delta, in at least the parameters' precision."""
        return ParameterVector.of(self.model, self.base.space, clone=False) - self.base

    def tell(self, done: int) -> None:
        """Reports progress."""
        if self.progress is not None:
            self.progress(done, len(self.batches))

    def present(self, terms: LossTerms, batch: Any) -> tuple[float, int]:
        """The loss at the present parameters, and what it is a mean over."""
        terms.ran(batch)
        with torch.no_grad(), nested_derivatives():
            if isinstance(self.objective, FunctionObjective):
                return float(self.objective.loss(self.model, batch)), len(next(batch_tensors(batch)))
            present = self.objective.logits_and_targets(self.model, batch)
            return float(present.loss()), len(present.targets)

    def finished(self, terms: LossTerms, step: ParameterVector) -> LossTerms:
        """Adds up what the processes found; a collective.

        Raises:
            ValueError: There was no batch, or a value is not finite.
        """
        gradient, terms.gradient = terms.gradient, {}
        parts = self.replicas.gather_objects(terms)
        total = sum(parts[1:], parts[0])
        if not total.n_targets:
            raise ValueError("there is no batch to expand the loss on")
        total.step_square = step.dot(step)
        if self.shares or gradient:
            total.gradient_norm = self._norm(gradient) / total.n_targets
        total.loss_shares = {name: share / total.n_targets for name, share in total.loss_shares.items()}
        for value in (total.loss, *total.derivatives):
            if not math.isfinite(value):
                raise ValueError("the loss or one of its derivatives at the base is not finite")
        return total

    def _norm(self, gradient: Mapping[str, Tensor]) -> float:
        vectors = []
        for name, value in self.base.items():
            dtype = torch.promote_types(value.dtype, torch.float32)
            mine = gradient[name] if name in gradient else torch.zeros_like(value, dtype=dtype)
            vectors.append(self.replicas.sum_(mine))
        return math.sqrt(math.fsum(reduce_tensors(vectors, torch.dot, vectors)))


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
        loss, rows = work.present(terms, part)
        weight = weight or rows
        terms.loss += weight * loss
        along = _along(work, terms, step, part, lambda model: work.objective.loss(model, part))
        terms.add_derivatives([float(value) for value in along], weight)
    if work.function_space and work.shares and direction is not None:
        _add_function_shares(work, terms, step, part, direction)
    del direction
    if work.shares:
        _add_gradient(work, terms, step, part, weight)
    return weight


def _logit_terms(work: TaylorWork, terms: LossTerms, step: ParameterVector, part: Any) -> tuple[int, Tensor]:
    """Expands logits, and the loss through them; returns the number of targets and the logits' first derivative."""
    derivatives = _along(work, terms, step, part, lambda model: work.objective.logits_and_targets(model, part).logits)
    terms.ran(part)
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


def _along(
    work: TaylorWork, terms: LossTerms, step: ParameterVector, part: Any, output: Callable[[nn.Module], Tensor]
) -> tuple[Tensor, ...]:
    """Derivatives of what a model gives, at the base and along the step."""
    terms.ran(part)
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

    terms.ran(part, backward=True)
    _pull_back(work, step, lambda model: work.objective.loss(model, part), None, take)


def _add_function_shares(
    work: TaylorWork, terms: LossTerms, step: ParameterVector, part: Any, direction: Tensor
) -> None:
    """Adds <J Delta_b, J Delta> of every tensor, from one backward pass: J' v with v = J Delta."""

    def take(name: str, gradient: Tensor, product: float) -> None:
        terms.add_function_share(name, product)

    terms.ran(part, backward=True)
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
        loss, weight = work.present(terms, batch)
        terms.loss += weight * loss
        with substituted(work.model, work.base):
            value, gradients = _backward(work, terms, batch, parameters)
        products = reduce_tensors(gradients, torch.dot, list(step.values()))
        for name, tensor, product in zip(work.base, gradients, products, strict=True):
            terms.add_gradient(name, tensor, product, weight)
        for place in slopes:
            with substituted(work.model, work.base + (place * _STEP) * step):
                _, gradients = _backward(work, terms, batch, parameters)
            slopes[place] += weight * math.fsum(reduce_tensors(gradients, torch.dot, list(step.values())))
        terms.add_derivatives([value, math.fsum(products)], weight)
        terms.n_targets += weight
        work.tell(done)
    if second:
        whole, half = (slopes[1.0] - slopes[-1.0]) / (2 * _STEP), (slopes[0.5] - slopes[-0.5]) / _STEP
        terms.derivatives.append((4 * half - whole) / 3)
        terms.error = abs(half - whole) / 3 / 2 / max(terms.n_targets, 1)
    return work.finished(terms, step)


def _backward(
    work: TaylorWork, terms: LossTerms, batch: Any, parameters: dict[str, nn.Parameter]
) -> tuple[float, list[Tensor]]:
    terms.ran(batch, backward=True)
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
