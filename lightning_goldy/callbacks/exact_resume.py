"""Random states in checkpoints, so that a resumed run is the uninterrupted one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.utilities import rank_zero_warn

from lightning_goldy.core.isolation import random_states, restore_random_states
from lightning_goldy.core.sharding import Replicas
from lightning_goldy.data.base import follow_training

_PATIENCE_SECONDS = 10.0


class ExactResume(L.Callback):
    """Saves the random states of all ranks in checkpoints and restores them on resume, as Lightning does not.

    Resumed from the end of an epoch, a run then ends with the bits of an uninterrupted one, and from the middle of one
    where the data loader keeps its position as well, as those of :mod:`lightning_goldy.data` do.

    Example:
        >>> import torch
        >>> callback = ExactResume()
        >>> state = callback.state_dict()
        >>> first = torch.rand(2)
        >>> callback.load_state_dict(state)
        >>> torch.equal(first, torch.rand(2))
        True
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None
        self._failed = False

    def state_dict(self) -> dict[str, Any]:
        """The states of every rank; a collective, as Lightning calls it on all of them.

        Once the run has failed, on this rank at least, the others are waited for a short while only.
        """
        world, mine = Replicas.world(), random_states()
        if not self._failed:
            return {"ranks": world.gather_objects(mine)}
        return {"ranks": world.gather_soon(mine, _PATIENCE_SECONDS) or [mine]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores this rank's states at once, and notes them for the start of the training."""
        world = Replicas.world()
        ranks = state_dict["ranks"]
        # Saved on another number of ranks there is no state of one's own to return to.
        self._state = ranks[world.rank] if len(ranks) == world.size else None
        if self._state is not None:
            restore_random_states(self._state)
        else:
            rank_zero_warn(
                f"the checkpoint holds the random states of {len(ranks)} rank(s), the run has {world.size}: random "
                "numbers are not those of an uninterrupted run"
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores once more: strategies differ in when they load callbacks, and set-up draws random numbers."""
        if self._state is not None:
            restore_random_states(self._state)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Notes that other ranks may not answer any more."""
        self._failed = True

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follows loaders that were made anew."""
        follow_training(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins the epoch's batches from the restored states.

        Loaders that keep their position begin there, and learn which of their batches were trained on; they need no
        random state. A loader that shuffles draws its order as its iterator is made, which is during set-up where the
        learning-rate schedule asks for the number of steps.
        """
        follow_training(trainer)
        self._failed = False
        state, self._state = self._state, None
        fetcher, loader = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
        if state is None or fetcher is None or loader is None:
            return
        restore_random_states(state)
        if not loader._state_dicts():
            iter(fetcher)  # makes the iterators anew, as every epoch does
