"""What the data modules share: one tokenizer, three splits, their loaders."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import lightning.pytorch as L
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_goldy.core.collate import PadCollator
from lightning_goldy.core.encoding import SampleSet
from lightning_goldy.data.loading import make_loader
from lightning_goldy.data.tokenization import load_tokenizer, padding_id


@dataclass(frozen=True)
class Splits:
    """The samples to train on, to validate on, and the fixed probe that analyses use (disjoint from training)."""

    train: SampleSet
    val: SampleSet
    probe: SampleSet


class ProbeDataModule(L.LightningDataModule, ABC):
    """A data module with a probe set.

    Subclasses build their splits in ``build_splits``; everything is built once, on first use, and is a function of
    the arguments alone. With more than one process Lightning shuffles and shards the training samples itself.

    Args:
        tokenizer: What ``load_tokenizer`` takes.
        batch_size: Samples per batch.
        probe_size: Samples in the probe.
        seed: Decides the split and the order of training samples.
    """

    num_workers: int = 0
    """Processes per loader; the samples lie in memory, so 0 is the fastest choice for most."""

    def __init__(
        self, *, tokenizer: str | PreTrainedTokenizerBase, batch_size: int, probe_size: int, seed: int
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
        self._splits: Splits | None = None

    @abstractmethod
    def build_splits(self) -> Splits:
        """Make the samples of all three splits."""

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Make or load the tokenizer."""
        return load_tokenizer(self._tokenizer_choice)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = self.load_tokenizer()
        return self._tokenizer

    @property
    def splits(self) -> Splits:
        """The samples, built on first use."""
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

    def train_dataloader(self) -> DataLoader:
        """Training batches, shuffled anew each epoch by ``seed``."""
        return self._loader(self.splits.train, shuffle_seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        """Validation batches in a fixed order."""
        return self._loader(self.splits.val)

    def probe_dataloader(self) -> DataLoader:
        """The probe's batches in a fixed order: what analyses use."""
        return self._loader(self.splits.probe)

    def _loader(self, samples: SampleSet, shuffle_seed: int | None = None) -> DataLoader:
        collate = PadCollator(padding_id(self.tokenizer))
        return make_loader(
            samples,
            batch_size=self.batch_size,
            collate=collate,
            shuffle_seed=shuffle_seed,
            num_workers=self.num_workers,
        )
