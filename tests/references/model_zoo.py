"""Real classes of transformers at tiny size, one of each family, and a batch that each understands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from tests.references.architecture_models import COMMON, VOCABULARY

_COMMON: dict[str, Any] = {**COMMON, "hidden_size": 16, "intermediate_size": 24, "initializer_range": 0.3}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_WIDE = {**_GROUPED, "head_dim": 4}
_ENDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 1}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.3}
_SHORT = {"vocab_size": VOCABULARY, "hidden_size": 16, "initializer_range": 0.3, **_ENDS}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2}
_FINE = {**_EXPERTS, "moe_intermediate_size": 12}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
_PER_LAYER: dict[str, Any] = {
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
}
_STACKS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "init_std": 0.3,
    **_ENDS,
}


def _without(options: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


ZOO: dict[str, Callable[[], Any]] = {
    "GPT-2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**_GPT, **_ENDS)),
    "Llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "Mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED)),
    "Mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**_GROUPED, num_local_experts=4)),
    "Qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)),
    "Qwen2-MoE": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(**_GROUPED, **_FINE, shared_expert_intermediate_size=12)
    ),
    "Qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_WIDE)),
    "Qwen3-MoE": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**_WIDE, **_FINE)),
    "Qwen3-Next": lambda: hf.Qwen3NextForCausalLM(
        hf.Qwen3NextConfig(
            **_WIDE,
            **_FINE,
            shared_expert_intermediate_size=12,
            layer_types=["linear_attention", "full_attention"],
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=4,
            linear_value_head_dim=4,
        )
    ),
    "OLMoE": lambda: hf.OlmoeForCausalLM(hf.OlmoeConfig(**_GROUPED, **_EXPERTS)),
    "GPT-OSS": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**_WIDE, num_local_experts=4, num_experts_per_tok=2)),
    "EXAONE-MoE": lambda: hf.ExaoneMoeForCausalLM(
        hf.ExaoneMoeConfig(
            **_WIDE,
            **_FINE,
            num_shared_experts=1,
            n_group=1,
            topk_group=1,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            mlp_layer_types=["dense", "sparse"],
        )
    ),
    "Granite-MoE": lambda: hf.GraniteMoeForCausalLM(
        hf.GraniteMoeConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2)
    ),
    "Granite-MoE, shared": lambda: hf.GraniteMoeSharedForCausalLM(
        hf.GraniteMoeSharedConfig(**_GROUPED, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=12)
    ),
    "Aria": lambda: hf.AriaTextForCausalLM(
        hf.AriaTextConfig(**_GROUPED, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    ),
    "HRM": lambda: hf.HrmTextForCausalLM(hf.HrmTextConfig(**_COMMON)),
    "Gemma 2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_WIDE)),
    "Gemma 3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_WIDE)),
    "Gemma 3n": lambda: hf.Gemma3nForCausalLM(
        hf.Gemma3nTextConfig(
            **_WIDE, **_PER_LAYER, laurel_rank=4, altup_num_inputs=2, activation_sparsity_pattern=[0.0, 0.0]
        )
    ),
    "Gemma 4": lambda: hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**_WIDE, **_PER_LAYER, global_head_dim=4)),
    "Phi-3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GROUPED)),
    "Falcon": lambda: hf.FalconForCausalLM(hf.FalconConfig(**_SHORT, num_hidden_layers=2, num_attention_heads=4)),
    "BLOOM": lambda: hf.BloomForCausalLM(hf.BloomConfig(**_SHORT, n_layer=2, n_head=4)),
    "MPT": lambda: hf.MptForCausalLM(
        hf.MptConfig(**_without(_SHORT, "hidden_size"), d_model=16, n_layers=2, n_heads=4, max_seq_len=32)
    ),
    "GPT-J": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**_GPT, **_ENDS, rotary_dim=4)),
    "GPT-Neo": lambda: hf.GPTNeoForCausalLM(
        hf.GPTNeoConfig(
            **_SHORT, num_layers=2, num_heads=4, max_position_embeddings=32, attention_types=[[["global", "local"], 1]]
        )
    ),
    "GPT-NeoX": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_COMMON)),
    "OPT": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            **_without(_COMMON, "intermediate_size", "initializer_range"),
            ffn_dim=24,
            word_embed_proj_dim=16,
            init_std=0.3,
        )
    ),
    "Cohere 2": lambda: hf.Cohere2ForCausalLM(hf.Cohere2Config(**_GROUPED)),
    "DeepSeek V2": lambda: hf.DeepseekV2ForCausalLM(hf.DeepseekV2Config(**_COMMON, **_LATENT, topk_method="greedy")),
    "DeepSeek V3": lambda: hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**_COMMON, **_LATENT, n_group=2, topk_group=1)),
    "Jamba": lambda: hf.JambaForCausalLM(
        hf.JambaConfig(
            **_GROUPED,
            **_EXPERTS,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            use_mamba_kernels=False,
            mamba_d_state=4,
            mamba_dt_rank=4,
        )
    ),
    "LFM2": lambda: hf.Lfm2ForCausalLM(hf.Lfm2Config(**_GROUPED, layer_types=["conv", "full_attention"])),
    "Mamba 2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(
            **_SHORT,
            num_hidden_layers=2,
            num_heads=4,
            head_dim=8,
            state_size=4,
            n_groups=2,
            chunk_size=8,
            pad_token_id=0,
        )
    ),
    "RecurrentGemma": lambda: hf.RecurrentGemmaForCausalLM(
        hf.RecurrentGemmaConfig(
            **_without(_WIDE, "max_position_embeddings", "initializer_range"),
            block_types=["recurrent", "attention"],
            lru_width=16,
            attention_window_size=16,
        )
    ),
    "RWKV": lambda: hf.RwkvForCausalLM(
        hf.RwkvConfig(**_SHORT, num_hidden_layers=2, attention_hidden_size=16, intermediate_size=24)
    ),
    "BERT": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_COMMON)),
    "RoBERTa": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_COMMON)),
    "ModernBERT": lambda: hf.ModernBertForSequenceClassification(
        hf.ModernBertConfig(
            **_without(_COMMON, "max_position_embeddings", "initializer_range"),
            cls_token_id=1,
            sep_token_id=1,
            global_attn_every_n_layers=2,
        )
    ),
    "T5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            pad_token_id=0,
            decoder_start_token_id=0,
        )
    ),
    "BART": lambda: hf.BartForConditionalGeneration(
        hf.BartConfig(**_STACKS, max_position_embeddings=32, forced_eos_token_id=None)
    ),
    "ViT": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(
            image_size=16,
            patch_size=8,
            num_labels=2,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ),
    "Whisper": lambda: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(**_STACKS, num_mel_bins=4, max_source_positions=8, max_target_positions=32)
    ),
}


def build_family(family: str, *, seed: int = 0) -> Any:
    """A model of a family, the same for the same seed, in evaluation mode."""
    torch.manual_seed(seed)
    return ZOO[family]().eval()


def batch_for(model: Any) -> dict[str, Any]:
    """Two samples: tokens and their labels, classes, images, or sound and its words."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (2, 7), generator=generator)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator), "labels": torch.tensor([0, 1])}
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(2, 4, 16, generator=generator), "labels": ids}
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if type(model).__name__.endswith("SequenceClassification"):
        return {**batch, "labels": torch.tensor([0, 1])}
    return {**batch, "labels": ids[:, :5] if model.config.is_encoder_decoder else ids}
