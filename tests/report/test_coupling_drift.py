from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from lightning_goldy.callbacks import KnowledgeCoupling, RunReport
from lightning_goldy.report.descriptions import description_of
from lightning_goldy.report.figures import ReportError, draw_figures, reads_of
from lightning_goldy.report.topics.coupling import (
    chart_drift_lines,
    chart_drift_map,
    chart_drift_prediction,
    drift_lines,
    drift_map,
    drift_scatters,
    moved_html,
    moved_text,
)
from tests.callbacks.knowledge import PIECES, WordData
from tests.callbacks.training import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Any, list[dict[str, Any]]]:
    knowledge = KnowledgeCoupling(PIECES, edits=[PIECES[2].id], every_n_steps=4, at=("start", "end"))
    trainer, _, _ = fit(tmp_path_factory.mktemp("run"), [knowledge, RunReport()], data=WordData(), max_epochs=1)
    rows = [json.loads(line) for line in (knowledge.folder / "results.jsonl").read_text().splitlines()]
    return trainer, rows


@pytest.fixture
def rows(run) -> list[dict[str, Any]]:
    return copy.deepcopy(run[1])


@pytest.fixture
def row(rows) -> dict[str, Any]:
    return rows[-1]


def test_the_scatter_plot_has_every_piece_in_the_colour_of_its_class(row) -> None:
    points = row["result"]["points"]
    groups = {label.partition(" ")[0]: group for label, group in drift_scatters(row).items()}
    assert list(groups) == ["edited", "untouched"]
    for name, group in groups.items():
        mine = [place for place in range(5) if points["class"][place] == name]
        assert group.x == tuple(points["predicted"][place] for place in mine)
        assert group.y == tuple(points["measured"][place] for place in mine)
        assert group.names == tuple(points["piece"][place] for place in mine)
    figure = chart_drift_prediction(row)
    drawn = figure.data["points"]
    # Edited ones are drawn last, above the others.
    assert [label.partition(" ")[0] for label in drawn["group"]] == ["untouched"] * 4 + ["edited"]
    assert drawn["name"][-1] == PIECES[2].id
    assert drawn["x"][:4] == pytest.approx(groups["untouched"].x)
    assert figure.data["ends"]["end"] == [min(drawn["x"] + drawn["y"]), max(drawn["x"] + drawn["y"])]
    assert "slope" in figure.caption


def test_points_that_are_not_finite_are_left_out(row) -> None:
    row["result"]["points"]["measured"][0] = None
    assert sum(len(group.x) for group in drift_scatters(row).values()) == 4
    groups = chart_drift_prediction(row).data["points"]["group"]
    assert sorted(groups.count(label) for label in set(groups)) == [1, 3]


def test_lines_go_over_the_run_with_gaps(rows) -> None:
    found = drift_lines(rows)
    assert found.steps == (0, 4, 8)
    assert found.measured["edited"] == tuple(row["metrics"]["measured_change/edited"] for row in rows)
    assert found.difference[0] == 0.0
    figure = chart_drift_lines(rows)
    assert figure.data["points_0"]["y"] == pytest.approx(list(found.difference))
    assert figure.data["points_1"]["x"] == [0, 4, 8]
    changes = figure.data["points_2"]
    names = ["untouched", "untouched, predicted", "edited", "edited, predicted"]
    assert list(dict.fromkeys(changes["line"])) == names
    # One colour for a class, and dashes for what was predicted of it.
    assert changes["group"] == ["untouched"] * 6 + ["edited"] * 6
    layers = figure.bare()["concat"][2]["layer"]
    assert [layer["encoding"]["color"]["field"] for layer in layers] == ["group", "group"]
    assert [layer["mark"].get("strokeDash") for layer in layers] == [None, [5, 4]]
    assert changes["y"][9:] == pytest.approx(list(found.predicted["edited"]))
    rows[1]["metrics"]["correlation"] = None
    assert chart_drift_lines(rows).data["points_1"]["y"][1] is None
    assert chart_drift_lines(rows[:1]).data["points_2"]["x"] == [0] * 4


def test_lines_need_nothing_of_earlier_rows_but_their_metrics(rows) -> None:
    assert reads_of("coupling_drift") == frozenset()
    whole = chart_drift_lines(rows).data
    for row in rows[:-1]:
        row["result"] = {}
    assert chart_drift_lines(rows).data == whole


def test_the_heat_map_holds_the_differences(row) -> None:
    names, cells = drift_map(row)
    assert len(names) == 5
    assert f"{PIECES[2].id} *" in names
    assert cells.tolist() == row["result"]["drifted"]["difference"]
    figure = chart_drift_map(row)
    assert figure.data["cells"]["value"] == pytest.approx(cells.ravel().tolist())
    assert [label.partition("|")[2] for label in figure.data["cells"]["x"][:5]] == list(names)
    assert figure.ranges == {"drift": (-abs(cells).max(), abs(cells).max())}


def test_everything_is_drawn_and_told(run, rows) -> None:
    for place, row in enumerate(rows):
        figures = draw_figures(row, rows[:place])
        assert list(figures) == ["prediction", "drift", "difference", "heat_map", "distribution"]
    assert all(figure.png().startswith(b"\x89PNG") for figure in figures.values())
    description = description_of("coupling_drift")
    assert all(description.meaning(name) for name in row["metrics"]), row["metrics"]
    page = (run[0].callbacks[0].folder.parents[1] / "report.html").read_text()
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
    figure = chart_drift_map(row)
    assert "$a$ <b>" in figure.data["cells"]["y"][0]
    # Text of the data is data, and nowhere in the chart.
    assert "<b>" not in json.dumps(figure.bare())
    assert figure.png().startswith(b"\x89PNG")


@pytest.mark.parametrize("part", ["points", "agreement", "drifted", "classes"])
def test_a_row_that_lacks_something_is_named(row, part) -> None:
    del row["result"][part]
    with pytest.raises(ReportError, match="a row of coupling_drift lacks what its figure needs"):
        draw_figures(row)


def test_an_entry_of_the_table_that_lacks_something_is_named(row) -> None:
    del row["result"]["moved"][0]["rank_after"]
    with pytest.raises(ReportError, match="lacks or spoils 'rank_after'"):
        moved_html(row)
