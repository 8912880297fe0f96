from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_goldy.report import ReportError, write_report
from lightning_goldy.report.answers import QUESTIONS, Bar
from lightning_goldy.report.builders import lines
from lightning_goldy.report.descriptions import Description, describe
from lightning_goldy.report.figures import FIGURES, figures_of, register_figure
from lightning_goldy.report.formatting import MISSING
from lightning_goldy.report.page import _bar_svg, _has_no_course, answers_json

Build = Callable[..., dict[str, Any]]
Write = Callable[..., Path]
PageOf = Callable[..., Any]
EVIL = "<script>alert('x')</script><img src=http://evil.example/a>\u2028&amp;"


def test_the_page_has_a_section_for_everything(run: Path, page_of: PageOf) -> None:
    (run / "hparams.yaml").write_text("learning_rate: 0.1\n")
    page = page_of(run)
    assert page.text("h1") == ["What did this finetune change?"]
    assert page.text("h2") == [
        "Change since the snapshot",
        "Golden parameters",
        "Training",
        "Methods",
        "What the analyses cost",
        "Settings of the run",
    ]
    ids = ["analysis-1", "analysis-2", "training", "methods", "cost", "settings"]
    folded = [f"analysis-{number}-{what}" for number in (1, 2) for what in ("definition", "doubt")]
    assert set(page.values("id")) == {"answers", *ids, *folded}
    # The answer to the first question refers to its analysis, and to when not to believe it.
    assert page.values("src", "href") == ["#analysis-1", "#analysis-1-doubt", *(f"#{name}" for name in ids)]
    assert page.text("h3")[:5] == [question.title for question in QUESTIONS.values()]
    assert "learning_rate: 0.1\n" in page.text("pre")
    summary = dict(zip(page.text("dt"), page.text("dd"), strict=True))
    assert summary["Run"] == "version_0"
    assert summary["Training steps"] == "30"
    assert summary["Time of the analyses"] == "10 s"


def test_the_page_needs_nothing_from_outside(run: Path, page_of: PageOf) -> None:
    page = page_of(run)
    text = page.source
    assert all(link.startswith("#") for link in page.values("src", "href"))
    assert not [tag for tag, _ in page.tags if tag in ("link", "iframe", "img", "object", "base")]
    policy = next(attributes for tag, attributes in page.tags if tag == "meta" and "http-equiv" in attributes)
    assert policy["content"].startswith("default-src 'none'")
    # The library is there once, beside the page's own script.
    assert page.scripts == 2
    assert text.count("window.vegaEmbed=") == 1
    assert "unsafe-eval" not in str(policy["content"])
    assert "plotly.js" not in text
    assert len(text) < 1_200_000
    assert "@import" not in text.partition("</style>")[0]


def test_figures_have_a_frame_for_every_row_and_share_colours(run: Path, page_of: PageOf) -> None:
    page = page_of(run)
    charts = page.charts
    labels = [[frame["label"] for frame in chart["frames"]] for chart in charts]
    assert labels.count(["step 10", "step 20", "step 30"]) == 1
    assert labels.count(["step 10", "step 20"]) == 2
    place = labels.index(["step 10", "step 20", "step 30"])
    assert charts[place]["params"] == [{"name": "colour_low", "value": 0}, {"name": "colour_high", "value": 100}]
    cells = page.table(place, "cells", 1)
    blocks = ["0|embeddings", "1|transformer.h.0", "2|transformer.h.1"]
    assert cells["y"] == [block for block in blocks for _ in range(4)]
    assert cells["value"] == [1, None, None, None, None, 8, 0, 100, None, 8, 0, None]
    assert "by chance 0.25 %" in charts[place]["frames"][0]["caption"]


def test_a_slider_is_there_only_where_there_is_a_choice(
    tmp_path: Path, golden_row: Build, write_rows: Write, page_of: PageOf
) -> None:
    write_rows(tmp_path, golden_row(10))
    page = page_of(tmp_path)
    assert not [tag for tag, _ in page.tags if tag == "input"]
    assert len(page.charts) == 1
    write_rows(tmp_path, golden_row(10), golden_row(20))
    sliders = [attributes for tag, attributes in page_of(tmp_path).tags if tag == "input"]
    assert [(slider["max"], slider["value"]) for slider in sliders] == [("1", "1")]


def test_many_rows_are_thinned_in_the_figures_but_not_in_the_lines(
    tmp_path: Path, golden_row: Build, write_rows: Write, page_of: PageOf
) -> None:
    write_rows(tmp_path, *(golden_row(step) for step in range(100)))
    page = page_of(tmp_path)
    assert "The figures show 40 of 100 results, evenly spaced; the lines show 100." in page.text("p")
    assert [frame["label"] for frame in page.charts[0]["frames"]][::39] == ["step 0", "step 99"]
    # None of the metrics moves, so that they are told in a line and not drawn.
    assert len(page.charts) == 1
    assert any("The same at every step: count (" in text for text in page.text("p"))
    rows = [golden_row(step) for step in range(100)]
    for row in rows:
        row["metrics"]["density"] = row["step"]
    write_rows(tmp_path, *rows)
    assert len(page_of(tmp_path).table(1, "points")["x"]) == 100


def test_the_latest_numbers_stand_beside_the_first_with_their_meaning(run: Path, page_of: PageOf) -> None:
    cells = page_of(run).cells()
    start = cells.index("density_over_chance")
    assert cells[start : start + 4] == [
        "density_over_chance",
        "8",
        "8",
        "density divided by the one expected by chance",
    ]
    start = cells.index("count")
    assert cells[start : start + 3] == ["count", "109", "109"]
    assert cells[cells.index("jaccard_previous") + 1] == MISSING


def test_the_cost_table_adds_up(run: Path, page_of: PageOf) -> None:
    cells = page_of(run).cells()
    start = len(cells) - cells[::-1].index("golden_parameters") - 1
    assert cells[start : start + 9] == ["golden_parameters", "3", "6 s", "2 s", "48", "24", "3 MiB", "60 %", MISSING]
    total = cells.index("total")
    assert cells[total + 1] == "10 s"


def test_hostile_names_come_out_as_text(tmp_path: Path, golden_row: Build, write_rows: Write, page_of: PageOf) -> None:
    rows = [golden_row(step, blocks=[EVIL]) for step in (1, 2)]
    for row in rows:
        row["metrics"] = {EVIL: row["step"], f"{EVIL}/{EVIL}": row["step"]}
        row["result"]["score"] = EVIL
        row["trigger"] = EVIL
    write_rows(tmp_path, *rows, name="a<b>&'c")
    unknown = golden_row(3) | {"analysis": EVIL, "name": "unknown"}
    write_rows(tmp_path, unknown)
    (tmp_path / "config.yaml").write_text(f"name: </pre>{EVIL}\n")
    page = page_of(tmp_path)
    text = page.source
    assert "<script>alert" not in text
    assert "</pre><script" not in text
    assert "<img" not in re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)
    assert page.scripts == 2
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert any(EVIL in data for data in page.text("figcaption"))
    assert any("evil.example" in data for data in page.text("pre"))
    place = next(place for place, chart in enumerate(page.charts) if "cells" in chart["shared"])
    assert f"1|{EVIL}" in page.table(place, "cells")["y"]


def test_unknown_analyses_get_their_numbers_and_lines(
    tmp_path: Path, golden_row: Build, write_rows: Write, page_of: PageOf
) -> None:
    rows = [golden_row(step) | {"analysis": "of_somebody_else", "name": "volume"} for step in (1, 2)]
    for row in rows:
        row["metrics"] = {
            "log_volume": -1e6 * row["step"],
            "share/h.0": 1.0 / row["step"],
            "share/h.1": 0.5 / row["step"],
            "once": None,
        }
        row["result"] = {}
    rows[1]["metrics"]["once"] = 3.25
    write_rows(tmp_path, *rows)
    page = page_of(tmp_path)
    assert "Of somebody else " in page.text("h2")
    assert "volume" in page.text("span")
    assert page.text("h4") == ["log_volume", "share"]
    assert page.table(1, "points")["line"] == ["h.0", "h.0", "h.1", "h.1"]
    assert page.cells()[:6] == ["metric", "step 1", "step 2", "log_volume", "-1,000,000", "-2,000,000"]
    assert "3.25" in page.cells()


def test_later_analyses_can_add_figures_and_words(
    tmp_path: Path, golden_row: Build, write_rows: Write, monkeypatch: pytest.MonkeyPatch, page_of: PageOf
) -> None:
    from lightning_goldy.report import descriptions, figures

    monkeypatch.setattr(figures, "FIGURES", dict(FIGURES))
    monkeypatch.setattr(descriptions, "_DESCRIPTIONS", dict(descriptions._DESCRIPTIONS))
    register_figure("tiny", "line", heading="A line")(lambda row: lines({"a": ([1], [row["result"]["value"]])}))

    @register_figure("tiny", "course", heading="All rows", over="run")
    def chart_course(rows: Any) -> Any:
        return lines({"a": ([row["step"] for row in rows], [row["result"].get("value") for row in rows])})

    describe("tiny", Description("Tiny analysis", "It measures a value.", "Read it.", {"value": "the value"}))
    row = golden_row(1) | {"analysis": "tiny", "name": "tiny", "metrics": {"value": 2}, "result": {"value": 2.0}}
    path = write_rows(tmp_path, row)
    page = page_of(tmp_path)
    assert page.text("h2")[0] == "Tiny analysis"
    assert page.text("h4") == ["A line", "All rows"]
    assert page.table(1, "points") == {"x": [1], "y": [2.0], "line": ["a"]}
    assert "It measures a value." in page.text("p")
    assert "the value" in page.cells()
    write_rows(tmp_path, row, row | {"step": 2, "result": {}})
    with pytest.raises(ReportError, match=re.escape(f"{path}, line 2: cannot be drawn: KeyError: 'value'")):
        write_report(tmp_path)


def test_output_may_be_elsewhere_and_nothing_else_is_written(run: Path, tmp_path: Path) -> None:
    before = set(run.rglob("*"))
    target = write_report(run, tmp_path / "pages" / "run.html")
    assert target == tmp_path / "pages" / "run.html"
    assert target.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert set(run.rglob("*")) == before
    with pytest.raises(ReportError, match="is a directory; give the file"):
        write_report(run, tmp_path)


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_a_failed_report_leaves_the_old_one(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_report(run)
    before = target.read_bytes()

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert target.read_bytes() == before
    assert [path.name for path in run.iterdir() if path.is_file()] == ["report.html"]


def test_missing_vl_convert_says_what_to_install(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ImportError, match=r'figures need vl-convert-python: pip install "lightning-goldy\[report\]"'):
        write_report(run)
    assert not (run / "report.html").exists()


def test_numbers_that_are_not_finite_are_gaps(
    tmp_path: Path, golden_row: Build, write_rows: Write, page_of: PageOf
) -> None:
    rows = [golden_row(step) for step in (1, 2, 3)]
    rows[1]["metrics"]["density"] = float("nan")
    write_rows(tmp_path, *rows)
    assert page_of(tmp_path).table(1, "points")["y"] == [0.02, None, 0.02]


def test_answers_come_first_with_their_small_print(run: Path, page_of: PageOf) -> None:
    page = page_of(run)
    assert "The weights moved by 8\u00a0% of their norm." in page.text("p")
    assert page.text("span")[:2] == ["weak", "not measured"]
    assert any("Doubt: how far weights moved does not tell" in text for text in page.text("p"))
    # Questions stand above the sections that answer them.
    groups = [attributes for tag, attributes in page.tags if tag == "p" and attributes.get("class") == "group"]
    assert len(groups) == 2


def test_numbers_are_folded_and_drawn_only_when_opened(run: Path, page_of: PageOf) -> None:
    page = page_of(run)
    summaries = [text for text in page.text("summary") if text not in ("Definition", "When not to believe it")]
    assert summaries[-2:] == ["Details: 3 metrics at 2 steps", "Details: 7 metrics at 3 steps"]


def test_methods_name_what_was_done_and_the_version(
    tmp_path: Path, golden_row: Build, write_rows: Write, monkeypatch: pytest.MonkeyPatch, page_of: PageOf
) -> None:
    from lightning_goldy import __version__
    from lightning_goldy.report import descriptions

    monkeypatch.setattr(descriptions, "_DESCRIPTIONS", {})
    describe("tiny", Description("Tiny", "", "", method="Values follow Someone (2020)."))
    write_rows(tmp_path, golden_row(1) | {"analysis": "tiny", "name": "tiny"})
    text = f"We analysed the finetune with lightning_goldy {__version__}. Values follow Someone (2020)."
    assert text in page_of(tmp_path).text("p")


def test_answers_as_json(run: Path) -> None:
    told = json.loads(answers_json(run))
    assert [answer["trust"] for answer in told["answers"]] == ["weak", *["not measured"] * 4]
    assert told["answers"][0]["sentence"] == "The weights moved by 8 % of their norm."
    golden = next(analysis for analysis in told["analyses"] if analysis["name"] == "golden_parameters")
    assert (golden["step"], golden["metrics"]["count"]) == (30, 109)
    assert golden["metrics"]["jaccard_previous"] is None


def test_large_frames_leave_room_for_fewer(
    tmp_path: Path, golden_row: Build, write_rows: Write, monkeypatch: pytest.MonkeyPatch, page_of: PageOf
) -> None:
    from lightning_goldy.report import page as pages

    write_rows(tmp_path, *(golden_row(step, golden=step) for step in range(9)))
    one = len(json.dumps(page_of(tmp_path).charts[0])) / 9
    monkeypatch.setattr(pages, "_MOST_BYTES", int(5 * one))
    page = page_of(tmp_path)
    labels = [frame["label"] for frame in page.charts[0]["frames"]]
    assert 2 <= len(labels) < 9
    assert (labels[0], labels[-1]) == ("step 0", "step 8")
    assert f"{len(labels)} of 9 steps" in page.text("small")


def test_one_step_of_lines_over_the_run_is_told_in_words(golden_row: Build) -> None:
    metrics = {"mean_absolute_difference": 0.1, "correlation": 0.5, "measured_change/untouched": -0.25}
    result = {"classes": {"untouched": 20}, "n_pairs": 190}
    row = golden_row(4) | {"analysis": "coupling_drift", "name": "drift", "metrics": metrics, "result": result}
    entry = next(entry for entry in figures_of("coupling_drift") if entry.over == "run")
    assert _has_no_course(entry, entry.draw([row]))
    assert not _has_no_course(entry, entry.draw([row, {**row, "step": 8}]))


def test_a_bar_tells_what_lies_outside_of_it() -> None:
    assert "100 % \u2192" in _bar_svg(Bar(0.9, 0.5, 1.3))
    assert "\u2190 0" in _bar_svg(Bar(0.1, -0.2, 0.3))
    assert "\u2192" not in _bar_svg(Bar(0.5, 0.4, 0.6, 1.5))
