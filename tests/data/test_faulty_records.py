"""Faulty records of every format: the error names file, record and field, or the record is left out and counted."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_goldy.data import load_pieces
from lightning_goldy.data.readers import RecordError
from tests.data.question_sets import records, write

Change = Callable[[dict[str, Any]], object]


def _set(**fields: Any) -> Change:
    return lambda row: row.update(fields)


def _without(field: str) -> Change:
    return lambda row: row.pop(field)


def _at(*path: Any, value: Any) -> Change:
    """Puts a value deep into a record."""

    def change(row: Any) -> None:
        for step in path[:-1]:
            row = row[step]
        row[path[-1]] = value

    return change


FULL_TEXT = "text that is not empty"
CORRUPTED: dict[str, list[tuple[Change, str, str]]] = {
    "hotpotqa": [
        (_without("_id"), "_id", f"expected {FULL_TEXT}; found nothing"),
        (_set(_id=["a"]), "_id", f"expected {FULL_TEXT}"),
        (_set(question=""), "question", f"expected {FULL_TEXT}; found ''"),
        (_set(answer=3), "answer", f"expected {FULL_TEXT}; found 3"),
        (_without("supporting_facts"), "supporting_facts", r"expected a list of \[title, sent_id\]; found nothing"),
        (
            _at("supporting_facts", 1, value=["Arthur's Magazine"]),
            "supporting_facts[1]",
            r"expected \[title, sent_id\]",
        ),
        (_at("supporting_facts", 0, 1, value="0"), "supporting_facts[0]", "a whole number of at least 0; found '0'"),
        (_at("supporting_facts", 0, 1, value=-1), "supporting_facts[0]", "a whole number of at least 0; found -1"),
        (_set(context="text"), "context", r"expected a list of \[title, sentences\]; found 'text'"),
        (_at("context", 0, 1, value="One sentence."), "context[0]", "expected a list of texts; found 'One sentence.'"),
        (_set(context={"title": ["a"], "sentences": []}), "context", "of one length; found '1 and 0'"),
        (_set(type={}), "type", f"expected {FULL_TEXT}; found {{}}"),
    ],
    "2wikimultihopqa": [
        (_without("_id"), "_id", f"expected {FULL_TEXT}; found nothing"),
        (_set(question=None), "question", f"expected {FULL_TEXT}; found nothing"),
        (_set(answer=["no"]), "answer", rf"expected {FULL_TEXT}; found \['no'\]"),
        (_without("evidences"), "evidences", r"expected a list of \[subject, relation, object\]; found nothing"),
        (_set(evidences="[]"), "evidences", r"expected a list of \[subject, relation, object\]; found '\[\]'"),
        (
            _at("evidences", 1, value=["Coffee Blues", "director"]),
            "evidences[1]",
            r"\[subject, relation, object\]; found \[",
        ),
        (_at("evidences", 1, 2, value=""), "evidences[1]", f"expected {FULL_TEXT}; found ''"),
        (_at("evidences", 0, 1, value=7), "evidences[0]", f"expected {FULL_TEXT}; found 7"),
        (_set(context=[["Coffee Blues", ["a", 1]]]), "context[0]", r"expected a list of texts; found \['a', 1\]"),
        (_set(context=[["Coffee Blues"]]), "context[0]", r"expected \[title, sentences\]; found \['Coffee Blues'\]"),
        (_set(supporting_facts=None), "supporting_facts", "found nothing"),
        (_set(type=1), "type", f"expected {FULL_TEXT}; found 1"),
    ],
    "musique": [
        (_without("id"), "id", f"expected {FULL_TEXT}; found nothing"),
        (_without("question"), "question", f"expected {FULL_TEXT}; found nothing"),
        (_set(answer=1975), "answer", f"expected {FULL_TEXT}; found 1975"),
        (_set(answerable="true"), "answerable", "expected true or false; found 'true'"),
        (_without("paragraphs"), "paragraphs", r"expected a list of \[idx, paragraph_text\]; found nothing"),
        (
            _at("paragraphs", 0, "idx", value=None),
            "paragraphs[0].idx",
            "expected a whole number of at least 0; found nothing",
        ),
        (
            _at("paragraphs", 0, "paragraph_text", value=[]),
            "paragraphs[0].paragraph_text",
            r"expected text; found \[\]",
        ),
        (_without("question_decomposition"), "question_decomposition", "found nothing"),
        (_set(question_decomposition=[]), "question_decomposition", r"expected at least one hop; found \[\]"),
        (
            _at("question_decomposition", 1, "answer", value=None),
            "question_decomposition[1].answer",
            f"expected {FULL_TEXT}; found nothing",
        ),
        (
            _at("question_decomposition", 0, "question", value=" "),
            "question_decomposition[0].question",
            f"expected {FULL_TEXT}; found ' '",
        ),
        (
            _at("question_decomposition", 0, "paragraph_support_idx", value=4),
            "question_decomposition[0].paragraph_support_idx",
            "expected the idx of a paragraph; found 4",
        ),
        (_at("question_decomposition", 0, value="Green"), "question_decomposition[0]", "found 'Green'"),
    ],
    "wikihop": [
        (_without("id"), "id", f"expected {FULL_TEXT}; found nothing"),
        (_set(id=True), "id", f"expected {FULL_TEXT}; found True"),
        (_without("query"), "query", f"expected {FULL_TEXT}; found nothing"),
        (_set(query="participant_of"), "query", "expected a relation, a space and a subject; found 'participant_of'"),
        (_set(answer=1996), "answer", f"expected {FULL_TEXT}; found 1996"),
        (_set(answer="a fourth"), "answer", "expected one of the candidates; found 'a fourth'"),
        (_without("candidates"), "candidates", "expected a list of texts; found nothing"),
        (_set(candidates="english"), "candidates", "expected a list of texts; found 'english'"),
        (_set(candidates=["english", 2]), "candidates", "expected a list of texts"),
        (_without("supports"), "supports", "expected a list of texts; found nothing"),
        (_set(query="country \ud800"), "query", "expected text of whole characters"),
    ],
    "qa": [
        (_without("Question"), "Question", f"expected {FULL_TEXT}; found nothing"),
        (_set(Question=" "), "Question", f"expected {FULL_TEXT}; found ' '"),
        (_set(Question=["Who?"]), "Question", f"expected {FULL_TEXT}"),
        (_set(Question="Who \udfff?"), "Question", "expected text of whole characters"),
        (_set(answer=5), "answer", f"expected {FULL_TEXT}; found 5"),
        (_set(answer={"a": 1}), "answer", f"expected {FULL_TEXT}"),
        (_set(answer=[None]), "answer[0]", f"expected {FULL_TEXT}; found nothing"),
        (_set(answer=["A", ""]), "answer[1]", f"expected {FULL_TEXT}; found ''"),
        (_set(id=1.5), "id", f"expected {FULL_TEXT}; found 1.5"),
        (_set(id=""), "id", f"expected {FULL_TEXT}; found ''"),
        (_set(category=3), "category", f"expected {FULL_TEXT}; found 3"),
    ],
    "jsonl": [
        (_without("question"), "question", f"expected {FULL_TEXT}; found nothing"),
        (_set(question=7), "question", f"expected {FULL_TEXT}; found 7"),
        (_set(answer=""), "answer", f"expected {FULL_TEXT}; found ''"),
        (_set(answer=None), "answer", f"expected {FULL_TEXT}; found nothing"),
        (_set(answer="\ud8ff"), "answer", "expected text of whole characters"),
        (_set(category=["c"]), "category", r"expected text; found \['c'\]"),
        (_set(group=1), "group", "expected text; found 1"),
        (_set(hop=1.0), "hop", "expected a whole number; found 1.0"),
        (_set(hop=True), "hop", "expected a whole number; found True"),
        (_set(id=[]), "id", "expected text or a whole number"),
        (_set(supporting_fact={}), "supporting_fact", "expected text; found {}"),
        (_set(question="Q one?"), "question", "'Q one\\?' already occurs on line 1"),
    ],
    "csv": [
        (_set(question=""), "question", f"expected {FULL_TEXT}; found nothing"),
        (_set(question="  "), "question", f"expected {FULL_TEXT}; found '  '"),
        (_set(answer=""), "answer", f"expected {FULL_TEXT}; found nothing"),
        (_set(answer="\t"), "answer", f"expected {FULL_TEXT}"),
        (_set(hop="one"), "hop", "expected a whole number; found 'one'"),
        (_set(hop="1.5"), "hop", "expected a whole number; found '1.5'"),
        (_set(hop="9" * 5000), "hop", "expected a whole number"),
        (_set(id="a"), "id", "'a' already occurs on line 2"),
        (_set(question="Q one?"), "question", r"'Q one\?' already occurs on line 2"),
        (_set(hop="1_000"), "hop", "expected a whole number; found '1_000'"),
    ],
}


def _cases() -> list[Any]:
    return [
        pytest.param(name, *case, id=f"{name}-{index}")
        for name, cases in CORRUPTED.items()
        for index, case in enumerate(cases)
    ]


@pytest.mark.parametrize(("name", "change", "field", "problem"), _cases())
def test_faulty_records_are_named(tmp_path: Path, name: str, change: Change, field: str, problem: str) -> None:
    rows = records(name)
    place = 2 if name == "musique" else 1
    change(rows[place])
    path = write(tmp_path, name, rows)
    what = "line" if name in ("musique", "jsonl", "csv") else "record"
    number = place + 1 + (name == "csv")
    with pytest.raises(RecordError) as error:
        load_pieces(path, format=name)
    message = str(error.value)
    assert message.startswith(f"{path}, {what} {number}")
    assert f"field {field!r}: " in message
    assert re.search(problem, message)
    identifier = rows[place].get("_id", rows[place].get("id"))
    if isinstance(identifier, str) and field not in ("_id", "id"):
        assert f"{what} {number} ({identifier!r}), field" in message


@pytest.mark.parametrize(("name", "change", "field", "problem"), _cases())
def test_faulty_records_can_be_left_out_and_are_counted(
    tmp_path: Path, name: str, change: Change, field: str, problem: str
) -> None:
    rows = records(name)
    place = 2 if name == "musique" else 1
    rest = rows[:place] + rows[place + 1 :]
    change(rows[place])
    found = load_pieces(write(tmp_path, name, rows), format=name, on_malformed="skip")
    expected = load_pieces(write(tmp_path, name, rest), format=name)
    faults = {reason: count for reason, count in found.skipped.items() if reason.startswith("malformed record: ")}
    assert sum(faults.values()) == 1
    assert re.sub(r"\[\d+\]", "[]", field) in next(iter(faults))
    assert {reason: count for reason, count in found.skipped.items() if reason not in faults} == expected.skipped
    assert [piece.question for piece in found.pieces] == [piece.question for piece in expected.pieces]
    assert (found.records, found.incomplete) == (expected.records + 1, expected.incomplete)
