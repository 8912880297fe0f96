from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

from lightning_goldy.report.builders import (
    Bars,
    HeatMap,
    Histogram,
    Line,
    Lines,
    Points,
    Scatter,
    arrange,
    bars,
    heads_style,
    heat_map,
    histogram,
    lines,
    scatter,
)
from lightning_goldy.report.figures import Figure

PNG = b"\x89PNG\r\n\x1a\n"


def axis_of(figure: Figure, axis: str = "y") -> Any:
    return figure.bare()["layer"][0]["encoding"][axis]


@pytest.mark.parametrize(
    ("values", "scale"),
    [([1.0, 99.0], "linear"), ([1.0, 100.0], "log"), ([0.0, 1000.0], "linear"), ([None, 3.0], "linear")],
)
def test_value_axes_are_logarithmic_where_that_helps(values: Any, scale: str) -> None:
    figure = lines({"a": ([1, 2], values)})
    assert axis_of(figure)["scale"]["type"] == scale
    assert figure.png().startswith(PNG)


def test_lines_that_never_move_get_an_axis_that_begins_at_zero() -> None:
    assert axis_of(lines({"a": ([1, 2], [4e-11, 4e-11])}))["scale"]["zero"] is True
    assert axis_of(lines({"a": ([1, 2], [4e-11, 5e-11])}))["scale"]["zero"] is False


def test_labels_of_many_steps_keep_apart() -> None:
    axis = axis_of(lines({"a": (range(0, 401, 20), [*range(21)])}), "x")["axis"]
    assert (axis["labelOverlap"], axis["labelSeparation"]) == ("parity", 8)


def test_intervals_are_bands_and_notes_are_in_the_tooltips() -> None:
    line = Line([1, 2], [2.0, 3.0], low=[1.0, None], high=[3.0, None], notes=["first", "second"])
    figure = lines({"volume": line, "base": Line([1, 2], [1.0, 1.0], shape="dashed")})
    points = figure.data["points"]
    assert points["low"] == [1.0, None, None, None]
    assert points["note"] == ["first", "second", "", ""]
    assert [layer["mark"]["type"] for layer in figure.bare()["layer"]] == ["area", "line", "line"]
    assert {"field": "note", "title": "note", "type": "nominal"} in figure.bare()["layer"][0]["encoding"]["tooltip"]
    assert figure.png().startswith(PNG)


def test_many_points_have_no_markers_but_can_be_pointed_at() -> None:
    few, many = (lines({"a": (range(count), [1.0 * step for step in range(count)])}) for count in (40, 41))
    assert few.bare()["layer"][0]["mark"]["point"] == {"filled": True, "size": 22}
    assert not many.bare()["layer"][0]["mark"]["point"]
    assert many.bare()["layer"][-1]["mark"] == {"type": "point", "opacity": 0, "size": 30}


def test_a_legend_is_there_only_where_lines_can_be_told_apart() -> None:
    def legend(count: int, style: Lines | None = None) -> Any:
        series = {f"line {place}": ([1, 2], [1.0, 2.0]) for place in range(count)}
        return axis_of(lines(series, style), "color")["legend"]

    assert legend(1) is None
    assert legend(2) is not None
    assert legend(31) is None
    assert legend(1, Lines(legend=True)) is not None


def test_charts_of_one_style_are_built_once() -> None:
    first, second = (lines({name: ([1, 2], [1.0, 2.0])}) for name in ("a", "b.c[0]"))
    assert first.chart is second.chart
    assert first.data != second.data


def test_labels_may_repeat_and_hold_anything() -> None:
    tokens = ["the", "the", "a|b", "", "$x$", "<b>"]
    figure = heat_map(np.eye(6), tokens, tokens, HeatMap("weight", rows="query", columns="key", numbers=False))
    assert figure.data["cells"]["x"][:3] == ["0|the", "1|the", "2|a|b"]
    assert figure.png().startswith(PNG)


def test_a_diverging_map_is_even_to_both_sides_and_an_empty_one_has_an_extent() -> None:
    style = HeatMap("change", colours="diverging", scale="drift")
    assert heat_map([[1.0, -3.0]], [0], [0, 1], style).ranges == {"drift": (-3.0, 3.0)}
    assert heat_map([[math.nan, 0.0]], [0], [0, 1], HeatMap("%")).ranges == {"colour": (0.0, 1.0)}
    assert heat_map([[5.0]], [0], [0], HeatMap("%"), extent=(2.0, 9.0)).ranges == {"colour": (2.0, 9.0)}
    with pytest.raises(ValueError, match=r"shape \(1, 1\) for 2 rows and 1 columns"):
        heat_map([[5.0]], [0, 1], [0], HeatMap("%"))


def test_thirty_layers_of_sixteen_heads_fit_and_panels_share_a_range() -> None:
    numbers = np.random.default_rng(0).random((6, 30, 16))
    panels = [
        heat_map(table, range(30), range(16), heads_style("share", title=f"statistic {place}", legend=place == 0))
        for place, table in enumerate(numbers)
    ]
    figure = arrange(panels, columns=3)
    assert list(figure.ranges) == ["colour"]
    assert figure.ranges["colour"][1] == pytest.approx(numbers.max(), rel=1e-5)
    png = figure.png(1.0)
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    assert width < 1160
    assert 2 * 30 * 13 < height < 1200


def drawn_labels(figure):
    import vl_convert

    return set(re.findall(r">([^<>]+)</text>", vl_convert.vegalite_to_svg(figure.spec())))


def test_a_bar_without_a_number_keeps_its_row_so_that_panels_side_by_side_line_up() -> None:
    for style in (Bars("share"), Bars("over chance", mark=1.0, scale="log")):
        assert drawn_labels(bars({"h.0": 1.5, "h.1": None, "h.2": math.nan, "h.3": 3.0}, style)) >= {
            *("h.0", "h.1", "h.2", "h.3")
        }


@pytest.mark.parametrize(
    ("numbers", "kind"),
    [
        ([230.0, 0.4, 3.0], "log"),
        ([230.0, 0.0, 3.0, None], "log"),
        ([230.0, 33.0], "log"),
        ([29.0, 1.0], "linear"),
        ([300.0, -1.0], "linear"),
        ([0.0, None], "linear"),
        ([], "linear"),
    ],
)
def test_bars_that_span_decades_are_on_a_logarithmic_axis_and_begin_at_the_mark(numbers, kind) -> None:
    figure = bars({f"h.{place}": number for place, number in enumerate(numbers)}, Bars("", mark=1.0, scale="auto"))
    encoding = figure.bare()["layer"][0]["encoding"]
    assert encoding["x"].get("scale", {"type": "linear"})["type"] == kind
    assert encoding.get("x2") == ({"datum": 1.0} if kind == "log" else None)
    assert drawn_labels(figure) >= {f"h.{place}" for place in range(len(numbers))}
    assert figure.png().startswith(PNG)


def test_bars_and_histograms_and_clouds_are_drawn() -> None:
    shown = bars({"h.0": 1.0, "h.1": None}, Bars("rank", mark=1.0, colour=2))
    counted = histogram([0, 1, 2], [3, 0], Histogram("size", log=False))
    cloud = scatter(
        {"a": Points([1.0, 2.0, math.nan], [1.0, None, 2.0], ["x", "y", "z"]), "b": Points([3.0], [4.0], ["w"])},
        Scatter("predicted", "measured", diagonal=True, names=True),
    )
    assert cloud.data["points"] == {"x": [1.0, 3.0], "y": [1.0, 4.0], "group": ["a", "b"], "name": ["x", "w"]}
    assert cloud.data["ends"] == {"end": [1.0, 4.0]}
    assert counted.ranges == {"bins": (0.0, 1.0), "bins_counts": (0, 3)}
    for figure in (shown, counted, cloud, scatter({"a": Points([], [])}, Scatter("x", "y", diagonal=True))):
        assert figure.png().startswith(PNG)
    with pytest.raises(ValueError, match="one edge more than counts, got 2 edges and 2 counts"):
        histogram([0, 1], [3, 0], Histogram("size"))


def test_arranged_figures_keep_their_data_apart() -> None:
    inner = arrange([bars({"a": 1.0}, Bars("x")), bars({"b": 2.0}, Bars("y"))], columns=2)
    figure = arrange([inner, lines({"c": ([1], [3.0])})], caption="All.")
    assert figure.data["bars_1_0"]["label"] == ["b"]
    assert figure.data["points_1"]["y"] == [3.0]
    assert figure.caption == "All."
    assert figure.png().startswith(PNG)
    with pytest.raises(ValueError, match="no figure to arrange"):
        arrange([])


def test_lines_keep_differences_of_large_numbers_and_fractions_of_positions() -> None:
    line = lines({"volume": (np.float32([0.5, 1.5]), [-1234567.25, -1234566.5])})
    assert line.data["points"]["x"] == [0.5, 1.5]
    assert line.data["points"]["y"] == [-1234567.25, -1234566.5]
    assert lines({"loss": (np.arange(2), [1.0, None])}).data["points"] == {
        "x": [0, 1],
        "y": [1.0, None],
        "line": ["loss", "loss"],
    }
