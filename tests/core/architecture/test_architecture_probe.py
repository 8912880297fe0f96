"""Tests of the probe: it agrees with the registry, finds the parts of other models, and leaves no trace."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_goldy.core.architecture import (
    Architecture,
    UnsupportedArchitectureError,
    available_architectures,
    describe_architecture,
)
from lightning_goldy.core.architecture.describe import probe_architecture
from lightning_goldy.core.architecture.families import canonical_modules
from tests.references.architecture_models import (
    COMMON,
    GROUPED,
    REGISTERED,
    UNREGISTERED,
    VOCABULARY,
    build,
    check_output_slices,
    lora,
)


def probe(model: Any) -> Architecture:
    return probe_architecture(canonical_modules(model), "", config=model.config, family="probed", sample_batch=None)


@pytest.mark.parametrize("family", REGISTERED)
def test_probe_agrees_with_registry(family: str) -> None:
    model = build(family)
    registered, probed = describe_architecture(model), probe(model)
    assert (probed.n_heads, probed.n_key_value_heads, probed.head_dim) == (
        registered.n_heads,
        registered.n_key_value_heads,
        registered.head_dim,
    )
    for expected, found in zip(registered.blocks, probed.blocks, strict=True):
        assert found.attention_output is expected.attention_output
        assert found.mlp_output is expected.mlp_output
        assert found.attention is expected.attention
        assert found.mlp_parts == expected.mlp_parts
        assert found.output == expected.output
        if found.query_key_value is None:
            assert expected.query.module is expected.key.module
        else:
            assert found.query_key_value == expected.query_key_value


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", UNREGISTERED)
def test_probe_describes_unregistered_family(family: str, implementation: str) -> None:
    model = build(family)
    model.set_attn_implementation(implementation)
    _, output, mlp_output = UNREGISTERED[family]
    architecture = describe_architecture(model)
    assert (architecture.family, architecture.source, len(architecture.blocks)) == (family, "probe", 2)
    for block in architecture.blocks:
        assert block.attention_output_name == f"{block.name}.{output}"
        assert block.mlp_output_name == f"{block.name}.{mlp_output}"
        assert block.mlp is model.get_submodule(f"{block.name}.mlp")
    check_output_slices(model, architecture)
    assert architecture.n_key_value_heads == {"bloom": 4, "stablelm": 2, "olmo": 2, "falcon": 1}[family]


def test_probe_sees_through_wrappers() -> None:
    model = build("gpt2")
    model.transformer.h[0] = checkpoint_wrapper(model.transformer.h[0])
    model.transformer.h[1].attn = torch.compile(model.transformer.h[1].attn)
    registered = describe_architecture(model)
    for expected, found in zip(registered.blocks, probe(model).blocks, strict=True):
        assert found.attention_output is expected.attention_output
        assert found.mlp_output is expected.mlp_output


def test_probe_sees_through_lora() -> None:
    model = lora("llama", ["q_proj", "v_proj", "o_proj", "down_proj"])
    registered, probed = describe_architecture(model), probe(model)
    for expected, found in zip(registered.blocks, probed.blocks, strict=True):
        assert found == expected


class TinyAttention(nn.Module):
    def __init__(self, softmax: bool = True) -> None:
        super().__init__()
        self.num_heads = 2
        self.softmax = softmax
        self.qkv = nn.Linear(8, 24)
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)  # each [B, heads, T, 4]
        scores = query @ key.mT
        mixed = (torch.softmax(scores, -1) if self.softmax else scores) @ value
        return self.proj(mixed.transpose(1, 2).flatten(2))


class TinyBlock(nn.Module):
    calls: Tensor

    def __init__(self, softmax: bool = True) -> None:
        super().__init__()
        self.attention = TinyAttention(softmax)
        self.up = nn.Linear(8, 16)
        self.noise = nn.Dropout(0.5)
        self.down = nn.Linear(16, 8)
        self.gate = nn.Linear(8, 1)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x + self.attention(x) + torch.rand(())
        return x + self.down(self.noise(F.relu(self.up(x)))) * self.gate(x)


class TinyModel(nn.Module):
    layers: Any

    def __init__(self, softmax: bool = True) -> None:
        super().__init__()
        self.config = SimpleNamespace(n_embd=8)
        self.layers = nn.ModuleList([TinyBlock(softmax) for _ in range(3)])

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for layer in self.layers:
            x = layer(x * scale)
        return x


@pytest.mark.parametrize("batch", [torch.ones(1, 4, 8), (torch.ones(1, 4, 8), 2.0), {"x": torch.ones(1, 4, 8)}])
def test_probe_of_a_model_without_model_type(batch: Any) -> None:
    model = TinyModel()
    architecture = describe_architecture(model, sample_batch=batch)
    assert (architecture.family, architecture.source) == ("TinyModel", "probe")
    assert (architecture.n_heads, architecture.head_dim) == (2, 4)
    for block, layer in zip(architecture.blocks, model.layers, strict=True):
        assert block.attention_output is layer.attention.proj
        assert block.mlp_output is layer.down  # not the gate, which is called last
        assert block.query_key_value is None
        with pytest.raises(UnsupportedArchitectureError, match="register_architecture"):
            _ = block.value


def test_probe_of_a_bare_list_of_blocks() -> None:
    model: Any = nn.Sequential(TinyBlock(), TinyBlock())
    with pytest.raises(UnsupportedArchitectureError, match="number and width"):
        describe_architecture(model, sample_batch=torch.ones(1, 4, 8))
    for block in model:
        block.attention.head_dim = 4
    architecture = describe_architecture(model, sample_batch=torch.ones(1, 4, 8))
    assert [block.attention_output_name for block in architecture.blocks] == ["0.attention.proj", "1.attention.proj"]


def test_probe_leaves_no_trace() -> None:
    model = TinyModel().train()
    model.layers[1].eval()
    model.layers[0].up.weight.grad = torch.ones(16, 8)
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    rng = torch.get_rng_state()
    with torch.enable_grad():
        architecture = describe_architecture(model, sample_batch=torch.ones(1, 4, 8))
        assert torch.is_grad_enabled()
    assert len(architecture.blocks) == 3
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["layers.0.up.weight"]
    assert torch.equal(model.layers[0].up.weight.grad, torch.ones(16, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_failed_probe_leaves_no_trace() -> None:
    model = TinyModel().train()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(
        UnsupportedArchitectureError, match=r"probe forward raised RuntimeError.*Registered: bert, gemma"
    ):
        describe_architecture(model, sample_batch=torch.ones(1, 4, 9))
    assert model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_probe_of_compiled_code_runs_it_eagerly() -> None:
    model = TinyModel()
    model.layers[0].compile(backend="aot_eager")
    model.layers[1] = torch.compile(model.layers[1], backend="aot_eager")
    architecture = describe_architecture(model, sample_batch=torch.ones(1, 4, 8))
    assert [block.attention_output_name for block in architecture.blocks] == [
        f"layers.{index}.attention.proj" for index in range(3)
    ]


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (nn.Linear(2, 2), None, "no list of blocks"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), None, "pass a sample_batch"),
        (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), torch.ones(1, 2), "no attention function ran in '0'"),
        (TinyModel(softmax=False), torch.ones(1, 4, 8), r"no attention function ran in 'layers\.0'"),
    ],
)
def test_model_without_attention(model: nn.Module, batch: Any, message: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=message) as error:
        describe_architecture(model, sample_batch=batch)
    assert type(model).__name__ in str(error.value)
    assert all(name in str(error.value) for name in available_architectures())


def test_unknown_family_without_attention_names_the_known_ones() -> None:
    config = hf.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(UnsupportedArchitectureError, match=r"MambaForCausalLM \(model_type 'mamba'\).*attention.*gpt2"):
        describe_architecture(hf.MambaForCausalLM(config))


def test_missing_projections_are_named() -> None:
    model = TinyModel()
    model.layers[1].attention.num_heads = 3
    with pytest.raises(UnsupportedArchitectureError, match=r"'layers\.1' called no .* input width 3 heads x 2"):
        describe_architecture(model, sample_batch=torch.ones(1, 4, 8))
    model = TinyModel()
    model.layers[2].down = nn.Identity()
    model.layers[2].up = nn.Identity()
    with pytest.raises(UnsupportedArchitectureError, match=r"no MLP output projection.*'layers\.2'"):
        describe_architecture(model, sample_batch=torch.ones(1, 4, 8))


def test_depths_that_share_one_block_are_refused() -> None:
    model = hf.AlbertModel(hf.AlbertConfig(**COMMON, embedding_size=32))
    with pytest.raises(UnsupportedArchitectureError, match="runs 2 times per forward"):
        describe_architecture(model)
    shared = TinyModel()
    shared.layers = nn.ModuleList([shared.layers[0]] * 3)
    with pytest.raises(UnsupportedArchitectureError, match="runs 3 times per forward"):
        describe_architecture(shared, sample_batch=torch.ones(1, 4, 8))


def test_experts_without_an_output_projection_are_refused() -> None:
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**GROUPED, num_local_experts=2))
    with pytest.raises(UnsupportedArchitectureError, match=r"no MLP output projection.*mixture-of-experts"):
        describe_architecture(model)
