"""The probe: the first batches that Lightning would feed, read once for all callbacks and without a trace."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary, WeakValueDictionary

import lightning.pytorch as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
)

from lightning_goldy.core.batches import batch_tensors, is_divisible, map_batch, sample_count, take_samples
from lightning_goldy.core.isolation import Kept, preserved
from lightning_goldy.core.store import raw_bytes
from lightning_goldy.data.base import SeededShuffle

_SEED = 0
"""Of every reading: a sampler or an augmentation that draws gives the same on every rank and after a resume."""
_OF_TRAINING = 64
"""Samples of a training set where all of the probe are asked for."""
_WHOLE = (SequentialSampler, RandomSampler, DistributedSampler, SeededShuffle)
"""Samplers that give each item of their data set its number."""


@dataclass(frozen=True)
class Source:
    """Where batches come from.

    Args:
        name: What messages call it.
        key: Tells sources apart.
        open: Gives what is to be read: batches, a loader, or several.
        limits: Batches that Lightning takes of each loader; None for all.
        owned: Whether it was given for this alone, so that an iterator may be used up.
        most: Samples that are read where all are asked for; None for all.
        backwards: Whether loaders are read from their end, as far as that can be reached.
        warning: What to say when it is read.
    """

    name: str
    key: tuple[str, int]
    open: Callable[[], Any]
    limits: Callable[[CombinedLoader], list[float]] | None = None
    owned: bool = False
    most: int | None = None
    backwards: bool = False
    warning: Callable[[CombinedLoader], str] | None = None


@dataclass(eq=False)
class Reading:
    """What was read of a source, on the CPU.

    Args:
        source: The source, which stays referenced as long as its key is in use.
        batches: The batches.
    """

    source: Source
    batches: list[Any] = field(default_factory=list)

    @property
    def n_samples(self) -> int:
        """The samples of all batches."""
        return sum(map(sample_count, self.batches))

    def first(self, n_samples: int | None) -> list[Any]:
        """The batches of the first samples, the last one cut; those of all samples where there are fewer."""
        return list(first_batches(self.batches, self.source.most if n_samples is None else n_samples))


_READINGS: WeakKeyDictionary[L.Trainer, WeakValueDictionary[tuple[Any, ...], Reading]] = WeakKeyDictionary()


def shared_reading(
    trainer: L.Trainer, source: Source, n_samples: int | None, wanted: Sequence[int | None] = ()
) -> Reading:
    """A reading of the source that callbacks of one trainer share as long as one of them holds it.

    Args:
        trainer: The trainer.
        source: What to read.
        n_samples: Samples that are needed; None for all that Lightning would take.
        wanted: Samples that all sharers need. The largest number is read.

    Raises:
        ValueError: The source cannot be read.
    """
    readings = _READINGS.setdefault(trainer, WeakValueDictionary())
    needs = [source.most if need is None else need for need in (n_samples, *wanted)]
    if None in needs:
        whole = readings.get((source.key, None))
        if whole is None:
            whole = readings[source.key, None] = Reading(source, read_batches(trainer, source, None))
        if needs[0] is None or whole.n_samples >= needs[0]:
            return whole
    most = max(need for need in needs if need is not None)
    reading = readings.get((source.key, most))
    if reading is None:
        reading = readings[source.key, most] = Reading(source, read_batches(trainer, source, most))
    return reading


def first_batches(batches: Iterable[Any], n_samples: int | None) -> Iterator[Any]:
    """The batches of the first samples, the last one cut; no batch more is asked for.

    Example:
        >>> [len(batch) for batch in first_batches(iter([torch.zeros(4), torch.zeros(4)]), 5)]
        [4, 1]
    """
    left = n_samples
    if left is not None and left <= 0:
        return
    for batch in batches:
        if left is None:
            yield batch
            continue
        size = sample_count(batch)
        # What only its objective can cut stays whole.
        yield take_samples(batch, slice(left)) if size > left and is_divisible(batch) else batch
        left -= size
        if left <= 0:
            return


def read_batches(trainer: L.Trainer, source: Source, n_samples: int | None) -> list[Any]:
    """The first batches of a source as the model would see them, on the CPU; nothing that they came from has moved on.

    Every batch passes the hooks that a validation batch of Lightning's passes. Of several loaders, Lightning's limits
    of batches hold unless they leave too few samples.

    Raises:
        ValueError: The source is no iterable of batches, or reading it would use it up.
    """
    module = trainer.lightning_module
    kept = Kept([] if trainer.datamodule is None else [trainer.datamodule])  # type: ignore[attr-defined]
    with preserved(module), _as_validation(trainer):
        _seed()
        try:
            with _as_one_process():
                combined = _combined(source.open(), source)
            if source.warning is not None:
                rank_zero_warn(source.warning(combined))
            limits = None if source.limits is None else source.limits(combined)
            for limit in [limits, None] if limits is not None and n_samples is not None else [limits]:
                batches = _read(trainer, combined, source, limit, n_samples)
                if n_samples is None or sum(map(sample_count, batches)) >= n_samples:
                    break
        finally:
            kept.restore()
    for kind, count in kept.replayed.items():
        rank_zero_info(
            f"{source.name}: {count} items of a {kind} that cannot go back were read for the probe; the training gets "
            "them again"
        )
    return batches


def _read(
    trainer: L.Trainer, combined: CombinedLoader, source: Source, limits: list[float] | None, n_samples: int | None
) -> list[Any]:
    kept = Kept(loader.batches if isinstance(loader, _Batches) else loader for loader in combined.flattened)
    used_up = [kind for kind in kept.iterators if not source.owned]
    if used_up:
        kept.restore()
        raise ValueError(
            f"{source.name} rests on a {type(used_up[0]).__name__}, which reading the probe would move on for the "
            "training: pass probe=[...] (batches or a DataLoader)"
        )
    loaders = [_for_every_rank(loader) for loader in combined.flattened]
    if source.backwards:
        loaders = [_backwards(loader) if _has_end(loader) else loader for loader in loaders]
    copies = CombinedLoader(loaders, combined._mode)
    copies._spec, copies.limits = combined._spec, limits
    _seed()
    try:
        return list(first_batches(_fed(trainer, copies), n_samples))
    finally:
        copies.reset()
        kept.restore()


@torch.no_grad()
def _fed(trainer: L.Trainer, loaders: CombinedLoader) -> Iterator[Any]:
    for batch, _, dataloader_idx in _alone(loaders):
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=dataloader_idx)
        batch = trainer.strategy.batch_to_device(batch, dataloader_idx=dataloader_idx)
        # Batches may have been made in inference mode, whose tensors cannot take part in a backward pass.
        yield map_batch(batch, lambda tensor: tensor.detach().cpu().clone())


def _alone(loaders: Iterable[Any]) -> Iterator[Any]:
    with _as_one_process():
        items = iter(loaders)
    while True:
        # The hooks that follow may take part in the communication of the processes.
        with _as_one_process():
            item = next(items, None)
        if item is None:
            return
        yield item


@contextmanager
def _as_one_process() -> Iterator[None]:
    """A data set that asks ``torch.distributed`` for its share of the samples takes them all.

    One that has been given its share before, or asks elsewhere (the environment, a name imported from torch), cannot be
    known.
    """
    if not (dist.is_available() and dist.is_initialized()):
        yield
        return
    answers = {"get_rank": lambda group=None: 0, "get_world_size": lambda group=None: 1}
    before = {name: getattr(dist, name) for name in answers}
    try:
        vars(dist).update(answers)
        yield
    finally:
        vars(dist).update(before)


def _seed() -> None:
    torch.default_generator.manual_seed(_SEED)
    # An uninitialised CUDA would take the seed later, when nothing puts it back.
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(_SEED)
    random.seed(_SEED)
    np.random.seed(_SEED)


@contextmanager
def _as_validation(trainer: L.Trainer) -> Iterator[None]:
    """Hooks that augment training batches alone ask the trainer or the module for the stage."""
    stage = trainer.state.stage
    trainer.state.stage = RunningStage.VALIDATING
    try:
        yield
    finally:
        trainer.state.stage = stage


class _Batches:
    """Any iterable of batches, which the combination of loaders takes for one loader."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def _combined(loaders: Any, source: Source) -> CombinedLoader:
    """Any form that loaders have, in Lightning's."""
    if isinstance(loaders, CombinedLoader):
        return loaders
    items = list(loaders.values() if isinstance(loaders, Mapping) else loaders) if _is_collection(loaders) else []
    if items and all(isinstance(item, DataLoader) for item in items):
        return CombinedLoader(loaders, "sequential")
    if isinstance(loaders, (Mapping, Tensor, str)):
        kind = type(loaders).__name__
        raise ValueError(f"{source.name} gave a {kind}, which is no iterable of batches: put the batch in a list")
    if not isinstance(loaders, Iterable) and not hasattr(loaders, "__getitem__"):
        kind = type(loaders).__name__
        raise ValueError(f"{source.name} gave a {kind}, which is no iterable of batches: give a DataLoader or a list")
    return CombinedLoader([_Batches(loaders) if not isinstance(loaders, DataLoader) else loaders], "sequential")


def _is_collection(value: Any) -> bool:
    return isinstance(value, (list, tuple, Mapping))


def _for_every_rank(loader: Any) -> Any:
    """A copy of a loader with workers of its own, that reads the same on every rank."""
    if not isinstance(loader, DataLoader):
        return loader
    copied = copy.copy(loader)
    held: dict[str, Any] = vars(copied)
    # The attributes of a loader that exists cannot be set.
    held.update(persistent_workers=False, _iterator=None)
    # A loader that is to go on within an epoch is read from its beginning.
    rewind = getattr(copied, "rewind", None)
    if callable(rewind):
        rewind()
    if "next_iter_state" in held:  # of torchdata's stateful loader
        held["next_iter_state"] = None
    if loader.num_workers > 0:
        held["prefetch_factor"] = 1
    if isinstance(loader.worker_init_fn, partial) and "rank" in loader.worker_init_fn.keywords:
        held["worker_init_fn"] = partial(loader.worker_init_fn, rank=0)
    held["sampler"] = _undivided(loader.sampler, loader.dataset)
    if loader.batch_sampler is not None:
        batches = _undivided(loader.batch_sampler, loader.dataset)
        if isinstance(batches, SequentialSampler):
            size = getattr(loader.batch_sampler, "batch_size", None)
            batches = BatchSampler(batches, size if isinstance(size, int) else 1, drop_last=False)
        held["batch_sampler"] = batches
    return copied


def _undivided(sampler: Any, dataset: Any) -> Any:
    if isinstance(sampler, DistributedSamplerWrapper):
        sampler = sampler.dataset._sampler  # type: ignore[attr-defined]
    elif isinstance(sampler, DistributedSampler):
        if sampler.num_replicas > 1:
            sampler = copy.copy(sampler)
            sampler.num_replicas, sampler.rank = 1, 0
            sampler.num_samples = sampler.total_size = len(sampler.dataset)
    elif getattr(sampler, "num_replicas", 1) != 1:
        return SequentialSampler(dataset)
    inner = getattr(sampler, "sampler", None)
    if inner is not None:
        whole = _undivided(inner, dataset)
        if whole is not inner:
            sampler = copy.copy(sampler)
            sampler.sampler = whole
    if callable(getattr(sampler, "set_epoch", None)):
        # A resumed run reads what the first one read.
        sampler.set_epoch(0)
    if getattr(sampler, "next_yielded", None) is not None:  # of torchdata's stateful samplers
        sampler.next_yielded = None
    return sampler


class _FromEnd:
    """What a sampler gives, the last first: of one that gives every item, the last items of the data set."""

    def __init__(self, sampler: Any, dataset: Any) -> None:
        self.sampler, self.dataset = sampler, dataset

    def __len__(self) -> int:
        return len(self.dataset) if type(self.sampler) in _WHOLE else len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        whole = type(self.sampler) in _WHOLE
        return iter(reversed(range(len(self.dataset)) if whole else list(self.sampler)))


def _has_end(loader: Any) -> bool:
    """Whether a loader's last samples can be had without reading the others."""
    if not isinstance(loader, DataLoader):
        batches = loader.batches if isinstance(loader, _Batches) else loader
        return hasattr(batches, "__len__") and hasattr(batches, "__getitem__")
    if isinstance(loader.dataset, IterableDataset):
        return False
    try:
        return len(loader) >= 0
    except (TypeError, NotImplementedError):  # of a sampler without a length
        return False


def _backwards(loader: Any) -> Any:
    """A loader's copy that begins with the last samples of its data set; nothing is read before it is asked for."""
    if not isinstance(loader, DataLoader):
        batches: Any = loader.batches if isinstance(loader, _Batches) else loader
        return _Batches(batches[place] for place in reversed(range(len(batches))))
    held: dict[str, Any] = vars(loader)
    sampler: Any = _FromEnd(loader.sampler, loader.dataset)
    if loader.batch_sampler is not None:
        size: Any = getattr(loader.batch_sampler, "batch_size", None)
        plain = type(loader.batch_sampler) is BatchSampler and isinstance(size, int)
        batches = BatchSampler(sampler, size, drop_last=False) if plain else _FromEnd(loader.batch_sampler, None)
        held["batch_sampler"] = batches
    held["sampler"] = sampler
    return loader


def training_source(trainer: L.Trainer, why: str) -> Source | None:
    """The last samples of the training set, the last one first, where nothing else can be a probe; None without one.

    Of an iterable, and of a sampler without a length, they are the first, since its end lies behind all the others.

    Args:
        trainer: Its training loaders are set up or not yet.
        why: Nothing else can.
    """
    loop = trainer.fit_loop
    if loop._combined_loader is None and (loop._data_source.instance is None or not loop._data_source.is_defined()):
        return None

    def warning(combined: CombinedLoader) -> str:
        ends = all(map(_has_end, combined.flattened))
        taken = "last" if ends else "first, as an iterable's last ones lie behind all the others,"
        return (
            f"the probe is taken from the training set, its {taken} samples ({why}): what analyses say of them is not "
            "what they would say of held-out samples. Pass probe=[...], or give a validation loader"
        )

    return Source(
        "the training set",
        ("training", id(loop)),
        partial(_opened, loop, "max_size_cycle"),
        most=_OF_TRAINING,
        backwards=True,
        warning=warning,
    )


def validation_source(trainer: L.Trainer) -> Source:
    """The validation loaders of the trainer, set up or not yet; its training set where it validates nothing.

    Raises:
        ValueError: There is neither.
    """
    loop = trainer.validate_loop if trainer.state.fn == TrainerFn.VALIDATING else trainer.fit_loop.epoch_loop.val_loop
    defined = loop._data_source.instance is not None and loop._data_source.is_defined()
    why = None
    if trainer.limit_val_batches == 0:
        why = "limit_val_batches=0"
    elif not is_overridden("validation_step", trainer.lightning_module):
        why = f"{type(trainer.lightning_module).__name__} has no validation_step"
    elif loop._combined_loader is None and not defined:
        why = "there is no validation loader"
    elif loop._combined_loader is not None and not any(loop._max_batches):
        why = "the validation loaders have no batch"
    if why is not None:
        training = training_source(trainer, why)
        if training is not None:
            return training
        raise ValueError(
            f"no probe batches ({why}): pass probe=[...] (batches or a DataLoader), or give the data module or the "
            "LightningModule a probe_dataloader(), or the trainer a validation loader"
        )

    def limits(combined: CombinedLoader) -> list[float]:
        return [_batch_limit(loader, trainer.limit_val_batches) for loader in combined.flattened]

    return Source("the validation set", ("validation", id(loop)), partial(_opened, loop, "sequential"), limits)


def _opened(loop: Any, mode: Literal["max_size_cycle", "sequential"]) -> CombinedLoader:
    """The loaders of a loop, those that it has set up or new ones."""
    if loop._combined_loader is not None:
        return loop._combined_loader
    loaders = loop._data_source.dataloader()
    return loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, mode)


def _batch_limit(loader: Any, limit: float | None) -> float:
    if isinstance(limit, int):
        return limit
    try:
        return max(1, int(len(loader) * limit)) if limit is not None and limit < 1 else float("inf")
    except (TypeError, NotImplementedError):  # it has no length
        return float("inf")


def probe_source(trainer: L.Trainer, pl_module: Any, given: Any) -> Source:
    """The callback's ``probe``, a ``probe_dataloader()`` of the LightningModule or data module, or the validation set.

    Without a validation set it is the training set's end.

    Raises:
        ValueError: There is none of them.
    """
    if given is not None:
        return Source("probe=", ("probe", id(given)), lambda: given, owned=isinstance(given, Iterator))
    for owner in (pl_module, trainer.datamodule):  # type: ignore[attr-defined]
        if callable(getattr(owner, "probe_dataloader", None)):
            name = f"{type(owner).__name__}.probe_dataloader()"
            return Source(name, ("probe_dataloader", id(owner)), owner.probe_dataloader)
    return validation_source(trainer)


def split_source(name: str, batches: Any) -> Source:
    """Batches that were given under a name."""
    return Source(f"the split {name!r}", ("split", id(batches)), lambda: batches, owned=isinstance(batches, Iterator))


def fingerprint_batches(batches: Iterable[Any]) -> str:
    """Hash of all tensors of some batches.

    Example:
        >>> first, second = [{"x": torch.zeros(2)}], [{"x": torch.ones(2)}]
        >>> fingerprint_batches(first) == fingerprint_batches(second)
        False
    """
    digest = hashlib.blake2b(digest_size=16)
    for tensor in batch_tensors(list(batches)):
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(raw_bytes(tensor))
    return digest.hexdigest()
