from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_goldy.core import ParameterSpace, ParameterVector, save_vectors
from lightning_goldy.report import ReportError, write_report
from lightning_goldy.report.page import answers_json
from lightning_goldy.report.run import read_run

Build = Callable[..., dict[str, Any]]
Write = Callable[..., Path]
PageOf = Callable[..., Any]


def test_the_goldy_folder_itself_may_be_given(run: Path) -> None:
    assert write_report(run / "goldy") == run.resolve() / "report.html"


def test_relative_directories_work(run: Path, monkeypatch: pytest.MonkeyPatch, page_of: PageOf) -> None:
    monkeypatch.chdir(run)
    assert "version_0" in page_of(".").text("dd")


def test_of_several_runs_the_newest_is_taken_and_named(
    run: Path, golden_row: Build, write_rows: Write, page_of: PageOf
) -> None:
    logs = run.parent
    for version, time in ((2, 3000), (10, 2000)):
        path = write_rows(logs / f"version_{version}", golden_row(5))
        os.utime(path, (time, time))
    for path in run.glob("goldy/*/results.jsonl"):
        os.utime(path, (1000, 1000))
    page = page_of(logs.parent)
    assert "version_2" in page.text("dd")
    told = "This is lightning_logs/version_2, the newest of 3 runs with analyses in"
    assert any(text.startswith(told) for text in page.text("p"))


def test_runs_of_the_same_age_are_ordered_by_their_number(tmp_path: Path, golden_row: Build, write_rows: Write) -> None:
    for version in (2, 10, 9):
        os.utime(write_rows(tmp_path / f"version_{version}", golden_row(5)), (1000, 1000))
    assert read_run(tmp_path).directory.name == "version_10"


def test_the_model_class_comes_from_the_tensor_files(run: Path, page_of: PageOf) -> None:
    module = torch.nn.Linear(2, 2)
    space = ParameterSpace.of(module)
    vector = ParameterVector(space, {name: tensor.detach() for name, tensor in module.named_parameters()})
    save_vectors(run / "goldy/golden_snapshot/base.safetensors", vector, kind="values", model=module)
    (run / "goldy/golden_parameters/mask.safetensors").write_bytes(b"torn")
    page = page_of(run)
    assert "Linear" in page.text("dd")
    assert "golden_parameters/mask.safetensors is not a readable tensor file." in page.text("p")


def test_a_torn_last_line_is_left_out_and_told(
    run: Path, golden_row: Build, write_rows: Write, page_of: PageOf
) -> None:
    write_rows(run, golden_row(10), golden_row(20), tail='{"format": 1, "analysis": "gol')
    page = page_of(run)
    assert "Line 3 of golden_parameters/results.jsonl, the last, is torn; it is left out." in page.text("p")
    assert ["step 10", "step 20"] in [[frame["label"] for frame in chart["frames"]] for chart in page.charts]


def test_a_run_whose_only_row_is_torn_says_so(tmp_path: Path, write_rows: Write) -> None:
    write_rows(tmp_path, name="golden", tail='{"format": 1, "analysis": "gol')
    with pytest.raises(ReportError, match=r"analysed yet; Line 1 of .*, the last, is torn; it is left out"):
        read_run(tmp_path)


def test_a_whole_last_line_without_a_newline_counts(tmp_path: Path, golden_row: Build, write_rows: Write) -> None:
    write_rows(tmp_path, golden_row(10), tail=json.dumps(golden_row(20)))
    assert len(read_run(tmp_path).analyses[0].rows) == 2


def test_rows_computed_again_replace_the_earlier_ones(
    tmp_path: Path, golden_row: Build, write_rows: Write, page_of: PageOf
) -> None:
    write_rows(tmp_path, golden_row(10), golden_row(30, golden=1), golden_row(20), golden_row(30, golden=2))
    (rows,) = read_run(tmp_path).analyses
    assert [row["step"] for row in rows.rows] == [10, 20, 30]
    assert rows.lines == (1, 3, 4)
    assert "golden_parameters holds 1 results that were computed again; the last counts." in page_of(tmp_path).text("p")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 3}, "format 3 is unknown; this version reads formats 1 and 2"),
        ({"step": "ten"}, "'step' must be an integer, got 'ten'"),
        ({"step": True}, "'step' must be an integer, got True"),
        ({"analysis": None}, "'analysis' must be text, got None"),
        ({"metrics": [1]}, "'metrics' must be an object"),
        ({"metrics": {"count": "3"}}, "'metrics.count' must be a number or null, got '3'"),
        ({"cost": {"seconds": []}}, "'cost.seconds' must be a number or null"),
        ({"result": {}}, "cannot be drawn: 'result.tensors' must be a list"),
        ({"analysis": "other"}, "'other' among rows of 'golden_parameters'"),
    ],
)
def test_malformed_rows_are_named_by_file_and_line(
    tmp_path: Path, golden_row: Build, write_rows: Write, change: Any, message: str
) -> None:
    path = write_rows(tmp_path, golden_row(10), golden_row(20) | change)
    with pytest.raises(ReportError, match=re.escape(f"{path}, line 2: {message}")):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [("{oops", "not JSON"), ("[1]", "a row must be an object, got list"), ('{"format": 1}', "'analysis' is missing")],
)
def test_lines_that_are_no_rows_are_named(
    tmp_path: Path, golden_row: Build, write_rows: Write, line: str, message: str
) -> None:
    path = write_rows(tmp_path, golden_row(10), tail=f"\n{line}\n")
    with pytest.raises(ReportError, match=re.escape(f"{path}, line 3: {message}")):
        write_report(tmp_path)


def test_an_analysis_without_a_result_yet_is_told(run: Path, write_rows: Write, page_of: PageOf) -> None:
    path = run / "goldy" / "basin_volume" / "results.jsonl"
    path.parent.mkdir()
    path.write_text("")
    assert "basin_volume has not written a result yet." in page_of(run).text("p")


def test_analyses_that_a_killed_run_had_still_to_make_are_named(run: Path, page_of: PageOf) -> None:
    for name in ("taylor_diff", "golden_parameters"):
        (run / "goldy" / name).mkdir(exist_ok=True)
        (run / "goldy" / name / ".run.json").write_text("{}")
    told = page_of(run).text("p")
    assert "taylor_diff has not written a result yet." in told
    assert "golden_parameters has not written a result yet." not in told


def test_a_question_whose_callback_a_killed_run_never_came_to_says_so(run: Path, page_of: PageOf) -> None:
    for name, callback in (("volumes", "BasinVolume"), ("later", "HeadPlasticity"), ("broken", None)):
        (run / "goldy" / name).mkdir()
        notes = "{" if callback is None else json.dumps({"identity": "a", "callback": callback, "claims": {}})
        (run / "goldy" / name / ".run.json").write_text(notes)
    told = page_of(run).text("p")
    assert "Not measured: volumes was attached, and had not fired when the run stood at step 30." in told
    assert not [text for text in told if "BasinVolume would tell" in text]
    assert any("was killed there before it came to it" in text for text in told)
    answers = json.loads(answers_json(run))["answers"]
    assert [answer["sentence"] for answer in answers if answer["question"] == "needs"] == [
        "Not measured: later was attached, and had not fired when the run stood at step 30."
    ]


def test_a_base_that_the_settings_leave_out_is_told_by_the_run(run: Path, page_of: PageOf) -> None:
    (run / "hparams.yaml").write_text(
        "model: null\ndata: null\ngoldy/base: GPT2LMHeadModel\ngoldy/data: data loaders\n"
    )
    page = page_of(run)
    told = dict(zip(page.text("dt"), page.text("dd"), strict=True))
    assert told["Base"] == "GPT2LMHeadModel"
    assert "data: data loaders" in told["Run"] or "data: data loaders" in page.text("small")


def test_nothing_to_report_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"run directory .*nowhere does not exist"):
        write_report(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="is not a directory"):
        write_report(tmp_path / "file")
    with pytest.raises(ReportError, match=r"no analyses here; looked for goldy/\*/results\.jsonl"):
        write_report(tmp_path)
    path = tmp_path / "goldy" / "golden_parameters" / "results.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("\n")
    with pytest.raises(ReportError, match="nothing has been analysed yet"):
        write_report(tmp_path)
