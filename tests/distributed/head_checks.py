"""Run in several processes by test_heads: heads are scored, cut, frozen and grown as in one process."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from lightning_goldy.analysis.heads import HeadFreeze, head_importance, heads_to_regrow, prune_heads, regrow_heads
from lightning_goldy.core.architecture import HeadGates, describe_architecture
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.objective import CausalLMObjective
from lightning_goldy.core.sharding import Replicas, gather, is_sharded, local, scatter_like, unshard_guard
from lightning_goldy.core.vector import ParameterVector
from tests.references.architecture_models import VOCABULARY
from tests.references.architecture_models import build as built

CUT = [(0, 0), (0, 1), (1, 2)]
Layout = Literal["rows", "columns", "whole"]
STRATEGIES = ("entropy", "magnitude", "combined", "taylor", "ablation", "random")


def build(family: str) -> Any:
    torch.manual_seed(11)
    return built(family)


def batches() -> list[dict[str, Tensor]]:
    """Five samples in two batches, the last of one row: some processes have none of it."""
    ids = torch.randint(2, VOCABULARY, (5, 8), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    whole = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    return [{key: value[:4] for key, value in whole.items()}, {key: value[4:] for key, value in whole.items()}]


def shard(model: Any, mesh: DeviceMesh, layout: Layout) -> Any:
    """Rows or columns of each block and of the rest, or all as one group, which a forward leaves unsharded."""
    options: dict[str, Any] = {"mesh": mesh}
    if layout == "columns":
        options["shard_placement_fn"] = lambda parameter: Shard(1) if parameter.ndim > 1 else Shard(0)
    if layout != "whole":
        for block in model.transformer.h if hasattr(model, "transformer") else model.model.layers:
            fully_shard(block, **options)
    return fully_shard(model, **options)


def whole_values(model: nn.Module) -> dict[str, Tensor]:
    unshard_guard(model)
    return {name: gather(parameter).clone() for name, parameter in model.named_parameters()}


def same_everywhere(value: Any) -> None:
    everyone = Replicas.world().gather_objects(value)
    assert all(other == everyone[0] for other in everyone)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def check_scores(model: Any, alone: Any) -> None:
    """``model`` may be in shards; ``alone`` is plain and measured by one process."""
    for closed in ([], CUT):
        for each in (model, alone):
            gates = HeadGates.of(each) or HeadGates(each)
            gates.enable(gates.closed)
            gates.disable(closed)
        for strategy in STRATEGIES:
            found = head_importance(model, batches(), strategy=strategy)
            expected = head_importance(alone, batches(), strategy=strategy, split_over_ranks=False)
            torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
            assert found.n_samples == expected.n_samples == 5
            assert found.cost == expected.cost
            same_everywhere(found.scores.tolist())
            same_everywhere(found.least_important(0.25))
        for strategy in ("gradient", "random", "last_pruned") if closed else ():
            grown = heads_to_regrow(model, batches(), count=2, strategy=strategy)  # type: ignore[arg-type]
            same_everywhere(grown)
            assert grown == heads_to_regrow(alone, batches(), count=2, strategy=strategy)  # type: ignore[arg-type]
    HeadGates.of(alone).remove()  # type: ignore[union-attr]
    HeadGates.of(model).remove()  # type: ignore[union-attr]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, use_cache=False).logits.square().mean()


def train(model: Any, parameters: nn.Module, steps: int, mine: Callable[[dict], dict]) -> torch.optim.Optimizer:
    """AdamW with weight decay and clipping, heads closed after the first step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    HeadGates(parameters)
    freeze = HeadFreeze(parameters, optimizer)
    for step in range(steps):
        if step == 1:
            prune_heads(parameters, CUT)
            with torch.no_grad():
                model(**batches()[0])
            freeze.zero_gradients()
        optimizer.zero_grad()
        loss_of(model, mine(batches()[0])).backward()
        freeze.zero_gradients()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    freeze.remove()
    return optimizer


def check_training(model: Any, parameters: Any, alone: Any, mine: Callable[[dict], dict]) -> None:
    """Trains in shards or replicas and alone; the results agree, and closed heads stand still to the last bit."""
    after_one, after_all = [], []
    for wrapped, plain, rows in ((model, parameters, mine), (alone, alone, lambda batch: batch)):
        start = whole_values(plain)
        train(wrapped, plain, 1, rows)
        HeadGates.of(plain).remove()  # type: ignore[union-attr]
        after_one.append(whole_values(plain))
        with torch.no_grad():
            for name, parameter in plain.named_parameters():
                local(parameter).copy_(local(scatter_like(parameter, start[name])))
        train(wrapped, plain, 4, rows)
        after_all.append(whole_values(plain))
    blocks = describe_architecture(alone).blocks
    for layer, head in CUT:
        for part in (*blocks[layer].query.head_slice(head), *blocks[layer].output_slice(head)):
            for one, four in zip(after_one, after_all, strict=True):
                assert torch.equal(part.of(four[part.name]), part.of(one[part.name])), part.name
    for name, expected in after_all[1].items():
        torch.testing.assert_close(after_all[0][name], expected, rtol=1e-3, atol=1e-4)


def check_surgery(family: str, mesh: DeviceMesh, layout: Layout) -> None:
    """Values and moments after every way of growing, bit for bit those of one process."""
    for initialisation in ("golden", "zero", "copy", "noise"):
        results = []
        for sharded in (True, False):
            model = build(family)
            model = shard(model, mesh, layout) if sharded else model
            base = BaseParameters(ParameterVector.of(model))
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
            for place, parameter in enumerate(model.parameters()):
                # Numbers that do not depend on how a sum is made: as if a step had been taken.
                full = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(place))
                parameter.grad = scatter_like(parameter.detach(), full)
            optimizer.step()
            with torch.no_grad():
                model(**batches()[0])
            prune_heads(model, CUT)
            options: dict[str, Any] = {"base": base} if initialisation == "golden" else {"seed": 3}
            regrow_heads(model, CUT, initialisation=initialisation, optimizer=optimizer, **options)  # type: ignore[arg-type]
            unshard_guard(model)
            moments = {n: gather(optimizer.state[p]["exp_avg"]).clone() for n, p in model.named_parameters()}
            if sharded:
                assert all(map(is_sharded, model.parameters()))
            results.append((whole_values(model), moments))
        (values, moments), (expected, expected_moments) = results
        equal(values, expected)
        equal(moments, expected_moments)
        assert any((moment == 0).any() for moment in moments.values())


def check_gates(family: str, mesh: DeviceMesh, layout: Layout) -> None:
    """Gates on shards: before or after sharding, kept whole, with checkpointing and a backward pass."""
    batch, alone = batches()[0], build(family)
    HeadGates(alone).disable(CUT)
    with torch.no_grad():
        expected = alone(**batch).logits
    for first in ("gates", "shards"):
        model = build(family)
        if first == "gates":
            gates = HeadGates(model, kind="parameter")
            model = shard(model, mesh, layout)
        else:
            model = shard(model, mesh, layout)
            gates = HeadGates(model, kind="parameter")
        gates.disable(CUT)
        assert not is_sharded(gates.closing)
        assert not is_sharded(gates.values)  # type: ignore[arg-type]
        assert not any("closing" in name or name == "values" for name in model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-5)
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        loss_of(model, batch).backward()
        gradient = gates.values.grad.clone()  # type: ignore[union-attr]
        assert not isinstance(gradient, DTensor)
        assert all(gradient[head] == 0 for head in CUT)
        same_everywhere(gradient.tolist())
        assert math.isfinite(float(gradient.sum()))


class Failing(CausalLMObjective):
    """Cannot take the samples of the last process."""

    def log_probs(self, model: nn.Module, batch: Any) -> Tensor:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise LookupError("a planted failure")
        return super().log_probs(model, batch)


def check_failure() -> None:
    """A failure on one process ends the analysis on all, and the model is as it was."""
    model = build("llama")
    last = dist.get_world_size() - 1
    wanted = (LookupError, "planted") if dist.get_rank() == last else (RuntimeError, f"on rank {last}: LookupError")
    for strategy in ("entropy", "ablation"):
        with pytest.raises(wanted[0], match=wanted[1]):  # type: ignore[arg-type]
            head_importance(model, batches(), Failing(), strategy=strategy)
    assert HeadGates.of(model) is None
    assert model.config._attn_implementation == "sdpa"


def check_replicated() -> None:
    """Plain replicas and DistributedDataParallel."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def mine(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: value[rank::size] for key, value in batch.items()}

    for family in ("llama", "gpt2"):
        model = build(family)
        check_scores(model, copy.deepcopy(model))
        if size == 2:  # the mean of means over equal parts is the mean
            replica = build(family)
            check_training(DistributedDataParallel(replica), replica, build(family), mine)


def check_sharded(brief: bool) -> None:
    """FSDP2 with rows or columns split."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cases: list[tuple[str, Layout]] = [("llama", "rows"), ("gpt2", "rows"), ("llama", "columns"), ("gpt2", "whole")]
    for family, layout in cases[::3] if brief else cases:
        if layout == "columns" and 32 % dist.get_world_size():
            continue  # FSDP2 splits columns evenly only
        check_gates(family, mesh, layout)
        check_scores(shard(build(family), mesh, layout), build(family))
        check_surgery(family, mesh, layout)
        model = shard(build(family), mesh, layout)
        check_training(model, model, build(family), lambda batch: batch)


def check_all(brief: bool) -> int:
    torch.manual_seed(0)
    check_replicated()
    check_failure()
    check_sharded(brief)
    return dist.get_rank()
