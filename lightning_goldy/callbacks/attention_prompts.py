"""The prompts whose attention is shown, as batches of one, and what their tokens are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor, nn

from lightning_goldy.analysis.attention_maps import NameTokens
from lightning_goldy.analysis.attention_rows import Tokens

PROBE = "probe"
"""What the prompt is called that is taken from the probe when none is given."""

PromptTexts = Mapping[str, "str | Sequence[int]"]


@dataclass(frozen=True)
class Prompt:
    """A prompt as the model takes it.

    Args:
        name: Part of tags and headings.
        batch: ``input_ids`` and ``attention_mask`` of shape ``[1, T]``, on the CPU.
        n_tokens: Length before it was cut.
    """

    name: str
    batch: dict[str, Tensor]
    n_tokens: int


def check_prompts(prompts: PromptTexts) -> None:
    """Checks names and contents before there is a tokenizer.

    Raises:
        ValueError: A name cannot be part of a tag, or a prompt is empty.
    """
    if not prompts:
        raise ValueError("prompts= names no prompt; leave it out to show the probe's first sample")
    for name, content in prompts.items():
        if not isinstance(name, str) or not name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"prompt names become parts of tags: letters, digits, '-' and '_' only; got {name!r}")
        text = isinstance(content, str)
        if not text and not all(isinstance(each, int) and not isinstance(each, bool) for each in content):
            raise ValueError(f"prompt {name!r} is a text or a list of token ids; got {content!r:.60}")
        if not len(content):
            raise ValueError(f"prompt {name!r} is empty")


def find_prompts(
    trainer: L.Trainer, model: nn.Module, given: PromptTexts | None, probe: Sequence[Any], max_tokens: int
) -> tuple[Prompt, ...]:
    """The prompts with the run's tokenizer, each cut to its first tokens; by default the probe's first sample.

    Raises:
        ValueError: A text needs a tokenizer and there is none, or a token is unknown to the model.
    """
    if given is None:
        tokens = Tokens.of(probe[0])
        # Without its padding, which the model does not see either.
        return (_prompt(PROBE, tokens.ids[0][tokens.valid[0]].tolist(), max_tokens),)
    tokenizer = find_tokenizer(trainer)
    embeddings: Any = getattr(model, "get_input_embeddings", None)
    size = None if embeddings is None else getattr(embeddings(), "num_embeddings", None)
    prompts = []
    for name, content in given.items():
        if isinstance(content, str) and tokenizer is None:
            raise ValueError(
                f"prompt {name!r} is a text, but neither {type(trainer.lightning_module).__name__} nor its data module "
                "has a tokenizer; give token ids instead"
            )
        ids = tokenizer(content).input_ids if isinstance(content, str) else list(content)
        if not ids:
            raise ValueError(f"prompt {name!r} has no tokens")
        wrong = [each for each in ids if each < 0 or (size is not None and each >= size)]
        if wrong:
            raise ValueError(f"prompt {name!r}: token {wrong[0]} is unknown to the model, which has {size} tokens")
        prompts.append(_prompt(name, ids, max_tokens))
    return tuple(prompts)


def find_tokenizer(trainer: L.Trainer) -> Any:
    """The LightningModule's tokenizer, or the data module's; None when there is neither."""
    module: Any = trainer.lightning_module
    own = getattr(module, "tokenizer", None)
    return own if own is not None else getattr(trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]


def token_namer(tokenizer: Any) -> NameTokens | None:
    r"""Turns ids into labels that can be read: a space before a word is a dot, a line break is written out.

    Example:
        >>> from lightning_goldy.data.tokenization import byte_tokenizer
        >>> token_namer(byte_tokenizer())([65, 32, 10])
        ['A', '·', '\\n']
    """
    if tokenizer is None:
        return None

    def name(ids: Sequence[int]) -> list[str]:
        texts = [str(tokenizer.decode([each])) for each in ids]
        return [text.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "·") or "∅" for text in texts]

    return name


def _prompt(name: str, ids: list[int], max_tokens: int) -> Prompt:
    kept = torch.tensor([ids[:max_tokens]])
    return Prompt(name, {"input_ids": kept, "attention_mask": torch.ones_like(kept)}, len(ids))
