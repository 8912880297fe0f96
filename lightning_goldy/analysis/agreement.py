"""How predictions agree with measurements, and 95 % intervals over samples by the jackknife and the bootstrap."""

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
_RESAMPLES = 1000


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
