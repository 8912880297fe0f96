"""Compares a masked finetune with a full one and with one of a random mask, from the same start, in one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import lightning.pytorch as L
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_goldy.analysis.result import Row
from lightning_goldy.callbacks.base import AnalysisCallback, AnalysisContext
from lightning_goldy.callbacks.finetune_rerun import Contender, Finetune, Rerun
from lightning_goldy.core.mask import ParameterMask
from lightning_goldy.core.naming import suggestion
from lightning_goldy.core.space import ParameterSpace
from lightning_goldy.core.store import load_vectors, save_vectors
from lightning_goldy.core.vector import ParameterVector
from lightning_goldy.module import GoldyModule
from lightning_goldy.optim.masked_adamw import MaskedAdamW

START_FILE = "start.safetensors"
RANDOM_FILE = "random.safetensors"


class FinetuneComparison(AnalysisCallback[tuple[Finetune, ...]]):
    """At the end of a masked training, trains the same model again, from the same start, in other ways.

    Prints one table: elements trained, the norm of the change, losses on the training and the validation set. Each
    other way costs a training of the same length. It needs a ``GoldyModule`` with ``masked_adamw``, a data module and
    a single device.

    Args:
        against: Other ways: ``full`` trains all elements, ``random`` as many of each tensor as the mask holds, drawn at
            random. Both at the masked training's rate inside.
        seed: Decides the random mask, and the random numbers of the other trainings.
        name: Folder and metric prefix.

    Raises:
        ValueError: A way is unknown, or none is given.

    Example:
        >>> FinetuneComparison(["fall"])
        Traceback (most recent call last):
        ValueError: unknown finetune 'fall'; did you mean 'full'? Valid: full, random
    """

    needs_probe = False

    def __init__(
        self, against: Sequence[Contender] = ("full", "random"), *, seed: int = 0, name: str | None = None
    ) -> None:
        super().__init__(at=("end",), name=name)
        against = (against,) if isinstance(against, str) else tuple(against)  # type: ignore[assignment]
        for contender in against:
            if contender not in get_args(Contender):
                raise ValueError(f"unknown finetune {contender!r}; {suggestion(str(contender), get_args(Contender))}")
        if not against:
            raise ValueError(f"against names nothing to compare with; choose from {', '.join(get_args(Contender))}")
        self.against, self.seed = against, seed
        self._modes: dict[str, bool] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses trainings that it cannot repeat."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if not (isinstance(pl_module, GoldyModule) and pl_module.optimizer_options.name == "masked_adamw"):
            raise ValueError("FinetuneComparison needs a GoldyModule with optimizer.name='masked_adamw'")
        if trainer.datamodule is None:  # type: ignore[attr-defined]
            raise ValueError("FinetuneComparison needs a data module, from which each training takes its data anew")
        if trainer.world_size != 1:
            raise ValueError(f"FinetuneComparison repeats trainings on one device; got {trainer.world_size}")

    def prepare(self, trainer: L.Trainer, model: nn.Module) -> None:
        """Keeps the start in a file, or brings it from the run that is resumed."""
        assert self._store is not None
        self._modes = {name: child.training for name, child in model.named_modules()}
        if self._resumed and self._previous_folder is not None:
            self._store.carry(Path(self._previous_folder) / START_FILE)
        else:
            save_vectors(self.folder / START_FILE, ParameterVector.of(model), kind="values", model=model)

    def compute(self, context: AnalysisContext) -> tuple[Finetune, ...]:
        """Measures the start and the masked finetune, then trains and measures the others."""
        assert isinstance(context.pl_module, GoldyModule)
        start, _ = load_vectors(self.folder / START_FILE, context.model)
        (optimizer,) = (each for each in context.trainer.optimizers if isinstance(each, MaskedAdamW))
        held = optimizer.mask
        assert held is not None
        space = ParameterSpace.of(context.model)
        mask = ParameterMask.from_dense(space, held.to_dense())
        rerun = Rerun(context.trainer, context.pl_module, start, self._modes, self.seed)
        found = [
            rerun.measured("start", 0, start),
            rerun.measured("masked", mask.total, ParameterVector.of(context.model)),
        ]
        for done, contender in enumerate(self.against, 1):
            elements, file = space.numel, None
            if contender == "random":
                counts = dict(zip(space.names, mask.count(), strict=True))
                chosen = ParameterMask.random(space, counts, seed=self.seed)
                elements, file = chosen.total, chosen.save(self.folder / RANDOM_FILE, model=context.model)
            found.append(rerun.measured(contender, elements, rerun.trained(file)))
            context.progress(done, len(self.against))
        return tuple(found)

    def describe(self, result: tuple[Finetune, ...], context: AnalysisContext) -> Row:
        """Prints the table and logs its numbers."""
        numel = ParameterSpace.of(context.model).numel
        Console().print(comparison_table(result, numel))
        metrics: dict[str, float | None] = {}
        for row in result:
            metrics[f"{row.name}/delta_norm"] = row.change
            metrics.update({f"{row.name}/{name.replace('/', '_')}": value for name, value in row.losses.items()})
        return Row("finetune_comparison", metrics, {"numel": numel, "rows": [vars(row) for row in result]})


def comparison_table(rows: Sequence[Finetune], numel: int) -> Table:
    """The finetunes side by side.

    Args:
        rows: What was measured.
        numel: Elements of the model.

    Example:
        >>> comparison_table([Finetune("full", 4, 0.5, {"val/loss": 1.25})], 4).row_count
        1
    """
    # A perplexity says what its loss says.
    names = [name for name in rows[0].losses if "perplexity" not in name]
    table = Table(title="the same start, data and steps; change: norm of the difference to the start")
    for column in ("trained", "elements", "share", "change", *names):
        justify = "left" if column == "trained" else "right"
        table.add_column(column.replace("_", " "), justify=justify, no_wrap=column not in names)  # type: ignore[arg-type]
    for row in rows:
        losses = [f"{row.losses[name]:.4f}" for name in names]
        table.add_row(row.name, f"{row.elements:,}", f"{row.elements / numel:.2%}", f"{row.change:.4g}", *losses)
    return table
