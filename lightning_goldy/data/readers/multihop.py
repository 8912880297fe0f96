"""Multi-hop questions whose supporting facts are known: HotpotQA, 2WikiMultihopQA, MuSiQue."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.data.readers.formats import Container, Reading
from lightning_goldy.data.readers.records import Record, SkippedRecord
from lightning_goldy.data.readers.wording import Form, word

_NO_PARAGRAPH = "supporting sentence whose paragraph the context lacks"
_NO_SENTENCE = "supporting sentence beyond the end of its paragraph"
_NO_SUPPORT = "hop without a supporting paragraph"
_LATER_HOP = "hop whose '#' and number name no earlier hop"
_REFERENCE = re.compile(r"#([0-9]{1,3})(?![0-9])")
_DISAMBIGUATION = re.compile(r"\s*\([^()]*\)$")


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
    columns = ("question", "answer", "paragraph_support_idx")
    pieces: list[KnowledgePiece] = []
    for index, (prompt, reply, support) in enumerate(_hop_rows(record, columns)):
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

    def fill(text: str) -> str:
        # One pass, so that an answer with a '#' in it is not read as a reference.
        return _REFERENCE.sub(lambda match: _referred(match, answers), text).strip()

    subject, arrow, relation = question.rpartition(">>")
    if arrow and subject.strip() and relation.strip():
        return word(fill(subject), fill(relation), form)
    return fill(question)


def _referred(match: re.Match[str], answers: Sequence[str]) -> str:
    number = int(match[1])
    return answers[number - 1] if 1 <= number <= len(answers) else match[0]


def _hop_rows(record: Record, columns: tuple[str, ...]) -> list[tuple[Any, ...]]:
    rows = record.table("question_decomposition", *columns)
    if not rows:
        raise record.malformed("question_decomposition", "at least one hop", [])
    return rows


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


def is_hotpotqa(row: Mapping[str, Any], container: Container) -> bool:
    """Whether it has a question with its context."""
    # The test file has neither answers nor supporting facts.
    return "question" in row and "context" in row and ("supporting_facts" in row or "_id" in row)
