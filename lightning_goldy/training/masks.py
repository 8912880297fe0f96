"""Where the mask of a masked training comes from: a file, a callback of the same run, or the resumed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.sharding import gather
from lightning_goldy.core.store import StoreError, pack_mask, read_header, unpack_mask
from lightning_goldy.optim.masked_adamw import MaskedAdamW
from lightning_goldy.optim.schedules import OptimizerOptions

MASK_CALLBACKS = {"golden": "GoldenParameters", "reverse_golden": "ReverseGoldenParameters"}
"""Names that ``optimizer.mask`` may have besides a file's, and the callbacks that they stand for."""

CHECKPOINT_KEY = "goldy_mask"


class MaskedTraining:
    """Finds the mask of a run, keeps it in checkpoints and takes it up again; does nothing without a masked optimizer.

    Args:
        options: The optimizer's; ``mask`` names the source.

    Example:
        >>> MaskedTraining(OptimizerOptions()).is_masked
        False
    """

    def __init__(self, options: OptimizerOptions) -> None:
        self.source = options.mask or ""
        self.is_masked = options.name == "masked_adamw"
        self._noted: Mapping[str, Any] | None = None

    def check(self, trainer: L.Trainer) -> None:
        """Checks, before anything is loaded, that the mask will be there.

        Raises:
            ValueError: The callback is missing, or does not run before the first step.
            StoreError: The file is missing or holds no mask.
        """
        self._noted = None
        if not self.is_masked:
            return
        if self.source in MASK_CALLBACKS:
            self._callback(trainer)
            return
        if not Path(self.source).is_file():
            raise StoreError(
                f"optimizer.mask={self.source!r}: no such file, nor a callback's name; "
                f"{suggestion(self.source, MASK_CALLBACKS)}"
            )
        header = read_header(self.source)
        if header.kind != "mask":
            raise StoreError(f"optimizer.mask={self.source}: holds {header.kind}, not a mask")

    def read_file(self, optimizer: Optimizer, model: nn.Module) -> None:
        """Gives the optimizer the mask of a file; that of a callback comes as training starts."""
        if isinstance(optimizer, MaskedAdamW) and self.source not in MASK_CALLBACKS:
            optimizer.set_mask(ParameterMask.load(self.source, model))

    def start(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Gives the optimizer its mask right before the first step; every rank must call.

        Raises:
            ValueError: The file's mask is not the one that the resumed run was trained with.
            FileNotFoundError: The callback has made none.
        """
        if not self.is_masked:
            return
        optimizer = _masked_optimizer(trainer)
        if optimizer is None:
            raise ValueError("optimizer.name='masked_adamw', but the trainer's optimizer is another one")
        if self._noted is not None:
            resumed = _unpacked(self._noted)
            # Every tensor is gathered before the answer, because the ranks must gather alike.
            present = None if optimizer.mask is None else optimizer.mask.to_dense()
            if present is not None and not (
                present.keys() == resumed.keys() and all(torch.equal(present[name], resumed[name]) for name in present)
            ):
                raise ValueError(
                    f"the mask in {self.source} is not the one that the checkpoint was trained with; resume with that "
                    "file, or start a new run from the weights"
                )
            optimizer.set_mask(resumed)
        elif self.source in MASK_CALLBACKS:
            optimizer.set_mask(ParameterMask.load(self._made_file(trainer), model))
        self._noted = None
        mask = optimizer.mask
        assert mask is not None
        everything = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        inside = mask.total
        rank_zero_info(f"mask from {self.source}: {inside:,} of {everything:,} elements ({inside / everything:.2%})")

    def save(self, trainer: L.Trainer, checkpoint: dict[str, Any]) -> None:
        """Adds the packed mask to a checkpoint; a collective when it is sharded."""
        optimizer = _masked_optimizer(trainer)
        if optimizer is None or (mask := optimizer.mask) is None:
            return
        packed: dict[str, Any] = {}
        for name, tensor in mask.items():
            full = gather(tensor)
            if trainer.is_global_zero:
                bits, encoding = pack_mask(full, name)
                packed[name] = {"packed": bits, "encoding": encoding, "shape": list(full.shape)}
        checkpoint[CHECKPOINT_KEY] = packed

    def note(self, checkpoint: Mapping[str, Any]) -> None:
        """Notes the mask of a checkpoint; a later ``check`` forgets it, so that only a resumed run uses it."""
        self._noted = checkpoint.get(CHECKPOINT_KEY)

    def _callback(self, trainer: L.Trainer) -> Any:
        wanted = MASK_CALLBACKS[self.source]
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        found = [each for each in callbacks if wanted in (base.__name__ for base in type(each).__mro__)]
        if not found:
            attached = ", ".join(type(each).__name__ for each in callbacks)
            raise ValueError(f"optimizer.mask={self.source!r} needs the callback {wanted}; the trainer has {attached}")
        starting = [each for each in found if "start" in each.at]
        if len(starting) != 1:
            raise ValueError(
                f"optimizer.mask={self.source!r} needs one {wanted} with at=['start', ...], whose mask exists before "
                f"the first step; {len(starting)} of {len(found)} have it"
            )
        return starting[0]

    def _made_file(self, trainer: L.Trainer) -> Path:
        callback = self._callback(trainer)
        path = Path(callback.folder) / f"mask-step={trainer.global_step:08d}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: {type(callback).__name__} has made no mask before the first step")
        return path


def _masked_optimizer(trainer: L.Trainer) -> MaskedAdamW | None:
    return next((each for each in trainer.optimizers if isinstance(each, MaskedAdamW)), None)


def _unpacked(noted: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: unpack_mask(each["packed"].cpu(), torch.Size(each["shape"]), each["encoding"], f"the checkpoint's {name}")
        for name, each in noted.items()
    }
