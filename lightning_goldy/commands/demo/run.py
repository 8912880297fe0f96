"""The demo from the first step to the last line."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from rich.console import Console
from rich.table import Table

from lightning_goldy.callbacks import (
    AttentionTracker,
    BasinVolume,
    GoldenParameters,
    GoldenSnapshot,
    KnowledgeCoupling,
    ParameterDistribution,
    ReverseGoldenParameters,
    RunReport,
    TaylorDiff,
)
from lightning_goldy.commands.demo.pretrained import AtlasKnowledge, cached_base, copy_base
from lightning_goldy.commands.demo.settings import DemoSettings
from lightning_goldy.data import AtlasDataModule, Fact, one_hop_questions
from lightning_goldy.optim import OptimizerOptions, ScheduleOptions
from lightning_goldy.training.module import GoldyModule
from lightning_goldy.training.quiet import progress_only, without_known_warnings

_ROWS = {
    "edited": "edited facts",
    "edited_held_out": "edited facts, new phrasing",
    "untouched": "untouched facts",
    "untouched_held_out": "untouched facts, new phrasing",
}


def run_demo(directory: str | Path = "runs/demo", *, fast: bool = False, seed: int = 0) -> Path:
    """Pretrains (or takes from the cache), finetunes on false facts with every callback, and writes the report.

    Args:
        directory: ``base`` (the pretrained model), ``pretrain`` and ``finetune`` (a folder per run) go there.
        fast: A reduced form: fewer facts, a smaller model, fewer steps.
        seed: Decides weights, edits and order.

    Returns:
        The report.

    Raises:
        RuntimeError: The pretraining ended without the facts known.
    """
    settings = DemoSettings.fast(seed) if fast else DemoSettings(seed=seed)
    directory = Path(directory)
    console = Console()
    start = time.monotonic()
    with without_known_warnings(), progress_only(), _one_thread():
        console.print("[bold]1/2[/bold] a model that knows the atlas")
        cached, from_cache = cached_base(settings, directory)
        base = copy_base(cached, directory / "base")
        console.print(f"{'from the cache' if from_cache else 'pretrained'}: {base}")
        console.print(f"[bold]2/2[/bold] finetuning on {settings.edits} false facts, watched by every callback")
        trainer, knowledge = _finetune(settings, base, directory)
    console.print(_table(knowledge))
    console.print(f"done in {time.monotonic() - start:.0f} s")
    report = Path(str(trainer.log_dir)) / "report.html"
    if not report.is_file():
        raise RuntimeError(f"no report was written to {report}")
    # Plain print: a long path must stay in one piece.
    print(f"report: {report}   TensorBoard: tensorboard --logdir {directory}")
    return report


def analysis_callbacks(every_n_steps: int) -> list[L.Callback]:
    """Every callback of the package that watches a training, and the report."""
    return [
        GoldenSnapshot(every_n_steps=every_n_steps),
        GoldenParameters(every_n_steps=every_n_steps, at=("start", "end")),
        ReverseGoldenParameters(at=("start", "end")),
        TaylorDiff(every_n_steps=every_n_steps, at=("end",)),
        ParameterDistribution(),
        AttentionTracker(every_n_steps=every_n_steps, at=("start", "end")),
        KnowledgeCoupling(n_pieces=128, every_n_steps=2 * every_n_steps, at=("end",)),
        BasinVolume(splits=True, every_n_steps=every_n_steps, at=("start", "end")),
        RunReport(),
    ]


def _finetune(settings: DemoSettings, base: Path, directory: Path) -> tuple[L.Trainer, AtlasKnowledge]:
    L.seed_everything(settings.seed, verbose=False)
    data = settings.finetuning_data()
    knowledge = AtlasKnowledge(_groups(data), data.tokenizer)
    module = GoldyModule(
        str(base),
        optimizer=OptimizerOptions(learning_rate=settings.finetuning_rate),
        schedule=ScheduleOptions("linear", warmup_fraction=0.1),
    )
    trainer = L.Trainer(
        max_epochs=settings.finetuning_epochs,
        accelerator="auto",
        devices=1,
        logger=TensorBoardLogger(directory, name="finetune"),
        callbacks=[
            knowledge,
            *analysis_callbacks(settings.every_n_steps),
            ModelCheckpoint(filename="{step}", every_n_epochs=settings.finetuning_epochs),
        ],
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    return trainer, knowledge


@contextmanager
def _one_thread() -> Iterator[None]:
    # Matrices of this size gain nothing from a second thread, and lose much when another program wants the core.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _groups(data: AtlasDataModule) -> dict[str, list]:
    edited: list[Fact] = data.edited_facts
    untouched = [fact for fact in data.facts if not fact.edited]
    return {
        "edited": one_hop_questions(edited),
        "edited_held_out": one_hop_questions(edited, "held_out"),
        "untouched": one_hop_questions(untouched),
        "untouched_held_out": one_hop_questions(untouched, "held_out"),
    }


def _table(knowledge: AtlasKnowledge) -> Table:
    table = Table(title="Questions answered as the finetuning data has it", title_justify="left")
    for heading, justify in (("", "left"), ("questions", "right"), ("before", "right"), ("after", "right")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for name, label in _ROWS.items():
        count = len(knowledge.groups[name])
        table.add_row(label, f"{count:,}", f"{knowledge.before[name]:.0%}", f"{knowledge.after[name]:.0%}")
    return table
