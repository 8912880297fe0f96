from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest

from lightning_goldy.callbacks.engine.store import RowHistory
from lightning_goldy.core.files import to_json_line
from lightning_goldy.report.figures import Figure, ReportError, draw_figures, figures_of, reads_of
from lightning_goldy.report.topics.heads import (
    chart_attention_maps,
    chart_gate_timeline,
    chart_head_scores,
    chart_plasticity_loss,
    chart_plasticity_sweep,
    plasticity_caption,
    score_caption,
    sweep_caption,
)
from tests.report.heads_rows import plasticity_row, plasticity_rows, sweep_row


def saved(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it comes back from the file."""
    return json.loads(to_json_line(row))


def spans_of(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float, str]]]:
    """Spans of each head, in order."""
    columns = chart_gate_timeline(rows).data["spans"]
    spans: dict[str, list[tuple[float, float, str]]] = {}
    for head, low, high, state in zip(*columns.values(), strict=True):
        spans.setdefault(head, []).append((low, high, state))
    return spans


def test_the_time_line_has_a_span_between_changes() -> None:
    expected = {
        "0.0": [(0, 9, "open")],
        "0.1": [(0, 6, "open"), (6, 9, "closed")],
        "1.0": [(0, 4, "open"), (4, 8, "closed"), (8, 9, "open")],
        "1.1": [(0, 9, "open")],
    }
    assert spans_of([plasticity_row()]) == expected
    # A change at the very step of the row still has a width.
    assert spans_of([plasticity_row(8)]) == expected


def test_the_course_has_both_ends_of_every_jump() -> None:
    data = chart_plasticity_loss([saved(plasticity_row())]).data
    assert data["points_0"]["x"] == data["points_1"]["x"] == [2, 4, 4, 6, 6, 8]
    assert data["points_0"]["y"] == [2.0, 2.0, 2.5, 2.25, 3.0, None]
    assert data["points_1"]["y"] == [1.0, 1.0, 3.0, 2.0, 3.0, 1.0]
    assert data["events_0"] == data["events_1"] == {"step": [4, 6, 8], "what": ["1 cut", "1 cut", "1 opened"]}


def test_scores_know_what_was_cut_and_what_was_closed() -> None:
    figure = chart_head_scores(saved(plasticity_row()))
    assert isinstance(figure, Figure)
    assert figure.data["cells"]["value"] == [0.25, -1.0, 3.0, 0.125]
    assert figure.ranges == {"colour": (-1.0, 3.0)}
    marks = {"y": ["1|1", "0|0"], "x": ["0|0", "1|1"], "value": [3.0, -1.0], "mark": ["closed", "cut"]}
    assert figure.data["marks"] == marks
    assert score_caption(plasticity_row(cut=False)) == "no head has been scored yet"


def test_maps_are_by_moment_and_head() -> None:
    figure = chart_attention_maps(saved(plasticity_row()))
    assert isinstance(figure, Figure)
    panels = figure.data["panels"]
    assert list(dict.fromkeys(panels["moment"])) == ["before the cut", "right after", "recovered"]
    assert panels["head"] == ["1.0, cut", "0.0, kept", "0.1, cut later"] * 3
    assert figure.data["weights"]["weight"] == [1.0, 0.0, 0.5, 0.5] * 9


def test_the_lines_of_a_sweep_are_means_over_seeds() -> None:
    data = chart_plasticity_sweep(saved(sweep_row())).data
    assert data["points"] == {
        "x": [0.1, 0.5] * 2,
        "y": [0.05, 0.3, 0.2, None],
        "line": ["taylor", "taylor", "random", "random"],
    }
    assert data["ranges"]["low"][:3] == [0.0, 0.2, 0.1]
    assert data["ranges"]["high"][:3] == [0.1, 0.4, 0.3]
    assert sweep_caption(sweep_row()).startswith("8 runs with 2 seeds")


def test_captions() -> None:
    assert plasticity_caption(plasticity_row()) == (
        "by taylor: 3 heads are open, 25 % closed; loss 2.25 nats, cycle 1 of 1"
    )


def test_the_band_of_random_heads_is_seen_at_one_level_too() -> None:
    row = saved(sweep_row())
    several = json.dumps(chart_plasticity_sweep(row).spec())
    row["result"]["runs"] = [run for run in row["result"]["runs"] if run["level"] == row["result"]["runs"][0]["level"]]
    one = json.dumps(chart_plasticity_sweep(row).spec())
    assert '"type": "area"' in several
    # An area over one place has no width; a rectangle without a place has that of the figure.
    assert '"type": "area"' not in one
    assert '"type": "rect"' in one


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
    # A head that was cut after the first cut of its cycle is known from the last row alone.
    later = {**whole, "result": {**whole["result"], "timeline": []}}
    last, all_of_it = chart_attention_maps(later), chart_attention_maps(whole)
    assert isinstance(last, Figure)
    assert isinstance(all_of_it, Figure)
    assert last.data == all_of_it.data
    # While a run trains, of earlier rows only this is kept.
    assert reads_of("head_plasticity") == {"timeline", "curve"}
    history = RowHistory(parts[:2])
    drawn = draw_figures(parts[2], history.rows)
    assert drawn["timeline"].data == chart_gate_timeline([whole]).data
    assert [entry.over for entry in figures_of("head_plasticity")] == ["run", "run", "step", "step"]


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
        ({"timeline": None}, chart_gate_timeline, "'timeline' must be of the kind list, got None"),
        ({"timeline": []}, chart_gate_timeline, "must not be empty"),
        ({"curve": {"steps": [1]}}, chart_plasticity_loss, "a list of numbers is missing"),
        ({"curve": {"steps": [1], "loss": [], "multiplier": []}}, chart_plasticity_loss, "of one length"),
        ({"scores": {}}, chart_head_scores, "'values' must be of the kind list"),
        ({"attention": {"heads": [], "n_cut": 0, "maps": {"cut": []}}}, chart_attention_maps, "a square map per head"),
        ({"runs": []}, chart_plasticity_sweep, "at least one run"),
        ({"runs": [{"strategy": "taylor"}]}, chart_plasticity_sweep, r"'result.runs\[0\]' lacks 'level'"),
    ],
)
def test_a_row_that_lacks_something_says_so(change: dict[str, Any], function: Any, message: str) -> None:
    row = plasticity_row()
    row["result"] |= change
    with pytest.raises(ReportError, match=message):
        function([row] if function in (chart_gate_timeline, chart_plasticity_loss) else row)


def test_the_caption_tells_how_well_the_samples_know_the_scores() -> None:
    row = plasticity_row()
    scores = row["result"]["scores"]
    assert "known to" not in score_caption(row)
    scores |= {
        "values": [[0.1, 0.2, 0.9]],
        "errors": [[0.01, 0.06, 0.02]],
        "cut": [[0, 0], [0, 1]],
        "closed_before": [],
    }
    assert "known to +- 0.02 (median), 0 of 2 cut heads within two standard errors" in score_caption(row)
    scores["errors"] = [[0.01, 0.4, 0.02]]
    assert "1 of 2 cut heads within two standard errors of the first kept one" in score_caption(row)
    scores["errors"] = [[None, None, None]]
    assert "known to" not in score_caption(row)


def test_random_heads_of_several_seeds_make_a_band() -> None:
    row = saved(sweep_row())
    band = chart_plasticity_sweep(row).data["band"]
    # Of the dearer level one seed has no cost.
    assert (band["x"], band["low"][0], band["high"][0]) == ([0.1, 0.5], 0.1, 0.3)
    assert sweep_caption(row).endswith("the band is what heads chosen at random cost")
    row["result"]["runs"] = [run for run in row["result"]["runs"] if run["strategy"] != "random"]
    assert chart_plasticity_sweep(row).data["band"]["x"] == []
    assert "band" not in sweep_caption(row)
