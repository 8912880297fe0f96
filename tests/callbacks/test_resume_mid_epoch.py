"""Resumed in the middle of an epoch, a training through GoldyModule is the uninterrupted one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_goldy.analysis.heads import Regrowth, Scoring
from lightning_goldy.callbacks import HeadPlasticity
from tests.callbacks.mid_epoch import check_resumed, train

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using", "ignore:.*exists and is not empty", "ignore:The dirpath has changed"
)

SCHEDULES = {
    "constant": {"name": "constant"},
    "warm-up": {"name": "constant", "warmup_fraction": 0.5},
    "linear": {"name": "linear", "warmup_steps": 2},
    "cosine": {"name": "cosine", "warmup_fraction": 0.2},
}


def plasticity():
    """Heads that are cut on the way: the callback asks for the training's length."""
    return [HeadPlasticity("random", pruning_level=0.5, regrowth=Regrowth(fraction=0.0), scoring=Scoring(n_samples=2))]


@pytest.mark.parametrize(
    ("kind", "schedule", "accumulate"),
    [("text", "cosine", 1), ("knowledge", "linear", 3), ("atlas", "warm-up", 1), ("text", "constant", 1)],
)
def test_in_the_middle_of_an_epoch(tmp_path, kind, schedule, accumulate):
    assert check_resumed(tmp_path, kind, SCHEDULES[schedule], [1], accumulate=accumulate) == 1


def test_with_plasticity(tmp_path):
    assert check_resumed(tmp_path, "text", SCHEDULES["constant"], [1], extra=plasticity) == 1


def test_also_without_the_random_states(tmp_path):
    """The module alone goes on with the next batch, and so does any other loader that keeps its position."""
    first, _ = train(tmp_path, "text", SCHEDULES["cosine"])
    checkpoint = tmp_path / "saved/step=2.ckpt"
    again, _ = train(tmp_path / "again", "text", SCHEDULES["cosine"], exact=False, ckpt_path=checkpoint)
    assert again == [pair for pair in first if pair[0] >= 2]


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", ["text", "knowledge", "atlas"])
@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
def test_at_every_step(tmp_path, kind, schedule, accumulate):
    assert check_resumed(tmp_path, kind, SCHEDULES[schedule], accumulate=accumulate) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_with_two_workers(tmp_path, accumulate):
    assert check_resumed(tmp_path, "text", SCHEDULES["cosine"], workers=2, accumulate=accumulate) >= 3


@pytest.mark.slow
def test_with_plasticity_at_every_step(tmp_path):
    assert check_resumed(tmp_path, "text", SCHEDULES["cosine"], extra=plasticity) >= 8


@pytest.mark.slow
def test_of_two_processes(tmp_path):
    command = [sys.executable, "-W", "ignore", "-m", "tests.callbacks.mid_epoch", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("exact", [True, False])
def test_again_in_the_epoch_after_a_resume_from_the_last_batch_of_one(tmp_path, exact):
    """The epoch that begins with the resume is counted, so that the next resume goes on within it."""
    whole, weights = train(tmp_path, "text", SCHEDULES["cosine"])
    last = (whole[-1][0] + 1) // 2
    options = {"schedule": SCHEDULES["cosine"], "exact": exact}
    for number, step in enumerate((last, last + 2)):
        place = tmp_path / f"resume{number}"
        checkpoint = (tmp_path if number == 0 else tmp_path / "resume0") / f"saved/step={step}.ckpt"
        found, resumed = train(place, "text", ckpt_path=checkpoint, **options)
        assert found == [pair for pair in whole if pair[0] >= step]
        # Without the random states dropout is another.
        assert not exact or all(torch.equal(weights[name], resumed[name]) for name in weights), number
