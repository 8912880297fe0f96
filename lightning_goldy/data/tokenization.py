"""Tokenizers: made on the spot from words or bytes, or loaded by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lightning_goldy.core.files import PlainError
from lightning_goldy.core.naming import unknown_name
from lightning_goldy.core.tasks import transformers_model

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"


def word_tokenizer(corpus: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of exactly the words of a corpus; punctuation marks are words of their own.

    A word carries the space before it, so decoding restores single-spaced text to the letter.

    Args:
        corpus: The texts. The vocabulary is sorted, so it depends on the set of words alone.

    Returns:
        A fast tokenizer with pad, eos and unk tokens (ids 0, 1, 2).

    Raises:
        ValueError: The corpus has no words.

    Example:
        >>> tokenizer = word_tokenizer(["What is the capital of Chad?", "N'Djamena"])
        >>> ids = tokenizer("the capital of Chad? N'Djamena").input_ids
        >>> len(ids), tokenizer.decode(ids)
        (6, "the capital of Chad? N'Djamena")
    """
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="always"), pre_tokenizers.Split(Regex(r"[?!.,:;]"), "isolated")]
    )
    # Texts share most of their words, and what stands between single spaces is cut by itself.
    parts = {part for text in corpus for part in ([text] if "  " in f" {text} " else text.split(" "))}
    words = sorted({word for part in parts for word, _ in splitter.pre_tokenize_str(part)})
    if not words:
        raise ValueError("a word-level tokenizer needs a corpus with at least one word")
    vocabulary = {word: index for index, word in enumerate([PAD, EOS, UNK, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = splitter
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    return _wrap(backend, unk_token=UNK)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes of UTF-8 text, plus eos (256) and pad (257).

    Example:
        >>> tokenizer = byte_tokenizer()
        >>> tokenizer("Aé").input_ids, tokenizer.decode([65, 195, 169])
        ([65, 195, 169], 'Aé')
    """
    # The byte-level pre-tokenizer shows a byte as a printable character: itself where it is one, else the next free
    # code point from 256 on. Listing them in byte order makes a token's id its byte.
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    vocabulary = {chr(byte if byte in printable else 256 + hidden.index(byte)): byte for byte in range(256)}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, EOS: 256, PAD: 257}, merges=[]))
    # Splitting into words changes no token when there are no merges, and keeps long texts fast.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    return _wrap(backend)


def load_tokenizer(
    tokenizer: str | PreTrainedTokenizerBase, corpus: Iterable[str] | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer that a data module's argument asks for.

    Args:
        tokenizer: ``"bytes"``, ``"words"`` (where there is a corpus), a local folder, a name on the hub, or a
            tokenizer, which is returned as it is.
        corpus: What ``"words"`` is made of.

    Returns:
        A tokenizer with an end-of-text token.

    Raises:
        ValueError: Nothing goes by that name, or the tokenizer has no end-of-text token.

    Example:
        >>> len(load_tokenizer("bytes"))
        258
    """
    loaded = _load(tokenizer, corpus) if isinstance(tokenizer, str) else tokenizer
    if loaded.eos_token_id is None:
        named = isinstance(tokenizer, str)
        advice = "write it into the folder's tokenizer_config.json, or set tokenizer.eos_token and pass the object"
        raise ValueError(
            f"the tokenizer {tokenizer if named else type(tokenizer).__name__!r} has no eos token, which ends every"
            f" answer and document: {advice if named else 'set tokenizer.eos_token'}"
        )
    return loaded


def own_tokenizer(module: Any) -> str | PreTrainedTokenizerBase | None:
    """What ``load_tokenizer`` takes for a model's own tokenizer.

    Args:
        module: A LightningModule or a model: its ``tokenizer``, or the folder or the name that it was loaded from.

    Returns:
        None where it was loaded from nowhere, as a model that is trained from scratch.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4))
        >>> own_tokenizer(model) is None
        True
        >>> model.name_or_path = "gpt2"
        >>> own_tokenizer(model)
        'gpt2'
    """
    given = getattr(module, "tokenizer", None)
    if isinstance(given, PreTrainedTokenizerBase):
        return given
    model = transformers_model(module) if isinstance(module, nn.Module) else None
    return str(getattr(model, "name_or_path", None) or "") or None


def load_own_tokenizer(owner: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer that ``own_tokenizer`` tells.

    Raises:
        PlainError: The model's folder, or its name on the hub, has none.
    """
    try:
        return load_tokenizer(owner)
    except PlainError as error:
        reason = error.__cause__ or "there is no such folder"
        raise PlainError(
            f"no tokenizer is given, and the model's own cannot be loaded from {owner!r}: save one there "
            f"(save_pretrained), or give tokenizer=, a folder, a name on the hub or bytes. {reason}"
        ) from error


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the pad token's, else the eos token's (padding is masked, so any id serves)."""
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    return int(pad if pad is not None else eos)


def _load(name: str, corpus: Iterable[str] | None) -> PreTrainedTokenizerBase:
    if name == "bytes":
        return byte_tokenizer()
    if name == "words" and corpus is not None:
        return word_tokenizer(corpus)
    built_in = ["bytes"] if corpus is None else ["bytes", "words"]
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".")):
        raise PlainError(f"{unknown_name('tokenizer', name, built_in)}, a local folder or a name on the hub")
    try:
        loaded = AutoTokenizer.from_pretrained(str(folder) if folder.is_dir() else name)
        # The library makes an empty one of a model's configuration alone.
        if set(loaded.get_vocab()) <= set(loaded.all_special_tokens):
            raise ValueError("there are no files of one")
        return loaded
    except Exception as error:  # the library raises bare exceptions for a file that it cannot read
        what = (
            "holds no tokenizer that can be loaded" if folder.is_dir() else "is neither a local folder nor on the hub"
        )
        message = unknown_name("tokenizer", name, built_in)
        raise PlainError(f"{message}, a local folder or a name on the hub. {name!r} {what}: {error}") from error


def _wrap(backend: Tokenizer, **special_tokens: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        **special_tokens,
    )
