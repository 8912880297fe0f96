"""A Hugging Face folder beside every Lightning checkpoint."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lightning_goldy.analysis.heads.compaction import gated_state, gates_card
from lightning_goldy.core.architecture import HeadGates, UnsupportedArchitectureError
from lightning_goldy.core.files import atomic_write
from lightning_goldy.training.quiet import without_transformers_bars


def pretrained_folder(checkpoint: str | os.PathLike[str]) -> Path:
    """The folder in Hugging Face format that belongs to a Lightning checkpoint.

    Example:
        >>> pretrained_folder("run/checkpoints/step=10.ckpt").name, pretrained_folder("run/weights").name
        ('step=10', 'weights-pretrained')
    """
    path = Path(checkpoint)
    return path.with_name(path.name.removesuffix(".ckpt") if path.name.endswith(".ckpt") else f"{path.name}-pretrained")


def write_pretrained(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    state: Mapping[str, Tensor] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Writes a model, or its PEFT adapter, and a tokenizer so that plain transformers or PEFT loads them.

    The folder is whole or absent: it is written under another name and renamed. Where attention heads are closed, their
    columns of the output projections are written as zeros, and ``README.md`` tells which; an adapter, which is saved
    without the weights that it adapts, cannot close a head, and a warning says so.

    Args:
        model: A transformers or PEFT model.
        folder: Replaced when it exists.
        state: The full weights, by the names of ``model.state_dict()``; by default the model's own.
        tokenizer: Saved beside the model when given.

    Returns:
        The folder.

    Raises:
        TypeError: The model has no ``save_pretrained``.
        UnsupportedArchitectureError: Heads are closed, and which weights are theirs is not known.
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(f"{type(model).__name__} has no save_pretrained; only transformers and PEFT models have")
    folder = Path(folder)
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
    weights = model.state_dict() if state is None else state
    gates, is_adapter = HeadGates.of(model), hasattr(model, "peft_config")
    if is_adapter and gates is not None and gates.closed:
        rank_zero_warn(
            f"{folder} holds an adapter, which cannot close the {len(gates.closed)} closed heads: close them again "
            "with HeadGates(model).disable(heads) once it is loaded; its README.md lists them"
        )
    elif not is_adapter:
        weights = gated_state(model, weights)
    options: dict[str, Any] = {"state_dict": _with_ties(model, weights)}
    if is_adapter:
        options["save_embedding_layers"] = False  # its "auto" asks the hub whether the vocabulary has changed
    try:
        with without_transformers_bars():
            model.save_pretrained(str(partial), **options)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(str(partial))
        if (card := gates_card(model, in_weights=not is_adapter)) is not None:
            atomic_write(partial / "README.md", card)
        _replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


class PretrainedExport(CheckpointIO):
    """Saves, loads and removes checkpoints through another ``CheckpointIO``, and keeps a folder beside each.

    For ``step=10.ckpt`` it writes ``step=10/``, which ``from_pretrained`` loads, and removes it with the checkpoint.
    What is exported is the weights in the checkpoint, so an asynchronous writer underneath changes nothing.

    Args:
        inner: The plugin that does the saving.
        trainer: Whose module is exported: its ``goldy_model``, with its ``export_tokenizer()``.
    """

    def __init__(self, inner: CheckpointIO, trainer: L.Trainer) -> None:
        self.inner = inner
        self.trainer = trainer

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Saves the checkpoint, then the folder."""
        self.inner.save_checkpoint(checkpoint, path, storage_options=storage_options)
        module = self.trainer.lightning_module
        if not getattr(module, "exports_pretrained", False):
            return
        if "://" in str(path):
            rank_zero_warn(f"no pretrained folder is written beside {path}: only local folders can hold one")
            return
        state = {
            name.removeprefix("model."): value
            for name, value in checkpoint["state_dict"].items()
            if name.startswith("model.")
        }
        folder, tokenizer = pretrained_folder(path), module.export_tokenizer()  # type: ignore[operator]
        try:
            write_pretrained(module.model, folder, state=state, tokenizer=tokenizer)  # type: ignore[arg-type]
        except UnsupportedArchitectureError as error:
            rank_zero_warn(f"no pretrained folder is written beside {path}, it would open the closed heads: {error}")

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Loads through the inner plugin."""
        return self.inner.load_checkpoint(path, *args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        """Removes the folder, then the checkpoint."""
        if "://" not in str(path):
            folder = pretrained_folder(path)
            if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
                shutil.rmtree(folder)
        self.inner.remove_checkpoint(path)

    def teardown(self) -> None:
        """Lets the inner plugin finish."""
        self.inner.teardown()


def attach_export(trainer: L.Trainer) -> None:
    """Makes a trainer write a pretrained folder beside each checkpoint; again on the same trainer is harmless.

    Sharded checkpoints, which are folders with one part per process, get none: a warning says so.
    """
    strategy = trainer.strategy
    if getattr(strategy, "_save_distributed_checkpoint", False):
        rank_zero_warn(
            f"{type(strategy).__name__} saves sharded checkpoints, beside which no pretrained folder is written; use "
            "save_distributed_checkpoint=False, or call GoldyModule.save_pretrained(folder) on every process"
        )
    elif not isinstance(strategy.checkpoint_io, PretrainedExport):
        strategy.checkpoint_io = PretrainedExport(strategy.checkpoint_io, trainer)


def _with_ties(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Gathering and asynchronous copying give tied weights storages of their own; transformers knows ties by storage.
    first: dict[int, str] = {}
    tied = dict(state)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        original = first.setdefault(id(parameter), name)
        if original != name and original in tied and name in tied:
            tied[name] = tied[original]
    return tied


def _replace(source: Path, target: Path) -> None:
    if not target.exists():
        source.rename(target)
        return
    # A folder cannot be renamed over another; for an instant there is none, never half of one.
    old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
    target.rename(old)
    source.rename(target)
    shutil.rmtree(old)
