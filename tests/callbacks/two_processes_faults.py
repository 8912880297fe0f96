"""Run by a test: in trainings of two processes one rank fails where the other one waits; each writes what it saw."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

import lightning_goldy.callbacks.golden_snapshot as snapshots
from lightning_goldy.analysis.golden import Search
from lightning_goldy.callbacks import GoldenParameters, GoldenSnapshot, HeadPlasticity, ReverseGoldenParameters
from lightning_goldy.callbacks.engine.store import ResultStore
from lightning_goldy.core.objective import CausalLMObjective
from tests.callbacks.knowledge import WordData
from tests.callbacks.test_interruptions import plasticity
from tests.callbacks.training import Finetune, ShardedFinetune, differences, fit


class FailsOnce(CausalLMObjective):
    """Of one rank, at a call of a step; the other rank is then in a collective, or ahead of one."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.left = call
        self.armed = False

    def __getattribute__(self, name: str):
        if name in ("loss", "log_probs", "logits_and_targets") and self.armed and dist.get_rank() == 1:
            self.left -= 1
            if self.left == 0:
                raise MemoryError("no room")
        return super().__getattribute__(name)


class Away(CSVLogger):
    def log_metrics(self, metrics, step=None):
        if any(name.startswith("goldy") for name in metrics):
            raise ConnectionError("the service is away")
        super().log_metrics(metrics, step)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, object] = {}

    def run(name: str, callbacks, *, sharded: bool = False, **options):
        kind = (
            ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            if sharded
            else DDPStrategy(process_group_backend="gloo")
        )
        for callback in callbacks:
            if isinstance(getattr(callback, "objective", None), FailsOnce):
                callback.objective.armed = False
        module = ShardedFinetune if sharded else Finetune
        trainer, _, trace = fit(
            folder / name, callbacks, module=module, data=WordData(), strategy=kind, devices=2, max_epochs=1, **options
        )
        rows = [
            [json.loads(line)["step"] for line in (callback.folder / "results.jsonl").read_text().splitlines()]
            for callback in callbacks
            if hasattr(callback, "folder") and (callback.folder / "results.jsonl").exists()
        ]
        found[name] = {"step": trainer.global_step, "rows": rows}
        return trace

    plain = run("plain", [])
    sharded = run("sharded", [], sharded=True)
    kinds = {
        "golden": lambda **options: GoldenParameters(n_samples=4, quorum=0.5, **options),
        "reverse": lambda **options: ReverseGoldenParameters(5.0, n_samples=4, search=Search(chunk_size=1), **options),
    }
    for name, make in kinds.items():
        for layout in (False, True) if name == "golden" else (False,):
            objective = FailsOnce(2)
            watcher = make(every_n_steps=1, at=(), on_error="warn", objective=objective, check=False)
            watcher.prepare = lambda *_, objective=objective: setattr(objective, "armed", True)
            case = f"{name} fails on one rank{', sharded' if layout else ''}"
            found[f"{case}: differences"] = differences(
                sharded if layout else plain, run(case, [watcher], sharded=layout)
            )

    saver = lambda name: ModelCheckpoint(folder / name / "c", every_n_train_steps=1, save_top_k=-1)  # noqa: E731
    real, failures = ResultStore.append, [OSError("no space")]

    def append(self, row):
        if self.write and failures:
            raise failures.pop()
        return real(self, row)

    ResultStore.append = append
    watcher = GoldenParameters(n_samples=2, every_n_steps=1, at=("checkpoint",), on_error="warn")
    run("no row", [watcher, saver("no row")], enable_checkpointing=True)
    ResultStore.append = real
    watcher = GoldenSnapshot(every_n_steps=1, at=("checkpoint",), on_error="warn")
    run("no logger", [watcher, saver("no logger")], enable_checkpointing=True, logger=Away(folder, None, "away"))

    write = snapshots.save_vectors

    def refused(path, *args, write: bool = True, **options):
        if write and "previous" in str(path):
            raise OSError("no space")
        return real_write(path, *args, write=write, **options)

    real_write, snapshots.save_vectors = write, refused
    watcher = GoldenSnapshot(every_n_steps=1, at=(), on_error="warn")
    run("no file", [watcher, saver("no file")], enable_checkpointing=True)
    snapshots.save_vectors = real_write

    objective = FailsOnce(4)
    watcher = plasticity(on_error="warn", objective=objective, check=False)
    check = HeadPlasticity.prepare
    watcher.prepare = lambda *args: (check(watcher, *args), setattr(objective, "armed", True))
    run("plasticity", [watcher])
    found["closed"] = [list(head) for head in watcher.plasticity.gates.closed]
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
