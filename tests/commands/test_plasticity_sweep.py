"""``goldy plasticity``: what is compared, what is written, what is refused."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_goldy.cli import main
from lightning_goldy.commands.plasticity import Sweep

REDUCED = [
    "--trainer.accelerator=cpu",
    "--model.model.n_layer=2",
    "--model.model.n_embd=16",
    "--data.block_size=16",
    "--data.batch_size=4",
    "--trainer.max_steps=12",
    "--trainer.limit_val_batches=3",
    "--trainer.val_check_interval=12",
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("to be or not to be, that is the question. " * 100)
    return tmp_path


def test_a_sweep_writes_rows_models_a_table_and_a_report(here, capsys):
    words = ["--strategies", "taylor", "random", "--levels", "0.5", "--cycles", "1", "--seeds", "0", "1"]
    assert main(["plasticity", "--data", "text.txt", *words, "--save-model", *REDUCED]) == 0
    folder = here / "runs" / "plasticity" / "version_0"
    (row,) = map(json.loads, (folder / "goldy" / "plasticity_sweep" / "results.jsonl").read_text().splitlines())
    runs = row["result"]["runs"]
    assert [(run["strategy"], run["seed"]) for run in runs] == [
        ("taylor", 0), ("random", 0), ("taylor", 1), ("random", 1),
    ]  # fmt: skip
    for run in runs:
        assert (run["heads"], run["open_heads"], len(run["closed"])) == (8, 4, 4)
        assert run["cost"] == pytest.approx(run["loss"] - run["loss_unpruned"], abs=1e-12)
        assert math.isfinite(run["loss_after_cut"])
    # One training without pruning per seed.
    assert runs[0]["loss_unpruned"] == runs[1]["loss_unpruned"]
    assert runs[0]["loss_unpruned"] != runs[2]["loss_unpruned"]
    assert row["metrics"]["runs"] == 4
    assert row["cost"]["forwards"] == sum(run["forwards"] for run in runs) > 0
    assert row["cost"]["backwards"] == sum(run["backwards"] for run in runs)
    model = AutoModelForCausalLM.from_pretrained(folder / "runs" / "taylor-0.5-1-seed0" / "compact")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    assert "closed" in (folder / "runs" / "taylor-0.5-1-seed0" / "compact" / "README.md").read_text().lower()
    shown = capsys.readouterr().out
    assert "taylor" in shown
    assert "report.html" in shown
    assert "Head plasticity: strategies compared" in (folder / "report.html").read_text()


def test_memory_is_measured_where_each_training_runs(here, monkeypatch):
    measured = []

    @contextmanager
    def watching(device):
        measured.append(device)
        peak = 1000 + len(measured)
        yield lambda: peak

    monkeypatch.setattr("lightning_goldy.commands.plasticity.peak_memory_bytes", watching)
    words = ["--strategies", "random", "--levels", "0.5", "--cycles", "1", "--seeds", "0"]
    assert main(["plasticity", "--data", "text.txt", *words, *REDUCED]) == 0
    # One without pruning and one with it; the trainer decides where.
    assert measured == [torch.device("cpu")] * 2
    path = here / "runs" / "plasticity" / "version_0" / "goldy" / "plasticity_sweep" / "results.jsonl"
    assert json.loads(path.read_text())["cost"]["peak_memory_bytes"] == 1002


def test_the_same_training_without_pruning_is_the_reference(here):
    """At a level whose cut comes after the last measurement nothing is lost: the cost is exactly zero."""
    recipe = """
trainer:
  callbacks:
    - class_path: lightning_goldy.callbacks.HeadPlasticity
      init_args:
        scoring: {n_samples: 4, attention_maps: false}
        schedule: {warmup_steps: 12, steps_per_cycle: 8}
"""
    (here / "late.yaml").write_text(recipe)
    from lightning_goldy.training.recipes import find_recipe

    configs = ["--config", str(find_recipe("head_plasticity_sweep").path), "--config", "late.yaml"]
    with pytest.warns(UserWarning, match="the last cycle ends at step 20, the training at 12"):
        assert main(["plasticity", *configs, "--data", "text.txt", "--strategies", "random", "--levels", "0.5",
                     "--output", "out", *REDUCED]) == 0  # fmt: skip
    (row,) = map(json.loads, (here / "out/goldy/plasticity_sweep/results.jsonl").read_text().splitlines())
    (run,) = row["result"]["runs"]
    assert run["cost"] == 0.0
    assert run["open_heads"] == 8
    assert main(["plasticity", *configs, "--data", "text.txt", "--output", "out", *REDUCED]) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--levels", "1.0"], "pruning_level is the share of all heads to cut, above 0 and below 1; got 1.0"),
        (["--strategies", "tailor"], "taylor"),
        (["--seeds", "0", "0"], "seeds must be different values, at least one; got [0, 0]"),
        (["--cycles", "0"], "cycles must be at least 1; got 0"),
        (["--levels", "0.9"], "asks for 7 of 8 heads in 2 layers, but 6 can be cut"),
        (["--config", "recipes/head_plasticity.yaml"], "goldy recipes copy head_plasticity"),
    ],
)
def test_what_cannot_work_is_a_short_message(here, capsys, words, message):
    assert main(["plasticity", "--data", "text.txt", *words, *REDUCED]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_combinations_are_all_there_once():
    sweep = Sweep(("taylor", "random"), (0.1, 0.3), (1, 2), (0,))
    assert len(set(sweep.combinations())) == 8
