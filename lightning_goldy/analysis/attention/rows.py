"""What each row of an attention pattern looks at: entropy, distance, and shares of its mass, summed over queries."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_goldy.analysis.divergence import jensen_shannon, precise
from lightning_goldy.core.objective import IGNORE_INDEX, document_ids, padding_mask, seen

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
