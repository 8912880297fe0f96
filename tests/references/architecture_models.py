"""Small models of every registered family and of others, and checks of what heads own by what the model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_goldy.core.architecture import Architecture, ParameterSlice

VOCABULARY = 67
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
# A head of 12 values where hidden / heads would be 8.
WIDE = {**GROUPED, "head_dim": 12}
OPT = {**{k: v for k, v in COMMON.items() if k != "intermediate_size"}, "ffn_dim": 48, "word_embed_proj_dim": 32}

REGISTERED: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
    ),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED, attention_bias=True)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GROUPED)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**WIDE)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**{**WIDE, "num_key_value_heads": 1})),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**WIDE)),
    "gemma3_text": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**WIDE)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**GROUPED)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**COMMON)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**COMMON)),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT)),
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**COMMON)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**COMMON)),
}
UNREGISTERED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "bloom": (
        lambda: hf.BloomForCausalLM(
            hf.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1)
        ),
        "self_attention.dense",
        "mlp.dense_4h_to_h",
    ),
    "stablelm": (lambda: hf.StableLmForCausalLM(hf.StableLmConfig(**GROUPED)), "self_attn.o_proj", "mlp.down_proj"),
    "olmo": (lambda: hf.OlmoForCausalLM(hf.OlmoConfig(**GROUPED)), "self_attn.o_proj", "mlp.down_proj"),
    "falcon": (
        lambda: hf.FalconForCausalLM(
            hf.FalconConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                bos_token_id=1,
                eos_token_id=1,
            )
        ),
        "self_attention.dense",
        "mlp.dense_4h_to_h",
    ),
}

_SHORT = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 1}
_FALCON = {**_SHORT, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_BIGCODE = {**_SHORT, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
FUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "bloom": (UNREGISTERED["bloom"][0], "self_attention.query_key_value"),
    "falcon, one key": (UNREGISTERED["falcon"][0], "self_attention.query_key_value"),
    "falcon, a key each": (
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**_FALCON, multi_query=False, alibi=True, bias=True)),
        "self_attention.query_key_value",
    ),
    "falcon, grouped": (
        lambda: hf.FalconForCausalLM(hf.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2)),
        "self_attention.query_key_value",
    ),
    "mpt": (
        lambda: hf.MptForCausalLM(
            hf.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4, max_seq_len=32)
        ),
        "attn.Wqkv",
    ),
    "gpt_bigcode, one key": (lambda: hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**_BIGCODE)), "attn.c_attn"),
    "gpt_bigcode, a key each": (
        lambda: hf.GPTBigCodeForCausalLM(hf.GPTBigCodeConfig(**_BIGCODE, multi_query=False)),
        "attn.c_attn",
    ),
    "persimmon": (lambda: hf.PersimmonForCausalLM(hf.PersimmonConfig(**COMMON)), "self_attn.query_key_value"),
}
"""Families whose queries, keys and values are made by one projection, and where that is in a block."""


def build(family: str) -> Any:
    """A model whose every parameter counts: biases and norms start at zero or one, which would hide errors."""
    model = (REGISTERED.get(family) or {**FUSED, **UNREGISTERED}[family][0])()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def lora(family: str, targets: list[str], **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, target_modules=targets, **options)
    model = peft.get_peft_model(build(family), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def token_ids() -> Tensor:
    return torch.randint(2, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=token_ids(), attention_mask=torch.ones(2, 7, dtype=torch.long)).logits


@contextmanager
def changed(parts: tuple[ParameterSlice, ...], change: Callable[[Tensor], Any]) -> Iterator[None]:
    saved = [part.parameter.detach().clone() for part in parts]
    with torch.no_grad():
        for part in parts:
            change(part.of(part.parameter))
    yield
    with torch.no_grad():
        for part, value in zip(parts, saved, strict=True):
            part.parameter.copy_(value)


@contextmanager
def gated(module: nn.Module, columns: list[slice]) -> Iterator[None]:
    def gate(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = args[0].clone()
        for column in columns:
            heads[..., column] = 0
        return (heads, *args[1:])

    handle = module.register_forward_pre_hook(gate)
    yield
    handle.remove()


def concatenated_heads(model: nn.Module, output: nn.Module) -> Tensor:
    seen: list[Tensor] = []
    handle = output.register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    logits(model)
    handle.remove()
    return seen[0].reshape(2, 7, -1)  # [B, T, heads x head_dim]


def columns_of(architecture: Architecture, head: int) -> slice:
    return slice(head * architecture.head_dim, (head + 1) * architecture.head_dim)


def check_output_slices(model: nn.Module, architecture: Architecture) -> None:
    clean = logits(model)
    for block in architecture.blocks:
        for head in range(block.n_heads):
            with gated(block.attention_output, [columns_of(architecture, head)]):
                expected = logits(model)
            with changed(block.output_slice(head), Tensor.zero_):
                found = logits(model)
            assert not torch.allclose(expected, clean, atol=1e-5, rtol=0)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert torch.equal(logits(model), clean)


def check_value_slices(model: nn.Module, architecture: Architecture) -> None:
    clean = logits(model)
    for block in architecture.blocks:
        for group in range(block.n_key_value_heads):
            with gated(block.attention_output, [columns_of(architecture, head) for head in block.query_heads(group)]):
                expected = logits(model)
            with changed(block.value.head_slice(group), Tensor.zero_):
                found = logits(model)
            assert not torch.allclose(expected, clean, atol=1e-5, rtol=0)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def check_query_key_slices(model: nn.Module, architecture: Architecture) -> None:
    for block in architecture.blocks:
        clean = concatenated_heads(model, block.attention_output)
        served = [(block.query, head, {head}) for head in range(block.n_heads)]
        served += [(block.key, group, set(block.query_heads(group))) for group in range(block.n_key_value_heads)]
        for projection, head, expected in served:
            with changed(projection.head_slice(head), lambda view: view.add_(torch.randn_like(view))):
                disturbed = concatenated_heads(model, block.attention_output)
            moved = (disturbed - clean).unflatten(-1, (-1, architecture.head_dim)).abs().amax((0, 1, 3))  # [heads]
            assert {index for index, size in enumerate(moved.tolist()) if size > 1e-4} == expected
            assert {index for index, size in enumerate(moved.tolist()) if size > 0} == expected


def owners_of_rows(model: nn.Module, projection: nn.Module, output: nn.Module, n_heads: int) -> list[tuple[str, int]]:
    """For each output of a fused projection what it makes ("query", "key" or "value"), and the first head it moves.

    It is moved at one position, and what attention makes of it is looked at. A value is all that tells at a single
    token; a key that moves at the first of several tells at the others; a query at its own position only.
    """
    heads: list[Tensor] = []
    output.register_forward_pre_hook(lambda module, args: heads.append(args[0].detach().clone()))
    moved: list[tuple[int, int]] = []

    def move(module: nn.Module, args: Any, made: Tensor) -> Tensor:
        made = made.clone()
        for row, position in moved:
            made[:, position, row] += 1.0
        return made

    projection.register_forward_hook(move)

    def run(length: int, *changes: tuple[int, int]) -> Tensor:
        moved[:] = changes
        with torch.no_grad():
            model(input_ids=token_ids()[:1, :length])
        return heads.pop()[0].unflatten(-1, (n_heads, -1))  # [T, H, D]

    alone, together = run(1), run(5)
    found = []
    for row in range(projection.weight.shape[isinstance(projection, hf.Conv1D)]):
        if (apart := (run(1, (row, 0)) - alone).abs().amax((0, 2))).max() > 1e-6:
            part = "value"
        else:
            part = "key" if (run(5, (row, 0)) - together).abs().max() > 1e-6 else "query"
            apart = (run(5, (row, 4)) - together)[4].abs().amax(-1)
        found.append((part, int((apart > 1e-6).nonzero()[0])))
    return found
