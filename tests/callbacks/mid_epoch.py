"""Trains through GoldyModule with any data module and resumes at a step; as a program it does so on two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_goldy import GoldyModule
from lightning_goldy.callbacks import ExactResume
from lightning_goldy.data import AtlasDataModule, KnowledgeDataModule, TextDataModule
from tests.callbacks.training import TokenData

EPOCHS = 2


def data_module(kind: str, folder: Path, workers: int = 0) -> L.LightningDataModule:
    """A data module of five to eight training batches."""
    if kind == "text":
        source = folder / "text.txt"
        source.write_text("to be or not to be, that is the question. " * 5)
        data: Any = TextDataModule(source, block_size=8, batch_size=3, probe_size=2)
    elif kind == "knowledge":
        source = folder / "pairs.jsonl"
        pairs = [{"question": f"{n}+{n}?", "answer": str(2 * n)} for n in range(26)]
        source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        data = KnowledgeDataModule(source, "bytes", template="{question}", batch_size=3, probe_size=2)
    elif kind == "atlas":
        data = AtlasDataModule(batch_size=8, edits=12, rehearsal=0.3, probe_size=4)
    else:
        data = TokenData()
    data.num_workers = workers
    return data


class Seen(L.Callback):
    """The batches that were trained on, as sums of their ids, by the optimizer step before them."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, int]] = []

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        self.batches.append((trainer.global_step, int(batch["input_ids"].sum())))


def train(
    folder: Path, kind: str, schedule: dict[str, Any], *, accumulate: int = 1, workers: int = 0, **options: Any
) -> tuple[list[tuple[int, int]], dict[str, torch.Tensor]]:
    """What was trained on, and the weights at the end."""
    ckpt_path = options.pop("ckpt_path", None)
    extra = options.pop("extra", [])
    if options.pop("exact", True):
        extra = [ExactResume(), *extra]
    folder.mkdir(parents=True, exist_ok=True)
    L.seed_everything(7, verbose=False)
    shape = {"model_type": "gpt2", "vocab_size": 660, "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 64}
    module = GoldyModule(shape, optimizer={"learning_rate": 1e-2}, schedule=schedule)
    seen = Seen()
    saver = ModelCheckpoint(folder / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    settings: dict[str, Any] = {"max_epochs": EPOCHS, "devices": 1, **options}
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        accumulate_grad_batches=accumulate,
        callbacks=[*extra, seen, saver],
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, datamodule=data_module(kind, folder, workers), ckpt_path=ckpt_path)
    return seen.batches, {name: value.detach().clone() for name, value in module.model.named_parameters()}


def check_resumed(folder: Path, kind: str, schedule: dict[str, Any], steps: Any = None, **options: Any) -> int:
    """Resumes at some or all steps of a training; the number of those that went on as the whole training did."""
    extra = options.pop("extra", list)
    batches, weights = train(folder, kind, schedule, extra=extra(), **options)
    last = max(step for step, _ in batches) + 1
    chosen = list(range(1, last)) if steps is None else [last // 2 + step for step in steps]
    for step in chosen:
        checkpoint = str(folder / "saved" / f"step={step}.ckpt")
        again = folder / f"again-{step}"
        found, resumed = train(again, kind, schedule, ckpt_path=checkpoint, extra=extra(), **options)
        assert found == [pair for pair in batches if pair[0] >= step], (kind, schedule, step)
        assert all(torch.equal(weights[name], resumed[name]) for name in weights), (kind, schedule, step)
    return len(chosen)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    for accumulation in (1, 3):
        for name in ("text", "atlas"):
            spread: dict[str, Any] = {"devices": 2, "strategy": "ddp", "max_epochs": 1}
            check_resumed(place / f"{name}-{accumulation}", name, {"name": "cosine"}, accumulate=accumulation, **spread)
    (place / "done").touch()
