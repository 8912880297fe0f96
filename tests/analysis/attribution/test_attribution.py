from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_goldy.analysis import ChangeAttributionResult, change_attribution, graft_curve
from lightning_goldy.analysis.agreement import resampled
from lightning_goldy.analysis.attribution import attribution as attribution_module
from lightning_goldy.analysis.attribution import model_units, unit_mask
from lightning_goldy.analysis.attribution import path as path_module
from lightning_goldy.analysis.attribution.units import rows_in_words
from lightning_goldy.core import (
    CausalLMObjective,
    ClassifierObjective,
    FunctionObjective,
    ParameterSpace,
    ParameterVector,
)
from lightning_goldy.core.files import percentage, to_json_line
from lightning_goldy.core.naming import block_of, kind_of
from lightning_goldy.report import chart_attribution_heads, chart_attribution_neurons, draw_figures
from lightning_goldy.report.formatting import format_number, format_percent
from lightning_goldy.report.sentences import answer_by_attribution
from lightning_goldy.report.topics.attribution import (
    heads_caption,
    interactions_caption,
    neurons_caption,
    places_caption,
    units_html,
)
from tests.references.attribution import moved, riemann_attribution, units_of
from tests.references.models import FAMILIES, build, class_batch, token_batch


def pair(family: str, step: float = 0.3) -> tuple[nn.Module, nn.Module, dict]:
    base = build(family, 0).double().eval()
    model = moved(base, build(family, 1).double(), step).eval()
    return model, base, class_batch(6) if family == "bert" else token_batch(6)


def test_a_linear_models_attribution_is_exact_with_any_number_of_nodes():
    base, model = nn.Linear(5, 1).double(), nn.Linear(5, 1).double()
    x = torch.randn(7, 5, dtype=torch.float64)
    mean = FunctionObjective(lambda module, batch: module(batch).mean())
    for nodes in (1, 2, 7):
        found = change_attribution(model, base, [x], mean, nodes=nodes, keep_scores=True)
        torch.testing.assert_close(found.scores["weight"], (model.weight - base.weight).detach() * x.mean(0))
        assert found.gap < 1e-12


def test_a_quadratics_attribution_is_exact_with_one_node_at_the_middle():
    base, model = nn.Linear(4, 1, bias=False).double(), nn.Linear(4, 1, bias=False).double()
    roots = torch.randn(4, 4, dtype=torch.float64)
    square = FunctionObjective(lambda module, batch: 0.5 * F.linear(module.weight, batch).square().sum())
    found = change_attribution(model, base, [roots], square, nodes=1, keep_scores=True)
    curvature = roots.T @ roots
    change = (model.weight - base.weight).detach()
    middle = (model.weight + base.weight).detach() / 2
    torch.testing.assert_close(found.scores["weight"], change * (middle @ curvature))
    assert found.gap < 1e-12


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "bert"])
def test_contributions_add_up_to_the_change(family):
    model, base, batch = pair(family)
    objective = ClassifierObjective() if family == "bert" else CausalLMObjective()
    found = change_attribution(model, base, [batch], objective, tolerance=1e-6, keep_scores=True)
    with torch.no_grad():
        change = float(objective.loss(model, batch) - objective.loss(base, batch))
    assert found.change == pytest.approx(change, rel=1e-9)
    assert found.total == pytest.approx(change, rel=1e-6)
    assert math.fsum(float(score.sum()) for score in found.scores.values()) == pytest.approx(found.total, rel=1e-9)
    for sums in (found.by_tensor, found.by_block, found.by_kind):
        assert math.fsum(sums.values()) == pytest.approx(found.total, rel=1e-9)
    assert math.fsum(float(unit["values"].sum()) for unit in found.units) == pytest.approx(found.total, rel=1e-9)


def head_sums(found: ChangeAttributionResult, model: nn.Module) -> dict[tuple[str, str], torch.Tensor]:
    """What heads contribute, element by element from the scores that are kept, the slow way."""
    groups = model_units(model, found.scores.space)
    sums = {}
    for group in (group for group in groups if group.kind in ("head", "key_value")):
        values = torch.zeros(group.count, dtype=torch.float64)
        for part in group.parts:
            for unit, places in enumerate(part.places(group.count)):
                values[unit] += found.scores[part.name].index_select(part.dim, places).double().sum()
        sums[group.kind, group.place] = values
    return sums


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "bert"])
def test_what_heads_contribute_is_known_of_each_passage(family, monkeypatch):
    monkeypatch.setattr(path_module, "_CPU_CHUNK", 100)  # less than some tensors, and no whole number of rows
    model, base, batch = pair(family)
    objective = ClassifierObjective() if family == "bert" else CausalLMObjective()
    options = {"nodes": 2, "samples_per_pass": 1, "keep_scores": True}
    found = change_attribution(model, base, [batch], objective, **options)
    held = {(u["kind"], u["place"]): u for u in found.units if u["kind"] in ("head", "key_value")}
    assert {kind for kind, _ in held} == {"head", "key_value"}
    for place, expected in head_sums(found, model).items():
        torch.testing.assert_close(held[place]["passages"].sum(0), expected)
        torch.testing.assert_close(held[place]["values"], expected)
    for passage, weight in enumerate(found.weights.tolist()):
        one = {name: values[passage : passage + 1] for name, values in batch.items()}
        alone = change_attribution(model, base, [one], objective, **options)
        for place, expected in head_sums(alone, model).items():
            torch.testing.assert_close(held[place]["passages"][passage], weight * expected)


def test_heads_have_the_intervals_that_their_block_would_have():
    model, base, batch = pair("llama")
    found = change_attribution(model, base, [batch], nodes=2, samples_per_pass=1)
    counts = resampled(6)
    for unit, row in zip(found.units, json.loads(to_json_line(found.details()))["units"], strict=True):
        assert ("passages" in unit) == ("low" in row) == (row["kind"] in ("head", "key_value"))
        for head, ends in enumerate(zip(row.get("low", ()), row.get("high", ()), strict=True)):
            drawn = (counts @ unit["passages"][:, head]) / (counts @ found.weights)
            assert ends == pytest.approx(drawn.quantile(torch.tensor([0.025, 0.975]).double()).tolist())
            assert ends[0] <= row["values"][head] <= ends[1]
    single = change_attribution(model, base, [batch], nodes=2, samples_per_pass=6).details()["units"]
    assert all(set(row["low"] + row["high"]) == {None} for row in single if "low" in row)


def test_the_map_of_heads_tells_their_intervals():
    model, base, batch = pair("llama")
    row = {"result": change_attribution(model, base, [batch], nodes=2, samples_per_pass=1).details(), "metrics": {}}
    figure = chart_attribution_heads(row)
    heads = [unit for unit in row["result"]["units"] if unit["kind"] == "head"]
    notes = [
        f"{format_number(low)} to {format_number(high)}"
        for unit in heads
        for low, high in zip(unit["low"], unit["high"], strict=True)
    ]
    assert figure.data["cells"]["note"] == notes
    value, span = max(
        zip([value for unit in heads for value in unit["values"]], notes, strict=True),
        key=lambda pair: abs(pair[0]),
    )
    assert f"{format_number(value)} [{span.replace(' to ', ', ')}]." in figure.caption
    row["result"]["weak"] = "only 3 passages"
    assert heads_caption(row).endswith("WEAK: only 3 passages.")
    for unit in heads:  # as rows of before have them
        del unit["low"], unit["high"]
    assert "note" not in chart_attribution_heads(row).data["cells"]
    assert "[" not in heads_caption(row)


def test_every_element_equals_a_riemann_sum():
    base = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    batch = (torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1]))
    expected = riemann_attribution(model, base, lambda module: ClassifierObjective().loss(module, batch))
    found = change_attribution(model, base, [batch], ClassifierObjective(), tolerance=1e-9, keep_scores=True)
    for name, score in found.scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["loss", "kl"])
def test_every_element_of_a_language_model_equals_a_riemann_sum(metric):
    model, base, batch = pair("llama")

    def value(module):
        target = CausalLMObjective().logits_and_targets(module, batch)
        if metric == "loss":
            return target.loss()
        with torch.no_grad():
            anchor = CausalLMObjective().logits_and_targets(base, batch).logits.softmax(-1)
        return (anchor * (anchor.log() - target.logits.log_softmax(-1))).sum(-1).mean()

    expected = riemann_attribution(model, base, value)
    found = change_attribution(model, base, [batch], metric=metric, tolerance=1e-7, keep_scores=True)
    for name, score in found.scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-4, atol=1e-4 * abs(found.change) / score.numel())


def test_log_probabilities_are_the_mean_over_samples():
    model, base, _ = pair("gpt2")
    batch = token_batch(4)
    batch["labels"][0, 6:] = -100
    found = change_attribution(model, base, [batch], metric="log_prob")
    with torch.no_grad():
        ends = [float(CausalLMObjective().log_probs(module, batch).mean()) for module in (base, model)]
    assert (found.base_value, found.value) == pytest.approx(tuple(ends), rel=1e-9)
    assert found.complete


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])  # embeddings tied and not
def test_a_function_is_attributed_like_the_metric_of_its_name(family):
    model, base, batch = pair(family)
    named = change_attribution(model, base, [batch], nodes=4, keep_scores=True)
    own = change_attribution(
        model, base, [batch], nodes=4, metric=lambda m, b: CausalLMObjective().loss(m, b), keep_scores=True
    )
    torch.testing.assert_close(own.contributions, named.contributions)
    for name, score in own.scores.items():
        torch.testing.assert_close(score, named.scores[name])
    assert own.metric == "function"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_embeddings_give_the_rows_that_are_read_and_are_left_as_they_were(family, monkeypatch):
    model, base, batch = pair(family)
    taken, take = [], attribution_module._Integration._take

    def watch(self, name):
        taken.append((name, self.path.parameters[name].grad.layout))
        take(self, name)

    monkeypatch.setattr(attribution_module._Integration, "_take", watch)
    change_attribution(model, base, [batch], nodes=1)
    sparse = {name for name, layout in taken if layout is torch.sparse_coo}
    # A tied weight's gradient is dense all the same, by the head's part of it.
    assert sparse == ({"transformer.wpe.weight"} if family == "gpt2" else {"model.embed_tokens.weight"})
    embeddings = [child for child in model.modules() if isinstance(child, nn.Embedding)]
    assert embeddings
    assert not any(child.sparse for child in embeddings)


def test_a_hook_of_the_trainings_own_is_given_the_dense_gradient_of_an_embedding():
    model, base, batch = pair("llama")
    plain = change_attribution(model, base, [batch], nodes=1)
    seen = []

    def keep(gradient):
        seen.append(gradient.layout)
        return torch.where(torch.ones_like(gradient, dtype=torch.bool), gradient, 0.0)

    model.get_input_embeddings().weight.register_hook(keep)
    hooked = change_attribution(model, base, [batch], nodes=1)
    assert set(seen) == {torch.strided}
    torch.testing.assert_close(hooked.contributions, plain.contributions)


def test_contributions_of_a_passage_are_those_of_its_samples_alone():
    model, base, batch = pair("llama")
    batch["labels"][0, 5:] = -100
    found = change_attribution(model, base, [batch], nodes=3)
    targets = (batch["labels"][:, 1:] != -100).sum(1)
    for row in range(6):
        alone = change_attribution(model, base, [{key: value[row : row + 1] for key, value in batch.items()}], nodes=3)
        share = float(targets[row] / targets.sum())
        assert float(found.weights[row]) == pytest.approx(share)
        torch.testing.assert_close(found.contributions[row], share * alone.contributions[0])


def test_samples_together_change_nothing_but_the_passages():
    model, base, batch = pair("gpt2")
    single = change_attribution(model, base, [batch], nodes=2, samples_per_pass=1)
    whole = change_attribution(model, base, [batch], nodes=2, samples_per_pass=6)
    assert (len(single.weights), len(whole.weights)) == (6, 1)
    torch.testing.assert_close(single.contributions.sum(0), whole.contributions[0])
    assert (single.n_samples, single.cost) == (whole.n_samples, whole.cost)


def test_the_model_comes_back_as_it_was():
    model, base, batch = pair("gpt2")
    model.train()
    before = copy.deepcopy(model.state_dict())
    model.transformer.wte.weight.grad = torch.ones_like(model.transformer.wte.weight)
    state = torch.get_rng_state()
    change_attribution(model, base, [batch], nodes=2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.transformer.wte.weight.grad.sum() == model.transformer.wte.weight.numel()
    assert model.transformer.wpe.weight.grad is None


def test_masks_hold_the_strongest_elements_exactly():
    model, base, batch = pair("gpt2")
    found = change_attribution(model, base, [batch], nodes=2, shares=[0.2, 0.01], keep_scores=True)
    assert found.shares == (0.01, 0.2)
    flat = torch.cat([score.flatten() for score in found.scores.values()]) * math.copysign(1, found.change)
    for share in (0.01, 0.2, 0.5):
        mask = found.mask(share)
        inside = torch.cat([flags.flatten() for flags in mask.values()])
        assert mask.total == max(1, math.floor(share * len(flat) + 0.5))
        assert flat[inside].min() >= flat[~inside].max()
    bare = change_attribution(model, base, [batch], nodes=2, shares=[0.01])
    assert all(torch.equal(bare.mask(0.01)[name], found.mask(0.01)[name]) for name in found.names)
    with pytest.raises(ValueError, match=r"strongest 0\.5 of the elements were not kept.*shares="):
        bare.mask(0.5)


def test_a_head_has_its_slices_and_a_neuron_its_rows_and_column():
    model, base, batch = pair("llama")
    found = change_attribution(model, base, [batch], nodes=2, keep_scores=True)
    scores, place = found.scores, "model.layers.1"
    attention, mlp = f"{place}.self_attn", f"{place}.mlp"
    rows = slice(2 * 4, 3 * 4)  # head 2 of 4, four wide
    head = scores[f"{attention}.q_proj.weight"][rows].sum() + scores[f"{attention}.o_proj.weight"][:, rows].sum()
    assert float(units_of(found, "head")[place][2]) == pytest.approx(float(head), rel=1e-9)
    rows = slice(1 * 4, 2 * 4)
    group = sum(scores[f"{attention}.{kind}_proj.weight"][rows].sum() for kind in "kv")
    assert float(units_of(found, "key_value")[place][1]) == pytest.approx(float(group), rel=1e-9)
    neuron = sum(scores[f"{mlp}.{kind}_proj.weight"][7].sum() for kind in ("gate", "up"))
    neuron += scores[f"{mlp}.down_proj.weight"][:, 7].sum()
    assert float(units_of(found, "neuron")[place][7]) == pytest.approx(float(neuron), rel=1e-9)
    row = scores["model.embed_tokens.weight"][5].sum()
    assert float(units_of(found, "row")["model.embed_tokens.weight"][5]) == pytest.approx(float(row), rel=1e-9)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_units_share_out_every_element_once(family):
    model = build(family)
    space = ParameterSpace.of(model)
    groups = model_units(model, space)
    assert sum(group.size(space) * group.count for group in groups) == space.numel
    everything = unit_mask(space, groups, [torch.ones(group.count, dtype=torch.bool) for group in groups])
    assert everything.total == space.numel
    kinds = {group.kind for group in groups}
    assert {"head", "key_value", "neuron", "row"} <= kinds


def test_a_planted_change_is_found_where_it_matters():
    torch.manual_seed(3)
    base = nn.Sequential(nn.Linear(100, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    model = copy.deepcopy(base)
    # Two of a hundred inputs are on: the changes of all other weights are as large, and without effect.
    inputs = torch.randn(32, 100, dtype=torch.float64) * 1e-4
    inputs[:, [17, 64]] += torch.randn(32, 2, dtype=torch.float64) + 2
    labels = torch.randint(0, 3, (32,))
    objective = ClassifierObjective()
    space = ParameterSpace.of(base, ["0.weight"])
    gradient = torch.autograd.grad(objective.loss(base, (inputs, labels)), base[0].weight)[0]
    planted = torch.zeros(40, 100, dtype=torch.bool)
    planted[:, [17, 64]] = True
    with torch.no_grad():
        model[0].weight.add_(torch.where(planted, -0.01 * gradient.sign(), 0.01 * torch.randn(40, 100).sign()))
    found = change_attribution(model, base, [(inputs, labels)], objective, space=space, shares=[0.02])
    hit = int((found.mask(0.02)["0.weight"] & planted).sum())
    assert hit / found.mask(0.02).total > 0.95
    assert hit / int(planted.sum()) > 0.95


def test_an_unchanged_model_says_so_and_costs_no_backward_pass():
    model = build("gpt2")
    found = change_attribution(model, copy.deepcopy(model), [token_batch(3)])
    assert (found.change, found.total, found.gap, found.cost.backwards) == (0.0, 0.0, None, 0)
    assert "no parameter has changed" in found.headline()
    assert all(value is None for name, value in found.row().metrics.items() if name.startswith("share/"))


def test_a_sum_that_is_not_complete_says_by_how_much():
    model, base, batch = pair("qwen3", step=1.0)
    found = change_attribution(model, base, [batch], nodes="base", tolerance=1e-9)
    assert not found.complete
    assert f"INCOMPLETE: the parts miss the change by {found.gap:.2g} of it with 1 nodes" in found.headline()


def test_a_metric_without_a_gradient_is_said_to_tell_nothing():
    model, base, batch = pair("gpt2")

    def jump(model, batch):
        return (model(input_ids=batch["input_ids"]).logits.sum().abs() * 1e6).floor().detach()

    found = change_attribution(model, base, [batch], metric=jump, nodes=1)
    assert found.change != 0
    assert not found.complete
    assert "its gradient along the change is zero" in found.headline()
    to_json_line(found.row().result)


def test_intervals_are_of_resampled_passages():
    model, base, batch = pair("gpt2")
    found = change_attribution(model, base, [batch], nodes=2)
    low, high = found.interval(kind_of, "mlp")
    assert low <= found.by_kind["mlp"] <= high
    draws = torch.randint(0, 6, (4000, 6), generator=torch.Generator().manual_seed(5))
    mlp = found.contributions[:, [kind_of(name) == "mlp" for name in found.names]].sum(1)
    resampled = mlp[draws].sum(1) / found.weights[draws].sum(1)
    expected = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    assert [low, high] == pytest.approx(expected, abs=0.15 * (expected[1] - expected[0]))
    one = change_attribution(model, base, [batch], nodes=2, samples_per_pass=6)
    assert one.interval(block_of, "transformer.h.0") == pytest.approx([one.by_block["transformer.h.0"]] * 2)


def test_one_passage_has_no_interval_and_says_so():
    model, base, batch = pair("llama")
    one = {name: value[:1] for name, value in batch.items()}
    found = change_attribution(model, base, [one], interactions=True)
    assert "(no interval: one passage)" in found.headline()
    line = json.loads(to_json_line(found.row().to_dict()))
    assert {row[end] for row in line["result"]["kinds"] for end in ("low", "high", "share_low", "share_high")} == {None}
    assert {row["alone_low"] for row in line["result"]["interactions"]} == {None}
    assert set(draw_figures(line, [line])) >= {"places", "interactions"}
    curve = graft_curve(model, base, found, [one], [one], [one], baselines=["random"], factors=[0.5])
    assert {point.low for point in curve.records} == {None} == {point.harm_high for point in curve.records}
    assert "(no interval: one sample)" in curve.headline()
    row = {**line, "result": {**line["result"], "graft": curve.details()}, "metrics": {**line["metrics"]}}
    assert answer_by_attribution([row]).interval == "no interval: one held-out sample"  # type: ignore[union-attr]
    assert "graft" in draw_figures(row, [row])


def test_kinds_and_blocks_have_shares_with_intervals():
    model, base, batch = pair("llama")
    found = change_attribution(model, base, [batch], samples_per_pass=1)
    kinds = {row["group"]: row for row in found.details()["kinds"]}
    for label, row in kinds.items():
        assert row["share"] == pytest.approx(found.by_kind[label] / found.total)
        assert (row["share_low"], row["share_high"]) == found.interval(kind_of, label, share=True)
        assert row["share_low"] <= row["share"] <= row["share_high"]
    assert any(row["share_low"] < row["share"] < row["share_high"] for row in kinds.values())
    (told,) = [row for label, row in kinds.items() if f"sits in {label} " in found.headline()]
    assert f"[{percentage(told['share_low'])}, {percentage(told['share_high'])}]" in found.headline()


def result_of(mlp: list[float], attention: list[float]) -> ChangeAttributionResult:
    """What passages say, each of the same weight, of two parameters of as many elements."""
    contributions = torch.tensor([mlp, attention], dtype=torch.float64).T
    return ChangeAttributionResult(
        metric="loss",
        base_value=0.0,
        value=float(contributions.sum()),
        names=("h.0.mlp.weight", "h.0.attn.weight"),
        contributions=contributions,
        weights=torch.full((len(mlp),), 1 / len(mlp), dtype=torch.float64),
        units=(),
        numels=(50, 50),
        squared_changes=(1.0, 1.0),
        n_samples=len(mlp),
        n_nodes=4,
        tolerance=0.01,
        shares=(),
        levels=None,
        scores=None,
    )


def test_parts_of_opposite_sign_are_told_as_what_cancels():
    found = result_of([-0.231] * 8, [0.131] * 8)
    assert found.headline() == (
        "the loss changed by -0.8: mlp parameters, which are 50 % of all, make 231 % [231 %, 231 %] of it, of which "
        "the others take 131 % back, for parts of opposite sign cancel"
    )
    row = found.row().to_dict()
    assert places_caption(row).startswith(
        "Contributions add up to the change of the metric. Parts of opposite sign cancel, so that one is more than the "
        "whole. mlp 231 % [231 %, 231 %] of it with 50 % of the elements; attention -131 %"
    )
    whole = result_of([-0.6] * 8, [-0.4] * 8)
    assert "60 % [60 %, 60 %] of it sits in mlp parameters, which are 50 % of all" in whole.headline()
    assert "cancel" not in whole.headline() + places_caption(whole.row().to_dict())
    # What rounds to the whole is the whole.
    assert "100 % [100 %, 100 %] of it sits in mlp" in result_of([-1.004] * 8, [0.004] * 8).headline()


@pytest.mark.parametrize(("count", "weak"), [(1, True), (2, True), (5, True), (6, False)])
def test_shares_over_too_few_passages_say_so(count, weak):
    found = result_of([-0.6] * count, [-0.4] * count)
    row = found.row().to_dict()
    assert ("; WEAK: " in found.headline()) == weak
    assert (" WEAK: " in places_caption(row)) == weak
    assert row["result"].get("weak", "") == found.weak
    if count == 2:
        assert found.headline().endswith(
            "WEAK: only 2 passages, and below 6 not even their whole range is a 95 % interval"
        )
        assert found.weak in answer_by_attribution([row]).doubts  # type: ignore[union-attr]


class Shortened(nn.Module):
    """Reads rows that a forward pass shortens in place."""

    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(5, 3, max_norm=1.0), nn.Linear(3, 1)

    def forward(self, ids):
        return self.out(self.embedding(ids))


def test_embeddings_that_shorten_what_is_read_are_named_where_the_sum_misses():
    square = FunctionObjective(lambda module, ids: module(ids).square().mean())
    base, model, ids = Shortened(), Shortened(), torch.arange(5)
    with torch.no_grad():
        model.embedding.weight.mul_(3)
    found = change_attribution(model, base, [ids], square)
    told = "the embedding 'embedding.weight' shortens rows to max_norm=1 as they are read (the longest is "
    assert not found.complete
    assert found.n_nodes == 4  # for more would not mend it
    assert f"with 4 nodes, for {told}" in found.headline()
    assert "torch.renorm, or leave it out" in found.headline()
    assert found.details()["cause"] == found.cause
    assert told in answer_by_attribution([found.row().to_dict()]).doubts[0]  # type: ignore[union-attr]
    # What the message asks for makes the sum complete: the line between two short rows is of short ones.
    with torch.no_grad():
        for module in (base, model):
            module.embedding.weight.copy_(torch.renorm(module.embedding.weight, 2, 0, 1 - 1e-6))
    short = change_attribution(model, base, [ids], square)
    assert short.complete
    assert short.cause == ""
    rest = ParameterSpace.of(model, include=("out.*",))
    assert change_attribution(moved(base, Shortened(), 0.5), base, [ids], square, space=rest).cause == ""


def test_the_page_lists_the_neurons_and_tokens_that_contribute_most():
    model, base, batch = pair("llama")
    found = change_attribution(model, base, [batch], nodes=2)
    row = rows_in_words(found.row(), Words()).to_dict()
    page = units_html(row)
    for kind, heading in (("neuron", "MLP neurons that contribute most"), ("row", "Tokens whose rows contribute most")):
        part = page.partition(heading)[2].partition("<h3>")[0]
        values = units_of(found, kind)
        strongest = max((abs(float(value)), place) for place, all_of in values.items() for value in all_of)
        assert part.index(strongest[1]) > 0
        assert part.count("<tr>") == 11
    assert "word " in page.partition("Tokens whose rows")[2]
    assert units_html({"result": {"units": []}}) == ""


def slow_interval(numerators, denominators):
    """The middle of a thousand resampled ratios, one by one."""
    draws = [
        sum(n * a for n, a in zip(row, numerators, strict=True))
        / sum(n * b for n, b in zip(row, denominators, strict=True))
        for row in resampled(len(numerators)).tolist()
    ]
    return torch.tensor(draws, dtype=torch.float64).quantile(torch.tensor([0.025, 0.975]).double()).tolist()


def test_the_change_its_places_and_its_interaction_have_intervals_over_passages():
    model, base, batch = pair("llama")
    samples = [{key: value[[row]] for key, value in batch.items()} for row in range(6)]
    found = change_attribution(model, base, samples, interactions=True)
    objective, losses, block = CausalLMObjective(), {}, "model.layers.1"
    moved_alone = copy.deepcopy(base)
    for name, value in model.state_dict().items():
        if name.startswith(block):
            moved_alone.state_dict()[name].copy_(value)
    with torch.no_grad():
        for told, one in (("base", base), ("now", model), ("alone", moved_alone)):
            losses[told] = [float(objective.loss(one, sample)) for sample in samples]
    # Samples of one length count alike.
    changes = [now - before for now, before in zip(losses["now"], losses["base"], strict=True)]
    assert found.change_interval == pytest.approx(slow_interval(changes, [1.0] * 6), rel=1e-6)
    low, high = found.change_interval  # type: ignore[misc]
    assert found.headline().startswith(f"the loss changed by {found.change:.4g} [{low:.4g}, {high:.4g}]: ")
    row = found.row().to_dict()
    assert row["result"]["effect_interval"] == pytest.approx([low, high])
    place = next(p for p in row["result"]["places"] if (p["block"], p["kind"]) == (block, "mlp"))
    inside = [block_of(name) == block and kind_of(name) == "mlp" for name in found.names]
    parts = found.contributions[:, torch.tensor(inside)].sum(1)
    assert place["contribution"] == pytest.approx(float(parts.sum()), rel=1e-9)
    assert [place["low"], place["high"]] == pytest.approx(slow_interval(parts.tolist(), [1 / 6] * 6), rel=1e-6)
    drawn = draw_figures(row, [row])
    assert len(set(drawn["places"].data["cells"]["note"])) > 4
    assert "95 % interval over passages" in json.dumps(drawn["places"].spec())
    # Of one block's effect alone the interval is known; the sum over blocks resamples the same passages.
    alone = [one - before for one, before in zip(losses["alone"], losses["base"], strict=True)]
    own = next(entry for entry in found.interactions if entry["block"] == block)
    assert [own["alone_low"], own["alone_high"]] == pytest.approx(slow_interval(alone, [1.0] * 6), rel=1e-6)
    low, high = found.interaction_interval  # type: ignore[misc]
    assert low <= found.interaction <= high
    assert f"of it [{percentage(1 - high)}, {percentage(1 - low)}]" in found.headline()
    assert " %] of the change is made by no block alone" in interactions_caption(row)
    few = change_attribution(model, base, samples[:3], interactions=True).row().to_dict()
    assert "WEAK: only 3 passages" in interactions_caption(few)


def test_a_change_that_may_be_none_and_a_share_that_may_be_anything_are_weak():
    passages = {"keys": tuple("abcdefgh"), "numerators": [1.0, -1.0] * 4, "denominators": [0.125] * 8, "power": 1.0}
    found = replace(result_of([0.2, -0.1] * 4, [0.1, 0.0] * 4), passages=passages)
    told = "the interval of the change includes 0, so that shares of it tell nothing"
    assert found.weak == found.details()["weak"] == told
    assert found.headline().endswith(f"; WEAK: {told}")
    sure = replace(found, passages={**passages, "numerators": [0.1] * 8})
    assert sure.weak == ""
    assert sure.headline().endswith("; WEAK: that interval is too wide to tell where it sits")


def test_neurons_are_told_by_rank_and_add_up():
    model, base, batch = pair("llama")
    found = change_attribution(model, base, [batch], nodes=2)
    row = found.row().to_dict()
    neurons = {unit["place"]: unit for unit in row["result"]["units"] if unit["kind"] == "neuron"}
    few, many, sizes = 0.0, 0.0, []
    for place, values in units_of(found, "neuron").items():
        ordered = sorted(values.tolist(), key=lambda value: -abs(value))
        sums, start = [], 0
        while start < len(ordered):
            sums.append(sum(ordered[start : 2 * start + 1]))
            start = 2 * start + 1
        assert neurons[place]["ranks"] == pytest.approx(sums, rel=1e-9)
        assert sum(sums) == pytest.approx(neurons[place]["total"], rel=1e-9)
        few, many = few + ordered[0], many + sum(ordered)
        sizes.append((abs(ordered[0]), sum(map(abs, ordered))))
    figure = draw_figures(row, [row])["neurons"]
    assert set(figure.data["cells"]["y"]) == {f"{place}|{name}" for place, name in enumerate(neurons)}
    caption = neurons_caption(row)
    assert f"make {format_number(few)} of the {format_number(many)} of all neurons" in caption
    strong, every = map(sum, zip(*sizes, strict=True))
    count, width = len(neurons), len(neurons) * next(iter(neurons.values()))["count"]
    assert f"The {count} strongest of {width} " in caption
    alike = f"and {format_percent(count / width)} if all were alike"
    assert f"have {format_percent(strong / every)} of the sum of all sizes, {alike}" in caption
    without = {**row, "result": {**row["result"], "units": []}}
    assert str(chart_attribution_neurons(without)).startswith("The neurons of this model are not described")


class Words:
    """Ids as words."""

    def decode(self, ids):
        return f"word {ids[0]}"


def test_the_row_and_the_json_tell_all():
    model, base, batch = pair("gpt2")
    found = change_attribution(model, base, [batch], nodes=2)
    again = ChangeAttributionResult.from_json(found.to_json())
    assert again.headline() == found.headline()
    row = found.row()
    assert {block["group"] for block in row.result["blocks"]} >= {"transformer.h.0", "transformer.h.1"}
    assert sum(entry["contribution"] for entry in row.result["tensors"]) == pytest.approx(found.total)
    assert row.cost == found.cost
    assert found.cost.backwards == 2 * 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "los"}, "unknown metric 'los'; did you mean 'loss'"),
        ({"nodes": "many"}, "unknown nodes 'many'"),
        ({"nodes": 0}, "nodes is 'auto', 'base' or lies between 1 and 256; got 0"),
        ({"nodes": 1.5}, "nodes is 'auto', 'base' or lies between 1 and 256; got 1.5"),
        ({"tolerance": 0}, r"tolerance must lie in \(0, 1\); got 0"),
        ({"shares": [2]}, r"shares lie in \(0, 1\]; got 2"),
        ({"shares": ["a"]}, r"shares lie in \(0, 1\]; got 'a'"),
        ({"shares": [math.nan]}, r"shares lie in \(0, 1\]; got nan"),
        ({"shares": [-math.inf]}, r"shares lie in \(0, 1\]; got -inf"),
        ({"shares": [True]}, r"shares lie in \(0, 1\]; got True"),
        ({"shares": [0.1, 0.1]}, "shares name 0.1 twice"),
        ({"shares": 0.1}, r"shares is a list of fractions in \(0, 1\]; got 0.1"),
        ({"shares": "0.1"}, r"shares is a list of fractions in \(0, 1\]; got '0.1'"),
        ({"samples_per_pass": 0}, "samples_per_pass must be at least 1"),
        ({"n_samples": 99}, "n_samples=99, but the batches hold only 6"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    model, base, batch = pair("gpt2")
    with pytest.raises(ValueError, match=message):
        change_attribution(model, base, [batch], **options)


def test_masks_and_shares_that_are_none_are_named_before_anything_is_measured():
    model, base, batch = pair("llama")
    other = ParameterVector.of(nn.Linear(2, 1)).map(lambda value: torch.ones_like(value, dtype=torch.bool))
    scores = ParameterVector.of(model)
    never = FunctionObjective(lambda module, batch: pytest.fail("measured"))
    for masks, message in (
        ([other], "masks is a mapping of names to masks; got list"),
        ({"golden": "mask.safetensors"}, "the mask 'golden' is a ParameterMask or a boolean vector; got str"),
        ({"golden": other}, "the mask 'golden': .*'weight'"),
        ({"golden": scores}, "the mask 'golden': .*bool"),
    ):
        with pytest.raises(ValueError, match=message):
            change_attribution(model, base, [batch], never, masks=masks)
    found = change_attribution(model, base, [batch], nodes=1, keep_scores=True, shares=[])
    for share, message in (("a", "share"), (None, "share"), (2, "share lie in"), (0, "share lie in")):
        with pytest.raises(ValueError, match=message):
            found.mask(share)


def test_a_metric_that_is_not_finite_names_the_parameter():
    model, base, batch = pair("gpt2")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan
    told = "'transformer.h.1.mlp.c_fc.weight' holds values that are not finite"
    with pytest.raises(ValueError, match=rf"at the present parameters: .*; {told}"):
        change_attribution(model, base, [batch])
    with pytest.raises(ValueError, match=rf"at the base: .*; {told}"):
        change_attribution(base, model, [batch])
