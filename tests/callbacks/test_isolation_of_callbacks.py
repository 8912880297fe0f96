"""Attaching a callback changes no bit of the training: weights, buffers, optimizer, random states, losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_goldy import GoldyModule
from lightning_goldy.callbacks import (
    ActivationDifferences,
    AnalysisCallback,
    AttentionTracker,
    BasinVolume,
    ChangeAttribution,
    CircuitTracker,
    Findings,
    GoldenParameters,
    GoldenSnapshot,
    KnowledgeCoupling,
    ParameterDistribution,
    ReverseGoldenParameters,
    TaylorDiff,
)
from tests.callbacks.knowledge import PIECES, WordData
from tests.callbacks.training import Finetune, Tokens, differences, fit
from tests.references.models import build

EVERYWHERE = {"every_n_steps": 5, "every_n_epochs": 1, "at": ("start", "checkpoint", "end")}
CALLBACKS = {
    "snapshot": lambda: [GoldenSnapshot(**EVERYWHERE)],
    "golden": lambda: [GoldenParameters(n_samples=3, **EVERYWHERE)],
    "golden_global": lambda: [GoldenParameters(n_samples=3, scope="global", last_layers=1, **EVERYWHERE)],
    "basin": lambda: [BasinVolume(1, n_samples=2, **EVERYWHERE)],
    "basin_best": lambda: [BasinVolume(1, n_samples=2, cutoff=[1e-3, 1e-2], preconditioner="best", **EVERYWHERE)],
    "basin_kronecker": lambda: [BasinVolume(1, n_samples=2, preconditioner="kronecker", **EVERYWHERE)],
    "taylor": lambda: [GoldenSnapshot(every_n_steps=3), TaylorDiff(n_samples=3, **EVERYWHERE)],
    "attribution": lambda: [GoldenSnapshot(every_n_steps=3), ChangeAttribution(nodes=1, n_samples=4, **EVERYWHERE)],
    "activations": lambda: [GoldenSnapshot(every_n_steps=3), ActivationDifferences(n_samples=3, **EVERYWHERE)],
    "taylor_moving": lambda: [TaylorDiff([1, 2], n_samples=3, reset="each", function_space=False, **EVERYWHERE)],
    "attention": lambda: [GoldenSnapshot(every_n_steps=3), AttentionTracker(n_samples=3, **EVERYWHERE)],
    "circuits": lambda: [
        GoldenSnapshot(**EVERYWHERE),
        CircuitTracker("induction", n_pairs=2, sizes=[0.1], **EVERYWHERE),
    ],
    "knowledge": lambda: [KnowledgeCoupling(PIECES, edits=[PIECES[0].id], **EVERYWHERE)],
    "both": lambda: [GoldenSnapshot(**EVERYWHERE), GoldenParameters(n_samples=3, score="taylor", **EVERYWHERE)],
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    cache = {}

    def run(key, **options):
        if key not in cache:
            cache[key] = fit(tmp_path_factory.mktemp("plain"), **options)[2]
        return cache[key]

    return run


@pytest.mark.filterwarnings("ignore:.*measured without a preconditioner")
@pytest.mark.parametrize("callbacks", CALLBACKS)
def test_single_device(plain, tmp_path, callbacks):
    options = {"enable_checkpointing": True}
    trainer, _, found = fit(tmp_path, CALLBACKS[callbacks](), data=WordData(), **options)
    assert differences(plain("checkpoints", **options), found) == []
    for callback in trainer.callbacks:
        if isinstance(callback, AnalysisCallback):
            assert len((callback.folder / "results.jsonl").read_text().splitlines()) >= 5


class Unvalidated(WordData):
    """Training rows alone, from a data set or from a stream of them."""

    val_dataloader = probe_dataloader = None

    def __init__(self, streamed: bool) -> None:
        super().__init__()
        self.streamed = streamed

    def train_dataloader(self):
        rows = Tokens(16, 1)
        return DataLoader(Stream(rows) if self.streamed else rows, batch_size=2, shuffle=not self.streamed)


class Stream(IterableDataset):
    """Draws for each row, so that whoever reads one more moves the others."""

    def __init__(self, rows) -> None:
        self.rows, self.read = rows, 0

    def __iter__(self):
        for index in range(len(self.rows)):
            self.read += 1
            yield self.rows[(index + int(torch.randint(3, ()))) % len(self.rows)]


@pytest.mark.filterwarnings("ignore:the probe is taken from the training set", "ignore:You defined a `validation_step`")
@pytest.mark.parametrize(
    ("streamed", "everything"),
    [
        (False, False),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
    ids=["few", "rows", "stream"],
)
def test_a_probe_out_of_the_training_set(tmp_path, streamed, everything):
    def watched():
        if not everything:
            return [GoldenSnapshot(), GoldenParameters(n_samples=3), AttentionTracker(n_samples=2)]
        kept = [ReverseGoldenParameters(n_samples=3), ParameterDistribution()]
        made = [make() for name, make in CALLBACKS.items() if "_" not in name and name not in ("both", "snapshot")]
        first = GoldenSnapshot(every_n_steps=3)
        return [first, *(each for group in made for each in group if not isinstance(each, GoldenSnapshot)), *kept]

    def own():
        module = GoldyModule(build("gpt2"), schedule={"name": "constant"})
        module.losses = []
        return module

    for module in (Finetune, own) if streamed else (own,):
        place = tmp_path / module.__name__
        runs = [fit(place / str(len(these)), these, module=module, data=Unvalidated(streamed), max_epochs=1)
                for these in ([], watched())]  # fmt: skip
        assert differences(runs[0][2], runs[1][2]) == []
        if streamed:
            sets = [trainer.fit_loop._combined_loader.flattened[0].dataset for trainer, *_ in runs]
            assert sets[0].read == sets[1].read


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 3},
        {"precision": "bf16-mixed"},
        {"precision": "bf16-true"},
        {"gradient_clip_val": 0.1, "val_check_interval": 3},
    ],
    ids=str,
)
def test_accumulation_precision_and_clipping(plain, tmp_path, options):
    _, _, found = fit(tmp_path, CALLBACKS["both"](), **options)
    assert differences(plain(str(options), **options), found) == []


def test_the_comparison_notices_a_callback_that_disturbs(plain, tmp_path):
    class Disturbing(AnalysisCallback[float]):
        needs_probe = False

        def compute(self, context):
            return 0.0

        def describe(self, result, context):
            return Findings({"nothing": result})

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            torch.rand(1)

    _, _, found = fit(tmp_path, [Disturbing()])
    assert {"weights", "losses", "torch", "optimizer"} <= set(differences(plain("checkpoints"), found))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes(tmp_path, strategy):
    """The training is undisturbed on both ranks, and the masks and rows are those of one process."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "ignore", "-m", "tests.callbacks.two_processes", strategy, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["differences"] == []
        assert found["world_size"] == 2
        assert found["same_mask_as_one_process"] is True
        assert found["same_change_as_one_process"] is True
        assert found["same_volumes_as_one_process"] is True
        assert found["same_knowledge_as_one_process"] is True


def test_a_users_own_module_needs_at_most_an_objective_and_an_attribute(tmp_path):
    callback = GoldenParameters(n_samples=2, model_attribute="model.transformer.h", at=("end",))
    with pytest.raises(ValueError, match="pass objective="):
        fit(tmp_path, [callback], module=Finetune, max_epochs=1)
