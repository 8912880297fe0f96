r"""The bridge of a network: from a tether so tight that a Gaussian is exact, loosened to the prior, and back.

Around a network no Gaussian is like the region that a cutoff leaves: which directions cost anything changes within a
small part of the prior's width. But under a tether :math:`\tfrac\kappa2 |x|^2` that is tight enough one is, and from
there κ is lowered in many small steps to 1/σ², with

.. math:: \frac{d \log Z}{d \log \kappa} = -\Big\langle \tfrac\kappa2 |x|^2 \Big\rangle
    = -\tfrac D2 + \tfrac12 \Big\langle b\, x^\top \nabla K
    - \frac{a^\top (a / \sigma^2 + b \nabla K)}{\kappa \sigma^2} \Big\rangle

The second form is Stein's identity: :math:`|x|^2` takes as long as the slowest direction to settle and lags behind κ,
while what the cost pulls at settles within a trajectory. But along a direction that the cost holds firmly the gradient
is as noisy as it is steep, and :math:`x_i^2` settles at once. So where chains then agree far better, the identity is
weighted direction by direction by how much of the precision is the tether's: what is taken off is

.. math:: \sum_i \frac{\kappa}{\Lambda_i} \Big[ \tfrac12 \big((x_i - m_i)\, \partial_i U - 1\big)
    + m_i\, \partial_i U \Big], \qquad \Lambda = \kappa + b F, \quad m = -\frac{a}{\sigma^2 \Lambda}

whose mean is 0 whatever F is taken for, which is the second form where the cost is flat, and which leaves no noise at
all where U is the quadratic with the curvature F.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_goldy.analysis.basin.bridge import Bridge, BridgeSettings, Strayed
from lightning_goldy.analysis.basin.saddle import Array, effective_share, student, trusted
from lightning_goldy.analysis.basin.sampling import Field, Tilt, identity, squares
from lightning_goldy.core.files import percentage
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.vector import derived_seed

# Draws that show whether a Gaussian is exact enough, those that its normaliser is then corrected by, and the share of
# them that the weights must leave.
_LOOK, _DRAWS, _EFFECTIVE = 16, 128, 0.5
# How often the tether is doubled before there is none that is tight enough.
_DOUBLINGS = 40
# Places of the tether at which curvature and steps are kept, and the share of a trajectory in what is learnt.
_PLACES, _MEMORY = 8, 0.1
# Leapfrog steps of a trajectory at most, and trajectories of a way at least, where the budget has them.
_LONGEST, _LEAST = 32, 24
# Masses tell of what is steepest along a direction; what is flat there takes longer to turn, and chains that start anew
# before it has turned spread as the square root of their steps. So trajectories are as many times as long, and at most
# so many steps, where the budget still has so many of them that the tether moves little within one: with a quarter as
# many, chains that it draws in ahead of them left an error 18 times as large around a Llama of 13,608 parameters.
_TIMES, _FARTHEST, _MANY = 4, 128, 256
# Time goes as u + 4 u^4 over the share u of log κ: chains take long to settle where the tether is loose.
_DWELL, _POWER = 4.0, 4
# Shares of the gradients: the first way, the search for the inverse temperature, and for each round its ways and its
# rest at the loose end. The second round is slower, so that their difference tells what speed does.
_SETTLING, _SEEKING, _ROUNDS = 0.15, 0.15, ((0.08, 0.04), (0.21, 0.08))
# How strongly steps follow the acceptance while chains settle, and while they are watched.
_GAIN, _SLOW_GAIN = 0.3, 0.1
# Below which acceptance a chain's step is cut at once, and by how much in its logarithm.
_REFUSED, _CUT = 0.1, 0.2
# By how much drawing in the tether may raise a chain's cost.
_LEVEL = 1.1
# Between which shares of the squared distance at which they would be settled chains count as such.
_SETTLED = 0.9, 1.1
# Below which share of its deviation a noisy integrand is left for one that lags more.
_NOISY = 0.5
# Samples that would have to ask for a control variate before it is taken at half of what they ask for.
_SHRUNK = 10.0
# By how much masses are rounded in their logarithms: sums over ranks differ in their last digits.
_ROUNDING = 16 / math.log(2)


class _Way(NamedTuple):
    """What chains found while the tether went from one end to the other; arrays of shape ``[chains, trajectories]``."""

    kappas: Array
    integrand: Array
    plain: Array
    """Half of κ |x|^2, whose mean is the integrand's where chains have settled."""
    costs: Array
    acceptance: Array
    eased: Array | None = None
    """The integrand with the identity weighted by how flat the cost is; it has less noise and lags more."""

    def mixed(self, places: Array) -> _Way:
        """The same with as much of the plain integrand in it as makes its noise least, at each place of κ.

        Both have one mean where chains have settled; where they have not, nothing is mixed in.
        """
        integrand = self.integrand.copy()
        for place in np.unique(places):
            here = places == place
            control = integrand[:, here] - self.plain[:, here]
            spread = control - control.mean()
            square = float((spread**2).mean())
            if square > 0 and math.isfinite(square) and trusted(integrand[:, here], control):
                asked = float((spread * integrand[:, here]).mean()) / square
                integrand[:, here] -= min(max(asked, 0.0), 1.0) * control.size / (control.size + _SHRUNK) * control
        return self._replace(integrand=integrand)

    def integral(self, every: int = 1) -> Array:
        """Over log κ by the trapezoidal rule, of each chain, nats."""
        chosen = np.unique(np.append(np.arange(0, len(self.kappas), every), len(self.kappas) - 1))
        logs = np.log(self.kappas[chosen])
        return np.abs(np.diff(logs)) @ ((self.integrand[:, chosen[1:]] + self.integrand[:, chosen[:-1]]) / 2).T


class TetherWalk(Bridge):
    """A bridge whose chains are let out on a tether; see :class:`~lightning_goldy.analysis.basin.Bridge`."""

    def walked(self) -> dict[str, Any]:
        """The fields of the result, but the share of the importance sampler's draws."""
        self.chains = self._chains()
        self.low, self.nodes, self.turn, self.odd = self.start.kappa, 0, 0.0, False
        self.learned: list[Tensor] = []
        self.steps_at: list[Tensor] = []
        self.tilt = self.start.at(t=1.0)
        if not self._resumed():
            self.done["before"] = self.taken
            self.done["first hold"] = self._tight(self.start)
            self.chains.draw(self.start.at(kappa=self.done["first hold"][0]))
            self.taken += self.settings.chains
        # Curvature and steps are kept there, however tight the tether has to be at the temperature that is found.
        self.high = self.kept = self.done["first hold"][0]
        self._stretch("loosened", self._loosen)
        self._stretch("sought", self._seek)
        target = self.tilt
        near = self.done["first hold"][-1]
        self.high, base, base_noise, _ = self._stretch("hold", lambda: self._tight(target, near))
        rounds: list[tuple[_Way, ...]] = []
        for number, (way, rest) in enumerate(_ROUNDS):
            ends = (self.low, self.high, way), (self.high, self.low, way), (self.low, self.low, rest)
            ways = [
                self._stretch(
                    f"round {number}, way {turn}", partial(self._watched, target, *walk, learning=number == 0)
                )
                for turn, walk in enumerate(ends)
            ]
            rounds.append(tuple(_Way(*map(np.array, found)) for found in ways))
        return self._ended(self._concluded(target, rounds, base, base_noise))

    def _put_back(self, numbers: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super()._put_back(numbers, tensors)
        self.turn, self.odd, place = numbers["turn"], numbers["odd"], self.start.pull
        kept = [tensors[f"learned {index}"].to(place.device, place.dtype) for index in range(numbers["distinct"])]
        self.learned = [kept[index] for index in numbers["learned"]]
        rows = ([row[own] for own in self.numbers] for row in numbers["steps_at"])
        self.steps_at = [torch.tensor(row, dtype=torch.float64) for row in rows]

    def _state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        numbers, tensors = super()._state()
        # Places that were passed within one trajectory share what was learnt.
        distinct = {id(learned): learned for learned in self.learned}
        order = list(distinct)
        numbers |= {
            "turn": self.turn,
            "odd": self.odd,
            "learned": [order.index(id(learned)) for learned in self.learned],
            "steps_at": [self._all(steps).tolist() for steps in self.steps_at],
            "distinct": len(order),
        }
        return numbers, tensors | {f"learned {index}": distinct[key] for index, key in enumerate(order)}

    @property
    def _own(self) -> int:
        """Gradients in all but those that were taken before the walk."""
        return self.settings.max_gradients - int(self.done["before"])

    def _begun(self, **first: Any) -> dict[str, Any]:
        """What the loop of a stretch goes on from; kept before a step where that is due."""
        if not self.loop:
            self.loop = {"first": self.taken, **first}
        elif self.file.due:
            self._keep()
        return self.loop

    def _tight(self, tilt: Tilt, near: int = 1) -> tuple[float, float, float, int]:
        """The least doubling of κ whose Gaussian is exact but for weights, log Z there, its error, and the doublings.

        Args:
            tilt: The density.
            near: Doublings that are looked at first; from there on strides grow until the least lies between two.
        """

        def holds(doublings: int) -> bool:
            return doublings > 0 and self._weighed(tilt, doublings, _LOOK)[0] >= _EFFECTIVE

        low, high, stride = 0, near, 1
        if holds(near):
            while holds(low := max(0, high - stride)):
                high, stride = low, 2 * stride
        else:
            while high < _DOUBLINGS and not holds(high):
                low, high, stride = high, min(high + stride, _DOUBLINGS), 2 * stride
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if holds(middle) else (middle, high)
        share, level, noise = self._weighed(tilt, high, _DRAWS)
        while share < _EFFECTIVE and high < _DOUBLINGS:
            high += 1
            share, level, noise = self._weighed(tilt, high, _DRAWS)
        if not share > 1 / _LOOK:
            raise ValueError(
                f"no tether makes the cost a quadratic one, not even {2.0**high:g} / sigma^2: is it smooth at the "
                "anchor?"
            )
        if share < _EFFECTIVE:
            self.weak.append(f"weights leave only {percentage(share)} of the draws at the tightest tether")
        return self.start.kappa * 2.0**high, level, noise, high

    def _weighed(self, tilt: Tilt, doublings: int, wanted: int) -> tuple[float, float, float]:
        """What weights leave of draws of the Gaussian at so many doublings of κ, log Z there, and its error."""
        gaussian = tilt.at(t=0.0, kappa=self.start.kappa * 2.0**doublings)
        # Noise of its own, so that a number does not depend on what else was looked at.
        chains = self._chains(derived_seed(self.seed, "hold", doublings))
        logs: list[Array] = []
        while sum(map(len, logs)) < wanted:
            x = chains.noise() * gaussian.precision.rsqrt() + gaussian.centre
            logs.append(tilt.b * self._all(squares(x, tilt.curvature).cpu() / 2 - self.field.values(x)))
            if effective_share(np.concatenate(logs)) < _EFFECTIVE and sum(map(len, logs)) >= _LOOK:
                break
        joined = np.concatenate(logs)
        weights = np.exp(joined - joined.max())
        level = gaussian.log_normaliser(self.variance) + float(joined.max()) + math.log(weights.mean())
        return effective_share(joined), level, float(weights.std() / weights.mean()) / math.sqrt(len(joined))

    def _place(self, kappa: float) -> int:
        share = math.log(self.kept / kappa) / math.log(self.kept / self.low)
        return min(max(round((_PLACES - 1) * share), 0), _PLACES - 1)

    def _places(self, way: _Way) -> Array:
        return np.array([self._place(kappa) for kappa in way.kappas])

    def _stages(self, begin: float, end: float, share: float, first: int) -> Iterator[tuple[float, int]]:
        """κ and the mean length of each trajectory, from one end to the other in a share of the gradients.

        Args:
            begin: κ at the one end.
            end: At the other.
            share: Of the walk's own gradients.
            first: Gradients that were taken when the way began.
        """
        # What earlier ways took beyond their shares is not taken twice.
        quota = min(share * self._own, self.settings.max_gradients - first)
        grid = np.linspace(0, 1, 513)
        passed = (grid + _DWELL * grid**_POWER) / (1 + _DWELL)
        down = end <= begin
        while True:
            step = math.exp(float(self._all(self.chains.steps).mean()))
            has, quarter = quota / self.settings.chains, math.pi / 2 / step
            length = max(1, min(_LONGEST, round(quarter), int(has / _LEAST)))
            length = max(length, min(_FARTHEST, round(_TIMES * quarter), int(has / _MANY)))
            spent, rest = self.taken - first, quota - 1.5 * length * self.settings.chains
            if spent >= rest:
                break
            share = spent / rest
            left = float(np.interp(share if down else 1 - share, passed, grid))
            yield max(begin, end) * (min(begin, end) / max(begin, end)) ** left, length
        yield end, length

    def _step(self, tilt: Tilt, mean_length: int, gain: float) -> None:
        """One trajectory of every chain, of a jittered length that the budget has."""
        # Of every two trajectories one is as much longer as the other is shorter, so that a way takes its share.
        self.turn = 1 - self.turn if self.odd else float(torch.rand((), generator=self.chains.turns, device="cpu"))
        self.odd, jitter = not self.odd, 0.7 + 0.6 * self.turn
        affordable = max(1, (self.settings.max_gradients - self.taken) // self.settings.chains)
        length = max(1, min(round(jitter * mean_length), affordable))
        self.chains.move(tilt, length, gain=gain)
        # Among chains that all move nobody would notice one that stands still for long.
        self.chains.steps = self.chains.steps - _CUT * (self.chains.acceptance < _REFUSED)
        self.taken += length * self.settings.chains
        self.tell(min(self.taken, self.settings.max_gradients), self.settings.max_gradients)

    def _learned_from(self, tilt: Tilt) -> Tilt:
        r"""Curvature from :math:`b \langle (\partial_i K)^2 \rangle`, which in equilibrium is that of b K."""
        found = self.replicas.sum_(self.chains.gradients.double().square().sum(dim=0)) * (tilt.b / self.settings.chains)
        learned = torch.lerp(tilt.learned, found.to(tilt.learned.dtype), _MEMORY)
        rounded = (learned.clamp(min=1e-30).log() * _ROUNDING).round().div(_ROUNDING).exp()
        return tilt.at(learned=torch.where(torch.isfinite(rounded), rounded, tilt.learned))

    def _loosen(self) -> None:
        """A first way out, on which curvature and steps are learnt at each place."""
        for kappa, length in self._stages(self.high, self.low, _SETTLING, self._begun()["first"]):
            self._begun()
            self.tilt, place = self.tilt.at(kappa=kappa), self._place(kappa)
            self._step(self.tilt, length, _GAIN)
            self.tilt = self._learned_from(self.tilt)
            if place >= _PLACES - 2:
                self.tilt = self._cooled(self.tilt, 0.1)
            del self.learned[place:], self.steps_at[place:]
            missing = place + 1 - len(self.learned)
            self.learned += missing * [self.tilt.learned]
            self.steps_at += missing * [self.chains.steps]

    def _seek(self) -> None:
        """Finds the inverse temperature at which the mean cost is the cutoff."""
        loop = self._begun(logs=[math.log(self.tilt.b)], late=0)
        begin, logs = loop["first"], loop["logs"]
        self.tilt = self.tilt.at(kappa=self.low)
        for _, length in self._stages(self.low, self.low, _SEEKING, begin):
            self._begun()
            self._step(self.tilt, length, _GAIN)
            self.tilt = self._learned_from(self.tilt)
            loop["late"] += self.taken > begin + 0.4 * _SEEKING * self._own
            self.tilt = self._cooled(self.tilt, 1 / (3 + loop["late"]) if loop["late"] else 0.3)
            logs.append(math.log(self.tilt.b))
        self.learned[-1], self.steps_at[-1] = self.tilt.learned, self.chains.steps
        self.tilt = self.tilt.at(b=math.exp(float(np.mean(logs[len(logs) // 2 :]))))

    def _cooled(self, tilt: Tilt, rate: float) -> Tilt:
        """A step of the inverse temperature towards that at which the mean cost is the cutoff."""
        mean = float(self._all(self.chains.costs).mean())
        shift = max(-1.0, min(1.0, math.log(mean / self.cutoff))) if math.isfinite(mean) and mean > 0 else 1.0
        return tilt.at(b=max(tilt.b * math.exp(rate * shift), 1e-9 / self.cutoff))

    def _watched(self, target: Tilt, begin: float, end: float, share: float, *, learning: bool) -> list[Any]:
        """Lets the tether go from one end to the other and watches the chains; the fields of a way, as lists."""
        chains = self.chains
        loop = self._begun(place=None, kappas=[], rows=[], acceptance=[])
        for kappa, length in self._stages(begin, end, share, loop["first"]):
            self._begun()
            place = self._place(kappa)
            if place != loop["place"]:
                chains.steps, loop["place"] = self.steps_at[place], place
            tilt = target.at(kappa=kappa, learned=self.learned[place])
            before = loop["kappas"][-1] if loop["kappas"] else begin
            if kappa > before:  # what is flat would lag behind a tether that draws in; nothing is in its way
                self._carry(tilt.at(kappa=before), tilt, halvings=0, steep=_LEVEL)
            self._step(tilt, length, _GAIN if learning else _SLOW_GAIN)
            if learning:
                self.learned[place] = self._learned_from(tilt).learned
            loop["kappas"].append(kappa)
            self.steps_at[place] = chains.steps
            loop["rows"].append(self._all(self._observed_on(tilt)).tolist())
            loop["acceptance"].append(float(self._all(chains.acceptance).mean()))
        # [trajectories, chains, 4] -> [integrand, plain, costs, eased], [chains, trajectories]
        columns = np.array(loop["rows"]).transpose(2, 1, 0).tolist()
        return [loop["kappas"], *columns[:3], loop["acceptance"], columns[3]]

    def _observed_on(self, tilt: Tilt) -> Tensor:
        """The integrand by Stein's identity, as it is, the cost, and the first one eased, ``[chains, 4]``."""
        x, plain = self.chains.x, squares(self.chains.x) * (tilt.kappa / 2)
        slope, centre = tilt.slope(x, self.chains.gradients), tilt.pull / -tilt.kappa
        known = (((x - centre) * slope - 1) / 2 + centre * slope).sum(-1, dtype=torch.float64)
        # What is learnt is F times the share of the precision that the cost has, whose inverse this is.
        learned = tilt.learned
        model = tilt.at(learned=(learned + (learned * (learned + 4 * tilt.kappa / tilt.b)).sqrt()) / 2)
        eased = plain - identity(model, x, slope, tilt.kappa)
        return torch.stack([plain - known, plain, self.chains.costs.to(x.device), eased], dim=-1).cpu()

    def _concluded(
        self, target: Tilt, rounds: list[tuple[_Way, ...]], base: float, base_noise: float
    ) -> dict[str, Any]:
        rounds = self._quiet(rounds)
        ups, downs = (np.stack([found[way].integral() for found in rounds]) for way in (0, 1))  # [rounds, chains]
        both = (ups + downs) / 2
        values, chains = both.mean(axis=1), both.shape[1]
        widened = student(chains) / math.sqrt(chains)
        noise, loop_noise = both[-1].std(ddof=1) * widened, (ups - downs)[-1].std(ddof=1) * widened
        loop, moved = float((ups - downs)[-1].mean()), float(values[-1] - values[0])
        coarse = np.mean([way.integral(2).mean() for way in rounds[-1][:2]]) - values[-1]
        rows = [(row, row) for found in rounds for row in found[2].costs]
        point, mean, variance, saddle_noise = self._crossed(target, rows, base + float(values[-1]))
        last = rounds[-1][2]
        spread = float(last.plain.mean() / last.integrand.mean())
        parts = {
            "chains": float(noise),
            "directions": float(max(0.0, abs(loop) - loop_noise)) / 2,
            "schedule": math.hypot(moved, coarse / 3),
            "start": base_noise,
            "saddle": saddle_noise,
        }
        acceptance = float(np.mean([way.acceptance.mean() for way in rounds[-1]]))
        self.nodes = len(rounds[-1][0].kappas)
        error = math.sqrt(math.fsum(part**2 for part in parts.values()))
        self._doubt_walk(error, moved, spread, point.log_volume)
        self._doubt_samples(mean, acceptance, point.log_volume, sum(row.size for row, _ in rows))
        return {
            "log_volume": point.log_volume,
            "error": error,
            **self._moments(target, point, mean, variance),
            "parts": parts,
            "trace": tuple(self._told(rounds)),
            "acceptance": acceptance,
            "nodes": self.nodes,
            "weak": "; ".join(self.weak),
            "tether": self.high / self.low,
        }

    def _quiet(self, rounds: list[tuple[_Way, ...]]) -> list[tuple[_Way, ...]]:
        """The rounds with the identity alone, or with one that has less noise where chains then agree far better."""

        def noise(rounds: list[tuple[_Way, ...]]) -> float:
            return float((rounds[-1][0].integral() + rounds[-1][1].integral()).std())

        def mixed(rounds: list[tuple[_Way, ...]]) -> list[tuple[_Way, ...]]:
            return [(*(way.mixed(self._places(way)) for way in found[:2]), found[2]) for found in rounds]

        others = [
            tuple(way._replace(integrand=way.eased) for way in found if way.eased is not None) for found in rounds
        ]
        whole = all(len(other) == len(found) for other, found in zip(others, rounds, strict=True))
        best = min([mixed(rounds), *([mixed(others)] if whole else [])], key=noise)
        return best if noise(best) < _NOISY * noise(rounds) else rounds

    def _doubt_walk(self, error: float, moved: float, spread: float, value: float) -> None:
        if _doubtful(error, value):
            self.weak.append(f"the error is {percentage(error / abs(value))} of the number")
        if _doubtful(moved, value):
            self.weak.append(f"the slower walk moved the number by {moved:+.3g} nats")
        if not _SETTLED[0] < spread < _SETTLED[1]:
            self.weak.append(
                f"the chains have spread to {percentage(spread)} of the squared distance at which they would be settled"
            )

    def _told(self, rounds: list[tuple[_Way, ...]]) -> list[dict[str, Any]]:
        """A row for every place of every way."""
        rows = []
        for number, found in enumerate(rounds, 1):
            for name, way in zip(("back", "there", "rest"), found, strict=True):
                places = self._places(way)
                for place in dict.fromkeys(places.tolist()):
                    here = places == place
                    numbers = {
                        "kappa": float(np.exp(np.log(way.kappas[here]).mean())),
                        "mean_cost": float(way.costs[:, here].mean()),
                        "distance": float((way.plain[:, here] / way.kappas[here]).mean()),
                        "integrand": float(way.integrand[:, here].mean()),
                        "acceptance": float(way.acceptance[here].mean()),
                        "samples": int(here.sum()) * len(way.costs),
                    }
                    where = {"round": number, "way": name, "leg": "tether", "place": place / (_PLACES - 1)}
                    rows.append(where | numbers)
        return rows


def _doubtful(nats: float, value: float) -> bool:
    return abs(nats) > max(1.0, 0.25 * abs(value))


def crossed(
    cost: Field,
    tilt: Tilt,
    cutoff: float,
    settings: BridgeSettings,
    *,
    seed: int = 0,
    replicas: Replicas = Replicas(),  # noqa: B008 - frozen
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The fields of the result by the path that the settings name, or by the one that the cost asks for.

    Args:
        cost: The field.
        tilt: As for :class:`~lightning_goldy.analysis.basin.Bridge`, like the others.
        cutoff: c, nats.
        settings: How.
        seed: Decides all noise.
        replicas: Ranks that share out the chains.
        progress: Called with (gradients taken, gradients in all).
    """
    options: dict[str, Any] = {"seed": seed, "replicas": replicas, "progress": progress}
    bridge = Bridge(cost, tilt, cutoff, settings, **options)
    if settings.path == "cost":
        return bridge.run()
    tethered = TetherWalk(cost, tilt, cutoff, settings, **options)
    if settings.path == "tether":
        return tethered.walked() | {"effective_sample_size": bridge.importance()[2]}
    found, share = bridge.drawn()
    if found is None:
        found = _walked(bridge, tethered)
    return found | {"effective_sample_size": share}


def _walked(bridge: Bridge, tethered: TetherWalk) -> dict[str, Any]:
    """The fields from the Gaussian's chains where these stay near it, else from those on a tether."""
    if not tethered.interrupted and bridge.near():
        bridge.may_stray = False
        try:
            return bridge.walked()
        except Strayed:
            tethered.taken = bridge.taken
    return tethered.walked()
