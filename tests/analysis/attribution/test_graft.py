from __future__ import annotations

import copy
import dataclasses
import math
import sys

import pytest
import torch
from torch import nn

from lightning_goldy.analysis import apply_change, change_attribution, graft, graft_curve, learn_mask, save_change
from lightning_goldy.analysis.attribution import baseline_mask, interleaved
from lightning_goldy.analysis.attribution.units import chosen_masks, element_space
from lightning_goldy.core import (
    CausalLMObjective,
    ClassifierObjective,
    FunctionObjective,
    ParameterSpace,
    ParameterVector,
)
from lightning_goldy.core.batches import sample_keys
from lightning_goldy.core.files import percentage
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import block_of
from lightning_goldy.core.store import StoreError
from lightning_goldy.report.topics.attribution import graft_caption
from tests.references.attribution import finetuned_pair, moved
from tests.references.models import build, token_batch

SHARES = (0.01, 0.1, 0.5, 1.0)


@pytest.fixture(scope="module")
def subject():
    base = build("llama", 0).eval()
    model = moved(base, build("llama", 1), 0.5).eval()
    scored, held_out, other = (token_batch(6, seed=seed) for seed in (1, 2, 3))
    found = change_attribution(model, base, [scored], metric="kl", shares=SHARES, keep_scores=True)
    return model, base, scored, held_out, other, found


@pytest.fixture(scope="module")
def curve(subject):
    model, base, scored, held_out, other, found = subject
    return graft_curve(model, base, found, [scored], [held_out], [other])


def test_the_whole_change_is_the_finetune_bit_for_bit(subject, curve):
    model, base, *_, found = subject
    full = curve.of("attribution")[-1]
    finetune = curve.of("finetune")[0]
    assert (full.share, full.value, full.harm, full.kl) == (1.0, finetune.value, finetune.harm, finetune.kl)
    assert (finetune.recovered, finetune.low, finetune.high) == (1.0, 1.0, 1.0)
    state = graft(model, base, found.mask(1.0))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    nothing = ParameterMask(found.mask(1.0).space, {name: torch.zeros_like(m) for name, m in found.mask(1.0).items()})
    state = graft(model, base, nothing)
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())


def test_every_point_is_that_of_a_model_made_by_hand(subject, curve):
    model, base, _, held_out, other, found = subject
    objective = CausalLMObjective()

    def measured(state):
        made = copy.deepcopy(base)
        made.load_state_dict(state)
        with torch.no_grad():
            anchor = objective.logits_and_targets(base, held_out).logits.log_softmax(-1)
            logits = objective.logits_and_targets(made, held_out).logits.log_softmax(-1)
            value = float((anchor.exp() * (anchor - logits)).sum(-1).mean())
            return value, float(objective.loss(made, other) - objective.loss(base, other))

    now = measured(model.state_dict())[0]
    before = dict(base.named_parameters())
    for point in curve.records:
        if point.method == "attribution":
            state = graft(model, base, found.mask(point.share))
        elif point.method == "interpolation":
            state = {
                name: before[name] + point.factor * (value - before[name]) if name in before else value
                for name, value in model.state_dict().items()
            }
        else:
            continue
        value, harm = measured(state)
        assert point.value == pytest.approx(value, abs=1e-6)
        assert point.recovered == pytest.approx(value / now, abs=1e-4)
        assert point.harm == pytest.approx(harm, abs=1e-5)


def test_drop_and_rescale_keeps_the_change_in_the_mean(subject):
    model, base, scored, held_out, other, found = subject
    for share in (0.5, 0.1):
        kept = ParameterMask.random(found.mask(1.0).space, 100 * share)
        state = graft(model, base, kept, factor=1 / share)
        name = "model.layers.0.mlp.gate_proj.weight"
        change = (state[name] - base.state_dict()[name])[kept[name]]
        torch.testing.assert_close(change, (model.state_dict()[name] - base.state_dict()[name])[kept[name]] / share)
    curve = graft_curve(model, base, found, [scored], [held_out], [other], baselines=["random", "drop_and_rescale"])
    for random, rescaled in zip(curve.of("random"), curve.of("drop_and_rescale"), strict=True):
        assert random.share == rescaled.share
        assert (random.value == rescaled.value) == (random.share == 1.0)


def test_the_frontier_holds_what_nothing_beats(curve):
    known = [point for point in curve.records if point.harm is not None]
    assert 0 < len(curve.frontier) < len(known)
    for point in known:
        beaten = any(
            other.recovered >= point.recovered
            and other.harm <= point.harm
            and (other.recovered, other.harm) != (point.recovered, point.harm)
            for other in known
        )
        assert point.on_frontier != beaten


def test_a_graft_is_chosen_by_what_it_recovers_or_harms(curve):
    point = curve.choose(recover=0.5)
    enough = [other for other in curve.records if other.recovered >= 0.5]
    assert point.harm == min(other.harm for other in enough)
    point = curve.choose(harm=0.0)
    assert point.recovered == max(other.recovered for other in curve.records if other.harm <= 0.0)
    assert curve.choose(recover=0.5, methods=["attribution"]).method == "attribution"
    with pytest.raises(ValueError, match=r"no graft tried recovers 100000000 % .*the most that one recovers is"):
        curve.choose(recover=1e6)
    with pytest.raises(ValueError, match=r"one of recover= and harm="):
        curve.choose()


def test_shares_that_recover_are_the_smallest_tried(curve):
    points = curve.of("attribution")
    share = curve.share_for(0.5)
    assert share == min(point.share for point in points if point.recovered >= 0.5)
    assert curve.share_for(1e6) is None
    assert f"{curve.share_for(0.95):.2g} of the elements recover" in curve.headline()


@pytest.mark.parametrize("pieces", ["units", "tensors", "blocks"])
def test_grafts_of_whole_pieces_stand_beside_as_many_random_elements(subject, pieces):
    model, base, scored, held_out, _, found = subject
    curve = graft_curve(model, base, found, [scored], [held_out], pieces=pieces, baselines=["random"], shares=[0.35])
    own = [point for method in ("attribution", "greedy") for point in curve.of(method)]
    assert {point.share for point in curve.of("random")} == {point.share for point in own}
    assert own
    assert all("as many random ones" in curve._beside(point) for point in own if point.share < 1)
    assert "as many random ones" in curve.headline()


@pytest.mark.parametrize("pieces", ["units", "tensors", "blocks"])
def test_whole_pieces_are_taken_by_what_they_contribute_per_element(subject, pieces):
    model, base, scored, held_out, _, found = subject
    for share, mask in chosen_masks(found, element_space(found, model), model, pieces, SHARES):
        assert mask.density == pytest.approx(share)
        if pieces == "tensors":
            assert all(flags.all() or not flags.any() for flags in mask.values())
    curve = graft_curve(model, base, found, [scored], [held_out], pieces=pieces, baselines=["random"])
    assert curve.of("attribution")[-1].value == curve.of("finetune")[0].value
    assert curve.base_collateral is None
    assert "harm to other text was not measured" in curve.headline()
    with pytest.raises(ValueError, match="harm was not measured"):
        curve.choose(harm=0.1)


def test_blocks_are_searched_for_greedily_on_the_samples_that_score(subject, monkeypatch):
    model, base, scored, held_out, _, found = subject
    objective, space = CausalLMObjective(), found.levels.space
    blocks = {}
    for name in space:
        blocks.setdefault(block_of(name), set()).add(name)
    start, end = (dict(one.named_parameters()) for one in (base, model))

    def divergence(batch, names):
        made = copy.deepcopy(base)
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                parameter.copy_((end if name in names else start)[name])
            now, before = (objective.logits_and_targets(one, batch).logits.log_softmax(-1) for one in (made, base))
        return float((before.exp() * (before - now)).sum(-1).mean())

    inside, expected, tries = set(), [], 0
    while len(expected) < len(blocks):
        left = [block for block in blocks if not blocks[block] <= inside]
        tries += len(left)
        inside |= blocks[max(left, key=lambda block: divergence(scored, inside | blocks[block]))]
        expected.append((sum(space.shape(name).numel() for name in inside) / space.numel, divergence(held_out, inside)))
    curve = graft_curve(model, base, found, [scored], [held_out], pieces="blocks", baselines=[])
    points = curve.of("greedy")
    assert [(point.share, point.value) for point in points] == [pytest.approx(pair, rel=1e-4) for pair in expected]
    assert points[-1].value == curve.of("finetune")[0].value
    # The base's predictions on either half, base, finetune and every point on the held-out one, and what was tried.
    assert curve.cost.forwards == 6 * (2 + 2 + len(curve.points) + tries)
    # What exceeds the largest share is not tried, and no more blocks at a step than the cap.
    monkeypatch.setattr(sys.modules["lightning_goldy.analysis.attribution.graft"], "CANDIDATES", 1)
    first = graft_curve(model, base, found, [scored], [held_out], pieces="blocks", baselines=[], shares=[0.4])
    own = first.of("greedy")
    assert 0 < len(own) < len(blocks)
    assert max(point.share for point in own) <= 0.4
    assert first.cost.forwards == 6 * (2 + 2 + len(first.points) + len(own))
    with pytest.raises(ValueError, match="there is no sample: the batches are empty"):
        graft_curve(model, base, found, [], [held_out], pieces="blocks")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factors": [math.nan]}, r"factors lie in \(0, 1\]; got nan"),
        ({"factors": [-0.5]}, r"factors lie in \(0, 1\]; got -0.5"),
        ({"factors": [math.inf]}, r"factors lie in \(0, 1\]; got inf"),
        ({"factors": ["half"]}, r"factors lie in \(0, 1\]; got 'half'"),
        ({"factors": [0.5, 0.5]}, "factors name 0.5 twice"),
        ({"factors": []}, "factors is empty"),
        ({"shares": []}, "shares is empty"),
        ({"shares": [0.1, math.nan]}, r"shares lie in \(0, 1\]; got nan"),
        ({"baselines": ["random", "random"]}, "baselines name 'random' twice"),
    ],
)
def test_wrong_arguments_are_refused(subject, options, message):
    model, base, scored, held_out, _, found = subject
    with pytest.raises(ValueError, match=message):
        graft_curve(model, base, found, [scored], [held_out], **options)


def test_the_gradient_baseline_is_the_first_order_at_the_base(subject, curve):
    model, base, scored, held_out, *_ = subject
    first = change_attribution(model, base, [scored], metric="loss", nodes="base", shares=SHARES)
    loss = change_attribution(model, base, [scored], metric="loss", shares=SHARES)
    made = graft_curve(model, base, loss, [scored], [held_out], baselines=["gradient"])
    expected = graft_curve(model, base, first, [scored], [held_out], baselines=[])
    gradient, own = made.of("gradient"), expected.of("attribution")
    assert [point.value for point in gradient] == [point.value for point in own]
    assert made.cost.backwards == len(scored["input_ids"])


def test_the_model_comes_back_as_it_was(subject):
    model, base, scored, held_out, other, found = subject
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    graft_curve(model, base, found, [scored], [held_out], [other])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_attribution_beats_magnitude_and_random_elements():
    model, base, scored, held_out = finetuned_pair()
    found = change_attribution(model, base, [scored], shares=[0.05, 0.2])
    curve = graft_curve(model, base, found, [scored], [held_out], baselines=["magnitude", "random"])
    for place in (0, 1):  # 5 % and 20 %
        attributed = curve.of("attribution")[place].recovered
        assert attributed > curve.of("magnitude")[place].recovered + 0.05
        assert attributed > curve.of("random")[place].recovered + 0.2


def test_the_planted_set_recovers_the_whole_effect():
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(100, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    model = copy.deepcopy(base)
    inputs = torch.randn(64, 100, dtype=torch.float64) * 1e-4
    inputs[:, [17, 64]] += torch.randn(64, 2, dtype=torch.float64) + 2
    labels = (inputs[:, [17, 64]] > 2).sum(1)
    halves = [(inputs[rows], labels[rows]) for rows in (slice(32), slice(32, 64))]
    objective, space = ClassifierObjective(), ParameterSpace.of(base, ["0.weight"])
    gradient = torch.autograd.grad(objective.loss(base, (inputs, labels)), base[0].weight)[0]
    planted = torch.zeros(40, 100, dtype=torch.bool)
    planted[:, [17, 64]] = True
    with torch.no_grad():
        noise = torch.randn(40, 100, dtype=torch.float64).sign()
        model[0].weight.add_(0.01 * torch.where(planted, -gradient.sign(), noise))
    start = ParameterVector.of(base, space)
    found = change_attribution(model, start, [halves[0]], objective, shares=[0.02])
    given = {"planted": [ParameterMask(space, {"0.weight": planted})]}
    options = {"objective": objective, "baselines": ["magnitude", "random"], "masks": given}
    curve = graft_curve(model, start, found, [], [halves[1]], **options)
    assert curve.of("planted")[0].share == 0.02
    assert curve.of("planted")[0].recovered > 0.99
    assert curve.of("attribution")[0].recovered > 0.99
    assert max(abs(curve.of(name)[0].recovered) for name in ("magnitude", "random")) < 0.2


def test_a_saved_change_makes_the_graft_of_its_base(subject, tmp_path):
    model, base, *_, found = subject
    mask = found.mask(0.1)
    path = save_change(tmp_path / "change.safetensors", model, base, mask, note={"recovered": 0.5})
    assert path.stat().st_size < 0.35 * sum(p.numel() * 4 for p in model.parameters())
    made = copy.deepcopy(base)
    assert apply_change(made, path) == {"recovered": 0.5}
    state = graft(model, base, mask)
    assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
    with pytest.raises(StoreError, match="is not the base that the change belongs on"):
        apply_change(made, path)
    apply_change(made, path, check=False)
    frozen = copy.deepcopy(base).requires_grad_(False)
    apply_change(frozen, path)
    assert all(torch.equal(value, state[name]) for name, value in frozen.state_dict().items())
    with pytest.raises(StoreError, match="which this GPT2LMHeadModel has not"):
        apply_change(build("gpt2"), path)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(rows)))


def test_a_saved_change_has_the_buffers_that_every_graft_has(tmp_path):
    torch.manual_seed(0)
    base, rows = Normed().eval(), torch.randn(5, 4)
    model = copy.deepcopy(base)
    with torch.no_grad():
        model.first.weight.add_(torch.randn(4, 4))
        model.norm.running_mean.add_(0.5)
    mask = ParameterMask(ParameterSpace.of(model), {n: torch.ones_like(p).bool() for n, p in model.named_parameters()})
    path = save_change(tmp_path / "change.safetensors", model, base, mask)
    apply_change(base, path)
    assert torch.equal(base(rows), model(rows))
    other = Normed()
    other.norm = nn.BatchNorm1d(4, track_running_stats=False)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(StoreError, match=r"buffer 'norm.running_mean' is \(4,\), torch.float32; this Normed has none"):
        apply_change(other, path, check=False)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_a_saved_change_is_refused_by_a_base_that_differs_in_what_was_frozen(tmp_path):
    torch.manual_seed(0)
    base = Normed()
    model = copy.deepcopy(base)
    for parameter in model.last.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        model.first.weight.add_(1.0)
    space = ParameterSpace.of(model)
    mask = ParameterMask(space, {name: torch.ones(space.shape(name), dtype=torch.bool) for name in space})
    path = save_change(tmp_path / "change.safetensors", model, base, mask)
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.last.bias.add_(1.0)
    with pytest.raises(StoreError, match="another one in the 2 others"):
        apply_change(other, path)
    apply_change(other, path, check=False)
    assert torch.equal(other.first.weight, model.first.weight)
    apply_change(base, path)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_saved_change_of_some_tensors_leaves_the_base_in_the_others(tmp_path):
    torch.manual_seed(0)
    base, model = Normed(), Normed()
    space = ParameterSpace.of(model, include=["first.*"])
    mask = ParameterMask(space, {name: torch.ones(space.shape(name), dtype=torch.bool) for name in space})
    other = copy.deepcopy(base)
    apply_change(other, save_change(tmp_path / "change.safetensors", model, base, mask))
    assert torch.equal(other.first.weight, model.first.weight)
    assert torch.equal(other.last.weight, base.last.weight)


def test_zeros_come_back_with_their_signs():
    torch.manual_seed(0)
    base, model = (nn.Linear(4, 1, bias=False) for _ in range(2))
    with torch.no_grad():
        model.weight[0, 1] = base.weight[0, 2] = -0.0
        model.weight[0, 2] = -0.0
    square = FunctionObjective(lambda module, rows: module(rows).square().mean())
    found = change_attribution(model, base, [torch.eye(4)], square, shares=[1.0])
    assert model.weight.signbit().tolist()[0][1:3] == [True, True]
    state = graft(model, base, found.mask(1.0))
    assert torch.equal(state["weight"].view(torch.int32), model.weight.detach().view(torch.int32))


def test_a_file_without_a_change_is_refused_and_nothing_moves(subject, tmp_path):
    model, base, *_, found = subject
    found.mask(0.1).save(tmp_path / "mask.safetensors", model=model)
    with pytest.raises(StoreError, match="holds no sparse change"):
        apply_change(base, tmp_path / "mask.safetensors")
    path = save_change(tmp_path / "change.safetensors", model, base, found.mask(0.1))
    path.write_bytes(path.read_bytes()[:-100])
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(StoreError):
        apply_change(base, path)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_another_change_is_refused(subject):
    model, base, scored, held_out, _, found = subject
    space = ParameterSpace.of(model, last_layers=1)
    part = change_attribution(model, base, [scored], nodes=1, space=space)
    with pytest.raises(ValueError, match="both must have one base and space"):
        graft_curve(model, base, part, [scored], [held_out])
    with pytest.raises(ValueError, match="both must have one base and space"):
        graft_curve(model, build("llama", 2).eval(), found, [scored], [held_out])
    with pytest.raises(ValueError, match="both must have one base and space"):
        learn_mask(model, build("llama", 2).eval(), found, [scored], share=0.1)
    with pytest.raises(ValueError, match=r"unknown baseline 'size'; .*magnitude"):
        graft_curve(model, base, found, [scored], [held_out], baselines=["size"])


def test_what_changed_nothing_recovers_nothing():
    layer = nn.Linear(3, 1, bias=False)
    objective = FunctionObjective(lambda module, x: module(x).square().mean())
    base = copy.deepcopy(layer)
    found = change_attribution(layer, base, [torch.eye(3)], objective, shares=[0.5], keep_scores=True)
    curve = graft_curve(layer, base, found, [], [torch.eye(3)], objective=objective, shares=[0.5], baselines=["random"])
    assert all(point.recovered is None for point in curve.records)
    assert "changed nothing" in curve.headline()
    assert not math.isnan(curve.value)
    found = change_attribution(layer, base, [torch.eye(3)], objective, shares=[0.5])
    with pytest.raises(ValueError, match="no parameter has changed"):
        graft_curve(layer, base, found, [], [torch.eye(3)], objective=objective)
    with pytest.raises(ValueError, match="no parameter has changed"):
        found.mask(0.5)


def test_what_cannot_be_chosen_is_told_with_what_was_tried(curve):
    least = min(point.harm for point in curve.records)
    with pytest.raises(ValueError, match=rf"at most -9 nats; the least that one does is {least:.4g} nats"):
        curve.choose(harm=-9)
    with pytest.raises(ValueError, match="harm must be a finite number; got nan"):
        curve.choose(harm=math.nan)
    with pytest.raises(ValueError, match="unknown method 'attributions'; did you mean 'attribution'"):
        curve.choose(recover=0.1, methods=["attributions"])


def test_a_change_that_does_nothing_there_has_no_graft_to_choose(subject):
    model, base, scored, held_out, other, found = subject
    same = graft_curve(model, base, found, [scored], [held_out], [other], metric="kl", shares=[0.1], baselines=[])
    nothing = dataclasses.replace(same, points=tuple({**point, "recovered": None} for point in same.points))
    with pytest.raises(ValueError, match="the finetune changed nothing on the held-out samples"):
        nothing.choose(harm=0.5)


def test_masks_are_given_one_or_several_under_names_of_their_own(subject):
    model, base, scored, held_out, _, found = subject
    options = {"shares": [0.1], "baselines": []}
    one = graft_curve(model, base, found, [scored], [held_out], masks={"golden": found.mask(0.1)}, **options)
    assert one.of("golden")[0].value == one.of("attribution")[0].value
    with pytest.raises(ValueError, match="masks may not be called 'attribution'"):
        graft_curve(model, base, found, [scored], [held_out], masks={"attribution": found.mask(0.1)}, **options)
    with pytest.raises(ValueError, match="baselines is a list of methods; got 'magnitude'"):
        graft_curve(model, base, found, [scored], [held_out], shares=[0.1], baselines="magnitude")


def test_a_metric_that_is_no_scalar_is_refused_and_one_passage_is_not_called_one_sample(subject):
    model, base, scored, held_out, *_ = subject
    for function, told in (
        (lambda model, batch: 1.0, "got float"),
        (lambda model, batch: model(batch["input_ids"]).logits.mean((1, 2)), r"got shape \(1,\)"),
    ):
        with pytest.raises(ValueError, match=f"must return a scalar tensor; {told}"):
            change_attribution(model, base, [scored], metric=function)

    def spread(model, batch):
        return model(batch["input_ids"]).logits.square().mean()

    found = change_attribution(model, base, [scored], metric=spread, nodes=2, shares=[0.5])
    curve = graft_curve(model, base, found, [scored], [held_out], metric=spread, baselines=[])
    assert "(no interval: one passage)" in curve.headline()


def test_a_value_that_is_not_finite_is_told_with_its_place(subject):
    model, base, scored, *_ = subject
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"the metric is not finite at the present parameters: .*nan"):
        change_attribution(broken, base, [scored], nodes=1)


def test_the_headline_tells_what_as_many_other_elements_recover(curve):
    def told(**recovered):
        points = [{**vars(curve.of(method)[0]), "recovered": value} for method, value in recovered.items()]
        return dataclasses.replace(curve, points=tuple(points), base_collateral=None).headline()

    better = told(attribution=0.6, random=0.2, magnitude=0.3, finetune=1.0)
    assert "as many random ones 20 % [" in better
    assert "those that changed most 30 % [" in better
    assert "no more than others of that number" not in better
    assert "WEAK: no more than others of that number" in told(attribution=0.6, random=0.7, finetune=1.0)


@pytest.mark.parametrize(("n_samples", "weak"), [(1, True), (2, True), (5, True), (6, False)])
def test_an_interval_over_too_few_samples_says_so(subject, n_samples, weak):
    model, base, scored, held_out, other, found = subject
    few, more = ({name: values[:n_samples] for name, values in batch.items()} for batch in (held_out, other))
    curve = graft_curve(model, base, found, [scored], [few], [more], shares=[0.5], baselines=[])
    assert (curve.n_values, curve.n_harms) == (n_samples, n_samples)
    assert ("; WEAK: " in curve.headline()) == weak
    assert (bool(curve.weak), bool(curve.harm_weak)) == (weak, weak)
    assert (curve.details().get("weak", ""), curve.details().get("harm_weak", "")) == (curve.weak, curve.harm_weak)
    if n_samples == 2:
        told = "only 2 held-out samples, and below 6 not even their whole range is a 95 % interval"
        assert curve.weak == told
        assert curve.harm_weak == told.replace("held-out samples", "samples of other text")
        assert curve.headline().count("WEAK") == 1
        assert told in graft_caption({"result": {"graft": curve.details()}})
    # Of files from before the values were counted.
    assert dataclasses.replace(curve, n_values=0, n_harms=0).weak == curve.weak
    assert dataclasses.replace(curve, n_collateral=0, n_harms=0).harm_weak == ""


def test_two_samples_that_agree_make_no_interval_without_a_doubt(curve):
    points = [{**point, "low": point["recovered"], "high": point["recovered"]} for point in curve.points]
    agreeing = dataclasses.replace(curve, points=tuple(points), n_values=2, n_held_out=2)
    assert "WEAK: only 2 held-out samples" in agreeing.headline()
    passages = dataclasses.replace(agreeing, n_held_out=64)
    assert "WEAK: only 2 held-out passages" in passages.headline()


def test_random_elements_are_drawn_several_times_and_each_draw_is_told(subject, curve):
    model, base, scored, held_out, other, found = subject
    options = {"shares": [0.1, 1.0], "baselines": ["random"]}
    three, one = (
        graft_curve(model, base, found, [scored], [held_out], [other], n_draws=count, **options) for count in (3, 1)
    )
    tenth, whole = three.of("random")
    assert tenth.draws[0] == tenth.recovered
    assert (len(tenth.draws), whole.draws) == (3, ())
    for seed, recovered in enumerate(tenth.draws):
        made = copy.deepcopy(model)
        made.load_state_dict(graft(model, base, baseline_mask(model, base, found, "random", 0.1, seed=seed)))
        again = graft_curve(made, base, attributed(made, base, held_out), [], [held_out], shares=[1.0], baselines=[])
        assert again.value / three.value == pytest.approx(recovered, rel=1e-5)
    assert len(set(tenth.draws)) == 3
    # A further draw is one forward pass of the held-out samples, and nothing else moves.
    assert three.cost.forwards - one.cost.forwards == 2 * len(held_out["input_ids"])
    assert [point.value for point in three.records] == [point.value for point in one.records]
    assert len(curve.of("random")[0].draws) == 5
    points = tuple({**point, "recovered": 0.6} if point["method"] == "attribution" else point for point in three.points)
    told = dataclasses.replace(three, points=points[:1] + points[2:]).headline()
    assert f"({percentage(min(tenth.draws))} to {percentage(max(tenth.draws))} over 3 draws)" in told
    luckier = {**vars(tenth), "draws": (tenth.recovered, 0.7)}
    points = tuple(luckier if point["method"] == "random" and point["share"] < 1 else point for point in points)
    assert "WEAK: no more than others" in dataclasses.replace(three, points=points[:1] + points[2:]).headline()
    assert dataclasses.asdict(type(three).from_json(three.to_json()).of("random")[0])["draws"] == tenth.draws
    with pytest.raises(ValueError, match="n_draws must be at least 1; got 0"):
        graft_curve(model, base, found, [scored], [held_out], n_draws=0)


@pytest.mark.parametrize("method", ["magnitude", "random", "drop_and_rescale"])
def test_the_mask_of_a_baseline_makes_its_graft(subject, curve, method):
    model, base, _, held_out, _, found = subject
    point = next(point for point in curve.of(method) if point.share == 0.1)
    made = copy.deepcopy(model)
    made.load_state_dict(graft(model, base, baseline_mask(model, base, found, method, 0.1), factor=point.factor))
    again = graft_curve(made, base, attributed(made, base, held_out), [], [held_out], shares=[1.0], baselines=[])
    assert again.value == pytest.approx(point.value, rel=1e-6)


def attributed(model, base, batch):
    return change_attribution(model, base, [batch], metric="kl", nodes=1, shares=[1.0])


def test_harm_and_what_is_recovered_are_told_of_each_sample(subject, curve):
    *_, held_out, other, _ = subject
    assert set(curve.pairs) == {"harm", "recovered/0.01", "recovered/0.1", "recovered/0.5"}
    recovered = {f"recovered/{point.share:.4g}": point.recovered for point in curve.of("attribution")}
    for name, record in curve.pairs.items():
        of_all = sum(record["numerators"]) / sum(record["denominators"])
        assert of_all == pytest.approx(curve.metrics()["harm"] if name == "harm" else recovered[name])
        assert list(record["keys"]) == sample_keys(other if name == "harm" else held_out)
    assert curve.details()["per_sample"] == curve.pairs
    again = type(curve).from_json(curve.to_json())
    assert (again, again.pairs) == (curve, curve.pairs)


def test_what_is_told_of_a_graft_that_was_chosen_covers_where_the_choosing_samples_flatter() -> None:
    generator = torch.Generator().manual_seed(4)
    base, model = (nn.Linear(40, 1, bias=False).double() for _ in range(2))
    with torch.no_grad():
        base.weight.zero_()
        model.weight.fill_(1.0)
    mean = FunctionObjective(lambda module, batch: module(batch).mean())
    space = ParameterSpace.of(model)
    # Twenty halves of the elements, all of which recover half of the effect in truth: inputs have mean 1.
    halves = [torch.randperm(40, generator=generator) < 20 for _ in range(20)]
    masks = {"half": [ParameterVector(space, {"weight": flags[None]}) for flags in halves]}
    errors, covered = {"chosen": [], "told": []}, {"chosen": 0, "told": 0}
    for _ in range(40):
        held_out = 1 + 2 * torch.randn(24, 40, dtype=torch.float64, generator=generator)
        found = change_attribution(model, base, [held_out], mean, nodes=1, shares=[0.5])
        options = {"objective": mean, "baselines": ["interpolation"], "factors": [0.1]}
        curves = {}
        for name, half in zip(("chosen", "told"), interleaved(held_out.split(1), 24), strict=True):
            curves[name] = graft_curve(model, base, found, [], half, half, masks=masks, **options)
        best = max(curves["chosen"].of("half"), key=lambda point: point.recovered)
        place = curves["chosen"].of("half").index(best)
        for name, curve in curves.items():
            point = curve.of("half")[place]
            errors[name].append(point.recovered - 0.5)
            covered[name] += point.low <= 0.5 <= point.high
    told, chosen = (torch.tensor(errors[name]) for name in ("told", "chosen"))
    assert abs(told.mean()) < 2 * told.std() / 40**0.5
    assert chosen.mean() > 4 * chosen.std() / 40**0.5
    assert covered["told"] >= 34 > covered["chosen"]  # of 40; 95 % of twelve samples' intervals cover a little less


def test_an_empty_argument_is_named(subject, curve):
    model, base, scored, held_out, _, found = subject
    with pytest.raises(ValueError, match="held_out: there is no sample"):
        graft_curve(model, base, found, [scored], [])
    with pytest.raises(ValueError, match="collateral: there is no sample"):
        graft_curve(model, base, found, [scored], [held_out], [])
    with pytest.raises(ValueError, match="methods is empty: name at least one of attribution, "):
        curve.choose(recover=0.1, methods=[])


def test_a_graft_of_no_number_or_no_mask_is_refused(subject):
    model, base, *_, found = subject
    with pytest.raises(ValueError, match="factor must be a finite number; got nan"):
        graft(model, base, found.mask(0.05), factor=math.nan)
    with pytest.raises(ValueError, match="bool"):
        graft(model, base, found.scores)
