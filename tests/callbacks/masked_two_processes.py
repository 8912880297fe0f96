"""Run by a test: two processes score, train only what was marked, and resume; each rank writes what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_goldy import GoldyModule, ParameterMask
from lightning_goldy.callbacks import GoldenParameters
from lightning_goldy.core.sharding import gather, is_sharded
from tests.callbacks.training import TokenData
from tests.references.models import build

OPTIONS = {"name": "masked_adamw", "mask": "golden", "learning_rate": 1e-2, "weight_decay": 0.1}


def train(strategy: str, folder: Path, name: str, ckpt_path: Path | None = None):
    kind = (
        ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
        if strategy == "fsdp2"
        else DDPStrategy(process_group_backend="gloo")
    )
    L.seed_everything(7, verbose=False)
    module = GoldyModule(build("gpt2").eval(), optimizer=OPTIONS, schedule={"name": "linear", "final_fraction": 0.0})
    scores = GoldenParameters(n_samples=3, quorum=0.5, at=("start",))
    saver = ModelCheckpoint(folder / "checkpoints", filename="{step}", every_n_epochs=1, save_top_k=-1)
    saver._save_on_train_epoch_end = True
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=kind,
        default_root_dir=folder / name,
        logger=False,
        callbacks=[scores, saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_epochs=2,
    )
    trainer.fit(module, datamodule=TokenData(), ckpt_path=ckpt_path)
    weights = {each: gather(parameter).clone() for each, parameter in module.model.named_parameters()}
    return trainer, scores, weights


def main(strategy: str, folder: Path) -> None:
    torch.set_num_threads(1)
    trainer, scores, found = train(strategy, folder, "whole")
    half = trainer.global_step // 2
    mask = ParameterMask.load(scores.folder / "mask-step=00000000.safetensors")
    changed = {name: value.detach() != found[name] for name, value in build("gpt2").named_parameters()}
    sharded = all(map(is_sharded, trainer.optimizers[0].mask.values()))
    _, _, resumed = train(strategy, folder, "resumed", folder / "checkpoints" / f"step={half}.ckpt")
    result = {
        "world_size": dist.get_world_size(),
        "inside": mask.total,
        "changed_inside": sum(int((changed[name] & mask[name]).sum()) for name in mask),
        "changed_outside": sum(int((changed[name] & ~mask[name]).sum()) for name in mask),
        "mask_is_sharded": sharded,
        "resumed_equals_uninterrupted": all(torch.equal(found[name], resumed[name]) for name in found),
    }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
