"""The tokenizer is the model's own unless another one is given."""

from __future__ import annotations

import json

import lightning.pytorch as L
import pytest
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_goldy import GoldyModule
from lightning_goldy.core.files import PlainError
from lightning_goldy.data import AtlasDataModule, KnowledgeDataModule, TextDataModule, byte_tokenizer, word_tokenizer
from lightning_goldy.training.models import build_model, complete_config, write_pretrained
from lightning_goldy.training.subject import find_tokenizer

TEXT = "the cat sat on the mat and the dog sat on the cat " * 12
CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_embd": 8, "n_positions": 64}
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
SMALL = {"block_size": 8, "batch_size": 2, "probe_size": 2}
pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


@pytest.fixture
def source(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "facts.jsonl").write_text(
        "\n".join(json.dumps({"question": f"the cat {n * 'sat '}", "answer": "on the mat"}) for n in range(9))
    )
    return tmp_path


def saved(folder, tokenizer):
    """A model's folder, with a tokenizer or without."""
    size = word_tokenizer([TEXT]) if tokenizer is None else tokenizer
    return str(write_pretrained(build_model(complete_config(CONFIG, size)), folder, tokenizer=tokenizer) or folder)


class Own(L.LightningModule):
    """A user's module around a pretrained model."""

    def __init__(self, folder):
        super().__init__()
        self.wrapped = nn.ModuleDict({"net": AutoModelForCausalLM.from_pretrained(folder)})

    def training_step(self, batch, batch_idx):
        return self.wrapped["net"](**batch).loss

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return None


def fitted(folder, module, data, **options):
    trainer = L.Trainer(max_steps=1, default_root_dir=folder, **{"enable_checkpointing": False, **QUIET, **options})
    trainer.fit(module, data)
    return trainer


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("kind", [GoldyModule, Own])
def test_data_modules_take_the_pretrained_models(source, kind):
    words = word_tokenizer([TEXT])
    folder = saved(source / "model", words)
    for data in (
        TextDataModule(source / "text.txt", **SMALL),
        KnowledgeDataModule(source / "facts.jsonl", template="{question}", probe_size=2, batch_size=2),
    ):
        # Read before there is a model, it has the bytes; nothing made of them is trained on.
        assert len(data.tokenizer) == len(byte_tokenizer())
        data.setup()
        fitted(source, kind(folder), data)
        assert data.tokenizer.get_vocab() == words.get_vocab()
        assert int(next(iter(data.train_dataloader()))["input_ids"].max()) < len(words)


def test_from_scratch_and_what_is_given_stay_as_they_are(source):
    text = TextDataModule(source / "text.txt", **SMALL)
    trainer = fitted(source, GoldyModule(CONFIG), text)
    assert (len(text.tokenizer), trainer.lightning_module.model.config.vocab_size) == (258, 258)
    atlas = AtlasDataModule(batch_size=8)
    fitted(source, GoldyModule(CONFIG), atlas)
    assert len(atlas.tokenizer) > 258
    folder = saved(source / "model", atlas.tokenizer)
    given = TextDataModule(source / "text.txt", "bytes", **SMALL)
    fitted(source, GoldyModule(folder), given)
    assert len(given.tokenizer) == 258


def test_a_folder_without_a_tokenizer_is_named(source):
    folder = saved(source / "bare", None)
    with pytest.raises(PlainError, match=rf"the model's own cannot be loaded from '{folder}'.*give tokenizer="):
        fitted(source, GoldyModule(folder), TextDataModule(source / "text.txt", **SMALL))


def test_the_models_own_is_saved_with_it_and_names_tokens(source):
    words = word_tokenizer([TEXT])
    module = GoldyModule(saved(source / "model", words), schedule={"name": "constant"})
    data = TextDataModule(source / "text.txt", words, **SMALL)
    trainer = L.Trainer(max_steps=1, default_root_dir=source / "run", **QUIET)
    trainer.fit(module, data.train_dataloader())
    assert find_tokenizer(trainer).get_vocab() == words.get_vocab()
    (folder,) = {path.parent for path in (source / "run").rglob("tokenizer.json")}
    assert AutoTokenizer.from_pretrained(folder).get_vocab() == words.get_vocab()
    bare = GoldyModule(saved(source / "bare", None))
    assert bare.export_tokenizer() is None
