"""The folder in Hugging Face format beside every checkpoint."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import AsyncCheckpointIO, TorchCheckpointIO
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_goldy import GoldyModule
from lightning_goldy.core import HeadGates
from lightning_goldy.data import AtlasDataModule
from lightning_goldy.training import models as export
from lightning_goldy.training.models import LoraOptions, PretrainedExport, pretrained_folder, write_pretrained
from tests.references.models import build

CONFIG = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32}


def _fit(folder, module, **options):
    checkpoint = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=2, monitor="step", mode="max", save_last=True
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=4,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint],
        **options,
    )
    trainer.fit(module, AtlasDataModule(batch_size=8, tokenizer="words"))
    return trainer


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("plugins", [[], [AsyncCheckpointIO()]], ids=["plain", "asynchronous"])
def test_every_checkpoint_that_stays_has_a_folder_with_its_weights(tmp_path, plugins):
    _fit(tmp_path, GoldyModule(CONFIG), plugins=plugins)
    assert _names(tmp_path) == ["last", "last.ckpt", "step=3", "step=3.ckpt", "step=4", "step=4.ckpt"]
    for path in tmp_path.glob("*.ckpt"):
        saved = torch.load(path, weights_only=True)["state_dict"]
        model = AutoModelForCausalLM.from_pretrained(pretrained_folder(path))
        assert model.lm_head.weight is model.transformer.wte.weight
        for name, value in model.state_dict().items():
            assert torch.equal(value, saved[f"model.{name}"]), name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "last")
    assert (
        tokenizer("The capital of France").input_ids == AtlasDataModule().tokenizer("The capital of France").input_ids
    )


def test_lora_leaves_an_adapter(tmp_path):
    base = GoldyModule({**CONFIG, "vocab_size": 653}).model
    base.save_pretrained(tmp_path / "base")
    module = GoldyModule(str(tmp_path / "base"), lora=LoraOptions(rank=2), optimizer={"learning_rate": 0.1})
    _fit(tmp_path / "run", module)
    folder = tmp_path / "run" / "step=4"
    assert not (folder / "model.safetensors").exists()
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), folder).eval()
    ids = torch.arange(9)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, module.model.eval()(ids).logits)
        assert not torch.allclose(again(ids).logits, base.eval()(ids).logits)


def test_a_checkpoint_saved_by_hand_after_training_has_one_too(tmp_path):
    trainer = _fit(tmp_path / "run", GoldyModule(CONFIG))
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    assert (tmp_path / "final" / "config.json").is_file()


def test_another_module_on_the_same_trainer_is_not_exported(tmp_path):
    trainer = _fit(tmp_path / "run", GoldyModule(CONFIG))
    trainer.strategy.connect(L.LightningModule())
    trainer.strategy.checkpoint_io.save_checkpoint({"state_dict": {"weight": torch.ones(1)}}, tmp_path / "other.ckpt")
    assert _names(tmp_path) == ["other.ckpt", "run"]


def test_removal_leaves_folders_of_others_alone(tmp_path):
    (tmp_path / "step=1").mkdir()
    (tmp_path / "step=1" / "notes.txt").write_text("mine")
    (tmp_path / "step=1.ckpt").write_text("")
    PretrainedExport(TorchCheckpointIO(), L.Trainer(logger=False)).remove_checkpoint(tmp_path / "step=1.ckpt")
    assert _names(tmp_path) == ["step=1"]


def test_weights_that_spawned_processes_hand_back_are_no_checkpoint(tmp_path):
    """Lightning's launcher writes a bare state dict through the plugin at the end of a fit under ``ddp_spawn``."""
    weights, path = {"model.weight": torch.ones(2)}, tmp_path / ".temp.ckpt"
    PretrainedExport(TorchCheckpointIO(), L.Trainer(logger=False)).save_checkpoint(weights, path)
    assert torch.equal(torch.load(path)["model.weight"], weights["model.weight"])
    assert [*tmp_path.iterdir()] == [path]


def test_sharded_checkpoints_are_announced_to_have_none():
    trainer = L.Trainer(logger=False)
    trainer.strategy._save_distributed_checkpoint = True
    before = trainer.strategy.checkpoint_io
    with pytest.warns(UserWarning, match="save_distributed_checkpoint=False"):
        export.attach_export(trainer)
    assert trainer.strategy.checkpoint_io is before


@pytest.mark.parametrize("exists", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch, exists):
    model = GoldyModule({**CONFIG, "vocab_size": 16}).model
    target = tmp_path / "model"
    if exists:
        write_pretrained(model, target)
        before = (target / "model.safetensors").read_bytes()

    def fail(folder, **options):
        Path(folder).mkdir()
        (Path(folder) / "config.json").write_text("half")
        raise OSError("the disk is full")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk is full"):
        write_pretrained(model, target)
    assert _names(tmp_path) == (["model"] if exists else [])
    assert not exists or (target / "model.safetensors").read_bytes() == before


def test_writing_replaces_a_folder_whole(tmp_path):
    model = GoldyModule({**CONFIG, "vocab_size": 16}).model
    target = tmp_path / "model"
    write_pretrained(model, target)
    (target / "stale.txt").write_text("old")
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    write_pretrained(model, target)
    assert "stale.txt" not in _names(target)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(target).lm_head.weight, model.lm_head.weight)
    assert _names(tmp_path) == ["model"]


def test_save_pretrained_of_another_module_says_what_can(tmp_path):
    with pytest.raises(TypeError, match="Linear has no save_pretrained"):
        GoldyModule(nn.Linear(2, 2), objective="classifier").save_pretrained(tmp_path / "x")


def test_save_pretrained_without_a_trainer(tmp_path):
    module = GoldyModule(CONFIG, tokenizer="bytes")
    module.save_pretrained(tmp_path / "model")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "model")) == 258
    assert GoldyModule(str(tmp_path / "model")).model.config.vocab_size == 258


@pytest.mark.parametrize("kind", ["buffer", "parameter"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
def test_closed_heads_are_closed_in_plain_transformers_too(tmp_path, family, kind):
    model = build(family).eval()
    gates = HeadGates(model, kind=kind)
    gates.disable([(0, 1), (1, 0)])
    if gates.values is not None:
        gates.values.data[0, 0] = 0.5
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(8).reshape(2, 4)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        folder = write_pretrained(model, tmp_path / "saved")
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        torch.testing.assert_close(plain(input_ids=ids).logits, expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    card = (folder / "README.md").read_text()
    assert f"2 of {len(gates.heads)} attention heads were closed" in card
    assert f"| 1 | {gates.heads_per_layer[1]} | 0 |" in card


def test_an_adapter_says_that_it_closes_no_head(tmp_path):
    model = get_peft_model(build("llama"), LoraConfig(target_modules=["o_proj"], r=2))
    HeadGates(model).disable([(0, 1)])
    with pytest.warns(UserWarning, match="an adapter, which cannot close the 1 closed heads"):
        folder = write_pretrained(model, tmp_path / "adapter")
    assert "do not close them" in (folder / "README.md").read_text()
