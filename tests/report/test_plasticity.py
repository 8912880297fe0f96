from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy as np
import pytest

from lightning_goldy.core.files import to_json_line
from lightning_goldy.report.charts import CHARTS
from lightning_goldy.report.plasticity import (
    attention_grid,
    gate_timeline,
    loss_course,
    plasticity_caption,
    score_caption,
    score_grid,
)
from lightning_goldy.report.plasticity_sweep import sweep_caption, sweep_lines
from lightning_goldy.report.plots import draw_plots
from lightning_goldy.report.registry import ReportError
from tests.report.plasticity_rows import plasticity_row, sweep_row


def saved(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it comes back from the file."""
    return json.loads(to_json_line(row))


def test_the_time_line_has_a_span_between_changes() -> None:
    timeline = gate_timeline(plasticity_row())
    assert timeline.labels == ("0.0", "0.1", "1.0", "1.1")
    assert timeline.edges == (0, 4, 6, 8, 9)
    assert timeline.opened.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]]
    # A change at the very step of the row still has a width.
    assert gate_timeline(plasticity_row(8)).edges == (0, 4, 6, 8, 9)


def test_the_course_has_both_ends_of_every_jump() -> None:
    course = loss_course(saved(plasticity_row()))
    assert course.steps == (2, 4, 4, 6, 6, 8)
    assert course.loss[:5] == (2.0, 2.0, 2.5, 2.25, 3.0)
    assert math.isnan(course.loss[5])
    assert course.events == ((4, "1 cut"), (6, "1 cut"), (8, "1 opened"))


def test_scores_know_what_was_cut_and_what_was_closed() -> None:
    grid = score_grid(saved(plasticity_row()))
    assert grid.values.tolist() == [[0.25, -1.0], [3.0, 0.125]]
    assert (grid.closed, grid.cut) == ({(1, 0)}, {(0, 1)})
    assert score_grid(plasticity_row(cut=False)) is None
    assert score_caption(plasticity_row(cut=False)) == "no head has been scored yet"


def test_maps_are_by_moment_and_head() -> None:
    grid = attention_grid(saved(plasticity_row()))
    assert grid.moments == ("before the cut", "right after", "recovered")
    assert grid.heads == ("1.0, cut", "0.0, kept", "0.1, cut later")
    assert grid.maps.shape == (3, 3, 2, 2)


def test_the_lines_of_a_sweep_are_means_over_seeds() -> None:
    taylor, random = sweep_lines(saved(sweep_row()))
    assert (taylor.label, taylor.levels) == ("taylor", (0.1, 0.5))
    assert taylor.mean == pytest.approx((0.05, 0.3), abs=1e-12)
    assert (taylor.low, taylor.high) == ((0.0, 0.2), (0.1, 0.4))
    assert random.mean[0] == pytest.approx(0.2, abs=1e-12)
    assert math.isnan(random.mean[1])
    assert sweep_caption(sweep_row()).startswith("8 runs with 2 seeds")


def test_captions() -> None:
    assert plasticity_caption(plasticity_row()) == (
        "by taylor: 3 heads are open, 25 % closed; loss 2.25 nats, cycle 1 of 1"
    )


@pytest.mark.parametrize("row", [plasticity_row(), plasticity_row(cut=False), saved(plasticity_row()), sweep_row()])
def test_every_figure_can_be_drawn(row: dict[str, Any]) -> None:
    plots, charts = draw_plots(row), CHARTS.draw(row)
    expected = 1 if row["analysis"] == "plasticity_sweep" else 4
    assert (len(plots), len(charts)) == (expected, expected)
    for figure in plots.values():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        assert buffer.getvalue().startswith(b"\x89PNG")
    for chart in charts.values():
        assert "caption" in chart.layout.meta
        assert "NaN" not in chart.to_json()


def test_what_the_charts_hold_is_what_the_row_holds() -> None:
    charts = CHARTS.draw(saved(plasticity_row()))
    gates = charts["Open heads over the run"].data[0]
    assert np.array_equal(np.array(gates.z), gate_timeline(plasticity_row()).opened)
    assert gates.x == (0, 4, 6, 8, 9)
    loss, multiplier = charts["The loss over the cycles"].data
    assert loss.y == (2.0, 2.0, 2.5, 2.25, 3.0, None)
    assert multiplier.y == (1.0, 1.0, 3.0, 2.0, 3.0, 1.0)
    scores = charts["Importance of heads"].data[0]
    assert scores.text == (["0.25", "-1 (cut)"], ["3 (closed)", "0.125"])


def test_many_heads_stay_drawable() -> None:
    row = plasticity_row()
    row["result"]["heads_per_layer"] = [16] * 30
    figure = draw_plots(row)["timeline"]
    assert figure.get_size_inches()[1] <= 30
    assert len(figure.axes[0].get_yticks()) <= 40


@pytest.mark.parametrize(
    ("change", "function", "message"),
    [
        ({"timeline": None}, gate_timeline, "'timeline' must be of the kind list, got None"),
        ({"timeline": []}, gate_timeline, "must not be empty"),
        ({"curve": {"steps": [1]}}, loss_course, "a list of numbers is missing"),
        ({"curve": {"steps": [1], "loss": [], "multiplier": []}}, loss_course, "of one length"),
        ({"scores": {}}, score_grid, "'values' must be of the kind list"),
        ({"attention": {"heads": [], "n_cut": 0, "maps": {"cut": []}}}, attention_grid, "a square map per head"),
        ({"runs": []}, sweep_lines, "at least one run"),
        ({"runs": [{"strategy": "taylor"}]}, sweep_lines, r"'result.runs\[0\]' lacks 'level'"),
    ],
)
def test_a_row_that_lacks_something_says_so(change: dict[str, Any], function: Any, message: str) -> None:
    row = plasticity_row()
    row["result"] |= change
    with pytest.raises(ReportError, match=message):
        function(row)
