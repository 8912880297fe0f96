"""Options given as objects, as dictionaries of their fields, or by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from lightning_goldy.models import LoraOptions
from lightning_goldy.optim.schedules import OptimizerName, OptimizerOptions, ScheduleOptions

Options = TypeVar("Options", OptimizerOptions, ScheduleOptions, LoraOptions)


def options_of(kind: type[Options], argument: str, value: Options | Mapping[str, Any]) -> Options:
    """The options that an argument gives.

    Args:
        kind: Their class.
        argument: The argument's name, for messages.
        value: An object of the class, or a dictionary of its fields.

    Raises:
        TypeError: It is neither.
        ValueError: There is no such field, or a value is out of its range.

    Example:
        >>> options_of(ScheduleOptions, "schedule", {"name": "linear"}).name
        'linear'
    """
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise TypeError(f"{argument} must be {kind.__name__} or a dict of its fields; got {type(value).__name__}")
    known = [field.name for field in dataclasses.fields(kind)]
    for key in value:
        if key not in known:
            raise ValueError(f"unknown option {argument}.{key}; choose from {', '.join(known)}")
    return kind(**value)


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
        if value not in get_args(OptimizerName):
            raise ValueError(f"unknown optimizer {value!r}; choose one of {', '.join(get_args(OptimizerName))}")
        value = {"name": value}
    if mask is None:
        return options_of(OptimizerOptions, "optimizer", value)
    fields = dict(value) if isinstance(value, Mapping) else {}
    if isinstance(value, OptimizerOptions):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif not isinstance(value, Mapping):
        options_of(OptimizerOptions, "optimizer", value)
    given = fields.get("mask")
    if given is not None and str(given) != str(mask):
        raise ValueError(f"two masks: mask={str(mask)!r} and optimizer.mask={given!r}; give one")
    return options_of(OptimizerOptions, "optimizer", {**fields, "mask": str(mask)})
