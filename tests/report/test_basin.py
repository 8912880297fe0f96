from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest

from lightning_goldy.core.files import to_json_line
from lightning_goldy.report.basin_charts import (
    chart_volume_cutoffs,
    chart_volume_estimates,
    chart_volume_trajectory,
)
from lightning_goldy.report.basin_plots import plot_volume_cutoffs, plot_volume_estimates, plot_volume_trajectory
from lightning_goldy.report.plots import draw_plots
from lightning_goldy.report.registry import ReportError
from lightning_goldy.report.volumes import (
    cutoff_caption,
    cutoff_curves,
    estimates,
    estimates_caption,
    trajectories,
    trajectory_caption,
)
from tests.report.basin_rows import basin_row, volume

PNG = b"\x89PNG\r\n\x1a\n"


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def saved(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it comes back from the file."""
    return json.loads(to_json_line(row))


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Two analyses of two splits."""
    first = basin_row({"clean": [volume([-10.0, -12.0, -20.0])], "memorised": [volume([-30.0, -31.0, -32.0])]}, step=0)
    second = basin_row(
        {"clean": [volume([-11.0, -12.0, -20.0])], "memorised": [volume([-25.0, -26.0, -27.0])]},
        step=5,
        earlier=[saved(first)],
    )
    return [first, second]


@pytest.fixture
def several() -> dict[str, Any]:
    """One split at three cutoffs on the line log V = 4 log cutoff + 2."""
    values = [4 * math.log(cutoff) + 2 for cutoff in (1e-3, 1e-2, 1e-1)]
    return basin_row({"clean": [volume([v, v, v], cutoff=c) for v, c in zip(values, (1e-3, 1e-2, 1e-1), strict=True)]})


@pytest.mark.parametrize("back", [dict, saved], ids=["as logged", "from the file"])
def test_the_trajectory_has_a_line_per_split_with_its_intervals(rows: Any, back: Any) -> None:
    lines = trajectories(back(rows[1]))
    assert [(line.label, line.steps) for line in lines] == [("clean", (0, 5)), ("memorised", (0, 5))]
    expected = volume([-11.0, -12.0, -20.0])
    assert lines[0].values[1] == pytest.approx(expected.log_volume, abs=1e-12)
    assert (lines[0].low[1], lines[0].high[1]) == pytest.approx(expected.interval(), abs=1e-12)
    figure = plot_volume_trajectory(rows[1])
    axes = figure.axes[0]
    drawn: Any = [container.lines[0].get_xydata() for container in axes.containers]
    assert np.allclose(drawn[1], list(zip(lines[1].steps, lines[1].values, strict=True)))
    # The ends of the error bar are the interval's, where the value lies inside.
    bar = axes.containers[0].lines[2][0].get_segments()[1]
    assert bar[0][1] == pytest.approx(min(lines[0].low[1], lines[0].values[1]))
    assert bar[1][1] == pytest.approx(max(lines[0].high[1], lines[0].values[1]))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["clean", "memorised"]
    assert png(figure).startswith(PNG)


def test_the_chart_has_the_same_points(rows: Any) -> None:
    chart = chart_volume_trajectory(saved(rows[1]))
    lines = trajectories(rows[1])
    for trace, line in zip(chart.data, lines, strict=True):
        assert (trace.x, trace.y, trace.name) == (line.steps, line.values, line.label)
        assert trace.error_y.arrayminus == pytest.approx(
            [value - low for value, low in zip(line.values, line.low, strict=True)]
        )
    assert "below the true log-volume" in chart.layout.meta["caption"]


def test_an_unbounded_volume_is_a_gap_not_a_number() -> None:
    row = basin_row({"clean": [volume([-10.0, math.nan, -12.0])]})
    assert row["metrics"]["log_volume/clean"] is None
    assert row["metrics"]["unbounded/clean"] == 1
    assert math.isnan(trajectories(saved(row))[0].values[0])
    assert chart_volume_trajectory(saved(row)).data[0].y == (None,)
    group = estimates(saved(row))[0]
    assert (group.offsets, group.unbounded) == ((0.0, -2.0), 1)
    assert "(1 unbounded)" in estimates_caption(row)
    for figure in draw_plots(saved(row)).values():
        assert png(figure).startswith(PNG)


def test_all_directions_unbounded_can_be_drawn() -> None:
    row = saved(basin_row({"clean": [volume([math.nan, math.nan])]}))
    assert "no direction is bounded" in [text.get_text() for text in plot_volume_estimates(row).axes[0].texts]
    assert sum(chart_volume_estimates(row).data[0].y) == 0
    for figure in draw_plots(row).values():
        assert png(figure).startswith(PNG)


def test_the_histogram_counts_every_direction_relative_to_the_volume(rows: Any) -> None:
    figure = plot_volume_estimates(rows[0])
    counts = [axes.patches[0].get_data().values.sum() for axes in figure.axes]
    assert counts == [3, 3]
    assert [axes.texts[0].get_text() for axes in figure.axes] == ["clean", "memorised"]
    group = estimates(rows[0])[0]
    assert group.offsets == pytest.approx([each - group.log_volume for each in (-10.0, -12.0, -20.0)])
    # A log-mean-exp of n estimates lies at most log n below the largest.
    assert 0 <= max(group.offsets) <= math.log(3)
    chart = chart_volume_estimates(rows[0])
    assert [sum(trace.y) for trace in chart.data] == [3, 3]
    assert [trace.yaxis for trace in chart.data] == ["y", "y2"]


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
    axes = plot_volume_cutoffs(several).axes[0]
    assert axes.get_xscale() == "log"
    chart = chart_volume_cutoffs(several)
    assert [trace.mode for trace in chart.data] == ["markers", "lines"]
    assert chart.data[0].marker.color == chart.data[1].line.color


def test_at_one_cutoff_the_line_has_the_slope_along_the_directions(rows: Any) -> None:
    curve = cutoff_curves(rows[0])[0]
    # Sensitivity 8 over slope 2.
    assert (curve.fitted, curve.slope) == (False, pytest.approx(4.0))
    (low, at_low), (high, at_high) = curve.line
    assert (low, high) == (0.005, 0.02)
    assert at_high - at_low == pytest.approx(4 * math.log(4))
    assert (at_low + at_high) / 2 == pytest.approx(curve.values[0])


def test_the_caption_says_what_does_not_compare(rows: Any) -> None:
    assert "different sigmas" not in trajectory_caption(rows[1])
    moved = basin_row({"clean": [volume([-1.0], sigma=0.2)]}, step=9, earlier=[saved(rows[1])])
    assert "different sigmas" in trajectory_caption(moved)
    with_adam = basin_row({"clean": [volume([-1.0], preconditioner="adam")]}, step=9, earlier=[saved(rows[1])])
    assert "without a preconditioner lie lower" in trajectory_caption(with_adam)
    mixed = basin_row(
        {"clean": [volume([-9.0], cutoff=1e-3), volume([-5.0], cutoff=1e-2, preconditioner="adam")]},
    )
    assert "different proposals" in cutoff_caption(mixed)
    assert "different proposals" not in cutoff_caption(rows[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda result: result.update(trajectory=None), r"'result\.trajectory' must be a list"),
        (lambda result: result.update(volumes=[]), r"'result\.volumes' must be a list of at least 1"),
        (lambda result: result["volumes"][0].update(estimates="many"), r"volumes\[0\]\.estimates' must be a list"),
        (lambda result: result["volumes"][1].update(estimates=[True]), r"volumes\[1\]\.estimates\[0\]'.*True"),
        (lambda result: result["volumes"][0].update(label=3), r"volumes\[0\]\.label' must be text, got 3"),
        (lambda result: result["trajectory"][0]["steps"].append(7), r"trajectory\[0\]' differ in length"),
    ],
)
def test_bad_rows_are_named(rows: Any, change: Any, message: str) -> None:
    row = saved(rows[1])
    change(row["result"])
    with pytest.raises(ReportError, match=message):
        draw_plots(row)


def test_names_are_shown_as_they_are() -> None:
    name = "a$\\frac{_"
    row = basin_row({name: [volume([-1.0, -2.0])]})
    for figure in draw_plots(row).values():
        assert png(figure).startswith(PNG)
    assert "&#36;" in chart_volume_trajectory(row).data[0].name


def test_the_page_has_the_section(rows: Any, write_rows: Any, page_of: Any, tmp_path: Any) -> None:
    write_rows(tmp_path, *map(saved, rows))
    page = page_of(tmp_path)
    assert "Basin volume" in page.text("h2")
    assert {"The volume over the run", "What the volume rests on", "The volume by cutoff"} <= set(page.text("h4"))
    assert "log-mean-exp of the directions' estimates, nats; a lower bound in expectation" in page.cells()
