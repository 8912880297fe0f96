"""Counterfactual edits of facts: named ones, or some drawn at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_goldy.data.names import unknown_name
from lightning_goldy.data.relations import Fact, relation_names


@dataclass(frozen=True)
class Edit:
    """A fact to be learned in place of the true one.

    Args:
        country: The country's name, as in the table.
        relation: ``"capital"``, ``"continent"``, ``"currency"`` or ``"language"``.
        answer: The counterfactual answer.
    """

    country: str
    relation: str
    answer: str


def apply_edits(facts: Sequence[Fact], edits: Sequence[Edit]) -> list[Fact]:
    """Replace the answers of the edited facts.

    Args:
        facts: All facts.
        edits: At most one per fact.

    Returns:
        The facts in the same order, with new answers where edited.

    Raises:
        ValueError: An unknown country or relation, an empty or unchanged answer, or two edits of one fact.

    Example:
        >>> from lightning_goldy.data.relations import country_facts
        >>> facts = apply_edits(country_facts(), [Edit("France", "capital", "Rome")])
        >>> [(fact.subject, fact.original, fact.answer) for fact in facts if fact.edited]
        [('France', 'Paris', 'Rome')]
    """
    index = {(fact.subject, fact.relation): number for number, fact in enumerate(facts)}
    edited = list(facts)
    for edit in edits:
        number = _locate(edit, index)
        if not edit.answer.strip():
            raise ValueError(f"the answer of {edit} is empty")
        if edited[number].edited:
            raise ValueError(f"{edit.country}'s {edit.relation} is edited twice: keep one of the edits")
        if edit.answer.strip() == facts[number].answer:
            raise ValueError(f"{edit} changes nothing: {edit.answer!r} is already the answer")
        edited[number] = replace(facts[number], answer=edit.answer.strip())
    return edited


def random_edits(facts: Sequence[Fact], count: int, seed: int) -> list[Edit]:
    """Draw edits of distinct facts; each new answer is another country's answer to the same relation.

    Args:
        facts: All facts.
        count: The number of edits.
        seed: The edits are a function of ``facts``, ``count`` and ``seed``.

    Raises:
        ValueError: ``count`` is not between 1 and the number of facts.

    Example:
        >>> from lightning_goldy.data.relations import country_facts
        >>> edits = random_edits(country_facts(), 20, seed=0)
        >>> len(edits), edits == random_edits(country_facts(), 20, seed=0)
        (20, True)
    """
    if not 1 <= count <= len(facts):
        raise ValueError(f"edits={count}: the number of random edits must be between 1 and {len(facts)} (all facts)")
    generator = random.Random(f"edits {seed}")
    answers = {
        relation: sorted({fact.answer for fact in facts if fact.relation == relation}) for relation in relation_names()
    }
    edits = []
    for fact in generator.sample(list(facts), count):
        others = [answer for answer in answers[fact.relation] if answer != fact.answer]
        edits.append(Edit(fact.subject, fact.relation, generator.choice(others)))
    return edits


def _locate(edit: Edit, index: dict[tuple[str, str], int]) -> int:
    if edit.relation not in relation_names():
        raise ValueError(unknown_name("relation", edit.relation, relation_names()) + f" (in {edit})")
    if (edit.country, edit.relation) not in index:
        countries = dict.fromkeys(country for country, _ in index)
        raise ValueError(unknown_name("country", edit.country, countries, listed=200) + f" (in {edit})")
    return index[edit.country, edit.relation]
