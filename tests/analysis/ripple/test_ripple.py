from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from lightning_goldy.analysis.result import Cost
from lightning_goldy.analysis.ripple import (
    FinetuneEditor,
    GradientStepEditor,
    KnowledgeEdit,
    RankOneEditor,
    ripple_effects,
)
from lightning_goldy.analysis.ripple.editors import LARGEST_STEP
from lightning_goldy.analysis.ripple.measure import Measure
from lightning_goldy.analysis.ripple.ripple import LINEAR_RANGE
from lightning_goldy.core.pieces import KnowledgePiece
from tests.core.test_autodiff import without_casts  # noqa: F401
from tests.references import architecture_models
from tests.references.models import build
from tests.references.ripple import EDITS, TEMPLATE, WORDS, double, effects, facts, gradient, read, ripple, seen_samples

EDITORS_IN_SHORT: dict[str, Any] = {
    "gradient_step": GradientStepEditor(learning_rate=0.1),
    "finetune": FinetuneEditor(learning_rate=1e-3, steps=3),
    "rank_one": RankOneEditor(steps=5, weight_decay=0.0),
}


def wanted(edit: tuple[str, str]) -> KnowledgePiece:
    return replace(next(piece for piece in facts() if piece.id == edit[0]), answer=edit[1])


def thought(model: nn.Module, edit: tuple[str, str], measure: str) -> float:
    return float(read(model, WORDS, wanted(edit), measure).log_prob.detach())


def output_weights(model: nn.Module) -> list[str]:
    ends = ("mlp.c_proj.weight", "mlp.down_proj.weight", "mlp.dense_4h_to_h.weight")
    return [name for name, _ in model.named_parameters() if name.endswith(ends)]


def stepped(rate: float, edit: tuple[str, str], measure: str = "answer_with_end") -> Any:
    def train(model: nn.Module) -> None:
        names = output_weights(model)
        step = gradient(model, WORDS, wanted(edit), names, measure)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name in names:
                size = parameters[name].numel()
                parameters[name].add_(rate * step[:size].view_as(parameters[name]))
                step = step[size:]

    return train


@pytest.mark.parametrize("measure", get_args(Measure))
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.usefixtures("without_casts")
def test_every_number_is_that_of_copies_read_piece_by_piece(family: str, measure: Measure) -> None:
    model = double(family)
    found = ripple(model, EDITS[:2], measure=measure, learning_rate=0.3)
    assert found.settings == {"editor": "gradient_step", "measure": measure, "route": "forward"}
    for row, edit in enumerate(EDITS[:2]):
        expected = effects(model, WORDS, [wanted(edit)], output_weights(model), stepped(0.3, edit, measure), measure)
        torch.testing.assert_close(found.predicted_first_order[row], expected.first_order, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.predicted_coupling[row], expected.coupling, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.cosine[row], expected.cosine, rtol=1e-9, atol=1e-12)
        assert float(found.delta_norm[row]) == pytest.approx(expected.delta_norm, rel=1e-9)
        for readings, log_prob, rank, exact in (
            (expected.before, found.before, found.rank_before, found.exact_before),
            (expected.after, found.after[row], found.rank_after[row], found.exact_after[row]),
        ):
            torch.testing.assert_close(log_prob, torch.stack([each.log_prob for each in readings]), rtol=1e-10, atol=0)
            assert rank.tolist() == [max(each.ranks) for each in readings]
            assert exact.tolist() == [each.exact for each in readings]
        torch.testing.assert_close(found.measured[row], found.after[row] - found.before)
        copied = copy.deepcopy(model)
        assert float(found.new_before[row]) == pytest.approx(thought(copied, edit, measure))
        stepped(0.3, edit, measure)(copied)
        assert float(found.new_after[row]) == pytest.approx(thought(copied, edit, measure))


def test_steps_of_adamw_are_those_of_a_training_loop() -> None:
    model = double("gpt2")

    def train(model: nn.Module) -> None:
        parameters = [dict(model.named_parameters())[name] for name in output_weights(model)]
        optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            (-read(model, WORDS, wanted(EDITS[0]), "answer_with_end").log_prob).backward()
            optimizer.step()

    found = ripple(model, EDITS[:1], editor=FinetuneEditor(learning_rate=0.01, steps=4, weight_decay=0.1))
    expected = effects(model, WORDS, [wanted(EDITS[0])], output_weights(model), train)
    torch.testing.assert_close(found.predicted_first_order[0], expected.first_order, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(found.predicted_coupling[0], expected.coupling, rtol=1e-7, atol=1e-9)
    after = torch.stack([each.log_prob for each in expected.after])
    torch.testing.assert_close(found.after[0], after, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.usefixtures("without_casts")
def test_the_prediction_is_first_order(family: str) -> None:
    model = double(family)
    gradient_square = float(ripple(model, EDITS[:1], learning_rate=1.0).delta_norm[0]) ** 2
    rates = [0.2 / gradient_square * 4.0**-k for k in range(5)]
    found = [ripple(model, EDITS[:2], learning_rate=rate) for rate in rates]
    for first, second in itertools.pairwise(found):
        torch.testing.assert_close(second.predicted_first_order * 4, first.predicted_first_order, rtol=1e-9, atol=0)
    remainders = np.array([float((each.measured - each.predicted_first_order).norm()) for each in found])
    slope = np.polyfit(np.log(rates[2:]), np.log(remainders[2:]), 1)[0]
    assert slope == pytest.approx(2.0, abs=0.1)
    agreement = [each.agreement()[0] for each in found]
    assert agreement[-1].pearson > 0.9999
    assert agreement[-1].slope == pytest.approx(1.0, abs=0.01)
    assert agreement[-1].intercept == pytest.approx(0.0, abs=0.01 * float(found[-1].measured.abs().max()))
    assert all(each.pearson > 0.99 for each in agreement[2:])


@pytest.mark.parametrize("editor", EDITORS_IN_SHORT)
def test_other_editors_are_predicted_by_their_own_change(editor: str) -> None:
    """The first order knows the change itself; the coupling only its length."""
    small: dict[str, Any] = {
        "gradient_step": GradientStepEditor(learning_rate=1e-3),
        "finetune": FinetuneEditor(learning_rate=1e-6, steps=3),
        "rank_one": RankOneEditor(steps=1, learning_rate=1e-3, largest=1e-3),
    }
    found = ripple(double("gpt2"), editor=small[editor])
    assert found.agreement()[0].pearson > 0.999
    assert found.agreement()[0].slope == pytest.approx(1.0, abs=0.02)
    same = torch.allclose(found.predicted_first_order, found.predicted_coupling, rtol=1e-6, atol=1e-14)
    assert same is (editor == "gradient_step")


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("editor", EDITORS_IN_SHORT)
def test_the_model_comes_back_bit_for_bit(family: str, editor: str) -> None:
    model: Any = build(family).train()
    first, *_, last = model.parameters()
    first.grad = torch.ones_like(first)
    last.requires_grad_(False)
    next(model.children()).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    needed = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    found = ripple(model, editor=EDITORS_IN_SHORT[editor])
    assert bool((found.delta_norm > 0).all())
    assert bool((found.measured != 0).any())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [parameter.requires_grad for parameter in model.parameters()] == needed
    assert [module.training for module in model.modules()] == modes
    assert float(first.grad.mean()) == 1
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not first)
    assert torch.equal(random, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_edits_are_made_alone_or_together() -> None:
    model = double("gpt2")
    alone = ripple(model, learning_rate=0.1)
    for row, edit in enumerate(EDITS):
        single = ripple(model, [edit], learning_rate=0.1)
        torch.testing.assert_close(single.after[0], alone.after[row], rtol=0, atol=0)
        assert single.classes[0] == alone.classes[row]
    both = ripple(model, EDITS[:2], learning_rate=0.1, together=True)
    # The loss is the mean over the edits, so to first order the effect is the mean of the two.
    torch.testing.assert_close(
        both.predicted_first_order[0], alone.predicted_first_order[:2].mean(0), rtol=1e-8, atol=1e-12
    )
    assert both.edits == ({"pieces": ("capital of Peru", "money of Chad"), "answers": ("Vientiane", "kip")},)
    classes = dict(zip(both.pieces, both.classes[0], strict=True))
    assert classes["capital of Peru"] == classes["money of Chad"] == "edited"
    assert classes["money of Peru"] == classes["capital of Chad"] == "same subject"
    assert classes["capital of Laos"] == classes["money of Laos"] == "same relation"
    assert classes["area of Laos"] == "unrelated"
    assert both.agreement()[0].n == len(facts()) - 2


def test_a_new_fact_can_be_edited_in() -> None:
    fact = KnowledgePiece("new", "the capital of Vanuatu is", "tiny", category="capital", group="Vanuatu")
    model = double("gpt2")
    found = ripple(model, [KnowledgeEdit(fact, "big")], learning_rate=0.1)
    assert "edited" not in found.classes[0]
    assert found.agreement()[0].n == len(facts())
    by_id = ripple(model, [("capital of Vanuatu", "big")], learning_rate=0.1)
    torch.testing.assert_close(found.after, by_id.after, rtol=0, atol=0)


@pytest.mark.parametrize("route", ["forward", "gradients"])
def test_functions_of_a_familys_own_go_forward_by_their_parts_or_by_gradients(
    route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> Any:
        raise NotImplementedError("no forward mode")

    if route == "gradients":
        monkeypatch.setattr("lightning_goldy.analysis.ripple.measure._forward_slope", refuse)
    model = architecture_models.build("bloom").double()
    found = ripple(model, EDITS[:1], learning_rate=1e-4, select=["*dense_4h_to_h.weight"])
    assert found.settings["route"] == route
    assert found.agreement()[0].pearson > 0.99
    assert found.agreement()[0].slope == pytest.approx(1.0, abs=0.02)


def test_both_routes_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double("gpt2")
    forward = ripple(model, editor=EDITORS_IN_SHORT["finetune"])
    monkeypatch.setattr("lightning_goldy.analysis.ripple.ripple.available_route", lambda *_: "gradients")
    backward = ripple(model, editor=EDITORS_IN_SHORT["finetune"])
    assert (forward.settings["route"], backward.settings["route"]) == ("forward", "gradients")
    for name in ("predicted_first_order", "predicted_coupling", "cosine", "after"):
        torch.testing.assert_close(getattr(forward, name), getattr(backward, name), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("editor", ["gradient_step", "finetune", "rank_one"])
def test_adapters_can_be_edited(editor: str) -> None:
    model = architecture_models.lora("gpt2", ["c_proj"], fan_in_fan_out=True).double()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    needed = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    rates = {"gradient_step": 1e-2, "finetune": 1e-4, "rank_one": 0.02}
    options = {} if editor == "rank_one" else {"select": ["*mlp*lora_*"]}
    found = ripple(model, editor=editor, learning_rate=rates[editor], **options)
    assert bool((found.measured != 0).all())
    assert bool((found.new_after > found.new_before).all())
    assert found.agreement()[0].pearson > 0.95
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == needed
    if editor == "gradient_step":
        default = ripple(model, editor=editor, learning_rate=rates[editor])
        torch.testing.assert_close(default.after, found.after, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("editor", "backwards", "forwards"),
    # An edit: its own answer before and after, its gradient, the pieces after it and along two directions.
    [("gradient_step", 1, 1), ("finetune", 3, 3), ("rank_one", 6, 7)],
)
def test_the_cost_is_what_the_model_saw(editor: str, backwards: int, forwards: int) -> None:
    model, n_pieces = double("gpt2"), len(facts())
    with seen_samples(model) as seen:
        found = ripple(model, EDITS[:2], editor=EDITORS_IN_SHORT[editor])
    covariance = n_pieces if editor == "rank_one" else 0
    expected = Cost(
        forwards=2 * n_pieces + 1 + covariance + 2 * (3 + 3 * n_pieces + forwards),
        backwards=n_pieces + 2 * (1 + backwards),
    )
    assert found.cost == found.row().cost == expected
    assert seen == [expected.forwards, expected.backwards]


def steep() -> nn.Module:
    """A model whose gradients are so large that a step of 0.01 is no small one."""
    model = double("gpt2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp.c_fc" in name or "wte" in name:
                parameter.mul_(6)
    return model


@pytest.mark.filterwarnings("error:ripple_effects")
def test_a_step_without_a_rate_is_halved_until_what_it_does_is_linear() -> None:
    model, (low, high) = steep(), LINEAR_RANGE
    settings = {"tokenizer": WORDS, "template": TEMPLATE}
    found = ripple_effects(model, facts(), EDITS, **settings)
    with pytest.warns(
        UserWarning, match=r"the slope of measured on predicted changes is .*, outside \[0.8, 1.25\]"
    ) as told:
        fixed = ripple_effects(model, facts(), EDITS, learning_rate=LARGEST_STEP, **settings)
    assert f"is {fixed.agreement()[0].slope:.3g}, outside" in str(told[0].message)
    assert fixed.details()["warning"] in str(told[0].message)
    assert not fixed.linear.all()
    assert fixed.learning_rate.tolist() == [LARGEST_STEP] * 3

    assert found.scaled
    assert found.warning() == ""
    assert bool(found.linear.all())
    assert all(low <= slope <= high for slope in found.slope.tolist())
    halvings = [math.log2(LARGEST_STEP / rate) for rate in found.learning_rate.tolist()]
    assert all(halving == round(halving) for halving in halvings)
    assert max(halvings) >= 1
    for row, (edit, rate) in enumerate(zip(EDITS, found.learning_rate.tolist(), strict=True)):
        same = ripple(model, [edit], learning_rate=rate, measure="answer", batch_size=16)
        assert torch.equal(same.after[0], found.after[row])
        assert float(same.slope[0]) == pytest.approx(same.agreement()[0].slope)
        if halvings[row]:  # the largest that will do
            with pytest.warns(UserWarning, match="the slope of measured on predicted changes is"):
                twice = ripple(model, [edit], learning_rate=2 * rate, measure="answer")
            assert not twice.linear.any()
    details = found.details()
    assert (details["slopes"], details["learning_rates"]) == (found.slope.tolist(), found.learning_rate.tolist())
    assert (details["linear_range"], details["scaled"]) == ([low, high], True)
    assert found.metrics()["smallest_slope"] == min(found.slope.tolist())


def test_halvings_are_bounded_and_the_slope_nearest_to_one_stands() -> None:
    model = steep()
    tried = [ripple(model, EDITS[:1], learning_rate=LARGEST_STEP / 2**halved) for halved in range(2)]
    found = ripple(model, EDITS[:1], editor=GradientStepEditor(halvings=1))
    nearest = min(tried, key=lambda each: abs(math.log(s)) if (s := float(each.slope[0])) > 0 else math.inf)
    assert found.learning_rate.tolist() == nearest.learning_rate.tolist()
    assert "1 of 1 edits" in found.warning()
    with pytest.raises(ValueError, match="halvings must be at least 0; got -1"):
        GradientStepEditor(halvings=-1)


def test_edits_that_change_no_weight_are_told_as_such_and_not_as_steps_too_large() -> None:
    with pytest.warns(UserWarning, match=r"2 of 2 edits changed no weight: .*more steps or less weight decay"):
        idle = ripple(build("llama"), EDITS[:2], editor=RankOneEditor(weight_decay=1e3, steps=2), measure="answer")
    assert idle.delta_norm.tolist() == [0.0, 0.0]
    assert "slope" not in idle.warning()
    # Beside one that moved, of the others alone.
    mixed = replace(
        idle, delta_norm=torch.tensor([0.0, 1.0]).double(), slope=torch.tensor([math.nan, 2.0]).double(), cost=Cost()
    )
    assert "1 of 2 edits changed no weight" in mixed.warning()
    assert "1 of 2 edits have slopes outside (2)" in mixed.warning()


def test_a_single_other_piece_has_no_line_and_the_new_answer_tells_the_slope() -> None:
    model, pieces = double("gpt2"), facts()[:2]
    found = ripple_effects(model, pieces, [(pieces[0], "Vientiane")], tokenizer=WORDS, template=TEMPLATE)
    rate = float(found.learning_rate[0])
    assert float(found.delta_norm[0]) > 0
    predicted = float(found.delta_norm[0]) ** 2 / rate
    assert float(found.slope[0]) == pytest.approx(float(found.new_after[0] - found.new_before[0]) / predicted, rel=1e-6)
