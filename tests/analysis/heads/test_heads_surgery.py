"""Tests that heads are cut and grown again exactly."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_goldy.analysis.heads import prune_heads, regrow_heads
from lightning_goldy.core.architecture import HeadError, HeadGates, describe_architecture
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.vector import ParameterVector
from tests.references.architecture_models import REGISTERED
from tests.references.head_training import BATCH, CUT, build, outputs, owned, train


@pytest.mark.parametrize("source", ["base", "vector"])
@pytest.mark.parametrize("family", REGISTERED)
def test_prune_and_regrow_golden_is_the_identity(family: str, source: str) -> None:
    model = build(family).to(torch.bfloat16 if family == "llama" else torch.float32)
    before, state = outputs(model), copy.deepcopy(model.state_dict())
    vector = ParameterVector.of(model)
    base = BaseParameters(vector) if source == "base" else vector
    prune_heads(model, CUT)
    assert not torch.equal(outputs(model), before)
    # What the closed heads own is lost meanwhile.
    for key, mask in owned(model, CUT).items():
        model.get_parameter(key).data[mask] = 7.0
    gates = regrow_heads(model, CUT, base=base)
    assert gates.closed == ()
    assert torch.equal(outputs(model), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("source", ["model", "folder", "file"])
def test_a_base_may_be_anything_that_a_base_can_be(source: str, tmp_path: Path) -> None:
    model = build("llama")
    before, state = outputs(model), copy.deepcopy(model.state_dict())
    base: Any = {"model": copy.deepcopy(model), "folder": tmp_path, "file": tmp_path / "model.safetensors"}[source]
    model.save_pretrained(tmp_path)
    prune_heads(model, CUT)
    for key, mask in owned(model, CUT).items():
        model.get_parameter(key).data[mask] = 7.0
    regrow_heads(model, CUT, base=base)
    assert torch.equal(outputs(model), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_golden_touches_nothing_that_an_open_head_uses() -> None:
    model = build("llama")
    base = BaseParameters(ParameterVector.of(model))
    prune_heads(model, CUT)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    moved = {key: value.detach().clone() for key, value in model.named_parameters()}
    golden = base.vector(model)
    regrow_heads(model, [(0, 0), (1, 2)], base=base)
    # The group of (0, 0) was all closed and comes back with it; half of the other group was open.
    masks = owned(model, [(0, 0), (1, 2)])
    rows = describe_architecture(model).blocks[0]
    for part in (*rows.key.head_slice(0), *rows.value.head_slice(0)):
        part.of(masks.setdefault(part.name, torch.zeros(part.parameter.shape, dtype=torch.bool))).fill_(True)
    for key, parameter in model.named_parameters():
        mask = masks.get(key, torch.zeros(parameter.shape, dtype=torch.bool))
        assert torch.equal(parameter[mask], golden[key][mask]), key
        assert torch.equal(parameter[~mask], moved[key][~mask]), key
    assert HeadGates.of(model).closed == ((0, 1),)


@pytest.mark.parametrize("initialisation", ["zero", "copy"])
@pytest.mark.parametrize("family", REGISTERED)
def test_zero_and_copy_keep_the_function(family: str, initialisation: Any) -> None:
    model = build(family)
    prune_heads(model, CUT)
    before = outputs(model)
    regrow_heads(model, CUT, initialisation=initialisation)
    assert torch.equal(outputs(model), before)
    model(**BATCH).logits.square().mean().backward()
    for layer, head in CUT:
        part = describe_architecture(model).blocks[layer].output_slice(head)[0]
        assert part.of(part.parameter.grad).abs().min() > 0


def test_copied_heads_compute_what_their_donors_do() -> None:
    model = build("llama")
    prune_heads(model, CUT)
    regrow_heads(model, CUT, initialisation="copy", donors={(0, 0): (0, 3)})
    blocks = describe_architecture(model).blocks
    seen: list[Tensor] = []
    blocks[0].attention_output.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    outputs(model)
    heads = seen[0].unflatten(-1, (4, -1))
    # Keys and values come from the first head's donor, and both open heads share them.
    torch.testing.assert_close(heads[..., 0, :], heads[..., 3, :])
    torch.testing.assert_close(heads[..., 1, :], heads[..., 2, :])
    part, donor = (blocks[1].query.head_slice(head)[0] for head in (2, 0))
    assert torch.equal(part.of(part.parameter), donor.of(donor.parameter))


@pytest.mark.parametrize(
    ("heads", "donors", "message"),
    [
        ([(0, 0)], {(0, 0): (0, 1)}, r"\(0, 1\) for \(0, 0\) must be an open head"),
        ([(0, 0)], {(0, 0): (1, 0)}, r"\(1, 0\) for \(0, 0\)"),
        ([(0, 0)], {(1, 2): (1, 0)}, r"\(1, 0\) for \(1, 2\)"),
        ([(0, 0), (0, 1)], {(0, 0): (0, 2), (0, 1): (0, 2)}, "named twice"),
        ([(0, 0), (0, 1), (0, 2)], {}, r"no open head of layer 0 is left for \(0, 1\)"),
    ],
)
def test_wrong_donors_are_named(heads: Any, donors: Any, message: str) -> None:
    model = build("llama")
    prune_heads(model, [(0, 0), (0, 1), (1, 2)] + ([(0, 2)] if len(heads) == 3 else []))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(HeadError, match=message):
        regrow_heads(model, heads, initialisation="copy", donors=donors)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (0, 0) in HeadGates.of(model).closed


def test_noise_has_the_layer_s_deviation_and_a_seed() -> None:
    def grown(seed: int, scale: float = 1.0) -> dict[str, Tensor]:
        model = build("gpt2")
        # Wide enough for a deviation to be told: 32 x 8 numbers a head.
        prune_heads(model, CUT)
        regrow_heads(model, CUT, initialisation="noise", seed=seed, noise_scale=scale)
        return {key: value.detach().clone() for key, value in model.named_parameters()}

    start = dict(build("gpt2").named_parameters())
    first, again, other, small = grown(1), grown(1), grown(2), grown(1, 0.1)
    masks = owned(build("gpt2"), CUT)
    for key in start:
        assert torch.equal(first[key], again[key])
        mask = masks.get(key, torch.zeros(start[key].shape, dtype=torch.bool))
        assert torch.equal(first[key][~mask], start[key][~mask])
        if mask.any():
            assert not torch.equal(first[key][mask], other[key][mask])
            torch.testing.assert_close(small[key][mask], 0.1 * first[key][mask], rtol=1e-5, atol=1e-8)
    name = "transformer.h.0.attn.c_proj.weight"
    found, expected = first[name][masks[name]].std(), start[name].detach().std(correction=0)
    # 512 normal numbers: their deviation is within 4 of its own deviations of 1 / sqrt(2 * 512).
    assert float(found / expected) == pytest.approx(1.0, abs=4 / math.sqrt(1024))
    queries = start["transformer.h.0.attn.c_attn.weight"][:, :32].detach()
    drawn = first["transformer.h.0.attn.c_attn.weight"][:, :8]
    assert float(drawn.std() / queries.std(correction=0)) == pytest.approx(1.0, abs=4 / math.sqrt(512))


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_moments_are_kept_or_reset(moments: Any) -> None:
    model = build("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    prune_heads(model, CUT, optimizer=optimizer)
    before = {key: optimizer.state[value]["exp_avg"].clone() for key, value in model.named_parameters()}
    regrow_heads(model, CUT, initialisation="zero", optimizer=[optimizer], moments=moments)
    masks = owned(model, CUT)
    for key, parameter in model.named_parameters():
        found = optimizer.state[parameter]
        mask = masks.get(key, torch.zeros(parameter.shape, dtype=torch.bool))
        if moments == "keep":
            assert torch.equal(found["exp_avg"], before[key])
        else:
            assert not found["exp_avg"][mask].any()
            assert not found["exp_avg_sq"][mask].any()
            assert torch.equal(found["exp_avg"][~mask], before[key][~mask])
        assert found["step"] == 2


def test_pruning_can_reset_moments_too() -> None:
    model = build("gpt2")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    train(model, optimizer, 1)
    prune_heads(model, CUT, optimizer=optimizer, moments="reset")
    for key, mask in owned(model, CUT).items():
        momenta = optimizer.state[model.get_parameter(key)]["momentum_buffer"]
        assert not momenta[mask].any()
        assert momenta[~mask].all()


def test_what_cannot_be_cut() -> None:
    model = build("llama")
    with pytest.raises(HeadError, match=r"layer 0 would keep 0 of 4 heads; min_heads_per_layer=1 must stay open"):
        prune_heads(model, [(0, head) for head in range(4)])
    assert HeadGates.of(model) is None
    with pytest.raises(HeadError, match="would keep 1 of 4"):
        prune_heads(model, [*CUT, (0, 2)], min_heads_per_layer=2)
    assert prune_heads(model, []).closed == ()
    prune_heads(model, CUT)
    with pytest.raises(HeadError, match=r"\(0, 1\) is closed already"):
        prune_heads(model, [(0, 1)])
    with pytest.raises(HeadError, match="would keep 0"):
        prune_heads(model, [(0, 2), (0, 3)])
    with pytest.raises(ValueError, match=r"unknown moments 'drop'; .*keep, reset"):
        prune_heads(model, [(0, 2)], moments="drop")  # type: ignore[arg-type]
    assert HeadGates.of(model).closed == tuple(CUT)


def test_what_cannot_grow() -> None:
    model = build("llama")
    with pytest.raises(HeadError, match="no gates"):
        regrow_heads(model, [(0, 0)], initialisation="zero")
    prune_heads(model, CUT)
    with pytest.raises(HeadError, match=r"\(0, 2\) is open"):
        regrow_heads(model, [(0, 2)], initialisation="zero")
    with pytest.raises(ValueError, match="pass BaseParameters"):
        regrow_heads(model, CUT)
    with pytest.raises(TypeError, match="a base is a module, a ParameterVector, BaseParameters, or the path"):
        regrow_heads(model, CUT, base=0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean 'zero'"):
        regrow_heads(model, CUT, initialisation="zeros")  # type: ignore[arg-type]
    part = ParameterVector.of(model)
    short = ParameterVector(
        part.space.subspace([n for n in part.space if "k_proj" not in n]),
        {n: part[n] for n in part.space if "k_proj" not in n},
    )
    with pytest.raises(ValueError, match=r"the base lacks 'model\.layers\.0\.self_attn\.k_proj\.weight'"):
        regrow_heads(model, CUT, base=short)
    assert HeadGates.of(model).closed == tuple(CUT)


def test_models_of_one_group_and_of_one_head() -> None:
    gemma = build("gemma")  # one key/value group
    base = BaseParameters(ParameterVector.of(gemma))
    before = outputs(gemma)
    prune_heads(gemma, [(0, 1), (0, 2), (0, 3)])
    regrow_heads(gemma, [(0, 1), (0, 2), (0, 3)], base=base)
    assert torch.equal(outputs(gemma), before)
    import transformers as hf

    single = hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=11, n_embd=8, n_layer=2, n_head=1, bos_token_id=1, eos_token_id=1)
    )
    with pytest.raises(HeadError, match="would keep 0 of 1"):
        prune_heads(single, [(1, 0)])
