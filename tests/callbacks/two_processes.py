"""Run by a test: two processes train with and without callbacks; each rank writes what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_goldy.analysis import golden_parameters
from lightning_goldy.callbacks import GoldenParameters, GoldenSnapshot
from lightning_goldy.core import ParameterSpace, ParameterVector, load_vectors
from tests.callbacks.training import Finetune, ShardedFinetune, TokenData, differences, fit


def main(strategy: str, folder: Path) -> None:
    torch.set_num_threads(1)
    sharded = strategy == "fsdp2"

    def run(name: str, callbacks):
        kind = (
            ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            if sharded
            else DDPStrategy(process_group_backend="gloo")
        )
        return fit(
            folder / name,
            callbacks,
            module=ShardedFinetune if sharded else Finetune,
            strategy=kind,
            devices=2,
            max_epochs=2,
            accumulate_grad_batches=2,
        )

    _, _, plain = run("plain", [])
    snapshot = GoldenSnapshot(every_n_steps=2, at=("end",))
    golden = GoldenParameters(n_samples=3, quorum=0.5, every_n_steps=2, at=("start", "end"))
    trainer, module, found = run("watched", [snapshot, golden])

    # The same on one process: the present weights in an unsharded model.
    alone = Finetune()
    parameters = dict(module.model.named_parameters())
    with torch.no_grad():
        for name, parameter in alone.model.named_parameters():
            value = parameters[name].detach()
            parameter.copy_(value.full_tensor() if hasattr(value, "full_tensor") else value)
    batches = list(TokenData().probe_dataloader())
    expected = golden_parameters(alone.model, batches, n_samples=3, quorum=0.5, split_over_ranks=False)
    mask, _ = load_vectors(golden.folder / f"mask-step={trainer.global_step:08d}.safetensors")
    base, _ = load_vectors(snapshot.folder / "base.safetensors")
    change = (ParameterVector.of(alone.model, ParameterSpace.of(alone.model)) - base).norm()
    row = json.loads((snapshot.folder / "results.jsonl").read_text().splitlines()[-1])
    result = {
        "differences": differences(plain, found),
        "world_size": dist.get_world_size(),
        "same_mask_as_one_process": all(torch.equal(mask[name], expected.mask[name]) for name in expected.mask),
        "same_change_as_one_process": abs(row["metrics"]["delta_norm"] / change - 1) < 1e-6,
    }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
