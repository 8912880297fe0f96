"""95 % intervals over samples, by the jackknife: what the estimate would have been without each of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from scipy.special import stdtrit


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
