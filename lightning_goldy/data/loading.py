"""Loaders whose order and position survive a restart and which leave the global random state alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from lightning_goldy.core.collate import PadCollator
from lightning_goldy.core.encoding import Sample, SampleSet


class SeededShuffle(Sampler[int]):
    """A shuffle that is a function of the seed and the epoch, so a resumed run sees the order it would have seen.

    Lightning calls ``set_epoch``; in a loop of your own, call it before each epoch.

    Args:
        size: The number of samples.
        seed: Any integer.

    Example:
        >>> sampler = SeededShuffle(4, seed=0)
        >>> first = list(sampler)
        >>> sampler.set_epoch(1)
        >>> sorted(first) == sorted(sampler), first == list(SeededShuffle(4, seed=0))
        (True, True)
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.size, generator=_generator(self.seed, self.epoch)).tolist())


class ResumableDataLoader(DataLoader):
    """A DataLoader that remembers, in checkpoints, how many batches of the epoch it has handed out.

    Loaded in the middle of an epoch it passes over those, so a killed run continues with the very next batch.
    """

    _delivered = 0
    _skip = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._delivered, self._skip = self._skip, 0
        for batch in islice(super().__iter__(), self._delivered, None):
            self._delivered += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The position, as Lightning stores it in a checkpoint."""
        return {"delivered": self._delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass at the stored position (at the beginning if that epoch was complete)."""
        self._delivered = self._skip = state["delivered"] % len(self)


def make_loader(
    samples: SampleSet,
    *,
    batch_size: int,
    collate: PadCollator,
    shuffle_seed: int | None = None,
    num_workers: int = 0,
) -> DataLoader:
    """A loader with a random generator of its own.

    Args:
        samples: A list or dataset of samples.
        batch_size: Samples per batch; the last batch may be smaller.
        collate: Makes a batch of samples.
        shuffle_seed: Shuffles by this seed and the epoch, resumably; None keeps the dataset's order.
        num_workers: Processes that fetch samples.
    """
    size = len(samples)
    dataset = cast("Dataset[Sample]", samples)  # a loader asks for no more than a length and items by number
    options: dict[str, Any] = {
        "batch_size": batch_size,
        "collate_fn": collate,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        # Without one, every pass over a loader draws from torch's global generator.
        "generator": _generator(shuffle_seed or 0, 0),
    }
    if shuffle_seed is None:
        return DataLoader(dataset, sampler=SequentialSampler(range(size)), **options)
    return ResumableDataLoader(dataset, sampler=SeededShuffle(size, shuffle_seed), **options)


def _generator(seed: int, epoch: int) -> torch.Generator:
    # Far apart, so that epoch 1 of one seed is not epoch 0 of the next; the multiplier is splitmix64's.
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + epoch) % 2**63)
