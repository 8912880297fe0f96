"""AdamW with decay groups, masked or not, and learning-rate schedules with a warm-up."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from lightning_goldy.core.naming import canonical_name, options_of, require_choice, require_number
from lightning_goldy.optim.masked_adamw import MaskedAdamW

OptimizerName = Literal["adamw", "masked_adamw"]
ScheduleName = Literal["cosine", "linear", "constant"]


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW's settings.

    Args:
        learning_rate: The peak learning rate, reached after the warm-up.
        weight_decay: Decoupled weight decay of matrices and embeddings; biases, norms and vectors have none.
        betas: Decay rates of the running means of the gradient and of its square, each in [0, 1).
        eps: Added to the denominator, > 0.
        name: ``adamw``, or ``masked_adamw``: one learning rate inside a mask and one outside.
        mask: For ``masked_adamw``: a mask file, or the callback that makes the mask before the first step, ``golden``
            or ``reverse_golden``.
        lr_inside: Of elements inside the mask, >= 0; ``learning_rate`` by default.
        lr_outside: Of all other elements, >= 0; at 0 they never change.

    Raises:
        ValueError: A value is out of its range, or ``masked_adamw`` and a mask come one without the other.

    Example:
        >>> OptimizerOptions(learning_rate=3e-4).weight_decay
        0.01
        >>> OptimizerOptions(name="masked_adamw", mask="golden").rates
        (5e-05, 0.0)
    """

    learning_rate: float = 5e-5
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    name: OptimizerName = "adamw"
    mask: str | None = None
    lr_inside: float | None = None
    lr_outside: float = 0.0

    @property
    def rates(self) -> tuple[float, float]:
        """The peak learning rates inside and outside the mask."""
        return (self.learning_rate if self.lr_inside is None else self.lr_inside), self.lr_outside

    def __post_init__(self) -> None:
        if not isinstance(self.betas, (list, tuple)):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1); got {self.betas!r:.60}")
        object.__setattr__(self, "betas", tuple(self.betas))  # a list in YAML and in checkpoints
        named = {name: getattr(self, name) for name in ("learning_rate", "weight_decay", "eps", "lr_outside")}
        for name, value in {**named, "lr_inside": self.rates[0]}.items():
            require_number(f"optimizer.{name}", value)
        for beta in self.betas:
            require_number("each of optimizer.betas", beta)
        if not isinstance(self.mask, str | None):
            raise ValueError(f"optimizer.mask is a file or a callback's name; got {self.mask!r:.60}")
        if not self.learning_rate > 0:
            raise ValueError(f"optimizer.learning_rate must be positive; got {self.learning_rate}")
        if not self.weight_decay >= 0:
            raise ValueError(f"optimizer.weight_decay must not be negative; got {self.weight_decay}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas must be two numbers in [0, 1); got {self.betas}")
        if not self.eps > 0:
            raise ValueError(f"optimizer.eps must be positive; got {self.eps}")
        require_choice("optimizer.name", self.name, get_args(OptimizerName))
        for field, rate in zip(("lr_inside", "lr_outside"), self.rates, strict=True):
            if not 0 <= rate < math.inf:
                raise ValueError(f"optimizer.{field} must be a finite number, not negative; got {rate}")
        if self.name == "masked_adamw" and not self.mask:
            raise ValueError("optimizer.name='masked_adamw' needs optimizer.mask: a file, 'golden' or 'reverse_golden'")
        if self.name == "adamw" and (self.mask is not None or self.lr_inside is not None or self.lr_outside):
            raise ValueError(
                f"optimizer.mask={self.mask!r}, lr_inside={self.lr_inside} and lr_outside={self.lr_outside} belong to "
                "optimizer.name='masked_adamw'; the name is 'adamw'"
            )


@dataclass(frozen=True)
class ScheduleOptions:
    """How the learning rate moves over the run: a linear warm-up, then a decay.

    Args:
        name: ``cosine`` or ``linear`` decay from the peak to ``final_fraction`` of it, or ``constant``.
        warmup_steps: Optimizer steps of warm-up; excludes ``warmup_fraction``.
        warmup_fraction: Warm-up as a fraction of the run, in [0, 1].
        final_fraction: The last learning rate over the peak, in [0, 1].

    Raises:
        ValueError: The name is unknown, a value is out of its range, or both forms of warm-up are given.

    Example:
        >>> ScheduleOptions("cosine", warmup_steps=10).resolved_warmup(100)
        10
    """

    name: ScheduleName = "cosine"
    warmup_steps: int | None = None
    warmup_fraction: float | None = None
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        require_choice("schedule.name", self.name, get_args(ScheduleName))
        if self.warmup_steps is not None and self.warmup_fraction is not None:
            raise ValueError(
                f"give schedule.warmup_steps or schedule.warmup_fraction, not both; "
                f"got {self.warmup_steps} and {self.warmup_fraction}"
            )
        for field, whole in (("warmup_steps", True), ("warmup_fraction", False), ("final_fraction", False)):
            if getattr(self, field) is not None:
                require_number(f"schedule.{field}", getattr(self, field), whole=whole)
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps must not be negative; got {self.warmup_steps}")
        for field in ("warmup_fraction", "final_fraction"):
            value = getattr(self, field)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"schedule.{field} must lie in [0, 1]; got {value}")

    def resolved_warmup(self, total_steps: float) -> int:
        """The warm-up in optimizer steps of a run of ``total_steps``.

        Raises:
            ValueError: The warm-up is longer than the run, or the run has no known end and the schedule needs one.
        """
        if math.isinf(total_steps) and (self.name != "constant" or self.warmup_fraction):
            raise ValueError(
                f"schedule {self.name!r} needs a run of known length; set the trainer's max_steps or max_epochs, "
                "or use name='constant' with warmup_steps"
            )
        if self.warmup_steps is None:
            return round((self.warmup_fraction or 0.0) * total_steps) if self.warmup_fraction else 0
        if self.warmup_steps > total_steps:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps} is longer than the run of {int(total_steps)} optimizer "
                "steps; shorten the warm-up or train longer"
            )
        return self.warmup_steps


def optimizer_options(
    value: OptimizerOptions | OptimizerName | Mapping[str, Any], mask: str | Path | None = None
) -> OptimizerOptions:
    """The optimizer's options, with a mask that was given beside them.

    Raises:
        TypeError: They are of another kind.
        ValueError: A name, a field or a value is unknown or out of range, or two masks are given.

    Example:
        >>> optimizer_options("masked_adamw", "golden").mask
        'golden'
    """
    if isinstance(value, str):
        require_choice("optimizer", value, get_args(OptimizerName))
        value = {"name": value}
    fields = vars(value) if isinstance(value, OptimizerOptions) else value
    if mask is not None and isinstance(fields, Mapping):
        given = fields.get("mask")
        if given is not None and str(given) != str(mask):
            raise ValueError(f"two masks: mask={str(mask)!r} and optimizer.mask={given!r}; give one")
        fields = {**fields, "mask": str(mask)}
    return options_of(OptimizerOptions, "optimizer", fields)


def schedule_factor(options: ScheduleOptions, total_steps: float) -> Callable[[int], float]:
    r"""The learning rate of each step over its peak.

    .. math::
        s_t = \frac{t + 1}{w} \; (t < w), \qquad
        s_t = f + (1 - f) \, d\!\left(\frac{t - w}{T - w}\right) \; (t \ge w)

    with w warm-up steps, T steps in all, f the final fraction, and d(x) = (1 + cos(pi x)) / 2, 1 - x or 1.

    Args:
        options: The schedule.
        total_steps: Optimizer steps of the run; infinite for a run without a known end.

    Returns:
        A function of the number of optimizer steps already made.

    Raises:
        ValueError: The warm-up is longer than the run, or the run has no known end and the schedule needs one.

    Example:
        >>> factor = schedule_factor(ScheduleOptions("linear", warmup_steps=2, final_fraction=0.0), 6)
        >>> [factor(step) for step in range(7)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    warmup = options.resolved_warmup(total_steps)

    # A closure, not a callable object: LambdaLR writes an object's attributes into checkpoints and restores them,
    # which would keep the old run's length when a run is resumed with more steps.
    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if options.name == "constant":
            return 1.0
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        decay = (1 + math.cos(math.pi * progress)) / 2 if options.name == "cosine" else 1 - progress
        return options.final_fraction + (1 - options.final_fraction) * decay

    return factor


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the trainable parameters into those that decay and those that do not.

    Args:
        module: Any module; tied parameters are taken once.
        weight_decay: Of matrices and embeddings. Biases, parameters of normalisation layers and vectors have none.

    Returns:
        Parameter groups for an optimizer; a group without parameters is left out.

    Raises:
        ValueError: No parameter is trainable.

    Example:
        >>> groups = decay_groups(nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)), 0.1)
        >>> [(group["weight_decay"], len(group["params"])) for group in groups]
        [(0.1, 1), (0.0, 3)]
    """
    decays: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    norms = {name for name, child in module.named_modules() if "norm" in type(child).__name__.lower()}
    for name, parameter in module.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if parameter.requires_grad:
            decays[parameter.ndim >= 2 and not leaf.endswith("bias") and owner not in norms].append(parameter)
    if not any(decays.values()):
        total = sum(1 for _ in module.parameters())
        raise ValueError(f"{type(module).__name__} has no trainable parameter: all {total} have requires_grad=False")
    return [{"params": held, "weight_decay": weight_decay if on else 0.0} for on, held in decays.items() if held]


def build_optimizer(module: nn.Module, options: OptimizerOptions) -> torch.optim.AdamW:
    """AdamW, masked where the options say so, over the trainable parameters of a module, with decay groups.

    Returns:
        The optimizer; a masked one has no mask yet.

    Raises:
        ValueError: No parameter is trainable.

    Example:
        >>> build_optimizer(nn.Linear(2, 2), OptimizerOptions(learning_rate=1e-3)).param_groups[0]["lr"]
        0.001
    """
    groups = decay_groups(module, options.weight_decay)
    if options.name == "adamw":
        return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.betas, eps=options.eps)
    names = {parameter: canonical_name(name) for name, parameter in module.named_parameters()}
    named = [{**group, "params": [(names[each], each) for each in group["params"]]} for group in groups]
    return MaskedAdamW(named, None, *options.rates, betas=options.betas, eps=options.eps)
