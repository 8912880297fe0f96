from __future__ import annotations

import math
import os
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

from lightning_goldy.core import (
    ParameterSpace,
    ParameterVector,
    StoreError,
    load_vectors,
    random_direction,
    save_vectors,
    store,
)
from lightning_goldy.core.store import (
    fingerprint,
    pack_mask,
    pack_values,
    packed_share,
    read_header,
    unpack_mask,
    unpack_values,
)
from tests.references.common import bits_reference
from tests.references.models import build


def small() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 3), nn.LayerNorm(3), nn.Linear(3, 2, bias=False))


def masks(module: nn.Module, density: float = 0.2) -> ParameterVector:
    return ParameterVector.of(module).map(lambda tensor: torch.rand(tensor.shape) < density)


def assert_equal(first: ParameterVector, second: ParameterVector) -> None:
    assert first.space.names == second.space.names
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert torch.equal(first[name], second[name])


# Round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["values", "direction", "mask"])
def test_round_trip(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    module = build("gpt2").to(dtype)
    space = ParameterSpace.of(module, exclude=["*.ln_1.*"])
    vectors = {
        "values": lambda: ParameterVector.of(module, space),
        "direction": lambda: random_direction(space, 1, dtype=torch.float32),
        "mask": lambda: random_direction(space, 1).top_k(3),
    }
    vector = vectors[kind]()
    path = tmp_path / "deep" / "er" / "vector.safetensors"
    assert save_vectors(path, vector, kind=kind, model=module, step=12, base_hash="abc") == path
    for loaded, header in (load_vectors(path), load_vectors(str(path), module)):
        assert_equal(loaded, vector)
        assert loaded.space == space
        assert (header.kind, header.model_class, header.step, header.base_hash) == (kind, "GPT2LMHeadModel", 12, "abc")
    assert read_header(path) == header
    assert header.space() == space
    assert [path.name for path in path.parent.iterdir()] == [path.name]


def test_values_without_rounding_or_loss(tmp_path: Path) -> None:
    module = nn.Linear(4, 2, bias=False)
    special = torch.tensor([[math.nan, math.inf, -math.inf, -0.0], [1e-45, 3.4e38, 1 / 3, 2**-149]])
    vector = ParameterVector(ParameterSpace.of(module), {"weight": special})
    loaded, _ = load_vectors(save_vectors(tmp_path / "v.safetensors", vector, kind="values", model="Linear"))
    assert torch.equal(loaded["weight"].view(torch.int32), special.view(torch.int32))


def with_bits(kind: str, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(5)
    values = 0.02 * torch.randn(90, 110)
    made = {
        "any": lambda: values,
        "coarse": lambda: values.bfloat16(),
        "half": lambda: values.half(),
        "zero": lambda: torch.zeros_like(values),
        "constant": lambda: values * 0 + 1 / 3,
        "special": lambda: torch.cat([values[:88], torch.tensor([[math.nan], [-math.inf]]).expand(2, 110)]),
        "noise": lambda: torch.randint(-(2**31), 2**31, (90, 110)).int().view(torch.float32),
    }[kind]()
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["any", "coarse", "half", "zero", "constant", "special", "noise"])
def test_packed_values_lose_no_bit(tmp_path: Path, dtype: torch.dtype, kind: str) -> None:
    values, whole = with_bits(kind, dtype), torch.int64 if dtype == torch.float64 else torch.int32
    whole = torch.int16 if dtype.itemsize == 2 else whole
    packed, encoding = pack_values(values)
    size = values.numel() * dtype.itemsize
    told = packed_share([values])
    if encoding == "dense":
        assert packed is values
        assert told == 1.0
    else:
        assert unpack_values(packed, values.shape, dtype, encoding).view(whole).equal(values.view(whole))
        assert packed.numel() <= 0.95 * size
        # A sample, and the code's own table.
        assert abs(packed.numel() - told * size) < 0.02 * size + 1500
    if dtype == torch.float32:
        most = {"any": 0.86, "coarse": 0.37, "half": 0.66, "zero": 0.0, "constant": 0.17, "special": 0.87}
        assert packed.numel() * packed.element_size() <= most.get(kind, 1.0) * size
    space = ParameterSpace(("a", "b"), (values.shape, torch.Size([2])), (dtype, dtype))
    vector = ParameterVector(space, {"a": values, "b": values[0, :2]})
    path = save_vectors(tmp_path / "v.safetensors", vector, kind="values", model="X", packed=True)
    loaded, header = load_vectors(path)
    assert header.encodings == [encoding, "dense"]
    assert all(loaded[name].view(whole).equal(vector[name].view(whole)) for name in vector)
    assert fingerprint(loaded) == fingerprint(vector)


def test_views_scalars_and_empty_tensors(tmp_path: Path) -> None:
    buffer = torch.arange(24.0)
    tensors = {
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
        "part": buffer[:6].view(2, 3),
        "turned": buffer[6:].view(6, 3).t(),
    }
    space = ParameterSpace(tuple(tensors), tuple(t.shape for t in tensors.values()), (torch.float32,) * 4)
    vector = ParameterVector(space, tensors)
    loaded, _ = load_vectors(save_vectors(tmp_path / "v.safetensors", vector, kind="values", model="X"))
    assert_equal(loaded, vector)
    mask = vector.map(lambda tensor: tensor > 4)
    loaded, header = load_vectors(save_vectors(tmp_path / "m.safetensors", mask, kind="mask", model="X"))
    assert_equal(loaded, mask)
    assert header.encodings == ["int32", "bits", "bits", "bits"]


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    ones = torch.ones(2, 2)
    space = ParameterSpace(("a", "b"), (ones.shape, ones.shape), (ones.dtype, ones.dtype))
    vector = ParameterVector(space, {"a": ones, "b": ones})
    loaded, _ = load_vectors(save_vectors(tmp_path / "v.safetensors", vector, kind="direction", model="X"))
    assert_equal(loaded, vector)


def test_only_the_writing_process_writes(tmp_path: Path) -> None:
    module = small()
    path = save_vectors(tmp_path / "x" / "v.safetensors", masks(module), kind="mask", model=module, write=False)
    assert path == tmp_path / "x" / "v.safetensors"
    assert list(tmp_path.iterdir()) == []


def test_loading_onto_a_compiled_module(tmp_path: Path) -> None:
    module = small()
    compiled = torch.compile(module, backend="eager")
    path = save_vectors(tmp_path / "v.safetensors", ParameterVector.of(compiled), kind="values", model=compiled)
    for target in (module, compiled):
        assert_equal(load_vectors(path, target)[0], ParameterVector.of(module))


# Masks


@given(
    st.lists(st.integers(0, 9), max_size=3),
    st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1), st.floats(0, 0.06)),
    st.integers(0, 9999),
)
@settings(max_examples=200, deadline=None)
def test_packing_any_mask(shape: list[int], density: float, seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    packed, encoding = pack_mask(mask)
    count = int(mask.sum())
    assert encoding == ("int32" if count * 32 < mask.numel() else "bits")
    if encoding == "bits":
        assert packed.tolist() == bits_reference(mask)
    else:
        assert packed.tolist() == [index for index, value in enumerate(mask.reshape(-1).tolist()) if value]
    assert torch.equal(unpack_mask(packed, mask.shape, encoding), mask)
    transposed = mask.permute(list(reversed(range(mask.ndim))))
    packed, encoding = pack_mask(transposed)
    assert torch.equal(unpack_mask(packed, transposed.shape, encoding), transposed)


@pytest.mark.parametrize(
    ("set_elements", "encoding"), [(0, "int32"), (9, "int32"), (10, "bits"), (11, "bits"), (320, "bits")]
)
def test_the_limit_is_one_in_thirty_two(tmp_path: Path, set_elements: int, encoding: str) -> None:
    mask = torch.zeros(320, dtype=torch.bool)
    mask[torch.randperm(320)[:set_elements]] = True
    packed, found = pack_mask(mask)
    assert found == encoding
    assert packed.nbytes == (40 if encoding == "bits" else 4 * set_elements)
    assert packed.nbytes <= 40


def test_a_mask_is_boolean(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weight: a mask is boolean; got torch\.float32"):
        pack_mask(torch.zeros(3), "weight")
    module = small()
    with pytest.raises(ValueError, match=r"0\.weight: a mask is boolean"):
        save_vectors(tmp_path / "m.safetensors", ParameterVector.of(module), kind="mask", model=module)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("packed", "encoding", "message"),
    [
        (torch.zeros(1, dtype=torch.uint8), "bits", "m: 1 bytes of torch.uint8 cannot hold 10 bits"),
        (torch.zeros(2, dtype=torch.int32), "bits", "m: 2 bytes of torch.int32 cannot hold 10 bits"),
        (torch.tensor([10], dtype=torch.int32), "int32", "m: an index lies outside the 10 elements"),
        (torch.tensor([-1], dtype=torch.int64), "int64", "m: an index lies outside the 10 elements"),
        (torch.tensor([1.5]), "int32", r"m: torch.float32 of shape \(1,\) are not int32 indices"),
        (torch.zeros(1, 1, dtype=torch.int32), "int32", r"m: torch.int32 of shape \(1, 1\) are not int32 indices"),
        (torch.zeros(1), "zip", "m: unknown encoding 'zip'; Valid: bits, int32, int64"),
    ],
)
def test_malformed_masks(packed: Tensor, encoding: str, message: str) -> None:
    with pytest.raises(StoreError, match=message):
        unpack_mask(packed, torch.Size([2, 5]), encoding, "m")


def test_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    module = small()
    with pytest.raises(ValueError, match="unknown kind 'snapshot'; Valid: values, direction, mask"):
        save_vectors(tmp_path / "v", ParameterVector.of(module), kind="snapshot", model=module)  # type: ignore[arg-type]


# Failures of the disk


class DiskError(OSError):
    pass


STEPS: dict[str, tuple[object, str, int, bool]] = {
    # name: owner, attribute, call that fails, whether the new content is in place by then
    "writing": (store, "save_file", 0, False),
    "opening to flush": (os, "open", 0, False),
    "flushing the file": (os, "fsync", 0, False),
    "renaming": (os, "replace", 0, False),
    "flushing the folder": (os, "fsync", 1, True),
}


@pytest.mark.parametrize("error", [DiskError, KeyboardInterrupt])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("existing", [True, False])
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_at_any_step_leaves_old_or_new(
    tmp_path: Path, step: str, existing: bool, half: bool, error: type[BaseException]
) -> None:
    owner, attribute, nth, done = STEPS[step]
    module, path = small(), tmp_path / "v.safetensors"
    old = ParameterVector.of(module)
    new = 2.0 * old
    if existing:
        save_vectors(path, old, kind="values", model=module, step=1)
    original, calls = getattr(owner, attribute), iter(range(100))

    def failing(*args, **kwargs):
        if next(calls) != nth:
            return original(*args, **kwargs)
        if half and attribute == "save_file":
            original(*args, **kwargs)
            target = Path(args[1])
            target.write_bytes(target.read_bytes()[:200])
        raise error("disk full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, attribute, failing)
        with pytest.raises(error, match="disk full"):
            save_vectors(path, new, kind="values", model=module, step=2)
    assert [file.name for file in tmp_path.iterdir()] == ([path.name] if existing or done else [])
    if existing or done:
        loaded, header = load_vectors(path, module)
        assert_equal(loaded, new if done else old)
        assert header.step == (2 if done else 1)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    module = small()
    with pytest.raises(OSError, match="file"):
        save_vectors(tmp_path / "file" / "v.safetensors", ParameterVector.of(module), kind="values", model=module)
    assert (tmp_path / "file").read_text() == "in the way"


def test_the_file_replaced_under_a_reader_does_not_change_what_it_read(tmp_path: Path) -> None:
    module = small()
    old = ParameterVector.of(module)
    path = save_vectors(tmp_path / "v.safetensors", old, kind="values", model=module)
    loaded, _ = load_vectors(path)
    save_vectors(path, 3.0 * old, kind="values", model=module)
    assert_equal(loaded, old)


# Fingerprints


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool])
def test_fingerprints_tell_every_bit_names_shapes_and_dtypes(dtype: torch.dtype) -> None:
    vector = ParameterVector.of(small()).map(lambda tensor: tensor.to(dtype))
    first = fingerprint(vector)
    assert first == fingerprint(vector.map(torch.clone))
    assert len(first) == 32
    changed = vector.map(torch.clone)
    flat = changed["1.bias"].view(torch.uint8)
    flat[0] ^= 1
    others = {fingerprint(changed)}
    names = tuple(f"x{name}" for name in vector)
    renamed = ParameterSpace(names, vector.space.shapes, vector.space.dtypes)
    others.add(fingerprint(ParameterVector(renamed, dict(zip(names, vector.values(), strict=True)))))
    turned = ParameterVector(
        ParameterSpace(
            vector.space.names, tuple(torch.Size(reversed(s)) for s in vector.space.shapes), vector.space.dtypes
        ),
        {name: tensor.reshape(tuple(reversed(tensor.shape))) for name, tensor in vector.items()},
    )
    others.add(fingerprint(turned))
    others.add(fingerprint(vector.map(lambda tensor: tensor.to(torch.float64))))
    assert first not in others
    assert len(others) == 4


def test_fingerprints_do_not_depend_on_the_memory_layout() -> None:
    matrix = torch.randn(3, 4)
    space = ParameterSpace(("w",), (torch.Size([4, 3]),), (torch.float32,))
    assert fingerprint(ParameterVector(space, {"w": matrix.t()})) == fingerprint(
        ParameterVector(space, {"w": matrix.t().contiguous()})
    )
