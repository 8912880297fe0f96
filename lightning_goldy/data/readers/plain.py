"""Questions with their answers as they are: JSON lines, tables, and the short form of shared question sets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.data.names import unknown_name
from lightning_goldy.data.readers.formats import Container, Reading
from lightning_goldy.data.readers.records import Record, RecordError, SkippedRecord, as_list, is_unicode, shown

PIECE_FIELDS = tuple(field.name for field in fields(KnowledgePiece))

_QUESTIONS = ("Question", "question")
_ANSWERS = ("answer", "Answer", "answers", "golden_answers")


def parse_piece(record: Record, reading: Reading | None = None) -> list[KnowledgePiece]:
    """A record with a piece's own fields, kept to the letter."""
    row = record.row
    for key in row:
        if key not in PIECE_FIELDS:
            raise RecordError(f"{record.place()}: {unknown_name('field', key, PIECE_FIELDS)}", f"unknown field {key!r}")
    for key in ("question", "answer"):
        record.as_text(row.get(key), key)
    for key in ("category", "group", "supporting_fact"):
        if not isinstance(row.get(key), str | None) or not is_unicode(row.get(key) or ""):
            raise record.malformed(key, "text", row[key])
    hop, name = row.get("hop"), row.get("id")
    if isinstance(hop, bool) or not isinstance(hop, int | None):
        raise record.malformed("hop", "a whole number", hop)
    if isinstance(name, bool) or not isinstance(name, str | int | None) or not is_unicode(str(name)):
        raise record.malformed("id", "text or a whole number", name)
    return [KnowledgePiece(**{**row, "id": record.number if name is None else str(name)})]


def parse_csv(record: Record, reading: Reading) -> list[KnowledgePiece]:
    """A line of a table, with a piece's own fields as columns."""
    # A table knows no types and no absence: a whole number is its digits, what is absent is empty.
    row: dict[str, Any] = {key.strip().lower(): value or None for key, value in record.row.items()}
    if len(row) < len(record.row):
        raise RecordError(f"{record.place()}: columns {', '.join(record.row)} repeat a name", "repeated column")
    hop = row.get("hop")
    if hop is not None:
        if not re.fullmatch(r"-?[0-9]{1,9}", hop.strip()):
            raise record.malformed("hop", "a whole number", hop)
        row["hop"] = int(hop)
    return parse_piece(Record(row, record.source, record.label), reading)


def parse_short(record: Record, reading: Reading) -> list[KnowledgePiece]:
    """A question and one answer or several, of which the first counts; other fields are left out."""
    question = next((key for key in _QUESTIONS if key in record.row), _QUESTIONS[0])
    answer = next((key for key in _ANSWERS if key in record.row), _ANSWERS[0])
    text = record.text(question)
    name = record.identifier("id") if record.row.get("id") is not None else record.number
    return [KnowledgePiece(name, text, _first_answer(record, answer), record.optional_text("category"))]


def _first_answer(record: Record, field: str) -> str:
    value = record.row.get(field)
    answers = as_list(value)
    if answers is None:
        return record.answer(field)
    if not answers:
        raise SkippedRecord("record without an answer")
    texts = [record.as_text(answer, f"{field}[{index}]") for index, answer in enumerate(answers)]
    return texts[0]


def parse_bamboogle(record: Record, reading: Reading) -> list[KnowledgePiece]:
    """A question and its answer, and nothing else."""
    for key in record.row:
        if key not in ("Question", "Answer", "id"):
            raise RecordError(
                f"{record.place()}: {unknown_name('field', key, ('Question', 'Answer'))}", f"unknown field {shown(key)}"
            )
    return parse_short(record, reading)


def is_csv(row: Mapping[str, Any], container: Container) -> bool:
    """Whether it is a table with these columns."""
    return container == "csv" and {"question", "answer"} <= {key.strip().lower() for key in row}


def is_short(row: Mapping[str, Any], container: Container) -> bool:
    """Whether it has a list of answers, or the names that such sets use."""
    if container == "csv":
        return False
    if "Question" in row:
        return any(key in row for key in _ANSWERS)
    several = any(key in row for key in ("answers", "golden_answers")) or as_list(row.get("answer")) is not None
    return "question" in row and several


def is_bamboogle(row: Mapping[str, Any], container: Container) -> bool:
    """Whether it has a question, an answer and nothing else."""
    return set(row) - {"id"} == {"Question", "Answer"}


def is_piece(row: Mapping[str, Any], container: Container) -> bool:
    """Whether it has a piece's own fields."""
    return container != "csv" and {"question", "answer"} <= set(row)
