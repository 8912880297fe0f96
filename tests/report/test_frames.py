from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from lightning_goldy.report.builders import lines
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import Figure
from lightning_goldy.report.formatting import script_json
from lightning_goldy.report.page import Frame, figure_html
from lightning_goldy.report.topics.golden import chart_weight_changes

Build = Callable[..., dict[str, Any]]
EVIL = "<script>alert('x')</script><img src=http://evil.example/a>\u2028&amp;"


def content_of(page: str) -> Any:
    return json.loads(page.partition('<script type="application/json">')[2].partition("</script>")[0])


def test_json_in_scripts_survives_the_round_trip() -> None:
    value = {"</script><!--": [EVIL, 1.5, None]}
    text = script_json(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="JSON compliant"):
        script_json(float("nan"))


def test_a_second_description_is_refused() -> None:
    with pytest.raises(ValueError, match="'golden_snapshot' is described already"):
        describe("golden_snapshot", Description("Again", "", ""))


def test_all_frames_of_a_figure_share_their_colours(snapshot_row: Build) -> None:
    rows = [snapshot_row(1), snapshot_row(2)]
    rows[1]["result"]["tensors"][1]["delta_norm"] = 3.0
    frames = [Frame(str(row["step"]), chart_weight_changes(row)) for row in rows]
    assert isinstance(frames[0].figure, Figure)
    assert frames[0].figure.ranges["colour"] == (0, pytest.approx(10.0))
    params = {param["name"]: param["value"] for param in content_of(figure_html("Where", frames))["params"]}
    assert params["colour_low"] == 0
    assert params["colour_high"] > 50


def test_the_chart_and_what_does_not_change_are_stored_once(snapshot_row: Build) -> None:
    frames = [Frame(str(step), chart_weight_changes(snapshot_row(step))) for step in range(30)]
    page = figure_html("Where", frames)
    content = content_of(page)
    assert len(content["specs"]) == 1
    assert content["shared"]["cells"]["x"] == {
        "of": ["0|embedding", "1|attention", "2|mlp"],
        "at": [0, 1, 2, 0, 1, 2, 0, 1, 2],
    }
    assert content["frames"][29]["data"]["cells"] == {"y": 0, "x": 0, "value": 0}
    assert len(figure_html("Where", frames[:1])) + 29 * 200 > len(page)


def test_a_step_with_another_chart_or_none_has_its_own() -> None:
    flat, steep = lines({"a": ([1, 2], [1.0, 2.0])}), lines({"a": ([1, 2], [1.0, 900.0])})
    page = figure_html("Loss", [Frame("1", flat), Frame("2", "Nothing <yet>."), Frame("3", steep)])
    content = content_of(page)
    assert [frame.get("spec") for frame in content["frames"]] == [0, None, 1]
    assert content["frames"][1] == {"label": "2", "none": "Nothing <yet>."}
    assert content["frames"][2]["data"]["points"]["y"] == [1.0, 900.0]
    assert '<input type="range" min="0" max="2" value="2"' in page
    nothing = figure_html("Loss", [Frame("1", "Nothing <yet>.")])
    assert '<p class="note">Nothing &lt;yet&gt;.</p>' in nothing
    assert "<script" not in nothing


def test_numbers_that_are_not_finite_are_null_on_the_page() -> None:
    figure = Figure({"mark": "point"}, {"points": {"x": [1.0, float("nan"), float("inf")], "name": ["a", "b", "c"]}})
    shared = content_of(figure_html("Any", [Frame("1", figure)]))["shared"]
    assert shared["points"] == {"x": [1.0, None, None], "name": ["a", "b", "c"]}
