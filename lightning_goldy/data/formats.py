"""Formats of questions: records, wording, and the registry with the public question sets, tables and JSON lines."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np

from lightning_goldy.core.files import PlainError
from lightning_goldy.core.naming import Registry, unknown_name
from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.data.relations import RELATIONS, Fact, country_facts, two_hop_questions

Form = Literal["question", "cloze"]
Container = Literal["json", "lines", "csv", "rows", "atlas"]
"""What records came in: a JSON list, JSON lines, a table, rows of a dataset, the embedded table."""

_SURROGATE = re.compile("[\ud800-\udfff]")
# "founded by", "participant of": the subject stands before such a relation and the answer after it.
_OPEN = re.compile(r"\b(?:of|in|by|to|at|from|on|with|for|after|as|than)$|^located\b", re.IGNORECASE)
_VERB = re.compile(r"^(?:has|have|interacts)\b", re.IGNORECASE)


class RecordError(PlainError):
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


@dataclass(eq=False)
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

    row: Mapping[str, Any]
    source: str
    label: str
    notes: Counter[str] = field(default_factory=Counter, init=False)

    @property
    def number(self) -> str:
        """The number in the label: the name of a record that has none."""
        return re.sub(r"\D", "", self.label)

    def malformed(self, field: str, expected: str, found: object = None) -> RecordError:
        """The error for a field that is not what it should be."""
        problem = f"expected {expected}; found {shown(found)}"
        # One reason for a fault, wherever in a list it stands.
        family = re.sub(r"\[\d+\]", "[]", field)
        return RecordError(f"{self.place(field)}, field {field!r}: {problem}", f"field {family!r}, {expected}")

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
        found = [each for each in lists if each is not None]
        if len(found) < len(lists):
            raise self.malformed(field, f"the lists {', '.join(columns)}", value)
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
        raise PlainError(unknown_name("form", form, get_args(Form)))


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
    raise PlainError(
        f"cannot tell the format of {source}: its first record has the fields {found}. Name the format, or use the"
        f" fields of one of these: {known}"
    )


def has(*fields: str) -> Callable[[Mapping[str, Any], Container], bool]:
    """A test for a record that has all of these fields."""
    return lambda row, container: all(field in row for field in fields)


_NO_PARAGRAPH = "supporting sentence whose paragraph the context lacks"
_NO_SENTENCE = "supporting sentence beyond the end of its paragraph"
_NO_SUPPORT = "hop without a supporting paragraph"
_LATER_HOP = "hop whose '#' and number name no earlier hop"
_REFERENCE = re.compile(r"#([0-9]{1,3})(?![0-9])")
_DISAMBIGUATION = re.compile(r"\s*\([^()]*\)$")
_MASK = re.compile(r"___MASK\d+___")
_QUESTIONS = ("Question", "question")
_ANSWERS = ("answer", "Answer", "answers", "golden_answers")

PIECE_FIELDS = tuple(field.name for field in fields(KnowledgePiece))


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
    first, *_ = [record.as_text(answer, f"{field}[{index}]") for index, answer in enumerate(answers)]
    return first


def parse_bamboogle(record: Record, reading: Reading) -> list[KnowledgePiece]:
    """A question and its answer, and nothing else."""
    for key in record.row:
        if key not in ("Question", "Answer", "id"):
            raise RecordError(
                f"{record.place()}: {unknown_name('field', key, ('Question', 'Answer'))}", f"unknown field {shown(key)}"
            )
    return parse_short(record, reading)


def parse_hotpotqa(record: Record, reading: Reading) -> list[KnowledgePiece]:
    """The question, with its supporting sentences."""
    name, question, answer = record.identifier("_id", "id"), record.text("question"), record.answer()
    category = record.optional_text("type")
    facts = _supporting_sentences(record)
    return [KnowledgePiece(name, question, answer, category, supporting_fact=_joined(text for _, text in facts))]


def parse_2wiki(record: Record, reading: Reading) -> list[KnowledgePiece]:
    """Every evidence triple, and the question composed of them."""
    name, question, answer = record.identifier("_id", "id"), record.text("question"), record.answer()
    category = record.optional_text("type")
    facts = _supporting_sentences(record)
    pieces = []
    for hop, cells in enumerate(record.table("evidences", "subject", "relation", "object"), start=1):
        subject, relation, value = (record.as_text(cell, f"evidences[{hop - 1}]") for cell in cells)
        fact = _joined(text for title, text in facts if subject in (title, _DISAMBIGUATION.sub("", title)))
        prompt = word(subject, relation, reading.form)
        pieces.append(KnowledgePiece(f"{name}/{hop}", prompt, value, relation, name, hop, fact))
    if reading.whole_questions:
        fact = _joined(text for _, text in facts)
        pieces.append(KnowledgePiece(name, question, answer, category, name, supporting_fact=fact))
    if not pieces:
        raise SkippedRecord("record without evidence triples")
    return pieces


def _supporting_sentences(record: Record) -> list[tuple[str, str]]:
    """Title and text of every supporting sentence that the context has."""
    paragraphs: dict[str, list[str]] = {}
    for index, (title, sentences) in enumerate(record.table("context", "title", "sentences")):
        place = f"context[{index}]"
        paragraphs.setdefault(record.as_text(title, place, empty=True), record.as_texts(sentences, place))
    found = []
    for index, (title, sentence) in enumerate(record.table("supporting_facts", "title", "sent_id")):
        place = f"supporting_facts[{index}]"
        title, number = record.as_text(title, place), record.as_index(sentence, place)
        if title not in paragraphs:
            record.note(_NO_PARAGRAPH)  # the fullwiki setting retrieves its paragraphs, and may miss one
        elif number >= len(paragraphs[title]):
            record.note(_NO_SENTENCE)
        else:
            found.append((title, paragraphs[title][number]))
    return found


def _joined(texts: Any) -> str | None:
    return " ".join(text for text in texts if text) or None


def parse_musique(record: Record, reading: Reading) -> list[KnowledgePiece]:
    """Every hop, with the answers of earlier hops filled in, and the question composed of them."""
    name, question = record.identifier("id"), record.text("question")
    answerable = record.row.get("answerable")
    answerable = True if answerable is None else answerable  # sets of answerable questions alone may not say so
    if not isinstance(answerable, bool):
        raise record.malformed("answerable", "true or false", answerable)
    if not answerable:
        raise SkippedRecord("unanswerable record")
    answer = record.answer()
    # The shape of the chain, such as 2hop or 3hop1, is the first part of the id.
    shape = name.partition("__")[0] if "hop" in name.partition("__")[0] else None
    texts = _paragraph_texts(record)
    hops = record.table("question_decomposition", "question", "answer", "paragraph_support_idx")
    if not hops:
        raise record.malformed("question_decomposition", "at least one hop", [])
    pieces: list[KnowledgePiece] = []
    for index, (prompt, reply, support) in enumerate(hops):
        place = f"question_decomposition[{index}]"
        prompt = record.as_text(prompt, f"{place}.question")
        earlier = [piece.answer for piece in pieces]
        if any(not 1 <= int(number) <= index for number in _REFERENCE.findall(prompt)):
            record.note(_LATER_HOP)
        reply = record.as_text(reply, f"{place}.answer")
        fact = _supporting_paragraph(record, texts, support, f"{place}.paragraph_support_idx")
        prompt = hop_question(prompt, earlier, reading.form)
        pieces.append(KnowledgePiece(f"{name}/{index + 1}", prompt, reply, shape, name, index + 1, fact))
    if reading.whole_questions:
        fact = _joined(dict.fromkeys(piece.supporting_fact for piece in pieces))
        pieces.append(KnowledgePiece(name, question, answer, shape, name, supporting_fact=fact))
    return pieces


def hop_question(question: str, answers: Sequence[str], form: Form = "question") -> str:
    """A hop's question with the answers of earlier hops in place of ``#1``, ``#2`` and so on.

    Args:
        question: As the decomposition has it; ``subject >> relation`` is worded.
        answers: Of the earlier hops. A number beyond them is no reference and stays: "#1 hit" in the first hop.
        form: How ``subject >> relation`` is worded.

    Example:
        >>> hop_question("When was #1 founded?", ["Oxford"]), hop_question("#1 >> spouse", ["Steve Hillage"])
        ('When was Oxford founded?', 'What is the spouse of Steve Hillage?')
    """
    replies = {f"#{number}": answer for number, answer in enumerate(answers, start=1)}

    def fill(text: str) -> str:
        # One pass, so that an answer with a '#' in it is not read as a reference.
        return _REFERENCE.sub(lambda match: replies.get(f"#{int(match[1])}", match[0]), text).strip()

    subject, arrow, relation = question.rpartition(">>")
    if arrow and subject.strip() and relation.strip():
        return word(fill(subject), fill(relation), form)
    return fill(question)


def _paragraph_texts(record: Record) -> dict[int, str]:
    texts: dict[int, str] = {}
    for index, (number, text) in enumerate(record.table("paragraphs", "idx", "paragraph_text")):
        place = f"paragraphs[{index}]"
        number = record.as_index(number, f"{place}.idx")
        if number in texts:
            raise record.malformed(f"{place}.idx", "a number that no other paragraph has", number)
        texts[number] = record.as_text(text, f"{place}.paragraph_text", empty=True)
    return texts


def _supporting_paragraph(record: Record, texts: Mapping[int, str], support: object, field: str) -> str | None:
    if support is None:
        record.note(_NO_SUPPORT)
        return None
    number = record.as_index(support, field)
    if number not in texts:
        raise record.malformed(field, "the idx of a paragraph", number)
    return texts[number] or None


def parse_wikihop(record: Record, reading: Reading) -> list[KnowledgePiece]:
    """The query, a relation and a subject, as one piece."""
    name, query, answer = record.identifier("id"), record.text("query"), record.answer()
    relation, _, subject = query.partition(" ")
    if not subject.strip():
        raise record.malformed("query", "a relation, a space and a subject", query)
    candidates = record.as_texts(record.row.get("candidates"), "candidates")
    record.as_texts(record.row.get("supports"), "supports")
    if _MASK.fullmatch(answer):
        raise SkippedRecord("record with a masked answer")
    if answer not in candidates:
        raise record.malformed("answer", "one of the candidates", answer)
    subject = subject.strip()
    return [KnowledgePiece(name, word(subject, relation, reading.form), answer, relation, subject)]


def parse_atlas(record: Record, reading: Reading) -> list[KnowledgePiece]:
    """The facts of one country, numbered in the table's order, and the questions that name it by its capital."""
    facts = country_facts([record.row["country"]])
    asked = {relation.name: _phrasing(relation.prompts, reading.form) for relation in RELATIONS}
    clozes = {relation.name: _phrasing(relation.prompts, "cloze") for relation in RELATIONS}
    stated = {fact.relation: f"{fact.prompts[clozes[fact.relation]]} {fact.answer}." for fact in facts}
    pieces = []
    for hop, fact in enumerate(facts, start=1):
        subject, relation = fact.subject, fact.relation
        asking = f"{subject}/{relation}", fact.prompts[asked[relation]], fact.answer
        pieces.append(KnowledgePiece(*asking, relation, subject, hop, stated[relation]))
    return pieces + _two_hop(facts, asked, stated) if reading.whole_questions else pieces


def _two_hop(facts: list[Fact], asked: Mapping[str, int], stated: Mapping[str, str]) -> list[KnowledgePiece]:
    pieces, seen = [], dict.fromkeys(asked, 0)
    for question in two_hop_questions(facts):
        fact, bridge = question.fact, question.bridge
        subject, relation = fact.subject, fact.relation
        # One question per phrasing, in the order of the relation's prompts.
        phrasing, seen[relation] = seen[relation], seen[relation] + 1
        if bridge is not None and phrasing == asked[relation]:
            name = f"{subject}/{bridge.relation}/{relation}"
            support = f"{stated[bridge.relation]} {stated[relation]}"
            asking = name, question.prompt, question.answer
            pieces.append(KnowledgePiece(*asking, relation, subject, supporting_fact=support))
    return pieces


def _phrasing(prompts: tuple[str, ...], form: Form) -> int:
    """The place of the first prompt that asks, or of the first that begins a sentence with the relation."""
    asks = [prompt.endswith("?") if form == "question" else prompt.startswith("The ") for prompt in prompts]
    return asks.index(True)


def _is_piece(row: Mapping[str, Any], container: Container) -> bool:
    return container != "csv" and {"question", "answer"} <= set(row)


def _is_bamboogle(row: Mapping[str, Any], container: Container) -> bool:
    return set(row) - {"id"} == {"Question", "Answer"}


def _is_table_of_pieces(row: Mapping[str, Any], container: Container) -> bool:
    return container == "csv" and {"question", "answer"} <= {key.strip().lower() for key in row}


def _is_short(row: Mapping[str, Any], container: Container) -> bool:
    """Whether it has a list of answers, or the names that such sets use."""
    if container == "csv":
        return False
    if "Question" in row:
        return any(key in row for key in _ANSWERS)
    several = any(key in row for key in ("answers", "golden_answers")) or as_list(row.get("answer")) is not None
    return "question" in row and several


def _is_hotpotqa(row: Mapping[str, Any], container: Container) -> bool:
    # The test file has neither answers nor supporting facts.
    return {"question", "context"} <= set(row) and ("supporting_facts" in row or "_id" in row)


_OWN = ", ".join(PIECE_FIELDS)
_HOTPOT = "_id, question, answer, type, supporting_facts, context"
_MUSIQUE = "id, question, answer, answerable, paragraphs, question_decomposition"

_TWO_WIKI = f"{_HOTPOT}, evidences"
_WIKIHOP = "id, query, answer, candidates, supports"
_ATLAS = "none, it is embedded"

for _name, _format in {
    "jsonl": Format(parse_piece, _is_piece, _OWN, repeated="error"),
    "csv": Format(parse_csv, _is_table_of_pieces, f"columns {_OWN}", repeated="error"),
    "qa": Format(parse_short, _is_short, "Question, answer (text or a list)"),
    "bamboogle": Format(parse_bamboogle, _is_bamboogle, "Question, Answer"),
    "wikihop": Format(parse_wikihop, has("query", "candidates"), _WIKIHOP, relations=True),
    "hotpotqa": Format(parse_hotpotqa, _is_hotpotqa, _HOTPOT),
    "2wikimultihopqa": Format(parse_2wiki, has("question", "context", "evidences"), _TWO_WIKI, True, relations=True),
    "musique": Format(parse_musique, has("question", "paragraphs"), _MUSIQUE, False, relations=True),
    "atlas": Format(parse_atlas, lambda _, container: container == "atlas", _ATLAS, False, relations=True),
}.items():
    FORMATS.register(_name)(_format)
