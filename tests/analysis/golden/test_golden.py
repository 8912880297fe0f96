from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertConfig, BertForTokenClassification

from lightning_goldy.analysis import GoldenResult, agreement, golden_parameters, jaccard, register_score
from lightning_goldy.analysis.agreement import binomial_tail, fitted_rates, row_column_null, row_column_nulls
from lightning_goldy.analysis.golden.golden import SCORES, _Watched, marks_by_column, marks_by_row
from lightning_goldy.core import (
    CausalLMObjective,
    ClassifierObjective,
    FunctionObjective,
    ParameterMask,
    ParameterSpace,
    ParameterVector,
)
from lightning_goldy.core.mask import jaccard as mask_jaccard
from lightning_goldy.core.objective import split_batch
from lightning_goldy.core.pieces import random_tokens
from lightning_goldy.core.sharding import Replicas
from tests.references.golden import golden_masks, row_column_null_reference
from tests.references.models import CAUSAL, FAMILIES, build, class_batch, token_batch


def naive_loss(model, sample):
    if "classifier" in dict(model.named_children()):
        inputs = {key: value for key, value in sample.items() if key != "labels"}
        return F.cross_entropy(model(**inputs).logits, sample["labels"])
    logits = model(input_ids=sample["input_ids"], attention_mask=sample["attention_mask"]).logits[:, :-1].float()
    return F.cross_entropy(logits.flatten(0, 1), sample["labels"][:, 1:].flatten(), ignore_index=-100)


def subject(family):
    model = build(family)
    if family == "bert":
        return model, class_batch(), ClassifierObjective()
    return model, token_batch(), CausalLMObjective()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("score", "scope", "quorum", "percent"),
    [
        ("gradient", "tensor", 1.0, 5.0),
        ("taylor", "tensor", 0.5, 10.0),
        ("fisher", "global", 0.5, 3.0),
        ("gradient", "global", 1.0, 20.0),
        ("gradient", "tensor", 0.34, 100.0),
    ],
)
def test_masks_equal_the_slow_reference_bit_for_bit(family, score, scope, quorum, percent):
    model, batch, objective = subject(family)
    options = {"score": score, "scope": scope, "quorum": quorum}
    result = golden_parameters(model, [batch], objective, top_k_percent=percent, **options)
    expected = golden_masks(model, list(split_batch(batch)), naive_loss, percent=percent, **options)
    assert list(result.mask) == list(expected)
    assert {name: torch.equal(result.mask[name], mask) for name, mask in expected.items()} == dict.fromkeys(
        expected, True
    )
    assert result.count == sum(int(mask.sum()) for mask in expected.values())
    assert result.count > 0 or quorum == 1.0


@pytest.mark.parametrize("family", CAUSAL)
def test_bfloat16_with_its_many_ties_equals_the_reference(family):
    model, batch = build(family).bfloat16(), token_batch(4)
    result = golden_parameters(model, [batch], top_k_percent=5, quorum=0.5)
    expected = golden_masks(model, list(split_batch(batch)), naive_loss, percent=5, quorum=0.5)
    assert all(torch.equal(result.mask[name], mask) for name, mask in expected.items())


def test_large_tensors_take_the_bracketed_path_and_still_equal_the_reference():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 10))
    batch = (torch.randn(5, 300), torch.randint(0, 10, (5,)))
    for scope in ("tensor", "global"):
        result = golden_parameters(model, [batch], ClassifierObjective(), top_k_percent=5, scope=scope, quorum=0.6)
        samples = list(split_batch(batch))
        expected = golden_masks(
            model, samples, lambda m, s: F.cross_entropy(m(s[0]), s[1]), percent=5, scope=scope, quorum=0.6
        )
        assert all(torch.equal(result.mask[name], mask) for name, mask in expected.items())


def test_unused_embedding_rows_are_ties_at_zero_and_go_to_the_smaller_index():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(2000, 16)
            self.head = nn.Linear(16, 3)

        def forward(self, ids):
            return self.head(self.table(ids).mean(dim=1))

    model = Bag()
    batch = (torch.randint(0, 2000, (4, 5)), torch.tensor([0, 1, 2, 0]))
    result = golden_parameters(model, [batch], ClassifierObjective(), top_k_percent=5, quorum=0.5)
    samples = list(split_batch(batch))
    expected = golden_masks(model, samples, lambda m, s: F.cross_entropy(m(s[0]), s[1]), percent=5, quorum=0.5)
    assert torch.equal(result.mask["table.weight"], expected["table.weight"])


@pytest.mark.parametrize("chunks", [1, 2, 3, 6])
def test_how_samples_are_batched_does_not_matter(chunks):
    model, batch = build("gpt2"), token_batch(6)
    parts = [{key: value[index::chunks] for key, value in batch.items()} for index in range(chunks)]
    whole = golden_parameters(model, [batch], quorum=0.5)
    assert jaccard(golden_parameters(model, parts, quorum=0.5).mask, whole.mask) == 1.0


def test_tied_weights_receive_the_gradient_of_both_uses():
    model, batch = build("gpt2"), token_batch(3)
    assert model.lm_head.weight is model.transformer.wte.weight
    mask = golden_parameters(model, [batch], top_k_percent=2).mask
    assert "transformer.wte.weight" in mask
    assert "lm_head.weight" not in mask


def test_a_planted_two_percent_is_found():
    """The loss of every sample depends on 20 of 1,000 weights, which are found exactly and nothing else."""
    torch.manual_seed(5)
    planted = torch.randperm(1000)[:20]
    batch = torch.zeros(32, 1000)
    batch[:, planted] = torch.randn(32, 20) + 3

    model = nn.Linear(1000, 1, bias=False)
    objective = FunctionObjective(lambda model, x: model(x).square().mean())
    result = golden_parameters(model, [batch], objective, top_k_percent=2)
    assert set(result.mask["weight"][0].nonzero().flatten().tolist()) == set(planted.tolist())
    assert result.density == pytest.approx(0.02)
    assert result.over_null == pytest.approx(1.0)  # a row of votes is one of shared columns


def test_noise_agrees_no_more_than_chance():
    """Gradients that are independent over samples overlap as often as the stated chance says, within four sigmas."""
    torch.manual_seed(6)
    batch = torch.randn(3, 40_000)
    objective = FunctionObjective(lambda model, x: model(x).sum())
    model = nn.Linear(40_000, 1, bias=False)
    result = golden_parameters(model, [batch], objective, top_k_percent=20)
    expected = 40_000 * 0.2**3
    assert abs(result.count - expected) < 4 * math.sqrt(expected)
    loose = golden_parameters(model, [batch], objective, top_k_percent=20, quorum=0.5)
    expected = 40_000 * (3 * 0.2**2 * 0.8 + 0.2**3)
    assert abs(loose.count - expected) < 4 * math.sqrt(expected)


def test_a_higher_quorum_keeps_a_subset():
    model, batch = build("llama"), token_batch(6)
    masks = [golden_parameters(model, [batch], top_k_percent=10, quorum=q).mask for q in (0.2, 0.5, 1.0)]
    for loose, strict in itertools.pairwise(masks):
        assert all(not (strict[name] & ~loose[name]).any() for name in strict)
    assert sum(masks[0].count()) > sum(masks[2].count())


def test_exactly_k_elements_when_one_sample_votes():
    model, batch = build("gpt2"), token_batch(1)
    result = golden_parameters(model, [batch], top_k_percent=7)
    for name, golden in zip(result.mask, result.golden, strict=True):
        assert golden == max(1, math.floor(result.mask[name].numel() * 0.07 + 0.5))
    assert result.golden == result.marked


def test_the_model_comes_back_as_it_was():
    model, batch = build("gpt2"), token_batch(3)
    model.train()
    model.transformer.h[0].eval()
    frozen = model.transformer.h[1].mlp.c_fc.weight.requires_grad_(False)
    model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, 3.0)
    gradient = model.lm_head.weight.grad
    before, modes = ParameterVector.of(model), [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    golden_parameters(model, [batch], space=ParameterSpace.of(model, exclude=["*wpe*"]))
    assert all(torch.equal(before[name], after) for name, after in ParameterVector.of(model).items())
    assert [module.training for module in model.modules()] == modes
    assert model.lm_head.weight.grad is gradient
    assert bool((gradient == 3).all())
    assert all(p.grad is None for p in model.parameters() if p is not model.lm_head.weight)
    assert not frozen.requires_grad
    assert model.transformer.wpe.weight.requires_grad
    assert torch.equal(rng, torch.get_rng_state())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters() if p._post_accumulate_grad_hooks)


def test_gradient_checkpointing_changes_nothing():
    model, batch = build("llama"), token_batch(3)
    plain = golden_parameters(model, [batch], quorum=0.5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert jaccard(golden_parameters(model, [batch], quorum=0.5).mask, plain.mask) == 1.0


def test_selection_and_progress():
    model, batch = build("gpt2"), token_batch(4)
    seen = []
    space = ParameterSpace.of(model, include=["*mlp*weight"], last_layers=1)
    options = {"n_samples": 3, "space": space}
    golden_parameters(model, [batch], **options, progress=lambda *at: seen.append(at))
    assert seen == [(done, 6) for done in range(1, 7)]
    seen.clear()
    result = golden_parameters(model, [batch], **options, control=False, progress=lambda *at: seen.append(at))
    assert set(result.mask) == {"transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_proj.weight"}
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert result.n_samples == 3


def test_result_goes_to_json_and_back():
    result = golden_parameters(build("gpt2"), [token_batch(3)], quorum=0.5)
    again = GoldenResult.from_json(result.to_json())
    assert all(torch.equal(again.mask[name], result.mask[name]) for name in result.mask)
    assert again.mask.space == result.mask.space
    assert type(result.mask) is type(again.mask) is ParameterMask
    assert again.mask.density == result.density
    assert again.metrics() == result.metrics()
    assert (again.golden, again.expected, again.score) == (result.golden, result.expected, result.score)
    with pytest.raises(ValueError, match="unexpected or missing field"):
        GoldenResult.from_json('{"mask": 1}')


def test_the_jaccard_index_is_that_of_masks():
    space = ParameterSpace.of(nn.Linear(3, 2))
    first, second = (ParameterMask.random(space, 50.0, seed=seed) for seed in (1, 2))
    empty = ParameterMask.from_indices(space, {})
    for one, other in ((first, second), (first, first), (first, empty), (empty, empty)):
        assert jaccard(one, other) == one.jaccard(other) == one.iou(other)
        assert jaccard(ParameterVector(space, dict(one)), other) == one.jaccard(other)
    assert jaccard is mask_jaccard


def test_users_add_scores():
    name = "test_only_negative_gradient"

    @register_score(name)
    def negative(gradient, value):
        return -gradient

    try:
        result = golden_parameters(build("gpt2"), [token_batch(2)], score=name, quorum=0.5)
        assert result.score == name
        with pytest.raises(ValueError, match="registered already"):
            register_score(name)(negative)
    finally:
        del SCORES._entries[name]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k_percent": 0}, r"top_k_percent must lie in \(0, 100\]; got 0"),
        ({"top_k_percent": 100.5}, r"\(0, 100\]"),
        ({"score": "taylr"}, "did you mean 'taylor'"),
        ({"scope": "blocks"}, "unknown scope 'blocks'"),
        ({"quorum": 0}, r"quorum must lie in \(0, 1\]; got 0"),
        ({"n_samples": 0}, "n_samples must be at least 1"),
        ({"n_samples": 7}, "the batches hold only 4 samples"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        golden_parameters(build("gpt2"), [token_batch(4)], **options)


def test_bad_batches_weights_and_gradients_are_named():
    model = build("gpt2")
    with pytest.raises(ValueError, match="the batches are empty"):
        golden_parameters(model, [])
    with pytest.raises(ValueError, match="every label is masked"):
        golden_parameters(model, [token_batch(2, query=12)])
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weights of transformer\.h\.1\.mlp\.c_fc\.weight are not finite"):
        golden_parameters(model, [token_batch(2)])
    infinite = FunctionObjective(lambda model, x: (model(x).sum() * 1e30).exp())
    with pytest.raises(ValueError, match="gradient of weight is not finite"):
        golden_parameters(nn.Linear(2, 1, bias=False), [torch.ones(1, 2)], infinite)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_parameter_that_the_objective_ignores_is_named_and_not_golden(scope):
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})
    objective = FunctionObjective(lambda model, x: model["used"](x).square().sum())
    batches, options = [torch.ones(2, 2)], {"top_k_percent": 80, "scope": scope}
    with pytest.warns(UserWarning, match=r"does not depend on idle\.weight .*zero.*exclude="):
        found = golden_parameters(model, batches, objective, **options)
    assert not found.mask["idle.weight"].any()
    assert not found.mask["idle.bias"].any()
    space = ParameterSpace.of(model, exclude=["idle*"])
    alone = golden_parameters(model, batches, objective, space=space, **options)
    assert alone.count > 0
    if scope == "tensor":
        assert all(torch.equal(found.mask[name], mask) for name, mask in alone.mask.items())
    space = ParameterSpace.of(model, include=["idle*"])
    with pytest.raises(ValueError, match=r"depends on none of the 2 selected parameters \(idle\.weight, \.\.\.\)"):
        golden_parameters(model, batches, FunctionObjective(lambda model, x: model["used"](x).sum()), space=space)


def test_many_samples_need_wider_votes():
    model = nn.Linear(3, 1, bias=False)
    objective = FunctionObjective(lambda model, x: model(x).sum())
    result = golden_parameters(model, [torch.tensor([[1.0, 0, 0]]).repeat(300, 1)], objective, top_k_percent=30)
    assert (result.needed, result.mask["weight"].tolist()) == (300, [[True, False, False]])


@pytest.mark.parametrize(("n", "needed", "p"), [(5, 5, 0.05), (7, 3, 0.2), (40, 20, 0.4), (3, 1, 1.0)])
def test_binomial_tail_is_the_sum_of_its_terms(n, needed, p):
    exact = sum(math.comb(n, m) * p**m * (1 - p) ** (n - m) for m in range(needed, n + 1))
    assert float(binomial_tail(n, needed, torch.tensor(p, dtype=torch.float64))) == pytest.approx(exact, rel=1e-12)


class Marking(nn.Module):
    """A matrix whose gradient is the sample itself, so that a test decides what is marked."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns))


MARKING = FunctionObjective(lambda model, x: (model.weight * x).sum())


def votes_of(rates: torch.Tensor, n_samples: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n_samples, *rates.shape, generator=generator) < rates


@pytest.mark.parametrize("needed", [2, 5, 8])
def test_independent_rows_and_columns_are_what_the_null_expects(needed):
    """Votes of products of rates give a ratio of 1, within four standard errors of the count."""
    torch.manual_seed(0)
    rates = torch.rand(48).square()[:, None] * torch.rand(40).sqrt()
    votes = votes_of(rates, 8).sum(dim=0)
    found, expected = int((votes >= needed).sum()), row_column_null(votes, 8, needed)
    assert abs(found - expected) < 4 * math.sqrt(expected)
    assert expected == pytest.approx(row_column_null_reference(votes, 8, needed), rel=1e-4)


def test_a_planted_interaction_gives_its_ratio():
    """Elements that all samples mark, one in every row and column, are more than their rows and columns explain."""
    rates, diagonal = torch.full((200, 200), 0.3), torch.eye(200, dtype=torch.bool)
    background = 0.3**6 * (200 * 200 - 200)
    # The votes of a row are 6 of its planted element and a binomial number of others, so its fitted rate scatters, and
    # by Jensen's inequality its sixth power is larger than that of the mean rate (199 x 0.3 + 1) / 200; of columns too.
    others = torch.arange(6 * 199 + 1, dtype=torch.float64)
    chances = torch.distributions.Binomial(6 * 199, torch.tensor(0.3).double()).log_prob(others).exp()
    mean = (199 * 0.3 + 1) / 200
    scatter = float((chances * ((6 + others) / (6 * 200)) ** 6).sum()) / mean**6
    ratio = (200 + background) / (200 * 200 * mean**6 * scatter**2)
    ratios = []
    for seed in range(10):
        votes = (votes_of(rates, 6, seed) | diagonal).sum(dim=0)
        ratios.append(int((votes >= 6).sum()) / row_column_null(votes, 6, 6))
    assert sum(ratios) / 10 == pytest.approx(ratio, rel=0.03)


def test_at_a_quorum_of_one_the_null_has_a_closed_form():
    votes = votes_of(torch.rand(40, 30, generator=torch.Generator().manual_seed(2)) * 0.3, 4).sum(dim=0)
    rows, columns = votes.sum(dim=1).double() / 4, votes.sum(dim=0).double() / 4
    total = rows.sum()
    expected = (rows**4).sum() * (columns**4).sum() / total**4
    assert row_column_null(votes, 4, 4) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_rates_that_would_exceed_one_are_cut_and_the_sums_still_match(seed):
    generator = torch.Generator().manual_seed(seed)
    votes = torch.zeros(12, 9, dtype=torch.long)
    votes[:3] = torch.randint(2, 6, (3, 9), generator=generator)
    votes[:, :2] += torch.randint(0, 3, (12, 2), generator=generator)
    votes.clamp_(max=5)
    rows, columns = votes.sum(dim=1), votes.sum(dim=0)
    first, second = fitted_rates(rows, columns, 5)
    assert float(first.max() * second.max()) > 1
    rates = (first[:, None] * second).clamp(max=1)
    assert torch.allclose(rates.sum(dim=0), columns.double() / 5, rtol=0, atol=1e-6)
    assert torch.allclose(rates.sum(dim=1), rows.double() / 5, rtol=0, atol=1e-6)
    assert row_column_null(votes, 5, 4) == pytest.approx(row_column_null_reference(votes, 5, 4), rel=1e-3)
    # Several at once are those one by one, an empty one among them.
    both = fitted_rates(torch.stack([rows, 0 * rows, rows]), torch.stack([columns, 0 * columns, columns]), 5)
    assert all(
        torch.equal(part[2], alone) and not part[1].any() for part, alone in zip(both, (first, second), strict=True)
    )


def test_the_null_of_one_sample_is_its_votes_even_where_rates_have_no_bound() -> None:
    # Two columns that every row with a vote has are cut at 1 everywhere: their rates grow from round to round.
    rows = np.zeros(64, dtype=int)
    rows[:20] = [2, 2, 3, 2, 6, 4, 2, 1, 6, 7, 2, 1, 2, 2, 3, 1, 2, 1, 1, 1]
    columns = np.array([0, 0, 0, 16, 0, 16, 8, 2, 2, 0, 4, 0, 0, 0, 3, 0])
    expected, rates = row_column_nulls(rows, columns, 1, 1)
    assert float(expected) == pytest.approx(51, rel=1e-9)
    assert np.isfinite(rates).all()
    random = np.random.default_rng(0)
    for _ in range(100):
        chances = np.exp(random.normal(0, 3, 12))[:, None] * np.exp(random.normal(-2, 3, 9))
        votes = random.binomial(1, chances.clip(max=1))
        expected, rates = row_column_nulls(votes.sum(1), votes.sum(0), 1, 1)
        assert float(expected) == pytest.approx(votes.sum(), abs=0.05)
        assert np.isfinite(rates).all()


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_rates_that_are_one_but_for_rounding_are_not_cut(needed: int) -> None:
    # Of all votes in one column the rates are those of the rows themselves, and one is 1.
    votes = torch.zeros(28, 3, dtype=torch.long)
    votes[[3, 6, 7, 26], 1] = torch.tensor([3, 1, 1, 1])
    expected = float(binomial_tail(3, needed, votes[:, 1].double() / 3).nan_to_num(0.0).sum())
    assert row_column_null(votes, 3, needed) == pytest.approx(expected, rel=1e-9)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 9), st.integers(0, 2**31))
@example(1, 9, 0, 0)  # one row that is not whole words
@settings(max_examples=25, deadline=None)
def test_marks_are_counted_by_row_and_column(rows, columns, offset, seed):
    """Also where words of eight marks would begin between words, and where a byte of 255 would overflow."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.rand(offset + rows * columns, generator=generator) < torch.rand(1, generator=generator) * 1.5
    marks = flat[offset:].view(rows, columns)
    for few in (0, marks.numel()):  # by words, and in one sum
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("lightning_goldy.analysis.golden.golden._FEW", few)
            assert torch.equal(marks_by_row(marks), marks.sum(dim=1).int())
            assert torch.equal(marks_by_column(marks), marks.sum(dim=0).int())


@pytest.mark.parametrize("n_samples", [1, 6])
@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 13), (300, 16), (513, 3)])
def test_marks_of_samples_add_up_to_sums_of_rows_and_columns(shape, n_samples):
    """Made of all marks at once, also where rows end between bytes and where a byte of 255 would overflow."""
    marks = torch.rand(n_samples, *shape, generator=torch.Generator().manual_seed(0)) < 0.9
    watched = _Watched("weight", shape, n_samples)
    for index, mask in enumerate(marks):
        watched.add(index, mask)
    watched.sum_over(Replicas(), torch.device("cpu"))
    assert np.array_equal(watched.rows, marks.sum(dim=2).numpy())
    assert np.array_equal(watched.columns, marks.sum(dim=1).numpy())


def test_rates_of_several_matrices_are_those_of_each_alone():
    generator = torch.Generator().manual_seed(0)
    rare = [torch.randint(0, 4, (4, 12, 9), generator=generator) // 3, torch.zeros(1, 12, 9, dtype=torch.long)]
    votes = torch.cat([*rare, torch.randint(0, 6, (3, 12, 9), generator=generator)])
    votes[5:, :2] = 5
    together = fitted_rates(votes.sum(dim=2), votes.sum(dim=1), 5)
    for index, matrix in enumerate(votes):
        for found, expected in zip(together, fitted_rates(matrix.sum(dim=1), matrix.sum(dim=0), 5), strict=True):
            assert torch.allclose(found[index], expected, rtol=1e-12, atol=0)
            assert found[index].isfinite().all()


def dense_votes(n_samples: int, spread: float) -> torch.Tensor:
    """Marks of samples that agree on dense rows and columns, shape ``[samples, 40, 60]``."""
    generator = torch.Generator().manual_seed(7)
    rows, columns = (torch.randn(size, generator=generator).mul(spread).exp() for size in (40, 60))
    scores = torch.randn(n_samples, 40, 60, generator=generator).abs() * rows[:, None] * columns
    scores *= torch.randn(n_samples, 40, 1, generator=generator).mul(0.5).exp()
    return scores >= scores.flatten(1).quantile(0.9, dim=1)[:, None, None]


@pytest.mark.parametrize(("n", "needed"), [(8, 8), (8, 5), (16, 1), (24, 12), (300, 300), (300, 200)])
@pytest.mark.parametrize("spread", [0.1, 2.0])
def test_the_null_summed_by_powers_is_the_sum_over_all_elements(n, needed, spread):
    """Also where terms of both signs cancel, and where powers leave the range of numbers."""
    votes = dense_votes(8, spread).sum(dim=0) * n // 8
    rates = fitted_rates(votes.sum(dim=1), votes.sum(dim=0), n)
    assert (float(rates[0].max() * rates[1].max()) > 1) == (spread > 1)
    tails = binomial_tail(n, needed, (rates[0][:, None] * rates[1]).clamp(max=1).clamp(min=1e-300))
    assert row_column_null(votes, n, needed) == pytest.approx(float(tails.sum()), rel=2e-3)


@pytest.mark.parametrize("spread", [1.0, 2.0, 3.0])
def test_rates_of_dense_rows_take_few_rounds(spread, monkeypatch):
    """Rounds alone took up to 90; the sums match whatever the fit begins with."""
    votes = dense_votes(8, spread)
    rows, columns = (votes.sum(dim=axis).sum(dim=0).numpy() for axis in (2, 1))
    made, round_of = [], agreement._cut_rates
    monkeypatch.setattr(agreement, "_cut_rates", lambda *sums: made.append(1) or round_of(*sums))
    first, second = (part.numpy() for part in fitted_rates(torch.from_numpy(rows), torch.from_numpy(columns), 8))
    assert 0 < len(made) // 2 <= 25
    rates = (first[:, None] * second).clip(max=1)
    assert abs(rates.sum(axis=1) - rows / 8).max() < 1e-5
    assert abs(rates.sum(axis=0) - columns / 8).max() < 1e-5
    without = [part.sum(dim=0).numpy() - part.numpy() for part in (votes.sum(dim=2), votes.sum(dim=1))]
    anew, _ = row_column_nulls(*without, 7, 7)
    near, _ = row_column_nulls(*without, 7, 7, near=second, done=1e-5)
    assert near == pytest.approx(anew, rel=1e-3)
    assert anew.tolist() == pytest.approx(
        [row_column_null(votes.sum(0) - mine.int(), 7, 7) for mine in votes], rel=1e-9
    )


@pytest.mark.parametrize("columns", [20, 24])
def test_the_interval_of_a_part_of_the_elements_is_cautious(columns, monkeypatch):
    torch.manual_seed(3)
    samples = list(torch.rand(7, 1, 3000, columns) + 0.5 * torch.rand(3000, 1) + 0.5 * torch.rand(columns))
    model, options = Marking(3000, columns), {"top_k_percent": 30, "quorum": 0.8}
    whole = golden_parameters(model, samples, MARKING, **options)
    monkeypatch.setattr("lightning_goldy.analysis.golden.golden._WATCHED", 7 * 8192)
    part = golden_parameters(model, samples, MARKING, **options)
    assert part.over_null == whole.over_null
    # Some hundred elements that one sample decides on scatter among the samples, so a part is cautious.
    assert 0.5 * whole.error < part.error < whole.error + 0.1


def test_the_result_holds_the_null_of_its_votes_and_the_interval_of_a_plain_jackknife():
    """Every element is watched here, so the interval is that of leaving out one sample after the other."""
    torch.manual_seed(3)
    samples = torch.rand(7, 1, 30, 20) + 0.5 * torch.rand(30, 1) + 0.5 * torch.rand(20)
    model, options = Marking(30, 20), {"top_k_percent": 30, "quorum": 0.5}
    batches = list(samples)
    result = golden_parameters(model, batches, MARKING, **options)
    marks = [golden_parameters(model, [sample], MARKING, **options).mask["weight"] for sample in batches]
    ratios = []
    for left_out in (None, *range(7)):
        votes = torch.stack([mark for index, mark in enumerate(marks) if index != left_out])
        needed = math.ceil(0.5 * len(votes))
        null = row_column_null_reference(votes.sum(dim=0), len(votes), needed)
        ratios.append(int((votes.sum(dim=0) >= needed).sum()) / null)
    assert result.over_null == pytest.approx(ratios[0], rel=1e-4)
    logarithms = torch.tensor(ratios[1:]).log()
    error = math.sqrt(6 / 7 * float((logarithms - logarithms.mean()).square().sum()))
    assert result.error == pytest.approx(error, rel=1e-3)
    low, high = result.interval
    assert low < result.over_null < high
    assert result.control is None
    assert "times what shared rows and columns explain" in result.headline()
    again = golden_parameters(model, batches[::-1], MARKING, **options)
    assert torch.equal(again.mask["weight"], result.mask["weight"])
    assert again.metrics() == pytest.approx(result.metrics(), nan_ok=True)


def test_vectors_have_no_null_and_few_samples_no_interval():
    result = golden_parameters(build("gpt2"), [token_batch(2)], quorum=0.5, control=False)
    matrices = [len(shape) > 1 for shape in result.mask.space.shapes]
    assert [value is not None for value in result.expected] == matrices
    assert result.interval is None
    assert result.metrics()["control_count"] is None


def test_random_tokens_are_the_control():
    """Same lengths and padding, other tokens, whatever the order; what is golden is what a run of their own finds."""
    model, batch = build("gpt2"), token_batch(4)
    result = golden_parameters(model, [batch], quorum=0.5, seed=3)
    drawn = [random_tokens(sample, model.config.vocab_size, 3) for sample in split_batch(batch)]
    for sample, other in zip(split_batch(batch), drawn, strict=True):
        assert not torch.equal(sample["input_ids"], other["input_ids"])
        assert torch.equal(sample["labels"] == -100, other["labels"] == -100)
        kept = other["labels"] != -100
        assert torch.equal(other["labels"][kept], other["input_ids"][kept])
        assert torch.equal(other["attention_mask"], sample["attention_mask"])
    alone = golden_parameters(model, drawn, quorum=0.5, control=False)
    assert result.control == alone.golden
    both = result.mask & alone.mask
    shared = sum(int(part.sum()) for part in both.values() if part.ndim > 1)
    assert result.shared == shared
    assert result.cost.backwards == 8
    other = golden_parameters(model, list(split_batch(batch))[::-1], quorum=0.5, seed=3)
    assert (other.control, other.shared) == (result.control, result.shared)
    assert golden_parameters(model, [batch], quorum=0.5, seed=4).control != result.control


def test_the_control_leaves_classes_of_positions_as_they_are():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    model = BertForTokenClassification(BertConfig(vocab_size=60, num_labels=3, **sizes))
    tokens = torch.randint(0, 60, (4, 6))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens % 3}
    result = golden_parameters(model, [batch], top_k_percent=50, quorum=0.5)
    assert result.control is not None
    assert sum(result.control) > 0
    drawn = random_tokens(batch, 60, classes=True)
    assert torch.equal(drawn["labels"], batch["labels"])
    assert not torch.equal(drawn["input_ids"], tokens)


def test_nothing_golden_has_no_interval():
    result = golden_parameters(build("llama"), [token_batch()], top_k_percent=0.01)
    empty = dataclasses.replace(result, golden=(0,) * len(result.golden), error=0.1)
    assert empty.over_null == 0
    assert empty.interval is None
