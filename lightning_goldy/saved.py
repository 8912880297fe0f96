"""Models that were saved: Lightning checkpoints and folders of ``save_pretrained``, read without running any code."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch import nn
from torch.optim import Optimizer

from lightning_goldy.analysis.moments import adam_curvature_from_state
from lightning_goldy.core.base import read_base
from lightning_goldy.core.sharding import local
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import StoreError
from lightning_goldy.core.vector import ParameterVector


@dataclass(frozen=True)
class SavedModel:
    """A saved model, of which nothing but the step has been read.

    Args:
        path: A ``.ckpt`` or a folder.
        step: Optimizer steps; None when nothing tells.
        epoch: Epoch in which it was saved; 0 when nothing tells.
    """

    path: Path
    step: int | None
    epoch: int

    def load_into(self, pl_module: L.LightningModule, model: nn.Module) -> None:
        """Puts the saved weights (and buffers, from a checkpoint) into the module.

        Args:
            pl_module: Takes a checkpoint's state.
            model: Takes a folder's weights; frozen parameters stay as they are.

        Raises:
            StoreError: It does not fit the module.
        """
        if self.path.is_dir():
            space = ParameterSpace.of(model)
            values = read_base(self.path, model, space)
            with torch.no_grad():
                for name, parameter in space.resolve(model).items():
                    local(parameter).copy_(local(values[name]))
            return
        checkpoint = _read(self.path)
        pl_module.on_load_checkpoint(checkpoint)
        try:
            pl_module.load_state_dict(checkpoint["state_dict"])
        except RuntimeError as error:
            raise StoreError(
                f"{self.path} does not fit the configuration's {type(pl_module).__name__}: {error}"
            ) from error

    def callback_states(self) -> dict[str, Any]:
        """What the run's callbacks left in the checkpoint (of a folder: in the checkpoint beside it), by state key.

        Raises:
            StoreError: The checkpoint is not one.
        """
        checkpoint = self.path if self.path.is_file() else self.path.with_name(f"{self.path.name}.ckpt")
        return dict(_read(checkpoint).get("callbacks") or {}) if checkpoint.is_file() else {}

    def curvature(self, pl_module: L.LightningModule, model: nn.Module, space: ParameterSpace) -> ParameterVector:
        """The second moments of the optimizer in a checkpoint.

        Args:
            pl_module: Its ``configure_optimizers`` says which saved state belongs to which parameter.
            model: Whose parameters the space names.
            space: Which parameters.

        Raises:
            StoreError: No optimizer of the module holds all of these parameters.
            ValueError: The saved state does not fit the optimizer, or has no second moments.
        """
        wanted = {id(parameter) for parameter in space.resolve(model).values()}
        states = _read(self.path)["optimizer_states"]
        for optimizer, state in zip(_optimizers(pl_module.configure_optimizers()), states, strict=False):
            if wanted <= {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}:
                return adam_curvature_from_state(state, optimizer, space=space, module=model)
        raise StoreError(
            f"{self.path}: none of its {len(states)} optimizers holds all {len(space)} parameters; use "
            "--preconditioner none"
        )


def read_saved(path: str | Path, *, with_optimizer: bool = False) -> SavedModel:
    """Looks at a saved model, so that one that cannot work is refused before anything is measured.

    Args:
        path: A Lightning checkpoint or a folder of ``save_pretrained``.
        with_optimizer: Whether the state of an optimizer is needed.

    Raises:
        FileNotFoundError: There is nothing.
        StoreError: It is neither, or lacks the optimizer's state.

    Example:
        >>> read_saved("nowhere.ckpt")
        Traceback (most recent call last):
        FileNotFoundError: no checkpoint at nowhere.ckpt
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {path}")
    if path.is_dir():
        if not any(path.glob("*.safetensors")):
            raise StoreError(f"{path}: a folder of save_pretrained holds .safetensors files; this one has none")
        if with_optimizer:
            raise StoreError(
                f"{path}: a folder of save_pretrained has no optimizer state; give the Lightning checkpoint, or use "
                "--preconditioner none"
            )
        named = re.search(r"step=(\d+)", path.name)
        return SavedModel(path, int(named[1]) if named else None, 0)
    checkpoint = _read(path)
    if with_optimizer and not checkpoint.get("optimizer_states"):
        raise StoreError(f"{path} was saved without the optimizer's state; use --preconditioner none")
    return SavedModel(path, checkpoint.get("global_step"), int(checkpoint.get("epoch") or 0))


def positions(saved: Sequence[SavedModel]) -> list[tuple[int, SavedModel]]:
    """Where each belongs on an axis of steps, ascending; numbered as given where steps are unknown or repeated.

    Example:
        >>> late, early = SavedModel(Path("b"), 20, 1), SavedModel(Path("a"), 10, 0)
        >>> [(step, each.path.name) for step, each in positions([late, early])]
        [(10, 'a'), (20, 'b')]
        >>> [step for step, _ in positions([late, late])]
        [0, 1]
    """
    steps = [each.step for each in saved]
    if None in steps or len(set(steps)) < len(steps):
        return list(enumerate(saved))
    return sorted(((int(each.step or 0), each) for each in saved), key=lambda pair: pair[0])


def _read(path: Path) -> dict[str, Any]:
    try:
        # weights_only: a checkpoint is data, and nothing in it may run.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise StoreError(f"{path}: not a whole checkpoint of plain data; no code in it is run ({error})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        found = sorted(map(str, checkpoint)) if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise StoreError(f"{path}: a Lightning checkpoint has a 'state_dict'; this one has {found}")
    return checkpoint


def _optimizers(configured: Any) -> list[Optimizer]:
    """The optimizers in what ``configure_optimizers`` returned, in any of the forms that Lightning takes."""
    if isinstance(configured, Optimizer):
        return [configured]
    if isinstance(configured, Mapping):
        return _optimizers(configured.get("optimizer"))
    if isinstance(configured, (list, tuple)):
        # A pair of lists holds optimizers and schedulers; anything else is one optimizer or mapping per element.
        pair = len(configured) == 2 and isinstance(configured[0], (list, tuple))
        return [each for part in (configured[0] if pair else configured) for each in _optimizers(part)]
    return []
