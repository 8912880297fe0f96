"""Tests that a closed gate is an ablated head, in every family, under every way of running a model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_goldy.core.architecture import HeadError, HeadGates, UnsupportedArchitectureError, describe_architecture
from lightning_goldy.core.architecture.gates import BatchMismatchError, check_heads
from tests.references.architecture_models import REGISTERED, UNREGISTERED, VOCABULARY, lora
from tests.references.architecture_models import build as built

CLOSED = [(0, 1), (1, 0), (1, 3)]
KERNELS = ("eager", "sdpa")
ONLY_EAGER = ("gemma2",)


def build(family: str) -> Any:
    torch.manual_seed(0)
    return built(family)


def with_kernel(family: str, kernel: str) -> Any:
    if kernel == "sdpa" and family in ONLY_EAGER:
        pytest.skip("the family has no sdpa attention")
    model = build(family)
    model.set_attn_implementation(kernel)
    return model


def padded_batch(*, side: str = "right") -> dict[str, Tensor]:
    ids = torch.randint(2, VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, (slice(6, None) if side == "right" else slice(0, 2))] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def outputs(model: nn.Module, **batch: Any) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


def ablated(model: nn.Module, heads: list[tuple[int, int]]) -> nn.Module:
    """A copy whose heads' output weights are zero."""
    other = copy.deepcopy(model)
    blocks = describe_architecture(other).blocks
    with torch.no_grad():
        for layer, head in heads:
            for part in blocks[layer].output_slice(head):
                part.of(part.parameter).zero_()
    return other


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", [*REGISTERED, "stablelm", "olmo"])
def test_a_closed_gate_is_exact_ablation(family: str, kernel: str) -> None:
    model = with_kernel(family, kernel)
    batch = padded_batch()
    before = outputs(model, **batch)
    expected = outputs(ablated(model, CLOSED), **batch)
    gates = HeadGates(model)
    assert torch.equal(outputs(model, **batch), before)
    gates.disable(CLOSED)
    # Zero times a weight and a weight of zero add the same zeros.
    assert torch.equal(outputs(model, **batch), expected)
    assert not torch.allclose(expected, before, atol=1e-3)
    gates.enable(CLOSED)
    assert torch.equal(outputs(model, **batch), before)


@pytest.mark.parametrize("family", UNREGISTERED)
def test_families_found_by_a_probe_are_gated(family: str) -> None:
    model = build(family)
    batch = padded_batch()
    gates = HeadGates(model)
    gates.disable(CLOSED)
    found = outputs(model, **batch)
    gates.remove()
    torch.testing.assert_close(found, outputs(ablated(model, CLOSED), **batch), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "qwen3", "gemma2"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_generation_with_a_cache_is_gated(family: str, kernel: str) -> None:
    model = with_kernel(family, kernel)
    batch = padded_batch(side="left")
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    before = model.generate(**batch, **options)
    expected = ablated(model, CLOSED).generate(**batch, **options)
    HeadGates(model).disable(CLOSED)
    found = model.generate(**batch, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))
    assert not torch.equal(torch.stack(found.logits), torch.stack(before.logits))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build("llama").train()
        gates = HeadGates(model, kind="parameter")
        gates.disable(CLOSED)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**padded_batch(), use_cache=False).logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in (*model.parameters(), *gates.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_closed_head_gets_no_gradient_and_the_others_do() -> None:
    model = build("llama")
    gates = HeadGates(model)
    gates.disable([(0, 0), (0, 1), (1, 2)])
    model(**padded_batch()).logits.square().mean().backward()
    block = gates.architecture.blocks[0]
    parts = [*block.query.head_slice(0), *block.output_slice(0), *block.key.head_slice(0), *block.value.head_slice(0)]
    assert all(not part.of(part.parameter.grad).any() for part in parts)
    other = gates.architecture.blocks[1]
    # Only one of the two heads of this group is closed.
    assert not other.query.head_slice(2)[0].of(other.query.module.weight.grad).any()
    assert other.value.head_slice(1)[0].of(other.value.module.weight.grad).any()


@pytest.mark.parametrize(
    ("family", "targets", "options"),
    [
        ("llama", ["q_proj", "o_proj"], {}),
        ("gpt2", ["c_attn", "c_proj"], {"fan_in_fan_out": True}),
        ("llama", ["o_proj"], {"use_dora": True}),
    ],
)
def test_lora_around_the_output_projection(family: str, targets: list[str], options: dict[str, Any]) -> None:
    model = lora(family, targets, **options)
    merged = copy.deepcopy(model).merge_and_unload()
    HeadGates(model).disable(CLOSED)
    expected = outputs(ablated(merged, CLOSED), **padded_batch())
    torch.testing.assert_close(outputs(model, **padded_batch()), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_low_precision_is_kept(dtype: torch.dtype, kind: Any) -> None:
    model = build("llama").to(dtype)
    expected = outputs(ablated(model, CLOSED), **padded_batch())
    before = outputs(model, **padded_batch())
    seen: list[torch.dtype] = []
    gates = HeadGates(model, kind=kind)
    assert torch.equal(outputs(model, **padded_batch()), before)
    gates.disable(CLOSED)
    block = gates.architecture.blocks[0]
    block.attention_output.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    assert torch.equal(outputs(model, **padded_batch()), expected)
    assert seen == [dtype]


def test_autocast_keeps_its_dtype() -> None:
    model = build("llama")
    gates = HeadGates(model)
    with torch.autocast("cpu", torch.bfloat16):
        before = outputs(model, **padded_batch())
        gates.disable(CLOSED)
        found = outputs(model, **padded_batch())
        gates.enable(CLOSED)
        assert torch.equal(outputs(model, **padded_batch()), before)
    assert found.dtype == before.dtype
    assert not torch.equal(found, before)


@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_gates_made_in_inference_mode_serve_a_training_step(kind: Any) -> None:
    model = build("gpt2")
    with torch.inference_mode():
        gates = HeadGates(model, kind=kind)
        gates.disable(CLOSED)
        model(**padded_batch())
    model(**padded_batch()).logits.sum().backward()
    gates.enable(CLOSED[:1])
    gates.disable([(0, 0)])
    assert gates.last_closed == ((0, 0), (1, 3), (1, 0))


@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_the_state_dict_of_the_model_keeps_its_keys(kind: Any, tmp_path) -> None:
    model = build("llama")
    keys = list(model.state_dict())
    gates = HeadGates(model, kind=kind)
    gates.disable(CLOSED)
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules() if "gate" in name] == [
        f"model.layers.{layer}.mlp.gate_proj" for layer in range(2)
    ]
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    gates.enable(CLOSED)
    assert torch.equal(outputs(plain, **padded_batch()), outputs(model, **padded_batch()))


@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_saved_gates_come_back_with_their_order(kind: Any, tmp_path) -> None:
    gates = HeadGates(build("llama"), kind=kind)
    gates.disable([(1, 3), (0, 2)])
    gates.disable([(0, 0), (1, 3)])
    assert gates.last_closed == ((0, 0), (0, 2), (1, 3))
    if gates.values is not None:
        gates.values.data[0, 1] = 0.5
    torch.save(gates.state_dict(), tmp_path / "gates")
    model = build("llama")
    other = HeadGates(model, kind=kind)
    other.disable([(0, 3)])
    other.load_state_dict(torch.load(tmp_path / "gates", weights_only=True))
    assert (other.closed, other.last_closed) == (gates.closed, gates.last_closed)
    assert gates.values is None or torch.equal(other.values, gates.values)
    other.disable([(1, 1)])
    assert other.last_closed[0] == (1, 1)
    found = outputs(model, **padded_batch())
    with gates.closing_only(other.closed):
        gates_model = outputs(model, **padded_batch())
    assert torch.equal(found, gates_model)


def test_gates_in_a_module_are_saved_under_their_own_name() -> None:
    holder = nn.Module()
    holder.model = build("gpt2")
    keys = set(holder.state_dict())
    holder.gates = HeadGates(holder.model)
    holder.gates.disable(CLOSED)
    assert set(holder.state_dict()) - keys == {"gates.closing"}
    fresh = nn.Module()
    fresh.model = build("gpt2")
    fresh.gates = HeadGates(fresh.model)
    fresh.load_state_dict(holder.state_dict())
    assert fresh.gates.closed == tuple(CLOSED)


def test_gates_of_other_heads_are_refused() -> None:
    saved = HeadGates(build("llama")).state_dict()
    other = HeadGates(_with_heads(2))
    with pytest.raises(HeadError, match=r"saved gates are of 2 layers of 4 heads, the model has 2 layers of 2 heads"):
        other.load_state_dict(saved)


def _with_heads(count: int) -> Any:
    import transformers as hf

    config = hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=count, bos_token_id=1, eos_token_id=1)
    return hf.GPT2LMHeadModel(config)


def test_trainable_gates_scale_heads_and_learn() -> None:
    model = build("llama")
    batch = padded_batch()
    scaled = copy.deepcopy(model)
    gates = HeadGates(model, kind="parameter")
    with torch.no_grad():
        gates.values[0, 2] = 0.25
        part = describe_architecture(scaled).blocks[0].output_slice(2)[0]
        part.of(part.parameter).mul_(0.25)
    torch.testing.assert_close(outputs(model, **batch), outputs(scaled, **batch), rtol=0, atol=1e-6)
    gates.disable([(1, 1)])
    model(**batch).logits.square().mean().backward()
    assert gates.values.grad[1, 1] == 0
    assert (gates.values.grad.flatten() != 0).sum() == 7
    torch.optim.SGD(gates.parameters(), lr=0.1, weight_decay=0.1).step()
    before = outputs(model, **batch)
    gates.values.data[1, 1] = 7.0
    assert torch.equal(outputs(model, **batch), before)


# Llama-type norms cast to float32, whose rounding would drown the differences.
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "bert", "opt"])
def test_measured_gradients_are_finite_differences(family: str) -> None:
    model = build(family).double()
    batch = padded_batch()
    gates = HeadGates(model, kind="parameter")
    gates.values.data = gates.values.data.double()
    gates.disable([(1, 2)])
    with gates.measured(3) as leaf:
        rows = model(**batch).logits.flatten(1).square().mean(dim=1)  # [3]
        (found,) = torch.autograd.grad(rows.sum(), [leaf])
    assert found.shape == (3, 2, 4)
    gates.enable([(1, 2)])
    gates.values.data[1, 2] = 0
    for layer, head in ((0, 0), (1, 2), (1, 3)):
        sides = []
        for change in (1e-4, -1e-4):
            gates.values.data[layer, head] += change
            sides.append(outputs(model, **batch).flatten(1).square().mean(dim=1))
            gates.values.data[layer, head] -= change
        torch.testing.assert_close(found[:, layer, head].double(), (sides[0] - sides[1]) / 2e-4, rtol=1e-4, atol=1e-8)


def test_measuring_leaves_the_gates_as_they_were() -> None:
    model = build("gpt2")
    gates = HeadGates(model)
    gates.disable(CLOSED)
    before = outputs(model, **padded_batch())
    with gates.measured(3):
        assert torch.equal(outputs(model, **padded_batch()), before)
    with pytest.raises(BatchMismatchError, match="gates of 2 samples met activations"), gates.measured(2):
        model(**padded_batch())
    with gates.closing_only([(0, 0)]):
        assert gates.closed == ((0, 0),)
        assert not torch.equal(outputs(model, **padded_batch()), before)
    assert torch.equal(outputs(model, **padded_batch()), before)


def test_a_copy_has_gates_of_its_own() -> None:
    model = build("llama")
    HeadGates(model).disable(CLOSED)
    other = copy.deepcopy(model)
    gates = HeadGates.of(other)
    assert gates is not None
    assert gates is not HeadGates.of(model)
    gates.enable(CLOSED)
    assert HeadGates.of(model).closed == tuple(CLOSED)
    gates.remove()
    assert HeadGates.of(other) is None
    assert not torch.equal(outputs(other, **padded_batch()), outputs(model, **padded_batch()))


def test_removed_gates_leave_no_hook() -> None:
    model = build("llama")
    before = outputs(model, **padded_batch())
    gates = HeadGates(model)
    gates.disable(CLOSED)
    gates.remove()
    assert HeadGates.of(model) is None
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(outputs(model, **padded_batch()), before)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([(2, 0)], r"no head \(2, 0\): the model has 2 layers of 4 heads"),
        ([(0, 4)], r"no head \(0, 4\)"),
        ([(0, -1)], r"no head \(0, -1\)"),
        ([(0, 1), (0, 1)], "named twice"),
        ([3], r"a pair \(layer, head\).*got 3"),
        ([(0, True)], "a pair"),
        ([(0, 1, 2)], "a pair"),
    ],
)
def test_wrong_heads_are_named(heads: Any, message: str) -> None:
    gates = HeadGates(build("llama"))
    for act in (gates.disable, gates.enable):
        with pytest.raises(HeadError, match=message):
            act(heads)
    assert gates.closed == ()


def test_heads_of_uneven_layers() -> None:
    assert check_heads([[1, 2], (0, 0)], (1, 3)) == ((1, 2), (0, 0))
    with pytest.raises(HeadError, match="2 layers of 1, 3 heads"):
        check_heads([(0, 1)], (1, 3))


def test_models_that_cannot_be_gated() -> None:
    with pytest.raises(UnsupportedArchitectureError, match="Sequential"):
        HeadGates(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    model = build("gpt2")
    HeadGates(model)
    with pytest.raises(HeadError, match="has gates already"):
        HeadGates(model)
    with pytest.raises(ValueError, match=r"'tensor'.*Valid: buffer, parameter"):
        HeadGates(build("gpt2"), kind="tensor")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is compiled"):
        HeadGates(torch.compile(build("gpt2")))  # type: ignore[arg-type]


def test_another_width_is_refused() -> None:
    gates = HeadGates(build("llama"))
    with pytest.raises(HeadError, match=r"o_proj' was called with width 16, not 4 heads x 8: under tensor parallelism"):
        gates.apply_to(0, torch.zeros(1, 2, 16))
