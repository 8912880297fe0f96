"""Terms of the Taylor expansion: sums over batches, exact derivatives along the change, and finite differences."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

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

Kind = Literal[
    "loss",
    "derivative",
    "loss share",
    "function share",
    "function change",
    "residual",
    "divergence",
    "agreed",
    "difference",
]


@dataclass
class Sums:
    """Sums over the batches of one process or of all.

    Args:
        kinds: By kind and by tensor or order. Times the number of targets: ``loss``, at the present parameters, nats;
            ``derivative``, of the loss along the step at the base, by order; ``loss share``, g . Delta by tensor.
            Over the targets: ``function share``, <J Delta_b, J Delta> by tensor; ``function change``, ||f_t - f_0||^2;
            and by order ``residual``, the squared distance of the logits from the prediction, ``divergence``,
            KL(p_t || p_k), nats, and ``agreed``, positions where both prefer the same class. ``difference`` of two
            estimates of the curvature along the step, times the number of targets.
        n_targets: Number of targets (of samples, where an objective has no targets).
        cost: Passes of the model.
        gradient_norm: ||g|| of the mean loss at the base.
    """

    kinds: dict[Kind, defaultdict[Any, float]] = field(default_factory=dict)
    n_targets: int = 0
    cost: Cost = field(default_factory=Cost)
    gradient_norm: float = math.nan

    def of(self, kind: Kind) -> dict[Any, float]:
        """The sums of a kind by tensor or order; empty where there are none."""
        return dict(self.kinds.get(kind, {}))

    def mean(self, kind: Kind, key: Any = None) -> float:
        """One sum per target."""
        return self.kinds[kind][key] / self.n_targets

    def add(self, kind: Kind, values: Iterable[tuple[Any, float]], weight: float = 1) -> None:
        """Adds values by tensor or order, each times the weight."""
        sums = self.kinds.setdefault(kind, defaultdict(float))
        for key, value in values:
            sums[key] += weight * value

    def merge(self, other: Sums) -> None:
        """Adds what another process found."""
        for kind, sums in other.kinds.items():
            self.add(kind, sums.items())
        self.n_targets, self.cost = self.n_targets + other.n_targets, self.cost + other.cost


# Logits are compared a piece at a time, in float64: so many pieces, of at least so many elements.
_PIECES = 16
_PIECE = 1 << 18
# Step of the central differences, as a fraction of the finetune's own; the second is half of it. Two of them remove the
# error of second order, and their difference tells what is left.
_STEP = 0.2


@dataclass
class Expansion:
    """One process's work: :meth:`exact` by forward mode, :meth:`finite` where the model has none.

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

    def __post_init__(self) -> None:
        # Delta, in at least the parameters' precision.
        self.step = ParameterVector.of(self.model, self.base.space, clone=False) - self.base
        self.own_loss = isinstance(self.objective, FunctionObjective)  # it need not be that of the targets
        self.sums = Sums()
        # Of the loss at the base, times the number of targets; at least float32.
        self.gradient: dict[str, Tensor] = {}

    def exact(self) -> Sums:
        """Forward mode, nested as often as the highest order asks, and one gradient for the shares; a collective."""
        count = parts_of_order(max(self.orders), gradients=self.shares)
        for done, batch in enumerate(self.batches, 1):
            for part in batch_parts(batch, self.objective, count):
                self.sums.n_targets += self._add_part(part)
            self._tell(done)
        return self._finished()

    def finite(self) -> Sums:
        """Exact gradients at the base and near it: central differences along the step, extrapolated once."""
        second = max(self.orders) > 1
        slopes = dict.fromkeys((-1.0, -0.5, 0.5, 1.0) if second else (), 0.0)
        for done, batch in enumerate(self.batches, 1):
            loss, weight = self._present(batch)
            self.sums.add("loss", [(None, loss)], weight)
            value, gradients = self._backward(self.base, batch)
            products = reduce_tensors(gradients, torch.dot, list(self.step.values()))
            for name, tensor, product in zip(self.base, gradients, products, strict=True):
                self._add_gradient(weight, name, tensor, product)
            for place in slopes:
                _, gradients = self._backward(self.base + (place * _STEP) * self.step, batch)
                slopes[place] += weight * math.fsum(reduce_tensors(gradients, torch.dot, list(self.step.values())))
            self.sums.add("derivative", enumerate([value, math.fsum(products)]), weight)
            self.sums.n_targets += weight
            self._tell(done)
        if second:
            whole, half = (slopes[1.0] - slopes[-1.0]) / (2 * _STEP), (slopes[0.5] - slopes[-0.5]) / _STEP
            self.sums.add("derivative", [(2, (4 * half - whole) / 3)])
            self.sums.add("difference", [(None, half - whole)])
        return self._finished()

    def _tell(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, len(self.batches))

    def _ran(self, part: Any, *, backward: bool = False) -> None:
        """Counts a forward pass of some samples, and the backward pass after it."""
        samples = len(next(batch_tensors(part)))
        self.sums.cost += Cost(samples, samples * backward)

    def _present(self, batch: Any) -> tuple[float, int]:
        """The loss at the present parameters, and what it is a mean over."""
        self._ran(batch)
        with torch.no_grad(), nested_derivatives():
            if self.own_loss:
                return float(self.objective.loss(self.model, batch)), len(next(batch_tensors(batch)))
            present = self.objective.logits_and_targets(self.model, batch)
            return float(present.loss()), len(present.targets)

    def _finished(self) -> Sums:
        """Adds up what the processes found.

        Raises:
            ValueError: There was no batch, or a value is not finite.
        """
        total, *others = self.replicas.gather_objects(self.sums)
        for other in others:
            total.merge(other)
        if not total.n_targets:
            raise ValueError("there is no batch to expand the loss on")
        if self.shares or self.gradient:
            total.gradient_norm = self._gradient_norm() / total.n_targets
        for value in (*total.of("loss").values(), *total.of("derivative").values()):
            if not math.isfinite(value):
                raise ValueError("the loss or one of its derivatives at the base is not finite")
        return total

    def _gradient_norm(self) -> float:
        vectors = []
        for name, value in self.base.items():
            dtype = torch.promote_types(value.dtype, torch.float32)
            mine = self.gradient[name] if name in self.gradient else torch.zeros_like(value, dtype=dtype)
            vectors.append(self.replicas.sum_(mine))
        return math.sqrt(math.fsum(reduce_tensors(vectors, torch.dot, vectors)))

    def _add_function_share(self, name: str, gradient: Tensor, product: float) -> None:
        self.sums.add("function share", [(name, product)])

    def _add_gradient(self, weight: int, name: str, gradient: Tensor, product: float) -> None:
        """Adds one tensor's gradient of a batch's mean loss, and its product with the step."""
        if name not in self.gradient:
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            self.gradient[name] = torch.zeros_like(gradient, dtype=dtype)
        self.gradient[name].add_(gradient, alpha=weight)
        self.sums.add("loss share", [(name, product)], weight)

    def _add_part(self, part: Any) -> int:
        """Adds what some samples say; returns the number of their targets."""
        weight, direction = 0, None

        def logits(model: nn.Module) -> Tensor:
            return self.objective.logits_and_targets(model, part).logits

        def loss(model: nn.Module) -> Tensor:
            return self.objective.loss(model, part)

        if self.function_space or not self.own_loss:
            derivatives = self._along(part, logits)
            weight, direction = self._add_logits(part, derivatives), derivatives[1]
            del derivatives
        if self.own_loss:
            present, rows = self._present(part)
            weight = weight or rows
            self.sums.add("loss", [(None, present)], weight)
            self.sums.add("derivative", enumerate(map(float, self._along(part, loss))), weight)
        if self.function_space and self.shares and direction is not None:
            # <J Delta_b, J Delta> of every tensor from one backward pass: J' v with v = J Delta.
            self._pull_back(part, logits, direction, self._add_function_share)
        del direction
        if self.shares:
            self._pull_back(part, loss, None, partial(self._add_gradient, weight))
        return weight

    def _along(self, part: Any, output: Callable[[nn.Module], Tensor]) -> tuple[Tensor, ...]:
        """Derivatives of what a model gives, at the base and along the step."""
        self._ran(part)
        # Without graphs: a parameter outside the base would have one kept for nothing.
        others = trainable_values(self.model)
        return directional_derivatives(
            lambda parameters: output(Substituted(self.model, {**others, **parameters})),
            dict(self.base),
            dict(self.step),
            max(self.orders),
        )

    def _add_logits(self, part: Any, derivatives: Sequence[Tensor]) -> int:
        """Adds what the logits' expansion says, and that of the loss through them; returns the number of targets."""
        self._ran(part)
        with torch.no_grad():
            with nested_derivatives():  # the same arithmetic, so that without a step nothing differs
                present = self.objective.logits_and_targets(self.model, part)
            for rows in _pieces(present.logits):
                piece = dataclasses.replace(
                    present, logits=present.logits[rows], targets=present.targets[rows], sample=present.sample[rows]
                )
                expansion = [_wide(derivative[rows]) for derivative in derivatives]
                if not self.own_loss:
                    weight = len(piece.targets)
                    self.sums.add("loss", [(None, float(piece.loss()))], weight)
                    self.sums.add("derivative", enumerate(_losses_of_logits(piece, expansion)), weight)
                if self.function_space:
                    self._compare(expansion, piece.logits)
        return len(present.targets)

    def _compare(self, expansion: Sequence[Tensor], present: Tensor) -> None:
        log_probs = torch.log_softmax(_wide(present), dim=-1)
        self.sums.add("function change", [(None, _square_distance(present, expansion[0]))])
        for order in self.orders:
            predicted = polynomial(expansion[: order + 1])
            self.sums.add("residual", [(order, _square_distance(present, predicted))])
            self.sums.add("divergence", [(order, divergence_sum(log_probs, predicted))])
            self.sums.add("agreed", [(order, int((present.argmax(-1) == predicted.argmax(-1)).sum()))])

    def _pull_back(
        self,
        part: Any,
        output: Callable[[nn.Module], Tensor],
        vector: Tensor | None,
        take: Callable[[str, Tensor, float], None],
    ) -> None:
        """J' v of what a model gives at the base; each tensor's is taken with its product with the step, and freed."""
        self._ran(part, backward=True)
        leaves = {name: value.detach().requires_grad_() for name, value in self.base.items()}
        left = set(leaves)

        def taker(name: str) -> Callable[[Tensor], None]:
            def hook(leaf: Tensor) -> None:
                assert leaf.grad is not None
                gradient, leaf.grad = leaf.grad, None
                left.discard(name)
                take(name, gradient, reduce_tensors([gradient], torch.dot, [self.step[name]])[0])

            return hook

        for name, leaf in leaves.items():
            leaf.register_post_accumulate_grad_hook(taker(name))
        with torch.enable_grad():
            found = output(Substituted(self.model, {**trainable_values(self.model), **leaves}))
        torch.autograd.backward(found, None if vector is None else vector.to(found.dtype), inputs=list(leaves.values()))
        if left:
            raise _independent(min(left))

    def _backward(self, place: ParameterVector, batch: Any) -> tuple[float, list[Tensor]]:
        """The loss and its gradients at a place of parameter space."""
        self._ran(batch, backward=True)
        parameters = place.space.resolve(self.model)
        with substituted(self.model, place):
            for parameter in parameters.values():
                parameter.grad = None
            value = self.objective.loss(self.model, batch)
            value.backward()
            unshard_guard(self.model)
            gradients = []
            for name, parameter in parameters.items():
                if parameter.grad is None:
                    raise _independent(name)
                gradients.append(parameter.grad)
                parameter.grad = None
        return float(value.detach()), gradients


def _independent(name: str) -> ValueError:
    return ValueError(f"the objective does not depend on {name}; leave it out of the base")


def _losses_of_logits(target: TargetLogits, expansion: Sequence[Tensor]) -> list[float]:
    """Derivatives of the loss along the step from those of the logits, by the chain rule on their polynomial."""

    def loss(where: dict[str, Tensor]) -> Tensor:
        return dataclasses.replace(target, logits=polynomial(expansion, where["t"])).loss()

    zero = {"t": torch.zeros((), dtype=expansion[0].dtype, device=expansion[0].device)}
    found = directional_derivatives(loss, zero, {"t": torch.ones_like(zero["t"])}, len(expansion) - 1)
    return [float(value) for value in found]


def _pieces(logits: Tensor) -> Iterator[slice]:
    rows = max(-(-len(logits) // _PIECES), _PIECE // logits.shape[-1], 1)
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _square_distance(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).square_().sum())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
