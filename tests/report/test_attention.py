from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_goldy.core.files import to_json_line
from lightning_goldy.report.attention_charts import (
    chart_attention_differences,
    chart_attention_heads,
    chart_attention_patterns,
    chart_attention_scales,
    chart_attention_spectra,
)
from lightning_goldy.report.attention_plots import (
    plot_attention,
    plot_attention_difference,
    plot_attention_grid,
    plot_attention_heads,
    plot_attention_prompts,
    plot_attention_spectra,
)
from lightning_goldy.report.attentions import SHARES, drift_caption, heads_by_statistic, patterns, spectra
from lightning_goldy.report.charts import CHARTS
from lightning_goldy.report.history import with_history
from lightning_goldy.report.legacy import Frame, figure_html
from lightning_goldy.report.plots import draw_plots
from lightning_goldy.report.registry import ReportError
from tests.report.attention_rows import attention_row, maps_of, statistics_of

PNG = b"\x89PNG\r\n\x1a\n"


def png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def saved(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it comes back from the file."""
    return json.loads(to_json_line(row))


@pytest.mark.parametrize("back", [dict, saved], ids=["as logged", "from the file"])
def test_every_statistic_has_its_panel(back: Any) -> None:
    row = back(attention_row())
    grids = heads_by_statistic(row)
    expected = statistics_of()
    assert set(grids) == set(expected.names)
    for name, grid in grids.items():
        assert np.array_equal(grid, expected.statistic(name).numpy(), equal_nan=True)
    figure = plot_attention_heads(row)
    drawn = {axes.get_title(): axes.images[0].get_array() for axes in figure.axes if axes.images}
    assert np.array_equal(drawn["entropy, nats"], grids["entropy"])
    assert drawn["induction"].mask.all()
    assert len(drawn) == 9
    assert png(figure).startswith(PNG)
    assert "layer 1, head 2: 0.06 nats" in drift_caption(row)


def test_the_charts_have_the_same_numbers() -> None:
    row = saved(attention_row())
    grids = heads_by_statistic(row)
    shares = chart_attention_heads(row)
    names = [name for name in grids if name in SHARES]
    assert [trace.z for trace in shares.data] == [
        tuple([None if math.isnan(value) else pytest.approx(value, rel=1e-4) for value in line] for line in grids[name])
        for name in names
    ]
    assert "over 50 queries of 4 samples" in shares.layout.meta["caption"]
    assert "induction over the 7" in shares.layout.meta["caption"]
    assert (shares.layout.coloraxis.cmin, shares.layout.coloraxis.cmax) == (0, 1)
    scales = chart_attention_scales(row)
    assert [scales.layout[trace.coloraxis].cmax for trace in scales.data] == [
        pytest.approx(float(grids[x].max())) for x in ("entropy", "distance", "drift")
    ]
    assert "Jensen-Shannon" in scales.layout.meta["caption"]
    without = chart_attention_scales(saved(attention_row(drift=False)))
    assert len(without.data) == 2
    assert "add GoldenSnapshot" in without.layout.meta["caption"]


CHART_OF_EVERY_PANEL = (
    chart_attention_heads,
    chart_attention_scales,
    chart_attention_patterns,
    chart_attention_differences,
)


@pytest.mark.parametrize("chart", CHART_OF_EVERY_PANEL, ids=lambda chart: chart.__name__)
def test_no_panel_changes_its_colours_from_step_to_step(chart: Any) -> None:
    rows = [saved(attention_row(step=step, drift=step > 1)) for step in (1, 2, 3)]
    for row, factor in zip(rows, (1.0, 5.0, 2.0), strict=True):
        for name in ("entropy", "distance", "drift"):
            table = row["result"]["statistics"].get(name, [])
            row["result"]["statistics"][name] = [[factor * value for value in line] for line in table] or None
        row["result"]["statistics"] = {name: table for name, table in row["result"]["statistics"].items() if table}
    page = figure_html("Heads", [Frame(str(row["step"]), chart(row)) for row in rows])
    frames = json.loads(page.partition('<script type="application/json">')[2].partition("</script>")[0])
    ranges: dict[str, set[tuple[float, float]]] = {}
    for frame in frames:
        figure = frame["figure"]
        for place, trace in enumerate(figure["data"]):
            axis = figure["layout"][trace["coloraxis"]]
            drawn = [value for line in trace["z"] for value in line if value is not None]
            assert all(axis["cmin"] <= value <= axis["cmax"] for value in drawn)
            # The title says which statistic it is.
            ranges.setdefault(figure["layout"]["annotations"][place]["text"], set()).add((axis["cmin"], axis["cmax"]))
    assert ranges
    assert all(len(found) == 1 for found in ranges.values())
    if chart is chart_attention_scales:
        tops = {name: top for name, found in ranges.items() for _, top in found}
        expected = {"entropy, nats": 5 * 1.2, "distance, tokens": 5 * 3.6, "drift from the base, nats": 5 * 0.06}
        assert tops == pytest.approx(expected)


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
    figure = plot_attention_prompts(row)
    left, right = figure.axes[:2]
    assert np.allclose(left.images[0].get_array(), shown[0].weights)
    assert np.allclose(right.images[0].get_array(), shown[0].change)
    low, high = right.images[0].get_clim()
    assert high == -low == pytest.approx(np.abs(shown[0].change).max())
    assert [label.get_text() for label in left.get_yticklabels()] == list(tokens)
    assert png(figure).startswith(PNG)
    chart = chart_attention_patterns(row)
    assert chart.data[0].z == tuple(map(list, shown[0].weights.tolist()))
    assert list(chart.layout.yaxis.ticktext) == ["the", "&#36;5", "&lt;b&gt;", "the"]
    assert list(chart.layout.yaxis.tickvals) == [0, 1, 2, 3]
    difference = chart_attention_differences(row)
    assert difference.layout.coloraxis.cmin == -difference.layout.coloraxis.cmax
    assert len(difference.data) == 2


def test_without_a_base_there_is_no_difference() -> None:
    row = saved(attention_row(drift=False))
    assert all(each.change is None for each in patterns(row))
    assert len(chart_attention_differences(row).data) == 0
    assert "No base" in chart_attention_differences(row).layout.annotations[0].text
    for figure in draw_plots(row).values():
        assert png(figure).startswith(PNG)


def test_the_strongest_heads_are_shown_once_and_stay() -> None:
    first = saved(attention_row(step=0))
    # All statistics are largest in the last head.
    assert first["result"]["heads"] == [[1, 2]]
    assert attention_row(step=5, heads=[(0, 1)])["result"]["heads"] == [[0, 1]]


def test_the_spectra_run_over_all_rows() -> None:
    rows: list[dict[str, Any]] = []
    for step in (0, 5, 10):
        rows.append(saved(attention_row(step=step, prompts=("one", "two"))))
    rows[-1] = dict(with_history(rows[-1], rows[:-1]))
    groups = spectra(rows[-1])
    assert [(group.prompt, group.steps) for group in groups] == [("one", (0, 5, 10)), ("two", (0, 5, 10))]
    for index, step in enumerate((0, 5, 10)):
        values = maps_of(("the", "$5", "<b>", "the"), seed=step).singular_values(3)
        assert groups[0].values[index] == pytest.approx(values.mean(dim=(0, 1)).tolist(), abs=1e-6)
    figure = plot_attention_spectra(rows[-1])
    assert np.allclose(figure.axes[0].lines[1].get_ydata(), groups[0].values[:, 1])
    assert png(figure).startswith(PNG)
    chart = chart_attention_spectra(rows[-1])
    assert chart.data[0].y == pytest.approx(groups[0].values[:, 0].tolist())
    assert [trace.name for trace in chart.data][:4] == ["one, 1", "one, 2", "one, 3", "two, 1"]


def test_a_prompt_of_one_token_can_be_drawn() -> None:
    row = saved(attention_row(("a",)))
    assert row["result"]["prompts"][0]["singular_values"][0][0] == [1.0, None, None]
    assert row["result"]["spectra"][0]["values"] == [1.0, None, None]
    for figure in draw_plots(row).values():
        assert png(figure).startswith(PNG)
    for chart in CHARTS.draw(row).values():
        json.loads(chart.to_json())


def test_the_page_shows_all_of_it_and_escapes_tokens(tmp_path: Path, write_rows: Any, page_of: Any) -> None:
    first = saved(attention_row(("a", "</script>", "b"), step=0))
    second = saved(attention_row(("a", "</script>", "b"), step=5))
    write_rows(tmp_path, first, second)
    page = page_of(tmp_path)
    assert {
        "What each head looks at",
        "What the chosen heads attend to",
        "How these patterns differ from the base's",
        "Singular values of the patterns",
    } <= set(page.text("h4"))
    assert "Attention heads" in page.text("h2")
    assert any("Jensen-Shannon" in cell for cell in page.cells())
    assert page.scripts == 4


def test_recorded_maps_can_be_plotted() -> None:
    tokens = ("the", "$5", "<b>", "the")
    now, base = maps_of(tokens, seed=1), maps_of(tokens, seed=0)
    figure = plot_attention(now, 1, 2)
    assert np.allclose(figure.axes[0].images[0].get_array(), now.pattern(1, 2))
    assert png(figure).startswith(PNG)
    grid = plot_attention_grid(now)
    drawn = [axes for axes in grid.axes if axes.images]
    assert [axes.get_title() for axes in drawn] == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    assert np.allclose(drawn[4].images[0].get_array(), now.pattern(1, 1))
    change = plot_attention_grid(now, base=base)
    assert np.allclose(change.axes[4].images[0].get_array(), now.pattern(1, 1) - base.pattern(1, 1))
    three = plot_attention_difference(now, base, 0, 1)
    shown = [axes.images[0].get_array() for axes in three.axes[:3]]
    for found, expected in zip(
        shown, (base.pattern(0, 1), now.pattern(0, 1), now.pattern(0, 1) - base.pattern(0, 1)), strict=True
    ):
        assert np.allclose(found, expected)
    assert png(three).startswith(PNG)
    assert png(change).startswith(PNG)
    with pytest.raises(IndexError, match="head 3: there are 3"):
        plot_attention(now, 0, 3)
    with pytest.raises(ValueError, match="of different prompts"):
        plot_attention_difference(now, maps_of(("other", "words", "are", "here")), 0, 0)


@pytest.mark.parametrize(
    ("draw", "change", "message"),
    [
        (plot_attention_heads, {"statistics": {}}, "'result.statistics' must be an object with at least one"),
        (
            plot_attention_heads,
            {"statistics": {"entropy": [[1], [1, 2]]}},
            "rows of .* differ in length",
        ),
        (plot_attention_heads, {"statistics": {"entropy": [["x"]]}}, "must hold numbers or null, got 'x'"),
        (chart_attention_heads, {"statistics": {"other": [[1.0]]}}, "holds none of normalised_entropy"),
        (plot_attention_prompts, {"prompts": []}, "'result.prompts' must be a list of at least one object"),
        (chart_attention_patterns, {"prompts": [{"tokens": ["a"], "maps": [{}]}]}, "must be an object with 'layer'"),
        (
            chart_attention_patterns,
            {"prompts": [{"tokens": ["a", "b"], "maps": [{"layer": 0, "head": 0, "weights": [[1.0]]}]}]},
            r"weights of shape \(1, 1\) for 2 tokens",
        ),
        (plot_attention_spectra, {"spectra": [{"steps": [1], "values": [[1.0], [2.0]]}]}, "as many steps as values"),
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
    assert len(patterns(row)) == 16
    assert "first 16 of 18 patterns" in chart_attention_patterns(row).layout.meta["caption"]
    assert torch.tensor(plot_attention_prompts(row).get_size_inches()).max() <= 30
