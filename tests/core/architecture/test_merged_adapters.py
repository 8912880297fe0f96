"""The change of merged weights equals that of the models that merge_and_unload() gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from lightning_goldy.analysis import explain_change, taylor_diff
from lightning_goldy.analysis.attribution.path import ChangePath
from lightning_goldy.analysis.change import SuccessiveUpdates, parameter_distribution, weight_change
from lightning_goldy.analysis.ripple import finetune_ripple
from lightning_goldy.core import ClassifierObjective, ParameterSpace, ParameterVector
from lightning_goldy.core.architecture.adapters import (
    AdapterError,
    adapted_layers,
    base_values,
    changes_in,
    laid_on,
    line_from,
    merged_name,
)
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.data import byte_tokenizer
from tests.references.model_zoo import build_family

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 8, "vocab_size": 258, "n_positions": 64}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ends))


def lora(**options: Any) -> Any:
    return peft.LoraConfig(r=2, lora_alpha=3, **options)


CASES = {
    "LoRA": (gpt2, lambda: lora(target_modules=["c_attn", "c_proj"])),
    "rsLoRA of nn.Linear": (
        lambda: build_family("Llama"),
        lambda: lora(target_modules=["q_proj", "down_proj"], use_rslora=True),
    ),
    "DoRA": (gpt2, lambda: lora(target_modules=["c_attn", "c_proj"], use_dora=True)),
    "embeddings": (gpt2, lambda: lora(target_modules=["wte", "c_fc"])),
    "tokens of tied embeddings": (gpt2, lambda: lora(target_modules=["c_attn"], trainable_token_indices=[1, 3])),
    "biases": (gpt2, lambda: lora(target_modules=["c_attn"], bias="lora_only")),
    "biases of LoRA": (gpt2, lambda: lora(target_modules=["c_attn"], lora_bias=True)),
    "modules_to_save": (gpt2, lambda: lora(target_modules=["c_attn"], modules_to_save=["ln_f"])),
    "VeRA": (
        lambda: build_family("Llama"),
        lambda: peft.VeraConfig(r=4, target_modules=["o_proj"], projection_prng_key=0),
    ),
    "IA3": (
        lambda: build_family("Llama"),
        lambda: peft.IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "VB-LoRA, whose layers share a bank": (
        lambda: build_family("Llama"),
        lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=8, topk=2, target_modules=["q_proj"]),
    ),
}


def move(model: nn.Module, size: float = 0.1) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn_like(parameter))


def unloaded(model: Any) -> nn.Module:
    merged = copy.deepcopy(model).merge_and_unload()
    return merged.requires_grad_(True)


def trained(kind: str) -> tuple[nn.Module, BaseParameters, nn.Module, nn.Module]:
    """A model with adapters, its base, and both merged by PEFT."""
    build, config = CASES[kind]
    model = peft.get_peft_model(build().double(), config()).double().eval()
    if kind != "LoRA":
        move(model)  # a base whose adapters do something already
    base, before = BaseParameters(ParameterVector.of(model)), unloaded(model)
    move(model)
    return model, base, before, unloaded(model)


@pytest.mark.parametrize("kind", CASES)
def test_changes_are_those_of_merged_models(kind: str) -> None:
    model, base, before, after = trained(kind)
    kept = ParameterVector.of(model, base.space)
    found, expected = weight_change(model, base), weight_change(after, before)
    rows = {row["name"]: row for row in expected.rows()}
    assert found.space == "merged"
    assert expected.space is None
    assert found.delta_norm == pytest.approx(expected.delta_norm, rel=1e-12)
    assert found.row().result["space"] == "merged"
    names = {row["name"] for row in found.rows()}
    assert {name for name, row in rows.items() if row["delta_norm"]} <= names <= set(rows)
    for row in found.rows():
        assert row["base_norm"] == pytest.approx(rows[row["name"]]["base_norm"], rel=1e-12)
        assert row["delta_norm"] == pytest.approx(rows[row["name"]]["delta_norm"], rel=1e-9)
    shapes = {row["name"]: row for row in parameter_distribution(after, before).rows}
    for row in parameter_distribution(model, base).rows:
        for column in ("stable_rank", "effective_rank", "alignment", "histogram_drift", "intruder_share"):
            value, other = row.get(column), shapes[row["name"]].get(column)
            assert (value is None) == (other is None)
            assert value is None or value == pytest.approx(other, rel=1e-4, abs=1e-9), column
    assert all(map(torch.equal, kept.values(), ParameterVector.of(model, base.space).values()))


@pytest.mark.parametrize(
    "kind",
    [
        "LoRA",
        "DoRA",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("rsLoRA of nn.Linear", "embeddings", "IA3", "VeRA")),
        pytest.param("modules_to_save", marks=pytest.mark.slow),
        "VB-LoRA, whose layers share a bank",
    ],
)
def test_derivatives_along_merged_weights_are_those_of_merged_models(kind: str) -> None:
    model, base, before, after = trained(kind)
    batches = [{"input_ids": torch.randint(0, 20, (2, 7))}]
    found, expected = (taylor_diff(*pair, batches, by="tensor") for pair in ((model, base), (after, before)))
    assert found.space == "merged"
    # Llama's norms cast to float32 inside.
    for name in ("base_loss", "loss", "first_order", "second_order", "step_norm", "nonlinearity"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5), name
    assert found.metrics()["gradient_norm"] != found.metrics()["gradient_norm"]  # no number, and none is told
    for name, share in found.loss_shares.items():
        assert share == pytest.approx(expected.loss_shares[name], rel=1e-5, abs=1e-9)
        assert found.function_shares[name] == pytest.approx(expected.function_shares[name], rel=1e-5, abs=1e-9)
    assert sum(found.loss_shares.values()) == pytest.approx(found.first_order, rel=1e-5)
    in_adapters = taylor_diff(model, base, batches, orders=[1], by=None, function_space=False, space="adapters")
    assert in_adapters.space == "adapters"
    # The weights of IA3 are linear in it; B A is quadratic, and DoRA has a norm.
    same = in_adapters.first_order == pytest.approx(found.first_order, rel=1e-6)
    assert same == (kind == "IA3")
    assert not any("goldy" in name for name, _ in model.named_parameters())


def test_shares_of_a_small_step_do_not_cancel() -> None:
    model = peft.get_peft_model(build_family("Llama"), peft.TrainableTokensConfig(token_indices=[3, 4])).eval()
    base = BaseParameters(ParameterVector.of(model))
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).mul_(1 - 1e-5)
    found = taylor_diff(model, base, [{"input_ids": torch.tensor([[3, 4, 5, 3, 6, 7, 8]])}], by="tensor")
    assert sum(found.loss_shares.values()) == pytest.approx(found.first_order, rel=1e-3)


def test_variants_and_predictions_of_facts_are_those_of_merged_models() -> None:
    model, base, before, after = trained("LoRA")
    batches = [{"input_ids": torch.randint(0, 20, (2, 7))}]
    variants: Any = ("frozen_attention", "linear_mlp", "tangent")
    explained = [explain_change(*pair, batches, variants=variants) for pair in ((model, base), (after, before))]
    assert explained[0].row().result["space"] == "merged"
    for name, value in explained[1].metrics().items():
        assert explained[0].metrics()[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
    pieces = [KnowledgePiece("a", "1+1?", "2"), KnowledgePiece("b", "1+2?", "3")]
    ripples = [finetune_ripple(*pair, pieces, tokenizer=byte_tokenizer()) for pair in ((model, base), (after, before))]
    assert torch.allclose(ripples[0].predicted, ripples[1].predicted, rtol=1e-9)
    assert ripples[0].delta_norm == pytest.approx(ripples[1].delta_norm, rel=1e-12)


def test_several_adapters_are_summed() -> None:
    model = peft.get_peft_model(gpt2().double(), lora(target_modules=["c_attn"]), adapter_name="first")
    model.add_adapter("second", lora(target_modules=["c_attn", "c_fc"]))
    model.base_model.set_adapter(["first", "second"])
    base, before = BaseParameters(ParameterVector.of(model.double().eval())), unloaded(model)
    move(model)
    found, expected = weight_change(model, base), weight_change(unloaded(model), before)
    assert found.delta_norm == pytest.approx(expected.delta_norm, rel=1e-12)
    assert len(found.names) == 2


def scale(model: Any) -> None:
    for layer in adapted_layers(model).values():
        layer.scale_layer(3.0)  # type: ignore[operator]


def add(model: Any) -> None:
    model.add_adapter("other", lora(target_modules=["c_attn"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def switch(model: Any) -> None:
    add(model)
    model.set_adapter("other")


def switch_off(model: Any) -> None:
    model.disable_adapter_layers()


@pytest.mark.parametrize("turn", [scale, add, switch, switch_off])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_the_base_is_what_the_adapters_of_its_time_came_to(turn: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    model = peft.get_peft_model(gpt2(), lora(target_modules=["c_attn", "c_proj"], init_lora_weights=False, **options))
    base, first = BaseParameters(ParameterVector.of(model)), unloaded(model)
    base.laid_on = laid_on(model)
    move(model)
    turn(model)
    settings = laid_on(model)
    # What another adapter begins with is no part of the base.
    new = {name: value for name, value in model.named_parameters() if ".other." in name and value.requires_grad}
    base.grow(ParameterVector(ParameterSpace.of_tensors(new), {name: own.detach() for name, own in new.items()}))
    now = copy.deepcopy(model).unload().requires_grad_(True) if turn is switch_off else unloaded(model)
    right = weight_change(now, first)
    told = weight_change(model, base)
    expected = dict(zip(right.names, right.delta_norms, strict=True))
    assert dict(zip(told.names, told.delta_norms, strict=True)) == pytest.approx(
        {name: expected[name] for name in told.names}, rel=1e-4
    )
    assert told.delta_norm == pytest.approx(right.delta_norm, rel=1e-4)
    batch = {"input_ids": torch.randint(258, (2, 6))}
    along, straight = (taylor_diff(one, start, [batch], orders=[1]) for one, start in ((model, base), (now, first)))
    assert along.base_loss == pytest.approx(straight.base_loss, rel=1e-5)
    assert along.loss == pytest.approx(straight.loss, rel=1e-5)
    assert along.first_order == pytest.approx(straight.first_order, rel=1e-3, abs=1e-6)
    with ChangePath(model, base) as path:
        path.move_to(0.0)
        torch.testing.assert_close(model.eval()(**batch).logits, first.eval()(**batch).logits, rtol=1e-4, atol=1e-5)
    assert laid_on(model) == settings
    with pytest.raises(AdapterError, match=r"c_attn: its adapters are not those .*or scaled otherwise"):
        base_values(model, base)


def test_an_adapter_that_a_base_was_computed_with_and_that_is_gone_is_named() -> None:
    model = peft.get_peft_model(gpt2(), lora(target_modules=["c_attn"], init_lora_weights=False))
    head = {"base_model.model.lm_head.weight": model.get_output_embeddings().weight}
    base = BaseParameters(ParameterVector.of(model, ParameterSpace.of_tensors(head)))
    base.laid_on = laid_on(model)
    switch(model)
    model.delete_adapter("default")
    with pytest.raises(AdapterError, match=r"c_attn: the base was computed with the adapter 'default', which is gone"):
        list(changes_in(model, base))


def test_low_rank_spectra_do_not_need_small_matrices() -> None:
    model, base, _, _ = trained("LoRA")
    rows = parameter_distribution(model, base, exact_below=1).rows
    dense = parameter_distribution(model, base).rows
    assert all(row["exact"] for row in rows)
    assert [row["singular_values"] for row in rows] == [row["singular_values"] for row in dense]
    # Two directions each, and no more of them: of the base only the A of the adapters was there, behind a B of zeros.
    assert all(len(row["singular_values"]) == 2 for row in rows)


def test_cosines_of_updates_are_those_of_merged_models() -> None:
    model, _, _, _ = trained("LoRA")
    adapters, merged = SuccessiveUpdates(), SuccessiveUpdates()
    for _ in range(4):
        found = adapters.observe(ParameterVector.of(model), model)
        expected = merged.observe(ParameterVector.of(unloaded(model)))
        move(model)
    assert found == pytest.approx(expected, abs=2e-3)  # the update before is kept in bfloat16


def test_a_classifier_of_linear_layers_is_expanded_exactly() -> None:
    plain = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    model = peft.get_peft_model(plain, lora(target_modules=["0", "2"])).eval()
    base, before = BaseParameters(ParameterVector.of(model)), unloaded(model)
    move(model)
    batch, objective = [(torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1]))], ClassifierObjective()
    found = taylor_diff(model, base, batch, objective)
    expected = taylor_diff(unloaded(model), before, batch, objective)
    assert found.second_order == pytest.approx(expected.second_order, rel=1e-9)


def test_without_adapters_nothing_is_told_and_nothing_else() -> None:
    layer = nn.Linear(2, 2)
    base = BaseParameters(ParameterVector.of(layer))
    assert "space" not in weight_change(layer, base).row().result
    assert [change.name for change in changes_in(layer, base)] == ["weight", "bias"]


def test_what_cannot_be_merged_is_refused_by_name() -> None:
    model, base, _, _ = trained("LoRA")
    with pytest.raises(ValueError, match="unknown space 'both'"):
        weight_change(model, base, space="both")
    model.merge_adapter()
    with pytest.raises(AdapterError, match=r"c_attn: the adapter is merged; take it apart first"):
        taylor_diff(model, base, [{"input_ids": torch.tensor([[1, 2, 3]])}])
    model.unmerge_adapter()
    layer: Any = next(iter(adapted_layers(model).values()))
    layer.base_layer.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"c_attn: the weight below the adapter is quantised \(uint8\)"):
        weight_change(model, base)


def test_the_model_is_itself_on_the_line_and_after_an_error() -> None:
    model, base, _, _ = trained("DoRA")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = model(input_ids=ids).logits
        with line_from(model, base):
            assert torch.equal(model(input_ids=ids).logits, before)
        with pytest.raises(IndexError), line_from(model, base):
            model(input_ids=ids + 1000)
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not any("forward" in vars(layer) for layer in adapted_layers(model).values())


def test_names_are_those_of_the_merged_model() -> None:
    model, base, _, after = trained("modules_to_save")
    own = dict(after.named_parameters())
    assert all(change.name in own for change in changes_in(model, base))
    assert merged_name("h.0.mlp.base_layer.base_layer.down_proj") == "h.0.mlp.down_proj"
