from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from lightning_goldy.report.charts import chart_weight_changes, line_chart
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import Frame, figure_html, script_json

Build = Callable[..., dict[str, Any]]
EVIL = "<script>alert('x')</script><img src=http://evil.example/a>\u2028&amp;"


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


@pytest.mark.parametrize(
    ("values", "axis"),
    [([1.0, 99.0], "linear"), ([1.0, 100.0], "log"), ([0.0, 1000.0], "linear"), ([None, 3.0], "linear")],
)
def test_value_axes_are_logarithmic_where_that_helps(values: Any, axis: str) -> None:
    assert line_chart({"a": ([1, 2], values)}).layout.yaxis.type == axis


def test_lines_that_never_move_get_an_axis_of_their_size() -> None:
    assert line_chart({"a": ([1, 2], [4e-11, 4e-11])}).layout.yaxis.range == (0.0, 8e-11)


def test_all_frames_of_a_figure_share_their_colours(snapshot_row: Build) -> None:
    rows = [snapshot_row(1), snapshot_row(2)]
    rows[1]["result"]["tensors"][1]["delta_norm"] = 3.0
    frames = [Frame(str(row["step"]), chart_weight_changes(row)) for row in rows]
    assert frames[0].figure.layout.coloraxis.cmax == pytest.approx(10.0)
    data = figure_html("Where", frames).partition('<script type="application/json">')[2].partition("</script>")[0]
    limits = [frame["figure"]["layout"]["coloraxis"]["cmax"] for frame in json.loads(data)]
    assert limits[0] == limits[1] > 50
