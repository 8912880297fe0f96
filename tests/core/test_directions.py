from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_goldy.core import ParameterSpace, random_direction
from lightning_goldy.core.directions import BLOCK, fill_direction_
from tests.references.common import direction_reference
from tests.references.models import build

SHAPES = [
    (),
    (1,),
    (5,),
    (0, 3),
    (BLOCK,),
    (BLOCK + 1,),
    (17 * BLOCK + 3,),  # more than one buffer of whole blocks
    (300, 300),
    (3, 50_000),
    (2, 3, 70_001),
    (1, 17 * BLOCK + 5),  # one row larger than the buffer
]


def space_of(name: str, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> ParameterSpace:
    return ParameterSpace((name,), (torch.Size(shape),), (dtype,))


def draw(name: str, n: int, seed: int) -> Tensor:
    return random_direction(space_of(name, (n,)), seed)[name]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, -3, 2**70])
def test_equals_whole_blocks_drawn_one_after_another(shape: tuple[int, ...], seed: int) -> None:
    found = random_direction(space_of("layer.weight", shape), seed)["layer.weight"]
    assert torch.equal(found, direction_reference("layer.weight", shape, seed))


def test_the_elements_of_a_name_do_not_depend_on_the_other_parameters_or_their_order() -> None:
    module = build("gpt2")
    whole = random_direction(ParameterSpace.of(module), 11)
    for include in (["*.mlp.*"], ["transformer.wte.weight", "*.h.1.*"]):
        part = random_direction(ParameterSpace.of(module, include), 11)
        assert all(torch.equal(part[name], whole[name]) for name in part)
    backwards = ParameterSpace(
        *(tuple(reversed(items)) for items in (whole.space.names, whole.space.shapes, whole.space.dtypes))
    )
    assert all(torch.equal(value, whole[name]) for name, value in random_direction(backwards, 11).items())


def test_a_wrapped_module_has_the_same_direction() -> None:
    module = nn.Sequential(nn.Linear(3, 4))
    plain = random_direction(ParameterSpace.of(module), 2)
    compiled = torch.compile(module, backend="eager")
    found = random_direction(ParameterSpace.of(compiled), 2, module=compiled)
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_the_float32_draws_rounded_once(dtype: torch.dtype) -> None:
    space = space_of("w", (70_000,), dtype)
    expected = direction_reference("w", (70_000,), 4)
    assert torch.equal(random_direction(space, 4)["w"], expected.to(dtype))
    assert torch.equal(random_direction(space, 4, dtype=torch.float32)["w"], expected)
    module = nn.Module()
    module.w = nn.Parameter(torch.zeros(70_000, dtype=dtype))
    assert torch.equal(random_direction(space, 4, module=module)["w"], expected.to(dtype))


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_do_not_matter(default: torch.dtype) -> None:
    expected = draw("w", 1000, 0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert torch.equal(draw("w", 1000, 0), expected)
        with torch.device("meta"):
            assert torch.equal(draw("w", 1000, 0), expected)
    finally:
        torch.set_default_dtype(before)


def test_the_global_random_state_neither_matters_nor_moves() -> None:
    expected = draw("w", 100, 0)
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    assert torch.equal(draw("w", 100, 0), expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_filling_writes_into_the_given_memory() -> None:
    tensor = torch.empty(4, 3).t()
    assert fill_direction_(tensor, "w", 9) is tensor
    assert torch.equal(tensor, direction_reference("w", (3, 4), 9))


def test_a_million_elements_look_normal() -> None:
    values = draw("layer.weight", 1_000_000, 0).double()
    n = len(values)
    assert abs(float(values.mean())) < 5 / math.sqrt(n)
    assert abs(float(values.var()) - 1) < 5 * math.sqrt(2 / n)
    assert abs(float((values**3).mean())) < 5 * math.sqrt(15 / n)
    assert abs(float((values**4).mean()) - 3) < 5 * math.sqrt(96 / n)
    assert abs(float((values.abs() < 1).double().mean()) - math.erf(1 / math.sqrt(2))) < 5 * math.sqrt(0.22 / n)
    assert len(values.unique()) > 0.95 * n


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("layer.0.weight", 0), ("layer.1.weight", 0)),
        (("layer.weight", 0), ("layer.weight", 1)),
        (("layer.weight", 1), ("layer.weight", -1)),
        # Names and numbers must not run together.
        (("1.weight", 1), (".weight", 11)),
    ],
)
def test_other_names_and_seeds_are_uncorrelated(first: tuple[str, int], second: tuple[str, int]) -> None:
    n = 300_000
    a, b = (draw(name, n, seed).double() for name, seed in (first, second))
    assert not torch.equal(a, b)
    for shift in (0, 1, BLOCK):
        assert abs(float((a[shift:] * b[: n - shift]).mean())) < 5 / math.sqrt(n - shift)


def test_blocks_are_uncorrelated() -> None:
    blocks = draw("w", 8 * BLOCK, 3).double().view(8, BLOCK)
    correlation = torch.corrcoef(blocks) - torch.eye(8)
    assert float(correlation.abs().max()) < 5 / math.sqrt(BLOCK)


def test_one_seed_gives_one_direction_per_call() -> None:
    space = ParameterSpace.of(nn.Linear(3, 3))
    a, b = random_direction(space, 1), random_direction(space, 1)
    assert all(torch.equal(a[name], b[name]) for name in space)
    assert a["weight"].data_ptr() != b["weight"].data_ptr()
