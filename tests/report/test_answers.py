"""Each branch of each sentence: rises, falls, nothing beyond noise, undefined, contradictory, not measured."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_goldy.report.answers import (
    _SPEAKERS,
    QUESTIONS,
    Answer,
    Bar,
    Finding,
    Waiting,
    answers_of,
    interval_of_mean,
    interval_of_share,
    interval_of_turned,
    register_answer,
)
from lightning_goldy.report.figures import ReportError
from lightning_goldy.report.sentences import (
    answer_by_attention,
    answer_by_attribution,
    answer_by_circuit,
    answer_by_cycle,
    answer_by_divergence,
    answer_by_expansion,
    answer_by_facts,
    answer_by_harm,
    answer_by_norms,
    answer_by_ripples,
    answer_by_streams,
    answer_by_sweep,
    answer_by_volume,
)
from lightning_goldy.report.topics.attribution import graft_caption, places_caption
from tests.report.heads_rows import plasticity_row, sweep_row

Row = dict[str, Any]


def row_of(metrics: Row, result: Row | None = None, step: int = 10) -> Row:
    return {"step": step, "trigger": "end", "metrics": metrics, "result": result or {}}


def point(method: str, share: float, recovered: float | None, half: float = 0.02, **more: float) -> Row:
    ends = {"low": None, "high": None} if recovered is None else {"low": recovered - half, "high": recovered + half}
    return {"method": method, "share": share, "recovered": recovered, **ends, **more}


def attribution_row(*points: Row, share: float | None = 0.2, effect: float = -4.0, n_held_out: int = 32) -> Row:
    kinds = [
        {"group": "attention", "contribution": -1.0, "low": -1.2, "high": -0.8, "elements": 0.25},
        {"group": "mlp", "contribution": -3.0, "low": -3.4, "high": -2.6, "elements": 0.5},
    ]
    graft = {"points": list(points), "n_held_out": n_held_out, "n_collateral": 16}
    result = {"metric": "loss", "complete": True, "total": -4.0, "kinds": kinds, "graft": graft}
    return row_of({"effect": effect, "share_for_95": share, "gap": 0.002}, result)


def told(finding: Finding | None) -> Finding:
    assert finding is not None
    return finding


def test_the_share_that_recovers_the_effect_stands_beside_as_many_at_random() -> None:
    finding = told(answer_by_attribution([attribution_row(point("attribution", 0.2, 0.96), point("random", 0.2, 0.3))]))
    assert finding.sentence == (
        "20 % of the elements recover 96 % of the change in loss on samples that did not score; "
        "75 % [65 %, 85 %] of it sits in the mlp parameters, 50 % of all."
    )
    assert finding.null == "as many elements at random recover 30 %"
    assert finding.doubts == ()
    assert finding.bar is not None
    assert finding.bar.null == 0.3


def test_a_share_is_doubted_for_chance_few_samples_and_a_wide_interval() -> None:
    like_chance = attribution_row(point("attribution", 0.2, 0.5, 0.4), point("random", 0.2, 0.3), n_held_out=4)
    doubts = told(answer_by_attribution([like_chance])).doubts
    assert doubts == (
        "only 4 held-out samples",
        "as many elements at random lie within the interval",
        "the interval is wider than half of the effect",
    )


def test_where_no_share_recovers_the_effect_the_most_is_told() -> None:
    points = (point("attribution", 0.1, 0.4), point("attribution", 0.2, 0.6), point("attribution", 0.5, None))
    finding = told(answer_by_attribution([attribution_row(*points, share=None)]))
    assert finding.sentence.startswith(
        "20 % of the elements recover 60 % of the change in loss on samples that did not score, "
        "the most of the shares tried; "
    )


@pytest.mark.parametrize(
    ("recovered", "much"), [(0.9475, "just below 95 %"), (0.94996, "just below 95 %"), (0.944, "94 %"), (0.951, "95 %")]
)
def test_a_share_that_is_not_reached_is_not_told_as_reached(recovered: float, much: str) -> None:
    row = attribution_row(point("attribution", 0.2, recovered), share=0.2 if recovered >= 0.95 else None)
    assert told(answer_by_attribution([row])).sentence.startswith(f"20 % of the elements recover {much} of the change")


def test_a_graft_is_told_by_what_it_chose() -> None:
    row = attribution_row(
        point("random", 0.2, 0.3, on_frontier=True),
        point("attribution", 0.2, 0.9, on_frontier=True),
        point("interpolation", 1.0, 0.9, factor=0.5, on_frontier=True),
        point("magnitude", 0.2, 0.4, on_frontier=False),
    )
    assert graft_caption(row).endswith(
        "Where nothing else recovers as much with less harm: elements at random, elements by attribution, "
        "interpolation."
    )


def test_an_attribution_without_held_out_samples_or_without_effect_says_so() -> None:
    without = told(answer_by_attribution([attribution_row()]))
    assert without.sentence.endswith("how few elements recover the effect was not measured.")
    assert without.doubts == ("no sample was held out",)
    nothing = told(answer_by_attribution([attribution_row(effect=0.0)]))
    assert nothing.sentence.startswith("No parameter carries anything")
    assert answer_by_attribution([row_of({})]) is None


def test_an_incomplete_attribution_is_doubted() -> None:
    row = attribution_row(point("attribution", 0.2, 0.96))
    row["result"]["complete"] = False
    row["metrics"]["gap"] = 0.3
    assert "the parts miss the change by 30 %" in told(answer_by_attribution([row])).doubts


def test_norms_answer_only_weakly() -> None:
    row = row_of({"relative_change": 0.08, "relative_change/h.0": 0.02, "relative_change/h.1": 0.12})
    finding = told(answer_by_norms([row]))
    assert finding.sentence == "The weights moved by 8 % of their norm, h.1 most (12 %)."
    assert "does not tell what carries the effect" in finding.doubts[0]
    assert told(answer_by_norms([row_of({"relative_change": 0.0})])).sentence == "No parameter has moved."


@pytest.mark.parametrize(
    ("nonlinearity", "regime", "sentence"),
    [
        (0.03, "lazy", "It is a small step: the first order explains all but 3 % of the change in logits."),
        (
            0.3,
            "weakly nonlinear",
            "It is weakly nonlinear: the first order leaves 30 % of the change in logits unexplained.",
        ),
        (0.7, "nonlinear", "It is nonlinear: the first order leaves 70 % of the change in logits unexplained."),
        (1.4, "nonlinear", "It is no small step: the first order explains nothing of the change in logits."),
    ],
)
def test_the_kind_of_change_by_its_regime(nonlinearity: float, regime: str, sentence: str) -> None:
    finding = told(answer_by_expansion([row_of({"nonlinearity": nonlinearity}, {"regime": regime, "n_targets": 64})]))
    assert finding.sentence == sentence
    assert finding.doubts == ()


def test_an_expansion_that_predicts_an_impossible_loss_is_doubted() -> None:
    metrics = {"nonlinearity": 0.6, "base_loss": 2.0, "loss/order1": 0.1, "loss/order2": -1.9, "change": -1.0}
    doubts = told(answer_by_expansion([row_of(metrics, {"n_targets": 64})])).doubts
    assert doubts == ("the second order predicts a loss of -1.9 nats, which no loss can be",)
    few = told(answer_by_expansion([row_of({"nonlinearity": 0.6}, {"n_targets": 3})])).doubts
    assert few == ("only 3 target tokens",)
    unchanged = told(answer_by_expansion([row_of({"change": 0.0, "nonlinearity": None})]))
    assert unchanged.sentence.startswith("The loss has not changed")
    assert answer_by_expansion([row_of({"nonlinearity": math.nan})]) is None


def volume_row(estimates: list[float], step: int, **more: Any) -> Row:
    volume = {
        "split": "clean",
        "sigma": 0.1,
        "cutoff": 0.01,
        "measure": "gaussian",
        "preconditioner": "none",
        "seed": 0,
        "dimension": 100,
        "log_volume": max(estimates),
        "lower_bound": min(estimates),
        "effective_sample_size": 2.5,
        "estimates": estimates,
        **more,
    }
    return row_of({"log_volume/clean": max(estimates)}, {"volumes": [volume]}, step)


@pytest.mark.parametrize(
    ("after", "words", "doubts"),
    [
        (
            [-200.0, -210.0, -220.0],
            "Along 3 common directions the basin narrowed by 50 nats on average since step 0",
            0,
        ),
        ([-100.0, -110.0, -120.0], "Along 3 common directions the basin widened by 50 nats on average since step 0", 0),
        ([-150.0, -250.0, -80.0], "The basin has not changed beyond the spread of 3 directions since step 0", 1),
    ],
)
def test_a_basin_is_compared_by_paired_directions(after: list[float], words: str, doubts: int) -> None:
    before = [-150.0, -160.0, -170.0]
    if doubts == 0:
        # The same difference in every direction, but for a nat.
        after = [value + noise for value, noise in zip(after, (0.5, -0.5, 0.0), strict=True)]
    finding = told(answer_by_volume([volume_row(before, 0), volume_row(after, 10)]))
    assert finding.sentence.startswith(words)
    assert len(finding.doubts) == doubts
    few = volume_row(after, 10)
    few["result"]["n_samples"] = 8
    assert told(answer_by_volume([volume_row(before, 0), few])).doubts == (*finding.doubts, "only 8 samples")


def test_basins_of_two_kinds_of_samples_are_told_apart_where_they_part() -> None:
    def both(clean: list[float], memorised: list[float], step: int) -> Row:
        rows = [volume_row(clean, step), volume_row(memorised, step, split="memorised")]
        return rows[0] | {"result": {"volumes": [volume for row in rows for volume in row["result"]["volumes"]]}}

    before = both([-150.0, -160.0], [-300.0, -310.0], 0)
    finding = told(answer_by_volume([before, both([-200.5, -209.5], [-249.5, -260.5], 10)]))
    assert finding.sentence.startswith(
        "Along 2 common directions the basin of clean samples narrowed by 50 nats on average since step 0, yet that of "
        "memorised ones widened by 50 nats on average; the region in which"
    )
    # Where both go one way, or one of them not beyond noise, they do not part.
    for memorised in ([-349.5, -360.5], [-250.0, -380.0]):
        finding = told(answer_by_volume([before, both([-200.5, -209.5], memorised, 10)]))
        narrowed = "the basin of clean samples narrowed by 50 nats on average since step 0; the region"
        assert finding.sentence.startswith(f"Along 2 common directions {narrowed}")


def test_volumes_of_other_directions_are_not_compared_and_a_single_bound_is_doubted() -> None:
    first = volume_row([-150.0, -160.0], 0, sigma=0.2)
    last = volume_row([-100.0, -110.0], 10, effective_sample_size=1.0)
    finding = told(answer_by_volume([first, last]))
    assert finding.sentence.startswith(
        "The region in which predictions stay within 0.01 nats of the model's has a log volume of at least -110 nats."
    )
    assert finding.doubts == (
        "it rests on an effective 1 of 2 directions",
        "one bound of one checkpoint compares with nothing",
    )
    assert answer_by_volume([row_of({}, {"volumes": []})]) is None


@pytest.mark.parametrize(("effective", "weak"), [(1.0, True), (1.99, True), (2.0, False), (None, False)])
@pytest.mark.parametrize("bridged", [False, True])
def test_a_difference_of_volumes_that_rest_on_one_direction_is_weak(
    effective: float | None, weak: bool, bridged: bool
) -> None:
    last = volume_row([-200.5, -209.5, -220.0], 10, effective_sample_size=effective)
    if bridged:
        last["result"]["bridges"] = [{"split": "clean", "log_volume": -90.0, "error": 2.0}]
    answer = answers_of([("volumes", "basin_volume", [volume_row([-150.0, -160.0, -170.0], 0), last])])[2]
    # What all directions agree on is still told, with its interval over them.
    assert answer.finding.sentence.startswith("Along 3 common directions the basin narrowed by 50 nats on average")
    assert answer.finding.interval.startswith("95 % interval of the paired difference -51.24 to -48.76 nats")
    assert answer.trust == ("weak" if weak else "solid")
    told_why = "so the difference tells of the radii along them and not of the volume"
    assert answer.finding.doubts == (
        (f"volumes rest on an effective {effective:.2g} of 3 directions, {told_why}",) if weak else ()
    )


def test_directions_that_a_bridge_does_without_are_not_doubted() -> None:
    row = volume_row([-150.0, -160.0], 10, effective_sample_size=1.0)
    row["result"]["bridges"] = [{"split": "clean", "log_volume": -90.0, "error": 2.0}]
    assert told(answer_by_volume([row])).doubts == ()


def test_a_bridge_states_the_volume_and_its_doubt() -> None:
    row = volume_row([-150.0, -160.0], 10)
    row["result"]["bridges"] = [{"split": "clean", "log_volume": -90.0, "error": 2.0, "weak": "chains still drift"}]
    finding = told(answer_by_volume([row]))
    region = "The region in which predictions stay within 0.01 nats of the model's"
    assert finding.sentence == f"{region} has a log volume of -90 nats."
    assert finding.interval == "one standard error 2 nats"
    assert finding.doubts == ("the bridge is weak: chains still drift",)


def test_a_circuit_beside_random_ones_and_the_bases() -> None:
    curve = {"values": [0.5, 0.9], "sizes": [10, 100], "n_edges": 1000, "band": [[0.0, 0.1], [0.0, 0.2]]}
    metrics = {"overlap": 0.83, "overlap_by_chance": 0.01}
    finding = told(answer_by_circuit([row_of(metrics, {"curve": curve})]))
    assert finding.sentence == (
        "A circuit of 100 of 1,000 edges keeps 90 % of the behaviour, and shares 83 % of its edges with the base's."
    )
    assert finding.null == "random circuits of its size keep 0 % to 20 %; by chance they would share 1 %"
    assert finding.doubts == ("no interval",)
    curve["values"] = [0.1, 0.2]
    assert "random circuits of its size keep as much" in told(answer_by_circuit([row_of({}, {"curve": curve})])).doubts
    assert answer_by_circuit([row_of({}, {})]) is None
    curve |= {"values": [0.5, 0.9], "intervals": [[0.4, 0.6], [0.7, 1.0]], "n_pairs": 20, "random": [0.0, 0.1]}
    finding = told(answer_by_circuit([row_of(metrics, {"curve": curve})]))
    assert finding.interval == "95 % interval 70 % to 100 % over 20 prompts"
    assert (finding.bar, finding.doubts) == (Bar(0.9, 0.7, 1.0, 0.1), ())
    finding = told(answer_by_circuit([row_of({**metrics, "overlap_noise": 0.9}, {"curve": curve})]))
    assert finding.null.endswith("by chance they would share 1 %, two seeds share 90 %")
    assert finding.doubts == ()
    alike = told(answer_by_circuit([row_of({**metrics, "overlap_noise": 0.8}, {"curve": curve})]))
    assert alike.doubts == ("two seeds differ as much",)
    wide = {**curve, "wide_intervals": [], "joined_band": [[0.0, 0.1], [0.0, 0.3]]}
    finding = told(answer_by_circuit([row_of(metrics, {"curve": wide})]))
    assert finding.interval == "95 % interval 70 % to 100 % over 20 prompts, with the edges as they were chosen"
    assert "0 % to 20 %, joined from end to end 0 % to 30 %; by chance" in finding.null
    harder: dict[str, Any] = {"exchanged_band": [[0.0, 0.1], [0.1, 0.25]], "exchanged": [0.0, 0.2]}
    harder["others"] = {"greater_than": [0.3, 0.5]}
    finding = told(answer_by_circuit([row_of({}, {"curve": {**wide, **harder}})]))
    assert finding.null == (
        "the circuit of greater_than keeps 50 %, random circuits of its size keep 0 % to 20 %, joined from end to end "
        "0 % to 30 %, the circuit with its heads exchanged keeps 10 % to 25 %"
    )
    assert finding.bar == Bar(0.9, 0.7, 1.0, 0.5)
    assert finding.doubts == ()
    for more, doubt in (
        (0.8, "its interval reaches what the circuit of greater_than keeps"),
        (0.95, "the circuit of greater_than keeps as much"),
    ):
        harder["others"] = {"greater_than": [0.3, more]}
        assert told(answer_by_circuit([row_of({}, {"curve": {**wide, **harder}})])).doubts == (doubt,)
    # Where the same pairs tell what is kept beyond the hardest null on average, that decides.
    harder |= {
        "others": {"greater_than": [0.3, 0.5]},
        "shuffled": [0.1, 0.6],
        "shuffled_band": [[0.0, 0.2], [0.4, 0.95]],
    }
    shuffled = "the circuit with its edges shuffled within layers"
    for margin, doubts in (
        ([0.1, 0.5], ()),
        ([-0.1, 0.7], (f"its interval reaches what {shuffled} keeps",)),
        ([None, None], (f"{shuffled} keeps as much",)),
    ):
        paired = {**wide, **harder, "wide_margins": [[0.0, 0.1], margin]}
        finding = told(answer_by_circuit([row_of({}, {"curve": paired})]))
        assert finding.doubts == doubts
        assert finding.null.startswith(f"{shuffled} keeps 40 % to 95 %, ")
        assert finding.bar == Bar(0.9, 0.7, 1.0, 0.6)
    paired |= {"shuffled": [0.1, 0.92], "wide_margins": [[0.0, 0.1], [-0.1, 0.05]]}
    assert told(answer_by_circuit([row_of({}, {"curve": paired})])).doubts == (f"{shuffled} keeps as much",)
    unknown = {
        "exchanged_band": [[None, None]] * 2,
        "exchanged": [None, None],
        "others": {"greater_than": [None, None]},
    }
    assert "exchanged" not in told(answer_by_circuit([row_of({}, {"curve": {**wide, **unknown}})])).null
    wide |= {"wide_intervals": [[0.4, 0.6], [0.25, 1.0]]}
    finding = told(answer_by_circuit([row_of(metrics, {"curve": wide})]))
    assert finding.interval == "95 % interval 25 % to 100 % over 20 prompts and the choice of the edges"
    assert finding.doubts == ("its interval reaches what random circuits keep",)
    curve["intervals"][-1] = [0.15, 1.0]
    doubts = told(answer_by_circuit([row_of({}, {"curve": curve})])).doubts
    assert doubts == ("its interval reaches what random circuits keep",)
    curve["intervals"][-1] = [0.7, 1.0]
    doubts = told(answer_by_circuit([row_of({}, {"curve": {**curve, "n_shared": 20}})])).doubts
    assert doubts == ("measured on prompts that chose its edges",)
    for away in ({"values": [None, None]}, {"clean": -0.2, "patched": -0.1}):
        finding = told(answer_by_circuit([row_of({}, {"curve": {**curve, **away, "absent": "it is not there"}})]))
        assert finding.sentence == "The model does not clearly show the behaviour whose circuit was looked for."
        assert finding.doubts == ("it is not there",)


@pytest.mark.parametrize(
    ("before", "after", "start", "doubted"),
    [
        (0.99, 0.82, "Only 82 % of the untouched facts are still known, from 99 %; ", False),
        (0.80, 0.82, "82 % of the untouched facts are known, from 80 %: no change beyond noise; ", True),
        (0.82, 0.82, "82 % of the untouched facts are known, as before; ", False),
        (0.50, 0.82, "82 % of the untouched facts are known, up from 50 %; ", False),
        (0.0, 0.0, "0 % of the untouched facts are known, as before; ", True),
        (0.05, 0.0, "Only 0 % of the untouched facts are still known, from 5 %; ", True),
    ],
)
def test_untouched_facts_before_and_after(before: float, after: float, start: str, doubted: bool) -> None:
    metrics = {"exact_before/untouched": before, "exact/untouched": after, "measured_change/untouched": -0.3}
    finding = told(answer_by_facts([row_of(metrics, {"classes": {"edited": 4, "untouched": 98}})]))
    assert finding.sentence.startswith(start)
    unpaired, *others = finding.doubts
    assert unpaired.startswith("the facts are not paired")
    assert bool(others) is doubted
    assert "over 98 facts" in finding.interval


@pytest.mark.parametrize(
    ("gained", "lost", "start", "interval", "doubted"),
    [
        (
            1,
            20,
            "Only 80 % of the untouched facts are still known, from 99 %: 19 points fewer [10, 28]; ",
            "-28 to -10",
            False,
        ),
        (30, 2, "99 % of the untouched facts are known, up from 70 %: 29 points more [18, 38]; ", "18 to 38", False),
        (2, 4, "96 % of the untouched facts are known, from 98 %: no change beyond noise; ", "-7.5 to 3.5", True),
        (6, 6, "90 % of the untouched facts are known, as before; ", "-7.3 to 7.3", False),
    ],
)
def test_facts_are_compared_with_themselves(gained: int, lost: int, start: str, interval: str, doubted: bool) -> None:
    before = {"fewer": 97, "up": 69}.get(next((word for word in ("fewer", "up") if word in start), ""), 96)
    before = 88 if gained == lost else before
    after = before + gained - lost
    metrics = {"exact_before/untouched": before / 98, "exact/untouched": after / 98, "measured_change/untouched": -0.3}
    result = {"classes": {"untouched": 98}, "turned": {"untouched": {"gained": gained, "lost": lost}}}
    finding = told(answer_by_facts([row_of(metrics, result)]))
    assert finding.sentence.startswith(start)
    turned = f"({lost} lost, {gained} gained)"
    assert finding.interval == f"95 % interval of the paired change {turned} {interval} points over 98 facts"
    assert finding.doubts == (("the interval of the change includes 0",) if doubted else ())
    assert finding.bar is not None
    low, high = interval_of_turned(gained, lost, 98)
    assert (finding.bar.low, finding.bar.high) == (before / 98 + low, min(1.0, before / 98 + high))


def test_a_change_that_hardly_any_fact_makes_is_no_noise_though_shares_overlap() -> None:
    # 8 of 400 are lost and none is gained: each share's own interval holds the other share.
    metrics = {"exact_before/untouched": 0.5, "exact/untouched": 0.48, "measured_change/untouched": -0.3}
    row = row_of(metrics, {"classes": {"untouched": 400}})
    assert "no change beyond noise" in told(answer_by_facts([row])).sentence
    assert told(answer_by_facts([row])).doubts[0].startswith("the facts are not paired")
    row["result"]["turned"] = {"untouched": {"gained": 0, "lost": 8}}
    sentence = told(answer_by_facts([row])).sentence
    assert sentence.startswith(
        "Only 48 % of the untouched facts are still known, from 50 %: 2 points fewer [0.46, 3.5]; "
    )


def test_facts_of_rows_that_do_not_pair_them_are_weak() -> None:
    metrics = {"exact_before/untouched": 0.99, "exact/untouched": 0.8, "measured_change/untouched": -0.3}
    result: Row = {"classes": {"untouched": 98}, "errors": {"untouched": 0.05}}
    unpaired = ("the facts are not paired, so the interval takes what was known before as exact",)
    assert told(answer_by_facts([row_of(metrics, result)])).doubts == unpaired
    result["turned"] = {"untouched": {"gained": 0, "lost": 19}}
    assert told(answer_by_facts([row_of(metrics, result)])).doubts == ()


def test_shares_of_facts_that_differ_are_told_apart() -> None:
    metrics = {"exact_before/untouched": 0.999, "exact/untouched": 0.996}
    result = {"classes": {"untouched": 10_000}, "turned": {"untouched": {"gained": 0, "lost": 30}}}
    finding = told(answer_by_facts([row_of(metrics, result)]))
    assert finding.sentence.startswith("Only 99.6 % of the untouched facts are still known, from 99.9 %: 0.3 points")
    assert finding.null == "99.9 % before the finetune"


def test_numbers_that_are_none_are_not_told() -> None:
    metrics = {"exact_before/untouched": 0.99, "exact/untouched": 0.8, "measured_change/untouched": -0.3}
    result = {"classes": {"untouched": 98}, "errors": {"untouched": math.nan}}
    assert "nan" not in told(answer_by_facts([row_of(metrics, result)])).sentence
    row = attribution_row(point("finetune", 1.0, 1.0, harm=math.nan))
    assert answer_by_harm([row]) is None


@pytest.mark.parametrize("chances", [(0.0, 0.0), (0.01, 0.2), (0.1, 0.1), (0.3, 0.05), (0.0, 0.6), (0.4, 0.4)])
@pytest.mark.parametrize("count", [16, 60])
def test_the_interval_of_what_turned_covers(chances: tuple[float, float], count: int) -> None:
    """By the exact probability of every outcome."""
    up, down = chances
    covered = 0.0
    for gained in range(count + 1):
        for lost in range(count + 1 - gained):
            low, high = interval_of_turned(gained, lost, count)
            ways = math.comb(count, gained) * math.comb(count - gained, lost)
            chance = ways * up**gained * down**lost * (1 - up - down) ** (count - gained - lost)
            covered += chance if low <= up - down <= high else 0.0
    assert covered >= 0.94


def test_the_interval_of_what_turned_is_students_paired_one_of_many() -> None:
    gained, lost, count = 300, 900, 10_000
    values = [1.0] * gained + [-1.0] * lost + [0.0] * (count - gained - lost)
    assert interval_of_turned(gained, lost, count) == pytest.approx(interval_of_mean(values), abs=1e-4)


def test_what_was_attached_and_has_not_fired_is_told() -> None:
    waiting = Waiting({"basin": "BasinVolume", "head_plasticity": "", "mine": "Own"}, 1200)
    answers = answers_of([], waiting)
    told = "was attached, and had not fired when the run stood at step 1,200."
    assert answers[2].finding.sentence == f"Not measured: basin {told}"
    assert answers[2].trust == "not measured"
    assert answers[2].finding.interval == "the run was killed there before it came to it, or still goes on"
    # Notes of an earlier version do not name the class.
    assert answers[4].finding.sentence == f"Not measured: head_plasticity {told}"
    assert answers[0].finding.sentence == "Not measured; ChangeAttribution or GoldenSnapshot would tell."
    two = Waiting({"a": "TaylorDiff", "b": "AttentionTracker"}, 3)
    assert answers_of([], two)[1].finding.sentence.startswith("Not measured: a and b were attached, and had not fired")
    snapshot = row_of({"relative_change": 0.0})
    measured = answers_of([("norms", "golden_snapshot", [snapshot])], Waiting({"all": "ChangeAttribution"}, 1))
    assert measured[0].finding.sentence == "No parameter has moved."


def test_facts_without_exact_answers_tell_their_log_probability() -> None:
    row = row_of({"measured_change/untouched": -0.25}, {"classes": {"untouched": 30}})
    finding = told(answer_by_facts([row]))
    assert finding.sentence == "The log probability of the untouched facts moved by -0.25 nats on average."
    assert finding.doubts == ("no interval",)
    assert answer_by_facts([row_of({}, {"classes": {}})]) is None


@pytest.mark.parametrize(
    ("harm", "half", "sentence"),
    [
        (0.3, 0.1, "The loss on other text rose by 0.3 nats."),
        (-0.3, 0.1, "The loss on other text fell by 0.3 nats."),
        (0.05, 0.1, "The loss on other text has not changed beyond noise."),
    ],
)
def test_harm_to_other_text(harm: float, half: float, sentence: str) -> None:
    whole = point("finetune", 1.0, 1.0, harm=harm, harm_low=harm - half, harm_high=harm + half)
    assert told(answer_by_harm([attribution_row(whole)])).sentence == sentence


def test_streams_within_the_null_are_noise() -> None:
    result = {"n_samples": 64}
    moved = told(answer_by_streams([row_of({"stream_change": 0.2, "stream_null": 0.05, "clearest_layer": 3}, result)]))
    assert moved.sentence == (
        "On unrelated text the residual stream, after block 3, moved by 20 % of its norm, which is readable."
    )
    noise = told(answer_by_streams([row_of({"stream_change": 0.02, "stream_null": 0.05}, result)]))
    assert noise.sentence.endswith("which is within the noise.")
    assert noise.doubts == ("another half of the text moves it as much",)
    same = told(answer_by_streams([row_of({"stream_change": None}, {"unchanged": True})]))
    assert same.sentence.startswith("Nothing has changed")


def test_heads_of_a_sweep_against_random_ones() -> None:
    within = told(answer_by_sweep([sweep_row()]))
    assert within.sentence == "Closing 50 % of the heads by taylor costs +0.3 nats, 0.7 less than random heads."
    row = sweep_row()
    for run in row["result"]["runs"]:
        if run["strategy"] == "random":
            run["cost"] = 0.3
    alike = told(answer_by_sweep([row]))
    assert "no less than random heads beyond the seeds' noise" in alike.sentence
    assert alike.doubts == ("it is within the range of random heads", "the interval includes 0")


def test_one_run_of_head_plasticity_has_no_null() -> None:
    row = plasticity_row()
    row["metrics"] |= {"cut/loss_before": 2.25, "cut/loss_after": 2.5}
    finding = told(answer_by_cycle([row]))
    assert finding.sentence == "The last cut of heads by taylor moved the loss by +0.25 nats; 3 of 4 heads are open."
    assert "not compared with heads closed at random" in finding.doubts
    fresh = plasticity_row(cut=False)
    fresh["metrics"] = {"loss": 2.25, "active_heads": 4.0}
    assert told(answer_by_cycle([fresh])).doubts == ("nothing was cut",)


def test_the_first_registered_analysis_speaks_and_the_others_stand_beside_it() -> None:
    snapshot = row_of({"relative_change": 0.08})
    attribution = attribution_row(point("attribution", 0.2, 0.96), point("random", 0.2, 0.3))
    answers = answers_of(
        [("norms", "golden_snapshot", [snapshot]), ("carriers", "change_attribution", [attribution]), ("none", "x", [])]
    )
    assert [answer.question for answer in answers] == list(QUESTIONS)
    assert (answers[0].analysis, answers[0].trust, list(answers[0].more)) == ("carriers", "solid", ["norms"])
    assert answers[2].trust == "not measured"
    assert "BasinVolume" in answers[2].finding.sentence
    weak = answers_of([("norms", "golden_snapshot", [snapshot])])[0]
    assert (weak.trust, weak.analysis) == ("weak", "norms")
    json.dumps([answer.to_json() for answer in answers], allow_nan=False)


def test_an_answer_has_the_course_of_its_metric() -> None:
    rows = [row_of({"relative_change": value}, step=step) for step, value in ((0, 0.0), (5, math.nan), (9, 0.2))]
    answer: Answer = answers_of([("norms", "golden_snapshot", rows)])[0]
    assert answer.course == ((0, 0.0), (9, 0.2))


def test_an_unknown_question_names_the_choices() -> None:
    with pytest.raises(ValueError, match="question must be one of carries, kind, robust, touched, needs, got 'why'"):
        register_answer("mine", "why")  # type: ignore[arg-type]


@given(st.floats(0, 1), st.integers(1, 10_000))
def test_an_interval_of_a_share_holds_the_share_and_stays_a_share(share: float, count: int) -> None:
    low, high = interval_of_share(share, count)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    wider = interval_of_share(share, max(1, count // 2))
    assert wider[1] - wider[0] >= high - low - 1e-12


def test_intervals_of_means_by_hand() -> None:
    # n = 5, sd = sqrt(2.5), t = 2.776: half width 2.776 * sqrt(0.5).
    low, high = interval_of_mean([1.0, 2.0, 3.0, 4.0, 5.0])
    assert low == pytest.approx(3 - 2.776445 * math.sqrt(0.5), abs=1e-5)
    assert high == pytest.approx(3 + 2.776445 * math.sqrt(0.5), abs=1e-5)
    assert interval_of_mean([1.0]) == (-math.inf, math.inf)


def expansion_row(left: float, *, interval: Any = None, n_samples: int | None = 32, **metrics: float) -> Row:
    result = {"regime": "nonlinear", "n_targets": 900, "thresholds": {"lazy": 0.1, "nonlinear": 0.5}}
    result |= {"interval": interval, "n_samples": n_samples}
    return row_of({"nonlinearity": left, "change": -1.0, "base_loss": 3.0, **metrics}, result)


def test_an_expansion_with_an_interval_clear_of_the_borders_is_solid() -> None:
    finding = told(answer_by_expansion([expansion_row(0.7, interval=[0.62, 0.79])]))
    assert finding.interval == "95 % interval 62 % to 79 % over 32 samples"
    assert finding.doubts == ()
    assert (finding.bar.low, finding.bar.high) == (0.62, 0.79)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("row", "doubt"),
    [
        (expansion_row(0.52, interval=[0.44, 0.61]), "the interval includes the border of 50 %"),
        (expansion_row(0.7, interval=[0.6, 0.8], n_samples=4), "only 4 samples"),
        (expansion_row(0.7), "no interval"),
    ],
)
def test_an_expansion_is_doubted_by_its_interval(row: Row, doubt: str) -> None:
    assert doubt in told(answer_by_expansion([row])).doubts


def test_drift_has_an_interval() -> None:
    result = {"drift_interval": [0.01, 0.03], "n_samples": 32}
    finding = told(answer_by_attention([row_of({"drift": 0.02, "drift_max": 0.3}, result)]))
    assert finding.interval == "95 % interval 0.01 to 0.03 nats over 32 samples"
    assert finding.doubts == ()
    few = told(answer_by_attention([row_of({"drift": 0.02, "drift_max": 0.3}, {"n_samples": 4})]))
    assert few.doubts == ("no interval", "only 4 samples")
    assert told(answer_by_attention([row_of({"drift": 0.0})])).sentence == "Attention has not moved from the base's."


def test_a_divergence_has_an_interval() -> None:
    row = row_of({"kl_from_base": 0.2}, {"kl_interval": [0.1, 0.4], "n_samples": 16})
    finding = told(answer_by_divergence([row]))
    assert (finding.interval, finding.doubts) == ("95 % interval 0.1 to 0.4 nats over 16 samples", ())
    assert told(answer_by_divergence([row_of({"kl_from_base": 0.2})])).doubts == ("no interval", "only 0 samples")


@pytest.mark.parametrize(("error", "noise"), [(0.1, False), (0.5, True)])
def test_the_mean_change_of_facts_has_an_interval(error: float, noise: bool) -> None:
    result = {"classes": {"untouched": 20}, "errors": {"untouched": error}}
    finding = told(answer_by_facts([row_of({"measured_change/untouched": -0.6}, result)]))
    half = 2.093 * error
    assert finding.interval == f"95 % interval {-0.6 - half:+.3g} to {-0.6 + half:+.3g} nats over 20 facts"
    assert ("beyond noise" in finding.sentence) == noise == ("the interval includes 0" in finding.doubts)


def test_ripples_speak_with_the_interval_of_their_correlation() -> None:
    row = row_of({"first_order_spearman": 0.8}, {"interval": {"spearman": [0.7, 0.9], "over": "10 edits"}})
    finding = told(answer_by_ripples([row]))
    assert finding.sentence.endswith("with a correlation of 0.80.")
    assert (finding.interval, finding.doubts) == ("95 % interval 0.70 to 0.90 over 10 edits", ())
    row = row_of({"first_order_spearman": 0.1}, {"interval": {"spearman": [-0.2, 0.4], "over": "10 edits"}})
    finding = told(answer_by_ripples([row]))
    assert "no better than noise" in finding.sentence
    assert finding.doubts == ("the interval includes 0",)
    assert told(answer_by_ripples([row_of({"first_order_spearman": 0.8})])).doubts == ("no interval",)
    assert answer_by_ripples([row_of({})]) is None


@pytest.mark.parametrize(
    ("left", "ends", "sentence"),
    [
        (0.09, [0.01, 0.45], "It is between a small step and weakly nonlinear: the first order leaves 9 % of"),
        (0.52, [0.44, 0.61], "It is between weakly nonlinear and nonlinear: the first order leaves 52 % of"),
        (1.05, [0.60, 1.50], "It is nonlinear: the first order leaves 105 % of"),
        (1.30, [1.10, 1.50], "It is no small step: the first order explains nothing of"),
    ],
)
def test_no_kind_of_change_is_claimed_beyond_the_interval(left: float, ends: list[float], sentence: str) -> None:
    assert told(answer_by_expansion([expansion_row(left, interval=ends)])).sentence.startswith(sentence)


@pytest.mark.parametrize("ends", [[None, None], [math.nan, math.nan], [0.1, None]])
def test_ends_of_an_interval_that_are_missing_are_no_interval(ends: list[float | None]) -> None:
    assert told(answer_by_expansion([expansion_row(0.7, interval=ends)])).doubts == ("no interval",)
    result = {"drift_interval": ends, "kl_interval": ends, "n_samples": 32}
    assert told(answer_by_attention([row_of({"drift": 0.1}, result)])).doubts == ("no interval",)
    assert told(answer_by_divergence([row_of({"kl_from_base": 0.1}, result)])).doubts == ("no interval",)


def test_what_has_no_interval_or_no_null_is_doubted() -> None:
    bare = {"method": "finetune", "share": 1.0, "recovered": 1.0, "low": None, "high": None, "harm": 0.2}
    harm = told(answer_by_harm([attribution_row(bare)]))
    assert (harm.interval, harm.doubts) == ("over 16 samples; no interval", ("no interval",))
    still = point("finetune", 1.0, 1.0, harm=0.0, harm_low=-0.1, harm_high=0.1)
    assert told(answer_by_harm([attribution_row(still)])).sentence == "The loss on other text has not changed."
    graft = told(answer_by_attribution([attribution_row({**bare, "method": "attribution", "share": 0.2})]))
    assert (graft.interval, graft.doubts) == ("no interval", ("no interval",))
    stream = told(answer_by_streams([row_of({"stream_change": 0.3}, {"n_samples": 64})]))
    assert stream.sentence == "On unrelated text the residual stream moved by 30 % of its norm."
    assert stream.doubts == ("no null was measured",)


def test_a_circuit_of_few_prompts_or_with_the_bases_edges_by_chance_is_doubted() -> None:
    curve = {"values": [0.9], "sizes": [10], "n_edges": 100, "band": [[0.0, 0.1]], "intervals": [[0.7, 1.0]]}
    row = row_of({"overlap": 0.1, "overlap_by_chance": 0.1}, {"curve": {**curve, "n_pairs": 3}})
    assert told(answer_by_circuit([row])).doubts == ("by chance it would share as many", "only 3 prompts")


def test_facts_that_were_edited_do_not_answer_what_else_was_touched() -> None:
    metrics = {"exact_before/edited": 0.0, "exact/edited": 1.0}
    assert answer_by_facts([row_of(metrics, {"classes": {"edited": 40}})]) is None


def test_an_interval_belongs_to_its_own_correlation() -> None:
    row = row_of({"pearson": 0.8}, {"interval": {"spearman": [0.1, 0.3], "over": "10 edits"}})
    assert told(answer_by_ripples([row])).doubts == ("no interval",)


def test_random_heads_that_were_drawn_once_are_doubted() -> None:
    runs = [{"level": 0.5, "strategy": name, "cost": cost} for name, cost in (("taylor", 0.1), ("random", 0.5))]
    runs += [{"level": 0.5, "strategy": "taylor", "cost": 0.2}, {"level": 0.9, "strategy": "taylor", "cost": math.nan}]
    finding = told(answer_by_sweep([row_of({}, {"runs": runs})]))
    assert finding.sentence.startswith("Closing 50 % of the heads by taylor costs +0.15 nats")
    assert finding.doubts == ("random heads were drawn once", "the interval includes 0")


def test_numbers_that_are_none_are_told_in_no_sentence() -> None:
    norms = row_of({"relative_change": 0.1, "relative_change/a": math.nan, "relative_change/b": 0.2})
    assert told(answer_by_norms([norms])).sentence == "The weights moved by 10 % of their norm, b most (20 %)."
    facts = row_of({"exact_before/untouched": 0.5, "exact/untouched": math.nan}, {"classes": {"untouched": 30}})
    assert answer_by_facts([facts]) is None
    assert answer_by_volume([volume_row([math.nan, math.nan], 0)]) is None


def test_rows_without_what_their_answer_is_made_of_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReportError, match=r"volumes: its rows do not hold .*\(answer_by_volume\): 'cutoff'"):
        answers_of([("volumes", "basin_volume", [row_of({}, {"volumes": [{"log_volume": -3.0}]})])])
    monkeypatch.setitem(_SPEAKERS["robust"], "mine", lambda rows: rows[-1]["metrics"]["nothing"])
    with pytest.raises(ReportError, match="own: its rows do not hold"):
        answers_of([("own", "mine", [row_of({})])])


def part_of(
    share: float, low: float | None, high: float | None, elements: float | None = 0.3, total: float = -2.0
) -> str:
    kind = {"group": "mlp", "contribution": share * total, "share_low": low, "share_high": high, "elements": elements}
    row = attribution_row(effect=total)
    row["result"] |= {"total": total, "kinds": [kind]}
    return told(answer_by_attribution([row])).sentence.partition("; how few")[0]


def test_where_an_effect_sits_is_no_finding_when_nothing_else_was_trained() -> None:
    assert part_of(1.0, 1.0, 1.0, elements=1.0) == "Nothing but the mlp parameters was trained"


MLP = "the mlp parameters, 30 % of all"
BACK = f"T{MLP[1:]}, make {{}} of it, and the others take {{}} back: parts cancel"


@pytest.mark.parametrize(
    ("share", "low", "high", "sentence"),
    [
        (0.6, 0.5, 0.7, f"60 % [50 %, 70 %] of it sits in {MLP}"),
        (0.35, 0.2, 0.5, f"35 % [20 %, 50 %] of it sits in {MLP}, no more than their number tells"),
        (
            1.2,
            0.9,
            1.7,
            f"{BACK.format('120 % [90 %, 170 %]', '20 %')}, perhaps by noise alone",
        ),
        (1.5, 1.2, 1.9, BACK.format("150 % [120 %, 190 %]", "50 %")),
        (2.31, None, None, f"{BACK.format('231 %', '131 %')}, as far as can be told without an interval"),
        (1.004, 1.0, 1.01, f"100 % [100 %, 101 %] of it sits in {MLP}"),
        (1.2, 0.88, 2.24, f"{{}}; {MLP}, have 120 % [88 %, 224 %] of it"),
        (8.7e14, 8e14, 9e14, f"{{}}; {MLP}, have 8.7e+16 % [8e+16 %, 9e+16 %] of it"),
        (0.2, -0.1, 0.5, f"Where it sits is within noise; {MLP}, have 20 % [-10 %, 50 %] of it"),
        (-0.2, -0.3, -0.1, f"No kind of parameter carries it by itself; {MLP}, have -20 % [-30 %, -10 %] of it"),
        (math.nan, math.nan, math.nan, "No part of it is told apart"),
        (0.6, math.nan, 0.7, f"60 % of it sits in {MLP}"),
    ],
)
def test_a_part_of_the_effect_claims_no_more_than_its_interval(
    share: float, low: float | None, high: float | None, sentence: str
) -> None:
    expected = sentence.format("Where it sits is open, for the interval is wider than the effect")
    assert part_of(share, low, high) == expected


def test_a_part_without_a_known_size_and_ends_of_contributions_alone() -> None:
    assert part_of(0.6, 0.5, 0.7, None) == "60 % [50 %, 70 %] of it sits in the mlp parameters, \u2013 of all"
    row = attribution_row()
    row["result"] |= {"total": -2.0, "kinds": [{"group": "mlp", "contribution": -1.0, "low": -1.2, "high": -0.8}]}
    assert told(answer_by_attribution([row])).sentence.startswith("50 % [40 %, 60 %] of it sits in the mlp parameters")


@pytest.mark.parametrize(
    ("recovered", "half", "sentence", "doubt"),
    [
        (
            1.3,
            0.1,
            "20 % of the elements recover 130 % of {}, more than all of them, as the others work against it; ",
            None,
        ),
        (1.02, 0.1, "20 % of the elements recover 102 % of {}, no more than all of them beyond noise; ", None),
        (
            0.3,
            0.4,
            "20 % of the elements recover 30 % of {}, the most of the shares tried; ",
            "the interval includes 0",
        ),
        (-0.1, 0.05, "No share of the elements that was tried recovers {}; 20 % of the elements make -10 % of", ""),
    ],
)
def test_what_a_graft_recovers_outside_of_a_share(
    recovered: float, half: float, sentence: str, doubt: str | None
) -> None:
    row = attribution_row(point("attribution", 0.2, recovered, half), share=0.2 if recovered > 0.9 else None)
    finding = told(answer_by_attribution([row]))
    assert finding.sentence.startswith(sentence.format("the change in loss on samples that did not score"))
    assert not doubt or doubt in finding.doubts
    row["result"]["graft"]["points"].append(point("attribution", 0.5, math.nan))
    assert told(answer_by_attribution([row])) == finding


@pytest.mark.parametrize(("moved", "words"), [(2.5, "250 % of"), (250.0, "250 times")])
def test_weights_that_moved_farther_than_their_norm(moved: float, words: str) -> None:
    finding = told(answer_by_norms([row_of({"relative_change": moved, "relative_change/a": 12.0})]))
    assert finding.sentence == f"The weights moved by {words} their norm, a most (12 times)."


def test_an_expansion_about_as_wrong_as_no_prediction() -> None:
    finding = told(answer_by_expansion([expansion_row(1.05, interval=[0.6, 1.5])]))
    assert finding.sentence == (
        "It is nonlinear: the first order leaves 105 % of the change in logits unexplained, about as much as "
        "predicting no change leaves."
    )
    assert "the interval includes 100 %, where it predicts nothing" in finding.doubts
    contrary = told(answer_by_expansion([expansion_row(0.7, interval=[0.62, 0.79], first_order=0.4)]))
    assert contrary.doubts == ("the first order predicts a change of the loss of the other sign",)
    still = row_of({"nonlinearity": 0.0, "change": 0.0}, {"regime": "unchanged", "n_targets": 64})
    assert told(answer_by_expansion([still])).sentence == "The weights have not moved, so there is no step to expand."


def test_the_answer_of_streams_has_the_interval_of_its_block() -> None:
    metrics = {"stream_change": 0.2, "stream_null": 0.05, "half_agreement": 0.9, "clearest_layer": 3.0}
    result = {"n_samples": 64, "layers": [1, 3], "norm_intervals": [[0.01, 0.02], [0.18, 0.21]]}
    finding = told(answer_by_streams([row_of(metrics, result)]))
    assert finding.interval == (
        "95 % interval over texts 18 % to 21 %; two halves agree on its direction to a cosine of 0.90"
    )
    assert finding.bar == Bar(0.2, 0.18, 0.21, 0.05)
    assert not finding.doubts
    open_ = told(answer_by_streams([row_of(metrics, {**result, "norm_intervals": [[0.1, 0.2], [0.0, 0.21]]})]))
    assert open_.doubts == ("the interval includes 0",)


def test_streams_whose_halves_disagree_or_are_one_text_are_not_readable() -> None:
    metrics = {"stream_change": 0.2, "stream_null": 0.05, "half_agreement": 0.1}
    finding = told(answer_by_streams([row_of(metrics, {"n_samples": 64})]))
    assert finding.sentence.endswith("of its norm, in no direction that two halves of the text agree on.")
    assert finding.doubts == ("two halves of the text disagree",)
    same = told(answer_by_streams([row_of({**metrics, "stream_null": 0.0}, {"n_samples": 64})]))
    assert same.sentence.endswith("moved by 20 % of its norm.")
    assert same.doubts == ("both halves are the same text, so there is no null",)


@pytest.mark.parametrize(
    ("kept", "ends", "words", "doubt"),
    [
        (1.3, [1.1, 1.5], "keeps 130 % of it, more than the whole model, as the edges left out work against it", None),
        (1.1, [0.9, 1.3], "keeps 110 % of it, no more than the whole model beyond noise", None),
        (-0.1, [-0.3, -0.05], "keeps nothing of it (-10 %)", "random circuits of its size keep as much"),
        (0.5, [-0.2, 0.6], "keeps 50 % of it", "the interval includes 0"),
        (0.5, [-0.2, 1.2], "keeps 50 % of it", "the interval is wider than the behaviour"),
        (0.5, [math.nan, 0.6], "keeps 50 % of it", "no interval"),
    ],
)
def test_what_a_circuit_keeps_outside_of_a_share(kept: float, ends: list[float], words: str, doubt: str | None) -> None:
    curve = {"values": [kept], "sizes": [10], "n_edges": 100, "n_pairs": 20, "intervals": [ends], "band": [[-9.0, 0.0]]}
    finding = told(answer_by_circuit([row_of({}, {"curve": curve})]))
    assert finding.sentence == f"A circuit of 10 of 100 edges {words}.".replace("of it", "of the behaviour", 1)
    assert (not finding.doubts) if doubt is None else doubt in finding.doubts
    undefined = told(answer_by_circuit([row_of({}, {"curve": {**curve, "values": [None]}})]))
    assert undefined.sentence == "What a circuit of 10 of 100 edges keeps of the behaviour is undefined."


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (0.1, "; their log probability moved by -0.3 [-0.498, -0.102] nats on average."),
        (0.2, "; their log probability has not moved beyond noise (-0.3 nats)."),
        (None, "; their log probability moved by -0.3 nats on average."),
    ],
)
def test_the_log_probability_beside_facts_tells_no_more_than_its_interval(error: float | None, words: str) -> None:
    metrics = {"exact_before/untouched": 0.9, "exact/untouched": 0.6, "measured_change/untouched": -0.3}
    finding = told(answer_by_facts([row_of(metrics, {"classes": {"untouched": 98}, "errors": {"untouched": error}})]))
    assert finding.sentence.endswith(words)


def test_a_cost_of_heads_is_doubted_where_its_interval_includes_nothing() -> None:
    costs = {"taylor": (0.05, 0.4), "random": (1.0, 1.2)}
    runs = [{"level": 0.5, "strategy": name, "cost": cost} for name, values in costs.items() for cost in values]
    assert told(answer_by_sweep([row_of({}, {"runs": runs})])).doubts == ("the interval includes 0",)


def test_facts_that_contradict_their_probability_say_yet() -> None:
    metrics = {"exact_before/untouched": 0.5, "exact/untouched": 0.82, "measured_change/untouched": -0.3}
    finding = told(answer_by_facts([row_of(metrics, {"classes": {"untouched": 98}})]))
    assert "; yet their log probability moved by -0.3 nats" in finding.sentence


def test_a_negative_correlation_goes_against_gradients() -> None:
    row = row_of({"first_order_spearman": -0.8}, {"interval": {"spearman": [-0.9, -0.7], "over": "10 edits"}})
    finding = told(answer_by_ripples([row]))
    assert finding.sentence == "What an edit does to other facts goes against their gradients: a correlation of -0.80."
    assert finding.doubts == ()


@pytest.mark.parametrize(
    ("own", "chance", "words", "doubts"),
    [
        ((0.6, 0.7), (0.1, 0.2), "costs +0.65 nats, 0.5 more than random heads", ("random heads cost less",)),
        (
            (-0.3, 0.1),
            (0.5, 0.6),
            "lowers the loss by 0.1 nats, 0.65 less than random heads",
            ("the interval includes 0",),
        ),
    ],
)
def test_heads_that_cost_more_than_random_ones_or_nothing(own: Any, chance: Any, words: str, doubts: Any) -> None:
    costs = {"taylor": own, "random": chance}
    runs = [{"level": 0.5, "strategy": name, "cost": cost} for name, values in costs.items() for cost in values]
    finding = told(answer_by_sweep([row_of({}, {"runs": runs})]))
    assert finding.sentence == f"Closing 50 % of the heads by taylor {words}."
    assert finding.doubts == doubts


def test_a_bound_that_is_missing_is_told_by_the_volume() -> None:
    finding = told(answer_by_volume([volume_row([-5.0, -6.0], 0, lower_bound=None)]))
    assert "a log volume of at least -5 nats" in finding.sentence


def test_the_caption_of_a_small_kind_does_not_say_that_it_has_nothing() -> None:
    kinds = [
        {"group": "norm", "contribution": -0.0024, "elements": 0.0026, "share_low": 0.0017, "share_high": 0.0031},
        {"group": "mlp", "contribution": -0.9976, "elements": 0.9974, "share_low": None, "share_high": None},
    ]
    assert places_caption({"result": {"total": -1.0, "kinds": kinds}}) == (
        "Contributions add up to the change of the metric. mlp 100 % of it with 100 % of the elements; "
        "norm 0.24 % [0.17 %, 0.31 %] of it with 0.26 % of the elements."
    )
