"""Whatever is spread over processes must equal what one process computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lightning_goldy.core import (
    ParameterSpace,
    ParameterVector,
    applied,
    load_vectors,
    random_direction,
    save_vectors,
    substituted,
)
from lightning_goldy.core.base import BaseParameters, read_base
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.selection import select_largest
from lightning_goldy.core.sharding import Replicas, gather, is_sharded, like, local, local_box, scatter_like
from lightning_goldy.core.store import fingerprint
from lightning_goldy.core.vector import require_finite
from tests.distributed.launch import run_processes
from tests.reference import largest_reference, share_of

# Models


class Odd(nn.Module):
    """No length divides by 2 or 3, some are shorter than the number of processes, one weight has three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 5)
        self.conv = nn.Conv1d(1, 5, 3, padding=1)
        self.norm = nn.LayerNorm(5)
        self.last = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(self.first(x).tanh()[:, None]).mean(dim=1)
        return self.last(self.norm(hidden))


class Even(nn.Module):
    """Two layers that tensor parallelism can split by columns and by rows."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 8)
        self.down = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh())


def build(kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A model, the same on every process, and a forward that gives its outputs."""
    torch.manual_seed(11)
    if kind == "gpt2":
        from tests.models import build as build_family
        from tests.models import token_batch

        ids = token_batch(2, 6)["input_ids"]
        return build_family("gpt2").eval(), lambda model: model(input_ids=ids).logits
    if kind == "even":
        x = torch.randn(3, 6)
        return Even(), lambda model: model(x)
    x = torch.randn(3, 7)
    return Odd(), lambda model: model(x)


def shard(module: nn.Module, layout: str, mesh: DeviceMesh) -> nn.Module:
    if layout == "tensor parallel":
        parallelize_module(module, mesh["model"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        return fully_shard(module, mesh=mesh["data"])
    if layout == "columns":
        # As tensor parallelism leaves it: some split by columns, some by rows, some everywhere, some no DTensor at all.
        for name, parameter in list(module.named_parameters()):
            if name.endswith("norm.bias"):
                continue
            owner = module.get_submodule(name.rpartition(".")[0])
            place = Shard(1) if parameter.ndim > 1 else Replicate() if name.endswith("norm.weight") else Shard(0)
            sharded = distribute_tensor(parameter.detach(), mesh, [place])
            owner.register_parameter(name.rpartition(".")[2], nn.Parameter(sharded))
        return module
    if hasattr(module, "transformer"):
        for block in module.transformer.h:
            fully_shard(block, mesh=mesh)
    elif layout == "by layer":
        fully_shard(module.first, mesh=mesh)
    return fully_shard(module, mesh=mesh)


# Checks: `whole` is a plain model, `spread` the same one in shards.


def same(spread: ParameterVector, whole: ParameterVector) -> None:
    """Bit for bit; a collective."""
    assert list(spread) == list(whole)
    for name, tensor in spread.items():
        full = gather(tensor)
        assert full.dtype == whole[name].dtype
        assert torch.equal(full, whole[name]), name


def close(found: list[float] | float, expected: list[float] | float) -> None:
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-300)


def check_layout(whole: nn.Module, spread: nn.Module) -> None:
    assert any(is_sharded(parameter) for parameter in spread.parameters())
    space = ParameterSpace.of(spread)
    assert space == ParameterSpace.of(whole)
    covered = {name: torch.zeros(shape) for name, shape in zip(space.names, space.shapes, strict=True)}
    for name, parameter in space.resolve(spread).items():
        shape, offset = local_box(parameter)
        assert tuple(local(parameter).shape) == shape
        box = tuple(slice(start, start + length) for start, length in zip(offset, shape, strict=True))
        assert torch.equal(local(parameter), dict(whole.named_parameters())[name].detach()[box])
        covered[name][box] += 1
        full = dict(whole.named_parameters())[name].detach()
        again = scatter_like(parameter, full)
        assert again.shape == full.shape
        assert torch.equal(local(again), local(parameter))
        assert torch.equal(gather(like(parameter.detach(), local(parameter).clone())), full)


def check_vectors(whole: nn.Module, spread: nn.Module) -> None:
    space = ParameterSpace.of(whole)
    a, b = ParameterVector.of(whole), random_direction(space, 3)
    x, y = ParameterVector.of(spread), random_direction(space, 3, module=spread)
    same(x, a)
    same(y, b)
    for name in space:
        assert is_sharded(y[name]) == is_sharded(x[name])
        assert not is_sharded(x[name]) or x[name].placements == y[name].placements
    for dtype in (torch.float64, torch.bfloat16):
        same(random_direction(space, 4, module=spread, dtype=dtype), random_direction(space, 4, dtype=dtype))
    close(x.dot(y), a.dot(b))
    close(x.norm(), a.norm())
    close(x.tensor_norms(), a.tensor_norms())
    close(x.tensor_dots(y), a.tensor_dots(b))
    close(y.tensor_norms(), b.tensor_norms())
    same(x + y, a + b)
    same(x - 2.0 * y, a - 2.0 * b)
    same(x * y, a * b)
    same(-x, -a)
    same(x.to(torch.bfloat16), a.to(torch.bfloat16))
    same(x.full(), a)
    assert not any(is_sharded(tensor) for tensor in x.full().values())
    moved, expected = ParameterVector.of(spread), ParameterVector.of(whole)
    assert moved.axpy_(0.5, y) is moved
    same(moved, expected.axpy_(0.5, b))
    same(ParameterVector.of(spread), a)
    positive = [int((tensor > 0).sum()) for tensor in b.values()]
    assert y.map(lambda tensor: tensor > 0).count() == b.map(lambda tensor: tensor > 0).count() == positive


def check_selection(whole: nn.Module, spread: nn.Module) -> None:
    space = ParameterSpace.of(whole)
    smooth, tied = random_direction(space, 1), random_direction(space, 2).map(lambda tensor: tensor.round() * 2)
    cases = {
        "smooth": smooth,
        "tied": tied,
        "zeros": tied.map(lambda tensor: tensor * (tensor > 3)),
        "constant": tied.map(torch.ones_like),
        "float64": smooth.to(torch.float64) * (1 + 1e-12),
        "bfloat16": smooth.to(torch.bfloat16),
    }
    layouts = space.resolve(spread)
    for case, vector in cases.items():
        scattered = ParameterVector(space, {name: scatter_like(layouts[name], vector[name]) for name in space})
        tensors, parts = list(vector.values()), list(scattered.values())
        for k in (1, share_of(20, space.numel), space.numel - 1, space.numel):
            masks = [like(part, mask) for part, mask in zip(parts, select_largest(parts, k), strict=True)]
            expected = ParameterVector(space, dict(zip(space, largest_reference(tensors, k), strict=True)))
            same(ParameterVector(space, dict(zip(space, masks, strict=True))), expected)
        # Each k of a global share, and one for each tensor.
        for percent, scope in ((20, "global"), (30, "tensor")) if case in ("smooth", "tied") else ():
            found, expected = (each.top_k(percent, scope=scope) for each in (scattered, vector))
            same(found, expected)
            assert found.count() == expected.count()
            assert scope == "tensor" or sum(found.count()) == share_of(percent, space.numel)


def check_applied(whole: nn.Module, spread: nn.Module, forward: Callable[[nn.Module], Tensor]) -> None:
    space = ParameterSpace.of(whole)
    before = ParameterVector.of(whole)
    a, x = random_direction(space, 5), random_direction(space, 5, module=spread)
    other = before.map(lambda tensor: tensor.flip(0))
    spread_other = ParameterVector(space, {n: scatter_like(p, other[n]) for n, p in space.resolve(spread).items()})

    def outputs(module: nn.Module) -> Tensor:
        result = forward(module)
        return result.full_tensor() if isinstance(result, DTensor) else result

    def logits_agree(runs: bool) -> None:
        if runs:
            torch.testing.assert_close(outputs(spread), outputs(whole), rtol=1e-5, atol=1e-5)

    runs = hasattr(spread, "unshard")
    for grad in (torch.no_grad, torch.enable_grad):
        with grad():
            logits_agree(runs)  # which leaves FSDP2's root unsharded
            with applied(spread, x, -0.3), applied(whole, a, -0.3):
                same(ParameterVector.of(spread), ParameterVector.of(whole))
                logits_agree(runs)
                with pytest.raises(RuntimeError, match="inside"), applied(spread, x):
                    logits_agree(False)
                    raise RuntimeError("inside")
                same(ParameterVector.of(spread), ParameterVector.of(whole))
            same(ParameterVector.of(spread), before)
            logits_agree(runs)
            with substituted(spread, spread_other), substituted(whole, other):
                same(ParameterVector.of(spread), other)
                logits_agree(runs)
            same(ParameterVector.of(spread), before)


def check_isolation(whole: nn.Module, spread: nn.Module, forward: Callable[[nn.Module], Tensor]) -> None:
    if not hasattr(spread, "unshard"):
        return
    with preserved(spread):
        forward(spread).square().mean().backward()
        found = {name: gather(p.grad) for name, p in ParameterSpace.of(spread).resolve(spread).items()}
    assert all(p.grad is None for p in spread.parameters())
    assert all(is_sharded(p) for p in spread.parameters())
    with preserved(whole):
        forward(whole).square().mean().backward()
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6)
    # A forward keeps the root's parameters whole; nothing may take them for the real ones.
    forward(spread)
    assert ParameterSpace.of(spread) == ParameterSpace.of(whole)
    assert all(is_sharded(tensor) for tensor in ParameterVector.of(spread).values())
    forward(spread)
    assert all(is_sharded(tensor) for tensor in random_direction(ParameterSpace.of(whole), 0, module=spread).values())
    forward(spread)
    assert Replicas.of(spread) == Replicas()


def check_files(whole: nn.Module, spread: nn.Module, folder: Path, group: list[int]) -> None:
    space, write = ParameterSpace.of(whole), dist.get_rank() == group[0]
    vectors = {
        "values": (ParameterVector.of(whole), ParameterVector.of(spread)),
        "direction": (random_direction(space, 9), random_direction(space, 9, module=spread)),
        "mask": (random_direction(space, 9).top_k(4), random_direction(space, 9, module=spread).top_k(4)),
    }
    for kind, (plain, sharded) in vectors.items():
        path = folder / f"{kind}.safetensors"
        assert fingerprint(sharded) == fingerprint(plain)
        save_vectors(path, sharded, kind=kind, model=spread, step=1, write=write)
        meet(group)
        if write:
            alone = save_vectors(folder / "alone", plain, kind=kind, model=whole, step=1)
            assert alone.read_bytes() == path.read_bytes()
        loaded, header = load_vectors(path, spread)
        assert header.model_class == type(whole).__name__
        same(loaded, plain)
        for name, parameter in space.resolve(spread).items():
            assert is_sharded(loaded[name]) == is_sharded(parameter)
            assert not is_sharded(parameter) or loaded[name].placements == parameter.placements
        same(load_vectors(path, whole)[0], plain)
        meet(group)
    save_file({n: p.detach().double() for n, p in whole.named_parameters()}, str(folder / f"hf-{dist.get_rank()}.safetensors"))
    same(read_base(folder / f"hf-{dist.get_rank()}.safetensors", spread, space), ParameterVector.of(whole))


def check_base(whole: nn.Module, spread: nn.Module) -> None:
    space = ParameterSpace.of(whole)
    kept, kept_whole = BaseParameters(ParameterVector.of(spread)), BaseParameters(ParameterVector.of(whole))
    same(kept.vector(spread), ParameterVector.of(whole))
    with (
        applied(spread, random_direction(space, 6, module=spread), 0.1),
        applied(whole, random_direction(space, 6), 0.1),
    ):
        for found, expected in zip(kept.changes(spread), kept_whole.changes(whole), strict=True):
            assert found.name == expected.name
            assert torch.equal(gather(found.base), expected.base)
            assert torch.equal(gather(found.delta), expected.delta)
        deltas = ParameterVector(space, {change.name: change.delta for change in kept.changes(spread)})
        close(deltas.norm(), ParameterVector(space, {c.name: c.delta for c in kept_whole.changes(whole)}).norm())


def check_finiteness(whole: nn.Module, spread: nn.Module) -> None:
    parameters = ParameterSpace.of(spread).resolve(spread)
    require_finite(parameters, "weights")
    # The last element of one tensor lies on one process only; the others must hear of it.
    name = max(parameters, key=lambda each: math.prod(parameters[each].shape))
    value = dict(whole.named_parameters())[name].detach().clone()
    value.view(-1)[-1] = math.nan
    broken = dict(parameters)
    broken[name] = scatter_like(parameters[name], value)
    with pytest.raises(ValueError, match=f"the weights of {name} are not finite"):
        require_finite(broken, "weights")


def meet(group: list[int]) -> None:
    """A barrier among some ranks."""
    if len(group) > 1:
        dist.barrier(group=GROUPS[tuple(group)])


GROUPS: dict[tuple[int, ...], Any] = {}

CASES: dict[str, tuple[list, tuple[str, ...] | None, str, str]] = {
    # name: ranks of the mesh, names of its dimensions, model, layout
    "1 process": ([0], None, "odd", "by layer"),
    "2 processes": ([0, 1], None, "odd", "by layer"),
    "3 processes": ([0, 1, 2], None, "odd", "whole"),
    "columns on 2": ([0, 1], None, "odd", "columns"),
    "columns on 3": ([0, 1, 2], None, "odd", "columns"),
    "hybrid 2 x 2": ([[0, 1], [2, 3]], ("replicate", "shard"), "odd", "by layer"),
    "tensor parallel 2 x 2": ([[0, 1], [2, 3]], ("data", "model"), "even", "tensor parallel"),
    "gpt2 on 3": ([0, 1, 2], None, "gpt2", "by layer"),
    "gpt2 hybrid 2 x 2": ([[0, 1], [2, 3]], ("replicate", "shard"), "gpt2", "by layer"),
}


def check_case(name: str, folder: Path) -> None:
    ranks, dimensions, kind, layout = CASES[name]
    # Every process of the job must take part in making groups, also those outside.
    mesh = DeviceMesh("cpu", torch.tensor(ranks), mesh_dim_names=dimensions)
    group = torch.tensor(ranks).flatten().tolist()
    GROUPS[tuple(group)] = dist.new_group(group)
    if dist.get_rank() not in group:
        return
    whole, forward = build(kind)
    spread, _ = build(kind)
    spread = shard(spread, layout, mesh)
    try:
        check_layout(whole, spread)
        check_vectors(whole, spread)
        check_selection(whole, spread)
        check_applied(whole, spread, forward)
        check_isolation(whole, spread, forward)
        check_base(whole, spread)
        check_finiteness(whole, spread)
        folder = folder / name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        check_files(whole, spread, folder, group)
    except BaseException as error:
        raise AssertionError(f"case {name!r}, rank {dist.get_rank()}") from error


def check_replicas() -> dict[str, Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    replicas = Replicas.of(nn.Linear(2, 2))
    assert replicas == Replicas.world() == Replicas(rank, size)
    shares: list[list[int]] = [[] for _ in range(size)]
    dist.all_gather_object(shares, replicas.share(range(7)))  # type: ignore[arg-type]
    assert sorted(item for share in shares for item in share) == list(range(7))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    tensor = torch.tensor([float(rank), 1.0])
    assert replicas.sum_(tensor) is tensor
    assert tensor.tolist() == [size * (size - 1) / 2, size]
    with replicas.together("measuring"):
        pass
    # The last rank fails; it raises its own error, and the others name it instead of waiting.
    failing = size - 1
    if rank == failing:
        with pytest.raises(KeyError, match="lost"), replicas.together("measuring"):
            raise KeyError("lost")
    else:
        with (
            pytest.raises(RuntimeError, match=f"measuring failed on rank {failing}: KeyError: 'lost'"),
            replicas.together("measuring"),
        ):
            pass
    # All fail: each with its own.
    with pytest.raises(ValueError, match=f"rank {rank}$"), replicas.together("measuring"):
        raise ValueError(f"rank {rank}")
    dist.barrier()  # nobody is left in another collective
    return {"rank": rank, "shares": shares}


def check_all(names: list[str], folder: str) -> dict[str, Any]:
    for name in names:
        check_case(name, Path(folder))
    return check_replicas()


# Tests


def test_every_layout_equals_one_process(tmp_path: Path) -> None:
    # One start of four processes for all; smaller meshes leave some of them out.
    results = run_processes(check_all, 4, list(CASES), str(tmp_path))
    assert [result["rank"] for result in results] == [0, 1, 2, 3]
    assert all(result["shares"] == results[0]["shares"] for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_world_size_equals_one_process(tmp_path: Path, world_size: int) -> None:
    names = [name for name, (ranks, *_) in CASES.items() if ranks == list(range(world_size))]
    assert names
    results = run_processes(check_all, world_size, names, str(tmp_path))
    assert len(results) == world_size


def test_without_processes_there_is_one_replica() -> None:
    assert Replicas.world() == Replicas.of(nn.Linear(1, 1)) == Replicas(0, 1)
    tensor = torch.ones(2)
    assert Replicas().sum_(tensor).tolist() == [1, 1]
    with pytest.raises(KeyError), Replicas().together("work"):
        raise KeyError


def fail_on(rank: int) -> int:
    if dist.get_rank() == rank:
        raise LookupError("a planted failure")
    return dist.get_rank()


@pytest.mark.slow
def test_the_harness_reports_the_failing_rank() -> None:
    with pytest.raises(AssertionError, match=r"(?s)failure-1.*a planted failure"):
        run_processes(fail_on, 2, 1)
    assert run_processes(fail_on, 2, 5) == [0, 1]
