"""Watches what a model knows of the atlas while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as L
from transformers import PreTrainedTokenizerBase

from lightning_goldy.data import Question
from lightning_goldy.evaluation import share_known


class AtlasKnowledge(L.Callback):
    """Logs the share of questions answered exactly, by group, and may end the training when enough are.

    Args:
        groups: Questions by the name of their group.
        tokenizer: The model's.
        every_n_epochs: Looks after so many epochs; 0 for the start and the end of the training only.
        stop: The name of a group and the share of it that ends the training.

    Raises:
        ValueError: ``stop`` names no group.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[Question]],
        tokenizer: PreTrainedTokenizerBase,
        *,
        every_n_epochs: int = 0,
        stop: tuple[str, float] | None = None,
    ) -> None:
        if stop is not None and stop[0] not in groups:
            raise ValueError(f"stop names the group {stop[0]!r}; the groups are {', '.join(groups)}")
        self.groups = {name: [(each.prompt, each.answer) for each in questions] for name, questions in groups.items()}
        self.tokenizer = tokenizer
        self.every_n_epochs = every_n_epochs
        self.stop = stop
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}

    @property
    def reached(self) -> bool:
        """Whether the share that ends the training has been reached."""
        return self.stop is not None and self.after.get(self.stop[0], 0.0) >= self.stop[1]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks before the first step."""
        self.before = self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks, shows it in the progress bar, and ends the training when enough is known."""
        if not self.every_n_epochs or (trainer.current_epoch + 1) % self.every_n_epochs:
            return
        self.after = self._look(trainer, pl_module)
        if self.stop is not None:
            pl_module.log("known", self.after[self.stop[0]], prog_bar=True, logger=False)
        trainer.should_stop = trainer.should_stop or self.reached

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Looks after the last step."""
        self.after = self._look(trainer, pl_module)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, float]:
        model = pl_module.model
        shares = {
            name: share_known(model, self.tokenizer, questions)  # type: ignore[arg-type]
            for name, questions in self.groups.items()
        }
        scalars = {f"known/{name}": share for name, share in shares.items()}
        for logger in trainer.loggers:
            logger.log_metrics(scalars, step=trainer.global_step)
        return shares
