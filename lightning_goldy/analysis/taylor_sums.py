"""What a Taylor comparison adds up over batches, and over the processes that share them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.core.autodiff import nested_derivatives
from lightning_goldy.core.batches import batch_tensors
from lightning_goldy.core.objective import FunctionObjective, Objective
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.vector import ParameterVector, reduce_tensors

Progress = Callable[[int, int], None] | None


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
    progress: Progress

    def step(self) -> ParameterVector:
        """Delta, in at least the parameters' precision."""
        return ParameterVector.of(self.model, self.base.space, clone=False) - self.base

    def tell(self, done: int) -> None:
        """Reports progress."""
        if self.progress is not None:
            self.progress(done, len(self.batches))

    def present(self, batch: Any) -> tuple[float, int]:
        """The loss at the present parameters, and what it is a mean over."""
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
