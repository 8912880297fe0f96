"""From what head plasticity was told to a plan of steps and heads for one model and one training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_goldy.analysis.head_scores import DEFAULT_WEIGHTS, check_weights
from lightning_goldy.analysis.head_slices import head_rows
from lightning_goldy.analysis.plasticity import PlasticityPlan
from lightning_goldy.analysis.pruning_schedule import Guard, Ramp
from lightning_goldy.callbacks.plasticity_settings import PruningSchedule, Recovery, Regrowth, Scoring
from lightning_goldy.core.gates import HeadError, HeadGates


@dataclass(frozen=True)
class PlasticitySettings:
    """Everything that decides what is cut and regrown, and when.

    Args:
        strategy: Of the head scores.
        pruning_level: Share of all heads that is closed after the last cut of a cycle, a fraction in (0, 1).
        cycles: Number of cycles.
        min_heads_per_layer: Heads that stay open in every layer.
        scoring: How heads are scored and the loss is measured.
        schedule: When.
        regrowth: What regrows, and from what.
        recovery: How the model trains after a cut.

    Raises:
        ValueError: A value is unknown or out of range.

    Example:
        >>> groups = (Scoring(), PruningSchedule(), Regrowth(), Recovery())
        >>> PlasticitySettings("entropy", 1.0, 1, 1, *groups)
        Traceback (most recent call last):
        ValueError: pruning_level is the share of all heads to cut, above 0 and below 1; got 1.0
    """

    strategy: str
    pruning_level: float
    cycles: int
    min_heads_per_layer: int
    scoring: Scoring
    schedule: PruningSchedule
    regrowth: Regrowth
    recovery: Recovery

    def __post_init__(self) -> None:
        check_weights(self.strategy, self.scoring.weights)
        if not 0 < self.pruning_level < 1:
            raise ValueError(
                f"pruning_level is the share of all heads to cut, above 0 and below 1; got {self.pruning_level}"
            )
        for name in ("cycles", "min_heads_per_layer"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")

    @property
    def needs_base(self) -> bool:
        """Whether regrown heads take their weights from the base."""
        return self.regrowth.fraction > 0 and self.regrowth.initialisation == "golden"

    @property
    def needs_patterns(self) -> bool:
        """Whether scores are made of attention patterns, which not every family shows."""
        weights = self.scoring.weights or DEFAULT_WEIGHTS
        return self.strategy == "entropy" or (self.strategy == "combined" and weights.get("entropy", 0) > 0)

    def to_dict(self) -> dict[str, Any]:
        """As plain numbers and text."""
        return asdict(self)

    def require_same(self, saved: Mapping[str, Any]) -> None:
        """Checks that a run goes on as it began.

        Raises:
            ValueError: A setting differs; the first is named with both values.
        """
        for name, value in _flat(self.to_dict()).items():
            before = _flat(saved).get(name)
            if before != value:
                raise ValueError(
                    f"{name}={value!r}, but the resumed run began with {before!r}; head plasticity cannot change in "
                    "the middle of a run"
                )

    def plan(self, gates: HeadGates, total_steps: float) -> PlasticityPlan:
        """The plan for a model and a training.

        Args:
            gates: Of the model.
            total_steps: Optimizer steps of the training, infinite when it has no end of its own.

        Raises:
            HeadError: The level is impossible for the model.
            ValueError: The parts of the schedule do not fit together.
        """
        target, unit = heads_to_cut(gates, self.pruning_level, self.min_heads_per_layer, self.scoring.unit)
        warmup, length, ramp, regrow = self.schedule.resolved(total_steps, self.cycles)
        return PlasticityPlan(
            target=target,
            cycles=self.cycles,
            warmup_steps=warmup,
            steps_per_cycle=length,
            ramp=Ramp(self.schedule.shape, ramp, self.schedule.cuts, unit),
            regrow_at=regrow,
            regrow_fraction=self.regrowth.fraction,
            guard=self.recovery.guard(length),
        )


def plan_from(saved: Mapping[str, Any]) -> PlasticityPlan:
    """Undoes ``dataclasses.asdict`` of a plan.

    Example:
        >>> plan = PlasticityPlan(target=4, cycles=1, warmup_steps=3, steps_per_cycle=10, regrow_at=6)
        >>> plan_from(asdict(plan)) == plan
        True
    """
    return PlasticityPlan(**{**saved, "ramp": Ramp(**saved["ramp"]), "guard": Guard(**saved["guard"])})


def heads_to_cut(gates: HeadGates, level: float, min_heads_per_layer: int, unit: str) -> tuple[int, int]:
    """How many heads a pruning level means for a model, and how many are cut together.

    Args:
        gates: Of the model.
        level: Share of all heads, a fraction.
        min_heads_per_layer: Heads that stay open in every layer.
        unit: ``head`` or ``group``.

    Raises:
        HeadError: So many heads cannot be cut, or none would be.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> heads_to_cut(HeadGates(GPT2LMHeadModel(config)), 0.5, 1, "head")
        (2, 1)
    """
    sizes = gates.heads_per_layer
    groups = [block.n_key_value_heads for block in gates.architecture.blocks]
    together = [heads // count if unit == "group" else 1 for heads, count in zip(sizes, groups, strict=True)]
    spare = sum(max(0, size - min_heads_per_layer) // step * step for size, step in zip(sizes, together, strict=True))
    step = max(together)
    wanted = step * math.floor(level * sum(sizes) / step + 0.5)
    of = f"{sum(sizes)} heads in {len(sizes)} layers"
    if spare == 0 and max(sizes) == 1:
        raise HeadError(f"every layer has a single head, which must stay open: there is nothing to cut in {of}")
    if spare == 0 and unit == "group" and max(groups) == 1:
        raise HeadError(
            "every layer has one key/value group (multi-query attention), which must stay open: no group can be cut "
            f"of {of}; take unit='head'"
        )
    if wanted < 1:
        raise HeadError(f"pruning_level={level} of {of} rounds to no {unit}; the least is {step / sum(sizes):.3g}")
    if wanted > spare:
        raise HeadError(
            f"pruning_level={level} asks for {wanted} of {of}, but {spare} can be cut while min_heads_per_layer="
            f"{min_heads_per_layer} stay open in each; the most is {spare / sum(sizes):.3g}"
        )
    return wanted, step


def check_regrowth(gates: HeadGates, regrowth: Regrowth) -> None:
    """Checks that what regrows can be given new weights.

    Raises:
        ValueError: A weight that would have to change is frozen, as those below an adapter are.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=11, bos_token_id=0, eos_token_id=0)
        >>> check_regrowth(HeadGates(GPT2LMHeadModel(config)), Regrowth(initialisation="noise"))
    """
    if regrowth.fraction == 0 or regrowth.initialisation == "golden":
        return
    for rows in head_rows(gates.architecture, gates.heads, gates.heads):
        if not rows.parameter.requires_grad:
            raise ValueError(
                f"initialisation={regrowth.initialisation!r} gives regrown heads new weights, but {rows.name} is "
                "frozen; train it, or take initialisation='golden'"
            )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        # Weights are one setting, whatever they name.
        nested = isinstance(value, Mapping) and name != "weights"
        flat |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
