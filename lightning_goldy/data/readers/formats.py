"""The registry of formats: how a record of each becomes pieces, and how it is told from the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.core.registry import Registry
from lightning_goldy.data.readers.records import Record
from lightning_goldy.data.readers.wording import Form

Container = Literal["json", "lines", "csv", "rows", "atlas"]
"""What records came in: a JSON list, JSON lines, a table, rows of a dataset, the embedded table."""


@dataclass(frozen=True)
class Reading:
    """How records are to become pieces.

    Args:
        form: How a subject and a relation are worded.
        whole_questions: Whether a question composed of several facts is a piece beside them.
    """

    form: Form = "question"
    whole_questions: bool = False


@dataclass(frozen=True)
class Format:
    """A format of records.

    Args:
        parse: Makes the pieces of one record. It raises what ``Record.malformed`` returns for a faulty record and
            ``SkippedRecord`` for a sound one that gives none.
        recognises: Whether a first record, and what it came in, are of this format.
        fields: The fields of a record, for messages.
        whole_questions: Whether composed questions are pieces beside their facts, unless the caller says; None where
            a record is one question and there is nothing to choose.
        relations: Whether a record has subjects and relations, which a form words.
        repeated: What a question is that an earlier record asked: left out and counted, or an error.
    """

    parse: Callable[[Record, Reading], list[KnowledgePiece]]
    recognises: Callable[[Mapping[str, Any], Container], bool]
    fields: str
    whole_questions: bool | None = None
    relations: bool = False
    repeated: Literal["skip", "error"] = "skip"


FORMATS: Registry[Format] = Registry("format")
"""Formats by name. Where several recognise a record, the one registered last is meant."""


def recognised(row: Mapping[str, Any], container: Container, source: str) -> str:
    """The name of the format of a source.

    Args:
        row: Its first record.
        container: What the record came in.
        source: For the message.

    Raises:
        ValueError: No format fits; the message tells the record's fields and those of every format.
    """
    for name in reversed([*FORMATS]):
        if FORMATS[name].recognises(row, container):
            return name
    known = "; ".join(f"{name}: {FORMATS[name].fields}" for name in FORMATS)
    found = ", ".join(map(str, row)) or "none"
    raise ValueError(
        f"cannot tell the format of {source}: its first record has the fields {found}. Name the format, or use the"
        f" fields of one of these: {known}"
    )


def has(*fields: str) -> Callable[[Mapping[str, Any], Container], bool]:
    """A test for a record that has all of these fields."""

    def recognises(row: Mapping[str, Any], container: Container) -> bool:
        return all(field in row for field in fields)

    return recognises
