"""The schedule: counts in closed form, the order of events, any interruption, any losses."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_goldy.analysis.heads.schedule import (
    PlasticityPlan,
    PlasticityState,
    Ramp,
    Recovery,
    plan_from,
    rate_multiplier,
)

ORDER = ["begin", "cut", "regrow", "finish"]


@st.composite
def plans(draw):
    unit = draw(st.sampled_from([1, 1, 2]))
    ramp = Ramp(
        draw(st.sampled_from(["cubic", "linear", "one_shot"])), draw(st.integers(0, 12)), draw(st.integers(1, 6)), unit
    )
    regrow_at = ramp.steps + draw(st.integers(1, 6))
    target = unit * draw(st.integers(1, 20))
    fraction = draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    cycles = draw(st.integers(1, 4)) if math.floor(fraction * target / unit + 0.5) else 1
    recovery = Recovery(
        measure_every_n_steps=draw(st.integers(1, 4)),
        within=0.1,
        tolerance=draw(st.sampled_from([None, 0.0, 0.5])),
        when_exceeded=draw(st.sampled_from(["ignore", "stop", "roll_back"])),
    )
    length = regrow_at + draw(st.integers(0, 6))
    return PlasticityPlan(target, cycles, draw(st.integers(0, 5)), length, ramp, regrow_at, fraction, recovery)


def play(plan, losses, *, jump=1, stop_at=None, state=None, step=0):
    """Walks through a run; returns (step, event, closed after, verdict) and the final state."""
    state = state or PlasticityState()
    closed, log = state.closed, []
    last = plan.last_step + 3 if stop_at is None else stop_at
    while step <= last:
        while (event := plan.due(state, step)) is not None:
            loss = losses[step % len(losses)]
            verdict = plan.verdict(state, loss) if event.kind == "finish" else None
            closed = state.closed_before if verdict == "roll_back" else event.closed
            state = plan.after(state, event, step, closed=closed, loss=loss)
            log.append((step, event.kind, closed, verdict))
        if plan.measures(state, step):
            state = plan.observed(state, step, losses[step % len(losses)])
        step += jump
    return log, state


LOSSES = st.lists(st.floats(0, 3), min_size=1, max_size=7)


@given(plans(), LOSSES, st.integers(1, 9))
@settings(max_examples=300, deadline=None)
def test_every_run_goes_through_its_cycles_in_order(plan, losses, jump):
    log, state = play(plan, losses, jump=jump)
    cycles = "".join({"begin": "b", "cut": "c", "regrow": "r", "finish": "f"}[kind] for _, kind, _, _ in log).split("f")
    assert cycles.pop() == "" or jump > 3
    finished = [verdict for _, kind, _, verdict in log if kind == "finish"]
    for cycle in cycles:
        assert cycle[0] == "b"
        assert cycle.lstrip("b").rstrip("r").strip("c") == ""
        assert cycle.count("b") == 1
        assert cycle.count("r") <= 1
    assert all(0 <= closed <= plan.target for _, _, closed, _ in log)
    assert "stop" not in finished[:-1]
    if jump <= 3:
        assert state.phase == "done"
        assert state.cycle == plan.cycles or finished[-1] == "stop"
    # Each kind of event moves the number of closed heads its own way.
    before = 0
    for _, kind, closed, verdict in log:
        assert {"begin": closed == before, "cut": closed > before, "regrow": closed < before}.get(
            kind, closed <= before or verdict == "roll_back"
        )
        before = closed


@given(plans(), LOSSES, st.data())
@settings(max_examples=200, deadline=None)
def test_an_interrupted_run_is_the_uninterrupted_one(plan, losses, data):
    whole, end = play(plan, losses)
    stop = data.draw(st.integers(0, plan.last_step))
    first, state = play(plan, losses, stop_at=stop)
    state = PlasticityState.from_dict(json.loads(json.dumps(state.to_dict())))
    second, again = play(plan, losses, state=state, step=stop + 1)
    assert first + second == whole
    assert again == end


@given(plans())
@settings(max_examples=200, deadline=None)
def test_steps_and_counts_are_those_of_the_plan(plan):
    log, _ = play(plan, [1.0])
    closed = 0
    for cycle in range(plan.cycles):
        start = plan.warmup_steps + cycle * plan.steps_per_cycle
        mine = [entry for entry in log if start <= entry[0] <= start + plan.steps_per_cycle]
        assert (start, "begin", closed, None) in mine
        assert [(at - start, count) for at, kind, count, _ in mine if kind == "cut"][
            : len(plan.ramp.course(closed, plan.target))
        ] == list(plan.ramp.course(closed, plan.target))
        closed = plan.target
        left = closed - plan.ramp.unit * math.floor(plan.regrow_fraction * closed / plan.ramp.unit + 0.5)
        if left < closed:
            assert (start + plan.regrow_at, "regrow", left, None) in mine
        closed = left
        assert (start + plan.steps_per_cycle, "finish", closed, "keep") in mine


@given(st.integers(0, 30), st.integers(1, 30), st.integers(1, 40), st.integers(1, 9))
def test_the_cubic_course_is_the_formula_of_zhu_and_gupta(start, more, steps, cuts):
    target = start + more
    course = dict(Ramp("cubic", steps, cuts).course(start, target))
    n = min(cuts, steps)
    closed = start
    for index in range(1, n + 1):
        # s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3
        exact = target + (start - target) * (1 - index / n) ** 3
        offset = math.floor(index * steps / n + 0.5)
        closed = course.get(offset, closed)
        assert abs(closed - exact) <= 0.5 + 1e-9
    assert closed == target


def test_linear_and_one_shot():
    assert Ramp("linear", 8, 4).course(0, 8) == ((2, 2), (4, 4), (6, 6), (8, 8))
    assert Ramp("linear", 8, 4, unit=4).course(0, 8) == ((2, 4), (6, 8))
    assert Ramp("one_shot", 8, 4).course(1, 8) == ((0, 8),)
    assert Ramp("cubic", 8, 4).course(8, 8) == ()


def test_a_cycle_that_costs_too_much_is_rolled_back_or_ends_the_run():
    options = {"target": 4, "cycles": 2, "warmup_steps": 1, "steps_per_cycle": 4, "ramp": Ramp("one_shot")}
    losses = [1.0, 1.0, 9.0, 9.0, 9.0, 1.6, 9.0, 9.0, 9.0, 1.6]
    for choice, expected in (("roll_back", [0, 2]), ("stop", [2]), ("ignore", [2, 2])):
        plan = PlasticityPlan(
            **options,
            regrow_at=2,
            recovery=Recovery(measure_every_n_steps=1, within=0.1, tolerance=0.5, when_exceeded=choice),
        )
        log, state = play(plan, losses)
        assert [closed for _, kind, closed, _ in log if kind == "finish"] == expected
        assert state.phase == "done"
    assert Recovery(tolerance=0.5).verdict(1.0, math.nan) == "roll_back"
    assert Recovery(tolerance=0.5).verdict(1.0, 1.5) == "keep"


def test_a_plan_that_an_earlier_version_saved_goes_on() -> None:
    plan = PlasticityPlan(4, 1, 0, 40, Ramp("linear", 4, 2), 12, 0.5, Recovery(tolerance=0.1))
    saved = json.loads(json.dumps(asdict(plan)))
    del saved["recovery"]
    saved["guard"] = {"measure_every": 2, "within": 0.02, "tolerance": 0.1, "when_exceeded": "roll_back"}
    again = plan_from(saved, plan.recovery)
    assert again == plan
    assert again.recovery.measure_every(again.steps_per_cycle) == saved["guard"]["measure_every"]


def test_recovery_is_counted_from_the_last_cut():
    plan = PlasticityPlan(4, 1, 0, 20, Ramp("linear", 4, 2), 12, 0.5, Recovery(measure_every_n_steps=2, within=0.1))
    losses = [1.0, 1.0, 3.0, 1.0, 3.0, 3.0, 3.0, 1.0, 1.2, 1.0, 1.1, 0.5]
    _, state = play(plan, losses, stop_at=10)
    # Measured at 6, 8 and 10; what it was between two measurements is not known.
    assert state.recovery_steps == 10 - 4
    _, state = play(plan, losses, stop_at=8)
    assert state.recovery_steps is None


def test_the_multiplier_decays_to_exactly_one():
    values = [rate_multiplier(step, 3.0, 7) for step in range(12)]
    assert values[0] == 3.0
    assert values[7:] == [1.0] * 5
    assert all(first > second for first, second in itertools.pairwise(values[:8]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Ramp("cubical"), "unknown shape of the schedule 'cubical'.*cubic"),
        (lambda: Ramp(steps=-1), "ramp_steps must be at least 0; got -1"),
        (lambda: Ramp(cuts=0), "cuts must be at least 1; got 0"),
        (lambda: Recovery(measure_every_n_steps=0), "measure_every_n_steps must be at least 1; got 0"),
        (lambda: Recovery(tolerance=-0.1), "tolerance is a loss in nats, finite and not negative; got -0.1"),
        (lambda: Recovery(when_exceeded="rollback"), "unknown when_exceeded 'rollback'.*roll_back"),
        (lambda: PlasticityPlan(0, 1, 0, 4), "at least one head must be cut per cycle; got 0"),
        (lambda: PlasticityPlan(1, 0, 0, 4), "cycles must be at least 1; got 0"),
        (lambda: PlasticityPlan(1, 1, 0, 4, Ramp(steps=3), 3), "cannot cut for 3 steps and regrow at 3"),
        (lambda: PlasticityPlan(1, 1, 0, 4, regrow_at=5), "regrow_at <= steps_per_cycle"),
        (lambda: PlasticityPlan(1, 1, 0, 4, regrow_fraction=1.5), r"in \[0, 1\]; got 1.5"),
        (lambda: PlasticityPlan(1, 2, 0, 4, regrow_fraction=0.4), "regrows none, so that later cycles"),
        (lambda: PlasticityState.from_dict({"phase": "warmup"}), r"the saved schedule has the fields \['phase'\]"),
    ],
)
def test_bad_values_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
