"""The weights that heads are regrown from: a snapshot's, or a file of the attention as training began."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
from torch import nn

from lightning_goldy.callbacks.golden_snapshot import BASE_FILE, GoldenSnapshot
from lightning_goldy.core.base import BaseParameters
from lightning_goldy.core.gates import HeadGates
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import StoreError, fingerprint, load_vectors, save_vectors
from lightning_goldy.core.vector import ParameterVector

_OF_SNAPSHOT = "snapshot"


class AttentionBase:
    """Finds or keeps the base.

    Args:
        expected: Fingerprint of the file of an interrupted run, or ``snapshot``; None when there is none.

    Example:
        >>> AttentionBase(None).hash is None
        True
    """

    def __init__(self, expected: str | None) -> None:
        self.hash = expected
        self._kept: BaseParameters | None = None

    @property
    def has_file(self) -> bool:
        """Whether there is a file of the base that a resume needs."""
        return self.hash not in (None, _OF_SNAPSHOT)

    def find(self, trainer: L.Trainer, model: nn.Module, gates: HeadGates, folder: Path) -> BaseParameters:
        """The attached snapshot's base if it is of this model, else that of the file, which a new run writes.

        Raises:
            ValueError: No attention weight is trained.
            StoreError: The file or the snapshot is missing, or another one than the interrupted run's.
        """
        wanted = attention_space(model, gates)
        if self.hash in (None, _OF_SNAPSHOT):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                # Where it is of another part of the LightningModule the names differ.
                if isinstance(callback, GoldenSnapshot) and all(name in callback.base.space for name in wanted):
                    self.hash = _OF_SNAPSHOT
                    return callback.base
        if self.hash == _OF_SNAPSHOT:
            raise StoreError("the interrupted run regrew heads from the base of a GoldenSnapshot; attach it again")
        if self._kept is None and self.hash is None:
            vector = ParameterVector.of(model, wanted)
            self.hash = fingerprint(vector)
            save_vectors(
                folder / BASE_FILE,
                vector,
                kind="values",
                model=model,
                step=trainer.global_step,
                base_hash=self.hash,
                write=trainer.is_global_zero,
            )
            self._kept = BaseParameters(vector)
        elif self._kept is None:
            vector, _ = load_vectors(folder / BASE_FILE, model)
            found = fingerprint(vector)
            if found != self.hash:
                raise StoreError(f"{folder / BASE_FILE} has hash {found}, the checkpoint was made with {self.hash}")
            self._kept = BaseParameters(vector)
        return self._kept


def attention_space(model: nn.Module, gates: HeadGates) -> ParameterSpace:
    """The trainable parameters of all attention modules.

    Raises:
        ValueError: There is none.
    """
    space = ParameterSpace.of(model)
    inside = {id(each) for block in gates.architecture.blocks for each in block.attention.parameters()}
    names = [name for name, parameter in space.resolve(model).items() if id(parameter) in inside]
    if not names:
        raise ValueError(
            "no attention weight is trained, so regrown heads have nothing to begin again with: train the attention, "
            "or set the regrowth's fraction to 0"
        )
    return space.subspace(names)
