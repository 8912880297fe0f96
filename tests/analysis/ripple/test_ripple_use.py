from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from lightning_goldy.analysis.agreement import agreement_of
from lightning_goldy.analysis.ripple import (
    EditRequest,
    GradientStepEditor,
    KnowledgeEdit,
    RippleResult,
    distance_class,
    register_editor,
    ripple_effects,
)
from lightning_goldy.analysis.ripple.editors import EDITORS
from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.core.space import ParameterSpace, SpaceError
from tests.references.models import build
from tests.references.ripple import EDITS, TEMPLATE, WORDS, double, facts, ripple


class Clumsy:
    """Changes modes, gradients, random state and weights, and fails at the second edit."""

    def __init__(self) -> None:
        self.edits = 0

    def space(self, model: nn.Module) -> ParameterSpace:
        return ParameterSpace.of(model, ["*mlp*"])

    def edit(self, model: nn.Module, request: EditRequest) -> None:
        model.train()
        request.log_prob(model).backward()
        for parameter in request.space.resolve(model).values():
            parameter.data.add_(torch.randn_like(parameter))
        self.edits += 1
        if self.edits == 2:
            raise ArithmeticError("half way")


def test_an_editor_that_fails_leaves_nothing_behind() -> None:
    model = build("gpt2").train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    editor = Clumsy()
    with pytest.raises(ArithmeticError, match="half way"):
        ripple(model, editor=editor)
    assert editor.edits == 2
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())


def test_low_precision_is_told_as_it_is() -> None:
    exact, model = build("gpt2").eval(), build("gpt2").to(torch.bfloat16).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = ripple(model, editor="finetune", learning_rate=2e-2, steps=3)
    wide = ripple(exact, editor="finetune", learning_rate=2e-2, steps=3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(found.before, wide.before, rtol=0, atol=0.05)
    torch.testing.assert_close(found.measured, wide.measured, rtol=0, atol=0.05)
    torch.testing.assert_close(found.predicted_first_order, wide.predicted_first_order, rtol=0, atol=0.05)
    assert float(wide.measured.abs().max()) > 0.3
    # A step below the rounding of the weights is no step.
    with pytest.warns(UserWarning, match="edits changed no weight: the step is below the weights' rounding"):
        nothing = ripple(model, learning_rate=1e-12)
    assert bool((nothing.delta_norm == 0).all())
    assert bool((nothing.measured == 0).all())
    assert bool((nothing.predicted_first_order == 0).all())
    assert nothing.agreement()[0].reason == "predicted values are all the same"


@pytest.mark.parametrize("editor", ["finetune", "gradient_step"])
def test_inside_autocast_the_edit_is_seen(editor: str) -> None:
    model = build("gpt2").eval()
    settings: dict[str, Any] = {"editor": editor, "learning_rate": 2e-2 if editor == "finetune" else 1.0}
    with torch.autocast("cpu", torch.bfloat16):
        found = ripple(model, **settings)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        expected = ripple(model, **settings)
    assert float(found.measured.abs().max()) > 0.05
    for name in ("before", "after", "predicted_first_order", "delta_norm"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=0)


class Noise:
    """Adds noise of the global random state, and leaves dropout on."""

    def __init__(self, size: float = 0.1) -> None:
        self.size = size

    def space(self, model: nn.Module) -> ParameterSpace:
        return ParameterSpace.of(model, ["*mlp.c_proj.weight"])

    def edit(self, model: nn.Module, request: EditRequest) -> None:
        assert not model.training
        model.train()
        with torch.no_grad():
            for parameter in request.space.resolve(model).values():
                parameter.add_(self.size * torch.randn_like(parameter))


def test_an_edit_leaves_nothing_to_the_next() -> None:
    model = build("gpt2").eval()
    found = ripple(model, editor=Noise())
    single = ripple(model, EDITS[2:], editor=Noise())
    torch.testing.assert_close(found.after[2], single.after[0], rtol=0, atol=0)
    torch.testing.assert_close(found.after[0], found.after[2], rtol=0, atol=0)
    with pytest.warns(UserWarning, match="edits changed no weight"):
        assert bool((ripple(model, editor=Noise(0.0)).measured == 0).all())


def test_own_editors_and_classes() -> None:
    @register_editor("test_scaling")
    class Scaling:
        def __init__(self, factor: float = 1.5) -> None:
            self.factor = factor

        def space(self, model: nn.Module) -> ParameterSpace:
            return ParameterSpace.of(model, ["*h.1.mlp.c_proj.weight"])

        def edit(self, model: nn.Module, request: EditRequest) -> None:
            request.kept["count"] = request.kept.get("count", 0) + 1
            assert len(request.context) == 3
            with torch.no_grad():
                for parameter in request.space.resolve(model).values():
                    parameter.mul_(self.factor)

    try:
        model = double("gpt2")
        found = ripple(model, editor="test_scaling", distance=lambda edited, other: other.category or "?")
        norm = float(model.transformer.h[1].mlp.c_proj.weight.detach().norm())
        assert found.delta_norm.tolist() == pytest.approx([norm / 2] * 3)
        assert set(found.groups) == {"capital", "money", "area"}
        assert [each.group for each in found.agreement()] == ["all", *found.groups]
        assert ripple(model, editor=Scaling(2.0)).settings["editor"] == "Scaling"
    finally:
        del EDITORS._entries["test_scaling"]


def test_distances() -> None:
    first = KnowledgePiece("1", "q", "a", category="x", group="g", hop=1)
    assert distance_class(first, replace(first, id="2")) == "same subject"
    assert distance_class(first, replace(first, id="2", hop=2, category="y")) == "two-hop"
    assert distance_class(first, replace(first, id="2", hop=None)) == "two-hop"
    assert distance_class(replace(first, hop=None), replace(first, id="2", hop=None)) == "same subject"
    assert distance_class(first, replace(first, id="2", group="h", hop=2)) == "same relation"
    assert distance_class(first, replace(first, id="2", group=None)) == "same relation"
    assert distance_class(first, replace(first, id="2", group="h", category="y")) == "unrelated"
    bare = KnowledgePiece("3", "q", "a")
    assert distance_class(bare, replace(bare, id="4")) == "unrelated"


@pytest.mark.parametrize("scale", [1.0, 1e-9, 1e-200])
def test_agreement_is_that_of_scipy(scale: float) -> None:
    generator = np.random.default_rng(3)
    x = np.round(generator.normal(size=60), 1)
    y = np.round(0.4 * x + generator.normal(size=60), 1)
    assert len(np.unique(x)) < 50  # ties
    found = agreement_of(scale * x, scale * y)
    assert found.n == 60
    assert found.pearson == pytest.approx(scipy.stats.pearsonr(x, y).statistic, rel=1e-12)
    assert found.spearman == pytest.approx(scipy.stats.spearmanr(x, y).statistic, rel=1e-12)
    line = scipy.stats.linregress(x, y)
    assert found.slope == pytest.approx(line.slope, rel=1e-12)
    assert found.intercept == pytest.approx(scale * line.intercept, rel=1e-10)
    assert found.sign_agreement == np.mean(
        [math.copysign(a != 0, a) == math.copysign(b != 0, b) for a, b in zip(x, y, strict=True)]
    )
    assert found.reason == ""


def test_what_is_undefined_says_why() -> None:
    for predicted, measured, reason, known in (
        ([], [], "no pair", ()),
        ([1.0], [2.0], "a single pair", ("sign_agreement",)),
        ([1.0, 1.0], [2.0, 3.0], "predicted values are all the same", ("sign_agreement",)),
        ([1.0, 2.0], [2.0, 2.0], "measured values are all the same", ("sign_agreement", "slope", "intercept")),
        ([1.0, math.nan], [2.0, 2.0], "1 of 2 pairs are not finite", ()),
        ([1.0, 2.0], [-math.inf, 2.0], "1 of 2 pairs are not finite", ()),
    ):
        found = agreement_of(predicted, measured)
        numbers = ("pearson", "spearman", "sign_agreement", "slope", "intercept")
        assert found.reason == reason
        assert [name for name in numbers if not math.isnan(getattr(found, name))] == list(known)


def test_an_edit_that_breaks_the_model_is_a_result() -> None:
    found = ripple(build("gpt2").eval(), learning_rate=1e38)
    assert not bool(torch.isfinite(found.after).all())
    assert "not finite" in found.agreement()[0].reason
    assert found.metrics()["first_order_pearson"] is None
    assert found.row().metrics["measured_change/unrelated"] is None


def test_it_goes_to_json_rows_and_text() -> None:
    found = ripple(build("gpt2").eval())
    again = RippleResult.from_json(found.to_json())
    for name, value in vars(found).items():
        assert (
            torch.equal(value, getattr(again, name))
            if isinstance(value, torch.Tensor)
            else value == getattr(again, name)
        )
    row = found.row().at(step=7).to_dict()
    points = row["result"]["points"]
    assert row["step"] == 7
    assert row["result"]["n_pairs"] == len(points["measured"]) == 3 * 11
    assert "edited" not in points["class"]
    place = points["piece"].index("money of Peru")
    assert points["measured"][place] == float(
        found.measured[points["edit"][place], found.pieces.index("money of Peru")]
    )
    assert row["metrics"]["first_order_spearman"] == found.agreement()[0].spearman
    assert row["metrics"]["measured_change/same_subject"] == pytest.approx(
        float(found.measured.numpy()[found.pairs("same subject")].mean())
    )
    lines = found.table().splitlines()
    assert len(lines) == 1 + 2 * 4
    assert lines[1].startswith("first_order  all                  33")
    one = found.agreement("coupling", edit=1)
    assert [each.n for each in one] == [11, 2, 3, 6]


def test_progress_counts_edits() -> None:
    told: list[tuple[int, int]] = []
    ripple(build("gpt2").eval(), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_bad_input_is_refused_before_anything_is_done() -> None:
    model = build("gpt2").eval()
    pieces = facts()
    for edits, options, message in (
        ([], {}, "there is no edit"),
        ([("capital of Peruu", "x")], {}, "no piece has the id 'capital of Peruu'.*did you mean 'capital of Peru'"),
        ([("capital of Peru", " ")], {}, "the new answer of piece 'capital of Peru' is empty"),
        ([("capital of Peru", "big"), ("capital of Peru", "big")], {}, "is edited twice to 'big'"),
        ([("capital of Peru", "big"), ("capital of Peru", "sol")], {"together": True}, "edited twice together"),
        ([KnowledgeEdit("capital of Peru", "big", subject="Chad")], {}, "subject 'Chad' does not stand in"),
        ([KnowledgeEdit(replace(pieces[0], question="?"), "big")], {}, "has the id 'capital of Peru' of another piece"),
        (EDITS, {"editor": "rankone"}, "unknown editor 'rankone'; did you mean 'rank_one'"),
        (EDITS, {"steps": 3}, "editor 'gradient_step' has no setting 'steps'"),
        (EDITS, {"learning_rate": -1.0}, "learning_rate must be a positive number; got -1.0"),
        (EDITS, {"editor": GradientStepEditor(), "learning_rate": 1.0}, "set it on the GradientStepEditor"),
        (EDITS, {"measure": "all"}, "unknown measure 'all'; Valid: answer_with_end, answer, first_token"),
        (EDITS, {"batch_size": 0}, "batch_size must be a whole number of at least 1; got 0"),
        (EDITS, {"template": "x"}, "must contain '{question}' exactly once"),
        (EDITS, {"distance": lambda edited, other: "all"}, "the class of piece 'money of Peru' is 'all'"),
        (EDITS, {"select": ["*nothing*"]}, "matches no trainable parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            ripple(model, edits, **options)
    with pytest.raises(ValueError, match="two pieces have the id 'capital of Peru'"):
        ripple_effects(model, [*pieces, pieces[0]], EDITS, tokenizer=WORDS, template=TEMPLATE)
    with pytest.raises(ValueError, match="no piece to measure"):
        ripple_effects(model, [], EDITS, tokenizer=WORDS, template=TEMPLATE)
    with pytest.raises(TypeError, match="a KnowledgeEdit or a pair"):
        ripple(model, ["capital of Peru"])
    with pytest.raises(TypeError, match="an editor has the methods space and edit; int has not"):
        ripple(model, editor=3)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(SpaceError, match="no MLP output projection is trainable"):
        ripple(model)
    model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"the weights of transformer\.h\.0\.mlp\.c_fc\.weight are not finite"):
        ripple(model, editor="rank_one")


def test_unknown_classes_and_predictors_are_refused() -> None:
    found = ripple(build("gpt2").eval(), EDITS[:1])
    with pytest.raises(ValueError, match="no pair has the class 'near'"):
        found.pairs("near")
    with pytest.raises(ValueError, match="edit must be a row from 0 to 0; got 1"):
        found.agreement(edit=1)
    with pytest.raises(ValueError, match=r"unknown predictor 'cosine'; .*first_order, coupling"):
        found.predicted("cosine")  # type: ignore[arg-type]
