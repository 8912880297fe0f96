"""What every attention head looks at, over many batches and at one step of a run, and how far that is from a base's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import per_sample, ratio_interval
from lightning_goldy.analysis.attention.patterns import (
    STATISTICS,
    AttentionMaps,
    NameTokens,
    Stack,
    Tokens,
    attention_maps,
    describe_stack,
    divergence_sums,
    show_patterns,
    statistic_sums,
    to_device_of,
    with_decoder_tokens,
)
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.architecture import Architecture
from lightning_goldy.core.architecture.adapters import base_run, base_within
from lightning_goldy.core.base import Base
from lightning_goldy.core.batches import sample_keys, take_samples
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import require_at_least, require_choice
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import Replicas, inside_parallel

DEFAULT_MEMORY = 256 * 2**20


@dataclass(frozen=True)
class AttentionStatistics(AnalysisResult):
    """Statistics of every head, each a mean over queries.

    All tensors have the shape ``[layers, heads]``, float64; NaN where a layer has fewer heads, or no query has the
    statistic (no token occurs twice, for induction). The definitions are those of
    :func:`~lightning_goldy.analysis.attention.patterns.statistic_sums`.

    Args:
        entropy: Of the attention rows, nats.
        normalised_entropy: Entropy over the logarithm of the number of visible keys, a fraction; 1 is uniform.
        distance: Mean distance between query and key, tokens.
        first_token: Mass on the first token of the query's own document, a fraction.
        diagonal: Mass on the query's own token, a fraction.
        previous_token: Mass on the token right before, a fraction.
        induction: Mass on tokens that follow earlier occurrences of the query's token, a fraction.
        duplicate_token: Mass on those earlier occurrences, a fraction.
        drift: Jensen-Shannon divergence from the base's rows, nats in [0, log 2]; None without a base.
        queries: Queries that each statistic is a mean over, shape ``[layers, statistics]``, int64.
        n_samples: Samples.
        cost: Passes, the base's included.
        drift_interval: 95 % interval of the mean drift over samples, by the jackknife; None without a base or drift.
        drift_samples: What the mean drift is of each sample; None without a base.
    """

    entropy: Tensor
    normalised_entropy: Tensor
    distance: Tensor
    first_token: Tensor
    diagonal: Tensor
    previous_token: Tensor
    induction: Tensor
    duplicate_token: Tensor
    drift: Tensor | None
    queries: Tensor
    n_samples: int
    cost: Cost = field(default=Cost(), compare=False)
    drift_interval: tuple[float, float] | None = None
    drift_samples: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def passes(self) -> int:
        """Deprecated: ``cost.forwards``, which counts samples."""
        warnings.warn("AttentionStatistics.passes has become cost.forwards", DeprecationWarning, stacklevel=2)
        return self.cost.forwards

    @property
    def names(self) -> tuple[str, ...]:
        """The statistics that there are: ``STATISTICS``, and ``drift`` with a base."""
        return STATISTICS if self.drift is None else (*STATISTICS, "drift")

    def statistic(self, name: str) -> Tensor:
        """One statistic, shape ``[layers, heads]``.

        Raises:
            ValueError: There is none of that name.
        """
        require_choice("statistic", name, self.names)
        return getattr(self, name)

    def mean(self, name: str) -> float:
        """Mean of a statistic over all heads that have it; NaN when none has."""
        return float(self.statistic(name).nanmean())

    def strongest(self, name: str) -> tuple[int, int] | None:
        """The (layer, head) with the largest value, the first of equals; None when no head has the statistic."""
        values = self.statistic(name)
        if bool(values.isnan().all()):
            return None
        place = int(values.nan_to_num(-math.inf).argmax())
        return place // values.shape[1], place % values.shape[1]


def attention_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    objective: Objective | None = None,
    *,
    base: Base | None = None,
    n_samples: int | None = None,
    stack: Stack | None = None,
    memory: int = DEFAULT_MEMORY,
    progress: Callable[[int, int], None] | None = None,
    split_over_ranks: bool = True,
) -> AttentionStatistics:
    r"""Measures every head's attention over all queries that are no padding, under any attention kernel.

    Sums are streamed in float64: beside the model there is one layer's pattern at a time. With a base the patterns of
    up to ``memory`` bytes wait for the present ones, which takes two passes per piece of a batch (and two more for each
    further group of layers, where one sample's patterns alone are larger). The model comes back as it was. On several
    ranks the pieces are shared out and the sums added; every rank must call.

    Args:
        model: A transformers model or anything that contains one.
        batches: Dicts with ``input_ids`` of shape ``[B, T]`` and optionally ``attention_mask``; read once, the same on
            every rank.
        objective: How the model is called; by default with everything of a batch but its labels.
        base: The base model, for the drift: anything that :func:`~lightning_goldy.core.base.base_of` takes.
        n_samples: Use only the first so many samples; all by default.
        stack: Of an encoder-decoder the ``encoder`` or the ``decoder``, whose batches have ``decoder_input_ids`` or
            ``labels``.
        memory: Bytes that the base's waiting patterns may take.
        progress: Called with (batches read, batches in all), when there are as many as ``len`` says.
        split_over_ranks: Whether to share pieces out over the ranks of an initialised process group.

    Returns:
        Means over queries of each head's statistics.

    Raises:
        UnsupportedArchitectureError: The family's patterns cannot be read; it is named.
        SpaceError: The base is that of another model.
        TypeError: It cannot be a base.
        ValueError: An argument is out of range, there are too few samples, or a pattern is not finite.

    Source: see :func:`~lightning_goldy.analysis.attention.patterns.statistic_sums` and
    :func:`~lightning_goldy.analysis.divergence.jensen_shannon`.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config)
        >>> result = attention_statistics(model, [{"input_ids": torch.tensor([[1, 2, 1, 2]])}])
        >>> result.entropy.shape, result.drift, bool((result.induction > 0).all())
        (torch.Size([2, 2]), None, True)
    """
    check_statistics_arguments(n_samples, memory)
    model = inside_parallel(model)
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    with preserved(model), replicas.together("attention_statistics"):
        start = None if base is None else base_run(model, base)
        architecture = describe_stack(model, stack)
        device = next(model.parameters()).device
        sums = _Sums(architecture, device, stack, with_drift=start is not None)
        done = pieces = 0
        for index, batch in enumerate(batches, 1):
            if n_samples is not None and done >= n_samples:
                break
            batch = with_decoder_tokens(model, batch, stack)
            rows = len(Tokens.of(batch, stack).ids)
            kept = rows if n_samples is None else min(rows, n_samples - done)
            for piece in _pieces(batch, kept, architecture, memory if start is not None else None, stack):
                if pieces % replicas.size == replicas.rank:
                    sums.add(model, to_device_of(model, piece), objective, start, memory)
                pieces += 1
            done += kept
            if progress is not None and isinstance(batches, Sized):
                progress(index, len(batches))
        if not done:
            raise ValueError("there is no sample: the batches are empty")
        if n_samples is not None and done < n_samples:
            raise ValueError(f"n_samples={n_samples}, but the batches hold only {done} samples")
    return sums.result(replicas, done)


def check_statistics_arguments(n_samples: int | None, memory: int = DEFAULT_MEMORY) -> None:
    """Checks what can be checked before there is a model.

    Raises:
        ValueError: An argument is out of range.
    """
    if n_samples is not None:
        require_at_least("n_samples", n_samples, 1)
    if memory < 1:
        raise ValueError(f"memory is a number of bytes, at least 1; got {memory}")


class _Sums:
    """Sums over queries, by layer, head and statistic."""

    def __init__(
        self, architecture: Architecture, device: torch.device, stack: Stack | None, *, with_drift: bool
    ) -> None:
        self.architecture, self.stack, self.with_drift = architecture, stack, with_drift
        self.heads = [block.n_heads for block in architecture.blocks]
        shape = (len(self.heads), len(STATISTICS) + with_drift)
        self.sums = torch.zeros(*shape, max(self.heads), dtype=torch.float64, device=device)
        self.counts = torch.zeros(shape, dtype=torch.float64, device=device)
        self.forwards = torch.zeros(1, dtype=torch.float64, device=device)
        # Of each piece the samples' drift, summed over layers, heads and queries, and their numbers of queries.
        self.samples: list[Tensor] = []
        self.keys: list[str] = []

    def add(
        self,
        model: nn.Module,
        batch: Any,
        objective: Objective | None,
        base: Callable[[], AbstractContextManager[Any]] | None,
        memory: int,
    ) -> None:
        tokens, n_layers = Tokens.of(batch, self.stack), len(self.heads)
        self.samples.append(torch.zeros(2, len(tokens.ids), dtype=torch.float64, device=self.sums.device))
        self.keys += sample_keys(batch) if self.with_drift else ()
        per_group = n_layers if base is None else max(1, memory // pattern_bytes(tokens, max(self.heads)))
        for start in range(0, n_layers, per_group):
            layers = range(start, min(start + per_group, n_layers))
            before: dict[int, Tensor] = {}
            if base is not None:
                with base():
                    show_patterns(model, self.architecture, batch, objective, partial(_keep, before), layers=layers)
            take = partial(self._take, tokens, before)
            show_patterns(model, self.architecture, batch, objective, take, layers=layers)
            self.forwards += len(tokens.ids) * (1 if base is None else 2)

    def _take(
        self, tokens: Tokens, waiting: dict[int, Tensor], layer: int, weights: Tensor, mask: Tensor | None
    ) -> None:
        before = waiting.pop(layer, None)
        sums, counts = statistic_sums(weights, mask, tokens)
        self.sums[layer, : len(STATISTICS), : sums.shape[1]] += sums
        self.counts[layer, : len(STATISTICS)] += counts
        if before is not None:
            drift, count = divergence_sums(weights, before, tokens)
            self.sums[layer, -1, : drift.shape[1]] += drift.sum(dim=0)
            self.counts[layer, -1] += count.sum()
            self.samples[-1][0] += drift.sum(dim=1)
            self.samples[-1][1] += count * drift.shape[1]

    def result(self, replicas: Replicas, n_samples: int) -> AttentionStatistics:
        sums, counts = replicas.sum_(self.sums).cpu(), replicas.sum_(self.counts).cpu()
        broken = (~torch.isfinite(sums)).any(dim=1).nonzero().tolist()
        if broken:
            layer, head = broken[0]
            raise ValueError(f"the attention of layer {layer}, head {head} is not finite")
        means = sums / torch.where(counts > 0, counts, math.nan)[:, :, None]  # [layers, statistics, heads]
        for layer, count in enumerate(self.heads):
            means[layer, :, count:] = math.nan
        named = {name: means[:, index].clone() for index, name in enumerate(STATISTICS)}
        drift = means[:, -1].clone() if self.with_drift else None
        queries = counts[:, : len(STATISTICS)].long()
        cost = Cost(forwards=int(replicas.sum_(self.forwards)))
        interval = samples = None
        if self.with_drift:
            parts = replicas.gather_objects(([piece.tolist() for piece in self.samples], self.keys))
            gathered = [pieces for pieces, _ in parts]
            moved, over = (
                [value for pieces in gathered for piece in pieces for value in piece[side]] for side in (0, 1)
            )
            interval = ratio_interval(moved, over)
            # Heads count alike, as in the mean of their drifts.
            samples = per_sample([key for _, keys in parts for key in keys], moved, over)
        return AttentionStatistics(
            **named,
            drift=drift,
            queries=queries,
            n_samples=n_samples,
            cost=cost,
            drift_interval=interval,
            drift_samples=samples,
        )


def _keep(waiting: dict[int, Tensor], layer: int, weights: Tensor, mask: Tensor | None) -> None:
    waiting[layer] = weights


def pattern_bytes(tokens: Tokens, n_heads: int) -> int:
    """Upper bound of the memory of one layer's patterns of a batch, bytes."""
    n_samples, length = tokens.ids.shape
    return n_samples * n_heads * length * length * 4


def _pieces(
    batch: Any, rows: int, architecture: Architecture, memory: int | None, stack: Stack | None
) -> Iterator[Any]:
    """The first rows of a batch, in pieces of which all layers' patterns fit into the memory, or single rows."""
    size = rows
    if memory is not None:
        one = Tokens.of(batch, stack).rows(0, 1)
        size = max(1, memory // sum(pattern_bytes(one, block.n_heads) for block in architecture.blocks))
    if rows == len(Tokens.of(batch, stack).ids) <= size:
        yield batch  # whole, with what describes its packed documents
        return
    for start in range(0, rows, size):
        yield take_samples(batch, slice(start, min(start + size, rows)))


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
    model = inside_parallel(model)
    start = None if base is None else base_within(base, model)
    options: dict[str, Any] = {"base": start, "n_samples": n_samples, "stack": stack, "progress": progress}
    statistics = attention_statistics(model, batches, objective, **options)
    at_base = None if start is None or not prompts else base_run(model, start)
    shown = []
    for prompt in prompts:
        before = None
        if at_base is not None:
            with at_base():
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
