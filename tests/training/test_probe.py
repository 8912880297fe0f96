"""The probe is what Lightning would feed, no more of it than is needed, and reading it leaves no trace."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import lightning.pytorch as L
import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    Sampler,
    TensorDataset,
)

from lightning_goldy.callbacks import AnalysisCallback
from lightning_goldy.core import ClassifierObjective
from lightning_goldy.data.base import ResumableDataLoader, SeededShuffle
from lightning_goldy.training.subject import find_probe, find_splits

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


class Numbers(Dataset):
    """Item i holds i; counts on the class what is read, in the object what a careful reading puts back."""

    reads = 0

    def __init__(self, size):
        self.size, self.seen, self.log = size, 0, []
        self.noise = np.random.default_rng(3)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        Numbers.reads += 1
        self.seen += 1
        self.log.append(index)
        return torch.tensor([float(index), 0.0]), index % 2


class Stream(IterableDataset):
    position = 0

    def __iter__(self):
        while self.position < 7:
            self.position += 1
            yield torch.tensor([float(self.position), 0.0]), 0


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Linear(2, 2)
        self.stages, self.losses, self.validated = [], [], []

    def training_step(self, batch, batch_idx):
        loss = cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if isinstance(batch, (list, tuple)):
            self.validated.append(cross_entropy(self.model(batch[0]), batch[1]).item())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Looking(AnalysisCallback[float]):
    """Takes the loss of its probe at the end."""

    def __init__(self, n_samples=None, **options):
        super().__init__(objective=ClassifierObjective(), **options)
        self.n_samples = n_samples

    def probe_samples(self):
        return self.n_samples

    def prepare(self, trainer, model):
        self.values = [batch[0][:, 0].tolist() for batch in self._batches]

    def compute(self, context):
        sums = [len(batch[1]) * context.objective.loss(context.model, batch) for batch in context.probe]
        self.loss = sum(sums).item() / sum(len(batch[1]) for batch in context.probe)

    def describe(self, result, context):
        from lightning_goldy.analysis import Row

        return Row("", {"loss": self.loss})


def fit(folder, callbacks, val=None, *, module=None, train=None, **options):
    torch.manual_seed(0)
    settings = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(default_root_dir=folder, callbacks=callbacks, **settings | options)
    module = module or Module()
    trainer.fit(module, DataLoader(Numbers(4), batch_size=2) if train is None else train, val)
    return trainer, module


def values(folder, loader, n_samples=None, **options):
    callback = Looking(n_samples)
    fit(folder, [callback], loader, **options)
    return callback.values


def batches(*starts):
    return [(torch.tensor([[float(start), 0.0], [start + 1.0, 0.0]]), torch.tensor([0, 1])) for start in starts]


class Hooked(Module):
    def on_before_batch_transfer(self, batch, dataloader_idx):
        return batch[0] + 10 * dataloader_idx, batch[1]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        self.stages.append((self.trainer.validating, self.training, torch.is_autocast_enabled("cpu")))
        return batch[0] / 4, batch[1]


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}], ids=str)
def test_the_probe_passes_the_hooks_of_a_transfer_and_its_loss_is_the_validation_loss(tmp_path, options):
    loaders = [DataLoader(Numbers(4), batch_size=4), DataLoader(Numbers(4), batch_size=4)]
    callback, module = Looking(), Hooked()
    fit(tmp_path, [callback], loaders, module=module, **options)
    assert callback.values == [[0, 0.25, 0.5, 0.75], [2.5, 2.75, 3.0, 3.25]]
    assert callback.loss == pytest.approx(sum(module.validated) / 2, rel=1e-2 if options else 1e-6)
    # What the module noted during the reading is gone, and validation and training noted theirs.
    assert module.stages == [(False, True, False)] * 2 + [(True, False, False)] * 2


def test_the_data_modules_hooks_come_first(tmp_path):
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Numbers(4), batch_size=2)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] - 1, batch[1]

    callback = Looking(3, probe=batches(5, 7))
    trainer = L.Trainer(default_root_dir=tmp_path, callbacks=[callback], max_epochs=1, accelerator="cpu", logger=False,
                        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    trainer.fit(Module(), datamodule=Data())
    assert callback.values == [[4, 5], [6]]


def test_no_more_is_read_than_the_largest_number_and_callbacks_share_it(tmp_path):
    before, data = Numbers.reads, Numbers(300)
    train = DataLoader(TensorDataset(torch.zeros(2, 2), torch.tensor([0, 1])))
    callbacks = [Looking(n, name=f"of{n}") for n in (3, 5, 2)]
    fit(tmp_path, callbacks, DataLoader(data, batch_size=2), limit_val_batches=1, train=train)
    # The limit leaves too few: its one batch, then three; validation itself reads the last one.
    assert Numbers.reads - before == 2 + 6 + 2
    assert [sum(map(len, callback.values)) for callback in callbacks] == [3, 5, 2]
    first = [callback._batches[0][0].untyped_storage().data_ptr() for callback in callbacks]
    assert len(set(first)) == 1
    assert (data.seen, data.log) == (2, [0, 1])


def test_all_samples_are_those_that_lightning_takes(tmp_path):
    loaders = {"a": DataLoader(Numbers(6), batch_size=2), "b": DataLoader(Numbers(4), batch_size=1)}
    assert values(tmp_path, loaders, limit_val_batches=2) == [[0, 1], [2, 3], [0], [1]]
    assert values(tmp_path, loaders, 5, limit_val_batches=2) == [[0, 1], [2, 3], [0]]
    assert values(tmp_path, loaders, 9, limit_val_batches=2) == [[0, 1], [2, 3], [4, 5], [0], [1], [2]]


class Backwards(Sampler):
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 4

    def __iter__(self):
        return iter([3, 2, 1, 0] if self.epoch == 0 else [0, 1, 2, 3])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: DataLoader(Numbers(4), batch_size=2, sampler=Backwards()), [[3, 2], [1]]),
        (lambda: DataLoader(Numbers(4), batch_sampler=BatchSampler(Backwards(), 3, drop_last=True)), [[3, 2, 1]]),
        (lambda: DataLoader(batches(0, 2), batch_size=None), [[0, 1], [2]]),
        (lambda: DataLoader(Stream(), batch_size=2), [[1, 2], [3]]),
        (lambda: DataLoader(Numbers(4), batch_size=1, num_workers=1, persistent_workers=True), [[0], [1], [2]]),
        (lambda: batches(4, 8), [[4, 5], [8]]),
        (lambda: CombinedLoader([DataLoader(Numbers(2)), DataLoader(Numbers(4))], "sequential"), [[0], [1], [0]]),
        (
            lambda: DataLoader(Numbers(5), sampler=DistributedSampler(Numbers(5), 2, 1, shuffle=False), batch_size=2),
            [[0, 1], [2]],
        ),
    ],
    ids=["sampler", "batch_sampler", "unbatched", "iterable", "workers", "list", "combined", "distributed"],
)
@pytest.mark.filterwarnings("ignore:.*workers")
def test_a_loaders_own_order(tmp_path, make, expected):
    callback = Looking(3, probe=make())
    fit(tmp_path, [callback])
    assert callback.values == expected


def test_combined_loaders_keep_their_mode(tmp_path):
    pairs = CombinedLoader({"a": DataLoader(Numbers(2)), "b": DataLoader(Numbers(3))}, "max_size_cycle")

    class Taking(Looking):
        needs_probe = False

        def on_train_start(self, trainer, pl_module):
            self.found = find_probe(trainer, pl_module, None).batches

    callback = Taking(at=("start",))
    fit(tmp_path, [callback], pairs)
    assert [(batch["a"][0].tolist(), batch["b"][0].tolist()) for batch in callback.found] == [
        ([[0, 0]], [[0, 0]]),
        ([[1, 0]], [[1, 0]]),
        ([[0, 0]], [[2, 0]]),
    ]


def test_generators_counters_and_workers_are_where_they_were(tmp_path):
    def collate(samples):
        calls.append(len(samples))
        counts["calls"] += 1
        x, y = torch.utils.data.default_collate(samples)
        return x + torch.rand(x.shape, generator=generator) + noise.random(), y

    def losses(watch):
        nonlocal calls, counts, generator, noise
        calls, counts, noise = [], {"calls": 0}, np.random.default_rng(1)
        generator = torch.Generator().manual_seed(5)
        data = Numbers(12)
        train = DataLoader(data, batch_size=4, shuffle=True, generator=generator, collate_fn=collate)
        _, module = fit(tmp_path, [Looking(5, probe=train)] if watch else [], train=train, max_epochs=2)
        return module.losses, data.seen, data.log, calls, counts

    calls, counts, generator, noise = [], {}, None, None
    assert losses(True) == losses(False)


def test_what_reading_would_use_up_is_refused(tmp_path):
    class OneWay(IterableDataset):
        def __init__(self):
            self.rows = (row for row in Numbers(8))

        def __iter__(self):
            return self.rows

    with pytest.raises(ValueError, match=r"the validation set rests on a generator.*pass probe="):
        fit(tmp_path, [Looking(2)], DataLoader(OneWay(), batch_size=2))
    callback = Looking(3, probe=iter(batches(0, 2)))
    fit(tmp_path, [callback])
    assert callback.values == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("probe", "message"),
    [
        ({"x": torch.zeros(2)}, "probe= gave a dict, which is no iterable of batches"),
        (torch.zeros(2), "probe= gave a Tensor"),
        (3, "probe= gave a int, which is no iterable"),
    ],
)
def test_what_is_no_iterable_of_batches_is_refused(tmp_path, probe, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, [Looking(2, probe=probe)])


class Rows(IterableDataset):
    """Begins anew with every pass."""

    def __iter__(self):
        return ((torch.tensor([float(number), 0.0]), 0) for number in range(1, 8))


class Endless(Sampler):
    """Has no length."""

    def __iter__(self):
        return iter([3, 1, 2, 0])


class Pairs(Sampler):
    """Batches of its own making."""

    def __len__(self):
        return 2

    def __iter__(self):
        return iter([[4, 0], [1, 2, 3]])


@pytest.mark.parametrize(
    ("make", "expected", "taken"),
    [
        (lambda: DataLoader(Numbers(7), batch_size=2, shuffle=True), [[6, 5], [4]], "last samples"),
        (lambda: DataLoader(Numbers(7), batch_size=2, drop_last=True), [[6, 5], [4]], "last samples"),
        (lambda: DataLoader(Numbers(7), batch_size=2, sampler=Backwards()), [[0, 1], [2]], "last samples"),
        (lambda: DataLoader(Numbers(5), batch_sampler=Pairs()), [[1, 2, 3]], "last samples"),
        (lambda: DataLoader(batches(0, 2, 4), batch_size=None), [[4, 5], [2]], "last samples"),
        (lambda: DataLoader(Numbers(4), batch_size=2, sampler=Endless()), [[3, 1], [2]], "first, as an iterable"),
        (lambda: DataLoader(Rows(), batch_size=2), [[1, 2], [3]], "first, as an iterable"),
        # What keeps its place goes on from where the training's own iterator has taken it.
        (lambda: DataLoader(Stream(), batch_size=2), [[3, 4], [5]], "first, as an iterable"),
        (lambda: ResumableDataLoader(Numbers(7), sampler=SeededShuffle(7, 1)), [[6], [5], [4]], "last samples"),
    ],
    ids=[
        "shuffled",
        "drop_last",
        "sampler",
        "batch_sampler",
        "unbatched",
        "endless",
        "iterable",
        "stream",
        "resumable",
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_without_a_validation_set_the_end_of_the_training_set_is_taken(tmp_path, make, expected, taken):
    few, more = Looking(3), Looking(4, name="more")
    losses = fit(tmp_path / "plain", [], train=make())[1].losses
    with pytest.warns(UserWarning, match=rf"from the training set, its {taken}.*\(there is no validation loader\)"):
        module = fit(tmp_path / "watched", [few, more], train=make())[1]
    assert few.values == expected
    # How much others need does not matter, and no step sees other samples for it.
    assert np.concatenate(more.values)[:3].tolist() == np.concatenate(expected).tolist()
    assert module.losses == losses != []


@pytest.mark.filterwarnings("ignore:the probe is taken from the training set")
def test_of_a_training_set_not_all_is_taken_and_nothing_of_it_moves_on(tmp_path):
    def run(watched, **options):
        data, generator = Numbers(100), torch.Generator().manual_seed(5)
        train = DataLoader(data, batch_size=8, shuffle=True, generator=generator, num_workers=0)
        callbacks = [Looking(), Looking(70, name="seventy")][:watched]
        _, module = fit(tmp_path, callbacks, train=train, max_epochs=2, **options)
        return callbacks, (module.losses, data.seen, data.log, generator.get_state().tolist(), torch.rand(1).item())

    assert [run(watched)[1] for watched in (1, 2)] == [run(0)[1]] * 2
    (callback,), _ = run(1)
    assert [np.concatenate(callback.values)[place] for place in (0, -1)] == [99, 36]
    (callback, most), _ = run(2)
    assert [each.values[-1][-1] for each in (callback, most)] == [36, 30]
    assert run(1, limit_val_batches=0)[0][0].values[0][0] == 99


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Total length of `")
@pytest.mark.parametrize("loaders", [list, lambda: DataLoader(Numbers(0))], ids=["none", "of nothing"])
def test_validation_loaders_that_hold_nothing_are_none(tmp_path, loaders):
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return DataLoader(Numbers(6), batch_size=2)

        def val_dataloader(self):
            return loaders()

    callback, module = Looking(2), Module()
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", callbacks=[callback], **options)
    with pytest.warns(UserWarning, match=r"its last samples \(the validation loaders have no batch\)"):
        trainer.fit(module, datamodule=Data())
    assert callback.values == [[5, 4]]


def test_a_run_without_any_loader_says_why(tmp_path):
    trainer = L.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False)
    module = Module()
    trainer.strategy.connect(module)
    with pytest.raises(ValueError, match=r"no probe batches \(there is no validation loader\): pass probe="):
        find_probe(trainer, module, None)


def test_a_validation_set_that_is_set_up_later(tmp_path):
    options = {"check_val_every_n_epoch": 2, "max_epochs": 2}
    assert values(tmp_path, DataLoader(Numbers(4), batch_size=2), 3, **options) == [[0, 1], [2]]


def test_another_fit_reads_anew(tmp_path):
    callback = Looking(2)
    trainer, module = fit(tmp_path, [callback], DataLoader(batches(0), batch_size=None))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, DataLoader(Numbers(4), batch_size=2), DataLoader(batches(6), batch_size=None))
    assert callback.values == [[6, 7]]


def test_a_random_order_is_the_same_in_every_reading(tmp_path):
    loader = DataLoader(Numbers(40), batch_size=4, shuffle=True)
    found = values(tmp_path, loader, 4, limit_val_batches=0.5)
    torch.rand(3)
    assert values(tmp_path, loader, 4, limit_val_batches=0.5) == found != [[0, 1, 2, 3]]


def test_splits_are_read_as_the_probe_is(tmp_path):
    @dataclass
    class Batch:
        x: torch.Tensor
        texts: list[str]

    class Splitting(Looking):
        needs_probe = False

        def on_train_start(self, trainer, pl_module):
            given = {"few": [Batch(torch.arange(4.0), list("abcd"))], "streamed": DataLoader(Stream(), batch_size=2)}
            self.found = find_splits(trainer, given, 3)

    callback = Splitting(at=("start",))
    fit(tmp_path, [callback])
    (few,), streamed = callback.found["few"], callback.found["streamed"]
    assert (few.x.tolist(), few.texts) == ([0, 1, 2], ["a", "b", "c"])
    assert [batch[0][:, 0].tolist() for batch in streamed] == [[1, 2], [3]]


def test_a_loader_that_goes_on_within_an_epoch_is_read_from_its_beginning(tmp_path):
    loader = ResumableDataLoader(Numbers(8), batch_size=2)
    loader.load_state_dict({"delivered": 3})
    callback = Looking(4, probe=loader)
    fit(tmp_path, [callback])
    assert callback.values == [[0, 1], [2, 3]]
    # Its own next pass begins where it was to begin.
    assert [batch[0][:, 0].tolist() for batch in loader] == [[6, 7]]
    assert [batch[0][:, 0].tolist() for batch in loader] == [[0, 1], [2, 3], [4, 5], [6, 7]]


class Shard(IterableDataset):
    """Every process reads a share of its own, as it asks torch for its rank."""

    def __iter__(self):
        rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        yield from ((torch.tensor([float(number), 0.0]), 0) for number in range(rank, 8, size))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_set_that_asks_for_its_share_is_read_whole(tmp_path, monkeypatch, workers):
    class Second(Looking):
        def prepare(self, trainer, model):
            loader = DataLoader(Shard(), batch_size=2, num_workers=workers)
            with monkeypatch.context() as patched:
                for name, answer in (("is_initialized", True), ("get_rank", 1), ("get_world_size", 2)):
                    patched.setattr(dist, name, lambda group=None, answer=answer: answer)
                assert next(iter(Shard()))[0][0] == 1
                reading = find_probe(trainer, trainer.lightning_module, loader, 4)
                assert (dist.get_rank(), dist.get_world_size()) == (1, 2)
            self.values = [batch[0][:, 0].tolist() for batch in reading.batches]

    callback = Second(probe=batches(0))
    fit(tmp_path, [callback])
    assert callback.values == [[0, 1], [2, 3]]


@pytest.mark.parametrize("kind", ["count", "generator", "lines", "cycle"])
def test_an_iterator_behind_a_bound_function_gives_again_what_the_probe_took(tmp_path, kind):
    (tmp_path / "lines").write_text("".join(f"{line}\n" for line in range(99)))

    class Counting(L.LightningDataModule):
        def __init__(self, file):
            super().__init__()
            made = {"count": itertools.count(), "generator": (number for number in range(99)), "lines": file}
            made["cycle"] = itertools.cycle(range(7))
            next(made[kind])  # and from here on no place can be asked for in a file
            self.held, self.taken = {"numbers": made[kind]}, []

        def collate(self, samples):
            x, y = torch.utils.data.default_collate(samples)
            self.taken.append(int(next(self.held["numbers"])))
            return x + self.taken[-1], y

        def train_dataloader(self):
            return DataLoader(Numbers(8), batch_size=2, collate_fn=self.collate)

        val_dataloader = train_dataloader

    def losses(*callbacks):
        torch.manual_seed(0)
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        quiet |= {"enable_model_summary": False, "num_sanity_val_steps": 0, "accelerator": "cpu"}
        trainer = L.Trainer(default_root_dir=tmp_path, callbacks=list(callbacks), max_epochs=2, **quiet)
        module = Module()
        with open(tmp_path / "lines") as file:
            data = Counting(file)
            trainer.fit(module, datamodule=data)
            return module.losses, data.taken, int(next(data.held["numbers"]))

    assert losses(Looking(3, every_n_epochs=1)) == losses()
