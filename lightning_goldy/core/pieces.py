"""Pieces of knowledge, and how questions, answers and texts become padded batches of token ids."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_goldy.core.naming import require_choice
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
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], *, mask_query: bool = True, end: bool = True
) -> list[Sample]:
    """Tokenise prompts with their answers and mark which tokens are targets.

    The text is ``prompt + " " + answer`` (no second space after a prompt that ends in one) followed by the eos token;
    ``labels[t] = input_ids[t]`` on the answer and eos, ``-100`` on the prompt. A bos token comes first where the
    tokenizer itself puts one, but never a second before a prompt that is written with it, as chat templates are. A
    token that holds characters of both prompt and answer counts as answer.

    Args:
        tokenizer: With an eos token, where there is an ``end``.
        pairs: Prompt and answer; white space around answers is dropped.
        mask_query: False makes the prompt's tokens targets too, as in pretraining.
        end: Whether the eos token follows.

    Returns:
        One sample per pair, unpadded.

    Raises:
        ValueError: An empty answer (no target would be left), an answer with words that the tokenizer does not know,
            or a tokenizer without an eos token or that gives no offsets where these are needed.

    Example:
        >>> from lightning_goldy.data.tokenization import byte_tokenizer
        >>> encode_pairs(byte_tokenizer(), [("Q?", "A")])[0]["labels"].tolist()
        [-100, -100, 32, 65, 256]
    """
    if not pairs:
        return []
    eos = tokenizer.eos_token_id
    if end and eos is None:
        raise ValueError(f"the {type(tokenizer).__name__} has no eos token to end an answer: set tokenizer.eos_token")
    texts, prompts = [], []
    for prompt, answer in pairs:
        if not answer.strip():
            raise ValueError(f"the answer to {prompt!r} is empty, so every target of that sample would be masked")
        prompts.append(prompt)
        texts.append(prompt + ("" if not prompt or prompt[-1].isspace() else " ") + answer.strip())
    rows = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    queries = tokenizer(prompts, add_special_tokens=False, verbose=False)["input_ids"]
    offsets = rows["offset_mapping"] if tokenizer.is_fast else [None] * len(texts)
    start_of_text, unknown = leading_bos(tokenizer), tokenizer.unk_token_id
    samples = []
    for ids, query, spans, prompt, text in zip(rows["input_ids"], queries, offsets, prompts, texts, strict=True):
        start = answer_start(ids, query, spans, len(prompt))
        if start >= len(ids) or unknown in ids[start:]:
            raise ValueError(_fault_of_answer(tokenizer, ids[start:], prompt, text[len(prompt) :].strip()))
        bos = [] if ids[: len(start_of_text)] == start_of_text else start_of_text
        tokens = torch.tensor([*bos, *ids, *([eos] if end else [])], dtype=torch.int64)
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


def _fault_of_answer(tokenizer: PreTrainedTokenizerBase, answer_ids: Sequence[int], prompt: str, answer: str) -> str:
    if not answer_ids:
        return f"the tokenizer makes no token of the answer {answer!r} to {prompt!r}: all targets masked"
    unknown = [word for word in answer.split() if tokenizer.unk_token_id in tokenizer.encode(word)]
    return (
        f"the tokenizer does not know {', '.join(map(repr, unknown or [answer]))} in the answer {answer!r} to"
        f" {prompt!r}: choose an answer of known words, or another tokenizer"
    )


def leading_bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The bos token where the tokenizer begins its texts with one; models trained so need it."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


class PadCollator:
    """Pads on the right to the longest sample of the batch.

    Args:
        pad_token_id: Fills ``input_ids``; ``attention_mask`` is filled with 0 and ``labels`` with -100.

    Example:
        >>> import torch
        >>> def sample(n):
        ...     return dict.fromkeys(("input_ids", "attention_mask", "labels"), torch.ones(n, dtype=torch.int64))
        >>> batch = PadCollator(9)([sample(1), sample(2)])
        >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
        ([[1, 9], [1, 1]], [[1, 0], [1, 1]], [[1, -100], [1, 1]])
    """

    def __init__(self, pad_token_id: int) -> None:
        self.fill = {"input_ids": pad_token_id, "attention_mask": 0, "labels": IGNORE_INDEX}

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """One batch, each tensor of shape ``[B, T]``."""
        return {
            key: pad_sequence([sample[key] for sample in samples], batch_first=True, padding_value=value)
            for key, value in self.fill.items()
        }


QUESTION_TEMPLATE = "Question: {question}\nAnswer:"
"""The prompt of a question; a cloze such as "The capital of Peru is" is its own prompt: ``"{question}"``."""


@dataclass(frozen=True)
class KnowledgePiece:
    """One question and its answer.

    Args:
        id: A name for it; the number of its line where the file gives none.
        question: The question.
        answer: The answer.
        category: A label to compare pieces by.
        group: What it belongs to, e.g. the multi-hop question that it is a hop of.
        hop: Its place in the group.
        supporting_fact: A sentence that answers it.
    """

    id: str
    question: str
    answer: str
    category: str | None = None
    group: str | None = None
    hop: int | None = None
    supporting_fact: str | None = None


AnswerTokens = Literal["answer_with_end", "answer", "first_token"]
"""Which tokens of an answer count: all and the end-of-text token, all without it, or the first."""


def encode_pieces(
    pieces: Sequence[KnowledgePiece],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: str = QUESTION_TEMPLATE,
    tokens: AnswerTokens = "answer_with_end",
) -> list[Sample]:
    """Tokenise pieces, the prompt masked and the answer a target; see ``encode_pairs``.

    Args:
        pieces: The pieces.
        tokenizer: With an eos token, where that is among ``tokens``.
        template: The prompt, with ``{question}`` where the question goes.
        tokens: Which are targets; the sample holds all of them.

    Returns:
        One sample per piece, unpadded, in the order given.

    Raises:
        ValueError: The template has not exactly one ``{question}``, ``tokens`` is unknown, or a piece cannot be
            tokenised.

    Example:
        >>> from lightning_goldy.data import byte_tokenizer
        >>> piece = KnowledgePiece("1", "Q?", "A")
        >>> encode_pieces([piece], byte_tokenizer(), template="{question}")[0]["labels"].tolist()
        [-100, -100, 32, 65, 256]
        >>> encode_pieces([piece], byte_tokenizer(), template="{question}", tokens="answer")[0]["labels"].tolist()
        [-100, -100, 32, 65, -100]
    """
    require_choice("tokens", tokens, get_args(AnswerTokens))
    if template.count("{question}") != 1:
        raise ValueError(f"template={template!r} must contain '{{question}}' exactly once")
    pairs = [(template.replace("{question}", each.question), each.answer) for each in pieces]
    end = tokens == "answer_with_end" or tokenizer.eos_token_id is not None
    samples = encode_pairs(tokenizer, pairs, end=end)
    for sample in samples if tokens != "answer_with_end" else ():
        places = (sample["labels"] != IGNORE_INDEX).nonzero().flatten()
        last = len(places) - end
        sample["labels"][places[last if tokens == "answer" else 1 :]] = IGNORE_INDEX
    return samples


def padded_batches(samples: Sequence[Sample], pad_token_id: int, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of samples in their order, padded on the right.

    Args:
        samples: As ``encode_pieces`` gives them.
        pad_token_id: Fills ``input_ids``.
        batch_size: Samples per batch, at least 1.

    Yields:
        ``input_ids``, ``attention_mask`` and ``labels``, each of shape ``[B, T]``.

    Example:
        >>> import torch
        >>> row = dict.fromkeys(("input_ids", "attention_mask", "labels"), torch.ones(2, dtype=torch.int64))
        >>> [len(batch["labels"]) for batch in padded_batches([row] * 3, 0, 2)]
        [2, 1]
    """
    collate = PadCollator(pad_token_id)
    for start in range(0, len(samples), batch_size):
        yield collate(samples[start : start + batch_size])


@dataclass(frozen=True)
class PromptPairs:
    """Prompts in two versions of equal length, of which the second lacks what the answer of the first rests on.

    Args:
        clean: Token ids of each prompt; the answer is the token behind the last.
        corrupted: Token ids of the other version.
        answers: For each prompt the tokens that are right.
        wrong: For each prompt the tokens that they are held against, such as the answer to the corrupted version; may
            be empty.
        names: What each prompt is called in messages; its place by default.

    Raises:
        ValueError: There is no pair, or one has versions of different lengths, no answer, or an answer that is wrong;
            it is named.

    Example:
        >>> pairs = PromptPairs(((5, 6, 5), (7, 8)), ((5, 9, 5), (7, 9)), ((6,), (1,)), ((9,), ()))
        >>> len(pairs), pairs.batches(8)
        (2, [[1], [0]])
        >>> PromptPairs(((5, 6),), ((5,),), ((6,),), ((),), names=("When Ada",))
        Traceback (most recent call last):
        ValueError: prompt 'When Ada' has 2 tokens and its corrupted version 1: both need the same number
    """

    clean: tuple[tuple[int, ...], ...]
    corrupted: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    wrong: tuple[tuple[int, ...], ...]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("clean", "corrupted", "answers", "wrong"):
            object.__setattr__(self, name, _rows_of_ids(name, getattr(self, name)))
        if not self.clean:
            raise ValueError("there is no pair of prompts")
        if not self.names:
            object.__setattr__(self, "names", tuple(map(str, range(len(self.clean)))))
        columns = {name: len(getattr(self, name)) for name in ("clean", "corrupted", "answers", "wrong", "names")}
        if len(set(columns.values())) > 1:
            raise ValueError(f"of each prompt there must be one entry everywhere; got {columns}")
        for name, clean, corrupted, right, wrong in zip(
            self.names, self.clean, self.corrupted, self.answers, self.wrong, strict=True
        ):
            if len(clean) != len(corrupted):
                raise ValueError(
                    f"prompt {name!r} has {len(clean)} tokens and its corrupted version {len(corrupted)}: both need "
                    "the same number"
                )
            if not clean or not right or set(right) & set(wrong):
                raise ValueError(f"prompt {name!r} needs tokens, and answers that are not among the wrong ones")

    def __len__(self) -> int:
        return len(self.clean)

    def take(self, places: Sequence[int]) -> PromptPairs:
        """Some of the pairs, in the given order."""
        return PromptPairs(
            clean=tuple(self.clean[place] for place in places),
            corrupted=tuple(self.corrupted[place] for place in places),
            answers=tuple(self.answers[place] for place in places),
            wrong=tuple(self.wrong[place] for place in places),
            names=tuple(self.names[place] for place in places),
        )

    def digests(self, version: Literal["clean", "corrupted"] = "clean") -> tuple[str, ...]:
        """By prompt 16 hexadecimal digits that tell it from any other.

        Args:
            version: Of which.

        Example:
            >>> pairs = PromptPairs(((5, 6), (5, 7)), ((5, 9), (5, 6)), ((6,), (1,)), ((), ()))
            >>> pairs.digests()[0] == pairs.digests("corrupted")[1]
            True
        """
        texts = (",".join(map(str, ids)) for ids in getattr(self, version))
        return tuple(hashlib.blake2b(text.encode(), digest_size=8).hexdigest() for text in texts)

    def batches(self, size: int) -> list[list[int]]:
        """Places of the pairs in batches of one length each, the shortest first, so that nothing is padded."""
        lengths = sorted({len(ids) for ids in self.clean})
        groups = ([place for place, ids in enumerate(self.clean) if len(ids) == length] for length in lengths)
        return [group[start : start + size] for group in groups for start in range(0, len(group), size)]


def _rows_of_ids(name: str, rows: Any) -> tuple[tuple[int, ...], ...]:
    """Lists or a tensor of token ids of each prompt as tuples."""
    rows = rows.tolist() if isinstance(rows, Tensor) else rows
    found = []
    for place, row in enumerate(rows if isinstance(rows, (list, tuple)) else [rows]):
        ids = row.tolist() if isinstance(row, Tensor) else row
        if not isinstance(ids, (list, tuple)) or not all(isinstance(token, Integral) for token in ids):
            raise ValueError(f"{name} are token ids, a list for each prompt; of prompt {place} got {row!r:.80}")
        found.append(tuple(map(int, ids)))
    return tuple(found)


def random_tokens(sample: Any, vocabulary: int, seed: int = 0, *, classes: bool = False) -> Any:
    """A sample of the same shape with tokens drawn uniformly, a function of both arguments; None without tokens.

    Padding stays; labels that repeat the tokens repeat the new ones, others are drawn too, -100 stays.

    Args:
        sample: A batch, with ``input_ids`` among its fields.
        vocabulary: Tokens are below it.
        seed: Another one draws other tokens.
        classes: Whether labels are classes, of positions or of samples, and no tokens: then they stay.

    Example:
        >>> drawn = random_tokens({"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])}, 9)
        >>> drawn["labels"][0, 0].item(), torch.equal(drawn["labels"][0, 1:], drawn["input_ids"][0, 1:])
        (-100, True)
    """
    if not isinstance(sample, Mapping) or not isinstance(sample.get("input_ids"), Tensor):
        return None
    ids = sample["input_ids"].cpu()
    found = zlib.crc32(ids.contiguous().numpy().tobytes(), seed)
    generator = torch.Generator().manual_seed(found)
    drawn, kept = (
        torch.randint(vocabulary, ids.shape, generator=generator, dtype=ids.dtype),
        sample.get("attention_mask"),
    )
    if isinstance(kept, Tensor) and kept.shape == ids.shape:
        drawn = torch.where(kept.cpu() != 0, drawn, ids)
    changed = {"input_ids": drawn}
    labels = sample.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not (classes or labels.is_floating_point()):
        labels = labels.cpu()
        others = torch.randint(vocabulary, labels.shape, generator=generator, dtype=labels.dtype)
        follow = torch.where(labels == ids, drawn.to(labels.dtype), others) if labels.shape == ids.shape else others
        changed["labels"] = torch.where(labels == IGNORE_INDEX, labels, follow)
    device = sample["input_ids"].device
    return {**sample, **{name: tensor.to(device) for name, tensor in changed.items()}}
