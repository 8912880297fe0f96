from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_goldy.data import AtlasDataModule, byte_tokenizer, country_facts, word_tokenizer
from lightning_goldy.data.prompt_pairs import (
    _NAMES,
    _SCENES,
    PairTask,
    TextPair,
    TooFewPairsError,
    atlas_pairs,
    greater_than_pairs,
    indirect_object_pairs,
    induction_pairs,
    pairs_of_task,
    split_of_task,
    text_pairs,
)

VERSIONS = ("clean", "corrupted")


def scenes_tokenizer():
    words = [*_NAMES, "store garden school station library hospital office market", "00 1 2 book letter ring"]
    words += ["bottle ball key picture basket", *(scene.replace("{", "").replace("}", "") for scene in _SCENES)]
    return word_tokenizer(words)


def test_facts_whose_answers_take_the_space_or_leave_it_are_no_partners() -> None:
    """Where the tokenizer joins the space with some answers only, a prompt's length depends on the answer."""
    joins = [("Ġ", letter) for letter in "ABMLS"]
    names = [*pre_tokenizers.ByteLevel.alphabet(), *("".join(pair) for pair in joins)]
    model = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, joins))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    for seed in range(4):
        pairs = atlas_pairs(tokenizer, 24, seed=seed)
        assert all(len(a) == len(b) for a, b in zip(pairs.clean, pairs.corrupted, strict=True))
        assert not any(set(right) & set(wrong) for right, wrong in zip(pairs.answers, pairs.wrong, strict=True))


@pytest.mark.parametrize("corrupted", ["flip", "third"])
def test_indirect_objects_differ_in_who_acts(corrupted):
    tokenizer = scenes_tokenizer()
    pairs = indirect_object_pairs(tokenizer, 20, corrupted=corrupted)
    for clean, other, right, wrong in zip(pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong, strict=True):
        apart = [place for place, (a, b) in enumerate(zip(clean, other, strict=True)) if a != b]
        assert len(apart) == 1
        assert clean[apart[0]] == wrong[0]
        assert (other[apart[0]] == right[0]) == (corrupted == "flip")
        assert clean.count(right[0]) == 1
        assert clean.count(wrong[0]) == 2
    assert tokenizer.unk_token_id not in {token for ids in pairs.clean for token in ids}
    assert pairs == indirect_object_pairs(tokenizer, 20, corrupted=corrupted)
    assert pairs != indirect_object_pairs(tokenizer, 20, corrupted=corrupted, seed=1)


def test_names_of_other_lengths_are_named():
    with pytest.raises(ValueError, match=r"'.*(Al|Bernard).*' has \d+ tokens and its corrupted version '.*' \d+"):
        indirect_object_pairs(byte_tokenizer(), 20, names=["Al", "Bernard", "Christina"])
    with pytest.raises(ValueError, match="three names are needed"):
        indirect_object_pairs(byte_tokenizer(), 2, names=["Al", "Bo"])


def test_years_are_told_by_the_next_token():
    tokenizer = byte_tokenizer()
    pairs = greater_than_pairs(tokenizer, 10)
    for name, right, wrong in zip(pairs.names, pairs.answers, pairs.wrong, strict=True):
        year, ones = map(int, name.split("year ")[1][2:4])
        assert sorted(tokenizer.decode(right)) == [str(digit) for digit in range(year + 1, 10)]
        assert sorted(tokenizer.decode(wrong)) == [str(digit) for digit in range(year + (ones == 9))]
    with pytest.raises(ValueError, match="joins the digits of 'The"):
        greater_than_pairs(word_tokenizer(["The war lasted from the year 1732 to the year 17"]), 1)


def test_induction_pairs_exchange_what_the_last_token_followed():
    for pairs in (induction_pairs(40, 30), induction_pairs(range(5, 30), 10, length=5, start=(1,))):
        for clean, other, right, wrong in zip(pairs.clean, pairs.corrupted, pairs.answers, pairs.wrong, strict=True):
            for ids, answer in ((clean, right), (other, wrong)):
                assert ids[ids.index(ids[-1]) + 1] == answer[0]
            assert sorted(clean) == sorted(other)
    with pytest.raises(ValueError, match="there are 4"):
        induction_pairs(4, 1, length=5)


def test_atlas_pairs_ask_of_another_country():
    data = AtlasDataModule(edits=3)
    tokenizer = data.load_tokenizer()
    facts = {fact.prompts[0]: fact for fact in country_facts()}
    pairs = atlas_pairs(tokenizer, None, relations=("capital", "currency"))
    assert len(pairs) > 100
    assert {facts[name].relation for name in pairs.names} == {"capital", "currency"}
    for name, right in zip(pairs.names, pairs.answers, strict=True):
        assert tokenizer.decode(right).split()[0] == facts[name].answer.split()[0]
    edited = atlas_pairs(tokenizer, None, facts=data.edited_facts)
    assert sorted(edited.names) == sorted(fact.prompts[0] for fact in data.edited_facts)
    with pytest.raises(ValueError, match="unknown relation 'captial'; did you mean 'capital'"):
        atlas_pairs(tokenizer, 4, relations=("captial",))
    with pytest.raises(ValueError, match=r"'What is the capital of .*' has \d+ tokens, as has no other"):
        atlas_pairs(byte_tokenizer(), None, facts=country_facts())


def test_tasks_by_name():
    assert pairs_of_task("indirect_object", 3, tokenizer=byte_tokenizer()) == indirect_object_pairs(byte_tokenizer(), 3)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        pairs_of_task("atlas")
    with pytest.raises(ValueError, match="did you mean 'induction'"):
        pairs_of_task("inductions")  # type: ignore[arg-type]


def test_no_prompt_is_drawn_twice():
    # Of the 120 orders of five tokens; drawn with repeats, a hundred would be about 68.
    pairs = induction_pairs(5, 100, length=5)
    assert len({*pairs.clean}) == 100
    with pytest.raises(TooFewPairsError, match="121 different prompts are asked for, and only 120 came up") as caught:
        induction_pairs(5, 121, length=5, seed=2)
    assert len(caught.value.pairs) == 120
    few = indirect_object_pairs(byte_tokenizer(), 400, names=["Mary", "John", "Anna"])
    assert len({*few.clean}) == 400


@pytest.mark.parametrize("task", ["indirect_object", "greater_than", "atlas", "induction"])
def test_prompts_that_measure_are_none_of_those_that_choose(task: PairTask):
    tokenizer = byte_tokenizer()
    found_on, others = split_of_task(task, 4, tokenizer=tokenizer, vocabulary=257)
    assert found_on == pairs_of_task(task, 4, tokenizer=tokenizer, vocabulary=257)
    assert others is not None
    assert len({*others.clean} - {*found_on.clean, *found_on.corrupted}) == 4
    assert (found_on, others) == split_of_task(task, 4, tokenizer=tokenizer, vocabulary=257)
    assert others != split_of_task(task, 4, tokenizer=tokenizer, vocabulary=257, seed=1)[1]


def test_a_task_that_runs_out_of_prompts_measures_on_what_is_left():
    tokenizer = AtlasDataModule(edits=3).load_tokenizer()
    n = len(atlas_pairs(tokenizer, None))
    found_on, others = split_of_task("atlas", n - 5, tokenizer=tokenizer)
    assert others is None or not {*others.clean} & {*found_on.clean, *found_on.corrupted}
    assert split_of_task("atlas", n, tokenizer=tokenizer)[1] is None
    with pytest.raises(TooFewPairsError, match=f"facts have a partner .* and are not drawn already; {n} are asked for"):
        atlas_pairs(tokenizer, n, beside=found_on)


def test_random_tokens_are_ordinary_ones_behind_the_bos_token(monkeypatch):
    tokenizer = word_tokenizer(["one two three four five six seven eight nine ten"])
    special = {*tokenizer.all_special_ids}
    pairs = pairs_of_task("induction", 20, tokenizer=tokenizer, vocabulary=64)
    assert special
    assert not special & {token for ids in (*pairs.clean, *pairs.corrupted) for token in ids}
    assert max(map(max, pairs.clean)) < len(tokenizer)
    monkeypatch.setattr("lightning_goldy.data.prompt_pairs.leading_bos", lambda tokenizer: [7])
    (clean,), (other,) = (getattr(pairs_of_task("induction", 1, tokenizer=tokenizer), name) for name in VERSIONS)
    assert (clean[0], other[0]) == (7, 7)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda tok: indirect_object_pairs(tok, 3, names="Mary"), "names is a list of names; got 'Mary'"),
        (lambda tok: atlas_pairs(tok, 3, relations="capital"), "relations is a list of relations; got 'capital'"),
        (lambda tok: atlas_pairs(tok, 0), "n must be at least 1; got 0"),
        (lambda tok: indirect_object_pairs(None, 3), "needs a tokenizer; got None"),
        (
            lambda tok: text_pairs(tok, [TextPair("Ada saw", "Eva saw", "Bo", ("Cy",))]),  # type: ignore[arg-type]
            "answers to 'Ada saw' is a list of words, none of them empty; got 'Bo'",
        ),
        (
            lambda tok: text_pairs(tok, [TextPair("Ada saw", "Eva saw", ("",), ("Cy",))]),
            r"answers to 'Ada saw' is a list of words, none of them empty; got \(''",
        ),
    ],
)
def test_words_in_place_of_lists_are_told(make, message):
    with pytest.raises(ValueError, match=message):
        make(byte_tokenizer())
    with pytest.raises(ValueError, match=r"there are \[\]: it knows none of Mary, John"):
        indirect_object_pairs(word_tokenizer(["capital of"]), 2)


@pytest.mark.parametrize("task", ["indirect_object", "atlas", "induction"])
def test_prompts_of_one_length_can_be_had(task: PairTask):
    # Of whichever lengths they come in, most have none of their own length beside them.
    shared = {"tokenizer": byte_tokenizer(), "vocabulary": 257}
    found_on, others = split_of_task(task, 4, one_length=True, **shared)
    assert others is not None
    assert len({len(ids) for ids in (*found_on.clean, *others.clean)}) == 1
    assert len({*others.clean} - {*found_on.clean, *found_on.corrupted}) == len(others) > 1
    if task == "atlas":
        with pytest.raises(
            TooFewPairsError, match=r"100 prompts of one length are asked for; of the commonest, \d+ tok"
        ):
            split_of_task(task, 100, one_length=True, **shared)
