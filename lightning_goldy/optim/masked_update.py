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
        mask: True inside; or, of a contiguous parameter, the ascending flat indices of what is inside; None where the
            mask says nothing, which is outside.
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
        names = ("parameter", "gradient", "first", "second", "largest", *(() if self.has_indices else ("mask",)))
        tensors = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        if self.parameter.numel() <= size or not all(tensor.is_contiguous() for tensor in tensors.values()):
            yield replace(self, step=self.step.clone())
            return
        flats = {name: tensor.view(-1) for name, tensor in tensors.items()}
        starts = range(0, self.parameter.numel(), size)
        indices: list[Tensor] = []
        if self.has_indices:
            assert self.mask is not None
            ends = torch.searchsorted(self.mask, torch.tensor([*starts[1:]], device=self.mask.device)).tolist()
            indices = [*torch.tensor_split(self.mask, ends)]
        for number, start in enumerate(starts):
            stretch = {name: flat[start : start + size] for name, flat in flats.items()}
            if indices:
                stretch["mask"] = indices[number] - start
            yield replace(self, step=self.step.clone(), **stretch)

    @property
    def squares(self) -> Tensor:
        """The running mean that the step takes the root of."""
        return self.second if self.largest is None else self.largest

    @property
    def has_indices(self) -> bool:
        """Whether the mask is held as indices."""
        return self.mask is not None and self.mask.dtype != torch.bool

    def inside(self, tensor: Tensor) -> Tensor:
        """A copy of what such a tensor has inside a mask of indices."""
        assert self.mask is not None
        return tensor.reshape(-1).index_select(0, self.mask)


class Roots:
    """Square roots of tensors, on a CPU in memory that is used again: new pages cost more than the roots."""

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}

    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        """The roots, which hold until the next call."""
        if tensors[0].device.type != "cpu":
            return [*torch._foreach_sqrt(tensors)]
        used: dict[torch.dtype, int] = {}
        results = []
        for tensor in tensors:
            start = used.get(tensor.dtype, 0)
            used[tensor.dtype] = end = start + tensor.numel()
            if tensor.dtype not in self._held or end > self._held[tensor.dtype].numel():
                # Earlier results keep the memory that this one replaces.
                self._held[tensor.dtype] = tensor.new_empty(max(end, _CACHED))
            result = self._held[tensor.dtype][start:end].view(tensor.shape)
            results.append(torch.sqrt(tensor, out=result))
        return results


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

    def advance(self, parts: Sequence[Part]) -> None:
        """The first half of torch's step: counts it and moves the moments, in torch's order of operations."""
        beta1, beta2 = self.group["betas"]
        gradients = [part.gradient for part in parts]
        if self.group["maximize"]:
            gradients = [*torch._foreach_neg(gradients)]
        seconds = [part.second for part in parts]
        torch._foreach_add_([part.step for part in parts], 1)
        torch._foreach_lerp_([part.first for part in parts], gradients, 1 - beta1)
        torch._foreach_mul_(seconds, beta2)
        torch._foreach_addcmul_(seconds, gradients, gradients, 1 - beta2)
        if self.group["amsgrad"]:
            torch._foreach_maximum_([part.largest for part in parts if part.largest is not None], seconds)

    def denominators(self, seconds: list[Tensor], parts: Sequence[Part], roots: Roots) -> list[Tensor]:
        """What torch's step divides the first moments by, from the second ones; these hold until the next call."""
        found = roots.of(seconds)
        beta2 = self.group["betas"][1]
        torch._foreach_div_(found, [(1 - beta2 ** part.step.item()) ** 0.5 for part in parts])
        torch._foreach_add_(found, self.group["eps"])
        return found

    def move(
        self, values: list[Tensor], firsts: list[Tensor], denominators: list[Tensor], parts: Sequence[Part], rate: float
    ) -> None:
        """The second half of torch's step, after the moments: decays and moves ``values`` in place.

        In torch's order of operations, so that every element ends with the bits that torch's step would give it.
        """
        beta1 = self.group["betas"][0]
        sizes = [(rate / (1 - beta1 ** part.step.item())) * -1 for part in parts]
        if self.group["weight_decay"] != 0:
            torch._foreach_mul_(values, 1 - rate * self.group["weight_decay"])
        torch._foreach_addcdiv_(values, firsts, denominators, sizes)


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
    marked = [part for part in parts if part.mask is not None and not part.has_indices]
    indexed = [part for part in parts if part.has_indices]
    for batch in _batches([part for part in parts if part.mask is None], settings):
        _uniform_step(batch, settings, outside)
    roots = Roots()
    for batch in _batches(marked, settings):
        _mixed_step(batch, settings, inside, outside, roots)
    for batch in _batches(indexed, settings):
        _indexed_step(batch, settings, inside, outside, roots)
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


def _mixed_step(parts: list[Part], settings: Settings, inside: float, outside: float, roots: Roots) -> None:
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
        denominators = settings.denominators([part.squares for part in parts], parts, roots)
        settings.move(values, [part.first for part in parts], denominators, parts, other)
    for part, value in zip(parts, values, strict=True):
        chosen = (part.parameter, value) if inside else (value, part.parameter)
        assert part.mask is not None
        torch.where(part.mask, *chosen, out=part.parameter)


def _indexed_step(parts: list[Part], settings: Settings, inside: float, outside: float, roots: Roots) -> None:
    """The same where few elements are inside: they are taken out, moved on their own, and put back."""
    before = [part.inside(part.parameter) for part in parts]
    settings.advance(parts)
    if outside:
        denominators = settings.denominators([part.squares for part in parts], parts, roots)
        everything, firsts = [part.parameter for part in parts], [part.first for part in parts]
        settings.move(everything, firsts, denominators, parts, outside)
        few = [part.inside(each) for part, each in zip(parts, denominators, strict=True)]
    elif inside:
        few = settings.denominators([part.inside(part.squares) for part in parts], parts, roots)
    if inside:
        settings.move(before, [part.inside(part.first) for part in parts], few, parts, inside)
    if inside or outside:
        for part, values in zip(parts, before, strict=True):
            assert part.mask is not None
            part.parameter.view(-1).scatter_(0, part.mask, values)


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
