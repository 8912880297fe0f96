from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_goldy.analysis.linearized import FrozenAttention, LinearizedMLP, TangentModel, build_variant
from lightning_goldy.analysis.taylor import TaylorApproximation
from lightning_goldy.core import ParameterVector
from tests.core.test_autodiff import without_casts  # noqa: F401  a fixture
from tests.references.architecture_models import REGISTERED
from tests.references.linearize import linear_mlp_logits, softmax_of_base
from tests.references.linearized import AT, SERVED, batch, build, eager, logits, moved
from tests.references.model_zoo import batch_for, build_family

LAST = {"gpt2": "mlp.c_proj", "llama": "mlp.down_proj", "bert": "output.dense"}


@pytest.mark.parametrize("family", list(REGISTERED))
def test_with_base_and_present_equal_the_model_is_reproduced(family: str) -> None:
    model = eager(family)
    inputs = batch(right=2)
    base = ParameterVector.of(model)
    expected = logits(model, inputs)
    assert torch.equal(logits(FrozenAttention(model, base), inputs), expected)
    for variant in (*(LinearizedMLP(model, base, at=at) for at in AT), TangentModel(model, base)):
        torch.testing.assert_close(logits(variant, inputs), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", [family for family in REGISTERED if family != "gemma2"])  # soft caps: no sdpa
def test_under_another_kernel_frozen_attention_differs_by_its_rounding(family: str) -> None:
    model = build(family)
    inputs = batch(right=2)
    valid = slice(None) if family in ("bert", "roberta") else inputs["attention_mask"].bool()
    found, fused = logits(FrozenAttention(model, ParameterVector.of(model)), inputs), logits(model, inputs)
    torch.testing.assert_close(found[valid], fused[valid], rtol=0, atol=2e-5)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", list(REGISTERED))
def test_frozen_patterns_are_those_of_the_base(family: str) -> None:
    model = eager(family)
    base = moved(model, 0.1)
    inputs = batch(right=2)
    found = FrozenAttention(model, base)(**inputs).logits
    gradients = torch.autograd.grad(found.sin().sum(), list(model.parameters()), allow_unused=True)
    with softmax_of_base(model, base, inputs):
        expected = model(**inputs).logits
    wanted = torch.autograd.grad(expected.sin().sum(), list(model.parameters()), allow_unused=True)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, logits(model, inputs), atol=1e-3)
    for mine, theirs in zip(gradients, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-5 * float(theirs.abs().max()) + 1e-9)


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize("family", list(REGISTERED))
def test_linear_mlps_are_first_order_expansions(family: str, at: str) -> None:
    model = build(family).double()
    base = moved(model, 0.05)
    inputs = batch(right=2)
    found = logits(LinearizedMLP(model, base, at=at), inputs)
    torch.testing.assert_close(found, linear_mlp_logits(model, base, inputs, at), rtol=0, atol=1e-8)
    assert not torch.allclose(found, logits(model, inputs), atol=1e-4)


@pytest.mark.parametrize("family", SERVED)
def test_a_tangent_has_the_logits_of_the_first_order(family: str) -> None:
    model = build(family).double()
    base = moved(model, 0.05)
    found = logits(TangentModel(model, base))
    torch.testing.assert_close(found, logits(TaylorApproximation(model, base, 1)), rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["frozen_attention", "base", "current", "tangent"])
@pytest.mark.parametrize("family", SERVED)
@pytest.mark.usefixtures("without_casts")
def test_gradients_flow_into_the_change(family: str, kind: str) -> None:
    model = build(family).double()
    base = moved(model, 0.05)
    variant = LinearizedMLP(model, base, at=kind) if kind in AT else build_variant(kind, model, base)
    weights = torch.randn(logits(variant).shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def value() -> Tensor:
        return (variant(**batch()).logits.tanh() * weights).sum()

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(value(), parameters, allow_unused=True)
    direction = [torch.randn(p.shape, generator=torch.Generator().manual_seed(4), dtype=p.dtype) for p in parameters]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True) if g is not None)
    found, at = {}, 0.0
    with torch.no_grad():
        for place in (1e-5, -1e-5, 2e-5, -2e-5, 0.0):
            for parameter, each in zip(parameters, direction, strict=True):
                parameter.add_(each, alpha=place - at)
            at = place
            found[place] = float(value())
    numerical = (8 * (found[1e-5] - found[-1e-5]) - (found[2e-5] - found[-2e-5])) / 12e-5
    assert slope == pytest.approx(numerical, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma", "qwen3"])
def test_a_change_of_queries_and_keys_alone_is_frozen_away(family: str) -> None:
    model = eager(family)
    before = logits(model)
    base = ParameterVector.of(model)
    moved(model, 0.2, only="q_proj")
    moved(model, 0.2, only="k_proj")
    assert not torch.allclose(logits(model), before, atol=1e-3)
    assert torch.equal(logits(FrozenAttention(model, base)), before)


def test_a_change_behind_the_last_attention_survives_it() -> None:
    model = eager("llama")
    base = moved(model, 0.2, only="layers.1.mlp")
    assert torch.equal(logits(FrozenAttention(model, base)), logits(model))


@pytest.mark.parametrize(
    ("family", "last"), [("gpt2", "mlp.c_proj"), ("llama", "mlp.down_proj"), ("bert", "output.dense")]
)
def test_an_mlp_is_linear_in_its_last_projection(family: str, last: str) -> None:
    model = build(family).double()
    base = moved(model, 0.2, only=last)
    torch.testing.assert_close(logits(LinearizedMLP(model, base, at="current")), logits(model), rtol=0, atol=1e-9)


@pytest.mark.parametrize("at", AT)
def test_the_remainder_of_linear_mlps_is_of_second_order(at: str) -> None:
    sizes = [1e-3, 2e-3, 4e-3]
    errors = []
    for size in sizes:
        model = build("gpt2").double()
        base = moved(model, size)
        errors.append(float((logits(LinearizedMLP(model, base, at=at)) - logits(model)).norm()))
    assert float(np.polyfit(np.log(sizes), np.log(errors), 1)[0]) == pytest.approx(2, abs=0.1)


def test_a_tangent_is_linear_and_its_gradient_does_not_depend_on_the_step() -> None:
    gradients, values = [], []
    for size in (0.0, 0.1, 0.2):
        model = build("gpt2").double()
        base = moved(model, size)
        output = TangentModel(model, base)(**batch()).logits
        values.append(output.detach())
        gradients.append(torch.autograd.grad(output[0, 0, :5].sum(), model.lm_head.weight)[0])
    torch.testing.assert_close(values[2] - values[0], 2 * (values[1] - values[0]), rtol=0, atol=1e-10)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("at", AT)
@pytest.mark.parametrize("family", ["BART", "Whisper"])
def test_mlps_of_both_stacks_are_expanded_with_what_the_block_does_between_their_projections(
    family: str, at: str
) -> None:
    model = build_family(family).double()
    inputs = {
        name: value.double() if value.is_floating_point() else value
        for name, value in batch_for(model).items()
        if name != "labels"
    }
    inputs["decoder_input_ids"] = torch.tensor([[1, 5, 6], [1, 7, 8]])
    base = moved(model, 0.05)
    found = logits(LinearizedMLP(model, base, at=at), inputs)
    torch.testing.assert_close(found, linear_mlp_logits(model, base, inputs, at), rtol=0, atol=1e-8)
    assert not torch.allclose(found, logits(model, inputs), atol=1e-4)
    torch.testing.assert_close(logits(LinearizedMLP(model, model, at=at), inputs), logits(model, inputs))


def test_the_dropout_between_two_projections_is_kept_in_training() -> None:
    model = build_family("BART")
    inputs = {**batch_for(model), "decoder_input_ids": torch.tensor([[1, 5, 6], [1, 7, 8]])}
    inputs.pop("labels")
    for part in model.modules():
        if hasattr(part, "activation_dropout"):
            part.activation_dropout, part.dropout = 0.5, 0.0
    linear = LinearizedMLP(model.train(), model, at="current")
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    torch.manual_seed(0)
    first = logits(linear, inputs)
    assert not torch.allclose(first, logits(linear, inputs), atol=1e-3)
    torch.testing.assert_close(logits(linear.eval(), inputs), logits(model.eval(), inputs))
