"""Turns the run directory into one HTML page when the training ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_goldy.callbacks.base import AnalysisCallback
from lightning_goldy.callbacks.engine.run_folder import run_directory
from lightning_goldy.callbacks.engine.store import ROWS, steps_so_far, to_each
from lightning_goldy.core.files import require_local
from lightning_goldy.core.naming import require_kinds
from lightning_goldy.report.answers import answers_table, answers_text, scalar_layout, sorted_scalars
from lightning_goldy.report.comparison import write_comparison
from lightning_goldy.report.descriptions import position_of
from lightning_goldy.report.figures import ReportError
from lightning_goldy.report.formatting import printable, show
from lightning_goldy.report.loggers import log_columns, log_hyperparameters, log_layout, log_text
from lightning_goldy.report.page import answers_of_run, costs_in_words
from lightning_goldy.report.rendering import require_drawing
from lightning_goldy.report.run import read_run


class RunReport(L.Callback):
    """Writes the report page of the run, on rank 0: at the end, before each analysis at the end, and when a run fails.

    So there is a page also of a run that is killed in its last analysis.

    Args:
        output: File to write; ``report.html`` in the run directory by default.
        compare: Directories of earlier runs; at the end ``comparison.html`` beside the page sets this run beside them.

    Raises:
        ValueError: A directory to compare with does not exist, or the output is an address of another storage.

    Example:
        >>> RunReport("report.html").output
        PosixPath('report.html')
    """

    def __init__(self, output: str | Path | None = None, compare: Sequence[str | Path] = ()) -> None:
        require_kinds(RunReport.__init__, locals())
        self.output = None if output is None else require_local(output, "output of RunReport")
        self.compare = [Path(directory) for directory in ([compare] if isinstance(compare, (str, Path)) else compare)]
        for directory in self.compare:
            if not directory.is_dir():
                raise ValueError(f"compare names {directory}, which is no directory of a run")
        self._folder: Path | None = None
        self._seen: dict[str, int] = {}
        self._logged: set[str] = set()
        self._instances: dict[str, str] = {}
        self._layout: dict[str, Any] = {}
        self._params: tuple[dict[str, str], dict[str, Any]] = {}, {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses a run whose report could not be written, before it starts.

        Raises:
            ImportError: altair or vl-convert is not installed.
            ValueError: The trainer has no analysis to report on.
        """
        if stage != "fit":
            return
        if not any(isinstance(callback, AnalysisCallback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ValueError(
                "RunReport has nothing to report: the trainer has no analysis callback, such as GoldenSnapshot()"
            )
        require_drawing()
        # All ranks agree on the folder before rank 0 makes it.
        folder = run_directory(trainer) if trainer.loggers else None
        if folder is not None and trainer.is_global_zero:
            self._params = _declare_hyperparameters(trainer, pl_module)
        # Analyses of the start come before this callback's own.
        self._logged, self._instances, self._layout = set(), {}, {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes the folder, which all ranks ask for."""
        self._folder, self._seen = run_directory(trainer), {}

    def when_logged(self, trainer: L.Trainer, row: Mapping[str, Any], tags: Sequence[str]) -> None:
        """Arranges TensorBoard's scalars by question, anew when one of them is logged for the first time.

        Args:
            trainer: Whose loggers have got them.
            row: Of which analysis.
            tags: Of its scalars.
        """
        self._logged.update(tags)
        # As the page has them.
        known = {**self._instances, row["name"]: row["analysis"]}
        self._instances = dict(sorted(known.items(), key=lambda instance: position_of(instance[1])))
        layout = scalar_layout(self._instances.items(), self._logged)
        if layout != self._layout:
            self._layout = layout
            to_each(trainer.loggers, "no layout for", lambda loggers: log_layout(loggers, layout))

    def write_page(self, trainer: L.Trainer) -> None:
        """Writes the page where there are rows that it does not have; on rank 0, the others have nothing to do."""
        if self._folder is None or not trainer.is_global_zero:
            return
        rows = {str(path): path.stat().st_size for path in self._folder.glob(f"goldy/*/{ROWS}")}
        if rows != self._seen:
            self._write(self._folder)
            self._seen = rows

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Writes the page with what a failed or interrupted run has found."""
        self.write_page(trainer)
        self._name_columns(trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the page."""
        folder = run_directory(trainer)
        self._name_columns(trainer)
        if trainer.is_global_zero and (path := self._write(folder)) is not None:
            self._tell(trainer, folder)
            rank_zero_info(f"report: {path}")
            self._set_beside(folder, path)

    def _name_columns(self, trainer: L.Trainer) -> None:
        """The headlines that have values become columns of TensorBoard's table of runs."""
        if not trainer.is_global_zero:
            return
        columns = sorted_scalars(self._instances.items(), self._logged)
        to_each(trainer.loggers, "no columns for", lambda loggers: log_columns(loggers, *self._params, columns))

    def _set_beside(self, folder: Path, page: Path) -> None:
        """Writes the comparison, where one is wanted."""
        if not self.compare:
            return
        try:
            target = write_comparison([*self.compare, folder], page.with_name("comparison.html"))
        except (ReportError, OSError) as error:
            rank_zero_warn(f"the comparison could not be written: {error}")
        else:
            rank_zero_info(f"comparison: {target}")

    def _tell(self, trainer: L.Trainer, folder: Path) -> None:
        """The answers for the console and for loggers that take text."""
        run = read_run(folder)
        answers = answers_of_run(run)
        text = answers_text(answers)
        step = steps_so_far(trainer)
        to_each(trainer.loggers, "the answers are not in", lambda each: log_text(each, "goldy/answers", text, step))
        show(answers_table(answers))
        print(printable(costs_in_words(run)))

    def _write(self, folder: Path) -> Path | None:
        from lightning_goldy.report.page import write_report

        try:
            return write_report(folder, self.output)
        except (ReportError, OSError) as error:
            # A page can be made again from the files at any time.
            rank_zero_warn(f"the report could not be written: {error}; try `goldy report {folder}`")
            return None


def _declare_hyperparameters(trainer: L.Trainer, pl_module: L.LightningModule) -> tuple[dict[str, str], dict[str, Any]]:
    """Gives loggers base, data and precision, and gives back these and the run's own parameters."""
    own: dict[str, Any] = {}
    for part in (pl_module, trainer.datamodule):  # type: ignore[attr-defined]
        if part is not None and getattr(part, "_log_hyperparams", False):
            own |= {name: value for name, value in part.hparams_initial.items() if name != "_class_path"}
    data, model = trainer.datamodule, getattr(pl_module, "model", pl_module)  # type: ignore[attr-defined]
    config = getattr(model, "config", None)
    source = getattr(data, "source", None)
    told = {
        "goldy/base": str(getattr(config, "name_or_path", "") or own.get("model") or type(model).__name__),
        "goldy/data": " ".join(
            [type(data).__name__ if data is not None else "data loaders", *([str(source)] if source else [])]
        ),
        "goldy/precision": str(trainer.precision),
    }
    to_each(trainer.loggers, "no hyperparameters for", lambda loggers: log_hyperparameters(loggers, told, own))
    return told, own
