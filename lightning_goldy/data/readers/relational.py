"""Sources of subjects and relations: WikiHop and the embedded atlas."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.data.facts import Country
from lightning_goldy.data.readers.formats import Container, Reading
from lightning_goldy.data.readers.records import Record, SkippedRecord
from lightning_goldy.data.readers.wording import Form, word
from lightning_goldy.data.relations import RELATIONS, Fact, country_facts, two_hop_questions

_MASK = re.compile(r"___MASK\d+___")


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
    country: Country = record.row["country"]
    facts = country_facts([country])
    chosen = {relation.name: _phrasing(relation.prompts, reading.form) for relation in RELATIONS}
    clozes = {relation.name: _phrasing(relation.prompts, "cloze") for relation in RELATIONS}
    stated = {fact.relation: f"{fact.prompts[clozes[fact.relation]]} {fact.answer}." for fact in facts}
    pieces = [
        KnowledgePiece(
            f"{fact.subject}/{fact.relation}",
            fact.prompts[chosen[fact.relation]],
            fact.answer,
            fact.relation,
            fact.subject,
            hop,
            stated[fact.relation],
        )
        for hop, fact in enumerate(facts, start=1)
    ]
    return pieces + _two_hop(facts, chosen, stated) if reading.whole_questions else pieces


def _two_hop(facts: list[Fact], chosen: Mapping[str, int], stated: Mapping[str, str]) -> list[KnowledgePiece]:
    pieces, seen = [], dict.fromkeys(chosen, 0)
    for question in two_hop_questions(facts):
        fact, bridge = question.fact, question.bridge
        # One question per phrasing, in the order of the relation's prompts.
        phrasing, seen[fact.relation] = seen[fact.relation], seen[fact.relation] + 1
        if bridge is None or phrasing != chosen[fact.relation]:
            continue
        name = f"{fact.subject}/{bridge.relation}/{fact.relation}"
        support = f"{stated[bridge.relation]} {stated[fact.relation]}"
        pieces.append(
            KnowledgePiece(name, question.prompt, question.answer, fact.relation, fact.subject, supporting_fact=support)
        )
    return pieces


def _phrasing(prompts: tuple[str, ...], form: Form) -> int:
    """The place of the first prompt that asks, or of the first that begins a sentence with the relation."""
    return next(
        index
        for index, prompt in enumerate(prompts)
        if (prompt.endswith("?") if form == "question" else prompt.startswith("The "))
    )


def is_atlas(row: Mapping[str, Any], container: Container) -> bool:
    """Whether it is the embedded table."""
    return container == "atlas"
