"""``goldy basin``."""

from __future__ import annotations

import json
import math
import pickle
import shlex

import lightning.pytorch as L
import pytest
import torch
import yaml

from lightning_goldy.analysis import adam_preconditioner, kronecker_preconditioner
from lightning_goldy.analysis.basin import basin_volume
from lightning_goldy.cli import main
from lightning_goldy.commands.checkpoints import positions, read_saved
from lightning_goldy.commands.fit import _OneBatch
from lightning_goldy.core import ParameterSpace
from lightning_goldy.data import AtlasDataModule
from lightning_goldy.training.models import build_model, complete_config, write_pretrained
from lightning_goldy.training.module import GoldyModule

TINY = {"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2, "n_positions": 64}
DATA = {"edits": 5, "batch_size": 8, "probe_size": 8}
# Two short runs in one process share a folder for checkpoints.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run with a checkpoint and a pretrained folder at steps 3 and 6, and the start that both come from."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    data = AtlasDataModule(**DATA)
    write_pretrained(build_model(complete_config(TINY, data.tokenizer)), folder / "base", tokenizer=data.tokenizer)
    saver = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(folder / "saved"), "filename": "{step}", "every_n_epochs": 1, "save_top_k": -1},
    }
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "lightning_goldy.GoldyModule",
            "init_args": {"model": str(folder / "base"), "schedule": {"name": "linear", "warmup_fraction": 0.1}},
        },
        "data": {"class_path": "lightning_goldy.data.AtlasDataModule", "init_args": DATA},
        "trainer": {
            "accelerator": "cpu",
            "default_root_dir": str(folder / "root"),
            "max_epochs": 2,
            "logger": False,
            "limit_val_batches": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [saver],
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    assert main(["fit", "--config", str(folder / "run.yaml")]) == 0
    return folder


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(folder):
    return [json.loads(line) for line in (folder / "goldy/basin_volume/results.jsonl").read_text().splitlines()]


def model_of(path):
    return GoldyModule(str(path.with_suffix(""))).model.eval()


def test_rows_are_what_the_function_finds(trained, here, capsys):
    paths = [trained / "saved" / f"step={step}.ckpt" for step in (6, 3)]
    words = shlex.split("--n-directions 3 --cutoff 0.02 --seed 5 --output out")
    assert main(["basin", *map(str, paths), "--config", str(trained / "run.yaml"), *words]) == 0
    found = rows(here / "out")
    assert [(row["step"], row["epoch"]) for row in found] == [(3, 0), (6, 1)]
    batches = list(AtlasDataModule(**DATA).probe_dataloader())
    # Both are measured at the sigma of the first.
    sigma = None
    for row, path in zip(found, reversed(paths), strict=True):
        assert row["result"]["checkpoint"] == str(path)
        expected = basin_volume(model_of(path), batches, n_directions=3, cutoff=0.02, seed=5, sigma=sigma)
        sigma = expected.sigma
        assert row["result"]["volumes"][0]["estimates"] == pytest.approx(expected.estimates.tolist(), rel=1e-9)
        assert row["metrics"]["sigma"] == sigma
    shown = capsys.readouterr().out
    assert "step=3.ckpt" in shown
    assert f"{found[1]['metrics']['log_volume']:,.0f}"[:4] in shown
    page = (here / "out" / "report.html").read_text()
    assert "The volume over the run" in page
    assert yaml.safe_load((here / "out" / "config.yaml").read_text())["model"]["init_args"]["model"]


@pytest.mark.parametrize(("configured", "read"), [(7, 7), (0.5, 0.5), (0, 1.0)])
def test_the_ignored_evaluation_is_short_and_the_validation_set_is_not(configured, read):
    trainer = L.Trainer(limit_val_batches=configured, logger=False, enable_checkpointing=False, accelerator="cpu")
    callback = _OneBatch(trainer)
    assert trainer.limit_val_batches == 1
    callback.on_validation_start(trainer, L.LightningModule())
    assert trainer.limit_val_batches == read


def test_a_pretrained_folder_gives_the_volume_of_its_checkpoint(trained, here):
    base = ["--config", str(trained / "run.yaml"), "--n-directions", "2"]
    assert main(["basin", str(trained / "saved/step=6.ckpt"), *base, "--output", "one"]) == 0
    assert main(["basin", str(trained / "saved/step=6"), *base, "--output", "two"]) == 0
    (one,), (two,) = rows(here / "one"), rows(here / "two")
    assert one["step"] == two["step"] == 6
    assert one["result"]["volumes"] == two["result"]["volumes"]


def test_the_configuration_that_a_run_saved_serves(trained, here):
    # A limit in steps alone, from which the length of the learning rate's schedule follows.
    limits = ["--trainer.max_epochs=null", "--trainer.max_steps=1", "--trainer.callbacks=null"]
    assert main(["fit", "--config", str(trained / "run.yaml"), *limits]) == 0
    (config,) = (trained / "root").rglob("config-1.yaml")
    assert "ckpt_path" in yaml.safe_load(config.read_text())
    words = [str(trained / "saved/step=3.ckpt"), "--n-directions", "2", "--preconditioner", "adam"]
    assert main(["basin", *words, "--config", str(config), "--output", "saved"]) == 0
    assert main(["basin", *words, "--config", str(trained / "run.yaml"), "--output", "own"]) == 0
    (saved,), (own,) = rows(here / "saved"), rows(here / "own")
    assert saved["result"]["volumes"] == own["result"]["volumes"]


def test_adam_comes_from_the_checkpoint(trained, here):
    path = trained / "saved" / "step=6.ckpt"
    words = shlex.split("--preconditioner best --n-directions 2 --output out")
    assert main(["basin", str(path), "--config", str(trained / "run.yaml"), *words]) == 0
    (row,) = rows(here / "out")
    module = GoldyModule(str(path.with_suffix("")), schedule={"name": "constant"})
    optimizer = module.configure_optimizers()["optimizer"]
    optimizer.load_state_dict(torch.load(path, weights_only=True)["optimizer_states"][0])
    space = ParameterSpace.of(module.model)
    proposal = adam_preconditioner(optimizer, space, module=module.model, eps=row["metrics"]["eps"])
    batches = list(AtlasDataModule(**DATA).probe_dataloader())
    expected = basin_volume(
        module.model.eval(), batches, n_directions=2, preconditioner={"none": None, "adam": proposal}
    )
    found = row["result"]["volumes"][0]["proposals"]
    assert found["none"]["log_volume"] == pytest.approx(expected.proposals["none"]["log_volume"], rel=1e-9)
    # Scales that are computed in another order differ in their last float32 digit.
    assert found["adam"]["log_volume"] == pytest.approx(expected.proposals["adam"]["log_volume"], rel=1e-6)


def test_kronecker_needs_no_optimizer(trained, here):
    folder = trained / "saved" / "step=6"
    words = shlex.split("--preconditioner kronecker --n-directions 2 --n-samples 4 --output out")
    assert main(["basin", str(folder), "--config", str(trained / "run.yaml"), *words]) == 0
    (row,) = rows(here / "out")
    model = GoldyModule(str(folder)).model.eval()
    batches = list(AtlasDataModule(**DATA).probe_dataloader())
    batches = [{name: value[:4] for name, value in batches[0].items()}]
    proposal = kronecker_preconditioner(model, batches, eps=row["metrics"]["eps"])
    expected = basin_volume(model, batches, n_directions=2, preconditioner=proposal)
    (volume,) = row["result"]["volumes"]
    assert volume["preconditioner"] == "kronecker"
    assert volume["estimates"] == pytest.approx(expected.estimates.tolist(), rel=1e-9)
    assert row["cost"]["backwards"] == 4


def test_splits_cutoffs_and_a_given_sigma(trained, here):
    words = shlex.split("--splits --cutoff 0.1 --cutoff 0.01 --sigma 0.5 --n-samples 4 --n-directions=2")
    paths = [str(trained / "saved" / "step=3.ckpt")] * 2
    assert main(["basin", *paths, "--config", str(trained / "run.yaml"), *words]) == 0
    assert main(["basin", *paths[:1], "--config", str(trained / "run.yaml"), *words, "--data.edits=6"]) == 0
    found = rows(here / "runs" / "basin" / "version_0")
    # The same step twice: numbered as they were given.
    assert [row["step"] for row in found] == [0, 1]
    labels = ["clean-0.01", "clean-0.1", "memorised-0.01", "memorised-0.1"]
    assert [volume["label"] for volume in found[0]["result"]["volumes"]] == labels
    assert found[0]["result"]["volumes"] == found[1]["result"]["volumes"]
    assert {row["metrics"]["sigma"] for row in found} == {0.5}
    (other,) = rows(here / "runs" / "basin" / "version_1")
    assert other["result"]["volumes"][0]["estimates"] != found[0]["result"]["volumes"][0]["estimates"]


def test_the_training_is_left_alone(trained, here):
    before = sorted(path.relative_to(trained) for path in trained.rglob("*"))
    main(["basin", str(trained / "saved/step=3.ckpt"), "--config", str(trained / "run.yaml"), "--n-directions", "2"])
    assert sorted(path.relative_to(trained) for path in trained.rglob("*")) == before
    assert [path.name for path in here.iterdir()] == ["runs"]


def refuse(capsys, *words):
    assert main(["basin", *map(str, words)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("goldy: ")
    assert "Traceback" not in message
    return message


def test_what_is_no_checkpoint_is_refused(trained, here, capsys):
    config = ["--config", trained / "run.yaml"]
    assert "no checkpoint at nowhere.ckpt" in refuse(capsys, "nowhere.ckpt", *config)
    (here / "empty").mkdir()
    assert "holds .safetensors files; this one has none" in refuse(capsys, "empty", *config)
    (here / "bad.ckpt").write_bytes(b"no zip")
    assert "bad.ckpt: not a whole checkpoint" in refuse(capsys, "bad.ckpt", *config)

    class Evil:
        def __reduce__(self):
            return (open, ("ran", "w"))

    torch.save({"state_dict": {}, "more": Evil()}, here / "evil.ckpt", pickle_module=pickle)
    assert "no code in it is run" in refuse(capsys, "evil.ckpt", *config)
    assert not (here / "ran").exists()
    torch.save({"weights": {}}, here / "other.ckpt")
    assert "has a 'state_dict'; this one has ['weights']" in refuse(capsys, "other.ckpt", *config)
    torch.save({"state_dict": {"model.x": torch.zeros(1)}}, here / "misfit.ckpt")
    assert "does not fit the configuration's GoldyModule" in refuse(capsys, "misfit.ckpt", *config)


def test_adam_needs_the_optimizers_state(trained, here, capsys):
    words = ["--config", trained / "run.yaml", "--preconditioner", "adam"]
    message = refuse(capsys, trained / "saved/step=3", *words)
    assert "has no optimizer state; give the Lightning checkpoint" in message
    checkpoint = torch.load(trained / "saved/step=3.ckpt", weights_only=True)
    torch.save({**checkpoint, "optimizer_states": []}, here / "light.ckpt")
    assert "was saved without the optimizer's state" in refuse(capsys, "light.ckpt", *words)


def test_bad_options_are_refused(trained, here, capsys):
    words = [trained / "saved/step=3.ckpt", "--config", trained / "run.yaml"]
    assert "cutoff must be positive" in refuse(capsys, *words, "--cutoff", "-1")
    assert "n_samples=99, but the probe holds only 8" in refuse(capsys, *words, "--n-samples", "99", "--output", "out")
    (here / "out/goldy/basin_volume").mkdir(parents=True, exist_ok=True)
    (here / "out/goldy/basin_volume/results.jsonl").write_text("{}\n")
    assert "holds rows of basin_volume already; give another --output" in refuse(capsys, *words, "--output", "out")
    with pytest.raises(SystemExit) as exit_:
        main(["recipes", "list", "--data.edits=5"])
    assert exit_.value.code == 2
    assert "unrecognized arguments: --data.edits=5" in capsys.readouterr().err


def test_checkpoints_without_steps_keep_their_order(trained):
    known = [read_saved(trained / "saved" / f"step={step}.ckpt") for step in (6, 3)]
    assert [step for step, _ in positions(known)] == [3, 6]
    unknown = [read_saved(trained / "base"), *known]
    assert [(step, each.path.name) for step, each in positions(unknown)] == [
        (0, "base"),
        (1, "step=6.ckpt"),
        (2, "step=3.ckpt"),
    ]
    assert all(math.isfinite(step) for step, _ in positions(unknown))
