"""What the rows of a run cost as it gets longer: seconds and bytes written, for half a run and for a whole one.

    python benchmarks/rows.py
    python benchmarks/rows.py --analyses 600

A run of twice as many analyses takes twice as long and writes twice as much. Bytes are those of the process's writes,
as Linux counts them; elsewhere they are left out.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy.callbacks import AttentionTracker, BasinVolume


class Tiny(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 64, "n_positions": 16}
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def written() -> int | None:
    """Bytes that this process has passed to write calls."""
    counts = Path("/proc/self/io")
    if not counts.exists():
        return None
    return int(counts.read_text().split("wchar:")[1].split()[0])


def measure(analyses: int) -> tuple[float, float, int | None, int]:
    """Seconds, seconds per analysis, bytes written, and bytes of the rows."""
    torch.manual_seed(0)
    ids = torch.randint(0, 64, (8, 12))
    samples = [{"input_ids": row, "labels": row} for row in ids]
    probe = [{"input_ids": ids[:2], "labels": ids[:2]}]
    common = {"every_n_steps": 1, "at": (), "n_samples": 2, "probe": probe}
    watchers = [AttentionTracker(max_tokens=8, **common), BasinVolume(1, sigma=0.1, **common)]
    options = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=analyses // len(watchers),
            default_root_dir=folder,
            logger=False,
            callbacks=watchers,
            **options,
        )
        before, start = written(), time.perf_counter()
        trainer.fit(Tiny(), DataLoader(samples, batch_size=2))
        seconds, after = time.perf_counter() - start, written()
        rows = sum((watcher.folder / "results.jsonl").stat().st_size for watcher in watchers)
    return seconds, seconds / analyses, None if before is None or after is None else after - before, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--analyses", type=int, default=300, help="of the whole run, of two callbacks together")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    measure(20)
    for analyses in (arguments.analyses // 2, arguments.analyses):
        seconds, each, total, rows = measure(analyses)
        shown = "unknown" if total is None else f"{total / 2**20:8.2f} MiB"
        print(
            f"{analyses:5} analyses: {seconds:6.1f} s ({1e3 * each:5.1f} ms each), {shown} written, "
            f"{rows / 2**20:6.2f} MiB of rows"
        )


if __name__ == "__main__":
    main()
