"""When to cut, to regrow and to judge: ramps, guards, and the state machine of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

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


Phase = Literal["warmup", "pruning", "recovery", "regrown", "done"]
EventKind = Literal["begin", "cut", "regrow", "finish"]


@dataclass(frozen=True)
class Event:
    """Something that is due.

    Args:
        kind: ``begin`` of a cycle, ``cut``, ``regrow``, or ``finish`` of a cycle.
        closed: Heads that are to be closed after it.
    """

    kind: EventKind
    closed: int


@dataclass(frozen=True)
class PlasticityState:
    """Where a run stands.

    Args:
        phase: ``warmup``, ``pruning`` (until the last cut), ``recovery`` (until heads regrow), ``regrown`` (until the
            cycle ends) or ``done``.
        cycle: Cycles that are finished.
        closed: Closed heads.
        closed_before: Closed heads as the cycle began.
        wanted: Closed heads that the ramp asks for by now.
        loss_before: Loss as the cycle began, nats.
        last_cut: Optimizer step of the last cut of the cycle.
        recovery_steps: Optimizer steps from the last cut until the loss was back, None as long as it is not.
        measured: Optimizer step of the last measurement of the loss.

    Example:
        >>> PlasticityState.from_dict(PlasticityState(cycle=1).to_dict()).cycle
        1
    """

    phase: Phase = "warmup"
    cycle: int = 0
    closed: int = 0
    closed_before: int = 0
    wanted: int = 0
    loss_before: float | None = None
    last_cut: int | None = None
    recovery_steps: int | None = None
    measured: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers and text."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PlasticityState:
        """Undoes :meth:`to_dict`.

        Raises:
            ValueError: A field is missing or unknown.
        """
        names = {each.name for each in fields(cls)}
        if set(values) != names:
            raise ValueError(f"the saved schedule has the fields {sorted(values)}; wanted {sorted(names)}")
        return cls(**values)


@dataclass(frozen=True)
class PlasticityPlan:
    """Cycles of cutting and regrowing heads, as a function from (state, step) to what is due.

    A cycle begins, closes heads along the ramp until ``target`` are closed, opens a fraction of the closed ones again,
    and ends; the next begins at once. Steps are optimizer steps from the start of the training. What is overdue, as
    after a step that counts for several optimizers, comes in order, of several overdue cuts only the last.

    Args:
        target: Heads that are closed after the last cut of every cycle.
        cycles: Number of cycles.
        warmup_steps: Steps before the first.
        steps_per_cycle: Length of each.
        ramp: The cuts.
        regrow_at: Steps from the beginning of a cycle until heads regrow.
        regrow_fraction: Share of the closed heads that is opened then.
        guard: How the loss is watched.

    Raises:
        ValueError: A value is out of range, or the parts of a cycle do not fit into it.

    Example:
        >>> plan = PlasticityPlan(target=4, cycles=1, warmup_steps=3, steps_per_cycle=10, regrow_at=6)
        >>> plan.due(PlasticityState(), 2), plan.due(PlasticityState(), 3)
        (None, Event(kind='begin', closed=0))
    """

    target: int
    cycles: int
    warmup_steps: int
    steps_per_cycle: int
    ramp: Ramp = field(default_factory=Ramp)
    regrow_at: int = 1
    regrow_fraction: float = 0.5
    guard: Guard = field(default_factory=Guard)

    def __post_init__(self) -> None:
        for name, value, least in (("cycles", self.cycles, 1), ("warmup_steps", self.warmup_steps, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        if self.target < 1:
            raise ValueError(f"at least one head must be cut per cycle; got {self.target}")
        if not 0 <= self.regrow_fraction <= 1:
            raise ValueError(f"regrow_fraction is a share of the closed heads, in [0, 1]; got {self.regrow_fraction}")
        ramp = 0 if self.ramp.shape == "one_shot" else self.ramp.steps
        if not ramp < self.regrow_at <= self.steps_per_cycle:
            raise ValueError(
                f"a cycle of {self.steps_per_cycle} steps cannot cut for {ramp} steps and regrow at {self.regrow_at}: "
                "wanted ramp_steps < regrow_at <= steps_per_cycle; make cycles longer or fewer"
            )
        if self.cycles > 1 and self.regrown(self.target) == self.target:
            raise ValueError(
                f"cycles={self.cycles}, but regrow_fraction={self.regrow_fraction} of {self.target} closed heads "
                "regrows none, so that later cycles have nothing to cut; take cycles=1 or a larger fraction"
            )

    @property
    def last_step(self) -> int:
        """Optimizer step at which the last cycle ends."""
        return self.warmup_steps + self.cycles * self.steps_per_cycle

    def regrown(self, closed: int) -> int:
        """Heads that stay closed of those that are closed when heads regrow."""
        unit = self.ramp.unit
        return max(0, closed - unit * math.floor(self.regrow_fraction * closed / unit + 0.5))

    def due(self, state: PlasticityState, step: int) -> Event | None:
        """What is to be done next at this optimizer step, if anything; ask again after :meth:`after`."""
        into = step - self.warmup_steps - state.cycle * self.steps_per_cycle
        if state.phase == "done" or into < 0:
            return None
        if state.phase == "warmup":
            return Event("begin", state.closed)
        if state.phase == "pruning":
            course = self.ramp.course(state.closed_before, self.target)
            overdue = [closed for offset, closed in course if offset <= into and closed > state.wanted]
            if overdue:
                return Event("cut", overdue[-1])
        if state.phase in ("pruning", "recovery") and into >= self.regrow_at and self._regrows(state):
            return Event("regrow", self.regrown(state.closed))
        return Event("finish", state.closed) if into >= self.steps_per_cycle else None

    def after(self, state: PlasticityState, event: Event, step: int, *, closed: int, loss: float) -> PlasticityState:
        """The state once an event has happened.

        Args:
            state: Before it.
            event: What :meth:`due` gave.
            step: Optimizer step.
            closed: Heads that are closed now (after ``finish``: with the verdict carried out).
            loss: At ``begin`` and ``finish`` the loss of the weights found, before any verdict, and of the model that
                is left after ``cut`` and ``regrow``; nats.
        """
        if event.kind == "begin":
            return replace(
                state,
                phase="pruning",
                closed=closed,
                closed_before=closed,
                wanted=closed,
                loss_before=loss,
                last_cut=None,
                recovery_steps=None,
                measured=step,
            )
        if event.kind == "cut":
            last = event.closed >= self.target
            phase: Phase = "recovery" if last else "pruning"
            state = replace(state, phase=phase, closed=closed, wanted=event.closed, last_cut=step)
            return self.observed(state, step, loss)
        if event.kind == "regrow":
            return replace(state, phase="regrown", closed=closed, measured=step)
        # The next cycle's beginning is due at once.
        over = self.verdict(state, loss) == "stop" or state.cycle + 1 == self.cycles
        return replace(state, phase="done" if over else "warmup", cycle=state.cycle + 1, closed=closed, measured=step)

    def verdict(self, state: PlasticityState, loss: float) -> Verdict:
        """What becomes of the cycle that ends with this loss, nats."""
        assert state.loss_before is not None
        return self.guard.verdict(state.loss_before, loss)

    def measures(self, state: PlasticityState, step: int) -> bool:
        """Whether the loss is to be measured now, for the course of the recovery."""
        return state.phase in ("pruning", "recovery", "regrown") and step - state.measured >= self.guard.measure_every

    def observed(self, state: PlasticityState, step: int, loss: float) -> PlasticityState:
        """The state once the loss has been measured, nats."""
        state = replace(state, measured=step)
        if state.phase not in ("recovery", "regrown") or state.recovery_steps is not None:
            return state
        assert state.loss_before is not None
        if state.last_cut is None or not loss <= state.loss_before + self.guard.within:
            return state
        return replace(state, recovery_steps=step - state.last_cut)

    def _regrows(self, state: PlasticityState) -> bool:
        return self.regrown(state.closed) < state.closed
