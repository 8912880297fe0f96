"""The Gaussian that a bridge starts from: a curvature in its eigenbasis, tethered, and shifted by a prior."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_goldy.analysis.basin.kronecker import KroneckerFisher, LayerFisher
from lightning_goldy.analysis.gradients import exact_products
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import ParameterVector

Curvature: TypeAlias = KroneckerFisher | ParameterVector | Tensor
"""The Hessian of a cost at its anchor: in Kronecker factors, its diagonal, or whole, shape ``[D, D]``."""

# Largest space whose whole Hessian is decomposed.
_WHOLE = 4096


class Eigenbasis:
    """A curvature by its eigenvalues, and the rotation between its eigenbasis and the parameters.

    Points are flat: the parameters of the space one after the other, each in its own eigenbasis.

    Args:
        space: The parameters.
        curvature: In nats per squared parameter unit; negative eigenvalues count as 0.
        device: Where points live.
        dtype: Of points.

    Attributes:
        values: Eigenvalues, shape ``[D]``.

    Raises:
        TypeError: The curvature is of another kind.
        ValueError: It belongs to another space, is too large, or is not finite.

    Example:
        >>> space = ParameterSpace.of(torch.nn.Linear(2, 1, bias=False))
        >>> basis = Eigenbasis(space, torch.tensor([[2.0, 1.0], [1.0, 2.0]]), device="cpu", dtype=torch.float64)
        >>> [round(value, 6) for value in basis.values.tolist()]
        [1.0, 3.0]
        >>> point = torch.tensor([[1.0, 5.0]], dtype=torch.float64)
        >>> bool(torch.allclose(basis.inward(basis.outward(point)), point))
        True
    """

    def __init__(
        self, space: ParameterSpace, curvature: Curvature, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        self.space, self.device, self.dtype = space, torch.device(device), dtype
        self.sizes = [math.prod(shape) for shape in space.shapes]
        self._whole: Tensor | None = None
        self._layers: dict[str, LayerFisher] = {}
        if isinstance(curvature, Tensor):
            values = self._decompose(curvature)
        elif isinstance(curvature, ParameterVector):
            curvature.space.require_same(space)
            values = torch.cat([tensor.reshape(-1).to(self.device, dtype) for tensor in curvature.values()])
        elif isinstance(curvature, KroneckerFisher):
            curvature.space.require_same(space)
            self._layers = curvature.layers
            values = torch.cat([self._eigenvalues(curvature, name) for name in space.names])
        else:
            raise TypeError(
                "a curvature is a KroneckerFisher, a ParameterVector (the diagonal) or a Tensor of shape [D, D]; got "
                f"{type(curvature).__name__}"
            )
        if not bool(torch.isfinite(values).all()):
            raise ValueError("the curvature is not finite")
        self.values = values.clamp(min=0)

    def _decompose(self, matrix: Tensor) -> Tensor:
        dimension = self.space.numel
        if matrix.shape != (dimension, dimension):
            raise ValueError(f"a whole curvature has the shape [{dimension}, {dimension}]; got {list(matrix.shape)}")
        if dimension > _WHOLE:
            raise ValueError(f"a whole curvature is for at most {_WHOLE} parameters; got {dimension}")
        values, vectors = torch.linalg.eigh(matrix.double())
        self._whole = vectors.to(self.device, self.dtype)
        return values.to(self.device, self.dtype)

    def _eigenvalues(self, fisher: KroneckerFisher, name: str) -> Tensor:
        layer = fisher.layers.get(name)
        if layer is None:
            return torch.full(
                (math.prod(self.space.shape(name)),), fisher.scalars[name], device=self.device, dtype=self.dtype
            )
        sides = [factor.values.to(self.device, self.dtype) for factor in (layer.inputs, layer.outputs)]
        rows, columns = sides if layer.inputs_first else sides[::-1]
        return torch.outer(rows, columns).reshape(-1)

    def outward(self, points: Tensor) -> Tensor:
        """From the eigenbasis to the parameters, shape ``[points, D]``."""
        return self._rotated(points, inverse=False)

    def inward(self, points: Tensor) -> Tensor:
        """From the parameters to the eigenbasis, shape ``[points, D]``."""
        return self._rotated(points, inverse=True)

    def _rotated(self, points: Tensor, *, inverse: bool) -> Tensor:
        with exact_products(self.device):
            if self._whole is not None:
                return points @ (self._whole if inverse else self._whole.T)
            if not self._layers:
                return points
            parts = []
            for name, part in zip(self.space.names, points.split(self.sizes, dim=-1), strict=True):
                layer = self._layers.get(name)
                if layer is None:
                    parts.append(part)
                    continue
                rows, columns = (layer.inputs, layer.outputs) if layer.inputs_first else (layer.outputs, layer.inputs)
                matrix = part.reshape(-1, *self.space.shape(name))
                if rows.vectors is not None:
                    vectors = rows.vectors.to(self.device, self.dtype)
                    matrix = (vectors.T if inverse else vectors) @ matrix
                if columns.vectors is not None:
                    vectors = columns.vectors.to(self.device, self.dtype)
                    matrix = matrix @ (vectors if inverse else vectors.T)
                parts.append(matrix.reshape(part.shape))
            return torch.cat(parts, dim=-1)


@dataclass(frozen=True, eq=False)
class Tilt:
    r"""A density between a Gaussian and the prior tilted by a cost.

    .. math:: -\log p(x) = t\, b K(x) + (1 - t)\, \tfrac b2 x^\top \hat F x + \tfrac\kappa2 |x|^2
        + \tfrac{a^\top x}{\sigma^2} + \text{const}

    At t = 1 and κ = 1/σ² it is the prior :math:`\mathcal N(-a, \sigma^2)` of the displacement x from the anchor a,
    tilted by :math:`e^{-bK}`; at t = 0 a Gaussian. All in the eigenbasis of F̂.

    Args:
        b: Inverse temperature, per nat.
        t: Share of the true cost, from 0 to 1.
        kappa: κ, the tether, at least 1/σ², per squared parameter unit.
        curvature: Eigenvalues of F̂, shape ``[D]``.
        learned: Curvature of the true cost as far as it is known, shape ``[D]``: what steps are scaled by.
        pull: a/σ², shape ``[D]``.
        floor: Least curvature of the mass, nats per squared parameter unit.

    Example:
        >>> one = torch.ones(1)
        >>> tilt = Tilt(b=3.0, t=0.0, kappa=1.0, curvature=one, learned=one, pull=4 * one)
        >>> tilt.precision.item(), tilt.centre.item()
        (4.0, -1.0)
    """

    b: float
    t: float
    kappa: float
    curvature: Tensor
    learned: Tensor
    pull: Tensor
    floor: float = 0.0

    @property
    def precision(self) -> Tensor:
        """Of the Gaussian that is like it, shape ``[D]``: exact at t = 0."""
        curved = self.curvature if self.t == 0 else torch.lerp(self.curvature, self.learned, self.t)
        return curved * self.b + self.kappa

    @property
    def held(self) -> Tensor:
        """Of what is Gaussian of it whatever the cost, shape ``[D]``."""
        return self.curvature * ((1 - self.t) * self.b) + self.kappa

    @property
    def centre(self) -> Tensor:
        """Of that Gaussian, shape ``[D]``."""
        return -self.pull / self.precision

    @property
    def mass(self) -> Tensor:
        """Masses of the momenta, shape ``[D]``."""
        return self.precision + self.floor * self.b * self.t

    def at(self, **changes: Any) -> Tilt:
        """The same with some values changed."""
        return replace(self, **changes)

    def energy(self, x: Tensor, cost: Tensor) -> Tensor:
        """Minus the log-density up to a constant, shape ``[points]``, float64."""
        inner = self.kappa * squares(x) / 2 + (x * self.pull).sum(-1, dtype=torch.float64)
        if self.t < 1:
            inner = inner + (1 - self.t) * self.b * squares(x, self.curvature) / 2
        return inner + self.t * self.b * cost if self.t > 0 else inner

    def slope(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the energy, given that of the cost, shape ``[points, D]``."""
        slope = x * (self.held if self.t < 1 else self.kappa) + self.pull
        return slope.add_(gradient, alpha=self.t * self.b) if self.t > 0 else slope

    def log_normaliser(self, variance: float) -> float:
        r"""Logarithm of the integral at t = 0, of the prior times the tilt and the tether.

        .. math:: \log Z_0 = -\tfrac12 \sum_i \log(\sigma^2 \Lambda_i)
            + \tfrac12 \sum_i \frac{(a_i / \sigma^2)^2}{\Lambda_i} - \frac{|a|^2}{2\sigma^2},
            \qquad \Lambda = b \hat F + \kappa

        Args:
            variance: σ², squared parameter units.
        """
        precision = (self.curvature.double() * self.b).add_(self.kappa)
        pull = self.pull.double()
        log_determinant = float((precision * variance).log_().sum())
        # Both squares are huge and nearly equal where the curvature is small; their difference is summed instead.
        shift = float((pull.square() * (1 / precision - variance)).sum())
        return 0.5 * (shift - log_determinant)

    def mean_cost(self) -> float:
        """Mean of the quadratic cost under the Gaussian at t = 0, nats."""
        precision = (self.curvature.double() * self.b).add_(self.kappa)
        return 0.5 * float(
            (self.curvature.double() * (1 / precision + (self.pull.double() / precision).square())).sum()
        )

    def solved(self, cutoff: float) -> Tilt:
        """The same at the inverse temperature at which the mean quadratic cost is the cutoff; hardly tilted without."""
        low, high = math.log(1e-9 / cutoff), math.log(self.curvature.numel() / cutoff) + 1
        for _ in range(60):
            middle = 0.5 * (low + high)
            above = self.at(b=math.exp(middle)).mean_cost() > cutoff
            low, high = (middle, high) if above else (low, middle)
        return self.at(b=math.exp(low))


def central_hessian(field: Any, dimension: int, scale: float, **place: Any) -> Tensor:
    """The Hessian at the anchor by central differences of gradients, two for each element, shape ``[D, D]``.

    Args:
        field: The cost in the parameters' own basis; see :class:`~lightning_goldy.analysis.basin.sampling.Field`.
        dimension: D.
        scale: A typical size of a parameter.
        **place: ``device`` and ``dtype`` of points.
    """
    step = scale * torch.finfo(place["dtype"]).eps ** (1 / 3)
    rows = []
    for part in (torch.eye(dimension, **place) * step).split(64):
        rows.append((field.slopes(part)[1] - field.slopes(-part)[1]) / (2 * step))
    whole = torch.cat(rows)
    return (whole + whole.T) / 2


def squares(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of the squared elements of each point, weighted, shape ``[points]``, float64."""
    return (x * x if weights is None else x * x * weights).sum(-1, dtype=torch.float64)
