"""A coupling matrix, how far it moved from another, and whether answers, relations and questions account for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_goldy.analysis.agreement import agreement_of
from lightning_goldy.analysis.divergence import effective_rank
from lightning_goldy.analysis.result import AnalysisResult, Cost
from lightning_goldy.core.naming import block_of, suggestion

# Rows of the matrix that are worked on at a time.
ROWS = 1024


@dataclass(frozen=True)
class CouplingResult(AnalysisResult):
    r"""How alike pieces are, pair by pair.

    Args:
        matrix: Shape ``[N, N]``, in the order of the pieces: cosines, or with ``normalize=False`` inner products;
            float32, of a float64 model float64. NaN in the rows and columns of pieces that failed.
        norms: Shape ``[N]``, float64: norms of the gradients (nats per parameter unit), centred ones with ``center``;
            of activations for ``measure="activation"``. NaN where a piece failed.
        log_probs: Shape ``[N]``, float64: mean log-probability of each answer, nats.
        pieces: Of each piece ``id``, ``question``, ``answer``, ``category``, ``group`` and ``hop``; all but the id None
            where pieces came as batches.
        failed: Of each piece that failed its ``index``, ``id`` and ``reason``.
        parameters: Canonical names of the tensors that gradients were taken with respect to.
        measure: ``gradient`` or ``activation``.
        normalize: Whether the matrix holds cosines.
        center: Whether the mean over pieces was subtracted.
        projection: Dimensions of the random projection; None where the matrix is exact.
        projection_error: Bound on the root mean square error of a cosine that the projection makes, before centring;
            None without one.
        seconds: What it took on this process.
        cost: Passes that were made to their end: those of a first piece that every process tries, and those of pieces
            that failed later, among them; not those of blocks that a workspace had already.
    """

    matrix: Tensor
    norms: Tensor
    log_probs: Tensor
    pieces: tuple[dict[str, Any], ...]
    failed: tuple[dict[str, Any], ...]
    parameters: tuple[str, ...]
    measure: Literal["gradient", "activation"]
    normalize: bool
    center: bool
    projection: int | None
    projection_error: float | None
    seconds: float
    cost: Cost = field(default_factory=Cost)

    def __len__(self) -> int:
        return len(self.pieces)

    @property
    def ids(self) -> tuple[str, ...]:
        """The pieces' ids."""
        return self.column("id")

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the blocks that the parameters belong to."""
        return tuple(dict.fromkeys(map(block_of, self.parameters)))

    @property
    def n_layers(self) -> int:
        """Number of those blocks."""
        return len(self.layers)

    @property
    def valid(self) -> Tensor:
        """Which pieces did not fail, shape ``[N]``, boolean."""
        return torch.isfinite(self.norms)

    @property
    def cosines(self) -> Tensor:
        """The cosines, also where the matrix holds inner products."""
        return (
            self.matrix
            if self.normalize
            else cosines_of_gram(self.matrix.to(torch.float64, copy=True), self.norms).to(self.matrix.dtype)
        )

    def column(self, name: str) -> tuple[Any, ...]:
        """One value per piece.

        Args:
            name: ``id``, ``question``, ``answer``, ``category``, ``group`` or ``hop``.

        Raises:
            ValueError: There is no such column.
        """
        valid = ("id", "question", "answer", "category", "group", "hop")
        if name not in valid:
            raise ValueError(f"unknown column {name!r}; {suggestion(name, valid)}")
        return tuple(piece[name] for piece in self.pieces)


def cosines_of_gram(gram: Tensor, norms: Tensor) -> Tensor:
    """Divides inner products by norms, in place; NaN stays where a norm is NaN.

    Args:
        gram: Shape ``[N, N]``, float64.
        norms: Shape ``[N]``, float64.

    Example:
        >>> cosines_of_gram(torch.tensor([[4.0, 3.0], [3.0, 9.0]]), torch.tensor([2.0, 3.0])).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    for start in range(0, len(gram), ROWS):
        part = gram[start : start + ROWS]
        part /= norms[start : start + ROWS, None] * norms
        part.clamp_(-1, 1)  # beyond by rounding, or by the error of a projection
    good = torch.isfinite(norms)
    gram.diagonal()[good] = 1
    return gram


@dataclass(frozen=True)
class CouplingDrift(AnalysisResult):
    r"""The drift of the cosines, over all pairs of two different pieces that failed in neither matrix.

    Args:
        n_pieces: Pieces that failed in neither.
        n_pairs: Their pairs.
        mean_absolute_difference: Mean of :math:`|C_{ij} - C^0_{ij}|`; None without a pair.
        mean_difference: Mean of :math:`C_{ij} - C^0_{ij}`; None likewise.
        correlation: Pearson correlation of the two upper triangles; None where a triangle is constant.
        by_class: Mean absolute difference by the classes of the two pieces, ``a`` for pairs inside a class and
            ``a_b`` for pairs between two; those that occur.
        piece_drift: Shape ``[N]``, float64: mean absolute difference of each piece with the others; NaN where it
            failed.
    """

    n_pieces: int
    n_pairs: int
    mean_absolute_difference: float | None
    mean_difference: float | None
    correlation: float | None
    by_class: dict[str, float]
    piece_drift: Tensor


def coupling_drift(base: CouplingResult, now: CouplingResult, classes: Sequence[str] | None = None) -> CouplingDrift:
    r"""Compares the cosines of two coupling results of the same pieces.

    .. math:: \frac{2}{N (N - 1)} \sum_{i < j} |C_{ij} - C^0_{ij}|

    Args:
        base: The matrix at the base, C^0.
        now: The present one, C.
        classes: A class per piece, for means by class.

    Raises:
        ValueError: The results are of other pieces, or the number of classes is another.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from lightning_goldy.analysis.coupling import knowledge_coupling
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> batch = {"input_ids": torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 7]])}
        >>> found = knowledge_coupling(GPT2LMHeadModel(config), [batch])
        >>> drift = coupling_drift(found, found)
        >>> drift.n_pairs, drift.mean_absolute_difference, round(drift.correlation, 6)
        (3, 0.0, 1.0)
    """
    if base.ids != now.ids:
        place = next((i for i, (a, b) in enumerate(zip(base.ids, now.ids, strict=False)) if a != b), None)
        what = f"{len(base)} and {len(now)} pieces" if place is None else f"{base.ids[place]!r} and {now.ids[place]!r}"
        raise ValueError(f"the two couplings are of other pieces: {what}")
    if classes is not None and len(classes) != len(base):
        raise ValueError(f"there are {len(classes)} classes for {len(base)} pieces")
    valid = base.valid & now.valid
    kept = valid.nonzero().flatten()
    first, second = (result.cosines[kept][:, kept].double() for result in (base, now))
    difference = second - first  # [n, n]
    rows, columns = torch.triu_indices(len(kept), len(kept), offset=1)
    pairs = difference[rows, columns]
    some = len(pairs) > 0
    correlation = agreement_of(first[rows, columns].numpy(), second[rows, columns].numpy()).pearson
    piece_drift = torch.full((len(base),), math.nan, dtype=torch.float64)
    if len(kept) > 1:
        piece_drift[kept] = difference.abs().sum(dim=1) / (len(kept) - 1)  # the diagonal adds nothing
    return CouplingDrift(
        n_pieces=len(kept),
        n_pairs=len(pairs),
        mean_absolute_difference=float(pairs.abs().mean()) if some else None,
        mean_difference=float(pairs.mean()) if some else None,
        correlation=correlation if math.isfinite(correlation) else None,
        by_class={} if classes is None else _by_class(difference, [classes[place] for place in kept.tolist()]),
        piece_drift=piece_drift,
    )


def _by_class(difference: Tensor, classes: Sequence[str]) -> dict[str, float]:
    names, means = np.array(classes, dtype=object), {}
    size = np.triu(difference.abs().numpy(), 1)
    for one, other in combinations_with_replacement(dict.fromkeys(classes), 2):
        chosen = np.logical_or(np.outer(names == one, names == other), np.outer(names == other, names == one))
        count = np.triu(chosen, 1).sum()
        if count:
            means[one if one == other else f"{one}_{other}"] = float(size[chosen].sum() / count)
    return means


CONTRASTS = ("answer", "category", "group")
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# Bins of the statistics, and of the figure.
_BINS, _FINE_BINS = 40, 200
_MOST_COLOURS, _DECIMALS = 9, 4


@dataclass(frozen=True)
class CouplingStatistics(AnalysisResult):
    """Statistics of all pairs of two different pieces that did not fail; None where there is nothing to say.

    Args:
        n_pieces: Pieces that did not fail.
        n_failed: Pieces that did.
        n_pairs: Pairs.
        mean: Mean cosine.
        std: Standard deviation.
        quantiles: Cosines below which a share of the pairs lies, by that share: ``"0.01"`` to ``"0.99"``.
        minimum: Smallest cosine.
        maximum: Largest cosine.
        histogram: Pairs in 40 equal bins from -1 to 1.
        thresholds: The cosines from which a pair is ``moderate`` and ``high``.
        high: Pairs from the upper threshold on.
        moderate: Pairs between the two.
        low: Pairs below the lower one; those below 0 are among them.
        negative: Pairs below 0.
        contrasts: For each of ``answer``, ``category`` and ``group`` that pieces have: ``same`` and ``different``, the
            mean cosine of pairs that share it and of pairs that do not; their numbers ``n_same`` and ``n_different``;
            their ``difference``; ``effect_size``, the difference in pooled standard deviations. Pairs of which one has
            none are left out.
        hops: Of each pair of hop numbers of one group (the pieces of one question): ``hops``, ``mean``, ``n_pairs``.
        top: The most coupled pairs: ``first`` and ``second`` (numbers), ``ids``, ``cosine``.
        bottom: The least coupled ones.
        order: All pieces that did not fail, by number, so that alike ones are neighbours; for a heat map.
        clusters: For each piece in ``order`` the number of its cluster.
        n_clusters: Number of clusters.
        effective_rank: The exponential of the entropy of the normalised eigenvalues of the matrix: how many directions
            the gradients point in; None for more pieces than it was asked for.
        participation_ratio: (sum of eigenvalues)^2 / sum of their squares, a cheaper relative of it.
    """

    analysis = "knowledge_coupling"

    n_pieces: int
    n_failed: int
    n_pairs: int
    mean: float | None
    std: float | None
    quantiles: dict[str, float]
    minimum: float | None
    maximum: float | None
    histogram: tuple[int, ...]
    thresholds: dict[str, float]
    high: int
    moderate: int
    low: int
    negative: int
    contrasts: dict[str, dict[str, Any]]
    hops: tuple[dict[str, Any], ...]
    top: tuple[dict[str, Any], ...]
    bottom: tuple[dict[str, Any], ...]
    order: tuple[int, ...]
    clusters: tuple[int, ...]
    n_clusters: int
    effective_rank: float | None
    participation_ratio: float | None

    def metrics(self) -> dict[str, float | None]:
        """Every number worth a curve, by name; those that do not exist are left out."""
        shares = {
            f"{name}_share": getattr(self, name) / self.n_pairs if self.n_pairs else None
            for name in ("high", "moderate", "negative")
        }
        numbers: dict[str, float | None] = {
            "mean": self.mean,
            "std": self.std,
            "maximum": self.maximum,
            **shares,
            "effective_rank": self.effective_rank,
            "participation_ratio": self.participation_ratio,
            "n_clusters": float(self.n_clusters),
            "n_failed": float(self.n_failed),
        }
        for name, contrast in self.contrasts.items():
            numbers |= {f"{name}/{column}": contrast[column] for column in ("same", "different", "difference")}
        return {name: float(value) for name, value in numbers.items() if value is not None}

    def details(self) -> dict[str, Any]:
        """Numbers of pieces, pairs and clusters, and the thresholds."""
        return {name: getattr(self, name) for name in ("n_pieces", "n_pairs", "n_clusters")} | {
            "thresholds": dict(self.thresholds)
        }

    def headline(self) -> str:
        """How much is coupled."""
        if self.mean is None:
            return f"knowledge coupling: {self.n_pieces} pieces, no pair"
        return (
            f"knowledge coupling of {self.n_pieces:,} pieces: mean cosine {self.mean:.3g}, "
            f"{100 * self.high / self.n_pairs:.3g} % of the pairs at {self.thresholds['high']:g} or more"
        )


def check_thresholds(*, moderate: float, high: float) -> None:
    """Whether two cosines can tell moderately and highly coupled pairs.

    Args:
        moderate: Cosine from which a pair counts as moderately coupled.
        high: Cosine from which it counts as highly coupled.

    Raises:
        ValueError: They are not in order within [-1, 1].
    """
    if not -1 <= moderate <= high <= 1:
        raise ValueError(f"the thresholds must be in order within [-1, 1]; got moderate={moderate}, high={high}")


def coupling_statistics(
    result: CouplingResult,
    *,
    high: float = 0.4,
    moderate: float = 0.1,
    top: int = 20,
    cluster_at: float | None = None,
    spectrum_below: int = 2048,
) -> CouplingStatistics:
    r"""Describes a coupling matrix.

    .. math::
        r_\text{eff} = \exp\Big(-\sum_k p_k \log p_k\Big), \quad p_k = \frac{\lambda_k}{\sum_l \lambda_l}, \qquad
        \text{effect size} = \frac{\bar c_\text{same} - \bar c_\text{different}}{s_\text{pooled}}

    Clusters come from average linkage on :math:`1 - C_{ij}`.

    Args:
        result: From ``knowledge_coupling`` or ``activation_similarity``.
        high: Cosine from which a pair counts as highly coupled.
        moderate: Cosine from which it counts as moderately coupled.
        top: Pairs to list at each end.
        cluster_at: Mean cosine that holds a cluster together; ``high`` by default.
        spectrum_below: Pieces up to which eigenvalues are computed.

    Raises:
        ValueError: The thresholds are not in order within [-1, 1], or ``top`` is negative.
        ImportError: SciPy is not installed.

    Source: effective rank: Roy and Vetterli 2007; average linkage: Sokal and Michener 1958; effect size: Cohen 1988.

    Example:
        >>> from lightning_goldy.analysis.coupling import knowledge_coupling
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3]])
        >>> found = coupling_statistics(knowledge_coupling(GPT2LMHeadModel(config), [{"input_ids": ids}]))
        >>> found.n_pairs, found.top[0]["ids"], found.high >= 1
        (3, ('0', '2'), True)
    """
    check_thresholds(moderate=moderate, high=high)
    if top < 0:
        raise ValueError(f"top is a number of pairs, at least 0; got {top}")
    kept = result.valid.nonzero().flatten()
    cosines = result.cosines if len(kept) == len(result) else result.cosines[kept][:, kept]
    pairs = cosines.numpy()[~np.tri(len(kept), dtype=bool)]  # all pairs once, row by row
    order, clusters = _clustered(pairs, len(kept), high if cluster_at is None else cluster_at)
    rank, ratio = _spectrum(cosines, spectrum_below)
    columns = {name: [result.column(name)[index] for index in kept.tolist()] for name in (*CONTRASTS, "hop")}
    return CouplingStatistics(
        n_pieces=len(kept),
        n_failed=len(result) - len(kept),
        **_distribution(pairs, high, moderate),
        contrasts=_contrasts(cosines, columns),
        hops=_hop_coupling(cosines, columns["group"], columns["hop"]),
        top=_extremes(cosines, top, kept, result.ids, -1),
        bottom=_extremes(cosines, top, kept, result.ids, 1),
        order=tuple(int(kept[place]) for place in order),
        clusters=tuple(clusters),
        n_clusters=len(set(clusters)),
        effective_rank=rank,
        participation_ratio=ratio,
    )


def _distribution(pairs: NDArray[Any], high: float, moderate: float) -> dict[str, Any]:
    some = len(pairs) > 0
    # A cosine of one pair in twice float32 is 1.0000001 to NumPy's bins.
    histogram = np.histogram(pairs, bins=_BINS, range=(-1, 1))[0]
    n_high, n_from = int((pairs >= high).sum()), int((pairs >= moderate).sum())
    quantiles = np.quantile(pairs, _QUANTILES) if some else ()
    return {
        "n_pairs": len(pairs),
        "mean": float(pairs.mean(dtype=np.float64)) if some else None,
        "std": float(pairs.std(dtype=np.float64)) if some else None,
        "quantiles": {str(share): float(value) for share, value in zip(_QUANTILES, quantiles, strict=some)},
        "minimum": float(pairs.min()) if some else None,
        "maximum": float(pairs.max()) if some else None,
        "histogram": tuple(histogram.tolist()),
        "thresholds": {"moderate": moderate, "high": high},
        "high": n_high,
        "moderate": n_from - n_high,
        "low": len(pairs) - n_from,
        "negative": int((pairs < 0).sum()),
    }


def _extremes(cosines: Tensor, top: int, kept: Tensor, ids: Sequence[str], sign: int) -> tuple[dict[str, Any], ...]:
    """The least (sign 1) or the most coupled pairs (sign -1); ties to the smaller numbers."""
    best: list[tuple[float, int, int]] = []
    for at, row in _rows_above(cosines):
        keys = sign * row
        fresh = [(float(keys[place]), at, at + 1 + int(place)) for place in _smallest(keys, top)]
        best = sorted([*best, *fresh])[:top]
    pairs = [(sign * key, int(kept[first]), int(kept[second])) for key, first, second in best]
    return tuple(
        {"first": first, "second": second, "ids": (ids[first], ids[second]), "cosine": cosine}
        for cosine, first, second in pairs
    )


def _smallest(keys: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Places of the smallest keys, ties to the smaller place."""
    if count >= len(keys):
        return np.arange(len(keys))
    if count == 0:
        return np.arange(0)
    border = np.partition(keys, count - 1)[count - 1]
    below = np.flatnonzero(keys < border)
    return np.concatenate([below, np.flatnonzero(keys == border)[: count - len(below)]])


def _clustered(pairs: NDArray[Any], count: int, at: float) -> tuple[list[int], list[int]]:
    if count < 2:
        return list(range(count)), [0] * count
    try:
        from scipy.cluster.hierarchy import fcluster, leaves_list, linkage
    except ImportError as error:
        raise ImportError("clusters need SciPy: pip install scipy") from error
    tree = linkage(np.maximum(1 - pairs.astype(np.float64), 0), method="average")
    order = leaves_list(tree)
    labels = fcluster(tree, 1 - at, criterion="distance")[order]
    # Numbered as they come in the order.
    numbers: dict[int, int] = {}
    return order.tolist(), [numbers.setdefault(label, len(numbers)) for label in labels.tolist()]


def _spectrum(cosines: Tensor, below: int) -> tuple[float | None, float | None]:
    if not len(cosines):
        return None, None
    square = math.fsum(float(row.double().square().sum()) for row in cosines)
    ratio = float(cosines.diagonal().double().sum()) ** 2 / square
    if len(cosines) > below:
        return None, ratio
    return effective_rank(torch.linalg.eigvalsh(cosines.double()).clamp(min=0)), ratio


def _rows_above(matrix: Tensor) -> Iterator[tuple[int, NDArray[Any]]]:
    """The number of each row and what stands above the diagonal in it."""
    array = matrix.numpy()
    for at in range(len(array) - 1):
        yield at, array[at, at + 1 :]


def _contrasts(cosines: Tensor, columns: Mapping[str, Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Pairs that share an answer, a category or a group against pairs that do not; without columns of one piece."""
    coded = {name: codes_of(columns[name], fold=name == "answer") for name in CONTRASTS}
    return {name: _contrast(cosines, codes) for name, codes in coded.items() if (codes >= 0).sum() > 1}


def codes_of(values: Sequence[Any], *, fold: bool = False) -> NDArray[np.int64]:
    """A number per value, -1 for none.

    Args:
        values: Texts or None.
        fold: Texts that differ in case or white space alone are the same.

    Example:
        >>> codes_of(["a", None, "A "], fold=True).tolist()
        [0, -1, 0]
    """
    known: dict[Any, int] = {}
    keys = map(folded, values) if fold else values
    return np.array([-1 if key is None else known.setdefault(key, len(known)) for key in keys], dtype=np.int64)


def folded(value: Any) -> Any:
    """A text without the case and white space in which equal answers may differ; what is no text stays."""
    return " ".join(value.split()).casefold() if isinstance(value, str) else value


def _contrast(cosines: Tensor, codes: NDArray[np.int64]) -> dict[str, Any]:
    sums = np.zeros((2, 3))  # of same and different: number, sum, sum of squares
    for at, row in _rows_above(cosines):
        if codes[at] < 0:
            continue
        has, same = codes[at + 1 :] >= 0, codes[at + 1 :] == codes[at]
        for which, mask in enumerate((same, has & ~same)):
            chosen = row[mask].astype(np.float64)
            sums[which] += len(chosen), chosen.sum(), (chosen * chosen).sum()
    (n_same, *_), (n_different, *_) = sums
    means = [float(total / count) if count else None for count, total, _ in sums]
    difference = means[0] - means[1] if means[0] is not None and means[1] is not None else None
    scatter = sum(square - total * total / count for count, total, square in sums if count)
    freedom = n_same + n_different - 2
    pooled = math.sqrt(max(0.0, scatter) / freedom) if freedom > 0 else 0.0
    return {
        "same": means[0],
        "different": means[1],
        "n_same": int(n_same),
        "n_different": int(n_different),
        "difference": difference,
        "effect_size": difference / pooled if difference is not None and pooled > 0 else None,
    }


def _hop_coupling(cosines: Tensor, groups: Sequence[Any], hops: Sequence[Any]) -> tuple[dict[str, Any], ...]:
    """Mean cosine between the hops of one question, by their numbers."""
    members: dict[Any, list[int]] = {}
    for at, (group, hop) in enumerate(zip(groups, hops, strict=True)):
        if group is not None and hop is not None:
            members.setdefault(group, []).append(at)
    cosines_of: dict[tuple[int, int], list[float]] = {}
    for inside in members.values():
        for place, first in enumerate(inside):
            for second in inside[place + 1 :]:
                key = tuple(sorted((hops[first], hops[second])))
                cosines_of.setdefault(key, []).append(float(cosines[first, second]))
    return tuple(
        {"hops": key, "mean": math.fsum(values) / len(values), "n_pairs": len(values)}
        for key, values in sorted(cosines_of.items())
    )


OTHERS = "others"
"""What categories are called that are too rare for a colour of their own."""


@dataclass(frozen=True)
class CouplingPicture(AnalysisResult):
    """What the figures of a coupling show, for any number of pieces.

    Args:
        cells: B rows of B mean cosines over blocks of neighbours in the clusters' order, rounded; a piece with itself
            does not count where a block holds several.
        sizes: Pieces in each of the B blocks.
        categories: The most frequent category in each block, ``others`` for rare ones, None where pieces have none.
        n_pieces: Pieces in all; as many as blocks where nothing is averaged.
        counts: Pairs in 200 equal bins from -1 to 1.
    """

    cells: tuple[tuple[float, ...], ...]
    sizes: tuple[int, ...]
    categories: tuple[str | None, ...]
    n_pieces: int
    counts: tuple[int, ...]

    def details(self) -> dict[str, Any]:
        """The parts of a row of ``results.jsonl`` that the figures of ``knowledge_coupling`` draw."""
        return {
            "heat_map": {
                "cells": [list(line) for line in self.cells],
                "sizes": list(self.sizes),
                "categories": list(self.categories),
                "n_pieces": self.n_pieces,
            },
            "distribution": {
                "edges": np.linspace(-1, 1, _FINE_BINS + 1).round(10).tolist(),
                "counts": list(self.counts),
            },
        }


def coupling_picture(result: CouplingResult, statistics: CouplingStatistics, *, most: int = 200) -> CouplingPicture:
    r"""Averages a coupling matrix over blocks of neighbours.

    .. math:: P_{IJ} = \frac{1}{n_{IJ}} \sum_{i \in I, \, j \in J, \, i \ne j} C_{ij}

    with the pieces cut into blocks I in the order of ``statistics.order``, so that alike pieces share a block. A block
    of one piece has 1 with itself.

    Args:
        result: From ``knowledge_coupling`` or ``activation_similarity``.
        statistics: Of that result.
        most: Blocks at most; with fewer pieces each is a block of its own.

    Raises:
        ValueError: ``most`` is below 1.

    Example:
        >>> from lightning_goldy.analysis.coupling import knowledge_coupling
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> ids = torch.tensor([[1, 2, 3], [4, 5, 6], [1, 2, 3]])
        >>> found = knowledge_coupling(GPT2LMHeadModel(config), [{"input_ids": ids}])
        >>> picture = coupling_picture(found, coupling_statistics(found), most=2)
        >>> picture.sizes, sum(picture.counts)
        ((2, 1), 3)
    """
    if most < 1:
        raise ValueError(f"most is a number of blocks, at least 1; got {most}")
    order = np.array(statistics.order, dtype=np.int64)
    cosines = result.cosines.numpy()
    # Sizes differ by one at most.
    blocks = [part for part in np.array_split(order, min(most, len(order)) or 1) if len(part)]
    sizes = np.array([len(part) for part in blocks], dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    cells = np.zeros((len(blocks), len(blocks)))
    counts = np.zeros(_FINE_BINS, dtype=np.int64)
    done = 0
    for at, block in enumerate(blocks):
        rows = cosines[np.ix_(block, order)].astype(np.float64)  # [pieces of the block, N]
        cells[at] = np.add.reduceat(rows.sum(axis=0), starts)
        # Each pair once: the part of a row to the right of the diagonal.
        for place, row in enumerate(rows, start=done):
            counts += np.histogram(row[place + 1 :], bins=_FINE_BINS, range=(-1, 1))[0]
        done += len(block)
    numbers = np.outer(sizes, sizes).astype(np.float64)
    several = np.flatnonzero(sizes > 1)
    # Its own cosine is 1 exactly.
    for table in (cells, numbers):
        table[several, several] -= sizes[several]
    return CouplingPicture(
        cells=tuple(tuple(line) for line in (cells / numbers).round(_DECIMALS).tolist()),
        sizes=tuple(sizes.tolist()),
        categories=_strip(blocks, result.column("category")),
        n_pieces=len(order),
        counts=tuple(counts.tolist()),
    )


def _strip(blocks: Sequence[NDArray[np.int64]], categories: Sequence[str | None]) -> tuple[str | None, ...]:
    named = []
    for block in blocks:
        counted = Counter(name for index in block.tolist() if (name := categories[index]) is not None)
        # Of equally frequent ones the first in the alphabet.
        named.append(min(counted, key=lambda name: (-counted[name], name)) if counted else None)
    shown = Counter(name for name in categories if name is not None)
    frequent = sorted(shown, key=lambda name: (-shown[name], name))[:_MOST_COLOURS]
    return tuple(name if name is None or name in frequent else OTHERS for name in named)
