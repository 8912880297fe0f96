"""Random states in checkpoints, so that a resumed run is the uninterrupted one."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch

from lightning_goldy.core.sharding import Replicas


class ExactResume(L.Callback):
    """Saves the random states of all ranks in checkpoints and restores them on resume, as Lightning does not.

    Resumed from the end of an epoch, a run then ends with the bits of an uninterrupted one. In the middle of an epoch
    the data loader must keep its position as well, as those of :mod:`lightning_goldy.data` do.

    Example:
        >>> callback = ExactResume()
        >>> state = callback.state_dict()
        >>> first = torch.rand(2)
        >>> callback.load_state_dict(state)
        >>> torch.equal(first, torch.rand(2))
        True
    """

    def __init__(self) -> None:
        self._state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states of every rank; a collective, as Lightning calls it on all of them."""
        return {"ranks": Replicas.world().gather_objects(random_states())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores this rank's states at once, and notes them for the start of the training."""
        world = Replicas.world()
        ranks = state_dict["ranks"]
        # Saved on another number of ranks there is no state of one's own to return to.
        self._state = ranks[world.rank] if len(ranks) == world.size else None
        if self._state is not None:
            restore_random_states(self._state)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restores once more: strategies differ in when they load callbacks, and set-up draws random numbers."""
        if self._state is not None:
            restore_random_states(self._state)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins the epoch's batches from the restored states.

        A loader that shuffles draws its order as its iterator is made, which is during set-up where the learning-rate
        schedule asks for the number of steps. A loader that keeps its position needs no random state.
        """
        state, self._state = self._state, None
        fetcher, loader = trainer.fit_loop._data_fetcher, trainer.fit_loop._combined_loader
        if state is not None and fetcher is not None and loader is not None and not loader._state_dicts():
            restore_random_states(state)
            iter(fetcher)  # makes the iterators anew, as every epoch does


def random_states() -> dict[str, Any]:
    """The states of Python, NumPy, torch and all CUDA devices, in types that load under ``weights_only``."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else [],
    }


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Undoes :func:`random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    if len(states["cuda"]) == torch.cuda.device_count() and states["cuda"]:
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
