"""What the data modules share: one tokenizer, three splits, their loaders."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler
from transformers import PreTrainedTokenizerBase

from lightning_goldy.core.pieces import KnowledgePiece, PadCollator, Sample, SampleSet
from lightning_goldy.data.readers import PieceSet, load_pieces
from lightning_goldy.data.tokenization import load_own_tokenizer, load_tokenizer, own_tokenizer, padding_id

TEMPLATE = "Question: {question}\nAnswer:"
"""The prompt of a knowledge piece; its answer follows after a space."""


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


class ResumableDataLoader(DataLoader[Any]):
    """A DataLoader that remembers, in checkpoints, how many batches of the epoch were trained on.

    Loaded in the middle of an epoch it passes over those, so a killed run continues with the very next batch. A batch
    that was handed out when the run was interrupted comes again: ``ExactResume`` and the analysis callbacks tell how
    many those are. In a loop of your own all that were handed out count, unless you set ``ahead``.

    Example:
        >>> loader = ResumableDataLoader([1, 2, 3])
        >>> batches = iter(loader)
        >>> _ = next(batches), next(batches)
        >>> loader.state_dict()
        {'delivered': 2}
        >>> loader.ahead = lambda: 1
        >>> loader.state_dict()
        {'delivered': 1}
    """

    _delivered = 0
    _skip = 0
    ahead: Callable[[], int] | None = None
    """Tells how many of the batches that were handed out have not been trained on."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._delivered, self._skip = self._skip, 0
        for batch in islice(super().__iter__(), self._delivered, None):
            self._delivered += 1
            yield batch

    def rewind(self) -> None:
        """Start the next pass at the first batch."""
        self._delivered = self._skip = 0

    def state_dict(self) -> dict[str, int]:
        """The position, as Lightning stores it in a checkpoint."""
        ahead = 0 if self.ahead is None else self.ahead()
        return {"delivered": (self._delivered - ahead) % max(len(self), 1) if ahead else self._delivered}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Start the next pass at the stored position (at the beginning if that epoch was complete)."""
        self._delivered = self._skip = state["delivered"] % len(self)


def follow_training(trainer: L.Trainer) -> None:
    """Lets the training loaders that keep their position leave out batches that were fetched and not trained on.

    Whoever asks during set-up how long the training is (``trainer.estimated_stepping_batches``, as most learning-rate
    schedules do) has Lightning make the loaders before it reads their positions from the checkpoint, and it reads them
    only as it makes loaders. So they are told here, and begin there.

    A checkpoint of an epoch's last batch is taken for one within that epoch; Lightning then counts no beginning of the
    next, and a further resume from within it would begin it anew. So it is counted here.
    """
    loop = trainer.fit_loop
    epochs = loop.epoch_progress.current
    if loop.restarted_mid_epoch and epochs.ready == epochs.completed:
        loop.reset_restart_stage()
    if getattr(loop, "_combined_loader_states_to_load", None) and loop._data_fetcher is not None:
        loop._load_combined_loader_states()
        iter(loop._data_fetcher)
    combined = loop._combined_loader
    for loader in [] if combined is None else combined.flattened:
        if isinstance(loader, ResumableDataLoader):
            loader.ahead = partial(_ahead, weakref.ref(trainer))


def _ahead(trainer: weakref.ref[L.Trainer]) -> int:
    """Batches of this epoch that were fetched, less those that were trained on."""
    known = trainer()
    if known is None or known.fit_loop._data_fetcher is None:
        return 0
    # Counted before the hooks at the end of a batch, as Lightning does where it resumes from within them.
    trained = known.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
    return max(known.fit_loop._data_fetcher.fetched - trained, 0)


def make_loader(
    samples: SampleSet, *, batch_size: int, collate: PadCollator, shuffle_seed: int | None = None, num_workers: int = 0
) -> DataLoader[Any]:
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


@dataclass(frozen=True)
class Splits:
    """The samples of a data module, disjoint.

    Args:
        train: To train on.
        val: To validate on.
        probe: Those that analyses use, the same all along.
    """

    train: SampleSet
    val: SampleSet
    probe: SampleSet


class ProbeDataModule(L.LightningDataModule, ABC):
    """A data module with a probe set.

    Subclasses build their splits in ``build_splits``; everything is built once, on first use, and is a function of
    the arguments alone. With more than one process Lightning shuffles and shards the training samples itself.

    Args:
        tokenizer: What ``load_tokenizer`` takes; None for the own one of the model that the trainer has.
        batch_size: Samples per batch.
        probe_size: Samples in the probe.
        seed: Decides the split and the order of training samples.
    """

    num_workers: int = 0
    """Processes per loader; the samples lie in memory, so 0 is the fastest choice for most."""
    made_tokenizer: str = "bytes"
    """What takes the place of a model's own tokenizer where there is no model, or one that was loaded from nowhere."""

    def __init__(
        self, *, tokenizer: str | PreTrainedTokenizerBase | None, batch_size: int, probe_size: int, seed: int
    ) -> None:
        super().__init__()
        for name, value, least in (("batch_size", batch_size, 1), ("probe_size", probe_size, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        self.batch_size = batch_size
        self.probe_size = probe_size
        self.seed = seed
        self._tokenizer_choice = tokenizer
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._tokenizer_of: Any = None
        self._splits: Splits | None = None

    @abstractmethod
    def build_splits(self) -> Splits:
        """Make the samples of all three splits."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Make or load the tokenizer that was chosen, or the model's own."""
        owner = self._tokenizer_owner()
        return (
            self.make_tokenizer(self._tokenizer_choice or self.made_tokenizer)
            if owner is None
            else load_own_tokenizer(owner)
        )

    def make_tokenizer(self, choice: str | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Hook for subclasses: the tokenizer of a name."""
        return load_tokenizer(choice)

    def _tokenizer_owner(self) -> str | PreTrainedTokenizerBase | None:
        """What gives the model's own tokenizer; None where one was chosen, or there is no such model."""
        if self._tokenizer_choice is not None or self.trainer is None:
            return None
        return own_tokenizer(self.trainer.lightning_module)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use; another trainer's model may have another one of its own."""
        owner = self._tokenizer_owner()
        if self._tokenizer is None or (self.trainer is not None and owner != self._tokenizer_of):
            self._splits = None
            self._tokenizer, self._tokenizer_of = self.load_tokenizer(), owner
        return self._tokenizer

    @property
    def splits(self) -> Splits:
        """The samples, built on first use."""
        _ = self.tokenizer
        if self._splits is None:
            splits = self.build_splits()
            for field in fields(splits):
                if len(getattr(splits, field.name)) == 0:
                    raise ValueError(f"{type(self).__name__}: the {field.name} set is empty")
            self._splits = splits
        return self._splits

    def prepare_data(self) -> None:
        """Download what has to be downloaded, on one process per machine."""
        self._tokenizer = self.tokenizer

    def setup(self, stage: str | None = None) -> None:
        """Build the samples; a second call does nothing."""
        self._splits = self.splits

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, shuffled anew each epoch by ``seed``."""
        return self._loader(self.splits.train, shuffle_seed=self.seed)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches in a fixed order."""
        return self._loader(self.splits.val)

    def probe_dataloader(self) -> DataLoader[Any]:
        """The probe's batches in a fixed order: what analyses use."""
        return self._loader(self.splits.probe)

    def _loader(self, samples: SampleSet, shuffle_seed: int | None = None) -> DataLoader[Any]:
        collate, size, workers = PadCollator(padding_id(self.tokenizer)), self.batch_size, self.num_workers
        return make_loader(samples, batch_size=size, collate=collate, shuffle_seed=shuffle_seed, num_workers=workers)


def other_pieces(source: str | Path) -> tuple[KnowledgePiece, ...]:
    """The questions and answers of a ``collateral``.

    Raises:
        FileNotFoundError: No such source.
        ValueError: A faulty record, or none; it says that it is of the collateral.
    """
    try:
        return told_pieces(source).pieces
    except ValueError as error:
        raise ValueError(f"collateral: {error}") from error


def told_pieces(path: str | Path) -> PieceSet:
    """The pieces of a source; says what of it was left out."""
    found = load_pieces(path)
    if found.skipped:
        left_out = ", ".join(f"{reason}: {count}" for reason, count in found.skipped.items())
        rank_zero_info(f"{found.source}: {len(found.pieces)} pieces; left out: {left_out}")
    return found
