from __future__ import annotations

import random
from pathlib import Path
from typing import cast

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_goldy.data import AtlasDataModule, PadCollator, ResumableDataLoader, SeededShuffle, encode_pairs
from lightning_goldy.data.base import make_loader
from lightning_goldy.data.tokenization import byte_tokenizer


def _loader(shuffle_seed: int | None = 0, **options: int) -> ResumableDataLoader:
    samples = encode_pairs(byte_tokenizer(), [("q", chr(65 + n)) for n in range(10)])
    return make_loader(samples, batch_size=3, collate=PadCollator(0), shuffle_seed=shuffle_seed, **options)  # type: ignore


def _read(loader: ResumableDataLoader) -> list[list[int]]:
    return [batch["input_ids"][:, 2].tolist() for batch in loader]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {}
    for seed in range(3):
        for epoch in range(3):
            sampler = SeededShuffle(20, seed)
            sampler.set_epoch(epoch)
            orders[seed, epoch] = tuple(sampler)
            assert list(sampler) == list(orders[seed, epoch])
            assert sorted(sampler) == list(range(20))
    assert len(set(orders.values())) == 9


def test_no_loader_touches_global_random_state() -> None:
    before = (torch.get_rng_state(), random.getstate(), cast(tuple, np.random.get_state())[1].tolist())
    for seed in (0, None):
        _read(_loader(seed))
    AtlasDataModule(edits=5, rehearsal=0.1).setup()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert before[2] == cast(tuple, np.random.get_state())[1].tolist()


def test_a_loader_continues_where_its_state_was_taken() -> None:
    whole = _read(_loader())
    assert len(whole) == 4
    loader = _loader()
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    state = loader.state_dict()
    resumed = _loader()
    resumed.load_state_dict(state)
    assert _read(resumed) == whole[2:]
    assert _read(resumed) == whole
    resumed.load_state_dict(resumed.state_dict())
    assert _read(resumed) == whole


def test_workers_give_the_same_batches() -> None:
    loader = _loader(num_workers=1)
    assert loader.persistent_workers
    assert _read(loader) == _read(_loader())


class _Recorder(L.LightningModule):
    """Trains one number per token and remembers what it saw."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(1000, 1)
        self.seen: list[list[int]] = []
        self.stop_after = stop_after

    def training_step(self, batch: dict[str, Tensor], batch_index: int) -> Tensor:
        self.seen.append(batch["input_ids"].flatten().tolist())
        return self.table(batch["input_ids"]).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_end(self, *_: object) -> None:
        if self.global_step == self.stop_after:
            self.trainer.save_checkpoint(Path(self.trainer.default_root_dir, "stopped.ckpt"))
            raise KeyboardInterrupt


def _trainer(folder: Path) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


@pytest.mark.parametrize("stop_after", [3, 5, 6, 9])
def test_a_run_resumed_anywhere_sees_the_batches_it_would_have_seen(tmp_path: Path, stop_after: int) -> None:
    def data() -> AtlasDataModule:
        return AtlasDataModule(batch_size=16, edits=20, seed=1)

    whole = _Recorder()
    _trainer(tmp_path).fit(whole, data())
    assert len(whole.seen) == 15
    assert whole.seen[:5] != whole.seen[5:10]

    killed = _Recorder(stop_after)
    # Lightning turns an interrupt into an exit once it has shut down.
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        _trainer(tmp_path).fit(killed, data())
    resumed = _Recorder()
    _trainer(tmp_path).fit(resumed, data(), ckpt_path=str(tmp_path / "stopped.ckpt"))
    assert killed.seen + resumed.seen == whole.seen
