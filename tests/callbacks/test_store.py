"""Results on the disk: whole rows only, the same cost for each, and a history that stays small."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from lightning_goldy.analysis import Cost, Row
from lightning_goldy.callbacks import AttentionTracker, BasinVolume, GoldenParameters, GoldenSnapshot, TaylorDiff
from lightning_goldy.callbacks.engine.store import MOST_ROWS, ResultStore, RowHistory
from lightning_goldy.core.files import append_row, read_rows
from lightning_goldy.report.figures import reads_of
from lightning_goldy.report.topics.attention import spectra
from lightning_goldy.report.topics.basin import trajectories
from lightning_goldy.report.topics.taylor import prediction
from tests.callbacks.training import TokenData, fit


def row_at(step: int) -> Row:
    spectra = [{"prompt": "probe", "values": [float(step), float("nan")]}]
    return Row("attention_tracker", {"entropy": step / 2}, {"spectra": spectra, "heads": [[0, 1]]}).at(step=step)


def test_a_row_is_written_whole_and_given_back(tmp_path):
    store = ResultStore(tmp_path / "tracker", write=True)
    row = Row("tiny", {"loss": float("inf")}, cost=Cost(4, 2)).at(
        name="mine", step=3, epoch=1, trigger="step", seconds=0.5, peak_memory_bytes=7, files={"mask": "m.safetensors"}
    )
    line = store.append(row)
    assert read_rows(store.rows) == [line]
    assert line == {
        "format": 2,
        "analysis": "tiny",
        "name": "mine",
        "step": 3,
        "epoch": 1,
        "trigger": "step",
        "metrics": {"loss": None},
        "result": {},
        "headline": "tiny",
        "cost": {"seconds": 0.5, "forwards": 4, "backwards": 2, "peak_memory_bytes": 7},
        "files": {"mask": "m.safetensors"},
    }
    silent = ResultStore(tmp_path / "silent", write=False)
    assert silent.append(row) == line
    assert silent.history == ()
    assert not (tmp_path / "silent").exists()


def test_a_run_killed_at_any_byte_of_its_last_line_goes_on_from_whole_rows(tmp_path):
    store = ResultStore(tmp_path / "tracker", write=True)
    lines = [json.loads(json.dumps(store.append(row_at(step))).replace("NaN", "null")) for step in range(3)]
    whole = store.rows.read_bytes()
    start = whole.removesuffix(b"\n").rfind(b"\n") + 1
    for end in range(start, len(whole) - 1):
        store.rows.write_bytes(whole[:end])
        if end == start:
            again = ResultStore(store.folder, write=True)
        else:
            with pytest.warns(UserWarning, match="was torn"):
                again = ResultStore(store.folder, write=True)
        assert read_rows(again.rows) == lines[:2]
        assert [row["step"] for row in again.history] == [0, 1]
        again.append(row_at(2))
        assert again.rows.read_bytes() == whole


def test_bytes_written_for_a_row_do_not_depend_on_the_rows_before_it(tmp_path, monkeypatch):
    store, sizes, write = ResultStore(tmp_path / "tracker", write=True), [], os.write

    def counting(descriptor, line):
        sizes.append(len(line))
        return write(descriptor, line)

    monkeypatch.setattr(os, "write", counting)
    monkeypatch.setattr(os, "replace", lambda *paths: pytest.fail("the file is rewritten"))
    for step in range(1000, 1600):
        store.append(row_at(step))
    assert len(sizes) == 600
    assert max(sizes) - min(sizes) < 10
    assert len(store.history) <= MOST_ROWS


def test_the_history_is_thin_even_and_that_of_the_file(tmp_path):
    store = ResultStore(tmp_path / "tracker", write=True)
    for step in range(530):
        store.append(row_at(step))
    steps = [row["step"] for row in store.history]
    assert steps == list(range(0, 530, 4))
    assert store.history[1] == {
        "analysis": "attention_tracker",
        "step": 4,
        "trigger": "end",
        "metrics": {"entropy": 2.0},
        "result": {"spectra": [{"prompt": "probe", "values": [4.0, None]}]},
    }
    assert ResultStore(store.folder, write=True).history == store.history
    resumed = ResultStore(tmp_path / "resumed", write=True)
    resumed.continue_from(store.folder, 100)
    assert [row["step"] for row in resumed.history] == list(range(101))
    store.continue_from(store.folder, 100)
    assert store.history == resumed.history
    store.start_fresh()
    assert store.history == ()


def test_rows_of_format_1_stay_on_resume_and_tell_their_history(tmp_path):
    old = {"format": 1, "analysis": "attention_tracker", "name": "tracker", "step": 2, "epoch": 0, "trigger": "step"}
    old |= {"metrics": {"entropy": 0.5}, "cost": {"seconds": 1.0, "model_evaluations": 3, "peak_memory_bytes": 5}}
    old |= {"result": {"spectra": [{"prompt": "probe", "steps": [0, 2], "values": [[1.0], [2.0]]}]}, "files": {}}
    append_row(tmp_path / "tracker" / "results.jsonl", old)
    append_row(tmp_path / "tracker" / "results.jsonl", {**old, "step": 9})
    store = ResultStore(tmp_path / "tracker", write=True)
    store.continue_from(store.folder, 4)
    line = store.append(row_at(6))
    assert read_rows(store.rows)[0] == old
    assert spectra([*store.history[:-1], line])["probe"][0] == ([2, 6], [2.0, 6.0])


def test_rows_of_a_run_hold_no_history(tmp_path):
    """Twice as long a run has rows of the same size, and the figures over the run have all its points."""
    watchers = [
        GoldenSnapshot(every_n_steps=1),
        GoldenParameters(n_samples=2, every_n_steps=1),
        TaylorDiff(orders=[1], every_n_steps=1, n_samples=2),
        AttentionTracker(every_n_steps=1, n_samples=2),
        BasinVolume(1, every_n_steps=1, n_samples=2, sigma=0.1),
    ]
    fit(tmp_path, watchers, data=TokenData(12), max_epochs=2)
    for watcher in watchers:
        rows = read_rows(watcher.folder / "results.jsonl")
        sizes = [len(json.dumps(row)) for row in rows]
        assert len(rows) == 12
        assert max(sizes[6:]) < 1.15 * max(sizes[:6]), watcher.name
        history = RowHistory(rows[:-1])
        if watcher.name == "taylor_diff":
            found, _ = prediction([*history.rows, rows[-1]])
            assert found["order1"] == [row["metrics"]["loss/order1"] - row["metrics"]["base_loss"] for row in rows]
        if watcher.name == "basin_volume":
            (line,) = trajectories([*history.rows, rows[-1]]).values()
            assert list(line.y) == [row["metrics"]["log_volume"] for row in rows]
        if watcher.name == "attention_tracker":
            (courses,) = spectra([*history.rows, rows[-1]]).values()
            values = [row["result"]["spectra"][0]["values"] for row in rows]
            assert [means for _, means in courses] == [list(course) for course in zip(*values, strict=True)]


@pytest.mark.parametrize(("control", "expected"), [(False, 3), (True, 6)])
def test_the_cost_of_golden_parameters_is_what_ran(tmp_path, control, expected):
    """A pass of every sample, and of every sample of random tokens."""
    passes = []

    class Counted(GoldenParameters):
        def compute(self, context):
            forward = context.model.register_forward_hook(lambda module, inputs, output: passes.append(len(output[0])))
            try:
                return super().compute(context)
            finally:
                forward.remove()

    watcher = Counted(n_samples=3, control=control)
    fit(tmp_path, [watcher], max_epochs=1)
    (row,) = read_rows(watcher.folder / "results.jsonl")
    assert row["analysis"] == "golden_parameters"
    assert len(passes) == row["cost"]["forwards"] == row["cost"]["backwards"] == expected


def test_what_figures_over_the_run_read_is_known_by_the_analysis():
    assert reads_of("attention_tracker") == {"spectra"}
    assert reads_of("of somebody else") == frozenset()
    assert torch.tensor([len(reads_of(name)) for name in ("taylor_diff", "variant_losses")]).sum() == 0


def test_a_run_goes_on_from_a_folder_whose_last_row_is_torn(tmp_path: Path) -> None:
    previous = tmp_path / "before"
    append_row(previous / "results.jsonl", {"step": 1})
    with open(previous / "results.jsonl", "ab") as file:
        file.write(b'{"step": 2, "met')
    before = (previous / "results.jsonl").read_bytes()
    store = ResultStore(tmp_path / "after", write=True)
    store.continue_from(previous, 5)
    assert read_rows(store.rows) == [{"step": 1}]
    assert (previous / "results.jsonl").read_bytes() == before
