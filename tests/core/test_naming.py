from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.utils.data import DataLoader

from lightning_goldy.core.naming import block_of, canonical_name, kind_of, model_class, require_kinds, suggestion
from tests.references.models import build

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@given(
    st.lists(st.sampled_from(["h", "0", "attn", "weight", "my_orig_mod", "_orig_modest"]), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.sampled_from(WRAPPERS)), max_size=4),
)
def test_wrappers_vanish_wherever_they_stand(parts: list[str], wrappers: list[tuple[int, str]]) -> None:
    name = ".".join(parts)
    wrapped = list(parts)
    for position, wrapper in wrappers:
        # A wrapper holds a module, so it never comes last.
        wrapped.insert(min(position, len(wrapped) - 1), wrapper)
    assert canonical_name(".".join(wrapped)) == name
    assert canonical_name(name) == name


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("gpt2", {"embeddings", "transformer.h.0", "transformer.h.1", "final"}),
        ("llama", {"embeddings", "model.layers.0", "model.layers.1", "final", "head"}),
        ("gpt_neox", {"embeddings", "gpt_neox.layers.0", "gpt_neox.layers.1", "final", "head"}),
        ("qwen3", {"embeddings", "model.layers.0", "model.layers.1", "final", "head"}),
        ("bert", {"embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "head", "other"}),
    ],
)
def test_blocks_of_real_models(family: str, expected: set[str]) -> None:
    assert {block_of(name) for name, _ in build(family).named_parameters()} == expected


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("transformer.h.0.attn.c_attn.weight", "attention"),
        ("transformer.h.0.attn.c_proj.bias", "attention"),
        ("transformer.h.0.mlp.c_proj.weight", "mlp"),
        ("transformer.h.0.ln_1.weight", "norm"),
        ("transformer.ln_f.bias", "norm"),
        ("transformer.wpe.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("gpt_neox.layers.3.attention.query_key_value.weight", "attention"),
        ("gpt_neox.layers.3.attention.dense.weight", "attention"),
        ("gpt_neox.layers.3.mlp.dense_4h_to_h.weight", "mlp"),
        ("gpt_neox.embed_in.weight", "embedding"),
        ("embed_out.weight", "head"),
        ("model.layers.0.self_attn.k_norm.weight", "norm"),
        ("model.layers.0.mlp.gate_proj.weight", "mlp"),
        ("model.layers.0.post_attention_layernorm.weight", "norm"),
        ("bert.encoder.layer.0.attention.self.query.weight", "attention"),
        ("bert.encoder.layer.0.attention.output.dense.weight", "attention"),
        ("bert.encoder.layer.0.attention.output.LayerNorm.weight", "norm"),
        ("bert.encoder.layer.0.intermediate.dense.weight", "mlp"),
        ("bert.encoder.layer.0.output.dense.bias", "mlp"),
        ("model.decoder.layers.0.fc1.weight", "mlp"),
        ("model.decoder.layers.0.self_attn.out_proj.weight", "attention"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "attention"),
        ("base_model.model.h.0.mlp.c_fc.lora_B.default.weight", "mlp"),
        ("0.weight", "other"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_class_names_seen_through_compilation() -> None:
    assert model_class(torch.compile(nn.Linear(1, 1), backend="eager")) == "Linear"

    class FSDPLike(nn.Module):
        """Its own name, no FSDP2."""

    assert model_class(FSDPLike()) == "FSDPLike"


def test_suggestions_put_the_closest_first_and_cut_long_lists() -> None:
    assert suggestion("zzz", ["gradient", "taylor"]) == "Valid: gradient, taylor"
    long = suggestion("name7", (f"name{index}x" for index in range(50)))
    assert long.startswith("did you mean 'name7x'? Valid: name0x, ")
    assert long.endswith("name39x, ... (50 in all)")


@dataclass(frozen=True)
class Settings:
    count: int = 1
    share: float | None = None
    on: bool = True
    names: Sequence[str] = ()
    order: Literal["up", "down"] | int = "up"
    texts: Iterable[Any] | None = None
    by_name: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        require_kinds(type(self), vars(self))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"count": 2.5}, "count must be a whole number; got 2.5"),
        ({"count": True}, "count must be a whole number; got True"),
        ({"share": "0.1"}, "share must be a finite number; got '0.1'"),
        ({"share": math.nan}, "share must be a finite number; got nan"),
        ({"on": "no"}, "on must be true or false; got 'no'"),
        ({"names": "h.0"}, "names must be a list (items: text); got 'h.0'"),
        ({"names": [1]}, "names must be a list (items: text); got [1]"),
        ({"order": 0.5}, "order must be 'up', 'down' or a whole number; got 0.5"),
        ({"texts": "a.txt"}, "texts must be batches or None; got 'a.txt'"),
        ({"by_name": ["a"]}, "by_name must be a mapping or None; got ['a']"),
    ],
)
def test_settings_of_another_kind_are_told(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=re.escape(told)):
        Settings(**wrong)


def test_settings_of_their_kinds_pass() -> None:
    assert Settings(np.int64(3), np.float32(0.5), False, ["a"], 3, [torch.ones(1)], {"a": "b"}).names == ["a"]
    settings = Settings(share=1, names=(name for name in "ab"), texts=DataLoader([1]))
    assert list(settings.names) == ["a", "b"]  # looking at its kind has taken nothing
