"""A progress bar for analyses that take longer than a few seconds, beside the trainer's own."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from tqdm import tqdm

_PATIENCE_SECONDS = 3.0


class AnalysisProgress:
    """Called with (done, total); shows itself only when the work turns out to be long.

    Args:
        trainer: Its progress bar decides the style; without one nothing is shown.
        label: Text beside the bar.
    """

    def __init__(self, trainer: L.Trainer, label: str) -> None:
        self._bar = trainer.progress_bar_callback if trainer.is_global_zero else None
        self._label = label
        self._start = time.monotonic()
        self._tqdm: Any = None
        self._task: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Reports that ``done`` of ``total`` parts are finished."""
        if self._bar is None or time.monotonic() - self._start < _PATIENCE_SECONDS:
            return
        if isinstance(self._bar, RichProgressBar):
            rich = self._bar.progress
            if rich is None:
                return
            if self._task is None:
                # Lightning's columns read these fields of every task.
                self._task = rich.add_task(self._label, total=total, visible=True)
            rich.update(self._task, completed=done)
        elif isinstance(self._bar, TQDMProgressBar):
            if self._tqdm is None:
                self._tqdm = tqdm(total=total, desc=self._label, position=2, leave=False)
            self._tqdm.update(done - self._tqdm.n)

    def __enter__(self) -> AnalysisProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._tqdm is not None:
            self._tqdm.close()
        if self._task is not None and isinstance(self._bar, RichProgressBar) and self._bar.progress is not None:
            self._bar.progress.remove_task(self._task)
