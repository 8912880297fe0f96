"""When and where an analysis runs; a subclass says what it computes and what of it to log."""

from __future__ import annotations

import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_goldy.analysis.forecast import Forecast, Plan, Run
from lightning_goldy.analysis.forecast.timing import try_gradients as try_gradients
from lightning_goldy.analysis.precision import with_precision
from lightning_goldy.analysis.result import AnalysisResult, Row
from lightning_goldy.callbacks.engine.run_folder import (
    find_previous,
    lock_folder,
    require_local_run,
    run_directory,
    unlock_folder,
)
from lightning_goldy.callbacks.engine.store import (
    AnalysisProgress,
    Findings,
    Histograms,
    ResultStore,
    Vectors,
    log_row,
    peak_memory_bytes,
    tell_where,
)
from lightning_goldy.callbacks.engine.weights import (
    Weights,
    as_compared,
    kind_of_weights,
    tell_last,
    undefined_row,
    weights_in,
    weights_mark,
)
from lightning_goldy.callbacks.preflight import Budget, apply_settings, dialled, preflight
from lightning_goldy.core.batches import move_batch
from lightning_goldy.core.isolation import undisturbed
from lightning_goldy.core.naming import canonical_name, require_at_least, require_choice, require_kinds, suggestion
from lightning_goldy.core.objective import Objective
from lightning_goldy.core.sharding import RankError, Replicas, is_sharded, unshard_guard
from lightning_goldy.core.space import ParameterSpace, newly_trainable, parameter_names, plain_parameters
from lightning_goldy.core.store import save_vectors
from lightning_goldy.core.tasks import transformers_model
from lightning_goldy.core.vector import require_finite
from lightning_goldy.data.base import follow_training
from lightning_goldy.training.probe import Reading
from lightning_goldy.training.probe import fingerprint_batches as fingerprint_batches
from lightning_goldy.training.subject import check_probe, check_strategy, find_model, find_objective, find_probe

At = Literal["start", "checkpoint", "end"]
Trigger = Literal["start", "step", "epoch", "checkpoint", "end"]
ResultT = TypeVar("ResultT")
T = TypeVar("T")
_PATIENCE_SECONDS = 60.0


@dataclass(frozen=True, eq=False)
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
        weights: Whose weights the model has.
        repeat: How many analyses this step has had before, of other weights.
    """

    trainer: L.Trainer
    pl_module: L.LightningModule
    model: nn.Module
    objective: Objective | None
    probe: Sequence[Any]
    step: int
    store: ResultStore
    progress: AnalysisProgress
    weights: Weights = "training"
    repeat: int = 0

    def file_name(self, name: str) -> str:
        """What a vector file of this analysis is called."""
        again = f"-{self.repeat + 1}" if self.repeat else ""
        return f"{name}-step={self.step:08d}{again}.safetensors"


class _Unattached(str):
    """The state key of a callback that no trainer has set up; Lightning compares those that it is given together."""

    callback: AnalysisCallback[Any]

    def __new__(cls, key: str, callback: AnalysisCallback[Any]) -> _Unattached:
        made = super().__new__(cls, key)
        made.callback = callback
        return made

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        same = str.__eq__(self, other)
        if same is True and isinstance(other, _Unattached) and other.callback is not self.callback:
            raise SameNameError(self.callback)
        return same

    def __ne__(self, other: object) -> bool:
        return not self == other


class SameNameError(ValueError, RuntimeError):
    """Two callbacks of a trainer have one name; a RuntimeError too, as Lightning raises where states have one key."""

    def __init__(self, callback: AnalysisCallback[Any]) -> None:
        super().__init__(
            f"two callbacks are called {callback.name!r}, or more than one stateful callback of type "
            f"`{type(callback).__name__}` has no name of its own; give each of them its own name="
        )


class AnalysisCallback(L.Callback, ABC, Generic[ResultT]):
    """Base of all callbacks: schedule, isolation, probe, results on disk and in every logger, resume, cost.

    What is analysed is every parameter that has been trained in this run so far, also where it is frozen again. At a
    checkpoint it has the weights that are saved, at the end those that the training leaves, whoever put them there.
    A step is analysed once for the same weights. With another trainer or model the callback starts anew.

    Args:
        every_n_steps: Run whenever so many optimizer steps have been made, those of all optimizers counted.
        every_n_epochs: Run at the end of every so many training epochs.
        at: Moments of the run: ``start`` (before the first step), ``checkpoint`` (whenever one is written, also one of
            weights only), ``end``.
        on_error: ``raise``, or ``warn`` to let the training go on when the analysis fails, on all ranks alike. What
            cannot work is an error before the first step all the same, and a logger that fails never is one.
        objective: How a batch becomes a loss; by default the LightningModule's ``objective``, or next-token prediction.
        model_attribute: Submodule to analyse; ``model`` by default, or the LightningModule itself.
        probe: Batches to analyse; by default a ``probe_dataloader()``, the validation set, or the training set's end.
        name: Folder and metric prefix; needed when a trainer has two callbacks of one class.
        check: Whether to try on one sample, before the first step, what the analysis will do, and to hold the
            objective's loss against the model's own; and to tell before the first step what it will cost.
        budget: What it may take: a fraction of the run's time, or seconds per firing as ``"20s"``. Its ``dials`` and
            then its schedule follow, never above what is given.
        large: Whether to do above 100 M trainable parameters what takes longest there.
        log_scalars: Which metrics go to the loggers as scalars: the analysis's ``headline``, or ``all``, also those of
            every block and layer and of the cost. Rows and the report have all of them.

    Raises:
        ValueError: An argument is out of range, or nothing is scheduled.
    """

    _attached = False
    dials: Mapping[str, Any] = {}
    """Settings that a budget turns down, and the least of each, by dotted name."""
    needs_probe = True
    """Whether the analysis runs the model on batches."""
    runs_model = False
    """Whether it does so on something else than a probe."""
    weights_alone = False
    """Whether the analysis looks at weights alone, whatever precision the model computes in."""
    compares, keeps_base = False, False
    """Whether it compares with the golden snapshot's base, and whether it is the one that keeps it."""
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
        check: bool = True,
        budget: float | str | None = None,
        large: bool = False,
        log_scalars: Literal["headline", "all"] = "headline",
        name: str | None = None,
    ) -> None:
        at = (at,) if isinstance(at, str) else at  # type: ignore[assignment]
        self.budget, self.large = Budget.of(budget), large
        told = locals()
        # What is no iterable is named with what it gave, when it is read.
        require_kinds(AnalysisCallback.__init__, told if isinstance(probe, str) else {**told, "probe": None})
        at = tuple(at)
        for argument, value in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if value is not None:
                require_at_least(argument, value, 1)
        for moment in at:
            if moment not in ("start", "checkpoint", "end"):
                raise ValueError(f"unknown moment at={moment!r}; {suggestion(moment, ('start', 'checkpoint', 'end'))}")
        if on_error not in ("raise", "warn"):
            raise ValueError(f"on_error is 'raise' or 'warn'; got {on_error!r}")
        if every_n_steps is None and every_n_epochs is None and not at:
            raise ValueError(f"{type(self).__name__} would never run: give every_n_steps, every_n_epochs or at=")
        self.every_n_steps, self.every_n_epochs, self.at = every_n_steps, every_n_epochs, at
        self.on_error = on_error
        self.objective, self.model_attribute, self.probe, self.check = objective, model_attribute, probe, check
        # What takes the place of settings that were given, and what was given.
        self.derived: dict[str, Any] = {}
        self.explicit: dict[str, Any] = {}
        self._read_ahead: Reading | None = None
        require_choice("log_scalars", log_scalars, ("headline", "all"))
        self.log_scalars = log_scalars
        self.name = name or default_name(type(self))
        if not self.name.replace("_", "").replace("-", "").isalnum():
            raise ValueError(f"name becomes a folder: letters, digits, '-' and '_' only; got {self.name!r}")
        self._store: ResultStore | None = None
        self.forget()

    def forget(self) -> None:
        """Drops what belongs to one run, for a subclass to extend; called before each run that starts anew."""
        self._last_step = -1
        self._analysed: list[str] | None = []
        self._seen_step = 0
        self._previous_folder: str | None = None
        self._previous_identity: str | None = None
        self._lost: str | None = None
        self._resumed = False
        self._starts = False
        self._goes_on = False
        self._run: tuple[Any, Any] | None = None
        self._batches: list[Any] = []
        self._reading: Reading | None = None
        self._task: Objective | None = None
        self.probe_size = 0
        # Step and hash of the weights as training left them, and what has ever been trained.
        self._left = (-1, "")
        self._trained: set[str] = set()
        self._flags: dict[int, tuple[bool, ...]] = {}
        self._notes: list[str] = []

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

    def estimate(self, plan: Plan, run: Run) -> Forecast:
        """Hook for subclasses: what a firing will cost, from settings and shapes alone; it must allocate nothing.

        Args:
            plan: Shapes of the model, which may lie on ``meta``, and of the probe.
            run: The steps of the run.
        """
        return Forecast(stated=False)

    def limited(self) -> dict[str, Any] | None:
        """Hook for subclasses: settings that take the place of those that are opt-in above 100 M parameters.

        None where the whole analysis is.
        """
        return {}

    def dialled(self, share: float, given: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
        """Hook for subclasses: the ``dials`` at a share of what was given, each at least its least."""
        return dialled(self.dials, share, given, plan.n_samples)

    def forecast(self, plan: Plan, run: Run) -> Forecast:
        """What this callback will cost in a run: passes, memory, disk, bytes communicated, firings."""
        steps = run.firings(every_n_steps=self.every_n_steps, every_n_epochs=self.every_n_epochs, at=self.at)
        estimate = self.estimate(plan, run)
        return replace(estimate, name=self.name, firings=len(steps), checkpoints=len(run.checkpoint_steps))

    @property
    def used_samples(self) -> int | None:
        """How many of them there are; None for all."""
        wanted = self.probe_samples()
        return None if wanted is None else min(wanted, self.probe_size)

    @property
    def state_key(self) -> str:
        """Differs between two callbacks of one class through their names."""
        key = f"{type(self).__qualname__}[{self.name}]"
        return key if self._attached else _Unattached(key, self)

    @property
    def folder(self) -> Path:
        """Where results are written; known once training has started."""
        if self._store is None:
            raise RuntimeError(f"{self.name}: the folder is known once training has started")
        return self._store.folder

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses what cannot work, before anything is loaded."""
        self._attached = True
        if stage != "fit":
            return
        # Another fit may have other data; what nobody holds is read anew.
        self._batches, self._reading, self._task = [], None, None
        names = [callback.name for callback in trainer.callbacks if isinstance(callback, AnalysisCallback)]  # type: ignore[attr-defined]
        require_local_run(trainer)
        if names.count(self.name) > 1:
            raise SameNameError(self)
        check_strategy(trainer.strategy, type(self).__name__, changes_training=self.changes_training)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Opens the folder, takes up an interrupted run, and tries the probe before the first step."""
        resumed = self._resumed
        callbacks = [each for each in trainer.callbacks if isinstance(each, AnalysisCallback)]  # type: ignore[attr-defined]
        # What another run has written stays, whatever fails from here on.
        former, self._store = self._store, None
        try:
            with Replicas.world().together(self.name):
                if callbacks[0] is self:
                    preflight(trainer, pl_module, callbacks)
                    tell_last(trainer, AnalysisCallback)
                self._start(trainer, pl_module, former)
        except BaseException:
            # Nothing is left of a run that never began.
            for callback in reversed(callbacks[: callbacks.index(self) + 1]):
                if callback._store is not None:
                    callback._store.withdraw()
                callback._run = None
            raise
        # A run that goes on has started before.
        self._starts = "start" in self.at and not resumed
        if self is callbacks[-1]:
            # What cannot work in any callback has been told by then.
            for callback in callbacks:
                callback.begin(trainer, pl_module)

    def begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Analyses the start where that is scheduled, once all callbacks have checked what they need."""
        if self._starts:
            self.run(trainer, pl_module, "start")

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule, former: ResultStore | None) -> None:
        folder = run_directory(trainer) / "goldy" / self.name
        if trainer.is_global_zero:
            lock_folder(folder.parent, trainer)
        known = None if former is None else former.folder
        again = not self._resumed and known == folder and self._is_same_run(trainer, pl_module)
        if not (self._resumed or again):
            self.forget()
        self._run = weakref.ref(trainer), weakref.ref(pl_module)
        self._store = ResultStore(folder, write=trainer.is_global_zero)
        if self._resumed and self._previous_folder is not None:
            self._continue(trainer, self._store)
        elif not again:
            self._store.start_fresh()
        self._store.note(type(self).__name__)
        self._goes_on = self._resumed or again
        self._seen_step = trainer.global_step
        self._flags = {}
        follow_training(trainer)
        # The sanity check's forward may have left FSDP2's root unsharded.
        unshard_guard(pl_module)
        model = find_model(pl_module, self.model_attribute)
        require_finite(newly_trainable(model, ()), "weights")
        self._trained &= parameter_names(model)
        if not self._goes_on:
            self._trained |= set(newly_trainable(model, ()))
        if self.needs_probe:
            self._take_probe(trainer, pl_module, model)
        with plain_parameters(model, self._trained if self._resumed else ()):
            self.prepare(trainer, model)
        if self.check:
            with undisturbed(trainer, pl_module):
                self._try(pl_module, model)
        self._observe_trainable(trainer, model)
        self._left = trainer.global_step, weights_mark(model)
        self._resumed = False

    def _take_probe(self, trainer: L.Trainer, pl_module: L.LightningModule, model: nn.Module) -> None:
        """Reads the probe, the same on every rank, and finds and checks what it is analysed by."""
        self._batches = self.read_probe(trainer, pl_module)
        with undisturbed(trainer, pl_module):
            Replicas.world().agree(f"{self.name}: the probe", fingerprint_batches(self._batches))
            objective = self._task = find_objective(pl_module, model, self.objective, self._batches)
            unasked = self.objective is None and objective is not getattr(pl_module, "objective", None)
            if unasked and transformers_model(model, anywhere=False) is None:
                rank_zero_info(
                    f"{self.name}: {type(model).__name__} is analysed by {type(objective).__name__}; "
                    "objective= takes another loss"
                )
            wanted, own = self.probe_samples(), {"pl_module": pl_module, "check": self.check}
            self.probe_size = check_probe(model, objective, self._batches, wanted, lacking="warn", **own)  # type: ignore[arg-type]

    def goes_on_with(self, trainer: L.Trainer) -> bool:
        """Whether settings were derived before, in a run that is resumed or that the trainer goes on with."""
        return self._resumed or (self._run is not None and self._run[0]() is trainer)

    def read_probe(self, trainer: L.Trainer, pl_module: L.LightningModule, n_samples: int | None = None) -> list[Any]:
        """The first batches of the probe, which callbacks of a trainer share; by default as many as are used."""
        if n_samples is not None:
            return find_probe(trainer, pl_module, self.probe, n_samples).first(n_samples)
        sharers = (callback for callback in trainer.callbacks if isinstance(callback, AnalysisCallback))  # type: ignore[attr-defined]
        wanted = [other.probe_samples() for other in sharers if other.needs_probe and other.probe is self.probe]
        self._reading = find_probe(trainer, pl_module, self.probe, self.probe_samples(), wanted=wanted)
        # Held over the start of the run, which forgets the others.
        self._read_ahead = None if self._read_ahead is self._reading else self._reading
        return self._reading.first(self.probe_samples())

    def _is_same_run(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Whether the same trainer goes on with the same module."""
        run = (None, None) if self._run is None else tuple(reference() for reference in self._run)
        return run[0] is trainer and run[1] is pl_module and self._last_step <= trainer.global_step

    def _try(self, pl_module: L.LightningModule, model: nn.Module) -> None:
        batches = self.tried_batches()
        if not batches:
            return
        objective = self.task(pl_module, model)
        device = next(model.parameters()).device
        sample = move_batch(next(iter(objective.samples(batches[0]))), device)
        self.try_route(model, objective, sample)

    def task(self, pl_module: L.LightningModule, model: nn.Module) -> Objective:
        """How a batch becomes a loss: the callback's objective, the module's, or what model and probe ask for."""
        return self._task or find_objective(pl_module, model, self.objective, self._batches)

    def tried_batches(self) -> Sequence[Any]:
        """Where the sample is taken from that the analysis is tried on: the probe."""
        return self._batches

    def try_route(self, model: nn.Module, objective: Objective, sample: Any) -> None:
        """Hook for subclasses: does for one sample what the analysis will do, so that what cannot work fails early.

        Called before the first step, on every rank, with the model isolated as for :meth:`compute`; the probe has been
        run forward by then. It must not call ``backward()`` on a plain model, whose gradients DistributedDataParallel
        would take for the training's: use :func:`try_gradients`.

        Args:
            model: The analysed module.
            objective: How a batch becomes a loss.
            sample: A batch of one sample, on the model's device.
        """

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

    def became_trainable(self, trainer: L.Trainer, model: nn.Module, space: ParameterSpace) -> None:
        """Hook for subclasses: parameters are about to be trained for the first time, and have their old values."""

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Notices what an optimizer is about to move for the first time."""
        flags = tuple(parameter.requires_grad for group in optimizer.param_groups for parameter in group["params"])
        if self._store is not None and self._flags.get(id(optimizer)) != flags:
            self._flags[id(optimizer)] = flags
            model, work = find_model(pl_module, self.model_attribute), "to keep what becomes trainable"
            self.attempt(trainer, work, lambda: self._observe_trainable(trainer, model))

    def _observe_trainable(self, trainer: L.Trainer, model: nn.Module) -> None:
        trainable = newly_trainable(model, self._trained)
        if not trainable:
            return
        unshard_guard(model)
        # Tried again where it fails.
        self.became_trainable(trainer, model, ParameterSpace.of_tensors(trainable))
        self._trained.update(trainable)
        names = list(trainable)
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        self._notes.append(f"{names[0]}{more} became trainable at step {trainer.global_step}")

    def training_changed_weights(self) -> None:
        """Has the present weights taken for those of the training, after a callback has changed them on purpose."""
        self._left = (-1, "")

    def has_training_weights(self, trainer: L.Trainer, pl_module: L.LightningModule) -> bool:
        """Whether the model has the weights that training left at this step, as far as was noted; all ranks call."""
        mark = weights_mark(find_model(pl_module, self.model_attribute))
        own = self._left[0] != trainer.global_step or self._left[1].partition("/")[0] == mark.partition("/")[0]
        return all(Replicas.world().gather_objects(own))

    def _note_weights(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remembers the weights that training has left at this step; later ones of the same step are not its own."""
        if self._left[0] != trainer.global_step:
            self._left = trainer.global_step, weights_mark(find_model(pl_module, self.model_attribute))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Runs when a scheduled number of optimizer steps has been passed; not inside a gradient accumulation."""
        seen, self._seen_step = self._seen_step, trainer.global_step
        every, step = self.every_n_steps, trainer.global_step
        if getattr(trainer.fit_loop, "_skip_backward", False):
            # Stochastic weight averaging's pass over the data for the batch norms counts a step that trains nothing.
            self._left = step, self._left[1]
        if every and step // every > seen // every:
            self.run(trainer, pl_module, "step")
        elif ("checkpoint" in self.at or self.every_n_epochs) and _may_validate(trainer, batch_idx):
            # Whoever swaps weights for a validation may do so for a checkpoint in it, or until the epoch's end.
            self._note_weights(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Runs after scheduled epochs."""
        self._note_weights(trainer, pl_module)
        if self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self.run(trainer, pl_module, "epoch")

    def when_saved(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Runs with the weights that are being saved, and saves the state that it leaves.

        It comes after all hooks of Lightning, also of a checkpoint of weights only, in which nothing else is saved.
        """
        if self._store is None or self._run is None or self._run[0]() is not trainer:
            return
        failed = trainer.interrupted
        try:
            if failed and "checkpoint" in self.at and self._last_step != trainer.global_step:
                rank_zero_warn(f"{self.name} does not run at the checkpoint of a run that has failed")
            elif not failed and "checkpoint" in self.at:
                with weights_in(checkpoint, pl_module) as replaced:
                    self.run(trainer, pl_module, "checkpoint", replaced=replaced)
        finally:
            if "callbacks" in checkpoint:
                self._save_state(trainer, pl_module, checkpoint, failed=failed)

    def _save_state(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any], *, failed: bool
    ) -> None:
        """Writes what a resume needs, and this callback's state, which was collected before, once more."""
        store, model = self._store, find_model(pl_module, self.model_attribute)
        assert store is not None

        def attempt(work: str, act: Callable[[], Any], otherwise: Callable[[Exception], Any]) -> Any:
            if not failed:
                return self.attempt(trainer, work, act, otherwise=otherwise)
            # Of a run that has failed, on this rank at least, the checkpoint comes first: no collective, and no error.
            try:
                return act()
            except Exception as error:  # noqa: BLE001 - whatever it is, the checkpoint is written
                rank_zero_warn(f"{self.name}: what a resume from this checkpoint needs is not written: {error}")
                return otherwise(error)

        kept = partial(self.save_files, trainer, model)
        self._lost = attempt("to write what a resume needs", kept, lambda error: f"{type(error).__name__}: {error}")
        state = {**self.state_dict(), "folder_identity": store.identity, "lost": self._lost}
        # Files that no note claims stay.
        claim = attempt("to note what a resume needs", lambda: store.claim(state, trainer), lambda error: None)
        checkpoint["callbacks"][self.state_key] = {**state, "claim": claim}

    def save_files(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Hook for subclasses: writes what a resume from this checkpoint needs and ``state_dict`` is too small for."""

    def when_finished(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Runs at the end of the training, after ``on_train_end`` of all callbacks and of the LightningModule."""
        if "end" in self.at:
            self.run(trainer, pl_module, "end")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lets other runs into the folder."""
        if stage == "fit" and self._store is not None and self._store.write:
            unlock_folder(self._store.folder.parent)

    def run(
        self, trainer: L.Trainer, pl_module: L.LightningModule, trigger: Trigger, *, replaced: bool = False
    ) -> None:
        """Computes, writes and logs, unless the same weights have been analysed at this step already.

        Args:
            trainer: The trainer.
            pl_module: Its LightningModule.
            trigger: What started it.
            replaced: Whether the weights are known to be others than the training's.
        """
        mark, step = weights_mark(find_model(pl_module, self.model_attribute)), trainer.global_step
        if step != self._last_step:
            analysed: list[str] = []
        elif self._analysed is None or not any(Replicas.world().gather_objects(mark not in self._analysed)):
            return
        else:
            analysed = self._analysed
        if not replaced and self._left[0] != step:
            self._left = step, mark
        trained = not replaced and self._left[1].partition("/")[0] == mark.partition("/")[0]
        weights = kind_of_weights(trainer, trained=all(Replicas.world().gather_objects(trained)))
        marks = [*analysed, mark]
        done = self.attempt(trainer, None, lambda: self._analyse(trainer, pl_module, trigger, weights, marks))
        if done is None or not trainer.is_global_zero:
            return
        try:
            log_row(trainer, *done, scalars=self.log_scalars)
        except Exception as error:  # noqa: BLE001 - a service may raise anything
            # The row is on the disk, and no training ends for want of its copy in a logger.
            rank_zero_warn(f"{self.name}: the row of step {step} is not logged whole: {error}")

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
            failed = f"{self.name} failed {work}" if work else f"{self.name} failed"
            if self.on_error == "raise" or final or not isinstance(error, Exception):
                tell_where(error, f"{failed} at step {trainer.global_step}", self.name)
                raise
            rank_zero_warn(f"{failed} at step {trainer.global_step} and training goes on: {error}")
            return otherwise(error)

    def _analyse(
        self, trainer: L.Trainer, pl_module: L.LightningModule, trigger: Trigger, weights: Weights, marks: list[str]
    ) -> tuple[dict[str, Any], Histograms, tuple[Mapping[str, Any], ...]]:
        """Computes and writes; what is to be logged."""
        start = time.perf_counter()
        assert self._store is not None
        with (
            undisturbed(trainer, pl_module),
            as_compared(trainer, self, find_model(pl_module, self.model_attribute)) as told,
            AnalysisProgress(trainer, self.name) as progress,
            peak_memory_bytes(pl_module.device) as peak,
        ):
            context = self._context(trainer, pl_module, progress, weights, len(marks) - 1)
            row, vectors, histograms = undefined_row(context.model) or self._described(self.compute(context), context)
            row = with_precision(row, context.model, ran=not self.weights_alone)
            files = self._saved(vectors, context)
        for note in [*self._notes, *told]:
            row = row.noted(note)
        row = row.extended(result={"derived": dict(self.derived)}) if self.derived else row
        row = row.at(
            analysis=self.analysis or row.analysis or default_name(type(self)),
            name=self.name,
            step=context.step,
            epoch=trainer.current_epoch,
            trigger=trigger,
            weights=weights,
            seconds=time.perf_counter() - start,
            peak_memory_bytes=peak(),
            files=files,
        )
        earlier = self._store.history
        # A row is written when no rank can fail any more but the one that writes.
        Replicas.world().meet(f"{self.name}: the row of step {context.step}")
        line = self._store.append(row)
        self._last_step, self._analysed, self._notes = context.step, marks, []
        return line, histograms, earlier

    def _context(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        progress: AnalysisProgress,
        weights: Weights,
        repeat: int,
    ) -> AnalysisContext:
        """What there is to analyse, with everything trainable that has been trained; inside the isolation."""
        assert self._store is not None
        model = find_model(pl_module, self.model_attribute)
        self._observe_trainable(trainer, model)
        for name, parameter in model.named_parameters():
            # What was trained and is frozen again belongs to the change; the isolation freezes it again.
            if not parameter.requires_grad and canonical_name(name) in self._trained:
                parameter.requires_grad_(True)
        objective = self.task(pl_module, model) if self.needs_probe else None
        subject = (trainer, pl_module, model, objective, self._batches)
        return AnalysisContext(*subject, trainer.global_step, self._store, progress, weights=weights, repeat=repeat)

    def _saved(self, vectors: Vectors, context: AnalysisContext) -> dict[str, str]:
        """Writes the vectors; the names of their files."""
        for name, (vector, kind) in vectors.items():
            path, write = self.folder / context.file_name(name), context.store.write
            save_vectors(path, vector, kind=kind, model=context.model, step=context.step, write=write)
        return {name: context.file_name(name) for name in vectors}

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
        state = {"last_step": self._last_step, "folder": folder, "analysed": self._analysed}
        return {**state, "trained": sorted(self._trained), "derived": dict(self.derived)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Notes what the interrupted run left; it is taken up when training starts."""
        self.forget()
        self._last_step = state_dict["last_step"]
        # Earlier versions knew of no other weights at a step.
        self._analysed = state_dict.get("analysed")
        self._trained = set(state_dict.get("trained", ()))
        self._previous_folder = state_dict["folder"]
        self._previous_identity, self._lost = state_dict.get("folder_identity"), state_dict.get("lost")
        # Lightning's search for a learning rate or batch size takes back what was before any training.
        self._resumed = self._previous_folder is not None
        self.derived = dict(state_dict.get("derived", {}))
        apply_settings(self, self.derived)

    def __getstate__(self) -> dict[str, Any]:
        """Without the run that it belongs to and its source of batches, which only this process knows."""
        return {**self.__dict__, "_run": None, "_reading": None}


def _may_validate(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether a validation may follow this batch."""
    every = trainer.val_check_batch
    last = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    return bool(trainer.enable_validation and (last or every is None or (every and (batch_idx + 1) % every == 0)))


def default_name(callback: type) -> str:
    """Snake case of a class name.

    Example:
        >>> default_name(AnalysisCallback)
        'analysis_callback'
    """
    name = callback.__name__
    return "".join(("_" if index and char.isupper() else "") + char.lower() for index, char in enumerate(name))
