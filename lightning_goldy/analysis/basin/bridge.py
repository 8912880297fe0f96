"""The volume by a bridge from a Gaussian to the true cost, or by importance sampling where that Gaussian is good."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_goldy.analysis.basin.saddle import (
    COUNTED,
    Array,
    Region,
    Saddle,
    controlled,
    counted,
    difference_of,
    effective_share,
    nested_rule,
    part_of,
    saddle,
    student,
    trusted,
    weighted_volume,
)
from lightning_goldy.analysis.basin.sampling import (
    LONGEST,
    Chains,
    Field,
    KeptState,
    Tilt,
    identity,
    langevin_coefficient,
    squares,
)
from lightning_goldy.core.files import percentage, require_local
from lightning_goldy.core.naming import require_at_least, require_choice, require_kinds
from lightning_goldy.core.sharding import Replicas

Path = Literal["auto", "cost", "tether"]

# Draws of the importance sampler: a first look, and all of them where that look is good.
_LOOK, _DRAWS = 16, 128
# Share of the draws that the weights must leave, or a chain is needed.
_EFFECTIVE = 0.25
# Share of the gradients that finds the inverse temperature and lets the chains settle.
_SETTLING = 0.35
# Error of half of the log-variance of the cost, over that of one independent value from each visit of a chain.
_DEPENDENT = 0.3
# Gradients that half a stretch takes more, of each chain.
_BETWEEN = 27
# By how much a stretch of the chains may raise their cost.
_STEEP = 3.0
# Where the mean cost is farther from the quadratic one than this, the Gaussian is no place to begin.
_FAR = 3.0
# And where chains that settle leave the quadratic cost above so many cutoffs, it is no place to come back to: curvature
# that is known up to lognormal(1.0) factors leaves 1.6, what saturates 2.
_ASTRAY = 10.0


@dataclass(frozen=True)
class BridgeSettings:
    """How a bridge is walked.

    Args:
        chains: Chains, at least 2: their spread is part of the error.
        nodes: Intervals of the path from the Gaussian to the cost, 2, 4, 8, ...; the estimate with half of them is part
            of the error. A tether has a place for every trajectory.
        max_gradients: Gradients of the cost in all, each of the whole probe, over all chains; the best estimate within
            them is returned.
        region: ``connected``, all that can be reached at no more than the cost, or ``star``, what is seen from the
            anchor along straight lines.
        ray_points: Places on each line that ``star`` looks at, a forward pass each beside every gradient.
        sgld_draws: Draws of Langevin dynamics that are compared with, beside ``max_gradients``, for each chain.
        floor: Least curvature that masses are made for, as a share of the mean curvature.
        path: ``cost`` adds what the true cost has beyond the quadratic one; ``tether``, for networks, begins where a
            tether holds all and loosens it to the prior; ``auto`` takes ``cost`` where the Gaussian's own draws cost
            about what it says and the chains then stay near it.
        keep_in: Folder in which a walk keeps its state until it has ended, so that an interrupted one goes on there bit
            for bit; None keeps nothing.

    Raises:
        ValueError: A value is unknown or out of range.

    Example:
        >>> BridgeSettings(nodes=6)
        Traceback (most recent call last):
        ValueError: nodes must be a power of 2, at least 2; got 6
    """

    chains: int = 4
    nodes: int = 8
    max_gradients: int = 20_000
    region: Region = "connected"
    ray_points: int = 8
    floor: float = 0.002
    sgld_draws: int = 0
    path: Path = "auto"
    keep_in: str | None = None

    def __post_init__(self) -> None:
        require_kinds(type(self), vars(self))
        if self.keep_in is not None:
            require_local(self.keep_in, "keep_in")
        require_at_least("chains", self.chains, 2)
        require_at_least("ray_points", self.ray_points, 1)
        require_choice("region", self.region, get_args(Region))
        require_choice("path", self.path, get_args(Path))
        if self.nodes < 2 or self.nodes & (self.nodes - 1):
            raise ValueError(f"nodes must be a power of 2, at least 2; got {self.nodes}")
        if not self.floor >= 0:
            raise ValueError(f"floor must be at least 0; got {self.floor}")
        if self.max_gradients < self.least:
            raise ValueError(
                f"max_gradients must be at least {self.least} for {self.chains} chains; got {self.max_gradients}"
            )

    @property
    def least(self) -> int:
        """Gradients that the shortest bridge takes."""
        return self.chains * 100


def bridge_gradients(settings: BridgeSettings) -> int:
    """Gradients that a bridge takes at most: its budget, a last trajectory, and the Langevin dynamics beside it.

    Not counted are two for each element where the curvature of up to 512 parameters has to be measured.

    Example:
        >>> bridge_gradients(BridgeSettings(chains=4, max_gradients=1000, sgld_draws=50))
        1256
    """
    langevin = settings.sgld_draws + 1 if settings.sgld_draws else 0
    return settings.max_gradients + settings.chains * (LONGEST + 1 + langevin)


class Strayed(Exception):  # noqa: N818 - no error: another path is asked for
    """Chains that settled are where the Gaussian is no likeness of the cost."""


class _Node(NamedTuple):
    place: float
    tilt: Tilt


class _Visit(NamedTuple):
    """What chains found at one node; every array of shape ``[chains, trajectories]``."""

    costs: Array
    integrand: Array
    centred: Array
    """The cost with its control variate taken off."""
    distance: Array
    acceptance: float


class Bridge:
    """Walks from a Gaussian to the true cost and back.

    Args:
        cost: The field.
        tilt: At t = 0 with κ = 1/σ², any b; its curvature is the Gaussian's.
        cutoff: c, nats.
        settings: How.
        seed: Decides all noise.
        replicas: Ranks that share out the chains; the noise and the result do not depend on their number.
        progress: Called with (gradients taken, gradients in all) on this rank.
    """

    def __init__(
        self,
        cost: Field,
        tilt: Tilt,
        cutoff: float,
        settings: BridgeSettings,
        *,
        seed: int = 0,
        replicas: Replicas = Replicas(),  # noqa: B008 - frozen
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.field, self.cutoff, self.settings, self.seed, self.replicas = cost, cutoff, settings, seed, replicas
        self.tell = progress or (lambda done, total: None)
        mean = float(tilt.curvature.mean(dtype=torch.float64))
        self.start = tilt.at(floor=settings.floor * mean).solved(cutoff)
        self.variance = 1 / tilt.kappa
        self.numbers = replicas.share(range(settings.chains))
        self.taken = 0
        self.here: Tilt | None = None
        self.weak: list[str] = []
        self.may_stray = True
        """Whether a walk goes on wherever its chains are; else it ends by :class:`Strayed`."""
        self.tilt = self.start
        """The density that is sought, as far as it is known."""
        self.done: dict[str, Any] = {}
        """What stretches that have ended gave, by name, in lists of numbers."""
        self.loop: dict[str, Any] = {}
        """The same of the stretch that is being walked, where it can be gone on with."""
        self.earlier = (0, 0)

    # Numbers of all chains, in their order, on every rank.
    def _all(self, mine: Tensor) -> Array:
        parts = self.replicas.gather_objects(dict(zip(self.numbers, mine.tolist(), strict=True)))
        joined = {number: value for part in parts for number, value in part.items()}
        return np.array([joined[number] for number in range(self.settings.chains)], dtype=np.float64)

    def importance(self) -> tuple[Array, Array, float]:
        """Costs and log-weights of draws of the Gaussian, and the share of them that the weights leave."""
        costs: list[Array] = []
        quadratic: list[Array] = []
        chains = self._chains()
        share = 0.0
        for wanted in (_LOOK, _DRAWS):
            while sum(map(len, costs)) < wanted:
                x = chains.noise() * self.start.precision.rsqrt() + self.start.centre
                costs.append(self._all(self.field.values(x)))
                quadratic.append(self._all(squares(x, self.start.curvature).cpu() / 2))
            weights = self.start.b * (np.concatenate(quadratic) - np.concatenate(costs))
            share = effective_share(weights)
            if share < _EFFECTIVE:
                break
        return np.concatenate(costs), np.concatenate(quadratic), share

    def _chains(self, seed: int | None = None) -> Chains:
        mine = torch.empty(len(self.numbers), len(self.start.pull), device=self.start.pull.device)
        own = self.seed if seed is None else seed
        return Chains(self.field, self.numbers, own, mine.to(self.start.pull.dtype))

    def near(self) -> bool:
        """Whether the Gaussian's own draws cost about what it says."""
        start, chains = self.start, self._chains()
        x = torch.cat([chains.noise() * start.precision.rsqrt() + start.centre for _ in range(4)])
        costs = np.mean([self._all(part).mean() for part in self.field.values(x).chunk(4)])
        return bool(1 / _FAR <= costs / self.cutoff <= _FAR)

    def drawn(self) -> tuple[dict[str, Any] | None, float]:
        """The fields of the result where draws of the Gaussian are enough, else None; and the share that is left."""
        costs, quadratic, share = self.importance()
        return (self._by_importance(costs, quadratic) if share >= _EFFECTIVE else None), share

    def run(self) -> dict[str, Any]:
        """The fields of the result: from draws where they are enough, else from chains."""
        drawn, share = self.drawn()
        return (self.walked() if drawn is None else drawn) | {"effective_sample_size": share}

    def walked(self) -> dict[str, Any]:
        """The same from chains, but the share of the draws.

        Raises:
            Strayed: The chains may not stray, and did.
        """
        self.chains = self._chains()
        self.nodes = self._affordable()
        self.tilt = self.start.at(t=1.0)
        if not self._resumed():
            self.chains.draw(self.start)
        self._settle()
        fields = self._summed(self.tilt, *self._passes(self.tilt))
        return self._ended(fields)

    def _kept(self) -> KeptState:
        settings, start = self.settings, self.start
        walk = dataclasses.asdict(dataclasses.replace(settings, keep_in=None)) | {
            "walk": type(self).__name__,
            "seed": self.seed,
            "cutoff": self.cutoff,
            "variance": self.variance,
            "start": [start.b, start.kappa, start.floor],
            "dtype": str(start.pull.dtype),
        }
        return KeptState(settings.keep_in, walk, (start.curvature, start.pull), self.replicas)

    @property
    def interrupted(self) -> bool:
        """Whether an earlier walk of this kind has left its state."""
        return self._kept().there

    def _resumed(self) -> bool:
        """Whether an earlier walk was interrupted; then all is as it was when that was last kept.

        Raises:
            ValueError: The cost has changed.
        """
        self.file = self._kept()
        state = self.file.read()
        if state is None:
            return False
        numbers, tensors = state
        chains, place = self.chains, self.chains.x
        chains.x = tensors["x"][list(self.numbers)].to(place.device, place.dtype)
        chains.look()
        costs = tensors["costs"][list(self.numbers)]
        if not self._all(torch.isclose(chains.costs, costs, rtol=1e-2, atol=1e-2 * self.cutoff).double()).all():
            raise ValueError(f"{self.file.path} is the state of a walk around another cost; remove it to begin anew")
        chains.costs = costs
        chains.steps, chains.acceptance = (tensors[name][list(self.numbers)] for name in ("steps", "acceptance"))
        for own, number in zip(chains.generators, self.numbers, strict=True):
            own.set_state(tensors["noise"][number].clone())
        chains.turns.set_state(tensors["turns"])
        counts = self._counts()
        self.earlier = (numbers["counts"][0] - counts[0], numbers["counts"][1] - counts[1])
        self._put_back(numbers, tensors)
        self.tell(min(self.taken, self.settings.max_gradients), self.settings.max_gradients)
        return True

    def _counts(self) -> list[int]:
        pairs = self.replicas.gather_objects((self.field.gradients, self.field.evaluations))
        return [sum(counts) for counts in zip(*pairs, strict=True)]

    def _put_back(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.taken, self.done, self.weak = numbers["taken"], numbers["done"], numbers["weak"]
        self.loop, place = numbers["loop"], self.start.pull
        self.tilt = self.tilt.at(b=numbers["b"], learned=tensors["learned"].to(place.device, place.dtype))
        if numbers["here"] is not None:
            self.here = self.tilt.at(t=numbers["here"])

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All that goes on of a walk, of all chains in their order; a collective."""
        chains = self.chains
        noise = [generator.get_state() for generator in chains.generators]
        mine = (chains.x.cpu(), chains.costs, chains.steps, chains.acceptance, noise)
        rows: dict[int, Any] = {}
        for own, parts in self.replicas.gather_objects((self.numbers, mine)):
            rows |= dict(zip(own, zip(*parts, strict=True), strict=True))
        columns = zip(*(rows[number] for number in range(self.settings.chains)), strict=True)
        named = zip(("x", "costs", "steps", "acceptance", "noise"), columns, strict=True)
        tensors = {name: torch.stack(column) for name, column in named}
        counts = [now + before for now, before in zip(self._counts(), self.earlier, strict=True)]
        numbers: dict[str, Any] = {
            "taken": self.taken,
            "done": self.done,
            "weak": self.weak,
            "loop": self.loop,
            "counts": counts,
        }
        numbers |= {"b": self.tilt.b, "here": None if self.here is None else self.here.t}
        return numbers, tensors | {"turns": chains.turns.get_state(), "learned": self.tilt.learned}

    def _keep(self) -> None:
        if self.file.path is not None:
            self.file.write(*self._state())

    def _stretch(self, name: str, walk: Callable[[], Any]) -> Any:
        """What a stretch gave, in lists of numbers: as it is kept, or by walking it, after which all is kept."""
        if name not in self.done:
            self.done[name] = walk()
            self.loop = {}
            self._keep()
        return self.done[name]

    def _ended(self, found: dict[str, Any]) -> dict[str, Any]:
        self.file.drop()
        return found | {"earlier": self.earlier}

    def _affordable(self) -> int:
        """Intervals: fewer where the budget does not give each node three trajectories and steps."""
        nodes = self.settings.nodes
        while nodes > 2 and self.settings.max_gradients < 2 * self.settings.chains * 24 * nodes:
            nodes //= 2
        if nodes < self.settings.nodes:
            self.weak.append(f"max_gradients={self.settings.max_gradients} allow {nodes} intervals of the path")
        return nodes

    def _spend(self, gradients: int) -> tuple[int, int]:
        """Trajectories and their mean length that a number of gradients of all chains allows."""
        step = math.exp(float(self._all(self.chains.steps).mean()))
        # Three at least: one settles, two are watched.
        length = max(1, min(self.chains.longest, round(math.pi / 2 / step), gradients // (3 * self.settings.chains)))
        return max(1, gradients // (self.settings.chains * length)), length

    def _move(self, tilt: Tilt, longest: int, gain: float = 0.0) -> None:
        step = math.exp(float(self._all(self.chains.steps).mean()))
        affordable = max(1, (self.settings.max_gradients - self.taken) // self.settings.chains)
        length = min(longest, self.chains.length(step), affordable)
        self.chains.move(tilt, length, gain=gain)
        self.taken += length * self.settings.chains
        self.tell(min(self.taken, self.settings.max_gradients), self.settings.max_gradients)

    def _carry(self, old: Tilt, new: Tilt, *, halvings: int = 3, steep: float = _STEEP) -> None:
        """Stretches the chains from one density to the next as the Gaussians that are like them are stretched.

        Otherwise they arrive far from equilibrium, where trajectories that spread are refused and those that contract
        are not. Where the stretch puts a chain on a slope, half of it is made first; in the end such a chain stays.
        """
        chains, like = self.chains, old.at(learned=new.learned)
        before = chains.x, chains.costs, chains.gradients
        chains.x = new.centre + (chains.x - like.centre) * (like.precision / new.precision).sqrt()
        chains.look()
        self.taken += self.settings.chains
        kept = chains.costs <= steep * before[1].clamp(min=0.1 * self.cutoff)
        # Two trajectories between two halves must be a small part of what there is.
        affordable = _BETWEEN * self.settings.chains < 0.02 * (self.settings.max_gradients - self.taken)
        if halvings and affordable and not self._all(kept.double()).all():
            chains.x, chains.costs, chains.gradients = before
            middle = new.at(t=(old.t + new.t) / 2)
            self._carry(old, middle, halvings=halvings - 1)
            for _ in range(2):
                self._move(middle, chains.longest, gain=0.3)
            self._carry(middle, new, halvings=halvings - 1)
            return
        where = kept.to(chains.x.device)[:, None]
        chains.x = torch.where(where, chains.x, before[0])
        chains.costs = torch.where(kept, chains.costs, before[1])
        chains.gradients = torch.where(where, chains.gradients, before[2])

    def _settle(self) -> None:
        """Finds the inverse temperature of the cutoff, and learns the curvature from the chains there."""
        budget = int(_SETTLING * self.settings.max_gradients)
        left = budget - self._stretch("settling from", lambda: self.taken)
        for number, share in enumerate((0.15, 0.35, 0.6, 1.0)):
            end = budget - left * (1 - share)

            def walk(end: float = end, number: int = number) -> list[Any]:
                self.tilt = self._round(self.tilt, end, gain=0.3 / (1 + number), cooling=number)
                quadratic = self._all(squares(self.chains.x, self.start.curvature) / 2)
                return [self._all(self.chains.steps).tolist(), float(quadratic.mean()) / self.cutoff]

            steps, quadratic = self._stretch(f"settling {number}", walk)
            if quadratic > _ASTRAY and not self.may_stray:
                self.file.drop()
                raise Strayed
        self.steps = torch.tensor([steps[number] for number in self.numbers], dtype=torch.float64)

    def _round(self, target: Tilt, end: float, *, gain: float, cooling: int) -> Tilt:
        """Moves the chains until so many gradients are taken, and learns the curvature from them.

        Args:
            target: The density.
            end: Gradients.
            gain: How strongly steps follow the acceptance.
            cooling: Which of the rounds that seek the inverse temperature.
        """
        sums = [torch.zeros_like(target.pull, dtype=torch.float64) for _ in range(4)]
        count, logs = 0, [math.log(target.b)]
        means: list[float] = []
        variates: list[float] = []
        while self.taken < end:
            self._move(target, max(1, int(end - self.taken) // self.settings.chains), gain=gain)
            slope = target.slope(self.chains.x, self.chains.gradients)
            costs = self.chains.costs
            means.append(float(self._all(costs).mean()))
            mean = means[-1]
            if cooling > 1:  # the curvature is known well enough to take off what its fluctuation explains
                variates.append(self._all(identity(target, self.chains.x, slope, target.learned)).mean())
                sure = len(means) < 4 or trusted(np.array([means]), np.array([variates]))
                mean -= variates[-1] if sure else 0.0
            shift = max(-1.0, min(1.0, math.log(mean / self.cutoff))) if math.isfinite(mean) and mean > 0 else 1.0
            rate = 0.5 if cooling < 2 else 1 / (2 + count)
            target = target.at(b=max(target.b * math.exp(rate * shift), 1e-9 / self.cutoff))
            logs.append(math.log(target.b))
            for row, grad in zip(self.chains.x.double(), slope.double(), strict=True):
                for total, value in zip(sums, (row, row * row, grad, grad * grad), strict=True):
                    total += value
            count += 1
        if cooling == 3:
            target = target.at(b=math.exp(float(np.mean(logs[len(logs) // 2 :]))))
        return target.at(learned=self._learned(target, sums, count))

    def _learned(self, target: Tilt, sums: Sequence[Tensor], count: int) -> Tensor:
        r"""Curvature of the cost, from :math:`\sqrt{\mathrm{Var}\, g / \mathrm{Var}\, x}` over gradients and points."""
        total = count * self.settings.chains
        if total < 6:
            return target.learned
        first, second, slope, slopes = (self.replicas.sum_(value) / total for value in sums)
        points, gradients = second - first.square(), slopes - slope.square()
        precision = (gradients.clamp(min=0) / points.clamp(min=1e-300)).sqrt()
        found = ((precision - target.kappa) / target.b).clamp(min=0)
        # In logarithms above the floor, drawn towards what was believed before as by some draws of its own.
        floor = 0.1 * target.floor + 1e-300
        logs = torch.lerp((target.learned.double() + floor).log(), (found + floor).log(), total / (total + 6.0))
        return (logs.exp() - floor).clamp(min=0).to(torch.float32).to(target.pull.dtype)

    def _visit(self, node: _Node, share: float, *, fresh: bool) -> _Visit:
        """Lets the chains settle at a node, then watches them."""
        tilt, chains = node.tilt, self.chains
        if not fresh:
            chains.steps = self.steps
            if tilt.t > 0 and self.here is not None:
                self._carry(self.here, tilt)
        self.here = tilt
        gradients = int(share * (self.settings.max_gradients - self.taken))
        model = tilt.at(floor=0.0)
        count, longest = self._spend(gradients)
        # At the Gaussian's end each draw is a new one.
        settling = 0 if fresh or tilt.t == 0 else max(1, count // 3)
        records: list[Tensor] = []
        acceptance: list[float] = []
        for turn in range(settling + max(2, count - settling)):
            if tilt.t == 0:
                chains.draw(tilt)
                self.taken += self.settings.chains
                if turn >= 2 * self.settings.nodes:
                    break
            else:
                self._move(tilt, longest, gain=0.2 if turn < settling else 0.0)
            if turn >= settling:
                records.append(self._observed(node, model))
                acceptance.append(float(self._all(chains.acceptance).mean()))
        table = self._all(torch.stack(records, dim=1))  # [chains, trajectories, 5]
        costs, integrand, control, cost_control, distance = np.moveaxis(table, -1, 0)
        return _Visit(
            costs,
            controlled(integrand, control),
            controlled(costs, cost_control),
            distance,
            1.0 if tilt.t == 0 else float(np.mean(acceptance)),
        )

    def _observed(self, node: _Node, model: Tilt) -> Tensor:
        """Cost, integrand, the control variates of both, and half the squared distance, ``[chains, 5]``."""
        tilt, x = node.tilt, self.chains.x
        slope = tilt.slope(x, self.chains.gradients)
        cost, half = self.chains.costs.to(x.device), squares(x) / 2
        of_cost = identity(model, x, slope, model.learned)
        integrand = tilt.b * (squares(x, tilt.curvature) / 2 - cost)
        control = tilt.b * (identity(model, x, slope, tilt.curvature) - of_cost)
        return torch.stack([cost, integrand, control, of_cost, half], dim=-1).cpu()

    def _passes(self, target: Tilt) -> tuple[list[_Node], list[dict[int, _Visit]], Array, Array]:
        """The nodes, what was found at them on both ways, and their weights, fine and coarse."""
        places, weights, coarse = nested_rule(self.nodes)
        nodes = [_Node(place, target.at(t=place)) for place in places.tolist()]
        last = len(nodes) - 1
        # The target's moments make the saddle, so it is watched for longer.
        shares = np.ones(len(nodes))
        shares[last] = 4.0
        passes: list[dict[int, _Visit]] = []
        total, done = 2 * shares.sum(), 0.0
        for order in (range(last, -1, -1), range(last + 1)):
            visits = {}
            for turn, place in enumerate(order):
                share, fresh = shares[place] / (total - done), place == last and turn == 0

                def visit(node: _Node = nodes[place], share: float = share, fresh: bool = fresh) -> list[Any]:
                    seen = self._visit(node, share, fresh=fresh)
                    return [part if isinstance(part, float) else part.tolist() for part in seen]

                *tables, acceptance = self._stretch(f"pass {len(passes)}, node {place}", visit)
                visits[place] = _Visit._make([*map(np.array, tables), acceptance])
                done += shares[place]
            passes.append(visits)
        return nodes, passes, weights, coarse

    def _summed(
        self, target: Tilt, nodes: list[_Node], passes: list[dict[int, _Visit]], weights: Array, coarse: Array
    ) -> dict[str, Any]:
        last = len(nodes) - 1

        def integral(rule: Array, part: slice | None = None) -> Array:  # [passes, chains]
            means = [
                np.stack([part_of(visits[place].integrand, part).mean(axis=1) for place in range(last + 1)])
                for visits in passes
            ]
            return np.stack([rule @ mean for mean in means])

        whole = integral(weights)
        chains = whole.shape[1]
        spread = whole.mean(axis=0).std(ddof=1) / math.sqrt(chains) * student(chains)
        halves = integral(weights, slice(0, 1)), integral(weights, slice(1, 2))
        drift, drift_noise = difference_of(*halves)
        there, back = whole
        loop, loop_noise = difference_of(there[None], back[None])
        schedule = float(abs((weights - coarse) @ self._means(passes, last)))
        level = target.at(t=0.0).log_normaliser(self.variance) + float(whole.mean())
        rows = [
            (row, centred)
            for visits in passes
            for row, centred in zip(visits[last].costs, visits[last].centred, strict=True)
        ]
        point, mean, variance, noise = self._crossed(target, rows, level)
        parts = {
            "chains": float(spread),
            "halves": max(0.0, abs(drift) - drift_noise),
            "directions": max(0.0, abs(loop) - loop_noise) / 2,
            "schedule": schedule,
            "saddle": noise,
        }
        value = point.log_volume
        acceptance = float(np.mean([visits[place].acceptance for visits in passes for place in visits]))
        ways = (halves[1] - halves[0]).mean(axis=1)  # of either pass
        sure = bool((ways > 0).all() or (ways < 0).all())
        self._doubt(drift, drift_noise, loop, loop_noise, mean, acceptance, value, passes[-1][last], sure)
        return {
            "log_volume": value,
            "error": math.sqrt(math.fsum(part**2 for part in parts.values())),
            **self._moments(target, point, mean, variance),
            "parts": parts,
            "tether": 1.0,
            "trace": tuple(self._trace(nodes, passes)),
            "acceptance": acceptance,
            "nodes": self.nodes,
            "weak": "; ".join(self.weak),
        }

    def _moments(self, target: Tilt, point: Saddle, mean: float, variance: float) -> dict[str, Any]:
        return {
            "method": "bridge",
            "inverse_temperature": point.b,
            "log_normaliser": point.log_normaliser,
            "mean_cost": mean,
            "cost_deviation": math.sqrt(variance),
            "learning_coefficient": target.b * mean,
            "sgld": self._langevin(target),
        }

    def _langevin(self, tilt: Tilt) -> dict[str, float]:
        """What Langevin dynamics from the anchor says, with its spread and its drift."""
        draws = self.settings.sgld_draws
        if not draws:
            return {}
        chains = self._chains()
        chains.x = torch.zeros_like(chains.x)
        coefficients = self._all(langevin_coefficient(chains, tilt.at(t=1.0, kappa=self.start.kappa), draws=draws))
        middle = draws // 2
        return {
            "learning_coefficient": float(coefficients[:, middle:].mean()),
            "chain_spread": float(coefficients[:, middle:].mean(axis=1).std(ddof=1)),
            "drift": float(coefficients[:, middle:].mean() - coefficients[:, :middle].mean()) if middle else math.nan,
            "draws": draws,
        }

    def _means(self, passes: list[dict[int, _Visit]], last: int) -> Array:
        return np.array([np.mean([found[place].integrand.mean() for found in passes]) for place in range(last + 1)])

    def _crossed(
        self, target: Tilt, rows: list[tuple[Array, Array]], level: float
    ) -> tuple[Saddle, float, float, float]:
        """The saddle, the mean and the variance of the cost, and the error that they bring, by leaving out chains.

        Args:
            target: The density that the rows are samples of.
            rows: Costs of one chain in a row each, and the same with a control variate taken off.
            level: log Z there, nats.
        """

        def point(without: int | None = None) -> tuple[Saddle, float, float]:
            kept = [pair for place, pair in enumerate(rows) if place != without]
            costs, centred = (np.concatenate(column) for column in zip(*kept, strict=True))
            mean, variance = float(centred.mean()), float(costs.var(ddof=1))
            found = saddle(level, target.b, mean, variance, self.cutoff)
            if found.width < COUNTED:
                inside = counted(level, target.b, costs, self.cutoff)
                found = found._replace(log_volume=inside, b=target.b, log_normaliser=level)
            return found, mean, variance

        blocks = len(rows)
        others = np.array([point(block)[0].log_volume for block in range(blocks)])
        found, mean, variance = point()
        spread = float(others.std()) * math.sqrt(blocks - 1) * student(blocks)
        # Chains that depend on themselves know their variance worse than leaving one out tells.
        widened = math.hypot(spread, _DEPENDENT * math.sqrt(2 / blocks))
        return found, mean, variance, math.hypot(widened, 1 / (8 * max(found.width, 0.5) ** 2))

    def _doubt(
        self,
        drift: float,
        noise: float,
        loop: float,
        loop_noise: float,
        mean: float,
        acceptance: float,
        value: float,
        visit: _Visit,
        sure: bool,
    ) -> None:
        """Notes what speaks against the number, and where both ways drift alike, on which side it lies."""
        if abs(drift) > max(2 * noise, 1.0, 2e-3 * abs(value)):
            way = f": the volume is {'too low' if drift > 0 else 'too high'}" if sure else ""
            self.weak.append(f"the chains still drift, by {drift:+.3g} nats between halves{way}")
        if abs(loop) > max(2 * loop_noise, 1.0, 5e-3 * abs(value)):
            self.weak.append(f"the way back differs from the way there by {loop:+.3g} nats")
        self._doubt_samples(mean, acceptance, value, visit.costs.size)

    def _doubt_samples(self, mean: float, acceptance: float, value: float, samples: int) -> None:
        if value > 0:
            self.weak.append(f"the logarithm of a probability cannot be {value:.3g}")
        if not 0.5 < mean / self.cutoff < 2:
            self.weak.append(f"the samples cost {mean:.3g} nats on average where the cutoff is {self.cutoff:g}")
        if acceptance < 0.3:
            self.weak.append(f"only {percentage(acceptance)} of the trajectories were accepted")
        if samples < 32:
            self.weak.append(f"only {samples} samples at the cutoff")

    def _trace(self, nodes: list[_Node], passes: list[dict[int, _Visit]]) -> list[dict[str, Any]]:
        rows = []
        for number, found in enumerate(passes):
            for place, visit in found.items():
                numbers = {
                    "mean_cost": float(visit.costs.mean()),
                    "distance": float(visit.distance.mean()),
                    "integrand": float(visit.integrand.mean()),
                    "acceptance": visit.acceptance,
                }
                node = nodes[place]
                rows.append(
                    {"way": ("there", "back")[number], "leg": "cost", "place": node.place, "kappa": node.tilt.kappa}
                    | numbers
                    | {"samples": visit.costs.size}
                )
        return rows

    def _by_importance(self, costs: Array, quadratic: Array) -> dict[str, Any]:
        """The volume from weighted draws; its error by leaving out one after the other."""
        base = self.start.log_normaliser(self.variance)
        whole = weighted_volume(costs, quadratic, self.start.b, base, self.cutoff)
        count = len(costs)
        others = [
            weighted_volume(np.delete(costs, place), np.delete(quadratic, place), self.start.b, base, self.cutoff)[0]
            for place in range(count)
        ]
        value, b, mean, deviation, log_normaliser = whole
        noise = float(np.std(others) * math.sqrt(count - 1))
        parts = {"draws": noise, "saddle": 1 / (8 * max(b * deviation, 0.5) ** 2)}
        return {
            "log_volume": value,
            "error": math.hypot(*parts.values()),
            "method": "importance",
            "inverse_temperature": b,
            "log_normaliser": log_normaliser,
            "mean_cost": mean,
            "cost_deviation": deviation,
            "learning_coefficient": b * mean,
            "sgld": self._langevin(self.start.at(b=b)),
            "parts": parts,
            "trace": (),
            "acceptance": 1.0,
            "nodes": 0,
            "weak": "",
            "tether": 1.0,
        }
