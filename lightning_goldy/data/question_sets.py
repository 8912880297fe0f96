"""The formats that come with the package: public question sets, tables and JSON lines, the embedded atlas."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.data.formats import (
    FORMATS,
    Container,
    Form,
    Format,
    Reading,
    Record,
    RecordError,
    SkippedRecord,
    as_list,
    has,
    is_unicode,
    shown,
    word,
)
from lightning_goldy.data.names import unknown_name
from lightning_goldy.data.relations import RELATIONS, Fact, country_facts, two_hop_questions

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

    def answer_of(match: re.Match[str]) -> str:
        number = int(match[1])
        return answers[number - 1] if 1 <= number <= len(answers) else match[0]

    def fill(text: str) -> str:
        # One pass, so that an answer with a '#' in it is not read as a reference.
        return _REFERENCE.sub(answer_of, text).strip()

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
        question = fact.prompts[asked[relation]]
        name = f"{subject}/{relation}"
        pieces.append(KnowledgePiece(name, question, fact.answer, relation, subject, hop, stated[relation]))
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
            piece = KnowledgePiece(name, question.prompt, question.answer, relation, subject, supporting_fact=support)
            pieces.append(piece)
    return pieces


def _phrasing(prompts: tuple[str, ...], form: Form) -> int:
    """The place of the first prompt that asks, or of the first that begins a sentence with the relation."""
    asks = [prompt.endswith("?") if form == "question" else prompt.startswith("The ") for prompt in prompts]
    return asks.index(True)


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

FORMATS.register("jsonl")(
    Format(
        parse_piece,
        lambda row, container: container != "csv" and {"question", "answer"} <= set(row),
        _OWN,
        repeated="error",
    )
)
FORMATS.register("csv")(Format(parse_csv, _is_table_of_pieces, f"columns {_OWN}", repeated="error"))
FORMATS.register("qa")(Format(parse_short, _is_short, "Question, answer (text or a list)"))
FORMATS.register("bamboogle")(
    Format(parse_bamboogle, lambda row, _: set(row) - {"id"} == {"Question", "Answer"}, "Question, Answer")
)
FORMATS.register("wikihop")(
    Format(parse_wikihop, has("query", "candidates"), "id, query, answer, candidates, supports", relations=True)
)
FORMATS.register("hotpotqa")(Format(parse_hotpotqa, _is_hotpotqa, _HOTPOT))
FORMATS.register("2wikimultihopqa")(
    Format(
        parse_2wiki,
        has("question", "context", "evidences"),
        f"{_HOTPOT}, evidences",
        whole_questions=True,
        relations=True,
    )
)
FORMATS.register("musique")(
    Format(parse_musique, has("question", "paragraphs"), _MUSIQUE, whole_questions=False, relations=True)
)
FORMATS.register("atlas")(
    Format(
        parse_atlas,
        lambda _, container: container == "atlas",
        "none, it is embedded",
        whole_questions=False,
        relations=True,
    )
)
