"""The volume of the region in which a cost stays below a cutoff; for a divergence, the basin volume."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from lightning_goldy.analysis.basin.measures import GaussianMeasure, RadialMeasure, SphereMeasure, UniformMeasure
from lightning_goldy.analysis.basin.radius import Crossing, find_radius
from lightning_goldy.analysis.basin.result import Measure, VolumeResult, best_of
from lightning_goldy.analysis.divergence import AnchoredDivergence, Cache, check_cache, shortened
from lightning_goldy.core.batches import map_batch
from lightning_goldy.core.directions import Preconditioner, Proposal, Ray, direction_seed
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.objective import CausalLMObjective, Objective
from lightning_goldy.core.sharding import Replicas, is_sharded, local, unshard_guard
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.vector import require_finite

Directions = Literal["auto", "implicit", "explicit"]
MEASURES = ("gaussian", "uniform", "sphere")

# A direction of this many bytes is held rather than drawn again at every move.
_SMALL = 32 << 20


def local_volume(
    module: nn.Module,
    cost: Callable[[nn.Module], float | torch.Tensor],
    *,
    n_directions: int = 10,
    cutoff: float = 1e-2,
    sigma: float | None = None,
    measure: Measure = "gaussian",
    preconditioner: Preconditioner | None = None,
    rtol: float = 1e-2,
    max_evaluations: int = 40,
    max_radius: float | None = None,
    l2_reg: float = 0.0,
    seed: int = 0,
    first_direction: int = 0,
    space: ParameterSpace | None = None,
    directions: Directions = "auto",
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> VolumeResult:
    r"""Estimates the volume of the region around a module's parameters where a cost stays below a cutoff.

    .. math:: V = \int_B \rho(\theta)\, d\theta, \qquad
        B = \{\theta_A + x : \mathrm{cost}(\theta_A + t x) \le \text{cutoff for all } t \in [0, 1]\}

    Directions u are uniform on the unit sphere; along each, the radius where the cost reaches the cutoff is searched,
    and the density integrated up to it. The estimate is unbiased for V, so its logarithm is a lower bound on average;
    with few directions in many dimensions it may lie far below. The module comes back bit for bit. On several ranks the
    directions are shared out; on a sharded module all ranks walk each one together.

    Args:
        module: Any module, plain or sharded with FSDP2, whose parameters are the anchor.
        cost: ``cost(module)`` in nats, about 0 at the anchor; called without gradients, the module in evaluation mode.
            One with a method ``at_anchor(module)`` is asked for that value rather than evaluated for it.
        n_directions: Number of directions; the first is the pilot from whose radius the others start.
        cutoff: The cost at the region's boundary, nats.
        sigma: Standard deviation of the Gaussian measure, parameter units; by default the root mean square of the
            selected parameters. Volumes at different sigmas are not comparable.
        measure: ``gaussian`` for the probability under N(0, sigma^2 I), ``uniform`` for the volume itself, ``sphere``
            for the probability on the sphere around the origin through the anchor.
        preconditioner: Stretches directions without changing volumes; the better it fits, the tighter the bound.
        rtol: Relative tolerance of the evaluated cost; a tenth of it is left after the last correction.
        max_evaluations: Cost evaluations per direction before an error.
        max_radius: Largest distance from the anchor, parameter units (radians for the sphere, at most pi); by default
            100 sqrt(D) times the root mean square. A direction that stays inside so far is reported as unbounded.
        l2_reg: Adds half of this times the squared distance from the anchor to the cost, nats per squared unit.
        seed: Decides the directions, which do not depend on the number of ranks, layout or device.
        first_direction: Number of the first direction, to go on where another estimate ended.
        space: Which parameters; all trainable ones by default.
        directions: ``implicit`` draws a direction again at every move, ``explicit`` holds it, ``auto`` holds what is
            small or, on a GPU, fits easily.
        progress: Called with (directions done, directions in all) on this rank.
        split_over_ranks: Whether to share directions out over the ranks of an initialised process group.

    Returns:
        The estimates, direction by direction.

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
    check_volume_arguments(n_directions, cutoff, sigma, measure, rtol, max_evaluations)
    if measure == "sphere" and preconditioner is not None:
        raise ValueError("measure='sphere' takes no preconditioner: directions are tangents of the sphere")
    began = time.perf_counter()
    space = space or ParameterSpace.of(module)
    replicas = Replicas.of(module) if split_over_ranks else Replicas()
    with preserved(module), torch.no_grad(), replicas.together("local_volume"):
        parameters = space.resolve(module)
        require_finite(parameters, "weights")
        explicit = _hold_direction(directions, parameters)
        with Ray(module, space, preconditioner=preconditioner, explicit=explicit) as ray:
            scale = _scale(sigma, ray, measure)
            walk = _Walk(ray, cost, _measure(measure, scale, ray), cutoff, rtol, max_evaluations, max_radius, l2_reg)
            walk.check_anchor()
            seeds = [direction_seed(seed, first_direction + index) for index in range(n_directions)]
            # Every rank walks the pilot, so that all start from the same radius.
            pilot = walk.trace(seeds[0])
            mine = replicas.share(seeds[1:])
            traces = [(seeds[0], pilot)]
            for each in mine:
                _tell(progress, len(traces), len(mine) + 1)
                traces.append((each, walk.trace(each, pilot)))
            _tell(progress, len(traces), len(mine) + 1)
    found = dict(pair for part in replicas.gather_objects(traces) for pair in part)
    return VolumeResult(
        **walk.numbers([found[each] for each in seeds]),
        extra_evaluations=0 if hasattr(cost, "at_anchor") else 1,
        measure=measure,
        preconditioner="none" if preconditioner is None else preconditioner.name,
        dimension=space.numel,
        sigma=scale,
        cutoff=cutoff,
        anchor_cost=walk.anchor_cost,
        rtol=rtol,
        max_radius=walk.max_radius,
        seed=seed,
        first_direction=first_direction,
        seconds=time.perf_counter() - began,
    )


def check_volume_arguments(
    n_directions: int, cutoff: float, sigma: float | None, measure: str, rtol: float, max_evaluations: int
) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: An argument is unknown or out of range.
    """
    for name, count in (("n_directions", n_directions), ("max_evaluations", max_evaluations)):
        if count < 1:
            raise ValueError(f"{name} must be at least 1; got {count}")
    for name, value in (("cutoff", cutoff), ("sigma", 1.0 if sigma is None else sigma)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be positive and finite; got {value}")
    if measure not in MEASURES:
        raise ValueError(f"unknown measure {measure!r}; {suggestion(str(measure), MEASURES)}")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol must lie in (0, 1); got {rtol}")


@dataclass
class _Walk:
    """The cost along rays from one anchor."""

    ray: Ray
    cost: Callable[[nn.Module], float | torch.Tensor]
    measure: RadialMeasure
    cutoff: float
    rtol: float
    max_evaluations: int
    largest: float | None
    l2_reg: float
    anchor_cost: float = math.nan

    @property
    def max_radius(self) -> float:
        default = self.measure.max_radius
        return default if self.largest is None else self.largest

    def check_anchor(self) -> None:
        if self.max_radius <= 0 or (isinstance(self.measure, SphereMeasure) and self.max_radius > math.pi):
            raise ValueError(f"max_radius must be positive (at most pi on the sphere); got {self.max_radius}")
        self.anchor_cost = self._evaluate(getattr(self.cost, "at_anchor", self.cost))
        if not abs(self.anchor_cost) < self.cutoff / 2:
            raise ValueError(
                f"the cost at the anchor is {self.anchor_cost:g} nats and must be about 0, well below the cutoff "
                f"{self.cutoff:g}; is it a difference from the present model, without dropout?"
            )

    def trace(self, seed: int, pilot: tuple[Proposal, Crossing] | None = None) -> tuple[Proposal, Crossing]:
        proposal = self.ray.turn(seed)
        unit = self.measure.unit(proposal)
        start, slope, bend = self.measure.start / unit, 2.0, 0.0
        if pilot is not None and math.isfinite(pilot[1].radius):
            start, slope, bend = pilot[1].radius, pilot[1].slope, pilot[1].bend
        crossing = find_radius(
            lambda radius: self._at(radius, proposal),
            self.cutoff,
            start,
            slope=slope,
            bend=bend,
            rtol=self.rtol,
            max_evaluations=self.max_evaluations,
            max_radius=self.max_radius / unit,
        )
        return proposal, crossing

    def _at(self, radius: float, proposal: Proposal) -> float:
        self.ray.move(*self.measure.coefficients(radius, proposal))
        return self._evaluate(self.cost) + 0.5 * self.l2_reg * self.measure.chord(radius, proposal) ** 2

    def _evaluate(self, cost: Callable[[nn.Module], float | torch.Tensor]) -> float:
        value = float(cost(self.ray.module))
        if any(map(is_sharded, self.ray.module.parameters())):
            # All ranks walk together, so they must take the same decisions.
            value = Replicas.world().gather_objects(value)[0]
        return value

    def numbers(self, traces: list[tuple[Proposal, Crossing]]) -> dict[str, Any]:
        """The columns of the result."""
        proposals, crossings = zip(*traces, strict=True)
        lengths, projections = (np.array([each[place] for each in proposals]) for place in (2, 3))
        radii = np.array([crossing.radius for crossing in crossings])
        unbounded = np.isnan(radii)
        integrals = self.measure.integrals(np.where(unbounded, 1.0, radii), lengths, projections)
        log_integral, sensitivity = (np.where(unbounded, np.nan, each) for each in integrals)
        columns = {
            "estimates": log_integral + self.measure.constant,
            "radii": radii,
            "props": lengths,
            "deltas": np.array([crossing.cost for crossing in crossings]),
            "slopes": np.array([crossing.slope for crossing in crossings]),
            "log_integral": log_integral,
            "sensitivities": sensitivity,
            "evaluations": np.array([crossing.evaluations for crossing in crossings]),
        }
        return {name: torch.from_numpy(column) for name, column in columns.items()}


def _measure(name: Measure, scale: float, ray: Ray) -> RadialMeasure:
    dimension = ray.space.numel
    if name == "sphere":
        if dimension < 2 or not ray.anchor_square:
            raise ValueError("measure='sphere' needs at least two selected elements that are not all zero")
        return SphereMeasure(dimension, ray.anchor_square)
    if name == "uniform":
        return UniformMeasure(dimension, scale)
    return GaussianMeasure(dimension, scale, ray.anchor_square)


def _scale(sigma: float | None, ray: Ray, measure: Measure) -> float:
    if sigma is not None:
        return sigma
    scale = math.sqrt(ray.anchor_square / ray.space.numel)
    if not scale and measure == "gaussian":
        raise ValueError("the selected parameters are all zero, so their root mean square is no sigma: give sigma=")
    return scale or 1.0


def _tell(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _hold_direction(directions: Directions, parameters: dict[str, nn.Parameter]) -> bool:
    if directions not in ("auto", "implicit", "explicit"):
        raise ValueError(
            f"unknown directions {directions!r}; {suggestion(str(directions), ('auto', 'implicit', 'explicit'))}"
        )
    if directions != "auto":
        return directions == "explicit"
    parts = [local(parameter) for parameter in parameters.values()]
    needed = sum(4 * part.numel() for part in parts)
    device = parts[0].device
    # Decided by what this process holds, which may differ by rank; the points walked through do not depend on it.
    return needed <= _SMALL or (device.type == "cuda" and torch.cuda.mem_get_info(device)[0] > 3 * needed)


def basin_volume(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    cutoff: float = 1e-2,
    preconditioner: Preconditioner | Mapping[str, Preconditioner | None] | None = None,
    cache: Cache = "auto",
    cache_dtype: torch.dtype | None = None,
    val_size: int | None = None,
    max_seq_len: int | None = None,
    **options: Any,
) -> VolumeResult:
    r"""Estimates the log-volume of the region around a model where its predictions stay within a KL divergence.

    .. math:: B = \Big\{\theta : \tfrac{1}{|T|} \sum_{t \in T}
        \mathrm{KL}\big(p_A(\cdot \mid x_{<t}) \,\|\, p_\theta(\cdot \mid x_{<t})\big) \le \text{cutoff}\Big\}

    taken as far as it can be seen from the anchor along straight lines. See
    :func:`~lightning_goldy.analysis.local_volume` for the estimator and its other options. One forward pass per
    batch and evaluation, about two evaluations per direction.

    Args:
        model: A plain, DistributedDataParallel-unwrapped, or FSDP2-sharded module: the anchor.
        batches: Batches that the objective understands, the same on every rank.
        objective: Where the targets are; next-token prediction by default.
        cutoff: The mean divergence at the boundary, nats per target.
        preconditioner: One, or several proposals by name (None for the plain one), of which the best is returned with
            every one's own numbers.
        cache: Where the anchor's log-probabilities are kept: ``device``, ``cpu``, ``none``, or ``auto``.
        cache_dtype: Of what is kept; a rounder dtype than the logits' adds the ``anchor_cost`` of the result to every
            divergence.
        val_size: Use only the first so many samples.
        max_seq_len: Use only the first so many tokens of each sample.
        **options: ``n_directions``, ``sigma``, ``measure``, ``rtol``, ``max_evaluations``, ``max_radius``, ``l2_reg``,
            ``seed``, ``first_direction``, ``space``, ``directions``, ``progress`` and ``split_over_ranks`` of
            ``local_volume``.

    Returns:
        The estimates, direction by direction, in nats.

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
    check_cache(cache, cache_dtype)
    objective = objective or CausalLMObjective()
    device = next(model.parameters()).device
    unshard_guard(model)
    chosen = [
        map_batch(batch, lambda tensor: tensor.to(device))
        for batch in shortened(batches, objective, val_size, max_seq_len)
    ]
    with preserved(model):
        divergence = AnchoredDivergence(model, chosen, objective, cache=cache, cache_dtype=cache_dtype)

        def volume(proposal: Preconditioner | None) -> VolumeResult:
            return local_volume(model, divergence, cutoff=cutoff, preconditioner=proposal, **options)

        if not isinstance(preconditioner, Mapping):
            return volume(preconditioner)
        best = best_of({name: volume(proposal) for name, proposal in preconditioner.items()})
    spent = sum(numbers["evaluations"] for numbers in best.proposals.values())
    # What the other proposals cost belongs to the choice.
    return dataclasses.replace(best, extra_evaluations=spent - int(best.evaluations.sum()))
