from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from lightning_goldy.cli import main
from lightning_goldy.report import ReportError, write_comparison
from lightning_goldy.report.comparison import Samples, differences, paired_interval
from lightning_goldy.report.run import read_run
from tests.report.conftest import Page

Build = Callable[..., dict[str, Any]]
Write = Callable[..., Path]
EVIL = "<script>alert('x')</script>"


def volumes(row: dict[str, Any], estimates: list[float], **settings: Any) -> dict[str, Any]:
    volume = {"split": "clean", "sigma": 0.1, "cutoff": 0.01, "measure": "gaussian", "preconditioner": "none"}
    volume |= {"seed": 0, "first_direction": 0, "dimension": 10, "log_volume": max(estimates), "estimates": estimates}
    named = {"analysis": "basin_volume", "name": "basin_volume"}
    return row | named | {"metrics": {}, "result": {"volumes": [volume | settings]}}


@pytest.fixture
def two(tmp_path: Path, snapshot_row: Build, golden_row: Build, write_rows: Write) -> tuple[Path, Path]:
    """Two runs with the same analyses; the second moved more, and its volume has another direction of difference."""
    runs = tmp_path / "a" / "version_0", tmp_path / "b" / "version_0"
    for run, moved, estimates in zip(runs, (0.08, 0.12), ([-5.0, -6.0, -7.0], [-8.0, -9.5, -10.0]), strict=True):
        row = snapshot_row(10)
        row["metrics"]["relative_change"] = moved
        write_rows(run, row)
        write_rows(run, volumes(golden_row(10), estimates))
    return runs


def test_a_column_for_each_run_and_paired_differences(two: tuple[Path, Path]) -> None:
    target = write_comparison(two)
    assert target == two[0] / "comparison.html"
    page = Page(target.read_text(encoding="utf-8"))
    assert page.text("h2") == ["Answers", "b/version_0 minus a/version_0"]
    assert page.text("th")[:3] == ["question", "a/version_0", "b/version_0"]
    told = {difference.what: difference for difference in differences(*map(read_run, two))}
    moved = told["golden_snapshot: relative_change"]
    assert moved.value == pytest.approx(0.04)
    volume = told["log volume, nats (clean)"]
    # Differences -3, -3.5, -3: their mean, and Student's interval with two degrees of freedom by hand.
    assert volume.value == pytest.approx(-19 / 6)
    half = 4.302653 * (1 / 12) ** 0.5 / 3**0.5
    assert volume.low == pytest.approx(-19 / 6 - half, abs=1e-5)
    assert volume.high == pytest.approx(-19 / 6 + half, abs=1e-5)
    assert volume.remark == "paired over 3 directions"


def test_a_difference_of_volumes_on_one_direction_is_called_weak(
    two: tuple[Path, Path], golden_row: Build, write_rows: Write
) -> None:
    write_rows(two[1], volumes(golden_row(10), [-8.0, -9.5, -10.0], effective_sample_size=1.0))
    for ordered in (two, two[::-1]):
        volume = next(told for told in differences(*map(read_run, ordered)) if "volume" in told.what)
        assert volume.value is not None
        assert volume.remark == (
            "paired over 3 directions; weak: volumes rest on an effective 1 of 3 directions, so it tells of the radii "
            "along them"
        )


def test_volumes_of_other_priors_are_not_subtracted(
    two: tuple[Path, Path], golden_row: Build, write_rows: Write
) -> None:
    write_rows(two[1], volumes(golden_row(10), [-8.0, -9.0], sigma=0.2))
    volume = next(told for told in differences(*map(read_run, two)) if "volume" in told.what)
    assert volume.value is None
    assert volume.remark == "not comparable: sigma 0.1 against 0.2"
    assert "not comparable: sigma 0.1 against 0.2" in write_comparison(two).read_text(encoding="utf-8")


def test_other_numbers_of_samples_are_not_subtracted(
    two: tuple[Path, Path], golden_row: Build, write_rows: Write
) -> None:
    rows = [golden_row(10), golden_row(10)]
    rows[1]["result"]["n_samples"] = 9
    for run, row in zip(two, rows, strict=True):
        write_rows(run, row)
    golden = next(told for told in differences(*map(read_run, two)) if told.what.startswith("golden_parameters"))
    assert (golden.value, golden.remark) == (None, "2 against 9 samples")


def test_other_settings_are_not_subtracted(two: tuple[Path, Path], golden_row: Build, write_rows: Write) -> None:
    rows = [golden_row(10), golden_row(10)]
    rows[1]["result"]["top_k_percent"] = 1.0
    for run, row in zip(two, rows, strict=True):
        write_rows(run, row)
    golden = next(told for told in differences(*map(read_run, two)) if told.what.startswith("golden_parameters"))
    was = rows[0]["result"]["top_k_percent"]
    assert (golden.value, golden.remark) == (None, f"not comparable: top_k_percent {was} against 1.0")


def test_a_comparison_as_json(two: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(two[0]), "--compare", str(two[1]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["runs"]) == ["a/version_0", "b/version_0"]
    assert len(told["runs"]["b/version_0"]["answers"]) == 5
    volume = next(entry for entry in told["differences"] if "volume" in entry["what"])
    assert volume["run"] == "b/version_0"
    assert volume["value"] == pytest.approx(-19 / 6)
    assert not (two[0] / "comparison.html").exists()


def test_a_comparison_needs_two_runs(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="at least two different runs"):
        write_comparison([two[0], two[0]])
    with pytest.raises(ReportError, match="is a directory; give the file"):
        write_comparison(two, tmp_path)


def test_hostile_names_stay_text(tmp_path: Path, golden_row: Build, write_rows: Write) -> None:
    runs = tmp_path / "a&<b>", tmp_path / "c"
    for run in runs:
        row = golden_row(1) | {"analysis": EVIL, "name": "x"}
        row["metrics"] = {EVIL: 1.0}
        write_rows(run, row)
    text = write_comparison(runs).read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "a&amp;&lt;b&gt;" in text


def record(values: list[float], weights: list[float] | None = None, power: float = 1.0) -> dict[str, Any]:
    keys = [f"k{place}" for place in range(len(values))]
    return {"keys": keys, "numerators": values, "denominators": weights or [1.0] * len(values), "power": power}


def test_a_paired_interval_of_means_is_students() -> None:
    first, second = [0.5, 1.0, 2.0, 4.0, 3.0], [1.5, 1.0, 3.0, 4.5, 4.0]
    value, low, high = paired_interval(*(Samples.of(record(values)) for values in (first, second)))
    found = stats.ttest_rel(second, first).confidence_interval(0.95)
    assert value == pytest.approx(0.7)
    assert (low, high) == pytest.approx((found.low, found.high))


def test_a_paired_interval_of_roots_of_ratios_by_hand() -> None:
    first, second = record([4.0, 9.0], [4.0, 4.0], 0.5), record([16.0, 9.0], [4.0, 4.0], 0.5)
    value, low, high = paired_interval(Samples.of(first), Samples.of(second))
    assert value == pytest.approx((25 / 8) ** 0.5 - (13 / 8) ** 0.5)
    # Without the first both are sqrt(9 / 4); without the second 2 against 1: the jackknife's error is half of 1.
    assert (low, high) == pytest.approx((value - 12.7062 * 0.5, value + 12.7062 * 0.5), abs=1e-4)


def with_samples(row: dict[str, Any], drift: dict[str, Any], **result: Any) -> dict[str, Any]:
    value = sum(drift["numerators"]) / sum(drift["denominators"])
    named = {"analysis": "attention_tracker", "name": "attention", "metrics": {"drift": value, "entropy": 1.0}}
    return row | named | {"result": {"n_samples": 3, "per_sample": {"drift": drift}, **result}}


def test_headlines_are_paired_sample_by_sample(two: tuple[Path, Path], golden_row: Build, write_rows: Write) -> None:
    values = [1.0, 2.0, 4.0], [1.5, 2.25, 4.75]
    for run, found in zip(two, values, strict=True):
        write_rows(run, with_samples(golden_row(10), record(found)), name="attention")
    # The order of samples does not matter: another number of ranks has another one.
    told = {entry.what: entry for entry in differences(*map(read_run, two))}
    drift, entropy = told["attention: drift"], told["attention: entropy"]
    assert (drift.value, drift.remark) == (pytest.approx(0.5), "paired over 3 samples; the interval includes 0")
    assert (drift.low, drift.high) == pytest.approx((0.5 - 4.302653 * 0.25 / 3**0.5, 0.5 + 4.302653 * 0.25 / 3**0.5))
    assert (entropy.value, entropy.low, entropy.remark) == (0.0, None, "no interval")
    turned = {name: found[::-1] if isinstance(found, list) else found for name, found in record(values[1]).items()}
    write_rows(two[1], with_samples(golden_row(10), turned), name="attention")
    again = {entry.what: entry for entry in differences(*map(read_run, two))}
    assert again["attention: drift"] == drift


def test_other_samples_or_seeds_are_refused_by_name(
    two: tuple[Path, Path], golden_row: Build, write_rows: Write
) -> None:
    write_rows(two[0], with_samples(golden_row(10), record([1.0, 2.0, 4.0]), seed=0), name="attention")
    other = record([1.0, 2.0, 4.0]) | {"keys": ["k0", "k1", "other"]}
    write_rows(two[1], with_samples(golden_row(10), other, seed=0), name="attention")
    drift = next(entry for entry in differences(*map(read_run, two)) if "drift" in entry.what)
    assert (drift.value, drift.low, drift.remark) == (None, None, "other samples: 2 of 3 are in both")
    # The row holds no samples of the entropy, which was of the same ones.
    entropy = next(entry for entry in differences(*map(read_run, two)) if "entropy" in entry.what)
    assert (entropy.value, entropy.remark) == (None, "other samples")
    write_rows(two[1], with_samples(golden_row(10), record([1.0, 2.0, 4.0]), seed=1), name="attention")
    drift = next(entry for entry in differences(*map(read_run, two)) if "drift" in entry.what)
    assert (drift.value, drift.remark) == (None, "not comparable: seed 0 against 1")


def test_volumes_of_other_numbers_of_samples_are_not_subtracted(
    two: tuple[Path, Path], golden_row: Build, write_rows: Write
) -> None:
    for run, count in zip(two, (16, 8), strict=True):
        row = volumes(golden_row(10), [-5.0, -6.0])
        row["result"]["n_samples"] = count
        write_rows(run, row)
    volume = next(told for told in differences(*map(read_run, two)) if "volume" in told.what)
    assert (volume.value, volume.remark) == (None, "16 against 8 samples")


def test_what_is_no_number_has_no_difference(two: tuple[Path, Path], snapshot_row: Build, write_rows: Write) -> None:
    row = snapshot_row(10)
    row["metrics"]["relative_change"] = float("nan")
    write_rows(two[1], row)
    told = {entry.what: entry for entry in differences(*map(read_run, two))}["golden_snapshot: relative_change"]
    assert (told.value, told.remark) == (None, "at least one of them is no number")


def test_facts_are_paired_by_their_ids(two: tuple[Path, Path], golden_row: Build, write_rows: Write) -> None:
    for run, measured, exact in zip(two, ([-0.1, -0.3], [0.1, 0.1]), ([1, 0], [1, 1]), strict=True):
        points = {"piece": ["a", "b"], "class": ["untouched"] * 2, "predicted": [0.0, 0.0], "measured": measured}
        metrics = {"measured_change/untouched": sum(measured) / 2, "exact/untouched": sum(exact) / 2}
        row = golden_row(10) | {"analysis": "coupling_drift", "name": "facts", "metrics": metrics}
        write_rows(run, row | {"result": {"n_pieces": 2, "points": points | {"exact": exact}}}, name="facts")
    told = {entry.what: entry for entry in differences(*map(read_run, two))}
    assert told["facts: measured_change/untouched"].value == pytest.approx(0.3)
    assert told["facts: exact/untouched"].remark == "paired over 2 samples; the interval includes 0"
    assert told["facts: measured_change/untouched"].high == pytest.approx(0.3 + 12.7062 * 0.1, abs=1e-4)


def with_grafts(row: dict[str, Any], harm: list[float], recovered: list[float], **graft: Any) -> dict[str, Any]:
    pairs = {"harm": record(harm), "recovered/0.05": record(recovered, [2.0, 2.0, 4.0])}
    told = {"n_samples": 3, "metric": "loss", "graft": {"pieces": "elements", "per_sample": pairs, **graft}}
    named = {"analysis": "change_attribution", "name": "change", "metrics": {"harm": sum(harm) / 3}}
    return row | named | {"result": told}


def test_harm_and_what_grafts_recover_are_paired(two: tuple[Path, Path], golden_row: Build, write_rows: Write) -> None:
    harms, shares = ([0.1, 0.2, 0.3], [0.2, 0.4, 0.6]), ([1.0, 1.0, 2.0], [1.5, 2.0, 3.5])
    for run, harm, recovered in zip(two, harms, shares, strict=True):
        write_rows(run, with_grafts(golden_row(10), harm, recovered), name="change")
    told = {entry.what: entry for entry in differences(*map(read_run, two))}
    harm, recovered = told["change: harm"], told["change: recovered by 5 % of the elements"]
    # Of harms 0.1, 0.2 and 0.3 more: Student's interval of their mean.
    assert (harm.value, harm.low) == (pytest.approx(0.2), pytest.approx(0.2 - 4.302653 * 0.1 / 3**0.5))
    assert harm.remark == "paired over 3 samples; the interval includes 0"
    # 7 of 8 against 4 of 8; without each sample 5.5 / 6, 5 / 6 and 3.5 / 4 against 3 / 6, 3 / 6 and 2 / 4.
    left = [5.5 / 6 - 0.5, 5 / 6 - 0.5, 0.875 - 0.5]
    error = (2 / 3 * sum((value - sum(left) / 3) ** 2 for value in left)) ** 0.5
    assert (recovered.value, recovered.low) == (pytest.approx(0.375), pytest.approx(0.375 - 4.302653 * error))
    assert "change: recovered by 5 % of the elements" in write_comparison(two).read_text(encoding="utf-8")


def test_grafts_of_other_pieces_samples_or_seeds_are_not_paired(
    two: tuple[Path, Path], golden_row: Build, write_rows: Write
) -> None:
    def told_of(**graft: Any) -> dict[str, Any]:
        row = with_grafts(golden_row(10), [0.2, 0.4, 0.6], [1.5, 2.0, 3.5], **graft)
        row["result"] |= {name: row["result"]["graft"].pop(name) for name in ("metric", "seed") if name in graft}
        write_rows(two[1], row, name="change")
        return {entry.what: entry for entry in differences(*map(read_run, two)) if entry.what.startswith("change")}

    write_rows(two[0], with_grafts(golden_row(10), [0.1, 0.2, 0.3], [1.0, 1.0, 2.0]), name="change")
    assert set(told_of(pieces="units")) == {"change: harm"}
    for wrong in ({"metric": "kl"}, {"seed": 1}):
        refused = told_of(**wrong)
        assert len(refused) == 2
        assert {entry.value for entry in refused.values()} == {None}
        assert all(entry.remark.startswith(f"not comparable: {next(iter(wrong))} ") for entry in refused.values())
    other = {"harm": record([0.1, 0.2, 0.3]) | {"keys": ["k0", "k1", "other"]}}
    assert told_of(per_sample=other)["change: harm"].remark == "other samples: 2 of 3 are in both"
