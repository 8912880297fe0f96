"""A volume-preserving map of directions by the inverse square root of a Kronecker-factored Fisher information."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_goldy.analysis.fisher import Factor, KroneckerFisher, kronecker_fisher
from lightning_goldy.analysis.outer_products import exact_products
from lightning_goldy.analysis.preconditioner import EpsUnit, check_damping
from lightning_goldy.core.objective import Objective


class KroneckerPreconditioner:
    r"""The map of a Fisher information that is known already, so that dampings can be compared without its passes.

    .. math::
        P(U) \propto \big(G + \tfrac{\sqrt\lambda}{\pi} I\big)^{-1/2}\; U \;
        \big(A + \pi \sqrt\lambda I\big)^{-1/2}, \qquad
        \pi = \sqrt{\frac{\mathrm{tr} A / d_\text{in}}{\mathrm{tr} G / d_\text{out}}}

    Parameters without factors are scaled by :math:`(f + \lambda)^{-1/2}`, f their mean squared gradient.

    Args:
        fisher: As :func:`~lightning_goldy.analysis.fisher.kronecker_fisher` gives it; not needed any more afterwards.
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
        damped = {each: _damped(layer.inputs, layer.outputs, damping) for each, layer in fisher.layers.items()}
        scales = {each: (value + damping) ** -0.5 for each, value in fisher.scalars.items()}
        logs = [_log_determinant(*factors) for factors in damped.values()]
        logs += [math.prod(self.space.shape(each)) * math.log(scale) for each, scale in scales.items()]
        self.log_mean = math.fsum(logs) / self.space.numel
        unit = math.exp(-self.log_mean)
        self._scales = {each: scale * unit for each, scale in scales.items()}
        self._roots = {}
        for each, (inputs, outputs) in damped.items():
            pair = _inverse_root(inputs).mul_(unit), _inverse_root(outputs)
            self._roots[each] = _Roots(*pair) if fisher.layers[each].inputs_first else _Roots(*pair[::-1])

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
        roots = self._roots[name]
        with exact_products(direction.device):
            left = roots.left @ direction if roots.left.ndim == 2 else roots.left[:, None] * direction
            return left @ roots.right if roots.right.ndim == 2 else left.mul_(roots.right)


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
    :func:`~lightning_goldy.analysis.fisher.kronecker_fisher` once and :class:`KroneckerPreconditioner` for each.

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


class _Roots(NamedTuple):
    """What stands on either side of U: matrices, or diagonals as vectors."""

    left: Tensor
    right: Tensor


def _damped(inputs: Factor, outputs: Factor, damping: float) -> tuple[Factor, Factor]:
    means = [float(factor.values.double().mean()) for factor in (inputs, outputs)]
    # Where a side is zero the split does not matter.
    pi = math.sqrt(means[0] / means[1]) if all(means) else 1.0
    root = math.sqrt(damping)
    return (
        inputs._replace(values=inputs.values.double() + pi * root),
        outputs._replace(values=outputs.values.double() + root / pi),
    )


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
