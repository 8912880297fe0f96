"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from lightning_goldy.optim.masked_adamw import MaskedAdamW
from lightning_goldy.optim.schedules import (
    OptimizerOptions,
    ScheduleOptions,
    build_optimizer,
    decay_groups,
    schedule_factor,
)

__all__ = ["MaskedAdamW", "OptimizerOptions", "ScheduleOptions", "build_optimizer", "decay_groups", "schedule_factor"]
