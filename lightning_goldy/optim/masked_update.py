"""One AdamW step with two learning rates: torch's own step for one of them, its formula once more for the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Elements worked on at a time. On a CPU a share of the cache, so that what one operation writes is still there for the
# next; elsewhere few enough that the copies made on the way are small beside the model.
_CACHED = 1 << 19
_BATCHED = 1 << 24


@dataclass
class Part:
    """What one step reads and writes of one parameter, or of a stretch of it.

    Args:
        parameter: Its values.
        gradient: Of the same shape, as are the next ones.
        first: Running mean of the gradient.
        second: Running mean of its square.
        largest: The largest ``second`` so far, for AMSGrad.
        mask: True inside; None where the mask says nothing, which is outside.
        step: Steps already made, a tensor of one element.
    """

    parameter: Tensor
    gradient: Tensor
    first: Tensor
    second: Tensor
    largest: Tensor | None
    mask: Tensor | None
    step: Tensor

    def split(self, size: int) -> Iterator[Part]:
        """The part in stretches of at most so many elements; the steps are copies."""
        names = ("parameter", "gradient", "first", "second", "largest", "mask")
        tensors = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        if self.parameter.numel() <= size or not all(tensor.is_contiguous() for tensor in tensors.values()):
            yield replace(self, step=self.step.clone())
            return
        flats = {name: tensor.view(-1) for name, tensor in tensors.items()}
        for start in range(0, self.parameter.numel(), size):
            stretch = {name: flat[start : start + size] for name, flat in flats.items()}
            yield replace(self, step=self.step.clone(), **stretch)


@dataclass(frozen=True)
class Settings:
    """AdamW's settings of one group, as ``torch.optim.adamw.adamw`` takes them.

    Args:
        group: The parameter group.
        grad_scale: Of a gradient scaler, for the fused step.
        found_inf: Likewise.
    """

    group: dict[str, Any]
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @property
    def splits_in_two(self) -> bool:
        """Whether moments and parameters move in steps of their own, so that the second can be made alone."""
        return not (self.group["fused"] or self.group["capturable"])

    def step(self, parts: Sequence[Part], rate: Any) -> None:
        """Torch's own step at one rate."""
        beta1, beta2 = self.group["betas"]
        adamw(
            [part.parameter for part in parts],
            [part.gradient for part in parts],
            [part.first for part in parts],
            [part.second for part in parts],
            [part.largest for part in parts if part.largest is not None],
            [part.step for part in parts],
            lr=rate,
            beta1=beta1,
            beta2=beta2,
            grad_scale=self.grad_scale,
            found_inf=self.found_inf,
            **{name: self.group[name] for name in ("foreach", "capturable", "fused", "amsgrad", "maximize")},
            **{name: self.group[name] for name in ("weight_decay", "eps")},
        )

    def move(self, values: list[Tensor], parts: Sequence[Part], rate: float) -> None:
        """The second half of torch's step, after the moments: decays and moves ``values`` in place.

        In torch's order of operations, so that every element ends with the bits that torch's step would give it.
        """
        beta1, beta2 = self.group["betas"]
        steps = [part.step.item() for part in parts]
        sizes = [(rate / (1 - beta1**step)) * -1 for step in steps]
        corrections = [(1 - beta2**step) ** 0.5 for step in steps]
        if self.group["weight_decay"] != 0:
            torch._foreach_mul_(values, 1 - rate * self.group["weight_decay"])
        denominators = torch._foreach_sqrt([part.second if part.largest is None else part.largest for part in parts])
        torch._foreach_div_(denominators, corrections)
        torch._foreach_add_(denominators, self.group["eps"])
        torch._foreach_addcdiv_(values, [part.first for part in parts], denominators, sizes)


def masked_step(parts: Sequence[Part], settings: Settings, inside: float, outside: float) -> None:
    """Makes one step in which elements inside the masks move at one rate and all others at another.

    Every element ends with the bits that ``torch.optim.AdamW`` at its rate would give it; at rate 0 it keeps its own.
    The moments move everywhere. Copies are held of a few parameters at a time.

    Args:
        parts: Changed in place.
        settings: Of the parameters' group.
        inside: Learning rate where the mask is true.
        outside: Learning rate elsewhere.
    """
    marked = [part for part in parts if part.mask is not None]
    for batch in _batches([part for part in parts if part.mask is None], settings):
        _uniform_step(batch, settings, outside)
    for batch in _batches(marked, settings):
        _mixed_step(batch, settings, inside, outside)
    # The stretches of a parameter counted on copies, because all of them start from the same number.
    steps = [part.step for part in parts]
    torch._foreach_add_(steps, 1)
    if settings.found_inf is not None:
        torch._foreach_sub_(steps, [settings.found_inf.to(step.device).reshape(()) for step in steps])


def _uniform_step(parts: list[Part], settings: Settings, rate: float) -> None:
    before = None if rate else [part.parameter.clone() for part in parts]
    settings.step(parts, rate)
    if before is not None:
        torch._foreach_copy_([part.parameter for part in parts], before)


def _mixed_step(parts: list[Part], settings: Settings, inside: float, outside: float) -> None:
    if not (inside or outside):
        _uniform_step(parts, settings, 0.0)
        return
    values = [part.parameter.clone() for part in parts]
    # Torch steps at a rate that is not 0; ``values`` become what the other rate makes of the elements.
    main, other = (inside, outside) if inside else (outside, inside)
    if other and not settings.splits_in_two:
        settings.step([_copied(part, value) for part, value in zip(parts, values, strict=True)], other)
    settings.step(parts, main)
    if other and settings.splits_in_two:
        settings.move(values, parts, other)
    for part, value in zip(parts, values, strict=True):
        chosen = (part.parameter, value) if inside else (value, part.parameter)
        assert part.mask is not None
        torch.where(part.mask, *chosen, out=part.parameter)


def _copied(part: Part, values: Tensor) -> Part:
    # The fused step divides the gradient by the scaler's factor in place.
    gradient, first, second = (tensor.clone() for tensor in (part.gradient, part.first, part.second))
    largest = None if part.largest is None else part.largest.clone()
    return Part(values, gradient, first, second, largest, part.mask, part.step.clone())


def _batches(parts: Sequence[Part], settings: Settings) -> Iterator[list[Part]]:
    """Stretches of the parts, gathered until they fill a batch."""
    batch: list[Part] = []
    filled = 0
    for part in parts:
        limit = _CACHED if part.parameter.device.type == "cpu" else _BATCHED
        # The fused kernel rounds otherwise where its vectors do not fit, so that cuts would show in the last bit.
        for piece in part.split(part.parameter.numel() if settings.group["fused"] else limit):
            if batch and filled + piece.parameter.numel() > limit:
                yield batch
                batch, filled = [], 0
            batch.append(piece)
            filled += piece.parameter.numel()
    if batch:
        yield batch
