from __future__ import annotations

from collections import Counter

import pytest

from lightning_goldy.data import RELATIONS, country_facts, load_countries, one_hop_questions, two_hop_questions
from lightning_goldy.data.relations import relation_names


def test_at_least_120_countries_times_four_relations() -> None:
    assert len(load_countries()) >= 120
    assert relation_names() == ("capital", "continent", "currency", "language")
    assert len(country_facts()) == 4 * len(load_countries())


def test_no_row_or_capital_twice_and_no_empty_or_padded_cell() -> None:
    countries = load_countries()
    assert len({country.name for country in countries}) == len(countries)
    assert len({country.capital for country in countries}) == len(countries)
    for country in countries:
        for value in vars(country).values():
            assert value == value.strip()
        assert all(getattr(country, relation) for relation in relation_names())
        assert country.article in ("", "the")
        assert country.name.isprintable()


def test_continents_are_six_and_the_table_is_sorted() -> None:
    assert {country.continent for country in load_countries()} == {
        "Africa",
        "Asia",
        "Europe",
        "North America",
        "Oceania",
        "South America",
    }
    names = [country.name for country in load_countries()]
    assert names == sorted(names)


@pytest.mark.parametrize(
    ("name", "capital", "continent", "currency", "language"),
    [
        ("Japan", "Tokyo", "Asia", "Japanese yen", "Japanese"),
        ("Brazil", "Brasilia", "South America", "Brazilian real", "Portuguese"),
        ("Kenya", "Nairobi", "Africa", "Kenyan shilling", "Swahili"),
        ("Australia", "Canberra", "Oceania", "Australian dollar", "English"),
        ("Switzerland", "Bern", "Europe", "Swiss franc", "German"),
        ("Canada", "Ottawa", "North America", "Canadian dollar", "English"),
    ],
)
def test_known_rows(name: str, capital: str, continent: str, currency: str, language: str) -> None:
    answers = {fact.relation: fact.answer for fact in country_facts() if fact.subject == name}
    assert answers == {"capital": capital, "continent": continent, "currency": currency, "language": language}


def test_phrasings_are_several_and_name_the_country_once() -> None:
    for relation in RELATIONS:
        templates = [*relation.prompts, relation.held_out_prompt]
        assert len(relation.prompts) >= 4
        assert len(set(templates)) == len(templates)
        assert all(template.count("{country}") == 1 for template in templates)


def test_held_out_words_are_trained_through_other_relations() -> None:
    trained = {word for relation in RELATIONS for prompt in relation.prompts for word in _words(prompt)}
    for relation in RELATIONS:
        assert set(_words(relation.held_out_prompt)) <= trained


def test_no_prompt_occurs_twice_and_none_is_both_trained_and_held_out() -> None:
    facts = country_facts()
    for ask in (one_hop_questions, two_hop_questions):
        train = Counter(question.prompt for question in ask(facts, "train"))
        held_out = Counter(question.prompt for question in ask(facts, "held_out"))
        assert max(train.values()) == max(held_out.values()) == 1
        assert not train.keys() & held_out.keys()


def test_an_article_stands_in_the_sentence_and_is_capitalised_at_its_start() -> None:
    prompts = {prompt for fact in country_facts() if fact.subject == "Netherlands" for prompt in fact.prompts}
    assert "What is the capital of the Netherlands?" in prompts
    assert "The Netherlands has the capital" in prompts


def test_two_hop_questions_have_the_answer_of_the_country_behind_the_capital() -> None:
    questions = {question.prompt: question for question in two_hop_questions(country_facts())}
    question = questions["Which currency is the currency of the country whose capital is Tokyo?"]
    assert question.answer == "Japanese yen"
    assert question.hops == 2
    assert question.bridge is not None
    assert (question.bridge.subject, question.bridge.relation, question.fact.relation) == (
        "Japan",
        "capital",
        "currency",
    )
    assert len(questions) == 3 * 4 * len(load_countries())


def test_an_unknown_phrasing_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown phrasing 'heldout'; did you mean 'held_out'.*train, held_out"):
        one_hop_questions(country_facts(), "heldout")  # type: ignore[arg-type]


def _words(template: str) -> list[str]:
    return template.replace("{country}", "").replace("?", "").replace(".", "").split()
