from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_goldy.core import ParameterSpace
from lightning_goldy.core.mask import MaskedModel, PackedMask, Positions, flat_positions, marked


@pytest.mark.parametrize("share", [0.0, 0.01, 0.4, 1.0])
def test_a_packed_mask_is_the_mask(share: float) -> None:
    mask = torch.rand(37, 53, generator=torch.Generator().manual_seed(0)) < share
    packed = PackedMask([("w", mask), ("b", torch.tensor(True))])
    assert list(packed) == ["w", "b"]
    assert torch.equal(packed["w"], mask)
    assert packed["b"].shape == ()
    assert packed.count("w") == int(mask.sum())
    assert torch.equal(flat_positions(packed, "w"), mask.flatten().nonzero().flatten())
    held = packed._parts["w"][0]
    assert held.numel() * held.itemsize <= mask.numel() / 8 + 1


@pytest.mark.parametrize("share", [0.0, 0.01, 0.4])
def test_positions_are_the_mask_that_they_list(share: float) -> None:
    mask = torch.rand(37, 53, generator=torch.Generator().manual_seed(0)) < share
    flat = mask.flatten().nonzero().flatten()
    shuffled = flat[torch.randperm(len(flat))]
    parts = marked([shuffled[::2], shuffled[1::2]], mask.shape)
    assert isinstance(parts, Positions) == (share < 1 / 32)
    dense = parts.dense() if isinstance(parts, Positions) else parts
    assert torch.equal(dense, mask)
    before = PackedMask([("w", mask), ("b", torch.tensor([True, False]))])
    for packed in (PackedMask([("w", Positions(flat, mask.shape))]), before.replaced([("w", parts)])):
        assert torch.equal(packed["w"], mask)
        assert packed.count("w") == len(flat)
        assert torch.equal(packed._parts["w"][0], before._parts["w"][0])
        assert packed._parts["w"][0].dtype == before._parts["w"][0].dtype


@pytest.mark.parametrize("share", [0.01, 0.4])
def test_only_the_values_of_zeroed_elements_are_kept_and_all_come_back(share: float) -> None:
    model = nn.ModuleDict({"a": nn.Linear(40, 30), "b": nn.Linear(30, 30)})
    # One that cannot be seen as flat, and values that a sum or a product would not give back.
    model["b"].weight = nn.Parameter(torch.randn(30, 30).t())
    with torch.no_grad():
        model["a"].weight.view(-1)[:3] = torch.tensor([-0.0, float("inf"), float("nan")])
    space = ParameterSpace.of(model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(1)
    masks = [{name: torch.rand(p.shape, generator=generator) < share for name, p in before.items()} for _ in range(2)]
    for mask in masks:
        mask["a.weight"].view(-1)[:3] = True
    with MaskedModel(model, space) as masked:
        packed = PackedMask(masks[1].items())
        partly = packed.replaced(iter([("a.weight", masks[0]["a.weight"])]))
        assert partly.shares(packed, "b.weight")
        assert not partly.shares(packed, "a.weight")
        for mask in (masks[0], packed, partly, masks[0]):
            masked.zero(mask)
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter.detach(), before[name].masked_fill(mask[name], 0))
                assert torch.equal(masked.value(name).view(torch.int32), before[name].view(torch.int32))
                for factor in (torch.rand(parameter.shape), torch.rand(parameter.shape[::-1]).t()):
                    product = (factor * before[name]).contiguous()
                    found = masked.multiply_(name, factor.clone(memory_format=torch.preserve_format))
                    assert torch.equal(found.contiguous().view(torch.int32), product.view(torch.int32))
            kept = sum(values.numel() for _, values in masked._kept.values())
            assert kept == sum(int(mask[name].sum()) for name in before)
    for name, parameter in model.named_parameters():
        assert torch.equal(
            parameter.detach().contiguous().view(torch.int32), before[name].contiguous().view(torch.int32)
        )
