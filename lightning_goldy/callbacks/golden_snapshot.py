"""Keeps the base parameters and tells how far the training has moved from them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_goldy.analysis.change import SuccessiveUpdates, WeightChange, change_inside, weight_change
from lightning_goldy.analysis.golden import GoldenResult, ReverseGoldenResult
from lightning_goldy.analysis.result import Row
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.core.base import BaseParameters, read_base
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import StoreError, fingerprint, load_vectors, save_vectors
from lightning_goldy.core.vector import ParameterVector

BASE_FILE = "base.safetensors"


def find_snapshot(trainer: L.Trainer) -> GoldenSnapshot | None:
    """The first snapshot among a trainer's callbacks; None without one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((each for each in callbacks if isinstance(each, GoldenSnapshot)), None)


def require_snapshot(trainer: L.Trainer, name: str) -> GoldenSnapshot:
    """The snapshot that a callback compares with.

    Args:
        trainer: Whose callbacks are searched.
        name: Of the callback.

    Raises:
        ValueError: There is none.
    """
    found = find_snapshot(trainer)
    if found is None:
        raise ValueError(f"{name} compares with the golden snapshot: add GoldenSnapshot() to the callbacks")
    return found


class GoldenSnapshot(AnalysisCallback[WeightChange]):
    """Keeps theta_0, which the other callbacks compare with, and logs the change since then.

    Logs the norm of the change, the change relative to the base, the cosine between successive updates (from one
    analysis to the next), the relative change by block, and the distribution of the elements' changes.

    Args:
        source: Where the base comes from: a vector file, a Hugging Face folder or a Lightning checkpoint. By default
            the parameters as training starts.
        every_n_steps: Run after every so many optimizer steps.
        track_updates: Whether to keep the previous values and update on the CPU (twice the parameters) for the cosine.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> GoldenSnapshot(every_n_steps=10).state_key
        'GoldenSnapshot[golden_snapshot]'
    """

    needs_probe = False

    def __init__(
        self,
        source: str | Path | None = None,
        *,
        every_n_steps: int | None = 50,
        track_updates: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(every_n_steps=every_n_steps, **options)
        self.source = source
        self.track_updates = track_updates
        self._base: BaseParameters | None = None
        self._base_hash: str | None = None
        self._updates = SuccessiveUpdates() if track_updates else None
        self._files: dict[str, str] = {}

    @property
    def base(self) -> BaseParameters:
        """The base parameters.

        Raises:
            RuntimeError: Training has not started yet.
        """
        if self._base is None:
            raise RuntimeError(
                "the snapshot is taken when training starts; list GoldenSnapshot before callbacks that need it"
            )
        return self._base

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Takes the snapshot, or takes up the one of the run that is resumed."""
        if self._resumed and self._previous_folder is not None:
            self._resume(trainer, model, Path(self._previous_folder))
            return
        if self._base is not None and self._base_hash is not None and self._last_step >= 0:
            return
        space = ParameterSpace.of(model)
        modules = trainer.lightning_module.named_modules()
        prefix = next((f"{name}." for name, child in modules if child is model and name), "")
        vector = (
            read_base(self.source, model, space, prefix=prefix) if self.source else ParameterVector.of(model, space)
        )
        self._base, self._base_hash = _written(vector, self.folder, trainer, model)
        if self._updates is not None:
            self._updates.observe(ParameterVector.of(model, space))

    def _resume(self, trainer: L.Trainer, model: nn.Module, previous: Path) -> None:
        assert self._store is not None
        if not all((previous / name).is_file() for name in self._files.values()):
            rank_zero_warn(f"{previous} lacks {sorted(self._files.values())}: the first two cosines will be missing")
            self._files = {}
        for name in (BASE_FILE, *self._files.values()):
            self._store.carry(previous / name)
        Replicas.world().meet(self.name)
        self._base = _read(self.folder, model, self._base_hash)
        if self._updates is not None:
            self._updates.load({key: load_vectors(self.folder / name, model)[0] for key, name in self._files.items()})

    def compute(self, context: AnalysisContext) -> WeightChange:
        """Measures the change since the base."""
        return weight_change(context.model, self.base)

    def describe(self, result: WeightChange, context: AnalysisContext) -> Row:
        """Adds the cosine between the last two updates."""
        if self._updates is None:
            return result.row().extended({"update_cosine": None})
        present = ParameterVector.of(context.model, self.base.space)
        # A copy, so that an analysis which fails later has observed nothing.
        self._updates = copy.copy(self._updates)
        return result.row().extended({"update_cosine": self._updates.observe(present)})

    def save_files(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Writes the previous values and the last update, from which the next cosine follows after a resume."""
        step = trainer.global_step
        for key, vector in ({} if self._updates is None else self._updates.vectors()).items():
            name = f"{key}-step={step:08d}.safetensors"
            if self._files.get(key) == name:
                # A second checkpoint of this step.
                continue
            save_vectors(
                self.folder / name, vector, kind="values", model=model, step=step, write=trainer.is_global_zero
            )
            self._files = {**self._files, key: name}

    def state_dict(self) -> dict[str, Any]:
        """Adds the hash of the base and the names of its files."""
        return {**super().state_dict(), "base_hash": self._base_hash, "files": dict(self._files)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Notes what the interrupted run left."""
        super().load_state_dict(state_dict)
        self._base_hash, self._files = state_dict["base_hash"], dict(state_dict["files"])


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
        if self._kept is None and self.hash is None:
            self._kept, self.hash = _written(ParameterVector.of(model, wanted), folder, trainer, model)
        elif self._kept is None:
            self._kept = _read(folder, model, self.hash)
        return self._kept


def _written(vector: ParameterVector, folder: Path, trainer: L.Trainer, model: nn.Module) -> tuple[BaseParameters, str]:
    """The base and its fingerprint, once its file is written."""
    found, step, write = fingerprint(vector), trainer.global_step, trainer.is_global_zero
    save_vectors(folder / BASE_FILE, vector, kind="values", model=model, step=step, base_hash=found, write=write)
    return BaseParameters(vector), found


def _read(folder: Path, model: nn.Module, expected: str | None) -> BaseParameters:
    """The base of a file whose fingerprint is the expected one."""
    vector, _ = load_vectors(folder / BASE_FILE, model)
    found = fingerprint(vector)
    if found != expected:
        raise StoreError(f"{folder / BASE_FILE} has hash {found}, the checkpoint was made with {expected}")
    return BaseParameters(vector)


MaskT = TypeVar("MaskT", GoldenResult, ReverseGoldenResult)


class MaskCallback(AnalysisCallback[MaskT]):
    """Base of callbacks that find a mask: tells what it has to do with the last mask and with the change.

    Args:
        **options: Of :class:`AnalysisCallback`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._mask: ParameterMask | None = None
        self._mask_file: str | None = None

    @abstractmethod
    def space(self, model: nn.Module) -> ParameterSpace:
        """The parameters whose elements may be marked."""

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Checks the selection, and takes up the last mask of a run that is resumed."""
        self.space(model)
        if self._resumed and self._mask_file is not None:
            Replicas.world().meet(self.name)
            self._mask = ParameterMask.load(self.folder / self._mask_file)

    def describe(self, result: MaskT, context: AnalysisContext) -> Row:
        """Adds what the mask has to do with the last mask and with the change."""
        snapshot = find_snapshot(context.trainer)
        share = None if snapshot is None else change_inside(context.model, snapshot.base, result.mask)
        metrics = {
            "jaccard_previous": None if self._mask is None else result.mask.jaccard(self._mask),
            "delta_share": share,
            "delta_share_over_density": share / result.density if share is not None and result.count else None,
        }
        self._mask = result.mask
        self._mask_file = f"mask-step={context.step:08d}.safetensors"
        return result.row().extended(metrics)

    def state_dict(self) -> dict[str, Any]:
        """Adds the name of the last mask's file."""
        return {**super().state_dict(), "mask_file": self._mask_file}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Notes what the interrupted run left."""
        super().load_state_dict(state_dict)
        self._mask_file = state_dict["mask_file"]
