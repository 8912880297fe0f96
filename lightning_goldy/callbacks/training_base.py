"""The parameters as training began: a snapshot's, or a file of the callback's own."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
from torch import nn

from lightning_goldy.callbacks.golden_snapshot import BASE_FILE, GoldenSnapshot
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import StoreError, fingerprint, load_vectors, save_vectors
from lightning_goldy.core.vector import ParameterVector

_OF_SNAPSHOT = "snapshot"


class TrainingBase:
    """Finds or keeps the base.

    Args:
        expected: Fingerprint of the file of an interrupted run, or ``snapshot``; None when there is none.

    Example:
        >>> TrainingBase(None).hash is None
        True
    """

    def __init__(self, expected: str | None) -> None:
        self.hash = expected
        self._kept: BaseParameters | None = None

    @property
    def has_file(self) -> bool:
        """Whether there is a file of the base that a resume needs."""
        return self.hash not in (None, _OF_SNAPSHOT)

    def find(self, trainer: L.Trainer, model: nn.Module, wanted: ParameterSpace, folder: Path) -> BaseParameters:
        """The attached snapshot's base if it is of this model, else that of the file, which a new run writes.

        Args:
            trainer: Its callbacks may hold a snapshot.
            model: As training begins or is resumed.
            wanted: The parameters that the base must hold.
            folder: Where the file is.

        Raises:
            StoreError: The file or the snapshot is missing, or another one than the interrupted run's.
        """
        if self.hash in (None, _OF_SNAPSHOT):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                # Where it is of another part of the LightningModule the names differ.
                if isinstance(callback, GoldenSnapshot) and all(name in callback.base.space for name in wanted):
                    self.hash = _OF_SNAPSHOT
                    return callback.base
        if self.hash == _OF_SNAPSHOT:
            raise StoreError("the interrupted run took its base from a GoldenSnapshot; attach it again")
        path = folder / BASE_FILE
        if self._kept is None and self.hash is None:
            vector = ParameterVector.of(model, wanted)
            self.hash = fingerprint(vector)
            step, write = trainer.global_step, trainer.is_global_zero
            save_vectors(path, vector, kind="values", model=model, step=step, base_hash=self.hash, write=write)
            self._kept = BaseParameters(vector)
        elif self._kept is None:
            vector, _ = load_vectors(path, model)
            found = fingerprint(vector)
            if found != self.hash:
                raise StoreError(f"{path} has hash {found}, the checkpoint was made with {self.hash}")
            self._kept = BaseParameters(vector)
        return self._kept
