"""Tests of the registered families: what is found, under which names, and how users add a family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_goldy.core.architecture import (
    FamilySpec,
    FusedProjection,
    HeadCounts,
    UnsupportedArchitectureError,
    available_architectures,
    describe_architecture,
    families,
    register_architecture,
)
from tests.references.architecture_models import (
    COMMON,
    OPT,
    REGISTERED,
    VOCABULARY,
    build,
    check_output_slices,
    check_query_key_slices,
    check_value_slices,
)


@pytest.mark.parametrize("family", REGISTERED)
def test_describes_registered_family(family: str) -> None:
    model = build(family)
    architecture = describe_architecture(model)
    assert (architecture.family, architecture.source, len(architecture.blocks)) == (family, "registry", 2)
    assert architecture.n_heads == 4
    modules = dict(model.named_modules())
    for index, block in enumerate(architecture.blocks):
        assert block.index == index
        assert block.name.endswith(f".{index}")
        assert block.n_heads == 4
        assert block.n_key_value_heads == architecture.n_key_value_heads
        pairs = {
            block.name: block.module,
            block.attention_name: block.attention,
            block.attention_output_name: block.attention_output,
            block.mlp_output_name: block.mlp_output,
            **{part.name: part.module for part in block.mlp_parts},
            **{part.name: part.module for part in (block.query, block.key, block.value)},
        }
        for name, module in pairs.items():
            assert modules[name] is module
        inside = set(block.attention.modules())
        assert {block.attention_output, block.query.module, block.key.module, block.value.module} <= inside
        assert block.mlp_output not in inside
        assert all(part.name.startswith(f"{block.name}.") for part in block.mlp_parts)


def test_registered_families_are_all_tested() -> None:
    assert set(available_architectures()) == set(REGISTERED)


@pytest.mark.parametrize(
    ("family", "groups", "head_dim"),
    [("gpt2", 4, 8), ("llama", 2, 8), ("qwen3", 2, 12), ("gemma", 1, 12), ("phi3", 2, 8), ("bert", 4, 8)],
)
def test_head_counts(family: str, groups: int, head_dim: int) -> None:
    architecture = describe_architecture(build(family))
    assert (architecture.n_key_value_heads, architecture.head_dim) == (groups, head_dim)
    assert architecture.blocks[0].key.layout.n_heads == groups


def test_block_of_finds_the_block_of_any_submodule() -> None:
    model = build("bert")
    architecture = describe_architecture(model)
    assert architecture.block_of(architecture.blocks[1].query.module) is architecture.blocks[1]
    assert architecture.block_of(model.classifier) is None


def test_mlp_that_is_no_single_module() -> None:
    opt = describe_architecture(build("opt")).blocks[0]
    assert opt.mlp is None
    assert opt.mlp_input is opt.module.fc1
    assert opt.mlp_output is opt.module.fc2
    llama = describe_architecture(build("llama")).blocks[0]
    assert llama.mlp is llama.mlp_input is llama.module.mlp


@pytest.mark.parametrize("family", REGISTERED)
def test_bare_model(family: str) -> None:
    model = build(family)
    bare = model.base_model
    prefix = model.base_model_prefix
    expected, found = describe_architecture(model), describe_architecture(bare)
    assert [block.module for block in found.blocks] == [block.module for block in expected.blocks]
    assert [f"{prefix}.{block.name}" for block in found.blocks] == [block.name for block in expected.blocks]


@pytest.mark.parametrize(
    "model_class", [hf.GPT2ForSequenceClassification, hf.LlamaForTokenClassification, hf.OPTForSequenceClassification]
)
def test_other_task_heads(model_class: Any) -> None:
    options = OPT if model_class is hf.OPTForSequenceClassification else COMMON
    model = model_class(model_class.config_class(**options))
    assert len(describe_architecture(model).blocks) == 2


def test_names_have_no_wrapper_prefixes() -> None:
    model = build("gpt2")
    expected = describe_architecture(model)
    wrapped = copy.deepcopy(model)
    wrapped.transformer.h[0] = checkpoint_wrapper(wrapped.transformer.h[0])
    wrapped.transformer.h[1].attn = torch.compile(wrapped.transformer.h[1].attn)
    compiled: Any = torch.compile(wrapped)
    found = describe_architecture(compiled)
    assert [block.name for block in found.blocks] == [block.name for block in expected.blocks]
    assert [b.attention_output_name for b in found.blocks] == [b.attention_output_name for b in expected.blocks]
    assert [type(block.module).__name__ for block in found.blocks] == ["GPT2Block", "GPT2Block"]
    assert type(found.blocks[1].attention).__name__ == "GPT2Attention"


def test_data_parallel_is_looked_through() -> None:
    model = build("llama")
    assert describe_architecture(nn.DataParallel(model)) == describe_architecture(model)


def test_model_inside_another_module() -> None:
    outer = nn.Module()
    outer.model = build("llama")
    architecture = describe_architecture(outer)
    assert architecture.blocks[0].name == "model.model.layers.0"
    assert architecture.blocks[0].output_slice(1)[0].parameter is outer.get_parameter(
        "model.model.layers.0.self_attn.o_proj.weight"
    )


def test_only_modules_are_described() -> None:
    with pytest.raises(TypeError, match="got dict"):
        describe_architecture({})  # type: ignore[arg-type]


def test_encoder_and_decoder_are_described_together_or_by_name() -> None:
    config = hf.T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=8, num_layers=1, num_heads=4)
    model = hf.T5ForConditionalGeneration(config)
    both = describe_architecture(model)
    assert [(block.index, block.name) for block in both.blocks] == [(0, "encoder.block.0"), (1, "decoder.block.0")]
    assert both.blocks[1].attention_output is model.decoder.block[0].layer[0].SelfAttention.o
    assert both.blocks[1].mlp_output is model.decoder.block[0].layer[2].DenseReluDense.wo
    for name in ("encoder", "decoder"):
        (block,) = describe_architecture(model, stack=name).blocks
        (alone,) = describe_architecture(getattr(model, name)).blocks
        assert (block.index, block.name) == (0, f"{name}.block.0")
        assert block.attention is alone.attention
        assert block.value.module is alone.value.module is block.attention.v
    with pytest.raises(ValueError, match="unknown stack 'middle'"):
        describe_architecture(model, stack="middle")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedArchitectureError, match="names a part of an encoder-decoder, which this is not"):
        describe_architecture(build("llama"), stack="decoder")


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", copy.deepcopy(families.FAMILIES))


@pytest.mark.usefixtures("registry")
def test_users_register_a_family() -> None:
    @register_architecture("bloom")
    def bloom(config: Any) -> FamilySpec:
        fused = FusedProjection("self_attention.query_key_value", "interleaved")
        return FamilySpec("h", "self_attention", "self_attention.dense", fused, ("mlp",), "mlp.dense_4h_to_h")

    model = build("bloom")
    architecture = describe_architecture(model)
    assert architecture.source == "registry"
    assert "bloom" in available_architectures()
    check_output_slices(model, architecture)
    check_value_slices(model, architecture)
    check_query_key_slices(model, architecture)


@pytest.mark.usefixtures("registry")
def test_registering_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"\['llama'\] are registered already"):
        register_architecture("tiny", "llama")
    with pytest.raises(ValueError, match=r"\['tiny'\]"):
        register_architecture("tiny", "tiny")
    with pytest.raises(ValueError, match="one or more model types"):
        register_architecture()
    assert "tiny" not in available_architectures()


@pytest.mark.usefixtures("registry")
def test_of_two_decorators_for_one_name_the_second_fails() -> None:
    first, second = register_architecture("tiny"), register_architecture("tiny")
    spec = FamilySpec("h", "attn", "attn.c_proj", None, ("mlp",), "mlp.c_proj")
    first(lambda config: spec)
    with pytest.raises(ValueError, match="model family 'tiny' is registered already"):
        second(lambda config: spec)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (FamilySpec("h", "attn", "attn.c_proj", None, ("mlp",), "mlp.c_proj"), "no list 'h' of blocks"),
        (FamilySpec("layers", "attn", "self_attn.o_proj", None, ("mlp",), "mlp.down_proj"), r"no module '.*0\.attn'"),
        (FamilySpec("layers", "self_attn", "mlp", None, ("mlp",), "mlp.down_proj"), "is a OlmoMLP, not a Linear"),
        (
            FamilySpec(
                "layers", "self_attn", "self_attn.o_proj", None, ("mlp",), "mlp.down_proj", HeadCounts(3, 3, 10)
            ),
            "width 32 of .*o_proj' is not a multiple of 10",
        ),
    ],
)
def test_specs_that_do_not_fit(spec: FamilySpec, message: str) -> None:
    register_architecture("olmo")(lambda config: spec)
    with pytest.raises(UnsupportedArchitectureError, match=message) as error:
        describe_architecture(build("olmo"))
    assert "OlmoForCausalLM" in str(error.value)
