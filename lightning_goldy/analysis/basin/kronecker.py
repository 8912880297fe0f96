"""The Kronecker-factored Fisher of a model, and the preconditioner that it makes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_goldy.analysis.basin.preconditioners import EpsUnit, check_damping
from lightning_goldy.analysis.gradients import LayerSums, exact_products, linear_layers, sampled_labels
from lightning_goldy.analysis.result import Cost
from lightning_goldy.core.batches import map_batch, sample_count
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import require_at_least
from lightning_goldy.core.objective import Objective, objective_for
from lightning_goldy.core.sharding import Replicas, align, is_sharded, local, sum_over_shards
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import derived_seed, require_finite


class Factor(NamedTuple):
    """A symmetric, positive semidefinite matrix by its eigenvalues.

    Args:
        values: Eigenvalues, shape ``[d]``, at least 0; of a diagonal matrix its diagonal.
        vectors: Eigenvectors in columns, shape ``[d, d]``; None for a diagonal matrix.
    """

    values: Tensor
    vectors: Tensor | None


class LayerFisher(NamedTuple):
    r"""The Fisher information of one weight, :math:`F \approx A \otimes G`.

    Args:
        inputs: A, the second moment of the inputs.
        outputs: G, that of the gradients at the outputs, nats squared per target.
        inputs_first: Whether the weight is stored as in x out, not as out x in.
    """

    inputs: Factor
    outputs: Factor
    inputs_first: bool


@dataclass(frozen=True)
class KroneckerFisher:
    r"""What :func:`kronecker_fisher` found; every part in nats per target and squared parameter unit.

    Args:
        space: The parameters.
        layers: Factors by the name of the weight, on the model's device, float32.
        scalars: For every other parameter its mean squared gradient.
        n_targets: Targets seen, draws of one label counted apart.
        cost: Passes of the model over all ranks, in samples.
    """

    space: ParameterSpace
    layers: dict[str, LayerFisher]
    scalars: dict[str, float]
    n_targets: int
    cost: Cost = field(default=Cost(), compare=False)

    @property
    def mean(self) -> float:
        """Mean of the diagonal over the space."""
        traces = [
            float(layer.inputs.values.double().sum() * layer.outputs.values.double().sum())
            for layer in self.layers.values()
        ]
        rest = [value * math.prod(self.space.shape(name)) for name, value in self.scalars.items()]
        return math.fsum(traces + rest) / self.space.numel


def kronecker_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    space: ParameterSpace | None = None,
    n_batches: int | None = None,
    n_draws: int = 1,
    max_dimension: int = 8192,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> KroneckerFisher:
    r"""Estimates the Fisher information of the predictions, a Kronecker product for every linear layer.

    .. math::
        F = \tfrac1N \sum_t \mathbb E_{y \sim p_\theta(\cdot \mid x_{<t})}
        \big[\nabla \log p_\theta(y) \, \nabla \log p_\theta(y)^\top \big] \approx A \otimes G, \qquad
        A = \overline{a a^\top}, \quad G = \tfrac1N \sum g g^\top

    with a a layer's input and g the gradient at its output, over all positions that bear on a target; the product is
    scaled to the trace that the weight's own gradients show, in which positions are not independent. Labels are drawn
    from the model: gradients of such are independent from target to target and 0 on average, so one backward pass per
    batch serves all its samples. Embeddings, norms, biases, tied weights and weights that are used otherwise get their
    mean squared gradient. The model comes back as it was. On several ranks the batches are shared out; every rank must
    call.

    Args:
        model: A plain, DistributedDataParallel-unwrapped, or FSDP2-sharded module.
        batches: Batches that the objective understands, the same on every rank.
        objective: Where the targets are; next-token prediction by default.
        space: Which parameters; all trainable ones by default.
        n_batches: Use only the first so many batches; all by default.
        n_draws: Labels drawn for each target, a forward and a backward pass each.
        max_dimension: A layer's side wider than this, such as the vocabulary, gets a diagonal factor.
        seed: Decides the labels, which do not depend on the number of ranks.
        progress: Called with (passes done, passes in all) on this rank.
        split_over_ranks: Whether to share batches out over the ranks of an initialised process group.

    Raises:
        ValueError: An argument is out of range, there are too few batches, or a weight or a gradient is not finite.
        TypeError: The objective has no logits.

    Source: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (2015),
        sections 3 and 5; Eschenhagen et al., "Kronecker-Factored Approximate Curvature for Modern Neural Network
        Architectures" (2023), the "expand" setting.

    Example:
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> batch = (torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> fisher = kronecker_fisher(nn.Linear(2, 3, bias=False), [batch], ClassifierObjective())
        >>> fisher.layers["weight"].inputs.values
        tensor([0.5000, 2.0000])
    """
    for name, count in (("n_batches", n_batches), ("n_draws", n_draws), ("max_dimension", max_dimension)):
        if count is not None:
            require_at_least(name, count, 1)
    objective = objective_for(model, objective)
    space = space or ParameterSpace.of(model)
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    with preserved(model), replicas.together("kronecker_fisher"):
        first = _first(batches, n_batches)
        sums = _Sums(model, space, max_dimension)
        mine = replicas.share([(*numbered, draw) for numbered in enumerate(first) for draw in range(n_draws)])
        with sums.collecting():
            for done, (number, batch, draw) in enumerate(mine, 1):
                sums.add(objective, batch, derived_seed(seed, "labels", number, draw))
                if progress is not None:
                    progress(done, len(mine))
        sums.sum_over(replicas)
    held = n_draws * sum(map(sample_count, first))
    return sums.fisher(Cost(forwards=held, backwards=held))


class _Sums:
    """All that passes over the batches add up."""

    def __init__(self, model: nn.Module, space: ParameterSpace, max_dimension: int) -> None:
        self.model, self.space = model, space
        self.parameters = space.resolve(model)
        require_finite(self.parameters, "weights")
        self.device = local(next(iter(self.parameters.values()))).device
        self.squares = {
            name: torch.zeros((), dtype=torch.float64, device=local(parameter).device)
            for name, parameter in self.parameters.items()
        }
        self.targets = torch.zeros((), dtype=torch.float64, device=self.device)
        self.layers = [
            LayerSums(name, module, space.shape(name), local(self.parameters[name]).device, max_dimension)
            for name, module in linear_layers(model).items()
            if name in space
        ]

    def collecting(self) -> ExitStack:
        """Hooks on the linear layers, and gradients for the parameters of the space alone."""
        stack = ExitStack()
        for layer in self.layers:
            handle = layer.module.register_forward_hook(layer.hook, with_kwargs=True)
            stack.callback(handle.remove)
        chosen = {id(parameter) for parameter in self.parameters.values()}
        # FSDP2 has planned which gradients it reduces.
        if not any(map(is_sharded, self.model.parameters())):
            for parameter in self.model.parameters():
                parameter.requires_grad_(id(parameter) in chosen)
        return stack

    def add(self, objective: Objective, batch: Any, seed: int) -> None:
        moved = map_batch(batch, lambda tensor: tensor.to(self.device))
        logits = objective.logits_and_targets(self.model, moved).logits
        labels = sampled_labels(logits, seed)
        F.cross_entropy(logits.float(), labels, reduction="sum").backward()
        self.targets += len(labels)
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                gradient = parameter.grad.to_dense() if parameter.grad.layout is torch.sparse_coo else parameter.grad
                self.squares[name] += local(align(gradient, parameter)).float().square().sum(dtype=torch.float64)
        for parameter in self.model.parameters():
            parameter.grad = None

    def sum_over(self, replicas: Replicas) -> None:
        parts = sum_over_shards(list(self.squares.values()), list(self.parameters.values()))
        self.squares = dict(zip(self.squares, parts, strict=True))
        sums = [total for layer in self.layers for total in (layer.inputs, layer.outputs, layer.positions)]
        for total in (self.targets, *self.squares.values(), *sums):
            replicas.sum_(total)

    def fisher(self, cost: Cost) -> KroneckerFisher:
        n_targets = float(self.targets)
        means = {name: float(square) / n_targets for name, square in self.squares.items()}
        for name, value in means.items():
            if not math.isfinite(value):
                raise ValueError(f"the gradient of {name} is not finite; it has no Fisher information")
        layers = {}
        for layer in self.layers:
            if float(layer.positions):
                inputs, outputs = _factor(layer.inputs / layer.positions), _factor(layer.outputs / n_targets)
                product = float(inputs.values.double().sum() * outputs.values.double().sum())
                if product:
                    outputs = outputs._replace(values=outputs.values * (means[layer.name] / product))
                layers[layer.name] = LayerFisher(inputs, outputs, layer.inputs_first)
        scalars = {
            name: value / math.prod(self.space.shape(name)) for name, value in means.items() if name not in layers
        }
        return KroneckerFisher(self.space, layers, scalars, round(n_targets), cost)


def _factor(matrix: Tensor) -> Factor:
    if matrix.ndim == 1:
        return Factor(matrix, None)
    values, vectors = torch.linalg.eigh(matrix)
    # Rounding makes some of the eigenvalues at 0 negative.
    return Factor(values.clamp_(min=0), vectors)


def _first(batches: Iterable[Any], n_batches: int | None) -> list[Any]:
    first = list(itertools.islice(batches, n_batches))
    if not first:
        raise ValueError("there is no sample: the batches are empty")
    if n_batches is not None and len(first) < n_batches:
        raise ValueError(f"n_batches={n_batches}, but there are only {len(first)} batches")
    return first


class KroneckerPreconditioner:
    r"""The map of a Fisher information that is known already, so that dampings can be compared without its passes.

    .. math::
        P(U) \propto \big(G + \tfrac{\sqrt\lambda}{\pi} I\big)^{-1/2}\; U \;
        \big(A + \pi \sqrt\lambda I\big)^{-1/2}, \qquad
        \pi = \sqrt{\frac{\mathrm{tr} A / d_\text{in}}{\mathrm{tr} G / d_\text{out}}}

    Parameters without factors are scaled by :math:`(f + \lambda)^{-1/2}`, f their mean squared gradient.

    Args:
        fisher: As :func:`~lightning_goldy.analysis.kronecker_fisher` gives it; not needed any more afterwards.
        eps: Damping, above 0: λ as a share of the mean of the Fisher information's diagonal over the space, or with
            ``eps_unit="absolute"`` λ itself, nats per squared parameter unit.
        eps_unit: ``mean`` or ``absolute``.
        name: Shown in results.

    Raises:
        ValueError: An argument is out of range, or the Fisher information is zero.

    Source: Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature" (2015),
        section 6.3.
    """

    whole_tensors: bool = True

    def __init__(
        self, fisher: KroneckerFisher, *, eps: float = 1e-2, eps_unit: EpsUnit = "mean", name: str = "kronecker"
    ) -> None:
        check_damping(eps, eps_unit)
        damping = eps * fisher.mean if eps_unit == "mean" else eps
        if not damping > 0:
            raise ValueError(
                f"the damping must be above 0, for a Fisher information is singular; got eps={eps} with a mean Fisher "
                f"information of {fisher.mean:g}"
            )
        self.name, self.space = name, fisher.space
        damped = {weight: _damped(layer.inputs, layer.outputs, damping) for weight, layer in fisher.layers.items()}
        scales = {other: (value + damping) ** -0.5 for other, value in fisher.scalars.items()}
        logs = [_log_determinant(*factors) for factors in damped.values()]
        logs += [math.prod(self.space.shape(other)) * math.log(scale) for other, scale in scales.items()]
        self.log_mean = math.fsum(logs) / self.space.numel
        unit = math.exp(-self.log_mean)
        self._scales = {other: scale * unit for other, scale in scales.items()}
        self._roots: dict[str, tuple[Tensor, Tensor]] = {}
        for weight, (inputs, outputs) in damped.items():
            pair = _inverse_root(inputs).mul_(unit), _inverse_root(outputs)
            # What stands on either side of U: matrices, or diagonals as vectors.
            self._roots[weight] = pair if fisher.layers[weight].inputs_first else pair[::-1]

    @property
    def factored(self) -> tuple[str, ...]:
        """The weights that have Kronecker factors; the others have one scale each."""
        return tuple(self._roots)

    def apply(self, name: str, direction: Tensor, start: int) -> Tensor:
        """P u for one parameter.

        Args:
            name: Canonical parameter name.
            direction: The whole u of the parameter, in its global shape; may be overwritten.
            start: 0.

        Returns:
            A tensor of the same shape.

        Raises:
            UnknownParameterError: The space lacks the parameter.
        """
        self.space.index(name)
        if name in self._scales:
            return direction.mul_(self._scales[name])
        left, right = self._roots[name]
        with exact_products(direction.device):
            mapped = left @ direction if left.ndim == 2 else left[:, None] * direction
            return mapped @ right if right.ndim == 2 else mapped.mul_(right)


def kronecker_preconditioner(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    eps: float = 1e-2,
    eps_unit: EpsUnit = "mean",
    name: str = "kronecker",
    **options: Any,
) -> KroneckerPreconditioner:
    """Scales directions by the inverse square root of the Fisher information, in Kronecker factors.

    A forward and a backward pass per batch, then an eigendecomposition per side of each linear layer; every application
    costs two matrix products per weight. To compare dampings, call
    :func:`~lightning_goldy.analysis.kronecker_fisher` once and :class:`KroneckerPreconditioner` for each.

    Args:
        model: A plain, DistributedDataParallel-unwrapped, or FSDP2-sharded module.
        batches: Batches that the objective understands, the same on every rank.
        objective: Where the targets are; next-token prediction by default.
        eps: Damping in units of ``eps_unit``, as for :class:`KroneckerPreconditioner`.
        eps_unit: ``mean`` or ``absolute``.
        name: Shown in results.
        **options: ``space``, ``n_batches``, ``n_draws``, ``max_dimension``, ``seed``, ``progress`` and
            ``split_over_ranks`` of ``kronecker_fisher``.

    Returns:
        A preconditioner that works on whole tensors, its log-determinant 0.

    Raises:
        ValueError: As for ``kronecker_fisher`` and :class:`KroneckerPreconditioner`.

    Example:
        >>> import torch
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> batch = (torch.tensor([[10.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))
        >>> P = kronecker_preconditioner(nn.Linear(2, 3, bias=False), [batch], ClassifierObjective())
        >>> mapped = P.apply("weight", torch.ones(3, 2), 0)
        >>> bool(mapped[:, 0].norm() < mapped[:, 1].norm())
        True
    """
    check_damping(eps, eps_unit)
    fisher = kronecker_fisher(model, batches, objective, **options)
    return KroneckerPreconditioner(fisher, eps=eps, eps_unit=eps_unit, name=name)


def _damped(inputs: Factor, outputs: Factor, damping: float) -> tuple[Factor, Factor]:
    means = [float(factor.values.double().mean()) for factor in (inputs, outputs)]
    # Where a side is zero the split does not matter.
    pi = math.sqrt(means[0] / means[1]) if all(means) else 1.0
    root = math.sqrt(damping)
    damped = inputs.values.double() + pi * root, outputs.values.double() + root / pi
    return Factor(damped[0], inputs.vectors), Factor(damped[1], outputs.vectors)


def _log_determinant(inputs: Factor, outputs: Factor) -> float:
    """Of the inverse square root of the product of two factors."""
    logs = [float(factor.values.log().sum()) for factor in (inputs, outputs)]
    return -0.5 * (len(outputs.values) * logs[0] + len(inputs.values) * logs[1])


def _inverse_root(factor: Factor) -> Tensor:
    root = factor.values.rsqrt().float()
    if factor.vectors is None:
        return root
    with exact_products(root.device):
        return (factor.vectors * root) @ factor.vectors.T
