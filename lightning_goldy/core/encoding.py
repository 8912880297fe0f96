"""From a question and its answer to token ids with labels on the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lightning_goldy.core.objective import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Sample = dict[str, Tensor]
"""``input_ids``, ``attention_mask`` and ``labels``, each int64 of shape ``[T]``."""


class SampleSet(Protocol):
    """Samples by number: a list of them, or a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], *, mask_query: bool = True
) -> list[Sample]:
    """Tokenise prompts with their answers and mark which tokens are targets.

    The text is ``prompt + " " + answer`` (no second space after a prompt that ends in one) followed by the eos token;
    ``labels[t] = input_ids[t]`` on the answer and eos, ``-100`` on the prompt. A bos token comes first where the
    tokenizer itself puts one. A token that holds characters of both prompt and answer counts as answer.

    Args:
        tokenizer: With an eos token.
        pairs: Prompt and answer; white space around answers is dropped.
        mask_query: False makes the prompt's tokens targets too, as in pretraining.

    Returns:
        One sample per pair, unpadded.

    Raises:
        ValueError: An empty answer (no target would be left), an answer with words that the tokenizer does not know,
            or a tokenizer that gives no offsets where they are needed.

    Example:
        >>> from lightning_goldy.data.tokenization import byte_tokenizer
        >>> encode_pairs(byte_tokenizer(), [("Q?", "A")])[0]["labels"].tolist()
        [-100, -100, 32, 65, 256]
    """
    if not pairs:
        return []
    texts, prompts = [], []
    for prompt, answer in pairs:
        if not answer.strip():
            raise ValueError(f"the answer to {prompt!r} is empty, so every target of that sample would be masked")
        prompts.append(prompt)
        texts.append(prompt + ("" if not prompt or prompt[-1].isspace() else " ") + answer.strip())
    rows = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    queries = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    offsets = rows["offset_mapping"] if tokenizer.is_fast else [None] * len(texts)
    bos = _leading_bos(tokenizer)
    samples = []
    for ids, query, spans, prompt, text in zip(rows["input_ids"], queries, offsets, prompts, texts, strict=True):
        start = answer_start(ids, query, spans, len(prompt))
        _check_answer(tokenizer, ids[start:], prompt, text[len(prompt) :].strip())
        tokens = torch.tensor([*bos, *ids, tokenizer.eos_token_id], dtype=torch.int64)
        labels = tokens.clone()
        if mask_query:
            labels[: len(bos) + start] = IGNORE_INDEX
        samples.append({"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels})
    return samples


def answer_start(
    ids: Sequence[int], query: Sequence[int], spans: Sequence[tuple[int, int]] | None, prompt_length: int
) -> int:
    """The index of the first token of the answer in a prompt-and-answer text.

    Args:
        ids: The tokens of the whole text.
        query: The tokens of the prompt alone.
        spans: First and last-plus-one character of each token of the whole text, or None if unknown.
        prompt_length: The number of characters of the prompt.

    Returns:
        ``len(query)`` where the prompt's tokens begin the text; else, where tokens merge across the border, the first
        token that reaches beyond the prompt.

    Raises:
        ValueError: The prompt's tokens do not begin the text and there are no offsets.

    Example:
        >>> answer_start([7, 9], [7, 8], [(0, 2), (2, 5)], prompt_length=4)
        1
    """
    if len(query) < len(ids) and list(ids[: len(query)]) == list(query):
        return len(query)
    if spans is None:
        raise ValueError(
            "the prompt is tokenised differently when its answer follows, and this tokenizer gives no offsets to tell"
            " them apart: use a fast tokenizer"
        )
    return next((index for index, (_, end) in enumerate(spans) if end > prompt_length), len(ids))


def _check_answer(tokenizer: PreTrainedTokenizerBase, answer_ids: Sequence[int], prompt: str, answer: str) -> None:
    if not answer_ids:
        raise ValueError(f"the tokenizer makes no token of the answer {answer!r} to {prompt!r}: all targets masked")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in answer_ids:
        unknown = [word for word in answer.split() if tokenizer.unk_token_id in tokenizer.encode(word)]
        raise ValueError(
            f"the tokenizer does not know {', '.join(map(repr, unknown or [answer]))} in the answer {answer!r} to"
            f" {prompt!r}: choose an answer of known words, or another tokenizer"
        )


def _leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The bos token where the tokenizer begins its texts with one; models trained so need it."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
