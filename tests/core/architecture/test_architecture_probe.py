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

from lightning_goldy.analysis import attention_maps, attention_statistics, head_importance
from lightning_goldy.analysis.coupling.pieces import selected_parameters
from lightning_goldy.core.architecture import (
    Architecture,
    HeadGates,
    UnsupportedArchitectureError,
    available_architectures,
    describe_architecture,
)
from lightning_goldy.core.architecture.describe import probe_architecture
from lightning_goldy.core.architecture.families import canonical_modules
from tests.references.architecture_models import (
    COMMON,
    REGISTERED,
    UNREGISTERED,
    VOCABULARY,
    build,
    check_output_slices,
    lora,
)
from tests.references.model_zoo import build_family


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
    block = describe_architecture(model, sample_batch=torch.ones(1, 4, 8)).blocks[2]
    assert block.attention_output is model.layers[2].attention.proj
    with pytest.raises(UnsupportedArchitectureError, match=r"no MLP output projection.*'layers\.2'"):
        _ = block.mlp_output


def test_depths_that_share_one_block_are_refused() -> None:
    model = hf.AlbertModel(hf.AlbertConfig(**COMMON, embedding_size=32))
    with pytest.raises(UnsupportedArchitectureError, match="runs 2 times per forward"):
        describe_architecture(model)
    shared = TinyModel()
    shared.layers = nn.ModuleList([shared.layers[0]] * 3)
    with pytest.raises(UnsupportedArchitectureError, match="runs 3 times per forward"):
        describe_architecture(shared, sample_batch=torch.ones(1, 4, 8))


def test_a_mixture_is_its_routed_and_its_shared_experts() -> None:
    model = build_family("Qwen2-MoE")
    for block, layer in zip(describe_architecture(model).blocks, model.model.layers, strict=True):
        assert block.mlp is block.mlp_output is layer.mlp
        assert [part.module for part in block.mlp_writers] == [layer.mlp.experts, layer.mlp.shared_expert.down_proj]


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class ListOfExperts(nn.Module):
    """Of three experts a probe meets one alone."""

    def __init__(self, rest: bool) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Expert() for _ in range(3)])
        self.rest = rest

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[1](x) + (x / 2 if self.rest else 0)


class MixedBlock(TinyBlock):
    def __init__(self, rest: bool) -> None:
        super().__init__()
        del self.up, self.down, self.gate
        self.moe = ListOfExperts(rest)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x) + self.moe(x)


def test_experts_in_a_list_are_all_writers_also_those_that_did_not_run() -> None:
    model = TinyModel()
    model.layers = nn.ModuleList([MixedBlock(rest=False) for _ in range(2)])
    block = describe_architecture(model, sample_batch=torch.ones(1, 4, 8)).blocks[1]
    assert block.mlp_output is model.layers[1].moe
    assert [part.module for part in block.mlp_writers] == [expert.down for expert in model.layers[1].moe.experts]


def test_an_mlp_with_a_part_that_its_writers_do_not_write_is_refused_where_it_is_asked_for() -> None:
    model = TinyModel()
    model.layers = nn.ModuleList([MixedBlock(rest=True) for _ in range(2)])
    block = describe_architecture(model, sample_batch=torch.ones(1, 4, 8)).blocks[1]
    assert block.attention_output is model.layers[1].attention.proj
    with pytest.raises(UnsupportedArchitectureError, match=r"'layers\.1'.*'layers\.\d\.moe' has a part that"):
        _ = block.mlp_output


class ShuffledAttention(TinyAttention):
    """Mixes its heads before the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.tensor([0, 4, 1, 5, 2, 6, 3, 7]))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        mixed = torch.softmax(query @ key.mT, -1) @ value
        return self.proj(mixed.transpose(1, 2).flatten(2)[..., self.order])


def test_heads_that_are_no_slices_of_the_projections_input_are_refused() -> None:
    model = TinyModel()
    for layer in model.layers:
        layer.attention = ShuffledAttention()
    architecture = describe_architecture(model, sample_batch=torch.ones(1, 4, 8))
    assert architecture.blocks[0].mlp_output is model.layers[0].down
    with pytest.raises(
        UnsupportedArchitectureError, match=r"'layers\.0': 'layers\.0\.attention\.proj' is not verified"
    ):
        HeadGates(model, architecture=architecture)


class GatedAttention(TinyAttention):
    """A gate per head is made after attention, of the block's input, before the output projection is called."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)
        mixed = torch.softmax(query @ key.mT, -1) @ value
        return self.proj((mixed.transpose(1, 2) * self.gate(x).sigmoid()[..., None]).flatten(2))


def test_a_gate_on_the_heads_is_not_taken_for_their_projection() -> None:
    model = TinyModel()
    for layer in model.layers:
        layer.attention = GatedAttention()
    block = describe_architecture(model, sample_batch=torch.ones(1, 4, 8)).blocks[1]
    assert block.attention_output is model.layers[1].attention.proj
    assert block.mlp_output is model.layers[1].down


class SideBlock(TinyBlock):
    """After its MLP a small gated path, as of per-layer inputs, writes to the residual stream."""

    def __init__(self) -> None:
        super().__init__()
        del self.up, self.down, self.gate
        self.feed_forward = Expert()
        self.per_layer_gate, self.per_layer_projection = nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        x = x + self.feed_forward(x)
        return x + self.per_layer_projection(F.relu(self.per_layer_gate(x)))


def test_a_path_beside_the_mlp_is_not_taken_for_it() -> None:
    model = TinyModel()
    model.layers = nn.ModuleList([SideBlock() for _ in range(2)])
    block = describe_architecture(model, sample_batch=torch.ones(1, 4, 8)).blocks[0]
    assert block.mlp is model.layers[0].feed_forward
    assert block.mlp_output is model.layers[0].feed_forward.down


@pytest.mark.parametrize("family", ["Jamba", "LFM2"])
def test_hybrids_keep_the_attention_that_they_have(family: str) -> None:
    model = build_family(family)
    architecture = describe_architecture(model)
    first, second = architecture.blocks
    assert (first.has_attention, first.n_heads, second.n_heads) == (False, 0, 4)
    assert architecture.attention_blocks == (second,)
    assert [block.mlp_output_name.split(".")[3] for block in architecture.mlp_blocks] == ["feed_forward"] * 2
    with pytest.raises(UnsupportedArchitectureError, match=r"'model\.layers\.0': it computes no attention"):
        _ = first.attention
    gates = HeadGates(model, architecture=architecture)
    assert gates.heads == ((1, 0), (1, 1), (1, 2), (1, 3))
    batch = {"input_ids": torch.randint(2, VOCABULARY, (2, 6))}
    scores = head_importance(model, [batch], strategy="combined", weights={"entropy": 0.5, "ablation": 0.5}).scores
    assert bool(scores[0].isnan().all() and scores[1].isfinite().all())
    gates.disable([(1, 2)])
    with torch.no_grad():
        closed = model(**batch).logits
        gates.remove()
        for part in second.output_slice(2):
            part.of(part.parameter).zero_()
        torch.testing.assert_close(model(**batch).logits, closed)
    found = attention_statistics(model, [batch])
    assert bool(found.entropy[0].isnan().all() and found.entropy[1].isfinite().all())
    assert attention_maps(model, batch).layers == (1,)


@pytest.mark.parametrize("heads", [4, 160])
def test_heads_that_are_normalised_together_are_refused_and_their_mlps_are_not(heads: int) -> None:
    torch.manual_seed(0)
    options = {"hidden_size": 2 * heads, "num_attention_heads": heads, "num_key_value_heads": heads}
    config = hf.BitNetConfig(**{**COMMON, **options, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 1})
    architecture = describe_architecture(hf.BitNetForCausalLM(config).eval())
    assert architecture.blocks[0].mlp_output_name.endswith("mlp.down_proj")
    with pytest.raises(UnsupportedArchitectureError, match=r"o_proj' is not verified.*normalised together before it"):
        _ = architecture.attention_blocks


class GatedUnit(nn.Module):
    """A block without attention: a convolution over positions and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.mix_out = nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix_out(self.mixer(x.transpose(1, 2)).transpose(1, 2))
        return x + self.mlp(x)


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=16, model_type="convolutional")
        self.layers = nn.ModuleList([GatedUnit(), GatedUnit()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_mlps_of_a_model_without_attention_are_described_and_its_heads_refused_by_name() -> None:
    model, x = Convolutional().eval(), torch.ones(1, 4, 16)
    architecture = describe_architecture(model, sample_batch=x)
    assert [block.mlp_output_name for block in architecture.mlp_blocks] == ["layers.0.mlp.2", "layers.1.mlp.2"]
    assert list(selected_parameters(model, "mlp_output", sample_batch=x)) == [
        "layers.0.mlp.2.weight",
        "layers.1.mlp.2.weight",
    ]
    for refused in (
        lambda: HeadGates(model, sample_batch=x),
        lambda: selected_parameters(model, "attention_output", sample_batch=x),
    ):
        with pytest.raises(UnsupportedArchitectureError, match="no block of this 'convolutional' has attention"):
            refused()


@pytest.mark.parametrize(("family", "why"), [("Mamba 2", "it has no MLP"), ("RWKV", "receptance' do not write")])
def test_what_has_neither_heads_nor_a_plain_mlp_says_what_can_be_done(family: str, why: str) -> None:
    with pytest.raises(UnsupportedArchitectureError, match=rf"no attention function ran.*{why}.*select=\[patterns"):
        describe_architecture(build_family(family))
