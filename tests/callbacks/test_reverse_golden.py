from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_goldy.analysis import (
    Cost,
    Fluctuation,
    ReverseGoldenResult,
    compare_generations,
    reverse_golden_parameters,
)
from lightning_goldy.analysis.basin import Selection
from lightning_goldy.callbacks import ExactResume, GoldenSnapshot, ReverseGoldenParameters
from lightning_goldy.callbacks import reverse_golden_parameters as reverse_golden_module
from lightning_goldy.callbacks.reverse_golden_parameters import Generations, Search, halves
from lightning_goldy.core import CausalLMObjective, ParameterSpace, load_vectors
from lightning_goldy.report import write_report
from tests.callbacks.training import Finetune, TokenData, differences, fit

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using", "ignore:.*exists and is not empty")

QUICK = {"n_samples": 4, "search": Search(rounds=3)}
EVERYWHERE = {"every_n_steps": 5, "every_n_epochs": 1, "at": ("start", "checkpoint", "end")}


def rows_of(callback) -> list[dict]:
    return [json.loads(line) for line in (callback.folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [{}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}, {"accumulate_grad_batches": 3}],
    ids=str,
)
def test_the_training_is_not_disturbed(tmp_path, options):
    _, _, plain = fit(tmp_path / "plain", enable_checkpointing=True, **options)
    watchers = [
        ReverseGoldenParameters(**QUICK, **EVERYWHERE),
        ReverseGoldenParameters(
            5, scope="global", strategy="chaos_driven", selection=Selection(last_layers=1), name="other", **QUICK
        ),
    ]
    _, _, found = fit(tmp_path / "watched", watchers, enable_checkpointing=True, **options)
    assert differences(plain, found) == []
    assert len(rows_of(watchers[0])) >= 3
    assert len(rows_of(watchers[1])) == 1


def test_a_row_holds_what_the_function_gives(tmp_path):
    watcher = ReverseGoldenParameters(
        2, strategy="momentum_based", fluctuation=Fluctuation(amplitude=0.5, min_delta=0.0), **QUICK
    )
    trainer, module, _ = fit(tmp_path, [GoldenSnapshot(), watcher], data=TokenData(probe_size=6))
    (row,) = rows_of(watcher)
    choosing, measuring = halves(list(TokenData(probe_size=6).probe_dataloader()), CausalLMObjective(), 4)
    expected: ReverseGoldenResult = reverse_golden_parameters(
        module.model,
        choosing,
        eval_batches=measuring,
        top_k_percent=2,
        strategy="momentum_based",
        rounds=3,
        amplitude=0.5,
        min_delta=0.0,
    )
    mask, header = load_vectors(watcher.folder / row["files"]["mask"])
    assert (header.kind, header.step) == ("mask", trainer.global_step)
    assert all(torch.equal(mask[name], expected.mask[name]) for name in expected.mask)
    assert row["metrics"]["kl_divergence"] == expected.kl_divergence
    assert row["metrics"]["single_shot/gradient"] == expected.single_shots["gradient"]
    assert row["metrics"]["count"] == sum(expected.mask.count())
    assert 0 < row["metrics"]["delta_share"] < 1
    assert row["result"] == json.loads(json.dumps(expected.summary()))
    assert row["cost"]["forwards"] == expected.cost.forwards > 0
    assert row["cost"]["backwards"] == expected.cost.backwards > 0
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "The course of the search" in page
    assert "Reverse golden parameters" in page


def test_resumed_equals_uninterrupted(tmp_path):
    def callbacks(folder):
        saver = ModelCheckpoint(folder, filename="{step}", every_n_epochs=1, save_top_k=-1)
        return [ExactResume(), ReverseGoldenParameters(every_n_steps=3, **QUICK), saver]

    def results(watcher):
        rows = rows_of(watcher)
        for row in rows:
            row.pop("cost")
            row["mask"] = {
                name: each.tolist() for name, each in load_vectors(watcher.folder / row["files"]["mask"])[0].items()
            }
        return rows

    whole = callbacks(tmp_path / "whole-checkpoints")
    _, _, expected = fit(tmp_path / "whole", whole, enable_checkpointing=True)
    first = callbacks(tmp_path / "checkpoints")
    fit(tmp_path / "first", first, max_steps=11, enable_checkpointing=True)
    again = callbacks(tmp_path / "checkpoints")
    checkpoint = tmp_path / "checkpoints" / "step=8.ckpt"
    _, _, found = fit(tmp_path / "second", again, enable_checkpointing=True, ckpt_path=checkpoint)
    losses, _ = found.pop("losses"), expected.pop("losses")
    assert len(losses) == 8
    assert differences(expected, found) == []
    assert results(again[1]) == results(whole[1])
    assert results(again[1])[1]["metrics"]["jaccard_previous"] is not None


class Words:
    """Stands for a tokenizer: a letter is a token, and a token is written as something that a page must escape."""

    pad_token_id = eos_token_id = 0

    def __call__(self, text):
        return {"input_ids": [ord(char) % 50 + 1 for char in text]}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(f"<b>{each}|" for each in ids)


class WithTokenizer(TokenData):
    tokenizer = Words()


def test_generations_go_to_the_row_the_page_and_tensorboard(tmp_path):
    logger = TensorBoardLogger(tmp_path, name=None, version="run")
    generations = Generations(prompts=["abc", "<script>alert(1)</script>"], max_new_tokens=4)
    watcher = ReverseGoldenParameters(20, generations=generations, **QUICK)
    _, _, plain = fit(tmp_path / "plain", max_epochs=1)
    _, _, found = fit(tmp_path, [watcher], data=WithTokenizer(), logger=logger, max_epochs=1)
    assert differences(plain, found) == []
    (row,) = rows_of(watcher)
    assert [entry["prompt"] for entry in row["result"]["generations"]] == list(generations.prompts)
    assert row["metrics"]["kl_per_token"] > 0
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert(1)" not in page
    tag = "goldy/reverse_golden_parameters/generations/text_summary"
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0}).Reload()
    text = events.Tensors(tag)[0].tensor_proto.string_val[0].decode()
    assert "&lt;script&gt;" in text
    assert "<" not in text


def test_the_cost_of_generations_is_added(tmp_path, monkeypatch):
    def priced(*arguments, **options):
        found = compare_generations(*arguments, **options)
        object.__setattr__(found, "cost", Cost(forwards=1000))
        return found

    monkeypatch.setattr(reverse_golden_module, "compare_generations", priced)
    forwards = []
    for prompts in ([], ["abc"]):
        watcher = ReverseGoldenParameters(generations=Generations(prompts=prompts, max_new_tokens=4), **QUICK)
        fit(tmp_path / str(len(prompts)), [watcher], data=WithTokenizer(), max_epochs=1)
        forwards.append(rows_of(watcher)[0]["cost"]["forwards"])
    assert forwards[1] == forwards[0] + 1000


def test_prompts_without_a_tokenizer_are_refused_before_the_first_step(tmp_path):
    watcher = ReverseGoldenParameters(generations=Generations(prompts=["abc"]), **QUICK)
    with pytest.raises(ValueError, match="prompts need a tokenizer"):
        fit(tmp_path, [watcher])


def test_halves_share_no_sample_and_leave_none_out():
    batches = [{"input_ids": torch.arange(12).view(6, 2)}, {"input_ids": torch.arange(12, 20).view(4, 2)}]
    for n_samples in range(2, 11):
        first, second = halves(batches, CausalLMObjective(), n_samples)
        parts = [torch.cat([batch["input_ids"] for batch in half]) for half in (first, second)]
        assert torch.equal(torch.cat(parts).flatten(), torch.arange(2 * n_samples))
        assert len(parts[0]) - len(parts[1]) == n_samples % 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k_percent": 0}, r"top_k_percent must lie in \(0, 100\]"),
        ({"strategy": "choas_driven"}, "did you mean 'chaos_driven'"),
        ({"scope": "model"}, "unknown scope 'model'"),
        ({"n_samples": 1}, "n_samples must be at least 2"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        ReverseGoldenParameters(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "g"}, "unknown score 'g'"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"cache": "x"}, "cache 'x'"),
    ],
)
def test_a_search_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Search(**options)


def test_the_space_is_the_selected_one(tmp_path):
    selection = Selection(include=["*mlp*weight"], last_layers=1)
    watcher = ReverseGoldenParameters(selection=selection, **QUICK)
    fit(tmp_path, [watcher], max_epochs=1)
    mask, _ = load_vectors(watcher.folder / rows_of(watcher)[0]["files"]["mask"])
    assert mask.space.names == ParameterSpace.of(Finetune().model, ["*mlp*weight"], (), 1).names


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes(tmp_path, strategy):
    """The training is undisturbed on both ranks, and the mask is the one of one process."""
    root = Path(__file__).parents[2]
    module = "tests.callbacks.reverse_golden_processes"
    command = [sys.executable, "-W", "ignore", "-m", module, strategy, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(2):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert found["differences"] == []
        assert found["world_size"] == 2
        assert found["count"][0] == found["count"][1]
        assert found["swapped"] <= 0.02
        assert found["kl"] == pytest.approx(1.0, abs=1e-3)
