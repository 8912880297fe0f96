"""Scalars, figures and histograms of a result to every logger that the trainer has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_goldy.report.coupling_drifts import moved_text
from lightning_goldy.report.figures import draw_figures
from lightning_goldy.report.generations import generations_text
from lightning_goldy.report.loggers import log_figure, log_histogram, log_scalars, log_text
from lightning_goldy.report.rendering import RenderError

_told: set[str] = set()


def log_findings(
    trainer: L.Trainer, row: Mapping[str, Any], histograms: Mapping[str, tuple[list[float], list[int]]]
) -> None:
    """Logs a row's metrics and cost, its figures and its histograms under ``goldy/<name>/``.

    Args:
        trainer: Its loggers are written to; without one nothing happens.
        row: A row of ``results.jsonl``.
        histograms: Bin edges and counts by name.
    """
    if not trainer.loggers:
        return
    prefix = f"goldy/{row['name']}"
    # Lightning draws its own metrics over batches that stepped, and global_step counts every optimizer's step. So the
    # loss at x is the one of the weights that an analysis at x has seen.
    step = trainer.global_step // max(1, len(trainer.optimizers))
    scalars = {f"{prefix}/{name}": value for name, value in row["metrics"].items()}
    scalars.update({f"{prefix}/cost/{name}": value for name, value in row["cost"].items()})
    log_scalars(trainer.loggers, scalars, step)
    for name, (edges, counts) in histograms.items():
        log_histogram(trainer.loggers, f"{prefix}/{name}", (edges, counts), step)
    if row["result"].get("generations"):
        log_text(trainer.loggers, f"{prefix}/generations", generations_text(row["result"]["generations"]), step)
    if row["result"].get("moved"):
        log_text(trainer.loggers, f"{prefix}/moved", moved_text(row["result"]["moved"]), step)
    try:
        figures = draw_figures(row)
    except ImportError as error:
        if str(error) not in _told:
            _told.add(str(error))
            rank_zero_warn(f"figures are not logged: {error}")
        return
    for name, figure in figures.items():
        # A tag of their own: TensorBoard shows a tag in one plugin only, and hides the figure behind a scalar.
        try:
            log_figure(trainer.loggers, f"{prefix}/figure/{name}", figure, step)
        except RenderError as error:
            # The row holds the numbers; no training ends for want of a picture.
            rank_zero_warn(f"figure {name!r} of {row['name']} at step {row['step']} is not logged: {error}")
