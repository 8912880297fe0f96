"""The same training with every strategy, level and number of cycles of head pruning, and without any."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_goldy.analysis.heads import HEAD_SCORES, compact
from lightning_goldy.analysis.result import Cost, Row
from lightning_goldy.callbacks import HeadPlasticity
from lightning_goldy.callbacks.engine.store import ROWS, ResultStore, peak_memory_bytes
from lightning_goldy.commands.fit import GoldyCLI, check_configs, command_line
from lightning_goldy.commands.output import output_folder, print_report
from lightning_goldy.core.architecture import HeadGates
from lightning_goldy.core.files import atomic_write, percentage, printable, read_rows
from lightning_goldy.core.isolation import undisturbed
from lightning_goldy.core.objective import map_batch
from lightning_goldy.report.formatting import format_number
from lightning_goldy.training.quiet import progress_only, without_known_warnings
from lightning_goldy.training.subject import find_model, find_objective

_NAME = "plasticity_sweep"
_QUICK = ("--trainer.max_steps=60", "--trainer.limit_val_batches=4")
# One device and no logger: the sweep keeps what is worth keeping.
_ALONE = (
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.logger=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
)


@dataclass(frozen=True)
class Sweep:
    """What is compared.

    Args:
        strategies: Names of head scores.
        levels: Shares of all heads to cut, fractions.
        cycles: Numbers of cycles.
        seeds: One training each, without pruning and for every combination of the others.

    Raises:
        ValueError: A list is empty or names something twice, or a value is unknown or out of range.

    Example:
        >>> len(Sweep(("taylor", "random"), (0.1, 0.5), (1,), (0, 1)).combinations())
        8
    """

    strategies: tuple[str, ...]
    levels: tuple[float, ...]
    cycles: tuple[int, ...] = (1,)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            values = getattr(self, field.name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"{field.name} must be different values, at least one; got {list(values)}")
        for strategy in self.strategies:
            HEAD_SCORES[strategy]
            for level, cycles in itertools.product(self.levels, self.cycles):
                HeadPlasticity(strategy, pruning_level=level, cycles=cycles)

    def combinations(self) -> list[tuple[int, str, float, int]]:
        """(seed, strategy, level, cycles) of every run with pruning."""
        return list(itertools.product(self.seeds, self.strategies, self.levels, self.cycles))


def run_sweep(
    sweep: Sweep,
    settings: Sequence[str],
    *,
    quick: bool = False,
    save_model: bool = False,
    output: str | Path | None = None,
) -> Path:
    """Trains, prints a table and writes rows, models and a report with the figure.

    Args:
        sweep: What is compared.
        settings: The words that ``goldy fit`` would be given: ``--config FILE`` and changes to it. The settings of a
            ``HeadPlasticity`` in the configuration hold for all runs, but for what is compared.
        quick: A reduced form: 60 optimizer steps per run, 4 batches of validation.
        save_model: Whether to write each pruned model with its closed heads cut out.
        output: A folder without results; by default the next free ``runs/plasticity/version_N``.

    Returns:
        The folder.

    Raises:
        ValueError: The configuration names no data or no validation set, or a level is impossible for the model.
        FileExistsError: The folder holds results already.
    """
    check_configs(settings)
    folder = output_folder(output, _NAME, "plasticity")
    words = [*settings, *(_QUICK if quick else ()), *_ALONE]
    plans: list[tuple[int, str | None, float, int]] = []
    for seed in sweep.seeds:
        plans += [(seed, None, 0.0, 0), *(plan for plan in sweep.combinations() if plan[0] == seed)]
    start, runs, unpruned = time.perf_counter(), [], math.nan
    console = Console()
    peaks = []
    with without_known_warnings(), progress_only(), console.status("") as status:
        for number, (seed, strategy, level, cycles) in enumerate(plans, 1):
            label = "unpruned" if strategy is None else f"{strategy}-{level:g}-{cycles}"
            status.update(f"{label}, seed {seed} ({number} of {len(plans)})")
            place = folder / "runs" / f"{label}-seed{seed}"
            found, peak = _train([*words, f"--seed_everything={seed}"], place, strategy, level, cycles, save_model)
            peaks.append(peak)
            if strategy is None:
                unpruned = found["loss"]
                continue
            compared = {"loss_unpruned": unpruned, "cost": found["loss"] - unpruned}
            runs.append({"strategy": strategy, "level": level, "cycles": cycles, "seed": seed, **found, **compared})
    row = _row(runs).at(seconds=time.perf_counter() - start, peak_memory_bytes=max(peaks))
    ResultStore(folder / "goldy" / _NAME, write=True).append(row)
    console.print(sweep_table(runs))
    print(f"rows: {folder / 'goldy' / _NAME / ROWS}")
    print_report(folder)
    return folder


def sweep_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Means over the seeds, one line per strategy, level and number of cycles.

    Args:
        runs: Those of a sweep.

    Example:
        >>> run = {"strategy": "taylor", "level": 0.5, "cycles": 1, "loss": 2.0, "loss_after_cut": 2.5, "cost": 0.1}
        >>> sweep_table([{**run, "open_share": 0.75, "recovery_steps": 7, "rolled_back": 0}]).row_count
        1
    """
    table = Table(title="Head plasticity: loss on the validation set, nats", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("strategy", no_wrap=True)
    means_of = ("probe,\ncut", "loss", "over\nunpruned", "steps to\nrecover")
    for heading in ("level", "cycles", "open at\nthe end", *means_of):
        table.add_column(heading, justify="right", no_wrap=True)
    for (strategy, level, cycles), mine in _groups(runs).items():
        open_share, *means = (
            _mean([run[name] for run in mine])
            for name in ("open_share", "loss_after_cut", "loss", "cost", "recovery_steps")
        )
        undone = " (undone)" if any(run["rolled_back"] for run in mine) else ""
        table.add_row(
            Text(printable(strategy)),
            f"{level:g}",
            str(cycles),
            f"{percentage(open_share)}{undone}",
            *map(format_number, means),
        )
    return table


class _LossAtTheEnd(Callback):
    """Measures the loss on the validation set, in evaluation mode, once the training ends."""

    def __init__(self) -> None:
        self.loss = math.nan

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model = find_model(pl_module, None)
        device = next(model.parameters()).device
        losses = []
        with undisturbed(trainer, pl_module), torch.no_grad():
            objective = find_objective(pl_module, model, None)
            limit = trainer.limit_val_batches
            loader = trainer.datamodule.val_dataloader()  # type: ignore[attr-defined]
            for batch in itertools.islice(loader, limit if isinstance(limit, int) else None):
                losses.append(-objective.log_probs(model, map_batch(batch, lambda tensor: tensor.to(device))).double())
        if not losses:
            raise ValueError("the validation set is empty, so there is nothing to compare losses on")
        self.loss = float(torch.cat(losses).mean())


def _train(
    words: Sequence[str], folder: Path, strategy: str | None, level: float, cycles: int, save_model: bool
) -> tuple[dict[str, Any], int]:
    """What a training comes to, and the peak of its memory in bytes."""
    with command_line([*words, f"--trainer.default_root_dir={folder}"]):
        cli = GoldyCLI(run=False)
    if cli.datamodule is None:
        raise ValueError("the configuration names no data module, so there is nothing to train on")
    if not (folder.parent.parent / "config.yaml").exists():
        atomic_write(folder.parent.parent / "config.yaml", cli.parser.dump(cli.config, skip_none=False))
    given = next((callback for callback in cli.trainer.callbacks if isinstance(callback, HeadPlasticity)), None)  # type: ignore[attr-defined]
    end = _LossAtTheEnd()
    plasticity = None if strategy is None else _plasticity(given or HeadPlasticity(), strategy, level, cycles)
    cli.trainer.callbacks = [*([] if plasticity is None else [plasticity]), end]  # type: ignore[attr-defined]
    start = time.perf_counter()
    with peak_memory_bytes(cli.trainer.strategy.root_device) as peak:
        cli.trainer.fit(cli.model, cli.datamodule)
    found: dict[str, Any] = {"loss": end.loss, "seconds": time.perf_counter() - start}
    if plasticity is None:
        return found, peak()
    model = find_model(cli.model, None)
    if save_model:
        compact(model).save_pretrained(folder / "compact")
        tokenizer = getattr(cli.datamodule, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder / "compact")
        found["model"] = str(folder / "compact")
    return found | _told(plasticity, model), peak()


def _plasticity(given: HeadPlasticity, strategy: str, level: float, cycles: int) -> HeadPlasticity:
    # Weights belong to one strategy only.
    scoring = given.settings.scoring
    scoring = scoring if strategy == "combined" else dataclasses.replace(scoring, weights=None)
    settings = dataclasses.replace(
        given.settings, strategy=strategy, pruning_level=level, cycles=cycles, scoring=scoring
    )
    plasticity = HeadPlasticity(probe=given.probe, model_attribute=given.model_attribute)
    plasticity.settings = settings
    return plasticity


def _told(plasticity: HeadPlasticity, model: torch.nn.Module) -> dict[str, Any]:
    gates = HeadGates.of(model)
    assert gates is not None
    rows = read_rows(plasticity.folder / ROWS)
    events = [event for row in rows for event in row["result"]["events"]]
    finished = [event for event in events if event["kind"] == "finish"]
    return {
        "heads": len(gates.heads),
        "open_heads": len(gates.opened),
        "open_share": len(gates.opened) / len(gates.heads),
        "closed": [list(head) for head in gates.closed],
        "loss_after_cut": max((event["loss_after"] for event in events if event["kind"] == "cut"), default=None),
        "recovery_steps": finished[-1]["recovery_steps"] if finished else None,
        "rolled_back": sum(event["verdict"] == "roll_back" for event in finished),
        "forwards": sum(row["cost"]["forwards"] for row in rows),
        "backwards": sum(row["cost"]["backwards"] for row in rows),
    }


def _row(runs: list[dict[str, Any]]) -> Row:
    costs = [sum(run["cost"] for run in mine) / len(mine) for mine in _groups(runs).values()]
    metrics: dict[str, float | None] = {"runs": len(runs), "best_cost": min(costs), "worst_cost": max(costs)}
    passes = (sum(run[name] for run in runs) for name in ("forwards", "backwards"))
    return Row(_NAME, metrics, {"runs": runs}, cost=Cost(*passes))


def _groups(runs: Sequence[Mapping[str, Any]]) -> dict[tuple[str, float, int], list[Mapping[str, Any]]]:
    """Runs that differ in their seeds alone."""
    groups: dict[tuple[str, float, int], list[Mapping[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["strategy"], run["level"], run["cycles"]), []).append(run)
    return groups


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
