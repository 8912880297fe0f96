"""Which keys a query sees: one meaning for every kind of mask, and the same entropies from every reader of patterns."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from lightning_goldy.analysis.attention import attention_statistics
from lightning_goldy.analysis.attention.patterns import (
    STATISTICS,
    Tokens,
    divergence_sums,
    jensen_shannon,
    recorded_attention,
    row_entropies,
    statistic_sums,
    visible_keys,
)
from lightning_goldy.core.architecture.families import eager_attention
from tests.references.architecture_models import build, token_ids
from tests.references.attention import divergence, rows_of_scores

SAMPLES, HEADS, LENGTH = 2, 3, 6
SLOPES = torch.tensor([0.5, 0.25, 4.0])  # of a distance bias, one per head
PLACES = torch.arange(LENGTH)
VALID = torch.tensor([[True] * LENGTH, [False, False] + [True] * (LENGTH - 2)])


def hidden_keys(window: int | None) -> Tensor:
    """Later keys, padding, and what lies outside the window, ``[B, T, T]``; the second sample is padded on the left."""
    behind = PLACES[:, None] - PLACES[None, :]
    hidden = (behind < 0) | (behind >= (LENGTH if window is None else window))
    return hidden[None] | ~VALID[:, None, :]


def mask_of(hidden: Tensor, kind: str, bias: Tensor) -> Tensor:
    """The mask as an attention function gets it, ``[B, 1 or H, T, T]``."""
    if kind == "boolean":
        return ~hidden[:, None]
    lowest = {"lowest": torch.finfo(torch.float32).min, "infinite": -math.inf, "billion": -1e9}[kind]
    return torch.zeros(hidden.shape).masked_fill(hidden, lowest)[:, None] + bias


def pattern_of(mask: Tensor, scores: Tensor, sink: float | None, *, appended: bool = False) -> Tensor:
    """Attention of a library: a softmax over the masked scores, with a sink as one logit more that is dropped after."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    logits = scores + mask
    if sink is None:
        return torch.softmax(logits, dim=-1)
    column = torch.full((*logits.shape[:-1], 1), sink)
    weights = torch.softmax(torch.cat([logits, column], dim=-1), dim=-1)
    return weights if appended else weights[..., :-1]


def plain(scores: Tensor, hidden: Tensor, bias: Tensor, sink: float | None) -> tuple[Tensor, Tensor]:
    """Mean normalised entropy of each sample's rows, and the sums of both entropies, by definition."""
    means, sums = torch.full((SAMPLES, HEADS), math.nan), torch.zeros(2, HEADS, dtype=torch.float64)
    for sample in range(SAMPLES):
        for head in range(HEADS):
            rows = rows_of_scores(scores[sample, head], hidden[sample], bias[0, head], sink)
            shares = []
            for t in VALID[sample].nonzero().flatten().tolist():
                n_keys = int((~hidden[sample, t]).sum())
                entropy = -math.fsum(a * math.log(a) for a in rows[t] if a > 0)
                sums[0, head] += entropy
                if n_keys > 1:
                    shares.append(entropy / math.log(n_keys))
            sums[1, head] += math.fsum(shares)
            means[sample, head] = math.fsum(shares) / len(shares)
    return means, sums


@pytest.mark.parametrize(
    ("kind", "biased"),
    # A boolean mask carries no bias.
    [("boolean", False), *((kind, biased) for kind in ("lowest", "infinite", "billion") for biased in (False, True))],
)
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("sink", [None, 0.7])
def test_entropies_are_those_of_a_plain_softmax(
    kind: str, biased: bool, window: int | None, sink: float | None
) -> None:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(SAMPLES, HEADS, LENGTH, LENGTH, generator=generator)
    behind = (PLACES[:, None] - PLACES[None, :]).abs()
    bias = -SLOPES[None, :, None, None] * behind if biased else torch.zeros(1, HEADS, LENGTH, LENGTH)
    hidden = hidden_keys(window)
    mask = mask_of(hidden, kind, bias if biased else torch.zeros(1))
    expected, expected_sums = plain(scores, hidden, bias, sink)
    torch.testing.assert_close(visible_keys(torch.zeros(scores.shape), mask), ~hidden)
    for appended in (False, True) if sink is not None else (False,):
        weights = pattern_of(mask, scores, sink, appended=appended)
        assert (weights[0, :, -1, :LENGTH].sum(dim=-1) < 0.99).all() == (sink is not None)
        torch.testing.assert_close(row_entropies(weights, mask, VALID), expected, rtol=0, atol=2e-6)
        # Without them the padding's rows, which see no key, are left out by the mask alone.
        torch.testing.assert_close(row_entropies(weights, mask, None), expected, rtol=0, atol=2e-6)
        sums, counts = statistic_sums(weights, mask, Tokens(torch.zeros(SAMPLES, LENGTH, dtype=torch.long), VALID))
        torch.testing.assert_close(sums[:2], expected_sums, rtol=0, atol=1e-5)
        n_rows = int(((~hidden).sum(dim=-1) > 1)[VALID].sum())
        assert counts[[STATISTICS.index("entropy"), STATISTICS.index("normalised_entropy")]].tolist() == [
            VALID.sum(),
            n_rows,
        ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_masks_hide_the_same_keys(dtype: torch.dtype) -> None:
    hidden = hidden_keys(None)
    bias = -SLOPES[None, :, None, None] * (PLACES[:, None] - PLACES[None, :]).abs()
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)[:, None] + bias.to(dtype)
    torch.testing.assert_close(visible_keys(torch.zeros(SAMPLES, HEADS, LENGTH, LENGTH), mask), ~hidden)


def test_a_mask_may_be_longer_than_the_keys_or_broadcast() -> None:
    weights = torch.full((1, 1, 2, 2), 0.5)
    longer = torch.tensor([[[[0.0, -math.inf, 0.0], [0.0, 0.0, 0.0]]]])
    assert visible_keys(weights, longer).tolist() == [[[True, False], [True, True]]]
    assert visible_keys(weights, torch.zeros(1, 1, 1, 1)).all()
    assert visible_keys(weights, None).all()


def test_a_boolean_mask_of_the_batch_hides_keys_while_patterns_are_read() -> None:
    model, ids = build("gpt2"), token_ids()
    model.set_attn_implementation("sdpa")
    causal = torch.ones(1, 1, 7, 7, dtype=torch.bool).tril().expand(2, -1, -1, -1).clone()
    causal[..., 2] = False
    causal[..., 2, 2] = True
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=causal).logits
    patterns: list[Tensor] = []
    with recorded_attention(model, lambda module, weights, mask: patterns.append(weights)), torch.no_grad():
        found = model(input_ids=ids, attention_mask=causal).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert all(bool((pattern[~causal.expand_as(pattern)] == 0).all()) for pattern in patterns)


def test_a_boolean_mask_of_the_batch_hides_keys_while_patterns_are_frozen() -> None:
    model, ids = build("gpt2"), token_ids()
    causal = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=causal).logits
        with eager_attention(model):
            found = model(input_ids=ids, attention_mask=causal).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_padding_in_float64_leaves_patterns_finite() -> None:
    """Llama takes the softmax in float32, where the lowest number of float64 is minus infinity."""
    single, batch = build("llama"), {"input_ids": token_ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    batch["attention_mask"][1, :3] = 0
    expected = attention_statistics(single, [batch])
    found = attention_statistics(copy.deepcopy(single).double(), [batch])
    for name in STATISTICS:
        torch.testing.assert_close(
            found.statistic(name), expected.statistic(name), rtol=0, atol=1e-5, equal_nan=True, msg=name
        )


def test_a_sinks_share_counts_in_the_divergence() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(2, SAMPLES, HEADS, LENGTH, LENGTH, generator=generator)
    mask = mask_of(hidden_keys(None), "lowest", torch.zeros(1))
    tokens = Tokens(torch.zeros(SAMPLES, LENGTH, dtype=torch.long), VALID)
    whole = [pattern_of(mask, each, sink, appended=True) for each, sink in zip(scores, (0.5, 2.5), strict=True)]
    expected = torch.zeros(HEADS, dtype=torch.float64)
    for sample, place in VALID.nonzero().tolist():
        for head in range(HEADS):
            expected[head] += divergence(*(each[sample, head, place].double().tolist() for each in whole))
    for first, second in (whole, [each[..., :-1] for each in whole]):
        found, count = divergence_sums(first, second, tokens)
        torch.testing.assert_close(found.sum(dim=0), expected, rtol=0, atol=1e-5)
        assert torch.equal(count, VALID.sum(dim=1).double())
    # Between rows without a sink there is nothing but their keys, however their sums are rounded.
    first, second = (pattern_of(mask, each, None) for each in scores)
    keys = jensen_shannon(first, second).masked_fill(~VALID[:, None], 0).sum(dim=2, dtype=torch.float64)
    assert torch.equal(divergence_sums(first, second, tokens)[0], keys)
