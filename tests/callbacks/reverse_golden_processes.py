"""Run by a test: two processes search while they train; each rank writes what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_goldy.analysis import reverse_golden_parameters
from lightning_goldy.callbacks import ReverseGoldenParameters
from lightning_goldy.callbacks.reverse_golden_parameters import Search, halves
from lightning_goldy.core import CausalLMObjective, load_vectors
from lightning_goldy.core.sharding import gather, unshard_guard
from tests.callbacks.training import Finetune, ShardedFinetune, TokenData, differences, fit


class Resharding(L.Callback):
    """The last validation leaves FSDP2's root unsharded, and an analysis after it does not."""

    def on_train_end(self, trainer, pl_module):
        unshard_guard(pl_module)


def main(strategy: str, folder: Path) -> None:
    torch.set_num_threads(1)
    sharded = strategy == "fsdp2"

    def run(name: str, callbacks):
        kind = (
            ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            if sharded
            else DDPStrategy(process_group_backend="gloo")
        )
        module = ShardedFinetune if sharded else Finetune
        watchers = [*callbacks, Resharding()]
        return fit(folder / name, watchers, module=module, strategy=kind, devices=2, max_epochs=1)

    _, _, plain = run("plain", [])
    watcher = ReverseGoldenParameters(2, n_samples=4, search=Search(rounds=3, chunk_size=1), at=("start", "end"))
    trainer, module, found = run("watched", [watcher])

    alone = Finetune()
    parameters = dict(module.model.named_parameters())
    with torch.no_grad():
        for name, parameter in alone.model.named_parameters():
            parameter.copy_(gather(parameters[name]))
    choosing, measuring = halves(list(TokenData().probe_dataloader()), CausalLMObjective(), 4)
    expected = reverse_golden_parameters(
        alone.model,
        choosing,
        eval_batches=measuring,
        top_k_percent=2,
        rounds=3,
        chunk_size=1,
        split_over_ranks=False,
    )
    mask, _ = load_vectors(watcher.folder / f"mask-step={trainer.global_step:08d}.safetensors")
    row = json.loads((watcher.folder / "results.jsonl").read_text().splitlines()[-1])
    # Gradients are summed in another order, which may swap elements that score the same to six digits.
    swapped = sum(int((mask[name] & ~expected.mask[name]).sum()) for name in expected.mask)
    result = {
        "differences": differences(plain, found),
        "world_size": dist.get_world_size(),
        "count": [sum(mask.count()), expected.count],
        "swapped": swapped / expected.count,
        "kl": row["metrics"]["kl_divergence"] / expected.kl_divergence,
    }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
