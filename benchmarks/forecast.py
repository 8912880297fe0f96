"""What callbacks take, over what was forecast before the first step: seconds, memory and disk.

    python benchmarks/forecast.py [--model FOLDER] [--only NAME ...]

One small run of two firings for each callback, on two small models, or on that of the folder, and of attention on one
of a large vocabulary, too; all its seconds are told, processor time of one thread. What the machine's speed is
measured from is timed again before each firing, since others use the machine, too. Memory is the largest resident size
while the analysis ran, less that before it; disk what the callback's folder holds at the end.
A ratio within 1.5 is meant, of what is told as a bound any up to that; figures too small to be told from noise are
left out.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from lightning_goldy.analysis.basin.bridge import BridgeSettings
from lightning_goldy.analysis.forecast import timing
from lightning_goldy.analysis.golden import Search
from lightning_goldy.callbacks import (
    ActivationDifferences,
    AttentionTracker,
    BasinVolume,
    GoldenParameters,
    GoldenSnapshot,
    KnowledgeCoupling,
    ParameterDistribution,
    ReverseGoldenParameters,
    TaylorDiff,
    preflight,
)
from lightning_goldy.core.pieces import KnowledgePiece
from lightning_goldy.data import byte_tokenizer

SMALL = ("gpt2", "llama")
# Logits of a large vocabulary, beside which everything else is small.
WIDE = "wide"
MEANT = 1.5
# Below these the machine's own noise is larger.
LEAST = {"seconds": 0.2, "memory": 20e6, "disk": 1e5}
LENGTH, ROWS, FIRINGS = 32, 4, 2


def built(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "tiny":
        return GPT2LMHeadModel(
            GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=8192, bos_token_id=0, eos_token_id=0)
        )
    if name == WIDE:
        return GPT2LMHeadModel(
            GPT2Config(
                n_layer=2, n_head=4, n_embd=128, n_positions=64, vocab_size=49152, bos_token_id=0, eos_token_id=0
            )
        )
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_layer=6, n_head=8, n_embd=384, n_positions=256, vocab_size=8192, bos_token_id=0, eos_token_id=0
            )
        )
    if name == "llama":
        config = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 512}
        return LlamaForCausalLM(LlamaConfig(**config, intermediate_size=1024, vocab_size=8192))
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)


def callback(name: str) -> Any:
    pieces = [KnowledgePiece(str(n), f"what is {n} + {n} ?", str(2 * n)) for n in range(12)]
    at = {"at": (), "every_n_steps": 1, "large": True}
    end = {"at": ("end",), "every_n_steps": None}
    return {
        "snapshot": lambda: GoldenSnapshot(every_n_steps=1, at=()),
        "golden": lambda: GoldenParameters(n_samples=4, **at),
        "reverse": lambda: ReverseGoldenParameters(n_samples=4, search=Search(rounds=3), **at),
        "distribution": lambda: ParameterDistribution(**at),
        "taylor": lambda: TaylorDiff(n_samples=4, **at),
        "taylor1": lambda: TaylorDiff((1,), n_samples=8, **at),
        "attention": lambda: AttentionTracker(n_samples=16, **at),
        "activations": lambda: ActivationDifferences(n_samples=16, **at),
        "basin": lambda: BasinVolume(2, n_samples=4, **at),
        "bridge": lambda: BasinVolume(
            2, n_samples=2, method="bridge", bridge=BridgeSettings(max_gradients=1000), **end
        ),
        "coupling": lambda: KnowledgeCoupling(pieces, edits=["1"], **at),
    }[name]()


NAMES = (
    "snapshot",
    "golden",
    "reverse",
    "distribution",
    "taylor",
    "taylor1",
    "attention",
    "activations",
    "basin",
    "bridge",
    "coupling",
)


class Module(L.LightningModule):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.tokenizer = model, byte_tokenizer()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.model(**batch).loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def resident(name: str) -> int:
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def measure(model: str, names: Sequence[str]) -> None:
    """A run for each callback; prints what was forecast and what it took."""
    # Of one thread, so that what else the machine does counts little.
    timing.clock = time.process_time
    for name in names:
        print(json.dumps([name, measured_run(model, name)]), flush=True)


def measured_run(model: str, name: str) -> dict[str, tuple[float, float, bool]]:
    """Of each kind what was forecast, what it took, and whether the forecast is a bound."""
    outlooks, speeds, found = [], [], {"memory": 0, "seconds": 0.0}
    watched, tell = callback(name), preflight.Outlook.lines
    analyse, begin = watched._analyse, watched.begin

    def kept(outlook: preflight.Outlook) -> list[str]:
        outlooks.append(outlook)
        return tell(outlook)

    def measured(trainer: L.Trainer, module: L.LightningModule, *args: Any) -> Any:
        # Beside the analysis, for the machine that both share is not always as fast.
        timing._arithmetic.cache_clear()
        speeds.append(preflight._measured(trainer, module, [watched])[1])
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before, start = resident("VmRSS"), time.process_time()
        Path("/proc/self/clear_refs").write_text("5")
        done = analyse(trainer, module, *args)
        found["memory"] = max(found["memory"], resident("VmHWM") - before)
        found["seconds"] += time.process_time() - start
        return done

    def begun(*args: Any) -> None:
        start = time.process_time()
        begin(*args)
        found["seconds"] += time.process_time() - start

    preflight.Outlook.lines, watched._analyse, watched.begin = kept, measured, begun  # type: ignore[method-assign]
    ids = torch.randint(3, 8000, (64, LENGTH), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    callbacks = [watched] if name == "snapshot" else [GoldenSnapshot(every_n_steps=None, track_updates=False), watched]
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=1 if name in ("bridge", "reverse") else FIRINGS,
            default_root_dir=folder,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            limit_val_batches=4,
        )
        trainer.fit(
            Module(built("tiny" if name == "bridge" else model)), *(DataLoader(rows, batch_size=ROWS) for _ in range(2))
        )
        disk = sum(path.stat().st_size for path in watched.folder.glob("*.safetensors"))
    preflight.Outlook.lines = tell  # type: ignore[method-assign]
    (forecast,) = [each for each in outlooks[-1].forecasts if each.name == watched.name]
    return {
        "seconds": (statistics.median(map(forecast.seconds_total, speeds)), found["seconds"], False),
        "memory": (forecast.memory, found["memory"], False),
        "disk": (forecast.disk_total, disk, forecast.bounded),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="FOLDER", help="a folder of save_pretrained, not the small models")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--run", metavar="MODEL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        measure(options.run, options.only)
        return
    kinds = " | ".join(f"{kind} | measured | ratio" for kind in ("seconds", "memory, MB", "disk, MB"))
    print(f"| model | callback | {kinds} |\n|{'---|' * 11}", flush=True)
    off = 0
    for model in [options.model] if options.model else (*SMALL, WIDE):
        names = [name for name in options.only if model != WIDE or name == "attention"]
        command = [sys.executable, "-W", "ignore", __file__, "--run", model, "--only", *names]
        with (
            tempfile.TemporaryFile("w+") as said,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as running,
        ):
            for line in running.stdout or ():
                if not line.startswith("["):
                    continue
                name, told = json.loads(line)
                cells = []
                for kind, (expected, found, bounded) in told.items():
                    scale = 1.0 if kind == "seconds" else 1e6
                    small = max(expected, found) < LEAST[kind]
                    ratio = found / expected if expected else float("inf")
                    off += not small and not (0 if bounded else 1 / MEANT) <= ratio <= MEANT
                    most = "<= " if bounded else ""
                    cells += [f"{most}{expected / scale:.3g}", f"{found / scale:.3g}", "-" if small else f"{ratio:.2f}"]
                print(f"| {Path(model).name} | {name} | {' | '.join(cells)} |", flush=True)
            if running.wait():
                said.seek(0)
                print(f"{Path(model).name}: failed: {said.read().strip().splitlines()[-1]}", flush=True)
                off += 1
    print(f"{off} outside of {MEANT} x")


if __name__ == "__main__":
    main()
