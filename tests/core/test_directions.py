from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_goldy.core import ParameterSpace, SpaceError, random_direction
from lightning_goldy.core.vector import BLOCK, Ray, fill_direction_
from tests.references.common import direction_reference
from tests.references.models import build
from tests.references.volume import flat_parameters

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


# A model moved along a direction


class Stretch:
    """A diagonal preconditioner that is told its scales."""

    name, whole_tensors = "stretch", False

    def __init__(self, space: ParameterSpace, scales: dict[str, Tensor]) -> None:
        self.space, self.scales = space, scales

    def apply(self, name: str, direction: Tensor, start: int) -> Tensor:
        return direction.mul_(self.scales[name].reshape(-1)[start : start + len(direction)])


class Rotate:
    """Needs whole tensors: reverses the rows and scales them."""

    name, whole_tensors = "rotate", True

    def __init__(self, space: ParameterSpace) -> None:
        self.space = space

    def apply(self, name: str, direction: Tensor, start: int) -> Tensor:
        assert start == 0
        return 2 * direction.flip(0) if direction.ndim else 2 * direction


def raw_direction(space: ParameterSpace, seed: int) -> dict[str, Tensor]:
    return dict(random_direction(space, seed, dtype=torch.float32))


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("kind", ["plain", "stretch", "rotate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_moves_are_the_anchor_and_the_direction_summed_in_high_precision_and_rounded_once(
    kind: str, explicit: bool, dtype: torch.dtype
) -> None:
    module = build("gpt2").to(dtype)
    space = ParameterSpace.of(module, exclude=["*.wpe.*"])
    raw = raw_direction(space, 5)
    scales = {name: torch.rand(tensor.shape) + 0.5 for name, tensor in raw.items()}
    preconditioner = {"plain": None, "stretch": Stretch(space, scales), "rotate": Rotate(space)}[kind]
    mapped = {
        name: {"plain": value, "stretch": value * scales[name], "rotate": 2 * value.flip(0)}[kind]
        for name, value in raw.items()
    }
    norm = torch.cat([value.double().reshape(-1) for value in raw.values()]).norm()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    anchor = flat_parameters(module, space)
    with Ray(module, space, preconditioner=preconditioner, explicit=explicit) as ray:
        proposal = ray.turn(5)
        whole = torch.cat([value.double().reshape(-1) for value in mapped.values()]) / norm
        assert proposal.raw_norm == pytest.approx(float(norm), rel=1e-12)
        assert proposal.length == pytest.approx(float(whole.norm()), rel=1e-6)
        assert proposal.projection == pytest.approx(float(whole @ anchor), rel=1e-5, abs=1e-7)
        assert ray.anchor_square == pytest.approx(float(anchor @ anchor), rel=1e-12)
        for anchor_scale, step in ((1.0, 0.3), (0.9, -2.0), (1.0, 0.3)):
            ray.move(anchor_scale, step)
            for name, parameter in space.resolve(module).items():
                wide = torch.promote_types(dtype, torch.float32)
                base = before[name].to(wide) * anchor_scale
                expected = (base + mapped[name].to(wide) * (step / proposal.raw_norm)).to(dtype)
                # Where the summands cancel, their own rounding is left.
                smallest = float(base.abs().max())
                tolerance = {torch.float64: 1e-14, torch.float32: 2e-7, torch.bfloat16: 8e-3}[dtype]
                torch.testing.assert_close(parameter.detach(), expected, rtol=tolerance, atol=tolerance * smallest)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_implicit_and_explicit_walks_are_the_same_bit_for_bit() -> None:
    found = []
    for explicit in (False, True):
        module = build("llama")
        with Ray(module, ParameterSpace.of(module), explicit=explicit) as ray:
            proposal = ray.turn(2)
            ray.move(1.0, 0.7)
            found.append((proposal, flat_parameters(module)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_the_module_comes_back_after_an_error() -> None:
    module = nn.Linear(3, 2)
    before = module.weight.detach().clone()

    def fail() -> None:
        with Ray(module, ParameterSpace.of(module)) as ray:
            ray.turn(0)
            ray.move(1.0, 1.0)
            assert not torch.equal(module.weight, before)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert torch.equal(module.weight, before)


def test_parameters_that_are_not_contiguous_are_moved_in_place() -> None:
    module = nn.Linear(3, 2, bias=False)
    module.weight = nn.Parameter(torch.arange(6.0).view(3, 2).t())
    space = ParameterSpace.of(module)
    with Ray(module, space) as ray:
        length = ray.turn(1).raw_norm
        ray.move(1.0, length)
        expected = torch.arange(6.0).view(3, 2).t() + raw_direction(space, 1)["weight"]
        torch.testing.assert_close(module.weight.detach(), expected)
    assert torch.equal(module.weight, torch.arange(6.0).view(3, 2).t())


def test_a_cast_weight_is_not_used_again_inside_autocast() -> None:
    module = nn.Linear(4, 4)
    x = torch.ones(1, 4)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(), Ray(module, ParameterSpace.of(module)) as ray:
        at_anchor = module(x)
        ray.turn(0)
        ray.move(1.0, 10.0)
        assert not torch.equal(module(x), at_anchor)
        ray.return_to_anchor()
        assert torch.equal(module(x), at_anchor)


def test_errors_tell_what_is_wrong() -> None:
    module, other = nn.Linear(2, 2), nn.Linear(2, 3)
    with pytest.raises(SpaceError, match="weight"):
        Ray(module, ParameterSpace.of(module), preconditioner=Rotate(ParameterSpace.of(other)))
    with Ray(module, ParameterSpace.of(module)) as ray, pytest.raises(RuntimeError, match="turn"):
        ray.move(1.0, 1.0)
