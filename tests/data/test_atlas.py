from __future__ import annotations

from itertools import chain
from typing import Any, get_args

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from lightning_goldy.data import AtlasDataModule, Edit, byte_tokenizer
from lightning_goldy.data.relations import Phrasing

ROME = Edit("France", "capital", "Rome")
YEN = Edit("Spain", "currency", "Japanese yen")


def _rows(loader: Any) -> list[tuple[int, ...]]:
    rows = []
    for batch in loader:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            rows.append(tuple(ids[mask == 1].tolist()))
    return rows


def _texts(data: AtlasDataModule, loader: Any) -> list[str]:
    return [str(data.tokenizer.decode(list(row), skip_special_tokens=True)) for row in _rows(loader)]


def test_pretraining_sees_every_fact_in_every_training_phrasing() -> None:
    data = AtlasDataModule()
    rows = _rows(data.train_dataloader())
    assert len(rows) == len(set(rows)) == 4 * len(data.facts)
    assert len(data.facts) >= 4 * 120
    assert len(data.splits.val) == len(data.facts)


@pytest.mark.parametrize("options", [{}, {"two_hop": True}, {"edits": 30, "rehearsal": 0.2, "two_hop": True}])
def test_validation_and_probe_are_disjoint_from_training(options: dict[str, Any]) -> None:
    data = AtlasDataModule(**options)
    train = set(_texts(data, data.train_dataloader()))
    assert not train & set(_texts(data, data.val_dataloader()))
    probe = _texts(data, data.probe_dataloader())
    assert not train & set(probe)
    assert len(probe) == len(set(probe)) == 32


@pytest.mark.parametrize("mask_query", [True, False])
def test_labels_mask_exactly_the_prompt(mask_query: bool) -> None:
    data = AtlasDataModule(mask_query=mask_query)
    tokenizer = data.tokenizer
    questions = data.training_questions()
    assert len(questions) == len(data.splits.train)
    for index, question in enumerate(questions):
        sample = data.splits.train[index]
        n_prompt = len(tokenizer(question.prompt).input_ids)
        n_answer = len(tokenizer(question.answer).input_ids)
        assert len(sample["input_ids"]) == n_prompt + n_answer + 1
        answer = [*tokenizer(question.answer).input_ids, tokenizer.eos_token_id]
        assert sample["labels"][n_prompt:].tolist() == answer
        masked = [-100] * n_prompt if mask_query else tokenizer(question.prompt).input_ids
        assert sample["labels"][:n_prompt].tolist() == masked


def test_probe_and_validation_mask_the_prompt_in_pretraining_too() -> None:
    data = AtlasDataModule(mask_query=False)
    for loader in (data.val_dataloader(), data.probe_dataloader()):
        for batch in loader:
            assert (batch["labels"][:, :3] == -100).all()


def test_every_text_round_trips_without_unknown_words() -> None:
    data = AtlasDataModule()
    asks = [data.one_hop_questions, data.two_hop_questions]
    for question in chain.from_iterable(ask(phrasing) for ask in asks for phrasing in get_args(Phrasing)):
        text = f"{question.prompt} {question.answer}"
        ids = data.tokenizer(text).input_ids
        assert data.tokenizer.unk_token_id not in ids
        assert data.tokenizer.decode(ids) == text


def test_edits_change_the_training_answers_and_nothing_else_is_trained() -> None:
    data = AtlasDataModule(edits=[YEN, ROME])
    texts = _texts(data, data.train_dataloader())
    assert len(texts) == 8
    assert "What is the capital of France? Rome" in texts
    assert all(text.endswith(("Rome", "Japanese yen")) for text in texts)


def test_the_edited_facts_lead_the_probe_in_their_order() -> None:
    data = AtlasDataModule(edits=[YEN, ROME], probe_size=5)
    texts = _texts(data, data.probe_dataloader())
    assert texts[:2] == ["What is the currency of Spain? Japanese yen", "Name the capital of France. Rome"]
    assert len(texts) == 5
    assert [question.fact.edited for question in data.probe_questions()] == [True, True, False, False, False]
    assert _texts(data, data.val_dataloader()).count("Name the capital of France. Rome") == 1


def test_rehearsal_keeps_a_share_of_unedited_facts() -> None:
    data = AtlasDataModule(edits=10, rehearsal=0.25)
    facts = {question.fact for question in data.training_questions()}
    unedited = [fact for fact in facts if not fact.edited]
    assert len(facts) - len(unedited) == 10
    assert len(unedited) == round(0.25 * (len(data.facts) - 10))


def test_two_hop_rehearsal_leaves_questions_behind_edits_out() -> None:
    data = AtlasDataModule(edits=[ROME, YEN], rehearsal=1.0, two_hop=True)
    two_hop = [question for question in data.training_questions() if question.hops == 2]
    assert two_hop
    assert not any(question.edited for question in two_hop)
    assert {"Name the currency of the country whose capital is Madrid."} <= {q.prompt for q in data.two_hop_questions()}
    assert "Name the currency of the country whose capital is Madrid." not in {question.prompt for question in two_hop}


def test_same_arguments_same_batches_and_setup_is_idempotent() -> None:
    def batches(seed: int) -> list[Tensor]:
        data = AtlasDataModule(edits=20, rehearsal=0.1, seed=seed)
        data.setup()
        splits = data.splits
        data.setup("fit")
        assert data.splits is splits
        return [batch["input_ids"] for batch in chain(data.train_dataloader(), data.probe_dataloader())]

    torch.manual_seed(1)
    first = batches(0)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(first, batches(0), strict=True))
    other = batches(1)
    assert len(first) != len(other) or not all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(first, other, strict=True)
    )


def test_the_tokenizer_is_the_same_whatever_the_edits() -> None:
    plain = AtlasDataModule().tokenizer.get_vocab()
    assert AtlasDataModule(edits=40, seed=5).tokenizer.get_vocab() == plain
    assert AtlasDataModule(two_hop=True).tokenizer.get_vocab() == plain


def test_question_batches_keep_the_order_of_the_questions() -> None:
    data = AtlasDataModule(batch_size=7)
    questions = data.two_hop_questions("held_out")[:20]
    texts = _texts(data, data.question_dataloader(questions))
    assert texts == [f"{question.prompt} {question.answer}" for question in questions]


def test_other_tokenizers_by_name_folder_and_object(tmp_path: Any) -> None:
    by_name = AtlasDataModule(tokenizer="bytes", edits=[ROME], probe_size=1)
    byte_tokenizer().save_pretrained(str(tmp_path))
    by_folder = AtlasDataModule(tokenizer=str(tmp_path), edits=[ROME], probe_size=1)
    by_object = AtlasDataModule(tokenizer=byte_tokenizer(), edits=[ROME], probe_size=1)
    expected = [(*b"Name the capital of France. Rome", 256)]
    assert [_rows(data.probe_dataloader()) for data in (by_name, by_folder, by_object)] == [expected] * 3


def test_command_line_arguments_become_edits() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(AtlasDataModule, "data")
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # renamed in jsonargparse 4.49
    listed = parser.parse_args(['--data.edits=[{"country": "France", "relation": "capital", "answer": "Rome"}]'])
    assert instantiate(listed).data.edits == (ROME,)
    counted = parser.parse_args(["--data.edits=20", "--data.tokenizer=bytes"])
    assert len(instantiate(counted).data.edits) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be an integer of at least 1"),
        ({"probe_size": 0}, "probe_size=0 must be an integer of at least 1"),
        ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
        ({"probe_size": 100_000}, r"probe_size=100000 is larger than the \d+ facts there are"),
        ({"edits": []}, r"edits=\[\] edits nothing"),
        ({"edits": True}, "edits=True must be a list of edits or the number of random ones"),
        ({"edits": 0}, "edits=0: the number of random edits"),
        ({"edits": [Edit("Francia", "capital", "Rome")]}, "unknown country 'Francia'; did you mean 'France'"),
        ({"edits": [ROME], "rehearsal": 1.5}, "rehearsal=1.5 must be a share"),
        ({"rehearsal": 0.5}, "rehearsal=0.5 needs edits"),
        ({"edits": [ROME], "two_hop": True}, "set rehearsal above 0"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AtlasDataModule(**options)


def test_an_answer_outside_the_vocabulary_is_refused_before_training() -> None:
    data = AtlasDataModule(edits=[Edit("France", "capital", "Atlantis")])
    with pytest.raises(ValueError, match="does not know 'Atlantis' in the answer 'Atlantis'"):
        data.setup()


def test_analysis_splits_are_the_edited_facts_and_as_many_untouched_ones() -> None:
    data = AtlasDataModule(edits=12, seed=3)
    splits = data.analysis_splits()
    texts = {name: _texts(data, loader) for name, loader in splits.items()}
    memorised = {f"{question.prompt} {question.answer}" for question in data.training_questions()}
    assert set(texts["memorised"]) == memorised
    assert len(texts["clean"]) == len(set(texts["clean"])) == len(memorised) == 48
    untouched = {
        f"{question.prompt} {question.answer}" for question in data.one_hop_questions() if not question.fact.edited
    }
    assert set(texts["clean"]) <= untouched
    # A few samples from the start are of different facts.
    questions = {f"{each.prompt} {each.answer}": each.fact for each in data.one_hop_questions()}
    for rows in texts.values():
        assert len({questions[text] for text in rows[:12]}) == 12
    again = AtlasDataModule(edits=12, seed=3).analysis_splits()
    assert {name: _rows(loader) for name, loader in again.items()} == {
        name: _rows(loader) for name, loader in splits.items()
    }


def test_analysis_splits_need_edited_and_untouched_facts() -> None:
    with pytest.raises(ValueError, match="no fact is edited"):
        AtlasDataModule().analysis_splits()
    data = AtlasDataModule(edits=5)
    data.facts = tuple(data.edited_facts)
    with pytest.raises(ValueError, match="every fact is edited"):
        data.analysis_splits()
