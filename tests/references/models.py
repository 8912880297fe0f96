"""Small models of several real families, built from configs."""

from __future__ import annotations

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 53
_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def _gpt2():
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=VOCABULARY, n_positions=32, **_IDS)
    return GPT2LMHeadModel(config)


def _llama():
    config = LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=16,
        intermediate_size=40,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        **_IDS,
    )
    return LlamaForCausalLM(config)


def _neox():
    config = GPTNeoXConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_size=16,
        intermediate_size=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        **_IDS,
    )
    return GPTNeoXForCausalLM(config)


def _qwen3():
    config = Qwen3Config(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        hidden_size=16,
        intermediate_size=24,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        **_IDS,
    )
    return Qwen3ForCausalLM(config)


def _bert():
    config = BertConfig(
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_size=16,
        intermediate_size=32,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        num_labels=3,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config)


CAUSAL = {"gpt2": _gpt2, "llama": _llama, "gpt_neox": _neox, "qwen3": _qwen3}
FAMILIES = {**CAUSAL, "bert": _bert}


def build(family: str, seed: int = 0) -> torch.nn.Module:
    """A freshly initialised model, the same for a seed, without moving the global random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FAMILIES[family]()


def token_batch(n_samples: int = 6, length: int = 12, *, query: int = 4, padding: int = 0, seed: int = 1) -> dict:
    """Random tokens with a masked query and padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (n_samples, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        mask[:, -padding:] = 0
        ids[:, -padding:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :query] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def class_batch(n_samples: int = 6, length: int = 10, *, classes: int = 3, seed: int = 1) -> dict:
    """Random tokens with a class label."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (n_samples, length), generator=generator)
    labels = torch.randint(0, classes, (n_samples,), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
