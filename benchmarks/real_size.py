"""What every analysis costs at real size: training steps of processor time, and memory beside the training.

    python benchmarks/real_size.py MODEL [--text FILE] [--only TaylorDiff ...] [--block 32] [--batch 4]
    python benchmarks/real_size.py MODEL --preset light [--steps 1000]

MODEL is a folder of `save_pretrained`, such as that of a model of 135 M parameters; without one it says so and ends.
Each callback runs at its defaults in a process of its own, after every second training step, on one thread. The
processor time of all but the first, and that of the first, is divided by the median of the training steps of the same
process, so that a busy machine disturbs both alike. The memory is the largest resident size while it runs above the
largest of the training steps, which a snapshot of the base is part of.

With `--preset` all callbacks of `callbacks/NAME.yaml` are attached to one run, with the budgets and schedules of as
many steps as `--steps` says; it ends after four. What every callback takes as the run begins (the forecast too), at
each step, for one firing and for a checkpoint is timed, and counted as often as the whole run has it, over its
training steps. With `--only` these callbacks and the snapshot alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

EVERY = 2
# Training steps of a preset's run.
STEPS_TIMED = 4
WORDS = (
    "the",
    "a",
    "small",
    "red",
    "cat",
    "dog",
    "tree",
    "house",
    "sees",
    "likes",
    "finds",
    "under",
    "of",
    "and",
    "never",
)
# What the callbacks need beside their defaults; the others change the training, or only read what these write.
SETTINGS: dict[str, dict[str, Any]] = {
    "GoldenSnapshot": {},
    "AttentionTracker": {},
    "GoldenParameters": {},
    "ParameterDistribution": {},
    "TaylorDiff": {"large": True},
    "ReverseGoldenParameters": {"large": True},
    "BasinVolume": {},
    "KnowledgeCoupling": {"large": True},
    "ChangeAttribution": {},
    "ActivationDifferences": {},
}


def resident() -> int:
    """Bytes of this process in memory."""
    import os

    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class Peak(threading.Thread):
    """Looks at the resident size a hundred times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest = 0
        self.start()

    def run(self) -> None:
        while True:
            self.largest = max(self.largest, resident())
            time.sleep(0.01)

    def since(self) -> int:
        """The largest since it was last asked."""
        largest, self.largest = max(self.largest, resident()), 0
        return largest


def token_batches(tokenizer: Any, text: Path | None, block: int, batch: int, count: int) -> list[dict[str, Any]]:
    """Blocks of a text, or of words in a fixed order without one."""
    import torch

    content = text.read_text() if text else " ".join(WORDS[(7 * k + k // 11) % len(WORDS)] for k in range(60_000))
    needed = block * batch * count
    ids = torch.tensor(tokenizer(content[: 12 * needed])["input_ids"][:needed])
    return [{"input_ids": part.view(batch, block)} for part in ids.split(block * batch) if len(part) == block * batch]


def finetune(options: argparse.Namespace, steps_made: int) -> Any:
    """The module that is trained, on so many batches, on one thread."""
    import lightning.pytorch as L
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    batches = token_batches(tokenizer, options.text, options.block, options.batch, steps_made + -(-16 // options.batch))
    probe, training = batches[steps_made:], batches[:steps_made]

    class Finetune(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
            self.tokenizer = tokenizer

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch, labels=batch["input_ids"], use_cache=False).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.model.parameters(), 2e-5)

        def train_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(training, batch_size=None)

        def probe_dataloader(self) -> Any:
            return torch.utils.data.DataLoader(probe, batch_size=None)

    return Finetune()


def asked_pieces(options: argparse.Namespace) -> dict[str, Any]:
    """Questions about sums."""
    from lightning_goldy.core.pieces import KnowledgePiece

    pieces = [KnowledgePiece(f"p{k}", f"What is {k} and {3 * k + 1}?", str(4 * k + 1)) for k in range(options.pieces)]
    return {"pieces": pieces, "n_pieces": options.pieces, "template": "{question}"}


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}


COLUMNS = ("begins, s", "a firing, s", "firings", "a checkpoint, s", "every step, s", "share of the run", "derived")


def measure_preset(options: argparse.Namespace) -> None:
    """Trains with all callbacks of a preset, and prints what each takes of the whole run."""
    import importlib

    import lightning.pytorch as L
    import yaml
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_goldy.analysis.forecast import timing

    timing.clock = time.process_time
    text = (Path(__file__).parent.parent / "callbacks" / f"{options.preset}.yaml").read_text()
    watched: list[Any] = []
    for entry in yaml.safe_load(text)["trainer"]["callbacks+"]:
        module, _, name = entry["class_path"].rpartition(".")
        if name not in options.only and name != "GoldenSnapshot":
            continue
        settings = asked_pieces(options) if name == "KnowledgeCoupling" else {}
        watched.append(getattr(importlib.import_module(module), name)(**settings, **entry.get("init_args", {})))
    spent: dict[str, dict[str, list[float]]] = {each.name: {} for each in watched}
    nested = [0.0]

    def timed(callback: Any, hook: str) -> None:
        inner = getattr(callback, hook)

        def act(*args: Any, **kwargs: Any) -> Any:
            outside, began = nested[0], time.process_time()
            nested[0] = 0.0
            try:
                return inner(*args, **kwargs)
            finally:
                took = time.process_time() - began
                spent[callback.name].setdefault(hook, []).append(took - nested[0])
                nested[0] = outside + took

        setattr(callback, hook, act)

    for callback in watched:
        for hook in ("on_train_start", "run", "on_before_optimizer_step", "on_train_batch_end", "when_saved"):
            timed(callback, hook)
    steps: list[float] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.began = time.process_time()

        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            steps.append(time.process_time() - self.began)
            trainer.should_stop = len(steps) == STEPS_TIMED

    with tempfile.TemporaryDirectory() as folder:
        saver = ModelCheckpoint(folder, every_n_train_steps=STEPS_TIMED)
        every: list[Any] = [Watch(), *watched, saver]
        trainer = L.Trainer(
            max_steps=options.steps, accelerator="cpu", default_root_dir=folder, callbacks=every, **QUIET
        )
        trainer.fit(finetune(options, STEPS_TIMED))
    step = statistics.median(steps[1:])
    print(f"| callback | {' | '.join(COLUMNS)} |\n|{'---|' * (1 + len(COLUMNS))}")
    shares = []
    for callback in watched:
        told, every = spent[callback.name], callback.every_n_steps
        firings = len({*range(every, options.steps + 1, every)} | {options.steps}) if every else 1
        hooks = sum(statistics.median(told[hook]) for hook in ("on_before_optimizer_step", "on_train_batch_end"))
        begins, firing, saved = sum(told["on_train_start"]), statistics.mean(told["run"]), max(told["when_saved"])
        total = begins + firings * firing + saved * options.checkpoints + options.steps * hooks
        shares.append(total / step / options.steps)
        figures = (f"{begins:.2f}", f"{firing:.2f}", f"{firings}", f"{saved:.3f}", f"{hooks:.5f}", f"{shares[-1]:.2%}")
        print(f"| `{callback.name}` | {' | '.join(figures)} | {callback.derived} |")
    print(f"{sum(shares):.2%} of {options.steps} steps of {step:.2f} s")


def measure(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Trains with one callback, in this process."""
    import lightning.pytorch as L

    from lightning_goldy import callbacks

    steps_made = EVERY * options.firings
    module = finetune(options, steps_made)
    peak, steps, analyses, memory = Peak(), [], [], [0, 0]

    class Watch(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            peak.since()

        def on_train_batch_start(self, *_: Any) -> None:
            self.began = time.process_time()

        def on_train_batch_end(self, *_: Any) -> None:
            steps.append(time.process_time() - self.began)
            memory[0] = max(memory[0], peak.since())

    settings = dict(SETTINGS[name])
    if name == "KnowledgeCoupling":
        settings |= asked_pieces(options)
    callback = getattr(callbacks, name)(every_n_steps=EVERY, at=(), **settings)
    run = callback.run

    def timed(*args: Any, **kwargs: Any) -> None:
        began = time.process_time()
        run(*args, **kwargs)
        analyses.append(time.process_time() - began)
        memory[1] = max(memory[1], peak.since())

    callback.run = timed
    snapshot = (
        [] if name == "GoldenSnapshot" else [callbacks.GoldenSnapshot(every_n_steps=10**6, at=(), track_updates=False)]
    )
    size = 4 * sum(parameter.numel() for parameter in module.model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        watched = [Watch(), *snapshot, callback]
        quiet: dict[str, Any] = {**QUIET, "enable_checkpointing": False}
        L.Trainer(max_steps=steps_made, accelerator="cpu", default_root_dir=folder, callbacks=watched, **quiet).fit(
            module
        )
    step = statistics.median(steps[1:])
    return {
        "name": name,
        "steps": statistics.median(analyses[1:]) / step,
        "first": analyses[0] / step,
        "step_seconds": step,
        "training_bytes": memory[0],
        "beside_bytes": max(0, memory[1] - memory[0]),
        "copies": max(0, memory[1] - memory[0]) / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="CALLBACK")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--pieces", type=int, default=256)
    parser.add_argument("--firings", type=int, default=3, help="at least 2; the first is told apart")
    parser.add_argument("--preset", choices=("light", "full"))
    parser.add_argument("--steps", type=int, default=1000, help="of the run that a preset is held against")
    parser.add_argument("--checkpoints", type=int, default=10, help="that this run writes")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.model is None or not (options.model / "config.json").is_file():
        print(f"skipped: {options.model} is no folder of save_pretrained, and nothing of this size is made up here")
        return
    if options.preset:
        measure_preset(options)
        return
    if options.here:
        print(json.dumps(measure(options, options.only[0])))
        return
    kinds = "training steps | of the first firing | memory beside the training, GB | in copies of the parameters"
    print(f"| callback | {kinds} |\n|---|---|---|---|---|")
    for name in options.only:
        arguments = [str(options.model), "--only", name, "--here", "--pieces", str(options.pieces)]
        arguments += ["--block", str(options.block), "--batch", str(options.batch)]
        arguments += ["--text", str(options.text)] if options.text else []
        arguments += ["--firings", str(options.firings)]
        told = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
        if told.returncode:
            print(f"| `{name}` | failed: {told.stderr.strip().splitlines()[-1]} | | | |", flush=True)
            continue
        found = json.loads(told.stdout.strip().splitlines()[-1])
        beside = found["beside_bytes"] / 1e9
        steps = f"{found['steps']:.1f} | {found['first']:.1f}"
        print(f"| `{name}` | {steps} | {beside:.2f} | {found['copies']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
