"""Every class that transformers lists for a task, at a tiny size: the chosen objective's loss is the model's own."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.auto import modeling_auto

from lightning_goldy.core.objective import check_own_loss, objective_for
from lightning_goldy.core.tasks import task_of

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "d_model": 16,
    "n_embd": 16,
    "emb_dim": 16,
    "embedding_size": 16,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "ffn_dim": 16,
    "d_ff": 16,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "n_head": 2,
    "n_heads": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
TASKS = ("CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "TOKEN_CLASSIFICATION", "SEQUENCE_CLASSIFICATION")
# Takes the source for the decoder's input where a batch has none, though its own function makes it from the labels.
TOLD_APART = {"FSMTForConditionalGeneration"}
LEAST = {"CAUSAL_LM": 50, "SEQ_TO_SEQ_CAUSAL_LM": 8, "MASKED_LM": 15, "TOKEN_CLASSIFICATION": 30}


def tiny(kind: type) -> Any:
    """A model of a class, or None where these sizes do not make a small one of it."""
    config_class = kind.config_class
    if config_class is None or config_class.sub_configs:
        return None
    known = config_class()
    config = config_class(**{key: value for key, value in SMALL.items() if hasattr(known, key)})
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    torch.manual_seed(0)
    return kind(config).eval() if size < 1e6 else None


def batch_for(model: nn.Module) -> dict[str, Any]:
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
    labels = {
        "classes": torch.tensor([0, 1]),
        "causal_lm": ids,
        "tokens": ids % 2 if "Token" in type(model).__name__ else ids.flip(1),
    }
    return {"input_ids": ids, "labels": labels.get(task_of(model) or "", ids.flip(1))}


def runnable(name: str) -> Any:
    # What cannot be built or run at this size, with text alone, shows nothing about the objective.
    with contextlib.suppress(Exception), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = tiny(getattr(hf, name))
        own = None if model is None else model(**batch_for(model)).loss
        return model if own is not None and bool(own.isfinite()) else None
    return None


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_loss_is_the_models_own_or_the_class_is_refused(task: str) -> None:
    names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").values()
    same, other = [], {}
    for name in sorted({part for entry in names for part in ([entry] if isinstance(entry, str) else entry)}):
        model = runnable(name)
        if model is None:
            continue
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                check_own_loss(model, objective_for(model), batch_for(model))
                same.append(name)
            except ValueError as error:
                other[name] = str(error)
    assert not other.keys() - TOLD_APART, other
    assert len(same) >= LEAST.get(task, 30), same
