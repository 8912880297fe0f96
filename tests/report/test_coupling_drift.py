from __future__ import annotations

import copy
import io
import json
from typing import Any

import pytest

from lightning_goldy.callbacks import KnowledgeCoupling, RunReport
from lightning_goldy.report.charts import CHARTS
from lightning_goldy.report.coupling_drift_charts import chart_drift_lines, chart_drift_map, chart_drift_prediction
from lightning_goldy.report.coupling_drift_plots import plot_drift_lines, plot_drift_map, plot_drift_prediction
from lightning_goldy.report.coupling_drifts import drift_lines, drift_map, drift_scatters, moved_html, moved_text
from lightning_goldy.report.descriptions import description_of
from lightning_goldy.report.history import with_history
from lightning_goldy.report.plots import draw_plots
from lightning_goldy.report.registry import ReportError
from tests.callbacks.knowledge import PIECES, WordData
from tests.callbacks.training import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Any, list[dict[str, Any]]]:
    knowledge = KnowledgeCoupling(PIECES, edits=[PIECES[2].id], every_n_steps=4, at=("start", "end"))
    trainer, _, _ = fit(tmp_path_factory.mktemp("run"), [knowledge, RunReport()], data=WordData(), max_epochs=1)
    rows = [json.loads(line) for line in (knowledge.folder / "results.jsonl").read_text().splitlines()]
    return trainer, rows


@pytest.fixture
def row(run) -> dict[str, Any]:
    *earlier, last = copy.deepcopy(run[1])
    return dict(with_history(last, earlier))


def test_the_scatter_plot_has_every_piece_in_the_colour_of_its_class(row) -> None:
    points = row["result"]["points"]
    groups = {group.name: group for group in drift_scatters(row)}
    assert list(groups) == ["edited", "untouched"]
    for name, group in groups.items():
        mine = [place for place in range(5) if points["class"][place] == name]
        assert group.predicted == tuple(points["predicted"][place] for place in mine)
        assert group.measured == tuple(points["measured"][place] for place in mine)
    drawn = plot_drift_prediction(row).axes[0].collections
    assert sorted(len(each.get_offsets()) for each in drawn) == [1, 4]
    traces = {trace.name.partition(" ")[0]: trace for trace in chart_drift_prediction(row).data}
    assert traces["untouched"].x == groups["untouched"].predicted
    assert list(traces["edited"].text) == [PIECES[2].id]


def test_points_that_are_not_finite_are_left_out(row) -> None:
    row["result"]["points"]["measured"][0] = None
    assert sum(len(group.predicted) for group in drift_scatters(row)) == 4
    assert sorted(len(trace.text) for trace in chart_drift_prediction(row).data) == [1, 3]
    plot_drift_prediction(row)


def test_lines_go_over_the_run_with_gaps(run, row) -> None:
    found = drift_lines(row)
    assert found.steps == (0, 4, 8)
    assert found.measured["edited"] == tuple(each["metrics"]["measured_change/edited"] for each in run[1])
    assert found.difference[0] == 0.0
    above, below, _ = plot_drift_lines(row).axes
    assert above.lines[0].get_ydata().tolist() == list(found.difference)
    assert below.lines[1].get_ydata().tolist() == list(found.predicted["edited"])
    assert [trace.name for trace in chart_drift_lines(row).data][2:4] == ["edited", "edited, predicted"]
    row["result"]["trajectory"]["correlation"][1] = None
    plot_drift_lines(row)
    plot_drift_lines(with_history(run[1][0]))


def test_the_heat_map_holds_the_differences(row) -> None:
    found = drift_map(row)
    assert len(found.names) == 5
    assert f"{PIECES[2].id} *" in found.names
    assert found.cells.tolist() == row["result"]["drifted"]["difference"]
    assert plot_drift_map(row).axes[0].images[0].get_array().tolist() == found.cells.tolist()
    assert [list(line) for line in chart_drift_map(row).data[0].z] == found.cells.tolist()


def test_everything_is_drawn_and_told(run, row) -> None:
    trainer, rows = run
    for each in rows:
        for figure in draw_plots(each).values():
            figure.savefig(io.BytesIO(), format="png")
        assert len(CHARTS.draw(each)) == 5
    description = description_of("coupling_drift")
    assert all(description.meaning(name) for name in row["metrics"]), row["metrics"]
    page = (trainer.callbacks[0].folder.parents[1] / "report.html").read_text()
    for text in (description.title, "Untouched facts that moved most", "which city has peru ?", "Drift over the run"):
        assert text in page


def test_text_of_the_data_is_shown_and_never_rendered(row) -> None:
    entry = row["result"]["moved"][0]
    entry["question"], entry["answer"], entry["id"] = "<script>`x`\n</script>", "</td>", "$a$ \x1b[31m"
    page = moved_html(row)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "\x1b" not in page
    text = moved_text(row["result"]["moved"])
    assert "`" not in text
    assert all(line.startswith("    ") for line in text.splitlines()[2:])
    row["result"]["drifted"]["ids"][0] = "$a$ <b>"
    plot_drift_map(row).savefig(io.BytesIO(), format="png")
    assert "<b>" not in chart_drift_map(row).to_json().replace("\\u003cb", "<b>").partition("hovertemplate")[0]


@pytest.mark.parametrize("part", ["points", "agreement", "drifted"])
def test_a_row_that_lacks_something_is_named(row, part) -> None:
    del row["result"][part]
    with pytest.raises(ReportError, match="a row of coupling_drift lacks what its figure needs"):
        draw_plots(row)
    with pytest.raises(ReportError, match="coupling_drift"):
        CHARTS.draw(row)


def test_an_entry_of_the_table_that_lacks_something_is_named(row) -> None:
    del row["result"]["moved"][0]["rank_after"]
    with pytest.raises(ReportError, match="lacks or spoils 'rank_after'"):
        moved_html(row)
