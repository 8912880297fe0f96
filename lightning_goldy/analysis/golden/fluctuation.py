"""How the pool of a search moves: the strategies by name, and the settings that they share."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from lightning_goldy.core.registry import Registry

Strategy = Callable[[int, float], float]
"""``strategy(iteration, improvement)``: the pool's size divided by the budget's, from the iteration (0, 1, ...) and the
growth of the divergence in the iteration before, nats."""


@dataclass(frozen=True)
class Fluctuation:
    """The settings that strategies share; each reads those that it names.

    Args:
        amplitude: How far the pool grows beyond the budget, a fraction of it.
        frequency: Oscillations per iteration.
        momentum: Share of its velocity that a moving pool keeps, in [0, 1).
        temperature: Of the exploration, nats: improvements far above it end the exploration.
        inflation_step: Factor of the pool after an iteration without improvement, at least 1.
        decay_factor: Factor of the pool after an improvement, or of the temperature each iteration, in (0, 1].
        max_inflation_factor: Largest pool, as a multiple of the budget, at least 1.
        min_delta: Smallest growth of the divergence that counts as an improvement, nats.

    Raises:
        ValueError: A value is out of range.

    Example:
        >>> Fluctuation(momentum=1.0)
        Traceback (most recent call last):
        ValueError: momentum must lie in [0, 1); got 1.0
    """

    amplitude: float = 0.3
    frequency: float = 0.1
    momentum: float = 0.8
    temperature: float = 1.0
    inflation_step: float = 1.2
    decay_factor: float = 0.9
    max_inflation_factor: float = 2.0
    min_delta: float = 0.01

    def __post_init__(self) -> None:
        ranges = {
            "amplitude": (self.amplitude >= 0, ">= 0"),
            "frequency": (self.frequency >= 0, ">= 0"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "temperature": (self.temperature > 0, "> 0"),
            "inflation_step": (self.inflation_step >= 1, ">= 1"),
            "decay_factor": (0 < self.decay_factor <= 1, "in (0, 1]"),
            "max_inflation_factor": (self.max_inflation_factor >= 1, ">= 1"),
            "min_delta": (self.min_delta >= 0, ">= 0"),
        }
        for name, (valid, wanted) in ranges.items():
            if not valid or not math.isfinite(getattr(self, name)):
                lie = "must lie" if wanted.startswith("in") else "must be"
                raise ValueError(f"{name} {lie} {wanted}; got {getattr(self, name)}")

    def strategy(self, name: str, seed: int = 0) -> Strategy:
        """The strategy of this name at its first iteration, kept between no more than the budget and the largest pool.

        Args:
            name: Of a registered strategy.
            seed: Decides the random ones.

        Raises:
            ValueError: The name is unknown; the valid ones are listed.

        Example:
            >>> wave = Fluctuation(frequency=0.25).strategy("adaptive_sinusoidal")
            >>> [round(wave(iteration, 0.0), 3) for iteration in range(4)]
            [1.15, 1.3, 1.15, 1.0]
        """
        factor = STRATEGIES[name](self, random.Random(seed))

        def bounded(iteration: int, improvement: float) -> float:
            value = factor(iteration, improvement)
            if not math.isfinite(value):
                raise ValueError(f"strategy {name!r} gave a pool of {value} times the budget at iteration {iteration}")
            return min(self.max_inflation_factor, max(1.0, value))

        return bounded


STRATEGIES: Registry[Callable[[Fluctuation, random.Random], Strategy]] = Registry("strategy")
register_strategy = STRATEGIES.register


@register_strategy("none")
def plain_greedy(settings: Fluctuation, generator: random.Random) -> Strategy:
    """The pool is the budget, so nothing that is masked comes out again: plain greedy growth."""
    return lambda iteration, improvement: 1.0


@register_strategy("adaptive_sinusoidal")
def adaptive_sinusoidal(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""A wave whose height follows the improvement.

    .. math:: 1 + \tfrac a2 (1 + \tanh \Delta) (1 + \sin 2 \pi f t)
    """

    def factor(iteration: int, improvement: float) -> float:
        height = settings.amplitude * (1 + math.tanh(improvement)) / 2
        return 1 + height * (1 + math.sin(2 * math.pi * settings.frequency * iteration))

    return factor


@register_strategy("momentum_based")
def momentum_based(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""A pool with inertia, which grows while the divergence does and shrinks when it stagnates.

    .. math:: v_t = \mu v_{t-1} \pm (1 - \mu), \qquad e_t = e_{t-1} + a v_t, \qquad e_0 = a
    """
    excess, velocity = settings.amplitude, 0.0

    def factor(iteration: int, improvement: float) -> float:
        nonlocal excess, velocity
        if iteration:
            push = 1.0 if improvement > settings.min_delta else -1.0
            velocity = settings.momentum * velocity + (1 - settings.momentum) * push
            excess = max(0.0, excess + settings.amplitude * velocity)
        return 1 + excess

    return factor


@register_strategy("exploration_decay")
def exploration_decay(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""Noise that cools down, and that an improvement silences.

    .. math:: 1 + 2 a u_t \, e^{-|\Delta| / T_t}, \qquad u_t \sim U(0, 1), \quad T_t = T d^t
    """

    def factor(iteration: int, improvement: float) -> float:
        cooled = settings.temperature * settings.decay_factor**iteration
        quiet = math.exp(-min(abs(improvement) / cooled, 700.0))
        return 1 + 2 * settings.amplitude * generator.random() * quiet

    return factor


@register_strategy("harmonic_oscillator")
def harmonic_oscillator(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""A damped spring around the budget, let go at the amplitude.

    .. math:: v_t = \mu v_{t-1} - (2 \pi f)^2 x_{t-1}, \qquad x_t = x_{t-1} + v_t, \qquad \text{factor} = 1 + |x_t|
    """
    place, velocity = settings.amplitude, 0.0

    def factor(iteration: int, improvement: float) -> float:
        nonlocal place, velocity
        if iteration:
            # Faster than one radian per iteration, the steps would be longer than the swing.
            stiffness = min(1.0, (2 * math.pi * settings.frequency) ** 2)
            velocity = settings.momentum * velocity - stiffness * place
            place += velocity
        return 1 + abs(place)

    return factor


@register_strategy("chaos_driven")
def chaos_driven(settings: Fluctuation, generator: random.Random) -> Strategy:
    r"""The logistic map in its chaotic regime.

    .. math:: c_t = 3.8 \, c_{t-1} (1 - c_{t-1}), \qquad \text{factor} = 1 + 2 a c_t
    """
    state = 0.1 + 0.8 * generator.random()

    def factor(iteration: int, improvement: float) -> float:
        nonlocal state
        state = 3.8 * state * (1 - state)
        return 1 + 2 * settings.amplitude * state

    return factor


@register_strategy("inflation")
def inflation(settings: Fluctuation, generator: random.Random) -> Strategy:
    """The pool inflates by a step while nothing improves, and decays towards the budget while something does."""
    size = 1 + settings.amplitude

    def factor(iteration: int, improvement: float) -> float:
        nonlocal size
        if iteration:
            improved = improvement > settings.min_delta
            size *= settings.decay_factor if improved else settings.inflation_step
            size = min(settings.max_inflation_factor, max(1.0, size))
        return size

    return factor
