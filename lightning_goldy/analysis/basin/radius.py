"""Where a cost reaches a cutoff along a ray, in as few evaluations as can be."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

# Largest step of one extrapolation, as a factor of the radius.
_LARGEST_STEP = math.log(32.0)
# A cost that is not finite says only that the point is outside.
_STEP_BACK = math.log(4.0)
# What a slope taken from elsewhere may be off by, as a fraction of it.
_BORROWED = 1 / 3
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
    slope: float = 2.0,
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
        slope: First guess of d log cost / d log radius at the cutoff.
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
    search = _Search(cutoff, rtol, slope, bend, math.log(max_radius))
    x = min(math.log(start), search.limit)
    for count in range(1, max_evaluations + 1):
        value = cost(math.exp(x))
        search.add(x, value)
        if search.accepted():
            return Crossing(
                math.exp(search.corrected()), search.best_cost, search.slope_at_best(), count, search.bend_at_best()
            )
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

    @property
    def best_cost(self) -> float:
        return self.points[0][2] if self.points else self.inside

    def accepted(self) -> bool:
        if self.high - self.low <= self.rtol * _JUMP:
            return True
        if not self.points:
            return False
        miss = abs(self.points[0][1])
        # A secant's slope is that of the middle; slopes are taken to change by at most their own size per factor e.
        unsure = _BORROWED if self._secant() is None else 0.05 + abs(self.points[1][0] - self.points[0][0]) / 2
        return miss <= self.rtol and miss * unsure <= self.rtol / 10

    def _secant(self) -> float | None:
        if len(self.points) < 2:
            return None
        (x, y, _), (other_x, other_y, _) = self.points[:2]
        if x == other_x:
            return None
        slope = (other_y - y) / (other_x - x)
        return slope if slope > _FLAT else None

    def _flat(self) -> bool:
        """Whether the cost is known to hardly grow, so that its next value is far away."""
        return len(self.points) > 1 and self._secant() is None

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
        found = x - y / self.slope_at_best()
        return min(max(found, self.low), self.high, self.limit) if self.low < self.high else found

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
        elif math.isfinite(low) and (guess <= low or self._flat()):
            guess = low + _LARGEST_STEP
        elif math.isfinite(high) and guess >= high:
            guess = high - _STEP_BACK
        return min(guess, self.limit)
