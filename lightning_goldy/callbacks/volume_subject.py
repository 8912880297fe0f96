"""What volumes are measured on: sets of samples by name, and the optimizer whose moments precondition."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as L
from torch import nn
from torch.optim import Optimizer

from lightning_goldy.core.batches import map_batch
from lightning_goldy.core.space import ParameterSpace


def find_splits(datamodule: Any, given: Mapping[str, Iterable[Any]] | bool) -> dict[str, list[Any]]:
    """The fixed batches of every split, the same on every rank, on the CPU.

    Args:
        datamodule: Asked for ``analysis_splits()`` when ``given`` is True.
        given: Batches or a DataLoader by name, or True.

    Raises:
        ValueError: There are no splits, or one is empty or has a name that no tag can hold.

    Example:
        >>> find_splits(None, {"clean": []})
        Traceback (most recent call last):
        ValueError: the split 'clean' is empty
    """
    if isinstance(given, Mapping):
        named = given
    else:
        if not callable(getattr(datamodule, "analysis_splits", None)):
            raise ValueError(
                f"splits=True asks the data module for analysis_splits(), which {type(datamodule).__name__} lacks; "
                "pass splits={name: batches}, or None for the probe"
            )
        named = datamodule.analysis_splits()
    check_split_names(named)
    splits = {}
    for name, batches in named.items():
        # Batches may have been made in inference mode.
        splits[name] = [map_batch(batch, lambda tensor: tensor.detach().cpu().clone()) for batch in batches]
        if not splits[name]:
            raise ValueError(f"the split {name!r} is empty")
    return splits


def check_split_names(names: Iterable[str]) -> None:
    """Refuses names that cannot be part of a logged tag.

    Raises:
        ValueError: There is none, or a name has other letters.

    Example:
        >>> check_split_names(["clean", "a/b"])
        Traceback (most recent call last):
        ValueError: split names become parts of tags: letters, digits, '-' and '_' only; got 'a/b'
    """
    names = list(names)
    if not names:
        raise ValueError("splits= names no set of samples")
    for name in names:
        if not re.fullmatch(r"[\w-]+", str(name), re.ASCII):
            raise ValueError(f"split names become parts of tags: letters, digits, '-' and '_' only; got {name!r}")


def find_adam(trainer: L.Trainer, space: ParameterSpace, model: nn.Module) -> Optimizer:
    """The optimizer of the Adam family that holds the parameters of a space.

    Raises:
        ValueError: None holds all of them, or the one that does keeps no second moments.
    """
    wanted = {id(parameter) for parameter in space.resolve(model).values()}
    for optimizer in trainer.optimizers:
        if not wanted <= {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}:
            continue
        if "betas" in optimizer.param_groups[0]:
            return optimizer
        raise ValueError(
            f"{type(optimizer).__name__} keeps no second moments; preconditioner='adam' and 'best' need an optimizer "
            "of the Adam family: use one, or preconditioner='none'"
        )
    raise ValueError(
        f"a preconditioner needs one optimizer that holds all {len(space)} selected parameters; none of "
        f"{[type(optimizer).__name__ for optimizer in trainer.optimizers]} does: narrow the selection, or use "
        "preconditioner='none'"
    )
