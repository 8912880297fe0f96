"""Models from names, folders and configurations."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from lightning_goldy.data import byte_tokenizer
from lightning_goldy.training import models
from lightning_goldy.training.models import (
    LoraOptions,
    add_lora,
    build_model,
    check_config,
    check_vocabulary,
    complete_config,
    enable_gradient_checkpointing,
    load_model,
    position_limit,
)

TINY = {"model_type": "gpt2", "vocab_size": 16, "n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 12}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"n_layer": 2}, "needs 'model_type'.*n_layer"),
        ({"model_type": "gtp2"}, "unknown model_type 'gtp2'.*gpt2"),
        ({**TINY, "n_layers": 2}, "unknown key 'n_layers' in the gpt2 configuration.*'n_layer'"),
        ({**LLAMA, "n_layer": 2}, "unknown key 'n_layer' in the llama configuration"),
    ],
)
def test_configuration_is_checked(config, message):
    with pytest.raises(ValueError, match=message):
        check_config(config)


def test_aliases_and_common_keys_are_known():
    check_config({"model_type": "gpt2", "hidden_size": 8, "num_hidden_layers": 1, "attn_implementation": "eager"})
    check_config({**LLAMA, "rope_theta": 5e5, "tie_word_embeddings": True, "max_position_embeddings": 64})


def test_the_tokenizer_completes_what_is_missing_and_nothing_else():
    tokenizer = byte_tokenizer()
    config = complete_config({"model_type": "gpt2", "pad_token_id": 7}, tokenizer)
    assert config["vocab_size"] == len(tokenizer) == 258
    assert (config["eos_token_id"], config["pad_token_id"], config["bos_token_id"]) == (tokenizer.eos_token_id, 7, None)
    assert complete_config({"model_type": "gpt2", "vocab_size": 300}, tokenizer)["vocab_size"] == 300


def test_without_a_tokenizer_the_vocabulary_stays_unknown():
    assert "vocab_size" not in complete_config({"model_type": "gpt2"}, None)


def test_models_come_in_training_mode(tmp_path):
    built = build_model(complete_config(TINY, None))
    assert built.training
    built.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).training


def test_dtype_and_head(tmp_path):
    model = build_model(complete_config({**TINY, "num_labels": 3, "pad_token_id": 0}, None), "sequence_classification")
    assert model(torch.ones(2, 4, dtype=torch.long)).logits.shape == (2, 3)
    build_model(complete_config(TINY, None), dtype="bfloat16").save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).dtype == torch.float32
    assert load_model(str(tmp_path), dtype="auto").dtype == torch.bfloat16


def test_a_missing_model_names_both_places(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"'missing/model' is no local folder \(looked for .*hub failed"):
        load_model("missing/model")


def test_a_missing_model_is_told_in_one_line_with_the_nearest_folder(tmp_path, monkeypatch):
    (tmp_path / "finetuned").mkdir()

    def fail(*_, **__):
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(models.AUTO_CLASSES["causal_lm"], "from_pretrained", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no local folder") as raised:
        load_model("finetune")
    told = str(raised.value)
    assert "\n" not in told
    assert "give a folder of save_pretrained, or a name on the hub. Did you mean finetuned? " in told
    assert told.endswith("The hub's reason: We couldn't connect to the hub. Check your connection.")
    # What is a path and no name on the hub.
    with pytest.raises(ValueError, match="no local folder") as raised:
        load_model(f"{tmp_path}/finetune")
    told = str(raised.value)
    assert told.endswith(f"or a name on the hub. Did you mean {tmp_path}/finetuned?")
    assert "reason" not in told


def test_a_folder_without_a_model_says_so(tmp_path):
    with pytest.raises(ValueError, match="holds no loadable causal_lm model"):
        load_model(str(tmp_path))


def test_lora_trains_the_adapters_alone_and_starts_as_the_base():
    model = build_model(complete_config(TINY, None)).eval()
    ids = torch.arange(10)[None]
    before = model(ids).logits
    adapted = add_lora(model, LoraOptions(rank=2))
    trainable = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    torch.testing.assert_close(adapted(ids).logits, before)


def test_lora_on_wrong_layers_lists_the_right_ones():
    with pytest.raises(ValueError, match=r"target_modules=\['q_proj'\].*c_attn"):
        add_lora(build_model(complete_config(TINY, None)), LoraOptions(target_modules=["q_proj"]))


def test_lora_without_peft_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"lightning-goldy\[lora\]"):
        add_lora(nn.Linear(2, 2), LoraOptions())


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}])
def test_lora_options_refuse(options):
    with pytest.raises(ValueError, match=f"lora.{next(iter(options))}"):
        LoraOptions(**options)


def test_gradient_checkpointing_changes_no_gradient():
    model = build_model(complete_config({**TINY, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, None))
    ids = torch.arange(10)[None]
    model(ids, labels=ids).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    enable_gradient_checkpointing(model)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_gradient_checkpointing_needs_a_model_that_offers_it():
    with pytest.raises(ValueError, match="Linear does not support"):
        enable_gradient_checkpointing(nn.Linear(2, 2))


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    with pytest.raises(ValueError, match="258 tokens but GPT2LMHeadModel only 16"):
        check_vocabulary(build_model(complete_config(TINY, None)), byte_tokenizer())


def test_only_learned_positions_are_a_limit():
    assert position_limit(build_model(complete_config(TINY, None))) == 12
    assert position_limit(build_model(complete_config(LLAMA, None))) is None
    opt = {"model_type": "opt", "vocab_size": 16, "hidden_size": 8, "ffn_dim": 8, "num_hidden_layers": 1}
    opt |= {"num_attention_heads": 2, "max_position_embeddings": 10, "word_embed_proj_dim": 8}
    model = build_model(complete_config(opt, None)).eval()
    assert position_limit(model) == 10
    assert model(torch.ones(1, 10, dtype=torch.long)).logits.shape[1] == 10
