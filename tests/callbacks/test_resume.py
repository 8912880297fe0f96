"""A run that is stopped and resumed gives the results of one that was not."""

from __future__ import annotations

import json

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_goldy import GoldyModule
from lightning_goldy.callbacks import ExactResume, GoldenParameters, GoldenSnapshot, TaylorDiff
from lightning_goldy.core import StoreError, load_vectors, save_vectors
from lightning_goldy.data.base import ResumableDataLoader, SeededShuffle
from tests.callbacks.killed import Ordered
from tests.callbacks.training import Finetune, TokenData, Tokens, differences, fit
from tests.references.models import build

# Lightning reminds of callbacks left out on purpose, and of the folder that a resume goes on in.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using", "ignore:.*exists and is not empty", "ignore:The dirpath has changed"
)

EPOCH = 8  # optimizer steps: 16 samples in batches of 2


def callbacks(folder):
    return [
        ExactResume(),
        GoldenSnapshot(every_n_steps=3, every_n_epochs=1),
        GoldenParameters(n_samples=3, quorum=0.5, every_n_steps=3, every_n_epochs=1),
        ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True),
    ]


def results(watchers) -> dict[str, list]:
    found = {}
    for callback in watchers:
        if hasattr(callback, "folder"):
            rows = [json.loads(line) for line in (callback.folder / "results.jsonl").read_text().splitlines()]
            for row in rows:
                row.pop("cost")
                row["tensors"] = {
                    key: {name: tensor.tolist() for name, tensor in load_vectors(callback.folder / name)[0].items()}
                    for key, name in row["files"].items()
                }
            found[callback.name] = rows
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    watchers = callbacks(folder / "checkpoints")
    _, _, found = fit(folder, watchers, max_epochs=3, enable_checkpointing=True)
    return folder, found, results(watchers)


@pytest.mark.parametrize("same_folder", [False, True], ids=["new folder", "same folder, trained past the checkpoint"])
def test_resumed_equals_uninterrupted(uninterrupted, tmp_path, same_folder):
    _, expected, expected_results = uninterrupted
    first = callbacks(tmp_path / "checkpoints")
    # Stopped in the middle of the second epoch, two steps after an analysis that the checkpoint does not know.
    fit(tmp_path / "first", first, max_epochs=3, max_steps=EPOCH + 5, enable_checkpointing=True)
    again = callbacks(tmp_path / "checkpoints")
    checkpoint = tmp_path / "checkpoints" / f"step={EPOCH}.ckpt"
    folder = tmp_path / ("first" if same_folder else "second")
    _, _, found = fit(folder, again, max_epochs=3, enable_checkpointing=True, ckpt_path=checkpoint)
    # The module's list of losses starts anew; the rest must be equal to the last bit.
    assert found.pop("losses") == expected["losses"][EPOCH:]
    assert differences({key: value for key, value in expected.items() if key != "losses"}, found) == []
    assert results(again) == expected_results
    assert [row["step"] for row in expected_results["golden_snapshot"]] == [3, 6, 8, 9, 12, 15, 16, 18, 21, 24]


def test_the_base_stays_the_one_of_the_first_start(uninterrupted, tmp_path):
    folder, _, _ = uninterrupted
    snapshot = GoldenSnapshot(every_n_epochs=1)
    fit(tmp_path, [snapshot], max_epochs=2, ckpt_path=folder / "checkpoints" / f"step={EPOCH}.ckpt")
    base, header = load_vectors(snapshot.folder / "base.safetensors")
    torch.manual_seed(0)
    start = dict(Finetune().model.named_parameters())
    assert header.step == 0
    assert all(torch.equal(base[name], start[name]) for name in base)


def test_a_missing_or_exchanged_base_is_an_error(uninterrupted, tmp_path):
    folder, _, _ = uninterrupted
    base = folder / "run" / "goldy" / "golden_snapshot" / "base.safetensors"
    checkpoint = folder / "checkpoints" / f"step={EPOCH}.ckpt"
    content = base.read_bytes()
    try:
        vector, header = load_vectors(base)
        save_vectors(base, vector * 2.0, kind="values", model=header.model_class)
        with pytest.raises(StoreError, match=r"has hash .*, the checkpoint was made with"):
            fit(tmp_path / "exchanged", [GoldenSnapshot(every_n_epochs=1)], max_epochs=2, ckpt_path=checkpoint)
        base.unlink()
        with pytest.raises(FileNotFoundError, match="which the resumed run needs, is gone"):
            fit(tmp_path / "missing", [GoldenSnapshot(every_n_epochs=1)], max_epochs=2, ckpt_path=checkpoint)
    finally:
        base.write_bytes(content)


def test_files_of_removed_checkpoints_go_and_those_of_kept_ones_stay(tmp_path):
    watcher = TaylorDiff(orders=[1], reset="each", function_space=False, n_samples=1, every_n_steps=1, at=())
    saver = ModelCheckpoint(
        tmp_path / "ckpt", filename="{step}", monitor="train_loss", every_n_train_steps=1, save_top_k=2, save_last=True
    )
    fit(tmp_path, [watcher, saver], max_epochs=2, enable_checkpointing=True)
    kept = {path.stem.removeprefix("step=") for path in (tmp_path / "ckpt").glob("step=*.ckpt")}
    assert len(kept) == 2
    needed = {f"base-step={int(step):08d}.safetensors" for step in {*kept, "16"}}
    left = {path.name for path in watcher.folder.glob("base-*")}
    # The last save prunes before Lightning removes what that save has replaced.
    assert needed <= left
    assert len(left) <= 5
    for path in [*(tmp_path / "ckpt").glob("*.ckpt")]:
        state = torch.load(path, weights_only=True)["callbacks"]["TaylorDiff[taylor_diff]"]
        assert (watcher.folder / state["base_file"]).is_file()


@pytest.mark.filterwarnings("ignore:.*the first two cosines will be missing")
def test_one_copy_of_the_updates_lives_with_which_the_newest_checkpoint_goes_on(tmp_path):
    def cosines(place, **options):
        saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=3, save_top_k=-1)
        watchers = [ExactResume(), GoldenSnapshot(every_n_steps=1, track_updates=True), saver]
        fit(tmp_path / place, watchers, data=Resumable(), max_epochs=1, enable_checkpointing=True, **options)
        return [row["metrics"]["update_cosine"] for row in results(watchers)["golden_snapshot"]]

    whole = cosines("whole")
    assert cosines("newest", ckpt_path=tmp_path / "ckpt/step=6.ckpt") == whole
    older = cosines("older", ckpt_path=tmp_path / "ckpt/step=3.ckpt")
    assert [index for index, value in enumerate(older) if value is None] == [0, 3, 4]


def test_checkpoint_state_is_small_and_loads_without_pickle(uninterrupted):
    folder, _, _ = uninterrupted
    state = torch.load(folder / "checkpoints" / f"step={EPOCH}.ckpt", weights_only=True)["callbacks"]
    assert set(state) >= {"GoldenSnapshot[golden_snapshot]", "GoldenParameters[golden_parameters]"}
    assert all(not isinstance(value, torch.Tensor) for value in state["GoldenSnapshot[golden_snapshot]"].values())


def test_an_analysis_at_checkpoints_is_part_of_the_checkpoint(tmp_path):
    watcher = GoldenParameters(n_samples=2, at=("checkpoint",))
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=4, save_top_k=-1, save_last=True)
    fit(tmp_path, [watcher, saver], max_epochs=1, enable_checkpointing=True)
    rows = [json.loads(line) for line in (watcher.folder / "results.jsonl").read_text().splitlines()]
    assert [(row["step"], row["trigger"]) for row in rows] == [(4, "checkpoint"), (8, "checkpoint")]
    state = torch.load(tmp_path / "ckpt" / "step=4.ckpt", weights_only=True)["callbacks"][watcher.state_key]
    assert (state["last_step"], state["mask_file"]) == (4, "mask-step=00000004.safetensors")


def test_a_second_run_into_the_same_folder_loses_nothing(tmp_path):
    for _ in range(2):
        watcher = GoldenSnapshot(at=("end",))
        fit(tmp_path, [watcher], max_epochs=1)
    assert len((watcher.folder / "results.jsonl").read_text().splitlines()) == 1
    assert (watcher.folder.parent / "golden_snapshot.1" / "results.jsonl").exists()


def test_a_run_that_goes_on_does_not_start_again(tmp_path):
    def watcher():
        return GoldenParameters(n_samples=3, quorum=0.5, every_n_epochs=1, at=("start",))

    saver = ModelCheckpoint(tmp_path, filename="{step}", every_n_epochs=1, save_top_k=-1, save_on_train_epoch_end=True)
    whole = watcher()
    fit(tmp_path / "whole", [whole, saver], max_epochs=2, enable_checkpointing=True)
    resumed = watcher()
    fit(tmp_path / "resumed", [resumed], max_epochs=2, ckpt_path=tmp_path / f"step={EPOCH}.ckpt")
    steps = [[row["step"] for row in results([each])["golden_parameters"]] for each in (whole, resumed)]
    assert steps == [[0, EPOCH, 2 * EPOCH]] * 2


class Resumable(TokenData):
    """Rows in an order that is the seed's, from a loader that keeps its place."""

    def train_dataloader(self):
        sampler, own = SeededShuffle(self.n_train, 0), torch.Generator()
        return ResumableDataLoader(Tokens(self.n_train, 1), batch_size=2, sampler=sampler, generator=own)


class Shuffled(TokenData):
    """Rows in an order that the loader draws from torch's own random state."""

    def train_dataloader(self):
        return DataLoader(Tokens(self.n_train, 1), batch_size=2, shuffle=True)


@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_a_loader_that_shuffles_goes_on_in_the_same_order(tmp_path, schedule):
    def trained(folder, **options):
        L.seed_everything(7, verbose=False)
        module = GoldyModule(build("gpt2").train(), schedule={"name": schedule})
        saver = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
        trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            callbacks=[ExactResume(), saver],
            enable_progress_bar=False,
            enable_model_summary=False,
            max_epochs=3,
        )
        trainer.fit(module, datamodule=Shuffled(), **options)
        return {name: value.detach().clone() for name, value in module.model.named_parameters()}

    whole = trained(tmp_path / "whole")
    # The schedule asks for the number of steps, for which Lightning begins the loader during set-up.
    resumed = trained(tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class SavedAt(L.Callback):
    """Saves after a batch, whether or not an optimizer has stepped for it."""

    def __init__(self, path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if (trainer.current_epoch, batch_idx) == (0, self.batch):
            trainer.save_checkpoint(self.path)


def test_what_was_accumulated_goes_on_to_be(tmp_path):
    def trained(name, callbacks, **options):
        options = {"data": Ordered(), "accumulate_grad_batches": 3, "max_epochs": 1, **options}
        return fit(tmp_path / name, [ExactResume(), *callbacks], **options)[2]

    whole = trained("whole", [SavedAt(tmp_path / "waiting.ckpt", 4), SavedAt(tmp_path / "stepped.ckpt", 5)])
    held = {
        name: torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["callbacks"]["ExactResume"]["ranks"][0]
        for name in ("waiting", "stepped")
    }
    assert held["waiting"]["gradients"].keys() == dict(Finetune().named_parameters()).keys()
    assert held["stepped"]["gradients"] == {}
    again = trained("again", [], ckpt_path=tmp_path / "waiting.ckpt")
    assert again.pop("losses") == whole.pop("losses")[5:]
    assert differences(whole, again) == []


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch")
def test_rows_of_another_run_in_the_new_folder_are_put_aside(tmp_path):
    fit(tmp_path, [GoldenSnapshot(at=("end",))], max_epochs=1)
    # A checkpoint before whose step the resumed run has no row.
    watcher = GoldenSnapshot(every_n_steps=20)
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    fit(tmp_path / "first", [watcher, saver], max_epochs=1, enable_checkpointing=True)
    again = GoldenSnapshot(every_n_steps=6, at=())
    fit(tmp_path, [again], max_epochs=1, ckpt_path=tmp_path / "saved" / "step=4.ckpt")
    assert [row["step"] for row in results([again])["golden_snapshot"]] == [6]
    assert (again.folder.parent / "golden_snapshot.1" / "results.jsonl").exists()
