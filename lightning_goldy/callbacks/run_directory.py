"""Where a callback's results go, and how they go on after a resume."""

from __future__ import annotations

import itertools
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_info

from lightning_goldy.core.files import append_row, atomic_path, atomic_write, filter_rows, read_rows, to_json_line

ROWS = "results.jsonl"
_UNLOGGED = "goldy_logs"


def run_directory(trainer: L.Trainer) -> Path:
    """The folder of this run: the first logger's, or a numbered one below the default root; the same on all ranks.

    A collective: every rank must call.
    """
    if trainer.loggers:
        logger = trainer.loggers[0]
        # Loggers of services share one save_dir between runs.
        own = getattr(logger, "log_dir", None) or os.path.join(
            logger.save_dir or trainer.default_root_dir, str(logger.name), str(logger.version)
        )
        return Path(str(trainer.strategy.broadcast(own)))
    known = getattr(trainer, "_goldy_run_directory", None)
    if known is None:
        root = Path(trainer.default_root_dir) / _UNLOGGED
        taken = [int(path.name[8:]) for path in root.glob("version_*") if path.name[8:].isdigit()]
        known = Path(str(trainer.strategy.broadcast(str(root / f"version_{max(taken, default=-1) + 1}"))))
        # All callbacks of a trainer share one folder.
        trainer._goldy_run_directory = known  # type: ignore[attr-defined]
    return known


class ResultStore:
    """The folder of one callback: ``results.jsonl`` and the files that its rows name.

    Args:
        folder: The folder, made when missing.
        write: Whether this process writes; every other method is a no-op without it.

    Raises:
        PermissionError: The folder cannot be written.
    """

    def __init__(self, folder: Path, *, write: bool) -> None:
        self.folder = folder
        self.write = write
        if not write:
            return
        probe = folder / f".{uuid.uuid4().hex}.writable"
        try:
            atomic_write(probe, "")
            probe.unlink()
            # Left by a process that was killed while it wrote; nobody else writes here.
            for leftover in folder.glob(".*.partial"):
                leftover.unlink()
        except OSError as error:
            raise PermissionError(f"results cannot be written to {folder}: {error}") from error

    @property
    def rows(self) -> Path:
        """The file of result rows."""
        return self.folder / ROWS

    def append(self, row: dict[str, Any]) -> None:
        """Adds one row; the files that it names must be there already."""
        if self.write:
            append_row(self.rows, row)

    def start_fresh(self) -> None:
        """Puts results of an earlier run out of the way, for a run that starts anew in the same folder."""
        if not (self.write and self.rows.exists()):
            return
        number = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.{number}")).exists():
            number += 1
        self.folder.rename(aside)
        self.folder.mkdir()
        rank_zero_info(f"{self.folder} held an earlier run's results; they are now in {aside}")

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
        if previous.resolve() == self.folder.resolve():
            filter_rows(self.rows, lambda row: row["step"] <= step)
            return
        kept = [row for row in read_rows(previous / ROWS) if row["step"] <= step]
        for name in sorted({name for row in kept for name in row.get("files", {}).values()}):
            self.carry(previous / name)
        if kept:
            atomic_write(self.rows, "".join(to_json_line(row) + "\n" for row in kept))

    def prune(self, prefix: str, trainer: L.Trainer) -> None:
        """Removes files that belonged to checkpoints which Lightning has removed since.

        Such a file is written right before its checkpoint. So it is still needed when a checkpoint is as young as the
        file and older than the next one.

        Args:
            prefix: What the files' names start with; they are numbered by step.
            trainer: Its checkpoint callbacks know the folders. Without one nothing is removed.
        """
        folders = {getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks} - {None}
        if not (self.write and folders):
            return
        saved = [path.stat().st_mtime for folder in folders for path in Path(str(folder)).glob("*.ckpt")]
        files = sorted(self.folder.glob(f"{prefix}-step=*.safetensors"))
        for file, following in itertools.pairwise(files):
            if not any(file.stat().st_mtime <= time < following.stat().st_mtime for time in saved):
                file.unlink()

    def carry(self, source: Path) -> None:
        """Brings a file of an earlier run into this folder."""
        if self.write and not (self.folder / source.name).exists():
            if not source.is_file():
                raise FileNotFoundError(f"{source}, which the resumed run needs, is gone")
            with atomic_path(self.folder / source.name) as temporary:
                shutil.copyfile(source, temporary)
