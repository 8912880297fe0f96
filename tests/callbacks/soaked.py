"""Run by a test: a training in which callbacks fire thousands of times, and what the process holds meanwhile."""

from __future__ import annotations

import gc
import json
import sys
import threading
import warnings
from itertools import count
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import psutil
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from lightning_goldy.callbacks import AttentionTracker, GoldenParameters, GoldenSnapshot, ParameterDistribution
from lightning_goldy.callbacks.base import AnalysisCallback
from lightning_goldy.report.figures import Figure
from tests.callbacks.training import Finetune, TokenData, fit

EVERY = 20
"""Firings between two looks, and figures between two that are drawn; the others are taken from those drawn before."""


class Look(L.Callback):
    """Notes memory, open files and threads as the firings go by."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        watchers = sum(isinstance(callback, AnalysisCallback) for callback in trainer.callbacks)
        pl_module.losses.clear()
        if trainer.global_step * watchers % EVERY:
            return
        gc.collect()
        # TensorBoard's thread opens its file for each write; a look in the middle of one would count it.
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
        process = psutil.Process()
        self.seen.append(
            {
                "firings": trainer.global_step * watchers,
                "bytes": process.memory_info().rss,
                "files": process.num_fds(),
                "threads": process.num_threads(),
                "own_threads": threading.active_count(),
            }
        )


def main(firings: int, folder: Path) -> None:
    torch.set_num_threads(1)
    drawn, kept, asked = Figure.png, {}, count()

    def png(figure: Figure) -> bytes:
        name = figure.title.partition(",")[0]
        if name not in kept or next(asked) % EVERY == 0:
            kept[name] = drawn(figure)
        return kept[name]

    Figure.png = png  # type: ignore[method-assign]
    often: dict[str, Any] = {"every_n_steps": 1, "at": ()}
    watchers = [
        GoldenSnapshot(**often),
        GoldenParameters(n_samples=1, **often),
        ParameterDistribution(**often),
        AttentionTracker(n_samples=1, **often),
    ]
    look = Look()
    loggers = [TensorBoardLogger(folder, name=None, version="run"), CSVLogger(folder, name=None, version="csv")]
    steps = firings // len(watchers)
    fit(
        folder,
        [*watchers, look],
        module=Finetune,
        data=TokenData(),
        logger=loggers,
        max_epochs=-1,
        max_steps=steps,
        limit_val_batches=0,
    )
    rows = [len((watcher.folder / "results.jsonl").read_text().splitlines()) for watcher in watchers]
    (folder / "seen.json").write_text(json.dumps({"rows": rows, "seen": look.seen}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]), Path(sys.argv[2]))
