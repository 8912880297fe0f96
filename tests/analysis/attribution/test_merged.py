"""Attribution and grafts in the space of merged weights equal those of the dense models that PEFT makes of adapters."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from lightning_goldy.analysis import apply_change, change_attribution, graft, graft_curve, save_change
from lightning_goldy.analysis.attribution.units import units_of
from lightning_goldy.core import CausalLMObjective
from lightning_goldy.core.architecture.adapters import AdapterError, merged_weights
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.sharding import local
from lightning_goldy.core.space import SpaceError
from lightning_goldy.core.vector import ParameterVector
from tests.core.architecture.test_merged_adapters import move, trained, unloaded
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


def test_adapters_around_both_sides_of_an_mlp_leave_the_units_where_they_are() -> None:
    plain = build("llama").double().eval()
    targets = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=targets)).double().eval()
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


def test_a_plain_base_of_a_model_with_adapters_is_told_what_to_compare() -> None:
    plain = build("gpt2", 0)
    model = peft.get_peft_model(copy.deepcopy(plain), peft.LoraConfig(r=2, target_modules=["c_attn"]))
    before = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.1)
    with pytest.raises(SpaceError, match=r"the base, a GPT2LMHeadModel, has no adapters, .*merge_and_unload\(\)"):
        change_attribution(model, plain, [ids(1)], nodes=4)
    # Both that it advises give the same.
    dense = copy.deepcopy(model).merge_and_unload().requires_grad_(True)
    found = change_attribution(dense, plain, [ids(1)], nodes=4)
    assert change_attribution(model, before, [ids(1)], nodes=4).total == pytest.approx(found.total, rel=1e-5)
