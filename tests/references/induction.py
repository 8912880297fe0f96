"""Two-layer models that complete repeated sequences: one built by hand, one trained on the spot."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

TOKENS = 12
_PLACES, _HEAD = 12, 16
_TOKEN, _PLACE, _PREVIOUS, _OUT = (slice(start, start + 12) for start in (0, 12, 24, 36))
KNOWN = ("input->a0.h0.v", "a0.h0->a1.h1.k", "a1.h1->output")
"""Edges that carry which token follows: a head copies the token before, another looks for it and copies its place."""


def built() -> Any:
    """A GPT-2 without norms: head a0.h0 copies the token before, a1.h1 looks for it; all else is small noise."""
    torch.manual_seed(0)
    config = hf.GPT2Config(
        vocab_size=TOKENS, n_embd=48, n_layer=2, n_head=3, n_positions=_PLACES, bos_token_id=0, eos_token_id=0,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = hf.GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0 if name.endswith("bias") else 0.2)
        model.transformer.wte.weight[:, _TOKEN] = torch.eye(TOKENS).double()
        model.transformer.wpe.weight[:, _PLACE] = torch.eye(_PLACES).double()
        model.lm_head.weight[:, _OUT] = 8 * torch.eye(TOKENS).double()
        before = torch.zeros(_PLACES, _PLACES).double()
        before[range(1, _PLACES), range(_PLACES - 1)] = 1
        _attend(model, 0, 0, (_PLACE, before), (_PLACE, torch.eye(_PLACES).double()), writes=_PREVIOUS)
        one = torch.eye(TOKENS).double()
        _attend(model, 1, 1, (_TOKEN, one), (_PREVIOUS, one), writes=_OUT)
    for block in model.transformer.h:
        block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
    model.transformer.ln_f = nn.Identity()
    return model


def _attend(
    model: Any, layer: int, head: int, query: tuple[slice, Tensor], key: tuple[slice, Tensor], *, writes: slice
) -> None:
    attention = model.transformer.h[layer].attn
    for part, (rows, weight) in enumerate((query, key)):
        start = 48 * part + _HEAD * head
        attention.c_attn.weight[rows, start : start + 12] = 4 * weight
    start = 96 + _HEAD * head
    attention.c_attn.weight[_TOKEN, start : start + 12] = torch.eye(12).double()
    attention.c_proj.weight[_HEAD * head : _HEAD * head + 12, writes] = torch.eye(12).double()


def trained(steps: int = 500, *, seed: int = 0, vocabulary: int = 30) -> Any:
    """A GPT-2 of two layers that has learned what follows a token, from pairs repeated in another order."""
    torch.manual_seed(seed)
    config = hf.GPT2Config(
        vocab_size=vocabulary, n_embd=48, n_layer=2, n_head=4, n_positions=24, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model: Any = hf.GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        ids, wanted = _recall(vocabulary)
        logits = model(input_ids=ids).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits[wanted], ids[:, 1:][wanted])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _recall(vocabulary: int) -> tuple[Tensor, Tensor]:
    """Eight different tokens, then tokens of them with their successors in any order; where the successors are due."""
    drawn = torch.rand(64, vocabulary).argsort(1)[:, :8]
    places = torch.rand(64, 7).argsort(1)[:, :6]
    again = torch.stack([drawn.gather(1, places), drawn.gather(1, places + 1)], dim=-1).flatten(1)
    wanted = torch.zeros(64, 19, dtype=torch.bool)
    wanted[:, 8::2] = True
    return torch.cat([drawn, again], dim=1), wanted
