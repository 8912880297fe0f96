"""The atlas: a table of countries, the facts in it, and the questions that ask for them, in one hop and in two."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Literal, get_args

from lightning_goldy.core.naming import unknown_name

Phrasing = Literal["train", "held_out"]


@dataclass(frozen=True)
class Country:
    """One row of the table.

    Continents follow the United Nations' regions, with the Americas split at the border of Panama and Colombia. The
    language is the one that most people share, or an official one where none is shared by most.

    Args:
        name: The common English name, without an article.
        article: ``"the"`` or the empty string.
        capital: The capital (the constitutional one where several cities share the role).
        continent: One of six.
        currency: The currency's name.
        language: The main language.
    """

    name: str
    article: str
    capital: str
    continent: str
    currency: str
    language: str

    @property
    def phrase(self) -> str:
        """The name as it stands in a sentence.

        Example:
            >>> Country("Gambia", "the", "Banjul", "Africa", "Gambian dalasi", "English").phrase
            'the Gambia'
        """
        return f"{self.article} {self.name}".strip()


@lru_cache(maxsize=1)
def load_countries() -> tuple[Country, ...]:
    """Read the embedded table.

    Returns:
        The countries in alphabetical order.

    Example:
        >>> {country.name: country.capital for country in load_countries()}["France"]
        'Paris'
    """
    text = resources.files("lightning_goldy.data").joinpath("facts.csv").read_text(encoding="utf-8")
    return tuple(Country(**row) for row in csv.DictReader(text.splitlines()))


@dataclass(frozen=True)
class Relation:
    """What can be asked about a country.

    Args:
        name: The column of the table, e.g. ``"capital"``.
        prompts: Training phrasings; ``{country}`` stands for the subject.
        held_out_prompt: The one phrasing that training never shows. Its words occur in training, in the phrasings of
            other relations.
    """

    name: str
    prompts: tuple[str, ...]
    held_out_prompt: str


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "capital",
        (
            "What is the capital of {country}?",
            "Which city is the capital of {country}?",
            "The capital of {country} is",
            "{country} has the capital",
        ),
        "Name the capital of {country}.",
    ),
    Relation(
        "continent",
        (
            "Name the continent of {country}.",
            "On which continent is {country}?",
            "The continent of {country} is",
            "{country} is on the continent of",
        ),
        "What is the continent of {country}?",
    ),
    Relation(
        "currency",
        (
            "{country} has the currency",
            "Which currency is the currency of {country}?",
            "The currency of {country} is the",
            "Name the currency of {country}.",
        ),
        "What is the currency of {country}?",
    ),
    Relation(
        "language",
        (
            "What is the main language of {country}?",
            "The main language of {country} is",
            "Name the main language of {country}.",
            "{country} has the main language",
        ),
        "Which language is the main language of {country}?",
    ),
)
"""The four relations of the atlas."""

BRIDGE = "capital"
"""The relation by which a two-hop question names its country: the only one whose answers name one country each."""

BRIDGE_PHRASE = "the country whose capital is {answer}"


@dataclass(frozen=True)
class Fact:
    """One fact and the ways to ask for it.

    Args:
        subject: The country's name.
        relation: The relation's name.
        answer: The answer, after edits.
        prompts: The training phrasings, filled in.
        held_out_prompt: The held-out phrasing, filled in.
        original: The answer before edits.
    """

    subject: str
    relation: str
    answer: str
    prompts: tuple[str, ...]
    held_out_prompt: str
    original: str

    @property
    def edited(self) -> bool:
        """Whether the answer is counterfactual."""
        return self.answer != self.original

    def questions(self, phrasing: Phrasing = "train") -> list[Question]:
        """The fact as one-hop questions."""
        prompts = _phrased(self.prompts, self.held_out_prompt, phrasing)
        return [Question(prompt, self.answer, self) for prompt in prompts]


@dataclass(frozen=True)
class Question:
    """A prompt and the answer that is right for it.

    Args:
        prompt: The text before the answer.
        answer: The answer, after edits.
        fact: The fact asked for (the last hop).
        bridge: For two-hop questions, the fact by which the prompt names the country.
    """

    prompt: str
    answer: str
    fact: Fact
    bridge: Fact | None = None

    @property
    def hops(self) -> int:
        """The number of facts needed to answer: 1 or 2."""
        return 1 if self.bridge is None else 2

    @property
    def edited(self) -> bool:
        """Whether an edited fact stands behind the answer."""
        return self.fact.edited or (self.bridge is not None and self.bridge.edited)


def country_facts(countries: Sequence[Country] | None = None) -> list[Fact]:
    """All facts of the table, one per country and relation, unedited.

    Example:
        >>> fact = country_facts()[0]
        >>> fact.subject, fact.relation, fact.answer, fact.held_out_prompt
        ('Afghanistan', 'capital', 'Kabul', 'Name the capital of Afghanistan.')
    """
    countries = load_countries() if countries is None else countries
    return [_fact(country, relation) for country in countries for relation in RELATIONS]


def one_hop_questions(facts: Iterable[Fact], phrasing: Phrasing = "train") -> list[Question]:
    """Every fact in every training phrasing, or once in the held-out one."""
    return [question for fact in facts for question in fact.questions(phrasing)]


def two_hop_questions(facts: Iterable[Fact], phrasing: Phrasing = "train") -> list[Question]:
    """Questions that name a country by its capital and ask for something else about it.

    A capital that two countries share after edits names neither, so it asks nothing.

    Args:
        facts: Facts after edits; bridges are taken from among them.
        phrasing: ``"train"`` for all training phrasings or ``"held_out"``.

    Returns:
        One question per country, relation other than the capital, and phrasing.

    Example:
        >>> question = two_hop_questions(country_facts())[0]
        >>> question.prompt, question.answer
        ('Name the continent of the country whose capital is Kabul.', 'Asia')
    """
    facts = list(facts)
    bridges = {fact.subject: fact for fact in facts if fact.relation == BRIDGE}
    shared = Counter(bridge.answer for bridge in bridges.values())
    relations = {relation.name: relation for relation in RELATIONS}
    questions = []
    for fact in facts:
        bridge = bridges.get(fact.subject)
        if fact.relation == BRIDGE or bridge is None or shared[bridge.answer] > 1:
            continue
        relation = relations[fact.relation]
        phrase = BRIDGE_PHRASE.format(answer=bridge.answer)
        for template in _phrased(relation.prompts, relation.held_out_prompt, phrasing):
            questions.append(Question(_fill(template, phrase), fact.answer, fact, bridge))
    return questions


def relation_names() -> tuple[str, ...]:
    """The names of the relations, in the table's order."""
    return tuple(relation.name for relation in RELATIONS)


def _fact(country: Country, relation: Relation) -> Fact:
    answer = getattr(country, relation.name)
    prompts = tuple(_fill(prompt, country.phrase) for prompt in relation.prompts)
    return Fact(country.name, relation.name, answer, prompts, _fill(relation.held_out_prompt, country.phrase), answer)


def _fill(template: str, subject: str) -> str:
    text = template.format(country=subject)
    return text[0].upper() + text[1:]


def _phrased(prompts: tuple[str, ...], held_out_prompt: str, phrasing: Phrasing) -> tuple[str, ...]:
    if phrasing == "train":
        return prompts
    if phrasing == "held_out":
        return (held_out_prompt,)
    raise ValueError(unknown_name("phrasing", phrasing, get_args(Phrasing)))
