"""What the user gave and what files hold is told in plain lines: which file, what is wrong, no control character."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from rich.console import Console
from torch import nn

from lightning_goldy import ParameterMask, ParameterSpace
from lightning_goldy.callbacks import (
    AttentionTracker,
    BasinVolume,
    GoldenParameters,
    GoldenSnapshot,
    KnowledgeCoupling,
    ParameterDistribution,
    ReverseGoldenParameters,
    TaylorDiff,
    VariantLosses,
)
from lightning_goldy.callbacks.base import AnalysisCallback
from lightning_goldy.callbacks.finetune_comparison import Finetune, comparison_table
from lightning_goldy.callbacks.knowledge_coupling import _pieces
from lightning_goldy.cli import main
from lightning_goldy.commands.checkpoints import read_saved
from lightning_goldy.core import StoreError
from lightning_goldy.optim import OptimizerOptions
from lightning_goldy.optim.schedules import ScheduleOptions, options_of
from lightning_goldy.report.formatting import console_table
from lightning_goldy.training.models import LoraOptions
from lightning_goldy.training.module import _unpacked
from lightning_goldy.training.recipes import Recipe

ESCAPE = "\x1b[31m"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            b"model:\n  model: caf\xe9\n",
            r"the configuration a\.yaml is not UTF-8 text: byte 19 is 0xe9; save it as",
        ),
        (b" \n", r"the configuration a\.yaml is empty"),
        (b"model: [\n", r"the configuration a\.yaml is not YAML: .*line 2, column 1"),
        (b"a: \x07", r"the configuration a\.yaml is not YAML: "),
        (b"[" * 600, r"the configuration a\.yaml is not YAML: "),
    ],
)
def test_configurations_that_cannot_be_read(content: bytes, match: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_bytes(content)
    for word in (["--config", "a.yaml"], ["--config=a.yaml"], ["-c", "a.yaml"]):
        assert main(["fit", *word]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.match(f"goldy: {match}", line)
        assert line.isprintable()
    torch.save({"state_dict": {"a": torch.zeros(1)}}, "a.ckpt")
    assert main(["analyze", "a.ckpt", "--config", "a.yaml"]) == 2
    assert "goldy: the configuration a.yaml is " in capsys.readouterr().err


@pytest.mark.parametrize("text", ['model:\n  class_path: "\\e[31mred"\n', 'trainer:\n  max_steps: "\\e[31mred"\n'])
def test_values_of_a_configuration_steer_no_terminal(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.yaml").write_text(text)
    with pytest.raises(SystemExit):
        main(["fit", "--config", "a.yaml"])
    told = capsys.readouterr().err
    assert "\\x1b[31mred" in told
    assert "\x1b" not in told


def test_files_of_no_text_are_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("a.txt").write_bytes(b"caf\xe9")
    Path("a.yaml").write_text("seed_everything: 1\n")
    Path("a.ckpt").write_bytes(b"")
    assert main(["fit", "--config", "a.yaml", "--ckpt_path", "a.ckpt"]) == 2
    assert "--ckpt_path a.ckpt: an empty file, of 0 bytes, is no checkpoint" in capsys.readouterr().err
    monkeypatch.setattr("lightning_goldy.cli.find_recipe", lambda name: Recipe(name, "recipes", Path("a.txt")))
    for words, told in (
        (["analyze", "a.ckpt", "--config", "a.yaml", "--prompts", "a.txt"], "a.txt is not UTF-8 text: byte 3 is 0xe9"),
        (["analyze", "a.ckpt", "--config", "a.yaml"], "a.ckpt: not a whole checkpoint"),
        (["recipes", "show", "a"], "the recipe a.txt is not UTF-8 text: byte 3 is 0xe9"),
        (["data", "show", "a.txt"], "a.txt is not UTF-8 text: byte 3 is 0xe9"),
        (["masks", "show", f"{ESCAPE}gone"], "\\x1b[31mgone: no such file"),
        (["report", f"{ESCAPE}gone"], "run directory \\x1b[31mgone does not exist"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert f"goldy: {told}" in error
        assert error.count("\n") == 1
        assert error[:-1].isprintable()


def test_names_in_files_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    space = ParameterSpace((f"h.0{ESCAPE}.weight", f"{ESCAPE}.1.weight"), (torch.Size([4]),) * 2, (torch.float32,) * 2)
    for name in ("a", f"b{ESCAPE}"):
        ParameterMask.random(space, 50.0).save(name, model=f"Net{ESCAPE}")
    Path("pieces.jsonl").write_text(
        json.dumps({"id": ESCAPE, "question": f"a{ESCAPE}b?", "answer": f"{ESCAPE}c", "category": f"d{ESCAPE}"}) + "\n"
    )
    for words in (
        ["masks", "show", "a"],
        ["masks", "compare", "a", f"b{ESCAPE}"],
        ["masks", "combine", "and", "a", f"b{ESCAPE}", "--output", f"c{ESCAPE}"],
        ["data", "show", "pieces.jsonl"],
        ["data", "convert", "pieces.jsonl", "--output", f"d{ESCAPE}.jsonl"],
    ):
        assert main(words) == 0
        shown = capsys.readouterr().out
        assert "\x1b" not in shown
        assert "\\x1b[31m" in shown


def test_tables_of_results_steer_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for table in (
        console_table("Counts", ["what"], [[ESCAPE]]),
        comparison_table([Finetune(f"[red]{ESCAPE}", 4, 0.5, {f"val/{ESCAPE}": 1.25})], 4),
    ):
        Console().print(table)
        shown = capsys.readouterr().out
        assert "\x1b" not in shown
        assert "\\x1b[31m" in shown


# Two callbacks


class Second(GoldenSnapshot):
    pass


def _trainer(callbacks: list[AnalysisCallback[Any]]) -> L.Trainer:
    return L.Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu")  # type: ignore[arg-type]


def test_two_callbacks_without_names_are_told_how_to_get_them() -> None:
    for pair in ([GoldenSnapshot(), GoldenSnapshot()], [TaylorDiff(name="a"), TaylorDiff(name="a")]):
        with pytest.raises(ValueError, match=r"two callbacks are called '\w+'.*give each of them its own name="):
            _trainer(pair)  # type: ignore[arg-type]
    first, second = GoldenSnapshot(), Second()
    _trainer([first, second, GoldenSnapshot(name="other")])
    assert first.state_key == "GoldenSnapshot[golden_snapshot]" == GoldenSnapshot().state_key[:]
    assert {first.state_key: 1} == {"GoldenSnapshot[golden_snapshot]": 1}


# Settings and what checkpoints hold


@pytest.mark.parametrize(
    ("kind", "settings", "match"),
    [
        (OptimizerOptions, {"learning_rate": math.inf}, "optimizer.learning_rate must be a finite number; got inf"),
        (OptimizerOptions, {"learning_rate": "1e-4"}, "optimizer.learning_rate must be a finite number; got '1e-4'"),
        (OptimizerOptions, {"learning_rate": 10**400}, "optimizer.learning_rate must be a finite number; got 1000"),
        (OptimizerOptions, {"weight_decay": math.inf}, "optimizer.weight_decay must be a finite number"),
        (OptimizerOptions, {"eps": math.nan}, "optimizer.eps must be a finite number"),
        (OptimizerOptions, {"betas": 3}, "optimizer.betas must be two numbers"),
        (OptimizerOptions, {"betas": ["a", ESCAPE]}, "each of optimizer.betas must be a finite number; got 'a'"),
        (OptimizerOptions, {"mask": 3, "name": "masked_adamw"}, "optimizer.mask is a file or a callback's name; got 3"),
        (ScheduleOptions, {"warmup_steps": math.nan}, "schedule.warmup_steps must be a whole number; got nan"),
        (ScheduleOptions, {"warmup_steps": True}, "schedule.warmup_steps must be a whole number; got True"),
        (ScheduleOptions, {"final_fraction": "x"}, "schedule.final_fraction must be a finite number; got 'x'"),
        (LoraOptions, {"rank": 2.5}, "lora.rank must be a whole number; got 2.5"),
        (LoraOptions, {"alpha": math.inf}, "lora.alpha must be a finite number; got inf"),
    ],
)
def test_settings_that_are_no_numbers(kind: type, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        options_of(kind, "settings", settings)


@pytest.mark.parametrize(
    ("kind", "setting", "whole"),
    [
        (AttentionTracker, "n_samples", True),
        (BasinVolume, "n_directions", True),
        (GoldenParameters, "n_samples", True),
        (GoldenParameters, "top_k_percent", False),
        (GoldenParameters, "quorum", False),
        (KnowledgeCoupling, "n_pieces", True),
        (ParameterDistribution, "top", True),
        (ReverseGoldenParameters, "n_samples", True),
        (ReverseGoldenParameters, "top_k_percent", False),
        (TaylorDiff, "every_n_steps", True),
        (TaylorDiff, "n_samples", True),
        (VariantLosses, "n_samples", True),
    ],
)
def test_settings_of_callbacks_that_are_no_numbers(kind: type, setting: str, whole: bool) -> None:
    for value in (math.nan, math.inf, "x", [1], {}, True, *([2.5] if whole else [])):
        with pytest.raises(ValueError, match=rf"{setting} must be a (whole|finite) number; got ") as error:
            kind(**{setting: value})
        assert str(error.value).isprintable()


def test_a_piece_that_is_none_is_told_on_one_line() -> None:
    batch = {"input_ids": torch.zeros(3, 9, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"list of KnowledgePiece; one of it is dict, \{'input_ids': tensor") as error:
        _pieces([batch], None)  # type: ignore[list-item]
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "change", [{"global_step": "a"}, {"global_step": -1}, {"global_step": 10**400}, {"epoch": 1.5}]
)
def test_checkpoints_with_steps_that_are_none(change: dict[str, Any]) -> None:
    torch.save({"state_dict": nn.Linear(1, 1).state_dict(), "global_step": 1, "epoch": 0, **change}, "a.ckpt")
    with pytest.raises(StoreError, match=rf"a\.ckpt: its '{next(iter(change))}' is no number of a training, but"):
        read_saved("a.ckpt")


def test_a_mask_in_a_checkpoint_that_is_none() -> None:
    sound = {"packed": torch.zeros(0, dtype=torch.int32), "encoding": "int32", "shape": [64]}
    assert not _unpacked({"a": sound})["a"].any()
    for spoilt in (
        {"a": {**sound, "shape": [10**12]}},
        {"a": {**sound, "shape": "x"}},
        {"a": {**sound, "encoding": ["bits"]}},
        {"a": {**sound, "packed": 3}},
        {"a": {}},
        {"a": 3},
        [1],
    ):
        with pytest.raises(StoreError, match="the checkpoint's"):
            _unpacked(spoilt)  # type: ignore[arg-type]
