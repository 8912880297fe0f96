from __future__ import annotations

import copy
import itertools
import json
import sys

import pytest
import torch
from torch import nn

from lightning_goldy.analysis.result import Cost
from lightning_goldy.analysis.ripple import FinetuneRipple, finetune_ripple
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.space import SpaceError
from lightning_goldy.core.store import save_vectors
from lightning_goldy.core.vector import ParameterVector
from tests.core.test_autodiff import without_casts  # noqa: F401
from tests.references.models import build
from tests.references.ripple import TEMPLATE, WORDS, double, facts, gradient, read, seen_samples

CLASSES = tuple("edited" if place in (1, 4) else "untouched" for place in range(12))


def moved(base: nn.Module, size: float = 0.01) -> nn.Module:
    """A finetune in a random direction, of every parameter."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def rippled(model: nn.Module, base: nn.Module, **options) -> FinetuneRipple:
    settings = {"tokenizer": WORDS, "template": TEMPLATE, "batch_size": 5, "classes": CLASSES, **options}
    return finetune_ripple(model, ParameterVector.of(base), facts(), **settings)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.usefixtures("without_casts")
def test_every_number_is_that_of_models_read_piece_by_piece(family: str) -> None:
    base = double(family)
    model = moved(base)
    found = rippled(model, base)
    names = [name for name, _ in base.named_parameters()]
    was, now = dict(base.named_parameters()), dict(model.named_parameters())
    delta = torch.cat([(now[name] - was[name]).detach().flatten() for name in names])
    predicted = torch.stack([gradient(base, WORDS, piece, names, "answer") @ delta for piece in facts()])
    torch.testing.assert_close(found.predicted, predicted, rtol=1e-9, atol=1e-12)
    assert found.delta_norm == pytest.approx(float(delta.norm()), rel=1e-12)
    assert found.route == "forward"
    for each, log_prob, rank, exact in (
        (base, found.before, found.rank_before, found.exact_before),
        (model, found.after, found.rank_after, found.exact_after),
    ):
        with torch.no_grad():
            readings = [read(each, WORDS, piece, "answer") for piece in facts()]
        torch.testing.assert_close(log_prob, torch.stack([one.log_prob for one in readings]), rtol=1e-10, atol=0)
        assert rank.tolist() == [max(one.ranks) for one in readings]
        assert exact.tolist() == [one.exact for one in readings]
    assert torch.equal(found.measured, found.after - found.before)


@pytest.mark.usefixtures("without_casts")
def test_what_is_not_predicted_shrinks_with_the_square_of_the_step() -> None:
    base = double("gpt2")
    missed = []
    for power in range(4):
        found = rippled(moved(base, 1e-2 * 2.0**-power), base)
        missed.append(float((found.measured - found.predicted).norm()))
    for first, second in itertools.pairwise(missed):
        assert first / second == pytest.approx(4.0, rel=0.2)


def test_gradients_give_what_forward_mode_gives(monkeypatch) -> None:
    base = double("gpt2")
    forward = rippled(moved(base), base)
    # The package has a function of the module's name.
    module = sys.modules["lightning_goldy.analysis.ripple.measure"]
    monkeypatch.setattr(module, "available_route", lambda *_: "gradients")
    backward = rippled(moved(base), base)
    assert (forward.route, backward.route) == ("forward", "gradients")
    torch.testing.assert_close(forward.predicted, backward.predicted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("route", "expected"), [("forward", Cost(3 * 12 + 1, 0)), ("gradients", Cost(3 * 12, 12))])
def test_the_cost_is_what_the_model_saw(monkeypatch, route: str, expected: Cost) -> None:
    base = double("gpt2")
    model = moved(base)
    if route == "gradients":
        module = sys.modules["lightning_goldy.analysis.ripple.measure"]
        monkeypatch.setattr(module, "available_route", lambda *_: "gradients")
    with seen_samples(model) as seen:
        found = rippled(model, base)
    assert found.cost == expected
    assert seen == [expected.forwards, expected.backwards]
    assert not model._forward_hooks


@pytest.mark.parametrize("kind", ["module", "vector", "parameters", "file"])
def test_a_base_is_anything_that_can_be_one(kind: str, tmp_path) -> None:
    base = build("gpt2")
    model = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    vector = ParameterVector.of(base)
    save_vectors(tmp_path / "base.safetensors", vector, kind="values", model=base)
    bases = {"module": base, "vector": vector, "parameters": BaseParameters(vector), "file": tmp_path}
    found, expected = (
        finetune_ripple(model, given, facts(), tokenizer=WORDS, template=TEMPLATE) for given in (bases[kind], vector)
    )
    assert found.delta_norm == expected.delta_norm > 0
    assert torch.equal(found.predicted, expected.predicted)


def test_what_a_row_needs_is_that_of_the_pieces() -> None:
    base = double("gpt2")
    found = rippled(moved(base), base)
    details = found.details()
    assert details["classes"] == {"untouched": 10, "edited": 2}
    assert details["points"]["piece"] == [piece.id for piece in facts()]
    assert details["points"]["measured"] == found.measured.tolist()
    assert details["points"]["predicted"] == found.predicted.tolist()
    assert [entry["group"] for entry in details["agreement"]] == ["all", "untouched", "edited"]
    assert details["agreement"][0]["pearson"] == found.metrics()["pearson"]
    assert json.loads(json.dumps(details, allow_nan=False)) == details


def test_numbers_by_class_are_those_of_its_pieces() -> None:
    base = double("gpt2")
    found = rippled(moved(base), base)
    edited, untouched = [1, 4], [place for place in range(12) if place not in (1, 4)]
    scalars = found.metrics()
    assert found.groups == ("untouched", "edited")
    for name, places in (("edited", edited), ("untouched", untouched)):
        measured, predicted = found.measured[places], found.predicted[places]
        assert scalars[f"measured_change/{name}"] == pytest.approx(float(measured.mean()))
        assert scalars[f"predicted_change/{name}"] == pytest.approx(float(predicted.mean()))
        expected = torch.corrcoef(torch.stack([predicted, measured]))[0, 1]
        assert scalars[f"pearson/{name}"] == pytest.approx(float(expected))
        same = (predicted.sign() == measured.sign()).double().mean()
        assert scalars[f"sign_agreement/{name}"] == pytest.approx(float(same))
    everything = torch.stack([found.predicted, found.measured])
    assert scalars["pearson"] == pytest.approx(float(torch.corrcoef(everything)[0, 1]))
    slope = torch.cov(everything)[0, 1] / found.predicted.var()
    assert scalars["slope"] == pytest.approx(float(slope))
    order = sorted(untouched, key=lambda place: -abs(float(found.measured[place])))
    assert list(found.most_moved(3)) == order[:3]
    assert len(found.most_moved(99, "all")) == 12
    assert found.most_moved(3, "rehearsed") == ()
    with pytest.raises(ValueError, match=r"no piece has the class 'editted'.*'edited'"):
        found.places("editted")


def test_the_model_comes_back_as_it_was_and_the_result_goes_through_json() -> None:
    base, model = build("gpt2"), build("gpt2", 1).train()
    vector = BaseParameters(ParameterVector.of(base))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    state = torch.get_rng_state()
    found = finetune_ripple(model, vector, facts(), tokenizer=WORDS, template=TEMPLATE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert float(model.lm_head.weight.grad.mean()) == 1.0
    assert found.classes == ("untouched",) * 12
    again = FinetuneRipple.from_json(found.to_json())
    assert torch.equal(again.predicted, found.predicted)
    assert again.pieces == found.pieces == tuple(piece.id for piece in facts())


def test_a_part_of_the_parameters_can_be_the_base() -> None:
    base = double("gpt2")
    for name, parameter in base.named_parameters():
        parameter.requires_grad_("mlp" in name)
    model = moved(base)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "mlp" not in name:
                dict(model.named_parameters())[name].copy_(parameter)
    found = rippled(model, base)
    names = [name for name, _ in base.named_parameters() if "mlp" in name]
    was, now = dict(base.named_parameters()), dict(model.named_parameters())
    delta = torch.cat([(now[name] - was[name]).detach().flatten() for name in names])
    predicted = torch.stack([gradient(base, WORDS, piece, names, "answer") @ delta for piece in facts()])
    torch.testing.assert_close(found.predicted, predicted, rtol=1e-6, atol=1e-8)


def test_bad_arguments_are_named() -> None:
    base = build("gpt2")
    for options, message in (
        ({"measure": "all"}, "unknown measure 'all'"),
        ({"batch_size": 0}, "batch_size"),
        ({"classes": ("edited",)}, "there are 1 classes for 12 pieces"),
        ({"template": "no question"}, "exactly once"),
    ):
        with pytest.raises(ValueError, match=message):
            rippled(base, base, **options)
    with pytest.raises(ValueError, match="there is no piece"):
        finetune_ripple(base, ParameterVector.of(base), [], tokenizer=WORDS)
    with pytest.raises(SpaceError, match="has no parameter"):
        rippled(base, build("llama"))
