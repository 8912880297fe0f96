from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from lightning_goldy.core.files import append_row
from lightning_goldy.report import write_report
from lightning_goldy.report.figures import ReportError
from lightning_goldy.report.formatting import printable
from lightning_goldy.report.topics.linearized import explanation_table
from lightning_goldy.report.topics.text import (
    continuations_html,
    continuations_table,
    generations_html,
    generations_table,
    generations_text,
    summary_table,
)
from tests.report.conftest import Page

COMPARED = {"prompt": "[b]2+2", "present": "<i>4\x1b[31m", "base": "five\nsix", "agreement": 0.25, "kl_per_token": 1.5}
ALONE = {**COMPARED, "base": None, "agreement": None, "kl_per_token": None}


def printed(table: Any, width: int = 120) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, force_terminal=False).print(table)
    return stream.getvalue()


def test_continuations_are_shown_as_they_are() -> None:
    shown = printed(continuations_table([COMPARED]))
    assert all(text in shown for text in ("[b]2+2", "<i>4\\x1b[31m", "five↵six", "25 %", "1.5", "same tokens"))
    assert "\x1b" not in shown
    alone = printed(continuations_table([ALONE]))
    assert "<i>4" in alone
    assert "base" not in alone
    assert "same tokens" not in alone


def test_long_words_are_folded_not_cut() -> None:
    shown = printed(continuations_table([{**COMPARED, "base": "x" * 200}]))
    assert shown.count("x") == 201  # and the one of the escape


def test_the_page_escapes_continuations(tmp_path: Any) -> None:
    row = {"format": 1, "analysis": "continuations", "name": "continuations", "step": 3, "epoch": 0}
    row |= {"trigger": "checkpoint", "metrics": {"prompts": 1, "agreement": 0.25, "kl_per_token": 1.5}, "files": {}}
    row |= {"result": {"continuations": [COMPARED]}, "cost": {}}
    append_row(tmp_path / "goldy/continuations/results.jsonl", row)
    page = Page(write_report(tmp_path).read_text())
    assert "What it writes" in page.text("h2")
    assert {"[b]2+2", "five↵six", "<i>4\\x1b[31m"} <= set(page.text("bdi"))
    assert not [tag for tag, _ in page.tags if tag == "i"]
    meaning = "mean KL(model || the other) along what the model writes, nats per token; the checkpoint, the base"
    assert meaning in page.cells()


@pytest.mark.parametrize("entry", [{"prompt": "a"}, {**COMPARED, "present": 3}, {**COMPARED, "agreement": "x"}])
def test_spoilt_continuations_are_named(entry: dict[str, Any]) -> None:
    with pytest.raises(ReportError, match="a continuation lacks or spoils"):
        continuations_html({"result": {"continuations": [entry]}})


def test_the_summary_shows_the_metrics() -> None:
    fits = [
        {"order": 1, "loss": 1.25, "relative_error": 0.375},
        {"order": 2, "loss": 1.5, "relative_error": None},
    ]
    expansion = {
        "name": "taylor_diff",
        "metrics": {"base_loss": 2.0, "loss": 1.0, "change": -1.0},
        "result": {"fits": fits, "regime": "weakly nonlinear"},
    }
    attention = {"name": "attention_tracker", "metrics": {"entropy": 0.5, "drift": None}, "result": {}}
    table = summary_table([expansion, attention, {"name": "continuations", "metrics": {}, "result": {}}])
    shown = " ".join(printed(table).split())
    assert "change of the loss, nats -1 " in shown
    assert "order 1: predicted change, nats -0.75 order 1: error / change of the logits 0.375" in shown
    assert "order 2: predicted change, nats -0.5 the step is weakly nonlinear attention_tracker" in shown
    assert "entropy, nats, mean 0.5" in shown
    assert "drift" not in shown
    assert table.row_count == 8


def test_the_summary_doubts_a_circuit_where_its_row_does() -> None:
    metrics = {"faithfulness_10_percent": 0.75, "faithfulness_low": -0.5, "faithfulness_high": 2.0}
    row = {"name": "circuit_tracker", "metrics": metrics, "result": {"curve": {"weak": "it reaches 0"}}}
    shown = " ".join(printed(summary_table([row])).split())
    assert "10 % of the edges keep 0.75 at least, by its 95 % interval -0.5 at most 2 weak: it reaches 0" in shown
    row["result"] = {"curve": {"weak": "", "n_pairs": 8, "n_shared": 8}}
    shown = " ".join(printed(summary_table([row])).split())
    assert "weak" not in shown
    assert "measured on 8 prompts, 8 of which chose the edges" in shown


def test_the_explanation_is_a_table_of_variants() -> None:
    each = {"variant": "frozen_attention", "loss": 1.25, "loss_share": 0.75, "logit_share": 0.5}
    each |= {"relative_error": 0.125, "kl_divergence": 0.03125}
    bare = {**dict.fromkeys(each), "variant": "both", "loss": 1.5}
    shown = " ".join(printed(explanation_table({"result": {"variants": [each, bare]}})).split())
    assert "attention frozen 1.25 75 % 50 % 12.5 % 0.03125" in shown
    assert "attention frozen, MLPs linear 1.5 – – – –" in shown  # noqa: RUF001
    with pytest.raises(ReportError, match=r"needs result\.variants"):
        explanation_table({"result": {}})


NASTY = {
    "prompt": "<script>alert(1)</script>",
    "plain": "a|b\n*x* [red]r[/red] `c` <img src=x>",
    "masked": "\x1b[31mred\x07 & \u202eback",
    "agreement": 0.25,
    "kl_per_token": 1.5,
}


def test_texts_are_shown_and_never_rendered() -> None:
    page = generations_html({"result": {"generations": [NASTY]}})
    assert "<script>" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "25 %" in page
    assert not any(char in page for char in "\x1b\x07\u202e")
    line = generations_text([NASTY]).splitlines()[-1]
    assert line.count("|") == 6
    assert not set("<>`*[]\x1b") & set(line)
    shown = printed(generations_table([NASTY]), width=200)
    assert "[red]r[/red]" in shown
    assert "\x1b" not in shown
    assert printable("a\r\nb\tc") == "a↵b\\tc"


def test_a_spoiled_entry_is_an_error() -> None:
    spoilt: list[Any] = [{**NASTY, "plain": None}, {"prompt": "a"}, "text"]
    for entry in spoilt:
        with pytest.raises(ReportError, match="a comparison of generations lacks or spoils"):
            generations_text([entry])
