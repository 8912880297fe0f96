"""The parts of the schedule of head plasticity: the ramp of a cycle, the watch over the loss, the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_goldy.core.naming import suggestion

Shape = Literal["cubic", "linear", "one_shot"]
WhenExceeded = Literal["ignore", "stop", "roll_back"]
Verdict = Literal["keep", "stop", "roll_back"]


@dataclass(frozen=True)
class Ramp:
    r"""How the number of closed heads rises within a cycle.

    .. math:: c_i = c_0 + (c_n - c_0) \left(1 - (1 - i / n)^3\right)

    after the i-th of n cuts, which are evenly spaced; ``linear`` has the exponent 1, and ``one_shot`` is one cut as the
    cycle begins.

    Args:
        shape: ``cubic``, ``linear`` or ``one_shot``.
        steps: From the beginning of the cycle to the last cut, optimizer steps; 0 is one cut at once.
        cuts: Number of cuts n, at most one per step.
        unit: Heads that are cut together.

    Raises:
        ValueError: A value is unknown or out of range.

    Source: Zhu and Gupta 2017, "To prune, or not to prune", equation 1.

    Example:
        >>> Ramp("cubic", steps=8, cuts=4).course(0, 10)
        ((2, 6), (4, 9), (6, 10))
        >>> Ramp("one_shot").course(3, 10)
        ((0, 10),)
    """

    shape: Shape = "cubic"
    steps: int = 0
    cuts: int = 4
    unit: int = 1

    def __post_init__(self) -> None:
        if self.shape not in get_args(Shape):
            raise ValueError(f"unknown shape of the schedule {self.shape!r}; {suggestion(self.shape, get_args(Shape))}")
        for name, value, least in (("ramp_steps", self.steps, 0), ("cuts", self.cuts, 1), ("unit", self.unit, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")

    def course(self, start: int, target: int) -> tuple[tuple[int, int], ...]:
        """The cuts of a cycle: (steps since its beginning, heads that are closed from then on).

        Args:
            start: Closed heads as the cycle begins.
            target: Closed heads after the last cut.
        """
        if target <= start:
            return ()
        if self.shape == "one_shot" or self.steps == 0:
            return ((0, target),)
        cuts, power = min(self.cuts, self.steps), 3 if self.shape == "cubic" else 1
        units, closed, course = (target - start) / self.unit, start, []
        for number in range(1, cuts + 1):
            share = 1 - (1 - number / cuts) ** power
            wanted = target if number == cuts else min(target, start + self.unit * math.floor(units * share + 0.5))
            if wanted > closed:
                closed = wanted
                course.append((math.floor(number * self.steps / cuts + 0.5), closed))
        return tuple(course)


@dataclass(frozen=True)
class Guard:
    """How the loss is watched, and what happens when a cycle costs too much.

    Args:
        measure_every: Optimizer steps between two measurements within a cycle.
        within: The loss has recovered when it is back within this of the loss before the cut, nats.
        tolerance: How far the loss may have risen over a cycle, nats; None for any distance.
        when_exceeded: ``roll_back`` to the beginning of the cycle, ``stop`` cutting for the rest of the run, or
            ``ignore``.

    Raises:
        ValueError: A value is unknown or out of range.

    Example:
        >>> Guard(tolerance=0.1).verdict(2.0, 2.2)
        'roll_back'
    """

    measure_every: int = 1
    within: float = 0.02
    tolerance: float | None = None
    when_exceeded: WhenExceeded = "roll_back"

    def __post_init__(self) -> None:
        if self.measure_every < 1:
            raise ValueError(f"measure_every_n_steps must be at least 1; got {self.measure_every}")
        for name, value in (("within", self.within), ("tolerance", self.tolerance)):
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name} is a loss in nats, finite and not negative; got {value}")
        if self.when_exceeded not in get_args(WhenExceeded):
            raise ValueError(
                f"unknown when_exceeded {self.when_exceeded!r}; "
                f"{suggestion(self.when_exceeded, get_args(WhenExceeded))}"
            )

    def verdict(self, before: float, after: float) -> Verdict:
        """What becomes of a cycle that took the loss from ``before`` to ``after``, nats."""
        # Written so that a loss that is not a number counts as too high.
        if self.tolerance is None or self.when_exceeded == "ignore" or after <= before + self.tolerance:
            return "keep"
        return self.when_exceeded


def rate_multiplier(steps: int, peak: float, decay_steps: int) -> float:
    r"""What the updates of a cut layer's attention are multiplied by.

    .. math:: 1 + (m - 1) \max(0,\, 1 - t / d)

    Args:
        steps: Optimizer steps t since the layer was cut.
        peak: m, right after the cut.
        decay_steps: d, until it is 1 again.

    Example:
        >>> [rate_multiplier(steps, 3.0, 4) for steps in (0, 1, 4, 9)]
        [3.0, 2.5, 1.0, 1.0]
    """
    return 1 + (peak - 1) * max(0.0, 1 - steps / decay_steps)
