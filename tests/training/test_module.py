"""GoldyModule: what it builds, logs, saves and loads."""

from __future__ import annotations

import math

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_goldy import ClassifierObjective, FunctionObjective, GoldyModule
from lightning_goldy.core.tasks import task_of
from lightning_goldy.data import AtlasDataModule
from lightning_goldy.optim import OptimizerOptions, ScheduleOptions
from lightning_goldy.training.models import LoraOptions

CONFIG = {"model_type": "gpt2", "n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32}
VOCABULARY = {**CONFIG, "vocab_size": 16}


def _trainer(folder, **options):
    defaults = {"max_steps": 2, "limit_val_batches": 1, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", default_root_dir=folder, logger=False, **{**defaults, **options})


def _tokens(*lengths, seed=0):
    """One batch per length, of 3 samples."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, 16, (3, length), generator=generator) for length in lengths]
    return DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=None)


class Recorder(L.Callback):
    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.callback_metrics["train/loss"].item())
        self.rates.append(trainer.callback_metrics["train/learning_rate"].item())


def test_a_missing_vocabulary_comes_from_the_data_module(tmp_path):
    data = AtlasDataModule(batch_size=8)
    module = GoldyModule(CONFIG)
    with pytest.raises(AttributeError):
        _ = module.model
    _trainer(tmp_path, enable_checkpointing=False).fit(module, data)
    assert module.model.config.vocab_size == len(data.tokenizer)
    assert module.model.config.eos_token_id == data.tokenizer.eos_token_id
    assert module.hparams["model"]["vocab_size"] == len(data.tokenizer)
    assert "vocab_size" not in CONFIG


def test_without_any_tokenizer_the_missing_vocabulary_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"no vocab_size.*n_layer"):
        _trainer(tmp_path).fit(GoldyModule(CONFIG), _tokens(8), _tokens(8))


def test_an_own_tokenizer_builds_the_model_at_once():
    module = GoldyModule(CONFIG, tokenizer="bytes")
    assert module.model.config.vocab_size == 258


def test_a_seed_decides_the_weights():
    def weights():
        torch.manual_seed(3)
        return GoldyModule(VOCABULARY).model.state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_epoch_metrics_weigh_every_token_equally(tmp_path):
    module = GoldyModule(VOCABULARY)
    batches = list(_tokens(5, 17))
    results = _trainer(tmp_path, limit_val_batches=2).validate(module, _tokens(5, 17), verbose=False)[0]
    module.model.eval()
    losses, hits = [], []
    with torch.no_grad():
        for batch in batches:
            logits = module.model(batch["input_ids"]).logits[:, :-1].flatten(0, 1)  # [B, T, V] -> [B (T-1), V]
            targets = batch["labels"][:, 1:].flatten()
            losses.append(nn.functional.cross_entropy(logits, targets, reduction="none"))
            hits.append(logits.argmax(-1) == targets)
    mean = torch.cat(losses).mean().item()
    assert results["val/loss"] == pytest.approx(mean, rel=1e-5)
    assert results["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert results["val/token_accuracy"] == pytest.approx(torch.cat(hits).float().mean().item())


def test_a_loss_that_is_not_a_number_shows(tmp_path):
    module = GoldyModule(VOCABULARY)
    with torch.no_grad():
        module.model.transformer.wte.weight[3] = math.nan
    results = _trainer(tmp_path, limit_val_batches=2).validate(module, _tokens(5, 17), verbose=False)[0]
    assert math.isnan(results["val/loss"])


def test_training_logs_the_step_and_the_epoch(tmp_path):
    trainer = _trainer(tmp_path, max_epochs=1, max_steps=-1, enable_checkpointing=False)
    trainer.fit(GoldyModule(VOCABULARY), _tokens(5, 9), _tokens(5))
    names = set(trainer.callback_metrics)
    for name in ("loss", "perplexity", "token_accuracy"):
        assert {f"train/{name}", f"train/{name}_epoch", f"val/{name}"} <= names
    assert trainer.callback_metrics["train/perplexity"] == pytest.approx(
        math.exp(trainer.callback_metrics["train/loss"]), rel=1e-5
    )


def test_the_learning_rate_moves_per_optimizer_step(tmp_path):
    recorder = Recorder()
    module = GoldyModule(
        VOCABULARY,
        optimizer=OptimizerOptions(learning_rate=0.1),
        schedule=ScheduleOptions("linear", warmup_steps=2, final_fraction=0.0),
    )
    options = {"max_steps": 4, "accumulate_grad_batches": 2, "callbacks": [recorder], "enable_checkpointing": False}
    _trainer(tmp_path, **options).fit(module, _tokens(*[6] * 8), _tokens(6))
    assert recorder.rates[::2] == pytest.approx([0.05, 0.1, 0.1, 0.05])


def test_a_warmup_longer_than_the_run_is_refused(tmp_path):
    module = GoldyModule(VOCABULARY, schedule={"warmup_steps": 100})
    with pytest.raises(ValueError, match="100 is longer than the run of 2"):
        _trainer(tmp_path).fit(module, _tokens(6), _tokens(6))


def test_training_learns(tmp_path):
    recorder = Recorder()
    module = GoldyModule(VOCABULARY, optimizer={"learning_rate": 1e-2}, schedule={"name": "constant"})
    options = {"max_steps": 40, "callbacks": [recorder], "enable_checkpointing": False}
    _trainer(tmp_path, **options).fit(module, _tokens(8), _tokens(8))
    assert recorder.losses[-1] < 0.7 * recorder.losses[0]


def test_a_classifier_of_any_kind(tmp_path):
    torch.manual_seed(0)
    data = DataLoader([(torch.randn(3), index % 2) for index in range(8)], batch_size=4)
    module = GoldyModule(nn.Linear(3, 2), objective=ClassifierObjective())
    trainer = _trainer(tmp_path)
    trainer.fit(module, data, data)
    assert {"train/loss", "train/accuracy", "val/loss", "val/accuracy"} <= set(trainer.callback_metrics)
    assert not any("perplexity" in name for name in trainer.callback_metrics)
    assert not list(tmp_path.rglob("config.json")), "a module of another kind has no pretrained form"


def test_an_objective_without_logits_logs_its_loss(tmp_path):
    objective = FunctionObjective(lambda model, batch: model(batch).square().mean())
    trainer = _trainer(tmp_path, enable_checkpointing=False)
    data = DataLoader(torch.randn(8, 3), batch_size=4)
    trainer.fit(GoldyModule(nn.Linear(3, 2), objective=objective), data, data)
    assert {name for name in trainer.callback_metrics if name.startswith("train/")} == {
        "train/loss",
        "train/loss_epoch",
        "train/learning_rate",
    }


def test_a_named_classifier_gets_its_head():
    module = GoldyModule({**VOCABULARY, "num_labels": 3, "pad_token_id": 0}, objective="classifier")
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.long), "labels": torch.tensor([0, 2])}
    assert module.objective.logits_and_targets(module.model, batch).logits.shape == (2, 3)


def test_batches_longer_than_the_positions_are_refused_before_training(tmp_path):
    with pytest.raises(ValueError, match="40 tokens, but the model has only 32 positions"):
        _trainer(tmp_path).fit(GoldyModule(VOCABULARY), _tokens(8), _tokens(40))


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (None, {}, ValueError, "got None.*load_from_checkpoint"),
        ("", {}, ValueError, "name, a folder"),
        (nn.ReLU(), {}, ValueError, "ReLU has no parameters"),
        (VOCABULARY, {"objective": "causal"}, ValueError, "unknown objective 'causal'.*causal_lm"),
        (VOCABULARY, {"objective": object()}, TypeError, "object is no objective"),
        (VOCABULARY, {"optimizer": {"lr": 1}}, ValueError, "unknown option optimizer.lr.*learning_rate"),
        (VOCABULARY, {"optimizer": 0.1}, TypeError, "optimizer must be OptimizerOptions"),
        (VOCABULARY, {"dtype": "half"}, ValueError, "unknown dtype 'half'.*float16"),
        (VOCABULARY, {"lora": {"rank": 0}}, ValueError, "lora.rank"),
    ],
)
def test_bad_arguments_are_refused(model, options, error, message):
    with pytest.raises(error, match=message):
        GoldyModule(model, **options)


@pytest.mark.parametrize("lora", [None, LoraOptions(rank=2)])
def test_a_checkpoint_gives_the_module_back(tmp_path, lora):
    data = AtlasDataModule(batch_size=8)
    module = GoldyModule(CONFIG, lora=lora, optimizer=OptimizerOptions(betas=(0.5, 0.6)), gradient_checkpointing=True)
    trainer = _trainer(tmp_path)
    trainer.fit(module, data)
    loaded = GoldyModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert loaded.optimizer_options == module.optimizer_options
    assert loaded.lora_options == lora
    assert loaded.gradient_checkpointing
    state = loaded.state_dict()
    for name, value in module.state_dict().items():
        assert torch.equal(state[name], value), name


def test_a_checkpoint_of_a_module_object_asks_for_the_object(tmp_path):
    module = GoldyModule(nn.Linear(3, 2), objective="classifier")
    trainer = _trainer(tmp_path)
    data = DataLoader([(torch.ones(3), 1)] * 2, batch_size=2)
    trainer.fit(module, data, data)
    path = trainer.checkpoint_callback.best_model_path
    with pytest.raises(ValueError, match="load_from_checkpoint"):
        GoldyModule.load_from_checkpoint(path)
    loaded = GoldyModule.load_from_checkpoint(path, model=nn.Linear(3, 2))
    assert torch.equal(loaded.model.weight, module.model.weight)
    assert isinstance(loaded.objective, ClassifierObjective)


def test_a_resumed_run_goes_on_with_optimizer_and_schedule(tmp_path):
    def fit(folder, max_steps, **options):
        torch.manual_seed(0)
        recorder = Recorder()
        config = {**VOCABULARY, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        module = GoldyModule(config, optimizer={"learning_rate": 1e-2}, schedule={"name": "constant"})
        trainer = _trainer(tmp_path, max_steps=max_steps, callbacks=[recorder], enable_checkpointing=False)
        trainer.fit(module, _tokens(6, 7), _tokens(6), **options)
        trainer.save_checkpoint(tmp_path / f"{folder}.ckpt")
        return recorder.losses

    whole = fit("whole", 4)
    fit("first", 2)
    assert fit("second", 4, ckpt_path=tmp_path / "first.ckpt") == whole[2:]


def test_a_given_model_keeps_its_mode():
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=4, vocab_size=8, n_positions=8)).eval()
    assert not GoldyModule(model).model.training


@pytest.mark.parametrize(
    ("objective", "model", "kind"),
    [
        (
            "seq2seq",
            {"model_type": "t5", "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2},
            "seq2seq",
        ),
        (
            "masked_lm",
            {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
            "tokens",
        ),
        (
            "token_classifier",
            {"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
            "tokens",
        ),
    ],
)
def test_an_objective_by_name_brings_its_head(objective, model, kind):
    special = {"decoder_start_token_id": 0} if objective == "seq2seq" else {}
    module = GoldyModule({**model, **special, "vocab_size": 11}, objective=objective)
    assert task_of(module.model) == kind
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    batch = {"input_ids": ids, "labels": ids % 2}
    module.eval()
    own = module.model(**batch).loss.item()
    assert module.objective.loss(module.model, batch).item() == pytest.approx(own, rel=1e-6)
    assert module.hparams["objective"] == objective
    # The same model as an object needs no name.
    given = GoldyModule(module.model)
    assert given.objective.loss(given.model, batch).item() == pytest.approx(own, rel=1e-6)
