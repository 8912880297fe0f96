"""How predictions agree with measurements and samples with each other, and 95 % intervals over samples."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor

from lightning_goldy.analysis.result import AnalysisResult
from lightning_goldy.core.files import finite

EVERYTHING = "all"
"""Names the agreement over all classes."""
FEWEST = 6
"""Values from which on a bootstrap over them can be a 95 % interval; see :func:`too_few`."""
_RESAMPLES = 1000
# Steps of the tables of binomial tails, products worked on at a time.
_STEPS, _PIECE = 1 << 13, 1 << 20
# Rounds of a fit, the change of its rates, relative, at which it is done, the last rounds that are mixed, and by how
# much a mix may change the logarithm of a rate.
_FITS, _FITTED, _MIXED, _LEAP = 200, 1e-7, 6, 20.0
# From where on a product of rates is cut at 1: one that is above by rounding alone is left, for nothing is sorted then.
_ABOVE = 1 + 1e-9
# Terms of a tail that are summed one by one, and how small a part of their size, with signs, is not lost to rounding.
_TERMS, _ROUNDED = 64, 1e-7
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Agreement(AnalysisResult):
    """How a prediction agrees with what was measured, over pairs of edit and piece.

    Args:
        predictor: ``first_order`` or ``coupling``.
        group: A distance class, or ``all``.
        n: Pairs.
        pearson: Linear correlation; NaN where undefined.
        spearman: Rank correlation, ties sharing their mean rank; NaN where undefined.
        sign_agreement: Share of the pairs where both have the same sign (zero is one of its own), a fraction.
        slope: Of the least-squares line of measured on predicted; 1 where predictions have the right size.
        intercept: Of that line, nats.
        reason: Why a number is NaN; empty where none is.
    """

    predictor: str
    group: str
    n: int
    pearson: float
    spearman: float
    sign_agreement: float
    slope: float
    intercept: float
    reason: str = ""

    def metrics(self) -> dict[str, float | None]:
        """The four numbers worth a curve; None where one is undefined."""
        names = ("pearson", "spearman", "sign_agreement", "slope")
        return {name: finite(getattr(self, name)) for name in names}

    def details(self) -> dict[str, Any]:
        """All of it; None for a number that is undefined."""
        return {name: finite(value) for name, value in vars(self).items()}


def agreement_of(
    predicted: Sequence[float] | NDArray[Any],
    measured: Sequence[float] | NDArray[Any],
    predictor: str = "first_order",
    group: str = EVERYTHING,
) -> Agreement:
    """Correlations, sign agreement and the least-squares line of measured on predicted values.

    Args:
        predicted: One value per pair.
        measured: Likewise.
        predictor: Its name.
        group: Its name.

    Returns:
        The numbers; those that are undefined (fewer than two pairs, a side that is constant, a value that is not
        finite) are NaN and the reason is told.

    Example:
        >>> found = agreement_of([1.0, 2.0, 3.0], [2.0, 4.0, 7.0])
        >>> round(found.pearson, 4), round(found.spearman, 4), found.slope, round(found.intercept, 4)
        (0.9934, 1.0, 2.5, -0.6667)
        >>> agreement_of([1.0, 2.0], [3.0, 3.0]).reason
        'measured values are all the same'
    """
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(measured, dtype=np.float64)
    n, nothing = len(x), math.nan
    wrong = int((~(np.isfinite(x) & np.isfinite(y))).sum())
    empty = Agreement(predictor, group, n, nothing, nothing, nothing, nothing, nothing)
    if not n or wrong:
        return dataclasses.replace(empty, reason=f"{wrong} of {n} pairs are not finite" if n else "no pair")
    signs = float((np.sign(x) == np.sign(y)).mean())
    known = dataclasses.replace(empty, sign_agreement=signs)
    if n < 2:
        return dataclasses.replace(known, reason="a single pair")
    if x.min() == x.max():
        return dataclasses.replace(known, reason="predicted values are all the same")
    slope = _correlation(x, y) * _spread(y) / _spread(x) if y.min() < y.max() else 0.0
    known = dataclasses.replace(known, slope=float(slope), intercept=float(y.mean() - slope * x.mean()))
    if y.min() == y.max():
        return dataclasses.replace(known, reason="measured values are all the same")
    return dataclasses.replace(known, pearson=_correlation(x, y), spearman=_correlation(_ranks(x), _ranks(y)))


def spaced_places(count: int, most: int) -> NDArray[np.int64]:
    """Places of at most so many of a number of things, evenly spaced from the first to the last.

    Example:
        >>> spaced_places(9, 3).tolist(), spaced_places(2, 3).tolist(), spaced_places(0, 3).tolist()
        ([0, 4, 8], [0, 1], [])
    """
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(np.int64))


def _correlation(x: NDArray[Any], y: NDArray[Any]) -> float:
    (x, along), (y, across) = _centred(x), _centred(y)
    return float(min(1.0, max(-1.0, x @ y / (np.linalg.norm(x) * np.linalg.norm(y))))) if along and across else math.nan


def _spread(values: NDArray[Any]) -> float:
    """Root of the sum of squared distances from the mean."""
    centred, size = _centred(values)
    return size * float(np.linalg.norm(centred))


def _centred(values: NDArray[Any]) -> tuple[NDArray[Any], float]:
    """Distances from the mean over the largest of them, and that; the squares of tiny changes would vanish."""
    centred: NDArray[Any] = values - values.mean()
    size = float(np.abs(centred).max())
    return centred / size, size


def _ranks(values: NDArray[Any]) -> NDArray[Any]:
    """Ranks from 1, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[Any] = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return ranks


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, power: float = 1.0
) -> tuple[float, float] | None:
    r"""Of :math:`(\sum_i a_i / \sum_i b_i)^p` over samples i, on the logarithmic scale, by Student's t.

    .. math:: s^2 = \frac{n - 1}{n} \sum_i (l_i - \bar l)^2, \qquad l_i = p \log \frac{A - a_i}{B - b_i}

    Args:
        numerators: a, one per sample, not negative.
        denominators: b, likewise.
        power: p.

    Returns:
        Both ends; None with fewer than two samples, or where the ratio is 0 or undefined without one of them.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 11.

    Example:
        >>> [round(end, 3) for end in ratio_interval([1.0, 2.0, 3.0], [2.0, 2.0, 2.0])]
        [0.28, 3.569]
        >>> ratio_interval([0.0, 0.0], [1.0, 1.0]) is None
        True
    """
    # Exact sums, so that the order of the samples, and who saw them, does not matter.
    whole, below, count = math.fsum(numerators), math.fsum(denominators), len(numerators)
    left = [(whole - a, below - b) for a, b in zip(numerators, denominators, strict=True)]
    if count < 2 or not all(a > 0 and b > 0 and math.isfinite(a / b) for a, b in [(whole, below), *left]):
        return None
    low, high = _around(power * math.log(whole / below), [power * math.log(a / b) for a, b in left])
    return math.exp(max(low, -700.0)), math.exp(min(high, 700.0))


def per_sample(
    keys: Sequence[str], numerators: Sequence[float], denominators: Sequence[float], *, power: float = 1.0
) -> dict[str, Any] | None:
    r"""What a number :math:`(\sum_i a_i / \sum_i b_i)^p` is of each sample, for pairs with another run's; JSON-able.

    Args:
        keys: Of the samples, such as those of :func:`~lightning_goldy.core.batches.sample_keys`.
        numerators: a, one per sample.
        denominators: b, likewise.
        power: p.

    Returns:
        The record; None where the values are not of single samples.

    Example:
        >>> per_sample(["a", "b"], [1.0, 2.0], [2.0, 2.0])
        {'keys': ('a', 'b'), 'numerators': (1.0, 2.0), 'denominators': (2.0, 2.0), 'power': 1.0}
        >>> per_sample(["a"], [1.0, 2.0], [2.0, 2.0]) is None
        True
    """
    if not len(keys) == len(numerators) == len(denominators) or not keys:
        return None
    # Tuples, as results have that are read back.
    values = {"numerators": (*map(float, numerators),), "denominators": (*map(float, denominators),)}
    return {"keys": tuple(keys), **values, "power": power}


def mean_norm_intervals(sums: Tensor, counts: Tensor, scales: Tensor) -> Tensor:
    r"""Of the norm of a mean vector over its scale, by the jackknife over samples, on the scale of squares.

    .. math:: \widehat{\lVert\mu\rVert^2} = \frac{\lVert\sum_i s_i\rVert^2 - \sum_i \lVert s_i\rVert^2}
        {(\sum_i n_i)^2 - \sum_i n_i^2}, \qquad
        \theta = \widehat{\lVert\mu\rVert^2} \Big/ \Big(\frac{\sum_i b_i}{\sum_i n_i}\Big)^2

    The norm of a mean is above that of the expectation, for what is left of the scatter of samples adds to it, and more
    so in every resample, whose intervals lie above it altogether. Products of two different samples have no such part,
    so these are what is jackknifed. Where samples scatter more than their mean is long, the interval may end below the
    norm of the mean.

    Args:
        sums: s, sums of vectors over each sample, shape ``[n, L, d]``.
        counts: n, how many vectors are in each sum, shape ``[n]``.
        scales: b, sums of the scale over each sample, shape ``[n, L]``.

    Returns:
        Both ends, not below 0, shape ``[L, 2]``; NaN with fewer than three samples.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 11, of the U-statistic of the square.

    Example:
        >>> mean_norm_intervals(torch.tensor([[[3.0, 4.0]]] * 3), torch.ones(3), torch.full((3, 1), 10.0)).tolist()
        [[0.5, 0.5]]
    """
    sums, counts, scales = sums.double(), counts.double()[:, None], scales.double()
    if len(sums) < 3:
        return torch.full((sums.shape[1], 2), math.nan, dtype=torch.float64)
    whole, squares, pairs = sums.sum(0), sums.square().sum(-1), counts.sum().square() - counts.square().sum()

    def scaled(square: Tensor, pairs: Tensor, scale: Tensor, count: Tensor) -> Tensor:
        return square / pairs / (scale / count).square()

    estimate = scaled(whole.square().sum(-1) - squares.sum(0), pairs, scales.sum(0), counts.sum())  # [L]
    left = (whole - sums).square().sum(-1) - (squares.sum(0) - squares)  # [n, L]
    rest = counts.sum() - counts
    without = scaled(left, rest.square() - (counts.square().sum() - counts.square()), scales.sum(0) - scales, rest)
    ends = [_around(float(one), others) for one, others in zip(estimate, without.T.tolist(), strict=True)]
    return torch.tensor(ends, dtype=torch.float64).clamp_min(0).sqrt()


def correlation_interval(whole: float, without: Sequence[float]) -> tuple[float, float] | None:
    """Of a correlation, on Fisher's scale, from its values without each group of samples.

    Args:
        whole: With all groups.
        without: Without each of them, in turn.

    Returns:
        Both ends; None with fewer than two groups, or where a correlation is undefined.

    Example:
        >>> [round(end, 2) for end in correlation_interval(0.8, [0.78, 0.8, 0.83])]
        [0.63, 0.9]
    """
    if len(without) < 2 or not all(map(math.isfinite, [whole, *without])):
        return None
    edge = 1 - 1e-12
    scaled = [math.atanh(max(-edge, min(edge, value))) for value in [whole, *without]]
    low, high = _around(scaled[0], scaled[1:])
    return math.tanh(low), math.tanh(high)


def _around(estimate: float, without: Sequence[float]) -> tuple[float, float]:
    count = len(without)
    mean = math.fsum(without) / count
    error = math.sqrt((count - 1) / count * math.fsum((value - mean) ** 2 for value in without))
    half = float(stdtrit(count - 1, 0.975)) * error
    return estimate - half, estimate + half


@functools.lru_cache(maxsize=4)
def resampled(count: int) -> Tensor:
    """How often each of so many passages is drawn in each resample, shape ``[resamples, count]``; always the same."""
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_RESAMPLES)
    return torch.from_numpy(draws).double()


def interval_of(values: Tensor) -> tuple[float, float]:
    """The middle 95 % of resampled values."""
    low, high = torch.nanquantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def too_few(count: int, named: str) -> str:
    r"""Why a bootstrap over so few values is no 95 % interval; nothing from :data:`FEWEST` on.

    .. math:: P\big(\min_i x_i \le \mathrm{median} \le \max_i x_i\big) = 1 - 2^{1 - n} \ge 0.95
        \iff n \ge 6

    What is resampled, a mean or a ratio of sums with one sign below, lies between the smallest and the largest value.
    Where values scatter alike to both sides, so that the mean is the median, even that whole range encloses it for
    fewer than six of them less often than 95 times in a hundred, and two values that happen to agree make a width of 0.

    Args:
        count: Values that are resampled.
        named: What they are, in the plural.

    Source: the sign test's interval of a median (Thompson 1936, Annals of Mathematical Statistics 7).

    Example:
        >>> too_few(2, "held-out samples")
        'only 2 held-out samples, and below 6 not even their whole range is a 95 % interval'
        >>> too_few(6, "held-out samples")
        ''
    """
    if count >= FEWEST:
        return ""
    if count < 2:
        return f"of a single one of the {named} there is no interval"
    return f"only {count} {named}, and below {FEWEST} not even their whole range is a 95 % interval"


def row_column_null(votes: Tensor, n_samples: int, needed: int) -> float:
    r"""Elements of a matrix that would be golden if samples shared no more than its rows and columns.

    .. math:: \sum_{ab} P\big(\mathrm{Bin}(n, \min(1, r_a c_b)) \ge \text{needed}\big), \qquad
        \sum_b \min(1, r_a c_b) = \tfrac1n \sum_b v_{ab}, \quad \sum_a \min(1, r_a c_b) = \tfrac1n \sum_a v_{ab}

    Every sample marks an element on its own, with the product of a rate of its row and one of its column, which are
    fitted so that rows and columns get as many votes as they did. Fitted rates scatter with those votes, so where rates
    are small the null is above that of the true rates, by a factor of about ``1 + needed (needed - 1) / 2 * (1 / votes
    of a row + 1 / votes of a column)``: few votes make it cautious.

    Args:
        votes: How many samples marked each element, shape ``[rows, columns]``.
        n_samples: Samples that voted.
        needed: Votes that make an element golden.

    Example:
        >>> row_column_null(torch.tensor([[2, 2], [2, 2]]), 2, 2)
        4.0
        >>> round(row_column_null(torch.tensor([[2, 0], [0, 2]]), 2, 2), 6)
        1.0
    """
    return float(row_column_nulls(votes.sum(dim=1).cpu().numpy(), votes.sum(dim=0).cpu().numpy(), n_samples, needed)[0])


def row_column_nulls(
    rows: NDArray[Any],
    columns: NDArray[Any],
    n_samples: int,
    needed: int,
    *,
    near: NDArray[np.float64] | None = None,
    done: float = _FITTED,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """As :func:`row_column_null` of several matrices at once, from their sums.

    Args:
        rows: Votes in each row, shape ``[..., rows]``.
        columns: Votes in each column, as many in all, shape ``[..., columns]``.
        n_samples: Samples that voted.
        needed: Votes that make an element golden.
        near: Rates of columns to begin with, shape ``[columns]``, as this gave them for a matrix that is much alike.
        done: Change of a rate by one more round, relative, at which they are fitted.

    Returns:
        Shape ``[...]``, and rates of the columns, in no order.

    Example:
        >>> row_column_nulls(np.array([[4, 4], [2, 2]]), np.array([[4, 4], [2, 2]]), 2, 2)[0].tolist()
        [4.0, 1.0]
    """
    flat = [part.reshape(-1, part.shape[-1]) / n_samples for part in (rows, columns)]
    first, second = _rates(flat[0], flat[1], near, done)[0]
    return _explained(first, second, n_samples, needed).reshape(rows.shape[:-1]), second.reshape(columns.shape)


def fitted_rates(rows: Tensor, columns: Tensor, n_samples: int) -> tuple[Tensor, Tensor]:
    """Rates of rows and columns whose products, cut at 1, have these sums.

    Args:
        rows: Votes in each row, shape ``[..., rows]``.
        columns: Votes in each column, as many in all, shape ``[..., columns]``.
        n_samples: Samples that voted; sums are divided by their number.

    Example:
        >>> first, second = fitted_rates(torch.tensor([4, 1]), torch.tensor([2, 2, 1]), 2)
        >>> torch.allclose((first[:, None] * second).clamp(max=1).sum(1), torch.tensor([2, 0.5]).double(), atol=1e-4)
        True
    """
    flat = [part.cpu().numpy().reshape(-1, part.shape[-1]) / n_samples for part in (rows, columns)]
    rates, orders = _rates(flat[0], flat[1])
    if orders is not None:
        places = (order.argsort(axis=-1) for order in orders)
        rates = tuple(np.take_along_axis(part, place, -1) for part, place in zip(rates, places, strict=True))
    first, second = (torch.from_numpy(part).view(like.shape) for part, like in zip(rates, (rows, columns), strict=True))
    return first, second


def _rates(
    rows: NDArray[np.float64], columns: NDArray[np.float64], near: NDArray[Any] | None = None, done: float = _FITTED
) -> tuple[tuple[NDArray[np.float64], ...], list[NDArray[np.int64]] | None]:
    """Rates of several matrices; where products are cut sorted, the largest first, with the order that they are in."""
    total = rows.sum(axis=-1, keepdims=True)
    rates = rows / np.maximum(total, _TINY), columns
    # [matrices]
    cut = rows.max(axis=-1) * columns.max(axis=-1) > _ABOVE * total[:, 0]
    if not cut.any():
        return rates, None
    # A rate grows with its sum, so that what is sorted once stays so.
    orders = [np.argsort(-part, axis=-1) for part in (rows, columns)]
    rows, columns = (np.take_along_axis(part, order, -1) for part, order in zip((rows, columns), orders, strict=True))
    start = columns if near is None else np.broadcast_to(-np.sort(-near), columns.shape)
    first, second = rows / np.maximum(total, _TINY), columns.copy()
    first[cut], second[cut] = _cut_fit(rows[cut], columns[cut], start[cut], done)
    return (first, second), orders


def _cut_fit(
    rows: NDArray[np.float64], columns: NDArray[np.float64], start: NDArray[np.float64], done: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Fits rates to sums that are sorted, the largest first, by rounds that end when all are done.

    A round makes the rates of the rows right, and with them those of the columns. Where samples agree on a few dense
    rows, rounds alone are slow, so each starts from the mix of the last ones that would change least (Anderson's).
    """
    first, second, some = np.empty_like(rows), np.empty_like(columns), columns > 0
    logarithms = np.log(np.where(some & (start > 0), start, 1.0))
    moving, least = np.arange(len(rows)), np.full(len(rows), math.inf)
    made: list[tuple[NDArray[Any], NDArray[Any]]] = []
    for _ in range(_FITS):
        fitted = _cut_rates(rows[moving], np.exp(logarithms) * some[moving])
        other = _cut_rates(columns[moving], fitted)
        first[moving], second[moving] = fitted, other
        after = np.log(np.where(some[moving], other, 1.0))
        size = np.abs(after - logarithms).max(axis=-1)
        left = size > done
        if not left.any():
            break
        made = [(ends[left], changes[left]) for ends, changes in [*made, (after, after - logarithms)][-_MIXED:]]
        # Far from where it was best a mix is not trusted, nor one that leaps: where sums are met only by rates without
        # bound, rounds hardly differ, and mixes of them would overflow.
        mixed = _least_changing(made)
        trusted = (size < 4 * least)[left] & (np.abs(mixed - after[left]).max(axis=-1) < _LEAP)
        logarithms = np.where(trusted[:, None], mixed, after[left])
        moving, least = moving[left], np.minimum(least, size)[left]
    return first, second


def _least_changing(made: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> NDArray[np.float64]:
    """The mix of what rounds made whose mixed changes have the least squares, shape ``[matrices, columns]``."""
    after, change = made[-1]
    if len(made) == 1:
        return after
    steps, turns = (np.stack([part - last for part in parts], 1) for *parts, last in zip(*made, strict=True))
    products = turns @ turns.swapaxes(1, 2)
    # Rounds that made the same leave a choice.
    ridge = 1e-12 * products.diagonal(axis1=1, axis2=2).max(axis=1) + _TINY
    products += ridge[:, None, None] * np.eye(products.shape[1])
    return after - (np.linalg.solve(products, turns @ change[..., None]) * steps).sum(axis=1)


def _cut_rates(sums: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rates r with sum_b min(1, r other_b) = sums, of each sum one; both sorted, the largest first."""
    left = other[:, ::-1].cumsum(axis=-1)[:, ::-1]
    rates = sums / np.maximum(left[:, :1], _TINY)
    count = int((rates * other[:, :1] > 1).sum(axis=-1).max())
    if count:
        # With the first m of the others cut, r = (sum - m) / (what is left of them); the sum at which the next is about
        # to be cut, r = 1 / other_m, ascends in m.
        shares = np.divide(left, other, out=np.full(left.shape, math.inf), where=other > 0)
        reached, most = np.arange(other.shape[1]) + shares, sums[:, :count]
        if most.size * reached.shape[1] <= _PIECE >> 4:
            m = (reached[:, None] < most[..., None]).sum(axis=-1)
        else:
            m = np.stack([np.searchsorted(ends, values) for ends, values in zip(reached, most, strict=True)])
        m = np.minimum(m, np.maximum((other > 0).sum(axis=-1, keepdims=True) - 1, 0))
        rates[:, :count] = (most - m) / np.maximum(np.take_along_axis(left, m, -1), _TINY)
    return rates


def _explained(first: NDArray[np.float64], second: NDArray[np.float64], n: int, needed: int) -> NDArray[np.float64]:
    r"""Sum of the binomial tail over all products of a row's and a column's rate, cut at 1, shape ``[matrices]``.

    .. math:: P(\mathrm{Bin}(n, p) \ge k) = \sum_{m=k}^n (-1)^{m-k} \tbinom nm \tbinom{m-1}{k-1} p^m, \qquad
        \sum_{ab} (r_a c_b)^m = \sum_a r_a^m \sum_b c_b^m

    Powers of products are products of powers, so that rows and columns are looked at one by one. Terms of both signs
    cancel where many samples leave a choice; there the tail is read from a table, product by product.

    Args:
        first: Rates of rows; where a product is above 1 sorted, the largest first.
        second: Rates of columns, as those of rows.
        n: Samples that voted.
        needed: Votes that make an element golden.
    """
    if n - needed <= _TERMS:
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            total, size = _power_sums(first, second, n, needed)
        if (np.isfinite(total) & (size * _ROUNDED <= total)).all():
            return total
    table = _tail_table(n, needed)
    pairs = zip(torch.from_numpy(first), torch.from_numpy(second), strict=True)
    return np.array([_expected_tail(rows, columns, table) for rows, columns in pairs])


def _power_sums(
    first: NDArray[np.float64], second: NDArray[np.float64], n: int, needed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What :func:`_explained` sums up, and the same without signs."""
    # Equally large at most, so that no power overflows that need not.
    scale = np.sqrt(second.max(axis=-1, keepdims=True) / np.maximum(first.max(axis=-1, keepdims=True), _TINY))
    first, second = first * scale, second / np.maximum(scale, _TINY)
    dense = (first * second.max(axis=-1, keepdims=True) > _ABOVE).sum(axis=-1)
    # In how many columns the product is cut, of each row in which one is.
    cuts = {row: np.searchsorted(-second[row], -1 / first[row, : dense[row]], "right") for row in np.flatnonzero(dense)}
    total = np.zeros(len(first))
    for row, cut in cuts.items():
        total[row] = cut.sum()
    size, powers = total, (_power(first, needed), _power(second, needed))
    for m in range(needed, n + 1):
        each = powers[0].sum(axis=-1) * powers[1].sum(axis=-1)
        for row, cut in cuts.items():
            left = np.append(powers[1][row, ::-1].cumsum()[::-1], 0.0)
            each[row] = powers[0][row, : len(cut)] @ left[cut] + powers[0][row, len(cut) :].sum() * left[0]
        ways = float(math.comb(n, m) * math.comb(m - 1, needed - 1))
        total, size = total + (-1) ** (m - needed) * ways * each, size + ways * each
        powers = powers[0] * first, powers[1] * second
    return total, size


def _power(base: NDArray[np.float64], exponent: int) -> NDArray[np.float64]:
    """By squares, several times as fast as a power with logarithms."""
    if exponent == 1:
        return base
    half = _power(base, exponent // 2)
    return half * half * base if exponent % 2 else half * half


@functools.lru_cache(maxsize=8)
def _tail_table(n: int, needed: int) -> Tensor:
    """The binomial tail at equidistant probabilities from 0 to 1, float64."""
    return binomial_tail(n, needed, torch.linspace(0, 1, _STEPS + 1, dtype=torch.float64))


def _interpolated(table: Tensor, probabilities: Tensor) -> Tensor:
    places = (probabilities * _STEPS).clamp_(max=_STEPS)
    below = places.int()
    flat = below.view(-1)
    # The last step has no slope, for nothing lies beyond it; index_select is four times as fast as an index.
    slopes = torch.cat([table[1:] - table[:-1], table.new_zeros(1)])
    low, slope = (part.index_select(0, flat).view(places.shape) for part in (table, slopes))
    return low.addcmul_(places.sub_(below), slope)


def _expected_tail(first: Tensor, second: Tensor, table: Tensor) -> float:
    """Sum of the tail over all products of a row's and a column's rate."""
    (rows, times), (columns, often) = (part.float().unique(return_counts=True) for part in (first, second))
    small, total = table.float(), 0.0
    for start in range(0, len(rows), max(1, _PIECE // max(1, len(columns)))):
        stop = start + max(1, _PIECE // max(1, len(columns)))
        tails = _interpolated(small, rows[start:stop, None] * columns)
        total += float((tails.double() @ often.double()) @ times[start:stop].double())
    return total


def binomial_tail(n: int, needed: int, p: Tensor) -> Tensor:
    """Probabilities that at least ``needed`` of ``n`` independent events happen, each with probability ``p``; float64.

    Example:
        >>> binomial_tail(3, 3, torch.tensor(0.5)).item(), round(binomial_tail(2, 1, torch.tensor(0.5)).item(), 12)
        (0.125, 0.75)
    """
    p = p.double()
    if needed == n:
        return p**n
    whole, happens, fails = math.lgamma(n + 1), p.log(), torch.log1p(-p)
    total = torch.zeros_like(p)
    for m in range(needed, n + 1):
        ways = whole - math.lgamma(m + 1) - math.lgamma(n - m + 1)
        # At 1 no event fails, and nothing times an infinite logarithm is nothing.
        total += (ways + m * happens + ((n - m) * fails if m < n else 0.0)).exp()
    return total.clamp(max=1.0)
