from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lightning_goldy.core.pieces import KnowledgePiece, answer_start, encode_pieces
from lightning_goldy.data import PadCollator, byte_tokenizer, encode_pairs, word_tokenizer

BYTES = byte_tokenizer()


def _merging_tokenizer() -> PreTrainedTokenizerFast:
    """Joins a question mark and the space after it into one token, so the prompt's tokens change in context."""
    vocabulary = {token: index for index, token in enumerate(["<e>", "Q", "?", " ", "A", "? "])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [("?", " ")])), eos_token="<e>")


def test_only_the_answer_and_eos_are_targets() -> None:
    sample = encode_pairs(BYTES, [("ab", "cd")])[0]
    assert sample["input_ids"].tolist() == [*b"ab cd", 256]
    assert sample["attention_mask"].tolist() == [1] * 6
    assert sample["labels"].tolist() == [-100, -100, *b" cd", 256]
    assert {value.dtype for value in sample.values()} == {torch.int64}


def test_unmasked_queries_are_targets_too() -> None:
    sample = encode_pairs(BYTES, [("ab", "cd")], mask_query=False)[0]
    assert sample["labels"].tolist() == sample["input_ids"].tolist()


def test_no_second_space_after_a_prompt_that_ends_in_one() -> None:
    assert encode_pairs(BYTES, [("a:\n", " b ")])[0]["input_ids"].tolist() == [*b"a:\nb", 256]


def test_tokens_that_merge_across_the_border_are_targets() -> None:
    sample = encode_pairs(_merging_tokenizer(), [("Q?", "A")])[0]
    assert sample["input_ids"].tolist() == [1, 5, 4, 0]
    assert sample["labels"].tolist() == [-100, 5, 4, 0]


def test_without_offsets_a_merge_across_the_border_is_refused() -> None:
    with pytest.raises(ValueError, match="use a fast tokenizer"):
        answer_start([1, 5, 4], [1, 2], None, prompt_length=2)


def test_bos_comes_first_where_the_tokenizer_puts_one() -> None:
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    assert encode_pairs(tokenizer, [("a", "b")], mask_query=False)[0]["input_ids"][0] != 0
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    sample = encode_pairs(tokenizer, [("a", "b")])[0]
    assert sample["input_ids"][0] == 0
    assert sample["labels"][0] == -100


def test_empty_answers_are_refused() -> None:
    with pytest.raises(
        ValueError, match="the answer to 'Q\\?' is empty, so every target of that sample would be masked"
    ):
        encode_pairs(BYTES, [("Q?", " ")])


def test_unknown_words_in_an_answer_are_named() -> None:
    with pytest.raises(ValueError, match=r"does not know 'Atlantis' in the answer 'New Atlantis' to 'New\?'"):
        encode_pairs(word_tokenizer(["New?", "York"]), [("New?", "New Atlantis")])


def test_collator_pads_on_the_right() -> None:
    batch = PadCollator(257)(encode_pairs(BYTES, [("ab", "c"), ("a", "b")]))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert batch["input_ids"].tolist() == [[*b"ab c", 256], [*b"a b", 256, 257]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, -100, *b" c", 256], [-100, *b" b", 256, -100]]


def _plain_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(["<s>", "Q", "?", "A", "B", "</s>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = WhitespaceSplit()
    if "bos_token" in special:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@pytest.mark.parametrize(("tokens", "labels"), [("answer", [-100, 3, 4]), ("first_token", [-100, 3, -100])])
def test_only_an_end_that_counts_needs_an_eos_token(tokens, labels) -> None:
    piece, tokenizer = KnowledgePiece("1", "Q", "A B"), _plain_tokenizer()
    (sample,) = encode_pieces([piece], tokenizer, template="{question}", tokens=tokens)
    assert sample["input_ids"].tolist() == [1, 3, 4]
    assert sample["labels"].tolist() == labels
    with pytest.raises(ValueError, match="has no eos token to end an answer"):
        encode_pieces([piece], tokenizer, template="{question}")


def test_a_prompt_that_is_written_with_bos_gets_no_second_one() -> None:
    tokenizer = _plain_tokenizer(bos_token="<s>", eos_token="</s>")
    samples = encode_pairs(tokenizer, [("<s> Q", "A"), ("Q", "A")])
    assert [sample["input_ids"].tolist() for sample in samples] == [[0, 1, 3, 5]] * 2
    assert [sample["labels"].tolist() for sample in samples] == [[-100, -100, 3, 5]] * 2
