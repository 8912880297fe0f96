"""The Gaussian that a bridge starts from, the densities on the way, and chains that sample them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.basin.kronecker import KroneckerFisher, LayerFisher
from lightning_goldy.analysis.divergence import AnchoredDivergence
from lightning_goldy.analysis.gradients import exact_products
from lightning_goldy.core.files import StoreError, parse_json
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import open_tensors, write_tensors
from lightning_goldy.core.vector import ParameterVector, derived_seed

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


# Acceptance that steps are adapted to.
_ACCEPTANCE = 0.75
# Leapfrog steps of a trajectory at most, where nothing else is said.
LONGEST = 12
# A trajectory turns by about a quarter of a period of a Gaussian, jittered so that none is periodic.
_QUARTER = math.pi / 2


class Field(Protocol):
    """A cost at displacements from an anchor, in an eigenbasis.

    Attributes:
        gradients: Gradients taken so far, one for each point.
        evaluations: Costs taken without a gradient so far, one for each point.
    """

    @property
    def gradients(self) -> int:
        """Gradients taken so far."""

    @property
    def evaluations(self) -> int:
        """Costs taken without a gradient so far."""

    def values(self, points: Tensor) -> Tensor:
        """Costs of ``[points, D]``, shape ``[points]``, float64, nats; infinite where it is not finite."""

    def slopes(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The same with the gradients, shape ``[points, D]``."""


class PointField:
    """The field of a cost that takes many points at once.

    Args:
        cost: ``cost(points)``, of flat parameters ``[points, D]`` shape ``[points]``, nats; differentiable.
        anchor: Flat parameters, shape ``[D]``.
        basis: Of the points.
    """

    def __init__(self, cost: Callable[[Tensor], Tensor], anchor: Tensor, basis: Eigenbasis) -> None:
        self.cost, self.anchor, self.basis = cost, anchor, basis
        self.gradients = self.evaluations = 0

    def values(self, points: Tensor) -> Tensor:
        """Costs of the points, nats."""
        self.evaluations += len(points)
        with torch.no_grad():
            return _finite(self.cost(self.anchor + self.basis.outward(points)).double())

    def slopes(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Costs and gradients."""
        self.gradients += len(points)
        with torch.enable_grad():
            moved = (self.anchor + self.basis.outward(points)).requires_grad_()
            costs = self.cost(moved)
            (gradient,) = torch.autograd.grad(costs.sum(), moved)
        return _finite(costs.detach().double()), self.basis.inward(gradient)


class ModuleField:
    """The field of a cost of a module, one point after the other; the caller puts the parameters back.

    Args:
        module: The module at the anchor, in the mode in which the cost is taken.
        cost: ``cost(module)``, nats: an :class:`~lightning_goldy.analysis.divergence.AnchoredDivergence`, or a function
            whose value can be differentiated.
        basis: Of the points; names the parameters.
    """

    def __init__(self, module: nn.Module, cost: Callable[[nn.Module], Any], basis: Eigenbasis) -> None:
        self.module, self.cost, self.basis = module, cost, basis
        self.parameters = basis.space.resolve(module)
        self.anchor = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.gradients = self.evaluations = 0

    def values(self, points: Tensor) -> Tensor:
        """Costs of the points, nats."""
        self.evaluations += len(points)
        costs = []
        with torch.no_grad():
            for row in self.basis.outward(points):
                self._move(row)
                costs.append(float(self.cost(self.module)))
        return _finite(torch.tensor(costs, dtype=torch.float64))

    def slopes(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Costs and gradients."""
        self.gradients += len(points)
        costs, gradients = [], torch.empty_like(points)
        for place, row in enumerate(self.basis.outward(points)):
            self._move(row)
            with torch.enable_grad():
                if isinstance(self.cost, AnchoredDivergence):
                    costs.append(self.cost.backward(self.module))
                else:
                    value = self.cost(self.module)
                    value.backward()
                    costs.append(float(value.detach()))
            flat = [
                torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                for parameter in self.parameters.values()
            ]
            gradients[place] = torch.cat([gradient.reshape(-1).to(points.dtype) for gradient in flat])
            for parameter in self.module.parameters():
                parameter.grad = None
        return _finite(torch.tensor(costs, dtype=torch.float64)), self.basis.inward(gradients)

    def _move(self, row: Tensor) -> None:
        with torch.no_grad():
            for part, (name, parameter) in zip(row.split(self.basis.sizes), self.parameters.items(), strict=True):
                parameter.copy_(self.anchor[name] + part.view(parameter.shape))
        # Inside autocast a low-precision copy of the old weight may be cached and would be used in its place.
        torch.clear_autocast_cache()

    def restore(self) -> None:
        """Puts the anchor's parameters back, bit for bit."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.anchor[name])
        torch.clear_autocast_cache()


class _Around:
    """What stands around the field of a cost, and counts by it."""

    inner: Field

    @property
    def gradients(self) -> int:
        """Gradients taken so far."""
        return self.inner.gradients

    @property
    def evaluations(self) -> int:
        """Costs taken without a gradient so far."""
        return self.inner.evaluations


class StarField(_Around):
    r"""The largest cost along the way from the anchor, so that what lies behind a ridge is outside.

    .. math:: K^*(x) = \max_{j = 1 \dots m} K(\tfrac jm x)

    Args:
        inner: The field of the cost.
        points: m, places looked at on each way.
    """

    def __init__(self, inner: Field, points: int = 8) -> None:
        self.inner, self.points = inner, points

    def _shares(self, points: Tensor) -> tuple[Tensor, Tensor]:
        shares = torch.arange(1, self.points + 1, device=points.device) / self.points
        costs = torch.stack([self.inner.values(points * share) for share in shares.to(points.dtype)])  # [m, points]
        highest, place = costs.max(dim=0)
        return highest, shares[place.to(shares.device)].to(points.dtype)

    def values(self, points: Tensor) -> Tensor:
        """Largest costs, nats."""
        return self._shares(points)[0]

    def slopes(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Largest costs and their gradients, which are those at the place times its share of the way."""
        share = self._shares(points)[1][:, None]
        costs, gradients = self.inner.slopes(points * share)
        return costs, gradients * share


class AddedTether(_Around):
    """A field with half of a weight times the squared distance added.

    Args:
        inner: The field of the cost.
        weight: Nats per squared parameter unit.
    """

    def __init__(self, inner: Field, weight: float) -> None:
        self.inner, self.weight = inner, weight

    def values(self, points: Tensor) -> Tensor:
        """Costs, nats."""
        return self.inner.values(points) + self.weight / 2 * squares(points).cpu()

    def slopes(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """Costs and gradients."""
        costs, gradients = self.inner.slopes(points)
        return costs + self.weight / 2 * squares(points).cpu(), gradients + self.weight * points


def _finite(costs: Tensor) -> Tensor:
    return torch.nan_to_num(costs.cpu(), nan=math.inf, posinf=math.inf)


@dataclass
class Chains:
    """Several chains of one density, each with noise and a step of its own.

    Args:
        field: The cost.
        numbers: Which chains these are, of all; decides their noise.
        seed: Decides the noise.
        x: Where they are, shape ``[chains, D]``.
        longest: Leapfrog steps of a trajectory at most.

    Attributes:
        costs: There, shape ``[chains]``, nats.
        gradients: There, of the cost.
        steps: Log of each chain's step, shape ``[chains]``; in units of the masses' natural time.
    """

    field: Field
    numbers: Sequence[int]
    seed: int
    x: Tensor
    longest: int = LONGEST
    costs: Tensor = dataclasses.field(init=False)
    gradients: Tensor = dataclasses.field(init=False)
    steps: Tensor = dataclasses.field(init=False)
    acceptance: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.generators = [
            torch.Generator("cpu").manual_seed(derived_seed(self.seed, "chain", number)) for number in self.numbers
        ]
        self.turns = torch.Generator("cpu").manual_seed(derived_seed(self.seed, "turns"))
        first = math.log(1.5) - 0.25 * math.log(self.x.shape[-1])
        self.steps = torch.full((len(self.numbers),), first, dtype=torch.float64)
        self.acceptance = torch.full_like(self.steps, _ACCEPTANCE)

    def look(self) -> None:
        """Takes cost and gradient where the chains are."""
        self.costs, self.gradients = self.field.slopes(self.x)

    def noise(self) -> Tensor:
        """Standard normal numbers, shape ``[chains, D]``, the same on every device and however chains are shared."""
        size = self.x.shape[-1]
        drawn = [torch.randn(size, generator=own, device="cpu") for own in self.generators]
        return torch.stack(drawn).to(self.x.device, self.x.dtype) if drawn else torch.empty_like(self.x)

    def draw(self, tilt: Tilt) -> None:
        """Puts the chains at independent draws of the Gaussian at t = 0."""
        self.x = _drawn(tilt, self.noise())
        self.look()

    def length(self, step: float) -> int:
        """Leapfrog steps of the next trajectory, jittered."""
        jitter = 0.7 + 0.6 * float(torch.rand((), generator=self.turns, device="cpu"))
        return max(1, min(self.longest, round(jitter * _QUARTER / step)))

    def move(self, tilt: Tilt, length: int, *, gain: float = 0.0) -> None:
        """One trajectory of every chain, accepted or not.

        Between two kicks by the cost what the tether and the prior hold moves as it would without a cost, exactly: most
        directions of many parameters cost nothing, and what a leapfrog step errs by in each of them would add up.

        Args:
            tilt: The density.
            length: Leapfrog steps.
            gain: How strongly steps follow the acceptance; 0 leaves them.
        """
        mass = tilt.mass
        step = self.steps.exp().to(self.x.device, self.x.dtype)[:, None]
        p = self.noise() * mass.sqrt()
        x, costs, gradients = self.x, self.costs, self.gradients
        before = tilt.energy(x, costs.to(x.device)) + squares(p, 1 / mass) / 2
        held, kick = tilt.held, 0.5 * tilt.t * tilt.b * step
        centre, turn, rate = -tilt.pull / held, step * (held / mass).sqrt(), (held * mass).sqrt()
        cos, sin = turn.cos(), turn.sin()
        for _ in range(length):
            p = p - kick * gradients
            away = x - centre
            x, p = centre + away * cos + p / rate * sin, p * cos - away * rate * sin
            costs, gradients = self.field.slopes(x)
            p = p - kick * gradients
        after = tilt.energy(x, costs.to(x.device)) + squares(p, 1 / mass) / 2
        change = torch.nan_to_num(after - before, nan=math.inf).cpu()
        uniform = [float(torch.rand((), generator=own, device="cpu", dtype=torch.float64)) for own in self.generators]
        self.acceptance = (-change).clamp(max=0).exp()
        accepted = self.acceptance > torch.tensor(uniform, dtype=torch.float64)
        where = accepted.to(x.device)[:, None]
        self.x = torch.where(where, x, self.x)
        self.gradients = torch.where(where, gradients, self.gradients)
        self.costs = torch.where(accepted, costs, self.costs)
        if gain:
            self.steps = self.steps + gain * (self.acceptance - _ACCEPTANCE)


def langevin_coefficient(chains: Chains, tilt: Tilt, *, draws: int = 100, step: float = 0.5) -> Tensor:
    r"""The learning coefficient by Langevin dynamics with a fixed step and no correction, as is usual in the field.

    .. math:: x \leftarrow x - \tfrac\epsilon2 \big(b \nabla K(x) + \kappa x\big) + \sqrt\epsilon\, \eta,
        \qquad \hat\lambda = b\, \langle K \rangle

    Args:
        chains: Where it starts; moved.
        tilt: Gives b, κ (the localisation) and the largest curvature.
        draws: Steps of each chain.
        step: ε in units of the steepest direction's variance.

    Returns:
        b K of every draw, shape ``[chains, draws]``.

    Source: Lau et al., "The Local Learning Coefficient: A Singularity-Aware Complexity Measure" (2023).
    """
    epsilon = step / (tilt.b * float(tilt.curvature.max()) + tilt.kappa)
    chains.look()
    costs = []
    for _ in range(draws):
        slope = chains.gradients * tilt.b + chains.x * tilt.kappa
        chains.x = chains.x - epsilon / 2 * slope + math.sqrt(epsilon) * chains.noise()
        chains.look()
        costs.append(chains.costs)
    return tilt.b * torch.stack(costs, dim=1)


def _drawn(tilt: Tilt, noise: Tensor) -> Tensor:
    return noise * tilt.precision.rsqrt() + tilt.centre


def identity(model: Tilt, x: Tensor, slope: Tensor, weights: Tensor | float) -> Tensor:
    """What Stein's identity knows to have mean 0, shape ``[chains]``, float64.

    Where the density is the model's Gaussian it is half of the weighted squares less their mean; where it is not, its
    mean is 0 all the same.
    """
    precision = model.precision
    centre = -model.pull / precision
    term = ((x - centre) * slope - 1) / 2 + centre * slope
    return (term * (weights / precision)).sum(-1, dtype=torch.float64)


# Another number for another way to walk, whose states go on in no other.
_WALK = 4
# Seconds between two writings of the state within a stretch, and how many times as long as one took at least.
_PAUSE, _RARE = 60.0, 20.0


class KeptState:
    """What a walk has done, in a file that is whole or absent; another walk has another file.

    Args:
        folder: Where; None keeps nothing.
        walk: What the same walk has the same, by name.
        vectors: The same of tensors.
        replicas: Of which the first one writes and all read.
    """

    def __init__(self, folder: str | None, walk: dict[str, Any], vectors: Sequence[Tensor], replicas: Replicas) -> None:
        self.replicas, self.path = replicas, None
        if folder is not None:
            digest = hashlib.blake2b(json.dumps([_WALK, walk], sort_keys=True).encode(), digest_size=8)
            for vector in vectors:
                digest.update(vector.detach().cpu().contiguous().numpy().data)
            name = replicas.gather_objects(f"bridge-{digest.hexdigest()}.safetensors")[0]
            self.path = Path(folder) / name
        self._written, self._took = time.monotonic(), 0.0

    @property
    def due(self) -> bool:
        """Whether the state was not written for so long that it is worth it, as the first replica's clock says."""
        if self.path is None:
            return False
        since = time.monotonic() - self._written
        return self.replicas.gather_objects(since > max(_PAUSE, _RARE * self._took))[0]

    @property
    def there(self) -> bool:
        """Whether there is such a file, as the first replica sees it."""
        return self.path is not None and self.replicas.gather_objects(self.path.is_file())[0]

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """Numbers and tensors by name; None where there is no such file.

        Raises:
            StoreError: It is no whole file of this kind.
        """
        if self.path is None or not self.there:
            return None
        with open_tensors(self.path) as file:
            try:
                numbers = parse_json((file.metadata() or {})["bridge"], constants="float")
            except (KeyError, ValueError) as error:
                raise StoreError(f"{self.path}: no state of a bridge ({error}); remove it to begin anew") from error
            return numbers, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping

    def write(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Writes both; a collective."""
        began = time.monotonic()
        if self.path is not None and self.replicas.rank == 0:
            plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
            write_tensors(self.path, plain, {"bridge": json.dumps(numbers)})
        self._written = time.monotonic()
        self._took = self._written - began

    def drop(self) -> None:
        """Removes the file of a walk that has ended."""
        if self.path is not None and self.replicas.rank == 0:
            self.path.unlink(missing_ok=True)
