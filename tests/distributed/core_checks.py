"""Run in several processes by test_core: each check compares a model in shards with the same one whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lightning_goldy.analysis.change import parameter_distribution, weight_change
from lightning_goldy.callbacks.engine.weights import weights_in
from lightning_goldy.core import (
    ParameterSpace,
    ParameterVector,
    applied,
    load_vectors,
    random_direction,
    save_vectors,
    substituted,
)
from lightning_goldy.core.architecture.adapters import AdapterError, require_line
from lightning_goldy.core.base import BaseParameters, base_of, read_base
from lightning_goldy.core.isolation import preserved
from lightning_goldy.core.selection import select_largest
from lightning_goldy.core.sharding import Replicas, gather, is_sharded, like, local, local_box, scatter_like
from lightning_goldy.core.store import fingerprint
from lightning_goldy.core.vector import require_finite
from tests.distributed.sharded_models import build, shard
from tests.references.common import largest_reference, share_of

# Checks: `whole` is a plain model, `spread` the same one in shards.


def same(spread: ParameterVector, whole: ParameterVector) -> None:
    """Bit for bit; every process looks at its own part, and `check_layout` shows that together they are the whole."""
    assert list(spread) == list(whole)
    for name, tensor in spread.items():
        expected = local(scatter_like(tensor, whole[name]))
        assert local(tensor).dtype == expected.dtype
        assert torch.equal(local(tensor), expected), name


def close(found: list[float] | float, expected: list[float] | float) -> None:
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-300)


def check_layout(whole: nn.Module, spread: nn.Module, group: dist.ProcessGroup) -> None:
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
    # [processes, elements]: how often each element is held
    held = torch.cat([count.flatten() for count in covered.values()])
    counts = [torch.empty_like(held) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, held, group=group)
    assert (torch.stack(counts).sum(dim=0) >= 1).all()


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
    full = x.full()
    assert all(torch.equal(full[name], a[name]) for name in a)
    assert not any(is_sharded(tensor) for tensor in full.values())
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

    def logits_agree() -> None:
        if hasattr(spread, "unshard"):  # a forward over columns is not what this is about
            torch.testing.assert_close(outputs(spread), outputs(whole), rtol=1e-5, atol=1e-5)

    for grad in (torch.no_grad, torch.enable_grad):
        with grad():
            logits_agree()  # which leaves FSDP2's root unsharded
            with applied(spread, x, -0.3), applied(whole, a, -0.3):
                logits_agree()
                same(ParameterVector.of(spread), ParameterVector.of(whole))
                with suppress(KeyError), applied(spread, x):
                    raise KeyError("inside")
                same(ParameterVector.of(spread), ParameterVector.of(whole))
                logits_agree()  # and ends so, with the moved values gathered
            logits_agree()
            same(ParameterVector.of(spread), before)
            with substituted(spread, spread_other), substituted(whole, other):
                logits_agree()
                same(ParameterVector.of(spread), other)
            logits_agree()
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


def check_files(whole: nn.Module, spread: nn.Module, folder: Path, group: dist.ProcessGroup) -> None:
    space, write = ParameterSpace.of(whole), dist.get_rank(group) == 0
    folder.mkdir(exist_ok=True)
    vectors = {
        "values": (ParameterVector.of(whole), ParameterVector.of(spread)),
        "direction": (random_direction(space, 9), random_direction(space, 9, module=spread)),
        "mask": (random_direction(space, 9).top_k(4), random_direction(space, 9, module=spread).top_k(4)),
    }
    for kind, (plain, sharded) in vectors.items():
        path = folder / f"{kind}.safetensors"
        assert fingerprint(sharded) == fingerprint(plain)
        save_vectors(path, sharded, kind=kind, model=spread, step=1, write=write)
        dist.barrier(group)
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
        dist.barrier(group)
    save_file(
        {n: p.detach().double() for n, p in whole.named_parameters()}, str(folder / f"hf-{dist.get_rank()}.safetensors")
    )
    same(read_base(folder / f"hf-{dist.get_rank()}.safetensors", spread, space), ParameterVector.of(whole))


def check_base(whole: nn.Module, spread: nn.Module) -> None:
    space = ParameterSpace.of(whole)
    kept, kept_whole = BaseParameters(ParameterVector.of(spread)), BaseParameters(ParameterVector.of(whole))
    same(kept.vector(spread), ParameterVector.of(whole))
    # A base takes the layout of the model, whichever it has itself.
    for model in (spread, whole):
        for base in (spread, whole, ParameterVector.of(spread), ParameterVector.of(whole)):
            found = base_of(base, model).vector(model)
            same(found, ParameterVector.of(whole))
            assert all(is_sharded(found[name]) == is_sharded(p) for name, p in space.resolve(model).items())
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


def check_adapters(mesh: DeviceMesh) -> None:
    """The change of merged weights under shards is that of one process; derivatives along them are refused there."""
    peft = pytest.importorskip("peft")
    models = []
    for _ in range(2):
        plain, _ = build("gpt2")
        torch.manual_seed(5)
        options = {"r": 2, "fan_in_fan_out": True, "init_lora_weights": False}
        model = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["c_attn", "wte"], **options))
        model.add_adapter("dora", peft.LoraConfig(target_modules=["c_fc"], use_dora=True, **options))
        model.base_model.set_adapter(["default", "dora"])
        models.append(model.eval())
    whole, spread = models[0], shard(models[1], "whole", mesh)
    bases = [BaseParameters(ParameterVector.of(model)) for model in (whole, spread)]
    space = bases[0].space
    direction = random_direction(space, 6)
    with applied(whole, direction, 0.1), applied(spread, random_direction(space, 6, module=spread), 0.1):
        for analyze in (weight_change, parameter_distribution):
            found, expected = analyze(spread, bases[1]), analyze(whole, bases[0], **_ALONE.get(analyze, {}))
            for row, other in zip(found.details()["tensors"], expected.details()["tensors"], strict=True):
                assert row["name"] == other["name"]
                close(row["delta_norm"], other["delta_norm"])
                close(row.get("stable_rank") or 0.0, other.get("stable_rank") or 0.0)
        with pytest.raises(AdapterError, match="each process to hold the whole model"):
            require_line(spread)


_ALONE: dict[Any, dict[str, Any]] = {parameter_distribution: {"split_over_ranks": False}}


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


def check_replaced(whole: nn.Module, spread: nn.Module) -> None:
    """Weights that a checkpoint holds in place of the module's are put in, whoever holds them in whatever form."""
    present = ParameterVector.of(spread)
    other = {name: 2 * tensor.detach() for name, tensor in whole.state_dict().items()}
    only = next(iter(other))
    shards = {name: 2 * tensor for name, tensor in present.items()}
    rank = dist.get_rank()
    for state, changed in (
        (other, set(other)),
        (other if rank == 0 else {}, set(other)),
        ({only: other[only]} if rank == 1 else {}, {only} if dist.get_world_size() > 1 else set()),
        (shards, set(shards)),
        (dict(present), set()),
        (dict(whole.state_dict()) if rank == 0 else {}, set()),
    ):
        with weights_in({"state_dict": state}, spread) as replaced:
            assert replaced is bool(changed)
            expected = {name: 2 * tensor if name in changed else tensor for name, tensor in present.items()}
            same(
                ParameterVector.of(spread), ParameterVector(present.space, {n: gather(t) for n, t in expected.items()})
            )
        assert all(
            torch.equal(local(tensor), local(present[name])) for name, tensor in ParameterVector.of(spread).items()
        )


CASES: dict[str, tuple[list, tuple[str, ...] | None, str, str]] = {
    # name: ranks of the mesh, names of its dimensions, model, layout
    "1 process": ([0], None, "odd", "by layer"),
    "2 processes": ([0, 1], None, "odd", "by layer"),
    "3 processes": ([0, 1, 2], None, "odd", "whole"),
    "columns on 2": ([0, 1], None, "odd", "columns"),
    "columns on 3": ([0, 1, 2], None, "odd", "columns"),
    "hybrid 2 x 2": ([[0, 1], [2, 3]], ("replicate", "shard"), "odd", "by layer"),
    "tensor parallel 2 x 2": ([[0, 1], [2, 3]], ("data", "model"), "even", "tensor parallel"),
    "gpt2 on 2": ([0, 1], None, "gpt2", "by layer"),
    "gpt2 hybrid 2 x 2": ([[0, 1], [2, 3]], ("replicate", "shard"), "gpt2", "by layer"),
}
FAST = ("3 processes", "columns on 3", "hybrid 2 x 2", "tensor parallel 2 x 2", "gpt2 on 2")


def check_case(name: str, folder: Path, brief: bool) -> None:
    ranks, dimensions, kind, layout = CASES[name]
    # Every process of the job must take part in making groups, also those outside.
    mesh = DeviceMesh("cpu", torch.tensor(ranks), mesh_dim_names=dimensions)
    members = torch.tensor(ranks).flatten().tolist()
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        return
    whole, forward = build(kind)
    spread, _ = build(kind)
    spread = shard(spread, layout, mesh)
    try:
        check_layout(whole, spread, group)
        check_vectors(whole, spread)
        if not brief:
            check_selection(whole, spread)
        check_applied(whole, spread, forward)
        check_isolation(whole, spread, forward)
        check_base(whole, spread)
        if kind == "gpt2" and len(members) == 2:
            check_adapters(mesh)
        check_finiteness(whole, spread)
        if len(members) == dist.get_world_size():
            check_replaced(whole, spread)
        check_files(whole, spread, folder / name.replace(" ", "-"), group)
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


def check_all(names: list[str], folder: str, brief: bool) -> dict[str, Any]:
    for name in names:
        check_case(name, Path(folder), brief=brief and name.startswith("gpt2"))
    return check_replicas()
