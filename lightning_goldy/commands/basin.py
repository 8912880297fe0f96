"""Basin volumes of saved checkpoints: loads each into the model of a configuration and measures it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from lightning_goldy.analysis.basin import VolumeSurvey, diagonal_preconditioner
from lightning_goldy.analysis.basin.survey import ONLY_SPLIT, Make
from lightning_goldy.analysis.precision import with_precision
from lightning_goldy.callbacks.engine.store import ResultStore, peak_memory_bytes
from lightning_goldy.commands.checkpoints import SavedModel, positions, read_saved
from lightning_goldy.commands.fit import check_configs, run_configured
from lightning_goldy.commands.output import output_folder, print_report
from lightning_goldy.commands.ranks import joined_ranks
from lightning_goldy.core.files import printable, read_rows
from lightning_goldy.core.isolation import undisturbed
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.report.formatting import format_number
from lightning_goldy.training.subject import check_probe, find_model, find_objective, find_probe, find_splits

_NAME = "basin_volume"


def measure_checkpoints(
    checkpoints: Sequence[str | Path],
    settings: Sequence[str],
    survey: VolumeSurvey,
    *,
    splits: bool = False,
    output: str | Path | None = None,
) -> Path:
    """Measures the volume around each checkpoint, prints a table and writes rows and a report.

    Processes that torchrun started share out the directions.

    Args:
        checkpoints: Lightning checkpoints or folders of ``save_pretrained``, in any order; rows are ordered by step.
        settings: The words that ``goldy fit`` would be given: ``--config FILE`` and changes to it.
        survey: What to measure; keeps the first checkpoint's sigma unless it was given one.
        splits: Whether to measure the data module's ``analysis_splits()`` rather than its probe.
        output: A folder without results; by default the next free ``runs/basin/version_N``.

    Returns:
        The folder.

    Raises:
        ValueError: A checkpoint is not one, does not fit the model or lacks the optimizer's state, or the configuration
            names no data.
        FileExistsError: The folder holds results already.
    """
    check_configs(settings)
    saved = [read_saved(path, with_optimizer=survey.needs_adam) for path in checkpoints]
    with joined_ranks("goldy basin") as ranks:
        folder = output_folder(output, _NAME, "basin")
        walk = run_configured(lambda: CheckpointVolumes(saved, survey, splits=splits, folder=folder), settings, folder)
        if not ranks.rank:
            Console().print(walk.table())
            print(printable(f"rows: {walk.store.rows}"))
            print_report(folder)
    return folder


class CheckpointVolumes(L.Callback):
    """Measures once the trainer has set up model and data; what the trainer evaluates afterwards does not matter.

    Args:
        saved: The checkpoints.
        survey: What to measure.
        splits: Whether to measure the data module's splits.
        folder: Where the rows go.
    """

    def __init__(self, saved: Sequence[SavedModel], survey: VolumeSurvey, *, splits: bool, folder: Path) -> None:
        self.saved, self.survey, self.splits = positions(saved), survey, splits
        self.store = ResultStore(folder / "goldy" / _NAME, write=not Replicas.world().rank)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Loads and measures one checkpoint after the other."""
        if trainer.max_epochs is None:
            # As fit() would have it; the optimizer's schedule may ask for the length of the run.
            trainer.fit_loop.max_epochs = 1000 if trainer.max_steps == -1 else -1
        with undisturbed(trainer, pl_module), Console().status("") as status:
            model = find_model(pl_module, None)
            batches = (
                find_splits(trainer, True, self.survey.n_samples)
                if self.splits
                else {ONLY_SPLIT: find_probe(trainer, pl_module, None, self.survey.n_samples).batches}
            )
            objective = find_objective(pl_module, model, None, next(iter(batches.values())))
            for number, (step, saved) in enumerate(self.saved, 1):
                status.update(f"{saved.path} ({number} of {len(self.saved)})")
                saved.load_into(pl_module, model)
                for split in batches.values():
                    check_probe(model, objective, split, self.survey.n_samples, pl_module=pl_module)
                adam = self._adam(saved, pl_module, model)
                start = time.perf_counter()
                with peak_memory_bytes(next(model.parameters()).device) as peak:
                    volumes = self.survey.measure(model, objective, batches, adam=adam)
                row = with_precision(volumes.row(), model).extended(result={"checkpoint": str(saved.path)})
                place = {"step": step, "epoch": saved.epoch, "trigger": "checkpoint", "weights": saved.weights}
                seconds = time.perf_counter() - start
                self.store.append(row.at(**place, seconds=seconds, peak_memory_bytes=peak()))

    def table(self) -> Table:
        """The volumes, one line per checkpoint, split and cutoff."""
        table = Table(title="Basin volume, nats: a lower bound in expectation", title_justify="left", box=SIMPLE_HEAD)
        for heading in ("checkpoint", "samples"):
            table.add_column(heading, overflow="fold")
        for heading in ("log V", "95 % from\nto", "bits per\nparameter", "rests on\ndirections"):
            table.add_column(heading, justify="right", no_wrap=True)
        for row in read_rows(self.store.rows):
            for volume in row["result"]["volumes"]:
                table.add_row(*map(Text, _cells(row, volume)))
        return table

    def _adam(self, saved: SavedModel, pl_module: L.LightningModule, model: nn.Module) -> Make | None:
        if not self.survey.needs_adam:
            return None
        curvature = saved.curvature(pl_module, model, self.survey.space(model))
        return lambda eps: diagonal_preconditioner(curvature, eps=eps, name="adam")


def _cells(row: dict[str, Any], volume: dict[str, Any]) -> list[str]:
    effective = f"{format_number(volume['effective_sample_size'])} of {len(volume['estimates'])}"
    unbounded = f"{volume['unbounded']} unbounded" if volume["unbounded"] else volume["preconditioner"]
    return [
        printable(Path(row["result"]["checkpoint"]).name),
        printable(volume["label"]),
        format_number(volume["log_volume"]),
        f"{format_number(volume['interval_low'])}\n{format_number(volume['interval_high'])}",
        format_number(volume["bits_per_parameter"]),
        f"{effective}\n({unbounded})",
    ]
