"""A small finetune that is run with and without callbacks, and everything that must not differ."""

from __future__ import annotations

import random
from pathlib import Path

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_goldy.core.sharding import unshard_guard
from tests.references.models import build, token_batch


class Tokens(Dataset):
    """Rows of a fixed batch."""

    def __init__(self, n_samples: int, seed: int) -> None:
        self.batch = token_batch(n_samples, seed=seed)

    def __len__(self) -> int:
        return len(self.batch["input_ids"])

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {key: value[index] for key, value in self.batch.items()}


class TokenData(L.LightningDataModule):
    """Training, validation and probe rows; the training order depends on the global seed."""

    def __init__(self, n_train: int = 16, probe_size: int = 4) -> None:
        super().__init__()
        self.n_train, self.probe_size = n_train, probe_size

    def train_dataloader(self):
        return DataLoader(Tokens(self.n_train, 1), batch_size=2, shuffle=True)

    def val_dataloader(self):
        return DataLoader(Tokens(4, 2), batch_size=2)

    def probe_dataloader(self):
        return DataLoader(Tokens(self.probe_size, 3), batch_size=2)


class Finetune(L.LightningModule):
    """A user's own module: a language model with dropout, and a batch norm whose buffers training moves."""

    def __init__(self, family: str = "gpt2") -> None:
        super().__init__()
        self.model = build(family)
        self.monitor = nn.BatchNorm1d(1)
        self.losses: list[float] = []

    def training_step(self, batch, batch_idx):
        loss = self.model(**batch).loss
        # Every source of randomness, so that a callback that draws from one is found out.
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        loss = loss + 1e-3 * noise + 0 * self.monitor(torch.rand(4, 1, device=self.device)).sum()
        self.log("train_loss", loss)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss, sync_dist=True)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class ShardedFinetune(Finetune):
    """The same under FSDP2."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        if not hasattr(self.model, "unshard"):
            for block in self.model.transformer.h:
                fully_shard(block, mesh=mesh)
            fully_shard(self.model, mesh=mesh)


def fit(folder: Path, callbacks=(), *, module=Finetune, data=None, ckpt_path=None, max_epochs=2, **options):
    """Trains and returns (trainer, module, everything that must not differ)."""
    L.seed_everything(7, verbose=False)
    # Replacing a module's state would hide what a callback did to the seeded one, so each run builds its own.
    lightning_module = module()
    settings = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": CSVLogger(folder, name=None, version="run"),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 1,
        "max_epochs": max_epochs,
        "log_every_n_steps": 1,
        **options,
    }
    trainer = L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **settings)
    trainer.fit(lightning_module, datamodule=data or TokenData(), ckpt_path=ckpt_path)
    # A training in spawned processes leaves nothing of itself in this one.
    return trainer, lightning_module, trace(trainer, lightning_module) if trainer.optimizers else {}


def trace(trainer, module) -> dict:
    """Weights, buffers, optimizer state, random states and losses, as bytes."""

    def data(tensor):
        tensor = tensor.detach()
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()

    # An evaluation leaves FSDP2's root unsharded, an analysis does not; the weights are the same.
    unshard_guard(module)
    optimizer = trainer.optimizers[0]
    state = [
        data(value)
        for group in optimizer.param_groups
        for parameter in group["params"]
        for _, value in sorted(optimizer.state[parameter].items())
    ]
    return {
        "weights": [data(parameter) for parameter in module.parameters()],
        "buffers": [data(buffer) for buffer in module.buffers()],
        "optimizer": state,
        "losses": list(module.losses),
        "python": random.getstate(),
        "numpy": [np.asarray(part).tobytes() for part in np.random.get_state()[1:]],
        "torch": data(torch.get_rng_state()),
        "modes": [child.training for child in module.modules()],
        "requires_grad": [parameter.requires_grad for parameter in module.parameters()],
        "step": trainer.global_step,
    }


def differences(first: dict, second: dict) -> list[str]:
    """What of two traces is not equal to the last bit."""
    return [key for key in first if first[key] != second[key]]
