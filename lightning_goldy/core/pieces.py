"""Knowledge pieces: questions with their answers, and where they belong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from lightning_goldy.core.collate import PadCollator
from lightning_goldy.core.encoding import Sample, encode_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def encode_pieces(
    pieces: Sequence[KnowledgePiece], tokenizer: PreTrainedTokenizerBase, *, template: str = QUESTION_TEMPLATE
) -> list[Sample]:
    """Tokenise pieces, the prompt masked and the whole answer a target; see ``encode_pairs``.

    Args:
        pieces: The pieces.
        tokenizer: With an eos token.
        template: The prompt, with ``{question}`` where the question goes.

    Returns:
        One sample per piece, unpadded, in the order given.

    Raises:
        ValueError: The template has not exactly one ``{question}``, or a piece cannot be tokenised.

    Example:
        >>> from lightning_goldy.data import byte_tokenizer
        >>> piece = KnowledgePiece("1", "Q?", "A")
        >>> encode_pieces([piece], byte_tokenizer(), template="{question}")[0]["labels"].tolist()
        [-100, -100, 32, 65, 256]
    """
    if template.count("{question}") != 1:
        raise ValueError(f"template={template!r} must contain '{{question}}' exactly once")
    return encode_pairs(tokenizer, [(template.replace("{question}", each.question), each.answer) for each in pieces])


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
