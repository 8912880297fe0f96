from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import pytest

from lightning_goldy.core.files import to_json_line
from lightning_goldy.report.figures import Figure, ReportError, draw_figures, figures_of, reads_of
from lightning_goldy.report.history import RowHistory
from lightning_goldy.report.topics.heads import (
    attention_grid,
    chart_attention_maps,
    chart_gate_timeline,
    chart_head_scores,
    chart_plasticity_loss,
    chart_plasticity_sweep,
    gate_timeline,
    loss_course,
    plasticity_caption,
    score_caption,
    score_grid,
    sweep_caption,
    sweep_lines,
)
from tests.report.heads_rows import plasticity_row, plasticity_rows, sweep_row


def saved(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it comes back from the file."""
    return json.loads(to_json_line(row))


def test_the_time_line_has_a_span_between_changes() -> None:
    timeline = gate_timeline([plasticity_row()])
    assert timeline.labels == ("0.0", "0.1", "1.0", "1.1")
    assert timeline.edges == (0, 4, 6, 8, 9)
    assert timeline.opened.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1], [1, 1, 1, 1]]
    # A change at the very step of the row still has a width.
    assert gate_timeline([plasticity_row(8)]).edges == (0, 4, 6, 8, 9)


def test_the_course_has_both_ends_of_every_jump() -> None:
    course = loss_course([saved(plasticity_row())])
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
    figures = draw_figures(row)
    names = ["timeline", "loss", *(["scores", "attention"] if row["result"].get("scores") else [])]
    assert list(figures) == (["loss_by_level"] if row["analysis"] == "plasticity_sweep" else names)
    for figure in figures.values():
        assert figure.caption
        assert figure.png().startswith(b"\x89PNG")
        assert "NaN" not in json.dumps(figure.spec())


def test_a_run_that_has_cut_nothing_says_so() -> None:
    row = plasticity_row(cut=False)
    assert chart_head_scores(row) == "No head has been scored yet."
    assert chart_attention_maps(row) == "There are no attention maps yet."


def test_rows_of_which_each_tells_what_is_new_make_the_whole_run() -> None:
    whole, parts = plasticity_row(), plasticity_rows(plasticity_row())
    assert [len(row["result"]["timeline"]) for row in parts] == [2, 1, 1]
    for chart in (chart_gate_timeline, chart_plasticity_loss):
        assert chart(parts).data == chart([whole]).data
        # What rows hold twice, as those of format 1 do, counts once.
        assert chart([*parts[:2], whole]).data == chart([whole]).data
    # While a run trains, of earlier rows only this is kept.
    assert reads_of("head_plasticity") == {"timeline", "curve"}
    history = RowHistory(parts[:2])
    drawn = draw_figures(parts[2], history.rows)
    assert drawn["timeline"].data == chart_gate_timeline([whole]).data
    assert [entry.over for entry in figures_of("head_plasticity")] == ["run", "run", "step", "step"]


def test_what_the_figures_hold_is_what_the_row_holds() -> None:
    row = saved(plasticity_row())
    spans = chart_gate_timeline([row]).data["spans"]
    opened = gate_timeline([row]).opened
    edges = gate_timeline([row]).edges
    for label, line in zip(gate_timeline([row]).labels, opened, strict=True):
        mine = [place for place, head in enumerate(spans["head"]) if head == label]
        for first, last, state in zip(edges, edges[1:], line, strict=False):
            (place,) = (place for place in mine if spans["low"][place] <= first and last <= spans["high"][place])
            assert spans["state"][place] == ("open" if state else "closed")
    loss = chart_plasticity_loss([row])
    assert loss.data["points_0"]["y"] == [2.0, 2.0, 2.5, 2.25, 3.0, None]
    assert loss.data["points_1"]["y"] == [1.0, 1.0, 3.0, 2.0, 3.0, 1.0]
    assert loss.data["events_0"] == {"step": [4, 6, 8], "what": ["1 cut", "1 cut", "1 opened"]}
    scores = chart_head_scores(row)
    assert isinstance(scores, Figure)
    assert scores.data["cells"]["value"] == [0.25, -1.0, 3.0, 0.125]
    assert scores.ranges == {"colour": (-1.0, 3.0)}
    assert scores.data["marks"] == {
        "y": ["1|1", "0|0"],
        "x": ["0|0", "1|1"],
        "value": [3.0, -1.0],
        "mark": ["closed", "cut"],
    }
    maps = chart_attention_maps(row)
    assert isinstance(maps, Figure)
    assert maps.data["weights"]["weight"] == [1.0, 0.0, 0.5, 0.5] * 9
    assert maps.data["panels"]["head"] == ["1.0, cut", "0.0, kept", "0.1, cut later"] * 3
    sweep = chart_plasticity_sweep(saved(sweep_row()))
    assert sweep.data["ranges"]["line"] == ["taylor", "taylor", "random", "random"]
    assert sweep.data["ranges"]["high"][:3] == [0.1, 0.4, 0.3]
    assert sweep.data["points"]["y"][:3] == [0.05, 0.3, 0.2]


def test_many_heads_stay_drawable() -> None:
    row = plasticity_row()
    row["result"]["heads_per_layer"] = [16] * 30
    row["result"]["scores"]["values"] = np.arange(480.0).reshape(30, 16).tolist()
    timeline, scores = chart_gate_timeline([row]), chart_head_scores(row)
    assert isinstance(scores, Figure)
    sizes = [struct.unpack(">II", figure.png(1.0)[16:24]) for figure in (timeline, scores)]
    assert all(width <= 900 and height <= 1700 for width, height in sizes)
    # A span per head and change of the head, not per change of any.
    assert len(timeline.data["spans"]["head"]) == 480 + 1 + 2


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
        function([row] if function in (gate_timeline, loss_course) else row)
