"""Turns the run directory into one HTML page when the training ends."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_goldy.callbacks.base import AnalysisCallback
from lightning_goldy.callbacks.run_folder import run_directory
from lightning_goldy.report.rendering import require_drawing


class RunReport(L.Callback):
    """Writes the report page of the run, on rank 0, after all other callbacks have finished.

    Args:
        output: File to write; ``report.html`` in the run directory by default.

    Example:
        >>> RunReport("report.html").output
        PosixPath('report.html')
    """

    def __init__(self, output: str | Path | None = None) -> None:
        self.output = None if output is None else Path(output)

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

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Writes the page."""
        from lightning_goldy.report.page import ReportError, write_report

        folder = run_directory(trainer)
        if not trainer.is_global_zero:
            return
        try:
            rank_zero_info(f"report: {write_report(folder, self.output)}")
        except (ReportError, OSError) as error:
            # The training is over and saved; a page can be made again from the files at any time.
            rank_zero_warn(f"the report could not be written: {error}; try `goldy report {folder}`")
