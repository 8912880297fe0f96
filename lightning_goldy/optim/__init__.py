"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from lightning_goldy.optim.schedules import (
    OptimizerOptions,
    ScheduleOptions,
    build_optimizer,
    decay_groups,
    schedule_factor,
)

__all__ = ["OptimizerOptions", "ScheduleOptions", "build_optimizer", "decay_groups", "schedule_factor"]
