"""Attribution and grafts in the space of merged weights equal those of the dense models that PEFT makes of adapters."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from lightning_goldy.analysis import (
    activation_differences,
    apply_change,
    change_attribution,
    graft,
    graft_curve,
    parameter_distribution,
    save_change,
    taylor_diff,
)
from lightning_goldy.analysis.change import weight_change
from lightning_goldy.core import CausalLMObjective
from lightning_goldy.core.architecture.adapters import AdapterError, merged_weights
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.files import StoreError
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.sharding import local
from lightning_goldy.core.space import SpaceError
from lightning_goldy.core.vector import ParameterVector
from tests.core.architecture.test_merged_adapters import move, trained, unloaded
from tests.references.attribution import units_of
from tests.references.models import build

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
KINDS = ["LoRA", "DoRA", "modules_to_save", "embeddings"]
OTHERS = ["rsLoRA of nn.Linear", "IA3", "VeRA", "biases", "biases of LoRA"]


def ids(seed: int, count: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(0, 20, (count, 7), generator=generator)}


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in OTHERS)])
def test_contributions_are_those_of_a_dense_copy(kind: str) -> None:
    model, base, before, after = trained(kind)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"nodes": 4, "shares": [0.1], "interactions": True}
    found = change_attribution(model, base, [ids(1)], keep_scores=True, **options)
    expected = change_attribution(after, before, [ids(1)], keep_scores=True, **options)
    assert found.space == "merged"
    assert found.row().result["space"] == "merged"
    assert found.change == pytest.approx(expected.change, rel=1e-9)
    assert found.total == pytest.approx(expected.total, rel=1e-6)
    for name, value in expected.by_tensor.items():
        assert found.by_tensor.get(name, 0.0) == pytest.approx(value, rel=1e-6, abs=1e-12)
    for name, score in found.scores.items():
        torch.testing.assert_close(score, expected.scores[name], rtol=1e-6, atol=1e-12)
    heads = {unit["place"]: unit["values"] for unit in expected.units if unit["kind"] == "head"}
    for unit in (unit for unit in found.units if unit["kind"] == "head"):
        assert unit["place"] in heads
    if kind == "LoRA":
        own = {unit["place"]: unit["values"] for unit in found.units if unit["kind"] == "head"}
        torch.testing.assert_close(own["transformer.h.0"], heads["transformer.h.0"], rtol=1e-6, atol=1e-12)
    state = model.state_dict()
    assert list(state) == list(kept)
    assert all(torch.equal(value, state[name]) for name, value in kept.items())
    assert "forward" not in {name for module in model.modules() for name in vars(module)}


def test_the_adapters_themselves_are_attributed_by_option() -> None:
    model, base, *_ = trained("LoRA")
    found = change_attribution(model, base, [ids(1)], nodes=8, space="adapters")
    assert found.space == "adapters"
    assert set(found.names) == set(base.space.names)
    assert found.complete
    again = change_attribution(model, base, [ids(1)], nodes=8, space=base.space)
    torch.testing.assert_close(again.contributions, found.contributions)
    state = graft(model, base, found.mask(0.1))
    assert list(state) == list(model.state_dict())
    with pytest.raises(ValueError, match="unknown space 'both'"):
        change_attribution(model, base, [ids(1)], space="both")


def test_grafts_write_full_weights(tmp_path) -> None:
    model, base, before, after = trained("DoRA")
    found = change_attribution(model, base, [ids(1)], nodes=4, shares=[0.1, 1.0])
    dense = change_attribution(after, before, [ids(1)], nodes=4, shares=[0.1, 1.0])
    curve = graft_curve(model, base, found, [ids(1)], [ids(2)], [ids(3)])
    expected = graft_curve(after, before, dense, [ids(1)], [ids(2)], [ids(3)], baselines=["interpolation", "gradient"])
    for method in ("interpolation", "finetune"):
        pairs = zip(curve.of(method), expected.of(method), strict=True)
        assert all(a.value == pytest.approx(b.value, rel=1e-9) for a, b in pairs)
    assert curve.of("attribution")[-1].value == curve.of("finetune")[0].value

    mask = found.mask(0.1)
    state = graft(model, base, mask)
    made = copy.deepcopy(before)
    made.load_state_dict(state)
    with torch.no_grad():
        value = float(CausalLMObjective().loss(made, ids(2)))
    assert value == pytest.approx(curve.of("attribution")[0].value, rel=1e-9)
    everything = ParameterMask(mask.space, {name: torch.ones_like(flags) for name, flags in mask.items()})
    for name, weight in graft(model, base, everything).items():
        torch.testing.assert_close(weight, after.state_dict()[name], rtol=1e-12, atol=1e-14)
    path = save_change(tmp_path / "change.safetensors", model, base, mask)
    again = copy.deepcopy(before)
    with torch.no_grad():
        for name, parameter in again.named_parameters():
            if name in mask.space:
                parameter.copy_(graft(model, base, ~mask & mask)[name])
    apply_change(again, path)
    assert all(torch.equal(local(value), state[name]) for name, value in again.state_dict().items())


def test_what_has_no_merged_weights_is_refused_and_errors_leave_no_trace() -> None:
    model, base, *_ = trained("LoRA")
    model.merge_adapter()
    with pytest.raises(AdapterError, match="the adapter is merged; take it apart first"):
        change_attribution(model, base, [ids(1)], nodes=1)
    model.unmerge_adapter()
    with merged_weights(model, base) as (_, parameters):
        assert "transformer.h.0.attn.c_attn.weight" in parameters

    def stop(done: int, total: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        change_attribution(model, base, [ids(1)], nodes=1, progress=stop)
    assert not any("forward" in vars(module) for module in model.modules())
    assert math.isfinite(change_attribution(model, base, [ids(1)], nodes=1).total)


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_around_both_sides_of_an_mlp_leave_the_units_where_they_are(use_dora: bool) -> None:
    plain = build("llama").double().eval()
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=2, target_modules=targets, use_dora=use_dora)
    model = peft.get_peft_model(copy.deepcopy(plain), config).double().eval()
    base = BaseParameters(ParameterVector.of(model))
    move(model)
    options = {"nodes": 2, "shares": [0.1]}
    found = change_attribution(model, base, [ids(1)], **options)
    expected = change_attribution(unloaded(model), plain, [ids(1)], **options)
    for kind in ("head", "key_value", "neuron"):
        units, dense = units_of(found, kind), units_of(expected, kind)
        assert list(units) == list(dense)
        for place, values in units.items():
            torch.testing.assert_close(values, dense[place], rtol=1e-6, atol=1e-12)
    own = change_attribution(model, base, [ids(1)], space="adapters", **options)
    assert math.fsum(float(unit["values"].sum()) for unit in own.units) == pytest.approx(own.total, rel=1e-9)


def test_a_sparse_graft_of_new_dora_adapters_belongs_on_the_model_below_them(tmp_path) -> None:
    torch.manual_seed(0)
    plain = build("llama")
    model = peft.get_peft_model(
        copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True)
    )
    base = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    found = change_attribution(model, base, [ids(1)], nodes=2, shares=[0.1], tolerance=0.5)
    path = save_change(tmp_path / "change.safetensors", model, base, found.mask(0.1))
    apply_change(plain, path)
    expected = graft(model, base, found.mask(0.1))
    assert all(torch.equal(value, expected[name]) for name, value in plain.state_dict().items())


def adapted_llama(targets: list[str]) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A llama whose embeddings are tied, the same with trained adapters, and what these are merged to."""
    from transformers import LlamaForCausalLM

    config = copy.deepcopy(build("llama").config)
    config.tie_word_embeddings = True
    plain = LlamaForCausalLM(config).double()
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=targets)).double().eval()
    move(model)
    return plain, model, unloaded(model)


def untrained(model: nn.Module) -> nn.Module:
    """The same with adapters that do nothing."""
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            parameter.mul_(0 if ".lora_B." in name or "embedding_A" in name else 1)
    return fresh


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["o_proj", "embed_tokens"]])
def test_a_plain_base_is_that_of_merged_weights(targets: list[str], tmp_path) -> None:
    plain, model, dense = adapted_llama(targets)
    plain.save_pretrained(tmp_path / "folder")
    torch.save({"state_dict": {f"model.{name}": v for name, v in plain.state_dict().items()}}, tmp_path / "base.ckpt")
    options = {"nodes": 4, "shares": [0.1], "keep_scores": True}
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    by_hand = change_attribution(model, untrained(model), [ids(1)], **options)
    if "embed_tokens" not in targets:  # which merging takes apart from the output
        expected = change_attribution(dense, plain, [ids(1)], **options)
        assert by_hand.total == pytest.approx(expected.total, rel=1e-9)
    vector = ParameterVector.of(plain)
    for base in (plain, tmp_path / "folder", str(tmp_path / "base.ckpt"), vector, BaseParameters(vector)):
        found = change_attribution(model, base, [ids(1)], **options)
        assert found.space == "merged"
        assert found.change == pytest.approx(by_hand.change, rel=1e-9)
        assert set(found.names) == set(by_hand.names)
        for name in found.names:
            torch.testing.assert_close(found.scores[name], by_hand.scores[name], rtol=1e-6, atol=1e-12)
        assert torch.equal(found.mask(0.1)[found.names[0]], by_hand.mask(0.1)[found.names[0]])
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in kept.items())


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
def test_a_plain_base_may_differ_in_the_weights_below_adapters() -> None:
    plain, model, dense = adapted_llama(["q_proj"])
    other = copy.deepcopy(plain)
    with torch.no_grad():
        for layer in other.model.layers:
            layer.self_attn.q_proj.weight.mul_(1.5)
    options = {"nodes": 4, "keep_scores": True}
    found = change_attribution(model, other, [ids(1)], **options)
    expected = change_attribution(dense, other, [ids(1)], **options)
    assert found.change == pytest.approx(expected.change, rel=1e-9)
    for name in found.names:
        torch.testing.assert_close(found.scores[name], expected.scores[name], rtol=1e-6, atol=1e-12)
    state = graft(model, other, found.mask(0.1))
    wanted = graft(dense, other, found.mask(0.1))
    assert all(torch.equal(value, wanted[name]) for name, value in state.items())
    with torch.no_grad():
        other.model.norm.weight.mul_(2)
    with pytest.warns(UserWarning, match=r"the base differs from PeftModel in 'base_model.model.model.norm.weight'"):
        change_attribution(model, other, [ids(1)], nodes=1)


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
def test_every_analysis_of_merged_weights_takes_a_plain_base() -> None:
    plain, model, dense = adapted_llama(["q_proj"])
    found, expected = weight_change(model, plain), weight_change(dense, plain)
    assert found.delta_norm == pytest.approx(expected.delta_norm, rel=1e-9)
    shapes = [{row["name"]: row for row in parameter_distribution(one, plain).rows} for one in (model, dense)]
    for name, row in shapes[0].items():
        assert row["stable_rank"] == pytest.approx(shapes[1][name]["stable_rank"], rel=1e-6)
    expansions = [taylor_diff(model, base, [ids(1)]).metrics() for base in (plain, untrained(model))]
    assert expansions[0] == pytest.approx(expansions[1], rel=1e-6, nan_ok=True)
    moved = [activation_differences(one, plain, [ids(1)]).means for one in (model, dense)]
    torch.testing.assert_close(*moved)


def test_a_plain_base_in_the_space_of_adapters_is_told_what_to_compare(tmp_path) -> None:
    plain = build("gpt2", 0)
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=["c_attn"]))
    plain.save_pretrained(tmp_path)
    for base, told in ((plain, "the base, a GPT2LMHeadModel,"), (tmp_path, f"{tmp_path}: the base")):
        with pytest.raises(SpaceError, match=rf"{told} has no adapters, .*with space='merged'.*merge_and_unload\(\)"):
            change_attribution(model, base, [ids(1)], nodes=4, space="adapters")
    wide = copy.deepcopy(plain)
    wide.transformer.h[0].attn.c_attn.weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(SpaceError, match=r"h.0.attn.c_attn.weight has shape \(2, 2\) in the base"):
        change_attribution(model, wide, [ids(1)], nodes=4)


@pytest.mark.parametrize("kind", ["module", "folder", "vector"])
def test_a_plain_base_of_more_blocks_is_of_another_model(kind: str, tmp_path) -> None:
    plain = build("gpt2", 0)
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=["c_attn"]))
    count = len(plain.transformer.h)
    plain.transformer.h.append(copy.deepcopy(plain.transformer.h[0]))
    plain.config.n_layer = count + 1
    plain.save_pretrained(tmp_path)
    base = {"module": plain, "folder": tmp_path, "vector": ParameterVector.of(plain)}[kind]
    told = f"the base is of another model: it has {count + 1} of 'transformer.h', PeftModel has {count}"
    with pytest.raises(StoreError if kind == "folder" else SpaceError, match=told):
        change_attribution(model, base, [ids(1)], nodes=4)


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "down_proj"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    ],
    ids=lambda options: "-".join(options["target_modules"] + list(options)[1:]),
)
@pytest.mark.parametrize("space", ["merged", "adapters"])
def test_a_folder_of_adapters_is_the_base_that_it_was_saved_from(options, space, tmp_path) -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    base = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    found, expected = (
        change_attribution(model, one, [ids(1)], nodes=2, space=space, keep_scores=True) for one in (tmp_path, base)
    )
    assert found.base_value == expected.base_value
    assert all(torch.equal(found.scores[name], expected.scores[name]) for name in expected.names)


def test_a_folder_of_adapters_that_are_scaled_otherwise_is_refused(tmp_path) -> None:
    plain = build("gpt2", 0)
    for scale in (4, 8):
        config = peft.LoraConfig(r=2, lora_alpha=scale, target_modules=["c_attn"])
        model = peft.get_peft_model(copy.deepcopy(plain), config)
        if scale == 4:
            model.save_pretrained(tmp_path)
    with pytest.raises(StoreError, match=r"its adapter has lora_alpha=4, that of PeftModel 8"):
        change_attribution(model, tmp_path, [ids(1)], nodes=1)


def test_a_plain_base_with_fewer_blocks_is_told_what_it_lacks() -> None:
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    config = copy.deepcopy(build("llama").config)
    config.num_hidden_layers -= 1
    with pytest.raises(SpaceError, match=r"the base has no parameter 'model\.layers\.\d+\.self_attn\.q_proj\.weight'"):
        change_attribution(model, type(build("llama"))(config), [ids(1)], nodes=1)


def test_a_plain_base_with_another_vocabulary_is_told() -> None:
    plain = build("llama")
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    more = plain.config.vocab_size + 3
    plain.resize_token_embeddings(more)
    with pytest.warns(UserWarning, match=rf"the base differs from PeftModel in .*\(shape \({more}, \d+\) there, "):
        change_attribution(model, plain, [ids(1)], nodes=1)
