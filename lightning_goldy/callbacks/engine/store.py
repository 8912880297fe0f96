"""Where results go: the folder of a callback with its rows, every logger, a progress bar, and what it all took."""

from __future__ import annotations

import math
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from tqdm import tqdm

from lightning_goldy.analysis.result import Cost, Row
from lightning_goldy.callbacks.engine.run_folder import (
    POOL,
    FolderNotes,
    checkpoint_folders,
    file_names,
    prune_bases,
    unlock_folder,
)
from lightning_goldy.core.files import (
    append_row,
    atomic_path,
    atomic_write,
    filter_rows,
    finite,
    read_rows,
    repair_rows,
    to_json_line,
)
from lightning_goldy.core.store import Kind
from lightning_goldy.core.vector import ParameterVector
from lightning_goldy.report.answers import answers_of, answers_text
from lightning_goldy.report.descriptions import description_of
from lightning_goldy.report.figures import TEXTS, ReportError, draw_figures, figures_of, reads_of
from lightning_goldy.report.loggers import figure_loggers, log_figure, log_histogram, log_scalars, log_text
from lightning_goldy.report.rendering import RenderError
from lightning_goldy.report.run import upgraded

ROWS = "results.jsonl"
_PATIENCE_SECONDS = 3.0
_LINE_SECONDS = 30.0
_told: set[str] = set()


MOST_ROWS = 200
"""Rows that a history holds at most."""


class RowHistory:
    """Rows of one analysis in the order of the run, at most 200, evenly spaced from the first on.

    Of each it holds step, trigger, metrics and what :func:`reads_of` names. When it is full every second row goes and
    only every second of those that follow is taken, so memory and time per row do not grow with the run.

    Args:
        rows: To begin with.

    Example:
        >>> rows = ({"analysis": "tiny", "step": step, "trigger": "step", "metrics": {}} for step in range(1000))
        >>> history = RowHistory(rows)
        >>> len(history.rows), [row["step"] for row in history.rows[:3]], history.rows[-1]["step"]
        (125, [0, 8, 16], 992)
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]] = ()) -> None:
        self._rows: list[Mapping[str, Any]] = []
        self._stride = 1
        self._seen = 0
        for row in rows:
            self.add(row)

    @property
    def rows(self) -> tuple[Mapping[str, Any], ...]:
        """What is held."""
        return tuple(self._rows)

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes in the next row, as ``results.jsonl`` would give it back."""
        if row.get("result", {}).get("undefined"):
            return
        taken, self._seen = self._seen % self._stride == 0, self._seen + 1
        if not taken:
            return
        reads = reads_of(row["analysis"])
        result = {name: value for name, value in row.get("result", {}).items() if name in reads}
        kept = {name: row[name] for name in ("analysis", "step", "trigger", "metrics")}
        self._rows.append(finite({**kept, "result": result}))
        if len(self._rows) > MOST_ROWS:
            self._rows, self._stride = self._rows[::2], 2 * self._stride


_FIELDS: dict[str, type] = {"analysis": str, "step": int, "trigger": str, "metrics": dict}


def row_fault(row: Mapping[str, Any], fields: Iterable[str] = tuple(_FIELDS)) -> str | None:
    """Why an object is no row of an analysis; None where it is one.

    Args:
        row: As it was read.
        fields: Those that it must have.

    Example:
        >>> row_fault({"analysis": "tiny", "step": "3", "trigger": "end", "metrics": {}})
        "'step' must be int, got '3'"
    """
    for name in fields:
        if not isinstance(row.get(name), _FIELDS[name]) or isinstance(row[name], bool):
            return f"{name!r} must be {_FIELDS[name].__name__}, got {row.get(name)!r:.60}"
    files = row.get("files", {})
    if not isinstance(row.get("result", {}), dict) or not isinstance(files, dict):
        return "'result' and 'files' must be objects"
    # What a resume copies lies beside the row.
    outside = [
        name for name in files.values() if not isinstance(name, str) or name in ("", "..") or Path(name).name != name
    ]
    return f"'files' must hold names without a folder, got {outside[0]!r:.60}" if outside else None


def _resumed_fault(row: Mapping[str, Any]) -> str | None:
    return row_fault(row, ("step",))


Vectors = dict[str, tuple[ParameterVector, Kind]]
Histograms = dict[str, tuple[list[float], list[int]]]


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


def tell_where(error: BaseException, failed: str, name: str) -> None:
    """Puts in front of an error's message which callback failed and when, and behind it what lets the training go on.

    An error whose message is made of more than its first argument, such as one of a file, stays as it is, and so does
    what is no error but an end, as of the keyboard.

    Args:
        error: As the analysis raised it; its kind stays.
        failed: Who failed, and when.
        name: Of the callback.

    Example:
        >>> error = ValueError("the loss is nan")
        >>> tell_where(error, "taylor failed at step 12", "taylor")
        >>> print(error)
        taylor failed at step 12: the loss is nan. Give taylor on_error="warn" to let the training go on without it.
    """
    first = error.args[0] if error.args else None
    # A message is told once, however many layers it passes.
    if isinstance(error, Exception) and isinstance(first, str) and str(error) == first and not first.startswith(failed):
        end = "" if first.endswith((".", "?")) else "."
        hint = f'Give {name} on_error="warn" to let the training go on without it.'
        error.args = (f"{failed}: {first}{end} {hint}", *error.args[1:])


class ResultStore:
    """The folder of one callback: ``results.jsonl`` and the files that its rows name.

    A row is one line at the end of the file; only a resume ever rewrites it, once. A last line that a killed process
    left torn is taken away when the folder is opened.

    Args:
        folder: The folder, made when missing.
        write: Whether this process writes; every other method is a no-op without it.

    Raises:
        PermissionError: The folder cannot be written.
    """

    def __init__(self, folder: Path, *, write: bool) -> None:
        self.folder = folder
        self.write = write
        self._history: RowHistory | None = None
        self._row_files: set[str] | None = None
        self._notes = FolderNotes.read(folder)
        self._aside: Path | None = None
        if not write:
            return
        self._before = {path.name for path in folder.iterdir()} if folder.is_dir() else None
        self._rows_before = self.rows.read_bytes() if self.rows.is_file() else None
        probe = folder / f".{uuid.uuid4().hex}.writable"
        try:
            atomic_write(probe, "")
            probe.unlink()
            # Left by a process that was killed while it wrote; nobody else writes here.
            for leftover in folder.glob(".*.partial"):
                leftover.unlink()
        except OSError as error:
            raise PermissionError(f"results cannot be written to {folder}: {error}") from error
        cut = repair_rows(self.rows)
        if cut:
            rank_zero_warn(f"the last line of {self.rows} was torn, {cut} bytes of it; it has been taken away")

    @property
    def identity(self) -> str:
        """Differs between folders, and stays when one is moved."""
        return self._notes.identity

    @property
    def rows(self) -> Path:
        """The file of result rows."""
        return self.folder / ROWS

    @property
    def history(self) -> tuple[Mapping[str, Any], ...]:
        """Earlier rows of this run for the figures over it, thinned; none where this process does not write."""
        return self._remembered().rows

    def append(self, row: Row) -> dict[str, Any]:
        """Adds one row; the files that it names must be there already.

        Returns:
            The line as a dict, also where this process does not write.
        """
        line = row.to_dict()
        if self.write:
            history = self._remembered()
            append_row(self.rows, line)
            history.add(line)
            if self._row_files is not None:
                self._row_files.update(line["files"].values())
        return line

    def start_fresh(self) -> None:
        """Puts results of an earlier run out of the way, for a run that starts anew in the same folder."""
        if not (self.write and self.rows.exists()):
            return
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
            number += 1
        self._history = self._row_files = None
        self.folder.rename(aside)
        self.folder.mkdir()
        self._aside = aside
        self._notes = FolderNotes.read(self.folder)
        rank_zero_info(f"{self.folder} held an earlier run's results; they are now in {aside}")

    def withdraw(self) -> None:
        """Takes back what was written since the folder was opened, for a run that does not begin after all."""
        if not self.write or not self.folder.is_dir():
            return
        self._put_back()
        for parent in self.folder.parents:
            # The base that it began with, where no other run has it.
            prune_bases(parent / POOL)
            with suppress(OSError):
                (parent / POOL).rmdir()

    def _put_back(self) -> None:
        if self._aside is not None:
            shutil.rmtree(self.folder)
            self._aside.rename(self.folder)
            return
        for path in self.folder.iterdir():
            if path.name not in (self._before or ()) and path.is_file():
                path.unlink()
        if self._rows_before is not None and self.rows.read_bytes() != self._rows_before:
            atomic_write(self.rows, self._rows_before)
        if self._before is None:
            unlock_folder(self.folder.parent)
            for made in (self.folder, self.folder.parent):
                if not any(made.iterdir()):
                    made.rmdir()

    def continue_from(self, previous: Path, step: int) -> None:
        """Keeps what an uninterrupted run would have at ``step``: earlier rows with their files, no later ones.

        Args:
            previous: The folder of the run that is resumed; it may be this one.
            step: Optimizer steps at which the checkpoint was written.

        Raises:
            FileNotFoundError: A row of the earlier run names a file that is gone.
        """
        if not self.write:
            return
        self._history = self._row_files = None
        if previous.resolve() == self.folder.resolve():
            filter_rows(self.rows, lambda row: row["step"] <= step, check=_resumed_fault)
            return
        # What another run has left here is no part of this one.
        self.start_fresh()
        # The process that wrote there may have been killed within a row.
        kept = [row for row in read_rows(previous / ROWS, torn="drop", check=_resumed_fault) if row["step"] <= step]
        for name in sorted({name for row in kept for name in row.get("files", {}).values()}):
            self.carry(previous / name)
        if kept:
            atomic_write(self.rows, "".join(to_json_line(row) + "\n" for row in kept).encode("utf-8", "replace"))

    def note(self, callback: str = "") -> None:
        """Writes down which folder this is, by which a resume knows it again.

        Args:
            callback: Class of the callback whose folder it is; by default as it was noted before.
        """
        self._notes.callback = callback or self._notes.callback
        if self.write:
            self._notes.write(self.folder)

    def claim(self, state: Mapping[str, Any], trainer: L.Trainer) -> str | None:
        """Notes the files that a checkpoint's state names, and removes those of checkpoints that are no more.

        Files that rows name stay. A checkpoint counts as removed when it was seen in a folder of Lightning's and is not
        there any more; one that was never seen there is taken to exist.

        Args:
            state: What the checkpoint is to hold.
            trainer: Its checkpoint callbacks know the folders.

        Returns:
            The token that the checkpoint is to carry; None where this process does not write.
        """
        if not self.write:
            return None
        for name in self._notes.released(checkpoint_folders(trainer)) - set(file_names(state)) - self._files_of_rows():
            (self.folder / name).unlink(missing_ok=True)
        token = self._notes.claim(set(file_names(state)))
        self.note()
        return token

    def _files_of_rows(self) -> set[str]:
        if self._row_files is None:
            self._row_files = {name for row in read_rows(self.rows) for name in row.get("files", {}).values()}
        return self._row_files

    def carry(self, source: Path) -> None:
        """Brings a file of an earlier run into this folder."""
        if self.write and not (self.folder / source.name).exists():
            if not source.is_file():
                raise FileNotFoundError(
                    f"{source}, which the resumed run needs, is gone: put the folder back there, or as "
                    f"goldy/{self.folder.name} into the folder that the checkpoint lies in"
                )
            with atomic_path(self.folder / source.name) as temporary:
                shutil.copyfile(source, temporary)

    def _remembered(self) -> RowHistory:
        if self._history is None:
            self._history = RowHistory(map(upgraded, read_rows(self.rows, check=row_fault)) if self.write else ())
        return self._history


def steps_so_far(trainer: L.Trainer) -> int:
    """Batches that optimizers have stepped for, which the loggers' axis and fractions of a training count.

    Under manual optimization ``global_step`` counts the steps of all optimizers, however many there are per batch.
    """
    module = getattr(trainer, "lightning_module", None)
    if module is None or module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


def training_length(trainer: L.Trainer) -> float:
    """The steps of the whole training, as :func:`steps_so_far` counts them; infinite without an end."""
    if trainer.lightning_module.automatic_optimization or trainer.max_steps == -1:
        return trainer.estimated_stepping_batches
    # max_steps counts the steps of all optimizers; how many a batch makes shows only as it trains.
    optimizers = max(1, len(trainer.optimizers))
    batches = math.inf if trainer.max_epochs == -1 else trainer.num_training_batches * max(trainer.max_epochs or 1, 1)
    return min(math.ceil(trainer.max_steps / optimizers), batches)


# Units: TensorBoard shows images about so wide, and makes wider ones smaller until their letters cannot be read.
_CARD = 360


def log_row(
    trainer: L.Trainer,
    row: Mapping[str, Any],
    histograms: Mapping[str, tuple[list[float], list[int]]],
    earlier: Sequence[Mapping[str, Any]] = (),
    *,
    scalars: Literal["headline", "all"] = "all",
) -> None:
    """Logs a row's metrics and cost, its figures and its histograms under ``goldy/<name>/``.

    Callbacks that have a ``when_logged`` are given the row and the tags of the scalars.

    Args:
        trainer: Its loggers are written to; without one nothing happens.
        row: A row of ``results.jsonl``.
        histograms: Bin edges and counts by name.
        earlier: Rows of the same analysis before it, for the figures over the run.
        scalars: ``all`` metrics and costs, or those that the analysis's description calls its headline.
    """
    if not trainer.loggers:
        return
    prefix = f"goldy/{row['name']}"
    # Lightning draws its own metrics over batches that stepped. So the loss at x is the one of the weights that an
    # analysis at x has seen.
    step = steps_so_far(trainer)
    whole, description = scalars == "all", description_of(row["analysis"])
    numbers = {
        **{name: value for name, value in row["metrics"].items() if whole or description.is_headline(name)},
        **{f"cost/{name}": value for name, value in row["cost"].items() if whole},
    }
    tagged = {f"{prefix}/{name}": value for name, value in numbers.items()}
    write = partial(to_each, trainer.loggers, f"{row['name']} at step {row['step']} is not in")
    write(lambda loggers: log_scalars(loggers, tagged, step))
    for callback in getattr(trainer, "callbacks", ()):
        if callable(hear := getattr(callback, "when_logged", None)):
            hear(trainer, row, [tag for tag, value in tagged.items() if value is not None])
    for name, (edges, counts) in histograms.items():
        write(lambda loggers: log_histogram(loggers, f"{prefix}/{name}", (edges, counts), step))  # noqa: B023
    try:
        sentences = answers_text(answers_of([(row["name"], row["analysis"], [*earlier, row])]))
    except ReportError as error:
        sentences = ""
        rank_zero_warn(f"the answer of {row['name']} at step {row['step']} is not logged: {error}")
    if sentences:
        write(lambda loggers: log_text(loggers, f"goldy/answers/{row['name']}", sentences, step))
    for name, written in TEXTS.items():
        if row["result"].get(name):
            text = written(row["result"][name])
            write(lambda loggers: log_text(loggers, f"{prefix}/{name}", text, step))  # noqa: B023
    _log_figures(trainer.loggers, row, earlier, step)


def _log_figures(
    loggers: Sequence[Any], row: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]], step: int
) -> None:
    """Logs the figures of a row to the loggers that take figures; what cannot be drawn is told."""

    def tell(name: str, error: Exception) -> None:
        # The row holds the numbers; no training ends for want of a picture.
        rank_zero_warn(f"figure {name!r} of {row['name']} at step {row['step']} is not logged: {error}")

    drawn = figures_of(row["analysis"]) and not row["result"].get("undefined")
    takers = figure_loggers(loggers) if drawn else []
    if not takers:
        return
    try:
        figures = draw_figures(row, earlier, failed=tell)
    except ImportError as error:
        if str(error) not in _told:
            _told.add(str(error))
            rank_zero_warn(f"figures are not logged: {error}")
        return
    for name, figure in figures.items():
        # A tag of their own: TensorBoard shows a tag in one plugin only, and hides the figure behind a scalar.
        try:
            draw = partial(log_figure, tag=f"goldy/{row['name']}/figure/{name}", figure=figure.within(_CARD), step=step)
            to_each(takers, f"{row['name']} at step {row['step']} is not in", draw)
        except RenderError as error:
            tell(name, error)


def to_each(loggers: Sequence[Any], failed: str, write: Callable[[list[Any]], object]) -> None:
    """Writes to one logger after the other; one that fails costs its own entry alone.

    Args:
        loggers: Of a trainer.
        failed: What is missing in one that fails, before its name.
        write: Gets a list of one.

    Raises:
        RenderError: A figure cannot be drawn, which is no logger's fault.
    """
    for logger in loggers:
        try:
            write([logger])
        except RenderError:
            raise
        except Exception as error:  # noqa: BLE001 - a service may raise anything
            rank_zero_warn(f"{failed} {type(logger).__name__}: {type(error).__name__}: {error}")


class AnalysisProgress:
    """Called with (done, total); shows itself only when the work turns out to be long.

    In a terminal it is a bar, from the first analysis on; elsewhere a line every 30 seconds.

    Args:
        trainer: Its progress bar decides the style; without one nothing is shown.
        label: Text beside the bar.
    """

    def __init__(self, trainer: L.Trainer, label: str) -> None:
        self._bar = trainer.progress_bar_callback if trainer.is_global_zero else None
        self._label = label
        self._start = self._told = time.monotonic()
        self._tqdm: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Reports that ``done`` of ``total`` parts are finished."""
        now = time.monotonic()
        if self._bar is None or now - self._start < _PATIENCE_SECONDS:
            return
        if not sys.stderr.isatty():
            # A bar that is drawn over itself would be one long line of a file.
            if now - self._told >= _LINE_SECONDS:
                self._told = now
                print(f"{self._label}: {done} of {total} after {now - self._start:.0f} s", file=sys.stderr, flush=True)
            return
        # Lightning's bar begins with the first batch, after the analyses of the start.
        if isinstance(self._bar, RichProgressBar) and (rich := self._bar.progress) is not None:
            if self._task is None:
                # Lightning's columns read these fields of every task.
                self._task = rich.add_task(self._label, total=total, visible=True)
            rich.update(self._task, completed=done)
        elif isinstance(self._bar, (RichProgressBar, TQDMProgressBar)):
            if self._tqdm is None:
                self._tqdm = tqdm(total=total, desc=self._label, position=2, leave=False)
            self._tqdm.update(done - self._tqdm.n)

    def __enter__(self) -> AnalysisProgress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._tqdm is not None:
            self._tqdm.close()
        if self._task is not None and isinstance(self._bar, RichProgressBar) and self._bar.progress is not None:
            self._bar.progress.remove_task(self._task)


@contextmanager
def peak_memory_bytes(device: torch.device) -> Iterator[Callable[[], int]]:
    """Measures the peak memory of a block; the yielded function gives the bytes once the block has ended.

    On a CUDA device the peak of allocated memory within the block; elsewhere the process's largest resident size so
    far, which includes the training's.

    Args:
        device: Where the model is.

    Example:
        >>> with peak_memory_bytes(torch.device("cpu")) as peak:
        ...     block = torch.zeros(1000)
        >>> peak() > 4000
        True
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    peak = 0
    yield lambda: peak
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_peak()


def _resident_peak() -> int:
    try:
        import resource
    except ImportError:  # pragma: no cover - Windows
        return 0
    # Linux counts kilobytes, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
