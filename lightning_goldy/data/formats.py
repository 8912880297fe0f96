"""Records of a source, the wording of their questions, and the registry of formats that makes pieces of them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np

from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.core.registry import Registry
from lightning_goldy.data.names import unknown_name

Form = Literal["question", "cloze"]
Container = Literal["json", "lines", "csv", "rows", "atlas"]
"""What records came in: a JSON list, JSON lines, a table, rows of a dataset, the embedded table."""

_SURROGATE = re.compile("[\ud800-\udfff]")
# "founded by", "participant of": the subject stands before such a relation and the answer after it.
_OPEN = re.compile(r"\b(?:of|in|by|to|at|from|on|with|for|after|as|than)$|^located\b", re.IGNORECASE)
_VERB = re.compile(r"^(?:has|have|interacts)\b", re.IGNORECASE)


class RecordError(ValueError):
    """A record is not what its format says; the message names the source, the record and the field.

    Args:
        message: All of that, and what was found.
        reason: The same for every record with this fault: records left out are counted by it.
    """

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = f"malformed record: {reason}"


class SkippedRecord(Exception):  # noqa: N818, it is no error
    """A sound record that gives no piece; the text is the reason it is counted by."""


class Record:
    """One record and where it stands.

    Args:
        row: The fields.
        source: The file or dataset, for messages.
        label: Which record of the source it is, such as ``line 3``.

    Example:
        >>> record = Record({"id": "a", "question": " Capital of Peru? "}, "peru.json", "record 1")
        >>> record.text("question")
        'Capital of Peru?'
        >>> str(record.malformed("title", "text", 7))
        "peru.json, record 1 ('a'), field 'title': expected text; found 7"
    """

    def __init__(self, row: Mapping[str, Any], source: str, label: str) -> None:
        self.row = row
        self.source = source
        self.label = label
        self.notes: Counter[str] = Counter()

    @property
    def number(self) -> str:
        """The number in the label: the name of a record that has none."""
        return re.sub(r"\D", "", self.label)

    def malformed(self, field: str, expected: str, found: object = None) -> RecordError:
        """The error for a field that is not what it should be."""
        problem = f"expected {expected}; found {shown(found)}"
        return RecordError(f"{self.place(field)}, field {field!r}: {problem}", f"field {_family(field)!r}, {expected}")

    def place(self, field: str = "") -> str:
        """Where the record stands, with its id unless that is what is wrong."""
        name = next((self.row[key] for key in ("_id", "id") if isinstance(self.row.get(key), str)), None)
        known = "" if name is None or field in ("_id", "id") else f" ({name!r})"
        return f"{self.source}, {self.label}{known}"

    def note(self, what: str) -> None:
        """Counts something that the record's pieces go without."""
        self.notes[what] += 1

    def identifier(self, *fields: str) -> str:
        """The record's own name, from the first of the fields that it has."""
        field = next((each for each in fields if self.row.get(each) is not None), fields[0])
        value = self.row.get(field)
        if isinstance(value, Integral) and not isinstance(value, bool):
            return str(value)
        return self.text(field)

    def text(self, field: str) -> str:
        """A field's text, without white space around it."""
        return self.as_text(self.row.get(field), field)

    def optional_text(self, field: str) -> str | None:
        """A field's text; None where it is missing or empty."""
        value = self.row.get(field)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        return self.as_text(value, field)

    def answer(self, field: str = "answer") -> str:
        """The answer.

        Raises:
            SkippedRecord: There is none, as in the test files of shared tasks.
            RecordError: It is no text.
        """
        answer = self.optional_text(field)
        if answer is None:
            raise SkippedRecord("record without an answer")
        return answer

    def as_text(self, value: object, field: str, *, empty: bool = False) -> str:
        """A value that must be text, without white space around it."""
        if not isinstance(value, str) or not (empty or value.strip()):
            raise self.malformed(field, "text" if empty else "text that is not empty", value)
        if not is_unicode(value):
            raise self.malformed(field, "text of whole characters", value)
        return value.strip()

    def as_index(self, value: object, field: str) -> int:
        """A value that must be a position, counted from 0."""
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 0:
            raise self.malformed(field, "a whole number of at least 0", value)
        return int(value)

    def as_texts(self, value: object, field: str) -> list[str]:
        """A value that must be a list of texts; an empty one stays as it is."""
        items = as_list(value)
        if items is None or not all(isinstance(item, str) and is_unicode(item) for item in items):
            raise self.malformed(field, "a list of texts", value)
        return [item.strip() for item in items]

    def table(self, field: str, *columns: str) -> list[tuple[Any, ...]]:
        """A field that holds rows of cells, in any of three shapes.

        Args:
            field: The field.
            columns: Names of the cells.

        Returns:
            The rows, whether the field is a list of lists (``[["Title", 0]]``), a list of objects
            (``[{"title": "Title", "sent_id": 0}]``), or one object of columns (``{"title": [...], "sent_id": [...]}``)
            as the hub keeps them; a cell that an object lacks is None.

        Raises:
            RecordError: It is neither.
        """
        value = self.row.get(field)
        if isinstance(value, Mapping):
            return self._columns(value, field, columns)
        items = as_list(value)
        if items is None:
            raise self.malformed(field, f"a list of [{', '.join(columns)}]", value)
        return [self._cells(item, f"{field}[{index}]", columns) for index, item in enumerate(items)]

    def _columns(self, value: Mapping[str, Any], field: str, columns: Sequence[str]) -> list[tuple[Any, ...]]:
        lists = [as_list(value.get(column)) for column in columns]
        if any(each is None for each in lists):
            raise self.malformed(field, f"the lists {', '.join(columns)}", value)
        found = [each for each in lists if each is not None]
        if len({len(each) for each in found}) > 1:
            lengths = " and ".join(str(len(each)) for each in found)
            raise self.malformed(field, f"lists {', '.join(columns)} of one length", lengths)
        return list(zip(*found, strict=True))

    def _cells(self, item: object, field: str, columns: Sequence[str]) -> tuple[Any, ...]:
        if isinstance(item, Mapping):
            return tuple(item.get(column) for column in columns)
        cells = as_list(item)
        if cells is None or len(cells) != len(columns):
            raise self.malformed(field, f"[{', '.join(columns)}]", item)
        return tuple(cells)


def as_list(value: object) -> list[Any] | None:
    """The value as a list, or None where it is no list."""
    if isinstance(value, np.ndarray):
        return list(value.tolist())
    return list(value) if isinstance(value, (list, tuple)) else None


def is_unicode(value: str) -> bool:
    """Whether a text can be written: JSON can hold half a surrogate pair, which no tokenizer takes."""
    return not _SURROGATE.search(value)


def shown(value: object, length: int = 80) -> str:
    """A value as messages show it.

    Example:
        >>> shown(None), shown("x" * 99)[-8:]
        ('nothing', 'xxxxx...')
    """
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _family(field: str) -> str:
    # One reason for a fault, wherever in a list it stands.
    return re.sub(r"\[\d+\]", "[]", field)


def word(subject: str, relation: str, form: Form = "question") -> str:
    """A prompt that asks for the object of a subject and a relation.

    Args:
        subject: Whom or what it is about.
        relation: The relation's name; underscores count as spaces.
        form: ``question`` for ``Question: {question}``-like templates, ``cloze`` for a sentence that the answer
            completes, whose template is ``{question}`` alone.

    Raises:
        ValueError: No such form.

    Example:
        >>> word("Green", "performer"), word("Green", "performer", "cloze")
        ('What is the performer of Green?', 'The performer of Green is')
        >>> word("juan rossell", "participant_of"), word("juan rossell", "participant_of", "cloze")
        ('juan rossell is participant of what?', 'juan rossell is participant of')
        >>> word("water", "has part", "cloze")
        'water has part'
    """
    check_form(form)
    relation = " ".join(relation.replace("_", " ").split())
    if _VERB.search(relation):
        sentence = f"{subject} {relation}"
    elif _OPEN.search(relation):
        sentence = f"{subject} is {relation}"
    else:
        return f"What is the {relation} of {subject}?" if form == "question" else f"The {relation} of {subject} is"
    return f"{sentence} what?" if form == "question" else sentence


def check_form(form: str) -> None:
    """Raises ValueError unless it is one of the two forms."""
    if form not in get_args(Form):
        raise ValueError(unknown_name("form", form, get_args(Form)))


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
