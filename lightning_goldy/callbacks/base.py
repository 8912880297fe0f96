"""When and where an analysis runs; a subclass says what it computes and what of it to log."""

from __future__ import annotations

import hashlib
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_goldy.analysis.result import AnalysisResult, Cost, Row
from lightning_goldy.callbacks.run_folder import (
    find_previous,
    lock_folder,
    require_local_run,
    run_directory,
    unlock_folder,
)
from lightning_goldy.callbacks.store import AnalysisProgress, ResultStore, log_row, peak_memory_bytes
from lightning_goldy.core.batches import batch_tensors
from lightning_goldy.core.isolation import undisturbed
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import RankError, Replicas, is_sharded, unshard_guard
from lightning_goldy.core.space import trainable_parameters
from lightning_goldy.core.store import Kind, save_vectors
from lightning_goldy.core.vector import ParameterVector, require_finite
from lightning_goldy.data.base import follow_training
from lightning_goldy.training.subject import check_probe, find_model, find_objective, find_probe

At = Literal["start", "checkpoint", "end"]
Trigger = Literal["start", "step", "epoch", "checkpoint", "end"]
Vectors = dict[str, tuple[ParameterVector, Kind]]
Histograms = dict[str, tuple[list[float], list[int]]]
ResultT = TypeVar("ResultT")
T = TypeVar("T")
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True)
class AnalysisContext:
    """What a computation may use.

    Args:
        trainer: The trainer.
        pl_module: Its LightningModule.
        model: The analysed module, in evaluation mode and isolated from the training.
        objective: How a batch becomes a loss; None when the callback needs no probe.
        probe: The fixed batches, on the CPU; empty when the callback needs none.
        step: Optimizer steps so far.
        store: The callback's folder.
        progress: Called with (done, total).
    """

    trainer: L.Trainer
    pl_module: L.LightningModule
    model: nn.Module
    objective: Objective | None
    probe: Sequence[Any]
    step: int
    store: ResultStore
    progress: AnalysisProgress


@dataclass
class Findings:
    """What to say of one result, as a callback may still put it; a :class:`~lightning_goldy.analysis.Row` is better.

    Args:
        metrics: Scalars by name; None where one does not exist yet.
        data: JSON-able description with everything that the figures need.
        vectors: Parameter vectors to save, by name, with their kind.
        histograms: Bin edges and counts by name.
        evaluations: Forward passes made, in samples.
    """

    metrics: dict[str, float | None]
    data: dict[str, Any] = field(default_factory=dict)
    vectors: Vectors = field(default_factory=dict)
    histograms: Histograms = field(default_factory=dict)
    evaluations: int = 0

    def row(self) -> Row:
        """The row that says the same."""
        return Row("", self.metrics, self.data, cost=Cost(forwards=self.evaluations))


class AnalysisCallback(L.Callback, ABC, Generic[ResultT]):
    """Base of all callbacks: schedule, isolation, probe, results on disk and in every logger, resume, cost.

    Args:
        every_n_steps: Run after every so many optimizer steps.
        every_n_epochs: Run at the end of every so many training epochs.
        at: Moments of the run: ``start`` (before the first step), ``checkpoint`` (whenever one is written), ``end``.
        on_error: ``raise``, or ``warn`` to let the training go on when the analysis fails, on all ranks alike. What
            cannot work is an error before the first step all the same, and a logger that fails never is one.
        objective: How a batch becomes a loss; by default the LightningModule's ``objective``, or next-token prediction.
        model_attribute: Submodule to analyse; ``model`` by default, or the LightningModule itself.
        probe: Batches to analyse; by default a ``probe_dataloader()``, or the validation set.
        name: Folder and metric prefix; needed when a trainer has two callbacks of one class.

    Raises:
        ValueError: An argument is out of range, or nothing is scheduled.
    """

    needs_probe = True
    """Whether the analysis runs the model on batches."""
    changes_training = False
    """Whether it intervenes in the training, which a callback that only looks never does."""
    analysis: str | None = None
    """What its rows are called, which decides their figures; None to leave it to the result.

    A result that does not say takes the name of the class in snake case.
    """

    def __init__(
        self,
        *,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        at: Sequence[At] = ("end",),
        on_error: Literal["raise", "warn"] = "raise",
        objective: Objective | None = None,
        model_attribute: str | None = None,
        probe: Iterable[Any] | None = None,
        name: str | None = None,
    ) -> None:
        at = (at,) if isinstance(at, str) else tuple(at)  # type: ignore[assignment]
        for argument, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise ValueError(f"{argument} must be at least 1; got {value}")
        for moment in at:
            if moment not in ("start", "checkpoint", "end"):
                raise ValueError(f"unknown moment at={moment!r}; {suggestion(moment, ('start', 'checkpoint', 'end'))}")
        if on_error not in ("raise", "warn"):
            raise ValueError(f"on_error is 'raise' or 'warn'; got {on_error!r}")
        if every_n_steps is None and every_n_epochs is None and not at:
            raise ValueError(f"{type(self).__name__} would never run: give every_n_steps, every_n_epochs or at=")
        self.every_n_steps, self.every_n_epochs, self.at = every_n_steps, every_n_epochs, at
        self.on_error = on_error
        self.objective, self.model_attribute, self.probe = objective, model_attribute, probe
        self.name = name or default_name(type(self))
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"name becomes a folder: letters, digits, '-' and '_' only; got {self.name!r}")
        self._last_step = -1
        self._seen_step = 0
        self._previous_folder: str | None = None
        self._previous_identity: str | None = None
        self._lost: str | None = None
        self._resumed = False
        self._goes_on = False
        self._store: ResultStore | None = None
        self._batches: list[Any] = []

    @abstractmethod
    def compute(self, context: AnalysisContext) -> ResultT:
        """The analysis itself; every rank calls."""

    def describe(self, result: ResultT, context: AnalysisContext) -> Row | Findings:
        """The row of a result, which a callback that knows more than the result extends; every rank calls.

        Raises:
            TypeError: The result has no row, and nothing else describes it.
        """
        if not isinstance(result, AnalysisResult):
            raise TypeError(
                f"{type(self).__name__}.compute gives {type(result).__name__}, which has no row: let it give an "
                "AnalysisResult, or override describe"
            )
        return result.row()

    def probe_samples(self) -> int | None:
        """How many probe samples an analysis uses, None for all."""
        return None

    @property
    def state_key(self) -> str:
        """Differs between two callbacks of one class through their names."""
        return f"{type(self).__qualname__}[{self.name}]"

    @property
    def folder(self) -> Path:
        """Where results are written; known once training has started."""
        if self._store is None:
            raise RuntimeError(f"{self.name}: the folder is known once training has started")
        return self._store.folder

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses what cannot work, before anything is loaded."""
        if stage != "fit":
            return
        names = [callback.name for callback in trainer.callbacks if isinstance(callback, AnalysisCallback)]  # type: ignore[attr-defined]
        require_local_run(trainer)
        if names.count(self.name) > 1:
            raise ValueError(f"two callbacks are called {self.name!r}; give each of them its own name=")
        if type(trainer.strategy).__name__ == "FSDPStrategy":
            raise ValueError(
                f"{type(self).__name__} cannot work with FSDPStrategy (FSDP1), whose flat parameters merge weights "
                "across layers; use ModelParallelStrategy with fully_shard (FSDP2), DDPStrategy or a single device"
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the folder, takes up an interrupted run, and tries the probe before the first step."""
        resumed = self._resumed
        with Replicas.world().together(self.name):
            self._start(trainer, pl_module)
        # A run that goes on has started before.
        if "start" in self.at and not resumed:
            self.run(trainer, pl_module, "start")

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = run_directory(trainer) / "goldy" / self.name
        if trainer.is_global_zero:
            lock_folder(folder.parent, trainer)
        again = self._store is not None and self._store.folder == folder and self._last_step <= trainer.global_step
        self._store = ResultStore(folder, write=trainer.is_global_zero)
        if self._resumed and self._previous_folder is not None:
            self._continue(trainer, self._store)
        elif not again:
            self._store.start_fresh()
        self._store.note()
        self._goes_on = self._resumed or again
        self._seen_step = trainer.global_step
        follow_training(trainer)
        # The sanity check's forward may have left FSDP2's root unsharded.
        unshard_guard(pl_module)
        model = find_model(pl_module, self.model_attribute)
        require_finite(dict(trainable_parameters(model)), "weights")
        if self.needs_probe:
            with undisturbed(trainer, pl_module):
                self._batches = find_probe(trainer, pl_module, self.probe)
                Replicas.world().agree(f"{self.name}: the probe", fingerprint_batches(self._batches))
                objective = find_objective(pl_module, model, self.objective)
                check_probe(model, objective, self._batches, self.probe_samples())
        self.prepare(trainer, model)
        self._resumed = False

    def _continue(self, trainer: L.Trainer, store: ResultStore) -> None:
        """Takes over the rows of the run that is resumed, from where they were or from beside the checkpoint."""
        former = str(self._previous_folder)
        found = find_previous(former, self._previous_identity, trainer.ckpt_path) if trainer.is_global_zero else None
        (place, *_) = Replicas.world().gather_objects(None if found is None else str(found))
        if self._lost is not None:
            raise RuntimeError(
                f"{self.name}: files that a resume needs could not be written when the checkpoint was ({self._lost}): "
                "resume from another checkpoint, or without this callback"
            )
        if place is not None:
            self._previous_folder = place
            store.continue_from(Path(place), trainer.global_step)
            return
        # What needs a file from there refuses to go on.
        rank_zero_warn(
            f"{self.name}: the results before the resume are not taken over: {former} is gone, or another run's, and "
            f"neither is it beside the checkpoint. Put it back there, or as goldy/{self.name} into the folder that the "
            "checkpoint lies in, and resume again"
        )

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Hook for subclasses: checks and preparations right before the first step."""

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Runs when the optimizer has just made a scheduled step; not inside a gradient accumulation."""
        stepped = trainer.global_step != self._seen_step
        self._seen_step = trainer.global_step
        if stepped and self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self.run(trainer, pl_module, "step")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Runs after scheduled epochs."""
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.run(trainer, pl_module, "epoch")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Runs with the weights that are being saved, and saves the state that it leaves."""
        if self._store is None:
            return
        if trainer.interrupted:
            self._save_at_failure(trainer, pl_module)
        else:
            if "checkpoint" in self.at:
                self.run(trainer, pl_module, "checkpoint")
            model = find_model(pl_module, self.model_attribute)
            self._lost = self.attempt(
                trainer, "to write what a resume needs", lambda: self.save_files(trainer, model), otherwise=_reason
            )
        # The callbacks' states were collected before this hook.
        state = {**self.state_dict(), "folder_identity": self._store.identity, "lost": self._lost}
        checkpoint["callbacks"][self.state_key] = {**state, "claim": self._store.claim(state, trainer)}

    def _save_at_failure(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Of a run that has failed, on this rank at least, the checkpoint comes first: no analysis, and no error."""
        if "checkpoint" in self.at and self._last_step != trainer.global_step:
            rank_zero_warn(f"{self.name} does not run at the checkpoint of a run that has failed")
        try:
            self.save_files(trainer, find_model(pl_module, self.model_attribute))
            self._lost = None
        except Exception as error:  # noqa: BLE001 - whatever it is, the checkpoint is written
            self._lost = _reason(error)
            rank_zero_warn(f"{self.name}: what a resume from this checkpoint needs is not written: {error}")

    def save_files(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Hook for subclasses: writes what a resume from this checkpoint needs and ``state_dict`` is too small for."""

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Runs at the end of the training."""
        if "end" in self.at:
            self.run(trainer, pl_module, "end")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets other runs into the folder."""
        if stage == "fit" and self._store is not None and self._store.write:
            unlock_folder(self._store.folder.parent)

    def run(self, trainer: L.Trainer, pl_module: L.LightningModule, trigger: Trigger) -> None:
        """Computes, writes and logs, unless this step has been analysed already."""
        if self._last_step == trainer.global_step:
            return
        done = self.attempt(trainer, None, lambda: self._run(trainer, pl_module, trigger))
        if done is None or not trainer.is_global_zero:
            return
        try:
            log_row(trainer, *done)
        except Exception as error:  # noqa: BLE001 - a service may raise anything
            # The row is on the disk, and no training ends for want of its copy in a logger.
            rank_zero_warn(f"{self.name}: the row of step {trainer.global_step} is not logged whole: {error}")

    def attempt(
        self,
        trainer: L.Trainer,
        work: str | None,
        act: Callable[[], T],
        *,
        otherwise: Callable[[Exception], T | None] = lambda error: None,
    ) -> T | None:
        """Does something on every rank, and on every rank or none.

        Where one rank fails, each takes this callback's attributes back to what they were; then they all raise or warn.

        Args:
            trainer: The trainer.
            work: What is done, for the message; None for the analysis itself.
            act: Does it; what it changes inside of an attribute's value stays changed.
            otherwise: What is given back where it failed and the training goes on.
        """
        before = dict(vars(self))
        pieces = trainer.lightning_module.parameters()
        patience = _PATIENCE_SECONDS if any(map(is_sharded, pieces)) else None
        try:
            with Replicas.world().together(self.name, patience=patience):
                return act()
        except BaseException as error:
            vars(self).clear()
            vars(self).update(before)
            final = isinstance(error, RankError) and error.final
            if self.on_error == "raise" or final or not isinstance(error, Exception):
                raise
            failed = f"{self.name} failed {work}" if work else f"{self.name} failed"
            rank_zero_warn(f"{failed} at step {trainer.global_step} and training goes on: {error}")
            return otherwise(error)

    def _run(
        self, trainer: L.Trainer, pl_module: L.LightningModule, trigger: Trigger
    ) -> tuple[dict[str, Any], Histograms, tuple[Mapping[str, Any], ...]]:
        """Computes and writes; what is to be logged."""
        start, step = time.perf_counter(), trainer.global_step
        assert self._store is not None
        with (
            undisturbed(trainer, pl_module),
            AnalysisProgress(trainer, self.name) as progress,
            peak_memory_bytes(pl_module.device) as peak,
        ):
            model = find_model(pl_module, self.model_attribute)
            objective = find_objective(pl_module, model, self.objective) if self.needs_probe else None
            context = AnalysisContext(trainer, pl_module, model, objective, self._batches, step, self._store, progress)
            result = self.compute(context)
            row, vectors, histograms = self._described(result, context)
            files = {}
            for name, (vector, kind) in vectors.items():
                path = self.folder / f"{name}-step={step:08d}.safetensors"
                save_vectors(path, vector, kind=kind, model=model, step=step, write=self._store.write)
                files[name] = path.name
        row = row.at(
            analysis=self.analysis or row.analysis or default_name(type(self)),
            name=self.name,
            step=step,
            epoch=trainer.current_epoch,
            trigger=trigger,
            seconds=time.perf_counter() - start,
            peak_memory_bytes=peak(),
            files=files,
        )
        earlier = self._store.history
        # A row is written when no rank can fail any more but the one that writes.
        Replicas.world().meet(f"{self.name}: the row of step {step}")
        line = self._store.append(row)
        self._last_step = step
        return line, histograms, earlier

    def _described(self, result: ResultT, context: AnalysisContext) -> tuple[Row, Vectors, Histograms]:
        told = self.describe(result, context)
        if isinstance(told, Findings):
            warnings.warn(
                f"{type(self).__name__}.describe returns Findings; return a lightning_goldy.analysis.Row, or let "
                "compute return an AnalysisResult, which has one",
                DeprecationWarning,
                stacklevel=2,
            )
            return told.row(), told.vectors, told.histograms
        if isinstance(result, AnalysisResult):
            return told, result.vectors(), result.histograms()
        return told, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Small and picklable under ``weights_only``: where the results are and how far they go."""
        folder = None if self._store is None else str(self._store.folder.absolute())
        return {"last_step": self._last_step, "folder": folder}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Notes what the interrupted run left; it is taken up when training starts."""
        self._last_step = state_dict["last_step"]
        self._previous_folder = state_dict["folder"]
        self._previous_identity, self._lost = state_dict.get("folder_identity"), state_dict.get("lost")
        self._resumed = True


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def fingerprint_batches(batches: Iterable[Any]) -> str:
    """Hash of all tensors of some batches.

    Example:
        >>> first, second = [{"x": torch.zeros(2)}], [{"x": torch.ones(2)}]
        >>> fingerprint_batches(first) == fingerprint_batches(second)
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in batch_tensors(list(batches)):
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def default_name(callback: type) -> str:
    """Snake case of a class name.

    Example:
        >>> default_name(AnalysisCallback)
        'analysis_callback'
    """
    name = callback.__name__
    return "".join(("_" if index and char.isupper() else "") + char.lower() for index, char in enumerate(name))
