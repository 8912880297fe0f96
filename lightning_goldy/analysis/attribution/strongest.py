"""Which elements contribute most, and what masks have to do with them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_goldy.analysis.attribution.path import ChangePath
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.selection import select_largest
from lightning_goldy.core.sharding import gather, like, local, scatter_like
from lightning_goldy.core.vector import ParameterVector, random_direction, reduce_tensors


def strongest(scores: ParameterVector, change: float, share: float) -> ParameterMask:
    """Exactly a share of the elements, those that contribute most in the direction of the change.

    Args:
        scores: What each element contributes.
        change: Its sign is that of the wanted contributions.
        share: A fraction in (0, 1]; at least one element.

    Example:
        >>> from torch import nn
        >>> from lightning_goldy.core.space import ParameterSpace
        >>> space = ParameterSpace.of(nn.Linear(4, 1, bias=False))
        >>> scores = ParameterVector(space, {"weight": torch.tensor([[1.0, -3.0, -2.0, 0.0]])})
        >>> strongest(scores, -4.0, 0.5)["weight"].tolist()
        [[False, True, True, False]]
    """
    return ParameterMask.of_vector((scores if change >= 0 else -scores).top_k(100 * share, scope="global"))


def levels_of(scores: Mapping[str, Tensor], shares: Sequence[float], *, sign: float = 1.0) -> dict[str, Tensor]:
    """The first of ascending shares whose strongest hold each element, or their number where none does.

    Args:
        scores: By parameter, plain or sharded; they are multiplied by the sign for a while.
        shares: Ascending fractions of all elements.
        sign: That of the scores that are strongest.

    Returns:
        Whole tensors of uint8 on the CPU.

    Example:
        >>> levels_of({"a": torch.tensor([4.0, 1.0, 3.0, 2.0])}, [0.25, 0.5])["a"].tolist()
        [0, 2, 1, 2]
    """
    directed, numel = list(scores.values()), sum(score.numel() for score in scores.values())
    parts = [local(score) for score in directed]
    if sign < 0:
        for part in parts:
            part.neg_()
    levels = [torch.full_like(part, len(shares), dtype=torch.uint8) for part in parts]
    for place in reversed(range(len(shares))):
        for level, inside in zip(levels, select_largest(directed, max(1, round(shares[place] * numel))), strict=True):
            level.masked_fill_(inside, place)
    if sign < 0:
        for part in parts:
            part.neg_()
    found = zip(scores, directed, levels, strict=True)
    return {name: gather(like(score, level)).cpu() for name, score, level in found}


def unread_levels(path: ChangePath, name: str, shares: tuple[float, ...], seed: int) -> dict[str, Tensor]:
    """The shares that hold each element, of a baseline that asks no sample."""
    if name == "magnitude":
        references = path.parameters.items()
        return levels_of({n: like(p.detach(), path.change(n).abs()) for n, p in references}, shares)
    # Drop-and-rescale has the same elements as the random baseline, so that what differs is the rescaling.
    direction = random_direction(path.space, seed, module=None if path.weight_space == "merged" else path.model)
    return levels_of({name: tensor.clone() for name, tensor in direction.items()}, shares)


def mask_links(
    scores: ParameterVector, masks: Mapping[str, ParameterVector], *, change: float
) -> tuple[dict[str, Any], ...]:
    r"""What masks have to do with contributions: the share inside, beside that inside a random mask of equal size.

    .. math::
        E\Big[\sum_{j \in M} A_j\Big] = \sum_t \frac{k_t}{n_t} A_t, \qquad
        \mathrm{Var} = \sum_t \frac{k_t (n_t - k_t)}{n_t - 1} \Big(\frac{1}{n_t} \sum_{j \in t} A_j^2
        - \frac{A_t^2}{n_t^2}\Big)

    of k_t elements drawn from the n_t of each tensor t.

    Args:
        scores: What each element contributes.
        masks: By name; elements that a mask's space lacks are outside of it.
        change: The whole change of the metric, whose sign the strongest contributions have.

    Returns:
        For each mask its name (``mask``), its share of the elements (``elements``) and of the contributions
        (``attribution``), what a random mask with as many of each tensor would hold (``null``, with ``null_low`` and
        ``null_high``, 95 % of such masks), and the Jaccard index with the mask of equally many strongest elements
        (``jaccard``, and ``jaccard_null`` of such a random mask).

    Raises:
        SpaceError: A mask is of parameters that have no scores.

    Example:
        >>> from torch import nn
        >>> from lightning_goldy.core.space import ParameterSpace
        >>> space = ParameterSpace.of(nn.Linear(4, 1, bias=False))
        >>> scores = ParameterVector(space, {"weight": torch.tensor([[4.0, 3.0, 2.0, 1.0]])})
        >>> golden = ParameterVector(space, {"weight": torch.tensor([[True, False, True, False]])})
        >>> link = mask_links(scores, {"golden": golden}, change=10.0)[0]
        >>> link["attribution"], link["null"], round(link["jaccard"], 3), round(link["jaccard_null"], 3)
        (0.6, 0.5, 0.333, 0.333)
    """
    tensors = list(scores.values())
    sums = reduce_tensors(tensors, torch.sum)
    squares = reduce_tensors(tensors, lambda x: x @ x)
    total, rows = math.fsum(sums) or math.nan, []
    for label, mask in masks.items():
        scores.space.subspace(mask.space.names).require_same(mask.space)
        marked = [
            scatter_like(
                score, gather(mask[name]) if name in mask.space else torch.zeros(score.shape, dtype=torch.bool)
            )
            for name, score in scores.items()
        ]
        counts = [int(count) for count in reduce_tensors(marked, torch.sum)]
        inside = math.fsum(reduce_tensors(tensors, torch.dot, marked))
        variance, expected, shared = 0.0, 0.0, 0.0
        strong = _strongest_flags(tensors, sum(counts), change)
        both = math.fsum(reduce_tensors(strong, torch.dot, marked))
        for score, count, part, square, taken in zip(
            tensors, counts, sums, squares, reduce_tensors(strong, torch.sum), strict=True
        ):
            size = score.numel()
            expected += count / size * part
            shared += count / size * taken
            variance += count * (size - count) / max(size - 1, 1) * max(square / size - (part / size) ** 2, 0.0)
        spread = 1.96 * math.sqrt(variance) / abs(total)
        whole = 2 * sum(counts)
        rows.append(
            {
                "mask": label,
                "elements": sum(counts) / scores.space.numel,
                "attribution": inside / total,
                "null": expected / total,
                "null_low": expected / total - spread,
                "null_high": expected / total + spread,
                "jaccard": both / (whole - both) if whole else 1.0,
                "jaccard_null": shared / (whole - shared) if whole else 1.0,
            }
        )
    return tuple(rows)


def _strongest_flags(scores: Sequence[Tensor], count: int, change: float) -> list[Tensor]:
    """The so many largest scores of the change's sign, in the scores' layouts."""
    if not count:
        return [torch.zeros_like(score, dtype=torch.bool) for score in scores]
    directed = list(scores) if change >= 0 else [-score for score in scores]
    return [like(score, flags) for score, flags in zip(scores, select_largest(directed, count), strict=True)]
