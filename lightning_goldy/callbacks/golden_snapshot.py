"""Keeps the base parameters and tells how far the training has moved from them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_goldy.analysis.change import SuccessiveUpdates, WeightChange, weight_change
from lightning_goldy.analysis.forecast import Forecast, Plan, Run, forecast_change
from lightning_goldy.analysis.result import Row
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.callbacks.engine.run_folder import POOL, prune_bases, run_root
from lightning_goldy.callbacks.engine.weights import FROZEN_FILE, Frozen
from lightning_goldy.core.architecture.adapters import (
    WeightSpace,
    check_space,
    laid_on,
    laid_otherwise,
    require_merged,
)
from lightning_goldy.core.base import BASE_FILE, Base, BaseParameters, base_of, read_base
from lightning_goldy.core.files import StoreError, link_file
from lightning_goldy.core.naming import model_class, require_kinds
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import Kind, fingerprint, load_vectors, read_header, save_vectors
from lightning_goldy.core.vector import ParameterVector
from lightning_goldy.training.subject import find_model


def find_snapshot(trainer: L.Trainer) -> GoldenSnapshot | None:
    """The first snapshot among a trainer's callbacks; None without one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, GoldenSnapshot)), None)


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

    Logs the norm of the change, the change relative to the base, the relative change by block, the distribution of the
    elements' changes, and on demand the cosine between successive updates (from one analysis to the next).

    The base is a file, packed without loss to a third to five sixths of the model's size, which all runs below one
    folder that begin with the same weights share. With ``track_updates`` one and a half times the model's size lies
    beside the newest checkpoint.

    Args:
        source: Where the base comes from: a vector file, a Hugging Face folder, a Lightning checkpoint, or a model or
            vector that is at hand. By default the parameters as training starts.
        every_n_steps: Run after every so many optimizer steps.
        track_updates: Whether to keep the previous values and update on the CPU (one and a half times the parameters)
            for the cosine, and in files from which a resumed run goes on.
        space: Of a model with adapters ``merged``, the change of the weights that they come to, or ``adapters``.
        frozen: Whether to keep the frozen weights that adapters lie on, too, so that merged weights compare with the
            true base after adapters have been merged into them and begun anew (ReLoRA); by default up to 16.8 M
            elements. Where they have moved and are not kept, analyses of merged weights are refused by name.
        **options: Of :class:`AnalysisCallback`.

    Example:
        >>> GoldenSnapshot(every_n_steps=10).state_key
        'GoldenSnapshot[golden_snapshot]'
    """

    needs_probe = False
    compares, keeps_base = True, True

    def __init__(
        self,
        source: Base | None = None,
        *,
        every_n_steps: int | None = 50,
        track_updates: bool = False,
        space: WeightSpace = "merged",
        frozen: bool | None = None,
        **options: Any,
    ) -> None:
        require_kinds(GoldenSnapshot.__init__, locals())
        super().__init__(every_n_steps=every_n_steps, **options)
        check_space(space)
        self.source, self.track_updates, self.space, self.frozen = source, track_updates, space, frozen

    def forget(self) -> None:
        """Drops the base and the updates."""
        super().forget()
        self._kept = KeptBase()
        self._updates = SuccessiveUpdates()
        self._files: dict[str, str] = {}
        self._frozen: Frozen | None = None
        self._frozen_hash: str | None = None

    @property
    def base(self) -> BaseParameters:
        """The base parameters, also of what became trainable later.

        Raises:
            RuntimeError: Training has not started yet.
        """
        if self._kept.base is None:
            raise RuntimeError(
                "the snapshot is taken when training starts; list GoldenSnapshot before callbacks that need it"
            )
        return self._kept.base

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Takes the snapshot, or takes up the one of the run that is resumed."""
        require_merged(model, self.space)
        if self._resumed and self._previous_folder is not None:
            self._resume(trainer, model, Path(self._previous_folder))
            return
        if self._goes_on and self._kept.base is not None:
            return
        space = ParameterSpace.of(model)
        self._kept.take(self._start_values(trainer, model, space), self.folder, trainer, model)
        self._frozen = Frozen.of(model, keep=self.frozen)
        if self._frozen.kept is not None:
            self._frozen_hash = _write(self._frozen.kept.vector(model), self.folder / FROZEN_FILE, trainer, model)
        if self.track_updates:
            self._updates.observe(ParameterVector.of(model, space))

    def follow(self, trainer: L.Trainer, model: nn.Module, callback: AnalysisCallback[Any]) -> list[str]:
        """Adds to the base what has moved below adapters although it was frozen, for a callback that compares with it.

        Args:
            trainer: The trainer.
            model: The one that the callback analyses.
            callback: Which is about to.

        Returns:
            What to say of it.

        Raises:
            AdapterError: Its values at the start are not known.
        """
        own = find_model(trainer.lightning_module, self.model_attribute)
        if self._frozen is None or not callback.compares or own is not model or self is not find_snapshot(trainer):
            return []

        def grow(values: ParameterVector) -> None:
            self._kept.grow(values, self.folder, trainer, model)
            self._updates.grow(values)

        source = None if self.source is None else partial(self._start_values, trainer, model)
        merged = getattr(callback, "space", "merged") == "merged"
        notes = self._frozen.follow(model, self.base, grow, merged=merged, who=callback.name, source=source)
        if merged and (moved := laid_otherwise(model, self.base)):
            notes.append(
                f"the adapters in use or their scaling are others than at the start in {len(moved)} layers "
                f"({moved[0]}): the change is from the weights that those of the start came to"
            )
        return notes

    def became_trainable(self, trainer: L.Trainer, model: nn.Module, space: ParameterSpace) -> None:
        """Adds what becomes trainable to the base, and to the vectors that updates are told by."""
        if not set(space) <= set(self.base.space):
            # Else only the file is missing.
            self._updates.grow(ParameterVector.of(model, space))
        self._kept.grow(self._start_values(trainer, model, space), self.folder, trainer, model)

    def _start_values(self, trainer: L.Trainer, model: nn.Module, space: ParameterSpace) -> ParameterVector:
        if self.source is None:
            return ParameterVector.of(model, space)
        if not isinstance(self.source, (str, Path)):
            return base_of(self.source, model, space).vector(model)
        modules = trainer.lightning_module.named_modules()
        prefix = next((f"{name}." for name, child in modules if child is model and name), "")
        return read_base(self.source, model, space, prefix=prefix)

    def _resume(self, trainer: L.Trainer, model: nn.Module, previous: Path) -> None:
        assert self._store is not None
        if not all((previous / name).is_file() for name in self._files.values()):
            rank_zero_warn(f"{previous} lacks {sorted(self._files.values())}: the first two cosines will be missing")
            self._files = {}
        kept_frozen = () if self._frozen_hash is None else (FROZEN_FILE,)
        for name in (*self._kept.files, *self._files.values(), *kept_frozen):
            self._store.carry(previous / name)
        Replicas.world().meet(self.name)
        self._trained |= {name for name in self._kept.read(self.folder, model).space if name not in self._below}
        if self._frozen is not None and self._frozen_hash is not None:
            self._frozen.kept = BaseParameters(_read(self.folder / FROZEN_FILE, model, self._frozen_hash), copy=False)
        if self.track_updates:
            self._updates.load({key: load_vectors(self.folder / name, model)[0] for key, name in self._files.items()})

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """Every element is read; no pass of the model."""
        return forecast_change(plan, track_updates=self.track_updates)

    def compute(self, context: AnalysisContext) -> WeightChange:
        """Measures the change since the base."""
        return weight_change(context.model, self.base, space=self.space)

    def describe(self, result: WeightChange, context: AnalysisContext) -> Row:
        """Adds the cosine between the last two updates of the training; averaged weights are no update of it."""
        if not self.track_updates or context.weights != "training":
            return result.row().extended({"update_cosine": None})
        present = ParameterVector.of(context.model, self.base.space)
        # A copy, so that an analysis which fails later has observed nothing.
        self._updates = copy.copy(self._updates)
        cosine = self._updates.observe(present, context.model, self.space)
        return result.row().extended({"update_cosine": cosine})

    def save_files(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Writes the previous values and the last update, from which the next cosine follows after a resume."""
        self._kept.write(self.folder, trainer, model)
        step, write = trainer.global_step, trainer.is_global_zero
        for key, vector in self._updates.vectors().items():
            name, kind = f"{key}-step={step:08d}.safetensors", _KINDS[key]
            earlier = self._files.get(key)
            if earlier == name:
                # A second checkpoint of this step.
                continue
            save_vectors(self.folder / name, vector, kind=kind, model=model, step=step, write=write)
            self._files = {**self._files, key: name}
            if earlier is not None and write:
                # One copy lives: without it a run that is resumed from an older checkpoint lacks two cosines.
                (self.folder / earlier).unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """Adds the hash of the base and the names of its files."""
        state = {**super().state_dict(), **self._kept.state_dict(), "files": dict(self._files)}
        if self._frozen is not None:
            sums = {name: list(pair) for name, pair in self._frozen.sums.items()}
            state |= {"frozen": {"sums": sums, "below": list(self._frozen.below), "hash": self._frozen_hash}}
        return state

    @property
    def _below(self) -> tuple[str, ...]:
        return () if self._frozen is None else self._frozen.below

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Notes what the interrupted run left."""
        super().load_state_dict(state_dict)
        self._kept = KeptBase(state_dict)
        self._files = dict(state_dict["files"])
        frozen = state_dict.get("frozen")
        if frozen is not None:
            sums = {name: (total, square) for name, (total, square) in frozen["sums"].items()}
            self._frozen, self._frozen_hash = Frozen(sums, tuple(frozen["below"])), frozen["hash"]


_OF_SNAPSHOT = "snapshot"
_KINDS: dict[str, Kind] = {"previous": "values", "update": "direction"}


class KeptBase:
    """A base in a file, and in further files what became trainable later.

    Args:
        state: What :meth:`state_dict` of an interrupted run gave.

    Example:
        >>> KeptBase().state_dict()
        {'base_hash': None, 'base_added': {}, 'base_laid_on': None}
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self.base: BaseParameters | None = None
        self.hash: str | None = None if state is None else state["base_hash"]
        self._added: dict[str, str] = {} if state is None else dict(state.get("base_added", {}))
        self._laid_on: dict[str, dict[str, float]] | None = None if state is None else state.get("base_laid_on")
        self._unwritten: dict[str, ParameterVector] = {}

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that a resume needs."""
        return (BASE_FILE, *self._added)

    def take(self, vector: ParameterVector, folder: Path, trainer: L.Trainer, model: nn.Module) -> None:
        """Keeps a copy of the values, and writes their file."""
        found = _write(vector, folder / BASE_FILE, trainer, model)
        self.base, self.hash, self._added, self._unwritten = BaseParameters(vector), found, {}, {}
        self.base.laid_on = self._laid_on = laid_on(model)

    def grow(self, vector: ParameterVector, folder: Path, trainer: L.Trainer, model: nn.Module) -> None:
        """Adds those of the values that it lacks; a file of their own leaves earlier checkpoints what they need.

        Raises:
            OSError: The file cannot be written; the values are held all the same, and :meth:`write` tries again.
        """
        assert self.base is not None
        space = vector.space.subspace(name for name in vector if name not in self.base.space)
        if len(space):
            new = ParameterVector(space, {name: vector[name] for name in space})
            number = len(self._added) + len(self._unwritten)
            self._unwritten[f"base-added-step={trainer.global_step:08d}-{number}.safetensors"] = new
            self.base.grow(new)
        self.write(folder, trainer, model)

    def write(self, folder: Path, trainer: L.Trainer, model: nn.Module) -> None:
        """Writes what is held and in no file yet, which a resume needs; all ranks call."""
        for name in list(self._unwritten):
            self._added[name] = _write(self._unwritten[name], folder / name, trainer, model)
            del self._unwritten[name]

    def read(self, folder: Path, model: nn.Module) -> BaseParameters:
        """The base of an interrupted run.

        Raises:
            StoreError: A file is missing, or another one than that run's.
        """
        self.base = BaseParameters(_read(folder / BASE_FILE, model, self.hash))
        self.base.laid_on = self._laid_on
        for name, expected in self._added.items():
            self.base.grow(_read(folder / name, model, expected))
        return self.base

    def state_dict(self) -> dict[str, Any]:
        """Hashes of the files."""
        return {"base_hash": self.hash, "base_added": dict(self._added), "base_laid_on": self._laid_on}


class TrainingBase:
    """Finds or keeps the base.

    Args:
        state: What :meth:`state_dict` of an interrupted run gave; None when there is none.

    Example:
        >>> TrainingBase().state_dict()["base_hash"] is None
        True
    """

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self._kept = KeptBase(state)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files of the base that a resume needs."""
        return () if self._kept.hash in (None, _OF_SNAPSHOT) else self._kept.files

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
        kept = self._kept
        if kept.hash in (None, _OF_SNAPSHOT):
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                # Where it is of another part of the LightningModule the names differ.
                if isinstance(callback, GoldenSnapshot) and all(name in callback.base.space for name in wanted):
                    kept.hash = _OF_SNAPSHOT
                    return callback.base
        if kept.hash == _OF_SNAPSHOT:
            raise StoreError("the interrupted run took its base from a GoldenSnapshot; attach it again")
        if kept.base is None and kept.hash is None:
            kept.take(ParameterVector.of(model, wanted), folder, trainer, model)
        elif kept.base is None:
            kept.read(folder, model)
        assert kept.base is not None
        self.grow(trainer, model, wanted, folder)
        return kept.base

    def grow(self, trainer: L.Trainer, model: nn.Module, space: ParameterSpace, folder: Path) -> None:
        """Adds parameters that are about to be trained for the first time; a snapshot does so itself."""
        if self._kept.base is not None:
            self._kept.grow(ParameterVector.of(model, space), folder, trainer, model)

    def write(self, trainer: L.Trainer, model: nn.Module, folder: Path) -> None:
        """Writes what could not be written as it was added; a snapshot does so itself."""
        self._kept.write(folder, trainer, model)

    def state_dict(self) -> dict[str, Any]:
        """Hashes of the files, or that there is a snapshot."""
        return self._kept.state_dict()


def _write(vector: ParameterVector, path: Path, trainer: L.Trainer, model: nn.Module) -> str:
    """The fingerprint of a base, once its file is written."""
    found, step, write = fingerprint(vector), trainer.global_step, trainer.is_global_zero
    pool = run_root(trainer) / POOL / f"{found}-{model_class(model)}-step={step:08d}.safetensors"
    known = write and _is_base(pool, found) and link_file(pool, path)
    if not any(Replicas.world().gather_objects(known)):
        save_vectors(path, vector, kind="values", model=model, step=step, base_hash=found, write=write, packed=True)
        if write:
            link_file(path, pool)
    if write:
        prune_bases(pool.parent)
    return found


def _is_base(path: Path, expected: str) -> bool:
    try:
        return path.is_file() and read_header(path).base_hash == expected
    except StoreError:
        return False


def _read(path: Path, model: nn.Module, expected: str | None) -> ParameterVector:
    """The base of a file whose fingerprint is the expected one."""
    vector, _ = load_vectors(path, model)
    found = fingerprint(vector)
    if found != expected:
        raise StoreError(f"{path} has hash {found}, the checkpoint was made with {expected}")
    return vector
