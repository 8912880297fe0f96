"""Trainings that are killed at any instant and resumed until they end, in processes forked from one with imports."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
import torch.multiprocessing as mp
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_goldy.analysis.heads import PruningSchedule, Recovery, Scoring
from lightning_goldy.callbacks import ExactResume, GoldenParameters, GoldenSnapshot, HeadPlasticity, TaylorDiff
from lightning_goldy.core.pieces import PadCollator
from lightning_goldy.core.store import load_vectors
from lightning_goldy.data.base import make_loader
from tests.callbacks.training import TokenData, Tokens, fit

Kind = Literal["plain", "accumulated", "plasticity"]
EPOCHS = 2


class Ordered(TokenData):
    """Rows in a shuffled order whose place the loader keeps."""

    def train_dataloader(self):
        rows = Tokens(self.n_train, 1)
        samples = [rows[index] for index in range(len(rows))]
        return make_loader(samples, batch_size=2, collate=PadCollator(0), shuffle_seed=5)


def _callbacks(folder: Path, kind: Kind) -> list:
    saver = ModelCheckpoint(folder / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    if kind == "plasticity":
        schedule = PruningSchedule(warmup_steps=1, steps_per_cycle=8, ramp_steps=2, cuts=2, regrow_at=4)
        options: dict[str, Any] = {"recovery": Recovery(measure_every_n_steps=1), "scoring": Scoring(n_samples=2)}
        return [ExactResume(), HeadPlasticity(pruning_level=0.5, schedule=schedule, **options), saver]
    return [
        ExactResume(),
        GoldenSnapshot(every_n_steps=2),
        GoldenParameters(n_samples=2, quorum=0.5, every_n_steps=3, at=("start", "checkpoint", "end")),
        TaylorDiff((1,), n_samples=2, reset="each", function_space=False, by=None, every_n_steps=2),
        saver,
    ]


def saved(folder: Path) -> Path | None:
    """The checkpoint of the most steps."""
    paths = (folder / "saved").glob("step=*.ckpt")
    return max(paths, key=lambda path: int(path.stem.partition("=")[2].partition("-")[0]), default=None)


def attempt(folder: Path, kind: Kind) -> None:
    """Trains from the last checkpoint on, or from the start; what it ends with is in ``final``."""
    torch.set_num_threads(1)
    options = {"accumulate_grad_batches": 3 if kind == "accumulated" else 1, "max_epochs": EPOCHS}
    trainer, _, found = fit(
        folder, _callbacks(folder, kind), data=Ordered(), enable_checkpointing=True, ckpt_path=saved(folder), **options
    )
    if trainer.received_sigterm:
        # Lightning has ended the training early, and in order.
        os._exit(1)
    # A resumed module has seen the losses of its own part alone.
    del found["losses"]
    found["seconds"] = time.process_time()
    torch.save(found, folder / "final.part")
    (folder / "final.part").rename(folder / "final")


def started(folder: Path, kind: Kind) -> Any:
    """A process that trains."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    process = context.Process(target=_quiet_attempt, args=(folder, kind), daemon=True)
    process.start()
    return process


def _quiet_attempt(folder: Path, kind: Kind) -> None:
    with open(folder / "console", "ab", buffering=0) as console:
        for stream in (1, 2):
            os.dup2(console.fileno(), stream)
        attempt(folder, kind)


def cpu_seconds(pid: int) -> float:
    """What a process has used of a processor; instants are told by it, for the machine may be busy with other work."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def struck(process: Any, number: signal.Signals, after: float, final: Path) -> bool:
    """Sends a signal once a process has used so many seconds; whether it came before ``final`` was written.

    Lightning has a process that was asked to end exit as one that has done its work.
    """
    while process.is_alive() and cpu_seconds(process.pid) < after:
        time.sleep(0.005)
    alive = process.is_alive()
    if alive:
        os.kill(process.pid, number)
    process.join(120)
    assert not process.is_alive(), "the process goes on after the signal"
    return alive and not final.exists()


def interrupted(folder: Path, kind: Kind, number: signal.Signals, count: int, seconds: float) -> Iterator[Path]:
    """Runs that were struck ``count`` times in all and then ended.

    Args:
        folder: Where they go.
        kind: What is trained.
        number: The signal.
        count: Strikes.
        seconds: What an undisturbed run takes of a processor.
    """
    drawn, left, runs = random.Random(f"{kind} {number}"), count, 0
    while left:
        run = folder / f"run{runs}"
        run.mkdir()
        runs += 1
        while not (run / "final").exists():
            process = started(run, kind)
            if left:
                left -= struck(process, number, drawn.uniform(0.0, seconds), run / "final")
                continue
            process.join()
            assert process.exitcode == 0, (run / "console").read_text()[-3000:]
        yield run


def outcome(folder: Path) -> tuple[dict, dict[str, list]]:
    """What a run ended with, and its rows with the tensors of the files that they name."""
    final, rows = torch.load(folder / "final", weights_only=False), {}
    # A run that was struck before its first checkpoint begins anew, beside what it had written.
    for file in sorted(file for file in folder.glob("run/goldy/*/results.jsonl") if "." not in file.parent.name):
        rows[file.parent.name] = [json.loads(line) for line in file.read_text().splitlines()]
        for row in rows[file.parent.name]:
            del row["cost"]
            row["tensors"] = {
                key: {name: tensor.tolist() for name, tensor in load_vectors(file.parent / name)[0].items()}
                for key, name in row["files"].items()
            }
    # Lightning validates no more where the last checkpoint is of the last step, so no random number is drawn for it.
    for name in ("seconds", "python", "numpy", "torch"):
        del final[name]
    return final, rows
