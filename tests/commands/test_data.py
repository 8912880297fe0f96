"""``goldy data``: what it writes is what the source holds, and what it prints counts all of it."""

from __future__ import annotations

import argparse
import json

import pytest

from lightning_goldy.cli import add_command, main
from lightning_goldy.data import load_pieces, read_pieces
from lightning_goldy.data.readers import FORMATS
from tests.data.question_sets import RECORDS, write


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    return tmp_path


def cells(shown: str) -> list[list[str]]:
    lines = [line for line in shown.splitlines() if "│" in line]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_convert_writes_the_pieces_and_counts_what_was_left_out(here, capsys):
    write(here, "musique", RECORDS["musique"])
    assert main(["data", "convert", "musique.jsonl", "--output", "out/pieces.jsonl"]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0] == "musique.jsonl, format musique"
    assert shown.splitlines()[-1] == "out/pieces.jsonl"
    assert cells(shown) == [
        ["records", "4"],
        ["pieces", "4"],
        ["groups", "2"],
        ["hop 1", "1"],
        ["hop 2", "2"],
        ["hop 3", "1"],
        ["categories", "2"],
        ["2hop", "2"],
        ["3hop1", "2"],
        ["left out", "3"],
        ["piece that repeats an earlier question and its answer", "1"],
        ["record without an answer", "1"],
        ["unanswerable record", "1"],
        ["kept without", "3"],
        ["hop without a supporting paragraph", "2"],
        ["hop whose '#' and number name no earlier hop", "1"],
    ]
    assert read_pieces("out/pieces.jsonl") == [*load_pieces("musique.jsonl").pieces]


def test_options_reach_the_reader(here, capsys):
    write(here, "2wikimultihopqa", RECORDS["2wikimultihopqa"])
    words = ["data", "convert", "2wikimultihopqa.json", "--output", "out.jsonl", "--format", "2wikimultihopqa"]
    assert main([*words, "--limit", "1", "--form", "cloze", "--no-whole-questions"]) == 0
    assert [piece.question for piece in read_pieces("out.jsonl")] == [
        "The director of Polish-Russian War is",
        "The mother of Xawery Żuławski is",
    ]
    assert ["records", "1"] in cells(capsys.readouterr().out)
    assert main([*words, "--whole-questions", "--force"]) == 0
    assert len(read_pieces("out.jsonl")) == 6


def test_faulty_records_stop_it_or_are_counted(here, capsys):
    (here / "a.jsonl").write_text('{"question": "Q?", "answer": "A"}\n{"question": "R?"}\n{\n')
    words = ["data", "convert", "a.jsonl", "--output", "b.jsonl"]
    assert main(words) == 2
    assert "a.jsonl, line 2, field 'answer': expected text" in capsys.readouterr().err
    assert not (here / "b.jsonl").exists()
    assert main([*words, "--on-malformed", "skip"]) == 0
    assert cells(capsys.readouterr().out)[-3:] == [
        ["left out", "2"],
        ["malformed record: field 'answer', text that is not empty", "1"],
        ["malformed record: not JSON", "1"],
    ]


def test_many_categories_are_summed_up(here, capsys):
    rows = [{"question": f"Q{n}?", "answer": "A", "category": f"c{n % 7}"} for n in range(20)]
    (here / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "convert", "a.jsonl", "--output", "b.jsonl"]) == 0
    shown = cells(capsys.readouterr().out)
    assert ["categories", "7"] in shown
    assert ["2 others", str(20 - 5 * 3)] in shown


def test_show_prints_the_first_pieces_as_they_are(here, capsys):
    rows = [{"id": f"[red]{n}", "question": f"[b]Q{n}?", "answer": "A", "hop": 1} for n in range(7)]
    (here / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "show", "a.jsonl", "--n", "2"]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("[red]")] == ["[red]0", "[red]1"]
    assert cells(shown) == [
        ["question", "[b]Q0?"],
        ["answer", "A"],
        ["hop", "1"],
        ["question", "[b]Q1?"],
        ["answer", "A"],
        ["hop", "1"],
    ]
    assert main(["data", "show", "a.jsonl"]) == 0
    assert capsys.readouterr().out.count("question") == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "absent.json"], "'absent.json' is not a file"),
        (["show", "atlas", "--n", "0"], "--n 0 must be at least 1"),
        (["show", "atlas", "--format", "atlsa"], "unknown format 'atlsa'; did you mean 'atlas'"),
        (["convert", "atlas", "--output", "old", "--limit", "3"], "old exists; --force replaces it"),
        (["convert", "atlas", "--output", "c", "--limit", "0"], "limit=0 must be"),
        (["convert", "old", "--output", "c"], "cannot tell the format of old: its first record has the fields a"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(here, capsys, words, message):
    (here / "old").write_text('{"a": 1}')
    assert main(["data", *words]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not (here / "c").exists()
    assert (here / "old").read_text() == '{"a": 1}'


def test_the_help_names_every_format(capsys):
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers(), "data")
    with pytest.raises(SystemExit):
        parser.parse_args(["data", "convert", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in FORMATS)
