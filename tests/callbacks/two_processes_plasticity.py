"""Run by a test: two processes cut and regrow heads, are killed and go on; each rank writes what it decided."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_goldy.analysis.heads import PruningSchedule, Recovery, Scoring, head_importance
from lightning_goldy.callbacks import ExactResume, HeadPlasticity
from lightning_goldy.core.architecture import HeadGates
from tests.callbacks.training import Finetune, ShardedFinetune, TokenData, differences, fit


def main(strategy: str, folder: Path) -> None:
    torch.set_num_threads(1)
    sharded = strategy == "fsdp2"

    def run(name: str, **options):
        kind = (
            ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            if sharded
            else DDPStrategy(process_group_backend="gloo")
        )
        callback = HeadPlasticity(
            "combined",
            pruning_level=0.5,
            cycles=2,
            scoring=Scoring(n_samples=3),
            schedule=PruningSchedule(warmup_steps=0, steps_per_cycle=6, ramp_steps=0, regrow_at=4),
            recovery=Recovery(tolerance=0.0, multiplier_decay_steps=3, measure_every_n_steps=1),
        )
        saver = ModelCheckpoint(folder / f"{name}_checkpoints", filename="{step}", every_n_epochs=1, save_top_k=-1)
        _, module, found = fit(
            folder / name,
            [ExactResume(), callback, saver],
            module=ShardedFinetune if sharded else Finetune,
            data=TokenData(8),
            strategy=kind,
            devices=2,
            max_epochs=7,
            enable_checkpointing=True,
            **options,
        )
        return callback, module, found

    callback, module, whole = run("whole")
    dist.barrier()
    rows = [json.loads(line) for line in (callback.folder / "results.jsonl").read_text().splitlines()]
    events = [event for row in rows for event in row["result"]["events"]]
    # Within the first cycle, after the cut: with the copy that the cycle is rolled back to.
    again, resumed_module, resumed = run("again", ckpt_path=folder / "whole_checkpoints" / "step=2.ckpt")
    dist.barrier()
    resumed_rows = [json.loads(line) for line in (again.folder / "results.jsonl").read_text().splitlines()]
    whole.pop("losses"), resumed.pop("losses")

    alone = Finetune().model
    scores = head_importance(
        alone,
        [{key: value[:3] for key, value in TokenData().probe_dataloader().dataset.batch.items()}],
        strategy="combined",
        split_over_ranks=False,
    )
    mine = differences(whole, resumed)
    gathered: list = [None, None]
    dist.all_gather_object(gathered, mine)
    result = {
        "world_size": dist.get_world_size(),
        "timeline": callback.plasticity.timeline,
        "curve": callback.plasticity.curve,
        "closed": HeadGates.of(module.model).closed,
        "verdicts": [event["verdict"] for event in events if event["kind"] == "finish"],
        "first_cut": next(event["heads"] for event in events if event["kind"] == "cut"),
        "first_cut_of_one_process": [list(head) for head in scores.least_important(0.5)],
        "resumed": {
            "differences": sorted({name for each in gathered for name in each}),
            "same_rows": [{**row, "cost": 0} for row in rows] == [{**row, "cost": 0} for row in resumed_rows],
            "same_closed": HeadGates.of(resumed_module.model).closed == HeadGates.of(module.model).closed,
        },
    }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))
    # A rank that leaves first would tear down the connections of the other.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
