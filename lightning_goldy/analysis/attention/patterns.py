"""Attention patterns: read under any kernel, summed up row by row, and kept of a few prompts with their spectra."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_goldy.analysis.divergence import jensen_shannon, precise
from lightning_goldy.analysis.result import AnalysisResult
from lightning_goldy.core.architecture import Architecture, UnsupportedArchitectureError, describe_architecture
from lightning_goldy.core.architecture.families import Attended, AttentionCall, AttentionKernelError, eager_attention
from lightning_goldy.core.architecture.gates import BatchMismatchError
from lightning_goldy.core.batches import batch_length, batch_tensors, map_batch
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.naming import model_class
from lightning_goldy.core.objective import (
    IGNORE_INDEX,
    Objective,
    accepts,
    document_ids,
    left_padding_positions,
    padding_mask,
    seen,
)
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.tasks import prompt_learning, transformers_model, virtual_tokens

Stack = Literal["encoder", "decoder"]

STATISTICS = (
    "entropy",
    "normalised_entropy",
    "distance",
    "first_token",
    "diagonal",
    "previous_token",
    "induction",
    "duplicate_token",
)
"""Names of the statistics, in the order of :func:`statistic_sums`."""

# Elements of a pattern that are worked on at a time; each takes about ten numbers beside the pattern.
_CHUNK = 1 << 22


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of a batch, which are no padding, and which occurred before.

    Args:
        ids: Token ids, shape ``[B, T]``.
        valid: True where a token is no padding, shape ``[B, T]``.
        documents: Numbers of the packed documents, rising along a row, shape ``[B, T]``; None for one in each row.

    Example:
        >>> tokens = Tokens(torch.tensor([[5, 6, 5, 6]]), torch.ones(1, 4, dtype=torch.bool))
        >>> tokens.earlier[0].nonzero().tolist(), tokens.followers[0].nonzero().tolist()
        ([[2, 0], [3, 1]], [[2, 1], [3, 2]])
    """

    ids: Tensor
    valid: Tensor
    documents: Tensor | None = None

    @classmethod
    def of(cls, batch: Any, stack: Stack | None = None) -> Tokens:
        """Those of a batch with ``input_ids``, its padding and its packed documents, told by its other tensors.

        Of a ``decoder`` with an encoder, ``decoder_input_ids`` and ``decoder_attention_mask``.

        Raises:
            ValueError: The batch is of another kind, the shapes differ, or a sample is all padding.
        """
        prefix = "decoder_" if stack == "decoder" else ""
        ids = batch.get(f"{prefix}input_ids") if isinstance(batch, Mapping) else None
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
            name = f"{prefix}input_ids"
            raise ValueError(f"attention needs batches that are dicts with {name!r} of shape [B, T]; got {found}")
        if stack == "decoder":
            batch = {"input_ids": ids, "attention_mask": decoder_mask(batch)}
        mask = batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim != 4 and mask.shape != ids.shape:
            raise ValueError(
                f"attention_mask must have the shape of input_ids, {tuple(ids.shape)}; got {tuple(mask.shape)}"
            )
        valid, documents = padding_mask(batch), document_ids(batch)
        if valid is None:
            return cls(ids, torch.ones_like(ids, dtype=torch.bool), documents)
        empty = valid.any(dim=1).logical_not().nonzero().flatten().tolist()
        if empty:
            raise ValueError(f"samples {empty[:5]} of a batch of {len(ids)} are all padding")
        return cls(ids, valid, documents)

    @property
    def first(self) -> Tensor:
        """Place of the first token of each token's own document that is no padding, shape ``[B, T]``.

        Example:
            >>> documents = torch.tensor([[0, 0, 0, 1, 1]])
            >>> Tokens(torch.ones(1, 5), torch.ones(1, 5, dtype=torch.bool), documents).first.tolist()
            [[0, 0, 0, 3, 3]]
        """
        numbers = torch.zeros_like(self.valid, dtype=torch.long) if self.documents is None else self.documents
        before = torch.where(self.valid, numbers, -1).cummax(dim=1).values.roll(1, dims=1)
        before[:, 0] = -1
        places = torch.arange(self.valid.shape[1], device=self.valid.device)
        return torch.where(self.valid & (numbers > before), places, 0).cummax(dim=1).values

    def first_document(self, row: int) -> Tensor:
        """Token ids of a row's first document without padding, shape ``[n]``."""
        kept = self.valid[row]
        if self.documents is not None:
            kept = kept & (self.documents[row] == self.documents[row][kept][0])
        return self.ids[row][kept]

    @property
    def earlier(self) -> Tensor:
        """Whether key s is an earlier occurrence of query t's token, shape ``[B, Tq, Tk]``."""
        same = self.ids[:, :, None] == self.ids[:, None, :]  # [B, Tq, Tk]
        return (same & self.valid[:, :, None] & self.valid[:, None, :]).tril(-1)

    @property
    def followers(self) -> Tensor:
        """Whether key s, before query t, comes right after an earlier occurrence of its token, ``[B, Tq, Tk]``."""
        shifted = self.earlier.roll(1, dims=2)  # [B, Tq, Tk]
        shifted[:, :, 0] = False
        return (shifted & self.valid[:, None, :]).tril(-1)

    def rows(self, start: int, stop: int) -> Tokens:
        """The samples from ``start`` up to ``stop``."""
        documents = None if self.documents is None else self.documents[start:stop]
        return Tokens(self.ids[start:stop], self.valid[start:stop], documents)


def decoder_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Which of a decoder's tokens are no padding, by its mask or by labels of -100 at a row's end; None for all.

    Example:
        >>> decoder_mask({"labels": torch.tensor([[5, -100, 6, -100, -100]])}).tolist()
        [[True, True, True, True, False]]
    """
    mask, labels = batch.get("decoder_attention_mask"), batch.get("labels")
    if mask is not None or not isinstance(labels, Tensor) or labels.ndim != 2:
        return mask
    ids = batch.get("decoder_input_ids")
    if isinstance(ids, Tensor) and ids.shape != labels.shape:
        return None
    # Token t stands before label t, so that it is the label before it.
    left = (labels != IGNORE_INDEX).flip(1).cummax(dim=1).values.flip(1)  # [B, T]
    return torch.cat([torch.ones_like(left[:, :1]), left[:, :-1]], dim=1)


def visible_keys(weights: Tensor, mask: Tensor | None) -> Tensor:
    """Which keys each query sees, the same for all heads.

    A key is hidden where a boolean mask is False, or where an additive one is so low that it stands for minus infinity:
    half the lowest number of its type and below, or -1e8 and below. What is above may be a bias by distance, which
    hides nothing. A row without a visible key is one of padding.

    Args:
        weights: Attention weights of one layer, shape ``[B, H, Tq, Tk]``.
        mask: That of the attention function, which broadcasts to them and may have more keys, as of a cache that is
            not full; None when every key is visible.

    Returns:
        Shape ``[B, Tq, Tk]``.

    Example:
        >>> distance = torch.tensor([[[[0.0, -1.0], [-1.0, 0.0]]]])
        >>> later = torch.tensor([[[[0.0, float("-inf")], [0.0, 0.0]]]])
        >>> visible_keys(torch.full((1, 1, 2, 2), 0.5), distance + later).tolist()
        [[[True, False], [True, True]]]
    """
    n_samples, _, length, n_keys = weights.shape
    if mask is None:
        return torch.ones(n_samples, length, n_keys, dtype=torch.bool, device=weights.device)
    mask = mask[..., :n_keys]
    return seen(mask).any(dim=1).expand(n_samples, length, n_keys)


def over_keys(weights: Tensor, mask: Tensor | None) -> Tensor:
    """The weights without columns that an attention sink has appended: those beyond the mask's keys.

    Example:
        >>> over_keys(torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 2, 2)).shape[-1]
        2
    """
    return weights if mask is None or mask.shape[-1] == 1 else weights[..., : mask.shape[-1]]


def entropies(weights: Tensor) -> Tensor:
    r"""Entropy :math:`-\sum_s a_s \log a_s` along the last dimension, nats; 0 log 0 is 0.

    Example:
        >>> round(entropies(torch.tensor([0.5, 0.5, 0.0])).item(), 6)
        0.693147
    """
    # Not torch.special.entr, which is several times slower on CPUs.
    return -(weights * weights.clamp_min(torch.finfo(weights.dtype).tiny).log()).sum(dim=-1)


def row_entropies(weights: Tensor, mask: Tensor | None, queries: Tensor | None) -> Tensor:
    r"""Mean normalised entropy of each head's attention rows, sample by sample.

    .. math:: \frac{1}{|R|} \sum_{t \in R} \frac{-\sum_s a_{ts} \log a_{ts}}{\log n_t}

    where n_t is how many keys query t sees and R are the queries that are no padding and see at least two.

    Args:
        weights: Attention weights, shape ``[B, H, Tq, Tk]``.
        mask: As for :func:`visible_keys`.
        queries: True where a query is no padding, shape ``[B, Tq]``; None when none is.

    Returns:
        Shape ``[B, H]``, a fraction in [0, 1] (1 is uniform attention) where rows add up to 1, which they do not beside
        an attention sink; NaN for samples without such a row.

    Example:
        >>> row_entropies(torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]]), None, None).item()
        0.5
    """
    weights = over_keys(weights, mask)
    n_visible = visible_keys(weights, mask).sum(dim=-1)  # [B, Tq]
    rows = n_visible > 1 if queries is None else (n_visible > 1) & queries
    shares = entropies(weights.float()) / n_visible.clamp_min(2).log()[:, None]  # [B, H, Tq]
    count = rows.sum(dim=-1, keepdim=True)  # [B, 1]
    return torch.where(rows[:, None], shares, 0.0).sum(dim=-1) / torch.where(count > 0, count, torch.nan)


def statistic_sums(weights: Tensor, mask: Tensor | None, tokens: Tokens) -> tuple[Tensor, Tensor]:
    r"""Sums of every statistic over the queries of one layer, and how many queries there are.

    With a query t and a key s, a_{ts} their attention weight, n_t the number of keys that t sees, x the tokens and f
    the first of t's own document that is no padding, over queries that are no padding:

    .. math::
        \text{entropy} &= -\sum_s a_{ts} \log a_{ts}, &
        \text{normalised} &= \text{entropy} / \log n_t \quad (n_t \ge 2) \\
        \text{distance} &= \sum_s a_{ts} \, |t - s|, &
        \text{first} &= a_{tf}, \quad \text{diagonal} = a_{tt} \\
        \text{previous} &= a_{t,t-1}, &
        \text{induction} &= \sum_{j < t - 1,\; x_j = x_t} a_{t,j+1} \\
        \text{duplicate} &= \sum_{j < t,\; x_j = x_t} a_{tj}

    The last three are taken only over queries that see such a key. An attention sink is no key: its share is missing
    from the row, whose weights add up to less than 1.

    Args:
        weights: Attention weights of one layer, shape ``[B, H, T, T]``.
        mask: As for :func:`visible_keys`.
        tokens: The batch.

    Returns:
        Sums, shape ``[statistics, H]``, and numbers of queries, shape ``[statistics]``; both float64.

    Raises:
        ValueError: There are other keys than queries, as with a cache or a learned prefix.

    Source: previous-token heads, and induction as prefix matching: Olsson et al. 2022, "In-context Learning and
    Induction Heads", arXiv 2209.11895, section "Key concepts"; duplicate-token heads: Wang et al. 2022,
    "Interpretability in the Wild", arXiv 2211.00593, section 3.

    Example:
        >>> tokens = Tokens(torch.tensor([[5, 6]]), torch.ones(1, 2, dtype=torch.bool))
        >>> sums, counts = statistic_sums(torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]]), None, tokens)
        >>> dict(zip(STATISTICS, sums[:, 0].tolist()))["distance"], counts.tolist()
        (0.5, [2.0, 2.0, 2.0, 2.0, 2.0, 1.0, 0.0, 0.0])
    """
    weights = over_keys(weights, mask)
    n_samples, n_heads, length, n_keys = weights.shape
    if (n_samples, length) != tuple(tokens.ids.shape) or n_keys != length:
        raise ValueError(
            f"attention of shape {tuple(weights.shape)} does not belong to {tuple(tokens.ids.shape)} tokens: a batch's "
            "rows must go through the model together, without a cache or a learned prefix"
        )
    visible = visible_keys(weights, mask)
    sums = torch.zeros(len(STATISTICS), n_heads, dtype=torch.float64, device=weights.device)
    counts = torch.zeros(len(STATISTICS), dtype=torch.float64, device=weights.device)
    for start, stop in chunks(weights):
        values, rows = _statistics(weights[start:stop], visible[start:stop], tokens.rows(start, stop))
        sums += torch.where(rows[:, :, None], values, 0.0).sum(dim=(1, 3), dtype=torch.float64)
        counts += rows.sum(dim=(1, 2), dtype=torch.float64)
    return sums, counts


def divergence_sums(first: Tensor, second: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Jensen-Shannon divergences between two patterns, summed over each sample's queries that are no padding.

    What an attention sink takes is one more place to look at, whether its column is there or left out.

    Args:
        first: Attention weights of one layer, shape ``[B, H, T, T]``.
        second: Others of that shape.
        tokens: The batch.

    Returns:
        Sums, shape ``[B, H]``, nats, and the numbers of queries, shape ``[B]``; both float64.
    """
    total = torch.zeros(first.shape[:2], dtype=torch.float64, device=first.device)
    for start, stop in chunks(first):
        values = jensen_shannon(*_with_sinks(first[start:stop], second[start:stop]))  # [B, H, T]
        total[start:stop] = torch.where(tokens.valid[start:stop, None], values, 0.0).sum(dim=2, dtype=torch.float64)
    return total, tokens.valid.sum(dim=1, dtype=torch.float64)


def _with_sinks(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both patterns with a column of what their rows lack of 1, where either lacks more than rounding takes."""
    rounding = max(torch.finfo(first.dtype).eps, 4 * torch.finfo(torch.float32).eps)
    missing = [1 - each.sum(dim=-1, keepdim=True, dtype=torch.float64) for each in (first, second)]
    if all(bool((share <= rounding).all()) for share in missing):
        return first, second
    shares = (torch.where(share > rounding, share, 0.0).to(first.dtype) for share in missing)
    pairs = zip((first, second), shares, strict=True)
    whole, other = (torch.cat([weights, share], dim=-1) for weights, share in pairs)
    return whole, other


def chunks(weights: Tensor) -> Iterator[tuple[int, int]]:
    """Ranges of samples that are small enough to be worked on together."""
    size = max(1, _CHUNK // max(1, math.prod(weights.shape[1:])))
    for start in range(0, len(weights), size):
        yield start, min(start + size, len(weights))


def _statistics(weights: Tensor, visible: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """Each statistic of each query, shape ``[statistics, B, H, T]``, and where it exists, ``[statistics, B, T]``."""
    weights, valid = precise(weights), tokens.valid
    _, n_heads, length, _ = weights.shape
    entropy = entropies(weights)  # [B, H, T]
    n_visible = visible.sum(dim=-1)  # [B, T]
    places = torch.arange(length, device=weights.device, dtype=weights.dtype)
    distance = torch.einsum("bhts,ts->bht", weights, (places[:, None] - places[None, :]).abs())
    first = tokens.first[:, :, None]  # [B, T, 1]
    previous = torch.zeros_like(entropy)
    previous[..., 1:] = weights.diagonal(offset=-1, dim1=-2, dim2=-1)
    has_previous = torch.zeros_like(valid)
    has_previous[:, 1:] = valid[:, :-1] & visible.diagonal(offset=-1, dim1=-2, dim2=-1)
    followers, earlier = tokens.followers & visible, tokens.earlier & visible
    values = (
        entropy,
        entropy / n_visible.clamp_min(2).log()[:, None],
        distance,
        weights.gather(-1, first[:, None].expand(-1, n_heads, -1, -1)).squeeze(-1),
        weights.diagonal(dim1=-2, dim2=-1),
        previous,
        torch.einsum("bhts,bts->bht", weights, followers.to(weights.dtype)),
        torch.einsum("bhts,bts->bht", weights, earlier.to(weights.dtype)),
    )
    rows = (
        valid,
        valid & (n_visible > 1),
        valid,
        valid,
        valid,
        valid & has_previous,
        valid & followers.any(dim=-1),
        valid & earlier.any(dim=-1),
    )
    return torch.stack(values), torch.stack(rows)


NameTokens = Callable[[Sequence[int]], Sequence[str]]
Sink = Callable[[nn.Module, Tensor, "Tensor | None"], None]
"""``sink(attention module, weights [B, H, Tq, Tk], additive mask [B, 1, Tq, Tk])``"""
LayerSink = Callable[[int, Tensor, "Tensor | None"], None]
"""``sink(layer, weights [B, H, T, T], additive mask [B, 1, T, T])``"""


@dataclass(frozen=True)
class AttentionMaps(AnalysisResult):
    """Attention patterns of every head of some layers on one batch.

    Args:
        layers: Indices of the layers.
        patterns: Softmax weights of each layer, shape ``[B, H, T, T]``, rows are queries; at least float32, on the CPU.
        valid: True where a token is no padding, shape ``[B, T]``.
        tokens: What each token is called, for each sample, padding included.
    """

    layers: tuple[int, ...]
    patterns: tuple[Tensor, ...]
    valid: Tensor
    tokens: tuple[tuple[str, ...], ...]

    @property
    def heads(self) -> tuple[tuple[int, int], ...]:
        """All (layer, head) pairs, in order of depth."""
        pairs = zip(self.layers, self.patterns, strict=True)
        return tuple((layer, head) for layer, pattern in pairs for head in range(pattern.shape[1]))

    def pattern(self, layer: int, head: int, *, sample: int = 0) -> Tensor:
        """What one head attends to, without padding.

        Args:
            layer: One of ``layers``.
            head: From 0.
            sample: Row of the batch.

        Returns:
            Shape ``[n, n]`` with n the sample's tokens; rows are queries and sum to 1.

        Raises:
            IndexError: There is no such layer, head or sample.
        """
        if layer not in self.layers:
            raise IndexError(f"layer {layer} was not recorded; those recorded: {list(self.layers)}")
        pattern = self.patterns[self.layers.index(layer)]
        for what, value, count in (("head", head, pattern.shape[1]), ("sample", sample, len(pattern))):
            if not 0 <= value < count:
                raise IndexError(f"{what} {value}: there are {count}, from 0 to {count - 1}")
        kept = self.valid[sample]
        return pattern[sample, head][kept][:, kept]

    def token_names(self, sample: int = 0) -> tuple[str, ...]:
        """Names of a sample's tokens without padding, in the order of :meth:`pattern`'s rows."""
        kept = self.valid[sample].tolist()
        return tuple(name for name, keep in zip(self.tokens[sample], kept, strict=True) if keep)

    def singular_values(self, top: int = 4, *, sample: int = 0) -> Tensor:
        """Largest singular values of each head's pattern on one sample, padding left out.

        A head that looks at the same place from everywhere has one large value (of the order of the root of the number
        of tokens); one that shifts, as a previous-token head, has many values of 1.

        Args:
            top: How many values.
            sample: Row of the batch.

        Returns:
            Shape ``[layers, heads, top]``, descending, float64; NaN beyond a layer's heads or the number of tokens.

        Raises:
            ValueError: ``top`` is below 1.
        """
        if top < 1:
            raise ValueError(f"top must be at least 1; got {top}")
        most = max(pattern.shape[1] for pattern in self.patterns)
        values = torch.full((len(self.layers), most, top), math.nan, dtype=torch.float64)
        kept = self.valid[sample]
        for index, pattern in enumerate(self.patterns):
            known = torch.linalg.svdvals(pattern[sample][:, kept][:, :, kept].double())[:, :top]  # [H, min(n, top)]
            values[index, : known.shape[0], : known.shape[1]] = known
        return values


def attention_maps(
    model: nn.Module,
    batch: Any,
    objective: Objective | None = None,
    *,
    layers: Sequence[int] | None = None,
    stack: Stack | None = None,
    name_tokens: NameTokens | None = None,
) -> AttentionMaps:
    """Records what every head attends to, under any attention kernel.

    The patterns are the family's own eager softmax weights, in evaluation mode. All of them are kept: this is for a few
    short prompts, :func:`~lightning_goldy.analysis.attention_statistics` for everything else. The model comes
    back as it was; under FSDP2 every rank must call.

    Args:
        model: A transformers model or anything that contains one.
        batch: A dict with ``input_ids`` of shape ``[B, T]`` and optionally ``attention_mask``.
        objective: How the model is called; by default with everything of the batch but its labels.
        layers: Only these blocks; all by default.
        stack: Of an encoder-decoder the ``encoder`` or the ``decoder``, whose batches have ``decoder_input_ids`` or
            ``labels``.
        name_tokens: Turns a list of token ids into as many labels, such as a tokenizer's ``convert_ids_to_tokens``; by
            default the ids themselves are shown.

    Returns:
        The patterns, on the CPU.

    Raises:
        UnsupportedArchitectureError: The family's patterns cannot be read; it is named.
        ValueError: The batch is of another kind, a layer does not exist, or a pattern is not finite.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> maps = attention_maps(GPT2LMHeadModel(config), {"input_ids": torch.tensor([[1, 2, 3]])})
        >>> maps.pattern(1, 0)[0].tolist(), maps.token_names()
        ([1.0, 0.0, 0.0], ('1', '2', '3'))
    """
    with preserved(model), Replicas.of(model).together("attention_maps"):
        architecture = describe_stack(model, stack)
        known = [block.index for block in architecture.attention_blocks]
        chosen = known if layers is None else sorted(set(layers))
        for layer in chosen:
            if layer not in known:
                count = len(architecture.blocks)
                have = "" if len(known) == count else f", with attention {known}"
                raise ValueError(f"layers: there is no layer {layer}; the model has {count}, from 0{have}")
        batch = with_decoder_tokens(model, batch, stack)
        tokens = Tokens.of(batch, stack)
        names = []
        for row in tokens.ids.tolist():
            names.append(tuple(map(str, row if name_tokens is None else name_tokens(row))))
            if len(names[-1]) != len(row):
                raise ValueError(f"name_tokens gave {len(names[-1])} names for {len(row)} tokens")
        patterns: dict[int, Tensor] = {}

        def keep(layer: int, weights: Tensor, mask: Tensor | None) -> None:
            patterns[layer] = weights.to(torch.promote_types(weights.dtype, torch.float32)).cpu()

        show_patterns(model, architecture, to_device_of(model, batch), objective, keep, layers=chosen)
    for layer, pattern in patterns.items():
        if not bool(torch.isfinite(pattern).all()):
            raise ValueError(f"the attention of layer {layer} is not finite")
    return AttentionMaps(tuple(chosen), tuple(patterns[layer] for layer in chosen), tokens.valid.cpu(), tuple(names))


def describe_stack(model: nn.Module, stack: Stack | None) -> Architecture:
    """The blocks whose attention is over one sequence of tokens.

    Raises:
        UnsupportedArchitectureError: The model has two stacks, and none is named.
    """
    kind, count = prompt_learning(model)
    if kind:
        raise UnsupportedArchitectureError(
            f"PEFT's {kind} puts {count} learned keys before a batch's own, for which there are no tokens, so its "
            "attention patterns cannot be read; read those of the model without them inside "
            "`with model.disable_adapter():`"
        )
    architecture = describe_architecture(model, stack=stack)
    if len(architecture.stacks) > 1:
        raise UnsupportedArchitectureError(
            f"{model_class(model)} has an encoder and a decoder, which attend to different tokens: pass "
            "stack='encoder' or stack='decoder'"
        )
    return architecture


def with_decoder_tokens(model: nn.Module, batch: Any, stack: Stack | None) -> Any:
    """The batch of an encoder-decoder with ``decoder_input_ids``, made by the model's own rule where it has none.

    Args:
        model: The model.
        batch: Without them, but with ``labels``; of the ``encoder``, whose attention they do not move, with neither.
        stack: Which stack is read; None leaves the batch as it is.
    """
    if stack is None or not isinstance(batch, Mapping) or batch.get("decoder_input_ids") is not None:
        return batch
    inner, labels = transformers_model(model), batch.get("labels")
    if labels is not None and (shifted := _shifted(inner, labels)) is not None:
        return {**batch, "decoder_input_ids": shifted}
    if stack == "decoder" or batch.get("decoder_inputs_embeds") is not None:
        return batch
    start = getattr(getattr(inner, "config", None), "decoder_start_token_id", None) or 0
    first = next(batch_tensors(batch))
    return {**batch, "decoder_input_ids": torch.full((len(first), 1), start, device=first.device)}


class UnreadableAttentionError(UnsupportedArchitectureError):
    """A model's attention patterns cannot be read.

    Args:
        reason: Which model, and why; the message adds what the importance of heads can be had from instead.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.reason}; use a strategy that needs gradients or losses only: magnitude, taylor, ablation, random"


@contextmanager
def recorded_attention(model: nn.Module, sink: Sink) -> Iterator[None]:
    """Shows every attention pattern to a function, computed by the family's own eager attention.

    Args:
        model: A transformers model or anything that contains one; its implementation is restored after.
        sink: Called once per attention function, in order.

    Raises:
        UnreadableAttentionError: The model does not take its attention function from ``AttentionInterface``.
    """

    def shown(call: AttentionCall, compute: Callable[[], Attended]) -> Attended:
        heads, weights = compute()
        if weights is None:
            raise AttentionKernelError(f"{model_class(call.module)} gives no attention weights")
        sink(call.module, weights, call.mask)
        return heads, weights

    try:
        with eager_attention(model, shown):
            yield
    except AttentionKernelError as error:
        raise UnreadableAttentionError(f"{error}, so its attention patterns cannot be read") from error


def show_patterns(
    model: nn.Module,
    architecture: Architecture,
    batch: Any,
    objective: Objective | None,
    sink: LayerSink,
    *,
    layers: Collection[int] | None = None,
) -> None:
    """Runs the model once on a batch and shows each layer's pattern as soon as it exists.

    Args:
        model: In evaluation mode.
        architecture: Its blocks.
        batch: On the model's device.
        objective: Calls the model; None calls it with everything of the batch but its labels.
        sink: Called once per layer, in order; it must not keep more than it needs.
        layers: Only these; all by default.

    Raises:
        UnsupportedArchitectureError: The patterns of a layer cannot be read.
        ValueError: A layer ran more than once.
    """
    attended = {block.index for block in architecture.attention_blocks}
    wanted = attended if layers is None else attended & set(layers)
    if not wanted:
        return
    owners = _layers(architecture)
    seen: set[int] = set()

    def show(module: nn.Module, weights: Tensor, mask: Tensor | None) -> None:
        layer = owners.get(id(module))
        if layer is None or layer not in wanted:
            return
        if layer in seen:
            raise ValueError(
                f"layer {layer} ran its attention twice in one pass over a batch; its rows must go through together"
            )
        seen.add(layer)
        sink(layer, weights.detach(), mask)

    try:
        with recorded_attention(model, show), torch.no_grad():
            _call(model, batch, objective)
    except UnreadableAttentionError as error:
        raise UnsupportedArchitectureError(
            f"{error.reason}; attention can be read of transformers families that take their attention function from "
            "AttentionInterface, such as gpt2, llama, gpt_neox, qwen3, gemma3_text, bert"
        ) from error
    missing = sorted(wanted - seen)
    if missing:
        raise UnsupportedArchitectureError(
            f"{model_class(model)}: layers {missing} computed their attention in another way than through "
            "AttentionInterface, so their patterns cannot be read"
        )


@contextmanager
def recorded_entropies(model: nn.Module, architecture: Architecture, batch: Any) -> Iterator[list[Tensor]]:
    """Gathers the entropies of one forward pass, layer by layer, shape ``[B, H]`` each; all are there after the block.

    Args:
        model: Runs within the block.
        architecture: Whose attention modules are told apart.
        batch: What it runs on; its ``attention_mask`` says which queries are padding.

    Raises:
        BatchMismatchError: When the model is called with another number of rows.
        UnreadableAttentionError: A layer computed its attention in another way.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.core.architecture import describe_architecture
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> model = GPT2LMHeadModel(config).eval()
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3]])}
        >>> with recorded_entropies(model, describe_architecture(model), batch) as layers, torch.no_grad():
        ...     _ = model(**batch)
        >>> [tuple(layer.shape) for layer in layers]
        [(1, 2), (1, 2)]
    """
    n_samples, owners = batch_length(batch), _layers(architecture)
    queries = {stack: _queries(model, batch, stack) for stack in ("encoder", "decoder")}
    found: dict[int, Tensor] = {}
    entropies: list[Tensor] = []

    def sink(module: nn.Module, weights: Tensor, additive: Tensor | None) -> None:
        layer = owners.get(id(module))
        if layer is not None:
            if len(weights) != n_samples:
                raise BatchMismatchError(f"{n_samples} samples gave attention of shape {tuple(weights.shape)}")
            inside = "decoder" in architecture.blocks[layer].name.split(".") and len(architecture.stacks) > 0
            mask = queries["decoder" if inside else "encoder"]
            found[layer] = row_entropies(weights.detach(), additive, mask)

    with recorded_attention(model, sink):
        yield entropies
    for block in architecture.attention_blocks:
        if block.index not in found:
            raise UnreadableAttentionError(
                f"{model_class(block.attention)} ignores set_attn_implementation in {block.attention_name!r}, so "
                "its attention patterns cannot be read"
            )
    none = next(iter(found.values()))[:, :0]
    entropies.extend(found.get(block.index, none) for block in architecture.blocks)


def _shifted(model: Any, labels: Tensor) -> Tensor | None:
    """Labels as the decoder reads them, by the method or the function that the family has for it."""
    method = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if method is not None:
        return method(labels=labels)
    function = getattr(sys.modules.get(type(model).__module__), "shift_tokens_right", None)
    if function is None or labels.ndim != 2:
        return None
    return function(labels, model.config.pad_token_id, model.config.decoder_start_token_id)


def _queries(model: nn.Module, batch: Any, stack: str) -> Tensor | None:
    """Which queries of a stack (of a model with one, ``encoder``) are of a batch's tokens and no padding."""
    if not isinstance(batch, Mapping):
        return None
    if stack == "decoder":
        return decoder_mask(batch)
    mask = padding_mask(batch) if "input_ids" in batch else None
    count = virtual_tokens(model)
    if count and isinstance(ids := batch.get("input_ids"), Tensor):
        mask = F.pad(torch.ones_like(ids, dtype=torch.bool) if mask is None else mask, (count, 0), value=False)
    return mask


def to_device_of(model: nn.Module, batch: Any) -> Any:
    """The batch where the model's parameters are."""
    device = next(model.parameters()).device
    return map_batch(batch, lambda tensor: tensor.to(device))


def _layers(architecture: Architecture) -> dict[int, int]:
    """The layer of every module that may be what an attention function is called for, by identity."""
    return {id(part): block.index for block in architecture.attention_blocks for part in block.attention.modules()}


def _call(model: nn.Module, batch: Any, objective: Objective | None) -> None:
    if objective is not None:
        objective.loss(model, batch)
        return
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key != "labels"}
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and "position_ids" not in inputs and accepts(model, "position_ids"):
        inputs.update(left_padding_positions(mask))
    if accepts(model, "use_cache"):
        inputs["use_cache"] = False
    model(**inputs)
