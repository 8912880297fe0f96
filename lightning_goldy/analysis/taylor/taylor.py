"""Taylor expansion of a finetune around its base: what is predicted of loss and logits, against what they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import divergence_sum, own_share, precise
from lightning_goldy.analysis.precision import float64_throughout, in_float32, low_precision, widened
from lightning_goldy.analysis.result import Cost
from lightning_goldy.analysis.taylor.approximation import (
    batch_parts,
    check_orders,
    farthest_within,
    losses_of_logits,
    parts_of_order,
    require_differences,
)
from lightning_goldy.analysis.taylor.result import By, Kind, Sums, TaylorDiffResult, result_of
from lightning_goldy.core.architecture.adapters import base_within, line_from
from lightning_goldy.core.architecture.blocks import expert_counts, expert_names
from lightning_goldy.core.autodiff import (
    ForwardModeError,
    Substituted,
    difference_derivatives,
    directional_derivatives,
    forward_mode,
    nested_derivatives,
    polynomial,
    trainable_values,
)
from lightning_goldy.core.base import Base, base_of
from lightning_goldy.core.batches import batch_tensors, sample_count, sample_keys
from lightning_goldy.core.composed import functions_by_parts, undetached
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import model_class
from lightning_goldy.core.objective import FunctionObjective, Objective, TargetLogits, objective_for
from lightning_goldy.core.sharding import Replicas, inside_parallel, is_sharded, unshard_guard
from lightning_goldy.core.vector import ParameterVector, reduce_rows, reduce_tensors, substituted

Shares = list[tuple[str, float]]
"""Products with the step by tensor, and of stacked experts by expert."""

Route = Literal["forward", "differences"]


# Logits are compared a piece at a time, in float64: so many pieces, of at least so many elements.
_PIECES = 16
_PIECE = 1 << 18
# Elements of a batch's largest tensor below which a part is not worth another pass over the weights.
_PART = 256
# Step of the central differences, as a fraction of the finetune's own; the second is half of it. Two of them remove the
# error of second order, and their difference tells what is left. Where weights are rounded below float32, a short step
# would be lost in the rounding.
_STEP, _COARSE_STEP = 0.05, 0.2
# So far from the first order may the sum of the shares be, as a part of either and of the shares' sizes.
_APART, _ROUNDING = 0.05, 0.02
# By differences, a first order that is farther from the sum of the shares is looked at from closer to the base.
_SAME = 0.01
# In the curvature from slopes at five places, a bend between them may be so many of their fourth differences, thrice;
# rounding moves a slope by so many units of the last place of its terms.
_BEND, _ROUNDED_SLOPE = 1.2, 4
# By differences, further by so many units of the loss's last place.
_ROUNDED_UNITS = 100
# Where a gradient is not what they say, slopes are taken so many times closer to the base than this part of the step.
_CLOSE, _CLOSER = 0.1, (4, 16, 64)


@dataclass
class Expansion:
    """One process's work: :meth:`whole` on a plain model, :meth:`finite` on a sharded one.

    Args:
        model: At the present parameters.
        base: theta_0.
        batches: This process's share, read once.
        objective: The loss.
        orders: Ascending.
        shares: Whether to attribute changes to tensors.
        function_space: Whether to expand logits.
        replicas: The processes that share the batches out.
        route: How derivatives along the step are taken by :meth:`whole`.
    """

    model: nn.Module
    base: ParameterVector
    batches: Iterable[Any]
    objective: Objective
    orders: tuple[int, ...]
    shares: bool
    function_space: bool
    replicas: Replicas
    route: Route = "forward"

    def __post_init__(self) -> None:
        # Delta, in at least the parameters' precision.
        self.step = ParameterVector.of(self.model, self.base.space, clone=False) - self.base
        self.own_loss = isinstance(self.objective, FunctionObjective)  # it need not be that of the targets
        rounded = any(value.dtype.itemsize < 4 for value in self.base.values())
        self.place = _COARSE_STEP if rounded else _STEP
        self.sums = Sums()
        self.experts = expert_counts(self.model)
        # Of the loss at the base, times the number of targets; at least float32.
        self.gradient: dict[str, Tensor] = {}
        # With the number of their targets, where a slope may have to be taken closer to the base.
        self.parts: list[tuple[Any, int]] = []

    def whole(self) -> Sums:
        """Derivatives along the step, as high as the highest order asks, and one gradient for the shares; a collective.

        Raises:
            ForwardModeError: By ``forward``, on every process, where the model of one has no forward mode.
        """
        count, problem = parts_of_order(max(self.orders), gradients=self.shares), None
        try:
            for batch in self.batches:
                size = max((tensor.numel() for tensor in batch_tensors(batch)), default=0)
                for part in batch_parts(batch, self.objective, min(count, max(1, size // _PART))):
                    weight = self._add_part(part)
                    self.sums.n_targets += weight
                    if self.route == "differences" and self.shares:
                        self.parts.append((part, weight))
        except ForwardModeError as error:
            problem = error
        told = self.replicas.gather_objects(None if problem is None else str(problem))
        if any(first := [message for message in told if message is not None]):
            raise ForwardModeError(first[0]) from problem
        self._add_shares()
        return self._finished()

    def try_route(self, sample: Any) -> None:
        """Does for one sample what :meth:`whole` or :meth:`finite` does for all, along the parameters themselves.

        Raises:
            ForwardModeError: By ``forward``, where the model has no forward mode.
        """
        self.step = ParameterVector.of(self.model, self.base.space, clone=False)
        if any(map(is_sharded, self.model.parameters())):
            self._backward(self.base, sample)
        else:
            self.parts.append((sample, self._add_part(sample)))
            self._add_shares()
            self._require_gradient(self.sums)

    def finite(self) -> Sums:
        """Exact gradients at the base and near it: central differences along the step, extrapolated once."""
        second = max(self.orders) > 1
        slopes = dict.fromkeys((-1.0, -0.5, 0.5, 1.0) if second else (), 0.0)
        middle = rounding = 0.0
        unit = max((torch.finfo(value.dtype).eps for value in self.base.values()), default=0.0)
        for batch in self.batches:
            loss, weight = self._present(batch)
            self.sums.add("loss", [(None, loss)], weight)
            value, gradients = self._backward(self.base, batch)
            products = reduce_tensors(gradients, torch.dot, list(self.step.values()))
            for name, tensor, product in zip(self.base, gradients, products, strict=True) if self.shares else ():
                shares = self._products(name, tensor) if name in self.experts else [(name, product)]
                self._add_gradient(weight, name, tensor)
                self.sums.add("loss share", shares, weight)
            for place in slopes:
                _, gradients = self._backward(self.base + (place * self.place) * self.step, batch)
                slopes[place] += weight * math.fsum(reduce_tensors(gradients, torch.dot, list(self.step.values())))
            self.sums.add("derivative", enumerate([value, math.fsum(products)]), weight)
            middle += weight * math.fsum(products)
            rounding += weight * _ROUNDED_SLOPE * unit * math.fsum(map(abs, products))
            self.sums.n_targets += weight
            if self.function_space:
                for part in batch_parts(batch, self.objective, parts_of_order(max(self.orders), gradients=False)):
                    self._add_differences(part)
        if second:
            whole, half = (slopes[1.0] - slopes[-1.0]) / (2 * self.place), (slopes[0.5] - slopes[-0.5]) / self.place
            self.sums.add("derivative", [(2, (4 * half - whole) / 3)])
            # A bend between the places shows in their fourth difference, which is next to nothing without one.
            bend = slopes[1.0] + slopes[-1.0] - 4 * (slopes[0.5] + slopes[-0.5]) + 6 * middle
            beyond = (_BEND * abs(bend) + 3 * rounding) / self.place
            self.sums.add("difference", [(None, abs(half - whole) + beyond)])
        return self._finished()

    def _ran(self, part: Any, *, backward: bool = False) -> None:
        """Counts a forward pass of some samples, and the backward pass after it."""
        samples = sample_count(part)
        self.sums.cost += Cost(samples, samples * backward)

    def _present(self, batch: Any) -> tuple[float, int]:
        """The loss at the present parameters, and what it is a mean over."""
        self._ran(batch)
        with torch.no_grad(), nested_derivatives():
            if self.own_loss:
                return float(self.objective.loss(self.model, batch)), sample_count(batch)
            present = self.objective.logits_and_targets(self.model, batch)
            return float(present.loss()), len(present.targets)

    def _finished(self) -> Sums:
        """Adds up what the processes found; refuses no batch, and values that are not finite."""
        total, *others = self.replicas.gather_objects(self.sums)
        for other in others:
            total.merge(other)
        if not total.n_targets:
            raise ValueError("there is no batch to expand the loss on")
        self._require_gradient(total)
        if self.shares or self.gradient:
            vectors = []
            for name, value in self.base.items():
                dtype = torch.promote_types(value.dtype, torch.float32)
                mine = self.gradient[name] if name in self.gradient else torch.zeros_like(value, dtype=dtype)
                vectors.append(self.replicas.sum_(mine))
            squares = math.fsum(reduce_tensors(vectors, lambda x: x @ x))
            total.gradient_norm = math.sqrt(squares) / total.n_targets
        for what in ("loss", "derivative"):
            for place, sum_ in total.of(what).items():
                if not math.isfinite(sum_):
                    order = f"derivative of order {place} of the loss at the base along the change"
                    told = "present loss" if what == "loss" else order if place else "loss at the base"
                    raise ValueError(f"the {told} is {sum_}, not finite")
        return total

    def _require_gradient(self, sums: Sums) -> None:
        """Refuses shares that do not add up to the first order: the gradient is not the derivative of the values.

        Where it is only that differences are too coarse for the derivative, the gradient's takes its place.
        """
        shares = sums.of("loss share").values()
        first, found = sums.of("derivative").get(1, 0.0), math.fsum(shares)
        cancelled, rounded = _ROUNDING * math.fsum(map(abs, shares)), 0.0
        if self.route == "differences":  # those of values that are rounded
            rounding = max((torch.finfo(value.dtype).eps for value in self.base.values()), default=0.0)
            rounded = _ROUNDED_UNITS * rounding * abs(sums.of("derivative").get(0, 0.0))
        agrees = not shares or _near(first, found, cancelled + rounded)
        same = abs(first - found) <= _SAME * max(abs(first), abs(found)) + rounded
        if agrees and (not shares or same or self.route == "forward"):
            return
        if self.route == "differences" and self._is_slope(sums, found, cancelled, rounded):
            sums.kinds["derivative"][1] = found
            return
        if agrees:
            return
        first, found = (value / (sums.n_targets or 1) for value in (first, found))
        raise ValueError(
            f"the gradient of {model_class(self.model)} is not the derivative of its loss: along the step it gives "
            f"{found:.6g} nats, and the loss changes by {first:.6g}; a part of the forward pass runs without gradients "
            "(torch.no_grad) or has a backward of its own, or numbers are taken out of tensors (item, numpy). Pass "
            "by=None to expand the loss without shares of parameters"
        )

    def _is_slope(self, sums: Sums, found: float, cancelled: float, rounded: float) -> bool:
        """Whether a gradient is the slope of values that are closer to the base than those of the expansion.

        Where the loss bends within a small part of the step, differences over more of it are no derivative. Rounding
        grows as the places come closer, and ends the search where it would hide what is wrong.
        """
        for closer in _CLOSER:
            if closer * rounded > _APART * abs(found) + cancelled:
                return False
            slope = self._slope(sums, _CLOSE / closer)
            if math.isfinite(slope) and _near(slope, found, cancelled + closer * rounded):
                return True
        return False

    def _slope(self, sums: Sums, step: float) -> float:
        """Of the loss at the base from values at four places along the step, times the number of targets."""
        slope, before = 0.0, self.sums.cost
        for place, factor in ((-2, 1 / 12), (-1, -2 / 3), (1, 2 / 3), (2, -1 / 12)):
            with substituted(self.model, self.base + (place * step) * self.step):
                slope += factor / step * math.fsum(self._present(part)[0] * weight for part, weight in self.parts)
        told = self.replicas.gather_objects((slope, self.sums.cost - before))
        if sums is not self.sums:  # a copy of all processes' sums
            for _, cost in told:
                sums.cost += cost
        return math.fsum(slope for slope, _ in told)

    def _add_shares(self) -> None:
        """Turns the gradient of all batches into the products of each tensor with the step."""
        for name in self.gradient:
            self._add_products("loss share", name, self.gradient[name])

    def _add_products(self, kind: Kind, name: str, gradient: Tensor) -> None:
        self.sums.add(kind, self._products(name, gradient))

    def _products(self, name: str, gradient: Tensor) -> Shares:
        """The product of one tensor's gradient with the step, of stacked experts that of each."""
        if name not in self.experts:
            return [(name, reduce_tensors([gradient], torch.dot, [self.step[name]])[0])]
        products = reduce_rows(gradient, torch.dot, self.step[name])
        return list(zip(expert_names([name], self.experts), products, strict=True))

    def _add_gradient(self, weight: int, name: str, gradient: Tensor) -> None:
        """Adds one tensor's gradient of a batch's mean loss."""
        if name in self.gradient:
            self.gradient[name].add_(gradient, alpha=weight)
        else:
            self.gradient[name] = precise(gradient) * weight

    def _add_part(self, part: Any) -> int:
        """Adds what some samples say; returns the number of their targets."""
        weight, direction = 0, None

        def logits(model: nn.Module) -> Tensor:
            return self.objective.logits_and_targets(model, part).logits

        def loss(model: nn.Module) -> Tensor:
            return self.objective.loss(model, part)

        if self.function_space or not self.own_loss:
            derivatives, errors = self._along(part, logits)
            weight, direction = self._add_logits(part, derivatives, errors), derivatives[1]
            del derivatives, errors
        if self.own_loss:
            present, rows = self._present(part)
            weight = weight or rows
            self.sums.add("loss", [(None, present)], weight)
            values, errors = self._along(part, loss)
            self.sums.add("derivative", enumerate(map(float, values)), weight)
            self.sums.add("difference", [(None, 3 * abs(float(error))) for error in errors[2:3]], weight)
        # <J Delta_b, J Delta> of every tensor from one backward pass: J' v with v = J Delta.
        through = self.shares and self.function_space and direction is not None
        share, gradient = partial(self._add_products, "function share"), partial(self._add_gradient, weight)
        if through and not self.own_loss and type(self.objective).loss is Objective.loss:
            # The loss is that of the same logits.
            whole = partial(self.objective.logits_and_targets, batch=part)
            self._pull_back(part, whole, [(direction, share), (None, gradient)])
            return weight
        if through:
            self._pull_back(part, logits, [(direction, share)])
        del direction
        if self.shares:
            self._pull_back(part, loss, [(None, gradient)])
        return weight

    def _along(self, part: Any, output: Callable[[nn.Module], Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Derivatives of what a model gives, at the base and along the step, and their errors; none by forward mode."""
        # Without graphs: a parameter outside the base would have one kept for nothing.
        others = trainable_values(self.model)

        def function(parameters: dict[str, Tensor]) -> Tensor:
            self._ran(part) if self.route == "differences" else None
            return output(Substituted(self.model, {**others, **parameters}))

        line = dict(self.base), dict(self.step), max(self.orders)
        if self.route == "differences":
            return difference_derivatives(function, *line)
        self._ran(part)
        with forward_mode(self.model):
            return directional_derivatives(function, *line), ()

    def _add_logits(self, part: Any, derivatives: Sequence[Tensor], errors: Sequence[Tensor]) -> int:
        """Adds what the logits' expansion says, and that of the loss through them; returns the number of targets."""
        self._ran(part)
        with torch.no_grad():
            with nested_derivatives():  # the same arithmetic, so that without a step nothing differs
                present = self.objective.logits_and_targets(self.model, part)
            n_rows, n_classes = present.logits.shape
            size = max(-(-n_rows // _PIECES), _PIECE // n_classes, 1)
            samples = torch.zeros(present.n_samples, 2, dtype=torch.float64, device=present.logits.device)
            for start in range(0, n_rows, size):
                rows = slice(start, start + size)
                piece = dataclasses.replace(
                    present, logits=present.logits[rows], targets=present.targets[rows], sample=present.sample[rows]
                )
                expansion = [precise(derivative[rows]) for derivative in derivatives]
                if not self.own_loss:
                    weight = len(piece.targets)
                    self.sums.add("loss", [(None, float(piece.loss()))], weight)
                    losses = losses_of_logits(piece, expansion)
                    self.sums.add("derivative", enumerate(losses), weight)
                    if errors[2:]:
                        off = farthest_within(piece.targets, expansion, [precise(error[rows]) for error in errors])
                        apart = abs(losses_of_logits(piece, off)[2] - losses[2])
                        self.sums.add("difference", [(None, 3 * apart)], weight)
                if self.function_space:
                    self._compare(expansion, piece, samples)
            self._keep(part, samples if self.function_space else samples[:0])
        return len(present.targets)

    def _add_differences(self, part: Any) -> None:
        """Adds what the logits' expansion says: central differences along the step, extrapolated once."""

        def logits(place: float) -> Tensor:
            self._ran(part)
            with torch.no_grad(), substituted(self.model, self.base + place * self.step):
                found = self.objective.logits_and_targets(self.model, part).logits
            return precise(found.clone())

        places = (self.place, -self.place, self.place / 2, -self.place / 2)
        before, (high, low, near_high, near_low) = logits(0.0), map(logits, places)
        slope = (8 * (near_high - near_low) - (high - low)) / (6 * self.place)
        bend = (16 * (near_high + near_low) - (high + low) - 30 * before) / (3 * self.place**2)
        del high, low, near_high, near_low
        self._ran(part)
        with torch.no_grad():
            present = self.objective.logits_and_targets(self.model, part)
            samples = torch.zeros(present.n_samples, 2, dtype=torch.float64, device=present.logits.device)
            self._compare([before, slope, bend], present, samples)
            self._keep(part, samples)
        if self.shares:
            # <J Delta_b, J Delta> of every tensor from one backward pass, as in forward mode.
            self._ran(part, backward=True)
            with substituted(self.model, self.base):
                found = self.objective.logits_and_targets(self.model, part).logits
                found.backward(slope.to(found.dtype))
                unshard_guard(self.model)
                gradients = self._taken(self.base.space.resolve(self.model))
            products = reduce_tensors(gradients, torch.dot, list(self.step.values()))
            self.sums.add("function share", zip(self.base, products, strict=True))

    def _keep(self, part: Any, samples: Tensor) -> None:
        self.sums.samples += samples.tolist()
        self.sums.keys += sample_keys(part) if len(samples) else ()

    def _compare(self, expansion: Sequence[Tensor], target: TargetLogits, samples: Tensor) -> None:
        present = target.logits
        log_probs, chosen = torch.log_softmax(precise(present), dim=-1), present.argmax(-1)
        change, by_row = _square_distance(present, expansion[0])
        samples[:, 1].index_add_(0, target.sample, by_row)
        self.sums.add("function change", [(None, change)])
        for order in self.orders:
            predicted = polynomial(expansion[: order + 1])
            residual, by_row = _square_distance(present, predicted)
            self.sums.add("residual", [(order, residual)])
            if order == 1:
                samples[:, 0].index_add_(0, target.sample, by_row)
            self.sums.add("divergence", [(order, divergence_sum(log_probs, predicted))])
            self.sums.add("agreed", [(order, int((chosen == predicted.argmax(-1)).sum()))])

    def _pull_back(
        self,
        part: Any,
        output: Callable[[nn.Module], Tensor | TargetLogits],
        passes: Sequence[tuple[Tensor | None, Callable[[str, Tensor], None]]],
    ) -> None:
        """J' v of what a model gives at the base, for one vector after the other; each tensor's is taken and freed.

        Args:
            part: The samples.
            output: Gives a scalar, logits, or logits with their targets.
            passes: v, and who takes the gradients by name; None is 1 for a scalar, and for targets asks for their loss.
        """
        self._ran(part)
        leaves = {name: value.detach().requires_grad_() for name, value in self.base.items()}
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if self.route == "forward":  # the derivative of the values, as along the step
                stack.enter_context(functions_by_parts(backward=True))
            found = output(_Undetached(self.model, {**trainable_values(self.model), **leaves}))
            logits = found.logits if isinstance(found, TargetLogits) else found
            loss = found.loss() if isinstance(found, TargetLogits) else found
        if not logits.requires_grad:
            raise _independent(len(leaves))
        for number, (vector, take) in enumerate(passes, 1):
            self.sums.cost += Cost(backwards=sample_count(part))
            value, seed = (loss, None) if vector is None else (logits, vector.to(logits.dtype))
            self._take_back(leaves, value, seed, take, retain=number < len(passes))

    def _take_back(
        self,
        leaves: Mapping[str, Tensor],
        value: Tensor,
        seed: Tensor | None,
        take: Callable[[str, Tensor], None],
        *,
        retain: bool,
    ) -> None:
        """One backward pass, whose gradients are taken as soon as they are complete."""
        left = set(leaves)

        def taker(name: str) -> Callable[[Tensor], None]:
            def hook(leaf: Tensor) -> None:
                assert leaf.grad is not None
                gradient, leaf.grad = leaf.grad, None
                left.discard(name)
                take(name, gradient)

            return hook

        hooks = [leaf.register_post_accumulate_grad_hook(taker(name)) for name, leaf in leaves.items()]
        torch.autograd.backward(value, seed, inputs=list(leaves.values()), retain_graph=retain)
        for hook in hooks:
            hook.remove()
        if len(left) == len(leaves):
            raise _independent(len(leaves))
        for name in left:  # what the objective does not depend on has a gradient of zero
            take(name, torch.zeros_like(leaves[name], requires_grad=False))

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
            gradients = self._taken(parameters)
        return float(value.detach()), gradients

    def _taken(self, parameters: Mapping[str, Tensor]) -> list[Tensor]:
        """The gradients that a backward pass left, taken off the parameters; zeros where it left none."""
        if all(parameter.grad is None for parameter in parameters.values()):
            raise _independent(len(parameters))
        gradients = []
        for parameter in parameters.values():
            gradients.append(torch.zeros_like(parameter.detach()) if parameter.grad is None else parameter.grad)
            parameter.grad = None
        return gradients


class _Undetached(Substituted):
    """Whose values have all of their derivative; what the objective detaches stays detached."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with undetached():
            return super().forward(*args, **kwargs)


def _independent(count: int) -> ValueError:
    return ValueError(f"the objective depends on none of the {count} parameters that the base holds")


def _square_distance(first: Tensor, second: Tensor) -> tuple[float, Tensor]:
    squares = (first.double() - second).square_()
    return float(squares.sum()), squares.sum(dim=-1)


def taylor_diff(
    model: nn.Module,
    base: Base,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    orders: Sequence[int] = (1, 2),
    by: By | None = "block",
    function_space: bool = True,
    space: str = "merged",
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> TaylorDiffResult:
    r"""Compares a finetuned model with its Taylor expansion around the base, in loss and in function space.

    .. math:: f_k = \sum_{j \le k} \frac{1}{j!} \frac{d^j}{dt^j} f(\theta_0 + t \Delta) \Big|_0, \qquad
        L_k \text{ likewise}, \qquad \Delta = \theta_t - \theta_0

    Derivatives are exact: nested forward mode along the step, in evaluation mode. Where an operation of the model has
    no forward mode, they are central differences of values at 13 places along the step (``route`` and ``error`` say
    so).
    On a sharded model loss and logits are expanded to order 2, from exact gradients at the base and central differences
    along the step. A parameter that the objective does not depend on has a gradient of zero. The model comes back as it
    was. On several ranks the batches are shared out; every rank must call.

    With adapters the line from base to present is that of the merged weights, in which the loss need not be the same
    function of t as along the adapters: B A is quadratic in them. Shares are exact and no merged weight is made
    (:class:`~lightning_goldy.core.architecture.adapters.Line`).

    A model that computes in bfloat16 or float16, by its weights or by autocast, is expanded in float32 where memory has
    room for its weights in it; ``precision`` says so. One of float64 weights is expanded in float64, also where its
    code casts to float32 (:func:`~lightning_goldy.analysis.precision.float64_throughout`).

    At order n every activation has n + 1 values and as many again while they are made, so a batch is worked through in
    2^n parts of whole samples (twice as many with shares) while these hold 256 tokens, whose sums are those of the
    batch. Under a FunctionObjective or an objective of
    your own a batch stays whole, because its loss need not be a sum over samples: give small batches there.

    Args:
        model: The finetuned model, plain or sharded with FSDP2.
        base: Where the expansion is made: anything that :func:`~lightning_goldy.core.base.base_of` takes.
        batches: Batches that the objective understands, the same on every rank.
        objective: The loss; next-token prediction by default.
        orders: Orders of the expansion, from 1 to 3 (2 on a sharded model).
        by: Report shares by ``block``, by ``tensor`` (of stacked experts by expert), or not (None), which saves a
            backward pass or two per batch and leaves the gradient's norm out.
        function_space: Whether to expand the logits too, or the loss alone.
        space: Of a model with adapters ``merged``, along the weights that they come to, or ``adapters``.
        progress: Called with (batches done, batches in all) on this rank.
        split_over_ranks: Whether to share batches out over the ranks of an initialised process group.

    Returns:
        Losses, predictions, shares and the regime.

    Raises:
        ValueError: An order or ``by`` is out of range, the third order is asked of a sharded model, there is no batch,
            a value is not finite, the objective has no logits for ``function_space`` or depends on no parameter of the
            base, or the model's gradient, from which shares are, is not the derivative of its values, or the space
            is unknown.
        SpaceError: The base is of another model.
        AdapterError: There is no line through the model's merged weights, as where it is sharded.
        TypeError: It cannot be a base.

    Source: linearisation as in Jacot et al. 2018 ("Neural Tangent Kernel"), Chizat et al. 2019 ("On Lazy Training").

    Example:
        >>> import torch
        >>> from lightning_goldy.core import FunctionObjective, ParameterVector
        >>> model = nn.Linear(1, 1, bias=False)
        >>> base = ParameterVector.of(model)
        >>> _ = model.weight.data.add_(0.5)
        >>> square = FunctionObjective(lambda model, x: model(x).square().mean())
        >>> found = taylor_diff(model, base, [torch.ones(2, 1)], square, function_space=False)
        >>> abs(found.fits[1]["residual"]) < 1e-6, round(found.second_order, 6)
        (True, 0.25)
    """
    orders = check_orders(orders, by)
    model = inside_parallel(model)
    objective = require_logits(objective_for(model, objective), function_space)
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    unshard_guard(model)
    sharded = any(map(is_sharded, model.parameters()))
    if sharded:
        require_differences(orders)
    precision = low_precision(model)
    with (
        preserved(model),
        replicas.together("taylor_diff"),
        in_float32(model) as raised,
        float64_throughout(model),
        line_from(model, base_within(base, model, space), space) as line,
    ):
        samples = [widened(batch) if raised else batch for batch in batches]

        def work(route: Route) -> Expansion:
            mine, start = own_share(samples, model, replicas, progress), line.start
            return Expansion(model, start, mine, objective, orders, by is not None, function_space, replicas, route)

        expansion = work("differences" if sharded else "forward")
        try:
            found = expansion.finite() if sharded else expansion.whole()
        except ForwardModeError:
            expansion = work("differences")
            found = expansion.whole()
    names = expert_names(line.start.space.names, expansion.experts)
    made = result_of(found, orders, by, names, line, route=expansion.route)
    if precision is None:
        return made
    above = {"dtype": "float32", "training": precision["dtype"], "epsilon": torch.finfo(torch.float32).eps}
    precision = precision | (above if raised else {"loss_floor": precision["epsilon"] * abs(made.loss)})
    return dataclasses.replace(made, precision=precision)


def expansion_route(
    model: nn.Module,
    sample: Any,
    objective: Objective | None = None,
    *,
    orders: Sequence[int] = (1, 2),
    by: By | None = "block",
    function_space: bool = True,
    space: str = "merged",
) -> tuple[Route, str]:
    """How :func:`taylor_diff` will take derivatives of a model, found by doing so for one sample at its present values.

    Args:
        model: The model, plain or sharded.
        sample: A batch on the model's device; one sample will do.
        objective: The loss; next-token prediction by default.
        orders: As for :func:`taylor_diff`.
        by: Likewise.
        function_space: Likewise.
        space: Likewise.

    Returns:
        The route, and why it is not ``forward``; empty where it is.

    Raises:
        ValueError: The objective depends on no trainable parameter.
        AdapterError: There is no line through the model's merged weights.

    Example:
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> sample = (torch.ones(1, 2), torch.tensor([0]))
        >>> expansion_route(nn.Linear(2, 3), sample, ClassifierObjective())
        ('forward', '')
    """
    route: Route = "forward"
    orders, why = check_orders(orders, by), ""
    unshard_guard(model)
    with preserved(model), float64_throughout(model), line_from(model, base_of(model, model), space) as line:
        start = line.start
        objective = require_logits(objective_for(model, objective), function_space)
        options = objective, orders, by is not None, function_space, Replicas()
        try:
            Expansion(model, start, (), *options).try_route(sample)
        except ForwardModeError as error:
            route, why = "differences", str(error)
            Expansion(model, start, (), *options, route).try_route(sample)
    return route, why


def _near(slope: float, found: float, beyond: float) -> bool:
    """Whether two slopes are apart by no more than a part of the larger and so much beyond; so is what is no number."""
    return not abs(slope - found) > _APART * max(abs(slope), abs(found)) + beyond


def require_logits(objective: Objective, function_space: bool) -> Objective:
    """Gives back an objective that has logits, or any where none are wanted.

    Raises:
        ValueError: A FunctionObjective has none.
    """
    if function_space and isinstance(objective, FunctionObjective) and objective.logits is None:
        raise ValueError(
            "function_space=True expands the logits, and this FunctionObjective has a loss but no logits: give it "
            "logits=, or pass function_space=False to expand the loss alone"
        )
    return objective
