"""What head plasticity can be told, and the plan of steps and heads that follows for one model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from lightning_goldy.analysis.heads.freeze import head_rows
from lightning_goldy.analysis.heads.importance import DEFAULT_WEIGHTS, RegrowChoice, check_weights
from lightning_goldy.analysis.heads.schedule import Guard, PlasticityPlan, Ramp, Shape, WhenExceeded
from lightning_goldy.analysis.heads.surgery import Initialisation, Moments
from lightning_goldy.core.architecture import HeadError, HeadGates
from lightning_goldy.core.naming import suggestion


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
        if self.n_samples is not None and self.n_samples < 1:
            raise ValueError(f"n_samples must be at least 1; got {self.n_samples}")
        _check_choice("unit", self.unit, ("head", "group"))
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
        Ramp(self.shape, cuts=self.cuts)
        for name in ("warmup_steps", "ramp_steps", "regrow_at"):
            value = getattr(self, name)
            if isinstance(value, bool) or value < 0 or (isinstance(value, float) and value > 1):
                raise ValueError(f"{name} is an int of optimizer steps or a float, a fraction in [0, 1]; got {value}")
        if self.steps_per_cycle is not None and self.steps_per_cycle < 1:
            raise ValueError(f"steps_per_cycle must be at least 1; got {self.steps_per_cycle}")

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
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"regrow fraction is a share of the closed heads, in [0, 1]; got {self.fraction}")
        _check_choice("choice", self.choice, get_args(RegrowChoice))
        _check_choice("initialisation", self.initialisation, get_args(Initialisation))
        _check_choice("moments", self.moments, get_args(Moments))
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
        if not 0 < self.learning_rate_multiplier < math.inf:
            raise ValueError(
                f"learning_rate_multiplier must be positive and finite; got {self.learning_rate_multiplier}"
            )
        if self.multiplier_decay_steps is not None and self.multiplier_decay_steps < 1:
            raise ValueError(f"multiplier_decay_steps must be at least 1; got {self.multiplier_decay_steps}")
        self.guard(20)

    @property
    def copies(self) -> bool:
        """Whether a cycle may have to be rolled back."""
        return self.tolerance is not None and self.when_exceeded == "roll_back"

    def guard(self, steps_per_cycle: int) -> Guard:
        """For cycles of this length, optimizer steps."""
        every = self.measure_every_n_steps
        every = max(1, steps_per_cycle // 20) if every is None else every
        return Guard(every, self.within, self.tolerance, self.when_exceeded)


def _steps(value: int | float, total: float) -> int:
    return math.floor(value * total + 0.5) if isinstance(value, float) else value


def _check_choice(argument: str, value: str, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise ValueError(f"unknown {argument} {value!r}; {suggestion(str(value), valid)}")


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
        check_weights(self.strategy, self.scoring.weights)
        if not 0 < self.pruning_level < 1:
            raise ValueError(
                f"pruning_level is the share of all heads to cut, above 0 and below 1; got {self.pruning_level}"
            )
        for name in ("cycles", "min_heads_per_layer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")

    @property
    def needs_base(self) -> bool:
        """Whether regrown heads take their weights from the base."""
        return self.regrowth.fraction > 0 and self.regrowth.initialisation == "golden"

    @property
    def needs_patterns(self) -> bool:
        """Whether scores are made of attention patterns, which not every family shows."""
        weights = self.scoring.weights or DEFAULT_WEIGHTS
        return self.strategy == "entropy" or (self.strategy == "combined" and weights.get("entropy", 0) > 0)

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers and text."""
        return asdict(self)

    def require_same(self, saved: Mapping[str, Any]) -> None:
        """Checks that a run goes on as it began.

        Raises:
            ValueError: A setting differs; the first is named with both values.
        """
        for name, value in _flat(self.to_dict()).items():
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
            guard=self.recovery.guard(length),
        )


def plan_from(saved: Mapping[str, Any]) -> PlasticityPlan:
    """Undoes ``dataclasses.asdict`` of a plan.

    Example:
        >>> plan = PlasticityPlan(target=4, cycles=1, warmup_steps=3, steps_per_cycle=10, regrow_at=6)
        >>> plan_from(asdict(plan)) == plan
        True
    """
    return PlasticityPlan(**{**saved, "ramp": Ramp(**saved["ramp"]), "guard": Guard(**saved["guard"])})


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
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> heads_to_cut(HeadGates(GPT2LMHeadModel(config)), 0.5, 1, "head")
        (2, 1)
    """
    sizes = gates.heads_per_layer
    groups = [block.n_key_value_heads for block in gates.architecture.blocks]
    together = [heads // count if unit == "group" else 1 for heads, count in zip(sizes, groups, strict=True)]
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
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> check_regrowth(HeadGates(GPT2LMHeadModel(config)), Regrowth(initialisation="noise"))
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
