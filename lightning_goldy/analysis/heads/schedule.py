"""When heads are cut, regrown and judged: the settings, and the plan of steps and heads that follows for a model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, get_args

from lightning_goldy.analysis.heads.importance import DEFAULT_WEIGHTS, RegrowChoice, check_weights
from lightning_goldy.analysis.heads.optimizer import head_rows
from lightning_goldy.analysis.heads.surgery import Initialisation, Moments
from lightning_goldy.core.architecture import HeadError, HeadGates
from lightning_goldy.core.naming import require_at_least, require_choice, require_kinds

Shape = Literal["cubic", "linear", "one_shot"]
WhenExceeded = Literal["ignore", "stop", "roll_back"]
Verdict = Literal["keep", "stop", "roll_back"]


@dataclass(frozen=True)
class Scoring:
    """How heads are scored and the loss is measured.

    Args:
        n_samples: Samples of the probe; None for all.
        weights: For ``combined``: strategies and their weights, fractions.
        seed: Of random strategies and random initialisations; every cycle draws anew.
        unit: Cut single heads, or whole key/value groups (``group``), as ``compact`` can remove them.
        attention_maps: Whether rows hold the attention maps of some cut and kept heads for one sample.

    Raises:
        ValueError: A value is unknown or out of range.

    Example:
        >>> Scoring(n_samples=0)
        Traceback (most recent call last):
        ValueError: n_samples must be at least 1; got 0
    """

    n_samples: int | None = 16
    weights: dict[str, float] | None = None
    seed: int = 0
    unit: Literal["head", "group"] = "head"
    attention_maps: bool = True

    def __post_init__(self) -> None:
        require_kinds(type(self), vars(self))
        if self.n_samples is not None:
            require_at_least("n_samples", self.n_samples, 1)
        require_choice("unit", self.unit, ("head", "group"))
        if self.weights is not None:
            check_weights("combined", self.weights)


@dataclass(frozen=True)
class PruningSchedule:
    """When heads are cut and regrown. An int is a number of optimizer steps, a float a fraction.

    Args:
        warmup_steps: Before the first cycle; as a fraction, of the training.
        steps_per_cycle: Length of a cycle; None shares what is left of the training out among the cycles.
        shape: ``cubic`` (Zhu and Gupta), ``linear``, or ``one_shot`` to cut everything as a cycle begins.
        ramp_steps: From the beginning of a cycle to its last cut; as a fraction, of the cycle.
        cuts: Number of cuts along the ramp; heads are scored anew for each.
        regrow_at: From the beginning of a cycle until heads regrow; as a fraction, of the cycle.

    Raises:
        ValueError: A value is unknown or out of range.

    Example:
        >>> PruningSchedule(warmup_steps=0.1, ramp_steps=4).resolved(100, cycles=2)
        (10, 45, 4, 27)
    """

    warmup_steps: int | float = 0.1
    steps_per_cycle: int | None = None
    shape: Shape = "cubic"
    ramp_steps: int | float = 0.3
    cuts: int = 4
    regrow_at: int | float = 0.6

    def __post_init__(self) -> None:
        require_kinds(type(self), vars(self))
        Ramp(self.shape, cuts=self.cuts)
        for name in ("warmup_steps", "ramp_steps", "regrow_at"):
            value = getattr(self, name)
            if isinstance(value, bool) or value < 0 or (isinstance(value, float) and value > 1):
                raise ValueError(f"{name} is an int of optimizer steps or a float, a fraction in [0, 1]; got {value}")
        if self.steps_per_cycle is not None:
            require_at_least("steps_per_cycle", self.steps_per_cycle, 1)

    def resolved(self, total_steps: float, cycles: int) -> tuple[int, int, int, int]:
        """Warm-up, cycle, ramp and time of regrowth, optimizer steps.

        Args:
            total_steps: Of the training; infinite when it has no end of its own.
            cycles: How many.

        Raises:
            ValueError: A fraction of an endless training is asked for, or nothing is left for the cycles.
        """
        endless = not math.isfinite(total_steps)
        if endless and (isinstance(self.warmup_steps, float) or self.steps_per_cycle is None):
            raise ValueError(
                "the training has no last step to take fractions of: set the trainer's max_steps or max_epochs, or "
                "give warmup_steps and steps_per_cycle as numbers of steps"
            )
        warmup = _steps(self.warmup_steps, total_steps)
        length = self.steps_per_cycle or int((total_steps - warmup) // cycles)
        if length < 2:
            raise ValueError(
                f"{total_steps} optimizer steps with a warm-up of {warmup} leave {max(0, length)} for each of {cycles} "
                "cycles; a cycle needs at least 2"
            )
        ramp = 0 if self.shape == "one_shot" else _steps(self.ramp_steps, length)
        regrow = _steps(self.regrow_at, length)
        if isinstance(self.regrow_at, float):
            # Rounding must not make a short cycle impossible.
            regrow = min(length, max(regrow, ramp + 1))
        return warmup, length, ramp, regrow


@dataclass(frozen=True)
class Regrowth:
    """What regrows, and from what.

    Args:
        fraction: Share of the closed heads that is opened again; 0 for none.
        choice: ``gradient`` (the largest loss gradient at the closed gate), ``random``, or ``last_pruned``.
        initialisation: ``golden`` (the base's weights), ``zero``, ``copy`` or ``noise``.
        moments: ``reset`` the optimizer's state of these weights to zero, or ``keep`` what it was at the cut.
        noise_scale: For ``noise``: multiple of the layer's standard deviation.

    Raises:
        ValueError: A value is unknown or out of range.

    Example:
        >>> Regrowth(choice="gradiant")
        Traceback (most recent call last):
        ValueError: unknown choice 'gradiant'; did you mean 'gradient'? ...
    """

    fraction: float = 0.5
    choice: RegrowChoice = "gradient"
    initialisation: Initialisation = "golden"
    moments: Moments = "reset"
    noise_scale: float = 1.0

    def __post_init__(self) -> None:
        require_kinds(type(self), vars(self))
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"regrow fraction is a share of the closed heads, in [0, 1]; got {self.fraction}")
        require_choice("choice", self.choice, get_args(RegrowChoice))
        require_choice("initialisation", self.initialisation, get_args(Initialisation))
        require_choice("moments", self.moments, get_args(Moments))
        if not 0 <= self.noise_scale < math.inf:
            raise ValueError(f"noise_scale must be finite and not negative; got {self.noise_scale}")


@dataclass(frozen=True)
class Recovery:
    """How the model trains after a cut, and what it must not cost.

    Args:
        learning_rate_multiplier: Of the updates of the attention of layers that were cut; 1 for none.
        multiplier_decay_steps: Optimizer steps until it is 1 again; None for the time from the last cut to the
            regrowth.
        measure_every_n_steps: Optimizer steps between two measurements of the loss within a cycle; None for a twentieth
            of the cycle.
        within: The loss has recovered when it is back within this of the loss before the cut, nats.
        tolerance: How far the loss may have risen over a cycle, nats; None for any distance.
        when_exceeded: ``roll_back`` (weights, optimizer state and gates as the cycle began), ``stop`` cutting for the
            rest of the run, or ``ignore``.

    Raises:
        ValueError: A value is unknown or out of range.

    Example:
        >>> Recovery(learning_rate_multiplier=0.0)
        Traceback (most recent call last):
        ValueError: learning_rate_multiplier must be positive and finite; got 0.0
    """

    learning_rate_multiplier: float = 3.0
    multiplier_decay_steps: int | None = None
    measure_every_n_steps: int | None = None
    within: float = 0.02
    tolerance: float | None = None
    when_exceeded: WhenExceeded = "roll_back"

    def __post_init__(self) -> None:
        require_kinds(type(self), vars(self))
        if not 0 < self.learning_rate_multiplier < math.inf:
            raise ValueError(
                f"learning_rate_multiplier must be positive and finite; got {self.learning_rate_multiplier}"
            )
        for name in ("multiplier_decay_steps", "measure_every_n_steps"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        for name, loss in (("within", self.within), ("tolerance", self.tolerance)):
            if loss is not None and not 0 <= loss < math.inf:
                raise ValueError(f"{name} is a loss in nats, finite and not negative; got {loss}")
        require_choice("when_exceeded", self.when_exceeded, get_args(WhenExceeded))

    @property
    def copies(self) -> bool:
        """Whether a cycle may have to be rolled back."""
        return self.tolerance is not None and self.when_exceeded == "roll_back"

    def measure_every(self, steps_per_cycle: int) -> int:
        """Optimizer steps between two measurements in cycles of this length."""
        return self.measure_every_n_steps or max(1, steps_per_cycle // 20)

    def verdict(self, before: float, after: float) -> Verdict:
        """What becomes of a cycle that took the loss from ``before`` to ``after``, nats.

        Example:
            >>> Recovery(tolerance=0.1).verdict(2.0, 2.2)
            'roll_back'
        """
        # Written so that a loss that is not a number counts as too high.
        if self.tolerance is None or self.when_exceeded == "ignore" or after <= before + self.tolerance:
            return "keep"
        return self.when_exceeded


def _steps(value: int | float, total: float) -> int:
    return math.floor(value * total + 0.5) if isinstance(value, float) else value


@dataclass(frozen=True)
class PlasticitySettings:
    """Everything that decides what is cut and regrown, and when.

    Args:
        strategy: Of the head scores.
        pruning_level: Share of all heads that is closed after the last cut of a cycle, a fraction in (0, 1).
        cycles: Number of cycles.
        min_heads_per_layer: Heads that stay open in every layer.
        scoring: How heads are scored and the loss is measured.
        schedule: When.
        regrowth: What regrows, and from what.
        recovery: How the model trains after a cut.

    Raises:
        ValueError: A value is unknown or out of range.

    Example:
        >>> groups = (Scoring(), PruningSchedule(), Regrowth(), Recovery())
        >>> PlasticitySettings("entropy", 1.0, 1, 1, *groups)
        Traceback (most recent call last):
        ValueError: pruning_level is the share of all heads to cut, above 0 and below 1; got 1.0
    """

    strategy: str
    pruning_level: float
    cycles: int
    min_heads_per_layer: int
    scoring: Scoring
    schedule: PruningSchedule
    regrowth: Regrowth
    recovery: Recovery

    def __post_init__(self) -> None:
        require_kinds(type(self), vars(self))
        check_weights(self.strategy, self.scoring.weights)
        if not 0 < self.pruning_level < 1:
            raise ValueError(
                f"pruning_level is the share of all heads to cut, above 0 and below 1; got {self.pruning_level}"
            )
        for name in ("cycles", "min_heads_per_layer"):
            require_at_least(name, getattr(self, name), 1)

    @property
    def needs_base(self) -> bool:
        """Whether regrown heads take their weights from the base."""
        return self.regrowth.fraction > 0 and self.regrowth.initialisation == "golden"

    @property
    def needs_patterns(self) -> bool:
        """Whether scores are made of attention patterns, which not every family shows."""
        weights = self.scoring.weights or DEFAULT_WEIGHTS
        return self.strategy == "entropy" or (self.strategy == "combined" and weights.get("entropy", 0) > 0)

    def require_same(self, saved: Mapping[str, Any]) -> None:
        """Checks that a run goes on as it began.

        Raises:
            ValueError: A setting differs; the first is named with both values.
        """
        for name, value in _flat(asdict(self)).items():
            before = _flat(saved).get(name)
            if before != value:
                raise ValueError(
                    f"{name}={value!r}, but the resumed run began with {before!r}; head plasticity cannot change in "
                    "the middle of a run"
                )

    def plan(self, gates: HeadGates, total_steps: float) -> PlasticityPlan:
        """The plan for a model and a training.

        Args:
            gates: Of the model.
            total_steps: Optimizer steps of the training, infinite when it has no end of its own.

        Raises:
            HeadError: The level is impossible for the model.
            ValueError: The parts of the schedule do not fit together.
        """
        target, unit = heads_to_cut(gates, self.pruning_level, self.min_heads_per_layer, self.scoring.unit)
        warmup, length, ramp, regrow = self.schedule.resolved(total_steps, self.cycles)
        return PlasticityPlan(
            target=target,
            cycles=self.cycles,
            warmup_steps=warmup,
            steps_per_cycle=length,
            ramp=Ramp(self.schedule.shape, ramp, self.schedule.cuts, unit),
            regrow_at=regrow,
            regrow_fraction=self.regrowth.fraction,
            recovery=self.recovery,
        )


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
        require_choice("shape of the schedule", self.shape, get_args(Shape))
        for name, value, least in (("ramp_steps", self.steps, 0), ("cuts", self.cuts, 1), ("unit", self.unit, 1)):
            require_at_least(name, value, least)

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
        recovery: How the loss is watched.

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
    recovery: Recovery = field(default_factory=Recovery)

    def __post_init__(self) -> None:
        for name, value, least in (("cycles", self.cycles, 1), ("warmup_steps", self.warmup_steps, 0)):
            require_at_least(name, value, least)
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
        left = self.regrown(state.closed)
        if state.phase in ("pruning", "recovery") and into >= self.regrow_at and left < state.closed:
            return Event("regrow", left)
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
            heads = {"closed": closed, "closed_before": closed, "wanted": closed}
            return PlasticityState("pruning", state.cycle, **heads, loss_before=loss, measured=step)
        if event.kind == "cut":
            phase: Phase = "recovery" if event.closed >= self.target else "pruning"
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
        return self.recovery.verdict(state.loss_before, loss)

    def measures(self, state: PlasticityState, step: int) -> bool:
        """Whether the loss is to be measured now, for the course of the recovery."""
        every = self.recovery.measure_every(self.steps_per_cycle)
        return state.phase in ("pruning", "recovery", "regrown") and step - state.measured >= every

    def observed(self, state: PlasticityState, step: int, loss: float) -> PlasticityState:
        """The state once the loss has been measured, nats."""
        state = replace(state, measured=step)
        if state.phase not in ("recovery", "regrown") or state.recovery_steps is not None:
            return state
        assert state.loss_before is not None
        if state.last_cut is None or not loss <= state.loss_before + self.recovery.within:
            return state
        return replace(state, recovery_steps=step - state.last_cut)


def plan_from(saved: Mapping[str, Any], recovery: Recovery) -> PlasticityPlan:
    """Undoes ``dataclasses.asdict`` of a plan.

    Args:
        saved: The plan; of an earlier version, which had a ``guard`` in it, too.
        recovery: That of the settings, which are saved apart.

    Example:
        >>> plan = PlasticityPlan(target=4, cycles=1, warmup_steps=3, steps_per_cycle=10, regrow_at=6)
        >>> plan_from(asdict(plan), plan.recovery) == plan
        True
    """
    numbers = {name: value for name, value in saved.items() if name not in ("ramp", "recovery", "guard")}
    return PlasticityPlan(**numbers, ramp=Ramp(**saved["ramp"]), recovery=recovery)


def heads_to_cut(gates: HeadGates, level: float, min_heads_per_layer: int, unit: str) -> tuple[int, int]:
    """How many heads a pruning level means for a model, and how many are cut together.

    Args:
        gates: Of the model.
        level: Share of all heads, a fraction.
        min_heads_per_layer: Heads that stay open in every layer.
        unit: ``head`` or ``group``.

    Raises:
        HeadError: So many heads cannot be cut, or none would be.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> gates = HeadGates(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11)))
        >>> heads_to_cut(gates, 0.5, 1, "head")
        (2, 1)
    """
    sizes = gates.heads_per_layer
    groups = [block.n_key_value_heads for block in gates.architecture.blocks]
    together = [
        max(1, heads // max(count, 1)) if unit == "group" else 1 for heads, count in zip(sizes, groups, strict=True)
    ]
    spare = sum(max(0, size - min_heads_per_layer) // step * step for size, step in zip(sizes, together, strict=True))
    step = max(together)
    wanted = step * math.floor(level * sum(sizes) / step + 0.5)
    of = f"{sum(sizes)} heads in {len(sizes)} layers"
    if spare == 0 and max(sizes) == 1:
        raise HeadError(f"every layer has a single head, which must stay open: there is nothing to cut in {of}")
    if spare == 0 and unit == "group" and max(groups) == 1:
        raise HeadError(
            "every layer has one key/value group (multi-query attention), which must stay open: no group can be cut "
            f"of {of}; take unit='head'"
        )
    if wanted < 1:
        raise HeadError(f"pruning_level={level} of {of} rounds to no {unit}; the least is {step / sum(sizes):.3g}")
    if wanted > spare:
        raise HeadError(
            f"pruning_level={level} asks for {wanted} of {of}, but {spare} can be cut while min_heads_per_layer="
            f"{min_heads_per_layer} stay open in each; the most is {spare / sum(sizes):.3g}"
        )
    return wanted, step


def check_regrowth(gates: HeadGates, regrowth: Regrowth) -> None:
    """Checks that what regrows can be given new weights.

    Raises:
        ValueError: A weight that would have to change is frozen, as those below an adapter are.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> gates = HeadGates(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11)))
        >>> check_regrowth(gates, Regrowth(initialisation="noise"))
    """
    if regrowth.fraction == 0 or regrowth.initialisation == "golden":
        return
    for rows in head_rows(gates.architecture, gates.heads, gates.heads):
        if not rows.parameter.requires_grad:
            raise ValueError(
                f"initialisation={regrowth.initialisation!r} gives regrown heads new weights, but {rows.name} is "
                "frozen; train it, or take initialisation='golden'"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        # Weights are one setting, whatever they name.
        nested = isinstance(value, Mapping) and name != "weights"
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
