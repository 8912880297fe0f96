from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.analysis.linearized import FrozenAttention, LinearizedMLP, TangentModel, build_variant
from lightning_goldy.core import CausalLMObjective, ParameterSpace, ParameterVector
from lightning_goldy.core.architecture import UnsupportedArchitectureError
from lightning_goldy.core.base import BaseParameters
from tests.core.test_autodiff import without_casts  # noqa: F401  a fixture
from tests.references.architecture_models import lora
from tests.references.linearize import softmax_of_base
from tests.references.linearized import AT, SERVED, batch, build, logits, moved, variants_of


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.usefixtures("without_casts")
def test_padding_does_not_matter(family: str) -> None:
    model = build(family).double()
    base = moved(model, 0.05)
    variants = [FrozenAttention(model, base), LinearizedMLP(model, base), TangentModel(model, base)]
    short, padded = batch(5), batch(5)
    for key in padded:
        padded[key] = torch.cat([padded[key], torch.zeros(3, 2, dtype=torch.long)], dim=1)
    for variant in variants:
        found, expected = logits(variant, padded), logits(variant, short)
        found = found if family == "bert" else found[:, :5]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


def test_padding_on_the_left_does_not_matter() -> None:
    model = build("llama").double()
    base = moved(model, 0.05)
    padded = batch(7, left=2)
    alone = {"input_ids": padded["input_ids"][1:, 2:], "attention_mask": torch.ones(2, 5, dtype=torch.long)}
    objective = CausalLMObjective()
    for variant in (FrozenAttention(model, base), LinearizedMLP(model, base), TangentModel(model, base)):
        with torch.no_grad():
            found = objective.log_probs(variant, padded)[1:]
            torch.testing.assert_close(found, objective.log_probs(variant, alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", SERVED)
def test_bfloat16_agrees_with_float32_to_its_precision(family: str) -> None:
    model = build(family)
    base = moved(model, 0.03)
    inputs = batch()
    exact = [logits(variant, inputs) for variant in variants_of(model, base)]
    narrow = [logits(variant, inputs) for variant in variants_of(model.bfloat16(), base)]
    for wide, found in zip(exact, narrow, strict=True):
        assert found.dtype == torch.bfloat16
        assert float((found.float() - wide).norm() / wide.norm()) < 4e-2


def test_as_context_managers_they_combine_in_either_order() -> None:
    model = build("gpt2").double()
    base = moved(model, 0.05)
    before = logits(model)
    linear = LinearizedMLP(model, base)
    with FrozenAttention(model, base), linear:
        both = logits(model)
        assert torch.equal(logits(linear), both)
    with linear, FrozenAttention(model, base):
        other = logits(model)
    torch.testing.assert_close(both, other, rtol=0, atol=1e-12)
    model.set_attn_implementation("eager")
    # The slow version of one inside the other: the patterns of the base serve its own pass first, then the present one.
    with softmax_of_base(model, base, batch(), times=2):
        inside = logits(linear)
    torch.testing.assert_close(both, inside, rtol=0, atol=1e-11)
    assert not torch.allclose(both, logits(FrozenAttention(model, base)), atol=1e-4)
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model), before)


def test_a_deep_copy_changes_itself_and_not_the_original() -> None:
    model = build("gpt2").double()
    base = moved(model, 0.05)
    for variant in variants_of(model, base):
        copied = copy.deepcopy(variant)
        assert copied.model is not model
        expected = logits(variant)
        assert torch.equal(logits(copied), expected)
        with torch.no_grad():
            for parameter in variant.parameters():
                parameter.add_(0.01)
        assert torch.equal(logits(copied), expected)
        assert not torch.allclose(logits(variant), expected, atol=1e-4)


def test_they_train_in_the_place_of_the_model() -> None:
    for kind in ("frozen_attention", "linear_mlp", "tangent"):
        model = build("gpt2").train()
        base = ParameterVector.of(model)
        variant = build_variant(kind, model, base)
        assert {id(p) for p in variant.parameters()} == {id(p) for p in model.parameters()}
        optimizer = torch.optim.AdamW(variant.parameters(), lr=3e-3)
        objective, losses = CausalLMObjective(), []
        for _ in range(12):
            optimizer.zero_grad()
            loss = objective.loss(variant, batch())
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0] - 0.3
        assert torch.equal(base["transformer.wte.weight"], variant.base_values()["transformer.wte.weight"])


def test_dropout_of_patterns_stays_as_the_model_has_it() -> None:
    # Of one block and with this dropout alone, so that no noise reaches the pattern itself.
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=67, embd_pdrop=0, resid_pdrop=0, attn_pdrop=0.4)
    model = GPT2LMHeadModel(config).train()
    model.set_attn_implementation("eager")
    frozen = FrozenAttention(model, ParameterVector.of(model))
    found = []
    for each in (model, frozen):
        torch.manual_seed(0)
        found.append((logits(each), torch.get_rng_state()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], logits(model.eval()))


def test_they_work_where_gradients_are_off_altogether() -> None:
    model = build("llama").eval()
    base = moved(model, 0.05)
    for variant in variants_of(model, base):
        expected = logits(variant)
        with torch.inference_mode():
            torch.testing.assert_close(variant(**batch()).logits, expected, rtol=0, atol=1e-6)


def test_the_model_comes_back_as_it_was_also_after_an_error() -> None:
    model = build("llama").train()
    base = BaseParameters(moved(model, 0.05))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    variants = (FrozenAttention(model, base), LinearizedMLP(model, base))
    for variant in variants:
        variant(**batch())
        with pytest.raises(ValueError, match="of somebody"), variant:
            raise ValueError("of somebody else's")
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    assert not model._forward_pre_hooks
    assert all("forward" not in part.__dict__ for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(key.startswith("base") for variant in variants for key in variant.state_dict())


def test_what_is_not_in_the_base_counts_as_unchanged() -> None:
    model = build("llama").double()
    whole = moved(model, 0.05, only="mlp")
    part = ParameterVector.of(model, ParameterSpace.of(model, include=("*.mlp.*",)))
    part = ParameterVector(part.space, {name: whole[name] for name in part})
    for at in AT:
        found = logits(LinearizedMLP(model, part, at=at))
        torch.testing.assert_close(found, logits(LinearizedMLP(model, whole, at=at)), rtol=0, atol=1e-12)


def test_adapters_are_the_change() -> None:
    model = lora("llama", ["q_proj", "up_proj"])
    base = ParameterVector.of(model).map(torch.zeros_like)
    with torch.no_grad(), model.disable_adapter():
        start = model(**batch()).logits
    linear = LinearizedMLP(model, base, at="current")
    frozen = FrozenAttention(model, base)
    assert not torch.allclose(logits(model), start, atol=1e-3)
    # Both adapters are zero at the base, where their product has no first order.
    with frozen, linear:
        torch.testing.assert_close(logits(model), start, rtol=0, atol=2e-5)


def test_families_that_are_not_served_are_named() -> None:
    bloom = build("bloom")
    base = ParameterVector.of(bloom)
    with pytest.raises(UnsupportedArchitectureError, match=r"Bloom\w+ ignores set_attn_implementation"):
        FrozenAttention(bloom, base)
    with pytest.raises(UnsupportedArchitectureError, match=r"bloom, BloomMLP\) takes hidden_states, residual"):
        LinearizedMLP(bloom, base)
    plain = nn.Linear(2, 2)
    with pytest.raises(UnsupportedArchitectureError, match="Linear"):
        FrozenAttention(plain, ParameterVector.of(plain))


def test_bad_input_is_refused() -> None:
    model = build("gpt2")
    base = ParameterVector.of(model)
    with pytest.raises(ValueError, match=r"unknown at='bse'; did you mean 'base'"):
        LinearizedMLP(model, base, at="bse")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown variant 'tangnt'; did you mean 'tangent'"):
        build_variant("tangnt", model, base)  # type: ignore[arg-type]
    other = ParameterVector.of(build("llama"))
    for kind in ("frozen_attention", "linear_mlp", "tangent"):
        with pytest.raises(ValueError, match=r"has no parameter 'model\.embed_tokens\.weight'"):
            build_variant(kind, model, other)
    frozen, linear = FrozenAttention(model, base), LinearizedMLP(model, base)
    with frozen, pytest.raises(RuntimeError, match="in a with block already"):
        frozen.__enter__()
    with frozen, pytest.raises(RuntimeError, match=r"'transformer.h.0.attn' is frozen already"):
        FrozenAttention(model, base)(**batch())
    with linear, pytest.raises(RuntimeError, match=r"'transformer.h.0.mlp' is linearised already"):
        LinearizedMLP(model, base)(**batch())
    cache = model(**batch(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="call the model without past_key_values"):
        frozen(**batch(), past_key_values=cache)
