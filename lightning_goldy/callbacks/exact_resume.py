"""Random states and waiting gradients in checkpoints, so that a resumed run is the uninterrupted one."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lightning_goldy.core.isolation import random_states, restore_random_states
from lightning_goldy.core.sharding import Replicas, like, local, unshard_guard
from lightning_goldy.data.base import follow_training

_PATIENCE_SECONDS = 10.0


class ExactResume(L.Callback):
    """Saves the random states of all ranks in checkpoints and restores them on resume, as Lightning does not.

    Resumed from the end of an epoch, a run then ends with the bits of an uninterrupted one, and from the middle of one
    where the data loader keeps its position as well, as those of :mod:`lightning_goldy.data` do. A checkpoint in the
    middle of an accumulation of gradients holds what has been accumulated, too: one more copy of the trained weights.

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
        self._trainer: weakref.ref[L.Trainer] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states of every rank; a collective, as Lightning calls it on all of them.

        Once the run has failed, on this rank at least, the others are waited for a short while only.
        """
        world, mine = Replicas.world(), {**random_states(), "gradients": self._accumulated()}
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

    def _accumulated(self) -> dict[str, torch.Tensor]:
        """This rank's part of gradients that wait for further batches."""
        trainer = None if self._trainer is None else self._trainer()
        if trainer is None or not trainer.training or not trainer.lightning_module.automatic_optimization:
            return {}
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            return {}
        unshard_guard(trainer.lightning_module)
        named = trainer.lightning_module.named_parameters()
        return {name: local(own.grad).cpu().clone() for name, own in named if own.grad is not None}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores once more: strategies differ in when they load callbacks, and set-up draws random numbers."""
        self._trainer = weakref.ref(trainer)
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
        parameters = dict(pl_module.named_parameters())
        for name, gradient in ({} if state is None else state.get("gradients", {})).items():
            parameter = parameters[name]
            parameter.grad = like(parameter.detach(), gradient.to(local(parameter).device))
        fetcher, loader = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
        if state is None or fetcher is None or loader is None:
            return
        restore_random_states(state)
        if not loader._state_dicts():
            iter(fetcher)  # makes the iterators anew, as every epoch does
