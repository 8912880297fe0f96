from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lightning_goldy.data import byte_tokenizer, load_tokenizer, word_tokenizer
from lightning_goldy.data.tokenization import padding_id

CORPUS = ["What is the capital of Chad?", "N'Djamena", "Port-au-Prince", "the Tongan pa'anga.", "Timor-Leste"]


def test_words_round_trip_and_are_never_unknown() -> None:
    tokenizer = word_tokenizer(CORPUS)
    for text in [*CORPUS, "What is the capital of Chad? N'Djamena", "Timor-Leste the Tongan pa'anga."]:
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


def test_words_do_not_depend_on_the_order_of_the_corpus() -> None:
    assert word_tokenizer(CORPUS).get_vocab() == word_tokenizer(reversed(CORPUS)).get_vocab()


def test_spaces_in_any_number_and_place_are_words_too() -> None:
    texts = ["a  b", " c", "d ", "", "e,f  g? h", "a b\nc d"]
    vocabulary = set(word_tokenizer(texts).get_vocab()) - {"<pad>", "<eos>", "<unk>"}
    splitter = word_tokenizer(texts).backend_tokenizer.pre_tokenizer
    assert vocabulary == {word for text in texts for word, _ in splitter.pre_tokenize_str(text)}


def test_word_special_tokens() -> None:
    tokenizer = word_tokenizer(CORPUS)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer("Atlantis").input_ids == [2]
    assert tokenizer.decode([*tokenizer("What is").input_ids, 1], skip_special_tokens=True) == "What is"


@pytest.mark.parametrize("tokenizer", [word_tokenizer(CORPUS), byte_tokenizer()], ids=["words", "bytes"])
def test_saved_tokenizers_load_as_they_were(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(str(tmp_path))
    for loaded in (AutoTokenizer.from_pretrained(str(tmp_path)), load_tokenizer(str(tmp_path))):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        for text in CORPUS:
            assert loaded(text).input_ids == tokenizer(text).input_ids
            assert loaded.decode(loaded(text).input_ids) == text


BYTES = byte_tokenizer()


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(codec="utf-8")).filter(lambda text: "<eos>" not in text and "<pad>" not in text))
def test_byte_ids_are_the_bytes_of_any_text(text: str) -> None:
    ids = BYTES(text).input_ids
    assert ids == list(text.encode("utf-8"))
    assert BYTES.decode(ids) == text


def test_byte_tokenizer_has_the_256_bytes_and_two_more() -> None:
    assert len(BYTES) == 258
    assert sorted(BYTES.get_vocab().values()) == list(range(258))
    assert (BYTES.eos_token_id, BYTES.pad_token_id, BYTES.unk_token_id) == (256, 257, None)


def test_an_object_is_taken_as_it_is_and_padding_falls_back_to_eos() -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<e>": 0, "a": 1})), eos_token="<e>"
    )
    assert load_tokenizer(tokenizer) is tokenizer
    assert padding_id(tokenizer) == 0
    assert padding_id(BYTES) == 257


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0})))
    with pytest.raises(ValueError, match=r"has no eos token.*set tokenizer.eos_token"):
        load_tokenizer(tokenizer)


def test_a_folder_without_an_eos_token_or_without_a_sound_tokenizer_is_refused_by_name(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}))).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no eos token, which .*write it into the folder's tokenizer_config"):
        load_tokenizer(str(tmp_path))
    for content in (b"\xff", b"", b"{}", b"[" * 5000, b'{"version": "1.0", "model": {"type": "\x1b[31m"}}'):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ValueError, match="holds no tokenizer that can be loaded") as error:
            load_tokenizer(str(tmp_path))
        assert str(error.value).isprintable()


def test_unknown_names_say_what_is_valid(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"unknown tokenizer '\./word'; did you mean 'words'.*bytes, words, a local folder"
    ):
        load_tokenizer("./word", corpus=CORPUS)
    with pytest.raises(ValueError, match="holds no tokenizer that can be loaded"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ValueError, match="at least one word"):
        word_tokenizer([])
