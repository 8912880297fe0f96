"""The volume of the region in which a cost stays below a cutoff; for a divergence, the basin volume."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import nn

from lightning_goldy.analysis.basin.bridge import BridgeSettings
from lightning_goldy.analysis.basin.kronecker import kronecker_fisher
from lightning_goldy.analysis.basin.result import (
    COLUMNS,
    GaussianMeasure,
    Measure,
    SphereMeasure,
    UniformMeasure,
    VolumeResult,
    best_of,
)
from lightning_goldy.analysis.basin.saddle import BridgeResult
from lightning_goldy.analysis.basin.sampling import (
    AddedTether,
    Curvature,
    Eigenbasis,
    Field,
    ModuleField,
    PointField,
    StarField,
    Tilt,
    central_hessian,
)
from lightning_goldy.analysis.basin.tether import crossed
from lightning_goldy.analysis.divergence import AnchoredDivergence, Cache, check_cache, own_share, shortened
from lightning_goldy.analysis.result import Cost, total_cost
from lightning_goldy.core.batches import sample_count
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import require_at_least, require_choice, require_kinds
from lightning_goldy.core.objective import Objective, objective_for
from lightning_goldy.core.sharding import Replicas, is_sharded, local, unshard_guard
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import ParameterVector, Preconditioner, Proposal, Ray, direction_seed, require_finite

Method = Literal["rays", "bridge", "auto"]
"""Rays: a cheap lower bound. Bridge: the volume, with an error. Auto: the bridge where it can be walked, else rays."""
Directions = Literal["auto", "implicit", "explicit"]

# Largest space whose Hessian is measured, and labels drawn for each target where a Fisher information is.
_MEASURED, _FISHER_DRAWS = 512, 4

# A direction of this many bytes is held rather than drawn again at every move.
_SMALL = 32 << 20


@dataclass(frozen=True)
class Estimator:
    """How a volume is estimated; the same for all that are to compare.

    Args:
        measure: ``gaussian`` for the probability under N(0, sigma^2 I), ``uniform`` for the volume itself, ``sphere``
            for the probability on the sphere around the origin through the anchor.
        seed: Decides the directions, which do not depend on the number of ranks, layout or device.
        rtol: Relative tolerance of the evaluated cost; a tenth of it is left after the last correction.
        max_evaluations: Cost evaluations per direction before an error.
        max_seq_len: Use only the first so many tokens of each sample.
        cache: Where the anchor's log-probabilities are kept: ``device``, ``cpu``, ``none``, or ``auto``.
        max_radius: Largest distance from the anchor, parameter units (radians for the sphere, at most pi); by default
            100 sqrt(D) times the root mean square. A direction that stays inside so far is reported as unbounded.
        l2_reg: Adds half of this times the squared distance from the anchor to the cost, nats per squared unit.
        first_direction: Number of the first direction, to go on where another estimate ended.
        directions: ``implicit`` draws a direction again at every move, ``explicit`` holds it, ``auto`` holds what is
            small or, on a GPU, fits easily.

    Raises:
        ValueError: A value is unknown or out of range.

    Example:
        >>> Estimator(rtol=2.0)
        Traceback (most recent call last):
        ValueError: rtol must lie in (0, 1); got 2.0
    """

    measure: Measure = "gaussian"
    seed: int = 0
    rtol: float = 1e-2
    max_evaluations: int = 40
    max_seq_len: int | None = None
    cache: Cache = "auto"
    max_radius: float | None = None
    l2_reg: float = 0.0
    first_direction: int = 0
    directions: Directions = "auto"

    def __post_init__(self) -> None:
        require_kinds(type(self), vars(self))
        require_at_least("max_evaluations", self.max_evaluations, 1)
        require_choice("measure", self.measure, get_args(Measure))
        require_choice("directions", self.directions, get_args(Directions))
        if not 0 < self.rtol < 1:
            raise ValueError(f"rtol must lie in (0, 1); got {self.rtol}")
        check_cache(self.cache, None)


def local_volume(
    module: nn.Module,
    cost: Callable[[nn.Module], float | torch.Tensor],
    *,
    n_directions: int = 10,
    cutoff: float = 1e-2,
    sigma: float | None = None,
    preconditioner: Preconditioner | None = None,
    measure: Measure = "gaussian",
    rtol: float = 1e-2,
    max_evaluations: int = 40,
    max_radius: float | None = None,
    l2_reg: float = 0.0,
    seed: int = 0,
    first_direction: int = 0,
    directions: Directions = "auto",
    estimator: Estimator | None = None,
    space: ParameterSpace | None = None,
    method: Method = "rays",
    curvature: Curvature | None = None,
    bridge: BridgeSettings = BridgeSettings(),  # noqa: B008 - frozen
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> Any:
    r"""Estimates the volume of the region around a module's parameters where a cost stays below a cutoff.

    .. math:: V = \int_B \rho(\theta)\, d\theta, \qquad
        B = \{\theta_A + x : \mathrm{cost}(\theta_A + t x) \le \text{cutoff for all } t \in [0, 1]\}

    Directions u are uniform on the unit sphere; along each, the radius where the cost reaches the cutoff is searched,
    and the density integrated up to it. The estimate is unbiased for V, so its logarithm is a lower bound on average;
    in many dimensions it lies far below, however many directions there are. The module comes back bit for bit. On
    several ranks the directions are shared out; on a sharded module all ranks walk each one together.

    With ``method="bridge"`` no rays are walked: a Gaussian with the cost's curvature is carried over to the cost itself
    by chains (:class:`~lightning_goldy.analysis.basin.Bridge`), and the result states a standard error. The cost must
    then be differentiable. One with a method ``of_points(points)``, which takes flat parameters ``[points, D]`` and
    gives ``[points]``, is asked for many points at once.

    Args:
        module: Any module, plain or sharded with FSDP2, whose parameters are the anchor.
        cost: ``cost(module)`` in nats, about 0 at the anchor; called without gradients, the module in evaluation mode.
            One with a method ``at_anchor(module)`` is asked for that value rather than evaluated for it.
        n_directions: Number of directions; the first is the pilot from whose radius the others start.
        cutoff: The cost at the region's boundary, nats.
        sigma: Standard deviation of the Gaussian measure, parameter units; by default the root mean square of the
            selected parameters. Volumes at different sigmas are not comparable.
        preconditioner: Stretches directions without changing volumes; the better it fits, the tighter the bound.
        measure: As for :class:`Estimator`, like the following.
        rtol: Relative tolerance of the evaluated cost.
        max_evaluations: Cost evaluations per direction before an error.
        max_radius: Largest distance from the anchor.
        l2_reg: Weight of the squared distance from the anchor in the cost.
        seed: Decides the directions.
        first_direction: Number of the first direction.
        directions: Whether they are held.
        estimator: All of these settings at once, instead of by name.
        space: Which parameters; all trainable ones by default.
        method: ``rays``, ``bridge``, or ``auto`` for the bridge under the Gaussian measure around whole parameters.
        curvature: The Hessian at the anchor, for the bridge: a Fisher information in Kronecker factors, its diagonal as
            a vector, or whole, shape ``[D, D]``; measured for up to 512 parameters where it is not given.
        bridge: How the bridge is walked.
        progress: Called with (directions done, directions in all), or gradients, on this rank.
        split_over_ranks: Whether to share directions, or chains, out over the ranks of an initialised process group.

    Returns:
        The estimates, direction by direction, as a :class:`VolumeResult`; a :class:`BridgeResult` of a bridge.

    Raises:
        ValueError: An argument is out of range, a weight is not finite, the cost at the anchor is not about 0, or a
            radius was not found in ``max_evaluations``.

    Source: Scherlis and Belrose, "Estimating the Probability of Sampling a Trained Neural Network at Random",
    arXiv 2501.18812, sections 3 and 4.

    Example:
        >>> module = nn.Linear(20, 1, bias=False)
        >>> anchor = module.weight.detach().clone()
        >>> distance = lambda module: (module.weight - anchor).square().sum()
        >>> result = local_volume(module, distance, cutoff=4.0, measure="uniform")
        >>> ball = 10 * math.log(math.pi) - math.lgamma(11) + 20 * math.log(2)  # of radius 2 in 20 dimensions
        >>> abs(result.log_volume - ball) < 1e-4, result.unbounded
        (True, ())
    """
    check_region(n_directions, cutoff, sigma)
    walked = (max_radius, l2_reg, first_direction, directions)
    estimator = _one_of(estimator, Estimator(measure, seed, rtol, max_evaluations, None, "auto", *walked))
    if estimator.measure == "sphere" and preconditioner is not None:
        raise ValueError("measure='sphere' takes no preconditioner: directions are tangents of the sphere")
    began = time.perf_counter()
    space = space or ParameterSpace.of(module)
    replicas = Replicas.of(module) if split_over_ranks else Replicas()
    if _bridges(method, estimator, module, preconditioner):
        crossing = _Crossing(module, cost, cutoff, sigma, estimator, bridge, space, replicas)
        return crossing.result(curvature, progress)
    with preserved(module), torch.no_grad(), replicas.together("local_volume"):
        parameters = space.resolve(module)
        require_finite(parameters, "weights")
        with Ray(module, space, preconditioner=preconditioner, explicit=_held(estimator, parameters)) as ray:
            radial, scale = _measure(estimator.measure, sigma, ray)
            walk = _Walk(ray, cost, radial, cutoff, estimator)
            walk.check_anchor()
            seeds = [direction_seed(estimator.seed, estimator.first_direction + index) for index in range(n_directions)]
            traces = walk.share(seeds, replicas, progress or (lambda done, total: None))
    traced = dict(pair for part in replicas.gather_objects(traces) for pair in part)
    return VolumeResult(
        **walk.numbers([traced[own] for own in seeds]),
        extra_evaluations=0 if hasattr(cost, "at_anchor") else 1,
        measure=estimator.measure,
        preconditioner="none" if preconditioner is None else preconditioner.name,
        dimension=space.numel,
        sigma=scale,
        cutoff=cutoff,
        anchor_cost=walk.anchor_cost,
        rtol=estimator.rtol,
        max_radius=walk.max_radius,
        seed=estimator.seed,
        first_direction=estimator.first_direction,
        seconds=time.perf_counter() - began,
    )


def basin_volume(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    n_directions: int = 10,
    cutoff: float = 1e-2,
    sigma: float | None = None,
    preconditioner: Preconditioner | Mapping[str, Preconditioner | None] | None = None,
    measure: Measure = "gaussian",
    rtol: float = 1e-2,
    max_evaluations: int = 40,
    max_radius: float | None = None,
    l2_reg: float = 0.0,
    seed: int = 0,
    first_direction: int = 0,
    directions: Directions = "auto",
    max_seq_len: int | None = None,
    cache: Cache = "auto",
    estimator: Estimator | None = None,
    cache_dtype: torch.dtype | None = None,
    n_samples: int | None = None,
    space: ParameterSpace | None = None,
    method: Method = "rays",
    curvature: Curvature | None = None,
    bridge: BridgeSettings = BridgeSettings(),  # noqa: B008 - frozen
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
    val_size: int | None = None,
) -> Any:
    r"""Estimates the log-volume of the region around a model where its predictions stay within a KL divergence.

    .. math:: B = \Big\{\theta : \tfrac{1}{|T|} \sum_{t \in T}
        \mathrm{KL}\big(p_A(\cdot \mid x_{<t}) \,\|\, p_\theta(\cdot \mid x_{<t})\big) \le \text{cutoff}\Big\}

    taken as far as it can be seen from the anchor along straight lines. See
    :func:`~lightning_goldy.analysis.local_volume` for the estimator. One forward pass per batch and evaluation, about
    two evaluations per direction.

    Args:
        model: A plain, DistributedDataParallel-unwrapped, or FSDP2-sharded module: the anchor.
        batches: Batches that the objective understands, the same on every rank.
        objective: Where the targets are; next-token prediction by default.
        n_directions: Number of directions, for each proposal.
        cutoff: The mean divergence at the boundary, nats per target.
        sigma: Standard deviation of the Gaussian measure; by default the root mean square of the parameters.
        preconditioner: One, or several proposals by name (None for the plain one), of which the best is returned with
            every one's own numbers.
        measure: As for :class:`Estimator`, like the following.
        rtol: Relative tolerance of the evaluated divergence.
        max_evaluations: Evaluations per direction before an error.
        max_radius: Largest distance from the anchor.
        l2_reg: Weight of the squared distance from the anchor.
        seed: Decides the directions.
        first_direction: Number of the first direction.
        directions: Whether they are held.
        max_seq_len: Use only the first so many tokens of each sample.
        cache: Where the anchor's log-probabilities are kept.
        estimator: All of these settings at once, instead of by name.
        cache_dtype: Of what is kept; a rounder dtype than the logits' adds the ``anchor_cost`` of the result to every
            divergence.
        n_samples: Use only the first so many samples.
        space: Which parameters; all trainable ones by default.
        method: ``rays`` for a lower bound; ``bridge`` for the volume itself, at thousands of gradients; ``auto`` for
            the bridge where it can be walked. See :func:`~lightning_goldy.analysis.local_volume`.
        curvature: For the bridge; the samples' own Fisher information in Kronecker factors by default.
        bridge: How the bridge is walked.
        progress: Called with (directions done, directions in all), or gradients, on this rank.
        split_over_ranks: Whether to share directions, or chains, out over the ranks of an initialised process group.
        val_size: Former name of ``n_samples``.

    Returns:
        The estimates, direction by direction, in nats, as a :class:`VolumeResult`, or a :class:`BridgeResult`; the cost
        is that of all ranks.

    Raises:
        ValueError: An argument is out of range, there is no sample, or a weight is not finite.

    Source: Scherlis and Belrose, "Estimating the Probability of Sampling a Trained Neural Network at Random",
    arXiv 2501.18812, section 4.

    Example:
        >>> from lightning_goldy.core.objective import ClassifierObjective
        >>> batch = (torch.eye(3), torch.tensor([0, 1, 2]))
        >>> result = basin_volume(nn.Linear(3, 3), [batch], ClassifierObjective(), n_directions=4)
        >>> result.log_volume < 0, len(result.estimates)
        (True, 4)
    """
    n_samples = _by_former_name(n_samples, val_size)
    walked = (max_radius, l2_reg, first_direction, directions)
    estimator = _one_of(estimator, Estimator(measure, seed, rtol, max_evaluations, max_seq_len, cache, *walked))
    check_cache(estimator.cache, cache_dtype)
    replicas, objective = Replicas.of(model) if split_over_ranks else Replicas(), objective_for(model, objective)
    unshard_guard(model)
    chosen = shortened(batches, objective, n_samples, estimator.max_seq_len)
    chosen = list(own_share(chosen, model, Replicas(), None))
    bridged, spent = _bridges(method, estimator, model, preconditioner), Cost()
    if bridged and curvature is None:
        options: dict[str, Any] = {"space": space, "n_draws": _FISHER_DRAWS, "seed": estimator.seed}
        # On every rank by itself: an eigenbasis may turn by any angle when its matrix changes in the last digit.
        fisher = kronecker_fisher(model, chosen, objective, split_over_ranks=False, **options)
        curvature, spent = fisher, fisher.cost
    region: dict[str, Any] = {"n_directions": n_directions, "cutoff": cutoff, "sigma": sigma, "space": space}
    shared: dict[str, Any] = {"estimator": estimator, "progress": progress, "split_over_ranks": split_over_ranks}
    with preserved(model):
        divergence = AnchoredDivergence(model, chosen, objective, cache=estimator.cache, cache_dtype=cache_dtype)
        volume = partial(local_volume, model, divergence, **region, **shared)
        # Every rank makes the anchor's predictions, and checks a bridge's on the first batch.
        common = divergence.forwards + (sample_count(chosen[0]) if bridged else 0)
        if bridged:
            result = volume(method="bridge", curvature=curvature, bridge=bridge)
        elif not isinstance(preconditioner, Mapping):
            result = volume(preconditioner=preconditioner)
        else:
            result = best_of({name: volume(preconditioner=proposal) for name, proposal in preconditioner.items()})
            walked_all = sum(numbers["evaluations"] for numbers in result.proposals.values())
            # What the other proposals cost belongs to the choice.
            result = dataclasses.replace(result, extra_evaluations=walked_all - int(result.evaluations.sum()))
    if not bridged:
        common = divergence.forwards - divergence.divided
    mine = Cost(divergence.forwards, divergence.backwards)
    return dataclasses.replace(result, cost=total_cost(replicas, mine, Cost(forwards=common)) + spent)


def _by_former_name(n_samples: int | None, val_size: int | None) -> int | None:
    if val_size is None:
        return n_samples
    warnings.warn("basin_volume: val_size has become n_samples", DeprecationWarning, stacklevel=3)
    if n_samples is not None:
        raise ValueError(f"give n_samples= alone; got n_samples={n_samples} and val_size={val_size}")
    return val_size


def _bridges(method: Method, estimator: Estimator, module: nn.Module, preconditioner: Any) -> bool:
    """Whether a bridge is walked; refuses what it cannot do where it was asked for."""
    require_choice("method", method, get_args(Method))
    if method == "rays":
        return False
    against = None
    if estimator.measure != "gaussian":
        against = f"needs the Gaussian measure; got measure={estimator.measure!r}"
    elif any(map(is_sharded, module.parameters())):
        against = "turns whole parameters into an eigenbasis, which a sharded model does not hold"
    elif preconditioner is not None:
        against = "takes no preconditioner; give curvature="
    if against is not None and method == "bridge":
        raise ValueError(f"method='bridge' {against}; or use method='rays', a lower bound")
    return against is None


@dataclass
class _Crossing:
    """A bridge around one module."""

    module: nn.Module
    cost: Callable[[nn.Module], float | torch.Tensor]
    cutoff: float
    sigma: float | None
    estimator: Estimator
    settings: BridgeSettings
    space: ParameterSpace
    replicas: Replicas

    def result(self, curvature: Curvature | None, progress: Callable[[int, int], None] | None) -> BridgeResult:
        began = time.perf_counter()
        with preserved(self.module), torch.no_grad(), self.replicas.together("local_volume"):
            parameters = self.space.resolve(self.module)
            require_finite(parameters, "weights")
            for parameter in self.module.parameters():
                parameter.requires_grad_(False)
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            flat = torch.cat([parameter.detach().reshape(-1) for parameter in parameters.values()])
            flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
            scale = float(flat.square().mean(dtype=torch.float64).sqrt()) if self.sigma is None else self.sigma
            if not scale:
                raise ValueError(
                    "the selected parameters are all zero, so their root mean square is no sigma: give sigma="
                )
            anchor = float(getattr(self.cost, "at_anchor", self.cost)(self.module))
            if not abs(anchor) < self.cutoff / 2:
                raise ValueError(
                    f"the cost at the anchor is {anchor:g} nats and must be about 0, well below the cutoff "
                    f"{self.cutoff:g}; is it a difference from the present model, without dropout?"
                )
            modules: list[ModuleField] = []
            try:
                basis, cost, measured = self._field(curvature, flat, scale, modules)
                pull = basis.inward(flat[None])[0] / scale**2
                tilt = Tilt(1.0, 0.0, 1 / scale**2, basis.values, basis.values, pull)
                options: dict[str, Any] = {"seed": self.estimator.seed, "replicas": self.replicas, "progress": progress}
                found = crossed(cost, tilt, self.cutoff, self.settings, **options)
            finally:
                for module in modules:
                    module.restore()
        taken = self.replicas.gather_objects((cost.gradients + measured, cost.evaluations))
        counts = [sum(pair) for pair in zip(found.pop("earlier", (0, 0)), *taken, strict=True)]
        return BridgeResult(
            **found,
            region=self.settings.region,
            gradients=counts[0],
            evaluations=counts[1],
            chains=self.settings.chains,
            dimension=self.space.numel,
            sigma=scale,
            cutoff=self.cutoff,
            seed=self.estimator.seed,
            seconds=time.perf_counter() - began,
        )

    def _field(
        self, curvature: Curvature | None, flat: torch.Tensor, scale: float, modules: list[ModuleField]
    ) -> tuple[Eigenbasis, Field, int]:
        """The cost in the eigenbasis of its curvature, and the gradients that measuring that took."""
        place: dict[str, Any] = {"device": flat.device, "dtype": flat.dtype}

        def field_in(basis: Eigenbasis) -> Field:
            if hasattr(self.cost, "of_points"):
                return self._bounded(PointField(self.cost.of_points, flat, basis))
            modules.append(ModuleField(self.module, self.cost, basis))
            return self._bounded(modules[-1])

        dimension, measured = self.space.numel, 0
        if curvature is None:
            if dimension > _MEASURED:
                raise ValueError(
                    f"method='bridge' measures the curvature of at most {_MEASURED} parameters itself; for {dimension} "
                    "give curvature=: a KroneckerFisher, a ParameterVector (the diagonal), or a matrix"
                )
            ones = {name: torch.ones(shape) for name, shape in zip(self.space.names, self.space.shapes, strict=True)}
            inner = field_in(Eigenbasis(self.space, ParameterVector(self.space, ones), **place))
            curvature = central_hessian(inner, dimension, scale, **place)
            measured = 2 * dimension if self.replicas.rank == 0 else 0  # every rank measures it for itself
            for module in modules:
                module.restore()
        basis = Eigenbasis(self.space, curvature, **place)
        return basis, field_in(basis), measured

    def _bounded(self, cost: Field) -> Field:
        bounded: Field = AddedTether(cost, self.estimator.l2_reg) if self.estimator.l2_reg else cost
        return StarField(bounded, self.settings.ray_points) if self.settings.region == "star" else bounded


def _one_of(whole: Estimator | None, named: Estimator) -> Estimator:
    if whole is not None and named != Estimator():
        default = Estimator()
        names = [name for name, value in vars(named).items() if value != getattr(default, name)]
        raise ValueError(f"give estimator=, or its settings by name, not both; got estimator= and {', '.join(names)}")
    return whole or named


def check_region(n_directions: int, cutoff: float, sigma: float | None) -> None:
    """Checks what can be checked of a volume before there is a model.

    Raises:
        ValueError: An argument is out of range.
    """
    require_at_least("n_directions", n_directions, 1)
    for name, value in (("cutoff", cutoff), ("sigma", 1.0 if sigma is None else sigma)):
        if not isinstance(value, Real) or not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite; got {value}")


@dataclass
class _Walk:
    """The cost along rays from one anchor."""

    ray: Ray
    cost: Callable[[nn.Module], float | torch.Tensor]
    measure: UniformMeasure
    cutoff: float
    estimator: Estimator
    anchor_cost: float = math.nan

    @property
    def max_radius(self) -> float:
        asked = self.estimator.max_radius
        return self.measure.max_radius if asked is None else asked

    def check_anchor(self) -> None:
        if self.max_radius <= 0 or (isinstance(self.measure, SphereMeasure) and self.max_radius > math.pi):
            raise ValueError(f"max_radius must be positive (at most pi on the sphere); got {self.max_radius}")
        self.anchor_cost = self._evaluate(getattr(self.cost, "at_anchor", self.cost))
        if not abs(self.anchor_cost) < self.cutoff / 2:
            raise ValueError(
                f"the cost at the anchor is {self.anchor_cost:g} nats and must be about 0, well below the cutoff "
                f"{self.cutoff:g}; is it a difference from the present model, without dropout?"
            )

    def share(
        self, seeds: list[int], replicas: Replicas, tell: Callable[[int, int], None]
    ) -> list[tuple[int, tuple[Proposal, Crossing]]]:
        """This rank's part of the directions, and the pilot, from whose radius all start.

        All walk the pilot, each with a share of the batches where the cost can be divided.
        """
        whole = self.cost
        divided = whole if isinstance(whole, AnchoredDivergence) and replicas.size > 1 else None
        before = 0 if divided is None else divided.forwards
        if divided is not None:
            self.cost = partial(divided.divide, replicas=replicas)
        pilot = self.trace(seeds[0])
        self.cost = whole
        mine = replicas.share(seeds[1:])
        traces = [(seeds[0], pilot)]
        for own in mine:
            tell(len(traces), len(mine) + 1)
            traces.append((own, self.trace(own, pilot)))
        if divided is not None:
            divided.divided += divided.forwards - before
        tell(len(traces), len(mine) + 1)
        return traces

    def trace(self, seed: int, pilot: tuple[Proposal, Crossing] | None = None) -> tuple[Proposal, Crossing]:
        proposal = self.ray.turn(seed)
        unit = self.measure.unit(proposal)
        start, slope, bend = self.measure.start / unit, None, 0.0
        if pilot is not None and math.isfinite(pilot[1].radius):
            start, slope, bend = pilot[1].radius, pilot[1].slope, pilot[1].bend
        crossing = find_radius(
            lambda radius: self._at(radius, proposal),
            self.cutoff,
            start,
            slope=slope,
            bend=bend,
            rtol=self.estimator.rtol,
            max_evaluations=self.estimator.max_evaluations,
            max_radius=self.max_radius / unit,
        )
        return proposal, crossing

    def _at(self, radius: float, proposal: Proposal) -> float:
        self.ray.move(*self.measure.coefficients(radius, proposal))
        return self._evaluate(self.cost) + 0.5 * self.estimator.l2_reg * self.measure.chord(radius, proposal) ** 2

    def _evaluate(self, cost: Callable[[nn.Module], float | torch.Tensor]) -> float:
        value = float(cost(self.ray.module))
        if any(map(is_sharded, self.ray.module.parameters())):
            # All ranks walk together, so they must take the same decisions.
            value = Replicas.world().gather_objects(value)[0]
        return value

    def numbers(self, traces: list[tuple[Proposal, Crossing]]) -> dict[str, Any]:
        """The columns of the result."""
        proposals, crossings = zip(*traces, strict=True)
        lengths, projections = (np.array([proposal[place] for proposal in proposals]) for place in (2, 3))
        radii, deltas, slopes, evaluations, _ = map(np.array, zip(*crossings, strict=True))
        unbounded = np.isnan(radii)
        integrals = self.measure.integrals(np.where(unbounded, 1.0, radii), lengths, projections)
        log_integral, sensitivities = (np.where(unbounded, np.nan, column) for column in integrals)
        estimates = log_integral + self.measure.constant
        columns = (estimates, radii, lengths, deltas, slopes, log_integral, sensitivities, evaluations)
        return dict(zip(COLUMNS, map(torch.from_numpy, columns), strict=True))


def _measure(name: Measure, sigma: float | None, ray: Ray) -> tuple[UniformMeasure, float]:
    dimension, square = ray.space.numel, ray.anchor_square
    scale = math.sqrt(square / dimension) if sigma is None else sigma
    if not scale and name == "gaussian":
        raise ValueError("the selected parameters are all zero, so their root mean square is no sigma: give sigma=")
    scale = scale or 1.0
    if name == "sphere":
        if dimension < 2 or not square:
            raise ValueError("measure='sphere' needs at least two selected elements that are not all zero")
        return SphereMeasure(dimension, square), scale
    if name == "uniform":
        return UniformMeasure(dimension, scale), scale
    return GaussianMeasure(dimension, scale, square), scale


def _held(estimator: Estimator, parameters: Mapping[str, nn.Parameter]) -> bool:
    if estimator.directions != "auto":
        return estimator.directions == "explicit"
    parts = [local(parameter) for parameter in parameters.values()]
    needed = sum(4 * part.numel() for part in parts)
    device = parts[0].device
    # Decided by what this process holds, which may differ by rank; the points walked through do not depend on it.
    return needed <= _SMALL or (device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 3 * needed)


# Largest step of one extrapolation, as a factor of the radius.
_LARGEST_STEP = math.log(32.0)
# A cost that is not finite says only that the point is outside.
_STEP_BACK = math.log(4.0)
# What a slope taken from elsewhere may be off by, as a fraction of it.
_BORROWED = 1 / 3
# The slope of a quadratic, where none is known, and what that may be off by: costs of up to the tenth power.
_QUADRATIC, _GUESSED = 2.0, 4.0
_PATIENCE = 8
# Below this slope nothing can be extrapolated.
_FLAT = 0.1
# Width of a bracket, in units of rtol, inside which only a jump can be.
_JUMP = 1e-3


class Crossing(NamedTuple):
    """Where the cost reaches the cutoff.

    Args:
        radius: The radius, or NaN when it was not reached.
        cost: The evaluated cost closest to the cutoff, nats.
        slope: d log cost / d log radius there.
        evaluations: Cost evaluations spent.
        bend: Second derivative of the same curve, as far as the evaluated points show it.
    """

    radius: float
    cost: float
    slope: float
    evaluations: int
    bend: float = 0.0


def find_radius(
    cost: Callable[[float], float],
    cutoff: float,
    start: float,
    *,
    slope: float | None = None,
    bend: float = 0.0,
    rtol: float = 1e-2,
    max_evaluations: int = 40,
    max_radius: float = math.inf,
) -> Crossing:
    r"""Finds the radius at which a cost equals a cutoff, by a bracketed secant in logarithms.

    With :math:`x = \log r` and :math:`y = \log(\text{cost} / \text{cutoff})` a quadratic cost is a line of slope 2. A
    point is accepted when the cost is within ``rtol`` of the cutoff and the slope is known well enough for the last
    correction, which is not evaluated, to leave a tenth of ``rtol``. Where the cost jumps across the cutoff, the place
    of the jump is accepted. A cost that is not finite counts as outside.

    Args:
        cost: Cost at a radius, nats.
        cutoff: The cost to reach, positive, nats.
        start: First radius, positive.
        slope: d log cost / d log radius at the cutoff, off by a third at most; None where nothing is known of it.
        bend: First guess of its second derivative.
        rtol: Relative tolerance of the cost.
        max_evaluations: Cost evaluations before giving up.
        max_radius: The largest radius that is tried.

    Returns:
        The crossing; its radius is NaN when the cost at ``max_radius`` is below the cutoff.

    Raises:
        ValueError: The evaluations were spent before the tolerance was reached.

    Example:
        >>> crossing = find_radius(lambda r: 3 * r**2, 0.03, start=1.0)
        >>> round(crossing.radius, 9), crossing.evaluations
        (0.1, 2)
    """
    search = _Search(cutoff, rtol, slope or _QUADRATIC, bend, math.log(max_radius), _BORROWED if slope else _GUESSED)
    x = min(math.log(start), search.limit)
    for count in range(1, max_evaluations + 1):
        value = cost(math.exp(x))
        search.add(x, value)
        if search.accepted():
            closest = search.points[0][2] if search.points else search.inside
            radius = math.exp(search.corrected())
            return Crossing(radius, closest, search.slope_at_best(), count, search.bend_at_best())
        if x >= search.limit and value < cutoff:
            return Crossing(math.nan, value, math.nan, count)
        x = search.next()
    raise ValueError(
        f"the cost did not come within {rtol:g} of the cutoff {cutoff:g} in {max_evaluations} evaluations; the radius "
        f"lies between {math.exp(search.low):.6g} and {math.exp(search.high):.6g}. Raise max_evaluations or rtol"
    )


@dataclass
class _Search:
    cutoff: float
    rtol: float
    slope: float
    bend: float
    limit: float
    unsure: float
    """What the slope may be off by, as a fraction of it, before two points tell it."""
    low: float = -math.inf
    high: float = math.inf
    count: int = 0
    inside: float = math.nan
    """The last cost inside, which has no logarithm where it is 0."""
    points: list[tuple[float, float, float]] = field(default_factory=list)
    """(x, y, cost) of the points whose logarithm exists, closest to the cutoff first."""

    def add(self, x: float, cost: float) -> None:
        self.count += 1
        outside = not cost < self.cutoff
        if outside:
            self.high = min(self.high, x)
        else:
            self.low, self.inside = max(self.low, x), cost
        if self.low >= self.high:
            # Not monotone: what the last point says holds, and its far side is open again.
            self.low, self.high = (-math.inf, x) if outside else (x, math.inf)
        if math.isfinite(cost) and cost > 0:
            self.points.append((x, math.log(cost / self.cutoff), cost))
            self.points.sort(key=lambda point: abs(point[1]))

    def accepted(self) -> bool:
        narrow = self.high - self.low <= self.rtol * _JUMP
        if narrow or not self.points:
            return narrow
        miss = abs(self.points[0][1])
        # A secant's slope is that of the middle; slopes are taken to change by at most their own size per factor e.
        unsure = self.unsure if self._secant() is None else 0.05 + abs(self.points[1][0] - self.points[0][0]) / 2
        return miss <= self.rtol and miss * unsure <= self.rtol / 10

    def _secant(self) -> float | None:
        if len(self.points) < 2 or self.points[0][0] == self.points[1][0]:
            return None
        (x, y, _), (other_x, other_y, _) = self.points[:2]
        slope = (other_y - y) / (other_x - x)
        return slope if slope > _FLAT else None

    def slope_at_best(self) -> float:
        secant = self._secant()
        return self.slope if secant is None else secant

    def bend_at_best(self) -> float:
        """From the three points closest to the cutoff; 0 where they do not show a growing curve."""
        if len(self.points) < 3:
            return self.bend
        (a, ya, _), (b, yb, _), (c, yc, _) = sorted(self.points[:3])
        if not a < b < c or self._secant() is None:
            return 0.0
        return 2 * ((yc - yb) / (c - b) - (yb - ya) / (b - a)) / (c - a)

    def _step(self) -> float:
        """Where the curve meets the cutoff, from its best point."""
        y, slope = self.points[0][1], self.slope_at_best()
        if len(self.points) > 1:
            return -y / slope
        # The same curve, shifted sideways: the pilot's slope and bend are those at the cutoff.
        steepness = math.sqrt(max(slope * slope + 2 * self.bend * y, 0.25 * slope * slope))
        return -2 * y / (slope + steepness)

    def corrected(self) -> float:
        x, y, _ = self.points[0] if self.points else (math.nan, math.inf, math.nan)
        if abs(y) > self.rtol:
            # A jump: the bracket, which is narrow, says more than an extrapolation.
            return 0.5 * (self.low + self.high)
        crossed = x - y / self.slope_at_best()
        return min(max(crossed, self.low), self.high, self.limit) if self.low < self.high else crossed

    def next(self) -> float:
        low, high = self.low, self.high
        if not self.points:
            guess = low + _LARGEST_STEP if math.isinf(high) else high - _STEP_BACK
        else:
            guess = self.points[0][0] + max(-_LARGEST_STEP, min(_LARGEST_STEP, self._step()))
        if math.isfinite(low) and math.isfinite(high):
            # The secant may creep along one side of a kink; halving does not.
            if not low < guess < high or (self.count > _PATIENCE and self.count % 2):
                guess = 0.5 * (low + high)
        elif math.isfinite(low) and (guess <= low or (len(self.points) > 1 and self._secant() is None)):
            # Also where the cost is known to hardly grow, so that its next value is far away.
            guess = low + _LARGEST_STEP
        elif math.isfinite(high) and guess >= high:
            guess = high - _STEP_BACK
        return min(guess, self.limit)
