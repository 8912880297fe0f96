from __future__ import annotations

import pytest

from lightning_goldy.data import Edit, apply_edits, country_facts, random_edits, two_hop_questions

FACTS = country_facts()


def test_an_edit_changes_one_answer_and_remembers_the_true_one() -> None:
    edited = apply_edits(FACTS, [Edit("France", "capital", " Rome ")])
    changed = [(old, new) for old, new in zip(FACTS, edited, strict=True) if old != new]
    assert len(changed) == 1
    old, new = changed[0]
    assert (old.answer, new.answer, new.original, new.edited) == ("Paris", "Rome", "Paris", True)
    assert new.prompts == old.prompts


def test_random_edits_are_seeded_distinct_and_never_true() -> None:
    edits = random_edits(FACTS, 50, seed=3)
    assert edits == random_edits(FACTS, 50, seed=3)
    assert edits != random_edits(FACTS, 50, seed=4)
    assert len({(edit.country, edit.relation) for edit in edits}) == 50
    assert sum(fact.edited for fact in apply_edits(FACTS, edits)) == 50
    for edit in edits:
        assert edit.answer in {fact.answer for fact in FACTS if fact.relation == edit.relation}


def test_every_fact_can_be_edited() -> None:
    assert all(fact.edited for fact in apply_edits(FACTS, random_edits(FACTS, len(FACTS), seed=0)))


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        (
            [Edit("Frnce", "capital", "Rome")],
            "unknown country 'Frnce'; did you mean 'France'.*Valid: Afghanistan, .*Zambia",
        ),
        ([Edit("france", "capital", "Rome")], "unknown country 'france'; did you mean 'France'"),
        ([Edit("France", "captial", "Rome")], "unknown relation 'captial'; did you mean 'capital'.*language"),
        ([Edit("France", "capital", " ")], "answer of .*France.* is empty"),
        ([Edit("France", "capital", "Paris")], "changes nothing: 'Paris' is already the answer"),
        ([Edit("France", "capital", "Rome"), Edit("France", "capital", "Bern")], "France's capital is edited twice"),
    ],
)
def test_bad_edits(edits: list[Edit], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_edits(FACTS, edits)


@pytest.mark.parametrize("count", [0, -1, 100_000])
def test_bad_number_of_random_edits(count: int) -> None:
    with pytest.raises(
        ValueError, match=f"edits={count}: the number of random edits must be between 1 and {len(FACTS)}"
    ):
        random_edits(FACTS, count, seed=0)


def test_two_hop_questions_follow_an_edit_of_the_last_hop() -> None:
    facts = apply_edits(FACTS, [Edit("France", "currency", "Swiss franc")])
    answers = {question.prompt: question for question in two_hop_questions(facts)}
    question = answers["Name the currency of the country whose capital is Paris."]
    assert question.answer == "Swiss franc"
    assert question.edited


def test_a_capital_that_two_countries_share_asks_nothing() -> None:
    facts = apply_edits(FACTS, [Edit("France", "capital", "Rome")])
    prompts = [question.prompt for question in two_hop_questions(facts)]
    assert not any("Paris" in prompt or "Rome" in prompt for prompt in prompts)
    assert any("Madrid" in prompt for prompt in prompts)
