"""What comes first: checks before analyses and files, the model before analyses at the end, the page before a kill."""

from __future__ import annotations

import json
import os
import signal

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from lightning_goldy import GoldyModule
from lightning_goldy.callbacks import GoldenParameters, GoldenSnapshot, KnowledgeCoupling, RunReport, TaylorDiff
from lightning_goldy.callbacks.engine.run_folder import POOL
from lightning_goldy.training.models import CheckpointOptions
from tests.callbacks.training import TokenData, fit
from tests.references.models import build


def files(folder):
    """All but the logger's own."""
    found = [path for path in (folder / "run/goldy").rglob("*") if path.is_file() and path.name != ".lock"]
    return sorted(str(path.relative_to(folder)) for path in found)


@pytest.mark.filterwarnings("ignore:.*exists and is not empty")
def test_nothing_is_analysed_or_written_before_all_checks_have_passed(tmp_path):
    fit(tmp_path, [GoldenSnapshot(at=["start"]), GoldenParameters(n_samples=2, at=["start"])], max_epochs=1)
    before = files(tmp_path), (tmp_path / "run/goldy/golden_snapshot/results.jsonl").read_text()
    told = []

    class Watched(GoldenParameters):
        def compute(self, context):
            told.append(context.step)
            return super().compute(context)

    watchers = [GoldenSnapshot(at=["start"]), Watched(n_samples=2, at=["start"], name="golden_parameters")]
    with pytest.raises(ValueError, match="needs a tokenizer"):
        fit(tmp_path, [*watchers, TaylorDiff(n_samples=2), KnowledgeCoupling()], max_epochs=1)
    assert told == []
    assert (files(tmp_path), (tmp_path / "run/goldy/golden_snapshot/results.jsonl").read_text()) == before
    assert not (tmp_path / "run/goldy/taylor_diff").exists()


def test_starts_are_analysed_in_the_order_of_the_callbacks(tmp_path):
    order = []

    class Told(GoldenParameters):
        def _start(self, trainer, pl_module, former):
            super()._start(trainer, pl_module, former)
            order.append(f"{self.name} checked")

        def compute(self, context):
            order.append(self.name)
            return super().compute(context)

    fit(tmp_path, [Told(n_samples=1, at=["start"], name=name) for name in "ab"], max_epochs=1)
    assert order == ["a checked", "b checked", "a", "b"]


def train(folder, callbacks, options=None, model=None, **settings):
    module = GoldyModule((model or build("gpt2")).train(), checkpoints=options or CheckpointOptions())
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(module, datamodule=TokenData())
    return trainer, module


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
def test_the_model_is_saved_before_the_analyses_at_the_end(tmp_path):
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", monitor="val/loss")
    present = []

    class Looks(GoldenSnapshot):
        def compute(self, context):
            present.append(sorted(path.name for path in (tmp_path / "saved").glob("*")))
            return super().compute(context)

    _, module = train(tmp_path, [Looks(every_n_steps=None), saver], max_steps=3)
    assert present == [["step=3", "step=3.ckpt"]]
    state = torch.load(tmp_path / "saved/step=3.ckpt", weights_only=True)
    assert all(torch.equal(value, state["state_dict"][name]) for name, value in module.state_dict().items())
    assert state["optimizer_states"]


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
def test_it_is_saved_once_and_not_against_the_users_will(tmp_path):
    saver = ModelCheckpoint(tmp_path / "a", filename="{step}", every_n_train_steps=1, save_top_k=1)
    train(tmp_path, [saver], max_steps=3)
    assert [path.name for path in (tmp_path / "a").glob("*.ckpt")] == ["step=3.ckpt"]
    unwanted = ModelCheckpoint(tmp_path / "b", filename="{step}", monitor="val/loss")
    train(tmp_path, [unwanted], CheckpointOptions(final=False), max_steps=3)
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").glob("*"))


def test_older_checkpoints_keep_what_is_asked_for(tmp_path):
    saver = ModelCheckpoint(tmp_path / "a", filename="{step}", every_n_train_steps=1, save_top_k=-1)
    train(tmp_path, [saver], CheckpointOptions(pretrained="newest", optimizer="newest"), max_steps=3)
    held = {path.name: torch.load(path, weights_only=True) for path in (tmp_path / "a").glob("*.ckpt")}
    assert sorted(held) == ["step=1.ckpt", "step=2.ckpt", "step=3.ckpt"]
    assert [name for name in sorted(held) if "optimizer_states" in held[name]] == ["step=3.ckpt"]
    assert [path.name for path in (tmp_path / "a").iterdir() if path.is_dir()] == ["step=3"]
    with pytest.raises(ValueError, match=r"unknown checkpoints.pretrained.*'some'"):
        CheckpointOptions(pretrained="some")


def test_a_run_that_is_refused_leaves_no_base(tmp_path):
    """The snapshot is taken before a later callback is refused, and its base lay in the pool for ever."""
    for callbacks in (
        [GoldenSnapshot(), KnowledgeCoupling()],
        [GoldenSnapshot(), TaylorDiff(n_samples=2), KnowledgeCoupling()],
    ):
        with pytest.raises(ValueError, match="needs a tokenizer"):
            fit(tmp_path / "alone", callbacks, max_epochs=1)
    assert not list((tmp_path / "alone").rglob("*.safetensors"))
    assert not (tmp_path / "alone" / POOL).exists()
    # One that another run has stays.
    fit(tmp_path, [GoldenSnapshot()], max_epochs=1)
    (base,) = (tmp_path / POOL).iterdir()
    with pytest.raises(ValueError, match="needs a tokenizer"):
        fit(tmp_path, [GoldenSnapshot(), KnowledgeCoupling()], max_epochs=1, logger=CSVLogger(tmp_path, version="b"))
    assert list((tmp_path / POOL).iterdir()) == [base]


def test_a_base_lies_on_the_disk_once(tmp_path):
    def base(seed):
        torch.manual_seed(seed)
        snapshot = GoldenSnapshot(every_n_steps=None)
        train(tmp_path, [snapshot], enable_checkpointing=False, max_steps=1)
        return snapshot.folder / "base.safetensors"

    first, second = base(0), base(0)
    assert first != second
    assert first.stat().st_ino == second.stat().st_ino
    assert len(list((tmp_path / POOL).iterdir())) == 1
    first.unlink()
    second.unlink()
    other = base(1)
    (kept,) = (tmp_path / POOL).iterdir()
    assert kept.stat().st_ino == other.stat().st_ino


@pytest.mark.parametrize(("coarse", "base"), [(True, (0.3, 0.4)), (False, (0.8, 0.9))], ids=["bfloat16", "float32"])
def test_what_a_run_of_two_checkpoints_takes(tmp_path, coarse, base):
    """By the options of the recipes: the newest checkpoint 3 sizes of the model, the older and the folder 1 each."""
    torch.manual_seed(0)
    model = type(build("gpt2"))(type(build("gpt2").config)(**{**build("gpt2").config.to_dict(), "n_embd": 256}))
    if coarse:
        model.to(torch.bfloat16).to(torch.float32)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    options = CheckpointOptions(pretrained="newest", optimizer="newest")
    train(tmp_path, [GoldenSnapshot(), saver], options, model, max_steps=4)
    taken = {path.stat().st_ino: (path.name, path.stat().st_size) for path in tmp_path.rglob("*") if path.is_file()}
    sizes = {name: count / size for name, count in taken.values()}
    told = {"step=2.ckpt": (1, 1.1), "step=4.ckpt": (3, 3.1), "model.safetensors": (1, 1.1)}
    for name, (least, most) in told.items():
        assert least <= sizes[name] <= most, (name, sizes[name])
    (kept,) = (tmp_path / POOL).iterdir()
    assert base[0] < kept.stat().st_size / size < base[1]
    whole = sum(count for _, count in taken.values()) / size
    assert 5 + base[0] < whole < 5.15 + base[1]


def test_updates_take_a_place_only_where_they_are_asked_for_and_one(tmp_path):
    for asked in (False, True):
        folder = tmp_path / str(asked)
        saver = ModelCheckpoint(folder / "a", filename="{step}", every_n_train_steps=2, save_top_k=-1)
        snapshot = GoldenSnapshot(every_n_steps=1, track_updates=asked)
        fit(folder, [snapshot, saver], max_epochs=1, enable_checkpointing=True)
        vectors = sorted(path.name for path in snapshot.folder.glob("*.safetensors"))
        updates = ["previous-step=00000008.safetensors", "update-step=00000008.safetensors"] if asked else []
        assert vectors == ["base.safetensors", *updates]


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
def test_there_is_a_page_when_the_last_analysis_is_killed(tmp_path):
    class Killed(GoldenParameters):
        def compute(self, context):
            os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        try:
            first = GoldenSnapshot(every_n_steps=None)
            saver = ModelCheckpoint(tmp_path / "saved", filename="{step}", monitor="val/loss")
            train(tmp_path, [first, RunReport(tmp_path / "page.html"), Killed(n_samples=1), saver], max_steps=2)
        finally:
            os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert (tmp_path / "saved/step=2.ckpt").is_file()
    assert "golden_snapshot" in (tmp_path / "page.html").read_text()


def test_a_failed_run_has_its_page(tmp_path):
    class Fails(GoldenParameters):
        def compute(self, context):
            raise ValueError("no such thing")

    snapshot = GoldenSnapshot(every_n_steps=1)
    with pytest.raises(ValueError, match="no such thing"):
        fit(tmp_path, [snapshot, RunReport(), Fails(n_samples=1, every_n_steps=3, at=())], max_epochs=1)
    (page,) = (tmp_path / "run").glob("report.html")
    assert "golden_snapshot" in page.read_text()
    steps = [json.loads(line)["step"] for line in (snapshot.folder / "results.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
