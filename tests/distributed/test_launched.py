"""Commands of several processes that torchrun started: the numbers of one process, written once."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import yaml

from lightning_goldy.cli import main
from lightning_goldy.commands.output import Launch, joined_ranks
from lightning_goldy.core.sharding import RankError
from lightning_goldy.data import AtlasDataModule, byte_tokenizer
from lightning_goldy.training.models import build_model, complete_config, write_pretrained
from tests.commands.test_coupling import IDS, ROWS
from tests.commands.test_coupling import TINY as BYTES
from tests.distributed.launch import run_processes

TINY = {"model_type": "gpt2", "n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 64}
DATA = {"edits": 5, "batch_size": 4, "probe_size": 8}


def trained(folder: Path) -> None:
    """A run with a snapshot, a checkpoint and an optimizer's state, and a model with pieces."""
    torch.manual_seed(0)
    data = AtlasDataModule(**DATA)
    write_pretrained(build_model(complete_config(TINY, data.tokenizer)), folder / "base", tokenizer=data.tokenizer)
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}}
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_goldy.GoldyModule",
            "init_args": {"model": str(folder / "base"), "optimizer": {"learning_rate": 0.01}},
        },
        "data": {"class_path": "lightning_goldy.data.AtlasDataModule", "init_args": DATA},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 4,
            "logger": logger,
            "limit_val_batches": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [
                {"class_path": "lightning_goldy.callbacks.GoldenSnapshot"},
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": str(folder / "lightning_logs/version_0"), "filename": "{step}"},
                },
            ],
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(folder / "run.yaml")]) == 0
    model = build_model({**BYTES, **IDS})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(folder / "bytes")
    byte_tokenizer().save_pretrained(folder / "bytes")
    (folder / "pieces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def words(folder: Path, out: Path) -> dict[str, list[str]]:
    """The commands, by the name of the folder that they write to."""
    (checkpoint,) = (folder / "lightning_logs/version_0").glob("*.ckpt")
    of_run = [str(checkpoint), "--config", str(folder / "run.yaml")]
    data = ["--data", str(folder / "pieces.jsonl"), "--edits", "1", "--activation", "--out", str(out / "coupling")]
    adam = ["--preconditioner", "best", "--n-directions", "5", "--output", str(out / "basin")]
    prompts = ["--prompt", "Chad", "--max-new-tokens", "3"]
    return {
        "coupling": ["coupling", "--model", str(folder / "bytes"), *data],
        "basin": ["basin", *of_run, *adam],
        "analyze": ["analyze", *of_run, *prompts, "--output", str(out / "analyze")],
        "shard": ["analyze", *of_run, *prompts, "--output", str(out / "shard"), "--shard"],
    }


def commands(folder: str) -> dict[str, object]:
    """All of them as one rank of a world; what each ended with and printed."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    told = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    found: dict[str, object] = {}
    for name, arguments in words(Path(folder), Path(folder) / "two").items():
        # At its end Lightning takes away what it takes for its own.
        os.environ.update(told, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(io.StringIO()) as errors:
            code = main(arguments)
        found[name] = (code, shown.getvalue(), errors.getvalue())
    os.environ.update(told)
    try:
        with joined_ranks("the work") as ranks:
            if ranks.rank:
                raise ValueError("planted")
    except (ValueError, RankError) as error:
        found["failure"] = f"{type(error).__name__}: {error}"
    return found


def rows_of(folder: Path) -> dict[str, dict]:
    files = sorted(folder.glob("goldy/*/results.jsonl"))
    return {file.parent.name: json.loads(file.read_text().splitlines()[0]) for file in files}


@pytest.mark.slow
def test_commands_of_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    trained(tmp_path)
    alone = words(tmp_path, tmp_path / "one")
    for name in ("coupling", "basin", "analyze"):
        assert main(alone[name]) == 0
    first, second = run_processes(commands, 2, str(tmp_path), timeout=900)
    for name in alone:
        assert first[name][0] == second[name][0] == 0, (name, first[name], second[name])
        assert "report" in first[name][1]
        assert second[name][1] == ""
        mine = rows_of(tmp_path / "two" / name)
        wanted = rows_of(tmp_path / "one" / ("analyze" if name == "shard" else name))
        # Variants of a model need its whole parameters.
        assert wanted.keys() - mine.keys() == ({"explain_change"} if name == "shard" else set())
        for analysis, row in mine.items():
            # On shards by differences along the step: the second order as far off as the row states.
            differences = (name, analysis) == ("shard", "taylor_diff")
            error = row["result"]["error"] if differences else 0.0
            stated = dict.fromkeys(("second_order", "loss/order2", "residual/order2"), error)
            stated["second_to_first"] = error / abs(wanted[analysis]["metrics"].get("first_order") or 1.0)
            for metric, value in wanted[analysis]["metrics"].items():
                tolerance = 2e-3 if differences else 1e-5
                off = 1e-6 + (stated.get(metric, 0.0) if differences else 0.0)
                same = value if value is None else pytest.approx(value, rel=tolerance, abs=off)
                assert row["metrics"][metric] == same, (name, analysis, metric)
            if not differences:
                for part in ("forwards", "backwards"):
                    assert row["cost"][part] == wanted[analysis]["cost"][part], (name, analysis)
    one, two = (json.loads((tmp_path / each / "coupling/coupling.json").read_text()) for each in ("one", "two"))
    for found, expected in zip(*(each["gradient_analysis"]["by_layer"] for each in (two, one)), strict=True):
        numbers = [
            {key: value for key, value in part.items() if isinstance(value, float)} for part in (found, expected)
        ]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-6)
        assert numbers[0]
    assert two["knowledge_pieces"] == one["knowledge_pieces"]
    assert first["failure"] == "RankError: the work failed on rank 1: ValueError: planted"
    assert second["failure"] == "ValueError: planted"


def test_a_launch_is_told_apart_from_a_process_that_is_alone(tmp_path: Path, monkeypatch, capsys) -> None:
    assert Launch.of({"RANK": "0", "WORLD_SIZE": "1"}) is None
    with pytest.raises(ValueError, match="LOCAL_RANK and LOCAL_WORLD_SIZE and MASTER_ADDR and MASTER_PORT are missing"):
        Launch.of({"RANK": "0", "WORLD_SIZE": "2"})
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / ".metadata").touch()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").touch()
    (tmp_path / "run.yaml").write_text("trainer: {}\n")
    for checkpoint, said in (("shards", "consolidate_checkpoint"), ("model", "start it with torchrun")):
        arguments = ["analyze", str(tmp_path / checkpoint), "--config", str(tmp_path / "run.yaml")]
        assert main([*arguments, "--shard", "--output", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
