from __future__ import annotations

import itertools
import math

import pytest

from lightning_goldy.analysis import Fluctuation, register_strategy
from lightning_goldy.analysis.golden.budget import STRATEGIES

FIVE = ("adaptive_sinusoidal", "momentum_based", "exploration_decay", "harmonic_oscillator", "chaos_driven")
IMPROVEMENTS = [0.0, 1.0, 0.5, 0.0, -0.2, 0.0, 0.3, 0.0, 0.0, 2.0]


def course(name: str, seed: int = 0, **settings: float) -> list[float]:
    strategy = Fluctuation(**settings).strategy(name, seed)
    return [strategy(iteration, improvement) for iteration, improvement in enumerate(IMPROVEMENTS)]


@pytest.mark.parametrize("name", [*FIVE, "inflation"])
def test_every_strategy_moves_the_pool_within_its_bounds(name):
    values = course(name, amplitude=0.3, max_inflation_factor=1.4)
    assert min(values) >= 1.0
    assert max(values) <= 1.4
    assert len({round(value, 9) for value in values}) > 2
    assert values == course(name, amplitude=0.3, max_inflation_factor=1.4)


def test_no_two_strategies_have_one_course():
    courses = [course(name) for name in (*FIVE, "inflation", "none")]
    for first, second in itertools.combinations(courses, 2):
        assert first != second
    assert set(course("none")) == {1.0}


@pytest.mark.parametrize("name", ["exploration_decay", "chaos_driven"])
def test_the_seed_decides_strategies_that_draw(name):
    assert course(name, seed=1) != course(name, seed=2)


@pytest.mark.parametrize("name", FIVE)
def test_without_amplitude_every_strategy_is_greedy(name):
    assert course(name, amplitude=0.0) == pytest.approx([1.0] * len(IMPROVEMENTS))


def test_closed_forms():
    wave = Fluctuation(amplitude=0.4, frequency=0.05).strategy("adaptive_sinusoidal")
    for iteration, improvement in ((0, 0.0), (3, 0.7), (8, -1.0)):
        expected = 1 + 0.2 * (1 + math.tanh(improvement)) * (1 + math.sin(0.1 * math.pi * iteration))
        assert wave(iteration, improvement) == pytest.approx(expected, rel=1e-12)
    # An undamped spring with unit stiffness has period 6: x, 0, -x, -x, 0, x.
    spring = Fluctuation(amplitude=0.5, frequency=1 / (2 * math.pi), momentum=0.999999999).strategy(
        "harmonic_oscillator"
    )
    assert [spring(index, 0.0) for index in range(6)] == pytest.approx([1.5, 1.0, 1.5, 1.5, 1.0, 1.5], abs=1e-6)
    steps = Fluctuation(amplitude=0.5, inflation_step=1.2, decay_factor=0.9).strategy("inflation")
    assert [steps(0, 0.0), steps(1, 0.0), steps(2, 1.0)] == pytest.approx([1.5, 1.8, 1.62])
    pushed = Fluctuation(amplitude=0.5, momentum=0.5).strategy("momentum_based")
    assert [pushed(0, 0.0), pushed(1, 1.0), pushed(2, 0.0)] == pytest.approx([1.5, 1.75, 1.625])


def test_exploration_cools_down_and_improvements_silence_it():
    assert Fluctuation(temperature=0.1).strategy("exploration_decay")(0, 100.0) == pytest.approx(1.0)
    hot, cold = (Fluctuation(temperature=t).strategy("exploration_decay", 3)(0, 0.5) for t in (5.0, 0.2))
    assert hot > cold


def test_users_add_strategies_and_wrong_values_are_caught():
    name = "test_only_endless"

    @register_strategy(name)
    def endless(settings, generator):
        return lambda iteration, improvement: math.inf if iteration else 1e9

    try:
        strategy = Fluctuation().strategy(name)
        assert strategy(0, 0.0) == 2.0
        with pytest.raises(ValueError, match="'test_only_endless' gave a pool of inf times the budget at iteration 1"):
            strategy(1, 0.0)
        with pytest.raises(ValueError, match="registered already"):
            register_strategy(name)(endless)
    finally:
        del STRATEGIES._entries[name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"amplitude": -0.1}, "amplitude must be >= 0; got -0.1"),
        ({"frequency": math.nan}, "frequency must be >= 0; got nan"),
        ({"momentum": -1}, r"momentum must lie in \[0, 1\); got -1"),
        ({"temperature": 0}, "temperature must be > 0; got 0"),
        ({"inflation_step": 0.5}, "inflation_step must be >= 1; got 0.5"),
        ({"decay_factor": 0}, r"decay_factor must lie in \(0, 1\]; got 0"),
        ({"max_inflation_factor": 0.5}, "max_inflation_factor must be >= 1"),
        ({"min_delta": -1}, "min_delta must be >= 0; got -1"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Fluctuation(**settings)


def test_an_unknown_strategy_is_named():
    with pytest.raises(ValueError, match="unknown strategy 'chaos_drive'; did you mean 'chaos_driven'"):
        Fluctuation().strategy("chaos_drive")
