"""What every attention head looks at, summed up over many batches, and how far that is from a base model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_goldy.analysis.agreement import per_sample, ratio_interval
from lightning_goldy.analysis.attention.patterns import describe_stack, show_patterns, to_device_of, with_decoder_tokens
from lightning_goldy.analysis.attention.rows import STATISTICS, Stack, Tokens, divergence_sums, statistic_sums
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.architecture import Architecture
from lightning_goldy.core.architecture.adapters import base_values
from lightning_goldy.core.base import Base, base_of
from lightning_goldy.core.batches import sample_keys, take_samples
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import require_at_least, require_choice
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.vector import ParameterVector, substituted

DEFAULT_MEMORY = 256 * 2**20


@dataclass(frozen=True)
class AttentionStatistics(AnalysisResult):
    """Statistics of every head, each a mean over queries.

    All tensors have the shape ``[layers, heads]``, float64; NaN where a layer has fewer heads, or no query has the
    statistic (no token occurs twice, for induction). The definitions are those of
    :func:`~lightning_goldy.analysis.attention.rows.statistic_sums`.

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

    Source: see :func:`~lightning_goldy.analysis.attention.rows.statistic_sums` and
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
    replicas = Replicas.of(model) if split_over_ranks else Replicas()
    with preserved(model), replicas.together("attention_statistics"):
        start = None if base is None else base_values(model, base_of(base, model))
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
        self, model: nn.Module, batch: Any, objective: Objective | None, base: ParameterVector | None, memory: int
    ) -> None:
        tokens, n_layers = Tokens.of(batch, self.stack), len(self.heads)
        self.samples.append(torch.zeros(2, len(tokens.ids), dtype=torch.float64, device=self.sums.device))
        self.keys += sample_keys(batch) if self.with_drift else ()
        per_group = n_layers if base is None else max(1, memory // pattern_bytes(tokens, max(self.heads)))
        for start in range(0, n_layers, per_group):
            layers = range(start, min(start + per_group, n_layers))
            before: dict[int, Tensor] = {}
            if base is not None:
                with substituted(model, base):
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
