from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest

from lightning_goldy.core.files import to_json_line
from lightning_goldy.report.figures import ReportError, draw_figures
from lightning_goldy.report.topics.basin import (
    chart_volume_cutoffs,
    chart_volume_estimates,
    chart_volume_trajectory,
    cutoff_caption,
    cutoff_curves,
    estimates,
    estimates_caption,
    trajectories,
    trajectory_caption,
)
from tests.report.basin_rows import basin_row, volume

PNG = b"\x89PNG\r\n\x1a\n"


def saved(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it comes back from the file."""
    return json.loads(to_json_line(row))


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Two analyses of two splits."""
    first = basin_row({"clean": [volume([-10.0, -12.0, -20.0])], "memorised": [volume([-30.0, -31.0, -32.0])]}, step=0)
    second = basin_row({"clean": [volume([-11.0, -12.0, -20.0])], "memorised": [volume([-25.0, -26.0, -27.0])]}, step=5)
    return [first, second]


@pytest.fixture
def several() -> dict[str, Any]:
    """One split at three cutoffs on the line log V = 4 log cutoff + 2."""
    values = [4 * math.log(cutoff) + 2 for cutoff in (1e-3, 1e-2, 1e-1)]
    return basin_row({"clean": [volume([v, v, v], cutoff=c) for v, c in zip(values, (1e-3, 1e-2, 1e-1), strict=True)]})


@pytest.mark.parametrize("back", [dict, saved], ids=["as logged", "from the file"])
def test_the_trajectory_has_a_line_per_split(rows: Any, back: Any) -> None:
    lines = trajectories(list(map(back, rows)))
    assert [(label, line.x) for label, line in lines.items()] == [("clean", (0, 5)), ("memorised", (0, 5))]
    line, expected = lines["clean"], volume([-11.0, -12.0, -20.0])
    assert line.y[1] == pytest.approx(expected.log_volume, abs=1e-12)
    assert line.low is not None
    assert line.high is not None
    # The resampled directions tell nothing of where the volume lies.
    assert math.isnan(line.low[1])
    assert math.isnan(line.high[1])
    assert list(line.notes) == ["none, sigma 0.1"] * 2


def test_the_trajectory_is_drawn_with_the_same_points(rows: Any) -> None:
    figure = chart_volume_trajectory(list(map(saved, rows)))
    points = figure.data["points"]
    assert points["line"] == ["clean", "clean", "memorised", "memorised"]
    assert points["x"] == [0, 5, 0, 5]
    lines = trajectories(rows).values()
    for column, values in (("y", "y"), ("low", "low"), ("high", "high")):
        expected = [value for line in lines for value in getattr(line, values)]
        if all(value is None or math.isnan(value) for value in expected):
            # No band is drawn of intervals that nothing has.
            assert column not in points
            continue
        # The figure has six significant digits.
        assert [math.nan if value is None else value for value in points[column]] == pytest.approx(
            expected, rel=1e-5, nan_ok=True
        )
    drawn = figure.bare()["layer"]
    assert drawn[0]["mark"]["type"] == ("area" if "low" in points else "line")
    assert drawn[int("low" in points)]["encoding"]["y"]["title"] == "log-volume, nats"
    with_intervals = json.loads(json.dumps([saved(row) for row in rows]))
    for row in with_intervals:
        for bound in row["result"]["volumes"]:
            bound |= {"interval_low": bound["log_volume"] - 1, "interval_high": bound["log_volume"] + 1}
    banded = chart_volume_trajectory(with_intervals)
    assert banded.bare()["layer"][0]["mark"]["type"] == "area"
    assert banded.data["points"]["low"] == pytest.approx([value - 1 for value in points["y"]], rel=1e-5)
    assert "below the true log-volume" in figure.caption


def test_a_bridge_is_drawn_with_its_error_and_told_with_what_speaks_against_it(rows: Any) -> None:
    walked = {"split": "clean", "label": "clean", "log_volume": -3.0, "error": 0.5, "method": "bridge", "weak": "few"}
    rows[1]["result"]["bridges"] = [walked]
    line = trajectories(list(map(saved, rows)))["clean by a bridge"]
    assert (line.x, line.y, line.low, line.high) == ((5,), (-3.0,), (-3.98,), (-2.02,))
    assert line.notes == ("by a bridge; weak: few",)
    caption = trajectory_caption(rows)
    assert "The volume of clean by a bridge is -3 +- 0.5 nats (one standard error). Do not rely on it: few." in caption
    assert "bootstrap" not in caption


def test_an_unbounded_volume_is_a_gap_not_a_number() -> None:
    row = saved(basin_row({"clean": [volume([-10.0, math.nan, -12.0])]}))
    assert row["metrics"]["log_volume/clean"] is None
    assert row["metrics"]["unbounded/clean"] == 1
    assert math.isnan(trajectories([row])["clean"].y[0] or 0.0)
    assert chart_volume_trajectory([row]).data["points"]["y"] == [None]
    assert chart_volume_cutoffs(row).data["points"]["value"] == [None]
    assert chart_volume_cutoffs(row).data["ends"]["cutoff"] == []
    group = estimates(row)[0]
    assert (group.offsets, group.unbounded) == ((0.0, -2.0), 1)
    assert "(1 unbounded)" in estimates_caption(row)
    for figure in draw_figures(row).values():
        assert figure.png().startswith(PNG)


def test_all_directions_unbounded_can_be_drawn() -> None:
    row = saved(basin_row({"clean": [volume([math.nan, math.nan])]}))
    bins = chart_volume_estimates(row).data["bins"]
    assert set(bins["panel"]) == {"clean: no direction is bounded"}
    assert sum(bins["count"]) == 0
    for figure in draw_figures(row).values():
        assert figure.png().startswith(PNG)


def test_the_histogram_counts_every_direction_relative_to_the_volume(rows: Any) -> None:
    figure = chart_volume_estimates(rows[0])
    bins = figure.data["bins"]
    counts = dict.fromkeys(bins["panel"], 0)
    for label, count in zip(bins["panel"], bins["count"], strict=True):
        counts[label] += count
    assert counts == {"clean": 3, "memorised": 3}
    assert list(bins["low"])[1:20] == list(bins["high"])[:19]
    group = estimates(rows[0])[0]
    assert group.offsets == pytest.approx([value - group.log_volume for value in (-10.0, -12.0, -20.0)])
    # A log-mean-exp of n estimates lies at most log n below the largest.
    assert 0 <= max(group.offsets) <= math.log(3)
    # Panels below each other share both axes, which facets do.
    facet = figure.bare()
    assert facet["facet"]["row"]["field"] == "panel"
    assert "resolve" not in facet


def test_the_line_over_cutoffs_is_the_fitted_one(several: Any) -> None:
    (curve,) = cutoff_curves(saved(several))
    assert curve.fitted
    assert curve.slope == pytest.approx(4.0, abs=1e-12)
    assert curve.cutoffs == (1e-3, 1e-2, 1e-1)
    for cutoff, value in curve.line:
        assert value == pytest.approx(4 * math.log(cutoff) + 2, abs=1e-12)
    assert "clean: slope 4 over the cutoffs" in cutoff_caption(several)
    assert several["metrics"]["scaling_exponent_fit/clean"] == pytest.approx(4.0, abs=1e-12)
    assert several["metrics"]["learning_coefficient_slope/clean"] == pytest.approx(4.0, abs=1e-12)
    figure = chart_volume_cutoffs(several)
    assert figure.data["points"]["cutoff"] == [1e-3, 1e-2, 1e-1]
    assert figure.data["points"]["value"] == pytest.approx(list(curve.values), rel=1e-5)
    assert figure.data["ends"]["cutoff"] == [1e-3, 1e-1]
    assert figure.data["ends"]["value"] == pytest.approx([value for _, value in curve.line], rel=1e-5)
    for layer in figure.bare()["layer"]:
        assert layer["encoding"]["x"]["scale"]["type"] == "log"
        # Points and line of one split share a colour.
        assert layer["encoding"]["color"]["field"] == "split"
    assert [layer["mark"]["type"] for layer in figure.bare()["layer"]] == ["line", "point"]
    bounded = copy.deepcopy(saved(several))
    for bound in bounded["result"]["volumes"]:
        bound |= {"interval_low": bound["log_volume"] - 1, "interval_high": bound["log_volume"] + 1}
    layers = chart_volume_cutoffs(bounded).bare()["layer"]
    assert [layer["mark"]["type"] for layer in layers] == ["line", "rule", "point"]


def test_at_one_cutoff_the_line_has_the_slope_along_the_directions(rows: Any) -> None:
    curve = cutoff_curves(rows[0])[0]
    # Sensitivity 8 over slope 2.
    assert (curve.fitted, curve.slope) == (False, pytest.approx(4.0))
    (low, at_low), (high, at_high) = curve.line
    assert (low, high) == (0.005, 0.02)
    assert at_high - at_low == pytest.approx(4 * math.log(4))
    assert (at_low + at_high) / 2 == pytest.approx(curve.values[0])


def test_the_caption_says_what_does_not_compare(rows: Any) -> None:
    assert "different sigmas" not in trajectory_caption(rows)
    moved = basin_row({"clean": [volume([-1.0], sigma=0.2)]}, step=9)
    assert "different sigmas" in trajectory_caption([*rows, moved])
    assert "without a preconditioner lie lower" not in trajectory_caption(rows)
    with_adam = basin_row({"clean": [volume([-1.0], preconditioner="adam")]}, step=9)
    assert "without a preconditioner lie lower" in trajectory_caption([*rows, with_adam])
    mixed = basin_row(
        {"clean": [volume([-9.0], cutoff=1e-3), volume([-5.0], cutoff=1e-2, preconditioner="adam")]},
    )
    assert "different proposals" in cutoff_caption(mixed)
    assert "different proposals" not in cutoff_caption(rows[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: result.update(volumes=[]), r"'result\.volumes' must be a list of at least 1"),
        (lambda result: result["volumes"][0].update(estimates="many"), r"volumes\[0\]\.estimates' must be a list"),
        (lambda result: result["volumes"][1].update(estimates=[True]), r"volumes\[1\]\.estimates\[0\]'.*True"),
        (lambda result: result["volumes"][0].update(label=3), r"volumes\[0\]\.label' must be text, got 3"),
        (lambda result: result["volumes"][0].update(interval_low="x"), r"volumes\[0\]\.interval_low' must be a number"),
        (lambda result: result.update(fits=3), r"'result\.fits' must be a list of at least 0"),
    ],
)
def test_bad_rows_are_named(rows: Any, change: Any, message: str) -> None:
    row = saved(rows[1])
    change(row["result"])
    with pytest.raises(ReportError, match=message):
        draw_figures(row)


def test_a_bad_earlier_row_is_named_too(rows: Any) -> None:
    earlier = saved(rows[0])
    earlier["result"]["volumes"][0]["log_volume"] = "deep"
    with pytest.raises(ReportError, match=r"volumes\[0\]\.log_volume' must be a number or null, got 'deep'"):
        draw_figures(saved(rows[1]), [earlier])


def test_names_are_shown_as_they_are() -> None:
    name = "a$\\frac{_"
    row = basin_row({name: [volume([-1.0, -2.0])]})
    figures = draw_figures(row)
    assert set(figures) == {"trajectory", "estimates", "cutoffs"}
    for figure in figures.values():
        assert figure.png().startswith(PNG)
    assert figures["trajectory"].data["points"]["line"] == [name]
    assert set(figures["estimates"].data["bins"]["panel"]) == {name}


def test_the_page_has_the_section(rows: Any, write_rows: Any, page_of: Any, tmp_path: Any) -> None:
    write_rows(tmp_path, *map(saved, rows))
    page = page_of(tmp_path)
    assert "Basin volume" in page.text("h2")
    assert {"The volume over the run", "What the volume rests on", "The volume by cutoff"} <= set(page.text("h4"))
    assert "log-mean-exp of the directions' estimates, nats; a lower bound in expectation" in page.cells()
