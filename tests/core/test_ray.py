from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_goldy.core import ParameterSpace, SpaceError, random_direction
from lightning_goldy.core.directions import Ray
from tests.references.models import build
from tests.references.volume import flat_parameters


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
