"""A run whose rows have format 1 is read, and its page is that of its rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_goldy.report.figures import FIGURES, ReportError, draw_figures
from lightning_goldy.report.run import AnalysisRows, read_run, upgraded
from lightning_goldy.report.topics.attention import spectra
from lightning_goldy.report.topics.basin import trajectories
from lightning_goldy.report.topics.heads import chart_gate_timeline, chart_plasticity_loss
from lightning_goldy.report.topics.taylor import prediction

RUN = Path(__file__).parent / "format1"
SEVEN = {
    "golden_snapshot", "golden_parameters", "taylor_diff", "attention_tracker", "basin_volume",
    "parameter_distribution", "head_plasticity",
}  # fmt: skip


def written(name: str) -> list[dict[str, Any]]:
    """The rows as they lie in the file."""
    return [json.loads(line) for line in (RUN / "goldy" / name / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def analyses() -> dict[str, AnalysisRows]:
    return {rows.name: rows for rows in read_run(RUN).analyses}


def test_all_rows_are_read_as_format_2(analyses: dict[str, AnalysisRows]) -> None:
    assert set(analyses) == SEVEN
    for name, rows in analyses.items():
        assert [row["step"] for row in rows.rows] == [row["step"] for row in written(name)]
        for old, row in zip(written(name), rows.rows, strict=True):
            assert (old["format"], row["format"], row["headline"]) == (1, 2, "")
            assert row["metrics"] == old["metrics"]
            assert row["cost"]["model_evaluations"] == old["cost"]["model_evaluations"]
            assert row["cost"]["forwards"] is row["cost"]["backwards"] is None
            assert "trajectory" not in row["result"]
            assert upgraded(row) is row


def test_volumes_over_the_run_are_those_that_the_rows_held(analyses: dict[str, AnalysisRows]) -> None:
    rows = analyses["basin_volume"].rows
    for index, old in enumerate(written("basin_volume")):
        lines = trajectories(rows[: index + 1])
        assert list(lines) == [line["label"] for line in old["result"]["trajectory"]]
        for (_, line), held in zip(lines.items(), old["result"]["trajectory"], strict=True):
            assert list(line.x) == held["steps"]
            assert [list(line.y), list(line.low or ()), list(line.high or ())] == [
                held[name] for name in ("log_volume", "interval_low", "interval_high")
            ]


def test_the_expansion_over_the_run_is_that_which_the_rows_held(analyses: dict[str, AnalysisRows]) -> None:
    rows = analyses["taylor_diff"].rows
    for index, old in enumerate(written("taylor_diff")):
        found, thresholds = prediction(rows[: index + 1])
        lines = old["result"]["trajectory"]
        assert found == {name: lines[name] for name in found}
        assert set(lines) - set(found) == {"first_order"}
        assert thresholds == (old["result"]["thresholds"]["lazy"], old["result"]["thresholds"]["nonlinear"])


def test_arrays_over_the_run_are_those_that_the_rows_held(analyses: dict[str, AnalysisRows]) -> None:
    rows = analyses["attention_tracker"].rows
    for index, old in enumerate(written("attention_tracker")):
        ((prompt, courses),) = spectra(rows[: index + 1]).items()
        (expected,) = old["result"]["spectra"]
        assert prompt == expected["prompt"]
        assert all(steps == expected["steps"] for steps, _ in courses)
        assert [means for _, means in courses] == [list(values) for values in zip(*expected["values"], strict=True)]


def test_gates_and_losses_over_the_run_are_those_that_the_rows_held(analyses: dict[str, AnalysisRows]) -> None:
    rows = analyses["head_plasticity"].rows
    for index, old in enumerate(written("head_plasticity")):
        for chart in (chart_plasticity_loss, chart_gate_timeline):
            assert chart(rows[: index + 1]).data == chart([old]).data


def test_every_figure_is_drawn_and_the_page_is_written(
    analyses: dict[str, AnalysisRows], tmp_path: Path, page_of: Callable[[Path], Any]
) -> None:
    for rows in analyses.values():
        assert draw_figures(rows.rows[-1], rows.rows[:-1])
    page = page_of(Path(shutil.copytree(RUN, tmp_path / "run")))
    cells = page.cells()
    assert {"forward", "backward", "evaluations"} <= set(cells)
    start = len(cells) - cells[::-1].index("taylor_diff")
    total = sum(row["cost"]["model_evaluations"] for row in written("taylor_diff"))
    assert cells[start + 5] == str(total)
    assert any("a unit that differs between analyses" in text for text in page.text("p"))


@pytest.mark.parametrize("wrong", [3, [3], [{"prompt": "a"}], None])
def test_spectra_that_are_none_are_told_by_their_figure(wrong: Any) -> None:
    row = next(row for row in written("attention_tracker") if "spectra" in row["result"])
    row = upgraded({**row, "result": {**row["result"], "spectra": wrong}})
    assert (row["format"], row["result"]["spectra"]) == (2, wrong)
    with pytest.raises(ReportError):
        FIGURES["attention_tracker"]["singular_values"].draw([row])
