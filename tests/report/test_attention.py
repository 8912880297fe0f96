from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_goldy.core.files import to_json_line
from lightning_goldy.report import (
    ReportError,
    chart_attention_differences,
    chart_attention_grid,
    chart_attention_heads,
    chart_attention_map,
    chart_attention_map_change,
    chart_attention_patterns,
    chart_attention_scales,
    chart_attention_spectra,
    draw_figures,
    reads_of,
)
from lightning_goldy.report.figures import figures_of
from lightning_goldy.report.topics.attention import SHARES, TITLES, drift_caption, heads_by_statistic, patterns, spectra
from tests.report.attention_rows import attention_row, maps_of, statistics_of

PNG = b"\x89PNG\r\n\x1a\n"


def saved(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it comes back from the file."""
    return json.loads(to_json_line(row))


def panels(figure: Any) -> dict[str, Any]:
    """Title to the numbers of each panel, [rows, columns]; None is NaN."""
    shown = {}
    for place, part in enumerate(figure.bare()["concat"]):
        cells = figure.data[f"cells_{place}"]
        n_rows = len(set(cells["y"]))
        values = np.array([math.nan if value is None else value for value in cells["value"]])
        shown[part["title"]["text"]] = values.reshape(n_rows, -1)
    return shown


@pytest.mark.parametrize("back", [dict, saved], ids=["as logged", "from the file"])
def test_every_statistic_has_its_panel(back: Any) -> None:
    row = back(attention_row())
    grids = heads_by_statistic(row)
    expected = statistics_of()
    assert set(grids) == set(expected.names)
    for name, grid in grids.items():
        assert np.array_equal(grid, expected.statistic(name).numpy(), equal_nan=True)
    drawn = panels(chart_attention_heads(row)) | panels(chart_attention_scales(row))
    assert set(drawn) == {TITLES[name] for name in grids}
    for name, grid in grids.items():
        np.testing.assert_allclose(drawn[TITLES[name]], grid, rtol=1e-5)
    assert np.isnan(drawn["induction"]).all()
    assert "layer 1, head 2: 0.06 nats" in drift_caption(row)
    for figure in draw_figures(row).values():
        assert figure.png().startswith(PNG)


def test_shares_have_one_scale_and_the_others_their_own() -> None:
    row = saved(attention_row())
    grids = heads_by_statistic(row)
    shares = chart_attention_heads(row)
    assert list(panels(shares)) == [TITLES[name] for name in grids if name in SHARES]
    assert shares.ranges == {"share": (0.0, 1.0)}
    assert "over 50 queries of 4 samples" in shares.caption
    assert "induction over the 7" in shares.caption
    scales = chart_attention_scales(row)
    assert scales.ranges == {
        name: (0.0, pytest.approx(float(grids[name].max()))) for name in ("entropy", "distance", "drift")
    }
    assert "Jensen-Shannon" in scales.caption
    without = chart_attention_scales(saved(attention_row(drift=False)))
    assert len(panels(without)) == 2
    assert "add GoldenSnapshot" in without.caption


def test_no_panel_changes_its_colours_from_step_to_step(tmp_path: Path, write_rows: Any, page_of: Any) -> None:
    rows = [saved(attention_row(step=step, drift=step > 1)) for step in (1, 2, 3)]
    for row, factor in zip(rows, (1.0, 5.0, 2.0), strict=True):
        statistics = row["result"]["statistics"]
        for name in {"entropy", "distance", "drift"} & set(statistics):
            statistics[name] = [[factor * value for value in line] for line in statistics[name]]
    write_rows(tmp_path, *rows)
    charts = [chart for chart in page_of(tmp_path).charts if len(chart["frames"]) == 3]
    found = {each["name"].removesuffix("_high"): each["value"] for chart in charts for each in chart["params"]}
    # A range is named by its statistic, and not by its place, as a step may lack one.
    assert any(len(set(frame["data"])) == 2 for chart in charts for frame in chart["frames"] if frame.get("data"))
    expected = {"entropy": 5 * 1.2, "distance": 5 * 3.6, "drift": 5 * 0.06, "share": 1.0, "weight": 1.0}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_patterns_and_their_differences_are_the_maps() -> None:
    tokens = ("the", "$5", "<b>", "the")
    row = saved(attention_row(tokens, heads=[(1, 2), (0, 0)]))
    now, base = maps_of(tokens, seed=10), maps_of(tokens, seed=0)
    shown = patterns(row)
    assert [(each.layer, each.head) for each in shown] == [(1, 2), (0, 0)]
    for each in shown:
        pair = each.layer, each.head
        assert np.allclose(each.weights, now.pattern(*pair), atol=6e-5, rtol=0)
        assert np.allclose(each.change, now.pattern(*pair) - base.pattern(*pair), atol=1.2e-4, rtol=0)
    figure, difference = chart_attention_patterns(row), chart_attention_differences(row)
    for drawn, numbers in ((figure, "weights"), (difference, "change")):
        assert list(panels(drawn)) == ["probe: layer 1, head 2", "probe: layer 0, head 0"]
        for values, each in zip(panels(drawn).values(), shown, strict=True):
            assert np.allclose(values, getattr(each, numbers), atol=1e-6)
    assert figure.ranges == {"weight": (0.0, 1.0)}
    most = max(np.abs(each.change).max() for each in shown)
    assert difference.ranges == {"change": (pytest.approx(-most), pytest.approx(most))}
    # Tokens repeat, so that a number before each makes it a place of its own.
    assert figure.data["cells_0"]["y"][::4] == ["0|the", "1|$5", "2|<b>", "3|the"]


def test_without_a_base_there_is_no_difference() -> None:
    row = saved(attention_row(drift=False))
    assert all(each.change is None for each in patterns(row))
    assert chart_attention_differences(row) == "No base to compare with."
    assert set(draw_figures(row)) == {"heads", "scales", "patterns", "singular_values"}


def test_the_strongest_heads_are_shown_once_and_stay() -> None:
    first = saved(attention_row(step=0))
    # All statistics are largest in the last head.
    assert first["result"]["heads"] == [[1, 2]]
    assert attention_row(step=5, heads=[(0, 1)])["result"]["heads"] == [[0, 1]]


def test_the_spectra_run_over_all_rows() -> None:
    rows = [saved(attention_row(step=step, prompts=("one", "two"))) for step in (0, 5, 10)]
    courses = spectra(rows)
    assert list(courses) == ["one", "two"]
    for index, step in enumerate((0, 5, 10)):
        values = maps_of(("the", "$5", "<b>", "the"), seed=step).singular_values(3).mean(dim=(0, 1)).tolist()
        assert [means[index] for _, means in courses["one"]] == pytest.approx(values, abs=1e-6)
    assert all(steps == [0, 5, 10] for steps, _ in courses["two"])
    figure = chart_attention_spectra(rows)
    assert [part["title"]["text"] for part in figure.bare()["concat"]] == ["one", "two"]
    points = figure.data["points_0"]
    assert list(dict.fromkeys(points["line"])) == ["value 1", "value 2", "value 3"]
    assert points["x"][:3] == [0, 5, 10]
    assert points["y"][3:6] == pytest.approx(courses["one"][1][1])
    # What the store keeps of earlier rows is enough.
    assert reads_of("attention_tracker") == {"spectra"}
    thin = [{"step": row["step"], "result": {"spectra": row["result"]["spectra"]}} for row in rows]
    assert chart_attention_spectra(thin).data == figure.data
    assert draw_figures(rows[-1], thin[:-1])["singular_values"].png().startswith(PNG)


def test_a_prompt_of_one_token_can_be_drawn() -> None:
    row = saved(attention_row(("a",)))
    assert row["result"]["prompts"][0]["singular_values"][0][0] == [1.0, None, None]
    assert row["result"]["spectra"][0]["values"] == [1.0, None, None]
    for figure in draw_figures(row).values():
        assert figure.png().startswith(PNG)


def test_the_page_shows_all_of_it_and_escapes_tokens(tmp_path: Path, write_rows: Any, page_of: Any) -> None:
    first = saved(attention_row(("a", "</script>", "b"), step=0))
    second = saved(attention_row(("a", "</script>", "b"), step=5))
    write_rows(tmp_path, first, second)
    page = page_of(tmp_path)
    assert {entry.heading for entry in figures_of("attention_tracker")} <= set(page.text("h4"))
    assert {
        "What each head looks at",
        "What the chosen heads attend to",
        "How these patterns differ from the base's",
        "Singular values of the patterns",
    } <= set(page.text("h4"))
    assert "Attention heads" in page.text("h2")
    assert any("Jensen-Shannon" in cell for cell in page.cells())
    assert '</script>"' not in page.source


def test_recorded_maps_can_be_drawn() -> None:
    tokens = ("the", "$5", "<b>", "the")
    now, base = maps_of(tokens, seed=1), maps_of(tokens, seed=0)
    figure = chart_attention_map(now, 1, 2)
    assert np.allclose(panels(figure)["layer 1, head 2"], now.pattern(1, 2), atol=1e-6)
    assert figure.png().startswith(PNG)
    for drawn, other in ((chart_attention_grid(now), None), (chart_attention_grid(now, base=base), base)):
        cells = drawn.data["cells"]
        values = np.array(cells["value"]).reshape(2, 3, 4, 4)
        for layer, head in now.heads:
            expected = now.pattern(layer, head) - (0 if other is None else other.pattern(layer, head))
            assert np.allclose(values[layer, head], expected, atol=1e-4)
        assert cells["layer"] == np.repeat([0, 1], 48).tolist()
        assert cells["head"] == 2 * np.repeat([0, 1, 2], 16).tolist()
        assert cells["query"][:8] == [0, 0, 0, 0, 1, 1, 1, 1]
        assert drawn.png().startswith(PNG)
    three = chart_attention_map_change(now, base, 0, 1)
    expected = (base.pattern(0, 1), now.pattern(0, 1), now.pattern(0, 1) - base.pattern(0, 1))
    assert list(panels(three)) == ["base: layer 0, head 1", "layer 0, head 1", "minus the base"]
    for found, pattern in zip(panels(three).values(), expected, strict=True):
        assert np.allclose(found, pattern, atol=1e-6)
    assert three.png().startswith(PNG)
    with pytest.raises(IndexError, match="head 3: there are 3"):
        chart_attention_map(now, 0, 3)
    with pytest.raises(ValueError, match="of different prompts"):
        chart_attention_map_change(now, maps_of(("other", "words", "are", "here")), 0, 0)


@pytest.mark.parametrize(
    ("draw", "change", "message"),
    [
        (chart_attention_heads, {"statistics": {}}, "'result.statistics' must be an object with at least one"),
        (
            chart_attention_heads,
            {"statistics": {"entropy": [[1], [1, 2]]}},
            "rows of .* differ in length",
        ),
        (chart_attention_heads, {"statistics": {"entropy": [["x"]]}}, "must hold numbers or null, got 'x'"),
        (chart_attention_heads, {"statistics": {"other": [[1.0]]}}, "holds none of normalised_entropy"),
        (chart_attention_patterns, {"prompts": []}, "'result.prompts' must be a list of at least one object"),
        (chart_attention_patterns, {"prompts": [{"tokens": ["a"], "maps": [{}]}]}, "must be an object with 'layer'"),
        (
            chart_attention_patterns,
            {"prompts": [{"tokens": ["a", "b"], "maps": [{"layer": 0, "head": 0, "weights": [[1.0]]}]}]},
            r"weights of shape \(1, 1\) for 2 tokens",
        ),
        (
            lambda row: chart_attention_spectra([row]),
            {"spectra": [{"prompt": "a"}]},
            r"'result\.spectra\[0\]\.values' must be a table of numbers, got \[None\]",
        ),
    ],
)
def test_a_broken_row_is_named(draw: Any, change: dict[str, Any], message: str) -> None:
    row = saved(attention_row())
    row["result"] = {**row["result"], **change}
    with pytest.raises(ReportError, match=message):
        draw(row)


def test_no_more_panels_than_can_be_read() -> None:
    heads = [(layer, head) for layer in range(2) for head in range(3)]
    row = attention_row(heads=heads, prompts=("a", "b", "c"))
    assert len(patterns(row)) == len(panels(chart_attention_patterns(row))) == 16
    assert "first 16 of 18 patterns" in chart_attention_patterns(row).caption


@pytest.mark.parametrize(("heads", "side_by_side"), [(4, 3), (16, 3), (32, 1)])
def test_many_heads_stay_readable(heads: int, side_by_side: int) -> None:
    row = attention_row()
    row["result"]["statistics"] = dict.fromkeys(SHARES, np.full((30, heads), 0.5).tolist())
    figure = chart_attention_heads(row)
    assert figure.bare()["columns"] == side_by_side
    for part in figure.bare()["concat"]:
        assert part["width"]["step"] >= 12
        assert part["height"]["step"] >= 11
