"""Writes a compacted model so that plain transformers loads it, with a card that says which heads went."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_goldy.core.files import atomic_write
from lightning_goldy.core.gates import Head

CARD = "README.md"


@dataclass(frozen=True)
class Cut:
    """What stayed of one parameter: ``index`` of ``size`` along dimension ``dim``."""

    name: str
    dim: int
    index: Tensor
    size: int

    def expanded(self, tensor: Tensor) -> Tensor:
        """The parameter in full shape, zero where it was cut.

        Example:
            >>> import torch
            >>> Cut("weight", 0, torch.tensor([1]), 3).expanded(torch.ones(1, 2)).tolist()
            [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
        """
        shape = list(tensor.shape)
        shape[self.dim] = self.size
        return tensor.new_zeros(shape).index_copy_(self.dim, self.index.to(tensor.device), tensor)


@dataclass(frozen=True)
class Compaction:
    """What was cut out of a model.

    Args:
        family: The model's family.
        heads_before: Heads of each layer before.
        heads_after: Heads of each layer after.
        closed: Heads whose gates were closed.
        removed: Those that are gone; the other closed ones stay with output columns of zero.
        cuts: What stayed of each parameter that was cut.
        smaller: Whether the saved model is smaller; otherwise it has its full shape, with zeros.
    """

    family: str
    heads_before: tuple[int, ...]
    heads_after: tuple[int, ...]
    closed: tuple[Head, ...]
    removed: tuple[Head, ...]
    cuts: tuple[Cut, ...]
    smaller: bool

    def card(self) -> str:
        """The model card, in Markdown."""
        rows = [
            f"| {layer} | {before} | {after} | {self._of(self.removed, layer)} | {self._of(self._silent, layer)} |"
            for layer, (before, after) in enumerate(zip(self.heads_before, self.heads_after, strict=True))
        ]
        form = (
            "The weights are saved in the smaller shape; the configuration has the new number of heads."
            if self.smaller
            else "The weights are saved in their full shape, with zeros where heads were cut, because a configuration "
            f"of {self.family!r} cannot describe what is left. The logits are the same."
        )
        return "\n".join(
            [
                "---",
                "library_name: transformers",
                "tags: [attention-head-pruning]",
                "---",
                "",
                "# Pruned attention heads",
                "",
                f"{len(self.closed)} of {sum(self.heads_before)} attention heads were closed, and {len(self.removed)} "
                "of them cut out of the query, key, value and output projections.",
                "",
                form,
                "",
                "| layer | heads before | heads kept | heads cut | closed heads kept as zeros |",
                "|---|---|---|---|---|",
                *rows,
                "",
                "Layers and heads count from 0, as in the model before.",
                "",
            ]
        )

    @property
    def _silent(self) -> tuple[Head, ...]:
        return tuple(head for head in self.closed if head not in self.removed)

    @staticmethod
    def _of(heads: tuple[Head, ...], layer: int) -> str:
        return ", ".join(str(head) for at, head in heads if at == layer) or "none"


class CompactSaver:
    """The ``save_pretrained`` of a compacted model.

    Args:
        model: The compacted model.
        record: What was cut.
    """

    def __init__(self, model: nn.Module, record: Compaction) -> None:
        self.model = model
        self.record = record

    def __call__(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        """Writes weights and configuration that ``from_pretrained`` loads, and the card ``README.md``.

        Args:
            save_directory: The folder; files of the same names are replaced, each at once.
            is_main_process: Whether this process writes.
            state_dict: The compacted model's own, when it was gathered elsewhere.
            push_to_hub: Not supported; push the folder.
            **options: As for ``PreTrainedModel.save_pretrained``.

        Raises:
            TypeError: The model is not a transformers model.
            ValueError: ``push_to_hub`` was asked for.
        """
        save = getattr(type(self.model), "save_pretrained", None)
        if save is None:
            raise TypeError(
                f"{type(self.model).__name__} has no save_pretrained; compact the transformers model inside"
            )
        if push_to_hub:
            raise ValueError("push_to_hub: save a compacted model to a folder, then push the folder")
        state = dict(self.model.state_dict() if state_dict is None else state_dict)
        if not self.record.smaller:
            for cut in self.record.cuts:
                state[cut.name] = cut.expanded(state[cut.name])
        if not is_main_process:
            return
        folder = Path(save_directory)
        partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            save(self.model, str(partial), state_dict=state, **options)
            atomic_write(partial / CARD, self.record.card())
            folder.mkdir(parents=True, exist_ok=True)
            for file in sorted(partial.iterdir()):
                os.replace(file, folder / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
