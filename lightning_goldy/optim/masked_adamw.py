"""AdamW with one learning rate inside a mask and one outside."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import canonical_name, suggestion
from lightning_goldy.core.sharding import align, gather, is_sharded, like, local, scatter_like
from lightning_goldy.core.space import ParameterSpace, SpaceError
from lightning_goldy.core.store import require_boolean

# Elements worked on at a time. On a CPU a share of the cache, so that what one operation writes is still there for the
# next; elsewhere few enough that the copies made on the way are small beside the model.
_CACHED = 1 << 19
_BATCHED = 1 << 24

_PASSED = ("foreach", "capturable", "fused", "amsgrad", "maximize", "weight_decay", "eps")


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

    def tensors(self, *others: str) -> dict[str, Tensor]:
        """What it has of the parameter's shape, by name, and of others."""
        names = ("parameter", "gradient", "first", "second", "largest", *others)
        return {name: tensor for name in names if (tensor := getattr(self, name)) is not None}

    def copied(self, values: Tensor) -> Part:
        """A copy with other values; the fused step divides even the gradient by the scaler's factor in place."""
        copies = {name: tensor.clone() for name, tensor in self.tensors("step").items() if name != "parameter"}
        return replace(self, parameter=values, **copies)

    def split(self, size: int) -> Iterator[Part]:
        """The part in stretches of at most so many elements; the steps are copies."""
        tensors = self.tensors(*(() if self.has_indices else ("mask",)))
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


@dataclass(frozen=True, eq=False)
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
            **{name: self.group[name] for name in _PASSED},
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
        result = roots.of(seconds)
        beta2 = self.group["betas"][1]
        torch._foreach_div_(result, [(1 - beta2 ** part.step.item()) ** 0.5 for part in parts])
        torch._foreach_add_(result, self.group["eps"])
        return result

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
        settings.step([part.copied(value) for part, value in zip(parts, values, strict=True)], other)
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
        few = [part.inside(denominator) for part, denominator in zip(parts, denominators, strict=True)]
    elif inside:
        few = settings.denominators([part.inside(part.squares) for part in parts], parts, roots)
    if inside:
        settings.move(before, [part.inside(part.first) for part in parts], few, parts, inside)
    if inside or outside:
        for part, values in zip(parts, before, strict=True):
            assert part.mask is not None
            part.parameter.view(-1).scatter_(0, part.mask, values)


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


# Share up to which a mask is held as indices: 8 bytes each, so no more than a byte for each element of the parameter.
_FEW = 1 / 8
_RATES = ("lr_inside", "lr_outside")


class MaskedAdamW(torch.optim.AdamW):
    r"""``torch.optim.AdamW`` whose whole update, weight decay included, has one rate inside a mask and one outside.

    .. math::
        \theta_j \leftarrow (1 - \gamma_j \lambda) \, \theta_j - \gamma_j \frac{\hat m_j}{\sqrt{\hat v_j} + \epsilon},
        \qquad \gamma_j = \begin{cases} \gamma_\text{inside} & j \in \text{mask} \\
        \gamma_\text{outside} & \text{otherwise} \end{cases}

    Every element ends each step with the bits that ``torch.optim.AdamW`` at its rate would give it; at rate 0 it never
    changes. The moments move everywhere, whatever the rates. A learning-rate scheduler changes ``lr``, the larger of
    the two rates, and the other follows in proportion. ``state_dict`` is that of ``torch.optim.AdamW`` with both rates
    in each group; it does not hold the mask.

    Args:
        named_parameters: ``model.named_parameters()``, or groups whose ``params`` are pairs of name and parameter; a
            group may have rates of its own.
        mask: Boolean tensors by parameter name, such as a :class:`~lightning_goldy.ParameterMask`, whole or in the
            parameter's layout. What it does not name is outside. None: :meth:`set_mask` gives it before the first step.
        lr_inside: Learning rate inside the mask, >= 0.
        lr_outside: Learning rate outside, >= 0.
        betas: Decay rates of the running means of the gradient and of its square, each in [0, 1).
        eps: Added to the denominator.
        weight_decay: Decoupled weight decay.
        **options: ``amsgrad``, ``maximize``, ``foreach``, ``fused`` and ``capturable``, as torch takes them.

    Raises:
        TypeError: The parameters have no names, or a rate is a tensor.
        ValueError: A rate is negative, or ``differentiable`` is asked for.
        SpaceError: The mask names no parameter of this optimizer, or has another shape.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> before = layer.weight.detach().clone()
        >>> mask = {"weight": torch.tensor([[True, False]])}
        >>> optimizer = MaskedAdamW(layer.named_parameters(), mask, lr_inside=0.1, lr_outside=0.0)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> _ = optimizer.step()
        >>> (layer.weight != before).tolist()
        [[True, False]]
    """

    def __init__(
        self,
        named_parameters: Iterable[Any],
        mask: Mapping[str, Tensor] | None,
        lr_inside: float = 1e-3,
        lr_outside: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        self._own_rates: dict[str, float] = {"lr_inside": lr_inside, "lr_outside": lr_outside}
        self._masks: dict[Tensor, Tensor] | None = None
        if options.pop("differentiable", False):
            raise ValueError("differentiable=True is not supported: elements are chosen in place")
        _check_rates(self._own_rates, "")
        options = {
            "lr": max(lr_inside, lr_outside),
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            **options,
        }
        super().__init__(list(named_parameters), **options)
        self.defaults.update(self._own_rates)
        if mask is not None:
            self.set_mask(mask)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group of named parameters; it may have ``lr_inside`` and ``lr_outside`` of its own.

        Raises:
            TypeError: The parameters have no names.
            ValueError: A rate is negative, or ``lr`` is given, or a parameter is complex.
        """
        if "lr" in param_group:
            raise ValueError(f"give lr_inside and lr_outside in place of lr; got lr={param_group['lr']!r}")
        rates = {name: param_group.get(name, self._own_rates[name]) for name in _RATES}
        _check_rates(rates, "the group's ")
        super().add_param_group({**param_group, **rates, "lr": max(rates.values())})
        group = self.param_groups[-1]
        if "param_names" not in group:
            self.param_groups.pop()
            raise TypeError("MaskedAdamW matches its mask by name: pass model.named_parameters(), not parameters()")
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            if parameter.is_complex():
                raise ValueError(f"{name} is complex ({parameter.dtype}); MaskedAdamW takes real parameters")

    def set_mask(self, mask: Mapping[str, Tensor]) -> None:
        """Puts a mask in place of the present one; the moments stay.

        Args:
            mask: Boolean tensors by parameter name, whole or in the parameter's layout, on any device.

        Raises:
            SpaceError: It names no parameter of this optimizer, or has another shape.
            ValueError: It is not boolean.
        """
        known = dict(self._named())
        masks: dict[Tensor, Tensor] = {}
        for name, tensor in mask.items():
            if name not in known:
                raise SpaceError(f"the mask names {name!r}, which is no parameter here; {suggestion(name, known)}")
            require_boolean(tensor, name)
            parameter = known[name]
            if tensor.shape != parameter.shape:
                raise SpaceError(f"{name}: mask of shape {tuple(tensor.shape)}, parameter {tuple(parameter.shape)}")
            both = is_sharded(tensor) and is_sharded(parameter)
            placed = align(tensor, parameter) if both else scatter_like(parameter, gather(tensor))
            masks[parameter] = self._held(parameter, local(placed).to(parameter.device))
        self._masks = masks

    def _held(self, parameter: Tensor, mask: Tensor) -> Tensor:
        """A copy of this process's mask: the indices of few elements, else a boolean for each."""
        group = next(group for group in self.param_groups if any(parameter is each for each in group["params"]))
        few = int(mask.count_nonzero()) <= _FEW * mask.numel()
        if few and Settings(group).splits_in_two and local(parameter).is_contiguous():
            return mask.reshape(-1).nonzero().flatten()
        return mask.clone(memory_format=torch.contiguous_format)

    @property
    def mask(self) -> ParameterMask | None:
        """A copy of the mask in the parameters' layout; None before one has been set."""
        if self._masks is None:
            return None
        held = {name: parameter for name, parameter in self._named() if parameter in self._masks}
        space = ParameterSpace.of_tensors(held)
        layout = {}
        for name, parameter in held.items():
            stored = self._masks[parameter]
            whole = stored.clone()
            if stored.dtype != torch.bool:
                whole = torch.zeros(local(parameter).shape, dtype=torch.bool, device=stored.device)
                whole.view(-1)[stored] = True
            layout[name] = like(parameter, whole)
        return ParameterMask(space, layout)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Makes one step.

        Args:
            closure: Evaluates the model again and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            RuntimeError: The rates differ and no mask has been set.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes up a state of this class or of ``torch.optim.AdamW``, whose groups keep the present two rates."""
        present = [{name: group[name] for name in _RATES} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, rates in zip(self.param_groups, present, strict=True):
            group.update({**rates, **group})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_masks": self._masks, "_own_rates": self._own_rates}

    def _step_group(self, group: dict[str, Any]) -> None:
        settings = Settings(group, getattr(self, "grad_scale", None), getattr(self, "found_inf", None))
        stepping = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not stepping:
            return
        if group["lr_inside"] == group["lr_outside"]:
            settings.step([self._whole(group, parameter) for parameter in stepping], group["lr"])
            return
        inside, outside = current_rates(group)
        if self._masks is None and (inside or outside):
            raise RuntimeError(
                f"MaskedAdamW has no mask, and its rates differ ({inside} inside, {outside} outside): call set_mask"
            )
        masked_step([self._local(group, parameter) for parameter in stepping], settings, inside, outside)

    def _whole(self, group: dict[str, Any], parameter: Tensor) -> Part:
        """The parameter, its gradient and its moments, which are made here as torch makes them."""
        gradient = parameter.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise RuntimeError("MaskedAdamW does not support sparse gradients, as torch.optim.AdamW does not")
        state = self.state[parameter]
        if not state:
            precise = torch.get_default_dtype() == torch.float64 and not group["fused"]
            on_device = group["capturable"] or group["fused"]
            state["step"] = torch.zeros(
                (), dtype=torch.float64 if precise else torch.float32, device=parameter.device if on_device else "cpu"
            )
            for name in ("exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        largest = state["max_exp_avg_sq"] if group["amsgrad"] else None
        return Part(parameter, gradient, state["exp_avg"], state["exp_avg_sq"], largest, None, state["step"])

    def _local(self, group: dict[str, Any], parameter: Tensor) -> Part:
        """The same of this process's part of the parameter, with the mask."""
        whole = self._whole(group, parameter)
        whole.mask = (self._masks or {}).get(parameter)
        if not is_sharded(parameter):
            return whole
        return replace(whole, **{name: local(align(part, parameter)) for name, part in whole.tensors().items()})

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.param_groups:
            yield from zip(map(canonical_name, group["param_names"]), group["params"], strict=True)


def current_rates(group: Mapping[str, Any]) -> tuple[Any, Any]:
    """The learning rates of a group inside and outside the mask, as a scheduler has left them.

    Args:
        group: A parameter group; ``lr`` is the present value of the larger of ``lr_inside`` and ``lr_outside``.

    Example:
        >>> current_rates({"lr": 0.5, "lr_inside": 1.0, "lr_outside": 0.25})
        (0.5, 0.125)
    """
    peak = max(group["lr_inside"], group["lr_outside"])
    # The larger one is ``lr`` itself, to the last bit.
    inside, outside = (
        group["lr"] if group[name] == peak else group[name] * (group["lr"] / peak if peak else 0.0) for name in _RATES
    )
    return inside, outside


def _check_rates(rates: Mapping[str, Any], whose: str) -> None:
    for name, rate in rates.items():
        if isinstance(rate, Tensor):
            raise TypeError(f"{whose}{name} is a number, because it is compared with the other rate; got a tensor")
        if not (rate >= 0 and math.isfinite(rate)):
            raise ValueError(f"{whose}{name} must be a finite number, not negative; got {rate}")
