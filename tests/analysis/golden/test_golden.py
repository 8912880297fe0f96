from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_goldy.analysis import GoldenResult, golden_parameters, jaccard, register_score
from lightning_goldy.analysis.golden.golden import SCORES, binomial_tail
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
from tests.references.golden import golden_masks
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
    assert result.density_over_chance > 1e40


def test_noise_agrees_no_more_than_chance():
    """Gradients that are independent over samples overlap as often as the stated chance says, within four sigmas."""
    torch.manual_seed(6)
    batch = torch.randn(3, 40_000)
    objective = FunctionObjective(lambda model, x: model(x).sum())
    model = nn.Linear(40_000, 1, bias=False)
    result = golden_parameters(model, [batch], objective, top_k_percent=20)
    expected = 40_000 * 0.2**3
    assert math.fsum(result.chance) == pytest.approx(expected)
    assert abs(result.count - expected) < 4 * math.sqrt(expected)
    loose = golden_parameters(model, [batch], objective, top_k_percent=20, quorum=0.5)
    expected = 40_000 * (3 * 0.2**2 * 0.8 + 0.2**3)
    assert math.fsum(loose.chance) == pytest.approx(expected)
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
    result = golden_parameters(model, [batch], n_samples=3, space=space, progress=lambda *at: seen.append(at))
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
    assert (again.golden, again.chance, again.score) == (result.golden, result.chance, result.score)
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
    assert binomial_tail(n, needed, p) == pytest.approx(exact, rel=1e-12)
