"""What head plasticity can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_goldy.analysis.head_scores import check_weights
from lightning_goldy.analysis.head_surgery import Initialisation, Moments
from lightning_goldy.analysis.heads import RegrowChoice
from lightning_goldy.analysis.pruning_schedule import Guard, Ramp, Shape, WhenExceeded
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
