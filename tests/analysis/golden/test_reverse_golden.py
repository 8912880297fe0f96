from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from torch import nn

from lightning_goldy.analysis import Fluctuation, ReverseGoldenResult, Search, reverse_golden_parameters
from lightning_goldy.analysis.divergence import divergence_sum
from lightning_goldy.analysis.golden import golden, reverse
from lightning_goldy.analysis.golden.budget import STRATEGIES, Outside
from lightning_goldy.analysis.golden.golden import SINGLE_SHOTS, Budget, single_shot_scores
from lightning_goldy.analysis.golden.reverse import crossings
from lightning_goldy.analysis.gradients import SharedDivergence, divergence_gradient, pieces_of
from lightning_goldy.core import (
    CausalLMObjective,
    ClassifierObjective,
    FunctionObjective,
    ParameterMask,
    ParameterSpace,
    ParameterVector,
)
from lightning_goldy.core.mask import MaskedModel, PackedMask
from lightning_goldy.core.objective import TargetLogits, split_batch
from lightning_goldy.core.sharding import Replicas
from tests.references.models import CAUSAL, build, token_batch
from tests.references.reverse_golden import (
    best_by_enumeration,
    budget_of,
    masked_divergence_reference,
    masked_gradient_reference,
    reselected_reference,
    shrunk_reference,
    single_shot_reference,
    top_reference,
)
from tests.references.volume import divergence_reference

BATCH, HELD_OUT = token_batch(4, seed=1), token_batch(4, seed=2)


def sharp(family: str, scale: float = 4.0) -> nn.Module:
    """A model with opinions: fresh weights say nearly the same whatever is zeroed."""
    model = build(family).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(scale)
    return model


def target_logits(batch):
    """Rows at the targets of right-padded or unpadded samples, by indexing."""

    def logits(call):
        found = call(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return found[:, :-1][batch["labels"][:, 1:] != -100]

    return logits


def loss(model, batch):
    return CausalLMObjective().log_probs(model, batch).mean()


def random_mask(model: nn.Module, share: float, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) < share for name, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_at_the_logits_is_that_of_the_definition(dtype):
    torch.manual_seed(0)
    log_probs = (3 * torch.randn(7, 11, dtype=dtype)).log_softmax(-1)
    logits = (3 * torch.randn(7, 11, dtype=dtype)).requires_grad_()
    (log_probs.exp() * (log_probs - logits.log_softmax(-1))).sum().backward()
    assert torch.allclose(divergence_gradient(log_probs, logits), logits.grad, rtol=0, atol=1e-6)
    assert divergence_sum(log_probs, logits.detach()) / 7 == pytest.approx(
        divergence_reference(log_probs, logits.detach()), rel=1e-6
    )


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("cache", ["cpu", "none"])
def test_divergence_and_gradient_of_a_masked_model_are_those_of_the_definition(family, cache):
    model = sharp(family).double()
    space = ParameterSpace.of(model)
    mask = random_mask(model, 0.1)
    pieces = pieces_of([BATCH], 3)
    divergence = SharedDivergence(model, pieces, CausalLMObjective(), Replicas(), cache=cache)
    with MaskedModel(model, space) as masked:
        assert divergence(model) == 0.0
        masked.zero(mask)
        value = divergence(model)
        again, gradients = divergence.gradients(model, masked.parameters)
    # Families cast to float32 inside, so the last digits are theirs.
    expected = masked_divergence_reference(model, mask, target_logits(BATCH))
    assert value == pytest.approx(expected, rel=1e-6)
    assert again == pytest.approx(expected, rel=1e-6)
    for name, gradient in masked_gradient_reference(model, mask, target_logits(BATCH)).items():
        scale = gradient.abs().max()
        assert scale > 0
        assert torch.allclose(gradients[name], gradient, rtol=0, atol=2e-5 * float(scale))


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_single_shot_scores_and_their_masks_equal_the_reference(scope):
    model = sharp("gpt2")
    parameters = dict(model.named_parameters())
    divergence = SharedDivergence(model, pieces_of([BATCH], 1), CausalLMObjective(), Replicas())
    found = single_shot_scores(model, divergence, CausalLMObjective(), parameters, SINGLE_SHOTS)
    expected = single_shot_reference(model, pieces_of([BATCH], 1), loss)
    budget = Budget(parameters, 3.0, scope)
    result = reverse_golden_parameters(
        model, [BATCH], eval_batches=[HELD_OUT], top_k_percent=3.0, scope=scope, rounds=1, chunk_size=1
    )
    for name, scores in expected.items():
        for parameter, each in scores.items():
            assert torch.allclose(found[name][parameter], each, rtol=1e-4, atol=1e-6 * float(each.max()))
        mask = top_reference(found[name], 3.0, scope)
        chosen = budget.largest(found[name], budget.sizes())
        assert all(torch.equal(chosen[parameter], each) for parameter, each in mask.items())
        measured = masked_divergence_reference(model, mask, target_logits(HELD_OUT))
        assert result.single_shots[name] == pytest.approx(measured, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_a_pool_is_all_masked_and_the_best_others_and_of_it_the_best_stay(seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(6, 9)
    scores = torch.randn(6, 9, generator=generator)
    budget = Budget({"w": weight}, 30, "tensor")
    mask = torch.zeros(54, dtype=torch.bool)
    mask[torch.randperm(54, generator=generator)[:10]] = True
    mask = mask.view(6, 9)
    for size, pool in ((10, 10), (10, 13), (14, 14), (14, 19), (10, 25), (14, 54)):
        found = budget.reselected({"w": scores}, {"w": mask}, [size], [pool])["w"]
        assert torch.equal(found, reselected_reference(scores, mask, size, pool))
        assert int((mask & ~found).sum()) <= pool - size


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("levels", [0, 3])
def test_what_lies_beside_a_mask_is_looked_for_once(scope, levels):
    generator = torch.Generator().manual_seed(levels)
    scores = {name: torch.randn(size, generator=generator) for name, size in (("a", (40, 50)), ("b", (900,)))}
    if levels:  # many ties
        scores = {name: (levels * part).round() for name, part in scores.items()}
    budget = Budget(scores, 5, scope)
    sizes = budget.sizes()
    mask = PackedMask(
        budget.selections({n: torch.randn(p.shape, generator=generator) for n, p in scores.items()}, sizes)
    )
    before = {name: part.clone() for name, part in scores.items()}
    outside = Outside()
    for factor in (1.6, 1.0, 1.3, 1.05):
        for grown in (1.0, 1.2):
            wanted = [math.ceil(grown * size) for size in sizes]
            pools = budget.pools(wanted, factor)
            expected = budget.reselected(scores, mask, wanted, pools)
            if factor == grown == 1.0:
                continue
            known = [outside.count(group) for group in range(len(sizes))]
            found = mask.replaced(budget.reselections(scores, mask, wanted, pools, outside))
            after = [outside.count(group) for group in range(len(sizes))]
            assert after == [max(*pair) for pair in zip(known, map(int.__sub__, pools, sizes), strict=True)]
            for name in scores:
                assert torch.equal(found[name], expected[name])
                assert torch.equal(scores[name], before[name])
    if scope == "global":
        whole = torch.cat([part.flatten() for part in scores.values()])
        held = torch.cat([mask[name].flatten() for name in scores])
        for size, pool in ((sizes[0], sizes[0] + 30), (sizes[0] + 9, sizes[0] + 50)):
            found = mask.replaced(budget.reselections(scores, mask, [size], [pool], outside))
            assert torch.equal(
                torch.cat([found[name].flatten() for name in scores]), reselected_reference(whole, held, size, pool)
            )


@functools.cache
def searched(strategy, scope):
    """A search by a strategy; several tests look at it."""
    return reverse_golden_parameters(
        sharp("gpt2"),
        [BATCH],
        eval_batches=[HELD_OUT],
        top_k_percent=2,
        scope=scope,
        strategy=strategy,
        min_delta=0,
        exact=4,
        rounds=40,
    )


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_every_strategy_keeps_its_promises(strategy, scope):
    model, result = sharp("gpt2"), searched(strategy, scope)
    sizes = [parameter.numel() for parameter in model.parameters()]
    if scope == "tensor":
        assert result.masked == tuple(budget_of(2, size) for size in sizes)
    assert result.count == (sum(result.masked) if scope == "tensor" else budget_of(2, sum(sizes)))
    mask = dict(result.mask)
    for batch, value in ((HELD_OUT, result.kl_divergence), (BATCH, result.search_divergence)):
        assert value == pytest.approx(masked_divergence_reference(model, mask, target_logits(batch)), rel=1e-4)
    assert result.passes <= 41
    best = [entry["best_kl"] for entry in result.history]
    assert all(first <= second for first, second in itertools.pairwise(best))
    assert best[-1] == result.search_divergence
    for entry in result.history:
        assert entry["kl"] >= max(entry["greedy_kl"], entry["pool_kl"] or 0.0)
        assert entry["pool"] >= entry["size"]
    accepted = sum(entry["accepted"] for entry in result.history)
    assert (accepted == 0) if strategy == "none" else (accepted > 0)


def test_the_strategy_is_not_ignored():
    """Two strategies take different ways, and most come to different masks."""
    results = [searched(strategy, "tensor") for strategy in STRATEGIES]
    for first, second in itertools.combinations(results, 2):
        ways = [[entry["pool"] for entry in each.history] for each in (first, second)]
        assert ways[0] != ways[1]
    masks = {b"".join(part.numpy().tobytes() for part in result.mask.values()) for result in results}
    assert len(masks) >= 5


@pytest.mark.parametrize(
    ("options", "ways"),
    [
        ({}, [30, 8, 16]),
        ({"rounds": 180}, [30, 8]),
        ({"rounds": 120}, [30]),
        ({"rounds": 50}, [30]),
        ({"rounds": 12}, []),
        ({"strategy": "none"}, []),
        ({"exact": 0}, []),
    ],
)
def test_small_masks_shrink_after_they_have_grown(options, ways, monkeypatch):
    """Where there are rounds for it, in as many ways; what is masked meanwhile falls from each width to the budget."""
    asked, starts, gains, shrink = [[]], [], reverse.MaskSearch._gains, reverse.MaskSearch._shrink

    def noting(self, mask):
        asked[-1].append(sum(map(mask.count, mask)))
        return gains(self, mask)

    def shrinking(self, now, width, rounds, means=None):
        asked.append([])
        found = shrink(self, now, width, rounds, means)
        starts.append((width, rounds, asked[-1], means))
        asked.append([])
        return found

    monkeypatch.setattr(reverse.MaskSearch, "_gains", noting)
    monkeypatch.setattr(reverse.MaskSearch, "_shrink", shrinking)
    settings = {"top_k_percent": 0.5, "exact": 4, "amplitude": 0, **options}
    result = reverse_golden_parameters(sharp("gpt2"), [BATCH], eval_batches=[HELD_OUT], **settings)
    first = [start for start in starts if start[3] is None]
    assert [width for width, *_ in first] == ways
    for width, rounds, sizes, _ in first:
        assert len(sizes) == rounds >= 12
        assert sizes == sorted(sizes, reverse=True)
        assert 0.6 * width * result.count < sizes[0] <= width * result.count
        assert sizes[-1] == result.count
    again = starts[len(first) :]
    assert all(sizes[0] <= width * result.count + len(result.masked) for width, _, sizes, _ in again)
    # Of fewer rounds no 16 are left.
    assert bool(again) == (len(ways) > 1)
    assert result.passes <= options.get("rounds", 40 if options.get("exact") == 0 else 280) + 1


@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("width", [30, 8])
def test_what_a_mask_shrinks_to_is_that_of_whole_sorts(scope, width):
    """The same averages of autograd through the definition, and the best of every mask of the budget."""
    model, logits = sharp("llama").double(), target_logits(BATCH)
    space = ParameterSpace.of(model)
    with MaskedModel(model, space) as masked:
        divergence = SharedDivergence(model, [BATCH], CausalLMObjective(), Replicas())
        budget = Budget(space.resolve(model), 1.0, scope)
        settings = Search(rounds=180, exact=4)
        search = reverse.MaskSearch(masked, divergence, budget, settings, Fluctuation(), "harmonic_oscillator")
        scores = single_shot_scores(model, divergence, CausalLMObjective(), space.resolve(model), ["fisher"])["fisher"]
        search.start({name: part.clone() for name, part in scores.items()})
        found = search._shrink({start: wide for start, _, wide in search._wide}[width], width, 14)
        rounds = search.passes
    assert rounds == 14
    swing = Fluctuation().strategy("harmonic_oscillator")
    swings = [swing(step, 0.0) for step in range(1, rounds + 1)]
    scores = {name: scores[name] for name in space.names}
    best = shrunk_reference(model, scores, 1.0, scope, swings, logits, start=width)
    assert found.value == pytest.approx(best[0], rel=1e-9)
    assert all(torch.equal(found.mask[name], best[1][name]) for name in space.names)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_more_ways_and_wider_masks_again_are_never_worse_than_one_way(family, scope, monkeypatch):
    """Where the search stood before it shrank in other ways and breathed: the best mask so far is never given up."""
    reached, shrink, breathe = [], reverse.MaskSearch._shrink, reverse.MaskSearch._breathe

    def shrinking(self, *arguments):
        found = shrink(self, *arguments)
        reached.append((found.value, self.best_divergence))
        return found

    def breathing(self, gain):
        before = self.best_divergence
        found = breathe(self, gain)
        assert self.best_divergence >= before
        # Gains that are handed on are those at the best mask.
        assert found is None or self.best_divergence == before
        return found

    monkeypatch.setattr(reverse.MaskSearch, "_shrink", shrinking)
    monkeypatch.setattr(reverse.MaskSearch, "_breathe", breathing)
    model = sharp(family)
    result = reverse_golden_parameters(model, [BATCH], eval_batches=[HELD_OUT], top_k_percent=0.5, scope=scope, exact=4)
    assert len(reached) > 3
    assert result.search_divergence >= max(max(pair) for pair in reached)
    logits = target_logits(BATCH)
    mask = {name: result.mask[name] for name in result.mask.space.names}
    assert result.search_divergence == pytest.approx(masked_divergence_reference(model, mask, logits), rel=1e-3)


def test_plain_greedy_only_adds():
    """The mask of the whole budget holds the start and every gain on the way, worked out with whole sorts."""
    model, logits = sharp("llama"), target_logits(BATCH)
    result = reverse_golden_parameters(
        model, [BATCH], eval_batches=[BATCH], top_k_percent=2, strategy="none", rounds=3, max_stagnant_iterations=9
    )
    start = single_shot_reference(model, pieces_of([BATCH], 1), loss)["fisher"]
    masks = top_share(start, {name: torch.zeros_like(each, dtype=torch.bool) for name, each in start.items()}, 1 / 4)
    values = []
    for share in (2 / 4, 3 / 4, 1.0):
        gradients = masked_gradient_reference(model, masks, logits)
        gains = {name: -gradients[name] * p.detach() for name, p in model.named_parameters()}
        masks = top_share(gains, masks, share)
        values.append(masked_divergence_reference(model, masks, logits))
    assert [entry["kl"] for entry in result.history] == pytest.approx(values, rel=1e-3)


def top_share(scores, mask, share):
    kept = {name: torch.where(mask[name], math.inf, each) for name, each in scores.items()}
    found = {}
    for name, each in kept.items():
        size = max(1, math.floor(share * budget_of(2, each.numel()) + 0.5))
        found[name] = reselected_reference(each, torch.zeros_like(mask[name]), size, each.numel())
    return found


def test_planted_elements_are_found_and_the_divergence_is_that_of_the_closed_form():
    """Only 5 of 400 weights say anything, all for the first class; without them the prediction is uniform."""
    torch.manual_seed(1)
    linear = nn.Linear(200, 2, bias=False)
    planted = torch.randperm(400)[:5]
    assert 0 < int((planted < 200).sum()) < 5
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight.view(-1)[planted] = torch.where(planted < 200, 3.0, -3.0)
    inputs = torch.rand(8, 200) + 0.5
    batch = (inputs, torch.randint(0, 2, (8,)))
    result = reverse_golden_parameters(
        linear, [batch], ClassifierObjective(), eval_batches=[batch], top_k_percent=1.25, scope="global"
    )
    assert set(result.mask["weight"].view(-1).nonzero().flatten().tolist()) == set(planted.tolist())
    p = linear(inputs).detach().double().softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    assert result.kl_divergence == pytest.approx(math.log(2) - float(entropy), rel=1e-5)


def test_what_holds_the_prediction_back_is_not_masked():
    """Of 5 weights that say anything one speaks against the other four: alone it turns the prediction around."""
    torch.manual_seed(1)
    linear = nn.Linear(200, 2, bias=False)
    planted = torch.randperm(400)[:5]
    (against,) = planted[planted >= 200].tolist()
    with torch.no_grad():
        linear.weight.zero_()
        linear.weight.view(-1)[planted] = 3.0
    inputs = torch.rand(8, 200) + 0.5
    batch = (inputs, torch.randint(0, 2, (8,)))
    result = reverse_golden_parameters(
        linear, [batch], ClassifierObjective(), eval_batches=[batch], top_k_percent=1.25, scope="global"
    )
    chosen = set(result.mask["weight"].view(-1).nonzero().flatten().tolist())
    assert set(planted.tolist()) - chosen == {against}
    left = 3 * inputs[:, against - 200].double()
    turned = torch.stack([torch.zeros_like(left), left], dim=-1)
    expected = divergence_reference(linear(inputs).detach(), turned)
    assert result.kl_divergence == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_few_elements_against_all_masks_there_are(seed):
    """Never above the best of all masks or below a single shot, and here above three quarters of the best."""
    torch.manual_seed(seed)
    linear = nn.Linear(5, 2, bias=False)
    with torch.no_grad():
        linear.weight.copy_(2 * torch.randn(2, 5))
    inputs = torch.randn(16, 5)
    batch = (inputs, torch.randint(0, 2, (16,)))
    weight, anchor = linear.weight.detach().double(), linear(inputs).detach()

    def divergence(chosen):
        moved = weight.clone().view(-1)
        moved[list(chosen)] = 0.0
        return divergence_reference(anchor, inputs.double() @ moved.view(2, 5).T)

    best, _ = best_by_enumeration(weight.view(-1), 3, divergence)
    result = reverse_golden_parameters(
        linear, [batch], ClassifierObjective(), eval_batches=[batch], top_k_percent=30, min_delta=0
    )
    assert max(result.single_shots.values()) <= result.kl_divergence + 1e-6
    assert 0.75 * best <= result.kl_divergence <= best + 1e-6


def test_ties_leave_the_budget_exact():
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(10, 3))
            self.gain = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return (x @ self.weight) * self.gain * torch.tensor([1.0, 2.0, 3.0])

    batch = (torch.ones(4, 10), torch.tensor([0, 1, 2, 0]))
    for scope, expected in (("tensor", (3, 1)), ("global", None)):
        result = reverse_golden_parameters(
            Same(), [batch], ClassifierObjective(), eval_batches=[batch], top_k_percent=10, scope=scope
        )
        assert result.count == (4 if expected else 3)
        assert expected is None or result.masked == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_comes_back_as_it_was(dtype):
    model = sharp("gpt2").to(dtype)
    model.train()
    model.transformer.h[0].eval()
    frozen = model.transformer.h[1].mlp.c_fc.weight.requires_grad_(False)
    gradient = model.lm_head.weight.grad = torch.full_like(model.lm_head.weight, 3.0)
    before, modes = ParameterVector.of(model), [module.training for module in model.modules()]
    kept, rng = frozen.clone(), torch.get_rng_state()
    space = ParameterSpace.of(model, exclude=["*wpe*"])
    result = reverse_golden_parameters(
        model, [BATCH], eval_batches=[HELD_OUT], top_k_percent=1, strategy="chaos_driven", space=space, rounds=4
    )
    assert all(torch.equal(before[name], after) for name, after in ParameterVector.of(model).items())
    assert [module.training for module in model.modules()] == modes
    assert model.lm_head.weight.grad is gradient
    assert bool((gradient == 3).all())
    assert not frozen.requires_grad
    assert torch.equal(kept, frozen)
    assert model.transformer.wpe.weight.requires_grad
    assert torch.equal(rng, torch.get_rng_state())
    assert result.kl_divergence > max(result.single_shots.values())
    assert "transformer.wpe.weight" not in result.mask


def test_a_failure_in_the_middle_restores_the_weights():
    model = sharp("gpt2")
    before = ParameterVector.of(model)

    def fail(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reverse_golden_parameters(model, [BATCH], eval_batches=[BATCH], top_k_percent=1, progress=fail)
    assert all(torch.equal(before[name], after) for name, after in ParameterVector.of(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_under_autocast_the_zeroed_weights_are_the_ones_that_run():
    """Autocast keeps low-precision copies of weights; a stale one would leave the divergence at 0."""
    model = sharp("gpt2")
    plain = reverse_golden_parameters(model, [BATCH], eval_batches=[HELD_OUT], top_k_percent=1, rounds=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = reverse_golden_parameters(model, [BATCH], eval_batches=[HELD_OUT], top_k_percent=1, rounds=4)
    assert result.single_shots["gradient"] == pytest.approx(plain.single_shots["gradient"], rel=0.2)
    assert result.kl_divergence > result.single_shots["gradient"]


class Counting(CausalLMObjective):
    def __init__(self) -> None:
        self.calls = {True: 0, False: 0}
        self.sizes = {True: 0, False: 0}

    def logits_and_targets(self, model, batch):
        self.calls[torch.is_grad_enabled()] += 1
        self.sizes[torch.is_grad_enabled()] += len(batch["input_ids"])
        return super().logits_and_targets(model, batch)


@pytest.mark.parametrize("strategy", ["none", "harmonic_oscillator"])
def test_passes_and_evaluations_are_counted(strategy):
    objective, seen = Counting(), []
    result = reverse_golden_parameters(
        sharp("gpt2"),
        [BATCH],
        objective,
        eval_batches=[HELD_OUT],
        top_k_percent=2,
        strategy=strategy,
        rounds=5,
        min_delta=0,
        progress=lambda *at: seen.append(at),
    )
    # The four samples are scored one by one.
    assert objective.calls[True] - 3 == result.passes <= 6
    assert objective.sizes[True] == 4 * result.passes
    assert objective.calls[False] == result.evaluations - 3 * result.passes
    assert seen == [(done, 5) for done in range(1, result.passes)]


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_the_cost_counts_every_sample_of_every_pass(cache):
    objective = Counting()
    options = {"top_k_percent": 2, "rounds": 3, "min_delta": 0, "chunk_size": 1, "cache": cache}
    result = reverse_golden_parameters(sharp("gpt2"), [BATCH], objective, eval_batches=[HELD_OUT], **options)
    assert result.cost.backwards == objective.sizes[True]
    assert result.cost.forwards == objective.sizes[True] + objective.sizes[False]


# What a hook itself keeps is put back after an analysis.
SEEN = {"forwards": 0, "backwards": 0}


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_the_cost_is_what_hooks_on_the_model_see(cache):
    model = sharp("gpt2")
    SEEN.update(forwards=0, backwards=0)

    def note(module, arguments, output):
        size = len(output.logits)
        SEEN["forwards"] += size
        if output.logits.requires_grad:
            output.logits.register_hook(lambda _: SEEN.update(backwards=SEEN["backwards"] + size))

    options = {"top_k_percent": 2, "rounds": 3, "min_delta": 0, "chunk_size": 3, "cache": cache}
    with model.register_forward_hook(note):
        result = reverse_golden_parameters(model, [BATCH], eval_batches=[HELD_OUT], **options)
    assert vars(result.cost) == SEEN
    assert (result.n_samples, result.n_eval_samples) == (4, 4)


def test_result_goes_to_json_and_back():
    result = reverse_golden_parameters(sharp("gpt2"), [BATCH], eval_batches=[HELD_OUT], top_k_percent=1, rounds=2)
    again = ReverseGoldenResult.from_json(result.to_json())
    assert all(torch.equal(again.mask[name], result.mask[name]) for name in result.mask)
    assert type(result.mask) is type(again.mask) is ParameterMask
    assert again.history == result.history
    assert again.summary() == result.summary()
    assert result.over_gradient == result.kl_divergence / result.single_shots["gradient"]
    assert result.density == result.count / result.mask.space.numel


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k_percent": 0}, r"top_k_percent must lie in \(0, 100\]; got 0"),
        ({"score": "fishr"}, "did you mean 'fisher'"),
        ({"scope": "blocks"}, "unknown scope 'blocks'"),
        ({"strategy": "greedy"}, "unknown strategy 'greedy'"),
        ({"rounds": 0}, "rounds must be at least 1; got 0"),
        ({"chunk_size": 0}, "chunk_size must be at least 1; got 0"),
        ({"max_stagnant_iterations": 0}, "max_stagnant_iterations must be at least 1"),
        ({"momentum": 2.0}, r"momentum must lie in \[0, 1\); got 2.0"),
        ({"cache": "disk"}, "unknown cache 'disk'"),
        ({"eval_batches": []}, "eval_batches is empty"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        reverse_golden_parameters(build("gpt2"), [BATCH], **{"eval_batches": [BATCH], **options})


def test_settings_may_come_whole_or_one_by_one():
    options = {"eval_batches": [HELD_OUT], "top_k_percent": 2, "strategy": "chaos_driven"}
    search, fluctuation = Search(rounds=3, seed=4, chunk_size=2), Fluctuation(amplitude=0.5, min_delta=0.0)
    model = sharp("gpt2")
    whole = reverse_golden_parameters(model, [BATCH], search=search, fluctuation=fluctuation, **options)
    single = reverse_golden_parameters(
        model, [BATCH], rounds=3, seed=4, chunk_size=2, amplitude=0.5, min_delta=0.0, **options
    )
    mixed = reverse_golden_parameters(
        model, [BATCH], search=Search(rounds=9, seed=4), fluctuation=fluctuation, rounds=3, chunk_size=2, **options
    )
    assert whole.summary() == single.summary() == mixed.summary()
    assert whole.passes == 4
    with pytest.raises(TypeError, match=r"takes no 'round'; did you mean 'rounds'"):
        reverse_golden_parameters(model, [BATCH], round=3, **options)


def test_bad_batches_weights_and_objectives_are_named():
    model = build("gpt2")
    with pytest.raises(ValueError, match=r"there is no sample: batches is empty"):
        reverse_golden_parameters(model, [], eval_batches=[BATCH])
    with pytest.raises(TypeError, match="has a loss but no logits"):
        reverse_golden_parameters(
            model, [BATCH], FunctionObjective(lambda model, x: model(**x).loss), eval_batches=[BATCH]
        )
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"weights of transformer\.h\.1\.mlp\.c_fc\.weight are not finite"):
        reverse_golden_parameters(model, [BATCH], eval_batches=[BATCH])


def test_a_model_that_breaks_when_masked_is_an_error():
    class Dividing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([2.0, 1.0]))

        def forward(self, x):
            return x / self.weight

    batch = (torch.ones(2, 2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="divergence of the masked model is nan nats: its outputs are not finite"):
        reverse_golden_parameters(Dividing(), [batch], ClassifierObjective(), eval_batches=[batch], top_k_percent=50)


def test_a_parameter_that_the_objective_ignores_is_named():
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "idle": nn.Linear(2, 2)})

    def logits(model, x):
        return TargetLogits(model["used"](x), torch.zeros(len(x)).long(), torch.arange(len(x)), len(x))

    class Task(FunctionObjective):
        def log_probs(self, model, batch):
            return logits(model, batch).log_probs()

    objective = Task(lambda model, x: logits(model, x).loss(), logits)
    with pytest.warns(UserWarning, match=r"does not depend on idle\.weight .*zero.*exclude="):
        whole = reverse_golden_parameters(model, [torch.ones(2, 2)], objective, eval_batches=[torch.ones(2, 2)])
    assert whole.mask["used.weight"].any()
    space = ParameterSpace.of(model, exclude=["idle*"])
    options = {"eval_batches": [torch.ones(2, 2)], "space": space}
    assert reverse_golden_parameters(model, [torch.ones(2, 2)], objective, **options).count > 0


def test_users_scores_start_the_search_and_compete():
    from lightning_goldy.analysis import register_score
    from lightning_goldy.analysis.golden.golden import SCORES

    name = "test_only_magnitude"

    @register_score(name)
    def magnitude(gradient, value):
        return value.abs()

    try:
        result = reverse_golden_parameters(sharp("gpt2"), [BATCH], eval_batches=[HELD_OUT], score=name, rounds=2)
        assert list(result.single_shots) == ["gradient", "taylor", "fisher", name]
        assert result.score == name
    finally:
        del SCORES._entries[name]


def test_batches_of_one_and_of_all_give_the_same_scores_and_the_same_mask():
    """Scores are of single samples, bit for bit; the course of the search differs by rounding only."""
    model = sharp("llama").double()
    parameters, objective = dict(model.named_parameters()), CausalLMObjective()
    scores = []
    for size in (1, 3, None):
        divergence = SharedDivergence(model, pieces_of([BATCH], size), objective, Replicas())
        scores.append(single_shot_scores(model, divergence, objective, parameters, SINGLE_SHOTS))
    for name in scores[0]:
        for parameter, each in scores[0][name].items():
            assert all(torch.equal(each, other[name][parameter]) for other in scores[1:])
    options = {"eval_batches": [HELD_OUT], "top_k_percent": 0.5, "scope": "global", "rounds": 6, "exact": 8}
    results = [reverse_golden_parameters(model, list(parts), **options) for parts in ([BATCH], split_batch(BATCH))]
    assert results[0].kl_divergence == pytest.approx(results[1].kl_divergence, rel=1e-6)
    assert results[0].single_shots == pytest.approx(results[1].single_shots, rel=1e-6)
    assert results[0].mask.jaccard(results[1].mask) > 0.99


def test_no_single_exchange_among_the_candidates_helps_at_the_end():
    """Of 40 weights 3 are masked: more would come of no exchange of one for another, for all were measured."""
    torch.manual_seed(4)
    linear = nn.Linear(10, 4, bias=False)
    with torch.no_grad():
        linear.weight.copy_(2 * torch.randn(4, 10))
    batch = (torch.randn(12, 10), torch.randint(0, 4, (12,)))
    options = {"eval_batches": [batch], "top_k_percent": 7.5, "scope": "global", "min_delta": 0.0}
    result = reverse_golden_parameters(linear, [batch], ClassifierObjective(), **options)
    anchor, weight = linear(batch[0]).detach(), linear.weight.detach().double().view(-1)

    def divergence(chosen):
        moved = weight.clone()
        moved[list(chosen)] = 0.0
        return divergence_reference(anchor, batch[0].double() @ moved.view(4, 10).T)

    chosen = set(result.mask["weight"].view(-1).nonzero().flatten().tolist())
    best, _ = best_by_enumeration(weight, 3, divergence)
    assert divergence(chosen) == pytest.approx(result.kl_divergence, rel=1e-5)
    worst = min(chosen, key=lambda one: divergence(chosen - {one}) * -1)
    reached = max(divergence(chosen - {worst} | {other}) for other in set(range(40)) - chosen)
    assert result.kl_divergence >= reached - 1e-6 or result.kl_divergence >= 0.9 * best
    assert result.history[-1]["kept"] == "exact"


class Switched(nn.Module):
    """One huge weight drives a saturated unit, so gradients say nothing of it; without it every prediction flips."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 5, bias=False)
        self.outer = nn.Linear(5, 2, bias=False)
        with torch.no_grad():
            self.inner.weight.mul_(0.1)
            self.inner.weight[2, 3] = 40.0
            self.outer.weight.mul_(0.1)
            self.outer.weight[:, 2] = torch.tensor([1.0, -1.0])

    def forward(self, x):
        return 4 * self.outer(torch.tanh(self.inner(x)))


def test_what_carries_the_largest_activation_is_found_where_gradients_vanish():
    torch.manual_seed(5)
    model, inputs = Switched(), torch.randn(6, 6)
    inputs[:, 3] = 2.0
    batch = (inputs, torch.zeros(6, dtype=torch.long))
    space = ParameterSpace.of(model, include=["inner*"])
    options = {"eval_batches": [batch], "top_k_percent": 0.1, "scope": "global", "space": space}
    found = reverse_golden_parameters(model, [batch], ClassifierObjective(), **options)
    assert found.mask["inner.weight"].nonzero().tolist() == [[2, 3]]
    assert found.kl_divergence > 10 * max(found.single_shots.values())
    blind = reverse_golden_parameters(model, [batch], ClassifierObjective(), exact=0, **options)
    assert blind.kl_divergence < found.kl_divergence
    seen = {"inner.weight": (torch.tensor([1, 1, 9.0, 1, 1]), torch.tensor([1, 1, 1, 8.0, 1, 1]))}
    assert crossings(seen, {"inner.weight": model.inner.weight}, Replicas())[0] == ("inner.weight", 2 * 6 + 3)


@pytest.mark.parametrize("seed", range(3))
def test_the_exchanges_that_promise_most_are_made_first(seed):
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.randn(12, generator=generator) for name in "abc"}
    mask = {name: torch.arange(12) < 4 for name in "abc"}
    budget = Budget(scores, 34, "tensor")
    promised = {
        name: (scores[name][4:].sort(descending=True).values[:4] - scores[name][:4].sort().values).tolist()
        for name in "abc"
    }
    ranked = sorted(((value, name) for name, values in promised.items() for value in values if value > 0), reverse=True)
    for total in (1, 3, 5):
        expected = [sum(name == each for _, each in ranked[:total]) for name in "abc"]
        assert budget.exchanges(scores, mask, [4, 4, 4], total) == expected
    promises = {}
    for total in (5, 3, 1):
        # Fewer exchanges are part of more, which no score is read again for.
        known = scores if total == 5 else {}
        expected = budget.exchanges(scores, mask, [4, 4, 4], total)
        assert budget.exchanges(known, mask, [4, 4, 4], total, promises) == expected
    pairs = budget.pairs(scores, mask, 5)
    values = [float(scores[one.name][one.position] - scores[other.name][other.position]) for one, other in pairs]
    assert values == pytest.approx([value for value, _ in ranked[:5]])


class Normed(nn.Module):
    """The norm of a vector, which has no slope at zero."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([3.0, 2.0, 0.5]))
        self.bias = nn.Parameter(torch.linspace(0.001, 0.006, 6))

    def forward(self, x):
        return torch.stack([self.weight.square().sum().sqrt() * x, (x * self.bias.sum() + 1)], dim=-1)


def test_where_nothing_is_known_of_a_gradient_the_mask_grows_by_the_smallest_weights():
    batch = (torch.ones(2), torch.tensor([0, 1]))
    options = {"eval_batches": [batch], "top_k_percent": 44, "scope": "global", "rounds": 6, "score": "taylor"}
    with pytest.warns(UserWarning, match=r"elements masked the gradients of the divergence of weight are not finite"):
        result = reverse_golden_parameters(Normed(), [batch], ClassifierObjective(), **options)
    assert result.count == 4
    assert "smallest" in {entry["kept"] for entry in result.history}
    assert result.mask["weight"].all()
    assert result.kl_divergence >= max(result.single_shots.values())


def test_sums_of_scores_one_after_the_other_find_the_same_mask(monkeypatch):
    options = {"eval_batches": [HELD_OUT], "top_k_percent": 2, "rounds": 3, "score": "taylor"}
    whole = reverse_golden_parameters(sharp("gpt2"), [BATCH], **options)
    monkeypatch.setattr(reverse, "_APART", 0)
    held, zeros = [], golden.zeros_like_parts
    monkeypatch.setattr(golden, "zeros_like_parts", lambda parts: held.append(len(parts)) or zeros(parts))
    single = reverse_golden_parameters(sharp("gpt2"), [BATCH], **options)
    assert len(held) == 2
    assert single.single_shots == whole.single_shots
    assert all(torch.equal(single.mask[name], whole.mask[name]) for name in whole.mask)
    assert (single.passes, single.cost.backwards) == (whole.passes + 1, whole.cost.backwards + whole.n_samples)
