"""Intervals over samples, against the analysis run again without each sample."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from lightning_goldy.analysis import activation_differences, attention_statistics, taylor_diff
from lightning_goldy.analysis.agreement import (
    FEWEST,
    correlation_interval,
    interval_of,
    mean_norm_intervals,
    ratio_interval,
    resampled,
    too_few,
)
from lightning_goldy.analysis.ripple.ripple import RippleResult
from lightning_goldy.core import ParameterVector
from tests.analysis.taylor.test_taylor import moved
from tests.references.models import build, token_batch


def around(whole: float, without: list[float]) -> tuple[float, float]:
    """Delete-one jackknife and Student's t, word for word."""
    count = len(without)
    error = math.sqrt((count - 1) / count * sum((value - np.mean(without)) ** 2 for value in without))
    half = stats.t.ppf(0.975, count - 1) * error
    return whole - half, whole + half


def without_each(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    count = len(batch["input_ids"])
    return [{name: torch.cat([rows[:i], rows[i + 1 :]]) for name, rows in batch.items()} for i in range(count)]


def logarithmic(whole: float, without: list[float]) -> tuple[float, float]:
    low, high = around(math.log(whole), [math.log(value) for value in without])
    return math.exp(low), math.exp(high)


@pytest.mark.parametrize("sizes", [[4], [1, 3]])
def test_nonlinearity(sizes: list[int]) -> None:
    model, batch = build("gpt2"), token_batch(4)
    base = moved(model, 0.3)
    parts = torch.arange(4).split(sizes)
    batches = [{name: rows[part] for name, rows in batch.items()} for part in parts]
    found = taylor_diff(model, base, batches, by=None)
    left = [taylor_diff(model, base, [other], orders=(1,), by=None).nonlinearity for other in without_each(batch)]
    assert found.n_samples == 4
    assert found.interval == pytest.approx(logarithmic(found.nonlinearity, left), rel=1e-5)
    assert found.row().result["interval"] == found.interval
    assert "95 % interval" in found.headline()


def test_an_unchanged_model_has_no_interval() -> None:
    model = build("gpt2")
    found = taylor_diff(model, ParameterVector.of(model), [token_batch(3)], by=None)
    assert found.interval is None
    assert "interval" not in found.row().result


def test_drift_of_attention_with_padding() -> None:
    model, batch = build("gpt2"), token_batch(4)
    batch = {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
    batch["attention_mask"][1, -3:] = 0
    base = moved(model, 0.3)
    found = attention_statistics(model, [batch], base=base, memory=1)
    left = [attention_statistics(model, [other], base=base).mean("drift") for other in without_each(batch)]
    assert found.drift_interval == pytest.approx(logarithmic(found.mean("drift"), left), rel=1e-6)
    assert attention_statistics(model, [batch]).drift_interval is None


def test_divergence_on_unrelated_text() -> None:
    model, batch = build("gpt2"), token_batch(4)
    base = moved(model, 0.1)
    found = activation_differences(model, base, [batch])
    left = [activation_differences(model, base, [other]).mean_kl for other in without_each(batch)]
    assert found.kl_interval == pytest.approx(logarithmic(found.mean_kl, left), rel=1e-6)


def test_the_interval_of_a_ratio_covers() -> None:
    """Of 400 draws of 16 samples about 95 % of the intervals hold the truth, as the log-normal's own do."""
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(400):
        sizes = generator.integers(5, 20, 16)
        low, high = ratio_interval(list(sizes * generator.lognormal(0.0, 0.6, 16)), list(sizes)) or (0.0, 0.0)
        held += low <= math.exp(0.18) <= high
    assert 0.91 <= held / 400 <= 0.98


@pytest.mark.parametrize(("count", "length"), [(4, 0.2), (6, 0.0), (8, 0.2), (16, 0.05), (16, 1.0), (32, 0.2)])
def test_the_interval_of_the_norm_of_a_mean_covers(count: int, length: float) -> None:
    """Planted means among texts that scatter: at least 91 in 100 hold the length; of a plain bootstrap few do."""
    generator = np.random.default_rng(0)
    held = plain = 0
    for _ in range(300):
        sizes = generator.integers(20, 64, count).astype(float)
        mean = np.zeros(64)
        mean[0] = length
        sizes_of_effect = 1 + 0.5 * generator.standard_normal((count, 1))
        sums = sizes[:, None] * (sizes_of_effect * mean + 0.07 * generator.standard_normal((count, 64)))
        scales = sizes * (1 + 0.05 * generator.standard_normal(count))
        given = [torch.from_numpy(values) for values in (sums[:, None], sizes, scales[:, None])]
        low, high = mean_norm_intervals(*given)[0].tolist()
        held += low <= length <= high
        drawn = resampled(count)
        low, high = interval_of((drawn @ given[0][:, 0]).norm(dim=1) / (drawn @ given[2][:, 0]))
        plain += low <= length <= high
    assert held / 300 >= 0.91
    assert plain / 300 < (0.95 if length == 1 else 0.3)


@pytest.mark.parametrize(
    ("above", "below"),
    [([1.0], [1.0]), ([0.0, 1.0], [1.0, 1.0]), ([1.0, 1.0], [1.0, 0.0]), ([math.nan, 1.0], [1.0, 1.0])],
)
def test_a_ratio_that_one_sample_decides_has_no_interval(above: list[float], below: list[float]) -> None:
    assert ratio_interval(above, below) is None


def test_correlations_stay_within_their_bounds() -> None:
    assert correlation_interval(1.0, [1.0, 1.0]) == pytest.approx((1.0, 1.0))
    low, high = correlation_interval(0.99, [0.9, 0.999, 0.99]) or (0.0, 0.0)
    assert -1 <= low < 0.99 < high <= 1
    assert correlation_interval(0.5, [0.5]) is None
    assert correlation_interval(0.5, [math.nan, 0.5]) is None


@pytest.mark.parametrize("n_edits", [1, 3])
def test_the_correlation_of_ripples(n_edits: int) -> None:
    """Over edits; where these are few, over pieces."""
    generator = torch.Generator().manual_seed(5)
    predicted = torch.randn(n_edits, 6, generator=generator, dtype=torch.float64)
    noise = torch.randn(n_edits, 6, generator=generator, dtype=torch.float64)
    found = SimpleNamespace(
        edits=("e",) * n_edits,
        measured=predicted + noise,
        pairs=lambda: np.ones((n_edits, 6), dtype=bool),
        predicted=lambda name: predicted,
    )
    told: dict[str, Any] = RippleResult._interval(found)  # type: ignore[arg-type, assignment]
    axis = 0 if n_edits == 3 else 1
    first, second = predicted.numpy(), found.measured.numpy()
    left = [
        stats.spearmanr(np.delete(first, i, axis).ravel(), np.delete(second, i, axis).ravel()).statistic
        for i in range(predicted.shape[axis])
    ]
    whole = stats.spearmanr(first.ravel(), second.ravel()).statistic
    low, high = around(math.atanh(whole), [math.atanh(value) for value in left])
    assert told["over"] == ("3 edits" if n_edits == 3 else "6 pieces")
    assert told["spearman"] == pytest.approx([math.tanh(low), math.tanh(high)])


@pytest.mark.parametrize("count", range(2, 9))
def test_the_whole_range_of_too_few_values_covers_less_often_than_it_says(count: int) -> None:
    closed = 1 - 2.0 ** (1 - count)
    assert (closed < 0.95) == (count < FEWEST)
    values = torch.from_numpy(np.random.default_rng(count).normal(size=(4000, count)))
    covers = (values.min(1).values <= 0) & (values.max(1).values >= 0)
    assert float(covers.double().mean()) == pytest.approx(closed, abs=0.02)
    for row in values[:20]:
        low, high = interval_of(resampled(count) @ row / count)
        assert float(row.min()) - 1e-12 <= low <= high <= float(row.max()) + 1e-12
    assert bool(too_few(count, "samples")) == (count < FEWEST)


def test_a_single_value_has_no_interval() -> None:
    assert too_few(1, "held-out samples") == "of a single one of the held-out samples there is no interval"
