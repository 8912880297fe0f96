"""What sharding does where nothing is sharded; tests/distributed covers the rest."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import nn

import lightning_goldy
from lightning_goldy.core.sharding import (
    Replicas,
    align,
    gather,
    is_sharded,
    like,
    local,
    local_box,
    modules_of,
    parameters_of,
    scatter_like,
    sum_over_shards,
    unshard_guard,
)


def test_plain_tensors_pass_through() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    assert not is_sharded(weight)
    assert local(weight).data_ptr() == weight.data_ptr()
    assert not local(weight).requires_grad
    assert local_box(weight) == ((3, 4), (0, 0))
    assert local_box(torch.tensor(1.0)) == ((), ())
    part = torch.zeros(3, 4)
    assert like(weight, part) is part
    assert align(part, weight) is part
    assert scatter_like(weight, part) is part
    assert gather(weight).data_ptr() == weight.data_ptr()
    assert not gather(weight).requires_grad


def test_sums_of_plain_tensors_are_what_they_are() -> None:
    partial = [torch.tensor(1.0), torch.tensor(2.0)]
    found = sum_over_shards(partial, [torch.zeros(3), torch.zeros(4)])
    assert found == partial
    assert found is not partial
    assert sum_over_shards([], []) == []


def test_only_what_can_unshard_is_resharded() -> None:
    calls = []

    class Sharded(nn.Module):
        def reshard(self) -> None:
            calls.append(self)

        def unshard(self) -> None: ...

    class Other(nn.Module):
        def reshard(self) -> None:
            raise AssertionError("not FSDP2")

    inner = Sharded()
    outer = nn.ModuleList([Other(), nn.Sequential(inner)])
    unshard_guard(outer)
    assert calls == [inner]


@given(st.integers(0, 30), st.integers(1, 7))
def test_shares_are_disjoint_complete_and_even(items: int, size: int) -> None:
    shares = [Replicas(rank, size).share(range(items)) for rank in range(size)]
    assert sorted(item for share in shares for item in share) == list(range(items))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_without_processes_there_is_one_replica() -> None:
    assert Replicas.world() == Replicas.of(nn.Linear(1, 1)) == Replicas(0, 1)
    tensor = torch.ones(2)
    assert Replicas().sum_(tensor) is tensor
    assert tensor.tolist() == [1, 1]


def test_alone_a_failure_is_its_own() -> None:
    with Replicas().together("work"):
        pass
    with pytest.raises(KeyError, match="lost"), Replicas().together("work"):
        raise KeyError("lost")


@pytest.mark.parametrize("layer", ["core", "analysis"])
def test_one_file_knows_about_processes(layer: str) -> None:
    importing = set()
    for path in (Path(lightning_goldy.__file__).parent / layer).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            if any(name.startswith("torch.distributed") for name in names):
                importing.add(path.name)
    assert importing == ({"sharding.py"} if layer == "core" else set())


def test_modules_are_listed_as_torch_lists_them() -> None:
    """Shared ones once, where they come first, missing ones not at all, and as a module says that names its own."""
    shared = nn.Linear(2, 2)
    model = nn.Sequential(nn.ModuleDict({"a": shared, "b": nn.ModuleList([nn.ReLU(), shared])}), shared, nn.Tanh())
    model.register_module("nothing", None)
    assert modules_of(model) == list(model.modules())
    assert parameters_of(modules_of(model)) == list(model.parameters())

    class Hiding(nn.Sequential):
        def named_modules(self, *args: Any, **options: Any) -> Any:
            return iter([("", self)])

    wrapped = nn.Sequential(Hiding(nn.Linear(1, 1)), nn.ReLU())
    assert modules_of(wrapped) == list(wrapped.modules()) != list(nn.Module.modules(nn.Sequential(*wrapped)))
    assert len(modules_of(wrapped)) == 3
