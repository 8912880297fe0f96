"""What is interrupted, moved, removed or written to by two at once loses nothing, or says so."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO

import lightning_goldy.callbacks.golden_snapshot as snapshots
from lightning_goldy.analysis.heads import PruningSchedule, Recovery, Scoring
from lightning_goldy.callbacks import ExactResume, GoldenSnapshot, HeadPlasticity, RunReport, TaylorDiff
from lightning_goldy.callbacks.engine.run_folder import POOL, FolderNotes, lock_folder
from lightning_goldy.commands.demo import run_demo
from lightning_goldy.commands.output import output_folder
from lightning_goldy.core.files import append_row, atomic_write, read_rows, require_local
from lightning_goldy.core.pieces import PadCollator
from lightning_goldy.data.base import make_loader
from tests.callbacks.training import Finetune, TokenData, Tokens, fit

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using",
    "ignore:.*exists and is not empty",
    "ignore:The dirpath has changed",
    "ignore:You're resuming from a checkpoint that ended before the epoch",
    "ignore:.*was called without a model",
    "ignore:.*the last cycle ends at step",
)


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "results.jsonl").read_text().splitlines()]


@contextmanager
def told() -> Iterator[list[str]]:
    """The texts of all warnings."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield messages
    messages += [str(warning.message) for warning in caught]


def at_failure(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_train_steps=100, save_on_exception=True)


def moving(**options) -> TaylorDiff:
    """A callback that cannot resume without its file."""
    return TaylorDiff((1,), n_samples=2, reset="each", function_space=False, by=None, every_n_steps=2, at=(), **options)


class Slow(TorchCheckpointIO):
    def save_checkpoint(self, *args, **options):
        time.sleep(0.3)
        super().save_checkpoint(*args, **options)


class Save(L.Callback):
    """Saves to a place of the user's own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer, *args) -> None:
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.path)


def needed(path: Path) -> list[str]:
    states = torch.load(path, weights_only=True)["callbacks"]
    return [
        states["TaylorDiff[taylor_diff]"]["base_file"],
        *states["GoldenSnapshot[golden_snapshot]"]["files"].values(),
    ]


def test_checkpoints_that_are_written_later_or_elsewhere_keep_their_files(tmp_path):
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    fit(
        tmp_path / "run",
        [moving(), GoldenSnapshot(every_n_steps=2), saver, Save(tmp_path / "mine.ckpt")],
        max_epochs=1,
        enable_checkpointing=True,
        plugins=[AsyncCheckpointIO(Slow())],
    )
    paths = [*(tmp_path / "ckpt").glob("*.ckpt"), tmp_path / "mine.ckpt"]
    assert len(paths) == 5
    for path in paths:
        for name in needed(path):
            assert list((tmp_path / "run").rglob(name)), (path.name, name)


def test_files_go_with_the_checkpoint_that_needed_them_and_with_no_other(tmp_path):
    saver = ModelCheckpoint(tmp_path / "ckpt", filename="{step}", every_n_train_steps=1)
    taylor = TaylorDiff((1,), n_samples=2, reset="each", function_space=False, by=None, every_n_steps=1, at=())
    fit(tmp_path / "run", [taylor, saver, Save(tmp_path / "mine.ckpt")], max_epochs=1, enable_checkpointing=True)
    left = {int(path.stem[-8:]) for path in taylor.folder.glob("base-step=*")}
    # Of the user's own; the last one's; and one that Lightning has removed after the last look.
    assert left == {4, 7, 8}


def test_what_only_a_listed_folder_can_tell_is_released(tmp_path):
    notes = FolderNotes("a", {})
    token = notes.claim(["base-step=1.safetensors", "shared.safetensors"])
    other = notes.claim(["shared.safetensors"])
    torch.save({"token": token}, tmp_path / "one.ckpt")
    torch.save({"token": other}, tmp_path / "two.ckpt")
    assert notes.released([tmp_path]) == set()
    (tmp_path / "one.ckpt").rename(tmp_path / "renamed.ckpt")
    assert notes.released([tmp_path]) == set()
    (tmp_path / "renamed.ckpt").unlink()
    tmp_path.rename(tmp_path.with_name("unmounted"))
    assert notes.released([tmp_path]) == set()
    tmp_path.with_name("unmounted").rename(tmp_path)
    (tmp_path / "broken.ckpt").write_bytes(b"PK")
    assert notes.released([tmp_path]) == {"base-step=1.safetensors"}
    assert set(notes.claims) == {other}


@pytest.mark.parametrize("at", [("end",), ("checkpoint", "end")], ids=str)
def test_the_checkpoint_of_a_failed_run_is_written_whatever_an_analysis_does(tmp_path, at):
    class Fails(GoldenSnapshot):
        def compute(self, context):
            raise ArithmeticError("no number")

        def save_files(self, trainer, model):
            raise OSError("no space")

    class Boom(Finetune):
        def training_step(self, batch, batch_idx):
            if self.trainer.global_step == 3:
                raise KeyError("the user's own")
            return super().training_step(batch, batch_idx)

    watcher = Fails(every_n_steps=50, at=at, name="failing")
    with told() as messages, pytest.raises(KeyError, match="the user's own"):
        fit(tmp_path, [watcher, at_failure(tmp_path / "ckpt")], module=Boom, enable_checkpointing=True)
    assert "failing: what a resume from this checkpoint needs is not written: no space" in messages
    (checkpoint,) = (tmp_path / "ckpt").glob("*.ckpt")
    state = torch.load(checkpoint, weights_only=True)["callbacks"][watcher.state_key]
    assert state["lost"] == "OSError: no space"
    with pytest.raises(RuntimeError, match=r"could not be written .*OSError: no space.*resume from another"):
        fit(tmp_path / "again", [Fails(name="failing")], ckpt_path=checkpoint)


class Ordered(TokenData):
    def train_dataloader(self):
        rows = Tokens(self.n_train, 1)
        samples = [rows[index] for index in range(len(rows))]
        return make_loader(samples, batch_size=2, collate=PadCollator(0), shuffle_seed=5)


class Quiet(Finetune):
    """Draws no random numbers, which an interrupted step would have drawn already."""

    def training_step(self, batch, batch_idx):
        self.model.eval()
        loss = self.model(**batch).loss
        self.losses.append(loss.item())
        return loss


class Stop(L.Callback):
    def __init__(self, hook: str, step: int) -> None:
        def stop(trainer, *args) -> None:
            if trainer.global_step == step:
                raise RuntimeError("stopped")

        setattr(self, hook, stop)


@pytest.mark.parametrize(
    ("hook", "step"), [("on_train_batch_start", 3), ("on_before_optimizer_step", 9), ("on_train_batch_end", 5)]
)
@pytest.mark.parametrize("teller", [ExactResume, lambda: GoldenSnapshot(at=("end",))], ids=["exact", "analysis"])
def test_a_batch_that_was_fetched_and_not_trained_on_comes_again(tmp_path, hook, step, teller):
    saver = at_failure(tmp_path / "ckpt")
    with pytest.raises(RuntimeError, match="stopped"):
        fit(
            tmp_path / "a", [teller(), Stop(hook, step), saver], module=Quiet, data=Ordered(), enable_checkpointing=True
        )
    _, whole, _ = fit(tmp_path / "whole", [], module=Quiet, data=Ordered())
    trainer, resumed, _ = fit(
        tmp_path / "b", [teller()], module=Quiet, data=Ordered(), ckpt_path=next((tmp_path / "ckpt").glob("*.ckpt"))
    )
    assert trainer.global_step == 16
    assert resumed.losses == whole.losses[step:]


class Away(CSVLogger):
    """A service that takes nothing of ours."""

    def log_metrics(self, metrics, step=None):
        if any(name.startswith("goldy") for name in metrics):
            raise ConnectionError("the service is away")
        super().log_metrics(metrics, step)


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_logger_that_fails_costs_its_own_entry_alone(tmp_path, on_error):
    watcher = GoldenSnapshot(every_n_steps=4, at=("checkpoint", "end"), on_error=on_error)
    saver = ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=4, save_top_k=-1)
    loggers = [Away(tmp_path, name=None, version="away"), CSVLogger(tmp_path, name=None, version="here")]
    with told() as messages:
        trainer, _, _ = fit(tmp_path, [watcher, saver], max_epochs=1, logger=loggers, enable_checkpointing=True)
    assert trainer.global_step == 8
    assert steps(watcher.folder) == [4, 8]
    assert "golden_snapshot at step 4 is not in Away: ConnectionError: the service is away" in messages
    assert "goldy/golden_snapshot/delta_norm" in (tmp_path / "here" / "metrics.csv").read_text()


def plasticity(**options) -> HeadPlasticity:
    schedule = PruningSchedule(warmup_steps=1, steps_per_cycle=6, ramp_steps=2, cuts=2, regrow_at=3)
    settings = {"recovery": Recovery(measure_every_n_steps=1), "scoring": Scoring(n_samples=2), "schedule": schedule}
    return HeadPlasticity(pruning_level=0.5, **{**settings, **options})


def test_plasticity_warns_of_every_failure_and_undoes_half_an_event(tmp_path, monkeypatch):
    from lightning_goldy.analysis.heads import plasticity as module

    callback = plasticity(on_error="warn")
    seen, broken, before = [], {"on": True}, {}

    def regrown(model, heads, **options):
        before.update({name: value.clone() for name, value in model.state_dict().items()})
        real(model, heads, **options)
        if broken["on"]:
            raise MemoryError("no room")

    real = module.regrow_heads
    monkeypatch.setattr(module, "regrow_heads", regrown)

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            run = callback.plasticity
            seen.append((trainer.global_step, run.state.phase, len(run.gates.closed)))
            if trainer.global_step == 4:
                present = pl_module.model.state_dict()
                assert all(torch.equal(value, present[name]) for name, value in before.items())
            broken["on"] = trainer.global_step < 5

    with told() as messages:
        trainer, _, _ = fit(tmp_path, [callback, Watch()], max_epochs=1)
    assert "head_plasticity failed at step 4 and training goes on: no room" in messages
    phases = {step: (phase, closed) for step, phase, closed in seen}
    assert phases[4] == phases[5] == ("recovery", 2)
    assert phases[6][0] == "regrown"
    assert phases[6][1] < 2
    assert before
    assert trainer.global_step == 8


def test_a_loss_that_is_no_number_does_not_end_a_training_that_warns(tmp_path):
    class NaN(Finetune):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * float("nan") if self.trainer.global_step == 3 else loss

    with told() as messages:
        schedule = PruningSchedule(warmup_steps=1, steps_per_cycle=30, ramp_steps=1, cuts=1, regrow_at=20)
        trainer, _, _ = fit(tmp_path, [plasticity(on_error="warn", schedule=schedule)], module=NaN, max_epochs=1)
    assert trainer.global_step == 8
    assert any("failed to measure the recovery at step" in message for message in messages)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A run of 8 steps, with a checkpoint beside its results at step 4."""
    folder = tmp_path_factory.mktemp("stopped")
    saver = ModelCheckpoint(folder / "run" / "checkpoints", filename="{step}", every_n_train_steps=4, save_top_k=-1)
    fit(folder, [moving(), GoldenSnapshot(every_n_steps=2), saver], max_epochs=1, enable_checkpointing=True)
    return folder


def moved(stopped: Path, target: Path, *parts: str) -> Path:
    """Copies parts of a run, so that their former place counts as gone."""
    for part in parts:
        shutil.copytree(stopped / "run" / part, target / part)
    return target / "checkpoints" / "step=4.ckpt"


def test_a_run_that_was_moved_goes_on_from_beside_its_checkpoint(stopped, tmp_path):
    checkpoint = moved(stopped, tmp_path / "new", "checkpoints", "goldy")
    away = stopped / "run" / "goldy"
    away.rename(stopped / "away")
    try:
        watchers = [moving(), GoldenSnapshot(every_n_steps=2)]
        fit(tmp_path / "resumed", watchers, max_epochs=1, ckpt_path=checkpoint)
        assert steps(watchers[0].folder) == [2, 4, 6, 8]
        assert steps(watchers[1].folder)[:2] == [2, 4]
        # Another run has come to the former place: it is not taken for this one.
        (away / "taylor_diff").mkdir(parents=True)
        atomic_write(away / "taylor_diff" / ".run.json", json.dumps({"identity": "other", "claims": {}}))
        append_row(away / "taylor_diff" / "results.jsonl", {"step": 1, "files": {}})
        watcher = moving()
        fit(tmp_path / "again", [watcher], max_epochs=1, ckpt_path=checkpoint)
        assert steps(watcher.folder) == [2, 4, 6, 8]
        # With neither there, what needs a file refuses, and what does not tells that rows are missing.
        alone = moved(stopped, tmp_path / "alone", "checkpoints")
        with told() as messages, pytest.raises(FileNotFoundError, match="put the folder back"):
            fit(tmp_path / "alone-resumed", [moving()], max_epochs=1, ckpt_path=alone)
        assert any("the results before the resume are not taken over" in message for message in messages)
    finally:
        shutil.rmtree(away, ignore_errors=True)
        (stopped / "away").rename(away)


def test_a_link_to_a_checkpoint_leads_to_what_lies_beside_the_checkpoint(stopped, tmp_path):
    checkpoint = moved(stopped, tmp_path / "new", "checkpoints", "goldy")
    away = stopped / "run" / "goldy"
    away.rename(stopped / "away")
    try:
        (tmp_path / "links").mkdir()
        link = tmp_path / "links" / "best.ckpt"
        link.symlink_to(checkpoint)
        watcher = moving()
        fit(tmp_path / "resumed", [watcher], max_epochs=1, ckpt_path=link)
        assert steps(watcher.folder) == [2, 4, 6, 8]
    finally:
        (stopped / "away").rename(away)


HOLD = """
import fcntl, os, sys
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.lockf(file, fcntl.LOCK_EX)
os.write(file, b'{"process": 42, "host": "there"}')
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_in_one_folder_are_refused_until_the_first_is_gone(tmp_path):
    lock = tmp_path / "run" / "goldy" / ".lock"
    lock.parent.mkdir(parents=True)
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], **options) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match=r"process 42 on there is writing results to .*another version="):
            fit(tmp_path, [GoldenSnapshot(at=("end",))], max_epochs=1)
        holder.kill()
        holder.wait()
    assert lock.exists()
    watcher = GoldenSnapshot(at=("end",))
    trainer, _, _ = fit(tmp_path, [watcher, GoldenSnapshot(at=("end",), name="second")], max_epochs=1)
    assert steps(watcher.folder) == [8]
    assert not lock.exists()
    # Two trainers of one process: refused while the first one runs, and let in when it has failed.
    lock_folder(lock.parent, trainer)
    other = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.state.status = "running"
    with pytest.raises(RuntimeError, match="another trainer of this process"):
        lock_folder(lock.parent, other)
    trainer.state.status = "interrupted"
    lock_folder(lock.parent, other)


def test_a_run_that_is_refused_leaves_what_its_callbacks_wrote_before(tmp_path):
    watchers = [GoldenSnapshot(at=("end",), every_n_steps=None), moving()]
    fit(tmp_path / "first", watchers, max_epochs=1)
    before = {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()}
    lock = tmp_path / "second" / "run" / "goldy" / ".lock"
    lock.parent.mkdir(parents=True)
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], **options) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RuntimeError, match="is writing results to"):
            fit(tmp_path / "second", watchers, max_epochs=1)
        holder.kill()
    assert {path: path.read_bytes() for path in (tmp_path / "first").rglob("*") if path.is_file()} == before


def test_a_note_of_files_that_cannot_be_written_does_not_end_a_training_that_warns(tmp_path, monkeypatch):
    class Full(L.Callback):
        def on_train_batch_start(self, trainer, *args) -> None:
            if trainer.global_step == 3:
                monkeypatch.setattr("lightning_goldy.callbacks.engine.run_folder.atomic_write", refuse_space)

    def refuse_space(path, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    watcher = GoldenSnapshot(every_n_steps=2, at=(), on_error="warn")
    saver = ModelCheckpoint(tmp_path / "c", filename="{step}", every_n_train_steps=2, save_top_k=-1)
    with told() as messages:
        trainer, _, _ = fit(tmp_path, [watcher, Full(), saver], max_epochs=1, enable_checkpointing=True)
    assert trainer.global_step == 8
    assert steps(watcher.folder) == [2, 4, 6, 8]
    states = [torch.load(path, weights_only=True)["callbacks"][watcher.state_key] for path in saved_files(tmp_path)]
    assert [state["claim"] is None for state in states] == [False, True, True, True]
    assert any("failed to note what a resume needs at step 4" in message for message in messages)


def saved_files(folder: Path) -> list[Path]:
    return [folder / "c" / f"step={step}.ckpt" for step in (2, 4, 6, 8)]


class Unfreezes(L.Callback):
    """Lets a block be trained from the fourth step on."""

    def setup(self, trainer, pl_module, stage) -> None:
        pl_module.model.transformer.h[0].requires_grad_(False)

    def on_train_batch_start(self, trainer, pl_module, *args) -> None:
        if trainer.global_step == 3:
            pl_module.model.transformer.h[0].requires_grad_(True)


def test_what_becomes_trainable_is_known_though_its_file_could_not_be_written(tmp_path, monkeypatch):
    write = snapshots.save_vectors

    class Full(L.Callback):
        def on_train_batch_start(self, trainer, *args) -> None:
            monkeypatch.setattr(snapshots, "save_vectors", refuse_added if trainer.global_step == 3 else write)

    def refuse_added(path, *args, **options):
        if "added" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, *args, **options)

    def run(name, *others):
        watcher = GoldenSnapshot(every_n_steps=2, at=(), on_error="warn", track_updates=True)
        saver = ModelCheckpoint(tmp_path / name / "c", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        with told() as messages:
            fit(tmp_path / name, [Unfreezes(), watcher, saver, *others], max_epochs=1, enable_checkpointing=True)
        return watcher, messages

    full, messages = run("full", Full())
    free, _ = run("free")
    assert any("failed to keep what becomes trainable at step 3" in message for message in messages)
    norms = [
        {row["step"]: row["metrics"]["delta_norm"] for row in read_rows(each.folder / "results.jsonl")}
        for each in (full, free)
    ]
    # It was tried again in vain before the row and in the checkpoint of step 4, and with success in that of step 5.
    assert norms[0] == {step: value for step, value in norms[1].items() if step != 4}
    files = [tmp_path / "full" / "c" / f"step={step}.ckpt" for step in (4, 5)]
    early, late = (torch.load(file, weights_only=True)["callbacks"][full.state_key] for file in files)
    assert (len(early["base_added"]), len(late["base_added"])) == (0, 1)
    assert early["lost"].startswith("OSError")
    assert late["lost"] is None


def test_addresses_of_this_machine_are_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    watcher = GoldenSnapshot(at=("end",), every_n_steps=None)
    fit(tmp_path, [watcher], max_epochs=1, logger=CSVLogger(f"file://{tmp_path}/runs", name=None, version="a"))
    assert watcher.folder == tmp_path / "runs" / "a" / "goldy" / "golden_snapshot"
    assert steps(watcher.folder) == [8]
    assert (tmp_path / "runs" / POOL).is_dir()
    assert not (tmp_path / "file:").exists()
    assert require_local(Path("file:///runs/a")) == Path("/runs/a")


@pytest.mark.parametrize("address", ["memory://runs", "s3://bucket/runs", "simplecache::gs://bucket"])
def test_a_root_in_another_storage_is_refused_before_anything_is_made(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    roots = {"loggers": [SimpleNamespace(save_dir=address)], "default_root_dir": tmp_path, "callbacks": []}
    for options in (roots, {**roots, "loggers": [], "default_root_dir": address}):
        with pytest.raises(ValueError, match="written to a local file system only"):
            GoldenSnapshot().setup(SimpleNamespace(**options), Finetune(), "fit")
    for write in (lambda: atomic_write(f"{address}/x", ""), lambda: append_row(Path(address, "rows.jsonl"), {})):
        with pytest.raises(ValueError, match="written to a local file system only"):
            write()
    for make in (lambda: RunReport(f"{address}/page.html"), lambda: output_folder(address, "taylor_diff", "analyze")):
        with pytest.raises(ValueError, match="written to a local file system only"):
            make()
    with pytest.raises(ValueError, match=r"--directory is .* written to a local file system only"):
        run_demo(address, fast=True)
    assert os.listdir(tmp_path) == []
    assert require_local(f"file://{tmp_path}/a") == tmp_path / "a"


@pytest.mark.slow
def test_one_of_two_processes_fails_and_both_go_on(tmp_path):
    """Wherever it is; a deadlock would end at the time limit."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.callbacks.two_processes_faults", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    last = first.pop("plain")["step"]
    closed = first.pop("closed")
    assert closed is not None
    for name, seen in first.items():
        if name.endswith("differences"):
            assert seen == [], name
            continue
        assert seen["step"] == last, name
    every = list(range(1, last + 1))
    for name in ("golden fails on one rank", "golden fails on one rank, sharded", "reverse fails on one rank"):
        assert first[name]["rows"] == [every[1:]], name
    for name in ("no row", "no logger", "no file"):
        assert first[name]["rows"] == [every], name


@pytest.mark.slow
def test_every_metric_of_every_callback_is_that_of_one_process(tmp_path):
    """Same name, same meaning, same value, whole on each of two ranks or sharded over them."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    found = {}
    for strategy in ("single", "ddp", "fsdp2"):
        command = [sys.executable, "-W", "ignore", "-m", "tests.callbacks.every_metric", strategy, str(tmp_path)]
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=150, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        files = sorted((tmp_path / strategy / "run" / "goldy").glob("*/results.jsonl"))
        found[strategy] = {file.parent.name: json.loads(file.read_text().splitlines()[0]) for file in files}
    alone = found.pop("single")
    assert len(alone) == 13
    assert sum(len(row["metrics"]) for row in alone.values()) > 100
    for strategy, rows in found.items():
        assert rows.keys() == alone.keys()
        for name, row in rows.items():
            differences = strategy == "fsdp2" and name.startswith("taylor")
            mine, wanted = row["metrics"], alone[name]["metrics"]
            error = row["result"]["error"] if differences else 0.0
            # Of the second order along the step, as the row states it.
            stated = {"second_to_first": error / abs(wanted["first_order"])} if differences else {}
            stated |= dict.fromkeys(("second_order", "loss/order2", "residual/order2"), error)
            missing = {metric for metric, value in wanted.items() if value is None}
            assert {metric for metric, value in mine.items() if value is None} == missing, (strategy, name)
            for metric in (mine.keys() | wanted.keys()) - missing:
                # Central differences of logits, of which no row states the error, are compared in function space.
                of_logits = differences and metric.startswith(("relative_error", "kl_divergence", "nonlinearity"))
                rel, off = 1e-3 if of_logits else 1e-4, 1e-6 + stated.get(metric, 0.0)
                assert mine[metric] == pytest.approx(wanted[metric], rel=rel, abs=off), (strategy, name, metric, error)
            assert row["result"].get("regime") == alone[name]["result"].get("regime")
