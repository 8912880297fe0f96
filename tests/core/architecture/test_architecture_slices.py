"""Tests that the slices of a head are what the model computes with, also under adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from lightning_goldy.core.architecture import HeadGates, UnsupportedArchitectureError, describe_architecture
from tests.references.architecture_models import (
    FUSED,
    REGISTERED,
    build,
    check_output_slices,
    check_query_key_slices,
    check_value_slices,
    columns_of,
    gated,
    logits,
    lora,
    owners_of_rows,
)


@pytest.mark.parametrize("family", REGISTERED)
def test_output_slices_are_the_heads(family: str) -> None:
    model = build(family)
    check_output_slices(model, describe_architecture(model))


@pytest.mark.parametrize("family", REGISTERED)
def test_value_slices_are_the_heads(family: str) -> None:
    model = build(family)
    check_value_slices(model, describe_architecture(model))


@pytest.mark.parametrize("family", FUSED)
def test_rows_of_a_fused_projection_are_those_of_the_heads_that_they_move(family: str) -> None:
    model = build(family).double()
    for block in describe_architecture(model).blocks:
        fused = block.module.get_submodule(FUSED[family][1])
        found = {}
        for part, projection in (("query", block.query), ("key", block.key), ("value", block.value)):
            assert projection.module is fused
            for head in range(projection.layout.n_heads):
                first = head if part == "query" else block.query_heads(head)[0]
                weight = projection.head_slice(head)[0]
                found.update({weight.start + row: (part, first) for row in range(weight.length)})
        expected = owners_of_rows(model, fused, block.attention_output, block.n_heads)
        assert [found[row] for row in range(len(expected))] == expected


@pytest.mark.parametrize("family", FUSED)
def test_slices_of_a_fused_projection_are_the_heads(family: str) -> None:
    model = build(family)
    check_value_slices(model, describe_architecture(model))
    check_query_key_slices(model, describe_architecture(model))


@pytest.mark.parametrize("family", REGISTERED)
def test_query_and_key_slices_move_their_heads_only(family: str) -> None:
    model = build(family)
    check_query_key_slices(model, describe_architecture(model))


@pytest.mark.parametrize("family", REGISTERED)
def test_slices_tile_the_projections(family: str) -> None:
    block = describe_architecture(build(family)).blocks[0]
    for projection in {id(p.module): p for p in (block.query, block.key, block.value)}.values():
        count = torch.zeros_like(projection.head_slice(0)[0].parameter)
        for other in (block.query, block.key, block.value):
            if other.module is projection.module:
                for head in range(other.layout.n_heads):
                    part = other.head_slice(head)[0]
                    assert count[part.index].shape == part.of(count).shape
                    count[part.index] += 1
        assert torch.equal(count, torch.ones_like(count))


@pytest.mark.parametrize(("family", "biased"), [("gpt2", True), ("llama", True), ("mistral", False), ("bert", True)])
def test_bias_belongs_to_query_key_value_but_not_to_output(family: str, biased: bool) -> None:
    block = describe_architecture(build(family)).blocks[0]
    names = [part.name.rpartition(".")[2] for part in block.value.head_slice(0)]
    assert names == (["weight", "bias"] if biased else ["weight"])
    assert [part.name for part in block.output_slice(0)] == [f"{block.attention_output_name}.weight"]


def test_groups_and_heads_map_both_ways() -> None:
    block = describe_architecture(build("llama")).blocks[0]
    assert [block.key_value_head(head) for head in range(4)] == [0, 0, 1, 1]
    assert [list(block.query_heads(group)) for group in range(2)] == [[0, 1], [2, 3]]


@pytest.mark.parametrize("head", [-1, 4])
def test_head_out_of_range(head: int) -> None:
    block = describe_architecture(build("llama")).blocks[0]
    for ask in (block.output_slice, block.query.head_slice, block.key_value_head):
        with pytest.raises(IndexError, match="there are 4"):
            ask(head)
    with pytest.raises(IndexError, match="there are 2"):
        block.value.head_slice(head)
    with pytest.raises(IndexError, match="there are 2"):
        block.query_heads(head)


def test_removed_heads_show_in_the_block() -> None:
    model = build("llama")
    attention = model.model.layers[1].self_attn
    for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
        projection = getattr(attention, name)
        projection.weight = nn.Parameter(projection.weight[:rows].detach())
        projection.bias = nn.Parameter(projection.bias[:rows].detach())
    attention.o_proj.weight = nn.Parameter(attention.o_proj.weight[:, :16].detach())
    architecture = describe_architecture(model)
    assert [(block.n_heads, block.n_key_value_heads) for block in architecture.blocks] == [(4, 2), (2, 1)]
    check_output_slices(model, architecture)


@pytest.mark.parametrize(
    ("family", "targets", "options"),
    [
        ("gpt2", ["c_attn", "c_proj"], {"fan_in_fan_out": True}),
        ("llama", ["q_proj", "k_proj", "v_proj", "o_proj"], {}),
        ("llama", ["v_proj", "o_proj"], {"lora_bias": True}),
        ("gpt_neox", ["query_key_value", "dense"], {}),
    ],
)
def test_lora_slices_include_the_adapter(family: str, targets: list[str], options: Mapping[str, Any]) -> None:
    model = lora(family, targets, **options)
    architecture = describe_architecture(model)
    block = architecture.blocks[0]
    assert architecture.family == family
    assert block.attention_output_name.startswith("base_model.model.")
    names = [part.name for part in block.output_slice(0)]
    assert names == [
        f"{block.attention_output_name}.base_layer.weight",
        f"{block.attention_output_name}.lora_A.default.weight",
    ]
    for part in (*block.output_slice(1), *block.value.head_slice(1)):
        assert model.get_parameter(part.name) is part.parameter
    check_output_slices(model, architecture)
    check_value_slices(model, architecture)


def test_adapter_that_mixes_heads_refuses_slices() -> None:
    model = lora("llama", ["o_proj"], use_dora=True)
    block = describe_architecture(model).blocks[0]
    assert block.n_heads == 4
    with pytest.raises(UnsupportedArchitectureError, match="plain LoRA"):
        block.output_slice(0)
    block.value.head_slice(0)


def test_packed_weight_refuses_slices() -> None:
    model = build("llama")
    projection = model.model.layers[0].self_attn.o_proj
    projection.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)
    block = describe_architecture(model).blocks[0]
    assert block.n_heads == 4
    with pytest.raises(UnsupportedArchitectureError, match=r"layers\.0\.self_attn\.o_proj.*packed"):
        block.output_slice(0)


@pytest.mark.parametrize("saved", ["o_proj", "mlp"])
def test_modules_to_save_are_looked_through(saved: str) -> None:
    model = lora("llama", ["q_proj"], modules_to_save=[saved])
    architecture = describe_architecture(model)
    block = architecture.blocks[0]
    trained = block.attention_output if saved == "o_proj" else block.mlp_output
    assert all(weight.requires_grad for weight in trained.parameters())
    assert "modules_to_save.default" in (block.attention_output_name if saved == "o_proj" else block.mlp_output_name)
    check_output_slices(model, architecture)


@pytest.mark.parametrize("family", ["llama", "stablelm"])
def test_adalora_keeps_its_factors_by_head(family: str) -> None:
    peft = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(init_r=4, target_modules=["o_proj", "v_proj"], total_step=20)
    model = peft.get_peft_model(build(family), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    architecture = describe_architecture(model.eval())
    assert architecture.blocks[0].output_slice(1)[1].name.endswith("o_proj.lora_A.default")
    check_output_slices(model, architecture)
    check_value_slices(model, architecture)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("VeraConfig", {"r": 2}), ("LoraConfig", {"r": 2, "use_dora": True}), ("LoHaConfig", {"r": 2})],
)
def test_heads_of_other_adapters_are_gated_and_not_cut(kind: str, options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), getattr(peft, kind)(target_modules=["o_proj"], **options)).eval()
    architecture = describe_architecture(model)
    with pytest.raises(UnsupportedArchitectureError, match="in a form other than plain LoRA"):
        architecture.blocks[0].output_slice(0)
    clean = logits(model)
    gates = HeadGates(model, architecture=architecture)
    gates.disable([(0, 1)])
    with gated(architecture.blocks[0].attention_output, [columns_of(architecture, 1)]):
        expected = logits(model)
    assert torch.equal(logits(model), expected)
    assert not torch.allclose(expected, clean)
