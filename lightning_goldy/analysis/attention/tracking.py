"""The attention of a model at one step: statistics of all heads over a probe, and patterns of some on prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.attention.patterns import AttentionMaps, NameTokens, attention_maps
from lightning_goldy.analysis.attention.rows import STATISTICS, Stack
from lightning_goldy.analysis.attention.statistics import AttentionStatistics, attention_statistics
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.architecture.adapters import base_values
from lightning_goldy.core.base import Base, base_of
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.vector import substituted

Heads = Sequence[tuple[int, int]] | Literal["all"]

KINDS = ("previous_token", "induction", "duplicate_token", "first_token")
"""Statistics that tell heads of a kind apart; the strongest head of each is shown unless others are chosen."""
_PEAKS = ("previous_token", "induction", "duplicate_token", "drift")


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as the model takes it.

    Args:
        name: Part of tags and headings.
        batch: ``input_ids`` and ``attention_mask`` of shape ``[1, T]``, on the CPU; of a decoder ``decoder_input_ids``
            and what its encoder reads.
        n_tokens: Length before it was cut.
    """

    name: str
    batch: dict[str, Tensor]
    n_tokens: int

    @classmethod
    def of(
        cls,
        name: str,
        content: str | Sequence[int],
        model: nn.Module,
        tokenizer: Any,
        max_tokens: int,
        *,
        source: Mapping[str, Tensor] | None = None,
    ) -> Prompt:
        """A prompt from a text or from token ids, cut to its first tokens.

        Args:
            name: Its name.
            content: A text or token ids.
            model: Whose embeddings must know the tokens.
            tokenizer: Of texts; may be None for ids.
            max_tokens: Longer prompts are cut.
            source: What the encoder reads where the prompt is the decoder's; None for any other.

        Raises:
            ValueError: It has no tokens, or one is unknown to the model.

        Example:
            >>> Prompt.of("sum", [5, 6, 7], nn.Linear(1, 1), None, 2).batch["input_ids"]
            tensor([[5, 6]])
        """
        ids = tokenizer(content).input_ids if isinstance(content, str) else list(content)
        if not ids:
            raise ValueError(f"prompt {name!r} has no tokens")
        embeddings: Any = getattr(model, "get_input_embeddings", None)
        size = None if embeddings is None else getattr(embeddings(), "num_embeddings", None)
        wrong = [token for token in ids if token < 0 or (size is not None and token >= size)]
        if wrong:
            raise ValueError(f"prompt {name!r}: token {wrong[0]} is unknown to the model, which has {size} tokens")
        kept = torch.tensor([ids[:max_tokens]])
        if source is not None:
            return cls(name, {**source, "decoder_input_ids": kept}, len(ids))
        return cls(name, {"input_ids": kept, "attention_mask": torch.ones_like(kept)}, len(ids))


def token_namer(tokenizer: Any) -> NameTokens | None:
    r"""Turns ids into labels that can be read: a space before a word is a dot, a line break is written out.

    Example:
        >>> class Letters:
        ...     def decode(self, ids):
        ...         return "".join(map(chr, ids))
        >>> token_namer(Letters())([65, 32, 10])
        ['A', '·', '\\n']
    """
    if tokenizer is None:
        return None

    def name(ids: Sequence[int]) -> list[str]:
        texts = [str(tokenizer.decode([token])) for token in ids]
        return [text.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "·") or "∅" for text in texts]

    return name


@dataclass(frozen=True)
class PromptAttention(AnalysisResult):
    """What every head looks at on one prompt.

    Args:
        name: Of the prompt.
        n_tokens: Its length before it was cut.
        maps: Present patterns.
        base: The base's; None without a base.
    """

    name: str
    n_tokens: int
    maps: AttentionMaps
    base: AttentionMaps | None


@dataclass(frozen=True)
class TrackedAttention(AnalysisResult):
    """Statistics of all heads over a probe, and the patterns of some on prompts.

    Args:
        statistics: Of all heads.
        prompts: Patterns of all heads on each prompt.
        heads: The (layer, head) pairs whose patterns go to the row.
        n_singular_values: How many singular values of each head's pattern go to the row.
        cost: Passes, the base's included.
        stack: Of an encoder-decoder the one that was read.
    """

    analysis: ClassVar[str] = "attention_tracker"

    statistics: AttentionStatistics
    prompts: tuple[PromptAttention, ...]
    heads: tuple[tuple[int, int], ...]
    n_singular_values: int = 4
    cost: Cost = field(default=Cost(), compare=False)
    stack: Stack | None = None

    def metrics(self) -> dict[str, float | None]:
        """Means over heads, the strongest head's values, entropy and drift by layer, the largest singular values."""
        statistics = self.statistics
        metrics: dict[str, float | None] = {name: statistics.mean(name) for name in statistics.names}
        for name in _PEAKS:
            if name in statistics.names:
                pair = statistics.strongest(name)
                metrics[f"{name}_max"] = None if pair is None else float(statistics.statistic(name)[pair])
        for name in ("entropy", "drift"):
            if name in statistics.names:
                for layer, values in enumerate(statistics.statistic(name)):
                    metrics[f"{name}/layer_{layer}"] = float(values.nanmean())
        for prompt in self.prompts:
            metrics[f"largest_singular_value/{prompt.name}"] = float(prompt.maps.singular_values(1).nanmean())
        return metrics

    def details(self) -> dict[str, Any]:
        """Every head's statistics and how many queries they are means over; patterns, tokens and singular values."""
        statistics = self.statistics
        values = [prompt.maps.singular_values(self.n_singular_values) for prompt in self.prompts]
        return {
            **({} if self.stack is None else {"stack": self.stack}),
            "n_samples": statistics.n_samples,
            **({} if statistics.drift_interval is None else {"drift_interval": list(statistics.drift_interval)}),
            **({} if statistics.drift_samples is None else {"per_sample": {"drift": statistics.drift_samples}}),
            "queries": dict(zip(STATISTICS, statistics.queries[0].tolist(), strict=True)),
            "statistics": {name: statistics.statistic(name).tolist() for name in statistics.names},
            "heads": [list(pair) for pair in self.heads],
            "prompts": [
                {
                    "name": prompt.name,
                    "n_tokens": prompt.n_tokens,
                    "tokens": list(prompt.maps.token_names()),
                    "singular_values": _rounded(each, 6),
                    "maps": [self._map(prompt, *pair) for pair in self.heads],
                }
                for prompt, each in zip(self.prompts, values, strict=True)
            ],
            "spectra": [
                {"prompt": prompt.name, "values": _known(each.double().round(decimals=6).nanmean(dim=(0, 1)))}
                for prompt, each in zip(self.prompts, values, strict=True)
            ],
        }

    def _map(self, prompt: PromptAttention, layer: int, head: int) -> dict[str, Any]:
        weights, base = (
            None if maps is None else _rounded(maps.pattern(layer, head), 4) for maps in (prompt.maps, prompt.base)
        )
        return {"layer": layer, "head": head, "weights": weights, "base": base}


def track_attention(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    prompts: Sequence[Prompt] = (),
    heads: Heads | None = None,
    base: Base | None = None,
    n_samples: int | None = None,
    stack: Stack | None = None,
    n_singular_values: int = 4,
    name_tokens: NameTokens | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TrackedAttention:
    """Measures all heads over batches and records their patterns on prompts, with a base's beside them.

    The model comes back as it was; on several ranks every rank must call.

    Args:
        model: A transformers model or anything that contains one.
        batches: Dicts with ``input_ids`` of shape ``[B, T]`` and optionally ``attention_mask``; read once.
        objective: How the model is called on the batches; by default with everything of them but their labels.
        prompts: What the patterns are shown on.
        heads: The (layer, head) pairs that are shown, or ``all``; by default :func:`strongest_heads`.
        base: The base model, for the drift: anything that :func:`~lightning_goldy.core.base.base_of` takes.
        n_samples: Use only the first so many samples; all by default.
        stack: Of an encoder-decoder the ``encoder`` or the ``decoder``, whose batches have ``decoder_input_ids`` or
            ``labels``.
        n_singular_values: How many are kept of each head's pattern.
        name_tokens: Turns token ids into labels; the ids themselves by default.
        progress: Called with (batches read, batches in all).

    Raises:
        UnsupportedArchitectureError: The family's patterns cannot be read; it is named.
        SpaceError: The base is that of another model.
        TypeError: It cannot be a base.
        ValueError: An argument is out of range, there are too few samples, or a pattern is not finite.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
        >>> prompt = Prompt.of("sum", [3, 4, 5], model, None, 24)
        >>> found = track_attention(model, [{"input_ids": torch.tensor([[1, 2, 1]])}], prompts=[prompt], heads="all")
        >>> found.heads, found.cost.forwards, len(found.row().result["prompts"][0]["maps"])
        (((0, 0), (0, 1), (1, 0), (1, 1)), 2, 4)
    """
    start = None if base is None else base_values(model, base_of(base, model))
    options: dict[str, Any] = {"base": start, "n_samples": n_samples, "stack": stack, "progress": progress}
    statistics = attention_statistics(model, batches, objective, **options)
    shown = []
    for prompt in prompts:
        before = None
        if start is not None:
            with substituted(model, start):
                before = attention_maps(model, prompt.batch, stack=stack, name_tokens=name_tokens)
        present = attention_maps(model, prompt.batch, stack=stack, name_tokens=name_tokens)
        shown.append(PromptAttention(prompt.name, prompt.n_tokens, present, before))
    if heads == "all":
        heads = shown[0].maps.heads if shown else ()
    chosen = strongest_heads(statistics) if heads is None else tuple(heads)
    # Every process shows all prompts, which counts once.
    passes = len(shown) * (1 if base is None else 2)
    cost = statistics.cost + Cost(forwards=passes)
    return TrackedAttention(statistics, tuple(shown), chosen, n_singular_values, cost, stack)


def strongest_heads(statistics: AttentionStatistics) -> tuple[tuple[int, int], ...]:
    """The (layer, head) pair that is strongest of each kind, without repetition.

    Args:
        statistics: Of all heads.
    """
    strongest = [statistics.strongest(name) for name in KINDS]
    return tuple(dict.fromkeys(pair for pair in strongest if pair is not None))


def check_prompts(prompts: Mapping[str, str | Sequence[int]]) -> None:
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
        if not text and not all(isinstance(token, int) and not isinstance(token, bool) for token in content):
            raise ValueError(f"prompt {name!r} is a text or a list of token ids; got {content!r:.60}")
        if not len(content):
            raise ValueError(f"prompt {name!r} is empty")


def _rounded(values: Tensor, digits: int) -> Any:
    # Enough for a figure, in a third of the characters.
    return values.double().round(decimals=digits).tolist()


def _known(values: Tensor) -> list[float | None]:
    return [None if value != value else value for value in values.tolist()]
