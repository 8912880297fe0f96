"""Run in several processes by test_carriers: attribution, grafts, circuits and traces are those of one process."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_goldy.analysis import (
    ChangeAttributionResult,
    activation_differences,
    change_attribution,
    faithfulness,
    find_circuits,
    graft,
    graft_curve,
    node_effects,
)
from lightning_goldy.analysis.circuits import PromptPairs
from lightning_goldy.core.architecture import UnsupportedArchitectureError
from lightning_goldy.core.architecture.adapters import AdapterError, require_merged_parameters
from lightning_goldy.core.sharding import RankError, Replicas, local
from lightning_goldy.core.vector import ParameterVector
from tests.analysis.circuits.test_scores import prompts
from tests.references.architecture_models import lora
from tests.references.attribution import moved
from tests.references.models import build, token_batch

SHARES = (0.05, 0.6)


def subject() -> tuple[Any, Any]:
    torch.manual_seed(11)
    base = build("llama", 0).eval()
    return moved(base, build("llama", 1), 0.5).eval(), base


def shard(model: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def odd_pairs() -> PromptPairs:
    """Five pairs of two lengths: some processes have one less, or none of a length."""
    sets = [prompts(4), prompts(1, 7)]
    clean, corrupted, answers, wrong = (
        tuple(row for one in sets for row in getattr(one, name)) for name in ("clean", "corrupted", "answers", "wrong")
    )
    small = [tuple(tuple(token % 50 for token in ids) for ids in column) for column in (clean, corrupted)]
    return PromptPairs(small[0], small[1], answers, wrong)


def same_everywhere(value: Any) -> None:
    everyone = Replicas.world().gather_objects(value)
    assert all(other == everyone[0] for other in everyone)


def check_circuits(model: nn.Module) -> None:
    pairs = odd_pairs()
    for method in ("eap_ig_inputs", "nodes"):
        options: dict[str, Any] = {"method": method, "n_edges": 20, "steps": 2, "n_groups": 2}
        found = find_circuits(model, pairs, **options)
        alone = find_circuits(model, pairs, **options, split_over_ranks=False)
        torch.testing.assert_close(found.scores, alone.scores, rtol=1e-4, atol=1e-6)
        # Batches are smaller where there are more processes, so other pairs make a group.
        assert (found.left_out.shape, alone.left_out.shape) == ((2, *found.scores.shape),) * 2
        if method == "eap_ig_inputs":
            for one in (found, alone):
                torch.testing.assert_close(one.left_out.sum(0), one.scores, rtol=1e-4, atol=1e-6)
        assert (found.clean, found.patched) == pytest.approx((alone.clean, alone.patched), rel=1e-5)
        assert found.cost == alone.cost
        same_everywhere(found.to_json())
    curve, expected = (faithfulness(model, alone, pairs, n_random=2, split_over_ranks=split) for split in (True, False))
    told, wanted = (
        {name: math.nan if value is None else value for name, value in part.metrics().items()}
        for part in (curve, expected)
    )
    assert told == pytest.approx(wanted, rel=1e-4, nan_ok=True)
    assert curve.intervals[0] == pytest.approx(expected.intervals[0], rel=1e-4)
    assert curve.cost == expected.cost
    effects, expected_effects = (node_effects(model, pairs, split_over_ranks=split) for split in (True, False))
    assert effects == pytest.approx(expected_effects, abs=1e-5)

    def broken(logits: Tensor, some: PromptPairs, clean: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            raise LookupError("a planted failure")
        return logits[:, 0]

    with pytest.raises((LookupError, RankError), match="a planted failure"):
        find_circuits(model, pairs, broken)


def check_attribution(model: nn.Module, plain: nn.Module, base: ParameterVector) -> None:
    """``model`` may be in shards; ``plain`` is measured by one process."""
    scored, held_out = (token_batch(5, seed=seed) for seed in (1, 2))
    options: dict[str, Any] = {"shares": SHARES, "interactions": True}
    found = change_attribution(model, base, [scored], **options)
    expected = change_attribution(plain, base, [scored], **options, split_over_ranks=False)
    assert found.metrics() == pytest.approx(expected.metrics(), rel=1e-4, abs=1e-7)
    torch.testing.assert_close(found.contributions, expected.contributions, rtol=1e-3, atol=1e-7)
    require_same_heads(found, expected)
    assert found.cost == expected.cost
    same_everywhere(found.metrics())
    if model is plain:
        return
    options = {"baselines": ["random", "interpolation"], "factors": [0.5]}
    for pieces in ("elements", "blocks"):
        curves = [
            graft_curve(one, base, attribution, [scored], [held_out], [held_out], pieces=pieces, **options)
            for one, attribution in ((model, found), (plain, expected))
        ]
        for point, wanted in zip(curves[0].points, curves[1].points, strict=True):
            assert point["method"] == wanted["method"]
            for name in ("share", "value", "recovered", "low", "high", "harm", "kl"):
                assert point[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), (point["method"], name)
            assert point["draws"] == pytest.approx(wanted["draws"], rel=1e-3, abs=1e-5)
            assert len(point["draws"]) == (5 if point["method"] == "random" else 0)
        assert curves[0].of("greedy") or pieces == "elements"


def require_same_heads(found: ChangeAttributionResult, expected: ChangeAttributionResult) -> None:
    """What heads contribute, of each passage, is the same and adds up."""
    places = [place for place, unit in enumerate(expected.units) if "passages" in unit]
    assert places
    for place in places:
        unit, wanted = found.units[place], expected.units[place]
        torch.testing.assert_close(unit["passages"], wanted["passages"], rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(unit["passages"].sum(0), unit["values"], rtol=1e-4, atol=1e-7)


def check_activations(model: nn.Module, plain: nn.Module, base: ParameterVector) -> None:
    found, expected = (activation_differences(one, base, [token_batch(4)]) for one in (model, plain))
    assert found.metrics() == pytest.approx(expected.metrics(), rel=1e-4, abs=1e-7)
    torch.testing.assert_close(found.means, expected.means, rtol=1e-4, atol=1e-6)
    assert [entry["kl"] for entry in found.divergent] == pytest.approx([entry["kl"] for entry in expected.divergent])


def check_refusals(sharded: nn.Module) -> None:
    with pytest.raises(UnsupportedArchitectureError, match="a sharded model's circuits are not found"):
        find_circuits(sharded, odd_pairs())


def check_merged_weights(more: list[str] | None) -> None:
    """Under shards the contributions of merged weights, and grafts of them, are those of one process."""
    torch.manual_seed(7)
    plain = lora("llama", ["q_proj", "down_proj"], modules_to_save=more)
    sharded, fresh = copy.deepcopy(plain), copy.deepcopy(plain)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
            elif "modules_to_save" in name:
                parameter.mul_(0.9)
    base = ParameterVector.of(fresh)
    sharded = shard_adapted(sharded)
    kept = {name: value.detach().clone() for name, value in sharded.named_parameters()}
    scored, held_out = (token_batch(4, seed=seed) for seed in (1, 2))
    options: dict[str, Any] = {"shares": SHARES, "nodes": 2}
    found = change_attribution(sharded, base, [scored], **options)
    expected = change_attribution(plain, base, [scored], **options, split_over_ranks=False)
    assert found.space == expected.space == "merged"
    assert found.metrics() == pytest.approx(expected.metrics(), rel=1e-4, abs=1e-7)
    torch.testing.assert_close(found.contributions, expected.contributions, rtol=1e-3, atol=1e-7)
    require_same_heads(found, expected)
    same_everywhere(found.metrics())
    grafting: dict[str, Any] = {"baselines": ["random", "magnitude"], "n_draws": 1}
    curves = [
        graft_curve(one, base, attribution, [scored], [held_out], **grafting)
        for one, attribution in ((sharded, found), (plain, expected))
    ]
    for point, wanted in zip(*(curve.records for curve in curves), strict=True):
        assert (point.method, point.share) == (wanted.method, wanted.share)
        assert point.value == pytest.approx(wanted.value, rel=1e-4)
    mask = expected.mask(SHARES[1])
    states = [
        graft(one, base, attribution.mask(SHARES[1])) for one, attribution in ((sharded, found), (plain, expected))
    ]
    assert set(states[0]) == set(states[1]) >= set(mask.space)
    for name, value in states[1].items():
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-6)
    for name, value in sharded.named_parameters():
        assert torch.equal(local(value), local(kept[name])), name
    logits = sharded(input_ids=scored["input_ids"]).logits
    torch.testing.assert_close(logits, plain(input_ids=scored["input_ids"]).logits, rtol=1e-4, atol=1e-5)


def check_low_precision_and_tensor_parallelism() -> None:
    """Passes in bfloat16 have merged weights of that type; a layer that is split among processes is refused."""
    torch.manual_seed(7)
    plain = lora("llama", ["q_proj"])
    fresh, split = copy.deepcopy(plain), copy.deepcopy(plain)
    with torch.no_grad():
        for name, parameter in fresh.named_parameters():
            parameter.mul_(0 if "lora_B" in name else 1)
    base = ParameterVector.of(fresh)
    low = shard_adapted(copy.deepcopy(plain), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    found, expected = (change_attribution(one, base, [token_batch(4)], nodes=2) for one in (low, plain))
    torch.testing.assert_close(found.contributions.sum(0), expected.contributions.sum(0), rtol=0.1, atol=2e-3)
    layer = split.base_model.model.model.layers[0].self_attn.q_proj.base_layer
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Shard(0)]), requires_grad=False)
    with pytest.raises(AdapterError, match="q_proj: under tensor parallelism no process computes with a whole layer"):
        require_merged_parameters(split)


def shard_adapted(adapted: Any, **options: Any) -> Any:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in adapted.base_model.model.model.layers:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(adapted, mesh=mesh, **options)


def check_all() -> int:
    model, base = subject()
    before = ParameterVector.of(base)
    check_circuits(model)
    check_attribution(model, model, before)
    sharded = shard(copy.deepcopy(model))
    check_attribution(sharded, model, before)
    check_activations(sharded, model, before)
    check_refusals(sharded)
    check_merged_weights(None)
    check_merged_weights(["lm_head"])
    check_low_precision_and_tensor_parallelism()
    return dist.get_rank()
