"""The demo's base model: pretrained once, then taken from the user's cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_goldy.demo.knowledge import AtlasKnowledge
from lightning_goldy.demo.settings import DemoSettings
from lightning_goldy.module import GoldyModule
from lightning_goldy.optim import OptimizerOptions, ScheduleOptions


def cached_base(settings: DemoSettings, directory: Path) -> tuple[Path, bool]:
    """A folder with a model that knows the atlas, pretrained now when the cache holds none.

    Args:
        settings: Decide the model; other settings, other facts or another version have folders of their own.
        directory: Where the logs of a pretraining go.

    Returns:
        The folder, in Hugging Face format, and whether it came from the cache.

    Raises:
        RuntimeError: The pretraining ended without the facts known.
    """
    folder = cache_directory() / f"demo-{settings.pretraining_hash}"
    # The folder is renamed into place when it is whole.
    if folder.is_dir():
        return folder, True
    _pretrain(settings, directory).save_pretrained(folder)
    return folder, False


def cache_directory() -> Path:
    """``lightning_goldy`` in the user's cache, which ``XDG_CACHE_HOME`` moves.

    Example:
        >>> cache_directory().name
        'lightning_goldy'
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root).expanduser() / "lightning_goldy"


def copy_base(folder: Path, target: Path) -> Path:
    """Puts the base model into the demo's own directory, where recipes look for it; replaces an older one."""
    if target.exists():
        shutil.rmtree(target)
    return Path(shutil.copytree(folder, target))


def _pretrain(settings: DemoSettings, directory: Path) -> GoldyModule:
    L.seed_everything(settings.seed, verbose=False)
    data = settings.pretraining_data()
    module = GoldyModule(
        settings.model_config,
        tokenizer=data.tokenizer,
        optimizer=OptimizerOptions(learning_rate=settings.pretraining_rate, betas=(0.9, 0.99)),
        schedule=ScheduleOptions("constant", warmup_steps=50),
    )
    groups = {"one_hop": data.one_hop_questions(), "one_hop_held_out": data.one_hop_questions("held_out")}
    knowledge = AtlasKnowledge(groups, data.tokenizer, every_n_epochs=2, stop=("one_hop", settings.target))
    trainer = L.Trainer(
        max_epochs=settings.max_epochs,
        accelerator="auto",
        devices=1,
        logger=TensorBoardLogger(directory, name="pretrain"),
        callbacks=[knowledge],
        gradient_clip_val=1.0,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=5 if settings.countries is None else 1,
    )
    trainer.fit(module, data)
    if not knowledge.reached:
        share = knowledge.after.get("one_hop", 0.0)
        raise RuntimeError(
            f"after {trainer.global_step} steps the model knows {share:.1%} of the one-hop facts, "
            f"not {settings.target:.0%}"
        )
    return module
